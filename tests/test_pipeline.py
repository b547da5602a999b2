"""The whole pipeline in small, through the real commands; and generation from plain files."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from egom2p import EgoM2P, Pipeline
from egom2p.data.video import decode_video
from egom2p.errors import Preempted, UserError
from egom2p.modalities import ModalitySet
from egom2p.quickstart import _all_done, _Lane, _to_the_end
from egom2p.training.log import read_metrics
from tests.conftest import run_cli


def test_quickstart_leaves_results_and_report(finished_alone):
    out, _, _, printed = finished_alone
    results = json.loads((out / "results.json").read_text())
    for task, metrics in {"rgb2cam": ("ate_m", "rre_deg"), "rgb2gaze": ("gaze_mse",), "rgb2depth": ("abs_rel",),
                          "depth2rgb": ("psnr_db",)}.items():
        for metric in metrics:
            assert {"value", "baseline", "shuffled", "ceiling"} <= results[task][metric].keys()
            assert all(np.isfinite(results[task][metric][k]) for k in ("value", "baseline", "shuffled", "ceiling"))
    assert {"world", "tokenizers", "encode", "train", "evaluate", "report"} <= results["seconds"].keys()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "no problem" in printed
    assert "eval/loss/cam" in {k for m in read_metrics(out / "model") for k in m}


def test_a_video_that_is_not_there_is_said_before_an_hour_of_work(tmp_path):
    done = run_cli("quickstart", "--out", tmp_path / "out", "--inputs", tmp_path / "none.mp4", check=False)
    assert done.returncode == 2 and "there is no file" in done.stderr and not (tmp_path / "out").exists()


def test_quickstart_refuses_another_configuration(finished, tmp_path):
    out, config, _, _ = finished
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("clips: 40", "clips: 41"))
    done = run_cli("quickstart", "--out", out, "--config", other, check=False)
    assert done.returncode == 2
    assert "another configuration" in done.stderr


def test_generate_from_a_plain_video(finished, tmp_path):
    out, _, video, _ = finished
    done = run_cli("generate", out / "model", "--inputs", video, "--targets", "cam,gaze,depth,rgb", "--out", tmp_path)
    folder = tmp_path / "walk"  # 3 s of video: windows at 0 and at 1 s, joined
    assert str(folder) in done.stdout
    poses = np.load(folder / "cam.npy")
    assert poses.shape == (90, 4, 4)
    assert np.allclose(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3), atol=1e-5)
    tum = np.loadtxt(folder / "cam.tum")
    assert tum.shape == (90, 8)
    assert np.allclose(np.linalg.norm(tum[:, 4:], axis=1), 1, atol=1e-4)
    assert np.allclose(tum[:, 1:4], poses[:, :3, 3], atol=1e-5)
    assert np.load(folder / "gaze.npy").shape == (90, 3)
    assert np.load(folder / "depth.npy").shape == (24, 24, 24)
    assert decode_video(folder / "rgb.mp4")[0].shape == (24, 24, 24, 3)
    assert {p.name for p in folder.iterdir()} == {"preview.png", "generated.json", "depth.mp4", "rgb.mp4", "cam.npy",
                                                  "cam.tum", "cam_colmap", "gaze.npy", "depth.npy",
                                                  "cam_tokens.npy", "gaze_tokens.npy", "depth_tokens.npy",
                                                  "rgb_tokens.npy"}
    note = json.loads((folder / "generated.json").read_text())
    assert note["starts_s"] == [0.0, 1.0]
    assert note["drift"]["cam"]["joins"] == 1
    assert np.load(folder / "cam_tokens.npy").shape == (2, 30)


def test_another_recording_of_the_same_name_is_refused(finished, tmp_path):
    """As sessions of HoloAssist are, all of them Video_pitchshift.mp4: neither replaces the other's results."""
    out, _, video, _ = finished
    other = tmp_path / "b/walk.mp4"
    other.parent.mkdir()
    shutil.copy(video, other)
    words = ("generate", out / "model", "--targets", "gaze", "--out", tmp_path / "made", "--inputs")
    run_cli(*words, video)
    before = (tmp_path / "made/walk/gaze.npy").stat().st_mtime_ns
    done = run_cli(*words, other, check=False)
    assert done.returncode == 2 and f"holds the results of {video}" in done.stderr
    assert (tmp_path / "made/walk/gaze.npy").stat().st_mtime_ns == before
    run_cli(*words, video, "--seed", 1)
    assert (tmp_path / "made/walk/gaze.npy").stat().st_mtime_ns != before
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["walk"]


def test_an_export_without_recipes_says_so(finished, tmp_path):
    """Pushed over an older model, it must take that one's recipes away."""
    model = EgoM2P.from_pretrained(finished[0] / "model")
    assert model.generation
    model.generation = {}
    model.save_pretrained(tmp_path / "plain")
    run_cli("export", tmp_path / "plain", "--out", tmp_path / "bundle")
    assert (tmp_path / "bundle/generation.json").read_text() == "{}"
    assert EgoM2P.from_pretrained(tmp_path / "bundle").generation == {}


def test_a_run_behind_a_link_finds_its_tokenizers(finished, tmp_path):
    """runs -> scratch: paths beside the model are as they are from the real folder."""
    out = finished[0]
    (tmp_path / "scratch/deep").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    shutil.copytree(out / "tokenizers/gaze", tmp_path / "home/tok", symlinks=True)
    model = EgoM2P.from_pretrained(out / "model")
    entries = [replace(m, tokenizer=str(tmp_path / "home/tok") if m.name == "gaze" else "") for m in model.modalities]
    linked = tmp_path / "home/runs"
    linked.symlink_to(tmp_path / "scratch/deep")
    model.modalities = ModalitySet(entries)
    model.save_pretrained(linked / "m")
    found = EgoM2P.from_pretrained(linked / "m").modalities.by_name("gaze").tokenizer
    assert Path(found).is_dir() and Path(found) == (tmp_path / "home/tok").resolve()


@pytest.mark.slow
def test_compiled_generation_predicts_the_same(finished, tmp_path):
    out, _, video, _ = finished
    for folder, more in (("plain", []), ("compiled", ["--compile"])):
        run_cli("generate", out / "model", "--inputs", video, "--targets", "cam", "--recipe",
                "cfgs/generate/world.yaml", "--out", tmp_path / folder, *more)
    assert np.array_equal(np.load(tmp_path / "plain/walk/cam_tokens.npy"),
                          np.load(tmp_path / "compiled/walk/cam_tokens.npy"))
    assert np.allclose(np.load(tmp_path / "plain/walk/cam.npy"), np.load(tmp_path / "compiled/walk/cam.npy"), atol=1e-4)


def test_generate_from_token_files_and_with_a_released_recipe(finished, tmp_path):
    out, _, _, _ = finished
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, np.random.default_rng(0).integers(0, 4096, (5, 3, 3)).astype(np.int32))
    run_cli("generate", out / "model", "--inputs", tokens, "--recipe", "cfgs/generate/rgb2cam.yaml", "--out",
            tmp_path / "a")
    run_cli("generate", out / "model", "--inputs", tokens, "--recipe", "cfgs/generate/rgb2cam.yaml", "--out",
            tmp_path / "b")
    assert np.array_equal(np.load(tmp_path / "a/tokens/cam.npy"), np.load(tmp_path / "b/tokens/cam.npy"))
    note = json.loads((tmp_path / "a/tokens/generated.json").read_text())
    assert note["recipes"]["cam"]["guidance"] == 2.0


def test_a_stage_that_fails_is_named_and_leaves_no_process_behind(tmp_path, world_clips):
    (tmp_path / "bad.yaml").write_text("train: {steps: many}\n")
    endless = ["tokenizer", "train", "tokenizers/world_cam/config.yaml", f"data.clips={world_clips}/*.tar",
               f"run.dir={tmp_path / 'run'}", "train.threads=1", "train.steps=100000", "checkpoint.every=0"]
    bad = _Lane([["tokenizer", "train", str(tmp_path / "bad.yaml")]], tmp_path / "bad.log")
    lanes = [_Lane([endless], tmp_path / "endless.log"), bad]
    with (pytest.raises(UserError, match=r"egom2p tokenizer train .*bad.yaml failed: egom2p: missing key 'run'"),
          _to_the_end(lanes)):
        while not _all_done(lanes[:1]) and not read_metrics(tmp_path / "run"):
            time.sleep(0.05)
        while not _all_done(lanes):
            time.sleep(0.05)
    assert lanes[0].process.exitcode == Preempted.EXIT_CODE  # it saved
    assert list((tmp_path / "run/checkpoints").glob("step_*"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--targets", "sound"], "no modality 'sound'"), (["--targets", ""], "say what to predict"),
    (["--targets", "cam", "--modality", "gaze"], "not a picture modality")])
def test_generate_refuses_in_one_line(finished, tmp_path, arguments, words):
    out, _, video, _ = finished
    done = run_cli("generate", out / "model", "--inputs", video, *arguments, "--out", tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr


def test_generate_names_unreadable_inputs(finished, tmp_path):
    out = finished[0]
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04" + b"x" * 40)
    np.savez(tmp_path / "far.npz", np.full((5, 3, 3), 5000))
    for name, words in (("bad.mp4", "cannot be decoded"), ("bad.npz", "not a token file"), ("far.npz", "outside"),
                        ("empty.npz", "not a token file"), ("cut.npz", "not a token file"),
                        ("none.mp4", "no input file")):
        done = run_cli("generate", out / "model", "--inputs", tmp_path / name, "--targets", "cam", "--out",
                       tmp_path / "o", check=False)
        assert done.returncode == 2
        assert words in done.stderr


def test_eval_command(finished, tmp_path):
    out = finished[0]
    done = run_cli("eval", out / "model", "--tasks", "rgb2cam,rgb+depth2cam", "--data", f"{out}/clips/test/*.tar",
                   "--recipe", "cfgs/generate/world.yaml", "--out", tmp_path)
    assert "rgb+depth2cam" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    first = json.loads((out / "results.json").read_text())
    assert results["rgb2cam"]["ate_m"]["value"] == pytest.approx(first["rgb2cam"]["ate_m"]["value"], rel=1e-6)
    rows = json.loads((tmp_path / "clips.json").read_text())["rgb2cam"]
    assert len(rows["keys"]) == len(rows["rows"]["model"]["ate_m"]) == 12
    bad = run_cli("eval", out / "model", "--tasks", "rgb2nose", "--data", f"{out}/clips/test/*.tar", check=False)
    assert bad.returncode == 2
    assert "rgb2nose" in bad.stderr


def test_library_use(finished):
    """The README's example."""
    out, _, video, _ = finished
    pipeline = Pipeline.from_pretrained(out / "model")
    prediction = pipeline(video, targets=["cam", "depth"], samples=3)
    assert prediction.signals["cam"].shape == (90, 4, 4)
    assert prediction.rates == {"cam": 30.0, "depth": 8.0}
    assert "metres" in prediction.units["cam"]
    assert prediction.spread["cam"].shape == (90, 1)
    # Recipes of mean codes say the same in every draw; how far draws are apart is what the tokens say.
    assert prediction.spread["cam"].max() > 1e-4 and prediction.spread["depth"].max() > 1e-3
    assert [w.start for w in prediction.windows] == [0.0, 1.0]
    with pytest.raises(UserError, match="no export or checkpoint"):
        EgoM2P.from_pretrained(out / "nothing")


def test_real_recordings(finished, examples, tmp_path):
    """The authors' own example clips, from plain mp4 to files (quality is not the point here)."""
    out = finished[0]
    run_cli("generate", out / "model", "--inputs", examples / "rgb2dep_h2o.mp4", examples / "dep2rgb_holo.mp4",
            "--targets", "cam,gaze,depth", "--out", tmp_path)
    for name in ("rgb2dep_h2o", "dep2rgb_holo"):
        assert np.load(tmp_path / name / "cam.npy").shape == (60, 4, 4)
