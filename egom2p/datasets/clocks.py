"""Whose clock is it: time stamps of a side file -> seconds from the video's start.

Tools write seconds, milli-, micro- or nanoseconds or frame numbers, from zero or from an epoch. The unit is what makes
the file's span fit the video's; the zero is taken as it stands when the stamps lie in the video, from `NAME.cam.json`
or
`NAME.gaze.json` when that says so, from the first row when both last equally long; otherwise the file is refused with
both ranges. Nothing is guessed beyond that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from egom2p.datasets.recording import BadSequence

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
STEPS_S = (2e-4, 1.1)  # from 5 kHz to key frames a second apart
SLACK_S = 1.0
LEAST_SHARE = 0.2  # of the video that a file in another unit than seconds must cover to be taken for one


@dataclass(frozen=True)
class VideoClock:
    """seconds: the video's length; frames: how many it has."""

    seconds: float
    frames: int

    @classmethod
    def of(cls, times: np.ndarray) -> "VideoClock":
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / 30
        return cls(float(times[-1] - times[0]) + step, len(times))

    @property
    def step(self) -> float:
        return self.seconds / max(self.frames, 1)


def seconds_of(stamps: np.ndarray, clock: VideoClock, what: str, notes: list[str],
               said: dict[str, Any] | None = None) -> np.ndarray:
    """(N,) stamps -> seconds from the video's first frame. said: `unit` (s, ms, us, ns or frames) and `start` (the
    stamp of the video's first frame), from the json beside the file. what: for messages."""
    said = said or {}
    finite = stamps[np.isfinite(stamps)]
    if len(finite) < 2:
        raise BadSequence(f"{what} holds {len(finite)} time stamps")
    unit = _unit(finite, clock, what, said.get("unit", ""))
    if "start" in said:
        return (stamps - float(said["start"])) * unit
    first, last = float(finite.min()) * unit, float(finite.max()) * unit
    if first >= -SLACK_S and last <= clock.seconds + SLACK_S:
        return stamps * unit
    span, step = last - first, float(np.median(np.diff(np.sort(finite)))) * unit
    if len(stamps) == clock.frames or abs(span + step - clock.seconds) <= 2 * max(step, clock.step):
        notes.append(f"{what}: its clock runs from {first:.6g} s; it lasts as long as the video and starts with it")
        return (stamps - finite.min()) * unit
    raise BadSequence(f"{what}: time stamps run from {first:.6g} to {last:.6g} s, the video from 0 to "
                      f"{clock.seconds:.2f} s;"
                      " say which stamp is the video's first frame: {\"start\": STAMP} in the json beside it")


def _unit(stamps: np.ndarray, clock: VideoClock, what: str, said: str) -> float:
    known = {**UNITS, "frames": clock.step}
    if said:
        if said not in known:
            raise BadSequence(f"{what}: unit '{said}' is none of {', '.join(known)}")
        return known[said]
    span, step = float(np.ptp(stamps)), float(np.median(np.diff(np.sort(stamps))))
    if step <= 0:
        raise BadSequence(f"{what}: its time stamps stand still")
    counted = bool(np.all(stamps == np.round(stamps))) and abs(step - 1) < 1e-9
    if counted and span > 1 and span <= clock.frames and not span <= clock.seconds + SLACK_S:
        return clock.step
    fitting = [u for u in UNITS.values() if STEPS_S[0] <= step * u <= STEPS_S[1]
               and span * u <= clock.seconds * 1.05 + SLACK_S and (u == 1 or span * u >= LEAST_SHARE * clock.seconds)]
    if not fitting:
        raise BadSequence(f"{what}: time stamps {stamps.min():.6g} to {stamps.max():.6g} span {span:.6g}, the video "
                          f"lasts {clock.seconds:.2f} s; in no unit (s, ms, us, ns, frames) do they fit together")
    return max(fitting)  # the longest span that fits: a file in a smaller unit would cover almost nothing
