"""What each kind of signal is measured by, and against which trivial predictions: values by hand."""

import numpy as np
import pytest

from egom2p import geometry
from egom2p.evaluation.measures import MEASURES, MeasureArgs, is_better

ARGS = MeasureArgs()


def poses(points: np.ndarray) -> np.ndarray:
    found = np.tile(np.eye(4), (len(points), 1, 1))
    found[:, :3, 3] = points
    return found


@pytest.mark.parametrize(("kind", "main", "curve", "alignment"), [
    ("pose", "ate_m", "position error, m", "ATE after a centred rigid SE(3) fit; RTE and RRE at delta 1"),
    ("gaze", "gaze_mse", "squared error", "none; frames with valid gaze"),
    ("depth", "abs_rel", "AbsRel", None), ("rgb", "psnr_db", "PSNR, dB", "none"),
    ("motion", "rmse", "root mean square error", "none")])
def test_what_ranks_the_clips(kind, main, curve, alignment):
    measure = MEASURES[kind](ARGS)
    assert (measure.main, measure.curve) == (main, curve)
    assert alignment in (None, measure.alignment)
    assert set(MEASURES) == {"pose", "gaze", "depth", "rgb", "motion"}


def test_the_text_of_depth_says_what_is_fitted_to_what():
    texts = {MEASURES["depth"](MeasureArgs(depth_alignment=a, depth_per=p)).alignment
             for a in ("none", "median", "scale_shift") for p in ("clip", "frame")}
    assert len(texts) == 6 and all(t.endswith("pixels with a reading") for t in texts)
    assert all((" per clip; " in t) != (" per frame; " in t) for t in texts)


def test_trivial_trajectories():
    """Standing still, the mean trajectory, and a line straight ahead as long as the mean one."""
    truth = poses(np.zeros((5, 3)))
    baselines = MEASURES["pose"](ARGS).baselines
    assert set(baselines({}, truth)) == {"no motion"}
    mean = geometry.pose_to_nine(poses(np.arange(15.0).reshape(5, 3)))
    found = baselines({"mean_signal": mean, "mean_length": np.array([2.0])}, truth)
    assert set(found) == {"no motion", "mean trajectory", "straight line of mean length"}
    assert np.array_equal(found["no motion"], truth)
    np.testing.assert_allclose(found["mean trajectory"][:, :3, 3], np.arange(15.0).reshape(5, 3), atol=1e-12)
    np.testing.assert_allclose(found["straight line of mean length"][:, :3, 3],
                               [[0, 0, z] for z in (0, 0.5, 1, 1.5, 2)])
    assert np.array_equal(found["straight line of mean length"][:, :3, :3], truth[:, :3, :3])


def test_every_alignment_of_a_trajectory_that_is_half_as_long():
    """Along a curve: without a fit and rigidly the lengths differ, with scale nothing is left."""
    t = np.linspace(0, 2, 60)
    truth = poses(np.stack([np.sin(t), 0.3 * t**2, t], -1))
    guess = poses(truth[:, :3, 3] / 2)
    found = MEASURES["pose"](ARGS).metrics(guess, truth, {"rates": {"cam": 30}})
    points = truth[:, :3, 3] - truth[0, :3, 3]
    assert found["ate_m@none"] == pytest.approx(np.sqrt((np.linalg.norm(points / 2, axis=1) ** 2).mean()), rel=1e-6)
    assert [found["ate_m@sim3"], found["ate_m@sim3_first_s"]] == pytest.approx([0, 0], abs=1e-6)
    assert found["ate_m"] == pytest.approx(found["ate_m@se3"], rel=1e-9)
    assert 0.05 < found["ate_m@se3"] < found["ate_m@none"]
    steps = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0) / 2, axis=1)
    assert found["rte_m"] == pytest.approx(np.sqrt((steps**2).mean()))
    assert found["rre_deg"] == pytest.approx(0, abs=1e-5)
    later = np.linalg.norm(truth[30:, :3, 3] - truth[:-30, :3, 3], axis=1) / 2
    assert found["rte_m@1s"] == pytest.approx(np.sqrt((later**2).mean()))
    assert MEASURES["pose"](MeasureArgs("sim3", 30)).metrics(guess, truth, {})["rte_m"] == found["rte_m@1s"]
    straight = poses(np.stack([0 * t, 0 * t, t], -1))
    on_a_line = MEASURES["pose"](ARGS).metrics(guess, straight, {})
    assert np.isnan(on_a_line["ate_m@sim3"]) and np.isfinite(on_a_line["ate_m@se3"])


@pytest.mark.parametrize(("alignment", "expected"), [("none", [0.0, 0.5, 1.0]), ("se3", [0.5, 0.0, 0.5]),
                                                     ("sim3", [0.0, 0.0, 0.0])])
def test_position_error_over_time(alignment, expected):
    truth = poses(np.array([[0.0, 0, 0], [0, 0, 1], [0, 0, 2]]))
    guess = poses(truth[:, :3, 3] / 2)
    np.testing.assert_allclose(MEASURES["pose"](MeasureArgs(alignment)).over_time(guess, truth), expected, atol=1e-9)


def test_gaze_figures_and_what_they_need():
    truth = np.array([[0.5, 0.5, 1], [0.2, 0.6, 1], [0.9, 0.9, 0]])
    guess = np.array([[0.6, 0.5], [0.2, 0.3], [0.0, 0.0]])
    measure = MEASURES["gaze"](ARGS)
    plain = measure.metrics(guess, truth, {})
    assert plain == {"gaze_mse": pytest.approx((0.1**2 / 2 + 0.3**2 / 2) / 2)}
    pixels = measure.metrics(guess, truth, {"side": 200})
    assert set(pixels) == {"gaze_mse", "gaze_px"} and pixels["gaze_px"] == pytest.approx(200 * (0.1 + 0.3) / 2)
    matrix = [[100, 0, 100], [0, 100, 100], [0, 0, 1]]
    found = measure.metrics(guess, truth, {"side": 200, "intrinsics": matrix})
    rays = [(np.array([200 * a - 100, 200 * b - 100, 100.0]), np.array([200 * c - 100, 200 * d - 100, 100.0]))
            for (a, b), (c, d, _) in zip(guess[:2], truth[:2], strict=True)]
    angles = [np.degrees(np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q))) for p, q in rays]
    assert found["gaze_deg"] == pytest.approx(np.mean(angles))
    hits = {d: np.mean([a <= d for a in angles]) for d in (2, 5, 10)}
    assert {k: v for k, v in found.items() if "@" in k} == {f"gaze_hit@{d}deg": v for d, v in hits.items()}
    np.testing.assert_allclose(measure.over_time(guess, truth), [0.005, 0.045, np.nan])
    trivial = measure.baselines({}, truth)
    assert set(trivial) == {"frame centre"} and np.array_equal(trivial["frame centre"], np.full((3, 2), 0.5))
    trivial = measure.baselines({"mean_signal": np.array([0.4, 0.7])}, truth)
    assert np.array_equal(trivial["mean gaze"], [[0.4, 0.7]] * 3)


def test_depth_figures_and_trivial_depths(rng):
    truth = rng.uniform(1, 4, (2, 5, 6)).astype(np.float16)
    measure = MEASURES["depth"](MeasureArgs(depth_alignment="none"))
    exact = 1 / truth.astype(np.float32)
    assert measure.metrics(exact, truth, {})["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert measure.metrics(exact / 2, truth, {})["abs_rel"] == pytest.approx(1, rel=1e-5)
    half_wrong = np.stack([exact[0], exact[1] / 2])
    np.testing.assert_allclose(measure.over_time(half_wrong, truth), [0, 1], atol=1e-5)
    fitted = MEASURES["depth"](MeasureArgs(depth_alignment="median", depth_per="frame"))
    np.testing.assert_allclose(fitted.over_time(half_wrong, truth), [0, 0], atol=1e-5)
    assert set(measure.baselines({}, truth)) == {"flat plane"} and not measure.baselines({}, truth)["flat plane"].any()
    mean = np.full((5, 6), 0.3, np.float32)
    assert np.array_equal(measure.baselines({"mean_signal": mean}, truth)["mean depth image"], [mean] * 2)
    assert set(measure.baselines({"mean_signal": mean[:4]}, truth)) == {"flat plane"}  # of another size


def test_picture_figures_and_trivial_pictures(rng):
    truth = rng.integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
    measure = MEASURES["rgb"](ARGS)
    off = truth.astype(np.int32)
    off[1] = np.where(off[1] > 127, off[1] - 10, off[1] + 10)
    found = measure.metrics(off.astype(np.uint8), truth, {})
    assert set(found) == {"psnr_db", "ssim"} and 0 < found["ssim"] < 1
    assert measure.over_time(off.astype(np.uint8), truth)[1] == pytest.approx(20 * np.log10(255 / 10))
    assert np.array_equal(measure.baselines({}, truth)["grey frame"], np.full(truth.shape, 128))
    mean = np.full((16, 16, 3), 99.6)
    trivial = measure.baselines({"mean_signal": mean}, truth)["mean frame"]
    assert trivial.dtype == np.uint8 and np.array_equal(trivial, np.full(truth.shape, 100))
    assert set(measure.baselines({"mean_signal": mean[:8]}, truth)) == {"grey frame"}


def test_figures_of_any_other_motion():
    truth, guess = np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 0], [3, 3]])
    measure = MEASURES["motion"](ARGS)
    assert measure.metrics(guess, truth, {}) == {"rmse": pytest.approx(np.sqrt(5 / 4))}
    np.testing.assert_allclose(measure.over_time(guess, truth), [np.sqrt(2), np.sqrt(0.5)])
    assert set(measure.baselines({}, truth)) == {"zero"} and not measure.baselines({}, truth)["zero"].any()
    mean = np.array([[1.0, 5], [3, 7]])
    found = measure.baselines({"mean_signal": mean}, truth)
    assert np.array_equal(found["mean signal"], mean) and np.array_equal(found["constant mean"], [[2, 6], [2, 6]])
    assert set(measure.baselines({"mean_signal": mean[:1]}, truth)) == {"zero"}


def test_variants_rank_as_the_metric_they_are_of():
    assert is_better("gaze_hit@5deg", 0.9, 0.5) and is_better("ate_m@sim3", 0.1, 0.2)
    assert not is_better("ssim", 0.1, 0.2) and not is_better("rte_m@1s", 0.2, 0.1)
