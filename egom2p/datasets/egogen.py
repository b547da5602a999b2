"""EgoGen (Li et al., "EgoGen: An Egocentric Synthetic Data Generator", CVPR 2024), as published for EgoM2P.

Get it: https://egogen.ethz.ch (registration), the `egom2p_*_ori.tar` archives. What is known of them comes from
EgoM2P's loader (one file a sequence, cam/NAME.npz with `arr_0` (T, 4, 4), camera to world in OpenGL axes: x right, y
up, looking along -z; metres; videos beside it) and its README_DATA.md, by which they were saved by scripts like
EgoGen's gen_egobody_depth.py. That one writes a file a frame, 320 x 288 with a focal length of 200, and the inverse of
the pose; no archive was at hand, so this adapter reads the layout of the loader:
  cam/NAME.npz                arr_0 (T, 4, 4), 30 Hz
  rgb/NAME.mp4                or rgb_256_8fps/NAME.mp4
  depth/NAME.npz or .npy      arr_0 (T, H, W) metres along z (pyrender's), 0 where nothing was hit; at the video's rate
  intrinsics/NAME.txt         3 x 3 pixels of the rgb frames, optional
All sequences are training data (no split is published). No gaze.
"""

from pathlib import Path

import numpy as np

from egom2p.data.tokens import load_array
from egom2p.datasets.recording import (
    Adapter,
    ArrayPictures,
    BadSequence,
    Recording,
    Track,
    VideoPictures,
    find,
    fit_intrinsics,
    need,
)
from egom2p.datasets.tables import read_matrix

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
RATE = 30.0


class EgoGen(Adapter):
    name = "egogen"
    layout = "cam/NAME.npz, rgb/NAME.mp4 (or rgb_256_8fps/NAME.mp4), depth/NAME.npz"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.stem for p in (root / "cam").glob("*.npz")), self)

    def files(self, root: Path, sequence: str) -> list[Path]:
        return sorted(root.glob(f"*/{sequence}.*"))

    def open(self, root: Path, sequence: str) -> Recording:
        video = VideoPictures(find(root / f"rgb/{sequence}.mp4", root / f"rgb_256_8fps/{sequence}.mp4"))
        height, width = video.read(0).shape[:2]
        recording = Recording(sequence, "train", rgb=video)
        recording.cam = recording.attempt("cam", self._camera, root / f"cam/{sequence}.npz")
        depth = next((p for end in ("npy", "npz") if (p := root / f"depth/{sequence}.{end}").exists()), None)
        if depth:
            recording.depth = recording.attempt("depth", ArrayPictures, depth, video.times, (width, height),
                                                recording.notes)
        path = root / f"intrinsics/{sequence}.txt"
        if path.exists():
            recording.intrinsics = recording.attempt("intrinsics", lambda: fit_intrinsics(
                read_matrix(path), width, height, None, recording.notes))
        return recording

    def _camera(self, path: Path) -> Track:
        poses = load_array(path.read_bytes()).astype(np.float64)
        if poses.ndim != 3 or poses.shape[1:] != (4, 4):
            raise BadSequence(f"{path} is {poses.shape}, expected (T, 4, 4)")
        return Track(np.arange(len(poses)) / RATE, poses @ OPENGL_FROM_OPENCV)
