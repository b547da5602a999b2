"""Pictures in clip tars: depth comes back bit for bit, frames as the eye sees them, and both are small."""

import io
import json

import av
import numpy as np
import pytest

from egom2p.data.clips import Clip, ClipIndex, write_clips
from egom2p.data.storage import from_file, to_file
from egom2p.data.video import decode_video
from egom2p.evaluation.video import psnr_db
from tests.conftest import run_cli


def depth_like(frames):
    """Metres in float16 that follow the grey of frames, with holes."""
    grey = frames[..., 0].astype(np.float32)
    return np.where(grey < 3, 0, 6 / (1 + grey / 40)).astype(np.float16)


def test_float16_pictures_come_back_bit_for_bit(rng):
    bits = rng.integers(0, 2**16, (5, 31, 17)).astype(np.uint16).view(np.float16)  # infinities and NaN, too
    extension, data = to_file(bits, "mp4", 8.0)
    assert extension == "mkv"
    np.testing.assert_array_equal(from_file(extension, data).view(np.uint16), bits.view(np.uint16))


def test_only_pictures_become_films(rng):
    for array in (rng.random((60, 3)), np.zeros((60, 4, 4), np.float32), np.zeros((4, 8, 8), np.float32)):
        extension, data = to_file(array, "mp4", 30.0)
        assert extension == "npy"
        np.testing.assert_array_equal(from_file(extension, data), array)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (33, 51)])
def test_frames_of_any_size_keep_their_colours(size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    frame = np.stack([rows * 255 / size[0], columns * 255 / size[1], np.full(size, 128)], -1).astype(np.uint8)
    frames = np.stack([np.roll(frame, t, 1) for t in range(16)])
    extension, data = to_file(frames, "mp4", 8.0)
    back = from_file(extension, data)
    assert extension == "mp4" and back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 4.0


@pytest.mark.parametrize("rate", [8.0, 29.97])
@pytest.mark.parametrize("frames", [np.zeros((5, 16, 16, 3), np.uint8), np.zeros((5, 16, 16), np.float16)],
                         ids=["colour", "depth"])
def test_films_run_at_the_rate_of_their_signal(frames, rate):
    with av.open(io.BytesIO(to_file(frames, "mp4", rate)[1])) as film:
        assert float(film.streams.video[0].average_rate) == pytest.approx(rate, rel=1e-3)


def test_real_clips_take_a_tenth_of_the_bytes(examples, tmp_path):
    """The examples' frames (H2O) and depth (HoloAssist, its grey levels as metres) in one clip."""
    frames, depth = decode_video(examples / "rgb2dep_h2o.mp4")[0], decode_video(examples / "dep2rgb_holo.mp4")[0]
    clip = Clip("real", "real", {"rgb": frames, "depth": depth_like(depth)}, {"rates": {"rgb": 8.0, "depth": 8.0}})
    write_clips(tmp_path / "clips.tar", [clip], "mp4")
    assert (tmp_path / "clips.tar").stat().st_size < (frames.nbytes + clip.signals["depth"].nbytes) / 10
    back = ClipIndex(str(tmp_path / "clips.tar")).read(0)
    np.testing.assert_array_equal(back.signals["depth"], clip.signals["depth"])
    assert psnr_db(back.signals["rgb"], frames) > 38
    assert back.meta["rates"] == clip.meta["rates"]


def test_prepare_stores_what_is_asked_for_and_keeps_to_it(tmp_path, rng):
    from egom2p.signals.writers import write_video

    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw/walk.mp4", rng.integers(0, 255, (60, 48, 64, 3)).astype(np.uint8), 25)
    np.save(tmp_path / "raw/walk.depth.npy", rng.random((60, 48, 64)).astype(np.float32) + 1)
    for store, extension in (("mp4", "mkv"), ("npy", "npy")):
        out = tmp_path / store
        command = ("prepare", "video", "--root", tmp_path / "raw", "--out", out, "--size", 32, "--workers", 1)
        run_cli(*command, "--store", store)
        index = ClipIndex(str(out))
        assert f"depth.{extension}" in index.rows[0][2] and index.read(0).signals["depth"].dtype == np.float16
        run_cli(*command)  # what it was begun with
        assert json.loads((out / "prepare.json").read_text())["store"] == store
        other = run_cli(*command, "--store", {"mp4": "npy", "npy": "mp4"}[store], check=False)
        assert other.returncode == 2 and "was prepared with" in other.stderr
