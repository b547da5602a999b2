"""Kind `motion`: any (T, C) series of numbers, in the units it was trained with."""

from functools import partial
from typing import Any

import numpy as np

from egom2p.signals.kind import Joiner, Measure, MeasureArgs, Series, SignalKind, Statistics, check_numbers, spread
from egom2p.signals.writers import npy_file

check = partial(check_numbers, shape="(T, C)", axes=2)


def averages(signal: np.ndarray) -> Statistics:
    """mean_signal (T, C)."""
    return {"mean_signal": signal}


def measure(args: MeasureArgs) -> Measure:
    return Measure(_metrics, _baselines, _over_time, "root mean square error", "rmse", "none")


def _metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any]) -> dict[str, float]:
    return {"rmse": float(np.sqrt(((predicted.astype(np.float64) - truth) ** 2).mean()))}


def _over_time(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.sqrt(((predicted.astype(np.float64) - truth) ** 2).mean(1))


def _baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    found = {"zero": np.zeros(truth.shape)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape:
        found["mean signal"] = statistics["mean_signal"]
        found["constant mean"] = np.broadcast_to(statistics["mean_signal"].mean(0), truth.shape)
    return found


MOTION = SignalKind("motion", "as trained", check, Series, Joiner, (npy_file,), measure, spread, averages)
