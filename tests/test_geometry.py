import numpy as np
import pytest

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
