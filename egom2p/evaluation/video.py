"""Picture metrics over (T, H, W, 3) uint8 frames."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from egom2p.errors import UserError


def psnr_db(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE) over the whole clip (capped at 100 for equal clips)."""
    mse = ((predicted.astype(np.float64) - reference.astype(np.float64)) ** 2).mean()
    return float(min(100.0, 10 * np.log10(255**2 / mse))) if mse > 0 else 100.0


def ssim(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    p, r = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 255 for x in (predicted, reference))
    return float(structural_similarity_index_measure(p, r, data_range=1.0))


def frechet_video_distance(predicted: Iterable[np.ndarray], reference: Iterable[np.ndarray],
                           features: Callable[[Tensor], Tensor]) -> float:
    """Frechet distance between two sets of clips (Unterthiner et al. 2018), lower is better.

    features: a video network, (1, 3, T, H, W) in [0, 1] -> (1, D); which one it is must be named beside the figure.
    Both sets need more than one clip; estimates are biased upwards for fewer clips than about D.
    """
    sets = []
    for clips in (predicted, reference):
        with torch.no_grad():
            videos = (torch.from_numpy(np.ascontiguousarray(c)).permute(3, 0, 1, 2)[None].float() / 255 for c in clips)
            rows = [features(video)[0].double().cpu().numpy() for video in videos]
        if len(rows) < 2:
            raise UserError("the Frechet distance needs at least two clips on each side")
        sets.append(np.stack(rows))
    return frechet_distance(*sets)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of (N, D) features (Dowson and Landau 1982)."""
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric.
    inner = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2
                 * np.sqrt(np.clip(inner, 0, None)).sum())
