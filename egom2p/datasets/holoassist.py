"""HoloAssist (Wang et al., ICCV 2023), recorded with HoloLens 2 and exported by Microsoft \\psi.

Get it: https://holoassist.github.io (CDLA-Permissive-2.0): the pitch-shifted videos, the camera parameters and the
eyes. Layout by its data_links README, formats by microsoft/psi HoloLensCaptureExporter and taeinkwon/PyHoloAssist:
  SESSION/Export_py/Video_pitchshift.mp4            896 x 504
  SESSION/Export_py/Video/Pose_sync.txt             tab separated, no header: seconds, ticks, 16 numbers (4 x 4
  row-major,
                                                    world from camera, metres, \\psi axes: x forward, y left, z up)
  SESSION/Export_py/Video/Intrinsics.txt            25 numbers: K row-major first, width and height last
  SESSION/Export_py/Video/VideoMp4Timing.txt        start and end of the mp4 in ticks
  SESSION/Export_py/Eyes/Eyes_sync.txt              seconds, ticks, ray origin (3), direction (3), valid; world frame
Ticks are 100 ns since year 1 and are read as integers (they exceed a float's precision). Video frame i is at start + i
/ fps.
Gaze: the ray's point at 0.5 m, projected with K (no distortion, as the authors do), crop 480 of 896 x 504 (facts.md).
AHAT depth is another camera and not used. Splits: train / val / test lists v1_2 beside the sessions (train-v1_2.txt,
...), one session a line; sessions in none of them are train.
"""

from pathlib import Path

import numpy as np

from egom2p import geometry
from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need, numbers

PSI_FROM_OPENCV = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
TICKS = 1e-7
GAZE_DISTANCE_M = 0.5
CROP = 480


class HoloAssist(Adapter):
    name = "holoassist"
    layout = ("SESSION/Export_py/{Video_pitchshift.mp4, Video/Pose_sync.txt, Video/Intrinsics.txt, "
              "Video/VideoMp4Timing.txt, Eyes/Eyes_sync.txt}")

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.parent.name for p in root.glob("*/Export_py")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence / "Export_py"
        video = VideoPictures(find(folder / "Video_pitchshift.mp4"))
        intrinsics = numbers(find(folder / "Video/Intrinsics.txt",
                                  folder / "Video/Instrinsics.txt"))[0, :9].reshape(3, 3)
        timing = [int(float(word)) if "." in word else int(word)
                  for word in find(folder / "Video/VideoMp4Timing.txt").read_text().split()]
        ticks, rows = _stamped(folder / "Video/Pose_sync.txt", 16)
        poses = rows.reshape(-1, 4, 4) @ PSI_FROM_OPENCV
        cam = Track(_seconds(ticks, timing[0]), poses)
        gaze = self._gaze(folder, timing[0], cam, intrinsics)
        return Recording(sequence, self.split(root, sequence), rgb=video, cam=cam, gaze=gaze, intrinsics=intrinsics,
                         crop=CROP)

    def _gaze(self, folder: Path, start: int, cam: Track, intrinsics: np.ndarray) -> Track | None:
        """Pixels of the gaze ray's point at half a metre, NaN where the eyes were lost or the point is behind the
        camera."""
        if not (folder / "Eyes/Eyes_sync.txt").exists():
            return None
        ticks, rows = _stamped(folder / "Eyes/Eyes_sync.txt", 6, optional=1)
        if len(rows) != len(cam.values):
            raise BadSequence(f"{len(rows)} eye rows for {len(cam.values)} poses; "
                              "both should be resampled to the video")
        direction = rows[:, 3:6] / np.maximum(np.linalg.norm(rows[:, 3:6], axis=1, keepdims=True), 1e-9)
        points = np.c_[rows[:, :3] + GAZE_DISTANCE_M * direction, np.ones(len(rows))]
        with np.errstate(invalid="ignore", divide="ignore"):
            seen = np.einsum("tij,tj->ti", geometry.invert(cam.values), points)[:, :3]
            pixels = geometry.project(seen, intrinsics)
            lost = (seen[:, 2] <= 0.05) | ~np.isfinite(pixels).all(1) | (np.linalg.norm(rows[:, 3:6], axis=1) < 1e-6)
        if rows.shape[1] > 6:
            lost |= rows[:, 6] == 0
        return Track(_seconds(ticks, start), np.where(lost[:, None], np.nan, pixels))

    def split(self, root: Path, sequence: str) -> str:
        for split in ("val", "test"):
            path = root / f"{split}-v1_2.txt"
            if path.exists() and sequence in path.read_text().split():
                return split
        return "train"


def _stamped(path: Path, columns: int, optional: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N,) integer ticks and (N, columns [+ optional]) numbers of a `_sync` file: seconds, ticks, then the numbers."""
    ticks, rows = [], []
    for line in find(path).read_text().splitlines():
        words = line.split()
        if len(words) >= 2 + columns:
            ticks.append(int(words[1].partition(".")[0]))
            rows.append([float(w) for w in words[2 : 2 + columns + optional]])
    if not rows:
        raise BadSequence(f"{path} holds no row of {2 + columns} columns")
    width = min(map(len, rows))
    return np.array(ticks, np.int64), np.array([r[:width] for r in rows], np.float64)


def _seconds(ticks: np.ndarray, start: int) -> np.ndarray:
    return (ticks - start) * TICKS
