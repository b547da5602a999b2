"""Vector quantisers: latents (B, N, L) -> ids (B, N) and the codes the decoder receives.

`EmaCodebook` is ours because the released tokenizers hand the decoder codes that EMA leaves unnormalised,
which vector-quantize-pytorch does not do. Finite scalar quantisation is that library's.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

DEAD_SHARE = 1 / 32
UNSEEN = 1e-3  # the count of a code that no latent was nearest to yet


class FiniteScalar(nn.Module):
    """Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024. No codebook to learn."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        from vector_quantize_pytorch import FSQ  # imports the whole compiler of torch

        super().__init__()
        self.fsq = FSQ(list(levels))
        self.latent_dim, self.codebook_size = len(levels), self.fsq.codebook_size

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, ids = self.fsq(latents)
        return codes, ids.long(), latents.new_zeros(())

    def codes(self) -> Tensor:
        """(K, L): what the decoder receives for each id."""
        return self.fsq.implicit_codebook

    def update(self, seed: int, step: int, skipped: bool = False) -> None:
        """Nothing to learn."""

    def leave_out_the_last(self) -> None:
        """Nothing is kept of a micro-batch."""


class EmaCodebook(nn.Module):
    """Cosine-similarity codebook with exponential moving averages (van den Oord et al. 2017, appendix A.1;
    Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2022, for the normalised lookup).

    id = argmax of normalised latent . normalised code, in float32 whatever is trained in; the decoder gets the stored
    code as it is. During training each micro-batch adds to the statistics; `update`, once an optimiser step, sums them
    over all processes, moves the codes, and replaces codes whose average count fell below a DEAD_SHARE of the mean
    count, or `dead_below` if that is less, by latents of the batch (4M's rule, `run_training_vqvae.py`; so does the
    first step with nearly all). The draw depends on (seed, step) and the global batch only.
    """

    def __init__(self, codebook_size: int, latent_dim: int, decay: float = 0.99, dead_below: float = 2.0) -> None:
        super().__init__()
        self.codebook_size, self.latent_dim = codebook_size, latent_dim
        self.decay, self.dead_below = decay, dead_below
        embed = F.normalize(torch.randn(codebook_size, latent_dim), dim=-1)
        self.register_buffer("embed", embed)
        self.register_buffer("embed_sum", embed * UNSEEN)
        self.register_buffer("cluster_size", torch.full((codebook_size,), UNSEEN))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            unit = F.normalize(latents.to(self.embed.dtype), dim=-1)
            ids = (unit @ F.normalize(self.embed, dim=-1).T).argmax(-1)
            codes = F.embedding(ids, self.embed)
            commitment = F.mse_loss(unit, codes)
        if self.training:
            self.pending.append((unit.detach().flatten(0, 1), ids.flatten()))
        return unit + (codes - unit).detach(), ids, commitment

    def codes(self) -> Tensor:
        return self.embed

    def leave_out_the_last(self) -> None:
        """Count nothing of the last micro-batch, but take part in the sum over processes."""
        self.pending = [*self.pending[:-1], *((unit[:0], ids[:0]) for unit, ids in self.pending[-1:])]

    @torch.no_grad()
    def update(self, seed: int, step: int, skipped: bool = False) -> None:
        if skipped:
            self.pending.clear()
        if not self.pending:
            return
        unit, ids = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending.clear()
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, torch.ones_like(unit[:, 0]))
        sums = torch.zeros_like(self.embed).index_add_(0, ids, unit)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if not counts.any():
            return
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_sum.lerp_(sums, 1 - self.decay)
        self.embed.copy_(self.embed_sum / self.cluster_size.clamp(min=1e-5)[:, None])
        self._replace_dead(unit, (DEAD_SHARE * counts.mean()).clamp(max=self.dead_below), seed, step)

    def _replace_dead(self, unit: Tensor, below: Tensor, seed: int, step: int) -> None:
        """Give dead codes a latent of the global batch; the choice ignores how the batch was dealt out."""
        dead = (self.cluster_size < below).nonzero().flatten()
        if not len(dead):
            return
        if dist.is_initialized():
            unit = _gather_rows(unit)
        unit = unit[_canonical_order(unit)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = unit[torch.randint(len(unit), (len(dead),), generator=generator).to(unit.device)]
        self.embed[dead] = chosen
        self.embed_sum[dead] = chosen * below
        self.cluster_size[dead] = below


def _gather_rows(rows: Tensor) -> Tensor:
    """(N, L) of each rank, N as it may be -> the rows of all ranks."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    padded = F.pad(rows, (0, 0, 0, int(counts.max()) - len(rows)))
    parts = [torch.empty_like(padded) for _ in range(len(counts))]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def _canonical_order(rows: Tensor) -> Tensor:
    """An order of the rows that does not depend on the order they came in."""
    keys = (rows.double() * 1e6).round() @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=rows.device)
    return keys.argsort(stable=True)


# Of the projection to the latent: larger latents saturate the bounding tanh, and the codes collapse.
FSQ_INIT_SCALE = 0.1


def make_quantizer(kind: Literal["ema", "fsq"], codebook_size: int, latent_dim: int,
                   levels: tuple[int, ...]) -> nn.Module:
    """The quantiser a tokenizer's config names."""
    return FiniteScalar(levels) if kind == "fsq" else EmaCodebook(codebook_size, latent_dim)
