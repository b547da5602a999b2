#!/usr/bin/env bash
# Lint and tests, one worker more than there are cores (many tests wait for processes they start), at most 8.
# Arguments go to pytest: `bash scripts/test.sh -m slow` runs the slow ones, `-n 0` everything in one process, a path
# that file only.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
export OMP_NUM_THREADS=1
# The few tests of several threads sleep where they wait: beside other workers, spinning takes them ten times as long.
export OMP_WAIT_POLICY=PASSIVE
parallel=(-n "$(($(getconf _NPROCESSORS_ONLN) + 1))" --maxprocesses 8 --dist worksteal)
if [ $# -gt 0 ]; then exec pytest "${parallel[@]}" "$@"; fi
exec pytest "${parallel[@]}" -m "not slow"
