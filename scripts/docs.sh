#!/usr/bin/env bash
# The documentation site, docs/_build/html/index.html. Warnings are errors. `bash scripts/docs.sh -b linkcheck docs docs/_build/links` follows links.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -c "import furo, myst_parser" 2>/dev/null || pip install -q -e '.[docs]'
if [ $# -gt 0 ]; then exec sphinx-build "$@"; fi
exec sphinx-build -W --keep-going -q -b html docs docs/_build/html
