"""Numbers of training that nothing else would notice: rates, decays, clipping, seeds, frozen parts, a loss by hand."""

import math

import numpy as np
import pytest
import torch

from egom2p.config import load
from egom2p.data.loader import BatchPlan, StepDataset
from egom2p.distributed import World
from egom2p.errors import UserError
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.guard import Guard
from egom2p.training.log import read_metrics
from egom2p.training.loop import Loop
from egom2p.training.optim import OptimArgs, make_optimizer, make_schedule
from egom2p.training.pretraining import InitArgs, PretrainConfig, PretrainTask, start_model
from tests.conftest import ROOT, run_cli
from tests.model.test_attention import MODALITIES
from tests.training.test_training import train

CPU = World(0, 1, 0, torch.device("cpu"))


def make_task(root, run, *overrides):
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml",
                  [f"data.root={root}", f"run.dir={run}", "eval.every=0", *overrides])
    torch.manual_seed(config.train.seed)
    return config, PretrainTask(config, CPU)


def test_schedule_equals_torchs():
    """Linear warm-up to the peak, then half a cosine down to a share of it: torch's own schedulers, one step apart."""
    args, total = OptimArgs(lr=3e-3, warmup_steps=5, final_lr_share=0.1), 40
    ours = [make_schedule(args, 8, total, 1)(step) for step in range(total + 1)]
    assert ours[:5] == pytest.approx([3e-3 * n / 5 for n in (1, 2, 3, 4, 5)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 5, eta_min=3e-4)
    theirs = []
    for _ in range(total - 5 + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert ours[5:] == pytest.approx(theirs, rel=1e-9)
    assert ours[-1] == pytest.approx(3e-4) and ours[4] == max(ours)


@pytest.mark.parametrize(("args", "batch", "peak", "warmup"), [
    (OptimArgs(lr=1e-3, lr_batch=256), 1024, 4e-3, 0), (OptimArgs(lr=1e-3, lr_batch=256), 64, 2.5e-4, 0),
    (OptimArgs(lr=1e-3), 64, 1e-3, 0), (OptimArgs(lr=1e-3, warmup_tokens=1000), 64, 1e-3, 10)])
def test_peak_and_warm_up_follow_the_batch(args, batch, peak, warmup):
    schedule = make_schedule(args, batch, 100, tokens_per_step=100)
    assert (schedule.peak, schedule.warmup) == (pytest.approx(peak), warmup)


def test_optimiser_decays_matrices_and_leaves_vectors():
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1, variant="gelu"))
    optimizer = make_optimizer(model, OptimArgs(lr=7e-4, betas=(0.8, 0.9), weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name
    assert all(g["betas"] == (0.8, 0.9) and g["lr"] == 7e-4 for g in optimizer.param_groups)


def test_logged_rates_are_the_closed_form(debug_tokens, tmp_path):
    train(debug_tokens, tmp_path, "train.steps=12", "optim.final_lr_share=0.2")
    rates = {row["step"]: row["lr"] for row in read_metrics(tmp_path) if "lr" in row}
    for step in range(1, 13):
        done = step - 1  # the rate of the step that has just been made
        wave = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (done - 5) / 7))
        assert rates[step] == pytest.approx(1e-3 * (step / 5 if done < 5 else wave)), step


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(debug_tokens, tmp_path):
    for limit, expected in ((1e-3, 1e-3), (0.0, None)):
        config, task = make_task(debug_tokens, tmp_path, f"optim.clip_norm={limit}")
        loop = Loop(config, task, CPU, tmp_path)
        seen = []
        loop.optimizer.register_step_pre_hook(lambda optimizer, *_, s=seen: s.append(torch.nn.utils.get_total_norm(
            [p.grad for g in optimizer.param_groups for p in g["params"]]).item()))
        _, norm = loop._train_step(next(task.steps(range(1))), 1e-3)
        loop.metrics.close()
        assert norm.item() > 0.01  # what is logged is the norm before clipping
        assert seen == [pytest.approx(expected or norm.item(), rel=1e-3)]


def test_the_seed_makes_the_weights(debug_tokens, tmp_path):
    def start(seed):
        train(debug_tokens, tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}", f"train.seed={seed}", "train.steps=1",
              "optim.lr=1e-12", "eval.every=0")
        run = max(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)
        return EgoM2P.from_pretrained(run).state_dict()

    first, again, other = start(0), start(0), start(1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert weight.ndim < 2 or not torch.allclose(weight, other[name], atol=1e-6), name


@pytest.mark.parametrize(("flags", "ends"), [("110110", False), ("0111", True), ("111", True), ("1101", False)])
def test_only_bad_steps_in_a_row_end_a_run(flags, ends):
    guard = Guard(CPU.device, 3, {})
    for step, flag in enumerate(flags):
        value = torch.tensor(float("nan") if flag == "1" else 1.0)
        assert guard.judge(step, value, [torch.tensor(1.0)], [torch.zeros(1)], [[step]]).item() == float(flag)
    if ends:
        with pytest.raises(UserError, match="3 steps in a row"):
            guard.report()
    else:
        guard.report()
        assert guard.state()["skipped"] == flags.count("1")


@pytest.mark.parametrize(("freeze", "unfreeze", "learns"), [
    ("none", (), lambda name: True), ("trunk", (), lambda name: name.startswith(("embeddings.", "heads."))),
    ("all", ("b",), lambda name: name.startswith(("embeddings.b.", "heads.b.")))])
def test_frozen_parts_are_the_ones_that_were_named(freeze, unfreeze, learns):
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1))
    start_model(model, InitArgs(freeze=freeze, unfreeze=unfreeze), 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == learns(name), name


@pytest.mark.parametrize(("group", "weights"), [(0, (1, 1, 1)), (2, (1, 1, 1)), (2, (1, 0.5, 3))])
def test_the_loss_by_hand(debug_tokens, tmp_path, group, weights):
    """Mean over groups of: weighted mean over output modalities of the mean CE of the group's targets.

    gaze is an input only, in the whole model; each sample's CE comes from `score`-like single passes.
    """
    config, task = make_task(debug_tokens, tmp_path, f"loss.group_samples={group}", "modalities.gaze.target=false",
                             "train.precision=float64", "train.micro_batch_size=3",
                             f"loss.weights={{depth: {weights[1]}, cam: {weights[2]}}}")
    task.model.double()
    plan = BatchPlan(8, 8, group or 8)
    whole = StepDataset(task.stream, 4, plan)[0].micro_batches[0]
    with torch.no_grad():
        _, losses = task.model(whole, torch.ones(len(whole.targets), dtype=torch.float64))
    modality = whole.targets.modality[whole.targets.by_modality].numpy()
    owner = np.repeat(np.arange(8), whole.targets.lengths.sum(1))[whole.targets.by_modality.numpy()]
    assert 3 not in modality  # gaze
    groups, by_hand = [range(i, i + (group or 8)) for i in range(0, 8, group or 8)], 0.0
    for members in groups:
        for m in range(3):
            mine = losses.numpy()[(modality == m) & np.isin(owner, members)]
            by_hand += (mine.mean() if len(mine) else 0.0) * weights[m] / sum(weights) / len(groups)
    loop = Loop(config, task, CPU, tmp_path)
    sums, _ = loop._train_step(next(task.steps(range(1))), 0.0)
    loop.metrics.close()
    figures = task.figures(sums)
    assert figures["loss"] == pytest.approx(by_hand, rel=1e-9)
    for m, name in enumerate(("rgb", "depth", "cam")):
        if (modality == m).any():
            assert figures[f"loss/{name}"] == pytest.approx(losses.numpy()[modality == m].mean(), rel=1e-9)


def test_input_only_in_one_data_set_holds_there_and_nowhere_else(debug_tokens, tmp_path):
    _, task = make_task(debug_tokens, tmp_path, "data.datasets.full.input_only=[rgb]")
    asked = {0: 0, 1: 0}
    for number in range(400):
        dataset, _ = task.stream.locate(number)
        targets = task.stream.sample(number).targets.modality
        asked[dataset] += int((targets == 0).sum())
    assert asked[0] == 0 and asked[1] > 0


@pytest.mark.parametrize(("changes", "words"), [
    (("loss.weights={gaze: 2}", "modalities.gaze.target=false"), "'gaze', which is no output modality"),
    (("loss.weights={cam: 0}",), "weights must be above 0"),
    (("loss.near_codes=-1",), "near_codes must not be below 0"),
    (("loss.near_codes=1",), "needs the code vectors of 'rgb', which has no tokenizer"),
    (("loss.near_codes=1", "loss.near_modalities=[voice]"), "'voice', which is no modality")])
def test_losses_that_cannot_be_are_one_line(debug_tokens, tmp_path, changes, words):
    done = run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path}", *changes,
                   check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
