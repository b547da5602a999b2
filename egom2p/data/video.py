"""Video files -> frames as a person would see them. One decoder for every command, by PyAV (FFmpeg).

`shown` yields what a player shows: of the stream that is a film (not a cover picture), the frames that are displayed
(edit lists and alt-ref frames hidden), turned upright by the display matrix, with square pixels, in the colours the
file's tags say (untagged: BT.601 at any size, as FFmpeg, OpenCV and the released tokens have it), at seconds from the
first frame shown. Variable frame rates keep their own times. A damaged packet costs its frames and those that build on
it; a cut-off file is read up to the cut.

Seen against files written by FFmpeg's own encoders and muxers (tests/data/test_video.py) and the authors' example
clips; assumed, not seen: recordings straight from phones and action cameras, HEVC's rotation messages, AV1. decord was
measured (benchmarks/RESULTS.md): equal pixels, slower, and wrong on edit lists, AVI, transport streams and damage; it
is not used.
"""

import heapq
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from egom2p.errors import UserError
from egom2p.geometry import crop_offset

log = logging.getLogger(__name__)

CONTAINERS = (b"ftyp", b"\x1aE\xdf\xa3", b"RIFF")  # what files that were meant as videos begin with
GRAY16 = ("gray16le", "gray16be")
READ_ERRORS = 20  # so often a container is asked again after an error in reading (not decoding) it
CLOCK_RESTART_S = 0.5  # backwards by more than this
LONGEST_HOLD_S = 10.0  # a jump of the clock beyond this is no pause but a cut
HDR = (16, 18)  # colour transfers of PQ and HLG


class NoVideo(UserError):
    """There never was a video in it: an empty file, a pointer, a folder, text, sound or pictures only."""


@dataclass
class Shown:
    """One frame: seconds from the first one shown, seconds it is shown for, and `picture()`: (H, W, 3) uint8, or (H, W)
    uint16 of a 16-bit grey stream."""

    time: float
    duration: float
    picture: Callable[[], np.ndarray]


@dataclass
class Losses:
    """What could not be decoded: packets, and frames that were left out because they built on them."""

    packets: int = 0
    frames: int = 0

    def __str__(self) -> str:
        return f"{self.packets} damaged packets, {self.frames} frames left out with them"


def shown(source: Path | bytes, losses: Losses | None = None, gray16: bool = False) -> Iterator[Shown]:
    """The frames of a video file (or its bytes), one at a time; see the module. losses is added to on the way.

    gray16: the stream must be 16-bit grey (depth); its pictures are neither turned to RGB nor stretched to square
    pixels.
    Raises UserError when there is no video in it.
    """
    losses = Losses() if losses is None else losses
    with _opened(source) as container:
        stream = _film(container, source)
        if gray16:
            _need_gray16(stream, source)
        # In AVI a lost frame is told from others by its packet: a decoder of several frames at once errs later.
        stream.thread_type = "SLICE" if container.format.name == "avi" else "AUTO"
        clock, damage = _Clock(container, stream), _Damage(losses)
        look: _Look | None = None
        for packet in _packets(container, stream, losses):
            clock.saw(packet)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                damage.packet(clock.of_packet(packet))
                clock.lost(packet)
                continue
            for frame in frames:
                time = clock.of_frame(frame)
                if time is None or damage.spoils(frame):
                    continue
                look = look or _Look(frame, stream, gray16)
                yield Shown(time, clock.duration(frame), look.of(frame))
    if look is None:
        raise UserError(f"{_name(source)}: holds no video frame{f' ({losses})' if losses.packets else ''}")


def decode_video(source: Path | bytes) -> tuple[np.ndarray, float]:
    """All frames of a video file or its bytes: (T, H, W, 3) uint8 and the average frame rate in Hz. UserError when a
    frame is lost: the caller wants all of them."""
    losses = Losses()
    frames = list(shown(source, losses))
    if losses.packets or losses.frames:
        raise UserError(f"{_name(source)}: {losses}")
    seconds = frames[-1].time + frames[-1].duration
    return np.stack([f.picture() for f in frames]), len(frames) / seconds if seconds > 0 else 0.0


def probe_video(path: Path) -> float:
    """Length in seconds by the container's own account, 0 when it gives none."""
    with _opened(path) as container:
        return float(container.duration or 0) / av.time_base


def frame_times(path: Path) -> np.ndarray:
    """(N,) seconds of each frame of a video from its packets alone, ascending, the first is 0.

    A packet may turn out to show no frame (damage, alt-ref): join pictures to these by time, never by count. What lies
    before the first key frame cannot be shown and is no frame; a clock that starts anew goes on, as in `shown`.
    """
    with _opened(path) as container:
        stream = _film(container, path)
        clock = _Clock(container, stream)
        times = _times_of(_packets(container, stream, Losses()), clock)
    if not times:
        raise UserError(f"{path}: holds no video frame")
    return np.array(times) - times[0]


def _times_of(packets: Iterable[Any], clock: "_Clock") -> list[float]:
    """Seconds of the frames that packets show, ascending."""
    times, undecodable = [], []
    start, shift, decoded = None, 0.0, -math.inf
    for packet in packets:
        if start is None and packet.size and packet.is_keyframe:  # perhaps one that is decoded and not shown
            start = (clock.stamp(packet) or 0) * clock.base
        time = clock.of_packet(packet)
        if time is None:
            continue
        if packet.dts is not None:
            if packet.dts * clock.base < decoded - CLOCK_RESTART_S and times:
                start, shift = time, max(times) + clock.step - time
            decoded = packet.dts * clock.base
        (undecodable if start is None or time < start else times).append(time + shift)
    return sorted(times or undecodable)  # some formats mark no key frame


class FrameStream:
    """Square (side, side, 3) uint8 frames at `rate` Hz, one at a time: for each moment the decoded frame nearest to it.

    Two frames are held. After the last one `seconds` is the recording's length and `losses` what was damaged.
    """

    def __init__(self, path: Path, rate: float, side: int) -> None:
        self.path, self.rate, self.side = path, rate, side
        self.seconds, self.losses = 0.0, Losses()

    def __iter__(self) -> Iterator[np.ndarray]:
        number, held, picture = 0, None, None
        for frame in shown(self.path, self.losses):
            if held is not None and frame.time - held.time > LONGEST_HOLD_S:
                log.warning("%s: nothing is shown from %.1f to %.1f s; what follows is left out", self.path, held.time,
                            frame.time)
                break
            while held is not None and number / self.rate < (held.time + frame.time) / 2:
                picture = square(held.picture()[None], self.side)[0] if picture is None else picture
                yield picture
                number += 1
            held, picture = frame, None
        self.seconds = held.time + held.duration
        while number / self.rate < self.seconds - 1e-6 or not number:
            picture = square(held.picture()[None], self.side)[0] if picture is None else picture
            yield picture
            number += 1
        if self.losses.packets:
            log.warning("%s: %s", self.path, self.losses)


def square(frames: np.ndarray, side: int) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, side, side, 3): centre crop to a square, area-correct bilinear resize.

    torchvision's antialiased resize stays in uint8: 15 times the speed of torch's in float32, at most one level apart.
    """
    cropped = centre_crop(frames, min(frames.shape[1:3]))
    if cropped.shape[1] == side:
        return np.ascontiguousarray(cropped)
    pixels = torch.from_numpy(np.ascontiguousarray(cropped)).permute(0, 3, 1, 2)
    from torchvision.transforms.v2.functional import resize  # a second to import

    return np.ascontiguousarray(resize(pixels, [side, side], antialias=True).permute(0, 2, 3, 1).numpy())


def centre_crop(frames: np.ndarray, side: int) -> np.ndarray:
    """The centred side x side square of (T, H, W, ...) frames, a view; see `geometry.crop_offset`."""
    left, top = crop_offset(frames.shape[2], frames.shape[1], side)
    return frames[:, max(0, top) : max(0, top) + side, max(0, left) : max(0, left) + side]


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    """The container; whatever goes wrong in opening or reading it becomes one line."""
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            yield container
    except (av.error.FFmpegError, OSError) as error:
        reason, never = _why(source, error)
        raise (NoVideo if never else UserError)(f"{_name(source)}: {reason}") from error


def _name(source: Path | bytes) -> str:
    return "video data" if isinstance(source, bytes) else str(source)


def _why(source: Path | bytes, error: Exception) -> tuple[str, bool]:
    """What is wrong with a file that FFmpeg does not open, in words that name the cure; and whether it never was a
    video."""
    if isinstance(source, bytes):
        head, size = source[:64], len(source)
    elif not source.exists():
        return "no such file", True
    elif source.is_dir():
        return "is a folder, not a video file", True
    else:
        size = source.stat().st_size
        with source.open("rb") as file:
            head = file.read(64)
    if not size:
        return "is empty (0 bytes)", True
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the video; run `git lfs pull`", True
    if not isinstance(source, bytes) and head[4:8] == b"ftyp" and b"moov" not in _boxes(source):
        return "was cut off before its index (moov) was written; a tool such as untrunc may recover it", False
    meant = any(mark in head[:8] for mark in CONTAINERS)
    return f"cannot be decoded as video ({' '.join(str(error).split())[:120]})", not meant


def _boxes(path: Path) -> list[bytes]:
    """Names of the top-level boxes of an mp4 that lie whole in the file."""
    names, size = [], path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at + 8 <= size and len(names) < 1000:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - at
            if length < 8 or at + length > size:
                break
            names.append(head[4:8])
            at += length
    return names


def _film(container: Any, source: Path | bytes) -> Any:
    """The video stream that is a film: the default one, then the largest; never a cover or thumbnail."""
    kinds = av.stream.Disposition
    still = kinds.attached_pic | kinds.still_image | kinds.timed_thumbnails
    there = [s for s in container.streams.video if not s.disposition & still]
    films = [s for s in there if s.codec_context is not None and s.width and s.height]
    if there and not films:
        raise UserError(f"{_name(source)}: its video cannot be decoded here: the file's index is cut off, or its codec "
                        "is unknown")
    if not films:
        raise NoVideo(f"{_name(source)}: holds no video stream")
    return max(films, key=lambda s: (bool(s.disposition & kinds.default), s.width * s.height, -s.index))


def _need_gray16(stream: Any, source: Path | bytes) -> None:
    """Depth must be 16-bit grey as it is: FFmpeg would turn 8-bit video into 16-bit nonsense without a word."""
    found = stream.codec_context.pix_fmt
    if found not in GRAY16:
        raise UserError(f"{_name(source)}: depth must be 16-bit grey (gray16le), this is {found} {stream.width} x "
                        f"{stream.height} {stream.codec_context.name}; take the data set's original depth, not a "
                        f"resized copy")


def _packets(container: Any, stream: Any, losses: Losses) -> Iterator[Any]:
    """Packets of the stream; after an error in reading, what follows it is tried, at most READ_ERRORS times."""
    for _ in range(READ_ERRORS):
        try:
            yield from container.demux(stream)
            return
        except av.error.FFmpegError:
            losses.packets += 1


class _Clock:
    """Seconds of packets and frames from the first frame shown.

    AVI has no presentation times and those FFmpeg makes up for B-frames are wrong: there the i-th frame shown is at the
    i-th smallest decoding time, counted anew from the first key frame after damage. A clock that starts anew (joined
    transport streams) goes on from the frame before.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.by_dts = container.format.name == "avi"
        self.base = float(stream.time_base) if stream.time_base else 0.0
        self.step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        self.waiting: list[float] = []
        self.keys: list[float] | None = None  # decoding times of key frames since damage
        self.first: float | None = None
        self.last: float | None = None
        self.shift = 0.0

    def saw(self, packet: Any) -> None:
        if self.by_dts and packet.dts is not None and packet.size:
            heapq.heappush(self.waiting, packet.dts * self.base)
            if self.keys is not None and packet.is_keyframe:
                self.keys.append(packet.dts * self.base)

    def lost(self, packet: Any) -> None:
        """No frame will come of this packet, so its time is nobody's, nor of some that need it."""
        if self.by_dts and packet.dts is not None and packet.dts * self.base in self.waiting:
            self.waiting.remove(packet.dts * self.base)
            heapq.heapify(self.waiting)
            self.keys = []

    def of_packet(self, packet: Any) -> float | None:
        """Container time of a packet whose frame is shown."""
        stamp = self.stamp(packet)
        if stamp is None or not packet.size or packet.is_discard:
            return None
        return stamp * self.base

    def stamp(self, packet: Any) -> int | None:
        return packet.dts if self.by_dts else packet.pts

    def of_frame(self, frame: Any) -> float | None:
        """None for a frame that repeats one shown already."""
        if self.by_dts:
            if self.keys and frame.key_frame:
                while self.waiting and self.waiting[0] < self.keys[0]:
                    heapq.heappop(self.waiting)
                self.keys = None
            time = heapq.heappop(self.waiting) if self.waiting else None
        else:
            time = None if frame.time is None else float(frame.time)
        if self.last is None:
            self.first = time or 0.0
            self.last = time = self.first
            return 0.0
        time = self.last + self.step if time is None else time + self.shift
        if time <= self.last:
            if self.last - time < CLOCK_RESTART_S:
                return None
            self.shift += self.last + self.step - time
            time = self.last + self.step
        self.last = time
        return time - self.first

    def duration(self, frame: Any) -> float:
        base = float(frame.time_base) if frame.time_base else self.base
        seconds = (frame.duration or 0) * base
        return seconds if 0 < seconds < LONGEST_HOLD_S else self.step


class _Damage:
    """Which frames to leave out after lost packets: those the decoder itself marks, and, after two or more losses in a
    row, all from the loss to the next key frame, since they build on what is not there."""

    def __init__(self, losses: Losses) -> None:
        self.losses, self.since, self.count = losses, None, 0

    def packet(self, time: float | None) -> None:
        self.losses.packets += 1
        self.count += 1
        if time is not None:
            self.since = time if self.since is None else min(self.since, time)

    def spoils(self, frame: Any) -> bool:
        moment = float(frame.time) if frame.time is not None else None
        if self.since is not None and frame.key_frame and moment is not None and moment >= self.since:
            self.since, self.count = None, 0
        late = self.count >= 2 and self.since is not None and moment is not None and moment >= self.since
        if frame.is_corrupt or late:
            self.losses.frames += 1
            return True
        return False


class _Look:
    """How frames become pictures: the size of the first one, square pixels, upright."""

    def __init__(self, first: Any, stream: Any, gray16: bool) -> None:
        self.gray16 = gray16
        ratio = float(stream.sample_aspect_ratio or 1) or 1.0
        self.width, self.height = first.width, first.height
        if not gray16 and abs(ratio - 1) > 1e-3:  # stretched, never shrunk
            self.width = round(first.width * ratio) if ratio > 1 else first.width
            self.height = first.height if ratio > 1 else round(first.height / ratio)
        self.turn = _upright(_display_matrix(first))
        if first.color_trc in HDR:
            log.warning("the video is HDR and is not tone-mapped: its colours come out pale")

    def of(self, frame: Any) -> Callable[[], np.ndarray]:
        def picture() -> np.ndarray:
            # threads=1: FFmpeg would start threads for every single frame.
            kind = "gray16le" if self.gray16 else "rgb24"
            array = frame.to_ndarray(format=kind, width=self.width, height=self.height, threads=1)
            return np.ascontiguousarray(self.turn(array))

        return picture


def _display_matrix(frame: Any) -> np.ndarray | None:
    """The first 2 x 2 numbers of the 3 x 3 display matrix, 16.16 fixed point; None when the file has none."""
    for index in range(len(frame.side_data)):
        data = frame.side_data[index]
        if data.type == av.sidedata.sidedata.Type.DISPLAYMATRIX:
            return np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2] / 65536
    return None


def _upright(matrix: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    """What the display matrix does to a stored picture: quarter turns and mirrors (x' = a x + c y, y' = b x + d y)."""
    if matrix is None:
        return lambda picture: picture
    (a, b), (c, d) = np.sign(np.round(matrix, 3)).astype(int)
    if a and d and not (b or c):
        return lambda picture: picture[::d, ::a]
    if b and c and not (a or d):
        return lambda picture: picture.swapaxes(0, 1)[::b, ::c]
    log.warning("the video's display matrix is no quarter turn; it is shown as stored")
    return lambda picture: picture
