"""Raw signals <-> the arrays a tokenizer's network sees. One entry a kind of signal; no modality names.

Series (pose, gaze, motion) become (T, C) z-scored numbers, with a last validity column where the signal
has one. Pictures (rgb, depth) become (3, T, H, W) in [-1, 1].
"""

from dataclasses import dataclass

import numpy as np

from egom2p import geometry


@dataclass(frozen=True)
class Series:
    """A (T, C) signal. `mean` and `std` have C entries and live in the tokenizer's export.

    kind pose: (T, 4, 4) world_from_camera <-> 9 numbers relative to the first frame (geometry.pose_to_nine).
    kind gaze: (T, 3) x, y, valid; invalid frames are sent to the network as zeros with validity 0.
    kind motion: (T, C), NaN nowhere.
    """

    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def has_validity(self) -> bool:
        return self.kind in ("gaze",)

    def is_observed(self, signal: np.ndarray) -> np.ndarray:
        """(T,) bool: frames that carry a measurement."""
        if self.has_validity:
            return (signal[:, -1] > 0) & np.isfinite(signal).all(-1)
        return np.isfinite(signal).reshape(len(signal), -1).all(-1)

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (T, C[+1]) float32."""
        signal = np.asarray(signal, np.float64)
        if self.kind == "pose":
            signal = geometry.pose_to_nine(geometry.relative_to_first(signal))
        observed = self.is_observed(signal)
        values = (signal[:, : len(self.mean)] - self.mean) / self.std
        if self.has_validity:
            values = np.concatenate([np.where(observed[:, None], values, 0), observed[:, None]], -1)
        return values.astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        """(T, C) network units -> raw signal: (T, 4, 4) first_from_camera, (T, 3) gaze (valid = 1) or (T, C)."""
        signal = np.asarray(values, np.float64) * self.std + self.mean
        if self.kind == "pose":
            return geometry.nine_to_pose(signal).astype(np.float32)
        if self.has_validity:
            signal = np.concatenate([signal, np.ones((len(signal), 1))], -1)
        return signal.astype(np.float32)


@dataclass(frozen=True)
class Picture:
    """A video signal.

    kind rgb: (T, H, W, 3) uint8. kind depth: metres (T, H, W), 0 = no reading; the network sees relative
    inverse depth, (1/d - min) / (max - min) over the clip, repeated to three channels, and decoding gives
    that relative inverse depth back as (T, H, W) float32 in [0, 1] (the metric scale is not in the tokens).
    """

    kind: str

    def is_observed(self, signal: np.ndarray) -> bool:
        return bool(np.any(signal > 0)) if self.kind == "depth" else True

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (3, T, H, W) float32 in [-1, 1]."""
        if self.kind == "depth":
            relative = relative_inverse_depth(signal)
            return np.broadcast_to(relative * 2 - 1, (3, *relative.shape)).astype(np.float32)
        return np.ascontiguousarray(signal.transpose(3, 0, 1, 2), np.float32) / np.float32(127.5) - 1

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "depth":
            return np.clip((values.mean(0) + 1) / 2, 0, 1).astype(np.float32)
        return np.clip((values.transpose(1, 2, 3, 0) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def relative_inverse_depth(depth: np.ndarray) -> np.ndarray:
    """Metres (T, H, W), 0 = no reading -> min-max normalised inverse depth in [0, 1]; no reading becomes 0 (far)."""
    depth = np.asarray(depth, np.float32)
    seen = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=seen)
    low, high = (inverse[seen].min(), inverse[seen].max()) if seen.any() else (0, 1)
    return np.where(seen, (inverse - low) / max(high - low, 1e-6), 0)
