"""Trajectory metrics over (T, 4, 4) poses; the alignment is always named.

Sturm et al., "A Benchmark for the Evaluation of RGB-D SLAM Systems", IROS 2012.
"""

import numpy as np

from egom2p import geometry


def ate(predicted: np.ndarray, reference: np.ndarray, alignment: str = "se3") -> float:
    """Absolute trajectory error in metres: root mean square distance of the camera centres.

    alignment: `se3` (centred rigid fit, Umeyama), `sim3` (with scale) or `none`.
    """
    points, target = predicted[:, :3, 3].astype(np.float64), reference[:, :3, 3].astype(np.float64)
    if alignment != "none":
        points = geometry.align(points, target, with_scale=alignment == "sim3")
    return float(np.sqrt(((points - target) ** 2).sum(1).mean()))


def relative_errors(predicted: np.ndarray, reference: np.ndarray, delta: int = 1) -> np.ndarray:
    """(T - delta, 4, 4) error motions inv(ref_i,i+delta) @ pred_i,i+delta."""
    def steps(poses: np.ndarray) -> np.ndarray:
        poses = poses.astype(np.float64)
        return geometry.invert(poses[:-delta]) @ poses[delta:]

    return geometry.invert(steps(reference)) @ steps(predicted)


def rte(predicted: np.ndarray, reference: np.ndarray, delta: int = 1) -> float:
    """Relative translation error in metres: root mean square over frame pairs `delta` apart. No alignment needed."""
    errors = relative_errors(predicted, reference, delta)
    return float(np.sqrt((errors[:, :3, 3] ** 2).sum(1).mean()))


def rre(predicted: np.ndarray, reference: np.ndarray, delta: int = 1) -> float:
    """Relative rotation error in degrees: root mean square over frame pairs `delta` apart."""
    angles = geometry.rotation_angle_deg(relative_errors(predicted, reference, delta)[:, :3, :3])
    return float(np.sqrt((angles**2).mean()))
