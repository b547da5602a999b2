"""Trajectory metrics over (T, 4, 4) poses; the alignment is always named.

Sturm et al., "A Benchmark for the Evaluation of RGB-D SLAM Systems", IROS 2012.
"""

import numpy as np

from egom2p import geometry

STATIC_M = 0.05  # a camera that stays within so many metres of its mean place
STRAIGHT = 0.05  # second against first singular value of the places
HORIZONS_S = (0.5, 1.0, 2.0, 5.0, 10.0)


def ate(predicted: np.ndarray, reference: np.ndarray, alignment: str = "se3", rate: float = 30.0) -> float:
    """Absolute trajectory error in metres: root mean square distance of the camera centres.

    alignment: `se3` (centred rigid fit, Umeyama), `sim3` (with scale), `sim3_first_s` (with scale, fitted on the first
    second at `rate` Hz) or `none`.
    """
    points, target = predicted[:, :3, 3].astype(np.float64), reference[:, :3, 3].astype(np.float64)
    if alignment != "none":
        fitted_on = round(rate) if alignment == "sim3_first_s" else 0
        points = geometry.align(points, target, alignment.startswith("sim3"), fitted_on)
    return float(np.sqrt(((points - target) ** 2).sum(1).mean()))


def degenerate(reference: np.ndarray) -> str:
    """`static` or `straight` for a trajectory by which a fit with scale means little or nothing, else ""."""
    places = reference[:, :3, 3].astype(np.float64)
    centred = places - places.mean(0)
    if np.linalg.norm(centred, axis=1).max() < STATIC_M:
        return "static"
    singular = np.linalg.svd(centred, compute_uv=False)
    return "straight" if singular[1] < STRAIGHT * singular[0] else ""


def horizons(frames: int, rate: float) -> dict[str, int]:
    """{name: frames apart} of the horizons that a trajectory is long enough for; the last frame of a clip may stand for
    one that lies a single frame beyond it (2 s of 60 frames)."""
    found = {}
    for seconds in HORIZONS_S:
        delta = min(round(seconds * rate), frames - 1)
        if delta >= round(seconds * rate) - 1 and delta > 0:
            found[f"{seconds:g}s"] = delta
    return found


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
