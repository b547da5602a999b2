"""Every modality of every train YAML goes through embed, mask, loss and generate."""

import numpy as np
import pytest
import torch

from egom2p.config import load
from egom2p.data.batch import MaskedSample, pack
from egom2p.data.masking import MaskArgs, Masker
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs
from egom2p.modalities import ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.pretraining import PretrainConfig
from tests.conftest import ROOT

TRAIN = sorted((ROOT / "cfgs/train").glob("*.yaml"))
SMALL = ModelArgs(12, 2, 1, 1)


def modality_sets():
    """The distinct modality sets of all train configs."""
    found = {}
    for path in TRAIN:
        modalities = ModalitySet.from_config(load(PretrainConfig, path).modalities)
        found.setdefault(tuple((m.name, m.vocab_size, m.grid) for m in modalities), (path.stem, modalities))
    return list(found.values())


@pytest.mark.parametrize(("name", "modalities"), modality_sets(), ids=lambda v: v if isinstance(v, str) else "")
def test_walk(name, modalities, rng):
    walk(modalities, rng)


def walk(modalities, rng):
    torch.manual_seed(0)
    model = EgoM2P(modalities, SMALL)
    tokens = {i: rng.integers(0, m.vocab_size, m.num_tokens) for i, m in enumerate(modalities)}
    masker = Masker(MaskArgs(120, 120), modalities, seed=0)
    batch = pack([MaskedSample(n, *masker.mask(tokens, n)) for n in range(8)], len(modalities))
    loss, losses = model(batch, torch.full((len(batch.targets),), 1 / len(batch.targets)))
    assert loss.item() == pytest.approx(np.average([np.log(m.vocab_size) for m in modalities],
                                                   weights=batch.targets.modality_counts), rel=0.1)
    assert len(losses) == len(batch.targets)
    loss.backward()
    for index, modality in enumerate(modalities):
        shown, asked = batch.inputs.modality_counts[index], batch.targets.modality_counts[index]
        assert (model.embeddings[modality.name].token.weight.grad.abs().sum() > 0) == (shown > 0)
        assert (model.heads[modality.name].weight.grad.abs().sum() > 0) == (asked > 0)
    first, last = modalities[0], modalities[-1]
    made = generate(model, {first.name: tokens[0].reshape(1, *first.grid)}, {last.name: TargetArgs(steps=2, top_p=0.9)})
    assert made.tokens[last.name].shape == (1, *last.grid)
    assert made.tokens[last.name].min() >= 0
    assert made.tokens[last.name].max() < last.vocab_size


def test_every_kind_of_signal_has_a_measure():
    from egom2p.evaluation.measures import MEASURES, MeasureArgs
    from egom2p.signals import KINDS

    assert MEASURES.keys() == KINDS.keys()
    for make in MEASURES.values():
        assert make(MeasureArgs()).main
