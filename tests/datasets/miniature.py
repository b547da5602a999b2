"""A short recording of the procedural world at any size and rate: the truth that each raw layout is written from."""

from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from egom2p import geometry
from egom2p.datasets.world import _make_scene, render

SECONDS = 6.0


class Miniature:
    """Frames of width x height with a 90 degree horizontal field of view, `rate` a second, for SECONDS."""

    def __init__(self, seed: int, width: int, height: int, rate: float, seconds: float = SECONDS) -> None:
        self.seed, self.width, self.height, self.rate, self.seconds = seed, width, height, rate, seconds
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

    @property
    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """rgb (T, H, W, 3) uint8 and depth (T, H, W) metres at `times`; not to be written to."""
        return _frames(self.seed, self.width, self.height, self.rate, self.seconds)

    def gaze_pixels(self, times: np.ndarray) -> np.ndarray:
        """The first ball's centre in pixels, NaN behind the camera."""
        points = self.in_camera(times)
        pixels = geometry.project(np.c_[points[:, :2], np.maximum(points[:, 2:], 1e-6)], self.intrinsics)
        return np.where(points[:, 2:] > 0.05, pixels, np.nan)

    def in_camera(self, times: np.ndarray) -> np.ndarray:
        return (geometry.invert(self.poses(times)) @ np.append(self.scene.balls[0], 1))[:, :3]

    def write_depth_video(self, path: Path, scale: float, rate: int, pix_fmt: str = "gray16le",
                          kept: slice = slice(None)) -> None:
        """FFV1, 16-bit grey, metres / scale; of the frames `kept`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=rate)
            stream.height, stream.width, stream.pix_fmt = self.height, self.width, pix_fmt
            for frame in self.frames[1][kept]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.round(frame / scale).astype(np.uint16),
                                                                       format="gray16le")))
            container.mux(stream.encode())


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@lru_cache(maxsize=2)
def _frames(*what: float) -> tuple[np.ndarray, np.ndarray]:
    """Of `Miniature(*what)`: several tests in turn write the same recording, each in another layout."""
    mini = Miniature(*what)
    top, parts = (mini.width - mini.height) // 2, []
    for start in range(0, len(mini.times), 16):
        rgb, depth = render(mini.scene, mini.poses(mini.times[start : start + 16]), mini.width)
        parts.append([x[:, top : top + mini.height] for x in (rgb, depth.astype(np.float32))])
    frames = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    for array in frames:
        array.flags.writeable = False
    return frames
