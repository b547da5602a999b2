"""Files that grow row by row: npy, TUM and COLMAP trajectories, mp4."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from egom2p.geometry import quaternions


class NpyWriter:
    """A .npy file that grows; its header is put right when it is closed, and only then does it have its name."""

    HEADER = 128

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.rows = path, path.with_name(f".{path.name}.part").open("wb"), 0
        self.file.write(bytes(self.HEADER))

    def append(self, part: np.ndarray) -> None:
        self.shape, self.dtype = part.shape[1:], part.dtype
        self.file.write(np.ascontiguousarray(part).tobytes())
        self.rows += len(part)

    def close(self) -> None:
        shape = "(" + ", ".join(map(str, (self.rows, *self.shape))) + ",)"
        descr = np.lib.format.dtype_to_descr(self.dtype)
        fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little"))
        self.file.write(fields.ljust(self.HEADER - 11).encode() + b"\n")
        self.file.close()
        Path(self.file.name).replace(self.path)


class TumWriter:
    """TUM trajectory file: `time tx ty tz qx qy qz qw` a line, seconds and metres."""

    def __init__(self, path: Path, rate: float) -> None:
        self.file, self.rate, self.rows = path.open("w"), rate, 0

    def append(self, poses: np.ndarray) -> None:
        times = (self.rows + np.arange(len(poses))) / self.rate
        xyzw = quaternions(poses[:, :3, :3].astype(np.float64))
        np.savetxt(self.file, np.c_[times, poses[:, :3, 3], xyzw], fmt="%.6f")
        self.rows += len(poses)

    def close(self) -> None:
        self.file.close()


class ColmapWriter:
    """A COLMAP text model (cameras.txt, images.txt, an empty points3D.txt) in a folder of its own.

    A pose is what COLMAP calls an image: `id qw qx qy qz tx ty tz camera name`, camera_from_world, metres, and an empty
    line of points after it (colmap.github.io/format.html; pycolmap 4.2 reads it). Images are called as
    `ffmpeg -r RATE ... frame_%06d.png` counts them, from 1. Predictions know no intrinsics: the camera has COLMAP's own
    first guess, a focal length of 1.2 sides, and says so.
    """

    def __init__(self, folder: Path, rate: float) -> None:
        folder.mkdir()
        (folder / "cameras.txt").write_text("# CAMERA_ID, MODEL, WIDTH, HEIGHT, f, cx, cy; a guess: the poses come "
                                            "without intrinsics\n1 SIMPLE_PINHOLE 256 256 307.2 128 128\n")
        (folder / "points3D.txt").write_text("# no points\n")
        self.file, self.rows = (folder / "images.txt").open("w"), 0
        self.file.write(f"# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; {rate:g} images a second\n")

    def append(self, poses: np.ndarray) -> None:
        turns = poses[:, :3, :3].astype(np.float64).transpose(0, 2, 1)  # camera_from_world
        shifts = -np.einsum("nij,nj->ni", turns, poses[:, :3, 3].astype(np.float64))
        for (x, y, z, w), shift in zip(quaternions(turns), shifts, strict=True):
            self.rows += 1
            numbers = " ".join(f"{value:.9g}" for value in (w, x, y, z, *shift))
            self.file.write(f"{self.rows} {numbers} 1 frame_{self.rows:06d}.png\n\n")

    def close(self) -> None:
        self.file.close()


class VideoWriter:
    """An H.264 mp4 at `rate` Hz that grows by (n, H, W, 3) uint8 frames with even sides."""

    def __init__(self, path: Path, rate: float) -> None:
        self.container = av.open(str(path), "w")
        self.stream = self.container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        self.stream.pix_fmt = "yuv420p"
        self.stream.options = {"crf": "15"}
        self.started = False

    def append(self, frames: np.ndarray) -> None:
        if not self.started:
            self.stream.height, self.stream.width = frames.shape[1:3]
            self.started = True
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


class DepthVideoWriter(VideoWriter):
    """Relative inverse depth in magma colours, near is bright."""

    def append(self, part: np.ndarray) -> None:
        import matplotlib

        super().append((matplotlib.colormaps["magma"](np.clip(part, 0, 1))[..., :3] * 255).astype(np.uint8))


def npy_file(folder: Path, name: str, rate: float) -> NpyWriter:
    return NpyWriter(folder / f"{name}.npy")


def tum_file(folder: Path, name: str, rate: float) -> TumWriter:
    return TumWriter(folder / f"{name}.tum", rate)


def colmap_folder(folder: Path, name: str, rate: float) -> ColmapWriter:
    return ColmapWriter(folder / f"{name}_colmap", rate)


def video_file(folder: Path, name: str, rate: float) -> VideoWriter:
    return VideoWriter(folder / f"{name}.mp4", rate)


def depth_video_file(folder: Path, name: str, rate: float) -> DepthVideoWriter:
    return DepthVideoWriter(folder / f"{name}.mp4", rate)


def write_tum(path: Path, poses: np.ndarray, rate: float) -> None:
    """A (T, 4, 4) trajectory at `rate` Hz as a TUM file."""
    writer = TumWriter(path, rate)
    writer.append(poses)
    writer.close()


def write_video(path: Path, frames: np.ndarray, rate: float) -> None:
    """(T, H, W, 3) uint8 with even sides -> an H.264 mp4 at `rate` Hz."""
    writer = VideoWriter(path, rate)
    writer.append(frames)
    writer.close()
