"""What one rank alone meets must not cost the others: empty micro-batches, a slow disk, a loader with many tensors."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from egom2p import distributed
from egom2p.config import load
from egom2p.data.loader import BatchPlan, StepDataset, TokenStream, _Parcel, step_loader
from egom2p.data.tarindex import index_tars, read_at, write_tar
from egom2p.data.tokens import load_array
from egom2p.errors import UserError
from egom2p.modalities import ModalitySet
from egom2p.model.attention import newest_flash_attention
from egom2p.training import loop
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT, run_ranks, start_torchrun
from tests.training.test_reliability import arguments, same_weights, small_disk  # noqa: F401
from tests.training.test_training import curve, train


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rank_with_an_empty_micro_batch_still_uses_every_parameter(mode):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "tests.training.empty_ranks", mode], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == ["ok: nothing", "ok: no inputs", "ok: no targets"]


@pytest.mark.slow
def test_ranks_wait_longer_for_a_disk_than_for_each_other(debug_tokens, small_disk, tmp_path):  # noqa: F811
    """Rank 0 tries for 12 seconds to write a checkpoint, where a rank that is silent for 4 counts as lost."""
    run, said = small_disk / "run", tmp_path / "said"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 160 * 1024))
    process = start_torchrun(2, *arguments(debug_tokens, run, "checkpoint.retry_s=100", "train.timeout_s=4"),
                             output=said)
    until = time.time() + 100
    while "trying again in" not in said.read_text() and process.poll() is None and time.time() < until:
        time.sleep(0.2)
    time.sleep(12)
    assert process.poll() is None, said.read_text()[-3000:]
    filler.unlink()
    assert process.wait(timeout=200) == 0, said.read_text()[-3000:]
    assert curve(run)[-1]["step"] == 20


def test_a_step_travels_as_one_tensor(debug_tokens):
    config = load(PretrainConfig, "cfgs/train/debug.yaml", [f"data.root={debug_tokens}"])
    modalities = ModalitySet.from_config(config.modalities)
    stream = TokenStream(config.data, modalities, config.masking, 0)
    steps = StepDataset(stream, len(modalities), BatchPlan(8, 2, 8))
    parcel = _Parcel.of(steps[3])
    assert isinstance(parcel, _Parcel) and parcel.flat.dim() == 1
    left = [v for m in parcel.batch.micro_batches for part in (m.inputs, m.targets) for v in vars(part).values()]
    assert not any(isinstance(v, torch.Tensor) for v in left)
    opened = parcel.open()
    assert len({t.untyped_storage().data_ptr() for m in opened.micro_batches for part in (m.inputs, m.targets)
                for t in vars(part).values() if isinstance(t, torch.Tensor)}) == 1
    here, there = (list(step_loader(steps, range(3, 6), workers)) for workers in (0, 1))
    for ours, theirs in zip(here, there, strict=True):
        assert ours.step == theirs.step and len(ours.micro_batches) == len(theirs.micro_batches) == 4
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert a.numbers.tolist() == b.numbers.tolist() and a.groups.tolist() == b.groups.tolist()
            for part in ("inputs", "targets"):
                for name, value in vars(getattr(a, part)).items():
                    other = getattr(getattr(b, part), name)
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (part, name)


def test_waiting_for_compressed_shards_is_said_once_with_the_cure(debug_tokens, tmp_path, caplog, monkeypatch):
    """The shards as released (.npz), read in the training process, and a limit that any wait exceeds."""
    monkeypatch.setattr(loop, "WAITS_TOO_LONG", 0.0)
    for shard in debug_tokens.rglob("*.tar"):
        entry = index_tars([shard])[0]
        rows = []
        for key, _, offset, size in entry.token_files():
            buffer = io.BytesIO()
            np.savez_compressed(buffer, load_array(read_at(shard, offset, size)))
            rows.append({"__key__": key, "npz": buffer.getvalue()})
        write_tar(tmp_path / "tokens" / shard.relative_to(debug_tokens), rows)
    train(tmp_path / "tokens", tmp_path / "run", "train.steps=3", "eval.every=0", "optim.warmup_steps=0")
    said = [line for line in caplog.text.splitlines() if "waiting for data" in line]
    assert len(said) == 1 and "egom2p shards convert" in said[0] and "data.workers" in said[0]


SILENT = """
import os, signal, time
import egom2p.distributed as distributed
distributed.SILENCE_MARGIN_S = 1
with distributed.process_group(600) as world:
    distributed.barrier()
    distributed.shorten_timeout(2)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)  # as a host that waits for its device, where no collective of the hosts tells it anything
"""


def test_a_rank_that_falls_silent_is_named_by_its_neighbour_also_outside_of_collectives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, "-c", SILENT], stderr=subprocess.PIPE, text=True, cwd=ROOT,
                              env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
                                   "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        said = ranks[0].communicate(timeout=90)[1]
        assert ranks[0].returncode == 1
        assert "egom2p: rank 0: rank 1 of 2 is missing (no heartbeat)" in said
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.parametrize(("installed", "capability", "used"), [
    (["FA3", "FA4"], 9, "FA3"), (["FA3", "FA4"], 10, "FA4"), (["FA3", "FA4"], 8, ""), (["FA4"], 9, ""), ([], 9, "")])
def test_the_flash_attention_that_is_installed_and_for_this_gpu_is_used(monkeypatch, installed, capability, used,
                                                                        caplog):
    def activate(name):
        if name not in installed:
            raise ImportError(f"no {name}")

    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    with caplog.at_level("INFO"):
        assert newest_flash_attention(capability) == used
    assert (f"attention by {used}" in caplog.text) == bool(used)
    assert ("FA3 is not used: no FA3" in caplog.text) == (capability == 9 and not used)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_summed_in_bfloat16_train_as_well(debug_tokens, reference, tmp_path, parallel):
    """Two processes against one: the same losses up to the rounding of the sums, which is there."""
    run_ranks(2, *arguments(debug_tokens, tmp_path / "run", "train.reduce=bfloat16", f"train.parallel={parallel}"))
    for ours, theirs in zip(curve(tmp_path / "run"), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3), ours["step"]
    assert not same_weights(tmp_path / "run", reference)
    done = train(debug_tokens, tmp_path / "x", "train.reduce=bfloat16", "train.precision=float64", check=False)
    assert done.returncode == 2 and "precision float64" in done.stderr


@pytest.mark.slow
def test_compiled_blocks_train_on_several_processes(debug_tokens, reference, tmp_path):
    """What the base recipe does under torchrun, packs filled up: two processes with train.compile against one without.
    (FSDP2 was seen to agree too; compiling twice takes minutes of the suite.)"""
    run_ranks(2, *arguments(debug_tokens, tmp_path / "run", "train.compile=true", "model.fill_to=64"))
    for ours, theirs in zip(curve(tmp_path / "run"), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), ours["step"]


def test_ranks_whose_data_differ_are_named_before_the_first_step(monkeypatch):
    """As where one host's copy is not whole yet: their orders would deal some samples twice and others never."""
    def gather(said, own):
        said[:] = [own, own, "other data"]

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(UserError, match="rank 2 see others"):
        distributed.check_same_everywhere("data", "{} others")
