"""Run `egom2p train` again and again, killing it at random moments (SIGKILL), until it has been killed so often and is
done.

    python -m tests.training.kill_harness CONFIG KILLS SEED key=value ...

Every life is a fork of a process that has imported everything, so that 50 lives take a minute and not ten; the code it
runs is the command's own. After each kill `checkpoints/latest` must name a checkpoint that loads. Prints one JSON
object: kills, lives, and the moments (what was half-written) that were hit.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401

import egom2p.training.pretraining  # noqa: F401
from egom2p.cli import main

# A life that gets so far is over, so that a run of as many steps as this times the kills cannot be done before them.
STEPS_A_LIFE = 8


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 before the first."""
    latest = run / "checkpoints/latest"
    return int(os.readlink(latest).rpartition("_")[2]) if latest.is_symlink() else 0


def check_latest(run: Path) -> None:
    """`latest` names a whole checkpoint, or there is none yet."""
    latest = run / "checkpoints/latest"
    if not latest.is_symlink():
        return
    state = json.loads((latest / "state.json").read_text())
    for name, digest in state["files"].items():
        assert hashlib.sha256((latest / name).read_bytes()).hexdigest() == digest, f"{latest.resolve()}/{name}"


def live(arguments: list[str], seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
    """One life, killed after `seconds` or when `until` holds; True when it was over before that."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = main(arguments)
        os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the command failed by itself: {status}"
            return True
        if until():
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def run(config: str, kills: int, seed: int, overrides: list[str]) -> dict:
    rng, moments, lives, killed = random.Random(seed), Counter(), 0, 0
    folder = Path(next(o.partition("=")[2] for o in overrides if o.startswith("run.dir=")))
    command = ["train", config, *overrides]
    # How long this machine, with what else it does, takes to a checkpoint; lives are measured by it.
    units = []
    for _ in range(2):
        started, before = time.monotonic(), newest(folder)
        live(command, 1e9, lambda before=before: newest(folder) > before)
        units.append(time.monotonic() - started)
    while True:
        over = killed >= kills
        patience = 1e9 if over else rng.uniform(0.1, 2.2) * min(units)
        enough = 1e9 if over else newest(folder) + STEPS_A_LIFE
        lives += 1
        if live([*command, f"data.workers={rng.choice([0, 0, 1])}"], patience, lambda e=enough: newest(folder) >= e):
            return {"kills": killed, "lives": lives, "moments": dict(moments)}
        killed += 1
        parts = list((folder / "checkpoints").glob(".*.part"))
        moments["inside a save" if parts else "elsewhere"] += 1
        check_latest(folder)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
