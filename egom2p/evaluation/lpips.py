"""Learned perceptual distance of two clips."""

import numpy as np
import torch

from egom2p.tokenizers.perceptual import Lpips


def lpips(predicted: np.ndarray, reference: np.ndarray, network: Lpips) -> float:
    """Learned perceptual distance of two (T, H, W, 3) uint8 clips, mean over frames, lower is better."""
    p, r = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 127.5 - 1
            for x in (predicted, reference))
    return float(network(p, r).mean())
