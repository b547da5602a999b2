"""torch.compile does not recompile as lengths vary; model FLOPs against torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from egom2p.data.batch import pack
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.flops import training_flops
from tests.model.test_attention import MODALITIES, SAMPLES, sample


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_flops_agree_with_torch(variant):
    """Forward of one pack; attention apart, which FlopCounterMode counts for some kernels only."""
    args = ModelArgs(24, 4, 2, 3, variant=variant)
    model = EgoM2P(MODALITIES, args)
    batch = pack(SAMPLES, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(batch), batch.targets.modality_counts)
    e, t = batch.inputs.lengths, batch.targets.lengths
    attention = 4 * 24 * (2 * (e.sum(1) ** 2).sum() + 3 * ((t**2).sum() + (e.sum(1) * t.sum(1)).sum()))
    counted = counter.get_total_flops() - sum(v for k, v in counter.get_flop_counts()["Global"].items()
                                              if "attention" in str(k))
    ours = training_flops(args, [m.vocab_size for m in MODALITIES], e, t) / 3 - attention
    assert ours == pytest.approx(counted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fill_to", [0, 16])
def test_compiled_blocks_do_not_recompile_as_lengths_vary(fill_to):
    """Over 60 packs, of other lengths and numbers of samples: as many graphs as after the first three, and the plain
    model's losses. What is traced anew is dynamo's, whatever makes code of it; trainings that are compiled whole are
    in tests/training/test_ranks_and_waits.py."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2))
    compiled = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2, fill_to=fill_to))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="aot_eager")
    rng = np.random.default_rng(0)
    graphs = []
    for step in range(60):
        samples = [sample(i, (int(rng.integers(2, 6)), 2, 1), (int(rng.integers(2, 6)), 3, int(rng.integers(1, 4))), i)
                   for i in range(3 + step % 3)]
        batch = pack(samples, 3)
        losses = []
        for model in (plain, compiled):
            loss, _ = model(batch, torch.full((len(batch.targets),), 0.1))
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[2], graphs
