"""Ego-Exo4D (Grauman et al., CVPR 2024), the Aria view.

Get it: https://ego-exo4d-data.org (own licence), then `egoexo -o DIR --parts metadata annotations captures
downscaled_takes/448 take_trajectory take_eye_gaze take_point_cloud --views ego`. Layout by docs.ego-exo4d-data.org
(data/takes, data/mps) and the authors' gaze tutorial:
  takes.json                            take_name, take_uid, root_dir, timesync_start_idx, capture {capture_name,
  cameras}
  captures/CAPTURE/timesync.csv         a row an instant; ARIA_214-1_capture_timestamp_ns in device time
  takes/TAKE/frame_aligned_videos/[downscaled/448/]ARIA_214-1.mp4    30 fps, upright, fisheye (1408 or 448 pixels)
  takes/TAKE/trajectory/closed_loop_trajectory.csv                   MPS, 1 kHz; 1 % of takes have none
  takes/TAKE/trajectory/online_calibration.jsonl                     device from camera-rgb
  takes/TAKE/eye_gaze/general_eye_gaze_2d.csv                        x, y in pixels of the 1408 mp4, 10 a second;
                                                                     frame_num counts these rows, not video frames
  annotations/splits.json               take_uid_to_split
Frame i of the mp4 is row timesync_start_idx + 1 + i (docs and tutorial), or without the + 1 where the mp4 has a frame
more.
Gaze is placed by tracking_timestamp_us against frame 0's stamp where both are there and agree (a note says when not),
else row k at k / 10 s, as the tutorial spreads it. Poses: MPS world from device @ device from camera @ rotZ(-90), which
is the authors' matrix. Frames stay fisheye and gaze is / 1408, no crop, as EgoM2P has it; so clips carry no pinhole
intrinsics. Takes in no split list are left out. No depth. No real take was at hand; columns and rates are what three
independent readers of real ones agree on.
"""

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from egom2p.config import read_json
from egom2p.datasets.aria import poses_at, read_online_calibration, read_trajectory
from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need
from egom2p.datasets.tables import read_table
from egom2p.errors import UserError
from egom2p.files import walk

RATE, GAZE_RATE, GAZE_SIDE = 30.0, 10.0, 1408


class EgoExo4D(Adapter):
    name = "egoexo4d"
    layout = ("takes.json, captures/CAPTURE/timesync.csv, takes/TAKE/{frame_aligned_videos,trajectory,eye_gaze} "
              "(parts metadata, captures, takes, take_trajectory)")

    def sequences(self, root: Path) -> list[str]:
        known = self._takes(root)
        return need(root, sorted(name for name, take in known.items() if self._folder(root, take).is_dir()), self)

    def skipped(self, root: Path) -> list[str]:
        known = {self._folder(root, take) for take in self._takes(root).values()}
        return [f"takes/{p.name}: not in takes.json" for p in sorted((root / "takes").glob("*"))
                if p.is_dir() and p not in known]

    def splits(self, root: Path, sequences: Sequence[str]) -> dict[str, str]:
        path = root / "annotations/splits.json"
        if not path.exists():
            raise UserError(f"{path} is missing, which says what each take is for; fetch it (egoexo --parts "
                            "annotations), or insist with --split train")
        by_uid = _split_by_uid(path)
        uids = {name: take["take_uid"] for name, take in self._takes(root).items()}
        return {name: by_uid[uids[name]] for name in sequences if uids[name] in by_uid}

    def files(self, root: Path, sequence: str) -> list[Path]:
        take = self._takes(root)[sequence]
        capture = root / "captures" / take.get("capture", {}).get("capture_name", "")
        return [*walk(self._folder(root, take)), capture / "timesync.csv",
                *(capture / "trajectory" / name for name in ("closed_loop_trajectory.csv", "online_calibration.jsonl"))]

    def open(self, root: Path, sequence: str) -> Recording:
        take = self._takes(root)[sequence]
        folder = self._folder(root, take)
        path = self._video(take, folder)
        video = VideoPictures(path)
        video.times = np.arange(len(video.times)) / RATE
        recording = Recording(sequence, "", rgb=video, meta={"lens": "fisheye"})
        stamps = recording.attempt("device clock", self._stamps, root, take, path.name.partition("_214-1")[0],
                                   len(video.times))
        if stamps is not None:
            recording.cam = recording.attempt("cam", self._camera, root, take, folder, stamps, video.times)
        side = video.read(0).shape[0]
        gaze = [folder / f"eye_gaze/{kind}_eye_gaze_2d.csv" for kind in ("personalized", "general")]
        if any(p.exists() for p in gaze):
            recording.gaze = recording.attempt("gaze", self._gaze, find(*[p for p in gaze if p.exists()]), side, stamps,
                                               len(video.times) / RATE, recording.notes)
        return recording

    def _takes(self, root: Path) -> dict[str, dict]:
        path = root / "takes.json"
        if not path.exists():
            raise UserError(f"{path} is missing (part metadata); expected {self.layout}")
        return _takes_by_name(path)

    def _folder(self, root: Path, take: dict) -> Path:
        return root / take.get("root_dir", f"takes/{take['take_name']}")

    def _video(self, take: dict, folder: Path) -> Path:
        """The Aria's rgb mp4: of the cameras marked ego those whose video is there, whose name says Aria first."""
        videos = sorted((folder / "frame_aligned_videos").glob("**/*_214-1.mp4"), key=lambda p: len(p.parts))
        cameras = take.get("capture", {}).get("cameras", [])
        ego = {str(c.get("cam_id")) for c in cameras if str(c.get("is_ego")).lower() == "true"}
        ours = [p for p in videos if p.name.partition("_214-1")[0] in ego] or videos
        if not ours:
            raise BadSequence(f"{folder} has no Aria video (*_214-1.mp4)")
        return min(ours, key=lambda p: ("aria" not in p.name.lower(), len(p.parts), p.name))

    def _stamps(self, root: Path, take: dict, aria: str, count: int) -> np.ndarray:
        """(count,) device time in ns of each video frame, NaN where the row or its stamp is missing."""
        path = root / "captures" / take["capture"]["capture_name"] / "timesync.csv"
        column = _timesync(find(path), f"{aria}_214-1_capture_timestamp_ns")
        start, end = int(take["timesync_start_idx"]), take.get("timesync_end_idx")
        first = start if end is not None and count == int(end) - start else start + 1
        rows = first + np.arange(count)
        inside = (rows >= 0) & (rows < len(column))
        stamps = np.full(count, np.nan)
        stamps[inside] = column[rows[inside]]
        return stamps

    def _camera(self, root: Path, take: dict, folder: Path, stamps: np.ndarray, times: np.ndarray) -> Track:
        capture = root / "captures" / take["capture"]["capture_name"] / "trajectory"
        places = (folder / "trajectory", capture)
        trajectory = read_trajectory(find(*(p / "closed_loop_trajectory.csv" for p in places)))
        device_from_camera, _ = read_online_calibration(find(*(p / "online_calibration.jsonl" for p in places)))
        return poses_at(trajectory, stamps, times, device_from_camera)

    def _gaze(self, path: Path, side: int, stamps: np.ndarray | None, seconds: float,
              notes: list[str]) -> Track:
        table = read_table(path)
        points = np.stack([table.column("x"), table.column("y")], -1) * side / GAZE_SIDE
        number = table.get("frame_num", "frame_number")
        times = (np.arange(len(table)) if number is None else number) / GAZE_RATE
        device_us = table.get("tracking_timestamp_us")
        seen = np.flatnonzero(np.isfinite(stamps)) if stamps is not None else []
        if device_us is not None and len(seen):
            start_ns = stamps[seen[0]] - seen[0] / RATE * 1e9
            placed = (device_us * 1000 - start_ns) / 1e9
            if len(placed) and -2 < placed[0] < 2 and placed[-1] < seconds + 2:
                times = placed
            else:
                span = f"from {placed.min():.1f} to {placed.max():.1f} s of a take of {seconds:.1f}"
                notes.append(f"{path.name}: its stamps run {span}; rows are placed a tenth of a second apart instead")
        order = np.argsort(times, kind="stable")
        return Track(times[order], points[order])


@lru_cache(maxsize=2)  # these hold every take of the release and are asked for at each
def _takes_by_name(path: Path) -> dict[str, dict]:
    return {t["take_name"]: t for t in read_json(path)}


@lru_cache(maxsize=2)
def _split_by_uid(path: Path) -> dict[str, str]:
    content = read_json(path)
    if "take_uid_to_split" in content:
        return {uid: str(split).lower() for uid, split in content["take_uid_to_split"].items()}
    return {uid: str(split).lower() for split, uids in content["split_to_take_uids"].items() for uid in uids}


@lru_cache(maxsize=8)  # takes of one capture share it
def _timesync(path: Path, column: str) -> np.ndarray:
    """One column of timesync.csv as float64 ns, NaN where a field is empty."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if column not in header:
            raise BadSequence(f"{path} lacks the column {column}")
        place = header.index(column)
        return np.array([float(row[place]) if len(row) > place and row[place].strip() else np.nan for row in reader])
