"""A Recording -> clips of 2 s: resampling to the clip rates, gates for gaps and tracker jumps, crop and resize."""

from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from egom2p import geometry
from egom2p.data.clips import RATES, Clip
from egom2p.data.video import centre_crop, square
from egom2p.datasets.checks import Statistics, reprojection_error
from egom2p.datasets.recording import BadSequence, Pictures, Recording, Track

SECONDS = 2.0
SPEED_LIMIT, TURN_LIMIT = 20.0, 1500.0  # m/s and deg/s between neighbouring 30 Hz poses: more is a jump of the tracker
LARGEST_DEPTH = 65504.0  # metres, what float16 holds
NO_ROTATION = 0.05  # largest entry of R R^T - 1 of a pose that counts
# Seconds a sample may be from the moment it stands for.
LARGEST_GAP = {"rgb": 0.2, "depth": 0.3, "cam": 0.1, "gaze": 0.16}
SERIES_GAP = 0.1  # of any other signal, or one and a half of its own steps where that is more


def safe(sequence: str) -> str:
    """A sequence's name as a file name and clip key."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in sequence)


def cut(recording: Recording, dataset: str, size: int, limit: int, counts: Counter, stats: Statistics,
        key: str = "", rates: Mapping[str, float] = MappingProxyType({})) -> Iterator[Clip]:
    """The recording's clips of 2 s one after another; counts says why others, or parts of these, were left out. key:
    what the clips' keys begin with. rates: Hz of each of `recording.series`."""
    if recording.rgb is None or not len(recording.rgb.times):
        raise BadSequence("no video")
    key = key or safe(recording.name)
    recording.cam = without_bad_poses(recording)
    series = _usable_series(recording, rates)
    start, end = float(recording.rgb.times[0]), float(recording.rgb.times[-1])
    number = 0
    while start + SECONDS <= end + LARGEST_GAP["rgb"] and not (limit and counts["clips kept"] >= limit):
        signals, intrinsics = _signals(recording, start, size, counts)
        if signals:
            signals |= _series_at(series, rates, start, counts)
        if signals:
            counts["clips kept"] += 1
            stats.add(signals)
            meta = {**recording.meta, "source": recording.name, "start": round(start, 6),
                    "rates": {n: {**RATES, **rates}[n] for n in signals}, "side": size}
            if intrinsics is not None:
                meta["intrinsics"] = np.round(intrinsics, 6).tolist()
                if {"depth", "cam"} <= signals.keys():
                    stats.reprojection.append(reprojection_error(signals["depth"], signals["cam"], intrinsics))
            yield Clip(f"{key}-{number:05d}", dataset, signals, meta)
        start += SECONDS
        number += 1


def without_bad_poses(recording: Recording) -> Track | None:
    """The camera track without the rows that are no rigid motion (an all-zero matrix, a scale, NaN); their number is
    noted unless they are NaN, which is how sets mark a lost pose."""
    if recording.cam is None:
        return None
    values = recording.cam.values.astype(np.float64)
    finite = np.isfinite(values).all((1, 2))
    turn = np.where(finite[:, None, None], values, 0)[:, :3, :3]
    off = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    rigid = finite & (off < NO_ROTATION) & (np.linalg.det(turn) > 0)
    bad = int((finite & ~rigid).sum())
    if bad:
        recording.notes.append(f"{bad} of {len(rigid)} poses are no rotation and were left out")
    return Track(recording.cam.times[rigid], values[rigid])


def _signals(recording: Recording, start: float, size: int,
             counts: Counter) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """({signal: array}, intrinsics of the stored frames) of one clip; {} when it has no video."""
    times = {n: start + np.arange(round(SECONDS * RATES[n])) / RATES[n] for n in RATES}
    try:
        frames = pictures_at(recording.rgb, times["rgb"], LARGEST_GAP["rgb"])
    except BadSequence:  # a stretch that cannot be decoded; what follows may be whole
        frames = None
    if frames is None:
        counts["clips dropped: gap in the video"] += 1
        return {}, None
    height, width = frames.shape[1:3]
    crop = recording.crop or min(height, width)
    signals: dict[str, np.ndarray] = {"rgb": square(centre_crop(frames, crop), size)}
    if recording.depth is not None:
        depth, reason = _depth_at(recording, times["depth"])
        if depth is None:
            counts[f"depth left out: {reason}"] += 1
        else:
            own = centre_crop(depth, round(crop * depth.shape[2] / width))
            signals["depth"] = _resize_nearest(own, size).astype(np.float16)
    if recording.cam is not None:
        poses, reason = resample_poses(recording.cam, times["cam"])
        if poses is None:
            counts[f"cam left out: {reason}"] += 1
        else:
            signals["cam"] = poses.astype(np.float32)
    if recording.gaze is not None:
        pixels = resample_points(recording.gaze, times["gaze"])
        gaze = geometry.gaze_from_pixels(pixels, width, height, crop)
        if not gaze[:, 2].any():
            counts["gaze left out: never seen"] += 1
        else:
            signals["gaze"] = gaze
    matrix = None
    if recording.intrinsics is not None:
        left, top = geometry.crop_offset(width, height, crop)
        shift = np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]])
        matrix = np.diag([size / crop, size / crop, 1.0]) @ shift @ recording.intrinsics
    return signals, matrix


def _usable_series(recording: Recording, rates: Mapping[str, float]) -> dict[str, Track]:
    """One's own signals that can be cut; the others are noted."""
    usable = {}
    for name, track in sorted(recording.series.items()):
        if track.times.ndim != 1 or len(track.times) != len(track.values):
            recording.notes.append(f"{name} left out: {track.times.shape} times for {track.values.shape} values")
        elif name not in rates:
            recording.notes.append(f"{name} left out: nobody says at which rate; give --series {name}=HZ")
        else:
            usable[name] = track
    return usable


def _series_at(series: Mapping[str, Track], rates: Mapping[str, float], start: float,
               counts: Counter) -> dict[str, np.ndarray]:
    """One's own signals in a clip that begins at `start`: (T, C) float32, poses (T, 4, 4)."""
    found = {}
    for name, track in series.items():
        rate = rates[name]
        times = start + np.arange(round(SECONDS * rate)) / rate
        if track.values.shape[1:] == (4, 4):
            values, reason = resample_poses(track, times, rate, _gap_of(track))
        else:
            values, reason = resample_series(track, times), "gap or NaN"
        if values is None:
            counts[f"{name} left out: {reason}"] += 1
        else:
            found[name] = values.astype(np.float32)
    return found


def _depth_at(recording: Recording, times: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(T, H, W) metres, 0 = no reading; or None and why. A depth file that cannot be read is left out from there on."""
    try:
        depth = pictures_at(recording.depth, times, LARGEST_GAP["depth"])
    except BadSequence as problem:
        if "ends before" not in str(problem):
            recording.depth = None
            recording.notes.append(f"depth left out: {problem}")
        return None, "gap"
    if depth is None:
        return None, "gap"
    depth = np.where((depth > 0) & (depth < LARGEST_DEPTH), depth, 0)
    return (depth, "") if depth.any() else (None, "no reading")


def pictures_at(source: Pictures, times: np.ndarray, gap: float) -> np.ndarray | None:
    """The pictures nearest in time, or None when one is further than `gap` away."""
    index = nearest(source.times, times)
    if np.abs(source.times[index] - times).max() > gap:
        return None
    return np.stack([source.read(int(i)) for i in index])


def nearest(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index into ascending `known` of the entry nearest to each of `wanted`."""
    right = np.clip(np.searchsorted(known, wanted), 1, len(known) - 1) if len(known) > 1 else np.zeros(len(wanted), int)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(known[left] - wanted) <= np.abs(known[right] - wanted), left, right)


def resample_poses(track: Track, times: np.ndarray, rate: float = RATES["cam"],
                   gap: float = LARGEST_GAP["cam"]) -> tuple[np.ndarray | None, str]:
    """(T, 4, 4) at `times`, `rate` a second: positions linear, rotations along the shortest arc (to first order); or
    None and why."""
    finite = np.isfinite(track.values).all((1, 2))
    known, poses = track.times[finite], track.values[finite].astype(np.float64)
    if len(known) < 2:
        return None, "no pose"
    between = _neighbours(known, times, gap)
    if between is None:
        return None, "gap or NaN"
    left, right, weight = between
    weight = weight[:, None, None]
    out = (1 - weight) * poses[left] + weight * poses[right]
    out[:, :3, :3] = geometry.chordal_mean(out[:, :3, :3])
    speed = np.linalg.norm(np.diff(out[:, :3, 3], axis=0), axis=1) * rate
    turn = geometry.rotation_angle_deg(out[:-1, :3, :3].transpose(0, 2, 1) @ out[1:, :3, :3]) * rate
    if speed.max(initial=0) > SPEED_LIMIT or turn.max(initial=0) > TURN_LIMIT:
        return None, "jump of the tracker"
    return out, ""


def _neighbours(known: np.ndarray, times: np.ndarray,
                gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of two or more ascending times, the indices before and after each of `times` and the weight of the latter; None
    where the nearest is further than `gap` away, or the two more than twice that apart."""
    right = np.clip(np.searchsorted(known, times), 1, len(known) - 1)
    left = right - 1
    nearest_s = np.minimum(np.abs(known[left] - times), np.abs(known[right] - times))
    between_far_ones = (known[right] - known[left] > 2 * gap) & (nearest_s >= 1e-4)
    if (nearest_s > gap).any() or between_far_ones.any():
        return None
    return left, right, np.clip((times - known[left]) / np.maximum(known[right] - known[left], 1e-9), 0, 1)


def resample_points(track: Track, times: np.ndarray) -> np.ndarray:
    """(T, 2) at `times`, linear between neighbours that are both seen, NaN elsewhere."""
    right = np.clip(np.searchsorted(track.times, times), 1, max(1, len(track.times) - 1))
    left = right - 1
    right = np.minimum(right, len(track.times) - 1)
    span = track.times[right] - track.times[left]
    weight = np.clip((times - track.times[left]) / np.maximum(span, 1e-9), 0, 1)[:, None]
    exact = np.where(np.abs(track.times[left] - times) < np.abs(track.times[right] - times), left, right)
    out = (1 - weight) * track.values[left] + weight * track.values[right]
    # On a sample itself its neighbour does not matter.
    near = np.abs(track.times[exact] - times) < 2e-3
    out[near] = track.values[exact][near]
    alone = np.abs(track.times[exact] - times) > LARGEST_GAP["gaze"]
    out[alone | ((span > 2 * LARGEST_GAP["gaze"]) & ~near)] = np.nan
    return out


def _gap_of(track: Track) -> float:
    """Seconds that a value of one's own signal may be from the moment it stands for."""
    return max(SERIES_GAP, 1.5 * float(np.median(np.diff(track.times)))) if len(track.times) > 1 else SERIES_GAP


def resample_series(track: Track, times: np.ndarray) -> np.ndarray | None:
    """(T, C) at `times`, linear between neighbours; None where a neighbour is too far away. Rows that are not finite do
    not count."""
    if len(track.times) < 2:
        return None
    rows = np.asarray(track.values, np.float64).reshape(len(track.times), -1)
    finite = np.isfinite(rows).all(1)
    known, values, gap = track.times[finite], rows[finite], _gap_of(track)
    if len(known) < 2:
        return None
    between = _neighbours(known, times, gap)
    if between is None:
        return None
    left, right, weight = between
    return (1 - weight[:, None]) * values[left] + weight[:, None] * values[right]


def _resize_nearest(frames: np.ndarray, size: int) -> np.ndarray:
    """(T, H, W) -> (T, size, size) by the nearest pixel: depth must not be mixed across edges."""
    rows, columns = (np.minimum(((np.arange(size) + 0.5) * n / size).astype(int), n - 1) for n in frames.shape[1:3])
    return frames[:, rows][:, :, columns]
