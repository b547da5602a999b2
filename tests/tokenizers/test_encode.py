"""Clips -> shards: what is left out is said, and nothing is mixed."""

import json
import tarfile
import threading
import time

import numpy as np
import pytest
import torch

from egom2p.data.clips import Clip, write_clips
from egom2p.data.tokens import TokenDataset
from egom2p.distributed import World
from egom2p.errors import UserError
from egom2p.lock import FileLock
from egom2p.modalities import Modality, ModalitySet
from egom2p.tokenizers import encode
from egom2p.tokenizers.encode import EncodeArgs, encode_clips
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer
from tests.conftest import run_cli, run_ranks, start_torchrun


def tokenizer(name, kind, channels, seed=0):
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
    written = encode_clips([cam, eye], str(tmp_path / "clips.tar"), tmp_path / "tokens")
    unmeasured, absent = "its 'cam' carries no finite measurement", "has no 'cam'"
    assert written["cam"] == {"clips": 2, "left_out": {unmeasured: 1, absent: 1}}
    assert written["gaze"]["clips"] == 2
    assert f"'cam': 1 of 4 clips go without it: {unmeasured} (c1)" in caplog.text
    note = json.loads((tmp_path / "tokens/cam/set/encode.json").read_text())
    assert note["tokenizer"] == cam.fingerprint() and note["clips"] == str(tmp_path / "clips.tar")
    assert note["total"] == written["cam"]
    assert note["shards"]["shard-000000.tar"]["left_out"] == {unmeasured: ["c1"], absent: ["c2"]}
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
    assert encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens")["cam"]["clips"] == 3
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="tokens of other clips"):
        encode_clips([cam], str(tmp_path / "b.tar"), tmp_path / "tokens")
    with pytest.raises(UserError, match="tokens of other tokenizer"):
        encode_clips([tokenizer("cam", "pose", 9, seed=1)], str(tmp_path / "a.tar"), tmp_path / "tokens")


def test_two_clips_of_one_key_are_refused(tmp_path, rng):
    """Two folders of `prepare` may both hold a GX010001; modalities are paired by key."""
    for name in ("a", "b"):
        write_clips(tmp_path / f"{name}.tar", [clip(i, cam=poses(rng)) for i in range(2)])
    with pytest.raises(UserError, match=r"a\.tar and .*b\.tar both hold a clip c0 of 'set'"):
        encode_clips([tokenizer("cam", "pose", 9)], str(tmp_path / "*.tar"), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_shards_of_clips_that_are_gone_do_not_stay_unseen(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_CLIPS", 2)
    cam = tokenizer("cam", "pose", 9)
    write_clips(tmp_path / "a.tar", [clip(i, cam=poses(rng)) for i in range(5)])
    encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens")
    write_clips(tmp_path / "a.tar", [clip(i, cam=poses(rng)) for i in range(3)])
    with pytest.raises(UserError, match=r"shard-000002\.tar is of clips that are not among these"):
        encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens")
    (tmp_path / "tokens/cam/set/shard-000002.tar").unlink()
    assert encode_clips([cam], str(tmp_path / "a.tar"), tmp_path / "tokens")["cam"]["clips"] == 3


def of_two(rank):
    return World(rank, 2, rank, torch.device("cpu"))


def shards(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("shard-*.tar"))}


@pytest.fixture
def many(tmp_path, rng, monkeypatch):
    """Clips of two data sets over five tars, cut into shards of four; (pattern, tokenizers)."""
    monkeypatch.setattr(encode, "SHARD_CLIPS", 4)
    for tar in range(5):
        write_clips(tmp_path / f"clips/{tar}.tar",
                    [Clip(f"t{tar}c{i}", "ab"[tar % 2], {"cam": poses(rng), "gaze": np.ones((60, 3), np.float32)})
                     for i in range(3)])
    return str(tmp_path / "clips/*.tar"), [tokenizer("cam", "pose", 9), tokenizer("gaze", "gaze", 2)]


def test_shards_do_not_depend_on_processes_batches_and_workers(many, tmp_path):
    pattern, made = many
    encode_clips(made, pattern, tmp_path / "one", EncodeArgs(workers=0))
    reference = shards(tmp_path / "one")
    assert len(reference) == 2 * (3 + 2)  # 9 clips of a, 6 of b
    encode_clips(made, pattern, tmp_path / "two", EncodeArgs(workers=2, batch=3))
    assert shards(tmp_path / "two") == reference
    for rank in (1, 0):  # as two processes would, one after the other
        encode_clips(made, pattern, tmp_path / "ranks", EncodeArgs(workers=0), of_two(rank))
    assert shards(tmp_path / "ranks") == reference


def test_a_shard_that_another_process_is_at_is_left_to_it(many, tmp_path, monkeypatch):
    """Rank 1 goes without it; rank 0 waits until it is done, or takes it when its holder is gone."""
    pattern, made = many
    monkeypatch.setattr(encode, "POLL_S", 0.05)
    lock = FileLock(tmp_path / "out/cam/a/.shard-000001.tar.lock")
    assert lock.take()
    assert encode_clips(made, pattern, tmp_path / "out", EncodeArgs(workers=0), of_two(1)) == {}
    assert not (tmp_path / "out/cam/a/shard-000001.tar").exists()
    assert (tmp_path / "out/gaze/a/shard-000001.tar").exists()
    threading.Timer(1.0, lock.release).start()
    assert encode_clips(made, pattern, tmp_path / "out", EncodeArgs(workers=0))["cam"]["clips"] == 15
    assert not list(tmp_path.rglob("*.lock"))


def test_damage_costs_its_own_signal(tmp_path, rng):
    gaze = np.ones((60, 3), np.float32)
    write_clips(tmp_path / "clips.tar", [clip(i, cam=poses(rng), gaze=gaze) for i in range(3)])
    data = bytearray((tmp_path / "clips.tar").read_bytes())
    with tarfile.open(tmp_path / "clips.tar") as tar:
        start = tar.getmember("c1.cam.npy").offset_data
    data[start : start + 6] = b"broken"
    (tmp_path / "clips.tar").write_bytes(data)
    written = encode_clips([tokenizer("cam", "pose", 9), tokenizer("gaze", "gaze", 2)], str(tmp_path / "clips.tar"),
                           tmp_path / "tokens")
    assert written["gaze"] == {"clips": 3, "left_out": {}}
    assert written["cam"]["clips"] == 2
    (reason,) = written["cam"]["left_out"]
    assert reason.startswith("damaged")


def test_clips_written_again_alike_keep_their_shards_and_others_lose_them(tmp_path, rng, caplog):
    clips, cam = [clip(i, cam=poses(rng)) for i in range(3)], tokenizer("cam", "pose", 9)
    write_clips(tmp_path / "clips.tar", clips)
    encode_clips([cam], str(tmp_path / "clips.tar"), tmp_path / "tokens")
    shard = tmp_path / "tokens/cam/set/shard-000000.tar"
    before = shard.stat().st_mtime_ns
    write_clips(tmp_path / "clips.tar", clips)  # another time, the same bytes
    encode_clips([cam], str(tmp_path / "clips.tar"), tmp_path / "tokens")
    assert shard.stat().st_mtime_ns == before
    write_clips(tmp_path / "clips.tar", [clips[0], clip(1, cam=poses(rng)), clips[2]])
    encode_clips([cam], str(tmp_path / "clips.tar"), tmp_path / "tokens")
    assert shard.stat().st_mtime_ns != before and "have changed since it was encoded" in caplog.text


@pytest.mark.slow
def test_a_killed_job_goes_on_under_torchrun(finished, tmp_path):
    """Two processes, killed while they encode; started again they leave what one undisturbed process does."""
    out = finished[0]
    write_clips(tmp_path / "clips.tar", [Clip(f"{i:06d}", "many", {"cam": poses(np.random.default_rng(i))})
                                         for i in range(3000)])
    command = ("tokenizer", "encode", out / "tokenizers/cam", "--clips", tmp_path / "clips.tar", "--workers", 0,
               "--out")
    run_cli(*command, tmp_path / "whole")
    first = start_torchrun(2, *command, tmp_path / "tokens")
    while not list((tmp_path / "tokens").rglob("shard-*.tar")) and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert "cam: 3000 clips" in run_ranks(2, *command, tmp_path / "tokens")
    assert shards(tmp_path / "tokens") == shards(tmp_path / "whole")


def test_a_device_that_is_not_there_is_one_line(finished, tmp_path):
    done = run_cli("tokenizer", "encode", finished[0] / "tokenizers/cam", "--clips", finished[0] / "clips/test/*.tar",
                   "--out", tmp_path, "--device", "cuda:7", check=False)
    assert done.returncode == 2 and "--device cuda:7" in done.stderr


def test_compare_puts_tokenizers_side_by_side(finished):
    out = finished[0]
    both = (out / "tokenizers/cam", out / "tokenizers/cam/checkpoints/latest")
    table = run_cli("tokenizer", "compare", *both, "--clips", out / "clips/test/*.tar").stdout
    rows = {line[:16].strip(): line[16:].split() for line in table.splitlines()}
    assert rows[""] == ["cam", "latest"]
    assert rows["ate_m"][0] == rows["ate_m"][1] and float(rows["ate_m"][0]) > 0
    assert rows["bits a clip"] == ["237", "237"]  # 30 ids of 240: 30 log2(240) = 237.2
    other = run_cli("tokenizer", "compare", out / "tokenizers/cam", out / "tokenizers/gaze", "--clips",
                    out / "clips/test/*.tar", check=False)
    assert other.returncode == 2 and "different signals" in other.stderr
