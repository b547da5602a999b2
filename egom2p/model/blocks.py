"""Pre-norm transformer blocks over packed tokens (T, dim)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p.model.attention import Segments, segment_attention

NORM_EPS = 1e-6


@dataclass(frozen=True)
class BlockStyle:
    """What the released variants differ in. biases: in linears and norms; gated: SwiGLU instead of GELU."""

    biases: bool
    gated: bool
    qk_norm: bool


STYLES = {"gelu": BlockStyle(True, False, False), "swiglu": BlockStyle(False, True, False),
          "swiglu_qknorm": BlockStyle(False, True, True)}


def layer_norm(dim: int, style: BlockStyle) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=NORM_EPS, bias=style.biases)


def as_multiplied(x: Tensor) -> Tensor:
    """In the type that the next layer multiplies in. Under autocast a norm returns float32, which that layer would cast
    all the same; but when both are compiled and the compiler puts them into two graphs, it would be written and read
    whole in between."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FeedForward(nn.Module):
    """GELU MLP, or SwiGLU (Shazeer 2020) of hidden width int(2/3 * ratio * dim)."""

    def __init__(self, dim: int, ratio: float, style: BlockStyle) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3) if style.gated else int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=style.biases)
        self.fc2 = nn.Linear(hidden, dim, bias=style.biases)
        self.fc3 = nn.Linear(dim, hidden, bias=style.biases) if style.gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fc3 is None:
            return self.fc2(F.gelu(self.fc1(x_TD)))
        return self.fc2(F.silu(self.fc1(x_TD)) * self.fc3(x_TD))


class QKNorm(nn.Module):
    """LayerNorm of queries and keys over each head's channels."""

    def __init__(self, head_dim: int, style: BlockStyle) -> None:
        super().__init__()
        self.q_norm, self.k_norm = layer_norm(head_dim, style), layer_norm(head_dim, style)

    def forward(self, q_THD: Tensor, k_THD: Tensor) -> tuple[Tensor, Tensor]:
        # Under autocast LayerNorm returns float32, while the values and the fused attention stay in half precision.
        return self.q_norm(q_THD).to(q_THD.dtype), self.k_norm(k_THD).to(k_THD.dtype)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, style: BlockStyle) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=style.biases)
        self.proj = nn.Linear(dim, dim, bias=style.biases)
        self.qk_norm = QKNorm(dim // num_heads, style) if style.qk_norm else None
        self.attend = segment_attention

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TD).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if self.qk_norm is not None:
            q_THD, k_THD = self.qk_norm(q_THD, k_THD)
        return self.proj(self.attend(q_THD, k_THD, v_THD, segments).flatten(1))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, style: BlockStyle) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=style.biases)
        self.kv = nn.Linear(dim, 2 * dim, bias=style.biases)
        self.proj = nn.Linear(dim, dim, bias=style.biases)
        self.qk_norm = QKNorm(dim // num_heads, style) if style.qk_norm else None
        self.attend = segment_attention

    def forward(self, x_TD: Tensor, context_TD: Tensor, segments: Segments) -> Tensor:
        q_THD = self.q(x_TD).unflatten(-1, (self.num_heads, -1))
        k_THD, v_THD = self.kv(context_TD).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        if self.qk_norm is not None:
            q_THD, k_THD = self.qk_norm(q_THD, k_THD)
        return self.proj(self.attend(q_THD, k_THD, v_THD, segments).flatten(1))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, style: BlockStyle) -> None:
        super().__init__()
        self.norm1, self.attn = layer_norm(dim, style), SelfAttention(dim, num_heads, style)
        self.norm2, self.mlp = layer_norm(dim, style), FeedForward(dim, mlp_ratio, style)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        x_TD = x_TD + self.attn(as_multiplied(self.norm1(x_TD)), segments)
        return x_TD + self.mlp(self.norm2(x_TD))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, style: BlockStyle) -> None:
        super().__init__()
        self.norm1, self.self_attn = layer_norm(dim, style), SelfAttention(dim, num_heads, style)
        self.query_norm, self.context_norm = layer_norm(dim, style), layer_norm(dim, style)
        self.cross_attn = CrossAttention(dim, num_heads, style)
        self.norm2, self.mlp = layer_norm(dim, style), FeedForward(dim, mlp_ratio, style)

    def forward(self, x_TD: Tensor, context_TD: Tensor, self_segments: Segments, cross_segments: Segments) -> Tensor:
        x_TD = x_TD + self.self_attn(as_multiplied(self.norm1(x_TD)), self_segments)
        query_TD, context_TD = as_multiplied(self.query_norm(x_TD)), as_multiplied(self.context_norm(context_TD))
        x_TD = x_TD + self.cross_attn(query_TD, context_TD, cross_segments)
        return x_TD + self.mlp(self.norm2(x_TD))


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Linears Xavier-uniform, the stacked qkv and kv matrices as if each part were its own; biases 0, norms 1.

    As in 4M (Mizrahi et al. 2023), after MAE. Use with `Module.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parts in (("qkv", 3), ("kv", 2)):
        stacked = getattr(module, name, None)
        if isinstance(stacked, nn.Linear):
            for part in stacked.weight.chunk(parts):
                nn.init.xavier_uniform_(part)
