"""Metrics against the shipped artefacts (facts.md section 6), evo, and cases computed by hand."""

import numpy as np
import pytest

from egom2p import geometry
from egom2p.evaluation.camera import ate, rre, rte
from egom2p.evaluation.depth import align_inverse_depth, depth_errors
from egom2p.evaluation.gaze import gaze_angle_deg, gaze_hits, gaze_mse
from egom2p.evaluation.results import bootstrap
from egom2p.evaluation.video import psnr_db, ssim
from tests.test_geometry import random_poses


@pytest.fixture
def trajectories(examples):
    reference = geometry.relative_to_first(np.load(examples / "cam.npy"))
    return geometry.nine_to_pose(np.load(examples / "token/cam-recon.npy").astype(np.float64)), reference


def test_shipped_reconstruction_of_the_camera(trajectories):
    predicted, reference = trajectories
    assert round(ate(predicted, reference), 5) == 0.00561
    assert round(ate(predicted, reference, "sim3"), 5) == 0.00552
    assert round(rte(predicted, reference), 5) == 0.00284
    assert round(rre(predicted, reference), 3) == 0.298


def test_shipped_reconstruction_of_the_gaze(examples):
    truth = geometry.gaze_from_pixels(np.load(examples / "gaze.npy"), 896, 504, 480)
    assert truth[:, 2].sum() == 58
    assert f"{gaze_mse(np.load(examples / 'token/gaze-recon.npy'), truth):.2e}" == "4.18e-05"


def wander(rng, count=60):
    poses = np.eye(4)[None].repeat(count, 0)
    for i in range(1, count):
        step = random_poses(rng, 1)[0]
        nine = np.r_[1, 0, 0, 0, 1, 0, 0, 0, 0] + np.r_[rng.normal(scale=0.05, size=6), 0, 0, 0]
        step[:3, :3] = geometry.nine_to_pose(nine)[:3, :3]
        step[:3, 3] *= 0.05
        poses[i] = poses[i - 1] @ step
    return poses


def test_evo_agrees(rng):
    """evo is GPL-3 and only ever an oracle here."""
    metrics = pytest.importorskip("evo.core.metrics")
    from evo.core.trajectory import PosePath3D

    reference, predicted = wander(rng), wander(rng)
    predicted[:, :3, 3] = reference[:, :3, 3] * 1.3 + 0.05 * rng.normal(size=(60, 3))

    def evo_ate(with_scale):
        path = PosePath3D(poses_se3=list(predicted))
        path.align(PosePath3D(poses_se3=list(reference)), correct_scale=with_scale)
        ape = metrics.APE(metrics.PoseRelation.translation_part)
        ape.process_data((PosePath3D(poses_se3=list(reference)), path))
        return ape.get_statistic(metrics.StatisticsType.rmse)

    def evo_rpe(relation):
        rpe = metrics.RPE(relation, 1, metrics.Unit.frames)
        rpe.process_data((PosePath3D(poses_se3=list(reference)), PosePath3D(poses_se3=list(predicted))))
        return rpe.get_statistic(metrics.StatisticsType.rmse)

    assert ate(predicted, reference) == pytest.approx(evo_ate(False), rel=1e-6)
    assert ate(predicted, reference, "sim3") == pytest.approx(evo_ate(True), rel=1e-6)
    assert rte(predicted, reference) == pytest.approx(evo_rpe(metrics.PoseRelation.translation_part), rel=1e-6)
    assert rre(predicted, reference) == pytest.approx(evo_rpe(metrics.PoseRelation.rotation_angle_deg), rel=1e-6)


def test_line_of_the_wrong_length():
    """A straight walk of length L predicted as one of length M errs by |L - M| / sqrt(12), for many frames."""
    def line(length):
        poses = np.eye(4)[None].repeat(2001, 0)
        poses[:, 2, 3] = np.linspace(0, length, 2001)
        return poses

    assert ate(line(1.0), line(2.2)) == pytest.approx(1.2 / np.sqrt(12), rel=1e-3)
    assert ate(line(1.0), line(2.2), "sim3") == pytest.approx(0, abs=1e-9)


def test_gaze_by_hand():
    truth = np.array([[0.5, 0.5, 1], [0.2, 0.4, 1], [0, 0, 0]])
    predicted = np.array([[0.6, 0.5], [0.2, 0.1], [9, 9]])
    assert gaze_mse(predicted, truth) == pytest.approx((0.1**2 + 0.3**2) / 4)
    assert np.isnan(gaze_mse(predicted, truth * [1, 1, 0]))
    k = np.array([[50, 0, 50], [0, 50, 50], [0, 0, 1.0]])
    assert gaze_angle_deg(np.array([[1.0, 0.5]]), np.array([[0.5, 0.5, 1]]), k, 100) == pytest.approx(45)
    holes = np.array([[0.5, 0.5, 1], [np.nan, 0.5, 1]])
    assert gaze_hits(holes, holes, k, 100, 5) == 1 and gaze_angle_deg(holes, holes, k, 100) == 0


def test_depth_by_hand(rng):
    truth = rng.uniform(1, 5, (4, 6, 6)).astype(np.float32)
    truth[0, 0] = 0
    inverse = np.where(truth > 0, 1 / np.maximum(truth, 1e-9), 7)
    assert depth_errors(align_inverse_depth(3 * inverse - 2, truth), truth)["abs_rel"] == pytest.approx(0, abs=1e-6)
    errors = depth_errors(np.array([[[2.0, 1.0, 1.0]]]), np.array([[[1.0, 1.0, 0.0]]]))
    assert errors["abs_rel"] == 0.5
    assert errors["rmse_m"] == pytest.approx(np.sqrt(0.5))
    assert errors["delta1"] == 0.5
    endless = truth.copy()
    endless[1, 0, 0] = np.inf  # no reading, as for the tokenizers
    assert depth_errors(align_inverse_depth(3 * inverse - 2, endless), endless)["silog"] == pytest.approx(0, abs=1e-6)


def test_pictures_by_hand(rng):
    a = rng.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    assert psnr_db(a, a) == 100
    assert ssim(a, a) == pytest.approx(1)
    assert psnr_db(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx(0)
    assert psnr_db(np.zeros_like(a), np.full_like(a, 10)) == pytest.approx(20 * np.log10(25.5))


def test_bootstrap_covers_the_mean(rng):
    low, high = bootstrap(rng.normal(3, 1, 400))
    assert low < 3.1
    assert high > 2.9
    assert 0.1 < high - low < 0.3
