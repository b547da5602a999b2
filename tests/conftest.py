"""Fixtures shared by all tests. References outside the repository are used when present, and skips say so."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("WANDB_MODE", "offline")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def examples() -> Path:
    """The authors' example recordings (never committed)."""
    folder = SHARED / "data" / "egom2p_examples"
    if not folder.is_dir():
        pytest.skip(f"the example recordings are not at {folder}")
    return folder


def run_cli(*args: object, cwd: Path = ROOT, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """`egom2p ARGS` in a process of its own."""
    command = [sys.executable, "-m", "egom2p", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


@pytest.fixture(scope="session")
def debug_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random token shards for cfgs/train/debug.yaml, written by the real command."""
    root = tmp_path_factory.mktemp("debug") / "tokens"
    run_cli("shards", "random", "cfgs/train/debug.yaml", "--out", root, "--count", 40)
    return root


@pytest.fixture(scope="session")
def world_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen procedural clips of 24 x 24 pixels."""
    from egom2p.data.world import write_world

    folder = tmp_path_factory.mktemp("clips")
    write_world(folder, 16, seed=5, size=24, processes=1)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
