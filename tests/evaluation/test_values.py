"""What the figures beside a model mean, by hand or by somebody else's code."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from egom2p.evaluation.camera import ate, rre, rte
from egom2p.evaluation.depth import align_depth, depth_errors
from egom2p.evaluation.measures import HIGHER_IS_BETTER, MEASURES, MeasureArgs, is_better
from egom2p.evaluation.results import TaskRows, bootstrap, summarise


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
    assert figures["ate_m"] == ate(guess, truth, "none") and figures["rte_m"] == rte(guess, truth, 3)
    assert figures["rre_deg"] == rre(guess, truth, 3)
