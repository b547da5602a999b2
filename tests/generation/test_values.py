"""Which positions a sampler commits when, with what randomness, and what its files say."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from egom2p import geometry
from egom2p.errors import UserError
from egom2p.generation.sampler import _clip_rng, _TargetDecoder, generate, sample_ids
from egom2p.generation.schedule import TargetArgs
from egom2p.modalities import ModalitySet
from egom2p.signals.depth import DEPTH
from egom2p.signals.pose import POSE, PoseJoiner
from egom2p.signals.writers import TumWriter
from tests.generation.test_sampler import model, rgb  # noqa: F401


def test_maskgit_keeps_the_most_confident(model):  # noqa: F811
    """A run of two steps asks for everything in its first; what it commits then keeps the confidence of that look."""
    condition = {"rgb": rgb()}
    at_once = generate(model, condition, {"cam": TargetArgs(1, temperature=0)}).confidence["cam"]
    in_two = generate(model, condition, {"cam": TargetArgs(2, order="maskgit", temperature=0)}).confidence["cam"]
    for sure, mine in zip(at_once, np.isclose(in_two, at_once, rtol=1e-6), strict=True):
        assert set(np.argsort(-sure)[:5]) <= set(np.flatnonzero(mine))
        assert mine.sum() < 10  # the others were asked again, with more to see


def asked_in_steps(model, order: str, monkeypatch) -> np.ndarray:  # noqa: F811
    """(steps, B, asked) positions that each step asks for."""
    seen, own = [], _TargetDecoder._draw
    monkeypatch.setattr(_TargetDecoder, "_draw", lambda self, asked, *how: seen.append(asked) or own(self, asked, *how))
    generate(model, {"rgb": rgb()}, {"cam": TargetArgs(2, order=order)})
    return np.array(seen)


def test_raster_goes_from_the_first_position_to_the_last(model, monkeypatch):  # noqa: F811
    asked = asked_in_steps(model, "raster", monkeypatch)
    assert asked.tolist() == [[list(range(5))] * 4, [list(range(5, 10))] * 4]


def test_random_order_is_random_and_a_clips_own(model, monkeypatch):  # noqa: F811
    asked = asked_in_steps(model, "roar", monkeypatch)
    assert len({tuple(clip) for clip in asked[0]}) > 1
    for first, second in asked.transpose(1, 0, 2):
        assert sorted([*first, *second]) == list(range(10)) and first.tolist() != list(range(5))


def test_random_numbers_depend_on_seed_clip_and_target():
    streams = {name: tuple(_clip_rng(*given).random(4)) for name, given in {
        "own": (0, "a", 0), "seed": (1, "a", 0), "clip": (0, "b", 0), "target": (0, "a", 1)}.items()}
    assert len(set(streams.values())) == 4
    assert streams["own"] == tuple(_clip_rng(0, "a", 0).random(4))


@pytest.mark.parametrize(("schedule", "wanted"), [("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0.5]),
                                                  ("inverse", [2, 1, 2 / 3, 0.5])])
def test_temperatures_by_hand(schedule, wanted):
    assert TargetArgs(4, temperature=2.0, temperature_schedule=schedule).temperatures() == pytest.approx(wanted)


def test_cosine_steps_decode_few_tokens_first_and_many_last():
    sizes = TargetArgs(6, step_sizes="cosine").sizes(100)
    assert sizes == sorted(sizes) and sizes[0] < 10 < sizes[-1]
    left = 100 - np.cumsum(sizes)
    assert left.tolist() == pytest.approx((100 * np.cos(np.pi / 2 * np.arange(1, 7) / 6)).tolist(), abs=1)


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}),
                                                  ({"top_p": 0.45}, {0}), ({}, {0, 1, 2, 3})])
def test_filters_keep_the_likeliest(options, allowed):
    """Probabilities .5 .3 .15 .05; a nucleus holds as few ids as reach its mass."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    uniform = (torch.arange(4000) + 0.5) / 4000
    made = sample_ids(logits, uniform, 1.0, options.get("top_p", 1.0), options.get("top_k", 0))
    assert set(made.tolist()) == allowed
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])[sorted(allowed)]
    shares = torch.bincount(made, minlength=4)[sorted(allowed)] / 4000
    torch.testing.assert_close(shares, weights / weights.sum(), atol=2e-3, rtol=0)


def test_tum_times_go_on_from_part_to_part(tmp_path):
    writer = TumWriter(tmp_path / "cam.tum", 30.0)
    poses = np.tile(np.eye(4), (7, 1, 1))
    poses[:, :3, :3] = Rotation.random(7, random_state=0).as_matrix()
    poses[:, 0, 3] = np.arange(7)
    for part in (poses[:3], poses[3:4], poses[4:]):
        writer.append(part)
    writer.close()
    rows = np.loadtxt(tmp_path / "cam.tum")
    np.testing.assert_allclose(rows[:, 0], np.arange(7) / 30, atol=1e-6)
    np.testing.assert_allclose(rows[:, 1], np.arange(7), atol=1e-6)
    np.testing.assert_allclose(Rotation.from_quat(rows[:, 4:]).as_matrix(), poses[:, :3, :3], atol=1e-5)


def test_a_mean_of_rotations_never_mirrors():
    """Sums of rotations far apart may have a negative determinant; the nearest rotation has not."""
    for seed in range(20):
        total = Rotation.random(3, random_state=seed).as_matrix().sum(0)
        nearest = geometry.chordal_mean(total)
        assert np.linalg.det(nearest) == pytest.approx(1)
        np.testing.assert_allclose(nearest @ nearest.T, np.eye(3), atol=1e-9)
        best = max(np.trace(total.T @ r) for r in Rotation.random(300, random_state=seed).as_matrix())
        assert np.trace(total.T @ nearest) >= best - 1e-9  # the chordal mean is the nearest of all


def test_windows_of_a_noisy_trajectory_join_to_rotations():
    rng = np.random.default_rng(0)
    truth = np.tile(np.eye(4), (100, 1, 1))
    truth[:, :3, :3] = Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.05, (100, 3)), 0)).as_matrix()
    truth[:, :3, 3] = np.cumsum(rng.normal(0, 0.02, (100, 3)), 0)
    joiner, parts = PoseJoiner(), []
    for start in (0, 30, 40):
        window = geometry.relative_to_first(truth[start : start + 60])
        window[:, :3, :3] = (Rotation.from_rotvec(rng.normal(0, 0.01, (60, 3))) * Rotation.from_matrix(
            window[:, :3, :3])).as_matrix()
        parts.append(joiner.add(start, window))
    made = np.concatenate([*parts, joiner.end()])
    assert made.shape == truth.shape
    np.testing.assert_allclose(made[:, :3, :3] @ made[:, :3, :3].transpose(0, 2, 1), np.eye(3) + 0 * made[:, :3, :3],
                               atol=1e-9)
    assert np.linalg.det(made[:, :3, :3]) == pytest.approx(1)
    angles = geometry.rotation_angle_deg(geometry.relative_to_first(truth)[:, :3, :3].transpose(0, 2, 1)
                                         @ geometry.relative_to_first(made)[:, :3, :3])
    assert angles.max() < 4


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_k": -1}])
def test_recipes_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="steps must be at least 1, temperature and top_k at least 0, top_p in"):
        TargetArgs(**wrong)
    with pytest.raises(ValueError, match="not both"):
        TargetArgs(guidance=2.0, condition_weights={"rgb": 1.0})
    TargetArgs(steps=1, temperature=0, top_p=1, top_k=0, guidance=1.0, condition_weights={"rgb": 1.0})


def test_windows_that_share_no_frame_go_on_where_the_one_before_ended():
    whole = random_walk(40)
    joiner = POSE.joiner()
    parts = [joiner.add(start, geometry.relative_to_first(whole[start : start + 10])) for start in (0, 10, 20, 30)]
    joined = np.concatenate([*parts, joiner.end()])
    step = np.linalg.norm(np.diff(whole[:, :3, 3], axis=0), axis=1).max()
    assert len(joined) == 40 and np.linalg.norm(np.diff(joined[:, :3, 3], axis=0), axis=1).max() <= step + 1e-9
    turns = [geometry.relative_to_first(p[20:30]) for p in (joined, whole)]
    assert np.allclose(turns[0], turns[1])  # inside a window the motion is its own
    depth, made = DEPTH.joiner(), np.linspace(0.1, 0.9, 64).reshape(1, 8, 8).repeat(10, 0)
    both = np.concatenate([depth.add(0, made), depth.add(10, made * 0.5 + 0.2), depth.end()])
    assert np.allclose(both, made[:1]) and depth.shift == pytest.approx(2.0)


def random_walk(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (count, 1, 1))
    for i in range(1, count):
        move = np.eye(4)
        move[:3, :3] = Rotation.from_rotvec(rng.normal(size=3) * 0.05).as_matrix()
        move[:3, 3] = rng.normal(size=3) * 0.02
        poses[i] = poses[i - 1] @ move
    return poses


@pytest.mark.parametrize(("shapes", "words"), [
    ({}, "at least of one"), ({"nose": (1, 4)}, "no modality 'nose'"), ({"rgb": (1, 7)}, "expected (clips"),
    ({"rgb": (12,)}, "expected (clips"), ({"rgb": (1, 3, 2, 2), "depth": (2, 3, 2, 2)}, "as many clips")])
def test_tokens_that_are_not_the_models_are_refused(model, shapes, words):  # noqa: F811
    given = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for call in (lambda: model.generate(given, ["cam"]), lambda: model.encode(given),
                 lambda: model.masked_logits(given, {}, {})):
        with pytest.raises(UserError, match=re.escape(words)):
            call()


def test_what_was_not_observed_is_never_shown_however_it_is_stored(model):  # noqa: F811
    first, *_, last = model.modalities
    ids = np.random.default_rng(0).integers(0, first.vocab_size, (1, *first.grid))
    ids.reshape(-1)[:2] = -1
    stored = np.where(ids < 0, 65535, ids).astype(np.uint16)
    made = [model.generate({first.name: x}, [last.name], seed=3).tokens[last.name] for x in (ids, stored)]
    assert np.array_equal(*made)
    everything = {first.name: np.ones((1, first.num_tokens), bool)}
    asked = {last.name: np.ones((1, last.num_tokens), bool)}
    both = {last.name: np.zeros((1, *last.grid), int)}
    shown = [model.masked_logits({first.name: x, **both}, everything, asked)[last.name] for x in (ids, stored)]
    without = model.masked_logits({first.name: np.maximum(ids, 0), **both},
                                  {first.name: ids.reshape(1, -1) >= 0}, asked)[last.name]
    assert torch.equal(*shown) and torch.equal(shown[0], without)
    with pytest.raises(UserError, match="no likelihood"):
        model.score({first.name: ids}, {}, everything)


def test_a_modality_that_is_only_shown_is_not_asked_for(model):  # noqa: F811
    first, *_, last = model.modalities
    model.modalities = ModalitySet(replace(m, target=m.name != last.name) for m in model.modalities)
    try:
        with pytest.raises(UserError, match="never learnt to predict"):
            model.generate({first.name: np.zeros((1, *first.grid), int)}, [last.name])
    finally:
        model.modalities = ModalitySet(replace(m, target=True) for m in model.modalities)
