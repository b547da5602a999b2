"""How the arrays of clips become files in a tar, and files arrays again.

npy: every array as .npy. mp4: frames (T, H, W, 3) uint8 as H.264 at 4:4:4, CRF 17 (lossy, some 41 dB; the eye sees
no difference), and pictures (T, H, W) float16 as FFV1, lossless: the 16-bit grey levels of the .mkv are the bits of the
float16 numbers. The rest stays .npy.
"""

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import av
import numpy as np

from egom2p.data.tarindex import npy_bytes
from egom2p.data.video import decode_video

Store = Literal["npy", "mp4"]

# What reading and parsing the bytes of a damaged file may raise.
DAMAGE = (ValueError, OSError, KeyError, EOFError, MemoryError, OverflowError, SyntaxError, TypeError,
          zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # numpy splits a header into tokens of Python

# fastdecode leaves out what costs most to undo (arithmetic coding, deblocking): read twice as fast, 10 % larger.
H264 = {"crf": "17", "tune": "fastdecode"}


def to_file(array: np.ndarray, store: Store, rate: float) -> tuple[str, bytes]:
    """(extension, bytes) of one signal of a clip; rate in Hz."""
    if store == "mp4" and array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8:
        return "mp4", _film(array, "rgb24", "libx264", "yuv444p", "mp4", H264, rate)
    if store == "mp4" and array.ndim == 3 and array.dtype == np.float16:
        return "mkv", _film(array.view(np.uint16), "gray16le", "ffv1", "gray16le", "matroska", {"level": "3"}, rate)
    return "npy", npy_bytes(array)


def from_file(extension: str, data: bytes) -> np.ndarray:
    """The array of a file's bytes. Raises one of DAMAGE, or UserError, when they are damaged; MemoryError
    only where memory is short."""
    return DECODERS[extension](data)


def _array(data: bytes) -> np.ndarray:
    """Of the bytes of a .npy file, whose header may claim anything."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    if version in ((1, 0), (2, 0)):
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(buffer)
        if math.prod(shape) * dtype.itemsize > len(data):
            raise ValueError(f"its header claims {shape} {dtype}, the file is of {len(data)} bytes")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _float16_pictures(data: bytes) -> np.ndarray:
    try:
        with av.open(io.BytesIO(data)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            frames = [f.to_ndarray(format="gray16le") for p in packets for f in p.decode()]
            frames += [f.to_ndarray(format="gray16le") for f in container.streams.video[0].decode(None)]
        if len(frames) < len(packets) or not frames:
            raise ValueError(f"{len(packets) - len(frames)} of {len(packets)} pictures cannot be decoded")
        return np.stack(frames).view(np.float16)
    except av.FFmpegError as error:
        raise ValueError(str(error)) from error


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "npy": _array,
    "mp4": lambda data: decode_video(data)[0],
    "mkv": _float16_pictures,
}


def _film(frames: np.ndarray, source: str, codec: str, pixels: str, container: str, options: dict[str, str],
          rate: float) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as film:
        stream = film.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options, stream.codec_context.thread_count = pixels, options, 1
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=source)))
        film.mux(stream.encode())
    return buffer.getvalue()
