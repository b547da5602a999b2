"""Gaze error over (T, 3) square-frame gaze (x, y, valid)."""

import numpy as np


def _seen(reference: np.ndarray) -> np.ndarray:
    """(T,) bool: frames whose gaze is valid and a number."""
    return (reference[:, 2] > 0) & np.isfinite(reference[:, :2]).all(1)


def gaze_mse(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error of the coordinates in [0, 1], over x and y of the reference's valid frames; nan if none."""
    valid = _seen(reference)
    return float(((predicted[valid, :2] - reference[valid, :2]) ** 2).mean()) if valid.any() else float("nan")


def gaze_distance(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance over valid frames, in units of the square frame's side (times the side: pixels); nan if
    none."""
    valid = _seen(reference)
    return float(np.linalg.norm(predicted[valid, :2] - reference[valid, :2],
                                axis=1).mean()) if valid.any() else float("nan")


def gaze_angles_deg(predicted: np.ndarray, reference: np.ndarray, intrinsics: np.ndarray, side: int) -> np.ndarray:
    """Angles in degrees between predicted and true gaze rays, one a valid frame; intrinsics in pixels of a `side`
    square."""
    valid = _seen(reference)
    inverse = np.linalg.inv(intrinsics)

    def rays(gaze: np.ndarray) -> np.ndarray:
        ray = np.c_[gaze[valid, :2] * side, np.ones(valid.sum())] @ inverse.T
        return ray / np.linalg.norm(ray, axis=1, keepdims=True)

    return np.degrees(np.arccos(np.clip((rays(predicted) * rays(reference)).sum(1), -1, 1)))


def gaze_angle_deg(predicted: np.ndarray, reference: np.ndarray, intrinsics: np.ndarray, side: int) -> float:
    """Mean of `gaze_angles_deg`; nan without a valid frame."""
    angles = gaze_angles_deg(predicted, reference, intrinsics, side)
    return float(angles.mean()) if len(angles) else float("nan")


def gaze_hits(predicted: np.ndarray, reference: np.ndarray, intrinsics: np.ndarray, side: int,
              degrees: float) -> float:
    """Share of valid frames whose gaze is off by at most so many degrees; nan without a valid frame."""
    angles = gaze_angles_deg(predicted, reference, intrinsics, side)
    return float((angles <= degrees).mean()) if len(angles) else float("nan")
