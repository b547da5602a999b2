"""From a recording to signals with units: read, resample, tokenise, generate, decode, join, write.

`Pipeline.from_pretrained(RUN)` holds a model and its tokenizers; `egom2p generate` is its command. A recording of any
length is cut into overlapping windows of the model's clip length (2 s), predicted one after another, and joined.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.config import to_plain
from egom2p.data.video import VideoWriter, probe_video, stream_frames
from egom2p.errors import UserError
from egom2p.evaluation.run import load_tokenizers
from egom2p.generation.join import JOINERS, Joiner, PoseJoiner
from egom2p.generation.sampler import generate_samples
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.signals import PICTURES

log = logging.getLogger(__name__)

CLIP_SECONDS = 2.0
UNITS = {"pose": "first_from_camera, metres, OpenCV axes", "gaze": "x, y in units of the square frame's side, valid", "motion": "as trained",
         "depth": "relative inverse depth, in the first window's scale", "rgb": "uint8"}


@dataclass
class Window:
    """One clip of the recording: start (seconds), the condition it was predicted from and the predicted signals, each in
    its own frame and scale; tokens, confidence and, with several samples, the spread (standard deviation) by target.
    """

    start: float
    condition: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    spread: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Prediction:
    """A whole recording. signals {target: (T, ...)} joined over windows, at `rates` Hz and in `units`:

    pose (T, 4, 4) in the first camera's frame, metres; gaze (T, 3) square-frame x, y, valid; depth (T, H, W) relative
    inverse depth; rgb (T, H, W, 3) uint8. spread: standard deviation over samples, when there are several (metres for
    poses). drift {pose target: [(metres, degrees)]}: residual of each join.
    """

    signals: dict[str, np.ndarray]
    rates: dict[str, float]
    units: dict[str, str]
    windows: list[Window]
    spread: dict[str, np.ndarray]
    drift: dict[str, list[tuple[float, float]]]


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

    def kind(self, name: str) -> str:
        return self.model.modalities.by_name(name).signal

    def __call__(self, path: str | Path, targets: list[str], modality: str = "", recipes: dict[str, TargetArgs] | None = None,
                 seed: int = 0, samples: int = 1, overlap: float = 0.5) -> Prediction:
        """Predict `targets` from one recording, held in memory as a whole (`generate_files` streams instead).

        path: a video, or a token file (.npz with arr_0, .npy) of the modality's grid. modality: what the file is; the
        model's first picture modality when empty. samples: draws a window; more than one give a spread. overlap: seconds
        that neighbouring windows share.
        """
        joined = _Joined(self, targets)
        windows, parts = [], []
        for window in self.windows(path, targets, modality, recipes, seed, samples, overlap):
            windows.append(window)
            parts.append(joined.add(window))
        parts.append(joined.end())
        signals = {n: np.concatenate([p[n] for p in parts if n in p]) for n in parts[-1]}
        spread = {n.removesuffix(SPREAD): signals.pop(n) for n in list(signals) if n.endswith(SPREAD)}
        return Prediction(signals, joined.rates, {n: UNITS[self.kind(n)] for n in targets}, windows, spread, joined.drift())

    def windows(self, path: str | Path, targets: list[str], modality: str = "", recipes: dict[str, TargetArgs] | None = None,
                seed: int = 0, samples: int = 1, overlap: float = 0.5) -> Iterator[Window]:
        """The predicted windows of a recording, one after another; only one is held at a time."""
        path, modality = Path(path), modality or self._first_picture()
        recipes = {name: (recipes or {}).get(name, TargetArgs()) for name in targets}
        for name in targets:
            self.tokenizer(name)
        for start, ids, shown in self._read(path, modality, targets, overlap):
            yield self._predict(start, modality, ids, shown, recipes, seed, samples, f"{path.name}|{start}")

    def _predict(self, start: float, modality: str, ids: np.ndarray, shown: np.ndarray | None, recipes: dict[str, TargetArgs],
                 seed: int, samples: int, key: str) -> Window:
        codes = {n: self.tokenizer(n).codes().detach() for n, r in recipes.items() if r.expected}
        draws = generate_samples(self.model, {modality: ids[None]}, recipes, samples, seed, [key], codes=codes)
        signals, spread = {}, {}
        for name, recipe in recipes.items():
            tokenizer = self.tokenizer(name)
            made = [tokenizer.decode_from_codes(d.expected[name][0]) if recipe.expected else tokenizer.decode(d.tokens[name][0]) for d in draws]
            signals[name] = made[0]
            if samples > 1:
                spread[name] = SPREADS.get(tokenizer.modality.signal, _spread)(np.stack(made).astype(np.float64))
        condition = {} if shown is None else {modality: shown}
        first = draws[0]
        return Window(start, condition, signals, {n: t[0] for n, t in first.tokens.items()}, {n: c[0] for n, c in first.confidence.items()}, spread)

    def _read(self, path: Path, modality: str, targets: list[str], overlap: float) -> Iterator[tuple[float, np.ndarray, np.ndarray | None]]:
        """(start, ids, raw frames or None) of each window."""
        if not path.is_file():
            raise UserError(f"no input file {path}")
        if path.suffix in (".npz", ".npy"):
            yield 0.0, self._read_tokens(path, modality), None
            return
        tokenizer = self.tokenizer(modality)
        if tokenizer.modality.signal not in PICTURES:
            raise UserError(f"{path}: '{modality}' is not a picture modality; give its tokens as .npz or .npy instead")
        count = tokenizer.args.num_frames
        hop, unit = self._hop(count, targets, overlap)
        for first, clip in cut(stream_frames(path, count / CLIP_SECONDS, tokenizer.frame_size), count, hop, unit):
            yield first * CLIP_SECONDS / count, tokenizer.encode_frames(clip), clip

    def _hop(self, count: int, targets: list[str], overlap: float) -> tuple[int, int]:
        """(video frames from one window's start to the next, unit): windows of `count` frames share at least `overlap` seconds
        and start at multiples of `unit`, so that they start on a frame of every target too."""
        unit = min(count, lcm(*(count // gcd(count, self.num_frames(name)) for name in targets)))
        shared = unit * -(-round(overlap * count / CLIP_SECONDS) // unit)
        return count - max(0, min(count - unit, shared)), unit

    def num_frames(self, name: str) -> int:
        """Frames of a decoded window of this modality."""
        return self.tokenizer(name).args.num_frames

    def rate(self, name: str) -> float:
        return self.num_frames(name) / CLIP_SECONDS

    def num_windows(self, path: Path, modality: str, targets: list[str], overlap: float) -> int:
        """An estimate, from the container's own account of its length; 0 when it gives none."""
        if path.suffix in (".npz", ".npy") or not path.is_file():
            return 1
        count = self.tokenizer(modality or self._first_picture()).args.num_frames
        hop = self._hop(count, targets, overlap)[0] * CLIP_SECONDS / count
        return max(1, 1 + int(np.ceil((probe_video(path) - CLIP_SECONDS) / hop)))

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


def cut(frames: Iterator[np.ndarray], length: int, hop: int, unit: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first frame, (length, H, W, 3)) of overlapping windows that together cover all frames.

    Windows start every `hop` frames; the last one starts at the latest multiple of `unit` that leaves it full or
    nearly so, the missing frames repeating the last. A recording shorter than a window gives one.
    """
    buffer: list[np.ndarray] = []
    first, told = 0, -1  # frame number of buffer[0]; last frame covered by a window
    for frame in frames:
        buffer.append(frame)
        if len(buffer) == length + hop:
            yield first, np.stack(buffer[:length])
            told = first + length - 1
            first, buffer = first + hop, buffer[hop:]
    if not buffer:
        return
    end = first + len(buffer)
    while end - first > length:
        yield first, np.stack(buffer[:length])
        told = first + length - 1
        step = min(hop, unit * -(-(end - first - length) // unit))
        first, buffer = first + step, buffer[step:]
    if end - 1 > told:
        yield first, np.stack([*buffer, *[buffer[-1]] * (length - len(buffer))])


SPREAD = "_spread"


def _spread(draws: np.ndarray) -> np.ndarray:
    """(S, T, ...) -> (T, ...) standard deviation over draws."""
    return draws.std(0).astype(np.float32)


def _pose_spread(draws: np.ndarray) -> np.ndarray:
    """(S, T, 4, 4) -> (T, 1) root mean square distance of the camera centres from their mean, metres."""
    centres = draws[:, :, :3, 3]
    return np.sqrt(((centres - centres.mean(0)) ** 2).sum(-1).mean(0))[:, None].astype(np.float32)


SPREADS = {"pose": _pose_spread}


class _Joined:
    """Joiners of all targets and their spreads."""

    def __init__(self, pipeline: Pipeline, targets: list[str]) -> None:
        self.rates = {n: pipeline.rate(n) for n in targets}
        self.joiners: dict[str, Joiner] = {n: JOINERS[pipeline.kind(n)]() for n in targets}
        self.types: dict[str, np.dtype] = {}

    def add(self, window: Window) -> dict[str, np.ndarray]:
        """Rows that are final now, by target (and target_spread)."""
        done = {}
        for name, signal in {**window.signals, **{n + SPREAD: s for n, s in window.spread.items()}}.items():
            joiner = self.joiners.setdefault(name, Joiner())
            self.types[name] = signal.dtype
            done[name] = joiner.add(round(window.start * self.rates[name.removesuffix(SPREAD)]), signal).astype(signal.dtype)
        return done

    def end(self) -> dict[str, np.ndarray]:
        return {name: joiner.end().astype(self.types[name]) for name, joiner in self.joiners.items()}

    def drift(self) -> dict[str, list[tuple[float, float]]]:
        return {n: j.drift for n, j in self.joiners.items() if isinstance(j, PoseJoiner)}


def generate_files(pipeline: Pipeline, inputs: list[Path], targets: list[str], out: Path, modality: str = "",
                   recipes: dict[str, TargetArgs] | None = None, seed: int = 0, samples: int = 1, overlap: float = 0.5) -> list[Path]:
    """Predict from each recording and write one folder each, window by window in constant memory: signals, tokens,
    preview.png (the first window) and generated.json."""
    return [_generate_file(pipeline, path, targets, out / path.stem, modality, recipes, seed, samples, overlap) for path in inputs]


def _generate_file(pipeline: Pipeline, path: Path, targets: list[str], folder: Path, modality: str, recipes: dict[str, TargetArgs] | None,
                   seed: int, samples: int, overlap: float) -> Path:
    from egom2p.visualize import plots

    joined, kinds = _Joined(pipeline, targets), {m.name: m.signal for m in pipeline.model.modalities}
    writers: dict[str, list[Any]] = {}
    count, confidence, starts = 0, dict.fromkeys(targets, 0.0), []
    expected = pipeline.num_windows(path, modality, targets, overlap)
    for window in tqdm(pipeline.windows(path, targets, modality, recipes, seed, samples, overlap), total=expected, desc=path.name, unit="window", disable=expected < 2):
        if not count:
            folder.mkdir(parents=True, exist_ok=True)
            frames = next(iter(window.condition.values()), np.full((16, 48, 48, 3), 40, np.uint8))
            plots.save(plots.clip_sheet(frames, {}, window.signals, kinds, f"{path.name}, {window.start:g} s"), folder / "preview.png")
            tokens = {n: NpyWriter(folder / f"{n}_tokens.npy") for n in targets}
        _append(writers, joined.add(window), folder, kinds, joined.rates)
        for name in targets:
            tokens[name].append(window.tokens[name][None])
            confidence[name] += float(window.confidence[name].mean())
        starts.append(window.start)
        count += 1
    _append(writers, joined.end(), folder, kinds, joined.rates)
    for writer in [*tokens.values(), *(w for group in writers.values() for w in group)]:
        writer.close()
    note = {"source": str(path), "windows": count, "starts_s": starts if count <= 1000 else starts[:: count // 1000 + 1], "overlap_s": overlap, "targets": targets,
            "seed": seed, "samples": samples, "rates_hz": joined.rates, "units": {n: UNITS[kinds[n]] for n in targets},
            "recipes": {n: to_plain((recipes or {}).get(n, TargetArgs())) for n in targets},
            "mean_confidence": {n: c / count for n, c in confidence.items()}, "drift": {n: _drift(j) for n, j in joined.drift().items()}}
    (folder / "generated.json").write_text(json.dumps(note, indent=1))
    return folder


def _drift(joins: list[tuple[float, float]]) -> dict[str, float]:
    """Residuals at the joins, and what they add up to if they are independent."""
    if not joins:
        return {"joins": 0}
    metres, degrees = np.array(joins).T
    return {"joins": len(joins), "mean_m": float(metres.mean()), "worst_m": float(metres.max()), "accumulated_m": float(np.sqrt((metres**2).sum())),
            "mean_deg": float(degrees.mean()), "worst_deg": float(degrees.max()), "accumulated_deg": float(np.sqrt((degrees**2).sum()))}


def _append(writers: dict[str, list[Any]], rows: dict[str, np.ndarray], folder: Path, kinds: dict[str, str], rates: dict[str, float]) -> None:
    for name, part in rows.items():
        if not len(part):
            continue
        if name not in writers:
            base = name.removesuffix(SPREAD)
            made = WRITERS[kinds[base]] if name == base else [lambda folder, name, rate: NpyWriter(folder / f"{name}.npy")]
            writers[name] = [make(folder, name, rates[base]) for make in made]
        for writer in writers[name]:
            writer.append(part)


class NpyWriter:
    """A .npy file that grows; its header is put right when it is closed."""

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
        fields = f"{{'descr': '{np.lib.format.dtype_to_descr(self.dtype)}', 'fortran_order': False, 'shape': {shape}, }}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little") + fields.ljust(self.HEADER - 11).encode() + b"\n")
        self.file.close()
        Path(self.file.name).replace(self.path)


class TumWriter:
    """TUM trajectory file: `time tx ty tz qx qy qz qw` a line, seconds and metres."""

    def __init__(self, path: Path, rate: float) -> None:
        self.file, self.rate, self.rows = path.open("w"), rate, 0

    def append(self, poses: np.ndarray) -> None:
        times = (self.rows + np.arange(len(poses))) / self.rate
        np.savetxt(self.file, np.c_[times, poses[:, :3, 3], _quaternions(poses[:, :3, :3].astype(np.float64))], fmt="%.6f")
        self.rows += len(poses)

    def close(self) -> None:
        self.file.close()


class DepthVideoWriter(VideoWriter):
    """Relative inverse depth in magma colours, near is bright."""

    def append(self, part: np.ndarray) -> None:
        import matplotlib

        super().append((matplotlib.colormaps["magma"](np.clip(part, 0, 1))[..., :3] * 255).astype(np.uint8))


def write_tum(path: Path, poses: np.ndarray, rate: float) -> None:
    """A (T, 4, 4) trajectory at `rate` Hz as a TUM file."""
    writer = TumWriter(path, rate)
    writer.append(poses)
    writer.close()


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


WRITERS: dict[str, list[Callable[[Path, str, float], Any]]] = {
    "pose": [lambda folder, name, rate: NpyWriter(folder / f"{name}.npy"), lambda folder, name, rate: TumWriter(folder / f"{name}.tum", rate)],
    "gaze": [lambda folder, name, rate: NpyWriter(folder / f"{name}.npy")],
    "motion": [lambda folder, name, rate: NpyWriter(folder / f"{name}.npy")],
    "depth": [lambda folder, name, rate: NpyWriter(folder / f"{name}.npy"), lambda folder, name, rate: DepthVideoWriter(folder / f"{name}.mp4", rate)],
    "rgb": [lambda folder, name, rate: VideoWriter(folder / f"{name}.mp4", rate)],
}
