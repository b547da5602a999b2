"""Pseudo-labels: what is missing is added and marked, what is there stays, a failure rewrites nothing."""

import numpy as np
import pytest

from egom2p.data.clips import Clip, ClipIndex, read_clips, write_clips
from egom2p.datasets.pseudo import as_depth
from egom2p.signals.depth import relative_inverse_depth
from tests.conftest import run_cli


class Brightness:
    """Bright is near."""

    name = "brightness"
    calls = 0

    def inverse_depth(self, frames: np.ndarray) -> np.ndarray:
        Brightness.calls += 1
        return frames.mean(-1)


class Broken:
    name = "broken"

    def inverse_depth(self, frames: np.ndarray) -> np.ndarray:
        return np.full(frames.shape[:3], np.nan)


@pytest.fixture
def clips(world_clips, tmp_path):
    """Every third clip of the world without its depth."""
    read = list(read_clips(f"{world_clips}/*.tar"))
    for i, clip in enumerate(read):
        if i % 3 == 0:
            clip.signals.pop("depth", None)
    write_clips(tmp_path / "clips/shard-000000.tar", [Clip(c.key, c.dataset, c.signals,
                                                           {k: v for k, v in c.meta.items()
                                                            if k != "dataset"}) for c in read])
    return tmp_path / "clips"


def test_missing_depth_is_added_and_marked(clips):
    before = {c.key: c for c in read_clips(f"{clips}/*.tar")}
    without = [k for k, c in before.items() if "depth" not in c.signals]
    assert without
    Brightness.calls = 0
    done = run_cli("depth", "--clips", f"{clips}/*.tar", "--model", "tests.datasets.test_pseudo:Brightness")
    assert f"{len(without)} clips labelled, {len(before) - len(without)} had depth" in done.stdout
    after = {c.key: c for c in read_clips(f"{clips}/*.tar")}
    assert after.keys() == before.keys()
    for key, clip in after.items():
        for name, signal in before[key].signals.items():
            assert np.array_equal(signal, clip.signals[name])
        assert ("pseudo" in clip.meta) == (key in without)
        assert {k: v for k, v in clip.meta.items() if k != "pseudo"} == before[key].meta
    one = after[without[0]]
    assert one.meta["pseudo"] == {"depth": "brightness", "scale": "relative"}
    grey = one.signals["rgb"].mean(-1)
    assert np.abs(relative_inverse_depth(one.signals["depth"]) - (grey - grey.min()) / np.ptp(grey)).max() < 0.01
    assert Brightness.calls == len(without)
    run_cli("depth", "--clips", f"{clips}/*.tar", "--model",
            "tests.datasets.test_pseudo:Brightness")  # nothing is left to do
    assert Brightness.calls == len(without)


@pytest.mark.parametrize(("model", "words"), [("tests.datasets.test_pseudo:Broken", "not finite"),
                                              ("rollingdepth", "not importable"),
                                              ("video-depth-anything", "not importable"),
                                              ("nonesuch", "no such estimator"),
                                              ("tests.datasets.test_pseudo:nothing", "no such estimator")])
def test_failures_are_one_line_and_rewrite_nothing(clips, model, words):
    before = {p.name: p.read_bytes() for p in clips.glob("*.tar")}
    done = run_cli("depth", "--clips", f"{clips}/*.tar", "--model", model, check=False)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in clips.glob("*.tar")} == before
    assert len(ClipIndex(f"{clips}/*.tar")) == 16


def test_stored_depth_keeps_the_relative_inverse(rng):
    inverse = rng.random((4, 8, 8)) * 7 - 3
    depth = as_depth(inverse)
    assert depth.min() >= 0.49
    assert depth.max() <= 20.1
    assert np.abs(relative_inverse_depth(depth) - (inverse - inverse.min()) / np.ptp(inverse)).max() < 2e-3


def test_clips_without_video_are_neither_labelled_nor_rewritten(clips):
    path = next(clips.glob("*.tar"))
    read = list(read_clips(str(path)))
    write_clips(path, [Clip(c.key, c.dataset, {"cam": c.signals["cam"]}, c.meta) for c in read])
    before = path.stat().st_mtime_ns
    done = run_cli("depth", "--clips", f"{clips}/*.tar", "--model", "tests.datasets.test_pseudo:Brightness")
    assert "0 clips labelled, 0 had depth" in done.stdout and path.stat().st_mtime_ns == before
