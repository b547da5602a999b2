"""Whose clock is it: time stamps of a side file -> seconds from the video's start.

Tools write seconds, milli-, micro- or nanoseconds or frame numbers, from zero or from an epoch. The unit is what makes
the file's span fit the video's; the zero is taken as it stands when the stamps lie in the video, from `NAME.cam.json`
or
`NAME.gaze.json` when that says so, from the first row when both last equally long; otherwise the file is refused with
both ranges. Nothing is guessed beyond that.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from egom2p.datasets.recording import BadSequence

TIME = re.compile(r"(time|timestamp|t|stamp|recording timestamp)s?(_?(s|sec|seconds|ms|us|ns))?(?![a-z0-9_.])")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
STEPS_S = (2e-4, 1.1)  # from 5 kHz to key frames a second apart
SLACK_S = 1.0
LEAST_SHARE = 0.2  # of the video that a file in another unit than seconds must cover to be taken for one


@dataclass(frozen=True)
class VideoClock:
    """times (F,): seconds of the video's frames, ascending, at whatever rate."""

    times: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def seconds(self) -> float:
        """The video's length."""
        last = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 1 / 30
        return float(self.times[-1] - self.times[0]) + last

    @property
    def step(self) -> float:
        return self.seconds / max(self.frames, 1)

    def of_frames(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) frame numbers, counted from 0, -> seconds from the first frame; beyond the video at its mean rate."""
        outside = np.minimum(numbers, 0) + np.maximum(numbers - (self.frames - 1), 0)
        return np.interp(numbers, np.arange(self.frames), self.times - self.times[0]) + outside * self.step


def time_column(names: Iterable[str]) -> str:
    """The first column that is called like a time, else the first one: tables saved with pandas have their rows'
    numbers in front."""
    names = list(names)
    return next((name for name in names if TIME.match(name)), names[0])


def _step_of(stamps: np.ndarray) -> float:
    """Median of the steps from stamp to stamp; several rows may share one (both eyes', say)."""
    apart = np.diff(np.unique(stamps))
    return float(np.median(apart)) if len(apart) else 0.0


def seconds_of(stamps: np.ndarray, clock: VideoClock, what: str, notes: list[str],
               said: dict[str, Any] | None = None) -> np.ndarray:
    """(N,) stamps -> seconds from the video's first frame. said: `unit` (s, ms, us, ns or frames) and `start` (the
    stamp of the video's first frame), from the json beside the file. what: for messages."""
    said = said or {}
    finite = stamps[np.isfinite(stamps)]
    if len(finite) < 2:
        raise BadSequence(f"{what} holds {len(finite)} time stamps")
    unit = _unit(finite, clock, what, said.get("unit", ""))

    def seconds(x: np.ndarray) -> np.ndarray:
        return clock.of_frames(x) if unit == "frames" else x * UNITS[unit]

    if "start" in said:
        return seconds(stamps - float(said["start"]))
    if unit == "frames" and finite.min() >= 1 and finite.max() == clock.frames:
        notes.append(f"{what}: its frames are counted from 1")
        return seconds(stamps - 1)
    first, last = seconds(np.array([finite.min(), finite.max()])).tolist()
    if first >= -SLACK_S and last <= clock.seconds + SLACK_S:
        return seconds(stamps)
    span, step = last - first, _step_of(seconds(finite))
    if len(stamps) == clock.frames or abs(span + step - clock.seconds) <= 2 * max(step, clock.step):
        notes.append(f"{what}: its clock runs from {first:.6g} s; it lasts as long as the video and starts with it")
        return seconds(stamps - finite.min())
    raise BadSequence(f"{what}: time stamps run from {first:.6g} to {last:.6g} s, the video from 0 to "
                      f"{clock.seconds:.2f} s;"
                      " say which stamp is the video's first frame: {\"start\": STAMP} in the json beside it")


def _unit(stamps: np.ndarray, clock: VideoClock, what: str, said: str) -> str:
    """A name of UNITS, or frames."""
    if said:
        if said not in (*UNITS, "frames"):
            raise BadSequence(f"{what}: unit '{said}' is none of {', '.join(UNITS)}, frames")
        return said
    span, step = float(np.ptp(stamps)), _step_of(stamps)
    if step <= 0:
        raise BadSequence(f"{what}: its time stamps stand still")
    counted = bool(np.all(stamps == np.round(stamps))) and abs(step - 1) < 1e-9
    if counted and span > 1 and span <= clock.frames and not span <= clock.seconds + SLACK_S:
        return "frames"
    fitting = [name for name, u in UNITS.items() if STEPS_S[0] <= step * u <= STEPS_S[1]
               and span * u <= clock.seconds * 1.05 + SLACK_S
               and (name == "s" or span * u >= LEAST_SHARE * clock.seconds)]
    if not fitting:
        raise BadSequence(f"{what}: time stamps {stamps.min():.6g} to {stamps.max():.6g} span {span:.6g}, the video "
                          f"lasts {clock.seconds:.2f} s; in no unit (s, ms, us, ns, frames) do they fit together")
    # The longest span that fits: a file in a smaller unit would cover almost nothing.
    return max(fitting, key=UNITS.__getitem__)
