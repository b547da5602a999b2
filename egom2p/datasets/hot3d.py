"""HOT3D (Banerjee et al., "HOT3D: Hand and Object Tracking in 3D from Egocentric Multi-View Videos", CVPR 2025): Aria
and Quest 3.

Get it: https://www.projectaria.com/datasets/hot3D (sequences CC BY-SA); or HOT3D-Clips on the Hugging Face Hub
(bop-benchmark/hot3d), which needs no VRS reader. Layouts by facebookresearch/hot3d (README, data_loaders,
clips/README.md):
  RECORDING/recording.vrs               Aria: stream 214-1, 1408 x 1408, 30 fps, turned. (Quest recordings are another
  VRS, which
                                        projectaria-tools cannot read: take HOT3D-Clips for them)
  RECORDING/metadata.json               headset, participant_id
  RECORDING/headset_trajectory.csv      timestamp[ns] (time code), t_wo_x[m].., q_wo_w.. : world from device, metres
  RECORDING/mps/eye_gaze/{personalized,general}_eye_gaze.csv      device time, 10 Hz
  clip-NNNNNN.tar                       150 frames at 30 fps: FRAME.image_214-1.jpg (Aria) or FRAME.image_1201-1.jpg
  (Quest, grey),
                                        FRAME.cameras.json {stream: {T_world_from_camera {translation_xyz,
                                        quaternion_wxyz}, calibration { projection_params, ...}}}, FRAME.info.json
                                        {participant_id}
Frames are undistorted to a pinhole of the same focal length and turned upright; the Quest's images too (worked out from
one sample pose; look at the contact sheet). No captured depth. Splits (facts.md): val P0001, P0014; test P0004 P0005
P0006 P0008 P0016 P0020.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from egom2p.datasets.aria import RAW_FROM_UPRIGHT, AriaRecording, pinhole, read_csv, transform, turn, turn_intrinsics
from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import Adapter, BadSequence, Pictures, Recording, Track, need
from egom2p.datasets.video import rotations

RATE = 30.0
VAL, TEST = {"P0001", "P0014"}, {"P0004", "P0005", "P0006", "P0008", "P0016", "P0020"}
STREAMS = {"hot3d_aria": "214-1", "hot3d_quest": "1201-1"}


class HOT3DAria(Adapter):
    name = "hot3d_aria"
    layout = "RECORDING/{recording.vrs, metadata.json, headset_trajectory.csv, mps} or clip-*.tar of HOT3D-Clips"

    def sequences(self, root: Path) -> list[str]:
        found = [p.relative_to(root).as_posix() for p in root.rglob("clip-*.tar") if self._has_stream(p)]
        if self.name == "hot3d_aria":
            found += [p.parent.name for p in root.glob("*/recording.vrs") if self._headset(p.parent) == "Aria"]
        return need(root, sorted(found), self)

    def open(self, root: Path, sequence: str) -> Recording:
        return self._open_clip(root / sequence,
                               sequence) if sequence.endswith(".tar") else self._open_vrs(root / sequence, sequence)

    def _has_stream(self, path: Path) -> bool:
        with tarfile.open(path) as tar:
            return any(f"image_{STREAMS[self.name]}." in m.name for _, m in zip(range(12), tar, strict=False))

    def _headset(self, folder: Path) -> str:
        path = folder / "metadata.json"
        return json.loads(path.read_text()).get("headset", "Aria") if path.exists() else "Aria"

    def _open_clip(self, path: Path, sequence: str) -> Recording:
        stream = STREAMS[self.name]
        pictures, cameras, participant = _ClipPictures(path, stream), [], ""
        with tarfile.open(path) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                if member.name.endswith(".cameras.json"):
                    cameras.append(json.load(tar.extractfile(member)).get(stream))
                elif member.name.endswith(".info.json") and not participant:
                    participant = str(json.load(tar.extractfile(member)).get("participant_id", ""))
        if len(cameras) != len(pictures.times) or not cameras[0]:
            raise BadSequence(f"{path}: {len(pictures.times)} images for {len(cameras)} cameras")
        poses = np.full((len(cameras), 4, 4), np.nan)
        for i, camera in enumerate(cameras):
            if camera and camera.get("T_world_from_camera"):
                w, *xyz = camera["T_world_from_camera"]["quaternion_wxyz"]
                poses[i] = transform([*xyz, w], camera["T_world_from_camera"]["translation_xyz"])
        raw, lens, height, width = _camera(cameras[0]["calibration"]["projection_params"], pictures)
        undistort = Undistortion(raw, width, height, lambda rays: distort_fisheye624(rays, lens))
        pictures.function = lambda frame: turn(undistort(frame))
        return Recording(sequence, _split(participant), rgb=pictures,
                         cam=Track(pictures.times, poses @ RAW_FROM_UPRIGHT), intrinsics=turn_intrinsics(raw, height))

    def _open_vrs(self, folder: Path, sequence: str) -> Recording:
        aria = AriaRecording(folder / "recording.vrs")
        columns = read_csv(folder / "headset_trajectory.csv")
        device = np.array([aria.provider.convert_from_timecode_to_device_time_ns(int(t))
                           for t in columns["timestamp[ns]"]], np.int64)
        poses = np.tile(np.eye(4), (len(device), 1, 1))
        poses[:, :3, :3] = rotations(np.stack([columns[f"q_wo_{a}"] for a in "xyzw"], -1))
        poses[:, :3, 3] = np.stack([columns[f"t_wo_{a}[m]"] for a in "xyz"], -1)
        meta = json.loads((folder / "metadata.json").read_text()) if (folder / "metadata.json").exists() else {}
        gaze = next((p for kind in ("personalized", "general")
                     if (p := folder / f"mps/eye_gaze/{kind}_eye_gaze.csv").exists()), None)
        return Recording(sequence, _split(str(meta.get("participant_id", sequence[:5]))), rgb=aria.rgb(),
                         cam=aria.camera_track(device, poses),
                         gaze=aria.gaze(gaze) if gaze else None, intrinsics=aria.intrinsics)


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
