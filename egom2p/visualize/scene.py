"""What there is to see of a clip or a recording, true and predicted: the common ground of the rerun recording and the
page."""

from dataclasses import dataclass, field
from functools import cached_property

import matplotlib
import numpy as np

from egom2p import geometry
from egom2p.signals import KINDS

ASSUMED_FOCAL = 0.9  # of the side: some 58 degrees of view, where nothing says what the camera's is
POINTS_A_FRAME = 2500


@dataclass
class Take:
    """One clip or recording.

    kinds {modality: kind of signal}; rates {modality: Hz}; truth, predicted {modality: raw signal}, of pictures and
    series alike; metres {"true" | "predicted": (T, H, W)} depth that can be placed in space, 0 = no reading; errors
    {modality: (T,)} over time and units {modality: of that error}; intrinsics (3, 3) as shares of the side, or None;
    notes: what a viewer must know.
    """

    key: str
    kinds: dict[str, str]
    rates: dict[str, float]
    truth: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    metres: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    intrinsics: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Length of the longest signal."""
        return max(len(s) / self.rates[n] for n, s in [*self.truth.items(), *self.predicted.items()])

    def of_kind(self, kind: str) -> str:
        """The first modality of a kind, "" when there is none."""
        return next((n for n, k in self.kinds.items() if k == kind and (n in self.truth or n in self.predicted)), "")

    def sides(self, name: str) -> dict[str, np.ndarray]:
        """{"true", "predicted": signal} of a modality, as far as there are such."""
        return {side: signals[name] for side, signals in (("true", self.truth), ("predicted", self.predicted))
                if name in signals}

    @cached_property
    def paths(self) -> dict[str, np.ndarray]:
        """{"true", "predicted": (T, 4, 4)} camera poses in the frame of the first camera."""
        name = self.of_kind("pose")
        return {side: geometry.relative_to_first(poses.astype(np.float64))
                for side, poses in (self.sides(name) if name else {}).items()}

    def camera(self) -> np.ndarray:
        """(3, 3) intrinsics as shares of the side, assumed where they are not known."""
        assumed = np.array([[ASSUMED_FOCAL, 0, 0.5], [0, ASSUMED_FOCAL, 0.5], [0, 0, 1]])
        return assumed if self.intrinsics is None else self.intrinsics

    def points(self, side: str, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """((n, 3) places in the first camera's frame, (n, 3) uint8 colours) of one depth picture, thinned out.
        Predicted depth is seen from the true camera where there is one: its own error, not the path's."""
        depth = self.metres[side][frame]
        rows, columns = np.nonzero(depth > 0)
        if len(rows) > POINTS_A_FRAME:
            kept = np.linspace(0, len(rows) - 1, POINTS_A_FRAME).astype(int)
            rows, columns = rows[kept], columns[kept]
        height, width = depth.shape
        shares = np.stack([(columns + 0.5) / width, (rows + 0.5) / height, np.ones(len(rows))])
        rays = np.linalg.inv(self.camera()) @ shares
        local = (rays * depth[rows, columns]).T
        paths = self.paths
        poses = paths.get("true", paths.get("predicted"))
        moment = frame / self.rates[self.of_kind("depth")]
        pose = np.eye(4) if poses is None else poses[min(len(poses) - 1,
                                                         round(moment * self.rates[self.of_kind("pose")]))]
        return local @ pose[:3, :3].T + pose[:3, 3], self._colours(frame, rows / height, columns / width)

    def _colours(self, frame: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        name = self.of_kind("rgb")
        video = self.truth.get(name, self.predicted.get(name)) if name else None
        if video is None or not len(video):
            return np.full((len(rows), 3), 150, np.uint8)
        picture = video[min(frame, len(video) - 1)]
        return picture[(rows * picture.shape[0]).astype(int), (columns * picture.shape[1]).astype(int)]


def as_images(kind: str, video: np.ndarray, predicted: bool) -> np.ndarray:
    """(T, H, W, 3) uint8 of a picture signal."""
    if KINDS[kind].shown is None:
        return video
    pictures = KINDS[kind].shown(video, predicted)
    if pictures.ndim == 4:
        return pictures if pictures.dtype == np.uint8 else (pictures * 255).astype(np.uint8)
    return (matplotlib.colormaps[KINDS[kind].colours or "gray"](pictures)[..., :3] * 255).astype(np.uint8)
