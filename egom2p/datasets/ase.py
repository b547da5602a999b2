"""Aria Synthetic Environments (Avetisyan et al., SceneScript, 2024); post-training and evaluation.

Get it: https://www.projectaria.com/datasets/ase (own licence). Layout by projectaria_tools' ASE docs and readers, one
folder a scene:
  SCENE/rgb/vignette%07d.jpg        704 x 704 fisheye, 10 fps, turned as the sensor is
  SCENE/depth/depth%07d.png         16-bit millimetres along each pixel's ray, same size; 0 and 65535 taken as no
  reading
                                    (ours); test scenes have none
  SCENE/trajectory.csv              MPS columns, world from device; row k belongs to image k
SCENE may lie below train/ or test/, where the same numbers recur.
One calibration serves every scene (AseCalibrationProvider.cpp; Fisheye624). Frames and depth are undistorted to a
pinhole of the same focal length, depth along the axis, then turned upright. Poses are interpolated from 10 to 30 Hz. No
gaze. Everything is `test` (no validation split is published).
"""

import re
from pathlib import Path

import numpy as np

from egom2p.datasets.aria import RAW_FROM_UPRIGHT, read_trajectory, transform, turn, turn_intrinsics
from egom2p.datasets.lens import Undistortion, distort_fisheye624
from egom2p.datasets.recording import (
    Adapter,
    BadSequence,
    ImagePictures,
    MappedPictures,
    Recording,
    Track,
    find,
    need,
)
from egom2p.files import walk

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
        found = {p.parent.parent.relative_to(root).as_posix() for p in walk(root) if p.parent.name == "rgb"}
        found |= {p.parent.relative_to(root).as_posix() for p in root.glob("**/rgb") if p.is_dir()}
        return need(root, sorted(found), self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence
        images, depth_files = _numbered(folder / "rgb"), _numbered(folder / "depth")
        numbers = sorted(images)
        frames = ImagePictures([images[n] for n in numbers], np.array(numbers) / RATE)
        height, width = frames.read(0).shape[:2]
        scale = width / SIDE
        raw = np.array([[FOCAL * scale, 0, (CENTRE[0] + 0.5) * scale], [0, FOCAL * scale, (CENTRE[1] + 0.5) * scale],
                        [0, 0, 1.0]])
        undistort = Undistortion(raw, width, height, lambda rays: distort_fisheye624(rays, LENS))
        recording = Recording(sequence, "test", rgb=MappedPictures(frames, lambda f: turn(undistort(f))),
                              intrinsics=turn_intrinsics(raw, height))
        if depth_files:
            order = sorted(depth_files)
            stored = ImagePictures([depth_files[n] for n in order], np.array(order) / RATE, depth=True)
            recording.depth = MappedPictures(stored, lambda d: turn(undistort.depth_along_rays(metres(d))))
        recording.cam = recording.attempt("cam", self._camera, folder)
        return recording

    def _camera(self, folder: Path) -> Track:
        """Row k of the trajectory is image k."""
        path = find(folder / "trajectory.csv", folder / "trajectory.txt")
        trajectory = read_trajectory(path, positional=True)
        if trajectory.left_out:
            raise BadSequence(f"{path}: {trajectory.left_out} rows are no pose, so which row is which image is not "
                              f"known")
        poses = trajectory.poses() @ DEVICE_FROM_CAMERA @ RAW_FROM_UPRIGHT
        return Track(np.arange(len(poses)) / RATE, poses)


def _numbered(folder: Path) -> dict[int, Path]:
    """{number: path} of vignette%07d.jpg, depth%07d.png and the like."""
    found = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        digits = re.search(r"(\d+)$", path.stem)
        if digits and path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found[int(digits[1])] = path
    return found
