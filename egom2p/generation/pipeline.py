"""From a file to signals with units: read, resample, tokenise, generate, decode, write.

`Pipeline.from_pretrained(RUN)` holds a model and its tokenizers; `egom2p generate` is its command.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.config import to_plain
from egom2p.data.video import decode_video, resample, square, write_video
from egom2p.errors import UserError
from egom2p.evaluation.run import load_tokenizers
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.signals import PICTURES

log = logging.getLogger(__name__)

CLIP_SECONDS = 2.0


@dataclass
class Prediction:
    """One 2-second clip: start (seconds), condition and targets as raw signals, tokens and confidence by target.

    pose (T, 4, 4) first_from_camera, metres; gaze (T, 3) square-frame x, y, valid; depth (T, H, W) relative
    inverse depth in [0, 1]; rgb (T, H, W, 3) uint8.
    """

    start: float
    condition: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]


class Pipeline:
    """A model with the tokenizers of the modalities in use."""

    def __init__(self, model: EgoM2P) -> None:
        self.model = model
        self._tokenizers: dict[str, Tokenizer] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "Pipeline":
        """An export, a run or a Hub repository of EgoM2P."""
        return cls(EgoM2P.from_pretrained(source, device))

    def tokenizer(self, name: str) -> Tokenizer:
        if name not in self.model.modalities.names:
            raise UserError(f"the model has no modality '{name}'; it has {', '.join(self.model.modalities.names)}")
        if name not in self._tokenizers:
            self._tokenizers.update(load_tokenizers(self.model, [name]))
        return self._tokenizers[name]

    def __call__(self, path: str | Path, targets: list[str], modality: str = "", recipes: dict[str, TargetArgs] | None = None,
                 seed: int = 0) -> list[Prediction]:
        """Predict `targets` from one file, one Prediction for each 2-second window.

        path: a video, or a token file (.npz with arr_0, .npy) of the modality's grid. modality: what the file
        is; the model's first rgb modality when empty.
        """
        path = Path(path)
        modality = modality or self._first_picture()
        recipes = {name: (recipes or {}).get(name, TargetArgs()) for name in targets}
        windows = self._read(path, modality)
        return [self._predict(start, modality, ids, shown, recipes, seed, f"{path.name}|{start}")
                for start, ids, shown in tqdm(windows, desc=path.name, unit="window", disable=len(windows) < 2)]

    def _predict(self, start: float, modality: str, ids: np.ndarray, shown: np.ndarray | None, recipes: dict[str, TargetArgs],
                 seed: int, key: str) -> Prediction:
        codes = {n: self.tokenizer(n).codes().detach() for n, r in recipes.items() if r.expected}
        made = generate(self.model, {modality: ids[None]}, recipes, seed=seed, keys=[key], codes=codes)
        signals = {}
        for name, recipe in recipes.items():
            tokenizer = self.tokenizer(name)
            signals[name] = tokenizer.decode_from_codes(made.expected[name][0]) if recipe.expected else tokenizer.decode(made.tokens[name][0])
        condition = {} if shown is None else {modality: shown}
        return Prediction(start, condition, signals, {n: t[0] for n, t in made.tokens.items()}, {n: c[0] for n, c in made.confidence.items()})

    def _read(self, path: Path, modality: str) -> list[tuple[float, np.ndarray, np.ndarray | None]]:
        """(start, ids, raw frames or None) of each window."""
        if not path.is_file():
            raise UserError(f"no input file {path}")
        if path.suffix in (".npz", ".npy"):
            return [(0.0, self._read_tokens(path, modality), None)]
        tokenizer = self.tokenizer(modality)
        if tokenizer.modality.signal not in PICTURES:
            raise UserError(f"{path}: '{modality}' is not a picture modality; give its tokens as .npz or .npy instead")
        frames, rate = decode_video(path)
        count, side = tokenizer.args.num_frames, tokenizer.frame_size
        windows = []
        for number in range(max(1, round(len(frames) / rate / CLIP_SECONDS))):
            start = number * CLIP_SECONDS
            chosen = resample(len(frames), rate, count / CLIP_SECONDS, count, start)
            clip = square(frames[chosen], side)
            windows.append((start, tokenizer.encode_frames(clip), clip))
        return windows

    def _read_tokens(self, path: Path, modality: str) -> np.ndarray:
        from egom2p.data.tokens import decode_tokens

        if modality not in self.model.modalities.names:
            self.tokenizer(modality)
        entry = self.model.modalities.by_name(modality)
        try:
            return decode_tokens(path.read_bytes(), entry).reshape(entry.grid)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"{path}: not a token file of '{modality}' ({error})") from error

    def _first_picture(self) -> str:
        for modality in self.model.modalities:
            if modality.signal in PICTURES:
                return modality.name
        raise UserError("the model has no picture modality; say what the input is with --modality")


def generate_files(pipeline: Pipeline, inputs: list[Path], targets: list[str], out: Path, modality: str = "",
                   recipes: dict[str, TargetArgs] | None = None, seed: int = 0) -> list[Path]:
    """Predict from each input and write one folder a window: signals, tokens, preview.png and generated.json."""
    from egom2p.visualize import plots

    kinds = {m.name: m.signal for m in pipeline.model.modalities}
    folders = []
    for path in inputs:
        predictions = pipeline(path, targets, modality, recipes, seed)
        for number, made in enumerate(predictions):
            folder = out / (path.stem if len(predictions) == 1 else f"{path.stem}-{number:04d}")
            folder.mkdir(parents=True, exist_ok=True)
            for name, signal in made.signals.items():
                WRITERS[kinds[name]](folder, name, signal)
                np.savez_compressed(folder / f"{name}_tokens.npz", arr_0=made.tokens[name], confidence=made.confidence[name].astype(np.float32))
            frames = next(iter(made.condition.values()), None)
            if frames is None:
                frames = np.full((16, 48, 48, 3), 40, np.uint8)
            plots.save(plots.clip_sheet(frames, {}, made.signals, kinds, f"{path.name}, {made.start:g} s"), folder / "preview.png")
            note = {"source": str(path), "start_s": made.start, "targets": targets, "seed": seed,
                    "recipes": {n: to_plain((recipes or {}).get(n, TargetArgs())) for n in targets},
                    "mean_confidence": {n: float(c.mean()) for n, c in made.confidence.items()}}
            (folder / "generated.json").write_text(json.dumps(note, indent=1))
            folders.append(folder)
    return folders


def write_tum(path: Path, poses: np.ndarray, rate: float) -> None:
    """TUM trajectory file: `time tx ty tz qx qy qz qw` a line, seconds and metres."""
    quaternions = _quaternions(poses[:, :3, :3].astype(np.float64))
    rows = np.c_[np.arange(len(poses)) / rate, poses[:, :3, 3], quaternions]
    np.savetxt(path, rows, fmt="%.6f")


def _quaternions(rotations: np.ndarray) -> np.ndarray:
    """(T, 3, 3) -> (T, 4) x, y, z, w: the dominant eigenvector of Bar-Itzhack's matrix (stable for any angle)."""
    m = rotations
    k = np.empty((len(m), 4, 4))
    k[:, 0] = np.stack([m[:, 0, 0] - m[:, 1, 1] - m[:, 2, 2], m[:, 1, 0] + m[:, 0, 1], m[:, 2, 0] + m[:, 0, 2], m[:, 2, 1] - m[:, 1, 2]], -1)
    k[:, 1] = np.stack([k[:, 0, 1], m[:, 1, 1] - m[:, 0, 0] - m[:, 2, 2], m[:, 2, 1] + m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0]], -1)
    k[:, 2] = np.stack([k[:, 0, 2], k[:, 1, 2], m[:, 2, 2] - m[:, 0, 0] - m[:, 1, 1], m[:, 1, 0] - m[:, 0, 1]], -1)
    k[:, 3] = np.stack([k[:, 0, 3], k[:, 1, 3], k[:, 2, 3], m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]], -1)
    vectors = np.linalg.eigh(k / 3)[1][..., -1]
    return vectors * np.where(vectors[:, 3:] < 0, -1, 1)


def _write_pose(folder: Path, name: str, signal: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", signal)
    write_tum(folder / f"{name}.tum", signal, len(signal) / CLIP_SECONDS)


def _write_series(folder: Path, name: str, signal: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", signal)


def _write_depth(folder: Path, name: str, signal: np.ndarray) -> None:
    import matplotlib

    np.save(folder / f"{name}.npy", signal)
    write_video(folder / f"{name}.mp4", (matplotlib.colormaps["magma"](signal)[..., :3] * 255).astype(np.uint8), len(signal) / CLIP_SECONDS)


def _write_rgb(folder: Path, name: str, signal: np.ndarray) -> None:
    write_video(folder / f"{name}.mp4", signal, len(signal) / CLIP_SECONDS)


WRITERS: dict[str, Callable[[Path, str, Any], None]] = {
    "pose": _write_pose, "gaze": _write_series, "motion": _write_series, "depth": _write_depth, "rgb": _write_rgb}
