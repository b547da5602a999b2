"""H2O (Kwon et al., "H2O: Two Hands Manipulating Objects for First Person Interaction Recognition", ICCV 2021).

Get it: https://h2odataset.ethz.ch (registration; the `_ego` archives are enough). Layout and conventions by the
authors' taeinkwon/h2odataset README and taeinkwon/h2oplayer:
  subjectN[_ego]/{h1,h2,k1,k2,o1,o2}/SEQUENCE/cam4/           cam4 is the head-mounted camera
    rgb/%06d.png            1280 x 720, undistorted
    depth/%06d.png          16 bit, millimetres along z, registered to rgb, 0 = no reading
    cam_pose/%06d.txt       16 numbers, row-major 4 x 4, camera to world, OpenCV axes, metres
    cam_intrinsics.txt      fx fy cx cy width height
The folder's name may carry more (subject3_ego_v1_1); the subject is its digit. A sequence that several folders hold
(the ego archive beside the full one) counts once. There are no time stamps: 30 frames a second by index (the player's
rate). No gaze. Splits of EgoM2P: subject3 k2, o1, o2 held out (the authors' validation list); subject4 is
the authors' test. No real file was at hand.
"""

import re
from pathlib import Path

import numpy as np

from egom2p.datasets.recording import Adapter, BadSequence, ImagePictures, Recording, Track, find, fit_intrinsics, need
from egom2p.datasets.tables import numbers

RATE = 30.0
HELD_OUT = {("3", scene) for scene in ("k2", "o1", "o2")}


class H2O(Adapter):
    name = "h2o"
    layout = "subjectN[_ego]/SCENE/SEQUENCE/cam4/{rgb,depth,cam_pose}/%06d.* and cam_intrinsics.txt"

    def sequences(self, root: Path) -> list[str]:
        return need(root, sorted(self._folders(root).values()), self)

    def skipped(self, root: Path) -> list[str]:
        used = set(self._folders(root).values())
        return [f"{name}: the same sequence as {self._folders(root)[_key(name)]}" for name in self._found(root)
                if name not in used]

    def _found(self, root: Path) -> list[str]:
        return sorted(str(p.parent.parent.relative_to(root)) for p in root.glob("**/subject[0-9]*/*/*/cam4/rgb"))

    def _folders(self, root: Path) -> dict[tuple, str]:
        """{(subject, scene, sequence): folder}, the ego archive's where there are several."""
        found: dict[tuple, str] = {}
        for name in sorted(self._found(root), key=lambda n: ("_ego" not in n, n)):
            if next((root / name / "cam4/rgb").glob("*.png"), None) or _key(name) not in found:
                kept = found.get(_key(name))
                if kept is None or not next((root / kept / "cam4/rgb").glob("*.png"), None):
                    found[_key(name)] = name
        return found

    def open(self, root: Path, sequence: str) -> Recording:
        folder = root / sequence / "cam4"
        images = numbered(folder / "rgb")
        if not images:
            raise BadSequence(f"{folder / 'rgb'} holds no image")
        frames = sorted(images)
        pictures = ImagePictures([images[i] for i in frames], np.array(frames) / RATE)
        height, width = pictures.read(0).shape[:2]
        recording = Recording(sequence, self.split(sequence), rgb=pictures)
        poses = [self._pose(folder / f"cam_pose/{i:06d}.txt") for i in frames]
        recording.cam = Track(np.array(frames) / RATE, np.stack(poses))
        depth = numbered(folder / "depth")
        if depth:
            order = sorted(depth)
            recording.depth = recording.attempt("depth", ImagePictures, [depth[i] for i in order],
                                                np.array(order) / RATE, True, 0.001)
        recording.intrinsics = recording.attempt("intrinsics", self._intrinsics, folder / "cam_intrinsics.txt", width,
                                                 height, recording.notes)
        return recording

    def _intrinsics(self, path: Path, width: int, height: int, notes: list[str]) -> np.ndarray:
        fx, fy, cx, cy, *size = numbers(path, 6)[0]
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        return fit_intrinsics(matrix, width, height, (int(size[0]), int(size[1])), notes)

    def split(self, sequence: str) -> str:
        subject, scene, _ = _key(sequence)
        return "val" if (subject, scene) in HELD_OUT else "test" if subject == "4" else "train"

    def _pose(self, path: Path) -> np.ndarray:
        """A frame whose pose file is missing or cut off has none."""
        try:
            return numbers(find(path)).reshape(-1)[:16].reshape(4, 4)
        except (BadSequence, ValueError):
            return np.full((4, 4), np.nan)


def numbered(folder: Path) -> dict[int, Path]:
    """{number: path} of the pictures in a folder whose names are numbers."""
    return {int(p.stem): p for p in folder.glob("*.png") if p.stem.isdigit()}


def _key(name: str) -> tuple[str, str, str]:
    *_, subject, scene, sequence = name.split("/")
    return re.match(r"subject(\d)", subject)[1], scene, sequence
