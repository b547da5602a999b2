"""MaskedSamples laid end to end without padding.

Tokens are in the order of samples, then modalities, then positions. Lengths stay on the host as numpy
arrays; the flat arrays are torch tensors that move to the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatTokens:
    """modality, position and token id of N tokens, three int arrays of shape (N,)."""

    modality: np.ndarray
    position: np.ndarray
    token: np.ndarray

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class MaskedSample:
    """What the model sees of one sample (`inputs`) and what it must predict (`targets`), sorted by modality.

    number: its global sample number; group: its loss group within the global batch.
    """

    number: int
    inputs: FlatTokens
    targets: FlatTokens
    group: int = 0


@dataclass(frozen=True)
class PackedTokens:
    """N tokens of a whole pack.

    position, token (N,) int64; modality (N,) int64; lengths (B, M) int64 on the host: tokens of each sample
    and modality. by_modality (N,) int64 is the permutation that sorts the tokens by modality (stable), and
    to_pack its inverse.
    """

    modality: Tensor
    position: Tensor
    token: Tensor
    lengths: np.ndarray
    by_modality: Tensor
    to_pack: Tensor

    def __len__(self) -> int:
        return len(self.token)

    @property
    def modality_counts(self) -> list[int]:
        return self.lengths.sum(0).tolist()


@dataclass(frozen=True)
class PackedBatch:
    """The samples of one micro-batch. numbers (B,) and groups (B,) int64 on the host."""

    inputs: PackedTokens
    targets: PackedTokens
    numbers: np.ndarray
    groups: np.ndarray

    def to(self, device: torch.device | str) -> "PackedBatch":
        return with_tensors(self, lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """In page-locked memory, so that copies to the device overlap with computation."""
        return with_tensors(self, Tensor.pin_memory)

    @property
    def num_samples(self) -> int:
        return len(self.numbers)


def with_tensors(part: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """A micro-batch (a dataclass, those in it included) with `function` of each tensor in the tensor's place, or of
    what else is of `kind`."""
    new = {}
    for name, value in vars(part).items():
        if isinstance(value, kind):
            new[name] = function(value)
        elif is_dataclass(value):
            new[name] = with_tensors(value, function, kind)
    return replace(part, **new)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a tensor on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pack(samples: Sequence[MaskedSample], num_modalities: int) -> PackedBatch:
    """Lay samples end to end."""
    return PackedBatch(
        inputs=_pack_tokens([s.inputs for s in samples], num_modalities),
        targets=_pack_tokens([s.targets for s in samples], num_modalities),
        numbers=np.array([s.number for s in samples], np.int64),
        groups=np.array([s.group for s in samples], np.int64),
    )


def _pack_tokens(parts: list[FlatTokens], num_modalities: int) -> PackedTokens:
    modality = _join([p.modality for p in parts])
    sample = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    lengths = np.bincount(sample * num_modalities + modality, minlength=len(parts) * num_modalities)
    by_modality = np.argsort(modality, kind="stable")
    to_pack = np.empty_like(by_modality)
    to_pack[by_modality] = np.arange(len(by_modality))
    flat = [modality, _join([p.position for p in parts]), _join([p.token for p in parts]), by_modality, to_pack]
    modality_t, position_t, token_t, by_t, to_t = (torch.from_numpy(a) for a in flat)
    return PackedTokens(modality_t, position_t, token_t, lengths.reshape(len(parts), num_modalities), by_t, to_t)


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64)
