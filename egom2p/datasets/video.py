"""A folder of one's own videos: any mp4, mov, mkv, avi or webm, with optional files beside it, named after the video.

  NAME.mp4
  NAME.cam.tum                 trajectory, `time tx ty tz qx qy qz qw` a line: seconds from the video's start, camera to
  world, metres
  NAME.colmap/images.txt       or a COLMAP text model (world to camera, one line an image; image names end in the
  frame's number)
  NAME.gaze.csv                header `time,x,y[,valid]`: seconds, pixels of the video's frames
  NAME.depth.npy               (T, H, W) metres, 0 = no reading, one a video frame; or NAME.depth/%06d.png, 16 bit
  millimetres
  NAME.intrinsics.txt          3 x 3 pixels of the video's frames
Camera axes are OpenCV's (x right, y down, z forward). A COLMAP model has no scale of its own: its units are taken as
metres. The split is
`train`, or what the top folder is called when that is train, val or test.
"""

import csv
from pathlib import Path

import numpy as np

from egom2p import geometry
from egom2p.datasets.recording import (
    Adapter,
    ArrayPictures,
    BadSequence,
    ImagePictures,
    Pictures,
    Recording,
    Track,
    VideoPictures,
    need,
    numbers,
)

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")


class VideoFolder(Adapter):
    name = "video"
    layout = ("videos (.mp4, .mov, .mkv, .avi, .webm), each with optional NAME.cam.tum, NAME.gaze.csv, "
              "NAME.depth.npy, NAME.intrinsics.txt")

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.relative_to(root).as_posix() for p in root.rglob("*")
                                 if p.suffix.lower() in SUFFIXES), self)

    def open(self, root: Path, sequence: str) -> Recording:
        path = root / sequence
        video = VideoPictures(path)
        beside = path.with_suffix("")
        top = sequence.split("/")[0]
        matrix = Path(f"{beside}.intrinsics.txt")
        return Recording(sequence, top if top in ("train", "val", "test") else "train", rgb=video,
                         depth=self._depth(beside, video.times),
                         cam=self._camera(beside, video.times), gaze=self._gaze(beside),
                         intrinsics=numbers(matrix, 3)[:3] if matrix.exists() else None)

    def _camera(self, beside: Path, times: np.ndarray) -> Track | None:
        tum = Path(f"{beside}.cam.tum")
        if tum.exists():
            rows = numbers(tum, 8)
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            poses = np.tile(np.eye(4), (len(rows), 1, 1))
            poses[:, :3, :3], poses[:, :3, 3] = rotations(rows[:, 4:8]), rows[:, 1:4]
            return Track(rows[:, 0], poses)
        colmap = Path(f"{beside}.colmap") / "images.txt"
        return read_colmap(colmap, times) if colmap.exists() else None

    def _gaze(self, beside: Path) -> Track | None:
        path = Path(f"{beside}.gaze.csv")
        if not path.exists():
            return None
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if not {"time", "x", "y"} <= set(reader.fieldnames or ()):
                raise BadSequence(f"{path} needs the columns time, x, y and may have valid; it has "
                                  f"{', '.join(reader.fieldnames or ['none'])}")
            rows = [(_number(r["time"]), _number(r["x"]), _number(r["y"]), _number(r.get("valid") or "1"))
                    for r in reader]
        table = np.array(sorted(r for r in rows if np.isfinite(r[0])), np.float64).reshape(-1, 4)
        if not len(table):
            raise BadSequence(f"{path} holds no row with a time")
        return Track(table[:, 0], np.where(table[:, 3:] > 0, table[:, 1:3], np.nan))

    def _depth(self, beside: Path, times: np.ndarray) -> Pictures | None:
        array, folder = Path(f"{beside}.depth.npy"), Path(f"{beside}.depth")
        if array.exists():
            return ArrayPictures(array, times)
        if folder.is_dir():
            return ImagePictures(sorted(folder.glob("*.png")), times, depth=True, scale=0.001)
        return None


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """(N, 4) x y z w -> (N, 3, 3); NaN where the quaternion is not one."""
    norm = np.linalg.norm(quaternions, axis=1, keepdims=True)
    x, y, z, w = np.where(np.abs(norm - 1) < 0.1, quaternions / np.maximum(norm, 1e-9), np.nan).T
    return np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), 2 * (x * y + z * w),
                     1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
                     2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1).reshape(-1, 3, 3)


def read_colmap(path: Path, times: np.ndarray) -> Track:
    """Poses of a COLMAP `images.txt` (IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, world to camera); NaN for frames
    without."""
    poses = np.full((len(times), 4, 4), np.nan)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for line in lines[::2]:
        words = line.split()
        if len(words) < 10:
            continue
        number = int("".join(c for c in Path(words[9]).stem.split("_")[-1] if c.isdigit()) or -1)
        if not 0 <= number < len(times):
            raise BadSequence(f"{path}: image '{words[9]}' names no frame of the video (0 .. {len(times) - 1})")
        w, x, y, z, *translation = map(float, words[1:8])
        camera_from_world = np.eye(4)
        camera_from_world[:3, :3], camera_from_world[:3, 3] = rotations(np.array([[x, y, z, w]]))[0], translation
        poses[number] = geometry.invert(camera_from_world)
    return Track(times, poses)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
