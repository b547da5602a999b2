"""Stops, full disks, bad numbers, other numbers of processes: what docs/reliability.md promises, through the real
command."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from egom2p.data.tarindex import npy_bytes, write_tar
from egom2p.distributed import World
from egom2p.errors import Preempted, UserError
from egom2p.training.checkpoint import CheckpointArgs, Checkpoints, restore_optimizer
from egom2p.training.log import MetricsLog, read_metrics
from egom2p.training.stop import StopRequest
from tests.conftest import run_cli, run_ranks, start_cli, start_torchrun
from tests.training.test_training import curve, train, weights
from tests.zygote import Forked


def arguments(root: Path, run: Path, *overrides: str) -> tuple[str, ...]:
    return ("train", "cfgs/train/debug.yaml", f"data.root={root}", f"run.dir={run}", "train.threads=1", *overrides)


def wait_for(condition, process: subprocess.Popen | Forked, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)


def forget_after(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`, as if the run had been killed there."""
    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_75(debug_tokens, reference, tmp_path, number):
    run = tmp_path / "run"
    process = start_cli(*arguments(debug_tokens, run, "checkpoint.every=0", "train.steps=20"))
    wait_for(lambda: len(read_metrics(run)) > 2, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == Preempted.EXIT_CODE == 75, output[-2000:]
    assert "stopped as asked after step" in output
    step = json.loads((run / "checkpoints/latest/state.json").read_text())["step"]
    assert 3 <= step < 20
    run_cli(*arguments(debug_tokens, run))
    assert curve(run) == curve(reference)
    assert same_weights(run, reference)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(debug_tokens, reference, tmp_path):
    run = tmp_path / "run"
    process = start_torchrun(2, *arguments(debug_tokens, run, "checkpoint.every=0"))
    wait_for(lambda: len(read_metrics(run)) > 2, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    output = process.communicate(timeout=90)[0]
    assert "stopped as asked after step" in output, output[-3000:]
    assert Checkpoints(run, CheckpointArgs()).newest_whole() is not None
    run_ranks(2, *arguments(debug_tokens, run))
    for ours, theirs in zip(curve(run), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_a_second_signal_ends_at_once(monkeypatch):
    """One that follows at once is the same request, which torchrun hands on to its workers."""
    from egom2p.training import stop as module

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest(World(0, 1, 0, torch.device("cpu"))) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed()
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended
        monkeypatch.setattr(module, "SAME_REQUEST_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def _linear() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _export(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


def test_milestones_are_kept_and_the_copy_is_of_its_own_moment(tmp_path):
    model, optimizer = _linear()
    checkpoints = Checkpoints(tmp_path, CheckpointArgs(keep_last=2, milestone_every=4))
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.fill_(step)
        checkpoints.save(step, _export, model, optimizer, {"fingerprint": ""})
        with torch.no_grad():
            model.weight.fill_(-1)  # training goes on while the thread writes
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]
    for step in (4, 6, 7):
        weights = load_file(tmp_path / f"checkpoints/step_{step:08d}/model.safetensors")
        assert weights["weight"].unique().tolist() == [step]


def test_a_run_that_went_on_before_damaged_checkpoints_keeps_its_own(tmp_path):
    """Of damaged later ones, as many as are kept, none is worth the one just written."""
    model, optimizer = _linear()
    for step in (800, 900):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/state.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, CheckpointArgs(keep_last=2))
    for step in (100, 200, 300):
        checkpoints.save(step, _export, model, optimizer, {"fingerprint": ""})
    checkpoints.wait()
    assert checkpoints.steps() == [200, 300, 800, 900]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_00000300"


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch, caplog):
    """As on NFS, where a file that somebody still has open leaves another in its folder."""
    remove, writes = shutil.rmtree, []

    def refuse(path, *args, **options):
        if Path(path).name == "step_00000001":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, *args, **options)

    model, optimizer = _linear()
    checkpoints = Checkpoints(tmp_path, CheckpointArgs(keep_last=1))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (1, 2, 3):
        checkpoints.save(step, lambda folder, weights: (writes.append(folder), _export(folder, weights)), model,
                         optimizer, {"fingerprint": ""})
    checkpoints.wait()
    assert len(writes) == 3 and checkpoints.steps() == [1, 3]
    assert "step_00000001 cannot be removed" in caplog.text
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_00000003"


def test_whatever_ends_the_writing_thread_ends_the_run(tmp_path):
    def export(folder, weights):
        raise MemoryError("no more")

    model, optimizer = _linear()
    checkpoints = Checkpoints(tmp_path, CheckpointArgs())
    checkpoints.save(1, export, model, optimizer, {"fingerprint": ""})
    with pytest.raises(UserError, match="MemoryError: no more"):
        checkpoints.wait()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_without_links_is_said_before_anything_is_trained(debug_tokens, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    done = run_cli(*arguments(debug_tokens, tmp_path / "run", "train.steps=2"), check=False)
    assert done.returncode == 2 and "without symbolic links" in done.stderr


def test_what_is_loaded_no_longer_lies_in_the_checkpoints_files(tmp_path):
    model, optimizer = _linear()
    checkpoints = Checkpoints(tmp_path, CheckpointArgs())
    checkpoints.save(1, _export, model, optimizer, {"fingerprint": ""})
    checkpoints.wait()
    restore_optimizer(tmp_path / "checkpoints/step_00000001", model, optimizer)
    assert "step_00000001" not in Path("/proc/self/maps").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, or a skip that says why there is none."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True,
                          text=True)
    if done.returncode:
        pytest.skip(f"no small file system to fill: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)])


def _fill(folder: Path, leave: int = 128 * 1024) -> Path:
    """Use up the disk but for a little, in which configurations and metrics fit and a checkpoint does not."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
    return filler


def test_a_disk_that_stays_full_ends_the_run_and_harms_nothing(debug_tokens, reference, small_disk):
    run = small_disk / "run"
    train(debug_tokens, run)
    forget_after(run, 15)
    kept = run / "checkpoints/step_00000015"
    before = {p: p.read_bytes() for p in kept.iterdir()}
    filler = _fill(small_disk)
    done = train(debug_tokens, run, "checkpoint.retry_s=0.5", check=False)
    assert done.returncode == 2
    assert "checkpoint not written" in done.stderr
    assert "No space left" in done.stderr
    assert all(p.read_bytes() == data for p, data in before.items())
    assert (run / "checkpoints/latest").resolve() == kept.resolve()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free + filler.stat().st_size))
    done = train(debug_tokens, run, "checkpoint.retry_s=0.5", check=False)
    assert done.returncode == 2
    assert "free space" in done.stderr
    assert (run / "config.yaml").read_text()
    filler.unlink()
    train(debug_tokens, run)
    assert curve(run) == curve(reference)
    assert same_weights(run, reference)


def test_a_disk_that_is_full_for_a_while_costs_nothing(debug_tokens, reference, small_disk, tmp_path):
    run, said = small_disk / "run", tmp_path / "said"
    filler = _fill(small_disk)
    process = start_cli(*arguments(debug_tokens, run, "checkpoint.retry_s=100"), output=said)
    until = time.time() + 100
    while "trying again in" not in said.read_text() and process.poll() is None and time.time() < until:
        time.sleep(0.2)
    filler.unlink()
    assert process.wait(timeout=200) == 0, said.read_text()[-3000:]
    assert "trying again in" in said.read_text()
    assert curve(run) == curve(reference)
    assert same_weights(run, reference)


def test_metrics_wait_for_a_disk_that_refuses(tmp_path, monkeypatch, caplog):
    from egom2p.training.log import LogArgs

    metrics = MetricsLog(tmp_path, LogArgs(), 0, 3, {}, True)
    metrics.write({"step": 1})
    metrics.path.rename(tmp_path / "away")
    (tmp_path / "metrics.jsonl").mkdir()  # opening it fails
    metrics.write({"step": 2, "loss/x": float("nan")})
    assert "1 lines not written yet" in caplog.text
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "away").rename(metrics.path)
    metrics.write({"step": 3})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss/x": None}, {"step": 3}]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, Path]:
    """Shards in which one clip alone holds id 255 of cam, and a start whose embedding of that id is infinite."""
    root, rng = tmp_path_factory.mktemp("poisoned"), np.random.default_rng(0)
    for name, grid, vocab, dtype in (("rgb", (5, 4, 4), 1000, np.uint16), ("depth", (5, 4, 4), 1000, np.uint16),
                                     ("cam", (30,), 255, np.uint16), ("gaze", (30,), 255, np.uint16)):
        for dataset in ("full", "nodepth", "held_out"):
            arrays = [rng.integers(0, vocab, grid).astype(dtype) for _ in range(40)]
            if name == "cam" and dataset == "full":
                arrays[7][:] = 255
            write_tar(root / "tokens" / name / dataset / "shard-000000.tar",
                      ({"__key__": f"{i:08d}", "npy": npy_bytes(a)} for i, a in enumerate(arrays)))
    run_cli("train", "cfgs/train/debug.yaml", f"data.root={root / 'tokens'}", f"run.dir={root / 'start'}",
            "train.steps=1", "eval.every=0")
    path = (root / "start/checkpoints/latest").resolve() / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.cam.token.weight"][255] = float("inf")
    save_file(tensors, path)
    return root / "tokens", root / "start/checkpoints/latest"


@pytest.mark.slow
def test_bad_numbers_are_left_out_and_named(poisoned, tmp_path, caplog):
    """Steps that show the poisoned id are skipped, named with their sample, and training goes on; two processes
    agree."""
    tokens, start = poisoned
    options = (f"init.from={start}", "eval.every=0", "train.steps=30")
    train(tokens, tmp_path / "one", *options)
    rows = read_metrics(tmp_path / "one")
    bad = [r["step"] for r in rows if r["loss"] is None or r["grad_norm"] is None]
    assert bad
    assert rows[-1]["skipped"] == len(bad) < 10
    assert all(np.isfinite(r["loss"]) for r in rows if r["step"] not in bad)
    final = load_file(tmp_path / "one/checkpoints/latest/model.safetensors")
    assert all(torch.isfinite(v).all() for k, v in final.items() if k != "embeddings.cam.token.weight")
    named = [line for line in caplog.text.splitlines() if "left out: its loss" in line]
    assert len(named) == len(bad)
    train(tokens, tmp_path / "one", *options, f"debug.replay_step={bad[0]}")
    replay = json.loads((tmp_path / f"one/replay_step_{bad[0]}.json").read_text())
    guilty = [r for r in replay["samples"] if r["loss"] is None]
    assert guilty
    assert {(r["dataset"], r["key"]) for r in guilty} == {("full", "00000007")}
    assert all(f"samples {', '.join(str(r['sample']) for r in guilty)} have" in named[0] for r in guilty)
    run_ranks(2, *arguments(tokens, tmp_path / "two", *options))
    assert [r["step"] for r in read_metrics(tmp_path / "two") if r["loss"] is None] == bad


def test_a_run_that_diverges_ends_with_the_last_good_weights(debug_tokens, tmp_path):
    done = train(debug_tokens, tmp_path / "run", "optim.lr=1e30", "optim.clip_norm=0", "train.max_skipped=4",
                 "checkpoint.every=1", "eval.every=0", check=False)
    assert done.returncode == 2
    assert "4 steps in a row had no finite loss" in done.stderr
    assert "debug.replay_step" in done.stderr


def test_replay_repeats_the_step_and_touches_nothing(debug_tokens, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.is_symlink()}
    done = train(debug_tokens, run, "debug.replay_step=18")
    replay = json.loads((run / "replay_step_18.json").read_text())
    logged = next(r for r in read_metrics(reference) if r["step"] == 18)
    assert {k: replay[k] for k in ("loss", "loss/rgb", "loss/cam",
                                   "grad_norm")} == {k: logged[k]
                                                     for k in ("loss", "loss/rgb", "loss/cam", "grad_norm")}
    assert [r["sample"] for r in replay["samples"]] == list(range(17 * 8, 18 * 8))
    assert "step 18: loss" in done.stdout
    after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*")
             if p.is_file() and not p.is_symlink() and "replay" not in p.name}
    assert after == before
    assert train(debug_tokens, run, "debug.replay_step=21", check=False).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-9),
                                                      pytest.param("float32", 1e-4, marks=pytest.mark.slow)])
def test_one_two_four_and_one_process_again(debug_tokens, tmp_path, precision, tolerance):
    """A run that goes on with another number of processes and another micro-batch: the same losses."""
    options = (f"train.precision={precision}", "checkpoint.keep_last=9")
    train(debug_tokens, tmp_path / "whole", *options)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run, symlinks=True)
    for step, processes, micro in ((5, 2, 2), (10, 4, 1), (15, 1, 8)):
        forget_after(run, step)
        if processes == 1:
            train(debug_tokens, run, *options, f"train.micro_batch_size={micro}")
        else:
            run_ranks(processes, *arguments(debug_tokens, run, *options, f"train.micro_batch_size={micro}"))
    ours, theirs = curve(run), curve(tmp_path / "whole")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance), a["step"]


@pytest.mark.slow
def test_four_processes_resume_bitwise(debug_tokens, tmp_path):
    """Above two ranks the order of summation depends on how gradients are grouped; it must not change on resume."""
    run_ranks(4, *arguments(debug_tokens, tmp_path / "whole", "checkpoint.keep_last=9"))
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run, symlinks=True)
    forget_after(run, 10)
    run_ranks(4, *arguments(debug_tokens, run, "checkpoint.keep_last=9"))
    assert curve(run) == curve(tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")


@pytest.mark.slow
def test_sharded_and_replicated_checkpoints_are_the_same_files(debug_tokens, reference, tmp_path):
    """FSDP2 on two processes up to step 10 of one run, from step 10 of another: the same losses, names and shapes."""
    run_ranks(2, *arguments(debug_tokens, tmp_path / "sharded", "train.parallel=fsdp", "checkpoint.keep_last=9"))
    for ours, theirs in zip(curve(tmp_path / "sharded"), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), ours["step"]
    shapes = [{f"{file}/{k}": (v.shape, v.dtype) for file in ("model", "optimizer")
               for k, v in load_file(run / f"checkpoints/latest/{file}.safetensors").items()}
              for run in (tmp_path / "sharded", reference)]
    assert shapes[0] == shapes[1]
    forget_after(tmp_path / "sharded", 10)
    train(debug_tokens, tmp_path / "sharded", "train.parallel=ddp")
    shutil.copytree(reference, tmp_path / "replicated", symlinks=True)
    forget_after(tmp_path / "replicated", 15)
    run_ranks(2, *arguments(debug_tokens, tmp_path / "replicated", "train.parallel=fsdp"))
    for run in ("sharded", "replicated"):
        for ours, theirs in zip(curve(tmp_path / run), curve(reference), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4), (run, ours["step"])


def test_a_failing_rank_shows_its_own_error_and_takes_the_others_down(debug_tokens, tmp_path):
    """One of two ranks is killed in mid-run; nobody hangs."""
    started = time.time()
    process = start_torchrun(2, *arguments(debug_tokens, tmp_path / "run"))
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > 2, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert time.time() - started < 100
    assert "Signal 9" in output or "exitcode: -9" in output.replace(" ", ""), output[-3000:]
