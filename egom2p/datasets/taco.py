"""TACO (Liu et al., "TACO: Benchmarking Generalizable Bimanual Tool-ACtion-Object Understanding", CVPR 2024).

Get it: https://taco2024.github.io (CC BY 4.0). Layout and conventions by leolyliu/TACO-Instructions (README,
dataset_utils):
  Egocentric_RGB_Videos/(ACTION, TOOL, TARGET)/YYYYMMDD_NNN/color.mp4                 1920 x 1080, 30 fps
  Egocentric_Depth_Videos/.../egocentric_depth.avi                                   FFV1 gray16, same size
  Egocentric_Camera_Parameters/.../egocentric_intrinsic.txt                          3 x 3
  Egocentric_Camera_Parameters/.../egocentric_frame_extrinsic.npy                    (N, 4, 4) world to camera, OpenCV
  axes, metres
Depth is in 1/4000 m by the author's correction in issue 15 (older READMEs say millimetres). Frame t of the video is row
t of the extrinsics; a sequence whose counts differ is skipped, as the authors do. The depth file is labelled 15 fps:
its frames are taken by index, as one a video frame, or one every second frame when there are half as many. No gaze, no
time stamps.
Split of EgoM2P (facts.md): 500 of 2 490 pieces of 4 s, evenly spaced; here, so that no recording is on both sides, the
sequences at the same even spacing (ours).
"""

from pathlib import Path

import numpy as np

from egom2p import geometry
from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need, numbers

RATE = 30.0
DEPTH_SCALE = 1 / 4000


class Taco(Adapter):
    name = "taco"
    layout = ("Egocentric_RGB_Videos/(ACTION, TOOL, TARGET)/DATE_NNN/color.mp4 and "
              "Egocentric_Camera_Parameters beside it")

    def sequences(self, root: Path) -> list[str]:
        videos = root / "Egocentric_RGB_Videos"
        return need(root, sorted(str(p.parent.relative_to(videos)) for p in videos.glob("*/*/color.mp4")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        video = VideoPictures(root / "Egocentric_RGB_Videos" / sequence / "color.mp4")
        parameters = root / "Egocentric_Camera_Parameters" / sequence
        camera_from_world = np.load(find(parameters / "egocentric_frame_extrinsic.npy"), allow_pickle=False)
        if len(camera_from_world) != len(video.times):
            raise BadSequence(f"{len(video.times)} video frames for {len(camera_from_world)} poses: frames were lost, "
                              f"nothing tells which")
        video.times = np.arange(len(video.times)) / RATE
        depth = None
        path = root / "Egocentric_Depth_Videos" / sequence / "egocentric_depth.avi"
        if path.exists():
            depth = VideoPictures(path, gray16=True, scale=DEPTH_SCALE)
            step = {len(video.times): 1, -(-len(video.times) // 2): 2}.get(len(depth.times))
            if step is None:
                raise BadSequence(f"{path}: {len(depth.times)} depth frames for {len(video.times)} video frames")
            depth.times = np.arange(len(depth.times)) * step / RATE
        return Recording(sequence, self.split(root, sequence), rgb=video, depth=depth,
                         cam=Track(video.times, geometry.invert(camera_from_world.astype(np.float64))),
                         intrinsics=numbers(parameters / "egocentric_intrinsic.txt", 3)[:3])

    def split(self, root: Path, sequence: str) -> str:
        known = self.sequences(root)
        count = max(1, round(len(known) * 500 / 2490))
        held_out = set(np.linspace(0, len(known) - 1, count).astype(int).tolist()) if len(known) > 1 else set()
        return "val" if known.index(sequence) in held_out else "train"
