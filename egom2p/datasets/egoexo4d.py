"""Ego-Exo4D (Grauman et al., CVPR 2024), the Aria view.

Get it: https://ego-exo4d-data.org (own licence), then `egoexo -o DIR --parts metadata annotations captures
downscaled_takes/448 take_trajectory take_eye_gaze take_point_cloud --views ego`. Layout by docs.ego-exo4d-data.org
(data/takes, data/mps) and the authors' gaze tutorial:
  takes.json                                         take_name, take_uid, root_dir, timesync_start_idx, capture
  {capture_name, cameras}
  captures/CAPTURE/timesync.csv                      a row an instant; ARIA_214-1_capture_timestamp_ns in device time
  takes/TAKE/frame_aligned_videos/[downscaled/448/]ARIA_214-1.mp4      30 fps, upright, fisheye (1408 or 448 pixels)
  takes/TAKE/trajectory/closed_loop_trajectory.csv   MPS, 1 kHz
  takes/TAKE/trajectory/online_calibration.jsonl     device from camera-rgb
  takes/TAKE/eye_gaze/general_eye_gaze_2d.csv        x, y in pixels of the 1408 mp4, 10 a second, optional
  annotations/splits.json                            take_uid_to_split
Frame i of the mp4 is row timesync_start_idx + 1 + i (docs and tutorial; another of the authors' examples has no + 1,
which would be 33 ms).
Poses: MPS world from device @ device from camera @ rotZ(-90), which is facts.md's matrix. Frames stay fisheye and gaze
is / 1408, no crop, as EgoM2P has it; so clips carry no pinhole intrinsics. No depth.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from egom2p.datasets.aria import poses_at, read_csv, read_online_calibration, read_trajectory
from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need

RATE, GAZE_RATE, GAZE_SIDE = 30.0, 10.0, 1408
FIRST_ROW = 1


class EgoExo4D(Adapter):
    name = "egoexo4d"
    layout = ("takes.json, captures/CAPTURE/timesync.csv, takes/TAKE/{frame_aligned_videos,trajectory,eye_gaze} "
              "(parts metadata, captures, takes, take_trajectory)")

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(name for name in self._takes(root) if (root / "takes" / name).is_dir()), self)

    def open(self, root: Path, sequence: str) -> Recording:
        take = self._takes(root)[sequence]
        folder = root / "takes" / sequence
        aria = self._aria(take, folder)
        videos = folder / "frame_aligned_videos"
        video = VideoPictures(find(videos / f"{aria}_214-1.mp4", videos / f"downscaled/448/{aria}_214-1.mp4"))
        video.times = np.arange(len(video.times)) / RATE
        stamps = self._stamps(root, take, aria, len(video.times))
        device_from_camera, _ = read_online_calibration(folder / "trajectory/online_calibration.jsonl")
        cam = None
        if (folder / "trajectory/closed_loop_trajectory.csv").exists():
            cam = poses_at(read_trajectory(folder / "trajectory/closed_loop_trajectory.csv"), stamps, video.times,
                           device_from_camera)
        side = video.read(0).shape[0]
        return Recording(sequence, self._split(root, take["take_uid"]), rgb=video, cam=cam,
                         gaze=self._gaze(folder, side), meta={"lens": "fisheye"})

    def _takes(self, root: Path) -> dict[str, dict]:
        path = root / "takes.json"
        return _takes_by_name(path) if path.exists() else {}

    def _aria(self, take: dict, folder: Path) -> str:
        named = [c["cam_id"] for c in take.get("capture", {}).get("cameras", []) if c.get("is_ego")]
        found = named or sorted({p.name.partition("_214-1")[0]
                                 for p in folder.glob("frame_aligned_videos/**/*_214-1.mp4")})
        if not found:
            raise BadSequence(f"{folder} has no Aria video (*_214-1.mp4)")
        return found[0]

    def _stamps(self, root: Path, take: dict, aria: str, count: int) -> np.ndarray:
        """(count,) device time in ns of each video frame, NaN where the row or its stamp is missing."""
        column = f"{aria}_214-1_capture_timestamp_ns"
        columns = read_csv(root / "captures" / take["capture"]["capture_name"] / "timesync.csv")
        if column not in columns:
            raise BadSequence(f"timesync.csv of {take['capture']['capture_name']} lacks the column {column}")
        rows = int(take["timesync_start_idx"]) + FIRST_ROW + np.arange(count)
        stamps = np.full(count, np.nan)
        inside = rows < len(columns[column])
        stamps[inside] = columns[column][rows[inside]]
        return stamps

    def _gaze(self, folder: Path, side: int) -> Track | None:
        paths = [folder / f"eye_gaze/{kind}_eye_gaze_2d.csv" for kind in ("personalized", "general")]
        path = next((p for p in paths if p.exists()), None)
        if path is None:
            return None
        columns = read_csv(path)
        if not {"x", "y"} <= columns.keys():
            raise BadSequence(f"{path} lacks the columns x and y")
        number = next((columns[n] for n in ("frame_num", "frame_number") if n in columns), None)
        times = number / RATE if number is not None else np.arange(len(columns["x"])) / GAZE_RATE
        return Track(times, np.stack([columns["x"], columns["y"]], -1) * side / GAZE_SIDE)

    def _split(self, root: Path, uid: str) -> str:
        path = root / "annotations/splits.json"
        return _split_by_uid(path).get(uid, "train") if path.exists() else "train"


@lru_cache(maxsize=2)  # these hold every take of the release and are asked for at each
def _takes_by_name(path: Path) -> dict[str, dict]:
    return {t["take_name"]: t for t in json.loads(path.read_text())}


@lru_cache(maxsize=2)
def _split_by_uid(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())["take_uid_to_split"]
