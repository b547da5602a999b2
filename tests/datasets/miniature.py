"""A short recording of the procedural world at any size and rate: the truth that each raw layout is written from."""

from functools import cached_property
from pathlib import Path

import av
import numpy as np

from egom2p import geometry
from egom2p.datasets.world import _make_scene, render

SECONDS = 6.0


class Miniature:
    """Frames of width x height with a 90 degree horizontal field of view, `rate` a second, for SECONDS."""

    def __init__(self, seed: int, width: int, height: int, rate: float, seconds: float = SECONDS) -> None:
        self.width, self.height, self.rate, self.seconds = width, height, rate, seconds
        number = 0
        while True:
            self.scene, self.walk = _make_scene(np.random.default_rng([seed, number]))
            if len(self.scene.balls) and self.walk.speed > 0.5:
                break
            number += 1
        self.times = np.arange(round(seconds * rate)) / rate

    def poses(self, times: np.ndarray) -> np.ndarray:
        """world_from_camera at any time; the world's two-second walk, slowed down."""
        return self.walk.poses(np.asarray(times) * 2.0 / self.seconds)

    @property
    def intrinsics(self) -> np.ndarray:
        return np.array([[self.width / 2, 0, self.width / 2], [0, self.width / 2, self.height / 2], [0, 0, 1.0]])

    @cached_property
    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """rgb (T, H, W, 3) uint8 and depth (T, H, W) metres at `times`."""
        return self.at(self.times)

    def at(self, times: np.ndarray, width: int = 0, height: int = 0) -> tuple[np.ndarray, np.ndarray]:
        width, height = width or self.width, height or self.height
        top, parts = (width - height) // 2, []
        for start in range(0, len(times), 16):
            rgb, depth = render(self.scene, self.poses(times[start : start + 16]), width)
            parts.append((rgb[:, top : top + height], depth[:, top : top + height].astype(np.float32)))
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

    def gaze_pixels(self, times: np.ndarray) -> np.ndarray:
        """The first ball's centre in pixels, NaN behind the camera."""
        points = self.in_camera(times)
        pixels = geometry.project(np.c_[points[:, :2], np.maximum(points[:, 2:], 1e-6)], self.intrinsics)
        return np.where(points[:, 2:] > 0.05, pixels, np.nan)

    def in_camera(self, times: np.ndarray) -> np.ndarray:
        return (geometry.invert(self.poses(times)) @ np.append(self.scene.balls[0], 1))[:, :3]

    def write_depth_video(self, path: Path, scale: float, rate: int, pix_fmt: str = "gray16le") -> None:
        """FFV1, 16-bit grey, metres / scale."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=rate)
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, pix_fmt
            for frame in self.frames[1]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.round(frame / scale).astype(np.uint16),
                                                                       format="gray16le")))
            container.mux(stream.encode())


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
