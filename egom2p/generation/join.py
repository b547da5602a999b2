"""Predictions of overlapping windows -> one continuous signal, in constant memory.

Each joiner takes windows in order, `add(start, window)`, and returns the rows that no later window can change; `end()`
returns the rest. In the overlap two windows are blended with weights that go linearly from the old to the new.
"""

from collections.abc import Callable

import numpy as np

from egom2p import geometry

MIN_SPREAD = 1e-6
SCALES = (0.2, 5.0)


class Joiner:
    """Plain blending of (n, ...) windows of numbers; start is a row of the whole signal."""

    def __init__(self) -> None:
        self.start, self.pending = 0, np.zeros(0)

    def add(self, start: int, window: np.ndarray) -> np.ndarray:
        window = window.astype(np.float64)
        if not len(self.pending):
            self.start, self.pending = start, window
            return window[:0]
        done, old = self.pending[: start - self.start], self.pending[start - self.start :]
        overlap = len(old)
        window = self.fit(old, window) if overlap else window
        weight = (np.arange(overlap) + 1) / (overlap + 1)
        self.start, self.pending = start, np.concatenate([self.blend(old, window[:overlap], weight), window[overlap:]])
        return done

    def end(self) -> np.ndarray:
        rest, self.pending = self.pending, self.pending[:0]
        return rest

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        """The window moved so that its first rows lie on `old`."""
        return window

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(-1, *[1] * (old.ndim - 1))
        return (1 - weight) * old + weight * new


class PoseJoiner(Joiner):
    """(n, 4, 4) first_from_camera of each window -> poses in the frame of the recording's first camera.

    A window is laid onto the one before by the rigid motion that fits the overlap best: rotations by their chordal mean,
    then positions by their mean. `drift` holds each join's residual: (metres, degrees), root mean square.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drift: list[tuple[float, float]] = []

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        new = window[: len(old)]
        rotation = chordal_mean((old[:, :3, :3] @ new[:, :3, :3].transpose(0, 2, 1)).sum(0))
        move = np.eye(4)
        move[:3, :3] = rotation
        move[:3, 3] = (old[:, :3, 3] - new[:, :3, 3] @ rotation.T).mean(0)
        moved = move @ window
        metres = np.sqrt(((moved[: len(old), :3, 3] - old[:, :3, 3]) ** 2).sum(1).mean())
        degrees = np.sqrt((geometry.rotation_angle_deg(old[:, :3, :3].transpose(0, 2, 1) @ moved[: len(old), :3, :3]) ** 2).mean())
        self.drift.append((float(metres), float(degrees)))
        return moved

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = super().blend(old, new, weight)
        out[:, :3, :3] = chordal_mean(out[:, :3, :3])
        return out


class GazeJoiner(Joiner):
    """(n, 3) x, y, valid: coordinates are blended, validity is that of either."""

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = super().blend(old, new, weight)
        out[:, 2] = np.maximum(old[:, 2], new[:, 2])
        return out


class DepthJoiner(Joiner):
    """(n, H, W) relative inverse depth, each window with a scale and shift of its own -> in those of the first window."""

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        x, y = window[: len(old)].ravel(), old.ravel()
        spread = x.var()
        scale = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > MIN_SPREAD else 1.0
        scale = float(np.clip(scale, *SCALES))  # an overlap too flat or too noisy to tell must not collapse the rest
        return scale * (window - x.mean()) + y.mean()


class PictureJoiner(Joiner):
    """(n, H, W, 3) uint8 frames, cross-faded."""

    def add(self, start: int, window: np.ndarray) -> np.ndarray:
        return super().add(start, window).round().astype(np.uint8)

    def end(self) -> np.ndarray:
        return super().end().round().astype(np.uint8)


JOINERS: dict[str, Callable[[], Joiner]] = {"pose": PoseJoiner, "gaze": GazeJoiner, "motion": Joiner, "depth": DepthJoiner, "rgb": PictureJoiner}


def chordal_mean(matrices: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> the nearest rotations (Hartley et al., "Rotation Averaging", IJCV 2013, section 5.3)."""
    u, _, vt = np.linalg.svd(matrices)
    flip = np.ones((*u.shape[:-2], 3))
    flip[..., 2] = np.linalg.det(u @ vt)
    return (u * flip[..., None, :]) @ vt
