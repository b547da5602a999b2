import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from egom2p import geometry


def random_poses(rng, count=50):
    rotations = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    rotations *= np.sign(np.linalg.det(rotations))[:, None, None]
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations, rng.normal(size=(count, 3))
    return poses


def test_nine_number_round_trip(rng):
    poses = random_poses(rng)
    assert np.allclose(geometry.nine_to_pose(geometry.pose_to_nine(poses)), poses, atol=1e-12)
    assert geometry.nine_to_pose(geometry.pose_to_nine(poses.astype(np.float32))).dtype == np.float32


def test_nine_numbers_are_columns_then_translation(rng):
    pose = random_poses(rng, 1)[0]
    assert np.array_equal(geometry.pose_to_nine(pose), np.r_[pose[:3, 0], pose[:3, 1], pose[:3, 3]])


def test_noisy_nine_numbers_give_a_rotation(rng):
    nine = geometry.pose_to_nine(random_poses(rng)) + rng.normal(scale=0.1, size=(50, 9))
    rotation = geometry.nine_to_pose(nine)[:, :3, :3]
    assert np.allclose(rotation @ np.swapaxes(rotation, 1, 2), np.eye(3), atol=1e-10)
    assert np.allclose(np.linalg.det(rotation), 1)


def test_relative_to_first_is_world_independent(rng):
    poses, world = random_poses(rng), random_poses(rng, 1)[0]
    assert np.allclose(geometry.relative_to_first(world @ poses), geometry.relative_to_first(poses))
    assert np.allclose(geometry.relative_to_first(poses)[0], np.eye(4))


@pytest.mark.parametrize("with_scale", [False, True])
def test_align_undoes_a_transform(rng, with_scale):
    points = rng.normal(size=(30, 3))
    transform = random_poses(rng, 1)[0]
    moved = (1.7 if with_scale else 1.0) * points @ transform[:3, :3].T + transform[:3, 3]
    assert np.allclose(geometry.align(points, moved, with_scale), moved)


def test_align_never_mirrors(rng):
    points = rng.normal(size=(30, 3))
    mirrored = points * [1, 1, -1]
    assert np.linalg.norm(geometry.align(points, mirrored) - mirrored) > 1


@pytest.mark.parametrize("angle", [0, 1e-6, 0.5, 90, 179.999, 180])
def test_rotation_angle(angle):
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    assert geometry.rotation_angle_deg(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])) == pytest.approx(angle, abs=1e-9)


def test_gaze_from_pixels_marks_what_is_invalid():
    pixels = np.array([[448, 252], [208, 12], [np.nan, 3], [0, 252], [448 + 0.7 * 480 + 1, 252]])
    gaze = geometry.gaze_from_pixels(pixels, 896, 504, 480)
    assert np.allclose(gaze[:2], [[0.5, 0.5, 1], [0, 0, 1]])
    assert gaze[2:, 2].tolist() == [0, 0, 0]
    assert np.isfinite(gaze).all()


def test_quaternions_are_scipys():
    """x y z w with w not negative, also for half turns, where w is nothing."""
    turns = Rotation.concatenate([Rotation.random(200, random_state=0), Rotation.from_rotvec(np.pi * np.eye(3)),
                                  Rotation.identity(1), Rotation.from_rotvec([[0, 0, 3.1], [1e-4, 0, 0]])])
    made = geometry.quaternions(turns.as_matrix())
    assert made.shape == (206, 4) and (made[:, 3] >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(np.abs((made * turns.as_quat()).sum(1)), 1, atol=1e-12)
    np.testing.assert_allclose(geometry.quaternions(Rotation.from_euler("y", [[90]], degrees=True).as_matrix())[0],
                               [0, np.sqrt(0.5), 0, np.sqrt(0.5)], atol=1e-12)


def test_projection_by_hand():
    matrix = np.array([[100.0, 3, 30], [0, 80, 20], [0, 0, 1]])
    points = np.array([[[1.0, 2, 4], [0, 0, 1]], [[-1, 1, 2], [5, 5, 5]]])
    np.testing.assert_allclose(geometry.project(points, matrix),
                               [[[25 + 1.5 + 30, 40 + 20], [30, 20]], [[-50 + 1.5 + 30, 60], [133, 100]]])


@pytest.mark.parametrize(("point", "valid"), [
    ((0.5, 0.5), True), ((-0.2, 1.2), True), ((1.2, -0.2), True), ((-0.21, 0.5), False), ((0.5, -0.21), False),
    ((1.21, 0.5), False), ((0.5, 1.21), False), ((np.nan, 0.5), False), ((0.5, np.nan), False)])
def test_gaze_counts_within_a_fifth_of_the_frame(point, valid):
    assert geometry.gaze_is_valid(np.array(point)) == valid
    made = geometry.gaze_from_pixels(np.array([point]) * 40 + [10, 0], 60, 40)
    assert made.dtype == np.float32 and made.shape == (1, 3)
    np.testing.assert_allclose(made[0], [*point, 1] if valid else [0, 0, 0], atol=1e-6)


def test_the_nearest_rotations_of_many_matrices_at_once():
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(4, 5, 3, 3))
    made = geometry.chordal_mean(matrices)
    assert made.shape == matrices.shape
    for given, nearest in zip(matrices.reshape(-1, 3, 3), made.reshape(-1, 3, 3), strict=True):
        assert np.linalg.det(nearest) == pytest.approx(1)
        best = Rotation.align_vectors(given.T, np.eye(3))[0].as_matrix()  # Kabsch, on the columns
        np.testing.assert_allclose(np.trace(given.T @ nearest), np.trace(given.T @ best), rtol=1e-6)


def test_a_fit_with_scale_is_umeyamas():
    """Known transforms of points are undone exactly; of noisy ones, no small change of the fit is better."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 3))
    turn = Rotation.random(random_state=1).as_matrix()
    reference = 2.5 * points @ turn.T + [1, -2, 3]
    np.testing.assert_allclose(geometry.align(points, reference, with_scale=True), reference, atol=1e-9)
    noisy = reference + rng.normal(0, 0.1, (30, 3))
    for with_scale in (True, False):
        fitted = geometry.align(points, noisy, with_scale=with_scale)
        error = ((fitted - noisy) ** 2).sum()
        for change in Rotation.from_rotvec(rng.normal(0, 0.01, (20, 3))).as_matrix():
            centre = fitted.mean(0)
            assert (((fitted - centre) @ change.T + centre - noisy) ** 2).sum() >= error
        for scale in (0.99, 1.01) if with_scale else ():
            assert ((scale * (fitted - centre) + centre - noisy) ** 2).sum() >= error
    still = np.tile([[1.0, 2, 3]], (5, 1))
    middle = np.tile(reference[:5].mean(0), (5, 1))
    np.testing.assert_allclose(geometry.align(still, reference[:5], with_scale=True), middle)
