"""Muon, other schedules, the average of weights: their arithmetic, and the promises that AdamW with cosine keeps."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.average import WeightAverage
from egom2p.training.optim import Muon, MuonAndAdamW, OptimArgs, make_optimizer, make_schedule
from tests.conftest import run_ranks
from tests.model.test_attention import MODALITIES
from tests.training.test_reliability import arguments, forget_after, same_weights
from tests.training.test_training import curve, train, weights

MUON = ("optim.name=muon", "optim.schedule=wsd", "train.ema=0.9")


def test_wsd_by_hand():
    """Warm-up over 4, constant at the peak, a straight line over the last fifth of the rest, down to a share."""
    rate = make_schedule(OptimArgs(lr=1.0, warmup_steps=4, schedule="wsd", final_lr_share=0.1), 1, 24, 1)
    assert [rate(i) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [rate(i) for i in range(4, 21)] == pytest.approx([1.0] * 17)
    assert [rate(i) for i in (21, 22, 23, 24)] == pytest.approx([0.1 + 0.9 * share for share in (0.75, 0.5, 0.25, 0)])


def test_inverse_square_root_by_hand():
    rate = make_schedule(OptimArgs(lr=2.0, warmup_steps=4, schedule="inverse_sqrt", decay_share=0.5), 1, 104, 1)
    assert [rate(i) for i in (4, 16, 36)] == pytest.approx([2.0, 1.0, 2 / 3])
    assert rate(79) == pytest.approx(2 * (4 / 79) ** 0.5 * 0.5)  # half of the tail is left
    assert rate(104) == 0


def small_model(seed=0):
    torch.manual_seed(seed)
    return EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1, variant="swiglu"))


def with_gradients(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_matrices_of_the_blocks_go_to_muon_and_the_rest_to_adamw(monkeypatch):
    """Against torch's two optimisers, run by hand on the two halves; torch's Muon kept from going to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    args = OptimArgs(name="muon", lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.9)
    ours, theirs = small_model(), small_model()
    optimizer = make_optimizer(ours, args)
    assert isinstance(optimizer, MuonAndAdamW)
    named = dict(theirs.named_parameters())
    matrices = [n for n, p in named.items() if p.ndim == 2 and n.startswith(("encoder.", "decoder."))]
    assert {n.split(".")[0] for n in matrices} == {"encoder", "decoder"} and len(matrices) >= 10
    by_hand = [torch.optim.Muon([named[n] for n in matrices], lr=0.01, weight_decay=0.2, momentum=0.9,
                                adjust_lr_fn="match_rms_adamw"),
               torch.optim.AdamW([{"params": [p for n, p in named.items() if n not in matrices and p.ndim > 1],
                                   "weight_decay": 0.2},
                                  {"params": [p for n, p in named.items() if p.ndim < 2], "weight_decay": 0.0}],
                                 lr=0.01, betas=(0.8, 0.9))]
    for step in range(3):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        optimizer.step()
        for one in by_hand:
            one.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_newton_schulz_is_in_a_type_that_the_device_multiplies_fast():
    """bfloat16 takes a CPU without such products twenty times as long; other devices have them."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "addmm" in str(function) or "baddbmm" in str(function):
                seen.append(args[1].dtype)
            return function(*args, **(kwargs or {}))

    muon = Muon([{"params": []}], 0.1, 0.9)
    for device, given, dtype in (("cpu", torch.float32, torch.float32), ("cpu", torch.float64, torch.float64),
                                 ("meta", torch.float32, torch.bfloat16)):
        for count in (1, 3):
            with Watch():
                found = muon._orthogonal([torch.ones(4, 3, device=device, dtype=given)] * count)
            assert [x.shape for x in found] == [(4, 3)] * count
            assert seen == [dtype] * 5 * 3
            seen.clear()


def test_matrices_of_one_shape_go_together_up_to_a_size(monkeypatch):
    """In any portions the same steps; a step of five large matrices never holds five more of them."""
    params = [torch.zeros(4, 3), torch.zeros(3, 4), *(torch.zeros(4, 3) for _ in range(4))]
    monkeypatch.setattr(Muon, "TOGETHER", 24)
    portions = list(Muon([{"params": []}], 0.1, 0.9)._alike(params))
    assert [[p.shape for p in portion] for portion in portions] == [[(4, 3)] * 2, [(4, 3)] * 2, [(4, 3)], [(3, 4)]]
    assert {id(p) for portion in portions for p in portion} == {id(p) for p in params}
    results = []
    for together in (1, 1 << 24):
        monkeypatch.setattr(Muon, "TOGETHER", together)
        model = small_model()
        optimizer = make_optimizer(model, OptimArgs(name="muon", lr=0.01))
        with_gradients(model, 0)
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_left_out_changes_nothing(name):
    model = small_model()
    optimizer = make_optimizer(model, OptimArgs(name=name, lr=0.01))
    before = copy.deepcopy(model.state_dict())
    with_gradients(model, 0)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    weights = copy.deepcopy(model.state_dict())
    state = {id(p): {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    with_gradients(model, 1)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, state[id(p)][k]) for p in model.parameters() for k, v in optimizer.state[p].items())


def test_frozen_parts_wait_until_they_are_let_go(debug_tokens, reference, tmp_path):
    """Before step 3 only the heads and tables move, from then on everything; a resumed run is the same one."""
    start = load_file(reference / "checkpoints/latest/model.safetensors")
    options = (f"init.from={reference}", "init.freeze=trunk", "init.unfreeze_at=3", "eval.every=0", "train.steps=6",
               "checkpoint.every=1", "checkpoint.keep_last=9", "optim.warmup_steps=0")
    train(debug_tokens, tmp_path / "run", *options)
    for step in (3, 4):
        now = load_file(tmp_path / f"run/checkpoints/step_{step:08d}/model.safetensors")
        moved = {name.split(".")[0] for name in start if not torch.equal(start[name], now[name])}
        assert moved >= {"embeddings", "heads"} and ("encoder" in moved) == (step > 3), step
    whole = curve(tmp_path / "run")
    forget_after(tmp_path / "run", 2)
    train(debug_tokens, tmp_path / "run", *options)
    assert curve(tmp_path / "run") == whole
    done = train(debug_tokens, tmp_path / "x", "init.unfreeze_at=3", check=False)
    assert done.returncode == 2 and "needs freeze" in done.stderr


def test_the_average_of_weights_by_hand():
    """decay .8: steps 0 and 1 weigh by 1/10 and 2/11, step 50 by .8; a step left out changes nothing; buffers stay."""
    model = torch.nn.BatchNorm1d(1)
    average = WeightAverage(model, 0.8)
    expected = 1.0
    for step, value, kept in ((0, 5.0, 0.1), (1, 3.0, 2 / 11), (50, -1.0, 0.8)):
        model.weight.data.fill_(value)
        average.update(step, torch.zeros(()))
        expected = kept * expected + (1 - kept) * value
        assert average.tensors["weight"].item() == pytest.approx(expected)
    model.weight.data.fill_(100.0)
    average.update(51, torch.ones(()))
    model.weight.data.fill_(7.0)
    assert average.tensors.keys() == {"weight", "bias"}
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 7.0 and average.tensors["weight"].item() == pytest.approx(expected)


def test_evaluation_and_export_hold_the_average(debug_tokens, reference, tmp_path):
    """Training itself is unmoved by it; what is exported is the average over its steps, worked out here from their
    weights, and the held-out loss is the export's own."""
    options = ("checkpoint.every=1", "checkpoint.keep_last=20", "eval.every=20")
    train(debug_tokens, tmp_path / "run", "train.ema=0.5", *options)
    train(debug_tokens, tmp_path / "plain", *options)
    plain, ours = curve(tmp_path / "plain"), curve(tmp_path / "run")
    assert [m["loss"] for m in ours if "loss" in m] == [m["loss"] for m in plain if "loss" in m]
    steps = [load_file(tmp_path / f"plain/checkpoints/step_{i:08d}/model.safetensors") for i in range(1, 21)]
    last = load_file(tmp_path / "run/checkpoints/latest/training.safetensors")
    assert all(torch.equal(last[k], v) for k, v in steps[-1].items())
    averaged = load_file(tmp_path / "run/checkpoints/latest/model.safetensors")
    begun = load_file(tmp_path / "run/checkpoints/step_00000001/model.safetensors")
    for name in ("mask_token", "encoder.0.attn.qkv.weight"):
        expected = begun[name].double()
        for step in range(1, 20):
            kept = min(0.5, (1 + step) / (10 + step))
            expected = kept * expected + (1 - kept) * steps[step][name].double()
        torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert ours[-1]["eval/loss/rgb"] != plain[-1]["eval/loss/rgb"]
    train(debug_tokens, tmp_path / "check", f"init.from={tmp_path / 'run'}", "train.steps=1", "eval.every=1",
          "optim.lr=1e-30", "optim.weight_decay=0")
    assert curve(tmp_path / "check")[-1]["eval/loss/rgb"] == pytest.approx(ours[-1]["eval/loss/rgb"], rel=1e-6)


def test_both_halves_follow_the_rate_and_lose_their_gradients():
    """The loop sets `lr` in `param_groups` and clears the gradients of all."""
    model = small_model()
    optimizer = make_optimizer(model, OptimArgs(name="muon", lr=0.01))
    with_gradients(model, 0)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("wrong", "words"), [
    ({"betas": (0.9,)}, "betas must be two numbers"), ({"lr": 0.0}, "lr above 0"),
    ({"warmup_steps": 1, "warmup_tokens": 1}, "give warmup_steps or warmup_tokens"),
    ({"decay_share": -0.1}, "decay_share must lie in 0 .. 1"), ({"decay_share": 1.1}, "decay_share must lie"),
    ({"final_lr_share": -3.0}, "final_lr_share must lie in 0 .. 1")])
def test_arguments_that_cannot_be(wrong, words):
    with pytest.raises(ValueError, match=words):
        OptimArgs(**wrong)
    assert OptimArgs(decay_share=0.0) and OptimArgs(decay_share=1.0)


def test_schedules_at_their_ends():
    """No warm-up, no tail, one step, and steps past the end (a run that was made shorter)."""
    for kind, level in (("cosine", 0.1), ("wsd", 0.1)):
        rate = make_schedule(OptimArgs(lr=1.0, schedule=kind, final_lr_share=0.1), 1, 10, 1)
        assert rate(0) == 1.0 and rate(10) == rate(50) == pytest.approx(level)
    assert make_schedule(OptimArgs(lr=1.0, schedule="wsd", decay_share=0.0), 1, 10, 1)(9) == 1.0
    assert make_schedule(OptimArgs(lr=1.0), 1, 1, 1)(0) == 1.0
    assert make_schedule(OptimArgs(lr=1.0), 1, 1, 1)(1) == pytest.approx(0.0)
    rate = make_schedule(OptimArgs(lr=1.0, schedule="inverse_sqrt", decay_share=0.0), 1, 100, 1)
    assert [rate(i) for i in (0, 1, 4, 16)] == pytest.approx([1.0, 1.0, 0.5, 0.25])


@pytest.mark.slow
def test_muon_and_the_average_resume_exactly_and_on_other_numbers_of_processes(debug_tokens, tmp_path):
    """From step 10 on one process: the same bits; on two, replicated and sharded: the same losses."""
    train(debug_tokens, tmp_path / "whole", *MUON, "checkpoint.keep_last=9")
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    forget_after(tmp_path / "run", 10)
    train(debug_tokens, tmp_path / "run", *MUON, "checkpoint.keep_last=9")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    for parallel in ("ddp", "fsdp"):
        run_ranks(2, *arguments(debug_tokens, tmp_path / parallel, *MUON, f"train.parallel={parallel}"))
        for ours, theirs in zip(curve(tmp_path / parallel), curve(tmp_path / "whole"), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3), (parallel, ours["step"])
        for name, tensor in weights(tmp_path / parallel).items():
            assert (tensor - whole[name]).norm() < 2e-3 * whole[name].norm(), (parallel, name)
