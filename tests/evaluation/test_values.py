"""What the figures beside a model mean, by hand or by somebody else's code."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from egom2p import geometry
from egom2p.errors import UserError
from egom2p.evaluation.camera import ate, degenerate, horizons, rre, rte
from egom2p.evaluation.depth import align_depth, depth_errors
from egom2p.evaluation.gaze import gaze_hits
from egom2p.evaluation.measures import HIGHER_IS_BETTER, MEASURES, MeasureArgs, is_better, pose_measure
from egom2p.evaluation.results import (
    Evaluation,
    TaskRows,
    bootstrap,
    changes_since,
    reliability,
    summarise,
    table,
    write_results,
)
from egom2p.evaluation.run import Task


def rows_of(metric: str, **sources: list[float]) -> TaskRows:
    rows = TaskRows(keys=[str(i) for i in range(len(next(iter(sources.values()))))])
    for source, values in sources.items():
        for value in values:
            rows.add(source.replace("base_", "baseline: "), {metric: value})
    return rows


@pytest.mark.parametrize(("metric", "strongest"), [("ate_m", "low"), ("ssim", "high"), ("psnr_db", "high"),
                                                   ("delta3", "high"), ("rmse", "low")])
def test_the_strongest_baseline_is_the_hardest_to_beat(metric, strongest):
    rows = rows_of(metric, model=[2.0, 3.0], shuffled=[5.0, 5.0], ceiling=[1.0, 1.0], base_low=[1.0, 2.0],
                   base_high=[7.0, 9.0])
    figures = summarise(rows)[metric]
    assert figures["baseline_name"] == strongest
    assert figures["baseline"] == {"low": 1.5, "high": 8.0}[strongest]
    assert (figures["value"], figures["shuffled"], figures["ceiling"]) == (2.5, 5.0, 1.0)
    assert figures["better"] == ("higher" if metric in HIGHER_IS_BETTER else "lower")
    assert is_better(metric, 2.0, 1.0) == (metric in HIGHER_IS_BETTER)


def test_intervals_hold_the_mean_in_95_of_100_cases():
    """Two thousand samples of 40 clips from a known distribution: the share of intervals that hold its mean, and their
    width against the normal approximation (1.96 standard errors to each side)."""
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for _ in range(300):
        values = rng.normal(3, 2, 40)
        low, high = bootstrap(values, 500)
        hits += low <= 3 <= high
        widths.append((high - low) / (2 * values.std(ddof=1) / np.sqrt(40)))
    assert 0.90 <= hits / 300 <= 0.975
    assert np.mean(widths) == pytest.approx(1.96, rel=0.05)


def walk(count: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.1, (count, 3)), 0)).as_matrix()
    poses[:, :3, 3] = np.cumsum(rng.normal(0, 0.1, (count, 3)), 0)
    return poses


@pytest.mark.parametrize("delta", [1, 3])
def test_relative_errors_at_a_delta_by_hand(delta):
    truth, guess = walk(seed=1), walk(seed=2)
    metres, degrees = [], []
    for i in range(len(truth) - delta):
        a = np.linalg.inv(truth[i]) @ truth[i + delta]
        b = np.linalg.inv(guess[i]) @ guess[i + delta]
        gap = np.linalg.inv(a) @ b
        metres.append(np.linalg.norm(gap[:3, 3]))
        degrees.append(np.degrees(np.linalg.norm(Rotation.from_matrix(gap[:3, :3]).as_rotvec())))
    assert rte(guess, truth, delta) == pytest.approx(np.sqrt(np.mean(np.square(metres))))
    assert rre(guess, truth, delta) == pytest.approx(np.sqrt(np.mean(np.square(degrees))))
    assert rte(guess, truth, 1) != pytest.approx(rte(guess, truth, 3))


@pytest.mark.parametrize(("alignment", "undone"), [("none", ()), ("se3", ("turn",)), ("sim3", ("turn", "scale"))])
def test_an_alignment_undoes_what_it_is_named_for(alignment, undone):
    truth = walk()
    turned, scaled = truth.copy(), truth.copy()
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = Rotation.from_euler("y", 50, degrees=True).as_matrix(), (1, 2, 3)
    turned = move @ truth
    scaled[:, :3, 3] *= 3
    for name, guess in (("turn", turned), ("scale", scaled)):
        error = ate(guess, truth, alignment)
        assert (error < 1e-6) == (name in undone), (name, error)


def test_median_alignment_makes_the_medians_equal():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, (2, 6, 7))
    truth[0, 0, :3] = 0
    metres = align_depth(1 / np.where(truth > 0, truth * 2.5, 1.0), truth, "median")
    np.testing.assert_allclose(metres[truth > 0], truth[truth > 0], rtol=1e-6)


def test_depth_thresholds_are_powers_of_one_and_a_quarter():
    truth = np.ones((1, 1, 4))
    guess = np.array([[[1.2, 1.5, 1.9, 2.5]]])  # inside 1.25, 1.5625, 1.953 and none
    errors = depth_errors(guess, truth)
    assert [errors[f"delta{k}"] for k in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert errors["abs_rel"] == pytest.approx(np.mean([0.2, 0.5, 0.9, 1.5]))
    assert errors["rmse_m"] == pytest.approx(np.sqrt(np.mean(np.square([0.2, 0.5, 0.9, 1.5]))))


def test_pose_measure_passes_its_alignment_and_delta_on():
    truth, guess = walk(seed=1), walk(seed=2)
    measure = MEASURES["pose"](MeasureArgs(pose_alignment="none", pose_delta=3))
    figures = measure.metrics(guess, truth, {})
    relative = [geometry.relative_to_first(poses) for poses in (guess, truth)]
    assert figures["ate_m"] == ate(*relative, "none") and figures["rte_m"] == rte(guess, truth, 3)
    assert figures["rre_deg"] == rre(guess, truth, 3)


def turning_walk(frames=60, rate=30.0):
    """A walk at 1 m/s along a quarter circle, the camera looking ahead."""
    poses = np.tile(np.eye(4), (frames, 1, 1))
    angle = np.linspace(0, np.pi / 2, frames)
    radius = (frames - 1) / rate / (np.pi / 2)
    poses[:, 0, 3], poses[:, 2, 3] = radius * (1 - np.cos(angle)), radius * np.sin(angle)
    poses[:, :3, :3] = Rotation.from_euler("y", angle[:, None]).as_matrix()
    return poses


def test_every_alignment_of_known_transformations():
    """A trajectory of another scale, moved and turned: what each fit can undo, by hand."""
    truth = turning_walk()
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = Rotation.from_euler("xyz", [0.3, -0.7, 0.2]).as_matrix(), [3, -2, 5]
    scaled = truth.copy()
    scaled[:, :3, 3] *= 1.5
    moved = move @ scaled
    places = truth[:, :3, 3]
    spread = np.sqrt(((places - places.mean(0)) ** 2).sum(1).mean())
    assert ate(moved, truth, "sim3") == pytest.approx(0, abs=1e-9)
    assert ate(moved, truth, "sim3_first_s") == pytest.approx(0, abs=1e-6)
    assert ate(moved, truth, "se3") == pytest.approx(0.5 * spread)
    unfitted = pose_measure(MeasureArgs()).metrics(moved, truth, {})["ate_m@none"]  # both from their own first pose
    assert unfitted == pytest.approx(0.5 * np.sqrt(((places - places[0]) ** 2).sum(1).mean()))
    late = scaled.copy()  # the scale is right in the first second and drifts afterwards
    late[:30, :3, 3] = truth[:30, :3, 3]
    late[30:, :3, 3] = truth[30:, :3, 3] + 0.5 * (truth[30:, :3, 3] - truth[29, :3, 3])
    off = 0.5 * (truth[30:, :3, 3] - truth[29, :3, 3])
    assert ate(late, truth, "sim3_first_s") == pytest.approx(np.sqrt((off**2).sum() / 60), rel=1e-6)
    assert ate(late, truth, "sim3") < ate(late, truth, "sim3_first_s")


def test_relative_errors_at_horizons_by_hand():
    """A constant drift of 1 mm and 0.1 degrees a frame along and about the viewing axis adds up over the horizon."""
    truth = np.tile(np.eye(4), (60, 1, 1))
    made = truth.copy()
    made[:, 2, 3] = 0.001 * np.arange(60)
    made[:, :3, :3] = Rotation.from_euler("z", np.radians(0.1) * np.arange(60)[:, None]).as_matrix()
    found = pose_measure(MeasureArgs()).metrics(made, truth, {})
    for name, delta in (("0.5s", 15), ("1s", 30), ("2s", 59)):
        assert found[f"rte_m@{name}"] == pytest.approx(0.001 * delta)
        assert found[f"rre_deg@{name}"] == pytest.approx(0.1 * delta, rel=1e-6)
    assert "rte_m@5s" not in found
    long = horizons(301, 30.0)
    assert long["5s"] == 150 and long["10s"] == 300


def test_motion_by_which_a_scale_means_nothing_is_marked():
    still, line, walk = np.tile(np.eye(4), (60, 1, 1)), np.tile(np.eye(4), (60, 1, 1)), turning_walk()
    still[:, 0, 3] = 0.02 * np.sin(np.arange(60))
    line[:, 2, 3] = np.arange(60) / 30
    assert [degenerate(t) for t in (still, line, walk)] == ["static", "straight", ""]
    found = pose_measure(MeasureArgs()).metrics(walk, line, {})
    assert np.isnan(found["ate_m@sim3"]) and np.isfinite(found["ate_m@se3"]) and np.isfinite(found["ate_m"])


def test_gaze_hits_and_silog_by_hand():
    matrix, side = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]]), 100
    truth = np.tile([0.5, 0.5, 1.0], (4, 1))
    truth[3, 2] = 0
    made = truth.copy()
    made[:, 0] += np.tan(np.radians([1.0, 4.0, 12.0, 90 - 1e-3]))  # 100 pixels of focal length, 100 of side
    assert [gaze_hits(made, truth, matrix, side, d) for d in (2, 5, 10, 15)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    depth, ratio = np.array([[[1.0, 2.0], [4.0, 0.0]]]), np.array([[[1.1, 1.1], [1.1, 5.0]]])
    assert depth_errors(depth * ratio, depth)["silog"] == pytest.approx(0, abs=1e-12)  # a scale costs nothing
    off = depth_errors(depth * [[[np.e, 1.0], [1.0, 1.0]]], depth)["silog"]
    assert off == pytest.approx(np.std([1, 0, 0]))


def test_the_table_says_what_is_covered_doubted_and_published():
    rows = TaskRows(keys=["a", "b"], doubts=["static", ""], asked=4)
    for source in ("model", "shuffled", "ceiling", "baseline: x"):
        for value in (1.0, 2.0):
            rows.add(source, {"ate_m": value, "ate_m@sim3": float("nan")})
    summary = {"rgb2cam": summarise(rows)}
    assert summary["rgb2cam"]["ate_m"]["coverage"] == 0.5
    text = table(summary, {"rgb2cam": {"ate_m": 0.032}})
    assert "answers for 50.0%" in text and "1 static clips" in text and "(published: 0.032)" in text
    assert "@sim3" not in text and "and 1 variants" in text


@pytest.mark.parametrize(("metric", "sign"), [("ate_m", -1), ("psnr_db", 1)])
def test_reliability_by_hand(metric, sign):
    """Eight clips, surer and better in step but for one swap; ranks, ties included, against scipy's."""
    from scipy.stats import spearmanr

    quality, sure = [1, 2, 3, 4, 5, 6, 8, 7], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    rows = rows_of(metric, model=[sign * q for q in quality])
    rows.confidences, rows.main = sure, metric
    told = reliability(rows)
    assert told["agreement"] == pytest.approx(spearmanr(quality, sure).statistic) and told["agreement"] > 0.9
    assert [p["clips"] for p in told["parts"]] == [2] * 4
    assert told["parts"][0] == {"clips": 2, "confidence": pytest.approx(0.15), metric: sign * 1.5}
    assert told["parts"][3] == {"clips": 2, "confidence": pytest.approx(0.75), metric: sign * 7.5}
    rows.confidences = [0.5, 0.5, 0.1, 0.1, 0.9, 0.9, 0.9, 0.2]
    rows.rows["model"][metric][2] = float("nan")
    known = [i for i in range(8) if i != 2]
    assert reliability(rows)["agreement"] == pytest.approx(
        spearmanr(np.array(quality)[known], np.array(rows.confidences)[known]).statistic)
    rows.confidences = [0.5] * 8
    assert reliability(rows) == {}


def evaluation_of(values: dict[str, float], commit: str) -> Evaluation:
    rows = TaskRows(keys=list(values), confidences=[0.5] * len(values), main="ate_m", doubts=[""] * len(values))
    for source in ("model", "shuffled", "ceiling", "baseline: x"):
        for value in values.values():
            rows.add(source, {"ate_m": value, "ate_m@sim3": value, "rte_m": 1.0})
    return Evaluation({"rgb2cam": summarise(rows)}, {"rgb2cam": rows}, {}, {"commit": commit})


def test_what_changed_since_the_last_evaluation_in_a_folder(tmp_path):
    """Paired by clip, whatever their order and whatever clip is new; equal figures and variants are not listed."""
    before = {f"c{i}": 1.0 + i for i in range(20)}
    assert changes_since(tmp_path, evaluation_of(before, "a")) == ({}, [])
    write_results(tmp_path, evaluation_of(before, "a"))
    assert changes_since(tmp_path, evaluation_of(before, "b")) == ({}, [])
    now = {"new": 99.0, **{k: v - 0.5 for k, v in reversed(before.items())}}
    about, changes = changes_since(tmp_path, evaluation_of(now, "b"))
    assert about["commit"] == "a" and [(c.task, c.metric) for c in changes] == [("rgb2cam", "ate_m")]
    assert (changes[0].before, changes[0].now) == pytest.approx((10.5, 10.0))
    assert changes[0].ci95 == pytest.approx([-0.5, -0.5]) and changes[0].is_real
    mixed = {k: v + (0.5 if i % 2 else -0.5) for i, (k, v) in enumerate(before.items())}
    assert not changes_since(tmp_path, evaluation_of(mixed, "b"))[1][0].is_real


def test_gains_and_their_intervals_are_named_and_signed():
    """Constant differences, so that an interval is the difference itself: others minus the model."""
    rows = rows_of("ate_m", model=[1.0, 2.0, 4.0], shuffled=[3.0, 4.0, 6.0], ceiling=[0.5] * 3, base_x=[1.5, 2.5, 4.5])
    told = summarise(rows)["ate_m"]
    assert told["shuffled_minus_value_ci95"] == pytest.approx([2.0, 2.0])
    assert told["baseline_minus_value_ci95"] == pytest.approx([0.5, 0.5])
    assert told["ci95"][0] < told["value"] < told["ci95"][1] and told["baselines"] == {"x": pytest.approx(17 / 6)}
    assert (told["clips"], told["coverage"]) == (3, 1.0)


def test_the_bootstrap_is_the_seeded_percentile_interval():
    values = np.r_[50.0, np.random.default_rng(3).normal(0, 1, 30), np.nan]
    finite, rng = values[:-1], np.random.default_rng(0)
    means = np.array([finite[rng.integers(0, 31, 31)].mean() for _ in range(400)])
    low, high = bootstrap(values, 400)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert bootstrap(values, 400) == [low, high]
    assert np.isnan(bootstrap(np.array([np.nan]))).all() and len(bootstrap(np.array([]))) == 2


def test_changes_are_found_after_variants_and_among_clips_without_a_number(tmp_path):
    first, second = ({f"c{i}": 1.0 + i for i in range(6)} for _ in range(2))
    before = evaluation_of(first, "a")
    before.rows["rgb2cam"].rows["model"]["rte_m"] = [float("nan"), 1, 1, 1, 1, 1]
    write_results(tmp_path / "new/folder", before)
    now = evaluation_of(second, "b")
    now.rows["rgb2cam"].rows["model"]["rte_m"] = [float("nan"), 2, 2, 2, 2, 2]
    _, changes = changes_since(tmp_path / "new/folder", now)
    assert [(c.metric, c.before, c.now, c.ci95) for c in changes] == [("rte_m", 1.0, 2.0, [1.0, 1.0])]
    (tmp_path / "new/folder/clips.json").unlink()
    assert changes_since(tmp_path / "new/folder", now) == ({}, [])


def test_what_is_written_can_be_read_back(tmp_path):
    evaluation = evaluation_of({"a": 1.0, "b": 3.0}, "x")
    write_results(tmp_path, evaluation, {"seconds": 5})
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["about"] == {"commit": "x"} and told["seconds"] == 5 and told["rgb2cam"]["ate_m"]["value"] == 2.0
    assert told["reliability"] == {"rgb2cam": {}}  # equal confidences
    clips = json.loads((tmp_path / "clips.json").read_text())["rgb2cam"]
    assert clips["keys"] == ["a", "b"] and clips["doubts"] == ["", ""] and clips["confidences"] == [0.5, 0.5]
    assert clips["rows"]["model"]["ate_m"] == [1.0, 3.0]


def test_the_table_to_the_letter():
    rows = TaskRows(keys=["a", "b"], doubts=["static", "straight"], asked=2, main="ate_m")
    for source, value in (("model", 1.0), ("shuffled", 3.0), ("ceiling", 0.25), ("baseline: x", 2.0)):
        for _ in range(2):
            rows.add(source, {"ate_m": value, "ate_m@sim3": value, "ate_m@none": value, "rte_m": value})
    assert table({"rgb2cam": summarise(rows)}, {"rgb2cam": {"rte_m": 0.5}}) == (
        "task         metric        model  baseline  shuffled   ceiling  clips  strongest baseline\n"
        "rgb2cam      ate_m        1.0000    2.0000    3.0000    0.2500      2  x\n"
        "rgb2cam      rte_m        1.0000    2.0000    3.0000    0.2500      2  x  (published: 0.5)\n"
        "rgb2cam      1 static, 1 straight clips: fits with scale mean nothing there and leave them out\n"
        "and 2 variants (other alignments, horizons, thresholds) in results.json")


def at(places: np.ndarray) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(places), 1, 1))
    poses[:, :3, 3] = places
    return poses


def test_what_is_degenerate_does_not_depend_on_where_or_how_far():
    """Static is within 5 cm of the mean place, wherever that is; straight is a matter of proportions."""
    turn = np.linspace(0, np.pi, 40)
    bow = np.stack([np.cos(turn), np.sin(turn), 0 * turn], -1)
    for centre in (0.0, 100.0):
        assert degenerate(at(0.04 * bow + centre)) == "static" and degenerate(at(0.2 * bow + centre)) == ""
    flat = bow * [1, 0.02, 0]
    for size in (0.2, 1.0, 30.0):
        assert degenerate(at(size * flat)) == "straight" and degenerate(at(size * bow * [1, 0.3, 0])) == ""


def test_horizons_a_clip_is_too_short_for_are_left_out():
    assert horizons(60, 30.0)["2s"] == 59 and "2s" not in horizons(59, 30.0)
    assert horizons(31, 30.0) == {"0.5s": 15, "1s": 30} and horizons(30, 30.0)["1s"] == 29


def test_defaults_of_the_camera_errors_are_the_published_ones():
    truth, guess = walk(seed=1), walk(seed=2)
    assert ate(guess, truth) == ate(guess, truth, "se3") != ate(guess, truth, "none")
    assert rte(guess, truth) == rte(guess, truth, 1) != rte(guess, truth, 2)
    assert rre(guess, truth) == rre(guess, truth, 1) != rre(guess, truth, 2)


def test_what_only_some_clips_have_a_figure_of_is_a_mean_over_those():
    rows = TaskRows(main="gaze_mse", asked=4)
    clips = [{"gaze_mse": 1.0, "gaze_deg": 3.0}, {"gaze_mse": 2.0}, {"gaze_mse": 3.0, "gaze_deg": 5.0}]
    rows.keys, rows.doubts = ["a", "b", "c"], ["", "", ""]
    rows.add_all([dict.fromkeys(("model", "shuffled", "ceiling", "baseline: centre"), figures)
                  for figures in clips])
    assert np.array_equal(rows.rows["model"]["gaze_deg"], [3.0, np.nan, 5.0], equal_nan=True)
    told = summarise(rows)
    assert (told["gaze_deg"]["value"], told["gaze_deg"]["clips"], told["gaze_deg"]["coverage"]) == (4.0, 2, 0.5)
    assert (told["gaze_mse"]["value"], told["gaze_mse"]["clips"], told["gaze_mse"]["coverage"]) == (2.0, 3, 0.75)


@pytest.mark.parametrize(("name", "inputs", "target"), [
    ("rgb2cam", ("rgb",), "cam"), ("rgb+imu22cam", ("rgb", "imu2"), "cam"), ("rgb_5122cam", ("rgb_512",), "cam"),
    ("cam2rgb_512", ("cam",), "rgb_512"), ("imu22rgb_512", ("imu2",), "rgb_512")])
def test_names_with_a_two_in_tasks(name, inputs, target):
    task = Task.parse(name, ["rgb", "cam", "imu2", "rgb_512"])
    assert (task.inputs, task.target) == (inputs, target)


@pytest.mark.parametrize(("name", "words"), [("rgb2rgb", "shows what it asks for"), ("rgb", "no modality"),
                                             ("rgb2nose", "no modality 'nose'"), ("", "no modality")])
def test_tasks_that_cannot_be(name, words):
    with pytest.raises(UserError, match=words):
        Task.parse(name, ["rgb", "cam"])


def test_without_a_fit_both_are_seen_from_their_own_first_pose():
    """Wherever the recording's world has its zero."""
    truth, guess = turning_walk(), turning_walk()
    guess[:, 2, 3] *= 1.1
    away = np.eye(4)
    away[:3, 3], away[:3, :3] = (5, -2, 1), Rotation.from_euler("y", 40, degrees=True).as_matrix()
    measure = MEASURES["pose"](MeasureArgs(pose_alignment="none"))
    here, there = measure.metrics(guess, truth, {}), measure.metrics(guess, away @ truth, {})
    assert here["ate_m"] == pytest.approx(there["ate_m"]) == pytest.approx(there["ate_m@none"])
    assert np.allclose(measure.over_time(guess, truth), measure.over_time(guess, away @ truth))
    with pytest.raises(ValueError, match="pose_delta"):
        MeasureArgs(pose_delta=0)
    with pytest.raises(UserError, match="longer clips"):
        MEASURES["pose"](MeasureArgs(pose_delta=60)).metrics(guess, truth, {})
