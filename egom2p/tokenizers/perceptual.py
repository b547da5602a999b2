"""What a picture looks like to a network: a learned distance, and a critic that tells pictures from reconstructions."""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from egom2p.errors import UserError


class Lpips(nn.Module):
    """LPIPS, AlexNet, version 0.1 (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", CVPR 2018). (N, 3, H, W) pairs in [-1, 1] -> (N,) distances.

    The features are torchvision's AlexNet, whose ImageNet weights the user brings (nothing is downloaded); the trained
    linear layers come with torchmetrics.
    """

    TAPS = (1, 4, 7, 9, 11)  # the five ReLUs of torchvision's AlexNet

    def __init__(self, alexnet_weights: str | Path) -> None:
        import torchmetrics  # these two take two seconds to import
        from torchvision.models import alexnet

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


class Critic(nn.Module):
    """Scores patches of frames, high for true ones: (N, 3, H, W) in [-1, 1] -> (N, h, w). After PatchGAN (Isola et al.,
    CVPR 2017), without running statistics, so that a resumed training needs nothing but its weights."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)[:, 0]


def adversarial_loss(critic: Critic, true: Tensor, made: Tensor, weight: float) -> Tensor:
    """For (N, 3, H, W) frames: what the critic has to learn (the hinge loss) plus `weight` times what its judgement
    means for `made`. One backward pass serves both: the critic's gradient comes from the first part alone, that of
    `made` from the second, so one optimiser trains them side by side."""
    learnt = F.relu(1 - critic(true)).mean() + F.relu(1 + critic(made.detach())).mean()
    fixed = {name: p.detach() for name, p in critic.named_parameters()}
    return learnt - weight * functional_call(critic, fixed, (made,)).mean()
