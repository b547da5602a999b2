"""Kind `gaze`: (T, 3) x, y in units of the square frame's side, valid (1 or 0)."""


import numpy as np

from egom2p.signals.kind import Joiner, Series, SignalKind, Statistics, check_numbers, spread
from egom2p.signals.writers import npy_file


def check(signal: np.ndarray) -> None:
    check_numbers(signal, "(T, 3): x, y, valid", 2, 3)


class GazeSeries(Series):
    """The network sees zeros with validity 0 for invalid frames; decoding marks all valid."""

    has_validity = True

    def is_observed(self, signal: np.ndarray) -> np.ndarray:
        return (signal[:, -1] > 0) & np.isfinite(signal).all(-1)

    def normalize(self, signal: np.ndarray) -> np.ndarray:
        observed = self.is_observed(signal)[:, None]
        return np.concatenate([np.where(observed, super().normalize(signal[:, :-1]), 0), observed],
                              -1).astype(np.float32)

    def denormalize(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([super().denormalize(values), np.ones((len(values), 1), np.float32)], -1)


def averages(gaze: np.ndarray) -> Statistics:
    """mean_signal (2,): over valid frames."""
    valid = gaze[:, 2] > 0
    return {"mean_signal": gaze[valid, :2].sum(0), "weight": valid.sum()}


class GazeJoiner(Joiner):
    """Coordinates are blended, validity is that of either."""

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = super().blend(old, new, weight)
        out[:, 2] = np.maximum(old[:, 2], new[:, 2])
        return out


GAZE = SignalKind("gaze", "x, y in units of the square frame's side, valid", check, GazeSeries, GazeJoiner, (npy_file,),
                  spread, averages, curves=("x", "y", "valid"))
