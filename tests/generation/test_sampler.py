"""Any-to-any sampling: schedules, filters, reproducibility, guidance, chaining, in-filling."""

import numpy as np
import pytest
import torch

from egom2p import EgoM2P  # with `generate` bound
from egom2p.errors import UserError
from egom2p.generation.sampler import generate, sample_ids
from egom2p.generation.schedule import TargetArgs
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import ModelArgs

MODALITIES = ModalitySet([Modality("rgb", 50, (3, 2, 2)), Modality("depth", 40, (3, 2, 2)), Modality("cam", 30, (10,))])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2, embedding_std=1.0)).eval()
    with torch.no_grad():
        for head in made.heads.values():
            head.weight.mul_(30)
    return made


def rgb(count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (count, 3, 2, 2))


@pytest.mark.parametrize("steps", [1, 3, 5, 30, 40])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_step_sizes(steps, kind):
    sizes = TargetArgs(steps=steps, step_sizes=kind).sizes(30)
    assert sum(sizes) == 30
    assert len(sizes) == min(steps, 30)
    assert min(sizes) >= 1


def test_linear_sizes_are_the_released_ones():
    """Differences of an integer linspace, largest first: 5120 tokens in 3 steps, 30 in 4."""
    assert TargetArgs(steps=3).sizes(5120) == [1707, 1707, 1706]
    assert TargetArgs(steps=4).sizes(30) == [8, 8, 7, 7]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_head_takes_a_few_positions_at_a_time(model, steps, monkeypatch):
    """Whatever fits in memory: the same ids, confidences and mean codes."""
    recipe = {"cam": TargetArgs(steps=steps, order="maskgit", guidance=1.5, top_p=0.9)}
    codes = {"cam": torch.randn(model.modalities.by_name("cam").vocab_size, 3)}
    whole = generate(model, {"rgb": rgb()}, recipe, codes=codes)
    monkeypatch.setattr("egom2p.generation.sampler.LOGITS_AT_ONCE", 2 * 7 * len(codes["cam"]))
    parts = generate(model, {"rgb": rgb()}, recipe, codes=codes)
    assert np.array_equal(parts.tokens["cam"], whole.tokens["cam"])
    assert np.allclose(parts.confidence["cam"], whole.confidence["cam"], atol=1e-5)
    assert torch.allclose(parts.expected["cam"], whole.expected["cam"], atol=1e-5)


@pytest.mark.parametrize("order", ["roar", "maskgit", "raster"])
@pytest.mark.parametrize("steps", [1, 4])
def test_every_scheme_fills_every_position(model, order, steps):
    made = generate(model, {"rgb": rgb()}, {"cam": TargetArgs(steps=steps, order=order, guidance=1.5)})
    assert made.tokens["cam"].shape == (4, 10)
    assert made.tokens["cam"].min() >= 0
    assert (made.confidence["cam"] > 0).all()


def test_a_clip_does_not_depend_on_its_batch(model):
    args = {"cam": TargetArgs(steps=3, guidance=2.0, top_p=0.9), "depth": TargetArgs(steps=2, temperature=0.7)}
    keys = ["a", "b", "c", "d"]
    together = generate(model, {"rgb": rgb()}, args, seed=5, keys=keys)
    for i, key in enumerate(keys):
        alone = generate(model, {"rgb": rgb()[i : i + 1]}, args, seed=5, keys=[key])
        for name in args:
            assert np.array_equal(alone.tokens[name][0], together.tokens[name][i])
    other = generate(model, {"rgb": rgb()}, args, seed=6, keys=keys)
    assert not np.array_equal(other.tokens["cam"], together.tokens["cam"])


def test_chained_targets_join_the_condition(model):
    greedy = TargetArgs(temperature=0.0)
    chained = generate(model, {"rgb": rgb()}, {"depth": greedy, "cam": greedy})
    by_hand = generate(model, {"rgb": rgb(), "depth": chained.tokens["depth"]}, {"cam": greedy})
    assert np.array_equal(chained.tokens["cam"], by_hand.tokens["cam"])
    alone = generate(model, {"rgb": rgb()}, {"cam": greedy})
    assert not np.array_equal(chained.tokens["cam"], alone.tokens["cam"])


def test_infilling_keeps_what_is_known(model):
    given = np.random.default_rng(1).integers(0, 30, (4, 10))
    known = np.zeros((4, 10), bool)
    known[:, :5] = True
    made = generate(model, {"rgb": rgb(), "cam": given}, {"cam": TargetArgs(steps=2)}, known={"cam": known})
    assert np.array_equal(made.tokens["cam"][:, :5], given[:, :5])
    assert (made.confidence["cam"][:, :5] == 1).all()


def test_expected_codes_are_the_mean_over_the_distribution(model):
    codes = torch.randn(30, 3)
    made = generate(model, {"rgb": rgb()}, {"cam": TargetArgs(temperature=0.0)}, codes={"cam": codes})
    everything = {"rgb": torch.ones(4, 12, dtype=torch.bool)}
    with torch.no_grad():
        logits = model.masked_logits({"rgb": torch.from_numpy(rgb()), "cam": torch.zeros(4, 10, dtype=torch.long)},
                                     everything,
                                     {"cam": torch.ones(4, 10, dtype=torch.bool)})["cam"].view(4, 10, 30)
    assert torch.allclose(made.expected["cam"], logits.softmax(-1) @ codes, atol=1e-5)
    assert np.array_equal(made.tokens["cam"], logits.argmax(-1).numpy())


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    uniform = torch.linspace(0, 1, 20_001)[:-1]
    ids = sample_ids(logits.expand(len(uniform), -1), uniform, 1.0)
    assert np.allclose(np.bincount(ids, minlength=4) / len(ids), [0.5, 0.3, 0.15, 0.05], atol=1e-3)
    nucleus = sample_ids(logits.expand(len(uniform), -1), uniform, 1.0, top_p=0.6)
    assert np.allclose(np.bincount(nucleus, minlength=4) / len(ids), [0.625, 0.375, 0, 0], atol=1e-3)
    best_two = sample_ids(logits.expand(len(uniform), -1), uniform, 1.0, top_k=2)
    assert best_two.max() == 1
    cold = sample_ids(logits.expand(len(uniform), -1), uniform, 0.01)
    assert (cold == 0).float().mean() > 0.999


def test_partial_nucleus_equals_the_full_sort():
    """At 5 000 classes the nucleus is found without sorting all of them; the sample is the same."""
    torch.manual_seed(0)
    for scale in (0.1, 3.0, 10.0):
        logits, uniform = scale * torch.randn(64, 5000), torch.rand(64)
        probabilities = logits.softmax(-1)
        values, order = probabilities.sort(descending=True)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, values.cumsum(-1) - values < 0.8)
        full = sample_ids(logits.masked_fill(~keep, float("-inf")), uniform, 0.5)
        assert torch.equal(sample_ids(logits, uniform, 0.5, top_p=0.8), full)


def test_unknown_modality_is_one_line(model):
    with pytest.raises(UserError, match="no modality 'sound'"):
        generate(model, {"rgb": rgb()}, {"sound": TargetArgs()})


def test_library_methods(model):
    """model.encode gives features of the observed positions; model.generate is the sampler."""
    ids = rgb(2)
    ids[0, 0, 0, 0] = -1
    features = model.encode({"rgb": torch.from_numpy(ids)})["rgb"]
    assert features.shape == (2, 12, 24)
    assert features[0, 0].abs().sum() == 0
    assert (features[1].abs().sum(-1) > 0).all()
    alone = model.encode({"rgb": torch.from_numpy(ids[1:])})["rgb"]
    assert torch.allclose(alone[0], features[1], atol=1e-5)
    made = model.generate({"rgb": torch.from_numpy(rgb())}, ["cam"], seed=3)
    assert np.array_equal(made.tokens["cam"], generate(model, {"rgb": rgb()}, {"cam": TargetArgs()},
                                                       seed=3).tokens["cam"])


def test_one_weighted_condition_is_guidance(model):
    grid = rgb()
    a = generate(model, {"rgb": grid}, {"cam": TargetArgs(steps=3, guidance=2.0)}, seed=1)
    b = generate(model, {"rgb": grid}, {"cam": TargetArgs(steps=3, condition_weights={"rgb": 2.0})}, seed=1)
    assert np.array_equal(a.tokens["cam"], b.tokens["cam"])


def test_several_weighted_conditions_add_up(model):
    """One step, greedy: argmax of uncond + sum w (cond - uncond), from three forward passes of our own."""
    grids = {"rgb": rgb(2), "depth": np.random.default_rng(1).integers(0, 40, (2, 3, 2, 2))}
    weights = {"rgb": 1.5, "depth": 0.7}
    made = generate(model, grids, {"cam": TargetArgs(steps=1, temperature=0, condition_weights=weights)})
    everything = {"cam": np.ones((2, 10), bool)}

    def logits(shown: list[str]) -> torch.Tensor:
        inputs = {n: np.ones((2, 12), bool) for n in shown}
        return model.masked_logits({**grids, "cam": np.zeros((2, 10), int)}, inputs, everything)["cam"]

    with torch.no_grad():
        plain = logits([])
        expected = plain + sum(w * (logits([n]) - plain) for n, w in weights.items())
    assert np.array_equal(made.tokens["cam"].reshape(-1), expected.argmax(-1).numpy())
    with pytest.raises(UserError, match="not given"):
        generate(model, {"rgb": rgb(2)}, {"cam": TargetArgs(condition_weights={"depth": 1.0})})
    with pytest.raises(ValueError, match="not both"):
        TargetArgs(guidance=2.0, condition_weights={"rgb": 1.0})


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_reusing_the_condition_is_exact_in_one_step(model, guidance):
    """With no target token visible there is nothing to encode together; later steps are an approximation."""
    recipes = [{"cam": TargetArgs(steps=1, guidance=guidance, temperature=0, reuse_condition=reuse)}
               for reuse in (False, True)]
    a, b = (generate(model, {"rgb": rgb()}, r) for r in recipes)
    assert np.array_equal(a.tokens["cam"], b.tokens["cam"])
    assert np.allclose(a.confidence["cam"], b.confidence["cam"], atol=1e-5)
    many = generate(model, {"rgb": rgb()}, {"cam": TargetArgs(steps=4, guidance=guidance, reuse_condition=True)})
    assert many.tokens["cam"].min() >= 0


def test_several_samples(model):
    from egom2p.generation.sampler import generate_samples

    args = {"cam": TargetArgs(steps=2)}
    draws = generate_samples(model, {"rgb": rgb(3)}, args, 4, seed=2, keys=["a", "b", "c"])
    first = generate(model, {"rgb": rgb(3)}, args, seed=2, keys=["a", "b", "c"])
    assert np.array_equal(draws[0].tokens["cam"], first.tokens["cam"])
    assert len({d.tokens["cam"].tobytes() for d in draws}) == 4
    assert draws[3].tokens["cam"].shape == (3, 10)


def test_score_is_the_log_likelihood(model):
    tokens = {"rgb": rgb(2), "cam": np.random.default_rng(3).integers(0, 30, (2, 10))}
    shown = {"rgb": np.random.default_rng(4).random((2, 12)) < 0.5}
    asked = {"cam": np.random.default_rng(5).random((2, 10)) < 0.6}
    scores = model.score(tokens, shown, asked)["cam"]
    with torch.no_grad():
        rows = model.masked_logits(tokens, shown, asked)["cam"].log_softmax(-1)
    expected = rows.gather(1, torch.from_numpy(tokens["cam"][asked["cam"]])[:, None])[:, 0]
    assert scores.shape == (2, 10)
    assert torch.isnan(scores[~torch.from_numpy(asked["cam"])]).all()
    assert torch.allclose(scores[torch.from_numpy(asked["cam"])], expected, atol=1e-5)
