"""Aria Digital Twin (Pan et al., ICCV 2023); post-training and evaluation.

Get it: https://www.projectaria.com/datasets/adt (own licence). Layout by projectaria_tools' ADT docs (V2):
  SEQUENCE/video.vrs               (main_recording.vrs in V1) stream 214-1, 1408 x 1408 fisheye, 30 fps, turned
  SEQUENCE/depth_images.vrs        same labels; integers in millimetres along the optical axis, same size, fisheye; 0 =
  no reading
  SEQUENCE/aria_trajectory.csv     MPS columns: world from device, device time
  SEQUENCE/eyegaze.csv             MPS columns, with depth
Frames and depth are undistorted to a pinhole of the same focal length and turned upright. Everything is `test`: no
official split exists.
Needs projectaria-tools.
"""

from pathlib import Path

from egom2p.datasets.aria import AriaRecording, read_trajectory
from egom2p.datasets.recording import Adapter, Recording, find, need


class ADT(Adapter):
    name = "adt"
    layout = "SEQUENCE/{video.vrs, depth_images.vrs, aria_trajectory.csv, eyegaze.csv}"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.parent.name for p in root.glob("*/aria_trajectory.csv")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence
        aria = AriaRecording(find(folder / "video.vrs", folder / "main_recording.vrs"))
        depth, gaze = folder / "depth_images.vrs", folder / "eyegaze.csv"
        return Recording(sequence, "test", rgb=aria.rgb(), depth=aria.depth(depth) if depth.exists() else None,
                         cam=aria.camera_track(*read_trajectory(folder / "aria_trajectory.csv")),
                         gaze=aria.gaze(gaze) if gaze.exists() else None, intrinsics=aria.intrinsics)
