"""`egom2p eval`: ranks, resuming, plots, protocols; and evaluation during training."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from egom2p import tokenizers
from egom2p.config import load
from egom2p.data.clips import Clip, ClipIndex, read_clips, write_clips
from egom2p.data.tarindex import index_tars
from egom2p.errors import UserError
from egom2p.evaluation.gaze import gaze_mse
from egom2p.evaluation.lpips import lpips
from egom2p.evaluation.run import ProtocolConfig, evaluate, evaluate_to, reconstruct
from egom2p.evaluation.video import frechet_distance, frechet_video_distance
from egom2p.generation.schedule import TargetArgs
from egom2p.modalities import Modality
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.perceptual import Lpips
from egom2p.tokenizers.video import VideoArgs, VideoTokenizer
from egom2p.training.log import read_metrics
from tests.conftest import ROOT, run_cli, run_ranks


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Forty clips of the size the tiny quickstart was trained on: three blocks."""
    from egom2p.datasets.world import write_world

    folder = tmp_path_factory.mktemp("eval")
    write_world(folder, 40, seed=9, size=24, processes=1)
    return f"{folder}/*.tar"


def command(model, clips, out, *more):
    return ["eval", str(model), "--tasks", "rgb2cam,rgb2depth", "--data", clips, "--recipe", "cfgs/generate/world.yaml",
            "--out", str(out), *more]


def test_ranks_share_the_clips_and_agree(finished, clips, tmp_path):
    model = finished[0] / "model"
    run_cli(*command(model, clips, tmp_path / "one"))
    assert run_ranks(2, *command(model, clips, tmp_path / "two")).count("rgb2cam      ate_m") == 1
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    for task in ("rgb2cam", "rgb2depth"):
        for metric, figures in one[task].items():
            assert two[task][metric]["clips"] == figures["clips"] > 30 or "sim3" in metric  # some have no scale
            for name in ("value", "baseline", "shuffled", "ceiling"):
                assert two[task][metric][name] == pytest.approx(figures[name], rel=1e-4)
    written = [line for p in (tmp_path / "two/rows").glob("*.jsonl") for line in p.read_text().splitlines()]
    assert len(written) == 80
    assert len(list((tmp_path / "two/rows").glob("*.jsonl"))) == 2
    for name in ("rgb2cam_errors", "rgb2cam_best", "rgb2cam_median", "rgb2cam_worst", "rgb2depth_errors"):
        assert (tmp_path / "one" / f"{name}.png").stat().st_size > 5000


def test_a_stopped_evaluation_goes_on_where_it_was(finished, clips, tmp_path, monkeypatch):
    model = EgoM2P.from_pretrained(finished[0] / "model")
    protocol = ProtocolConfig(("rgb2cam",), clips)
    whole = evaluate_to(tmp_path / "whole", model, protocol)
    rows = (tmp_path / "whole/rows/0-of-1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part/rows").mkdir(parents=True)
    cut_off = "".join(rows[:17]) + rows[17][:40]  # one block and a bit; a line cut off
    (tmp_path / "part/rows/0-of-1.jsonl").write_text(cut_off)
    calls = []
    import egom2p.evaluation.run as run

    real = run.predict
    monkeypatch.setattr(run, "predict", lambda *a: calls.append(a[-1]) or real(*a))
    again = evaluate_to(tmp_path / "part", model, protocol)
    assert again.summary == whole.summary
    written = [line for line in (tmp_path / "part/rows/0-of-1.jsonl").read_text().splitlines() if line]
    assert sum(_is_json(line) for line in written) == len(written) - 1  # the half line spoilt no other
    assert sum(len(keys) for keys in calls[::2]) <= 24 + 24 + 3  # the blocks that were missing, and three clips drawn
    other = evaluate_to(tmp_path / "part", model, ProtocolConfig(("rgb2cam",), clips, seed=3, limit=20))
    assert other.summary["rgb2cam"]["ate_m"]["clips"] == 20


def _is_json(line: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(line))
    return False


@pytest.mark.slow
def test_a_sharded_model_is_evaluated_while_it_trains(finished, clips, tmp_path):
    """FSDP2 on two ranks: figures of a task as those of the checkpoint, evaluated by itself."""
    shutil.copy(finished[0] / "model/config.yaml", tmp_path / "c.yaml")
    run_ranks(2, "train", tmp_path / "c.yaml", f"run.dir={tmp_path / 'run'}", "train.parallel=fsdp", "train.steps=4",
              "optim.warmup_steps=0", "eval.every=4", "eval.tasks=[rgb2cam]", f"eval.clips='{clips}'",
              "eval.task_clips=4")
    (figure,) = [r["eval/rgb2cam/ate_m"] for r in read_metrics(tmp_path / "run") if "eval/rgb2cam/ate_m" in r]
    recipes = {"cam": TargetArgs(**EgoM2P.from_pretrained(tmp_path / "run").generation["cam"])}
    alone = evaluate(EgoM2P.from_pretrained(tmp_path / "run"), ["rgb2cam"], clips, recipes, 4)
    assert figure == pytest.approx(alone.summary["rgb2cam"]["ate_m"]["value"], rel=1e-3)


def test_held_out_clips_that_cannot_be_read_are_named(finished, tmp_path, caplog):
    """One is left out; when all are, the run says so."""
    shutil.copytree(finished[0] / "tokens", tmp_path / "tokens")
    shutil.copy(finished[0] / "model/config.yaml", tmp_path / "c.yaml")
    shards = list(tmp_path.glob("tokens/*/held_out/*.tar"))
    words = ("train", tmp_path / "c.yaml", f"data.root={tmp_path / 'tokens'}", "train.steps=1", "optim.warmup_steps=0",
             "eval.every=1")
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[512:518] = b"broken"
        shard.write_bytes(data)
    run_cli(*words, f"run.dir={tmp_path / 'one'}")
    assert "held out, left out: sample" in caplog.text
    for shard in shards:
        entry = index_tars([shard])[0]
        data = bytearray(shard.read_bytes())
        for offset in entry.offsets.tolist():
            data[offset : offset + 6] = b"broken"
        shard.write_bytes(data)
    done = run_cli(*words, f"run.dir={tmp_path / 'all'}", check=False)
    assert done.returncode == 2 and "held-out clips can be used" in done.stderr


def test_pictures_of_odd_sides_are_measured_without_their_padding(tmp_path, rng):
    """22 pixels in patches of 8: the decoder makes 24. And of a data set that begins with clips without the signal."""
    clips = [Clip(f"a{i}", "a", {"gaze": np.ones((60, 3), np.float32)}) for i in range(6)]
    clips += [Clip(f"b{i}", "b", {"rgb": rng.integers(0, 255, (16, 22, 22, 3)).astype(np.uint8)}) for i in range(4)]
    write_clips(tmp_path / "clips.tar", clips)
    VideoTokenizer(Modality("rgb", 512, (5, 3, 3), "rgb"), VideoArgs(dim=16, depth=1)).save_pretrained(tmp_path / "t")
    made = reconstruct(tokenizers.load(tmp_path / "t"), str(tmp_path / "clips.tar"), limit=2)
    assert made.clips == 2 and np.isfinite(made.errors["psnr_db"]).all()
    done = run_cli("tokenizer", "reconstruct", tmp_path / "t", "--clips", tmp_path / "clips.tar", "--limit", -1,
                   check=False)
    assert done.returncode == 2


def test_recipes_for_what_the_model_has_not_are_named(finished, clips, tmp_path, caplog):
    shutil.copy(finished[0] / "model/config.yaml", tmp_path / "c.yaml")
    done = run_cli("train", tmp_path / "c.yaml", "generation.camm.steps=3", "generation.cam=null", check=False)
    assert done.returncode == 2 and "did you mean 'cam'" in done.stderr
    run_cli("train", tmp_path / "c.yaml", "modalities.gaze=null", f"run.dir={tmp_path / 'less'}", "train.steps=1",
            "optim.warmup_steps=0", "eval.every=0", "loss.near_modalities=[rgb,depth]",
            "masking.components=[{alpha: 1}]")
    assert "a recipe for 'gaze'" in caplog.text
    assert "gaze" not in EgoM2P.from_pretrained(tmp_path / "less").generation
    evaluate(EgoM2P.from_pretrained(finished[0] / "model"), ["rgb2gaze"], clips, {"camera": TargetArgs()}, 4)
    assert "a recipe for 'camera'" in caplog.text


def test_the_tokenizers_own_error_is_of_whole_encodings(finished, clips, monkeypatch):
    """Of gaze with blinks: an id that is nobody's, where nothing was observed, would spoil the frames beside it."""
    real = tokenizers.load_for

    def with_wild_weights(*args):
        loaded = real(*args)
        torch.manual_seed(0)
        for parameter in loaded["gaze"].parameters():
            torch.nn.init.normal_(parameter)
        return loaded

    monkeypatch.setattr(tokenizers, "load_for", with_wild_weights)
    model = EgoM2P.from_pretrained(finished[0] / "model")
    figures = evaluate(model, ("rgb2gaze",), clips, {}).summary["rgb2gaze"]["gaze_mse"]
    tokenizer = with_wild_weights(model.modalities, ["gaze"], model.device, model.folder)["gaze"]
    gazes = [clip.signals["gaze"] for clip in read_clips(clips) if "gaze" in clip.signals]
    observed = [tokenizer.observed(gaze) for gaze in gazes]
    assert any(seen.any() and not seen.all() for seen in observed)
    errors = [gaze_mse(tokenizer.decode(tokenizer.encode(gaze)), gaze)
              for gaze, seen in zip(gazes, observed, strict=True) if seen.any()]
    assert figures["ceiling"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_alignments_and_units(finished, clips, tmp_path):
    protocol = tmp_path / "p.yaml"
    protocol.write_text(f"tasks: [rgb2depth, rgb2gaze]\ndata: '{clips}'\nlimit: 6\nmeasures: "
                        f"{{depth_alignment: median, depth_per: frame}}\n")
    run_cli("eval", finished[0] / "model", "--protocol", protocol, "--out", tmp_path / "o")
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert {"abs_rel", "rmse_m", "delta1", "delta2", "delta3"} <= results["rgb2depth"].keys()
    assert {"gaze_mse", "gaze_px", "gaze_deg"} <= results["rgb2gaze"].keys()
    assert results["protocol"]["measures"]["depth_per"] == "frame"
    mse, px = results["rgb2gaze"]["gaze_mse"]["value"], results["rgb2gaze"]["gaze_px"]["value"]
    assert px <= np.sqrt(2 * mse) * 24 * 1.2
    done = run_cli("eval", finished[0] / "model", "--tasks", "rgb2cam", check=False)
    assert done.returncode == 2
    assert "--protocol" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "cfgs/eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_published_protocols_build_and_run(path, finished, clips, tmp_path):
    """Every protocol on clips of the world: the command of its first line."""
    protocol = load(ProtocolConfig, path)
    assert path.read_text().startswith(f"# egom2p eval MODEL --protocol cfgs/eval/{path.name}")
    run_cli("eval", finished[0] / "model", "--protocol", path, "--data", clips, "--limit", 3, "--out", tmp_path)
    assert set(protocol.tasks) <= json.loads((tmp_path / "results.json").read_text()).keys()


def test_evaluation_during_training(finished, clips, tmp_path):
    """Figures in metrics.jsonl, a picture a task, the time spent."""
    out = finished[0]
    run = tmp_path / "run"
    shutil.copy(out / "model/config.yaml", tmp_path / "c.yaml")
    run_cli("train", tmp_path / "c.yaml", f"run.dir={run}", "train.steps=4", "optim.warmup_steps=0", "eval.every=2",
            "eval.tasks=[rgb2cam,rgb2gaze]", "eval.tasks_every=4",
            f"eval.clips='{clips}'", "eval.task_clips=4")
    with_tasks = [r for r in read_metrics(run) if "eval/rgb2cam/ate_m" in r]
    assert [r["step"] for r in with_tasks] == [4]
    assert np.isfinite(with_tasks[0]["eval/rgb2gaze/gaze_mse"])
    assert with_tasks[0]["eval/tasks_s"] > 0
    assert {p.name for p in (run / "pictures/step_00000004").iterdir()} == {"rgb2cam.png", "rgb2gaze.png"}
    done = run_cli("train", tmp_path / "c.yaml", f"run.dir={tmp_path / 'x'}", "eval.tasks=[rgb2cam]", check=False)
    assert done.returncode == 2
    assert "eval.clips" in done.stderr


def test_frechet_distance_of_known_gaussians(rng):
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2."""
    a = rng.standard_normal((200_000, 3)) * [1, 2, 0.5] + [0, 1, 0]
    b = rng.standard_normal((200_000, 3)) * [2, 1, 0.5] + [1, 1, 0]
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_video_distance_takes_a_plugged_in_network(rng):
    clips = [rng.integers(0, 255, (4, 8, 8, 3)).astype(np.uint8) for _ in range(8)]
    network = lambda x: torch.stack([x.mean((1, 2, 3, 4)), x.std((1, 2, 3, 4))], 1)  # noqa: E731
    assert frechet_video_distance(clips, clips, network) == pytest.approx(0, abs=1e-9)
    assert frechet_video_distance(clips, [c // 2 for c in clips], network) > 0.01
    with pytest.raises(UserError, match="two clips"):
        frechet_video_distance(clips[:1], clips, network)


def test_lpips_is_the_published_one(rng, tmp_path):
    """Against the network of torchmetrics (a port of the authors'), both with the same random AlexNet."""
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    torch.manual_seed(0)
    network = alexnet(weights=None)
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    reference = _LPIPS(pretrained=True, pnet_rand=True)
    for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        for index, layer in getattr(reference.net, name).named_children():
            layer.load_state_dict(network.features[int(index)].state_dict())
    a, b = (rng.integers(0, 255, (4, 64, 64, 3)).astype(np.uint8) for _ in range(2))
    ours = Lpips(tmp_path / "alexnet.pth")
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (a, b))
    assert lpips(a, a, ours) == 0
    assert lpips(a, b, ours) == pytest.approx(float(reference(x, y).mean()), rel=1e-5)
    with pytest.raises(UserError, match="alexnet"):
        Lpips(tmp_path / "none.pth")


def test_results_say_what_they_are_about_and_keep_other_models_out(finished, tmp_path):
    out, folder = finished[0], tmp_path / "eval"
    asked = ("--tasks", "rgb2cam", "--data", out / "clips/test", "--out", folder)
    run_cli("eval", out / "model", *asked)
    about = json.loads((folder / "results.json").read_text())["about"]
    assert about["model"] == str((out / "model").resolve()) and about["step"] == 12
    assert about["weights"] == EgoM2P.from_pretrained(out / "model").fingerprint()
    assert about["recipes"]["cam"]["expected"] is True and about["clips"] == 12
    run_cli("eval", out / "model", *asked)  # the same again
    earlier = out / "model/checkpoints/step_00000006"
    other = tmp_path / "other"
    shutil.copytree(out / "model/checkpoints/latest", other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "mask_token": weights["mask_token"] + 1}, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    for name, entry in config["modalities"].items():
        entry["tokenizer"] = str(out / "tokenizers" / name)
    (other / "config.json").write_text(json.dumps(config))
    done = run_cli("eval", other, *asked, check=False)
    assert done.returncode == 2 and "holds results of another model" in done.stderr
    assert json.loads((folder / "results.json").read_text())["about"] == about
    if earlier.is_dir():  # an earlier step of the same run gives way
        run_cli("eval", earlier, *asked)
        assert json.loads((folder / "results.json").read_text())["about"]["step"] == 6


def test_the_control_sees_another_clips_input(finished, tmp_path):
    """Two clips with the same target and very different inputs: with inputs exchanged the predictions are exchanged."""
    index = ClipIndex(str(finished[0] / "clips/test/*.tar"))
    pair = [index.read(i) for i in range(2)]
    pair = [Clip(c.key, c.dataset, {**c.signals, "cam": pair[0].signals["cam"]}, c.meta) for c in pair]
    pair[1].signals["rgb"][:] = 255 - pair[1].signals["rgb"]
    write_clips(tmp_path / "pair.tar", pair)
    model = EgoM2P.from_pretrained(finished[0] / "model")
    with torch.no_grad():  # a model of seconds hardly listens to its input: make it
        model.context_projection.weight.mul_(30)
    rows = evaluate(model, ["rgb2cam"], str(tmp_path / "pair.tar"), {}).rows["rgb2cam"].rows
    model_ate, control = rows["model"]["ate_m"], rows["shuffled"]["ate_m"]
    assert model_ate[0] != pytest.approx(model_ate[1], rel=1e-6)
    assert control != pytest.approx(model_ate, rel=1e-6)


def test_the_seed_of_a_protocol_is_used(finished):
    model = EgoM2P.from_pretrained(finished[0] / "model")
    clips, sampled = str(finished[0] / "clips/test/*.tar"), {"cam": TargetArgs(steps=2, temperature=1.0)}
    values = [evaluate(model, ["rgb2cam"], clips, sampled, limit=4, seed=seed).summary["rgb2cam"]["ate_m"]["value"]
              for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_one_clip_can_be_evaluated(finished, clips, tmp_path):
    """Alone it has nothing to be shuffled with, and says so."""
    run_cli(*command(finished[0] / "model", clips, tmp_path / "one"), "--limit", 1)
    told = json.loads((tmp_path / "one/results.json").read_text())["rgb2cam"]["ate_m"]
    assert told["clips"] == 1 and np.isfinite(told["value"]) and not np.isfinite(told["shuffled"] or np.nan)
