"""From a recording to signals with units: read, resample, tokenise, generate, decode.

`Pipeline.from_pretrained(RUN)` holds a model and its tokenizers. A recording of any length is cut into overlapping
windows of the model's clip length (2 s), predicted one after another, and joined (`recordings`).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import gcd, lcm
from pathlib import Path

import numpy as np

from egom2p import tokenizers
from egom2p.data.storage import DAMAGE
from egom2p.data.tokens import decode_tokens
from egom2p.data.video import FrameStream, probe_video
from egom2p.errors import UserError
from egom2p.generation.sampler import generate_samples
from egom2p.generation.schedule import Recipes, TargetArgs, recipes_of
from egom2p.model.egom2p import EgoM2P
from egom2p.signals import SignalKind
from egom2p.signals.kind import Joiner
from egom2p.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

CLIP_SECONDS = 2.0
SPREAD = "_spread"
GREY = 8.0  # levels by which the channels of a grey film differ at most, on average


@dataclass
class Window:
    """One clip of the recording: start (seconds), how much of it the recording fills (less than a whole clip only in
    the last window, whose missing frames repeat its last one), the condition it was predicted from and the predicted
    signals, each in its own frame and scale; tokens, confidence and, with several samples, the spread (standard
    deviation) by target.
    """

    start: float
    seconds: float
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


@dataclass
class Encoded:
    """What the model makes of a recording: starts (W,) seconds of its windows, tokens (W, *grid) ids, features
    (W, n, dim) of the encoder's last layer, n the tokens of a window, in the grid's order."""

    modality: str
    starts: np.ndarray
    tokens: np.ndarray
    features: np.ndarray


class Pipeline:
    """A model with the tokenizers of the modalities in use."""

    def __init__(self, model: EgoM2P, trust_torchscript: bool = False) -> None:
        self.model, self.trust_torchscript = model, trust_torchscript
        self._tokenizers: dict[str, Tokenizer] = {}
        self._fingerprints: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu", trust_torchscript: bool = False) -> "Pipeline":
        """An export, a run or a Hub repository of EgoM2P. trust_torchscript: run TorchScript networks that it brings
        along."""
        return cls(EgoM2P.from_pretrained(source, device), trust_torchscript)

    def tokenizer(self, name: str) -> Tokenizer:
        if name not in self.model.modalities.names:
            raise UserError(f"the model has no modality '{name}'; it has {', '.join(self.model.modalities.names)}")
        if name not in self._tokenizers:
            model = self.model
            self._tokenizers |= tokenizers.load_for(model.modalities, [name], model.device, model.folder,
                                                    self.trust_torchscript, model.origins)
        return self._tokenizers[name]

    def fingerprint(self, name: str) -> str:
        """Of a modality's tokenizer: taken once, it reads all of its weights."""
        if name not in self._fingerprints:
            self._fingerprints[name] = self.tokenizer(name).fingerprint()
        return self._fingerprints[name]

    def recipes(self, given: dict[str, TargetArgs] | None = None) -> Recipes:
        """How each target is asked for: as `given` says, else as the model's export does, else by the defaults."""
        return recipes_of(self.model.generation, given)

    def kind(self, name: str) -> SignalKind:
        return self.model.modalities.by_name(name).kind

    def __call__(self, path: str | Path, targets: list[str], modality: str = "",
                 recipes: dict[str, TargetArgs] | None = None,
                 seed: int = 0, samples: int = 1, overlap: float = 0.5) -> Prediction:
        """Predict `targets` from one recording, held in memory as a whole (`generate_files` streams instead).

        path: a video, or a token file (.npz with arr_0, .npy) of the modality's grid. modality: what the file is; the
        model's first picture modality when empty. samples: draws a window; more than one give a spread. overlap:
        seconds that neighbouring windows share.
        """
        joined = Joined(self, targets)
        windows, parts = [], []
        for window in self.windows(path, targets, modality, recipes, seed, samples, overlap):
            windows.append(window)
            parts.append(joined.add(window))
        parts.append(joined.end())
        signals = {n: np.concatenate([p[n] for p in parts if n in p]) for n in parts[-1]}
        spread = {n.removesuffix(SPREAD): signals.pop(n) for n in list(signals) if n.endswith(SPREAD)}
        return Prediction(signals, joined.rates, {n: self.kind(n).unit for n in targets}, windows, spread,
                          joined.drift())

    def encode(self, path: str | Path, modality: str = "", overlap: float = 0.0) -> Encoded:
        """Tokens and encoder features of one recording, window by window; for other work on top of the model.

        path, modality, overlap: as in a call.
        """
        modality = modality or self.first_picture()
        starts, ids = [], []
        for start, _, tokens, _ in self._read(Path(path), modality, [modality], overlap):
            starts.append(start)
            ids.append(tokens)
        features = [self.model.encode({modality: window[None]})[modality][0].float().cpu().numpy() for window in ids]
        return Encoded(modality, np.array(starts), np.stack(ids), np.stack(features))

    def windows(self, path: str | Path, targets: list[str], modality: str = "",
                recipes: dict[str, TargetArgs] | None = None,
                seed: int = 0, samples: int = 1, overlap: float = 0.5) -> Iterator[Window]:
        """The predicted windows of a recording, one after another; only one is held at a time."""
        path, modality = Path(path), modality or self.first_picture()
        recipes = {name: self.recipes(recipes)[name] for name in targets}
        for name in targets:
            self.tokenizer(name)
        if modality in targets:
            log.warning("'%s' is what is shown: it comes back as its tokenizer makes it, not predicted", modality)
        for start, seconds, ids, shown in self._read(path, modality, targets, overlap):
            key = f"{path.name}|{start}"
            yield self._predict(start, seconds, modality, ids, shown, recipes, seed, samples, key)

    def _predict(self, start: float, seconds: float, modality: str, ids: np.ndarray, shown: np.ndarray | None,
                 recipes: dict[str, TargetArgs],
                 seed: int, samples: int, key: str) -> Window:
        codes = {n: self.tokenizer(n).codes().detach() for n, r in recipes.items() if r.expected}
        draws = generate_samples(self.model, {modality: ids[None]}, recipes, samples, seed, [key], codes=codes)
        signals, spread = {}, {}
        for name in recipes:
            made = [d.signals(name, self.tokenizer(name))[0] for d in draws]
            signals[name] = made[0]
            if samples > 1:  # of what was drawn: a mean over codes is the same in every draw
                drawn = [self.tokenizer(name).decode(d.tokens[name][0]) for d in draws] if name in codes else made
                spread[name] = self.kind(name).spread(np.stack(drawn).astype(np.float64))
        condition = {} if shown is None else {modality: shown}
        first = draws[0]
        return Window(start, seconds, condition, signals, {n: t[0] for n, t in first.tokens.items()},
                      {n: c[0] for n, c in first.confidence.items()}, spread)

    def _read(self, path: Path, modality: str, targets: list[str],
              overlap: float) -> Iterator[tuple[float, float, np.ndarray, np.ndarray | None]]:
        """(start, seconds that are filled, ids, raw frames or None) of each window."""
        if not path.is_file():
            raise UserError(f"no input file {path}")
        if path.suffix in (".npz", ".npy"):
            yield 0.0, CLIP_SECONDS, self._read_tokens(path, modality), None
            return
        tokenizer = self.tokenizer(modality)
        if not tokenizer.modality.kind.is_picture:
            raise UserError(f"{path}: '{modality}' is not a picture modality; give its tokens as .npz or .npy instead")
        count = tokenizer.args.num_frames
        hop, unit = self._hop(count, targets, overlap)
        if hop == count and len(targets) > (modality in targets):
            log.warning("windows of %d frames share none here (--overlap, or frame counts that do not fit): each "
                        "begins where the one before ended", count)
        stream = FrameStream(path, count / CLIP_SECONDS, tokenizer.frame_size)
        for first, clip in cut(iter(stream), count, hop, unit):
            if not first and tokenizer.modality.kind.colours and _is_coloured(clip):
                log.warning("%s: is in colours; a film of '%s' is of grey levels, near is white (the %s.mp4 of `egom2p "
                            "generate` is for looking at, its .npy holds the numbers)", path, modality, modality)
            start = first * CLIP_SECONDS / count
            # Until the stream has ended, and `seconds` is known, every window is full.
            filled = min(CLIP_SECONDS, stream.seconds - start) if stream.seconds else CLIP_SECONDS
            yield start, filled, tokenizer.encode_frames(clip), clip

    def _hop(self, count: int, targets: list[str], overlap: float) -> tuple[int, int]:
        """(video frames from one window's start to the next, unit): windows of `count` frames share at least `overlap`
        seconds and start at multiples of `unit`, so that they start on a frame of every target too."""
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
        count = self.tokenizer(modality or self.first_picture()).args.num_frames
        hop = self._hop(count, targets, overlap)[0] * CLIP_SECONDS / count
        return max(1, 1 + int(np.ceil((probe_video(path) - CLIP_SECONDS) / hop)))

    def _read_tokens(self, path: Path, modality: str) -> np.ndarray:
        if modality not in self.model.modalities.names:
            self.tokenizer(modality)
        entry = self.model.modalities.by_name(modality)
        try:
            return decode_tokens(path.read_bytes(), entry).reshape(entry.grid)
        except DAMAGE as error:
            raise UserError(f"{path}: not a token file of '{modality}' ({error})") from error

    def first_picture(self) -> str:
        for modality in self.model.modalities:
            if modality.kind.is_picture:
                return modality.name
        raise UserError("the model has no picture modality; say what the input is with --modality")


def _is_coloured(clip: np.ndarray) -> bool:
    """(T, H, W, 3): channels that differ by more than compression makes of grey."""
    return float(np.abs(np.diff(clip.astype(np.int16), axis=-1)).mean()) > GREY


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


class Joined:
    """The windows of a recording laid together, by target (and target_spread)."""

    def __init__(self, pipeline: Pipeline, targets: list[str]) -> None:
        self.rates = {n: pipeline.rate(n) for n in targets}
        self.joiners: dict[str, Joiner] = {n: pipeline.kind(n).joiner() for n in targets}
        self.types: dict[str, np.dtype] = {}
        self.seconds = 0.0
        self.rows: dict[str, int] = {}

    def add(self, window: Window) -> dict[str, np.ndarray]:
        """Rows that are final now."""
        done = {}
        for name, signal in {**window.signals, **{n + SPREAD: s for n, s in window.spread.items()}}.items():
            joiner = self.joiners.setdefault(name, Joiner())
            self.types[name] = signal.dtype
            if name.endswith(SPREAD):  # in the scale that its signal was just joined with
                signal = signal * np.float32(self.joiners[name.removesuffix(SPREAD)].shift)
            start = round(window.start * self.rates[name.removesuffix(SPREAD)])
            done[name] = joiner.add(start, signal).astype(signal.dtype)
            self.rows[name] = self.rows.get(name, 0) + len(done[name])
        self.seconds = window.start + window.seconds
        return done

    def end(self) -> dict[str, np.ndarray]:
        """The remaining rows, as far as the recording goes."""
        rest = {name: joiner.end().astype(self.types[name]) for name, joiner in self.joiners.items()}
        ends = {name: max(1, round(self.seconds * self.rates[name.removesuffix(SPREAD)])) for name in rest}
        return {name: rows[: ends[name] - self.rows[name]] for name, rows in rest.items()}

    def drift(self) -> dict[str, list[tuple[float, float]]]:
        return {n: j.drift for n, j in self.joiners.items() if j.drift is not None}
