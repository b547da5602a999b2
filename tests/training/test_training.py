"""The loop through the real command: invariants 2, 4 and 5, config refusals, logging."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from egom2p.model.egom2p import EgoM2P
from egom2p.training.checkpoint import CheckpointArgs, Checkpoints
from egom2p.training.log import cut_after, read_metrics
from tests.conftest import run_cli, run_ranks, start_cli, start_torchrun

EXACT = ("step", "loss", "loss/rgb", "loss/depth", "loss/cam", "loss/gaze", "lr", "grad_norm", "eval/loss/rgb",
         "eval/loss/cam")


def train(root: Path, run: Path, *overrides: str, check: bool = True):
    return run_cli("train", "cfgs/train/debug.yaml", f"data.root={root}", f"run.dir={run}", "train.threads=1",
                   *overrides, check=check)


def curve(run: Path) -> list[dict]:
    return [{k: m[k] for k in EXACT if k in m} for m in read_metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/latest/model.safetensors")


def test_a_run_leaves_what_the_design_says(reference):
    assert (reference / "config.yaml").exists()
    assert {"commit", "torch", "host", "index_hash"} <= json.loads((reference / "environment.json").read_text()).keys()
    metrics = read_metrics(reference)
    assert {"step", "loss", "loss/rgb", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait_s",
            "peak_memory_gb"} <= metrics[0].keys()
    assert [m["step"] for m in metrics if "eval/loss/rgb" in m] == [10, 20]
    assert metrics[-2]["loss"] < metrics[0]["loss"]
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["latest", "step_00000015", "step_00000020"]
    assert isinstance(EgoM2P.from_pretrained(reference), EgoM2P)


def test_micro_batches_add_up_to_the_global_loss(debug_tokens, reference, tmp_path):
    """Accumulation of 1, 2, 4 and 8 micro-batches: the same losses up to summation order."""
    for micro in (1, 8):
        train(debug_tokens, tmp_path / str(micro), f"train.micro_batch_size={micro}")
        for ours, theirs in zip(curve(tmp_path / str(micro)), curve(reference), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4), ours["step"]


def test_groups_restore_the_released_weights(debug_tokens, tmp_path):
    """group_samples: the first step's loss is the mean over groups of each group's own loss, whatever the
    micro-batch."""
    losses = {}
    for group, micro in ((0, 8), (2, 8), (2, 3), (1, 8)):
        run = tmp_path / f"{group}-{micro}"
        train(debug_tokens, run, "train.steps=1", f"loss.group_samples={group}", f"train.micro_batch_size={micro}",
              "eval.every=0")
        losses[group, micro] = curve(run)[0]["loss"]
    assert losses[2, 8] == pytest.approx(losses[2, 3], rel=1e-5)
    assert losses[2, 8] != pytest.approx(losses[0, 8], rel=1e-3)
    assert losses[1, 8] != pytest.approx(losses[2, 8], rel=1e-3)  # by hand: tests/training/test_values.py


def test_two_processes_equal_one(debug_tokens, reference, tmp_path):
    process = start_torchrun(2, "train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}",
                             f"run.dir={tmp_path / 'run'}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    for ours, theirs in zip(curve(tmp_path / "run"), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), ours["step"]


def test_float64_agrees_to_nine_digits(debug_tokens, tmp_path):
    for micro in (2, 8):
        train(debug_tokens, tmp_path / str(micro), "train.precision=float64", f"train.micro_batch_size={micro}")
    for ours, theirs in zip(curve(tmp_path / "2"), curve(tmp_path / "8"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_workers_change_nothing(debug_tokens, reference, tmp_path):
    train(debug_tokens, tmp_path / "run", "data.workers=2")
    assert curve(tmp_path / "run") == curve(reference)


@pytest.mark.parametrize("pause", [0.0, 0.6])
def test_kill_and_resume_is_bitwise(debug_tokens, reference, tmp_path, pause):
    """kill -9 after the first checkpoint appears (and a little later), start again: the same figures and weights."""
    run = tmp_path / "run"
    arguments = ("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={run}", "train.threads=1")
    process = start_cli(*arguments)
    deadline = time.time() + 120
    while not (run / "checkpoints/latest").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / "checkpoints/latest/state.json").exists()
    run_cli(*arguments)
    assert curve(run) == curve(reference)
    ours, theirs = weights(run), weights(reference)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_interrupted_run_continued_to_a_later_end(debug_tokens, reference, tmp_path):
    """Stopping at a checkpoint and going on is exact, optimiser state included (the schedule's end is unchanged)."""
    run = tmp_path / "run"
    train(debug_tokens, run)
    for name in ("step_00000020", "latest"):
        path = run / "checkpoints" / name
        if path.is_symlink():
            path.unlink()
        else:
            import shutil

            shutil.rmtree(path)
    train(debug_tokens, run)
    assert curve(run) == curve(reference)
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(reference).values(), strict=True))


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(debug_tokens, reference, tmp_path, caplog):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    newest = run / "checkpoints/step_00000020/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    folder, state = Checkpoints(run, CheckpointArgs()).newest_whole()
    assert (folder.name, state["step"]) == ("step_00000015", 15)
    assert "step_00000020 is damaged (model.safetensors)" in caplog.text
    assert (run / "checkpoints/latest").resolve() == folder.resolve()


def test_changed_data_and_changed_config_are_refused(debug_tokens, reference, tmp_path):
    import shutil

    run, root = tmp_path / "run", tmp_path / "tokens"
    shutil.copytree(reference, run, symlinks=True)
    shutil.copytree(debug_tokens, root)
    done = train(debug_tokens, run, "optim.lr=0.5", check=False)
    assert done.returncode == 2
    assert "optim.lr: 0.001 -> 0.5" in done.stderr
    (root / "gaze/full/shard-000000.tar").unlink()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(debug_tokens), str(root)))
    done = train(root, run, "train.steps=22", check=False)
    assert done.returncode == 2
    assert "the data changed" in done.stderr
    done = train(debug_tokens, run, "train.batch_size=9", check=False)
    assert done.returncode == 2


def test_batch_that_does_not_divide_lists_what_would(debug_tokens, tmp_path):
    printed = run_ranks(2, "train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}",
                        "train.batch_size=9", code=2)
    assert "use one of [1, 3, 9] processes" in printed


def test_start_from_an_export_with_modalities_added_and_left_out(debug_tokens, reference, tmp_path):
    run = tmp_path / "run"
    train(debug_tokens, run, f"init.from={reference}", "init.freeze=all", "init.unfreeze=[cam]", "train.steps=3",
          "eval.every=0")
    before, after = weights(reference), weights(run)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"embeddings.cam.token.weight", "embeddings.cam.modality", "heads.cam.weight"}
    done = train(debug_tokens, tmp_path / "other", f"init.from={reference}", "model.dim=24", check=False)
    assert done.returncode == 2
    assert "does not fit this model" in done.stderr


def test_bfloat16_and_checkpointing_train(debug_tokens, reference, tmp_path):
    train(debug_tokens, tmp_path / "b", "train.precision=bfloat16")
    train(debug_tokens, tmp_path / "c", "model.activation_checkpointing=true")
    assert curve(tmp_path / "b")[-2]["loss"] == pytest.approx(curve(reference)[-2]["loss"], rel=0.02)
    for ours, theirs in zip(curve(tmp_path / "c"), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert weights(tmp_path / "b")["mask_token"].dtype == torch.float32


def test_a_cpu_that_only_imitates_bfloat16_is_named(debug_tokens, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("egom2p.training.loop.multiplies_bfloat16", lambda device: True)
    train(debug_tokens, tmp_path / "fast", "train.precision=bfloat16", "train.steps=1")
    assert "bfloat16 products" not in caplog.text
    monkeypatch.setattr("egom2p.training.loop.multiplies_bfloat16", lambda device: False)
    train(debug_tokens, tmp_path / "slow", "train.precision=bfloat16", "train.steps=1")
    assert "this CPU has no bfloat16 products" in caplog.text and "train.precision=float32" in caplog.text


def test_wandb_offline(debug_tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(debug_tokens, tmp_path / "run", "train.steps=2", "log.wandb=true", "eval.every=0")
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(read_metrics(tmp_path / "run")) == 2


class Service:
    """Stands for a Weights & Biases run: keeps what it is told, or fails."""

    def __init__(self, reason: str = "") -> None:
        self.told, self.reason, self.ended = [], reason, False

    def log(self, figures: dict, step: int) -> None:
        if self.reason:
            raise RuntimeError(self.reason)
        self.told.append({"step": step, **figures})

    def finish(self) -> None:
        self.ended = True


def test_wandb_is_told_every_figure(debug_tokens, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setattr("egom2p.training.log.start_wandb", lambda *_: service)
    train(debug_tokens, tmp_path, "train.steps=4", "log.wandb=true", "eval.every=2")
    assert service.told == read_metrics(tmp_path) and service.ended
    assert any("eval/loss/cam" in row for row in service.told)


def test_a_service_that_fails_costs_the_run_nothing(debug_tokens, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("egom2p.training.log.start_wandb", lambda *_: Service("over quota"))
    train(debug_tokens, tmp_path, "train.steps=3", "log.wandb=true", "eval.every=0")
    assert len(read_metrics(tmp_path)) == 3
    assert caplog.text.count("Weights & Biases fails (over quota)") == 1


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    cut_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_no_unreadable_clip_passes_in_silence(debug_tokens, tmp_path):
    """Beyond the stated share of damaged clips the run ends, naming the check command."""
    import os
    import shutil

    root = tmp_path / "tokens"
    shutil.copytree(debug_tokens, root)
    for shard in (root / "rgb").glob("*/shard-*.tar"):
        stat = shard.stat()
        data = bytearray(shard.read_bytes())
        for start in [m.start() for m in re.finditer(b"\x93NUMPY", bytes(data))]:
            data[start : start + 6] = b"broken"
        shard.write_bytes(data)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = train(root, tmp_path / "run", "eval.every=0", check=False)
    assert done.returncode == 2
    assert "egom2p shards check" in done.stderr


def test_released_shards_train_without_conversion(debug_tokens, reference, tmp_path):
    """`.npz` with arr_0 in int32 / int64 under MODALITY/SET/token/: the same run, bit for bit, as from our shards."""
    from benchmarks.loader import write_released

    write_released(debug_tokens, tmp_path / "npz")
    for folder in sorted((tmp_path / "npz").glob("*/*")):
        (folder / "token").mkdir()
        for shard in folder.glob("*.tar"):
            shard.rename(folder / "token" / shard.name)
    paths = [f"data.datasets.{n}.path='[rgb,depth,cam,gaze]/{n}/token/shard-{{000000..000000}}.tar'"
             for n in ("full", "nodepth")]
    train(tmp_path / "npz", tmp_path / "run", *paths, f"eval.root={debug_tokens}")
    assert curve(tmp_path / "run") == curve(reference)
