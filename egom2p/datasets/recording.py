"""What every adapter makes of a raw sequence, and how it is read: a Recording with lazy pictures and time-stamped
tracks.

All clocks are seconds from a common zero of the sequence. Poses are `world_from_camera` in OpenCV axes, metres, of the
camera that took the rgb frames as they are returned (upright, undistorted). Gaze is in pixels of those frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from egom2p.data.tokens import load_array
from egom2p.errors import UserError


class BadSequence(Exception):
    """A sequence that cannot be used; the message says why. It never ends a run."""


class Pictures(ABC):
    """times (N,) seconds, ascending; `read(i)` gives picture i. Indices are asked for in ascending order."""

    times: np.ndarray

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
    """One sequence. crop: side of the centred square that is used, the shorter side of the frames when 0.
    intrinsics (3, 3) pixels of the rgb frames; meta goes into every clip's json."""

    name: str
    split: str
    rgb: Pictures | None = None
    depth: Pictures | None = None
    cam: Track | None = None
    gaze: Track | None = None
    intrinsics: np.ndarray | None = None
    crop: int = 0
    meta: dict[str, Any] = field(default_factory=dict)


class Adapter(ABC):
    """One raw data set. `sequences` names everything below `root` that can be opened, sorted."""

    name: str
    layout: str  # what `root` must hold, for the message when it does not

    @abstractmethod
    def sequences(self, root: Path) -> list[str]: ...

    @abstractmethod
    def open(self, root: Path, sequence: str) -> Recording:
        """Raises BadSequence (or any error, which is taken as one)."""


class VideoPictures(Pictures):
    """A video file, decoded forwards. times: seconds of each frame, its own time stamps when None.

    gray16: depth as 16-bit grey (FFV1 and the like), multiplied by `scale` to metres.
    """

    def __init__(self, path: Path, times: np.ndarray | None = None, gray16: bool = False, scale: float = 1.0,
                 turn: int = 0) -> None:
        self.path, self.gray16, self.scale, self.turn = path, gray16, scale, turn
        self.times = frame_times(path) if times is None else np.asarray(times, np.float64)
        self._frames: Iterator[np.ndarray] | None = None
        self._next = 0
        self._held: tuple[int, np.ndarray] | None = None

    def read(self, index: int) -> np.ndarray:
        if self._held and self._held[0] == index:
            return self._held[1]
        if self._frames is None or index < self._next:
            self._frames, self._next = self._decode(), 0
        for frame in self._frames:
            self._next += 1
            if self._next == index + 1:
                self._held = (index, self._convert(frame))
                return self._held[1]
        raise BadSequence(f"{self.path} ends at frame {self._next} of {len(self.times)}")

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            with av.open(str(self.path)) as container:
                container.streams.video[0].thread_type = "AUTO"
                yield from container.decode(video=0)
        except av.error.FFmpegError as error:
            raise BadSequence(f"{self.path} cannot be decoded after frame {self._next} ({error})") from error

    def _convert(self, frame: av.VideoFrame) -> np.ndarray:
        if self.gray16:
            return np.rot90(frame.to_ndarray(format="gray16le").astype(np.float32) * np.float32(self.scale), self.turn)
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.turn))


class ImagePictures(Pictures):
    """A list of image files. depth: 16-bit, multiplied by `scale` to metres."""

    def __init__(self, paths: Sequence[Path], times: np.ndarray, depth: bool = False, scale: float = 1.0) -> None:
        if len(paths) != len(times):
            raise BadSequence(f"{len(paths)} images for {len(times)} time stamps")
        self.paths, self.times, self.depth, self.scale = list(paths), np.asarray(times, np.float64), depth, scale

    def read(self, index: int) -> np.ndarray:
        try:
            with Image.open(self.paths[index]) as image:
                array = np.asarray(image if self.depth else image.convert("RGB"))
        except OSError as error:
            raise BadSequence(f"{self.paths[index]} cannot be read ({error})") from error
        return array.astype(np.float32) * np.float32(self.scale) if self.depth else array


class ArrayPictures(Pictures):
    """Depth frames of a .npy file (memory-mapped) or of a .npz's arr_0, (T, H, W) metres, NaN or 0 = no reading."""

    def __init__(self, path: Path, times: np.ndarray) -> None:
        self.array = np.load(path, mmap_mode="r",
                             allow_pickle=False) if path.suffix == ".npy" else load_array(path.read_bytes())
        if len(self.array) != len(times):
            raise BadSequence(f"{path} holds {len(self.array)} frames, expected {len(times)}")
        self.times = np.asarray(times, np.float64)

    def read(self, index: int) -> np.ndarray:
        return np.nan_to_num(self.array[index].astype(np.float32))


class MappedPictures(Pictures):
    """Pictures passed through a function, such as an undistortion."""

    def __init__(self, source: Pictures, function: Any) -> None:
        self.source, self.function, self.times = source, function, source.times

    def read(self, index: int) -> np.ndarray:
        return self.function(self.source.read(index))


def frame_times(path: Path) -> np.ndarray:
    """(N,) seconds of each frame of a video, from its packets alone; the first is 0."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadSequence(f"{path} holds no video stream")
            stream = container.streams.video[0]
            times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None)
    except (av.error.FFmpegError, OSError) as error:
        raise BadSequence(f"{path} is not a readable video ({error})") from error
    if not times:
        raise BadSequence(f"{path} holds no frame")
    return np.array(times) - times[0]


def find(*paths: Path) -> Path:
    """The first of `paths` that exists; BadSequence names the first otherwise."""
    for path in paths:
        if path.exists():
            return path
    raise BadSequence(f"{paths[0]} is missing")


def numbers(path: Path, columns: int | None = None) -> np.ndarray:
    """(N, C) numbers of a text file without header, separated by blanks, tabs or commas; rows that are cut off are
    dropped."""
    rows = [line.replace(",", " ").split() for line in find(path).read_text().splitlines()
            if line.strip() and not line.lstrip().startswith("#")]
    columns = columns or max((len(r) for r in rows), default=0)
    try:
        table = np.array([r[:columns] for r in rows if len(r) >= columns], np.float64)
    except ValueError as error:
        raise BadSequence(f"{path}: {error}") from error
    if not len(table):
        raise BadSequence(f"{path} holds no row of {columns} numbers")
    return table


def need(root: Path, found: list[str], adapter: "Adapter") -> list[str]:
    """`found`, or one line that says what the folder should look like."""
    if not found:
        raise UserError(f"{root}: no sequence of '{adapter.name}' there; expected {adapter.layout}")
    return found
