"""Design invariant 4 under fire: killed again and again, on one process and under torchrun, the run is bitwise the
same."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from egom2p.training.log import read_metrics
from tests.conftest import ROOT, run_cli, run_ranks, start_torchrun
from tests.training.test_reliability import arguments, same_weights
from tests.training.test_training import curve

# Small steps: what is tried here is what lies between them.
SMALL = ("eval.every=21", "eval.samples=4", "model.encoder_depth=1", "model.decoder_depth=1", "train.batch_size=4",
         "masking.input_tokens=24", "masking.target_tokens=24")
OPTIONS = ("checkpoint.every=2", *SMALL)


@pytest.mark.slow
def test_fifty_kills_change_nothing(debug_tokens, tmp_path):
    steps = "train.steps=480"
    run_cli(*arguments(debug_tokens, tmp_path / "whole", steps, *SMALL))
    done = subprocess.run([sys.executable, "-m", "tests.training.kill_harness", "cfgs/train/debug.yaml", "55", "1",
                           f"data.root={debug_tokens}",
                           f"run.dir={tmp_path / 'killed'}", "train.threads=1", steps,
                           *OPTIONS], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] >= 50, told
    assert told["moments"].get("inside a save", 0) >= 3, told
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_changes_nothing(debug_tokens, tmp_path):
    """torchrun --nproc-per-node 2 --max-restarts 100, one of the workers killed five times."""
    options = ("train.steps=300", *OPTIONS)
    run_ranks(2, *arguments(debug_tokens, tmp_path / "whole", "train.steps=300", *SMALL))
    run, rng = tmp_path / "killed", random.Random(2)
    process = start_torchrun(2, *arguments(debug_tokens, run, *options), launcher=("--max-restarts", "100"),
                             output=tmp_path / "log")
    kills, seen, deadline = 0, 0, time.time() + 400
    while process.poll() is None and time.time() < deadline:
        steps = len(read_metrics(run))
        if kills < 5 and steps > seen + 20:
            time.sleep(rng.uniform(0, 0.5))
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            if len(workers) == 2:
                os.kill(int(rng.choice(workers)), signal.SIGKILL)
                kills, seen = kills + 1, steps
                time.sleep(1)
        time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert kills == 5
    assert curve(run) == curve(tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")
