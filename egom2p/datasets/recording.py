"""What every adapter makes of a raw sequence, and how it is read: a Recording with lazy pictures and time-stamped
tracks.

All clocks are seconds from a common zero of the sequence. Poses are `world_from_camera` in OpenCV axes, metres, of the
camera that took the rgb frames as they are returned (upright, undistorted, square pixels). Gaze is in pixels of those
frames. **A side file that is wrong costs its own signal**, is named in `notes`, and never the video: adapters read each
through `Recording.attempt`.
"""

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from egom2p.data.storage import DAMAGE
from egom2p.data.tokens import load_array
from egom2p.data.video import Losses, NoVideo, Shown, frame_times, shown
from egom2p.errors import UserError
from egom2p.files import walk

T = TypeVar("T")
RESERVED = ("rgb", "depth", "cam", "gaze", "intrinsics", "colmap", "json")  # names with a meaning of their own
CENTRE_TOLERANCE = 0.15  # of the side: a principal point further than this from the frame's centre is another frame's
ASPECT_TOLERANCE = 0.01
DEPTH_TOLERANCE = 0.03  # networks round the sides to multiples of 14 or 32
SHORTEST_SHARE = 0.9  # of the video: depth with fewer frames was stored at another rate


class BadSequence(Exception):
    """A sequence, or a file of it, that cannot be used; the message says why. It never ends a run."""


class NotARecording(BadSequence):
    """A file that only looks like a recording by its name: empty, a pointer, no video in it. It is skipped and
    named."""


class Pictures(ABC):
    """times (N,) seconds, ascending; `read(i)` gives picture i. Indices are asked for in ascending order. losses: what
    could not be decoded so far."""

    times: np.ndarray
    losses: Losses | None = None

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, or (H, W) float32 metres for depth, 0 = no reading."""


@dataclass(frozen=True)
class Track:
    """times (N,) seconds, ascending; values (N, ...), NaN where there is no measurement."""

    times: np.ndarray
    values: np.ndarray


@dataclass
class Recording:
    """One sequence. split: "" when the set's lists say it (`Adapter.splits`). series: any other signals by name, of
    values (N, C); at which rate clips hold them is said by `Adapter.rates` or the user. crop: side of the centred
    square that is used, the shorter side of the frames when 0. intrinsics (3, 3) pixels of the rgb frames; meta goes
    into every clip's json; notes: what was left out and why, and what was chosen where there was a choice."""

    name: str
    split: str
    rgb: Pictures | None = None
    depth: Pictures | None = None
    cam: Track | None = None
    gaze: Track | None = None
    series: dict[str, Track] = field(default_factory=dict)
    intrinsics: np.ndarray | None = None
    crop: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, read: Callable[..., T], *args: Any) -> T | None:
        """`read(*args)`, or None and a note that says what is lost and why."""
        try:
            return read(*args)
        except MemoryError:  # of this machine, not of the file
            raise
        except (BadSequence, UserError, ArithmeticError, AttributeError, LookupError, csv.Error, *DAMAGE) as error:
            reason = str(error) if isinstance(error, (BadSequence, UserError)) else f"{type(error).__name__}: {error}"
            self.notes.append(f"{what} left out: {' '.join(reason.split())}")
            return None


class Adapter(ABC):
    """One raw data set. `sequences` names everything below `root` that can be opened, sorted."""

    name: str
    layout: str  # what `root` must hold, for the message when it does not
    rates: ClassVar[dict[str, float]] = {}  # Hz at which clips hold each of `Recording.series`

    @abstractmethod
    def sequences(self, root: Path) -> list[str]: ...

    @abstractmethod
    def open(self, root: Path, sequence: str) -> Recording:
        """Raises BadSequence (or any error, which is taken as one)."""

    def splits(self, root: Path, sequences: Sequence[str]) -> dict[str, str] | None:
        """{sequence: split} where lists of the set's authors decide; a sequence in no list is left out. None: `open`
        decides. UserError names the file that is wanted when the lists are not there."""
        return None

    def files(self, root: Path, sequence: str) -> list[Path]:
        """The files a sequence is read from, as far as they lie together: when one of them changes, the sequence is
        prepared anew."""
        place = root / sequence
        return [place] if place.is_file() else list(walk(place))

    def skipped(self, root: Path) -> list[str]:
        """Files below `root` that are part of no sequence although they look as if they were, each with its reason."""
        return []


class VideoPictures(Pictures):
    """A video file, decoded forwards. times: seconds of each frame, the file's own time stamps when None.

    gray16: depth as 16-bit grey (FFV1 and the like), multiplied by `scale` to metres. Frames are found by the time
    stamps of the file, so that one that is lost to damage is replaced by the nearest one within `within` seconds.
    """

    def __init__(self, path: Path, times: np.ndarray | None = None, gray16: bool = False, scale: float = 1.0,
                 within: float = 0.2) -> None:
        self.path, self.gray16, self.scale, self.within = path, gray16, scale, within
        try:
            self.stamps = frame_times(path)
        except NoVideo as error:
            raise NotARecording(str(error)) from error
        except UserError as error:
            raise BadSequence(str(error)) from error
        self.times = self.stamps if times is None else np.asarray(times, np.float64)
        self.losses = Losses()
        self._frames: Iterator[Shown] | None = None
        self._before: Shown | None = None
        self._now: Shown | None = None
        self._held: tuple[int, np.ndarray] | None = None

    def read(self, index: int) -> np.ndarray:
        if self._held and self._held[0] == index:
            return self._held[1]
        frame = self._nearest(self.stamps[index])
        if frame is None:
            raise BadSequence(f"{self.path} ends before {self.stamps[index]:.2f} s of {self.stamps[-1]:.2f} s")
        picture = frame.picture()
        if self.gray16:
            picture = picture.astype(np.float32) * np.float32(self.scale)
        self._held = (index, picture)
        return picture

    def _nearest(self, moment: float) -> Shown | None:
        if self._frames is None or (self._before is not None and moment < self._before.time - self.within):
            self._frames, self._before, self._now = shown(self.path, self.losses, self.gray16), None, None
        while self._now is None or self._now.time < moment - 1e-6:
            following = self._next()
            if following is None:
                break
            self._before, self._now = self._now, following
        near = [f for f in (self._before, self._now) if f is not None and abs(f.time - moment) <= self.within]
        return min(near, key=lambda f: abs(f.time - moment), default=None)

    def _next(self) -> Shown | None:
        try:
            return next(self._frames, None)
        except UserError as error:
            raise BadSequence(str(error)) from error


class ImagePictures(Pictures):
    """A list of image files. depth: 16-bit grey, multiplied by `scale` to metres."""

    def __init__(self, paths: Sequence[Path], times: np.ndarray, depth: bool = False, scale: float = 1.0) -> None:
        if len(paths) != len(times):
            raise BadSequence(f"{len(paths)} images for {len(times)} time stamps")
        if not len(paths):
            raise BadSequence("there is no image")
        self.paths, self.times, self.depth, self.scale = list(paths), np.asarray(times, np.float64), depth, scale

    def read(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if self.depth and image.mode not in ("I;16", "I;16B", "I;16L", "I"):
                    raise BadSequence(f"{path} is {image.mode}; a depth picture must be 16-bit grey")
                array = np.asarray(image if self.depth else image.convert("RGB"))
        except OSError as error:
            raise BadSequence(f"{path} cannot be read ({error})") from error
        return array.astype(np.float32) * np.float32(self.scale) if self.depth else array


class ArrayPictures(Pictures):
    """Depth frames of a .npy file (memory-mapped) or of a .npz's arr_0, (T, H, W) metres, NaN, infinite or 0 = no
    reading; frame t belongs to frame t of a video with frames `size` = (width, height) at `times`."""

    def __init__(self, path: Path, times: np.ndarray, size: tuple[int, int], notes: list[str]) -> None:
        if path.suffix == ".npy":
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            self.array = load_array(path.read_bytes())
        if self.array.ndim != 3 or self.array.dtype.kind != "f":
            raise BadSequence(f"{path} is {self.array.dtype} {self.array.shape}, expected metres as floats (T, H, W)")
        check_shape(path, self.array.shape[1:], size)
        check_count(path, len(self.array), len(times), notes)
        self.times = np.asarray(times, np.float64)[: len(self.array)]

    def read(self, index: int) -> np.ndarray:
        return np.nan_to_num(self.array[index].astype(np.float32), nan=0, posinf=0, neginf=0)


class MappedPictures(Pictures):
    """Pictures passed through a function, such as an undistortion."""

    def __init__(self, source: Pictures, function: Any) -> None:
        self.source, self.function, self.times = source, function, source.times

    @property
    def losses(self) -> Losses | None:
        return self.source.losses

    def read(self, index: int) -> np.ndarray:
        return self.function(self.source.read(index))


def beside_video(rgb: VideoPictures, path: Path, scale: float, notes: list[str]) -> VideoPictures:
    """A depth video whose frame t belongs to frame t of `rgb`, on the same clock. One that is a little shorter
    covers its own frames only; one of another shape or rate, or longer by more than a frame, is refused."""
    depth = VideoPictures(path, gray16=True, scale=scale)
    check_shape(path, depth.read(0).shape, rgb.read(0).shape[1::-1])
    count, frames = len(depth.times), len(rgb.times)
    check_count(path, count, frames, notes, more=1)
    depth.times = rgb.times[:count] if count <= frames else np.append(rgb.times, rgb.times[-1] + 1e-3)
    return depth


def check_shape(path: Path, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    """BadSequence unless depth pictures of `shape` (H, W) are the video's frames, `size` (width, height), or a smaller
    form of them."""
    if abs(shape[1] / shape[0] / (size[0] / size[1]) - 1) > DEPTH_TOLERANCE:
        raise BadSequence(f"{path} is {shape[1]} x {shape[0]}, the video as it is shown {size[0]} x {size[1]}: another "
                          "shape, so turned, cut or squeezed; depth of the frames as they are shown is wanted")


def check_count(path: Path, count: int, frames: int, notes: list[str], more: int = 0) -> None:
    """BadSequence unless `count` depth frames can be one each for the video's `frames`, up to `more` too many; a note
    where the last ones are missing."""
    if count > frames + more or count < SHORTEST_SHARE * frames:
        raise BadSequence(f"{path} has {count} frames, the video {frames}; nothing tells which belong together")
    if count < frames:
        notes.append(f"depth covers {count} of {frames} video frames")


def fit_intrinsics(matrix: np.ndarray, width: int, height: int, full: tuple[int, int] | None,
                   notes: list[str]) -> np.ndarray:
    """Intrinsics for frames of width x height. Those whose principal point is far from the frame's centre are of frames
    of another size: scaled, with a note, when they fit frames of the size `full`, which has the same shape; else
    refused."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise BadSequence(f"intrinsics must be a 3 x 3 matrix of positive focal lengths, not {matrix.tolist()}")
    if _centred(matrix, width, height):
        return matrix
    if full and _centred(matrix, *full) and abs(full[0] / full[1] / (width / height) - 1) < ASPECT_TOLERANCE:
        notes.append(f"intrinsics are of {full[0]} x {full[1]} frames and were scaled to {width} x {height}")
        return np.diag([width / full[0], height / full[1], 1.0]) @ matrix
    raise BadSequence(f"the principal point ({matrix[0, 2]:.0f}, {matrix[1, 2]:.0f}) is not near the centre of "
                      f"{width} x {height} frames: these are the intrinsics of frames of another size")


def _centred(matrix: np.ndarray, width: int, height: int) -> bool:
    return abs(matrix[0, 2] / width - 0.5) < CENTRE_TOLERANCE and abs(matrix[1, 2] / height - 0.5) < CENTRE_TOLERANCE


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """(N, 4) x y z w -> (N, 3, 3); NaN where the quaternion is not one."""
    norm = np.linalg.norm(quaternions, axis=1, keepdims=True)
    unit = np.where(np.abs(norm - 1) < 0.1, quaternions / np.maximum(norm, 1e-9), np.nan)
    x, y, z, w = unit.T
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
            2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
            2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]
    return np.stack(rows, -1).reshape(-1, 3, 3)


def poses_from(quaternions_xyzw: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """(N, 4) and (N, 3) -> (N, 4, 4)."""
    poses = np.tile(np.eye(4), (len(translations), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(quaternions_xyzw), translations
    return poses


def stamp_of(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of the files: another one means that something changed."""
    digest = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
            line = f"{path}|{stat.st_size}|{stat.st_mtime_ns}\n"
        except OSError:
            line = f"{path}|gone\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def find(*paths: Path) -> Path:
    """The first of `paths` that exists; BadSequence names the first otherwise."""
    for path in paths:
        if path.exists():
            return path
    raise BadSequence(f"{paths[0]} is missing")


def need(root: Path, found: list[str], adapter: "Adapter") -> list[str]:
    """`found`, or one line that says what the folder should look like."""
    if not found:
        raise UserError(f"{root}: no sequence of '{adapter.name}' there; expected {adapter.layout}")
    return found


def read_lists(paths: dict[str, Path]) -> dict[str, str]:
    """{name: split} of text files with a name a line, one file a split."""
    return {name: split for split, path in paths.items()
            for name in path.read_text(encoding="utf-8-sig").split() if name}
