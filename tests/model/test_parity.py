"""The network is the released network: logits, losses, gradients, guidance, against recorded tensors."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from egom2p.compat.released import convert_model, convert_motion
from egom2p.data.batch import pack
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import samples_from_grids
from tests.conftest import ROOT

NAMES = ("model_swiglu", "model_swiglu_qknorm", "model_gelu")


def reference(name: str) -> dict:
    """Tensors recorded from the released code, committed."""
    return torch.load(ROOT / f"tests/reference/{name}.pt", weights_only=True)


@pytest.fixture(params=NAMES)
def case(request):
    given = reference(request.param)
    model = convert_model(given["state_dict"], "", given["config"]["num_heads"], {}, request.param)
    return given, model


def test_sizes_come_from_shapes(case):
    given, model = case
    config = given["config"]
    assert {m.name: list(m.grid) for m in model.modalities} == config["grids"]
    assert {m.name: m.vocab_size for m in model.modalities} == config["vocab_sizes"]
    assert (model.args.dim, model.args.encoder_depth, model.args.decoder_depth, model.args.variant) == (
        config["dim"], config["encoder_depth"], config["decoder_depth"], config["variant"])


def test_logits(case):
    given, model = case
    logits = model.masked_logits(given["tokens"], given["is_input"], given["is_target"])
    for name, expected in given["logits"].items():
        assert logits[name].shape == expected.shape
        assert (logits[name] - expected).abs().max() < 1e-4


def test_loss_and_gradients(case):
    given, model = case
    batch = pack(samples_from_grids(model.modalities, given["tokens"], given["is_input"], given["is_target"]), 4)
    counts = batch.targets.modality_counts
    scale = torch.cat([torch.full((n,), 1 / (4 * max(n, 1))) for n in counts])
    loss, losses = model(batch, scale)
    assert loss.item() == pytest.approx(given["loss_mod"].item(), rel=1e-5)
    for modality, part in zip(model.modalities, losses.split(counts), strict=True):
        assert part.mean().item() == pytest.approx(given["loss_per_modality"][modality.name].item(), abs=1e-4)
    loss.backward()
    ours = {"mask_token": model.mask_token.grad,
            "encoder_embeddings.tok_cam.token_emb.weight": model.embeddings["cam"].token.weight.grad,
            "encoder.0.attn.qkv.weight": model.encoder[0].attn.qkv.weight.grad,
            "decoder_proj_context.weight": model.context_projection.weight.grad}
    for name, expected in given["grads_mod"].items():
        assert (ours[name].reshape(expected.shape) - expected).abs().max() < 1e-4, name


def test_guided_one_step_generation(case):
    given, model = case
    rgb = given["tokens"]["rgb"]
    num = len(rgb)
    for target, expected in given["generate_from_rgb"].items():
        n = model.modalities.by_name(target).num_tokens
        everything = {"rgb": torch.ones(num, 80, dtype=torch.bool)}
        tokens = {"rgb": rgb, target: torch.zeros(num, n, dtype=torch.long)}
        asked = {target: torch.ones(num, n, dtype=torch.bool)}
        conditional = model.masked_logits(tokens, everything, asked)[target].view(num, n, -1)
        unconditional = model.masked_logits(tokens, {}, asked)[target].view(num, n, -1)
        assert (conditional - expected["logits_cond"]).abs().max() < 1e-4
        assert (unconditional - expected["logits_uncond"]).abs().max() < 1e-4
        made = generate(model, {"rgb": rgb.numpy()}, {target: TargetArgs(steps=1, temperature=0, guidance=2.0)})
        assert np.array_equal(made.tokens[target].reshape(num, n), expected["ids_guided_2"].numpy())


@pytest.mark.parametrize("name", ["vqvae_cam", "vqvae_gaze"])
def test_motion_tokenizer(name):
    given = reference(name)
    tokenizer = convert_motion(given["state_dict"], given["config"]["num_heads"], name).eval()
    with torch.no_grad():
        ids = tokenizer.encode_normalized(given["input"])
        reconstruction = tokenizer.decode_normalized(ids)
    assert torch.equal(ids, given["ids"])
    assert torch.equal(tokenizer.codes()[ids].transpose(1, 2), given["quantized"])
    assert (reconstruction - given["reconstruction"]).abs().max() < 1e-4


def write_released(path: Path, state: dict, **args) -> Path:
    """A checkpoint in the released layout."""
    torch.save({"model": state, "args": argparse.Namespace(**args), "epoch": 3, "optimizer": {}, "scaler": {}}, path)
    return path
