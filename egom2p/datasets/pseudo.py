"""`egom2p depth`: pseudo-labels for clips that have no depth, marked as such in the clip's json.

An estimator sees a clip's frames and returns inverse depth in any linear scale. RollingDepth and Video-Depth-Anything
are behind the names `rollingdepth` and `video-depth-anything`, when their repositories are importable;
`package.module:Class` names one of your own. Labels are stored as depth whose min-max normalised inverse is the
estimate, between 0.5 and 20 m: the scale is not metric, and `pseudo` in the json says so.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from egom2p.data.clips import Clip, ClipIndex, count_clips, expand_paths, signal_of, to_files
from egom2p.data.tarindex import index_tars, write_tar
from egom2p.errors import DamagedClip, UserError
from egom2p.resources import load_object
from egom2p.signals.writers import write_video

log = logging.getLogger(__name__)

NEAREST_M, FARTHEST_M = 0.5, 20.0


class DepthEstimator(Protocol):
    """name goes into the clip's json."""

    name: str

    def inverse_depth(self, frames: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 at 8 fps -> (T, H, W), near is large, linear in inverse depth up to scale and shift."""


class RollingDepth:
    """Ke et al., "Video Depth without Video Models", CVPR 2025; its repository's `fast` preset. Its output is taken as
    inverse depth."""

    name = "rollingdepth"

    def __init__(self, weights: str = "prs-eth/rollingdepth-v1-0") -> None:
        try:
            from rollingdepth import RollingDepthPipeline
        except ImportError as error:
            raise UserError("rollingdepth is not importable: clone https://github.com/prs-eth/rollingdepth "
                            "(Apache-2.0), install its requirements and "
                            "put it on PYTHONPATH; or use another --model") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = RollingDepthPipeline.from_pretrained(weights, torch_dtype=torch.float16
                                                         if device == "cuda" else torch.float32).to(device)

    def inverse_depth(self, frames: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "clip.mp4"
            write_video(path, frames, 8)
            made = self.pipe(input_video_path=path, start_frame=0, frame_count=0, processing_res=768,
                             resample_method="BILINEAR", dilations=[1, 25], cap_dilation=True,
                             snippet_lengths=[3], init_infer_steps=[1], strides=[1], coalign_kwargs=None, refine_step=0,
                             max_vae_bs=4, restore_res=True)
        return made.depth_pred.float().cpu().numpy()[:, 0]


class VideoDepthAnything:
    """Chen et al., "Video Depth Anything", CVPR 2025. weights: video_depth_anything_{vits,vitb,vitl}.pth."""

    name = "video-depth-anything"
    SIZES = {"vits": (64, [48, 96, 192, 384]), "vitb": (128, [96, 192, 384, 768]),
             "vitl": (256, [256, 512, 1024, 1024])}

    def __init__(self, weights: str = "checkpoints/video_depth_anything_vits.pth") -> None:
        try:
            from video_depth_anything.video_depth import VideoDepthAnything as Network
        except ImportError as error:
            raise UserError("video_depth_anything is not importable: clone "
                            "https://github.com/DepthAnything/Video-Depth-Anything, install its requirements and "
                            "put it on PYTHONPATH; or use another --model") from error
        if "metric" in Path(weights).name:  # that network gives metres, which would be taken for their inverse
            raise UserError(f"--model video-depth-anything:{weights}: the metric weights predict depth itself; take "
                            "video_depth_anything_{vits,vitb,vitl}.pth")
        encoder = next((e for e in self.SIZES if e in Path(weights).name), None)
        if encoder is None or not Path(weights).is_file():
            raise UserError(f"--model video-depth-anything:{weights}: name the weights file "
                            f"video_depth_anything_{{vits,vitb,vitl}}.pth")
        features, channels = self.SIZES[encoder]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = Network(encoder=encoder, features=features, out_channels=channels)
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
        self.network = self.network.to(self.device).eval()

    def inverse_depth(self, frames: np.ndarray) -> np.ndarray:
        depths, _ = self.network.infer_video_depth(frames, 8, input_size=518, device=self.device,
                                                   fp32=self.device == "cpu")
        return np.asarray(depths, np.float32)


BUILT_IN = {"rollingdepth": RollingDepth, "video-depth-anything": VideoDepthAnything}


def make_estimator(model: str) -> DepthEstimator:
    """`NAME` or `NAME:WEIGHTS` of a built-in, or `package.module:Class`."""
    name, _, rest = model.partition(":")
    if name in BUILT_IN:
        return BUILT_IN[name](rest) if rest else BUILT_IN[name]()
    try:
        made = load_object(model)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--model {model}: no such estimator ({error}); use {', '.join(BUILT_IN)} or "
                        f"package.module:Class") from error
    if not hasattr(made, "inverse_depth") or not hasattr(made, "name"):
        raise UserError(f"--model {model}: an estimator needs `name` and `inverse_depth(frames)`")
    return made


def label_depth(pattern: str, model: str) -> tuple[int, int]:
    """Add depth to every clip that has video and none, tar by tar, each rewritten aside and renamed; a tar that needs
    nothing is left alone, so a stopped run goes on where it was. Returns (clips labelled, clips that had depth)."""
    estimator, labelled, had = None, 0, 0
    paths = [p for p in expand_paths(pattern) if p.suffix == ".tar"]
    with tqdm(total=count_clips(pattern), desc="depth", unit="clip") as bar:
        for path in paths:
            entry = index_tars([path])[0]
            if entry.damage:
                raise UserError(f"{path}: {entry.damage}; mend it first, nothing of it was rewritten")
            named = list(zip(entry.keys, map(signal_of, entry.suffixes), strict=True))
            with_depth, with_rgb = ({key for key, signal in named if signal == wanted} for wanted in ("depth", "rgb"))
            had += len(with_depth)
            if with_rgb - with_depth:
                estimator = estimator or make_estimator(model)
                labelled += len(with_rgb - with_depth)
                write_tar(path, _labelled(path, estimator, bar))
            else:
                bar.update(len(set(entry.keys)))
    return labelled, had


def _labelled(path: Path, estimator: DepthEstimator, bar: tqdm) -> Iterator[dict[str, str | bytes]]:
    """The tar's samples, files that there are as they are, with depth beside a video that has none."""
    index = ClipIndex.of([path])
    for number, key in enumerate(index.keys):
        files, clip = _whole(index, number, path)
        sample = {"__key__": key, **files}
        bar.update(1)
        if "depth" not in clip.signals and "rgb" in clip.signals:
            frames = clip.signals["rgb"]
            inverse = np.asarray(estimator.inverse_depth(frames), np.float32)
            if inverse.shape != frames.shape[:3] or not np.isfinite(inverse).all():
                raise UserError(f"{path}: {estimator.name} gave {inverse.shape} for frames {frames.shape}, or numbers "
                                f"that are not finite; {path.name} is untouched")
            meta = {**clip.meta, "pseudo": {"depth": estimator.name, "scale": "relative"}}
            labelled = Clip(key, clip.dataset, {"depth": as_depth(inverse)}, meta)
            sample |= to_files(labelled, "mp4" if "rgb.mp4" in files else "npy")
        yield sample


def _whole(index: ClipIndex, number: int, path: Path) -> tuple[dict[str, bytes], Clip]:
    try:
        files = index.files(number)
        return files, index.decode(number, files)
    except DamagedClip as error:
        raise UserError(f"{error}; nothing of {path.name} was rewritten") from error


def as_depth(inverse: np.ndarray) -> np.ndarray:
    """(T, H, W) inverse depth in any scale -> float16 metres in [NEAREST_M, FARTHEST_M] with the same min-max
    normalised inverse."""
    low, high = float(inverse.min()), float(inverse.max())
    share = (inverse - low) / max(high - low, 1e-9)
    return (1 / (1 / FARTHEST_M + share * (1 / NEAREST_M - 1 / FARTHEST_M))).astype(np.float16)


