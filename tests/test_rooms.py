"""The house: imports go from higher rooms to lower ones only, and never in a circle."""

import ast
import re
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "egom2p"


def rooms() -> list[list[str]]:
    """The order as `docs/architecture.md` writes it: lowest first, rooms of one line may not import each other."""
    block = re.search(r"```rooms\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    return [line.split() for line in block[1].strip().splitlines()]


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that `path` imports anywhere in it, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {f for f in found if f in known and f != name}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def test_every_module_is_in_the_order_and_imports_only_downwards():
    known = modules()
    level = {room: number for number, line in enumerate(rooms()) for room in line}
    assert {room_of(n) for n in known} == level.keys()
    wrong = []
    for name, path in known.items():
        for other in imports_of(name, path, known):
            mine, theirs = room_of(name), room_of(other)
            if mine != theirs and level[theirs] >= level[mine] and not is_package_door(name, other):
                wrong.append(f"{name} -> {other}")
    assert not wrong


def is_package_door(name: str, other: str) -> bool:
    """`egom2p/__init__.py` opens lazily onto what users want, and any module may ask it for the version."""
    return "egom2p" in (name, other)


def test_no_circle():
    known = modules()
    graph = {n: imports_of(n, p, known) - {"egom2p"} for n, p in known.items() if n != "egom2p"}
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name not in done:
            for other in graph[name]:
                walk(other, [*trail, name])
            done.add(name)

    for name in graph:
        walk(name, [])


def test_the_check_sees_imports_inside_functions(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from egom2p.training.loop import Loop\n    import egom2p.cli\n")
    assert imports_of("egom2p.data.x", path, modules()) == {"egom2p.training.loop", "egom2p.cli"}
