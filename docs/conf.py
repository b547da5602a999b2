"""The documentation site: `bash scripts/docs.sh` builds it, warnings are errors.

Guide pages are the Markdown files beside this one; the reference pages are generated from the parser, the configuration
dataclasses and the docstrings each time (`docs/reference.py`).
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import reference  # noqa: E402

import egom2p  # noqa: E402

project, author, release = "EgoM2P", "the EgoM2P rebuild", egom2p.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
highlight_language = "none"  # of docstrings; fenced blocks name their own
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
# Docstrings here are plain English with `code` in single backquotes; they are shown as they are, not parsed as reST.
suppress_warnings = ["ref.python", "misc.highlighting_failure"]


def plain(app, what, name, obj, options, lines) -> None:
    """A docstring as a literal block, so that nothing in it is taken for markup."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""] if any(lines) else []


def setup(app) -> None:
    reference.write(HERE / "reference")
    app.connect("autodoc-process-docstring", plain)
