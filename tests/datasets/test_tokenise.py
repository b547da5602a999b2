"""`egom2p tokens`: the samples of `prepare` and `tokenizer encode`, in one pass that can be stopped."""

import json

import numpy as np
import pytest

from egom2p.data.clips import ClipIndex
from egom2p.data.reading import open_tokens
from egom2p.datasets import tokenise as one_pass
from egom2p.modalities import Modality
from egom2p.signals.writers import write_video
from egom2p.tokenizers.video import VideoArgs, VideoTokenizer
from tests.conftest import run_cli


@pytest.fixture
def raw(tmp_path, rng):
    """Five videos of one to four clips, two of them for testing; (folder, tokenizer folder)."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(5):
        frames = rng.integers(0, 255, (16 * (1 + number), 32, 32, 3)).astype(np.uint8)
        write_video(folder / f"walk{number}.mp4", frames, 8)
    VideoTokenizer(Modality("rgb", 512, (5, 4, 4), "rgb"), VideoArgs(dim=16, depth=1)).save_pretrained(tmp_path / "tok")
    return folder, tmp_path / "tok"


def one(folder, tokenizer, tmp_path) -> tuple:
    return ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1, "--split",
            "train", "--tokenizers", tokenizer, "--group", 2)


def samples(root):
    return {key: grids["rgb"].tolist() for key, grids in open_tokens(root, "video").items()}


def test_one_pass_gives_the_samples_of_two_and_goes_on(raw, tmp_path, monkeypatch, capsys):
    folder, tokenizer = raw
    run_cli("prepare", "video", "--root", folder, "--out", tmp_path / "clips", "--size", 32, "--workers", 1, "--split",
            "train")
    run_cli("tokenizer", "encode", tokenizer, "--clips", tmp_path / "clips/*/*.tar", "--out", tmp_path / "two")
    command = one(folder, tokenizer, tmp_path)
    whole, calls = one_pass._encode_group, []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(*given)

    monkeypatch.setattr(one_pass, "_encode_group", breaks)
    assert run_cli(*command, check=False).returncode == 130
    assert len(calls) == 2
    done = run_cli(*command)
    assert len(calls) == 4  # the group it was at, and the last; not the first
    assert "video: 15 clips" in done.stdout
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    assert len(list((tmp_path / "one/rgb/video").glob("*.tar"))) == 3
    beside = tmp_path / "one-prepared"
    assert [str(p.relative_to(beside)) for p in beside.rglob("*.tar")] == ["sample/sample.tar"]
    assert len(ClipIndex(str(beside / "sample"))) == 5 and (beside / "contact_sheet.png").exists()


def test_a_recording_that_changed_is_encoded_anew(raw, tmp_path, rng):
    folder, tokenizer = raw
    command = one(folder, tokenizer, tmp_path)
    run_cli(*command)
    before = samples(tmp_path / "one")
    write_video(folder / "walk1.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    run_cli(*command)
    after = samples(tmp_path / "one")
    assert before.keys() == after.keys()
    assert {k.split("-")[0] for k in before if before[k] != after[k]} == {"walk1_mp4"}


def test_recordings_that_come_later_make_shards_of_their_own(raw, tmp_path, rng):
    """Sorted before the others or not, and whether those are still there or not."""
    folder, tokenizer = raw
    command = one(folder, tokenizer, tmp_path)
    run_cli(*command)
    before = samples(tmp_path / "one")
    write_video(folder / "again.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    run_cli(*command)
    both = samples(tmp_path / "one")
    assert {k: both[k] for k in before} == before and {k[:5] for k in both.keys() - before.keys()} == {"again"}
    for path in folder.glob("*.mp4"):
        path.unlink()
    write_video(folder / "more.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    said = run_cli(*command)
    last = samples(tmp_path / "one")
    assert {k: last[k] for k in both} == both and {k[:4] for k in last.keys() - both.keys()} == {"more"}
    assert "again.mp4 and 5 more: prepared before" in json.loads(
        (tmp_path / "one-prepared/card.json").read_text())["skipped"][-1], said.stdout
    write_video(folder / "walk1.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    refused = run_cli(*command, check=False)
    assert refused.returncode == 2 and "walk0.mp4 of it is not below" in refused.stderr


def test_a_change_is_not_forgotten_when_the_run_is_stopped(raw, tmp_path, rng, monkeypatch):
    folder, tokenizer = raw
    command = one(folder, tokenizer, tmp_path)
    run_cli(*command)
    before = samples(tmp_path / "one")
    write_video(folder / "walk1.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "_encode_group", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_cli(*command, check=False).returncode == 130
    run_cli(*command)
    after = samples(tmp_path / "one")
    assert {k.split("-")[0] for k in before if before[k] != after[k]} == {"walk1_mp4"}


def test_a_recording_that_fails_again_costs_its_group_nothing(raw, tmp_path, rng, monkeypatch):
    folder, tokenizer = raw
    (folder / "walk1.mp4").write_bytes((folder / "walk1.mp4").read_bytes()[:600])
    command = one(folder, tokenizer, tmp_path)
    assert run_cli(*command, check=False).returncode == 1
    before = samples(tmp_path / "one")
    assert not [k for k in before if k.startswith("walk1")]
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "_encode_group", lambda *given: pytest.fail("encoded anew"))
        assert run_cli(*command, check=False).returncode == 1
    write_video(folder / "walk1.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    run_cli(*command)
    after = samples(tmp_path / "one")
    assert {k: after[k] for k in before} == before and {k[:5] for k in after.keys() - before.keys()} == {"walk1"}


def test_other_groups_are_refused(raw, tmp_path):
    folder, tokenizer = raw
    command = ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1,
               "--tokenizers", tokenizer, "--group")
    run_cli(*command, 2)
    done = run_cli(*command, 3, check=False)
    assert done.returncode == 2 and "was begun with" in done.stderr


def test_a_split_that_empties_leaves_no_shard_behind(raw, tmp_path, rng):
    """One recording of a group is cut to nothing and the other leaves the split: their old tokens go, too."""
    folder, tokenizer = raw
    (folder / "val").mkdir()
    (folder / "walk1.mp4").rename(folder / "val/walk1.mp4")
    command = ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1,
               "--tokenizers", tokenizer, "--group", 5)
    run_cli(*command)
    assert len(open_tokens(tmp_path / "one", "video_val")) == 2
    write_video(folder / "val/walk1.mp4", rng.integers(0, 255, (4, 32, 32, 3)).astype(np.uint8), 8)
    run_cli(*command, check=False)
    assert not list((tmp_path / "one/rgb/video_val").glob("*.tar"))
    assert json.loads((tmp_path / "one/rgb/video_val/encode.json").read_text())["shards"] == {}
    assert len(open_tokens(tmp_path / "one", "video")) == 13


def test_a_folder_that_does_not_say_what_is_in_which_shard_is_refused(raw, tmp_path):
    command = one(*raw, tmp_path)
    run_cli(*command)
    note = tmp_path / "one-prepared" / one_pass.NOTE
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "groups"}))
    done = run_cli(*command, check=False)
    assert done.returncode == 2 and "older version" in done.stderr
