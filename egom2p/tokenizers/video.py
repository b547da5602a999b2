"""A small causal video tokenizer with finite scalar quantisation, for any resolution.

Shapes: B clips, T frames, H x W pixels; a token covers `patch` = time x height x width of them. The first
frame is its own group (it is repeated to fill one patch in time), so 1 + k * patch[0] frames make 1 + k
latent frames, and latent frame i depends on no later frame. The layout is that of Cosmos' DV4x8x8.
Patches are projected linearly, mixed by causal convolutions on the latent grid, quantised, and mirrored.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from egom2p.modalities import Modality
from egom2p.tokenizers.base import Tokenizer, check_picture, picture_units
from egom2p.tokenizers.perceptual import Critic, Lpips, adversarial_loss
from egom2p.tokenizers.quantize import FiniteScalar


@dataclass(frozen=True)
class VideoArgs:
    """num_frames: frames of the raw clip; those short of 1 + k * patch[0] are filled by repeating the edges. loss: mean
    absolute or squared error of pixels in [-1, 1]. edge_weight: of the same error of the differences between
    neighbouring pixels, which keeps edges, those of objects in depth above all (the gradient term of Eigen and Fergus,
    ICCV 2015). near_weight: of near pixels over far ones, for depth, whose pixels are inverse depth: the error of a
    pixel at level g in [0, 1] counts 1 + near_weight * g. perceptual_weight: of LPIPS, with torchvision's AlexNet
    weights at `perceptual_network`. adversarial_weight: of the judgement of a critic that is trained beside (0 =
    none)."""

    num_frames: int = 16
    patch: tuple[int, ...] = (4, 8, 8)
    dim: int = 128
    depth: int = 2
    levels: tuple[int, ...] = (8, 8, 8)
    loss: Literal["l1", "l2"] = "l2"
    edge_weight: float = 0.0
    near_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_network: str = ""
    adversarial_weight: float = 0.0

    def __post_init__(self) -> None:
        if len(self.patch) != 3:
            raise ValueError("patch must be three numbers: frames, rows, columns")
        if min(self.edge_weight, self.near_weight, self.perceptual_weight, self.adversarial_weight) < 0:
            raise ValueError("weights of the loss must not be below 0")
        if bool(self.perceptual_weight) != bool(self.perceptual_network):
            raise ValueError("perceptual_weight and perceptual_network (AlexNet weights of torchvision) go together")


class VideoTokenizer(Tokenizer):
    """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) ids -> (B, 3, T, H, W)."""

    kind = "video"
    only_for_training = ("loss", "edge_weight", "near_weight", "perceptual_weight", "perceptual_network",
                         "adversarial_weight")

    def __init__(self, modality: Modality, args: VideoArgs) -> None:
        super().__init__(modality, args)
        self.signal = picture_units(modality)
        values = 3 * int(np.prod(args.patch))
        self.quantizer = FiniteScalar(args.levels)
        if self.quantizer.codebook_size != modality.vocab_size:
            raise ValueError(f"levels {list(args.levels)} make {self.quantizer.codebook_size} codes, "
                             f"but modality '{modality.name}' has vocab_size {modality.vocab_size}")
        steps = 1 + (args.num_frames - 1 + sum(self._time_padding(args.num_frames))) // args.patch[0]
        if len(modality.grid) != 3 or modality.grid[0] != steps:
            raise ValueError(f"{args.num_frames} frames in patches of {args.patch[0]} make {steps} steps in time, but "
                             f"the grid of modality '{modality.name}' is {list(modality.grid)}")
        self.embed = nn.Linear(values, args.dim)
        self.encoder = nn.Sequential(*(CausalBlock(args.dim) for _ in range(args.depth)))
        self.to_latent = nn.Linear(args.dim, len(args.levels))
        self.from_latent = nn.Linear(len(args.levels), args.dim)
        self.decoder = nn.Sequential(*(CausalBlock(args.dim) for _ in range(args.depth)))
        self.unembed = nn.Linear(args.dim, values)
        self.critic = Critic() if args.adversarial_weight else None
        self._judges: tuple[Lpips, ...] = ()  # in a tuple: not a part of the export

    @property
    def frame_size(self) -> int:
        """Side in pixels of the square frames its grid is for."""
        return self.modality.grid[1] * self.args.patch[1]

    def check_size(self, signal: np.ndarray) -> None:
        check_picture(signal, self.modality, self.args.num_frames, self.args.patch)

    def encode_normalized(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1], T and sides of any size -> (B, t, h, w) ids."""
        return self.quantizer(self.latents(self._pad(video)))[1].unflatten(1, self._grid(video))

    def decode_normalized(self, ids: Tensor) -> Tensor:
        """(B, t, h, w) ids -> (B, 3, T, H, W), padding in time removed."""
        return self.decode_codes(F.embedding(ids.flatten(1), self.codes()), ids.shape[1:])

    def codes(self) -> Tensor:
        return self.quantizer.codes()

    def latents(self, video: Tensor) -> Tensor:
        """Padded (B, 3, T, H, W) -> (B, t * h * w, L) before quantisation."""
        time, height, width = self.args.patch
        video = torch.cat([video[:, :, :1].expand(-1, -1, time - 1, -1, -1), video], 2)
        patches = rearrange(video, "b c (t p) (h q) (w r) -> b t h w (c p q r)", p=time, q=height, r=width)
        return self.to_latent(self.encoder(self.embed(patches))).flatten(1, 3)

    def decode_codes(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """(B, t * h * w, L) codes -> (B, 3, T, H, W)."""
        time, height, width = self.args.patch
        grid = tuple(grid or self.modality.grid)
        hidden = self.decoder(self.from_latent(codes).unflatten(1, grid))
        video = rearrange(self.unembed(hidden), "b t h w (c p q r) -> b c (t p) (h q) (w r)", p=time, q=height, r=width,
                          c=3)
        before, _ = self._time_padding(self.args.num_frames)
        start = time - 1 + before
        return video[:, :, start : start + self.args.num_frames]

    def training_loss(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The error that the arguments' weights say; figures: error (MSE of pixels), ids."""
        codes, ids, _ = self.quantizer(self.latents(self._pad(video)))
        made = self._unpad_sides(self.decode_codes(codes, self._grid(video)), video.shape[-2:])
        off, args = made - video, self.args
        distance = torch.abs if args.loss == "l1" else torch.square
        near = 1 + args.near_weight * (video + 1) / 2 if args.near_weight else 1
        loss = (distance(off) * near).mean()
        if args.edge_weight:
            edges = distance(off.diff(dim=-1)).mean() + distance(off.diff(dim=-2)).mean()
            loss = loss + args.edge_weight * edges
        if args.perceptual_weight or self.critic is not None:
            frames = [rearrange(x, "b c t h w -> (b t) c h w") for x in (video, made)]
            if args.perceptual_weight:
                loss = loss + args.perceptual_weight * self._perceptual(*frames).mean()
            if self.critic is not None:
                loss = loss + adversarial_loss(self.critic, *frames, args.adversarial_weight)
        return loss, {"error": off.detach().square().mean(), "ids": ids}

    def _perceptual(self, true: Tensor, made: Tensor) -> Tensor:
        if not self._judges:
            self._judges = (Lpips(self.args.perceptual_network),)
        return self._judges[0].to(true)(made, true)

    def _time_padding(self, frames: int) -> tuple[int, int]:
        """Frames to add before and after, half each, so that 1 + k * patch[0] remain."""
        missing = -(frames - 1) % self.args.patch[0]
        return missing // 2, missing - missing // 2

    def _pad(self, video: Tensor) -> Tensor:
        """Repeat edge frames in time; zero-pad the sides, centred, to multiples of the patch."""
        before, after = self._time_padding(video.shape[2])
        video = torch.cat([video[:, :, :1].expand(-1, -1, before, -1, -1), video,
                           video[:, :, -1:].expand(-1, -1, after, -1, -1)], 2)
        rows, columns = (-side % patch for side, patch in zip(video.shape[-2:], self.args.patch[1:], strict=True))
        return F.pad(video, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _unpad_sides(self, video: Tensor, size: tuple[int, int]) -> Tensor:
        top, left = ((have - want) // 2 for have, want in zip(video.shape[-2:], size, strict=True))
        return video[..., top : top + size[0], left : left + size[1]]

    def _grid(self, video: Tensor) -> tuple[int, int, int]:
        time = 1 + (video.shape[2] - 1 + sum(self._time_padding(video.shape[2]))) // self.args.patch[0]
        return time, *(-(-side // patch) for side, patch in zip(video.shape[-2:], self.args.patch[1:], strict=True))


class CausalBlock(nn.Module):
    """Residual block on (B, t, h, w, D): a 2 x 3 x 3 convolution that looks back one latent frame, then an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = nn.Conv2d(2 * dim, dim, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = torch.cat([F.pad(y[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), y], -1)
        y = self.mix(rearrange(y, "b t h w d -> (b t) d h w"))
        x = x + rearrange(F.gelu(y), "(b t) d h w -> b t h w d", b=x.shape[0])
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
