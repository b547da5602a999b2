"""Poses, rigid alignment and gaze coordinates.

Poses are (..., 4, 4) `world_from_camera` matrices in OpenCV axes (x right, y down, z forward), metres.
Gaze is (..., 2) x right, y down in units of the square frame's side: (0, 0) top left, (1, 1) bottom right.
"""

import numpy as np


def invert(a_from_b: np.ndarray) -> np.ndarray:
    """b_from_a for rigid (..., 4, 4) transforms."""
    rotation_t = np.swapaxes(a_from_b[..., :3, :3], -1, -2)
    b_from_a = np.zeros_like(a_from_b)
    b_from_a[..., :3, :3] = rotation_t
    b_from_a[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation_t, a_from_b[..., :3, 3])
    b_from_a[..., 3, 3] = 1
    return b_from_a


def relative_to_first(world_from_camera: np.ndarray) -> np.ndarray:
    """first_from_camera: the (T, 4, 4) trajectory in the frame of its first camera (the canonical frame)."""
    return invert(world_from_camera[:1]) @ world_from_camera


def pose_to_nine(a_from_b: np.ndarray) -> np.ndarray:
    """(..., 4, 4) -> (..., 9): first rotation column, second rotation column, translation in metres.

    The 6-number rotation of Zhou et al., "On the Continuity of Rotation Representations", CVPR 2019.
    """
    return np.concatenate([a_from_b[..., :3, 0], a_from_b[..., :3, 1], a_from_b[..., :3, 3]], axis=-1)


def nine_to_pose(nine: np.ndarray) -> np.ndarray:
    """(..., 9) -> (..., 4, 4). The two columns are made orthonormal by Gram-Schmidt, the third is their cross
    product."""
    first = _normalize(nine[..., 0:3])
    second = nine[..., 3:6]
    second = _normalize(second - (first * second).sum(-1, keepdims=True) * first)
    a_from_b = np.zeros((*nine.shape[:-1], 4, 4), dtype=nine.dtype)
    a_from_b[..., :3, :3] = np.stack([first, second, np.cross(first, second)], axis=-1)
    a_from_b[..., :3, 3] = nine[..., 6:9]
    a_from_b[..., 3, 3] = 1
    return a_from_b


def rotation_angle_deg(rotation: np.ndarray) -> np.ndarray:
    """Angle of (..., 3, 3) rotations in degrees, accurate near 0 and 180 (chordal and trace forms combined)."""
    trace = np.trace(rotation, axis1=-2, axis2=-1)
    skew = np.stack([rotation[..., 2, 1] - rotation[..., 1, 2], rotation[..., 0, 2] - rotation[..., 2, 0],
                     rotation[..., 1, 0] - rotation[..., 0, 1]], axis=-1)
    return np.degrees(np.arctan2(np.linalg.norm(skew, axis=-1), trace - 1))


def align(points: np.ndarray, reference: np.ndarray, with_scale: bool = False, fitted_on: int = 0) -> np.ndarray:
    """Move (N, D) `points` onto `reference` by the least-squares rigid (or similarity) transform.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991.
    Both sets are centred first. fitted_on: only the first so many points decide the transform (0 = all). Returns the
    moved points; degenerate sets (all points equal) are only centred.
    """
    points, reference = np.asarray(points, np.float64), np.asarray(reference, np.float64)
    known, target = points[: fitted_on or None], reference[: fitted_on or None]
    mean_p, mean_r = known.mean(0), target.mean(0)
    centred = known - mean_p
    u, singular, vt = np.linalg.svd((target - mean_r).T @ centred)
    sign = np.ones(points.shape[1])
    if np.linalg.det(u) * np.linalg.det(vt) < 0:
        sign[-1] = -1
    rotation = u @ np.diag(sign) @ vt
    spread = (centred**2).sum()
    scale = (singular * sign).sum() / spread if with_scale and spread > 0 else 1.0
    return scale * (points - mean_p) @ rotation.T + mean_r


def chordal_mean(matrices: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> the nearest rotations (Hartley et al., "Rotation Averaging", IJCV 2013, section 5.3)."""
    u, _, vt = np.linalg.svd(matrices)
    flip = np.ones((*u.shape[:-2], 3))
    flip[..., 2] = np.linalg.det(u @ vt)
    return (u * flip[..., None, :]) @ vt


def quaternions(rotations: np.ndarray) -> np.ndarray:
    """(T, 3, 3) -> (T, 4) x, y, z, w: the dominant eigenvector of Bar-Itzhack's matrix (stable for any angle)."""
    m = rotations
    k = np.empty((len(m), 4, 4))
    k[:, 0] = np.stack([m[:, 0, 0] - m[:, 1, 1] - m[:, 2, 2], m[:, 1, 0] + m[:, 0, 1], m[:, 2, 0] + m[:, 0, 2],
                        m[:, 2, 1] - m[:, 1, 2]], -1)
    k[:, 1] = np.stack([k[:, 0, 1], m[:, 1, 1] - m[:, 0, 0] - m[:, 2, 2], m[:, 2, 1] + m[:, 1, 2],
                        m[:, 0, 2] - m[:, 2, 0]], -1)
    k[:, 2] = np.stack([k[:, 0, 2], k[:, 1, 2], m[:, 2, 2] - m[:, 0, 0] - m[:, 1, 1], m[:, 1, 0] - m[:, 0, 1]], -1)
    k[:, 3] = np.stack([k[:, 0, 3], k[:, 1, 3], k[:, 2, 3], m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]], -1)
    vectors = np.linalg.eigh(k / 3)[1][..., -1]
    return vectors * np.where(vectors[:, 3:] < 0, -1, 1)


def project(camera_points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """(..., 3) points in camera axes -> (..., 2) pixels with a (3, 3) pinhole matrix. Points need z > 0."""
    homogeneous = camera_points @ intrinsics.T
    return homogeneous[..., :2] / homogeneous[..., 2:3]


def gaze_is_valid(gaze: np.ndarray) -> np.ndarray:
    """(..., 2) square-frame gaze -> (...) bool: seen, and within [-0.2, 1.2] on both axes."""
    with np.errstate(invalid="ignore"):
        return np.all((gaze >= -0.2) & (gaze <= 1.2), axis=-1)


def crop_offset(width: int, height: int, side: int) -> tuple[int, int]:
    """(left, top) of the centred side x side square of a width x height frame, whole pixels; pictures, intrinsics and
    gaze must all use this one."""
    return (width - side) // 2, (height - side) // 2


def gaze_from_pixels(pixels: np.ndarray, width: int, height: int, crop: int | None = None) -> np.ndarray:
    """(T, 2) pixels of a width x height frame -> (T, 3) square-frame x, y, valid; `crop` is the centred square's
    side."""
    side = crop or min(width, height)
    gaze = (pixels - np.array(crop_offset(width, height, side))) / side
    valid = gaze_is_valid(gaze)
    gaze = np.where(valid[..., None], gaze, 0.0)
    return np.concatenate([gaze, valid[..., None]], axis=-1).astype(np.float32)


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)
