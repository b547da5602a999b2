"""Learned perceptual distance of two clips."""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torchvision.models import alexnet

from egom2p.errors import UserError


class Lpips(nn.Module):
    """LPIPS, AlexNet, version 0.1 (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", CVPR 2018). (N, 3, H, W) pairs in [-1, 1] -> (N,) distances.

    The features are torchvision's AlexNet, whose ImageNet weights the user brings (nothing is downloaded); the trained
    linear layers come with torchmetrics.
    """

    TAPS = (1, 4, 7, 9, 11)  # the five ReLUs of torchvision's AlexNet

    def __init__(self, alexnet_weights: str | Path) -> None:
        super().__init__()
        network = alexnet(weights=None)
        network.load_state_dict(_state_dict(alexnet_weights))
        self.features = network.features
        linear = _state_dict(Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth")
        self.weights = nn.ParameterList(linear[f"lin{i}.model.1.weight"].flatten() for i in range(len(self.TAPS)))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        squares = ((x - y) ** 2 for x, y in zip(self._unit_features(a), self._unit_features(b), strict=True))
        parts = [torch.einsum("nchw,c->nhw", s, w).mean((1, 2)) for s, w in zip(squares, self.weights, strict=True)]
        return torch.stack(parts).sum(0)

    def _unit_features(self, x: Tensor) -> Iterator[Tensor]:
        x = (x - self.shift) / self.scale
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.TAPS:
                yield x / (x.pow(2).sum(1, keepdim=True) + 1e-8).sqrt()


def _state_dict(path: str | Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"LPIPS needs torchvision's AlexNet weights (alexnet-owt-7be5be79.pth); {path} is not "
                        "there") from error
    except (RuntimeError, UnpicklingError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a file of weights that torchvision publishes") from error


def lpips(predicted: np.ndarray, reference: np.ndarray, network: Lpips) -> float:
    """Learned perceptual distance of two (T, H, W, 3) uint8 clips, mean over frames, lower is better."""
    p, r = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 127.5 - 1
            for x in (predicted, reference))
    return float(network(p, r).mean())
