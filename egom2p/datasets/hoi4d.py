"""HOI4D (Liu et al., "HOI4D: A 4D Egocentric Dataset for Category-Level Human-Object Interaction", CVPR 2022);
post-training, evaluation.

Get it: https://hoi4d.github.io. Layout and conventions by leolyliu/HOI4D-Instructions (README, utils/decode.py,
prepare_4Dseg), relative path ZY2021080000*/H*/C*/N*/S*/s*/T*/:
  align_rgb/image.mp4             1920 x 1080, 300 frames
  align_depth/depth_video.avi     16-bit grey, millimetres along z, registered to rgb, 0 = no reading
  3Dseg/output.log                Open3D / Redwood trajectory: a line of three integers, the first the frame, then 4 x
  4;
                                  camera to world (Open3D inverts it into the extrinsic the authors use), OpenCV, metres
  action/color.json               info.duration (or info.Duration): 20 s for 300 frames, 10 s in 104 recordings
  camera_params/CAMERA/intrin.npy 3 x 3, one a camera
The archives unpack to roots of their own (HOI4D_release, HOI4D_depth_video, HOI4D_annotations), real trees nest once
more (annotations/HOI4D_annotations/ZY*); folders down to two below `root` are searched. Frame t of video, depth and log
belong together; its time is t * duration / 300. No gaze. The authors publish lists for their own benchmarks; here
everything is `test` (ours). No real file was at hand; the depth's codec is inferred from the authors' decoding (16-bit
PNG out of ffmpeg) and from TACO by the same authors.
"""

from pathlib import Path

import numpy as np

from egom2p.config import read_json
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
from egom2p.datasets.tables import read_text
from egom2p.errors import UserError
from egom2p.files import walk

RATES = (15.0, 30.0)
FULL = (1920, 1080)
PATTERN = "ZY*/H*/C*/N*/S*/s*/T*/align_rgb/image.mp4"


class HOI4D(Adapter):
    name = "hoi4d"
    layout = ("[HOI4D_release/]ZY*/H*/C*/N*/S*/s*/T*/align_rgb/image.mp4 with align_depth, 3Dseg/output.log "
              "and camera_params")

    def sequences(self, root: Path) -> list[str]:
        found = {p.parent.parent.relative_to(base).as_posix() for base in self._bases(root) for p in base.glob(PATTERN)}
        return need(root, sorted(found), self)

    def files(self, root: Path, sequence: str) -> list[Path]:
        camera = f"camera_params/{sequence.split('/')[0]}/intrin.npy"
        return [f for base in self._bases(root) for f in (*walk(base / sequence), base / camera)]

    def open(self, root: Path, sequence: str) -> Recording:
        places = [base / sequence for base in self._bases(root)]
        video = VideoPictures(find(*(p / "align_rgb/image.mp4" for p in places)))
        recording = Recording(sequence, "test", rgb=video)
        rate = self._rate(places, len(video.times), recording.notes)
        video.times = np.arange(len(video.times)) / rate
        height, width = video.read(0).shape[:2]
        depth, log = _first(places, "align_depth/depth_video.avi"), _first(places, "3Dseg/output.log")
        if depth:
            recording.depth = recording.attempt("depth", beside_video, video, depth, 0.001, recording.notes)
        if log:
            recording.cam = recording.attempt("cam", read_redwood, log, video.times)
        else:
            recording.notes.append("cam left out: no 3Dseg/output.log below any of the roots")
        camera = f"camera_params/{sequence.split('/')[0]}/intrin.npy"
        matrix = _first(self._bases(root), camera)
        if matrix:
            recording.intrinsics = recording.attempt("intrinsics", lambda: fit_intrinsics(
                np.load(matrix, allow_pickle=False), width, height, FULL, recording.notes))
        else:
            recording.notes.append(f"intrinsics left out: no {camera}")
        return recording

    def _rate(self, places: list[Path], frames: int, notes: list[str]) -> float:
        """Frames a second, from the duration that the annotations state."""
        path = _first(places, "action/color.json")
        if path is None:
            notes.append(f"no action/color.json says how long this lasts; {RATES[0]:g} frames a second are assumed")
            return RATES[0]
        try:
            info = read_json(path).get("info", {})
        except UserError as error:
            raise BadSequence(str(error)) from error
        duration = float(info.get("duration") or info.get("Duration") or 0)
        rate = min(RATES, key=lambda r: abs(frames / duration - r)) if duration > 0 else 0
        if not rate or abs(frames / duration / rate - 1) > 0.1:
            raise BadSequence(f"{path}: {duration:g} s for {frames} frames is neither 15 nor 30 a second")
        return rate

    def _bases(self, root: Path) -> list[Path]:
        """`root` and the folders down to two below it that may be roots of an archive."""
        def below(folder: Path) -> list[Path]:
            try:
                return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("ZY", ".")))
            except PermissionError:  # such as lost+found
                return []

        first = below(root)
        return [root, *first, *(p for folder in first for p in below(folder))]


def _first(places: list[Path], name: str) -> Path | None:
    return next((p / name for p in places if (p / name).exists()), None)


def read_redwood(path: Path, times: np.ndarray) -> Track:
    """An Open3D trajectory log as a track: the first integer of each block is the frame when they rise, else its
    place."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
    blocks = [lines[i : i + 5] for i in range(0, len(lines), 5)]
    whole = [b for b in blocks if len(b) == 5 and all(len(row) >= 4 for row in b[1:])]
    if not whole:
        raise BadSequence(f"{path} holds no pose")
    try:
        poses = np.array([[row[:4] for row in block[1:]] for block in whole], np.float64)
        numbers = np.array([int(block[0][0]) for block in whole])
    except ValueError as error:
        raise BadSequence(f"{path}: {error}") from error
    if (np.diff(numbers) <= 0).any():
        numbers = np.arange(len(whole))
    inside = (numbers >= 0) & (numbers < len(times))
    return Track(times[numbers[inside]], poses[inside])
