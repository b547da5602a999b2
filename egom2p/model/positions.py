"""Fixed sine-cosine position tables for grids of one to three axes and any even width.

Where the released model has a table ours equals it: one axis puts the sines first and the cosines after,
three axes give a third of the channels to each axis with sine and cosine interleaved.
"""

import numpy as np
import torch
from torch import Tensor

BASE = 10000.0


def position_table(grid: tuple[int, ...], dim: int, kind: str = "axes") -> Tensor:
    """(prod(grid), dim) float32. `dim` must be even; channels are dealt to the axes in even shares. kind `reviv`: see
    `reviv_table`."""
    if kind == "reviv":
        return reviv_table(grid, dim)
    if dim % 2:
        raise ValueError(f"a position table needs an even dim, not {dim}")
    if len(grid) == 1:
        angles = _angles(np.arange(grid[0]), dim // 2)
        return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32))
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    columns = [_interleaved(coordinates[:, axis], share) for axis, share in enumerate(_shares(dim, len(grid)))]
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))


def reviv_table(grid: tuple[int, ...], dim: int) -> Tensor:
    """ReViV's table for hands and body, whose tokens lie as (frames, groups) while the table is made for (groups,
    frames): row n has the angles of n // frames, then those of n % frames, sines before cosines."""
    if len(grid) != 2 or dim % 4:
        raise ValueError(f"a reviv position table needs a grid of two axes and a dim that divides by 4, not {grid}, "
                         f"{dim}")
    rows = np.arange(grid[0] * grid[1])
    parts = [f(_angles(n, dim // 4)) for n in (rows // grid[0], rows % grid[0]) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))


def _shares(dim: int, axes: int) -> list[int]:
    """Even channel counts that sum to dim, as equal as can be, the larger ones first."""
    pairs, extra = divmod(dim // 2, axes)
    return [2 * (pairs + (axis < extra)) for axis in range(axes)]


def _interleaved(position: np.ndarray, dim: int) -> np.ndarray:
    angles = _angles(position, dim // 2)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(len(position), dim)


def _angles(position: np.ndarray, half: int) -> np.ndarray:
    return position[:, None] / BASE ** (np.arange(half) / half)[None]
