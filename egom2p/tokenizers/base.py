"""The tokenizer protocol: raw signal <-> grid of ids, with normalisation constants inside the export.

Every tokenizer has
  modality                          its `Modality`
  encode(signal) -> ids             one raw clip signal -> int64 array of the modality's grid
  decode(ids) -> signal             the other way
  encode_normalized(x) -> ids       a batch in the network's units
  decode_normalized(ids) -> x
  codes() -> (vocab, L)             the code vector the decoder receives for each id
  decode_codes(codes) -> x          batches of code vectors (B, n, L), for instance means over predicted probabilities
  decode_from_codes(codes) -> signal   of one clip, (n, L)
  args.num_frames                   frames of a clip; of pictures also frame_size, the side that its grid is for
  observed(signal) -> bool grid     positions that carry a measurement
  training_loss(x) -> loss, figures
  statistics                        {name: array} gathered over the training clips (mean signal and the like)
"""

import hashlib
import json
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from egom2p.config import build, to_plain
from egom2p.errors import UserError
from egom2p.export import Exportable, resolve_folder
from egom2p.modalities import Modality, ModalityArgs
from egom2p.signals import KINDS
from egom2p.signals.kind import NetworkUnits

STATISTICS = "statistics.safetensors"


class Tokenizer(Exportable):
    """Base of every tokenizer; a subclass sets `kind`, `signal`, `modality` and the four batch methods."""

    kind: str
    modality: Modality
    signal: NetworkUnits
    only_for_training: tuple[str, ...] = ()  # arguments that the tokens do not depend on
    later_arguments: ClassVar[dict[str, Any]] = {}  # newer than exports there are: with these values, as if not there
    encode_batch = 16  # clips at once, when many are encoded
    margin = 0.0  # of pictures smaller than the grid, in the network's units
    trusted = True  # whether programs (TorchScript) that came with it may be run; see `tokenizers.load_for`

    def __init__(self, modality: Modality, args: Any) -> None:
        super().__init__()
        self.modality, self.args = modality, args
        self.statistics: dict[str, np.ndarray] = {}

    def encode(self, signal: np.ndarray) -> np.ndarray:
        """One raw signal -> int64 ids of shape `modality.grid`."""
        return self.encode_many([signal])[0]

    def encode_many(self, signals: list[np.ndarray]) -> np.ndarray:
        """Raw signals -> int64 ids (B, *grid). Raises UserError for one that the tokenizer is not for."""
        for signal in signals:
            self.check(signal)
        return self.encode_units(self.stack([self.signal.normalize(signal) for signal in signals]))

    def stack(self, units: list[np.ndarray], whole_grid: bool = False) -> Tensor:
        """Clips in the network's units -> one batch. Pictures whose sides differ (46 and 48 pixels are of one grid) get
        the margins here that `encode_normalized` would give each by itself; with whole_grid all of them do, so that
        batches go together."""
        if len({x.shape for x in units}) > 1 or (whole_grid and self.modality.kind.is_picture):
            sides = [cells * size for cells, size in zip(self.modality.grid[1:], self.args.patch[1:], strict=True)]
            units = [_with_margins(x, sides, self.margin) for x in units]
        return torch.from_numpy(np.stack(units))

    def encode_observed(self, signals: list[np.ndarray]) -> np.ndarray:
        """Raw signals -> int64 ids (B, *grid), -1 where nothing was observed."""
        return np.where(np.stack([self.observed(signal) for signal in signals]), self.encode_many(signals), -1)

    def encode_units(self, x: Tensor) -> np.ndarray:
        """A batch in the network's units, on any device -> int64 ids (B, *grid)."""
        with self._as_trained():
            return self.encode_normalized(x.to(self.device, non_blocking=True)).cpu().numpy()

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 frames of a video file, H x W those of the grid -> ids, of a picture modality; a depth
        video's grey levels are its relative inverse depth."""
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        ids = self.encode_units(video)[0]
        if ids.shape != tuple(self.modality.grid):
            raise UserError(f"'{self.modality.name}': {frames.shape[2]} x {frames.shape[1]} pixels make {ids.shape} "
                            f"tokens, its grid is {list(self.modality.grid)}; films are shown as squares")
        return ids

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """In the type of its weights, and in its whole precision, also inside a training in bfloat16 or TF32, where ids
        would differ from those on disk."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # convolutions are asked for by themselves
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids of shape `modality.grid` (or flat) -> one raw signal."""
        self._check_ids(ids)
        batch = torch.as_tensor(np.asarray(ids, np.int64)).reshape(1, *self.modality.grid).to(self.device)
        with self._as_trained():
            return self.signal.denormalize(self.decode_normalized(batch)[0].float().cpu().numpy())

    def decode_from_codes(self, codes: Tensor) -> np.ndarray:
        """(n, L) code vectors, for instance expected ones -> one raw signal."""
        with self._as_trained():
            return self.signal.denormalize(self.decode_codes(codes[None].float())[0].float().cpu().numpy())

    def observed(self, signal: np.ndarray) -> np.ndarray:
        """Bool array of shape `modality.grid`: positions that carry a measurement."""
        return np.full(self.modality.grid, bool(np.all(self.signal.is_observed(signal))))

    def check(self, signal: np.ndarray, key: str = "") -> None:
        """Raises UserError, in words a user can act on, unless a raw signal (of clip `key`) is one that this tokenizer
        is for."""
        try:
            self.modality.kind.check(signal)
            self.check_size(signal)
        except ValueError as error:
            where = f"clip {key}: " if key else ""
            raise UserError(f"{where}'{self.modality.clip_signal}' {error}") from error

    def check_size(self, signal: np.ndarray) -> None:
        """Raises ValueError unless a signal of the right kind has the size that the grid is for."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.state_dict(keep_vars=True).values())).device

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss (DistributedDataParallel wraps `forward`)."""
        return self.training_loss(x)

    def after_step(self, seed: int, step: int, skipped: bool = False) -> None:
        """Called once an optimiser step; codebooks with running statistics move here, unless the step was left out."""

    def fingerprint(self) -> str:
        """Hash of the configuration and the weights: equal fingerprints make equal tokens."""
        config = self.to_config()
        config["args"] = {k: v for k, v in config["args"].items() if k not in self.only_for_training
                          and not (k in self.later_arguments and self.later_arguments[k] == v)}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def made(self, fingerprint: str) -> bool:
        """Whether tokens whose note says `fingerprint` are this one's."""
        return fingerprint == self.fingerprint()

    def to_config(self) -> dict[str, Any]:
        plain = to_plain(self.modality)
        return {"kind": self.kind, "modality": plain, "args": to_plain(self.args)}

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> "Tokenizer":
        if config.get("kind") != cls.kind or not {"modality", "args"} <= config.keys():
            raise UserError(f"{source}: not an export of a {cls.kind} tokenizer")
        entry = dict(config["modality"])
        name = entry.pop("name", "")
        args = build(typing.get_type_hints(cls.__init__)["args"], config["args"], "args", source)
        return cls(Modality(name, **vars(build(ModalityArgs, entry, "modality", source))), args)

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        super().save_pretrained(folder, weights)
        if self.statistics:
            save_file({k: np.ascontiguousarray(v) for k, v in self.statistics.items()}, Path(folder) / STATISTICS)
        else:  # of what was exported there before
            (Path(folder) / STATISTICS).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "Tokenizer":
        """A folder written by `save_pretrained`, a run or a Hub repository, in eval mode. `egom2p.tokenizers.load`
        finds out by itself which class an export is of."""
        folder = resolve_folder(source)
        tokenizer = super().from_pretrained(folder, device)
        if (folder / STATISTICS).is_file():
            tokenizer.statistics = load_file(folder / STATISTICS)
        return tokenizer

    def _check_ids(self, ids: np.ndarray) -> None:
        ids = np.asarray(ids)
        if ids.size != self.modality.num_tokens:
            raise UserError(f"{self.modality.name}: {ids.size} ids given, its grid {list(self.modality.grid)} needs "
                            f"{self.modality.num_tokens}")
        if ids.min() < 0 or ids.max() >= self.modality.vocab_size:
            raise UserError(f"{self.modality.name}: ids must lie in 0 .. {self.modality.vocab_size - 1}, "
                            f"found {ids.min()} .. {ids.max()}")


def _with_margins(picture: np.ndarray, sides: list[int], value: float) -> np.ndarray:
    """(3, T, h, w) -> (3, T, *sides), centred."""
    missing = [side - have for side, have in zip(sides, picture.shape[-2:], strict=True)]
    around = [(0, 0), (0, 0), *((n // 2, n - n // 2) for n in missing)]
    return np.pad(picture, around, constant_values=value)


def check_picture(signal: np.ndarray, modality: Modality, num_frames: int, patch: tuple[int, ...]) -> None:
    """ValueError unless a video has the frames and sides that a grid of such patches is for."""
    if len(signal) != num_frames:
        raise ValueError(f"has {len(signal)} frames, but tokenizer '{modality.name}' is for {num_frames}")
    height, width = signal.shape[1:3]
    sides = tuple(cells * size for cells, size in zip(modality.grid[1:], patch[1:], strict=True))
    if any(not side - size < have <= side for have, side, size in zip((height, width), sides, patch[1:], strict=True)):
        raise ValueError(f"is {width} x {height} pixels, but tokenizer '{modality.name}' is for {sides[1]} x "
                         f"{sides[0]}; prepare the clips with --size {sides[0]}, or use a tokenizer of their "
                         "size")


def picture_units(modality: Modality) -> NetworkUnits:
    """The network's units of a picture modality. ValueError for any other."""
    if not modality.kind.is_picture:
        served = [k.name for k in KINDS.values() if k.is_picture]
        raise ValueError(f"a video tokenizer serves {', '.join(served)}, not '{modality.signal}'")
    return modality.kind.network()


def series_units(modality: Modality, mean: tuple[float, ...], std: tuple[float, ...]) -> NetworkUnits:
    """The network's units of a series modality. ValueError for any other."""
    if modality.kind.is_picture:
        served = [k.name for k in KINDS.values() if not k.is_picture]
        raise ValueError(f"a motion tokenizer serves {', '.join(served)}, not '{modality.signal}'")
    return modality.kind.network(mean, std)
