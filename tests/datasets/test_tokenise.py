"""`egom2p tokens`: the samples of `prepare` and `tokenizer encode`, in one pass that can be stopped."""

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


def samples(root):
    return {key: grids["rgb"].tolist() for key, grids in open_tokens(root, "video").items()}


def test_one_pass_gives_the_samples_of_two_and_goes_on(raw, tmp_path, monkeypatch, capsys):
    folder, tokenizer = raw
    run_cli("prepare", "video", "--root", folder, "--out", tmp_path / "clips", "--size", 32, "--workers", 1, "--split",
            "train")
    run_cli("tokenizer", "encode", tokenizer, "--clips", tmp_path / "clips/*/*.tar", "--out", tmp_path / "two")
    command = ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1, "--split",
               "train", "--tokenizers", tokenizer, "--group", 2)
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
    command = ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1, "--split",
               "train", "--tokenizers", tokenizer, "--group", 2)
    run_cli(*command)
    before = samples(tmp_path / "one")
    write_video(folder / "walk1.mp4", rng.integers(0, 255, (32, 32, 32, 3)).astype(np.uint8), 8)
    run_cli(*command)
    after = samples(tmp_path / "one")
    assert before.keys() == after.keys()
    assert {k.split("-")[0] for k in before if before[k] != after[k]} == {"walk1_mp4"}


def test_other_groups_are_refused(raw, tmp_path):
    folder, tokenizer = raw
    command = ("tokens", "video", "--root", folder, "--out", tmp_path / "one", "--size", 32, "--workers", 1,
               "--tokenizers", tokenizer, "--group")
    run_cli(*command, 2)
    done = run_cli(*command, 3, check=False)
    assert done.returncode == 2 and "was begun with" in done.stderr
