"""AdamW or Muon, their parameter groups, and the learning-rate schedules."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from egom2p.model.blocks import DecoderBlock, EncoderBlock


@dataclass(frozen=True)
class OptimArgs:
    """name: adamw, or muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for tables, heads and
    vectors, both at the same lr (Muon's steps are scaled to AdamW's size). lr: peak learning rate; with lr_batch > 0 it
    is multiplied by batch_size / lr_batch (MAE's rule). Linear warm-up for warmup_steps (or warmup_tokens), then the
    schedule, down to final_lr_share of the peak: cosine; wsd: constant, and a straight line down over the last
    decay_share of the steps; inverse_sqrt: with the root of the step after warm-up, and the same line at the end.
    betas: AdamW's. momentum: Muon's. weight_decay: of matrices and tables. clip_norm: of the gradient, 0 = none."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    lr_batch: int = 0
    betas: tuple[float, ...] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup_steps: int = 0
    warmup_tokens: int = 0
    schedule: Literal["cosine", "wsd", "inverse_sqrt"] = "cosine"
    decay_share: float = 0.2
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)) or self.lr <= 0:
            raise ValueError("betas must be two numbers from 0 to below 1, momentum one, and lr above 0")
        if min(self.weight_decay, self.clip_norm, self.warmup_steps, self.warmup_tokens, self.lr_batch) < 0:
            raise ValueError("weight_decay, clip_norm, warmup_steps, warmup_tokens and lr_batch must not be below 0")
        if self.warmup_steps and self.warmup_tokens:
            raise ValueError("give warmup_steps or warmup_tokens, not both")
        for name in ("decay_share", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 .. 1")


def make_optimizer(model: nn.Module, args: OptimArgs) -> "torch.optim.AdamW | MuonAndAdamW":
    """Weight decay on matrices and tables, not on vectors (norms, biases, modality embeddings). Fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
              {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    if args.name == "muon":
        return MuonAndAdamW(model, groups, args)
    return _adamw(groups, args)


def _adamw(groups: list[dict[str, Any]], args: OptimArgs) -> torch.optim.AdamW:
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=tuple(args.betas), fused=True)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's step, on 2-D parameters (Nesterov momentum, five Newton-Schulz steps, AdamW's size), in the
    type that the device multiplies fast.

    torch's and timm's optimisers orthogonalise in bfloat16 everywhere. A CPU without bfloat16 products (before
    avx512_bf16 and AMX) takes twenty times as long for that as for float32, so on a CPU it is the weights' own type.
    Matrices of one shape go together. The iteration is timm's function.
    """

    COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]  # Jordan's, as torch has them
    TOGETHER = 1 << 24  # numbers of a stack of matrices

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        from timm.optim.muon import get_lr_scale

        for group in self.param_groups:
            for params in self._alike([p for p in group["params"] if p.grad is not None]):
                updates = self._orthogonal([self._momentum(p, group["momentum"]) for p in params])
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * get_lr_scale(p.shape, "match_rms_adamw"))

    def _alike(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Matrices of one shape, at most TOGETHER numbers of them at a time; shards of FSDP2 one by one."""
        shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            shapes[p.shape].append(p)
        for same in shapes.values():
            count = 1 if hasattr(same[0], "placements") else max(1, self.TOGETHER // same[0].numel())
            yield from (same[start : start + count] for start in range(0, len(same), count))

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)

    def _orthogonal(self, updates: list[Tensor]) -> Sequence[Tensor]:
        from timm.optim.muon import zeropower_via_newtonschulz

        dtype = updates[0].dtype if updates[0].device.type == "cpu" else torch.bfloat16
        if len(updates) == 1:
            return [zeropower_via_newtonschulz(updates[0], 5, self.COEFFICIENTS, dtype=dtype)]
        return zeropower_via_newtonschulz(torch.stack(updates), 5, self.COEFFICIENTS, dtype=dtype).unbind()


class MuonAndAdamW:
    """Two optimisers that look like one: Muon for the 2-D weights inside blocks, AdamW for everything else.

    As fused AdamW does by itself, a step with `found_inf` = 1 leaves everything as it is; for Muon the host has to look
    at the flag.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], args: OptimArgs) -> None:
        inside = [p for m in model.modules() if isinstance(m, (EncoderBlock, DecoderBlock)) for p in m.parameters()]
        chosen = {id(p) for p in inside if p.ndim == 2}
        matrices = [{**g, "params": [p for p in g["params"] if id(p) in chosen]} for g in groups]
        others = [{**g, "params": [p for p in g["params"] if id(p) not in chosen]} for g in groups]
        self.muon = Muon([g for g in matrices if g["params"]] or [{"params": []}], args.lr, args.momentum)
        self.adamw = _adamw(others, args)
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.muon.state = self.adamw.state = self.state
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.found_inf: Tensor | None = None

    def step(self) -> None:
        if self.found_inf is None or not bool(self.found_inf):
            self.muon.step()
            self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step (counted from 0)."""

    peak: float
    warmup: int
    total: int
    final_share: float
    kind: str = "cosine"
    decay_share: float = 0.2

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        length = max(1, self.total - self.warmup)
        progress = min(1.0, (step - self.warmup) / length)
        if self.kind == "cosine":
            return self._between(0.5 * (1 + math.cos(math.pi * progress)))
        level = math.sqrt(max(1, self.warmup) / max(1, self.warmup, step)) if self.kind == "inverse_sqrt" else 1.0
        tail = min(1.0, (1 - progress) / self.decay_share) if self.decay_share else 1.0
        return self._between(level * tail)

    def _between(self, share: float) -> float:
        return self.peak * (self.final_share + (1 - self.final_share) * share)


def make_schedule(args: OptimArgs, batch_size: int, total_steps: int, tokens_per_step: int) -> Schedule:
    peak = args.lr * batch_size / args.lr_batch if args.lr_batch else args.lr
    warmup = args.warmup_steps or round(args.warmup_tokens / tokens_per_step)
    return Schedule(peak, warmup, total_steps, args.final_lr_share, args.schedule, args.decay_share)
