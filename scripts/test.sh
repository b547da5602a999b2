#!/usr/bin/env bash
# Lint and tests. Arguments go to pytest; `bash scripts/test.sh -m slow` runs the slow ones.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
if [ $# -gt 0 ]; then exec pytest "$@"; fi
exec pytest -m "not slow"
