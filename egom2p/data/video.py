"""Video files in and out: decode, resample to a frame rate, centre crop, resize, write.

decord decodes where it is installed (x86-64); PyAV everywhere else, and always writes.
"""

import io
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

from egom2p.errors import UserError


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


def resample(num_frames: int, rate: float, target_rate: float, target_frames: int, start: float = 0.0) -> np.ndarray:
    """Indices of the source frames nearest to `target_frames` times at `target_rate` from `start` s; ends repeat."""
    times = start + np.arange(target_frames) / target_rate
    return np.clip(np.round(times * rate).astype(int), 0, num_frames - 1)


def square(frames: np.ndarray, side: int) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, side, side, 3): centre crop to a square, area-correct bilinear resize."""
    height, width = frames.shape[1:3]
    crop = min(height, width)
    top, left = (height - crop) // 2, (width - crop) // 2
    frames = frames[:, top : top + crop, left : left + crop]
    if crop == side:
        return np.ascontiguousarray(frames)
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def write_video(path: Path, frames: np.ndarray, rate: float) -> None:
    """(T, H, W, 3) uint8 with even sides -> an H.264 mp4 at `rate` Hz."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "15"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
