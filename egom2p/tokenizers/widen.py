"""Head motion made wider for training: recorded or synthetic trajectories mirrored, shortened, re-mounted, and with
band-limited turning and swaying laid over them. What is drawn for a sample depends on (seed, its number) alone.
"""

import numpy as np

WAVES = 12
HERTZ = (0.15, 5.0)  # of the waves; more of them are slow, and their size goes with f ** -1.5
TURN = (0.02, 0.8)  # rad/s, root mean square over a clip of what is laid over each axis: log-uniform between
SWAY = (0.01, 0.4)  # m/s
MOUNT = 0.2  # rad, standard deviation of a fixed turn of the camera on the head, each axis
PACE = (0.2, 1.3)  # the path's length is multiplied by
PLAIN = 0.25  # share of clips without waves and mount


def widen(world_from_camera: np.ndarray, seed: int, numbers: np.ndarray, rate: float = 30.0) -> np.ndarray:
    """(B, T, 4, 4) poses of samples `numbers` -> others, relative to their first frame."""
    rngs = [np.random.Generator(np.random.Philox(key=[seed, int(n)])) for n in numbers]
    uniform = np.stack([rng.random(3 + 6 + 2 * 6 * WAVES) for rng in rngs])
    normal = np.stack([rng.standard_normal(3 + 6 * WAVES) for rng in rngs])
    poses = world_from_camera.astype(np.float64)
    rotation, centre = poses[..., :3, :3], poses[..., :3, 3]
    centre = (centre - centre[:, :1]) * (PACE[0] + (PACE[1] - PACE[0]) * uniform[:, 0])[:, None, None]
    centre = np.einsum("bji,btj->bti", rotation[:, 0], centre)
    rotation = rotation[:, :1].swapaxes(-1, -2) @ rotation
    on = (uniform[:, 1] >= PLAIN)[:, None, None]
    waves = _waves(uniform[:, 3:], normal[:, 3:], rotation.shape[1], rate) * on
    rotation = rotation @ _turns(waves[..., :3]) @ _turns(normal[:, None, :3] * MOUNT * on)
    centre = centre + waves[..., 3:]
    mirrored = np.where(uniform[:, 2] < 0.5, -1.0, 1.0)[:, None]
    mirror = np.concatenate([mirrored, np.ones_like(mirrored), np.ones_like(mirrored)], 1)
    first = rotation[:, :1].swapaxes(-1, -2)
    out = np.zeros((*rotation.shape[:2], 4, 4))
    out[..., :3, :3] = (first @ rotation) * mirror[:, None, :, None] * mirror[:, None, None, :]
    out[..., :3, 3] = (first @ centre[..., None])[..., 0] * mirror[:, None]
    out[..., 3, 3] = 1
    return out


def _waves(uniform: np.ndarray, normal: np.ndarray, num_frames: int, rate: float) -> np.ndarray:
    """(B, T, 6): turning about three axes (rad) and sway along them (m), 0 in the first frame."""
    size, rest = uniform[:, :6, None], uniform[:, 6:].reshape(-1, 2, 6, WAVES)
    frequency = HERTZ[0] + (HERTZ[1] - HERTZ[0]) * rest[:, 0] ** 1.5
    phase = 2 * np.pi * rest[:, 1]
    weight = normal.reshape(-1, 6, WAVES) * frequency**-1.5
    times = (np.arange(num_frames) / rate).astype(np.float32)
    angle = (2 * np.pi * frequency).astype(np.float32)[..., None] * times + phase.astype(np.float32)[..., None]
    waves = np.einsum("bcw,bcwt->bct", weight.astype(np.float32), np.sin(angle)).astype(np.float64)
    waves -= waves[..., :1]
    speed = np.sqrt((np.diff(waves, axis=-1) ** 2).mean(-1, keepdims=True)) * rate
    low, high = (np.log([[t] * 3 + [s] * 3])[..., None] for t, s in zip(TURN, SWAY, strict=True))
    return (waves / np.maximum(speed, 1e-9) * np.exp(low + (high - low) * size)).swapaxes(1, 2)


def _turns(vectors: np.ndarray) -> np.ndarray:
    """(..., 3) rotation vectors -> (..., 3, 3), Rodrigues' formula."""
    angle = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    x, y, z = np.moveaxis(vectors / angle, -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle)[..., None] * skew + (1 - np.cos(angle))[..., None] * (skew @ skew)
