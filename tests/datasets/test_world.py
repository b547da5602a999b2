"""The renderer's geometry: pictures, depth, poses and gaze are one consistent world."""

import filecmp

import numpy as np
import pytest

from egom2p import geometry
from egom2p.data.clips import count_clips, read_clips
from egom2p.datasets.world import BALL_COLOUR, intrinsics, make_clip, write_world
from egom2p.errors import UserError

SIZE = 64


def poses_of_video(clip):
    """Exact poses at the video's times; frames 0, 4, 8, 12 fall on motion samples 0, 15, 30, 45."""
    return {frame: clip.signals["cam"][frame * 15 // 4] for frame in (0, 4, 8, 12)}


def full_clips(count):
    clips = (make_clip(7, n, SIZE) for n in range(200))
    return [c for c in clips if {"depth", "gaze"} <= c.signals.keys()][:count]


def unproject(depth, pose):
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics(SIZE)).T
    points = rays * depth.astype(np.float64)[..., None]
    return points.reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]


def test_depth_reprojects_from_frame_to_frame():
    """A surface point seen in frame a lands in frame b at the depth b measured there, unless something is in front."""
    agree = []
    for clip in full_clips(6):
        poses = poses_of_video(clip)
        for a, b in ((0, 4), (4, 8), (8, 12)):
            world = unproject(clip.signals["depth"][a], poses[a].astype(np.float64))
            seen = (world - poses[b][:3, 3]) @ poses[b][:3, :3].astype(np.float64)
            pixel = geometry.project(np.c_[seen[:, :2], np.maximum(seen[:, 2:], 1e-6)], intrinsics(SIZE))
            inside = (seen[:, 2] > 0.1) & (pixel >= 0).all(1) & (pixel < SIZE).all(1)
            u, v = pixel[inside].astype(int).T
            measured = clip.signals["depth"][b][v, u].astype(np.float64)
            agree.append(np.abs(measured / seen[inside, 2] - 1) < 0.05)
    assert np.mean(np.concatenate(agree)) > 0.93


def test_gaze_is_the_projected_ball_and_the_ball_is_drawn_there():
    on_ball, errors = [], []
    for clip in full_clips(40):
        balls, fixated = np.array(clip.meta["balls"]), np.array(clip.meta["fixated"])
        jumps = np.flatnonzero(np.diff(fixated))
        for frame, pose in poses_of_video(clip).items():
            index = frame * 15 // 4
            gaze = clip.signals["gaze"][index]
            if not gaze[2] or np.any(np.abs(index - jumps) < 3):
                continue
            seen = geometry.invert(pose.astype(np.float64)) @ np.append(balls[fixated[index]], 1)
            errors.append(np.abs(geometry.project(seen[:3], intrinsics(1)) - gaze[:2]).max())
            column, row = (gaze[:2] * SIZE).astype(int)
            if 0 <= column < SIZE and 0 <= row < SIZE:
                colour = clip.signals["rgb"][frame, row, column].astype(float)
                on_ball.append(np.corrcoef(colour, BALL_COLOUR)[0, 1] > 0.95)
    assert len(errors) > 50
    assert max(errors) < 0.02
    assert np.mean(on_ball) > 0.9  # the rest is behind furniture


def test_poses_are_rigid_smooth_and_level():
    for clip in full_clips(10):
        pose = clip.signals["cam"].astype(np.float64)
        assert np.allclose(pose[:, :3, :3] @ np.swapaxes(pose[:, :3, :3], 1, 2), np.eye(3), atol=1e-5)
        assert np.linalg.det(pose[:, :3, :3]) == pytest.approx(1, abs=1e-5)
        velocity = np.diff(pose[:, :3, 3], axis=0) * 30
        assert np.abs(np.diff(velocity, axis=0)).max() < 0.25  # m/s a frame: no jumps
        assert (pose[:, 2, 1] < -0.5).all()  # the camera's down points to the floor


def test_clips_lack_signals_as_real_sets_do():
    clips = [make_clip(0, n, 8) for n in range(300)]
    for signal in ("depth", "gaze"):
        assert 0.04 < np.mean([signal not in c.signals for c in clips]) < 0.18
    dropped = [1 - c.signals["gaze"][:, 2].mean() for c in clips if "gaze" in c.signals]
    assert 0.01 < np.mean(dropped) < 0.3


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    for processes in (1, 2):
        write_world(tmp_path / str(processes), 260, seed=3, size=8, processes=processes)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        assert filecmp.cmp(tmp_path / "1" / shard, tmp_path / "2" / shard, shallow=False)
    assert count_clips(str(tmp_path / "1")) == 260


def test_round_trip_through_tars(world_clips):
    clip = next(read_clips(str(world_clips)))
    again = make_clip(5, 0, 24)
    assert clip.key == again.key
    assert clip.signals.keys() == again.signals.keys()
    assert all(np.array_equal(clip.signals[k], again.signals[k]) for k in clip.signals)
    assert clip.meta["intrinsics"] == intrinsics(24).tolist()


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1 clip"):
        write_world(tmp_path, 0)
    with pytest.raises(UserError, match="unknown signal 'sound'"):
        write_world(tmp_path, 1, without=("sound",))
