"""HOT3D (Banerjee et al., "HOT3D: Hand and Object Tracking in 3D from Egocentric Multi-View Videos", CVPR 2025): Aria
and Quest 3.

Get it: https://www.projectaria.com/datasets/hot3D (sequences CC BY-SA); or HOT3D-Clips on the Hugging Face Hub
(bop-benchmark/hot3d), which needs no VRS reader. Layouts by facebookresearch/hot3d (README, data_loaders,
clips/README.md):
  RECORDING/recording.vrs            Aria: stream 214-1, 1408 x 1408, 30 fps, turned. (Quest recordings are another VRS,
                                     which projectaria-tools cannot read: take HOT3D-Clips for them)
  RECORDING/metadata.json            headset, participant_id
  RECORDING/headset_trajectory.csv   timestamp[ns] (time code), t_wo_x[m].., q_wo_w.. : world from device, metres; the
  test
                                     participants have none
  RECORDING/mps/slam/closed_loop_trajectory.csv     the same poses in device time (equal to 0.01 mm on the authors'
  sample)
  RECORDING/mps/eye_gaze/{personalized,general}_eye_gaze.csv      device time, 10 Hz
  clip-NNNNNN.tar                    150 frames at 30 fps: FRAME.image_214-1.jpg (Aria) or FRAME.image_1201-1.jpg
  (Quest,
                                     grey; Aria clips hold this stream too), FRAME.cameras.json {stream:
                                     {T_world_from_camera {translation_xyz, quaternion_wxyz}, calibration
                                     {projection_params, ...}}}, FRAME.info.json {participant_id, image_timestamps_ns}
Where headset_trajectory.csv is missing, or the recording has no usable time code, the MPS trajectory is used; where
that is missing too, the camera is left out. Frames are undistorted to a pinhole of the same focal length and turned
upright; the Quest's images too (worked out from one sample pose; look at the contact sheet). The calibration is the
factory's (of a clip, its first frame's), where the authors' code takes MPS' own for each frame. headset_trajectory.csv
has a row for the stamp of every camera, so two or three a frame, microseconds apart. No captured depth. Splits,
EgoM2P's: val P0001, P0014; test P0004 P0005 P0006 P0008 P0016 P0020.
"""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from egom2p.config import read_json
from egom2p.datasets.aria import (
    RAW_FROM_UPRIGHT,
    AriaRecording,
    Trajectory,
    gaze_file,
    pinhole,
    read_trajectory,
    transform,
    turn,
    turn_intrinsics,
)
from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import Adapter, BadSequence, Pictures, Recording, Track, find, need
from egom2p.datasets.tables import read_table
from egom2p.errors import UserError
from egom2p.files import walk

RATE = 30.0
VAL, TEST = {"P0001", "P0014"}, {"P0004", "P0005", "P0006", "P0008", "P0016", "P0020"}
STREAMS = {"hot3d_aria": "214-1", "hot3d_quest": "1201-1"}


class HOT3DAria(Adapter):
    name = "hot3d_aria"
    layout = "RECORDING/{recording.vrs, metadata.json, headset_trajectory.csv, mps} or clip-*.tar of HOT3D-Clips"

    def sequences(self, root: Path) -> list[str]:
        found = [p.relative_to(root).as_posix() for p in walk(root) if self._is_clip(p) or self._is_recording(p)]
        return need(root, sorted(n.removesuffix("/recording.vrs") for n in found), self)

    def skipped(self, root: Path) -> list[str]:
        files = list(walk(root))
        return [*(f"{p.parent.relative_to(root)}: a Quest recording, whose VRS projectaria-tools cannot read; take "
                  f"HOT3D-Clips"
                  for p in files if p.name == "recording.vrs" and _headset(p.parent) != "Aria"),
                *(f"{p.relative_to(root)}: not a readable tar" for p in files if _may_be_clip(p) and not _names(p))]

    def open(self, root: Path, sequence: str) -> Recording:
        path = root / sequence
        return self._open_clip(path, sequence) if sequence.endswith(".tar") else self._open_vrs(path, sequence)

    def _is_clip(self, path: Path) -> bool:
        """Whether a tar is a clip of this headset: Aria clips hold the Quest's stream too."""
        names = _names(path) if _may_be_clip(path) else []
        aria = any(f"image_{STREAMS['hot3d_aria']}." in n for n in names)
        return aria if self.name == "hot3d_aria" else not aria and any(f"image_{STREAMS[self.name]}." in n
                                                                       for n in names)

    def _is_recording(self, path: Path) -> bool:
        return self.name == "hot3d_aria" and path.name == "recording.vrs" and _headset(path.parent) == "Aria"

    def _open_clip(self, path: Path, sequence: str) -> Recording:
        stream = STREAMS[self.name]
        pictures, cameras, participant = _ClipPictures(path, stream), {}, ""
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                frame = member.name.partition(".")[0]
                if member.name.endswith(".cameras.json"):
                    cameras[frame] = json.load(tar.extractfile(member)).get(stream)
                elif member.name.endswith(".info.json") and not participant:
                    participant = str(json.load(tar.extractfile(member)).get("participant_id", ""))
        calibrated = next((c for c in cameras.values() if c and c.get("calibration")), None)
        if not pictures.members or calibrated is None:
            raise BadSequence(f"{path}: {len(pictures.members)} images and no calibrated camera of stream {stream}")
        poses = np.full((len(pictures.members), 4, 4), np.nan)
        for i, frame in enumerate(pictures.frames):
            pose = (cameras.get(frame) or {}).get("T_world_from_camera")
            if pose:
                w, *xyz = pose["quaternion_wxyz"]
                poses[i] = transform([*xyz, w], pose["translation_xyz"])
        raw, lens, height, width = _camera(calibrated["calibration"]["projection_params"], pictures)
        undistort = Undistortion(raw, width, height, lambda rays: distort_fisheye624(rays, lens))
        pictures.function = lambda frame: turn(undistort(frame))
        return Recording(sequence, _split(participant), rgb=pictures,
                         cam=Track(pictures.times, poses @ RAW_FROM_UPRIGHT), intrinsics=turn_intrinsics(raw, height))

    def _open_vrs(self, folder: Path, sequence: str) -> Recording:
        aria = AriaRecording(folder / "recording.vrs")
        recording = Recording(sequence, _split(_participant(folder)), rgb=aria.rgb(), intrinsics=aria.intrinsics)
        headset = folder / "headset_trajectory.csv"
        if headset.exists():
            recording.cam = recording.attempt("poses of headset_trajectory.csv", headset_track, aria, headset)
        if recording.cam is None:
            recording.cam = recording.attempt("cam", lambda: aria.camera_track(read_trajectory(
                find(folder / "mps/slam/closed_loop_trajectory.csv"))))
            if recording.cam is not None:
                recording.notes.append("poses are those of mps/slam/closed_loop_trajectory.csv")
        gaze = gaze_file(folder / "mps/eye_gaze")
        if gaze:
            recording.gaze = recording.attempt("gaze", aria.gaze, gaze)
        return recording


def headset_track(aria: AriaRecording, path: Path) -> Track:
    """The headset's poses, whose stamps are time code."""
    table = read_table(path)
    quaternions = np.stack([table.column(f"q_wo_{a}") for a in "xyzw"], -1)
    translations = np.stack([table.column(f"t_wo_{a}[m]") for a in "xyz"], -1)
    good = np.isfinite(quaternions).all(1) & np.isfinite(translations).all(1)
    stamps = _integers(path, "timestamp[ns]")
    if len(stamps) != len(good):
        raise BadSequence(f"{path}: rows are cut off")
    device = aria.from_timecode(stamps[good])
    order = np.argsort(device, kind="stable")
    return aria.camera_track(Trajectory(device[order].astype(np.float64), quaternions[good][order],
                                        translations[good][order]))


def _integers(path: Path, column: str) -> np.ndarray:
    """A column of ns since an epoch, as integers: they exceed a float's precision."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return np.array([int(row[column]) for row in csv.DictReader(file)], np.int64)


def _may_be_clip(path: Path) -> bool:
    return path.name.startswith("clip-") and path.suffix == ".tar"


def _names(path: Path) -> list[str]:
    """The first of a tar's names; [] when it cannot be read."""
    try:
        with tarfile.open(path) as tar:
            return [m.name for _, m in zip(range(16), tar, strict=False)]
    except (tarfile.TarError, OSError, EOFError):
        return []


def _headset(folder: Path) -> str:
    path = folder / "metadata.json"
    try:
        return read_json(path).get("headset", "Aria") if path.exists() else "Aria"
    except UserError:
        return "Aria"  # and `open` says what is wrong


def _participant(folder: Path) -> str:
    path = folder / "metadata.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return str(known.get("participant_id") or folder.name[:5])


class HOT3DQuest(HOT3DAria):
    name = "hot3d_quest"
    layout = ("clip-*.tar of HOT3D-Clips (train_quest3, test_quest3); full Quest recordings are a VRS that "
              "projectaria-tools cannot read")


class _ClipPictures(Pictures):
    """JPEGs of one stream inside a HOT3D clip tar, 30 a second."""

    def __init__(self, path: Path, stream: str) -> None:
        self.path, self.function = path, None
        with tarfile.open(path) as tar:
            self.members = sorted((m for m in tar.getmembers() if f".image_{stream}." in m.name), key=lambda m: m.name)
        self.frames = [m.name.partition(".")[0] for m in self.members]
        self.times = np.arange(len(self.members)) / RATE

    def read(self, index: int) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.members[index].offset_data)
            frame = np.asarray(Image.open(io.BytesIO(file.read(self.members[index].size))).convert("RGB"))
        return self.function(frame) if self.function else frame


def _camera(params: list[float], pictures: Pictures) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Pinhole matrix, lens coefficients and size from projection_params of 15 (f) or 16 (fx, fy) numbers."""
    height, width = pictures.read(0).shape[:2]
    params = np.array(params if len(params) == 15 else [params[0], *params[2:]], np.float64)
    return pinhole(params), params[3:15], height, width


def _split(participant: str) -> str:
    return "val" if participant in VAL else "test" if participant in TEST else "train"
