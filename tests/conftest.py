"""Fixtures shared by all tests. References outside the repository are used when present, and skips say so."""

import contextlib
import io
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


def run_cli(*args: object, check: bool = True) -> subprocess.CompletedProcess:
    """`egom2p ARGS` through the real entry point, in this process (importing torch takes seconds)."""
    from egom2p.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in args])
    if check and code:
        raise AssertionError(f"egom2p {' '.join(map(str, args))} returned {code}:\n{out.getvalue()[-2000:]}\n{err.getvalue()[-4000:]}")
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def start_cli(*args: object, torchrun: int = 0, **env: str) -> subprocess.Popen:
    """`egom2p ARGS` as a process of its own, or under torchrun with so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)] if torchrun else []
    command = [sys.executable, *launcher, "-m", "egom2p", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


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
