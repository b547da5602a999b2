"""Averages of a signal over its training clips, stored in the tokenizer's export.

They are the trivial predictions that evaluation sets every model against: the mean trajectory, the mean
gaze, the mean depth image, the mean frame.
"""

import numpy as np

from egom2p import geometry
from egom2p.data.rawclips import RawSignalDataset
from egom2p.data.tokens import DamagedClip
from egom2p.tokenizers.signals import relative_inverse_depth

MAX_CLIPS = 1000


def gather_statistics(kind: str, dataset: RawSignalDataset) -> dict[str, np.ndarray]:
    """Means over at most MAX_CLIPS clips spread over the data set; {} for kinds without a trivial prediction."""
    if kind not in _PER_CLIP:
        return {}
    sums: dict[str, np.ndarray] = {}
    count = 0
    for element in np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_CLIPS)).astype(int):
        try:
            figures = _PER_CLIP[kind](dataset.read(int(element)))
        except DamagedClip:
            continue
        if sums and any(sums[k].shape != np.shape(v) for k, v in figures.items()):
            continue
        sums = {k: sums.get(k, 0) + np.asarray(v, np.float64) for k, v in figures.items()}
        count += 1
    return _finish(sums, count)


def _finish(sums: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    weight = sums.pop("weight", np.float64(count))
    return {k: np.asarray(v / max(float(weight), 1), np.float32).reshape(np.shape(v) or (1,)) for k, v in sums.items()}


def _pose(world_from_camera: np.ndarray) -> dict[str, np.ndarray]:
    """mean_signal (T, 9): relative poses as nine numbers. mean_length (1,): path length in metres."""
    nine = geometry.pose_to_nine(geometry.relative_to_first(world_from_camera.astype(np.float64)))
    return {"mean_signal": nine, "mean_length": np.linalg.norm(np.diff(nine[:, 6:], axis=0), axis=1).sum()}


def _gaze(gaze: np.ndarray) -> dict[str, np.ndarray]:
    """mean_signal (2,): over valid frames."""
    valid = gaze[:, 2] > 0
    return {"mean_signal": gaze[valid, :2].sum(0), "weight": valid.sum()}


def _depth(depth: np.ndarray) -> dict[str, np.ndarray]:
    """mean_signal (H, W): relative inverse depth, over frames too."""
    return {"mean_signal": relative_inverse_depth(depth).mean(0)}


def _rgb(frames: np.ndarray) -> dict[str, np.ndarray]:
    """mean_signal (H, W, 3) in 0 .. 255, over frames too."""
    return {"mean_signal": frames.mean(0)}


_PER_CLIP = {"pose": _pose, "gaze": _gaze, "depth": _depth, "rgb": _rgb}
