"""An exponential moving average of the weights while they are trained (Polyak & Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """average += (1 - d) (weights - average) after every step, d = min(decay, (1 + step) / (10 + step)).

    The second term, of which TensorFlow's ExponentialMovingAverage made a habit, lets the first steps, whose weights
    are still random, be forgotten soon. Parameters only: buffers are tables, or averages themselves (codebooks).
    A sharded model's average is sharded like it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """step: the one just taken, counted from 0; skipped: 1.0 on the device when it was left out, and then this
        changes nothing. The host waits for nothing."""
        share = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - skipped)
        for average, now in self._pairs():
            average.lerp_(now, share.to(now.dtype))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights, and afterwards with its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, now in self._pairs():
            kept = now.clone()
            now.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield _local(self.tensors[name]), _local(parameter.detach())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
