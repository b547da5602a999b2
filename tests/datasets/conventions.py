"""Axes and lenses of recording devices, from their own documentation and not from the code under test.

A matrix's columns say where OpenCV's axes (x right, y down, z forward) point in the other frame.
"""

import numpy as np
from scipy.spatial.transform import Rotation


def frame(x: tuple[int, ...], y: tuple[int, ...], z: tuple[int, ...]) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = np.column_stack([x, y, z])
    return out


# Microsoft's Platform for Situated Intelligence (HoloAssist): x forward, y left, z up.
PSI_FROM_OPENCV = frame(x=(0, -1, 0), y=(0, 0, -1), z=(1, 0, 0))
# Aria's cameras lie on their side: a raw picture is turned clockwise by 90 degrees to stand upright, so that upright
# right is raw up and upright down is raw right.
RAW_FROM_UPRIGHT = frame(x=(0, -1, 0), y=(1, 0, 0), z=(0, 0, 1))


def transform(xyzw: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """(4, 4) of a quaternion and a translation, by scipy."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = Rotation.from_quat(xyzw).as_matrix(), translation
    return out


def aria_matrix(params: np.ndarray) -> np.ndarray:
    """Aria's f, cu, cv count pixel centres as whole numbers; ours lie at halves."""
    f, cu, cv = params[:3]
    return np.array([[f, 0, cu + 0.5], [0, f, cv + 0.5], [0, 0, 1]])


def opencv_distort(x: float, y: float, k1: float, k2: float, p1: float, p2: float, k3: float = 0, k4: float = 0,
                   k5: float = 0, k6: float = 0) -> tuple[float, float]:
    """Where a pinhole ray (x, y, 1) goes by OpenCV's rational lens, as its calib3d page writes it."""
    r = (x**2 + y**2) ** 0.5
    factor = (1 + k1 * r**2 + k2 * r**4 + k3 * r**6) / (1 + k4 * r**2 + k5 * r**4 + k6 * r**6)
    return x * factor + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2), y * factor + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y
