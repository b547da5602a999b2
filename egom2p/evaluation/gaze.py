"""Gaze error over (T, 3) square-frame gaze (x, y, valid)."""

import numpy as np


def gaze_mse(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error of the coordinates in [0, 1], over x and y of the reference's valid frames; nan if none."""
    valid = (reference[:, 2] > 0) & np.isfinite(reference[:, :2]).all(1)
    return float(((predicted[valid, :2] - reference[valid, :2]) ** 2).mean()) if valid.any() else float("nan")


def gaze_distance(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance over valid frames, in units of the square frame's side (times the side: pixels); nan if
    none."""
    valid = (reference[:, 2] > 0) & np.isfinite(reference[:, :2]).all(1)
    return float(np.linalg.norm(predicted[valid, :2] - reference[valid, :2],
                                axis=1).mean()) if valid.any() else float("nan")


def gaze_angle_deg(predicted: np.ndarray, reference: np.ndarray, intrinsics: np.ndarray, side: int) -> float:
    """Mean angle in degrees between predicted and true gaze rays over valid frames; intrinsics in pixels of a `side`
    square."""
    valid = reference[:, 2] > 0
    inverse = np.linalg.inv(intrinsics)

    def rays(gaze: np.ndarray) -> np.ndarray:
        ray = np.c_[gaze[valid, :2] * side, np.ones(valid.sum())] @ inverse.T
        return ray / np.linalg.norm(ray, axis=1, keepdims=True)

    cosine = np.clip((rays(predicted) * rays(reference)).sum(1), -1, 1)
    return float(np.degrees(np.arccos(cosine)).mean()) if valid.any() else float("nan")
