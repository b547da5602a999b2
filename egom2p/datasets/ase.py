"""Aria Synthetic Environments (Avetisyan et al., SceneScript, 2024); post-training and evaluation.

Get it: https://www.projectaria.com/datasets/ase (own licence). Layout by projectaria_tools' ASE docs and readers, one
folder a scene:
  SCENE/rgb/vignette%07d.jpg        704 x 704 fisheye, 10 fps, turned as the sensor is
  SCENE/depth/depth%07d.png         16 bit millimetres along each pixel's ray, same size; 0 and 65535 taken as no
  reading (ours)
  SCENE/trajectory.csv              MPS columns, world from device; row k belongs to image k
One calibration serves every scene (AseCalibrationProvider.cpp; Fisheye624). Frames and depth are undistorted to a
pinhole of the same focal length, depth along the axis, then turned upright. Poses are interpolated from 10 to 30 Hz. No
gaze. Everything is `test` (no validation split is published).
"""

from pathlib import Path

import numpy as np

from egom2p.datasets.aria import RAW_FROM_UPRIGHT, read_trajectory, transform, turn, turn_intrinsics
from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import Adapter, BadSequence, ImagePictures, MappedPictures, Recording, Track, find, need

RATE = 10.0
SIDE = 704
FOCAL, CENTRE = 297.6375381033778, (357.6599197217746, 349.1922497127481)
LENS = np.array([0.3650890375644368, -0.1738082418112771, -0.7534945484033189, 2.434788882752295, -2.57786220300886,
                 0.8788483538598834,
                 0.0008005198595407136, -0.000294237814554143, 0, 0, 0, 0])
DEVICE_FROM_CAMERA = transform([0.32640934382849085, 0.029274992008313648, 0.033361059956531547, 0.9441858687689326],
                               [-0.007530096566173914, -0.010908549841580260, -0.003598063315542823])


def metres(stored: np.ndarray) -> np.ndarray:
    """Millimetres of a depth PNG as metres; 65535 is no reading."""
    return np.where(stored >= 65535, 0, stored) * np.float32(0.001)


class ASE(Adapter):
    name = "ase"
    layout = "SCENE/{rgb/vignette%07d.jpg, depth/depth%07d.png, trajectory.csv}"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.parent.name for p in root.glob("*/rgb")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence
        images = sorted((folder / "rgb").glob("vignette*.*"))
        _, poses = read_trajectory(find(folder / "trajectory.csv", folder / "trajectory.txt"))
        if len(images) != len(poses):
            raise BadSequence(f"{len(images)} images for {len(poses)} poses")
        times = np.arange(len(images)) / RATE
        frames = ImagePictures(images, times)
        height, width = frames.read(0).shape[:2]
        scale = width / SIDE
        raw = np.array([[FOCAL * scale, 0, (CENTRE[0] + 0.5) * scale], [0, FOCAL * scale, (CENTRE[1] + 0.5) * scale],
                        [0, 0, 1.0]])
        undistort = Undistortion(raw, width, height, lambda rays: distort_fisheye624(rays, LENS))
        depth_files = sorted((folder / "depth").glob("depth*.png"))
        depth = None
        if len(depth_files) == len(images):
            stored = ImagePictures(depth_files, times, depth=True)
            depth = MappedPictures(stored, lambda d: turn(undistort.depth_along_rays(metres(d))))
        return Recording(sequence, "test", rgb=MappedPictures(frames, lambda f: turn(undistort(f))), depth=depth,
                         cam=Track(times, poses @ DEVICE_FROM_CAMERA @ RAW_FROM_UPRIGHT),
                         intrinsics=turn_intrinsics(raw, height))
