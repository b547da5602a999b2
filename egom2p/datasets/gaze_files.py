"""Gaze beside a video, as eye trackers and people export it, -> pixels of the video's frames, NaN where nothing was
seen.

Known by their columns (from the exporters' sources and documentation; docs/data.md has the table):
  own             time, x, y [, valid | confidence]; pixels, unless `--gaze-units normalized` says 0 .. 1
  Pupil Core      gaze_timestamp, norm_pos_x, norm_pos_y (0 .. 1, y upwards), confidence
  Pupil Cloud     timestamp [ns], gaze x [px], gaze y [px], worn, blink id (Invisible, Neon)
  Tobii Pro Lab   recording timestamp, gaze point x, gaze point y [MCS px], validity left, validity right
  Tobii Glasses 3 gazedata.gz, a JSON object a line (0 .. 1)
  MPS             yaw and pitch in radians: no pixels without the glasses' calibration, so refused by name
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.datasets.clocks import VideoClock, seconds_of
from egom2p.datasets.recording import BadSequence, Track
from egom2p.datasets.tables import Table, read_table

CONFIDENT = 0.6  # Pupil Labs' own advice: samples below are not reliable
OUTSIDE = 1.05


def read_gaze(path: Path, clock: VideoClock, size: tuple[int, int], units: str, said: dict[str, Any],
              notes: list[str]) -> Track:
    """size: (width, height) of the video's frames. units: "" (find out, refuse when in doubt), pixels or normalized."""
    if path.suffix == ".gz":
        stamps, points, valid, normalized = _glasses3(path)
    else:
        table = read_table(path)
        stamps, points, valid, normalized = _columns(table)
        if table.lost:
            notes.append(f"{path.name}: {table.lost} of {len(table) + table.lost} rows are cut off and were left out")
    times = seconds_of(stamps, clock, str(path), notes, said)
    if normalized is None:
        normalized = _is_normalized(path, points, units)
    if normalized:
        points = points * np.array(size)
    seen = valid & np.isfinite(points).all(1)
    far = (np.abs(points - np.array(size) / 2) > np.array(size) * (OUTSIDE - 0.5)).any(1)
    if not normalized and seen.any() and (far & seen).sum() > 0.2 * seen.sum():
        raise BadSequence(f"{path}: {far[seen].mean():.0%} of the gaze lies outside the {size[0]} x {size[1]} frames; "
                          "it is in pixels of frames of another size (pixels of this video's frames are wanted)")
    order = np.argsort(times, kind="stable")
    order = order[np.isfinite(times[order])]
    return Track(times[order], np.where(seen[:, None], points, np.nan)[order])


def _is_normalized(path: Path, points: np.ndarray, units: str) -> bool:
    finite = points[np.isfinite(points).all(1)]
    if not units and len(finite) and np.abs(finite).max() <= 1.5:
        raise BadSequence(f"{path}: all gaze lies within {np.abs(finite).max():.2f}, which looks like 0 .. 1 where "
                          "pixels are documented; say --gaze-units normalized or --gaze-units pixels")
    return units == "normalized"


def _columns(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool | None]:
    """stamps (N,), points (N, 2), valid (N,) bool, and whether points are 0 .. 1 (None: not known)."""
    names = table.columns
    if any(name.endswith("yaw_rads_cpf") for name in names):
        raise BadSequence(f"{table.path} holds MPS gaze as angles, which need the glasses' calibration; prepare the "
                          "recording with its VRS file, or project it and give pixels")
    if {"norm_pos_x", "norm_pos_y"} <= names.keys():
        if "gaze_timestamp" not in names and "world_index" not in names and "index" not in names:
            raise BadSequence(f"{table.path} holds pupil positions of the eye's own picture; export gaze_positions.csv")
        points = np.stack([names["norm_pos_x"], 1 - names["norm_pos_y"]], 1)
        return table.column("gaze_timestamp", "timestamp"), points, _valid(table), True
    if "gaze x [px]" in names:
        points = np.stack([names["gaze x [px]"], table.column("gaze y [px]")], 1)
        blink = table.get("blink id")
        valid = _valid(table) & (np.isnan(blink) if blink is not None else True)
        return table.column("timestamp [ns]"), points, valid, False
    tobii = next((n for n in names if n.startswith("gaze point x")), None)
    if tobii:
        return _tobii(table, tobii)
    if not table.has_header:
        raise BadSequence(f"{table.path} needs a header with the columns time, x, y and may have valid or confidence")
    points = np.stack([table.column("x", "gaze_x"), table.column("y", "gaze_y")], 1)
    return table.column("time", "timestamp", "t [s]"), points, _valid(table), None


def _valid(table: Table) -> np.ndarray:
    """Rows that count: a valid or worn column that is not 0, a confidence of at least CONFIDENT."""
    valid = np.ones(len(table), bool)
    for name in ("valid", "worn"):
        column = table.get(name)
        if column is not None and np.isfinite(column).any():
            valid &= column > 0
    confidence = table.get("confidence")
    if confidence is not None:
        scale = 100.0 if np.nanmax(confidence) > 1.0 else 1.0
        valid &= confidence / scale >= CONFIDENT
    return valid


def _tobii(table: Table, x_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool | None]:
    """A Tobii Pro Lab export of a glasses project: rows of other sensors and events lie between those of the eye
    tracker, which alone have a word on their validity; theirs without a point are blinks."""
    if "presented stimulus name" in table.columns:
        raise BadSequence(f"{table.path} is of a screen project: its gaze is in pixels of the screen, not of a scene "
                          f"video")
    y_name = x_name.replace("point x", "point y")
    points = np.stack([table.columns[x_name], table.column(y_name)], 1)
    sides = [c for n in ("validity left", "validity right") if (c := table.get(n)) is not None and np.isfinite(c).any()]
    valid = np.any([side > 0 for side in sides], axis=0) if sides else np.ones(len(table), bool)
    stamp = next((n for n in table.columns if n.startswith("recording timestamp")), None)
    if stamp is None:
        raise BadSequence(f"{table.path} needs the column Recording timestamp; it has {', '.join(table.columns)}")
    tracked = np.any([np.isfinite(side) for side in sides], axis=0) if sides else False
    rows = np.isfinite(points).all(1) | tracked | ~np.isfinite(table.columns[stamp])
    return table.columns[stamp][rows], points[rows], valid[rows], "norm" in x_name


def _glasses3(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """`{"type": "gaze", "timestamp": s, "data": {"gaze2d": [x, y], ...}}` a line, seconds from the recording's
    start."""
    stamps, points = [], []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row.get("type") == "gaze":
                    stamps.append(float(row["timestamp"]))
                    points.append(row.get("data", {}).get("gaze2d") or [np.nan, np.nan])
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise BadSequence(f"{path} is no whole Tobii Glasses 3 gazedata ({error})") from error
    if not stamps:
        raise BadSequence(f"{path} holds no gaze")
    table = np.array(points, np.float64)
    return np.array(stamps), table, np.isfinite(table).all(1), True
