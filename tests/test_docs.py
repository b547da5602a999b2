"""The documentation site builds without a warning, and its reference pages say what the code says."""

import subprocess
import sys

import pytest

from egom2p.cli import _parser
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    pytest.importorskip("myst_parser", reason="myst-parser is not installed")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-D",
                           "extensions=myst_parser,sphinx.ext.autodoc",  # without the pages of source code
                           "docs", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    commands = (tmp_path / "html/reference/commands.html").read_text()
    verbs = next(a for a in _parser()._actions if a.dest == "command").choices
    assert all(f"egom2p {verb}" in commands for verb in verbs)
    keys = (tmp_path / "html/reference/configuration.html").read_text()
    for key in ("optim.schedule", "masking.components.NAME.", "init.unfreeze_at", "tokenizer.motion.mean"):
        assert key in keys, key
    modules = (tmp_path / "html/reference/modules.html").read_text()
    assert "egom2p.tokenizers.vidtok" in modules and "Sturm et al." in modules
