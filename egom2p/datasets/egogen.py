"""EgoGen (Li et al., "EgoGen: An Egocentric Synthetic Data Generator", CVPR 2024), as published for EgoM2P.

Get it: https://egogen.ethz.ch (registration), the `egom2p_*_ori.tar` archives. What is known of them comes from the
loader of EgoM2P: one file a sequence, cam/NAME.npz with `arr_0` (T, 4, 4), camera to world in OpenGL axes (x right, y
up, looking along -z), metres; videos beside it. The inside of the archives is not documented, so this adapter is
configurable where it must guess, and says so:
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
    Pictures,
    Recording,
    Track,
    VideoPictures,
    find,
    need,
    numbers,
)

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
RATE = 30.0


class EgoGen(Adapter):
    name = "egogen"
    layout = "cam/NAME.npz, rgb/NAME.mp4 (or rgb_256_8fps/NAME.mp4), depth/NAME.npz"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(p.stem for p in (root / "cam").glob("*.npz")), self)

    def open(self, root: Path, sequence: str) -> Recording:
        poses = load_array(find(root / f"cam/{sequence}.npz").read_bytes()).astype(np.float64) @ OPENGL_FROM_OPENCV
        if poses.ndim != 3 or poses.shape[1:] != (4, 4):
            raise BadSequence(f"cam/{sequence}.npz is {poses.shape}, expected (T, 4, 4)")
        video = VideoPictures(find(root / f"rgb/{sequence}.mp4", root / f"rgb_256_8fps/{sequence}.mp4"))
        path = root / f"intrinsics/{sequence}.txt"
        return Recording(sequence, "train", rgb=video, depth=self._depth(root, sequence, video.times),
                         cam=Track(np.arange(len(poses)) / RATE, poses),
                         intrinsics=numbers(path, 3)[:3] if path.exists() else None)

    def _depth(self, root: Path, sequence: str, times: np.ndarray) -> Pictures | None:
        path = next((p for suffix in ("npy", "npz") if (p := root / f"depth/{sequence}.{suffix}").exists()), None)
        return ArrayPictures(path, times) if path else None
