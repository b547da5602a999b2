"""AdamW, its parameter groups and the learning-rate schedule."""

import math
from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


@dataclass(frozen=True)
class OptimArgs:
    """lr: peak learning rate; with lr_batch > 0 it is multiplied by batch_size / lr_batch (MAE's rule).
    Linear warm-up for warmup_steps (or warmup_tokens), then cosine to final_lr_share of the peak."""

    lr: float = 1e-4
    lr_batch: int = 0
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup_steps: int = 0
    warmup_tokens: int = 0
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or self.lr <= 0:
            raise ValueError("betas must be two numbers and lr above 0")
        if self.warmup_steps and self.warmup_tokens:
            raise ValueError("give warmup_steps or warmup_tokens, not both")


def make_optimizer(model: nn.Module, args: OptimArgs) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices and tables, not on vectors (norms, biases, modality embeddings)."""
    groups = param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=tuple(args.betas), fused=True)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step (counted from 0)."""

    peak: float
    warmup: int
    total: int
    final_share: float

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.final_share + (1 - self.final_share) * cosine)


def make_schedule(args: OptimArgs, batch_size: int, total_steps: int, tokens_per_step: int) -> Schedule:
    peak = args.lr * batch_size / args.lr_batch if args.lr_batch else args.lr
    warmup = args.warmup_steps or round(args.warmup_tokens / tokens_per_step)
    return Schedule(peak, warmup, total_steps, args.final_lr_share)
