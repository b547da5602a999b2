"""TACO (Liu et al., "TACO: Benchmarking Generalizable Bimanual Tool-ACtion-Object Understanding", CVPR 2024).

Get it: https://taco2024.github.io (CC BY 4.0). Layout and conventions by leolyliu/TACO-Instructions (README,
dataset_utils):
  Egocentric_RGB_Videos/(ACTION, TOOL, TARGET)/YYYYMMDD_NNN/color.mp4      1920 x 1080, 30 fps
  Egocentric_Depth_Videos/.../egocentric_depth.avi                         FFV1 gray16le, same size
  Egocentric_Camera_Parameters/.../egocentric_intrinsic.txt                3 x 3
  Egocentric_Camera_Parameters/.../egocentric_frame_extrinsic.npy          (N, 4, 4) world to camera, OpenCV axes,
  metres
Depth is in 1/4000 m by the author's correction in issue 15 (older READMEs say millimetres). Frame t of the video is row
t of the extrinsics and frame t of the depth file, whose label of 15 fps means nothing (third parties who read real
files: 198 frames each). Where the extrinsics are fewer or more the camera is left out, as the authors do; depth that is
shorter covers its own frames. The "resized" copies in circulation (512 x 376, H.264 depth of 8 bits, full-size
intrinsics) are not
TACO's data: their depth is refused, their intrinsics fit no frame. No gaze, no time stamps. No real file was at hand.
Split of EgoM2P: 500 of 2 490 pieces of 4 s, evenly spaced; here, so that no recording is on both sides and a
further download moves none, a fifth of the sequences by a hash of their names (ours).
"""

import hashlib
from pathlib import Path

import numpy as np

from egom2p import geometry
from egom2p.datasets.recording import (
    Adapter,
    BadSequence,
    Recording,
    Track,
    VideoPictures,
    beside_video,
    find,
    fit_intrinsics,
    need,
)
from egom2p.datasets.tables import read_matrix

RATE = 30.0
DEPTH_SCALE = 1 / 4000
FULL = (1920, 1080)
HELD_OUT_SHARE = 500 / 2490


class Taco(Adapter):
    name = "taco"
    layout = ("Egocentric_RGB_Videos/(ACTION, TOOL, TARGET)/DATE_NNN/color.mp4 and "
              "Egocentric_Camera_Parameters beside it")

    def sequences(self, root: Path) -> list[str]:
        videos = root / "Egocentric_RGB_Videos"
        return need(root, sorted(str(p.parent.relative_to(videos)) for p in videos.glob("*/*/color.mp4")), self)

    def files(self, root: Path, sequence: str) -> list[Path]:
        parts = ("Egocentric_RGB_Videos", "Egocentric_Depth_Videos", "Egocentric_Camera_Parameters")
        return [p for part in parts for p in sorted((root / part / sequence).glob("*"))]

    def open(self, root: Path, sequence: str) -> Recording:
        video = VideoPictures(root / "Egocentric_RGB_Videos" / sequence / "color.mp4")
        video.times = np.arange(len(video.times)) / RATE
        height, width = video.read(0).shape[:2]
        recording = Recording(sequence, split_of(sequence), rgb=video)
        parameters = root / "Egocentric_Camera_Parameters" / sequence
        recording.cam = recording.attempt("cam", self._camera, parameters, video)
        depth = root / "Egocentric_Depth_Videos" / sequence / "egocentric_depth.avi"
        if depth.exists():
            recording.depth = recording.attempt("depth", beside_video, video, depth, DEPTH_SCALE, recording.notes)
        recording.intrinsics = recording.attempt("intrinsics", lambda: fit_intrinsics(
            read_matrix(parameters / "egocentric_intrinsic.txt"), width, height, FULL, recording.notes))
        return recording

    def _camera(self, parameters: Path, video: VideoPictures) -> Track:
        camera_from_world = np.load(find(parameters / "egocentric_frame_extrinsic.npy"), allow_pickle=False)
        if camera_from_world.shape != (len(video.times), 4, 4):
            raise BadSequence(f"{len(video.times)} video frames for extrinsics {camera_from_world.shape}: frames were "
                              f"lost, nothing tells which")
        return Track(video.times, geometry.invert(camera_from_world.astype(np.float64)))


def split_of(sequence: str) -> str:
    """By a hash of the sequence's name: about a fifth is held out."""
    draw = int.from_bytes(hashlib.sha256(Path(sequence).name.encode()).digest()[:4], "big") / 2**32
    return "val" if draw < HELD_OUT_SHARE else "train"
