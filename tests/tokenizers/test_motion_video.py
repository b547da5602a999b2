"""The tokenizers of our own: training through the real command, round trips, causality, codebook."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vector_quantize_pytorch import VectorQuantize

from egom2p import geometry, tokenizers
from egom2p.data.clips import read_clips, write_clips
from egom2p.errors import UserError
from egom2p.modalities import Modality
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer
from egom2p.tokenizers.quantize import EmaCodebook
from egom2p.tokenizers.video import VideoArgs, VideoTokenizer
from egom2p.training.log import read_metrics
from tests.conftest import run_cli, run_ranks

SMALL = ("train.steps=40", "train.batch_size=8", "log.every=10", "optim.warmup_steps=5", "eval.every=40",
         "eval.samples=8")


def train(name, clips, run, *overrides):
    run_cli("tokenizer", "train", f"tokenizers/world_{name}/config.yaml", f"data.clips={clips}/*.tar", f"run.dir={run}",
            *SMALL, *overrides)
    return tokenizers.load(run)


def test_an_exported_tokenizer_holds_the_average_of_its_weights(world_clips, tmp_path):
    """That of the second step, worked out from the first one's and the weights."""
    options = ("train.steps=2", "train.ema=0.5", "checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=0")
    train("gaze", world_clips, tmp_path, *options)
    first, averaged = (load_file(tmp_path / f"checkpoints/step_{n:08d}/model.safetensors") for n in (1, 2))
    last = load_file(tmp_path / "checkpoints/step_00000002/training.safetensors")
    name = "out.weight"
    share = 1 - min(0.5, 2 / 11)
    torch.testing.assert_close(averaged[name], first[name] + share * (last[name] - first[name]))
    assert not torch.equal(averaged[name], last[name])


@pytest.mark.parametrize("name", ["cam", "gaze", "rgb", "depth"])
def test_train_encode_decode(name, world_clips, tmp_path):
    overrides = ["tokenizer.modality.grid=[5,3,3]"] if name in ("rgb", "depth") else []
    tokenizer = train(name, world_clips, tmp_path, *overrides)
    metrics = read_metrics(tmp_path)
    assert metrics[-2]["error"] < 0.8 * metrics[0]["error"]
    assert {"codes_used", "perplexity"} <= metrics[0].keys()
    assert "eval/error" in metrics[-1]
    clip = next(c for c in read_clips(str(world_clips)) if name in c.signals)
    ids = tokenizer.encode(clip.signals[name])
    assert ids.shape == tokenizer.modality.grid
    back = tokenizer.decode(ids)
    assert back.shape == clip.signals[name].shape
    assert np.allclose(tokenizer.decode_from_codes(tokenizer.codes()[torch.from_numpy(ids.reshape(-1))]), back,
                       atol=1e-5)
    assert "mean_signal" in tokenizer.statistics
    if name == "cam":
        rotation = back[:, :3, :3]
        assert np.allclose(rotation @ np.swapaxes(rotation, 1, 2), np.eye(3), atol=1e-4)


def test_other_clips_of_the_same_number_are_no_resume(world_clips, tmp_path):
    clips = [c for c in read_clips(str(world_clips)) if "gaze" in c.signals]
    (tmp_path / "clips").mkdir()
    write_clips(tmp_path / "clips/a.tar", clips)
    train("gaze", tmp_path / "clips", tmp_path / "run", "train.steps=2", "eval.every=0")
    write_clips(tmp_path / "clips/a.tar", [replace(c, key=f"x{c.key[1:]}") for c in clips])
    done = run_cli("tokenizer", "train", "tokenizers/world_gaze/config.yaml", f"data.clips={tmp_path}/clips/*.tar",
                   f"run.dir={tmp_path / 'run'}", *SMALL, "train.steps=2", "eval.every=0", check=False)
    assert done.returncode == 2 and "resume.force" in done.stderr


def test_a_tokenizer_in_float64_and_wrong_numbers(world_clips, tmp_path):
    train("gaze", world_clips, tmp_path, "train.steps=2", "train.precision=float64")
    assert read_metrics(tmp_path)[-1]["step"] == 2
    for wrong in ("train.seed=-1", "train.micro_batch_size=-1", "eval.samples=0"):
        done = run_cli("tokenizer", "train", "tokenizers/world_gaze/config.yaml", wrong, check=False)
        assert done.returncode == 2 and "below 0" in done.stderr
    done = run_cli("train", "cfgs/train/debug.yaml", "init.freeze=all", check=False)
    assert done.returncode == 2 and "nothing to learn" in done.stderr


def test_wrong_ids_are_one_line(world_clips, tmp_path):
    tokenizer = train("cam", world_clips, tmp_path, "train.steps=1")
    for ids, words in ((np.zeros(29, int), "needs 30"), (np.full(30, 240), "0 .. 239")):
        with pytest.raises(UserError, match=words):
            tokenizer.decode(ids)


@pytest.mark.slow
def test_ema_codebook_two_processes_equal_one(world_clips, tmp_path):
    """Codebook statistics cover the global batch: same error curve on one and on two processes."""
    overrides = [f"data.clips={world_clips}/*.tar", *SMALL, "tokenizer.motion.quantizer=ema",
                 "tokenizer.motion.latent_dim=8", "train.steps=12",
                 "log.every=1", "eval.every=0"]
    for world in (1, 2):
        run_ranks(world, "tokenizer", "train", "tokenizers/world_cam/config.yaml", f"run.dir={tmp_path / str(world)}",
                  *overrides)
    one, two = ([m["error"] for m in read_metrics(tmp_path / str(w))] for w in (1, 2))
    assert one == pytest.approx(two, rel=1e-3)


def test_ema_lookup_agrees_with_vector_quantize_pytorch():
    """Where the two agree: the nearest code by cosine similarity, for unit codes."""
    torch.manual_seed(0)
    ours = EmaCodebook(32, 8).eval()
    theirs = VectorQuantize(dim=8, codebook_size=32, use_cosine_sim=True).eval()
    theirs._codebook.embed.copy_(ours.embed[None])
    latents = torch.randn(4, 30, 8)
    assert torch.equal(ours(latents)[1], theirs(latents)[1])


def test_ema_moves_codes_to_their_latents_and_revives_dead_ones():
    torch.manual_seed(0)
    book = EmaCodebook(16, 4, decay=0.5).train()
    centres = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    for step in range(60):
        book((centres[torch.randint(3, (64,))] + 0.01 * torch.randn(64, 4))[None])
        book.update(seed=0, step=step)
    book.eval()
    codes = book(centres[None])[0][0]
    assert torch.allclose(torch.nn.functional.normalize(codes, dim=-1), centres, atol=0.02)
    used = book(centres[torch.randint(3, (300,))][None])[1].unique()
    assert len(used) == 3


def test_gaze_ignores_what_invalid_frames_hold():
    tokenizer = MotionTokenizer(Modality("gaze", 240, (30,), "gaze"),
                                MotionArgs(60, (0.5, 0.5), (0.5, 0.5), 16, 1, 2, quantizer="fsq")).eval()
    gaze = np.random.default_rng(0).random((60, 3)).astype(np.float32)
    gaze[:, 2] = 1
    gaze[10:20, 2] = 0
    other = gaze.copy()
    other[10:20, :2] = np.nan
    assert np.array_equal(tokenizer.encode(gaze), tokenizer.encode(other))
    observed = tokenizer.observed(other)
    assert observed.tolist() == [not 5 <= i < 10 for i in range(30)]


def test_a_pose_with_nan_is_not_observed():
    tokenizer = MotionTokenizer(Modality("cam", 240, (30,), "pose"),
                                MotionArgs(60, (0.0,) * 9, (1.0,) * 9, 16, 1, 2, quantizer="fsq"))
    poses = np.tile(np.eye(4), (60, 1, 1))
    assert tokenizer.observed(poses).all()
    poses[7, 0, 3] = np.nan
    assert not tokenizer.observed(poses).any()


def test_any_series_is_a_modality():
    """A T x C signal of its own: heart rate and skin conductance, say."""
    tokenizer = MotionTokenizer(Modality("body", 64, (20,), "motion"),
                                MotionArgs(40, (70.0, 3.0), (10.0, 1.0), 16, 1, 2, quantizer="fsq", levels=(4, 4, 4)))
    signal = np.random.default_rng(0).normal([70, 3], [10, 1], (40, 2))
    assert tokenizer.decode(tokenizer.encode(signal)).shape == (40, 2)


@pytest.mark.parametrize(("frames", "height", "width"), [(16, 24, 24), (17, 32, 16), (13, 20, 30), (9, 8, 8)])
def test_video_of_any_size_is_causal(frames, height, width):
    torch.manual_seed(0)
    grid = (1 + -(-(frames - 1) // 4), -(-height // 8), -(-width // 8))
    tokenizer = VideoTokenizer(Modality("rgb", 4096, grid, "rgb"),
                               VideoArgs(frames, dim=16, depth=1, levels=(4,) * 6)).eval()
    video = torch.rand(2, 3, frames, height, width) * 2 - 1
    ids = tokenizer.encode_normalized(video)
    assert ids.shape == (2, *grid)
    assert tokenizer.decode_normalized(ids).shape[:3] == (2, 3, frames)
    before, _ = tokenizer._time_padding(frames)
    for latent in range(1, grid[0]):
        changed = video.clone()
        first_changed = 1 + 4 * (latent - 1) - before
        changed[:, :, max(0, first_changed) :] = torch.rand_like(changed[:, :, max(0, first_changed) :])
        if first_changed > 0:
            assert torch.equal(tokenizer.encode_normalized(changed)[:, :latent], ids[:, :latent])


def test_statistics_are_the_mean_training_signals(world_clips, tmp_path):
    tokenizer = train("cam", world_clips, tmp_path, "train.steps=1")
    nines = [geometry.pose_to_nine(geometry.relative_to_first(c.signals["cam"].astype(float)))
             for c in read_clips(str(world_clips))]
    assert np.allclose(tokenizer.statistics["mean_signal"], np.mean(nines, 0), atol=1e-5)
    lengths = [np.linalg.norm(np.diff(n[:, 6:], axis=0), axis=1).sum() for n in nines]
    assert tokenizer.statistics["mean_length"][0] == pytest.approx(np.mean(lengths), rel=1e-5)


def test_reconstruct_command(world_clips, tmp_path):
    train("gaze", world_clips, tmp_path, "train.steps=2")
    done = run_cli("tokenizer", "reconstruct", tmp_path, "--clips", f"{world_clips}/*.tar")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    tokenizer = tokenizers.load(tmp_path)
    gaze = [c.signals["gaze"] for c in read_clips(str(world_clips), {"gaze"}) if np.any(c.signals.get("gaze", 0))]
    errors = [((tokenizer.decode(tokenizer.encode(g))[:, :2] - g[:, :2])[g[:, 2] > 0] ** 2).mean() for g in gaze]
    figures = [float(value) for value in rows["gaze_mse"]]
    assert figures == pytest.approx([np.mean(errors), np.median(errors), np.max(errors)], abs=1e-5)
    used = {int(i) for g in gaze for i in tokenizer.encode(g)}
    assert done.stdout.splitlines()[-1] == f"{len(gaze)} clips, {len(used)} of 240 ids used"
