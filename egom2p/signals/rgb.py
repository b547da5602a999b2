"""Kind `rgb`: (T, H, W, 3) uint8 frames."""


import numpy as np

from egom2p.signals.kind import Joiner, SignalKind, Statistics, check_numbers, spread
from egom2p.signals.writers import video_file


def check(signal: np.ndarray) -> None:
    check_numbers(signal, "(T, H, W, 3)", 4, 3)
    if signal.dtype != np.uint8:
        raise ValueError(f"is {signal.dtype}, expected uint8 in 0 .. 255")


class RgbPicture:
    """The network sees (3, T, H, W) in [-1, 1]."""

    def is_observed(self, signal: np.ndarray) -> bool:
        return True

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (3, T, H, W) float32 in [-1, 1]."""
        return np.ascontiguousarray(signal.transpose(3, 0, 1, 2), np.float32) / np.float32(127.5) - 1

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.transpose(1, 2, 3, 0) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def averages(frames: np.ndarray) -> Statistics:
    """mean_signal (H, W, 3) in 0 .. 255, over frames too."""
    return {"mean_signal": frames.mean(0)}


class PictureJoiner(Joiner):
    """Frames are cross-faded."""

    def add(self, start: int, window: np.ndarray) -> np.ndarray:
        return super().add(start, window).round().astype(np.uint8)

    def end(self) -> np.ndarray:
        return super().end().round().astype(np.uint8)


def shown(video: np.ndarray, predicted: bool) -> np.ndarray:
    return video


RGB = SignalKind("rgb", "uint8", check, RgbPicture, PictureJoiner, (video_file,), spread, averages,
                 is_picture=True, shown=shown)
