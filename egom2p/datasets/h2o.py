"""H2O (Kwon et al., "H2O: Two Hands Manipulating Objects for First Person Interaction Recognition", ICCV 2021).

Get it: https://h2odataset.ethz.ch (registration; the `_ego` archives are enough). Layout and conventions by the
authors' taeinkwon/h2odataset README and taeinkwon/h2oplayer:
  subjectN[_ego]/{h1,h2,k1,k2,o1,o2}/SEQUENCE/cam4/           cam4 is the head-mounted camera
    rgb/%06d.png            1280 x 720, undistorted
    depth/%06d.png          16 bit, millimetres along z, registered to rgb, 0 = no reading
    cam_pose/%06d.txt       16 numbers, row-major 4 x 4, camera to world, OpenCV axes, metres
    cam_intrinsics.txt      fx fy cx cy width height
There are no time stamps: 30 frames a second by index (the player's rate). No gaze.
Splits of EgoM2P (facts.md): subject3 k2, o1, o2 held out (the authors' validation list); subject4 is the authors' test.
"""

from pathlib import Path

import numpy as np

from egom2p.datasets.recording import Adapter, BadSequence, ImagePictures, Recording, Track, find, need, numbers

RATE = 30.0
HELD_OUT = {("subject3", scene) for scene in ("k2", "o1", "o2")}


class H2O(Adapter):
    name = "h2o"
    layout = "subjectN[_ego]/SCENE/SEQUENCE/cam4/{rgb,depth,cam_pose}/%06d.* and cam_intrinsics.txt"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(str(p.parent.parent.relative_to(root)) for p in root.glob("subject*/*/*/cam4/rgb")),
                    self)

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence / "cam4"
        images = {int(p.stem): p for p in (folder / "rgb").glob("*.png")}
        if not images:
            raise BadSequence(f"{folder / 'rgb'} holds no image")
        fx, fy, cx, cy = numbers(folder / "cam_intrinsics.txt", 6)[0, :4]
        frames = sorted(images)
        poses = [self._pose(folder / f"cam_pose/{i:06d}.txt") for i in frames]
        depth = {int(p.stem): p for p in (folder / "depth").glob("*.png")} if (folder / "depth").is_dir() else {}
        with_depth = sorted(depth)
        return Recording(sequence, self.split(sequence), rgb=ImagePictures([images[i] for i in frames],
                                                                           np.array(frames) / RATE),
                         depth=ImagePictures([depth[i] for i in with_depth], np.array(with_depth) / RATE, depth=True,
                                             scale=0.001) if depth else None,
                         cam=Track(np.array(frames) / RATE, np.stack(poses)),
                         intrinsics=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]))

    def split(self, sequence: str) -> str:
        subject, scene = sequence.split("/")[0].removesuffix("_ego"), sequence.split("/")[1]
        return "val" if (subject, scene) in HELD_OUT else "test" if subject == "subject4" else "train"

    def _pose(self, path: Path) -> np.ndarray:
        """A frame whose pose file is missing or cut off has none."""
        try:
            return numbers(find(path)).reshape(-1)[:16].reshape(4, 4)
        except (BadSequence, ValueError):
            return np.full((4, 4), np.nan)
