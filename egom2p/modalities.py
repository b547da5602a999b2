"""What a modality is. Token count, position table, embedding, head and masks all derive from it."""

import math
from dataclasses import dataclass

import numpy as np

from egom2p.errors import UserError
from egom2p.signals import KINDS, SignalKind


@dataclass(frozen=True)
class Modality:
    """One stream of discrete tokens.

    vocab_size: number of token ids, 0 .. vocab_size - 1.
    grid: 1 to 3 axes, slowest first; (5, 32, 32) is time x height x width, (30,) is time.
    signal: kind of the raw signal behind the tokens: rgb, depth, pose, gaze or motion (any T x C array).
    source: name of that signal in a clip (`KEY.<source>.npy`); the modality's own name when empty.
    tokenizer: folder or Hub name of the tokenizer export; empty when only tokens are at hand.
    target: False keeps the modality out of the loss: it is only ever an input.
    positions: position table, `axes` (of the grid's axes) or `reviv` (of ReViV's hands and body).
    """

    name: str
    vocab_size: int
    grid: tuple[int, ...]
    signal: str = "motion"
    source: str = ""
    tokenizer: str = ""
    target: bool = True
    positions: str = "axes"

    def __post_init__(self) -> None:
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise ValueError(f"modality '{self.name}': grid must be 1 to 3 positive numbers, not {list(self.grid)}")
        if self.vocab_size < 1:
            raise ValueError(f"modality '{self.name}': vocab_size must be positive, not {self.vocab_size}")
        if self.positions not in ("axes", "reviv"):
            raise ValueError(f"modality '{self.name}': positions must be axes or reviv, not '{self.positions}'")
        if self.signal not in KINDS:
            raise ValueError(f"modality '{self.name}': signal must be one of {', '.join(KINDS)}, not '{self.signal}'")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def kind(self) -> SignalKind:
        """What its raw signal is, and everything that depends on it."""
        return KINDS[self.signal]

    @property
    def clip_signal(self) -> str:
        return self.source or self.name

    @property
    def token_dtype(self) -> np.dtype:
        """Storage type of its tokens; the largest value (uint16) or -1 (int32) marks 'no observation'."""
        return np.dtype(np.uint16 if self.vocab_size < 65536 else np.int32)


def stored_ids(array: np.ndarray) -> np.ndarray:
    """Token ids as shards hold them -> int64, -1 where not observed (65535 in uint16, see `Modality.token_dtype`)."""
    ids = array.astype(np.int64)
    return np.where(ids == 65535, -1, ids) if array.dtype == np.uint16 else ids


@dataclass(frozen=True)
class ModalityArgs:
    """A YAML entry `NAME: {vocab_size, grid, ...}`; fields as in `Modality`."""

    vocab_size: int
    grid: tuple[int, ...]
    signal: str = "motion"
    source: str = ""
    tokenizer: str = ""
    target: bool = True
    positions: str = "axes"


class ModalitySet(tuple[Modality, ...]):
    """Modalities in a fixed order; a modality's index is its place in that order."""

    @classmethod
    def from_config(cls, entries: dict[str, ModalityArgs]) -> "ModalitySet":
        try:
            return cls(Modality(name=name, **vars(entry)) for name, entry in entries.items())
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def names(self) -> list[str]:
        return [m.name for m in self]

    def index_of(self, name: str) -> int:
        return self.names.index(name)

    def by_name(self, name: str) -> Modality:
        return self[self.index_of(name)]
