"""The worked example of docs/data.md, as written there."""

import json
import re
import sys

import numpy as np

from egom2p import geometry
from egom2p.cli import main
from egom2p.signals.writers import write_video
from tests.conftest import ROOT, run_cli
from tests.datasets.miniature import Miniature
from tests.datasets.test_adapters import SIZE, check, clips_of


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    code = next(block for block in blocks if "class MySet" in block)
    (tmp_path / "my_set.py").write_text(code)
    monkeypatch.chdir(tmp_path)  # where my_set.py lies
    monkeypatch.setattr(sys, "path", list(sys.path))
    mini = Miniature(21, 96, 72, 25)
    folder = tmp_path / "raw/first"
    folder.mkdir(parents=True)
    write_video(folder / "video.mp4", mini.frames[0], 25)
    np.save(folder / "poses.npy", geometry.invert(mini.poses(mini.times)))
    assert main(["prepare", "my_set:MySet", "--root", "raw", "--out", "out", "--size", str(SIZE)]) == 0
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["dataset"] == "my_set"
    check(clips_of(tmp_path / "out", "first"), mini, signals=("rgb", "cam"))
    done = run_cli("prepare", "my_set:Nothing", "--root", tmp_path / "raw", "--out", tmp_path / "x", check=False)
    assert done.returncode == 2
    assert "package.module:Class" in done.stderr
    sys.modules.pop("my_set", None)
