"""HOI4D (Liu et al., "HOI4D: A 4D Egocentric Dataset for Category-Level Human-Object Interaction", CVPR 2022);
post-training, evaluation.

Get it: https://hoi4d.github.io. Layout and conventions by leolyliu/HOI4D-Instructions (README, utils/decode.py,
prepare_4Dseg), relative path ZY2021080000*/H*/C*/N*/S*/s*/T*/:
  align_rgb/image.mp4             1920 x 1080, 15 fps
  align_depth/depth_video.avi     16 bit, millimetres along z, registered to rgb, 0 = no reading
  3Dseg/output.log                Open3D / Redwood trajectory: a line of three integers, then 4 x 4; camera to world
  (Open3D inverts it
                                  into the extrinsic the authors use), OpenCV axes, metres
  camera_params/CAMERA/intrin.npy 3 x 3, one a camera
The archives unpack to roots of their own (HOI4D_release, HOI4D_depth_video, HOI4D_annotations); all below `root` is
searched. Frame t of the video, the depth and the log belong together; time is t / 15 s. No gaze. No split is published:
everything is `test` (ours).
"""

from pathlib import Path

import numpy as np

from egom2p.datasets.recording import Adapter, BadSequence, Recording, Track, VideoPictures, find, need

RATE = 15.0


class HOI4D(Adapter):
    name = "hoi4d"
    layout = ("[HOI4D_release/]ZY*/H*/C*/N*/S*/s*/T*/align_rgb/image.mp4 with align_depth, 3Dseg/output.log "
              "and camera_params")

    def sequences(self, root: Path) -> list[str]:
        found = {p.parent.parent.relative_to(base).as_posix() for base in self._bases(root)
                 for p in base.glob("ZY*/H*/C*/N*/S*/s*/T*/align_rgb/image.mp4")}
        return need(root, sorted(found), self)

    def open(self, root: Path, sequence: str) -> Recording:
        places = [base / sequence for base in self._bases(root)]
        video = VideoPictures(find(*(p / "align_rgb/image.mp4" for p in places)))
        video.times = np.arange(len(video.times)) / RATE
        depth_file = next((p / "align_depth/depth_video.avi" for p in places
                           if (p / "align_depth/depth_video.avi").exists()), None)
        depth = VideoPictures(depth_file, gray16=True, scale=0.001) if depth_file else None
        if depth is not None:
            if abs(len(depth.times) - len(video.times)) > 1:
                raise BadSequence(f"{len(depth.times)} depth frames for {len(video.times)} video frames")
            depth.times = np.arange(len(depth.times)) / RATE
        log = next((p / "3Dseg/output.log" for p in places if (p / "3Dseg/output.log").exists()), None)
        cam = None
        if log is not None:
            poses = read_redwood(log)
            cam = Track(np.arange(len(poses)) / RATE, poses)
        camera = sequence.split("/")[0]
        intrinsics = [base / f"camera_params/{camera}/intrin.npy" for base in self._bases(root)]
        matrix = next((np.load(p, allow_pickle=False).astype(np.float64) for p in intrinsics if p.exists()), None)
        return Recording(sequence, "test", rgb=video, depth=depth, cam=cam, intrinsics=matrix)

    def _bases(self, root: Path) -> list[Path]:
        return [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("ZY"))]


def read_redwood(path: Path) -> np.ndarray:
    """(N, 4, 4) of an Open3D trajectory log."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) < 5:
        raise BadSequence(f"{path} holds no pose")
    try:
        return np.array([[row[:4] for row in lines[i + 1 : i + 5]] for i in range(0, len(lines) - 4, 5)], np.float64)
    except ValueError as error:
        raise BadSequence(f"{path}: {error}") from error
