"""Fixtures shared by all tests. References outside the repository are used when present, and skips say so."""

import atexit
import contextlib
import fcntl
import functools
import io
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.zygote import Forked, Zygote

os.environ.setdefault("WANDB_MODE", "offline")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
# Tests that use the machine as a whole (ports of SLURM's daemons, network namespaces), or some GB of its memory.
ONE_AT_A_TIME = ("test_slurm.py", "test_hosts.py", "test_released_sizes_run_whole")


@pytest.hookimpl(trylast=True)  # when what is not asked for is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, which gives each worker one stretch of the list to begin with: tests of a file stay together,
    so that what they share is made once, and slow ones come first, so that no worker waits for one at the end. Those of
    ONE_AT_A_TIME are all the first worker's, and those that need the small quickstart the second's, so that no other
    waits for them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    alone = [item for item in items if _is_alone(item)]
    slow = [item for item in items if item.get_closest_marker("slow") and not _is_alone(item)]
    quick = [item for item in items if not item.get_closest_marker("slow") and not _is_alone(item)]
    stretches: list[list[pytest.Item]] = [alone, *([] for _ in range(workers - 1))]
    others = stretches[1:] or stretches
    others[0] += [item for item in slow if "finished" in item.fixturenames]
    rest = [item for item in slow if "finished" not in item.fixturenames]
    for _, tests in itertools.groupby(rest, key=lambda item: item.path):
        min(others, key=len).extend(tests)
    left = len(items)
    for number, stretch in enumerate(stretches):  # stretches are cut by number
        room = max(0, left // (workers - number) - len(stretch))
        stretch += quick[:room]
        del quick[:room]
        left -= len(stretch)
    stretches[-1] += quick
    items[:] = [item for stretch in stretches for item in stretch]


def _is_alone(item: pytest.Item) -> bool:
    return any(name in item.nodeid for name in ONE_AT_A_TIME)


@pytest.fixture(autouse=True)
def one_at_a_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Keeps other workers' tests of ONE_AT_A_TIME waiting. (xdist's groups do nothing under pytest 9.2.)"""
    if not _is_alone(request.node):
        yield
        return
    with only_one(common_folder(tmp_path_factory) / "one_at_a_time"):
        yield


def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this run of the suite."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def only_one(path: Path):
    """One worker at a time in here: others wait for the lock on the file `path`."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
        raise AssertionError(f"egom2p {' '.join(map(str, args))} returned "
                             f"{code}:\n{out.getvalue()[-2000:]}\n{err.getvalue()[-4000:]}")
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def start_cli(*args: object, **how: object) -> Forked:
    """`egom2p ARGS` as a process of its own: a fork, whose start is quick. how: see `Zygote.start`."""
    return _zygote().start(*args, **how)


def run_ranks(ranks: int, *args: object, code: int = 0) -> str:
    """`egom2p ARGS` by so many processes, which meet as torchrun's do; what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks),
                   "LOCAL_WORLD_SIZE": str(ranks)}
    processes = [start_cli(*args, **meeting, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    printed = [process.communicate(timeout=400)[0] for process in processes]
    assert all(p.returncode == code for p in processes), "\n".join(text[-3000:] for text in printed)
    return printed[0]


def start_torchrun(processes: int, *args: object, launcher: tuple[str, ...] = (), prefix: tuple[str, ...] = (),
                   output: Path | None = None, **env: str) -> subprocess.Popen:
    """`egom2p ARGS` under torchrun itself, with so many processes and further `launcher` options.
    prefix: a command to start it with, such as `ip netns exec NAME`. Its output goes to the file `output`, or a
    pipe."""
    where = [] if "--nnodes" in launcher else ["--standalone"]
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(processes),
               *launcher, "-m", "egom2p", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=output.open("w") if output else subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10", **env})


@functools.cache
def _zygote() -> Zygote:
    folder = Path(tempfile.mkdtemp())
    zygote = Zygote(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(zygote.close)
    return zygote


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, below `common_folder`, filled by `make(folder)` of the first worker that asks; nobody else writes
    there."""
    with only_one(folder.with_name(f"{folder.name}.lock")):
        if not (done := folder.with_name(f"{folder.name}.done")).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def debug_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random token shards for cfgs/train/debug.yaml, written by the real command."""
    def make(folder: Path) -> None:
        run_cli("shards", "random", "cfgs/train/debug.yaml", "--out", folder, "--count", 40)
        run_cli("shards", "index", folder)  # or the first to read it writes one while others copy the folder

    return made_once(common_folder(tmp_path_factory) / "debug_tokens", make)


@pytest.fixture(scope="session")
def reference(debug_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the debug config that nothing disturbed."""
    return made_once(common_folder(tmp_path_factory) / "reference", lambda folder: run_cli(
        "train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={folder / 'run'}", "train.threads=1")
    ) / "run"


@pytest.fixture(scope="session")
def world_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen procedural clips of 24 x 24 pixels."""
    from egom2p.datasets.world import write_world

    folder = tmp_path_factory.mktemp("clips")
    write_world(folder, 16, seed=5, size=24, processes=1)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


TINY = """
include: [{quickstart}]
size: 24
train:
  rooms: {{clips: 40, seed: 1}}
  walks: {{clips: 30, seed: 2, without: [depth]}}
held_out: {{clips: 12, seed: 3}}
test: {{clips: 12, seed: 4}}
tokenizer_overrides: [train.steps=8, train.batch_size=8, optim.warmup_steps=2, log.every=4]
train_overrides: ["modalities.rgb.grid=[5,3,3]", "modalities.depth.grid=[5,3,3]", train.steps=12, train.batch_size=4,
eval.every=6, eval.samples=8,
                  optim.warmup_steps=2, log.every=2, masking.input_tokens=45, checkpoint.every=6]
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A quickstart of seconds: the same stages and YAMLs, few clips and steps. (out, config, video, what it printed.)

    Made once and shared by all workers: a test that writes into it asks for `finished_alone`.
    """
    folder = made_once(common_folder(tmp_path_factory) / "finished", _small_quickstart)
    return folder / "out", folder / "tiny.yaml", folder / "walk.mp4", (folder / "printed.txt").read_text()


@pytest.fixture
def finished_alone(finished, tmp_path_factory):
    """`finished`, for a test that runs the quickstart again in its folder, or reads what such a run rewrites."""
    with only_one(common_folder(tmp_path_factory) / "finished.alone"):
        yield finished


def _small_quickstart(folder: Path) -> None:
    from egom2p.signals.writers import write_video

    for name in ("rgb", "depth"):
        text = (ROOT / f"tokenizers/world_{name}/config.yaml").read_text().replace("[5, 6, 6]", "[5, 3, 3]")
        (folder / f"{name}.yaml").write_text(text)
    lanes = (f"lanes: [[{folder}/rgb.yaml, tokenizers/world_gaze/config.yaml], "
             f"[tokenizers/world_cam/config.yaml, {folder}/depth.yaml]]\n")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(quickstart=ROOT / "cfgs/quickstart.yaml") + lanes)
    video = folder / "walk.mp4"
    write_video(video, np.random.default_rng(0).integers(0, 255, (75, 48, 64, 3)).astype(np.uint8), 25)
    done = run_cli("quickstart", "--out", folder / "out", "--config", config, "--inputs", video)
    (folder / "printed.txt").write_text(done.stdout)
