"""The benchmarks' reference computes the same loss and gradients as ours, and the scripts run."""

import pytest
import torch

from benchmarks.plain import PlainEgoM2P
from egom2p.data.batch import pack
from egom2p.model.egom2p import EgoM2P, ModelArgs
from tests.conftest import start_cli
from tests.model.test_attention import MODALITIES, SAMPLES


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_plain_padded_network_equals_ours(variant):
    """Padded with dense masks against packed segments: loss and every gradient to 1e-9 (float64)."""
    torch.manual_seed(0)
    model = EgoM2P(MODALITIES, ModelArgs(24, 4, 2, 2, variant=variant)).double()
    samples = [s for s in SAMPLES if len(s.inputs)]  # the dense softmax of a sample without inputs is uniform, not zero
    plain = PlainEgoM2P(model, 20, 20)
    theirs = plain.loss(plain.collate(samples))
    theirs.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    batch = pack(samples, 3)
    scale = torch.cat([torch.full((n,), 1 / (3 * max(n, 1)), dtype=torch.float64)
                       for n in batch.targets.modality_counts])
    ours, _ = model(batch, scale)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expected"), [
    (["benchmarks.loader", "--count", "64", "--rounds", "1", "--shards", "2"], "samples/s a core"),
    (["benchmarks.gpu", "--smoke", "--sections", "correct,sync,step,ladder,profile,generate,train"], "correct: ok"),
    (["benchmarks.scaling", "--smoke"], "of the rows"),
    (["benchmarks.checkpoint", "--rounds", "1", "--size", "smoke"], "stall"),
    (["benchmarks.generate", "--rounds", "1", "--recipes", "rgb2cam", "--size", "smoke"], "greedy ids identical"),
    (["benchmarks.encode", "--count", "8", "--large", "1", "--rounds", "1"], "peak memory"),
    (["benchmarks.soak", "--processes", "200", "--deterministic", "--no-load"], "0 of 200 processes differ"),
    (["benchmarks.prepare", "--width", "128", "--height", "96", "--seconds", "4", "--size", "64"], "clips/s")])
def test_benchmark_runs(command, expected, tmp_path):
    """Every section of the script works, whatever the machine; no figure is asserted but that gradients repeat (the
    suite's other workers are the soak's load)."""
    out = ["--out", str(tmp_path)] if command[0] == "benchmarks.gpu" else []
    process = start_cli(*command[1:], *out, module=command[0], errors=tmp_path / "errors")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-2000:] + (tmp_path / "errors").read_text()[-2000:]
    assert expected in printed
