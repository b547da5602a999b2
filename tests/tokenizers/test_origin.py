"""Tokens know their tokenizer: what does not belong together is refused when train, check, generate or eval start."""

import json
import shutil

import numpy as np
import pytest

from egom2p import EgoM2P, Pipeline
from egom2p.data import open_tokens
from egom2p.data.clips import ClipIndex
from egom2p.errors import UserError
from egom2p.tokenizers import load
from egom2p.tokenizers.origin import origins_of
from tests.conftest import run_cli


def training(out, run, *more):
    """`egom2p train` for two steps on the tokens of the finished quickstart."""
    tokenizers = [f"modalities.{n}.tokenizer={out}/tokenizers/{n}" for n in ("rgb", "depth", "cam", "gaze")]
    return ("train", "cfgs/train/quickstart.yaml", f"run.dir={run}", f"data.root={out}/tokens", *tokenizers,
            "modalities.rgb.grid=[5,3,3]", "modalities.depth.grid=[5,3,3]", "masking.input_tokens=45", "train.steps=2",
            "train.batch_size=4", "eval.every=2", "eval.samples=4", "checkpoint.every=2", *more)


@pytest.fixture(scope="module")
def other_cam(finished, tmp_path_factory):
    """A camera tokenizer of the same shape, and not the same."""
    folder = tmp_path_factory.mktemp("other") / "cam"
    run_cli("tokenizer", "train", "tokenizers/world_cam/config.yaml", f"data.clips={finished[0]}/clips/held_out/*.tar",
            f"run.dir={folder}", "train.steps=1", "train.batch_size=4", "eval.every=0", "train.seed=9")
    return folder


@pytest.fixture(scope="module")
def other_tokens(finished, other_cam, tmp_path_factory):
    """The quickstart's tokens, but cam of the set `walks` made by the other tokenizer."""
    root = tmp_path_factory.mktemp("mixed") / "tokens"
    shutil.copytree(finished[0] / "tokens", root)
    shutil.rmtree(root / "cam/walks")
    run_cli("tokenizer", "encode", other_cam, "--clips", f"{finished[0]}/clips/train/walks/*.tar", "--out", root)
    return root


def test_a_model_remembers_which_tokenizers_made_its_tokens(finished):
    out = finished[0]
    model = EgoM2P.from_pretrained(out / "model")
    assert model.origins == {n: load(out / "tokenizers" / n).fingerprint() for n in ("rgb", "depth", "cam", "gaze")}


def test_an_exported_bundle_still_fits(finished, tmp_path):
    run_cli("export", finished[0] / "model", "--out", tmp_path / "bundle")
    assert Pipeline.from_pretrained(tmp_path / "bundle").encode(finished[2]).features.shape[1:] == (45, 128)


@pytest.mark.parametrize("wrong, said", [
    ("{other}", "did not make the tokens of 'cam'"),
    ("{out}/tokenizers/gaze", "is for gaze, but 'cam' is pose"),
    ("{out}/nowhere", "no export or checkpoint there"),
])
def test_training_refuses_a_tokenizer_that_is_not_the_one(finished, other_cam, tmp_path, wrong, said):
    name = wrong.format(other=other_cam, out=finished[0])
    done = run_cli(*training(finished[0], tmp_path / "run", f"modalities.cam.tokenizer={name}"), check=False)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_refuses_tokens_of_two_tokenizers(finished, other_tokens, tmp_path):
    done = run_cli(*training(finished[0], tmp_path / "run", f"data.root={other_tokens}"), check=False)
    assert done.returncode == 2
    assert f"{other_tokens}/cam/rooms" in done.stderr and f"{other_tokens}/cam/walks" in done.stderr


def test_shards_check_names_them_too(finished, other_tokens):
    assert run_cli("shards", "check", finished[0] / "tokens").returncode == 0
    done = run_cli("shards", "check", other_tokens, check=False)
    assert done.returncode == 1 and "'cam'" in done.stdout and "different tokenizers" in done.stdout
    assert "1 problem" in done.stdout


def test_a_run_does_not_go_on_when_its_tokens_were_made_anew(finished, other_cam, tmp_path):
    """Same clips, same keys, same sizes: only the note says that the ids mean something else now."""
    root, run = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(finished[0] / "tokens", root)
    without = [*(f"modalities.{n}.tokenizer=''" for n in ("rgb", "depth", "cam", "gaze")), "init.codes=false",
               "loss.near_codes=0", "loss.near_modalities=[]"]
    run_cli(*training(finished[0], run, f"data.root={root}", *without))
    for name in ("rooms", "walks", "held_out"):
        shutil.rmtree(root / "cam" / name)
        clips = finished[0] / "clips" / (name if name == "held_out" else f"train/{name}")
        run_cli("tokenizer", "encode", other_cam, "--clips", clips, "--out", root)
    done = run_cli(*training(finished[0], run, f"data.root={root}", *without, "train.steps=4"),
                   check=False)
    assert done.returncode == 2 and "the data changed" in done.stderr


def test_a_start_from_a_model_of_other_tokens_is_refused(finished, other_cam, tmp_path):
    root = tmp_path / "tokens"
    for name in ("rooms", "walks", "held_out"):
        clips = finished[0] / "clips" / (name if name == "held_out" else f"train/{name}")
        run_cli("tokenizer", "encode", other_cam, "--clips", clips, "--out", root)
    done = run_cli(*training(finished[0], tmp_path / "run", f"data.root={root}",
                             f"modalities.cam.tokenizer={other_cam}", f"init.from={finished[0]}/model"), check=False)
    assert done.returncode == 2 and "made by another tokenizer" in done.stderr


def test_generate_and_eval_refuse_another_tokenizer(finished, other_cam, tmp_path):
    run_cli("export", finished[0] / "model", "--out", tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle/config.json").read_text())
    config["modalities"]["cam"]["tokenizer"] = str(other_cam)
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    for command in (("generate", tmp_path / "bundle", "--inputs", finished[2], "--targets", "cam", "--out",
                     tmp_path / "made"),
                    ("eval", tmp_path / "bundle", "--tasks", "rgb2cam", "--data", finished[0] / "clips/test")):
        done = run_cli(*command, check=False)
        assert done.returncode == 2 and "is not the one whose tokens the model learnt" in done.stderr


def test_a_modality_without_tokens_is_named(finished, tmp_path, caplog):
    extra = "modalities.hands={vocab_size: 16, grid: [30], signal: motion}"
    run_cli(*training(finished[0], tmp_path / "run", extra))
    assert "no data set has tokens of hands" in caplog.text


def test_tokens_are_read_by_hand_as_training_reads_them(finished):
    out = finished[0]
    tokens = open_tokens(out / "tokens", "rooms")
    assert len(tokens) == 40 and tokens.modalities == ["cam", "depth", "gaze", "rgb"]
    index, cam = ClipIndex(str(out / "clips/train/rooms")), load(out / "tokenizers/cam")
    clip = index.read(7)
    assert np.array_equal(tokens[clip.key]["cam"], cam.encode(clip.signals["cam"]))
    assert tokens[clip.key]["rgb"].shape == (5, 3, 3)
    with pytest.raises(UserError, match="held_out, rooms, walks"):
        open_tokens(out / "tokens")


def test_folders_without_a_note_say_nothing(tmp_path):
    assert origins_of([("cam", tmp_path)]) == {}
