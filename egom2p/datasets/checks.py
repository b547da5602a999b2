"""What is measured of prepared clips, so that wrong axes, units or calibrations show: statistics and a reprojection
check."""

from collections import Counter
from typing import Any

import numpy as np

from egom2p import geometry
from egom2p.data.clips import RATES


def reprojection_error(depth: np.ndarray, cam: np.ndarray, intrinsics: np.ndarray, step: int = 4) -> float:
    """Median relative disagreement of depth carried from one frame into another `step` frames later (nan if
    untestable).

    Wrong axes, transposed matrices or wrong intrinsics show as tens of percent; a true set as a few (Schops et al. 2017
    use the same consistency).
    """
    pose_times = np.arange(len(depth)) / RATES["depth"] * RATES["cam"]
    poses = cam[np.clip(pose_times.round().astype(int), 0, len(cam) - 1)].astype(np.float64)
    side = depth.shape[1]
    v, u = np.mgrid[0:side:4, 0:side:4].reshape(2, -1)
    errors = []
    for a in range(0, len(depth) - step, step):
        z = depth[a][v, u].astype(np.float64)
        seen = z > 0
        rays = np.c_[u[seen] + 0.5, v[seen] + 0.5, np.ones(seen.sum())] @ np.linalg.inv(intrinsics).T
        points = np.c_[rays * z[seen, None], np.ones(seen.sum())]
        moved = points @ (geometry.invert(poses[a + step]) @ poses[a]).T
        ahead = moved[:, 2] > 0.05
        pixels = (geometry.project(moved[ahead, :3], intrinsics) - 0.5).round().astype(int)
        inside = ((pixels >= 0) & (pixels < side)).all(1)
        there = depth[a + step][pixels[inside, 1], pixels[inside, 0]].astype(np.float64)
        expected = moved[ahead][inside, 2]
        errors.append(np.abs(there - expected)[there > 0] / expected[there > 0])
    errors = np.concatenate(errors) if errors else np.zeros(0)
    return float(np.median(errors)) if len(errors) > 50 else float("nan")


class Statistics:
    """Sums and histograms of one sequence, which add up over sequences."""

    EDGES = {"speed_m_s": np.linspace(0, 4, 41), "turn_deg_s": np.linspace(0, 400, 41),
             "depth_m": np.linspace(0, 10, 41),
             "gaze_x": np.linspace(-0.2, 1.2, 29), "gaze_y": np.linspace(-0.2, 1.2, 29)}

    def __init__(self) -> None:
        self.clips: Counter = Counter()
        self.histograms = {n: np.zeros(len(e) - 1, np.int64) for n, e in self.EDGES.items()}
        self.pose_sum, self.pose_squares, self.pose_count = np.zeros(9), np.zeros(9), 0
        self.reprojection: list[float] = []

    def add(self, signals: dict[str, np.ndarray]) -> None:
        self.clips.update(signals.keys())
        if "cam" in signals:
            nine = geometry.pose_to_nine(geometry.relative_to_first(signals["cam"].astype(np.float64)))
            self.pose_sum += nine.sum(0)
            self.pose_squares += (nine**2).sum(0)
            self.pose_count += len(nine)
            rotations = signals["cam"][:, :3, :3].astype(np.float64)
            self._count("speed_m_s", np.linalg.norm(np.diff(signals["cam"][:, :3, 3], axis=0), axis=1) * RATES["cam"])
            turns = geometry.rotation_angle_deg(rotations[:-1].transpose(0, 2, 1) @ rotations[1:])
            self._count("turn_deg_s", turns * RATES["cam"])
        if "depth" in signals:
            self._count("depth_m", signals["depth"][:, ::8, ::8][signals["depth"][:, ::8, ::8] > 0])
        if "gaze" in signals:
            seen = signals["gaze"][signals["gaze"][:, 2] > 0]
            self._count("gaze_x", seen[:, 0])
            self._count("gaze_y", seen[:, 1])

    def _count(self, name: str, values: np.ndarray) -> None:
        edges = self.EDGES[name]
        self.histograms[name] += np.histogram(np.clip(values.astype(np.float64), edges[0], edges[-1]), edges)[0]

    def plain(self) -> dict[str, Any]:
        return {"clips": dict(self.clips), "histograms": {n: h.tolist() for n, h in self.histograms.items()},
                "pose_sum": self.pose_sum.tolist(),
                "pose_squares": self.pose_squares.tolist(), "pose_count": self.pose_count,
                "reprojection": [e for e in self.reprojection if np.isfinite(e)]}
