"""Kind `motion`: any (T, C) series of numbers, in the units it was trained with."""

from functools import partial

import numpy as np

from egom2p.signals.kind import Joiner, Series, SignalKind, Statistics, check_numbers, spread
from egom2p.signals.writers import npy_file

check = partial(check_numbers, shape="(T, C)", axes=2)


def averages(signal: np.ndarray) -> Statistics:
    """mean_signal (T, C)."""
    return {"mean_signal": signal}


MOTION = SignalKind("motion", "as trained", check, Series, Joiner, (npy_file,), spread, averages)
