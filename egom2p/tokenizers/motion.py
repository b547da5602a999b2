"""One VQ-VAE for every T x C signal: camera motion, gaze, or any series of numbers.

Shapes: B clips, T frames, N = T / stride tokens, C channels, D width, L latent channels.
Conv1d(kernel = stride) -> sine-cosine positions -> transformer -> tanh MLP -> latent -> quantiser, and the
mirror image back. The network is that of the released camera and gaze tokenizers (facts of EgoM2P's
configs); `quantizer: fsq` swaps the EMA codebook for finite scalar quantisation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p.modalities import Modality
from egom2p.model.attention import Segments
from egom2p.model.blocks import STYLES, EncoderBlock, init_weights
from egom2p.model.positions import position_table
from egom2p.tokenizers.base import Tokenizer, series_units
from egom2p.tokenizers.quantize import FSQ_INIT_SCALE, make_quantizer

LEAST_STD = 0.01


@dataclass(frozen=True)
class MotionArgs:
    """num_frames and channels of the signal; mean and std z-score it; channel_weights scale its squared error.

    mean, std: `auto` in a training's configuration: measured on its clips, and then numbers in what it exports.
    channel_weights: empty for plain MSE in network units.
    dim, depth, num_heads, mlp_ratio: width, blocks, heads and widening of encoder and decoder, each.
    stride: frames a token, so that num_frames / stride tokens fill the grid; kernel: frames that a token looks at.
    quantizer: `ema`, a codebook of vocab_size vectors of latent_dim that follow the latents (commitment_weight draws
    latents to their codes), or `fsq`, finite scalars: so many `levels` an entry, whose product is vocab_size.
    bands: 0 for the network of patches in time. K for one MLP (of `depth` residual blocks; num_heads, stride and kernel
    unused) over the signal's start and K smooth bands of its motion, a ramp and K - 1 sines: what it decodes is smooth,
    and every token says something of the whole clip.
    loss: `pose` compares rotations as rotations, and motion between frames 1, 5 and 15 apart (nine numbers only).
    """

    num_frames: int
    mean: Literal["auto"] | tuple[float, ...]
    std: Literal["auto"] | tuple[float, ...]
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    latent_dim: int = 32
    stride: int = 2
    kernel: int = 2
    quantizer: Literal["ema", "fsq"] = "ema"
    levels: tuple[int, ...] = (8, 6, 5)
    channel_weights: tuple[float, ...] = ()
    commitment_weight: float = 1.0
    bands: int = 0
    loss: Literal["mse", "pose"] = "mse"

    def __post_init__(self) -> None:
        if min(self.num_frames, self.dim, self.depth, self.num_heads, self.stride, self.latent_dim) < 1:
            raise ValueError("num_frames, dim, depth, num_heads, stride and latent_dim must be at least 1")
        if self.num_frames % self.stride or self.dim % self.num_heads:
            raise ValueError(f"num_frames {self.num_frames} must divide by stride {self.stride}, and dim {self.dim} by "
                             f"num_heads {self.num_heads}")
        if self.kernel < self.stride or (self.kernel - self.stride) % 2:
            raise ValueError(f"kernel {self.kernel} must be stride {self.stride}, or more by an even number")
        if "auto" in (self.mean, self.std):
            if self.mean != self.std:
                raise ValueError("mean and std must both be auto, or neither")
        elif len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError("mean and std need one entry a channel, std above 0")


class MotionTokenizer(Tokenizer):
    """(B, T, C) -> (B, N) ids -> (B, T, C); signals with validity carry it as a last input channel."""

    kind = "motion"
    only_for_training = ("loss",)
    later_arguments: ClassVar = {"bands": 0}
    encode_batch = 1024

    def __init__(self, modality: Modality, args: MotionArgs) -> None:
        super().__init__(modality, args)
        self.signal = series_units(modality, args.mean, args.std)
        self.channels = len(args.mean)
        latent = len(args.levels) if args.quantizer == "fsq" else args.latent_dim
        if args.bands and self.signal.has_validity:
            raise ValueError("bands are for signals without gaps")
        if args.bands:
            self.bands = _Bands(args.num_frames, args.bands)
            self.num_tokens, size = modality.num_tokens, (args.bands + 1) * self.channels
            self.encoder = nn.Sequential(nn.Linear(size, args.dim), *_residual_mlp(args))
        else:
            if modality.num_tokens != args.num_frames // args.stride:
                raise ValueError(f"num_frames {args.num_frames} by stride {args.stride} make "
                                 f"{args.num_frames // args.stride} tokens, but the grid of '{modality.name}' is "
                                 f"{list(modality.grid)}")
            self.num_tokens, size = 1, args.stride * self.channels
            padding = (args.kernel - args.stride) // 2
            self.conv = nn.Conv1d(self.channels, args.dim, args.kernel, args.stride, padding)
            self.encoder = _Trunk(args)
        self.to_latent = nn.Linear(args.dim, self.num_tokens * latent)
        self.quantizer = make_quantizer(args.quantizer, modality.vocab_size, latent, args.levels)
        if self.quantizer.codebook_size != modality.vocab_size:
            raise ValueError(f"levels {list(args.levels)} make {self.quantizer.codebook_size} codes, "
                             f"but modality '{modality.name}' has vocab_size {modality.vocab_size}")
        self.from_latent = nn.Linear(self.num_tokens * latent, args.dim)
        self.decoder = nn.Sequential(*_residual_mlp(args)) if args.bands else _Trunk(args)
        self.out = nn.Linear(args.dim, size)
        weights = args.channel_weights or (1.0,) * self.channels
        self.register_buffer("channel_weights", torch.tensor(weights), persistent=False)
        self.register_buffer("mean", torch.tensor(args.mean), persistent=False)
        self.register_buffer("std", torch.tensor(args.std), persistent=False)
        self.apply(init_weights)
        with torch.no_grad():
            if args.quantizer == "fsq":
                self.to_latent.weight.mul_(BANDS_INIT_SCALE if args.bands else FSQ_INIT_SCALE)
            for module in self.modules():
                if isinstance(module, _ResidualMLP):
                    module.fc2.weight.zero_()

    def latents(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C[+1]) network units -> (B, N, L) before quantisation."""
        if self.signal.has_validity:
            x_BTC = x_BTC[..., :-1] * x_BTC[..., -1:]
        if self.args.bands:
            latents = self.to_latent(self.encoder(self.bands.analyse(x_BTC).flatten(1)))
            return latents.unflatten(1, (self.num_tokens, -1))
        tokens_BND = self.conv(x_BTC.transpose(1, 2)).transpose(1, 2)
        return self.to_latent(self.encoder(tokens_BND))

    def encode_normalized(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C[+1]) -> (B, N) ids."""
        return self.quantizer(self.latents(x_BTC))[1]

    def decode_normalized(self, ids_BN: Tensor) -> Tensor:
        """(B, N) ids -> (B, T, C)."""
        return self.decode_codes(F.embedding(ids_BN, self.codes()))

    def codes(self) -> Tensor:
        """(vocab, L): what the decoder receives for each id."""
        return self.quantizer.codes()

    def decode_codes(self, codes_BNL: Tensor) -> Tensor:
        if self.args.bands:
            bands = self.out(self.decoder(self.from_latent(codes_BNL.flatten(1))))
            return self.bands.synthesise(bands.unflatten(1, (-1, self.channels)))
        out = self.out(self.decoder(self.from_latent(codes_BNL)))
        return out.unflatten(-1, (self.channels, self.args.stride)).transpose(2, 3).flatten(1, 2)

    def training_loss(self, x_BTC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted MSE over a clip's observed frames, its mean over clips, plus the commitment term; figures: error,
        ids (B, N)."""
        codes, ids, commitment = self.quantizer(self.latents(x_BTC))
        decoded = self.decode_codes(codes)
        if self.args.loss == "pose":
            error = pose_loss(decoded * self.std + self.mean, x_BTC * self.std + self.mean)
            return error + self.args.commitment_weight * commitment, {"error": error.detach(), "ids": ids}
        error = (decoded - x_BTC[..., : self.channels]) ** 2 * self.channel_weights
        if self.signal.has_validity:
            valid = x_BTC[..., -1:]
            error = (error * valid).sum((1, 2)) / (valid.sum((1, 2)) * self.channels).clamp(min=1)
        error = error.mean()
        return error + self.args.commitment_weight * commitment, {"error": error.detach(), "ids": ids}

    def observed(self, signal: np.ndarray) -> np.ndarray:
        """A token is observed when at least one of its frames is (validity), or all are (no validity)."""
        frames = self.signal.is_observed(signal).reshape(-1, self.args.stride)
        if self.signal.has_validity:
            return frames.any(1)
        return np.full(self.modality.grid, bool(frames.all()))

    def check_size(self, signal: np.ndarray) -> None:
        if len(signal) != self.args.num_frames:
            raise ValueError(f"has {len(signal)} frames, but tokenizer '{self.modality.name}' is for "
                             f"{self.args.num_frames}")
        if self.modality.signal == "motion" and signal.shape[1] != len(self.args.mean):
            raise ValueError(f"has {signal.shape[1]} channels, but tokenizer '{self.modality.name}' is for "
                             f"{len(self.args.mean)}")

    def after_step(self, seed: int, step: int, skipped: bool = False) -> None:
        self.quantizer.update(seed, step, skipped)


def with_statistics(args: MotionArgs, modality: Modality, signals: Iterable[np.ndarray]) -> MotionArgs:
    """The arguments with mean and std of each channel over the observed frames of raw signals, where they say `auto`.

    A channel that hardly moves is not blown up: no std is below LEAST_STD of the largest.
    """
    if args.mean != "auto":
        return args
    plain, parts = series_units(modality, (0.0,), (1.0,)), [np.zeros((0, 0))]
    for signal in signals:
        modality.kind.check(signal)
        observed = plain.is_observed(signal)
        if observed.any() and (plain.has_validity or observed.all()):
            parts.append(plain.normalize(signal)[observed])
    frames = np.concatenate(parts[1:] or parts)
    frames = frames[:, :-1] if plain.has_validity else frames
    if len(frames) < 2:
        raise ValueError("mean: auto, but no clip carries a measurement")
    std = frames.std(0, dtype=np.float64)
    floor = max(LEAST_STD * std.max(), 1e-6)
    return replace(args, mean=_rounded(frames.mean(0, dtype=np.float64)), std=_rounded(np.maximum(std, floor)))


def _rounded(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{x:.6g}") for x in numbers)


class _Trunk(nn.Module):
    """Positions, transformer blocks and a residual tanh MLP over (B, N, D)."""

    def __init__(self, args: MotionArgs) -> None:
        super().__init__()
        style = STYLES["gelu"]
        self.register_buffer("position", position_table((args.num_frames // args.stride,), args.dim), persistent=False)
        self.blocks = nn.ModuleList(EncoderBlock(args.dim, args.num_heads, args.mlp_ratio, style)
                                    for _ in range(args.depth))
        self.norm = nn.LayerNorm(args.dim, eps=1e-6)
        hidden = int(args.dim * args.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(args.dim, hidden), nn.Linear(hidden, args.dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        lengths = np.full(x_BND.shape[0], x_BND.shape[1])
        segments = Segments(lengths, lengths, x_BND.device)
        x = (x_BND + self.position).flatten(0, 1)
        for block in self.blocks:
            x = block(x, segments)
        x = x + self.fc2(torch.tanh(self.fc1(self.norm(x))))
        return x.unflatten(0, x_BND.shape[:2])


# Of the projection to the latents of bands.
BANDS_INIT_SCALE = 0.5
# Metres and radians at which a term of `pose_loss` costs 1, by how many frames apart the compared poses are (0: the
# poses themselves).
POSE_SCALES = {0: (0.02, 0.02), 1: (0.003, 0.003), 5: (0.01, 0.01), 15: (0.02, 0.02)}


class _Bands(nn.Module):
    """(B, T, C) <-> (B, 1 + K, C): the first frame, and the motion from it in an orthonormal basis made of a ramp and
    K - 1 sines that vanish at both ends. Divided by (2 k + 1) ** -1.75, so that all bands of head motion are of about
    one size."""

    def __init__(self, num_frames: int, bands: int) -> None:
        super().__init__()
        times = np.linspace(0, 1, num_frames)
        basis, _ = np.linalg.qr(np.stack([times, *(np.sin(np.pi * k * times) for k in range(1, bands))], 1))
        size = np.sqrt(num_frames) * (2.0 * np.arange(bands) + 1) ** -1.75
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.float32), persistent=False)
        self.register_buffer("size", torch.tensor(size, dtype=torch.float32)[:, None], persistent=False)

    def analyse(self, x_BTC: Tensor) -> Tensor:
        start = x_BTC[:, :1]
        return torch.cat([start, self.basis.T @ (x_BTC - start) / self.size], 1)

    def synthesise(self, bands_BKC: Tensor) -> Tensor:
        return bands_BKC[:, :1] + self.basis @ (bands_BKC[:, 1:] * self.size)


class _ResidualMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def _residual_mlp(args: MotionArgs) -> list[nn.Module]:
    blocks = [_ResidualMLP(args.dim, int(args.dim * args.mlp_ratio)) for _ in range(args.depth)]
    return [*blocks, nn.LayerNorm(args.dim, eps=1e-6)]


def pose_loss(predicted: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of (B, T, 9) poses in units of POSE_SCALES: of the poses, and of the motion between poses some
    frames apart, as `evaluation.camera` measures it (rotations by their chordal distance)."""
    p_rotation, r_rotation = rotations(predicted), rotations(reference)
    p_centre, r_centre = predicted[..., 6:], reference[..., 6:]
    total = predicted.new_zeros(())
    for apart, (metres, radians) in POSE_SCALES.items():
        if apart:
            p_turn, p_move = _motions(p_rotation, p_centre, apart)
            r_turn, r_move = _motions(r_rotation, r_centre, apart)
        else:
            p_turn, p_move, r_turn, r_move = p_rotation, p_centre, r_rotation, r_centre
        total = total + ((p_move - r_move) ** 2).sum(-1).mean() / metres**2
        total = total + ((p_turn - r_turn) ** 2).sum((-1, -2)).mean() / (2 * radians**2)
    return total / 100


def rotations(nine: Tensor) -> Tensor:
    """(..., 9) -> (..., 3, 3), as `geometry.nine_to_pose`."""
    first = F.normalize(nine[..., :3], dim=-1, eps=1e-6)
    second = nine[..., 3:6]
    second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1, eps=1e-6)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def _motions(rotation: Tensor, centre: Tensor, apart: int) -> tuple[Tensor, Tensor]:
    """Rotation and translation from each frame to the one `apart` frames later, in the earlier frame's axes."""
    back = rotation[:, :-apart].transpose(-1, -2)
    return back @ rotation[:, apart:], (back @ (centre[:, apart:] - centre[:, :-apart])[..., None])[..., 0]
