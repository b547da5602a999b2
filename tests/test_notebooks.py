"""The notebooks run from top to bottom, and lie in the repository without outputs."""

import json

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_no_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, finished, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("EGOM2P_MODEL", str(finished[0] / "model"))
    monkeypatch.setenv("EGOM2P_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("EGOM2P_STEPS", "20")
    monkeypatch.setenv("EGOM2P_CLIPS", "40")
    notebook = nbformat.read(path, 4)
    (tmp_path / "tokenizers").symlink_to(ROOT / "tokenizers")
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    texts = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert {"predict_and_look": "viewer", "train_on_your_own": "rmse"}[path.stem] in texts
