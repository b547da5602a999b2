"""`train.profile` and the collector: looking at a run changes nothing of it."""

import gc
import json

import pytest

from egom2p.training.loop import GARBAGE_STEPS, garbage_collected_by_steps
from egom2p.training.profile import profiled_steps
from tests.conftest import run_cli
from tests.training.test_training import curve, train


def test_a_profiled_run_is_the_same_run(debug_tokens, reference, tmp_path):
    train(debug_tokens, tmp_path, "train.profile=3:4")
    assert curve(tmp_path) == curve(reference)
    trace = json.loads((tmp_path / "profile/rank0.json").read_text())
    steps = [e for e in trace["traceEvents"] if "AdamW.step" in e.get("name", "")]
    assert len(steps) == 2  # one update a step
    assert "Self CPU" in (tmp_path / "profile/rank0.txt").read_text()


@pytest.mark.parametrize(("text", "steps"), [("", []), ("1:1", [1]), ("20:22", [20, 21, 22])])
def test_profiled_steps_are_counted_from_one_and_include_both_ends(text, steps):
    assert list(profiled_steps(text)) == steps


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:2:3"])
def test_a_profile_that_names_no_steps_is_refused(debug_tokens, tmp_path, text):
    done = run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}/run",
                   f"train.profile='{text}'", check=False)
    assert done.returncode == 2 and "profile must be FROM:TO" in done.stderr


def test_garbage_is_collected_by_steps_and_as_before_afterwards(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", collected.append)
    with garbage_collected_by_steps() as collect:
        assert not gc.isenabled()
        for step in range(1, 2 * GARBAGE_STEPS + 1):
            collect(step)
    assert gc.isenabled() and collected == [1, 1]
