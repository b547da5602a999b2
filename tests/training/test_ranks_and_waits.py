"""What one rank alone meets must not cost the others: empty micro-batches, a slow disk, a loader with many tensors."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from egom2p.config import load
from egom2p.data.loader import BatchPlan, StepDataset, TokenStream, _Parcel, step_loader
from egom2p.modalities import ModalitySet
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT, start_cli
from tests.training.test_reliability import arguments, small_disk  # noqa: F401
from tests.training.test_training import curve


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rank_with_an_empty_micro_batch_still_uses_every_parameter(mode):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "tests.training.empty_ranks", mode], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == ["ok: nothing", "ok: no inputs", "ok: no targets"]


def test_ranks_wait_longer_for_a_disk_than_for_each_other(debug_tokens, small_disk, tmp_path):  # noqa: F811
    """Rank 0 tries for 12 seconds to write a checkpoint, where a rank that is silent for 4 counts as lost."""
    run, said = small_disk / "run", tmp_path / "said"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 160 * 1024))
    process = start_cli(*arguments(debug_tokens, run, "checkpoint.retry_s=100", "train.timeout_s=4"), torchrun=2,
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
