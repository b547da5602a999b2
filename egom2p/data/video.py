"""Video files -> frames: decode, resample to a frame rate, centre crop, resize."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from egom2p.errors import UserError
from egom2p.geometry import crop_offset


def decode_video(source: str | Path | bytes) -> tuple[np.ndarray, float]:
    """All frames of a video file or its bytes: (T, H, W, 3) uint8 and the average frame rate in Hz."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    name = "video data" if isinstance(source, bytes) else source
    try:
        with av.open(opened) as container:
            if not container.streams.video:
                raise UserError(f"{name}: holds no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{name}: cannot be decoded as video ({error}); give an mp4, mov or mkv file") from error
    if not frames or rate <= 0:
        raise UserError(f"{name}: holds no video frame")
    return np.stack(frames), rate


def probe_video(path: Path) -> float:
    """Length in seconds by the container's own account, 0 when it gives none."""
    try:
        with av.open(str(path)) as container:
            return float(container.duration or 0) / av.time_base
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be decoded as video ({error}); give an mp4, mov or mkv file") from error


def stream_frames(path: Path, rate: float, side: int) -> Iterator[np.ndarray]:
    """Square (side, side, 3) uint8 frames at `rate` Hz, one at a time: for each moment the decoded frame nearest to it.

    Works for variable frame rates (frames' own time stamps are used) and any length; one frame is held.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            step = 1 / float(stream.average_rate or stream.guessed_rate or rate)
            kept, kept_time, number, first = None, 0.0, 0, None
            for index, frame in enumerate(container.decode(stream)):
                moment = float(frame.time) if frame.time is not None else index * step
                first = moment if first is None else first
                moment -= first
                if kept is not None:
                    while number / rate < (kept_time + moment) / 2:
                        yield kept
                        number += 1
                if (number / rate) < moment + step:
                    kept, kept_time = square(frame.to_ndarray(format="rgb24")[None], side)[0], moment
            if kept is None:
                raise UserError(f"{path}: holds no video frame")
            while number / rate < kept_time + step - 1e-6:
                yield kept
                number += 1
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be decoded as video ({error}); give an mp4, mov or mkv file") from error


def resample(num_frames: int, rate: float, target_rate: float, target_frames: int, start: float = 0.0) -> np.ndarray:
    """Indices of the source frames nearest to `target_frames` times at `target_rate` from `start` s; ends repeat."""
    times = start + np.arange(target_frames) / target_rate
    return np.clip(np.round(times * rate).astype(int), 0, num_frames - 1)


def square(frames: np.ndarray, side: int) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, side, side, 3): centre crop to a square, area-correct bilinear resize.

    torchvision's antialiased resize stays in uint8: 15 times the speed of torch's in float32, at most one level apart.
    """
    cropped = centre_crop(frames, min(frames.shape[1:3]))
    if cropped.shape[1] == side:
        return np.ascontiguousarray(cropped)
    pixels = torch.from_numpy(np.ascontiguousarray(cropped)).permute(0, 3, 1, 2)
    return np.ascontiguousarray(resize(pixels, [side, side], antialias=True).permute(0, 2, 3, 1).numpy())


def centre_crop(frames: np.ndarray, side: int) -> np.ndarray:
    """The centred side x side square of (T, H, W, ...) frames, a view; see `geometry.crop_offset`."""
    left, top = crop_offset(frames.shape[2], frames.shape[1], side)
    return frames[:, max(0, top) : max(0, top) + side, max(0, left) : max(0, left) + side]
