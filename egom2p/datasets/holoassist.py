"""HoloAssist (Wang et al., ICCV 2023), recorded with HoloLens 2 and exported by Microsoft \\psi.

Get it: https://holoassist.github.io (CDLA-Permissive-2.0): the videos (pitch-shifted, or compressed), the camera
parameters, the eyes, the split lists. Layout by its data_links README, formats by microsoft/psi HoloLensCaptureExporter
and taeinkwon/PyHoloAssist:
  SESSION/Export_py/Video_pitchshift.mp4         896 x 504; or Video_compress.mp4, 454 x 256, with the same intrinsics
  file
  SESSION/Export_py/Video/Pose_sync.txt          tab separated, no header: seconds, ticks, 16 numbers (4 x 4 row-major,
                                                 world from camera, metres, \\psi axes: x forward, y left, z up); NaN =
                                                 lost
  SESSION/Export_py/Video/Intrinsics.txt         25 numbers: K row-major first, width and height last (the README's tree
                                                 spells it Instrinsincs.txt)
  SESSION/Export_py/Video/VideoMp4Timing.txt     start and end of the mp4 in ticks
  SESSION/Export_py/Eyes/Eyes_sync.txt           seconds, ticks, ray origin (3), direction (3), whether the eyes were
                                                 calibrated; world frame; a lost ray is NaN
  {train,val,test}-v1_2.txt                      a session a line, in ROOT, data_split/, data-splits-v1_2/ or splits/
Ticks are 100 ns since year 1 and are read as integers (they exceed a float's precision). Video frame i is at start + i
/ fps. Gaze: the ray's point at 0.5 m, projected with K (no distortion, as the authors do), crop 480 of 896 x 504, as
EgoM2P. Eyes are joined to poses by their ticks. AHAT depth is another camera and not used. Sessions in no list are left
out, as EgoM2P does. No real file was at hand; sizes and columns are what third parties report of real ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from egom2p import geometry
from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need, read_lists
from egom2p.datasets.tables import read_text
from egom2p.errors import UserError

PSI_FROM_OPENCV = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
TICKS = 1e-7
GAZE_DISTANCE_M = 0.5
CROP_SHARE = 480 / 504  # of the frame's height
INTRINSICS = ("Intrinsics.txt", "Instrinsincs.txt", "Instrinsics.txt")
LISTS = ("", "data_split", "data-splits-v1_2", "data_splits", "splits", "annotations")


class HoloAssist(Adapter):
    name = "holoassist"
    layout = ("SESSION/Export_py/{Video_pitchshift.mp4, Video/Pose_sync.txt, Video/Intrinsics.txt, "
              "Video/VideoMp4Timing.txt, Eyes/Eyes_sync.txt}")

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.parent.name for p in root.glob("*/Export_py")), self)

    def splits(self, root: Path, sequences: Sequence[str]) -> dict[str, str]:
        for place in (base / folder for base in (root, root.parent) for folder in LISTS):
            lists = {s: path for s in ("train", "val", "test") if (path := place / f"{s}-v1_2.txt").exists()}
            if lists:
                return read_lists(lists)
        raise UserError(f"{root}: none of the split lists train-v1_2.txt, val-v1_2.txt, test-v1_2.txt is there or in "
                        "data_split/ (data-splits-v1_2.zip of holoassist.github.io); put them there, or insist with "
                        "--split train")

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence / "Export_py"
        video = VideoPictures(find(folder / "Video_pitchshift.mp4", folder / "Video_compress.mp4"))
        height, width = video.read(0).shape[:2]
        recording = Recording(sequence, "", rgb=video, crop=round(height * CROP_SHARE))
        recording.intrinsics = recording.attempt("intrinsics", read_intrinsics, folder / "Video", width, height)
        start = recording.attempt("clock of poses and gaze", _start, folder / "Video/VideoMp4Timing.txt")
        if start is None:
            return recording
        poses = recording.attempt("cam", _stamped, folder / "Video/Pose_sync.txt", 16)
        if poses is None:
            return recording
        ticks, rows, _ = poses
        recording.cam = Track(_seconds(ticks, start), rows.reshape(-1, 4, 4) @ PSI_FROM_OPENCV)
        eyes = folder / "Eyes/Eyes_sync.txt"
        if eyes.exists() and recording.intrinsics is not None:
            recording.gaze = recording.attempt("gaze", self._gaze, eyes, start, ticks, recording.cam,
                                               recording.intrinsics, recording.notes)
        return recording

    def _gaze(self, path: Path, start: int, pose_ticks: np.ndarray, cam: Track, intrinsics: np.ndarray,
              notes: list[str]) -> Track:
        """Pixels of the gaze ray's point at half a metre, NaN where the eyes or the head were lost or the point is
        behind the camera."""
        ticks, rows, calibrated = _stamped(path, 6)
        if not calibrated.all():
            notes.append(f"gaze: {np.mean(~calibrated):.0%} of the rows were taken without a valid calibration of the "
                         "eyes; they are used, as EgoM2P does")
        nearest = np.clip(np.searchsorted(pose_ticks, ticks), 1, max(1, len(pose_ticks) - 1))
        before = np.abs(pose_ticks[nearest - 1] - ticks) <= np.abs(pose_ticks[np.minimum(nearest, len(pose_ticks) - 1)]
                                                                   - ticks)
        nearest = np.minimum(np.where(before, nearest - 1, nearest), len(pose_ticks) - 1)
        lengths = np.linalg.norm(rows[:, 3:6], axis=1)
        directions = rows[:, 3:6] / np.maximum(lengths[:, None], 1e-9)
        points = np.c_[rows[:, :3] + GAZE_DISTANCE_M * directions, np.ones(len(rows))]
        with np.errstate(invalid="ignore", divide="ignore"):
            seen = np.einsum("tij,tj->ti", geometry.invert(cam.values[nearest]), points)[:, :3]
            pixels = geometry.project(seen, intrinsics)
            lost = (seen[:, 2] <= 0.05) | ~np.isfinite(pixels).all(1) | (lengths < 1e-6)
        lost |= np.abs(pose_ticks[nearest] - ticks) * TICKS > 1 / 60
        return Track(_seconds(ticks, start), np.where(lost[:, None], np.nan, pixels))


def read_intrinsics(folder: Path, width: int, height: int) -> np.ndarray:
    """K of frames of width x height: the file's, each axis scaled from the size it states. A newer exporter writes a
    line a frame, with a leading tick."""
    path = find(*(folder / name for name in INTRINSICS))
    row = np.array(read_text(path).split("\n")[0].split(), np.float64)
    row = row[1:] if row[0] > 1e12 else row
    if len(row) < 11 or not np.allclose(row[6:9], [0, 0, 1]):
        raise BadSequence(f"{path} does not start with a 3 x 3 matrix; expected 25 numbers, width and height last")
    full_width, full_height = row[-2:]
    if not (full_width >= width and full_height >= height):
        raise BadSequence(f"{path} is of {full_width:g} x {full_height:g} frames, the video is {width} x {height}")
    return np.diag([width / full_width, height / full_height, 1.0]) @ row[:9].reshape(3, 3)


def _start(path: Path) -> int:
    words = read_text(find(path)).split()
    if not words:
        raise BadSequence(f"{path} is empty")
    return int(words[0].partition(".")[0])


def _stamped(path: Path, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) integer ticks, (N, columns) numbers and (N,) bool (a further column that is 0 or False says no: of the eyes'
    calibration) of a `_sync` file: seconds, ticks, then the numbers."""
    ticks, rows, valid = [], [], []
    for line in read_text(find(path)).splitlines():
        words = line.split()
        if len(words) >= 2 + columns:
            ticks.append(int(words[1].partition(".")[0]))
            rows.append([float(w) for w in words[2 : 2 + columns]])
            valid.append(len(words) == 2 + columns or words[2 + columns].lower() not in ("0", "0.0", "false"))
    if not rows:
        raise BadSequence(f"{path} holds no row of {2 + columns} columns")
    order = np.argsort(ticks, kind="stable")
    return np.array(ticks, np.int64)[order], np.array(rows, np.float64)[order], np.array(valid)[order]


def _seconds(ticks: np.ndarray, start: int) -> np.ndarray:
    return (ticks - start) * TICKS
