"""Raw signals <-> the arrays a tokenizer's network sees. One entry a kind of signal; no modality names.

Series (pose, gaze, motion) become (T, C) z-scored numbers, with a last validity column where the signal
has one. Pictures (rgb, depth) become (3, T, H, W) in [-1, 1].
"""

from dataclasses import dataclass

import numpy as np

from egom2p import geometry


@dataclass(frozen=True)
class Series:
    """Kind `motion`: a (T, C) signal, NaN nowhere. `mean` and `std` have C entries and live in the tokenizer's export."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    has_validity = False

    def is_observed(self, signal: np.ndarray) -> np.ndarray:
        """(T,) bool: frames that carry a measurement."""
        return np.isfinite(signal).reshape(len(signal), -1).all(-1)

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (T, C[+1]) float32."""
        return ((np.asarray(signal, np.float64) - self.mean) / self.std).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        """(T, C) network units -> raw signal."""
        return (np.asarray(values, np.float64) * self.std + self.mean).astype(np.float32)


class PoseSeries(Series):
    """Kind `pose`: (T, 4, 4) world_from_camera -> 9 numbers relative to the first frame; back to (T, 4, 4) first_from_camera."""

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        return super().normalize(geometry.pose_to_nine(geometry.relative_to_first(np.asarray(signal, np.float64))))

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return geometry.nine_to_pose(super().denormalize(values).astype(np.float64)).astype(np.float32)


class GazeSeries(Series):
    """Kind `gaze`: (T, 3) x, y, valid. The network sees zeros with validity 0 for invalid frames; decoding marks all valid."""

    has_validity = True

    def is_observed(self, signal: np.ndarray) -> np.ndarray:
        return (signal[:, -1] > 0) & np.isfinite(signal).all(-1)

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        observed = self.is_observed(signal)[:, None]
        return np.concatenate([np.where(observed, super().normalize(signal[:, :-1]), 0), observed], -1).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([super().denormalize(values), np.ones((len(values), 1), np.float32)], -1)


class RgbPicture:
    """Kind `rgb`: (T, H, W, 3) uint8."""

    def is_observed(self, signal: np.ndarray) -> bool:
        return True

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (3, T, H, W) float32 in [-1, 1]."""
        return np.ascontiguousarray(signal.transpose(3, 0, 1, 2), np.float32) / np.float32(127.5) - 1

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.transpose(1, 2, 3, 0) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


class DepthPicture:
    """Kind `depth`: metres (T, H, W), 0 = no reading.

    The network sees relative inverse depth, (1/d - min) / (max - min) over the clip, repeated to three
    channels; decoding gives that relative inverse depth back as (T, H, W) float32 in [0, 1] (the metric scale
    is not in the tokens).
    """

    def is_observed(self, signal: np.ndarray) -> bool:
        return bool(np.any(signal > 0))

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (3, T, H, W) float32 in [-1, 1]."""
        relative = relative_inverse_depth(signal)
        return np.broadcast_to(relative * 2 - 1, (3, *relative.shape)).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.mean(0) + 1) / 2, 0, 1).astype(np.float32)


SERIES = {"motion": Series, "pose": PoseSeries, "gaze": GazeSeries}
PICTURES = {"rgb": RgbPicture, "depth": DepthPicture}


def relative_inverse_depth(depth: np.ndarray) -> np.ndarray:
    """Metres (T, H, W), 0 = no reading -> min-max normalised inverse depth in [0, 1]; no reading becomes 0 (far)."""
    depth = np.asarray(depth, np.float32)
    seen = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=seen)
    low, high = (inverse[seen].min(), inverse[seen].max()) if seen.any() else (0, 1)
    return np.where(seen, (inverse - low) / max(high - low, 1e-6), 0)
