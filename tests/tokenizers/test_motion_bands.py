"""The camera tokenizer's parts by hand: bands, the loss on motion, widened head motion."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from egom2p import geometry
from egom2p.datasets.world import make_clip
from egom2p.evaluation.camera import rre, rte
from egom2p.modalities import Modality
from egom2p.tokenizers.motion import POSE_SCALES, MotionArgs, MotionTokenizer, _Bands, pose_loss, rotations
from egom2p.tokenizers.widen import widen
from tests.conftest import run_cli


def random_poses(rng, clips=4, frames=60):
    """Smooth random trajectories, (B, T, 4, 4)."""
    poses = np.tile(np.eye(4), (clips, frames, 1, 1))
    turns = np.cumsum(0.02 * rng.standard_normal((clips, frames, 3)), 1)
    poses[..., :3, :3] = Rotation.from_rotvec(turns.reshape(-1, 3)).as_matrix().reshape(clips, frames, 3, 3)
    poses[..., :3, 3] = np.cumsum(0.02 * rng.standard_normal((clips, frames, 3)), 1)
    return poses


def nine(poses):
    return torch.from_numpy(geometry.pose_to_nine(poses)).float()


def test_bands_keep_what_they_are_made_for_and_are_smooth(rng):
    bands = _Bands(60, 8)
    torch.testing.assert_close(bands.basis.T @ bands.basis, torch.eye(8), atol=1e-5, rtol=0)
    times = torch.linspace(0, 1, 60)[None, :, None]
    x = 3 + 2 * times + 0.5 * torch.sin(3 * np.pi * times) - 0.2 * torch.sin(7 * np.pi * times)
    assert bands.analyse(x).shape == (1, 9, 1)
    torch.testing.assert_close(bands.synthesise(bands.analyse(x)), x, atol=1e-5, rtol=0)
    noise = torch.from_numpy(rng.standard_normal((2, 60, 3))).float()
    kept = bands.synthesise(bands.analyse(noise))
    torch.testing.assert_close(kept[:, 0], noise[:, 0])
    assert kept.diff(n=2, dim=1).abs().mean() < 0.1 * noise.diff(n=2, dim=1).abs().mean()


def test_rotations_are_those_of_the_geometry(rng):
    raw = rng.standard_normal((5, 7, 9))
    np.testing.assert_allclose(rotations(torch.from_numpy(raw)).numpy(), geometry.nine_to_pose(raw)[..., :3, :3],
                               atol=1e-9)


def test_the_loss_on_motion_by_hand(rng):
    poses = random_poses(rng)
    assert pose_loss(nine(poses), nine(poses)).item() == 0
    moved = poses.copy()
    moved[..., 0, 3] += 0.03  # everywhere: no motion is wrong, the places are
    assert pose_loss(nine(moved), nine(poses)).item() == pytest.approx((0.03 / 0.02) ** 2 / 100, rel=1e-3)
    still = np.tile(np.eye(4), (1, 60, 1, 1))
    drift = still.copy()
    drift[..., 2, 3] = 0.001 * np.arange(60)
    expected = (0.001**2 * (np.arange(60) ** 2).mean() / POSE_SCALES[0][0] ** 2
                + sum((0.001 * apart) ** 2 / POSE_SCALES[apart][0] ** 2 for apart in (1, 5, 15)))
    assert pose_loss(nine(drift), nine(still)).item() == pytest.approx(expected / 100, rel=1e-3)
    turned = still.copy()
    turned[..., :3, :3] = Rotation.from_euler("y", 0.001 * np.arange(60)[:, None]).as_matrix()
    small = pose_loss(nine(turned), nine(still)).item()  # the chord of a small angle is the angle
    expected = (0.001**2 * (np.arange(60) ** 2).mean() / POSE_SCALES[0][1] ** 2
                + sum((0.001 * apart) ** 2 / POSE_SCALES[apart][1] ** 2 for apart in (1, 5, 15)))
    assert small == pytest.approx(expected / 100, rel=2e-2)


def test_the_same_motion_seen_from_elsewhere_costs_the_same(rng):
    """Motion between frames does not depend on the world's axes: only the term of the poses themselves may differ."""
    made, truth = random_poses(rng), random_poses(rng)
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = Rotation.from_euler("xyz", [0.4, -1, 2]).as_matrix(), (1, 2, 3)
    here, there = pose_loss(nine(made), nine(truth)), pose_loss(nine(move @ made), nine(move @ truth))
    assert there.item() == pytest.approx(here.item(), rel=1e-4)
    assert rte(move @ made[0], move @ truth[0]) == pytest.approx(rte(made[0], truth[0]))


def test_widened_motion_is_rigid_wider_and_depends_on_the_sample_alone():
    poses = np.stack([make_clip(1, i, 8).signals["cam"] for i in range(24)])
    numbers = np.arange(100, 124)
    wide = widen(poses, 7, numbers)
    turn = wide[..., :3, :3]
    np.testing.assert_allclose(turn @ turn.swapaxes(-1, -2), np.broadcast_to(np.eye(3), turn.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-6)
    np.testing.assert_allclose(wide[:, 0], np.broadcast_to(np.eye(4), wide[:, 0].shape), atol=1e-6)
    np.testing.assert_array_equal(widen(poses[5:7], 7, numbers[5:7]), wide[5:7])
    assert not np.allclose(widen(poses, 8, numbers), wide)
    still = np.tile(np.eye(4), (60, 1, 1))
    assert np.mean([rre(p, still) for p in wide]) > 1.2 * np.mean([rre(p, still) for p in poses])
    speed = np.linalg.norm(np.diff(wide[..., :3, 3], axis=1), axis=-1) * 30
    assert speed.max() < 10


def test_a_tokenizer_of_bands_learns_one_batch_by_heart(rng):
    """Overfitted on 16 clips: far below the trivial error, and smooth between frames."""
    torch.manual_seed(0)
    args = MotionArgs(60, (0.9, 0, 0, 0, 0.9, 0, 0, 0, 0), (0.2,) * 9, 96, 2, 4, 1.0, quantizer="fsq", levels=(16, 15),
                      bands=12, loss="pose")
    tokenizer = MotionTokenizer(Modality("cam", 240, (30,), "pose"), args)
    poses = np.stack([make_clip(2, i, 8).signals["cam"] for i in range(16)])
    x = torch.from_numpy(np.stack([tokenizer.signal.normalize(p) for p in poses]))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        tokenizer.training_loss(x)[0].backward()
        optimizer.step()
    back = [tokenizer.decode(tokenizer.encode(p)) for p in poses]
    truth = [geometry.relative_to_first(p.astype(np.float64)) for p in poses]
    still = np.tile(np.eye(4), (60, 1, 1))
    for error in (rte, rre):
        assert np.mean([error(b, t) for b, t in zip(back, truth, strict=True)]) \
            < 0.35 * np.mean([error(still, t) for t in truth])


def test_bands_are_refused_where_they_make_no_sense():
    args = MotionArgs(60, (0.5, 0.5), (0.5, 0.5), 16, 1, 2, quantizer="fsq", bands=4)
    with pytest.raises(ValueError, match="without gaps"):
        MotionTokenizer(Modality("gaze", 240, (30,), "gaze"), args)


def test_only_head_motion_is_widened(world_clips, tmp_path):
    done = run_cli("tokenizer", "train", "tokenizers/world_gaze/config.yaml", f"data.clips={world_clips}/*.tar",
                   f"run.dir={tmp_path}", "data.widen=true", check=False)
    assert done.returncode == 2 and "data.widen is for head motion" in done.stderr


def test_a_tokenizer_is_not_compiled(world_clips, tmp_path):
    done = run_cli("tokenizer", "train", "tokenizers/world_cam/config.yaml", f"data.clips={world_clips}/*.tar",
                   f"run.dir={tmp_path}", "train.compile=true", check=False)
    assert done.returncode == 2 and "train.compile is for the masked transformer" in done.stderr
