"""A folder of one's own videos: any mp4, mov, mkv, avi or webm, with optional files beside it, named after the video.

  NAME.mp4                     shown upright with square pixels, whatever the phone wrote; side files mean that picture
  NAME.cam.tum                 trajectory, `time tx ty tz qx qy qz qw` a line: camera to world, metres (`trajectories`)
  NAME.colmap/                 or a COLMAP model, text or binary (world to camera, one image a frame)
  NAME.cam.json                optional: {"unit": "ns", "start": STAMP, "quaternion": "wxyz", "first_image": 1}
  NAME.gaze.csv                `time,x,y[,valid]`, or as an eye tracker exports it (`gaze_files`); NAME.gaze.tsv,
                               NAME.gazedata.gz; NAME.gaze.json: {"unit": ..., "start": ...}
  NAME.depth.npy               (T, H, W) metres, 0 = no reading, one a video frame; or NAME.depth/NUMBER.png, 16-bit
                               millimetres, counted from 0 or from 1
  NAME.intrinsics.txt          3 x 3 pixels of the video's frames
  NAME.imu.csv                 any other signal that is asked for (`--series imu=200`): a column of times and one a
                               channel, in any form that `tables` reads (.csv, .tsv, .txt); NAME.imu.json: as for gaze
Camera axes are OpenCV's (x right, y down, z forward). A COLMAP model has no scale of its own: its units are taken as
metres. The split is `train`, or what the top folder is called when that is train, val or test.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from egom2p.config import read_json
from egom2p.datasets.clocks import VideoClock, seconds_of, time_column
from egom2p.datasets.gaze_files import read_gaze
from egom2p.datasets.recording import (
    RESERVED,
    Adapter,
    ArrayPictures,
    BadSequence,
    ImagePictures,
    Pictures,
    Recording,
    Track,
    VideoPictures,
    check_shape,
    fit_intrinsics,
    need,
)
from egom2p.datasets.tables import read_matrix, read_table
from egom2p.datasets.trajectories import read_colmap, read_tum
from egom2p.files import walk

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mts", ".ts")
SIDES = (".cam.tum", ".cam.json", ".colmap", ".gaze.csv", ".gaze.tsv", ".gazedata.gz", ".gaze.json", ".depth.npy",
         ".depth", ".intrinsics.txt")
TABLES = (".csv", ".tsv", ".txt")
SHOWN = 20


class VideoFolder(Adapter):
    name = "video"
    layout = ("videos (.mp4, .mov, .mkv, .avi, .webm), each with optional NAME.cam.tum, NAME.colmap/, NAME.gaze.csv, "
              "NAME.depth.npy, NAME.intrinsics.txt; and NAME.imu.csv with --series imu=HZ")

    def __init__(self, gaze_units: str = "", series: Mapping[str, float] = MappingProxyType({})) -> None:
        self.gaze_units, self.series = gaze_units, series
        self.sides = (*SIDES, *(f".{name}{ending}" for name in series for ending in (*TABLES, ".json")))

    def sequences(self, root: Path) -> list[str]:
        films = [p for p in walk(root) if p.suffix.lower() in SUFFIXES]
        known = {str(p.with_suffix("")) for p in films}
        return need(root, sorted(p.relative_to(root).as_posix() for p in films if not self._beside(p, known)), self)

    def _beside(self, film: Path, known: set[str]) -> bool:
        """Whether a film is called as if it were a side file of another (NAME.depth.mkv beside NAME.mp4)."""
        return film.with_suffix("").suffix in self.sides and str(film.with_suffix("").with_suffix("")) in known

    def files(self, root: Path, sequence: str) -> list[Path]:
        path = root / sequence
        sides = [Path(f"{path.with_suffix('')}{suffix}") for suffix in self.sides]
        return [path, *(f for s in sides for f in ([s] if s.is_file() else walk(s) if s.is_dir() else []))]

    def skipped(self, root: Path) -> list[str]:
        """Side files without a video, and files of endings that mean nothing here."""
        files = list(walk(root))
        videos = {str(p.with_suffix("")) for p in files if p.suffix.lower() in SUFFIXES}
        rows: dict[str, str] = {}
        for path in files:
            if path.suffix.lower() in SUFFIXES:
                if self._beside(path, videos):
                    name = path.relative_to(root).as_posix()
                    rows[name] = f"{name}: called as a side file, and none of those is a film (docs/data.md)"
                continue
            base, suffix = _side_of(path, root, self.sides)
            name = path.relative_to(root).as_posix()
            if not suffix:
                own = re.fullmatch(r"(.+)\.([A-Za-z_]\w*)", path.with_suffix("").name)
                asked = path.suffix in TABLES and own and str(path.with_name(own[1])) in videos and (
                    own[2] not in RESERVED)
                rows[name] = f"{name}: neither a video nor a side file" + (
                    f"; --series {own[2]}=HZ takes it for a signal of your own" if asked else "")
            elif base not in videos:
                top = Path(base).relative_to(root).as_posix() + suffix
                rows[top] = f"{top}: no video is called {Path(base).name}"
        said = list(rows.values())
        return said[:SHOWN] + ([f"{len(said) - SHOWN} more"] if len(said) > SHOWN else [])

    def open(self, root: Path, sequence: str) -> Recording:
        path = root / sequence
        video = VideoPictures(path)
        height, width = video.read(0).shape[:2]
        top = sequence.split("/")[0]
        recording = Recording(sequence, top if top in ("train", "val", "test") else "train", rgb=video)
        twins = [p.name for p in path.parent.iterdir() if p.stem == path.stem and p.suffix.lower() in SUFFIXES]
        if len(twins) > 1 and len(self.files(root, sequence)) > 1:
            recording.notes.append(f"side files left out: {' and '.join(sorted(twins))} share them; rename one")
            return recording
        beside = _Beside(path.with_suffix(""), video.times, (width, height), self.gaze_units, recording.notes)
        recording.depth = recording.attempt("depth", beside.depth)
        recording.gaze = recording.attempt("gaze", beside.gaze)
        recording.cam = recording.attempt("cam", beside.camera)
        recording.intrinsics = recording.attempt("intrinsics", beside.intrinsics)
        tracks = {name: recording.attempt(name, beside.series, name) for name in self.series}
        recording.series = {name: track for name, track in tracks.items() if track is not None}
        return recording


class _Beside:
    """The side files of one video; each method raises BadSequence for what is wrong, and gives None for what is
    absent."""

    def __init__(self, base: Path, times: np.ndarray, size: tuple[int, int], gaze_units: str, notes: list[str]) -> None:
        self.base, self.times, self.size, self.gaze_units, self.notes = base, times, size, gaze_units, notes
        self.clock = VideoClock(times)
        self.colmap: tuple[np.ndarray, tuple[int, int]] | None = None

    def path(self, suffix: str) -> Path:
        return Path(f"{self.base}{suffix}")

    def said(self, suffix: str) -> dict[str, Any]:
        path = self.path(suffix)
        said = read_json(path) if path.exists() else {}
        if not isinstance(said, dict):
            raise BadSequence(f"{path} must hold an object such as {{\"start\": 0}}")
        return said

    def camera(self) -> Track | None:
        said = self.said(".cam.json")
        if self.path(".cam.tum").exists():
            return read_tum(self.path(".cam.tum"), self.clock, said, self.notes)
        if not self.path(".colmap").is_dir():
            return None
        track, matrix, size = read_colmap(self.path(".colmap"), self.times, said, self.notes)
        self.colmap = None if matrix is None else (matrix, size)
        return track

    def gaze(self) -> Track | None:
        path = next((p for s in (".gaze.csv", ".gaze.tsv", ".gazedata.gz") if (p := self.path(s)).exists()), None)
        if path is None:
            return None
        return read_gaze(path, self.clock, self.size, self.gaze_units, self.said(".gaze.json"), self.notes)

    def series(self, name: str) -> Track | None:
        """Its first column that is called like a time, else its first one, and all others."""
        path = next((p for ending in TABLES if (p := self.path(f".{name}{ending}")).exists()), None)
        if path is None:
            return None
        table = read_table(path)
        clock = time_column(table.columns)
        values = {name: column for name, column in table.columns.items() if name != clock}
        # Of a separator at the lines' ends, or the rows' numbers that pandas puts in front; a channel that has a name
        # and no number costs the signal.
        nameless = [name for name, column in values.items() if table.has_header and _is_no_channel(name, column)]
        values = [column for name, column in values.items() if name not in nameless]
        if not values:
            raise BadSequence(f"{path}: a column of times and one of numbers a channel are wanted; it has "
                              f"{', '.join(table.columns)}")
        if table.lost:
            self.notes.append(f"{path.name}: {table.lost} of {len(table) + table.lost} rows are cut off and were left "
                              "out")
        times = seconds_of(table.columns[clock], self.clock, str(path), self.notes, self.said(f".{name}.json"))
        order = np.argsort(times, kind="stable")
        order = order[np.isfinite(times[order])]
        return Track(times[order], np.stack(values, 1)[order])

    def depth(self) -> Pictures | None:
        if self.path(".depth.npy").exists():
            return ArrayPictures(self.path(".depth.npy"), self.times, self.size, self.notes)
        if not self.path(".depth").is_dir():
            return None
        pictures = numbered_depth(self.path(".depth"), self.times, self.notes)
        check_shape(self.path(".depth"), pictures.read(0).shape, self.size)
        return pictures

    def intrinsics(self) -> np.ndarray | None:
        """The file's, or the COLMAP model's; call `camera` before."""
        width, height = self.size
        if self.path(".intrinsics.txt").exists():
            return fit_intrinsics(read_matrix(self.path(".intrinsics.txt")), width, height, None, self.notes)
        if self.colmap is None:
            return None
        matrix, full = self.colmap
        return fit_intrinsics(np.diag([width / full[0], height / full[1], 1.0]) @ matrix, width, height, None,
                              self.notes)


def _is_no_channel(name: str, column: np.ndarray) -> bool:
    """Of a column with a header."""
    unnamed = not name.strip(".0123456789") or name.startswith("unnamed:")
    return unnamed and bool(np.isnan(column).all() or np.array_equal(column, np.arange(len(column))))


def numbered_depth(folder: Path, times: np.ndarray, notes: list[str]) -> ImagePictures:
    """16-bit PNG, one a video frame, put in the order of the numbers in their names, which count from 0 or from 1."""
    numbers = {}
    for path in folder.glob("*.png"):
        digits = re.search(r"(\d+)\D*$", path.stem)
        if digits is None:
            raise BadSequence(f"{path}: a depth picture's name must end in the number of its frame")
        if int(digits[1]) in numbers:
            raise BadSequence(f"{folder}: two pictures have the number {int(digits[1])}")
        numbers[int(digits[1])] = path
    if not numbers:
        raise BadSequence(f"{folder} holds no .png")
    first = 0 if 0 in numbers else 1
    if first not in numbers or max(numbers) - first >= len(times):
        raise BadSequence(f"{folder}: pictures {min(numbers)} .. {max(numbers)} for {len(times)} video frames; they "
                          f"must count from 0 or 1 and one belong to each frame")
    if len(numbers) < len(times):
        notes.append(f"depth covers {len(numbers)} of {len(times)} video frames")
    order = sorted(numbers)
    return ImagePictures([numbers[n] for n in order], times[np.array(order) - first], depth=True, scale=0.001)


def _side_of(path: Path, root: Path, sides: Sequence[str]) -> tuple[str, str]:
    """(path of the video it belongs to without ending, its own ending), ("", "") when it is no side file."""
    for place in (path, *path.parents):
        if place == root:
            break
        for suffix in sides:
            if place.name.endswith(suffix):
                return str(place)[: -len(suffix)], suffix
    return "", ""
