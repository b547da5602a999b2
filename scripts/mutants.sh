#!/usr/bin/env bash
# Mutation testing: do the tests notice when the code is wrong? Slips of one operator or number are put in one at a time
# and the fast tests that reach them run.
#     bash scripts/mutants.sh geometry             one room or module: egom2p/geometry.py or egom2p/geometry/
#     bash scripts/mutants.sh training 'tests/training/test_values.py tests/training/test_training.py'
#     SAMPLE=100 bash scripts/mutants.sh data      so many slips of the room, drawn by chance (the same ones each time)
# Prints every slip that was not noticed and the share that was. A line that ends in `# pragma: no mutate: REASON` is left alone.
# The tests of a room are tests/ROOM or tests/test_ROOM.py, and every room's tests of values. Minutes a room.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
room=${1:?usage: bash scripts/mutants.sh ROOM [TESTS]}
code=egom2p/$room
[ -d "$code" ] || code=$code.py
tests=${2:-$(for path in "tests/$room" "tests/test_$room.py" tests/*/test_values.py; do
    if [ -e "$path" ]; then echo "$path"; fi
done)}
[ -e "$code" ] && [ -n "$tests" ] || { echo "no room $room, or no tests of it; name them" >&2; exit 2; }
export OMP_NUM_THREADS=1
python - "$code" $tests <<'PYTHON' > setup.cfg
import sys
code, *tests = sys.argv[1:]
beside = ["cfgs", "tokenizers", "scripts", "benchmarks", "docs", "notebooks", "req.txt", "setup.py", "README.md"]
print("[mutmut]", "source_paths=egom2p", f"only_mutate={code if code.endswith('.py') else code + '/*.py'}",
      "also_copy=\n    " + "\n    ".join(beside),
      "pytest_add_cli_args_test_selection=\n    " + "\n    ".join(tests),
      "pytest_add_cli_args=\n    -m\n    not slow\n    -p\n    no:xdist\n    -o\n    addopts=", sep="\n")
PYTHON
rm -rf mutants
chosen=
if [ -n "${SAMPLE:-}" ]; then
    mutmut run none__such > mutants.log 2>&1 || true  # makes the slips and learns which tests reach them
    chosen=$(python scripts/survivors.py --sample "$SAMPLE")
fi
mutmut run --max-children "$(getconf _NPROCESSORS_ONLN)" $chosen || true
mutmut results --all true | python scripts/survivors.py
