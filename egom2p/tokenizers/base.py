"""The tokenizer protocol: raw signal <-> grid of ids, with normalisation constants inside the export.

Every tokenizer has
  modality                          its `Modality`
  encode(signal) -> ids             one raw clip signal -> int64 array of the modality's grid
  decode(ids) -> signal             the other way
  encode_normalized(x) -> ids       a batch in the network's units
  decode_normalized(ids) -> x
  codes() -> (vocab, L)             the code vector the decoder receives for each id
  decode_from_codes(codes) -> signal   (n, L) vectors, for instance means over predicted probabilities
  observed(signal) -> bool grid     positions that carry a measurement
  training_loss(x) -> loss, figures
  statistics                        {name: array} gathered over the training clips (mean signal and the like)
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from egom2p.config import build, read_json, to_plain
from egom2p.errors import UserError
from egom2p.modalities import Modality, ModalityArgs
from egom2p.model.export import CONFIG, Exportable, resolve_folder

STATISTICS = "statistics.safetensors"


class Tokenizer(Exportable):
    """Base of every tokenizer; a subclass sets `kind`, `signal`, `modality` and the four batch methods."""

    kind: str
    modality: Modality

    def __init__(self, modality: Modality, args: Any) -> None:
        super().__init__()
        self.modality, self.args = modality, args
        self.statistics: dict[str, np.ndarray] = {}

    def encode(self, signal: np.ndarray) -> np.ndarray:
        """One raw signal -> int64 ids of shape `modality.grid`."""
        return self.encode_many([signal])[0]

    def encode_many(self, signals: list[np.ndarray]) -> np.ndarray:
        """Raw signals of equal shape -> int64 ids (B, *grid)."""
        x = torch.from_numpy(np.stack([self.signal.normalize(signal) for signal in signals])).to(self.device)
        with torch.no_grad():
            return self.encode_normalized(x).cpu().numpy()

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids of shape `modality.grid` (or flat) -> one raw signal."""
        self._check_ids(ids)
        batch = torch.as_tensor(np.asarray(ids, np.int64)).reshape(1, *self.modality.grid).to(self.device)
        with torch.no_grad():
            return self.signal.denormalize(self.decode_normalized(batch)[0].float().cpu().numpy())

    def decode_from_codes(self, codes: Tensor) -> np.ndarray:
        """(n, L) code vectors, for instance expected ones -> one raw signal."""
        with torch.no_grad():
            return self.signal.denormalize(self.decode_codes(codes[None].float())[0].float().cpu().numpy())

    def observed(self, signal: np.ndarray) -> np.ndarray:
        """Bool array of shape `modality.grid`: positions that carry a measurement."""
        return np.full(self.modality.grid, bool(np.all(self.signal.is_observed(signal))))

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
        digest = hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to_config(self) -> dict[str, Any]:
        plain = to_plain(self.modality)
        return {"kind": self.kind, "modality": plain, "args": to_plain(self.args)}

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> "Tokenizer":
        import typing

        kinds = {c.kind: c for c in all_kinds()}
        if config.get("kind") not in kinds or not {"modality", "args"} <= config.keys():
            raise UserError(f"{source}: not a tokenizer export (its 'kind' must be one of {', '.join(kinds)})")
        chosen = kinds[config["kind"]]
        entry = dict(config["modality"])
        name = entry.pop("name", "")
        args = build(typing.get_type_hints(chosen.__init__)["args"], config["args"], "args", source)
        return chosen(Modality(name, **vars(build(ModalityArgs, entry, "modality", source))), args)

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        super().save_pretrained(folder, weights)
        if self.statistics:
            save_file({k: np.ascontiguousarray(v) for k, v in self.statistics.items()}, Path(folder) / STATISTICS)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> "Tokenizer":
        folder = resolve_folder(source)
        chosen = {c.kind: c for c in all_kinds()}.get(read_json(folder / CONFIG).get("kind"), cls)
        if "from_pretrained" in vars(chosen) and chosen is not cls:
            return chosen.from_pretrained(folder, device)
        tokenizer = super(Tokenizer, chosen).from_pretrained(folder, device)
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


def all_kinds() -> list[type[Tokenizer]]:
    """Every tokenizer class. Adding one means adding it here."""
    from egom2p.tokenizers.cosmos import CosmosTokenizer
    from egom2p.tokenizers.motion import MotionTokenizer
    from egom2p.tokenizers.video import VideoTokenizer

    return [MotionTokenizer, VideoTokenizer, CosmosTokenizer]
