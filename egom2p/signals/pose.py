"""Kind `pose`: (T, 4, 4) world_from_camera, metres, OpenCV axes. The network sees nine numbers relative to the first
frame."""


import numpy as np

from egom2p import geometry
from egom2p.signals.kind import Joiner, Series, SignalKind, Statistics, check_numbers
from egom2p.signals.writers import colmap_folder, npy_file, tum_file


def check(signal: np.ndarray) -> None:
    check_numbers(signal, "(T, 4, 4)", 3, 4)
    if signal.shape[1] != 4:
        raise ValueError(f"has shape {signal.shape}, expected (T, 4, 4)")


class PoseSeries(Series):
    """(T, 4, 4) world_from_camera -> 9 numbers relative to the first frame; back to (T, 4, 4) first_from_camera."""

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        return super().normalize(geometry.pose_to_nine(geometry.relative_to_first(np.asarray(signal, np.float64))))

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return geometry.nine_to_pose(super().denormalize(values).astype(np.float64)).astype(np.float32)


def averages(world_from_camera: np.ndarray) -> Statistics:
    """mean_signal (T, 9): relative poses as nine numbers. mean_length (1,): path length in metres."""
    nine = geometry.pose_to_nine(geometry.relative_to_first(world_from_camera.astype(np.float64)))
    return {"mean_signal": nine, "mean_length": np.linalg.norm(np.diff(nine[:, 6:], axis=0), axis=1).sum()}


class PoseJoiner(Joiner):
    """(n, 4, 4) first_from_camera of each window -> poses in the frame of the recording's first camera.

    A window is laid onto the one before by the rigid motion that fits the overlap best: rotations by their chordal
    mean, then positions by their mean. `drift` holds each join's residual: (metres, degrees), root mean square. Where
    windows share no frame, one begins where the other ended, as if the camera stood still in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drift: list[tuple[float, float]] = []

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        new = window[: len(old)]
        rotation = geometry.chordal_mean((old[:, :3, :3] @ new[:, :3, :3].transpose(0, 2, 1)).sum(0))
        move = np.eye(4)
        move[:3, :3] = rotation
        move[:3, 3] = (old[:, :3, 3] - new[:, :3, 3] @ rotation.T).mean(0)
        moved = move @ window
        there = moved[: len(old)]
        metres = np.sqrt(((there[:, :3, 3] - old[:, :3, 3]) ** 2).sum(1).mean())
        angles = geometry.rotation_angle_deg(old[:, :3, :3].transpose(0, 2, 1) @ there[:, :3, :3])
        self.drift.append((float(metres), float(np.sqrt((angles**2).mean()))))
        return moved

    def follow(self, last: np.ndarray, window: np.ndarray) -> np.ndarray:
        return last[0] @ geometry.invert(window[0]) @ window

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = super().blend(old, new, weight)
        out[:, :3, :3] = geometry.chordal_mean(out[:, :3, :3])
        return out


def spread(draws: np.ndarray) -> np.ndarray:
    """(S, T, 4, 4) -> (T, 1) root mean square distance of the camera centres from their mean, metres."""
    centres = draws[:, :, :3, 3]
    return np.sqrt(((centres - centres.mean(0)) ** 2).sum(-1).mean(0))[:, None].astype(np.float32)


POSE = SignalKind("pose", "first_from_camera, metres, OpenCV axes", check, PoseSeries, PoseJoiner,
                  (npy_file, tum_file, colmap_folder), spread, averages, curves=("x, m", "y, m", "z, m"))
