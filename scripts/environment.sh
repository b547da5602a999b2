# Sourced by the other scripts: makes .venv from req.txt and setup.py when it is missing or they changed, and enters it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
stamp=.venv/.installed
wanted=$(cat req.txt setup.py | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "making .venv (PyTorch is large: a few minutes the first time)"
    if [ -e .venv/.making ]; then rm -rf .venv; fi  # one that was killed while it was made
    if [ ! -x .venv/bin/python ]; then
        mkdir -p .venv && touch .venv/.making
        "$PYTHON" -m venv .venv
        rm .venv/.making
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install -qq --upgrade pip
    # Modules are compiled when they are first imported: to compile all of them takes two fifths of the time.
    .venv/bin/python -m pip install -qq --no-compile --editable ".[dev]"
    echo "$wanted" > $stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE  # what is compiled is kept
