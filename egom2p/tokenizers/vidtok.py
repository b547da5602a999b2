"""Microsoft's VidTok with finite scalar quantisation, causal in time (Tang et al., "VidTok: A Versatile and Open-Source
Video Tokenizer", 2024; weights MIT, huggingface.co/microsoft/VidTok): networks of ours with the published key names.

Shapes: B clips, C channels, T frames, H x W pixels; f frames and s x s pixels a token. Checked against Microsoft's own
code (microsoft/VidTok d6ad92d9) at small width for versions 1.0 and 1.1; the published files could not be fetched here.
`egom2p import-released FILE.ckpt --out DIR` makes the folder.

Version 1.0 looks back into zeros and needs 1 + k * f frames: a clip is filled up by repeating its last frame. Version
1.1 looks back into the repeated first frame and takes k * f frames as well. Trained at 3 frames a second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p.modalities import Modality
from egom2p.tokenizers.base import Tokenizer, check_picture, picture_units
from egom2p.tokenizers.quantize import FiniteScalar

Conv = Callable[[int, int, int], nn.Module]  # (channels in, channels out, kernel) -> a convolution that keeps the size


@dataclass(frozen=True)
class VidTokArgs:
    """num_frames of a clip; width: channels at full size, times `multipliers` level by level (each but the last halves
    the sides); time_levels: those after which the encoder, and before which the decoder, changes the frame count;
    repeats_first: version 1.1."""

    num_frames: int = 16
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    levels: tuple[int, ...] = (8, 8, 8, 8, 8)
    encoder_time_levels: tuple[int, ...] = (1, 2)
    decoder_time_levels: tuple[int, ...] = (1, 2)
    blocks: int = 2
    repeats_first: bool = True

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows, columns a token."""
        side = 2 ** (len(self.multipliers) - 1)
        return 2 ** len(self.encoder_time_levels), side, side

    @property
    def padded_frames(self) -> int:
        """Frames that the network is given: its own in version 1.1, 1 + k * f in version 1.0."""
        time = self.patch[0]
        return self.num_frames if self.repeats_first else self.num_frames + -(self.num_frames - 1) % time

    @property
    def latent_frames(self) -> int:
        return -(-self.padded_frames // self.patch[0])


class VidTokTokenizer(Tokenizer):
    """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) ids -> (B, 3, T, H, W)."""

    kind = "vidtok"

    def __init__(self, modality: Modality, args: VidTokArgs) -> None:
        super().__init__(modality, args)
        self.signal = picture_units(modality)
        self.quantizer = FiniteScalar(args.levels)
        if (self.quantizer.codebook_size, args.latent_frames) != (modality.vocab_size, modality.grid[0]):
            raise ValueError(f"makes {args.latent_frames} x h x w ids of {self.quantizer.codebook_size}, but modality "
                             f"'{modality.name}' is {list(modality.grid)} of {modality.vocab_size}")
        self.encoder, self.decoder = Encoder(args), Decoder(args)

    @property
    def frame_size(self) -> int:
        """Side in pixels of the square frames its grid is for."""
        return self.modality.grid[1] * self.args.patch[1]

    def check_size(self, signal: np.ndarray) -> None:
        check_picture(signal, self.modality, self.args.num_frames, self.args.patch)
        if any(side % self.args.patch[1] for side in signal.shape[1:3]):
            raise ValueError(f"is {signal.shape[2]} x {signal.shape[1]} pixels; VidTok needs multiples of "
                             f"{self.args.patch[1]}")

    def encode_normalized(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) int64 ids."""
        missing = self.args.padded_frames - video.shape[2]
        latents = self.encoder(torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2))
        return self.quantizer(latents.movedim(1, -1).flatten(1, 3).float())[1].unflatten(1, latents.shape[2:])

    def decode_normalized(self, ids: Tensor) -> Tensor:
        return self.decode_codes(F.embedding(ids.flatten(1), self.codes()), ids.shape[1:])

    def codes(self) -> Tensor:
        return self.quantizer.codes()

    def decode_codes(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """(B, t * h * w, L) codes -> (B, 3, T, H, W)."""
        video = self.decoder(codes.unflatten(1, tuple(grid or self.modality.grid)).movedim(-1, 1))
        return video[:, :, -self.args.padded_frames :][:, :, : self.args.num_frames].clamp(-1, 1)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, L, t, h, w). Each level: blocks over space and over time in turn, then half the size."""

    def __init__(self, args: VidTokArgs) -> None:
        super().__init__()
        self.time, self.repeats_first = args.patch[0], args.repeats_first
        volume, line = _causal(3, args.repeats_first), _causal(1, args.repeats_first)
        self.conv_in = volume(3, args.width, 3)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        width, last = args.width, len(args.multipliers) - 1
        for level, multiplier in enumerate(args.multipliers):
            widths = [width, *[args.width * multiplier] * args.blocks]
            width = widths[-1]
            self.down.append(_Level(Residual(a, b, _frame_conv) for a, b in pairwise(widths)))
            self.down_temporal.append(_Level(Residual(width, width, line) for _ in range(args.blocks)))
            if level < last:
                self.down[level].downsample = HalfSide(width)
            if level in args.encoder_time_levels:
                self.down_temporal[level].downsample = HalfTime(width, args.repeats_first)
        self.mid = Middle(width, volume)
        self.norm_out, self.conv_out = ChannelNorm(width), volume(width, len(args.levels), 3)

    def forward(self, video: Tensor) -> Tensor:
        rest = video.shape[2] % self.time
        if rest:
            front = self.time - rest if self.repeats_first else self.time - 1
            video = torch.cat([video[:, :, :1].expand(-1, -1, front, -1, -1), video], 2)
        x = self.conv_in(video)
        for space, time in zip(self.down, self.down_temporal, strict=True):
            x = _through_level(space, time, "downsample", x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, L, t, h, w) -> (B, 3, T, H, W); in version 1.1 T may be up to f - 1 more than were put in, in front."""

    def __init__(self, args: VidTokArgs) -> None:
        super().__init__()
        self.extra = 0 if args.repeats_first else args.patch[0] - 1
        volume, line = _causal(3, args.repeats_first), _causal(1, args.repeats_first)
        width = args.width * args.multipliers[-1]
        self.conv_in, self.mid = volume(len(args.levels), width, 3), Middle(width, volume)
        up, up_temporal, first = [], [], 1
        for level in reversed(range(len(args.multipliers))):
            widths = [width, *[args.width * args.multipliers[level]] * (args.blocks + 1)]
            width = widths[-1]
            space = _Level(Residual(a, b, _frame_conv) for a, b in pairwise(widths))
            time = _Level(Residual(width, width, line) for _ in range(args.blocks + 1))
            if level:
                space.upsample = DoubleSide(width)
            if level in args.decoder_time_levels:
                time.upsample = DoubleTime(width, args.repeats_first, first)
                first *= 2
            up.append(space)
            up_temporal.append(time)
        self.up, self.up_temporal = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(up_temporal))
        self.norm_out, self.conv_out = ChannelNorm(width), volume(width, 3, 3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for space, time in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            x = _through_level(space, time, "upsample", x)
        return self.conv_out(F.silu(self.norm_out(x)))[:, :, self.extra :]


class _Level(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)


class Middle(nn.Module):
    def __init__(self, width: int, conv: Conv) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (Residual(width, width, conv), FrameAttention(width, conv),
                                                   Residual(width, width, conv))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position, (B, C, ...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Residual(nn.Module):
    def __init__(self, before: int, after: int, conv: Conv) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(before), conv(before, after, 3)
        self.norm2, self.conv2 = ChannelNorm(after), conv(after, after, 3)
        if before != after:
            self.nin_shortcut = conv(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class FrameAttention(nn.Module):
    """One head over the positions of each frame."""

    def __init__(self, width: int, conv: Conv) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(3).permute(0, 2, 3, 1) for project in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).reshape(x.shape))


class CausalConv(nn.Module):
    """Convolution over (B, C, T) or (B, C, T, H, W) that sees no later frame."""

    def __init__(self, before: int, after: int, kernel: int, axes: int, repeats_first: bool, stride: int = 1) -> None:
        super().__init__()
        conv = nn.Conv1d if axes == 1 else nn.Conv3d
        self.conv = conv(before, after, kernel, stride=stride if axes == 1 else (stride, 1, 1))
        self.front, self.side, self.repeats_first = kernel - stride, kernel // 2, repeats_first

    def forward(self, x: Tensor) -> Tensor:
        if self.front > 0:
            x = torch.cat([_before_first(x, self.repeats_first)] * self.front + [x], 2)
        return self.conv(x if x.ndim == 3 else F.pad(x, (self.side,) * 4))


class HalfSide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DoubleSide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Mixed(nn.Module):
    """A plain resampling in time and a learned one, in learned shares."""

    def __init__(self, width: int, repeats_first: bool, stride: int = 1) -> None:
        super().__init__()
        self.repeats_first = repeats_first
        self.conv = CausalConv(width, width, 3, 3, repeats_first, stride)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def mix(self, plain: Tensor, learned: Tensor) -> Tensor:
        share = self.mix_factor.sigmoid()
        return share * plain + (1 - share) * learned


class HalfTime(_Mixed):
    def __init__(self, width: int, repeats_first: bool) -> None:
        super().__init__(width, repeats_first, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool3d(torch.cat([_before_first(x, self.repeats_first), x], 2), (3, 1, 1), (2, 1, 1))
        return self.mix(mean, self.conv(x))


class DoubleTime(_Mixed):
    """Version 1.0 repeats frames; 1.1 interpolates, the `first` frames (of the first latent one) by themselves."""

    def __init__(self, width: int, repeats_first: bool, first: int) -> None:
        super().__init__(width, repeats_first)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.repeats_first:
            parts = [part for part in (x[:, :, : self.first], x[:, :, self.first :]) if part.shape[2]]
            x = torch.cat([F.interpolate(p, scale_factor=(2.0, 1.0, 1.0), mode="trilinear") for p in parts], 2)
        else:
            x = x.repeat_interleave(2, 2)
        return self.mix(x, self.conv(x))


def _before_first(x: Tensor, repeats_first: bool) -> Tensor:
    return x[:, :, :1] if repeats_first else torch.zeros_like(x[:, :, :1])


def _causal(axes: int, repeats_first: bool) -> Conv:
    return lambda before, after, kernel: CausalConv(before, after, kernel, axes, repeats_first)


def _frame_conv(before: int, after: int, kernel: int) -> nn.Module:
    return nn.Conv2d(before, after, kernel, padding=kernel // 2)


def _through_level(space: _Level, time: _Level, change: str, x: Tensor) -> Tensor:
    """The blocks over space and over time in turn, then what changes the sides and the frame count, where there is such
    (`change`: its published name)."""
    for over_space, over_time in zip(space.block, time.block, strict=True):
        x = _along_time(over_time, _frame_by_frame(over_space, x))
    if hasattr(space, change):
        x = _frame_by_frame(getattr(space, change), x)
    return getattr(time, change)(x) if hasattr(time, change) else x


def _frame_by_frame(function: nn.Module, x: Tensor) -> Tensor:
    """A function of (N, C, H, W) on each frame of (B, C, T, H, W)."""
    out = function(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _along_time(function: nn.Module, x: Tensor) -> Tensor:
    """A function of (N, C, T) at each position of (B, C, T, H, W)."""
    out = function(x.permute(0, 3, 4, 1, 2).flatten(0, 2))
    return out.unflatten(0, (x.shape[0], *x.shape[3:])).permute(0, 3, 4, 1, 2)
