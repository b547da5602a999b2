"""What a kind of signal is, and the parts that most kinds share.

Everything the framework does that depends on what a raw signal *is* (a pose, a picture, a gaze, ...) hangs on one
`SignalKind` object. A modality names its kind, and no room branches on names of modalities or kinds. (What a prediction
of a kind is worth is its `Measure`, in `evaluation/measures.py`, which lies higher.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Statistics = dict[str, np.ndarray]


class NetworkUnits(Protocol):
    """Raw signals of one kind <-> the arrays a tokenizer's network sees."""

    def is_observed(self, signal: np.ndarray) -> Any:
        """(T,) bool, or one bool for pictures: what carries a measurement."""
    def normalize(self, signal: np.ndarray) -> np.ndarray: ...
    def denormalize(self, values: np.ndarray) -> np.ndarray: ...


class Writer(Protocol):
    """A file that grows."""

    def append(self, part: np.ndarray) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class SignalKind:
    """One kind of raw signal, for example `pose`.

    unit: of what decoding gives, in words.
    check(signal): raises ValueError, in words a user can act on, when an array cannot be of this kind.
    network: makes the `NetworkUnits`; of (mean, std) for series, of nothing for pictures.
    is_picture: the network sees (3, T, H, W); otherwise (T, C[+1]).
    averages(signal) -> {name: array}: summed over training clips and divided by their number (or by `weight` when that
    is among them); they are the trivial predictions that evaluation sets every model against. None: there are none.
    joiner: makes what lays overlapping windows together. spread((S, T, ...) draws) -> (T, ...).
    writers: each makes a growing file in a folder from (folder, name, rate in Hz).
    shown(signal, predicted): pictures only, what a plot draws; colours: matplotlib's colour map for it. curves: names
    of what is drawn of a series over time (of a pose: where the camera is).
    """

    name: str
    unit: str
    check: Callable[[np.ndarray], None]
    network: Callable[..., NetworkUnits]
    joiner: Callable[[], "Joiner"]
    writers: tuple[Callable[[Path, str, float], Writer], ...]
    spread: Callable[[np.ndarray], np.ndarray]
    averages: Callable[[np.ndarray], Statistics] | None = None
    is_picture: bool = False
    shown: Callable[[np.ndarray, bool], np.ndarray] | None = None
    colours: str | None = None
    curves: tuple[str, ...] = ()

    def statistics(self, signals: Iterable[np.ndarray]) -> Statistics:
        """Averages over raw signals; those whose shape differs from the first one's are left out."""
        if self.averages is None:
            return {}
        sums: Statistics = {}
        count = 0
        for signal in signals:
            figures = self.averages(signal)
            if sums and any(sums[k].shape != np.shape(v) for k, v in figures.items()):
                continue
            sums = {k: sums.get(k, 0) + np.asarray(v, np.float64) for k, v in figures.items()}
            count += 1
        weight = max(float(sums.pop("weight", np.float64(count))), 1)
        return {k: np.asarray(v / weight, np.float32).reshape(np.shape(v) or (1,)) for k, v in sums.items()}


@dataclass(frozen=True)
class Series:
    """(T, C) numbers, z-scored. `mean` and `std` have C entries and live in the tokenizer's export."""

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


class Joiner:
    """Overlapping windows of one signal -> one continuous signal, in constant memory.

    Windows come in order: `add(start, window)` returns the rows that no later window can change, `end()` the rest;
    start is a row of the whole signal. In the overlap two windows are blended with weights that go linearly from the
    old to the new. This one serves (n, ...) numbers; a subclass fits or blends in its own way. shift: what the newest
    window was multiplied by, where a subclass does that.
    """

    shift = 1.0

    drift: list[tuple[float, float]] | None = None  # residual of each join, where a subclass measures it

    def __init__(self) -> None:
        self.start, self.pending = 0, np.zeros(0)

    def add(self, start: int, window: np.ndarray) -> np.ndarray:
        window = window.astype(np.float64)
        if not len(self.pending):
            self.start, self.pending = start, window
            return window[:0]
        done, old = self.pending[: start - self.start], self.pending[start - self.start :]
        overlap = len(old)
        window = self.fit(old, window) if overlap else self.follow(self.pending[-1:], window)
        weight = (np.arange(overlap) + 1) / (overlap + 1)
        blended = self.blend(old, window[:overlap], weight)
        self.start, self.pending = start, np.concatenate([blended, window[overlap:]])
        return done

    def end(self) -> np.ndarray:
        rest, self.pending = self.pending, self.pending[:0]
        return rest

    def fit(self, old: np.ndarray, window: np.ndarray) -> np.ndarray:
        """The window moved so that its first rows lie on `old`."""
        return window

    def follow(self, last: np.ndarray, window: np.ndarray) -> np.ndarray:
        """The window moved so that it goes on from the row before it, where the two share none."""
        return window

    def blend(self, old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(-1, *[1] * (old.ndim - 1))
        return (1 - weight) * old + weight * new


def spread(draws: np.ndarray) -> np.ndarray:
    """(S, T, ...) -> (T, ...) standard deviation over draws."""
    return draws.std(0).astype(np.float32)


def check_numbers(signal: np.ndarray, shape: str, axes: int, last: int | None = None) -> None:
    """ValueError unless `signal` has numbers, `axes` axes and, where given, `last` entries on the last of them."""
    if signal.dtype.kind not in "fiu":
        raise ValueError(f"is {signal.dtype}, expected numbers of shape {shape}")
    if signal.ndim != axes or 0 in signal.shape or (last and signal.shape[-1] != last):
        raise ValueError(f"has shape {signal.shape}, expected {shape}")
