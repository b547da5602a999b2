"""Long recordings: windows that cover everything, and joins that give back what was cut."""

import json

import numpy as np
import pytest

from egom2p import geometry
from egom2p.data.video import FrameStream, probe_video
from egom2p.generation.pipeline import Pipeline, cut
from egom2p.geometry import chordal_mean
from egom2p.signals.depth import DepthJoiner
from egom2p.signals.gaze import GazeJoiner
from egom2p.signals.kind import Joiner
from egom2p.signals.pose import PoseJoiner
from egom2p.signals.rgb import PictureJoiner
from egom2p.signals.writers import NpyWriter, write_video
from tests.conftest import run_cli
from tests.test_geometry import random_poses


@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 24, 28, 29, 40, 41, 64, 100, 101])
@pytest.mark.parametrize(("hop", "unit"), [(12, 4), (16, 4), (8, 1), (4, 4)])
def test_windows_cover_every_frame_once_or_in_overlaps(count, hop, unit):
    frames = [np.full((2, 2, 3), i % 256, np.uint8) for i in range(count)]
    windows = list(cut(iter(frames), 16, hop, unit))
    seen = np.zeros(count, int)
    last = -1
    for first, clip in windows:
        assert clip.shape == (16, 2, 2, 3)
        assert first % unit == 0
        assert first > last
        assert last < 0 or first - last <= hop
        last = first
        for i, frame in enumerate(clip):
            assert frame[0, 0, 0] == min(first + i, count - 1) % 256
            if first + i < count:
                seen[first + i] += 1
    assert (seen > 0).all()
    assert windows[-1][0] + 16 - count < max(unit, 16 - count + 1)


def pieces(signal: np.ndarray, length: int, hop: int):
    return [(s, signal[s : s + length]) for s in range(0, len(signal) - length + 1, hop)]


def joined(joiner: Joiner, parts) -> np.ndarray:
    return np.concatenate([*(joiner.add(s, w) for s, w in parts), joiner.end()])


def test_trajectories_come_back_whatever_frame_each_window_is_in(rng):
    steps = random_poses(rng, 240)
    steps[:, :3, 3] *= 0.01
    steps[:, :3, :3] = chordal_mean(np.eye(3) + 0.02 * (steps[:, :3, :3] - np.eye(3)))
    poses = np.eye(4)[None].repeat(240, 0)
    for i in range(1, 240):
        poses[i] = poses[i - 1] @ steps[i]
    parts = [(s, geometry.relative_to_first(w)) for s, w in pieces(poses, 60, 45)]
    joiner = PoseJoiner()
    back = joined(joiner, parts)
    assert np.allclose(back, geometry.relative_to_first(poses), atol=1e-9)
    assert len(joiner.drift) == 4
    assert np.max(joiner.drift) < 1e-6
    noisy = [(s, w + rng.normal(0, 0.01, w.shape) * np.array([[0, 0, 0, 1]] * 3 + [[0] * 4])) for s, w in parts]
    joiner = PoseJoiner()
    back = joined(joiner, noisy)
    assert 0.001 < np.mean([m for m, _ in joiner.drift]) < 0.05
    assert np.allclose(np.linalg.det(back[:, :3, :3]), 1)


def test_depth_scales_are_fitted_on_the_overlap(rng):
    depth = rng.random((40, 6, 6)) + np.linspace(0, 1, 40)[:, None, None]
    parts = [(s, w * rng.uniform(0.5, 2) + rng.uniform(-1, 1)) if s else (s, w) for s, w in pieces(depth, 16, 12)]
    assert np.allclose(joined(DepthJoiner(), parts), depth, atol=1e-9)
    flat = [(s, np.zeros((16, 2, 2))) for s in (0, 12, 24)]
    assert np.isfinite(joined(DepthJoiner(), flat)).all()


def test_noise_does_not_flatten_depth_join_by_join(rng):
    """Five minutes of windows that agree to .97 with their neighbours, each in a scale of its own: least squares slopes
    would leave a third of the first window's scale, at its bound."""
    base = rng.random((1, 8, 8)) + 0.3 * rng.standard_normal((2400, 8, 8)).cumsum(0) / 50
    noise = np.sqrt(1 / 0.97 - 1) * base.std()
    parts = []
    for start, window in pieces(base, 16, 12):
        noisy = window + noise * rng.standard_normal(window.shape)
        parts.append((start, noisy * rng.uniform(0.5, 2) + rng.uniform(-1, 1) if start else noisy))
    back = joined(DepthJoiner(), parts)
    slope = np.polyfit(base[-200:].ravel(), back[-200:].ravel(), 1)[0]
    assert 0.7 < slope < 1.4, slope


def test_gaze_pictures_and_numbers_blend(rng):
    gaze = np.concatenate([rng.random((120, 2)), np.ones((120, 1))], 1)
    assert np.allclose(joined(GazeJoiner(), pieces(gaze, 60, 30)), gaze)
    frames = rng.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
    back = joined(PictureJoiner(), pieces(frames, 16, 12))
    assert back.dtype == np.uint8
    assert np.array_equal(back, frames)
    ramp = joined(Joiner(), [(0, np.zeros((6, 1))), (3, np.ones((6, 1)))])
    assert np.allclose(ramp[:, 0], [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_growing_npy_is_an_ordinary_one(tmp_path, rng):
    for shape, dtype in (((4, 4), np.float32), ((3,), np.float64), ((), np.int32), ((2, 3, 4), np.uint8)):
        parts = [(rng.random((n, *shape)) * 100).astype(dtype) for n in (2, 0, 5)]
        writer = NpyWriter(tmp_path / "x.npy")
        for part in parts:
            writer.append(part)
        writer.close()
        back = np.load(tmp_path / "x.npy")
        assert back.dtype == dtype
        assert np.array_equal(back, np.concatenate(parts))


@pytest.mark.parametrize(("rate", "seconds"), [(25, 5), (30, 3), (8, 4), (5, 4), (60, 2)])
def test_streamed_frames_are_the_nearest_in_time(tmp_path, rate, seconds):
    """Each frame of the source holds its own number as grey level."""
    count = rate * seconds
    frames = np.repeat(np.linspace(20, 235, count).astype(np.uint8)[:, None, None, None], 32,
                       1).repeat(32, 2).repeat(3, 3)
    write_video(tmp_path / "v.mp4", frames, rate)
    got = np.array([f.mean() for f in FrameStream(tmp_path / "v.mp4", 8, 16)])
    assert len(got) == 8 * seconds
    assert probe_video(tmp_path / "v.mp4") == pytest.approx(seconds, abs=0.1)
    nearest = frames[np.clip(np.round(np.arange(len(got)) / 8 * rate - 1e-6).astype(int), 0, count - 1), 0, 0, 0]
    step = 215 / count
    assert np.abs(got - nearest).max() < 1.01 * step + 3


def test_a_long_recording_in_constant_memory(finished, tmp_path):
    """Forty seconds at 25 fps: no more than one window's frames are ever held, and the files are whole."""
    out = finished[0]
    rng = np.random.default_rng(0)
    write_video(tmp_path / "day.mp4", np.kron(rng.integers(0, 255, (1000, 8, 8, 3)),
                                              np.ones((1, 4, 4, 1))).astype(np.uint8), 25)
    pipeline = Pipeline.from_pretrained(out / "model")
    held = [w.start for w in pipeline.windows(tmp_path / "day.mp4", ["cam"])]
    assert held == [1.5 * i for i in range(len(held) - 1)] + [38.0]
    run_cli("generate", out / "model", "--inputs", tmp_path / "day.mp4", "--targets", "cam,gaze,depth", "--samples", 2,
            "--overlap", 1, "--out", tmp_path)
    folder = tmp_path / "day"
    assert np.load(folder / "cam.npy").shape == (1200, 4, 4)
    assert np.load(folder / "gaze.npy").shape == (1200, 3)
    assert np.load(folder / "depth.npy").shape == (320, 24, 24)
    assert np.load(folder / "cam_spread.npy").shape == (1200, 1)
    spread = np.load(folder / "depth_spread.npy")
    assert spread.shape[0] == 320 and 0 < spread.max() < 1  # two draws of something in [0, 1]
    note = json.loads((folder / "generated.json").read_text())
    assert note["windows"] == 39
    assert note["drift"]["cam"]["joins"] == 38
    assert note["samples"] == 2
    assert not list(folder.glob("*.part"))
