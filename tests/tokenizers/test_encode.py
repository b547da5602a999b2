"""Clips -> shards: what is left out is said, and nothing is mixed."""

import numpy as np
import pytest

from egom2p.data.clips import Clip, write_clips
from egom2p.data.tokens import TokenDataset
from egom2p.errors import UserError
from egom2p.modalities import Modality, ModalitySet
from egom2p.tokenizers.encode import encode_clips
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer


def tokenizer(name, kind, channels, seed=0):
    import torch

    torch.manual_seed(seed)
    return MotionTokenizer(Modality(name, 240, (30,), kind),
                           MotionArgs(60, (0.0,) * channels, (1.0,) * channels, 16, 1, 2, quantizer="fsq")).eval()


def clip(number, **signals):
    return Clip(f"c{number}", "set", signals)


def poses(rng):
    made = np.tile(np.eye(4, dtype=np.float32), (60, 1, 1))
    made[:, :3, 3] = rng.normal(size=(60, 3))
    return made


def test_unmeasured_signals_are_left_out_and_named(tmp_path, rng, caplog):
    nan = poses(rng)
    nan[3, 0, 3] = np.nan
    gaze = np.ones((60, 3), np.float32)
    half = gaze.copy()
    half[:20, 2] = 0
    blind = gaze * [1, 1, 0]
    write_clips(tmp_path / "clips.tar", [clip(0, cam=poses(rng), gaze=gaze), clip(1, cam=nan, gaze=half),
                                         clip(2, gaze=blind.astype(np.float32)), clip(3, cam=poses(rng))])
    cam, eye = tokenizer("cam", "pose", 9), tokenizer("gaze", "gaze", 2)
    assert encode_clips([cam, eye], str(tmp_path / "clips.tar"), tmp_path / "tokens") == {"cam": 2, "gaze": 2}
    assert "'cam': 1 of 3 clips carry no finite measurement" in caplog.text
    assert "c1" in caplog.text
    dataset = TokenDataset.open(tmp_path / "tokens", "set", "", ModalitySet([cam.modality, eye.modality]))
    assert dataset.keys == ["c0", "c1", "c3"]
    assert dataset.read(1).tokens.keys() == {1}
    assert (dataset.read(1).tokens[1][:10] == -1).all()
    assert (dataset.read(1).tokens[1][10:] >= 0).all()


def test_running_again_keeps_shards_and_mixing_is_refused(tmp_path, rng):
    for name in ("a", "b"):
        write_clips(tmp_path / f"{name}.tar", [clip(i, cam=poses(rng)) for i in range(3)])
    cam = tokenizer("cam", "pose", 9)
    encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens")
    shard = tmp_path / "tokens/cam/set/shard-000000.tar"
    before = shard.stat().st_mtime_ns
    assert encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens") == {"cam": 3}
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="tokens of other clips"):
        encode_clips([cam], str(tmp_path / "b.tar"), tmp_path / "tokens")
    with pytest.raises(UserError, match="tokens of other tokenizer"):
        encode_clips([tokenizer("cam", "pose", 9, seed=1)], str(tmp_path / "a.tar"), tmp_path / "tokens")
