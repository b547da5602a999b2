"""A training step never asks the device for a value: nothing in it may read a tensor's data on the host.

The CPU's twin of `python -m benchmarks.gpu --sections sync`: every operation that must wait for a GPU's result to
know what to return (item, nonzero, boolean indexing, unique) is refused while a step runs.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import SMALL, small_samples
from egom2p.data.batch import pack
from egom2p.data.loader import StepBatch
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.loop import Loop
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal",
           "allclose")


class NoHostReads(TorchDispatchMode):
    """Raises where the host would need a value the device has not finished computing."""

    METHODS = ("tolist", "numpy", "cpu", "__array__")  # these copy CPU tensors without dispatching

    def __enter__(self):
        self.kept = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name in self.METHODS:
            setattr(torch.Tensor, name, _refuse)
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.kept.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        booleans = name in ("index", "index_put", "index_put_") and any(t is not None and t.dtype == torch.bool
                                                                        for t in args[1])
        if name in WAITING or booleans:
            raise AssertionError(f"host synchronisation in a step: {func}")
        return func(*args, **(kwargs or {}))


def _refuse(tensor, *args, **kwargs):
    raise AssertionError("host synchronisation in a step: a tensor's data is copied to the host")


def test_the_check_notices_host_reads():
    with NoHostReads():
        for wrong in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).all()),
                      lambda x: x.tolist()):
            with pytest.raises(AssertionError, match="host synchronisation"):
                wrong(torch.ones(3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_reads_nothing_back(debug_tokens, tmp_path, checkpointing):
    from egom2p.config import load
    from egom2p.distributed import World
    from egom2p.training.pretraining import PretrainTask

    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml",
                  [f"data.root={debug_tokens}", f"run.dir={tmp_path}", "eval.every=0",
                   f"model.activation_checkpointing={str(checkpointing).lower()}"])
    world = World(0, 1, 0, torch.device("cpu"))
    task = PretrainTask(config, world)
    loop = Loop(config, task, world, tmp_path)
    batches = task.steps(range(2))
    loop._train_step(next(batches), 1e-3)
    batch = next(batches)
    with NoHostReads():
        loop._train_step(batch, 1e-3)
    loop.metrics.close()


def test_odd_batches_read_nothing_back():
    """Single tokens, one modality alone, an empty input side."""
    torch.manual_seed(0)
    model = EgoM2P(SMALL, ModelArgs(32, 2, 1, 1))
    samples = small_samples(1)
    none = type(samples[0].inputs)(*(np.zeros(0, np.int64) for _ in range(3)))
    samples.append(type(samples[0])(9, none, samples[1].targets))
    batch = StepBatch(0, [pack(samples, len(SMALL))]).micro_batches[0]
    scale = torch.ones(len(batch.targets))
    with NoHostReads():
        model(batch, scale)[0].backward()
