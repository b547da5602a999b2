"""What mutation testing found: `mutmut results --all true | python scripts/survivors.py`, after `mutmut run`.

Each slip that no test noticed with the line it changed, then the score: the share that was noticed of those that a test
reached, and of all. `--sample N` instead draws N names of the slips that mutmut has made.
"""

import difflib
import json
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

FUNCTION = re.compile(r"^( *)(?:async )?def (\S*__mutmut_(?:orig|\d+))\(", re.M)


@cache
def functions(module: str) -> dict[str, list[str]]:
    """{name: lines} of every variant of every function in a mutated module."""
    path = Path("mutants", *module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text()
    found = list(FUNCTION.finditer(source))
    ends = [m.start() for m in found[1:]] + [len(source)]
    return {m[2]: source[m.end() : end].splitlines() for m, end in zip(found, ends, strict=True)}


def change(name: str) -> str:
    """`was -> is` of a slip."""
    module, _, function = name.rpartition(".")
    variants = functions(module)
    old, new = variants[re.sub(r"__mutmut_\d+$", "__mutmut_orig", function)], variants[function]
    lines = [line for line in difflib.unified_diff(old, new, n=0, lineterm="")
             if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return "  ->  ".join(line[1:].strip() for line in lines[:2])


def sample(count: int) -> list[str]:
    names = [name for path in sorted(Path("mutants").rglob("*.meta"))
             for name in json.loads(path.read_text())["exit_code_by_key"]]
    return random.Random(0).sample(names, min(count, len(names)))


def main() -> None:
    if sys.argv[1:2] == ["--sample"]:
        print("\n".join(sample(int(sys.argv[2]))))
        return
    outcomes: Counter[str] = Counter()
    for line in sys.stdin:
        name, _, outcome = line.strip().partition(": ")
        if not outcome or outcome == "not checked":
            continue
        outcomes[outcome] += 1
        if outcome not in ("killed", "timeout"):
            print(f"{name.split('.')[-1]} ({outcome}): {change(name)}")
    noticed, total = outcomes["killed"] + outcomes["timeout"], sum(outcomes.values())
    reached = total - outcomes["no tests"]
    counts = ", ".join(f"{number} {what}" for what, number in outcomes.items())
    print(f"{counts}: noticed {noticed / max(1, reached):.0%} of {reached} that a test reached, "
          f"{noticed / max(1, total):.0%} of all {total}")


if __name__ == "__main__":
    main()
