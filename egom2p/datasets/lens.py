"""Lens models, from their authors' formulas, and undistortion to a pinhole of the same intrinsics."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F


def distort_rational(rays: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(..., 2) pinhole rays x / z, y / z -> distorted ones. coefficients k1 k2 p1 p2 [k3 [k4 k5 k6]], OpenCV's rational
    model."""
    k1, k2, p1, p2, k3, k4, k5, k6 = np.pad(np.asarray(coefficients, np.float64).reshape(-1),
                                            (0, max(0, 8 - np.size(coefficients))))[:8]
    x, y = rays[..., 0], rays[..., 1]
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
                     y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], -1)


class Undistortion:
    """Frames of a real lens -> what a pinhole with the lens's own `intrinsics` would see, black outside."""

    def __init__(self, intrinsics: np.ndarray, width: int, height: int,
                 distort: Callable[[np.ndarray], np.ndarray]) -> None:
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
        seen = distort(rays[..., :2] / rays[..., 2:])
        pixels = np.concatenate([seen, np.ones_like(seen[..., :1])], -1) @ intrinsics.T
        grid = np.stack([2 * pixels[..., 0] / width - 1, 2 * pixels[..., 1] / height - 1], -1)
        self.grid = torch.from_numpy(grid.astype(np.float32))[None]
        self.slant = np.linalg.norm(rays / rays[..., 2:], axis=-1)

    def depth_along_rays(self, frame: np.ndarray) -> np.ndarray:
        """(H, W) distances along the lens's rays, 0 = no reading -> depth along the optical axis, nearest pixel."""
        picture = torch.from_numpy(np.ascontiguousarray(frame, np.float32))[None, None]
        out = F.grid_sample(picture, self.grid, mode="nearest", padding_mode="zeros", align_corners=False)[0, 0].numpy()
        return (out / self.slant).astype(np.float32)

    def depth_along_axis(self, frame: np.ndarray) -> np.ndarray:
        """(H, W) depth along the optical axis, 0 = no reading -> the same, moved to the pinhole's pixels, nearest."""
        return (self.depth_along_rays(frame) * self.slant).astype(np.float32)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> the same shape."""
        picture = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
        out = F.grid_sample(picture, self.grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return out[0].round().byte().permute(1, 2, 0).contiguous().numpy()


def distort_fisheye624(rays: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(..., 2) pinhole rays x / z, y / z -> distorted ones. coefficients k0..k5 p0 p1 s0..s3: six radial terms of the
    angle, two tangential, four of the thin prism (Project Aria's FisheyeRadTanThinPrism)."""
    k, p, s = np.split(np.asarray(coefficients, np.float64), [6, 8])
    radius = np.maximum(np.linalg.norm(rays, axis=-1, keepdims=True), 1e-12)
    angle = np.arctan(radius)
    bent = angle * (1 + sum(k[i] * angle ** (2 * i + 2) for i in range(6)))
    xy = rays / radius * bent
    square = (xy**2).sum(-1, keepdims=True)
    prism = np.concatenate([s[0] * square + s[1] * square**2, s[2] * square + s[3] * square**2], -1)
    return xy + 2 * (xy @ p)[..., None] * xy + square * p + prism
