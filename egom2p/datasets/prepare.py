"""`egom2p prepare`: raw sequences -> clips, a card and a contact sheet.

Each sequence becomes `OUT/SPLIT/SEQUENCE.tar` (absent when nothing of it is kept) and `OUT/records/SEQUENCE.json` with what was kept, what
was dropped and why. Sequences are independent: any number of processes writes the same files, a second run does
only what is missing, and one that fails is written down and harms no other.
"""

import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p import geometry
from egom2p.data.clips import RATES, Clip, write_clips
from egom2p.data.video import square
from egom2p.datasets.recording import BadSequence, Pictures, Recording, Track
from egom2p.errors import UserError
from egom2p.generation.join import chordal_mean

log = logging.getLogger(__name__)

SECONDS = 2.0
SPEED_LIMIT, TURN_LIMIT = 20.0, 1500.0  # m/s and deg/s between neighbouring 30 Hz poses: more is a jump of the tracker
LARGEST_GAP = {"rgb": 0.2, "depth": 0.3, "cam": 0.1, "gaze": 0.16}  # seconds a sample may be from the moment it stands for


@dataclass(frozen=True)
class PrepareArgs:
    """size: side of the stored frames in pixels; limit: clips a sequence (0 = all); workers: processes (0 = all cores)."""

    size: int = 256
    limit: int = 0
    workers: int = 0


def prepare(name: str, root: Path, out: Path, args: PrepareArgs, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Prepare every sequence (or those in `only`) of data set `name`. Returns the card."""
    from egom2p.datasets.card import write_card

    adapter = make_adapter(name)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected {adapter.layout}")
    sequences = adapter.sequences(root)
    missing = set(only) - set(sequences)
    if missing:
        raise UserError(f"{root} has no sequence '{sorted(missing)[0]}'; there are {len(sequences)}, the first {', '.join(sequences[:3])}")
    sequences = [s for s in sequences if not only or s in only]
    _check_same_settings(out, name, args)
    waiting = [s for s in sequences if not record_path(out, s).exists()]
    workers = min(args.workers or os.cpu_count() or 1, max(1, len(waiting)))
    bar = tqdm(total=len(sequences), initial=len(sequences) - len(waiting), desc=f"prepare {name}", unit="sequence")
    for record in _run(name, root, out, args, waiting, workers):
        bar.update(1)
        if record["error"]:
            log.warning("%s: left out: %s", record["sequence"], record["error"])
    bar.close()
    return write_card(out, set_name(name))


def record_path(out: Path, sequence: str) -> Path:
    return out / "records" / f"{safe(sequence)}.json"


def safe(sequence: str) -> str:
    """A sequence's name as a file name and clip key."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in sequence)


def make_adapter(name: str):
    """The adapter of a data set, by its name or as `package.module:Class`; UserError lists those there are."""
    from egom2p.datasets import ADAPTERS

    if name not in ADAPTERS and ":" not in name:
        raise UserError(f"no data set '{name}'; there are {', '.join(sorted(ADAPTERS))}, or name your own as package.module:Class")
    module, _, attribute = ADAPTERS.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"data set '{name}': {error}; write package.module:Class of an importable module") from error


def set_name(name: str) -> str:
    """What the clips of a data set are labelled with: its name, or the adapter's own for a package.module:Class."""
    return make_adapter(name).name if ":" in name else name


def _check_same_settings(out: Path, name: str, args: PrepareArgs) -> None:
    note = out / "prepare.json"
    settings = {"dataset": name, "size": args.size, "limit": args.limit}
    if note.exists() and json.loads(note.read_text()) != settings:
        raise UserError(f"{out} was prepared with {json.loads(note.read_text())}, now {settings}; choose another --out or remove it")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings))


def _run(name: str, root: Path, out: Path, args: PrepareArgs, sequences: list[str], workers: int) -> Iterator[dict]:
    if workers <= 1:
        for sequence in sequences:
            yield prepare_sequence(name, root, out, args, sequence)
        return
    import multiprocessing

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(prepare_sequence, name, root, out, args, s) for s in sequences]):
            yield done.result()


def prepare_sequence(name: str, root: Path, out: Path, args: PrepareArgs, sequence: str) -> dict[str, Any]:
    """One sequence -> its tar and its record, which is returned. Never raises for what the sequence holds."""
    counts, stats, error, split, seconds = Counter(), _Stats(), "", "", 0.0
    try:
        recording = make_adapter(name).open(root, sequence)
        split, seconds = recording.split, float(np.ptp(recording.rgb.times)) if recording.rgb is not None and len(recording.rgb.times) else 0.0
        clips = cut(recording, set_name(name), args, counts, stats)
        first = next(clips, None)
        if first is not None:
            write_clips(out / recording.split / f"{safe(sequence)}.tar", _chain(first, clips))
    except UserError:
        raise
    except Exception as problem:  # whatever is wrong with this sequence must not cost the others
        error = f"{type(problem).__name__}: {problem}" if not isinstance(problem, BadSequence) else str(problem)
        for tar in out.glob(f"*/{safe(sequence)}.tar"):
            tar.unlink()
        counts, stats = Counter({"sequences that failed": 1}), _Stats()
    record = {"sequence": sequence, "split": split, "error": error, "seconds": seconds, "counts": dict(counts), "stats": stats.plain()}
    path = record_path(out, sequence)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(record))
    aside.replace(path)
    return record


def cut(recording: Recording, dataset: str, args: PrepareArgs, counts: Counter, stats: "_Stats") -> Iterator[Clip]:
    """The recording's clips of 2 s one after another; counts says why others, or parts of these, were left out."""
    if recording.rgb is None or not len(recording.rgb.times):
        raise BadSequence("no video")
    start, end = float(recording.rgb.times[0]), float(recording.rgb.times[-1])
    number = 0
    while start + SECONDS <= end + LARGEST_GAP["rgb"] and not (args.limit and counts["clips kept"] >= args.limit):
        try:
            signals, intrinsics = _signals(recording, start, args.size, counts)
        except BadSequence as problem:
            # Decoding broke off: what came before is whole.
            counts[f"clips dropped: {'video broke off' if 'ends at' in str(problem) or 'decoded' in str(problem) else problem}"] += 1
            return
        if signals:
            counts["clips kept"] += 1
            stats.add(signals)
            meta = {**recording.meta, "source": recording.name, "start": round(start, 6), "rates": {n: RATES[n] for n in signals}, "side": args.size}
            if intrinsics is not None:
                meta["intrinsics"] = np.round(intrinsics, 6).tolist()
                if {"depth", "cam"} <= signals.keys():
                    stats.reprojection.append(reprojection_error(signals["depth"], signals["cam"], intrinsics))
            yield Clip(f"{safe(recording.name)}-{number:05d}", dataset, signals, meta)
        start += SECONDS
        number += 1


def _signals(recording: Recording, start: float, size: int, counts: Counter) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """({signal: array}, intrinsics of the stored frames) of one clip; {} when it has no video."""
    times = {n: start + np.arange(round(SECONDS * RATES[n])) / RATES[n] for n in RATES}
    frames = _pictures(recording.rgb, times["rgb"], LARGEST_GAP["rgb"])
    if frames is None:
        counts["clips dropped: gap in the video"] += 1
        return {}, None
    height, width = frames.shape[1:3]
    crop = recording.crop or min(height, width)
    signals: dict[str, np.ndarray] = {"rgb": square(_centre(frames, crop), size)}
    if recording.depth is not None:
        depth = _pictures(recording.depth, times["depth"], LARGEST_GAP["depth"])
        if depth is None or not (depth > 0).any():
            counts["depth left out: gap" if depth is None else "depth left out: no reading"] += 1
        else:
            signals["depth"] = _resize_nearest(_centre(depth, round(crop * depth.shape[2] / width)), size).astype(np.float16)
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
        shift = np.array([[1, 0, -(width - crop) / 2], [0, 1, -(height - crop) / 2], [0, 0, 1]])
        matrix = np.diag([size / crop, size / crop, 1.0]) @ shift @ recording.intrinsics
    return signals, matrix


def _pictures(source: Pictures, times: np.ndarray, gap: float) -> np.ndarray | None:
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


def resample_poses(track: Track, times: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(T, 4, 4) at `times`: positions linear, rotations along the shortest arc (to first order); or None and why."""
    finite = np.isfinite(track.values).all((1, 2))
    known, poses = track.times[finite], track.values[finite].astype(np.float64)
    if len(known) < 2:
        return None, "no pose"
    right = np.clip(np.searchsorted(known, times), 1, len(known) - 1)
    left = right - 1
    on_it = np.minimum(np.abs(known[left] - times), np.abs(known[right] - times)) < 1e-4
    if (np.minimum(np.abs(known[left] - times), np.abs(known[right] - times)) > LARGEST_GAP["cam"]).any() or ((known[right] - known[left] > 2 * LARGEST_GAP["cam"]) & ~on_it).any():
        return None, "gap or NaN"
    weight = np.clip((times - known[left]) / np.maximum(known[right] - known[left], 1e-9), 0, 1)[:, None, None]
    out = (1 - weight) * poses[left] + weight * poses[right]
    determinants = np.linalg.det(poses[:, :3, :3])
    if np.abs(determinants - 1).max() > 0.05:
        return None, "no rotation (determinant is not 1)"
    out[:, :3, :3] = chordal_mean(out[:, :3, :3])
    speed = np.linalg.norm(np.diff(out[:, :3, 3], axis=0), axis=1) * RATES["cam"]
    turn = geometry.rotation_angle_deg(out[:-1, :3, :3].transpose(0, 2, 1) @ out[1:, :3, :3]) * RATES["cam"]
    if speed.max() > SPEED_LIMIT or turn.max() > TURN_LIMIT:
        return None, "jump of the tracker"
    return out, ""


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
    out[(np.abs(track.times[exact] - times) > LARGEST_GAP["gaze"]) | ((span > 2 * LARGEST_GAP["gaze"]) & ~near)] = np.nan
    return out


def _centre(frames: np.ndarray, crop: int) -> np.ndarray:
    """The centred crop x crop square of (T, H, W, ...)."""
    top, left = (frames.shape[1] - crop) // 2, (frames.shape[2] - crop) // 2
    return frames[:, max(0, top) : max(0, top) + crop, max(0, left) : max(0, left) + crop]


def _resize_nearest(frames: np.ndarray, size: int) -> np.ndarray:
    """(T, H, W) -> (T, size, size) by the nearest pixel: depth must not be mixed across edges."""
    rows, columns = (np.minimum(((np.arange(size) + 0.5) * n / size).astype(int), n - 1) for n in frames.shape[1:3])
    return frames[:, rows][:, :, columns]


def reprojection_error(depth: np.ndarray, cam: np.ndarray, intrinsics: np.ndarray, step: int = 4) -> float:
    """Median relative disagreement of depth carried from one frame into another `step` frames later (nan if untestable).

    Wrong axes, transposed matrices or wrong intrinsics show as tens of percent; a true set as a few (Schops et al. 2017 use
    the same consistency).
    """
    pose_times = np.arange(len(depth)) / RATES["depth"] * RATES["cam"]
    poses = cam[np.clip(pose_times.round().astype(int), 0, len(cam) - 1)].astype(np.float64)
    side = depth.shape[1]
    v, u = np.mgrid[0:side:4, 0:side:4].reshape(2, -1)
    errors = []
    for a in range(0, len(depth) - step, step):
        z = depth[a][v, u].astype(np.float64)
        seen = z > 0
        rays = np.c_[u[seen] + 0.5, v[seen] + 0.5, np.ones(seen.sum())] @ np.linalg.inv(intrinsics).T
        points = np.c_[rays * z[seen, None], np.ones(seen.sum())]
        moved = points @ (geometry.invert(poses[a + step]) @ poses[a]).T
        ahead = moved[:, 2] > 0.05
        pixels = (geometry.project(moved[ahead, :3], intrinsics) - 0.5).round().astype(int)
        inside = ((pixels >= 0) & (pixels < side)).all(1)
        there = depth[a + step][pixels[inside, 1], pixels[inside, 0]].astype(np.float64)
        expected = moved[ahead][inside, 2]
        errors.append(np.abs(there - expected)[there > 0] / expected[there > 0])
    errors = np.concatenate(errors) if errors else np.zeros(0)
    return float(np.median(errors)) if len(errors) > 50 else float("nan")


class _Stats:
    """Sums and histograms of one sequence, which add up over sequences."""

    EDGES = {"speed_m_s": np.linspace(0, 4, 41), "turn_deg_s": np.linspace(0, 400, 41), "depth_m": np.linspace(0, 10, 41),
             "gaze_x": np.linspace(-0.2, 1.2, 29), "gaze_y": np.linspace(-0.2, 1.2, 29)}

    def __init__(self) -> None:
        self.clips: Counter = Counter()
        self.histograms = {n: np.zeros(len(e) - 1, np.int64) for n, e in self.EDGES.items()}
        self.pose_sum, self.pose_squares, self.pose_count = np.zeros(9), np.zeros(9), 0
        self.reprojection: list[float] = []

    def add(self, signals: dict[str, np.ndarray]) -> None:
        self.clips.update(signals.keys())
        if "cam" in signals:
            nine = geometry.pose_to_nine(geometry.relative_to_first(signals["cam"].astype(np.float64)))
            self.pose_sum += nine.sum(0)
            self.pose_squares += (nine**2).sum(0)
            self.pose_count += len(nine)
            rotations = signals["cam"][:, :3, :3].astype(np.float64)
            self._count("speed_m_s", np.linalg.norm(np.diff(signals["cam"][:, :3, 3], axis=0), axis=1) * RATES["cam"])
            self._count("turn_deg_s", geometry.rotation_angle_deg(rotations[:-1].transpose(0, 2, 1) @ rotations[1:]) * RATES["cam"])
        if "depth" in signals:
            self._count("depth_m", signals["depth"][:, ::8, ::8][signals["depth"][:, ::8, ::8] > 0])
        if "gaze" in signals:
            seen = signals["gaze"][signals["gaze"][:, 2] > 0]
            self._count("gaze_x", seen[:, 0])
            self._count("gaze_y", seen[:, 1])

    def _count(self, name: str, values: np.ndarray) -> None:
        edges = self.EDGES[name]
        self.histograms[name] += np.histogram(np.clip(values.astype(np.float64), edges[0], edges[-1]), edges)[0]

    def plain(self) -> dict[str, Any]:
        return {"clips": dict(self.clips), "histograms": {n: h.tolist() for n, h in self.histograms.items()}, "pose_sum": self.pose_sum.tolist(),
                "pose_squares": self.pose_squares.tolist(), "pose_count": self.pose_count, "reprojection": [e for e in self.reprojection if np.isfinite(e)]}


def _chain(first: Clip, rest: Iterator[Clip]) -> Iterator[Clip]:
    yield first
    yield from rest


