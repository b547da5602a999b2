"""Attention over segments laid end to end: no padding and no dense mask.

Shapes: T tokens of the whole pack, H heads, D channels a head. Segment s of the queries sees segment s of
the keys and nothing else. Lengths are known on the host, so nothing here waits for the device.
"""

import logging
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature

import numpy as np
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from egom2p.data.batch import on_device

log = logging.getLogger(__name__)

LENGTH_STEP = 256  # kernels are told the longest segment in these steps
FLASH_FOR = {"FA3": 9, "FA4": 10}  # FlashAttention's newer kernels, by the GPUs' major compute capability
FUSED_WIDTH = (8, 256)  # torch's flash kernels take heads of so many channels a multiple, and so many at most


@dataclass(frozen=True)
class Segments:
    """Lengths (S,) int64 on the host of the query and key segments, in pack order."""

    query_lengths: np.ndarray
    key_lengths: np.ndarray
    device: torch.device

    @cached_property
    def cu_queries(self) -> Tensor:
        """(S + 1,) int32 offsets on the device."""
        return _offsets(self.query_lengths, self.device)

    @cached_property
    def cu_keys(self) -> Tensor:
        return _offsets(self.key_lengths, self.device)

    @cached_property
    def max_lengths(self) -> tuple[int, int]:
        """Upper bounds of the longest segments, of which there are few different ones."""
        longest = int(self.query_lengths.max(initial=0)), int(self.key_lengths.max(initial=0))
        return -(-longest[0] // LENGTH_STEP) * LENGTH_STEP, -(-longest[1] // LENGTH_STEP) * LENGTH_STEP

    @cached_property
    def any_pair(self) -> bool:
        """Whether some query meets some key."""
        return bool(np.any((self.query_lengths > 0) & (self.key_lengths > 0)))

    @cached_property
    def keyless(self) -> Tensor | None:
        """(Tq,) bool on the device: queries whose segment has no keys; None when there is none."""
        without = (self.key_lengths == 0) & (self.query_lengths > 0)
        return on_device(np.repeat(without, self.query_lengths), self.device) if without.any() else None

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """(segments, query length, key length) of each distinct pair of lengths, in the order of `sorted_*`."""
        pairs, counts = np.unique(self._pairs, axis=0, return_counts=True)
        return [(int(n), int(q), int(k)) for (q, k), n in zip(pairs, counts, strict=True)]

    @cached_property
    def sorted_queries(self) -> tuple[Tensor, Tensor] | None:
        """Permutation of query tokens that brings segments of equal lengths together, and its inverse."""
        return self._permutation(self.query_lengths)

    @cached_property
    def sorted_keys(self) -> tuple[Tensor, Tensor] | None:
        return self._permutation(self.key_lengths)

    @property
    def _pairs(self) -> np.ndarray:
        return np.stack([self.query_lengths, self.key_lengths], 1)

    def _permutation(self, lengths: np.ndarray) -> tuple[Tensor, Tensor] | None:
        order = np.lexsort((self.key_lengths, self.query_lengths))
        if np.array_equal(order, np.arange(len(order))):
            return None
        starts = np.cumsum(lengths) - lengths
        sorted_lengths = lengths[order]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(sorted_lengths) - sorted_lengths, sorted_lengths)
        forward = np.repeat(starts[order], sorted_lengths) + within
        inverse = np.empty_like(forward)
        inverse[forward] = np.arange(len(forward))
        return on_device(forward, self.device), on_device(inverse, self.device)


def segment_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments) -> Tensor:
    """Softmax attention inside each segment, scaled by D ** -0.5. (Tq, H, D) -> (Tq, H, D).

    A query whose segment has no keys gets zeros. Fused variable-length attention on CUDA in half precision, for heads
    that its kernels take; elsewhere one scaled_dot_product_attention for each distinct pair of lengths. When no query
    meets a key in the whole pack, the (empty or zero) result still depends on q, k and v, so that every parameter has a
    gradient on every rank.
    """
    if not segments.any_pair:
        return q_THD * 0 + (k_THD.sum() + v_THD.sum()) * 0
    multiple, widest = FUSED_WIDTH
    if (q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16) and not q_THD.shape[-1] % multiple
            and q_THD.shape[-1] <= widest):
        return _fused(q_THD, k_THD, v_THD, segments)
    return _grouped(q_THD, k_THD, v_THD, segments)


def _fused(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    max_q, max_k = segments.max_lengths
    # Slices of one projection: the kernel takes any strides as long as channels lie side by side.
    out = varlen_attn(q_THD, k_THD, v_THD, segments.cu_queries, segments.cu_keys, max_q, max_k,
                      **_flash_only(max(max_q, max_k)))
    if segments.keyless is not None:
        out = torch.where(segments.keyless[:, None, None], torch.zeros_like(out), out)
    return out


@cache
def _takes_window() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in signature(varlen_attn).parameters


def _flash_only(longest: int) -> dict[str, tuple[int, int]]:
    """A window that hides nothing, which keeps torch's varlen_attn with FlashAttention.

    Since torch 2.14 varlen_attn hands packs to cuDNN on Hopper and later, unless a window is asked for (read in its
    source, `_can_use_cudnn`: `window_size != [-1, -1]`). cuDNN keeps a plan for every (tokens, segments, longest
    lengths), so that each of our packs would be a new one, and its backward pass ignores deterministic mode.
    """
    return {"window_size": (longest, longest)} if _takes_window() else {}


def newest_flash_attention(capability: int) -> str:
    """Let torch use FlashAttention 4 or 3 where its package is installed (torch 2.11 and later can be told) and the
    GPU, of this major compute capability, is the one it is for. Returns which, "" when it stays with its own; says so
    in the log. (torch's own registration looks at the package alone, and its kernels then refuse other GPUs in the
    first step: `torch/nn/attention/_fa3.py`, `_fa4.py`.)"""
    for name in getattr(torch.nn.attention, "list_flash_attention_impls", list)():
        if FLASH_FOR.get(name) != capability:
            continue
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, AttributeError) as error:
            log.info("%s is not used: %s", name, " ".join(str(error).split())[:120])
        else:
            log.info("attention by %s", name)
            return name
    return ""


def _grouped(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments) -> Tensor:
    queries, keys = segments.sorted_queries, segments.sorted_keys
    if queries is not None:
        q_THD = _Permute.apply(q_THD, *queries)
    if keys is not None:
        k_THD, v_THD = _Permute.apply(k_THD, *keys), _Permute.apply(v_THD, *keys)
    sizes_q = [n * q for n, q, _ in segments.groups]
    sizes_k = [n * k for n, _, k in segments.groups]
    parts = [_dense(q, k, v, *group) for q, k, v, group in zip(
        q_THD.split(sizes_q), k_THD.split(sizes_k), v_THD.split(sizes_k), segments.groups, strict=True)]
    out_THD = torch.cat(parts) if parts else q_THD
    return out_THD if queries is None else _Permute.apply(out_THD, queries[1], queries[0])


def _dense(q: Tensor, k: Tensor, v: Tensor, num: int, len_q: int, len_k: int) -> Tensor:
    """Attention of `num` segments of equal lengths: (num * len_q, H, D) -> the same."""
    if not len_q or not len_k:
        # Keep the graph whole: these queries depend on nothing but are differentiable all the same.
        return q * 0
    q, k, v = (x.unflatten(0, (num, length)).transpose(1, 2) for x, length in ((q, len_q), (k, len_k), (v, len_k)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class _Permute(torch.autograd.Function):
    """Row permutation whose backward is the inverse permutation (a gather, not a scatter-add)."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, forward)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.contiguous().index_select(0, ctx.saved_tensors[0]), None, None


permute_rows = _Permute.apply


def _offsets(lengths: np.ndarray, device: torch.device) -> Tensor:
    return on_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
