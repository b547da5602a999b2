"""Kind `depth`: (T, H, W) metres along the optical axis, 0 = no reading.

Tokens hold relative inverse depth only, so what decoding gives is (T, H, W) in [0, 1], near is 1: the metric scale is
not in the tokens.
"""


import numpy as np

from egom2p.signals.kind import Joiner, SignalKind, Statistics, check_numbers, spread
from egom2p.signals.writers import depth_video_file, npy_file

MIN_SPREAD = 1e-6
SCALES = (0.2, 5.0)

def check(signal: np.ndarray) -> None:
    check_numbers(signal, "(T, H, W) metres", 3)
    if signal.dtype.kind != "f":
        raise ValueError(f"is {signal.dtype}, expected metres as float16 (millimetres divided by 1000)")


def relative_inverse_depth(depth: np.ndarray) -> np.ndarray:
    """Metres (T, H, W), 0 = no reading -> min-max normalised inverse depth in [0, 1]; no reading becomes 0 (far)."""
    depth = np.asarray(depth, np.float32)
    seen = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=seen)
    low, high = (inverse[seen].min(), inverse[seen].max()) if seen.any() else (0, 1)
    return np.where(seen, (inverse - low) / max(high - low, 1e-6), 0)


class DepthPicture:
    """The network sees (1/d - min) / (max - min) over the clip, repeated to three channels in [-1, 1]."""

    def is_observed(self, signal: np.ndarray) -> bool:
        return bool(np.any(signal > 0))

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        """Raw signal -> (3, T, H, W) float32 in [-1, 1]."""
        relative = relative_inverse_depth(signal)
        return np.broadcast_to(relative * 2 - 1, (3, *relative.shape)).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values.mean(0) + 1) / 2, 0, 1).astype(np.float32)


def averages(depth: np.ndarray) -> Statistics:
    """mean_signal (H, W): relative inverse depth, over frames too."""
    return {"mean_signal": relative_inverse_depth(depth).mean(0)}


class DepthJoiner(Joiner):
    """Relative inverse depth, each window with a scale and shift of its own -> in those of the first window."""

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        x, y = window[: len(old)].ravel(), old.ravel()
        together = ((x - x.mean()) * (y - y.mean())).mean()
        # The ratio of spreads, not the least squares slope: noise in the window makes that one too small, and over
        # many joins nothing would be left. An overlap too flat or too noisy to tell must not change the rest.
        scale = y.std() / x.std() if x.var() > MIN_SPREAD and together > 0 else 1.0
        self.shift = float(np.clip(scale, *SCALES))
        return self.shift * (window - x.mean()) + y.mean()

    def follow(self, last: np.ndarray, window: np.ndarray) -> np.ndarray:
        return self.fit(last, window)  # neighbouring frames are nearly one


def shown(video: np.ndarray, predicted: bool) -> np.ndarray:
    """Metres become relative inverse depth, which predictions are already; joined ones leave [0, 1]."""
    return np.clip(video, 0, 1) if predicted else relative_inverse_depth(video)


DEPTH = SignalKind("depth", "relative inverse depth, in the first window's scale", check, DepthPicture, DepthJoiner,
                   (npy_file, depth_video_file), spread, averages, is_picture=True, shown=shown,
                   colours="magma")
