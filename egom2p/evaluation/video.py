"""Picture metrics over (T, H, W, 3) uint8 frames."""

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr_db(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE) over the whole clip (capped at 100 for equal clips)."""
    mse = ((predicted.astype(np.float64) - reference.astype(np.float64)) ** 2).mean()
    return float(min(100.0, 10 * np.log10(255**2 / mse))) if mse > 0 else 100.0


def ssim(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, by torchmetrics."""
    p, r = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 255 for x in (predicted, reference))
    return float(structural_similarity_index_measure(p, r, data_range=1.0))
