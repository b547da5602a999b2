"""`egom2p import-released`: real layout, nothing executed, one line when it cannot be."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from egom2p import EgoM2P, tokenizers
from egom2p.compat.released import CAMERA_MEAN, HEADS, convert_model
from egom2p.data.batch import MaskedSample, pack
from egom2p.data.masking import MaskArgs, Masker
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import ModelArgs
from egom2p.model.positions import position_table
from tests.conftest import run_cli
from tests.model.test_parity import reference, write_released


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The three released kinds of file, at a small size."""
    folder = tmp_path_factory.mktemp("released")
    write_released(folder / "model.pth", reference("model_swiglu")["state_dict"], model="fm_mini_2e_2d_swiglu_nobias",
                   in_domains="tok_rgb")
    for name in ("cam", "gaze"):
        write_released(folder / f"{name}.pth", reference(f"vqvae_{name}")["state_dict"], domain=name)
    return folder


def test_model_comes_back_as_an_ordinary_export(released, tmp_path):
    done = run_cli("import-released", released / "model.pth", "--out", tmp_path, "--num-heads", 4)
    assert "rgb [5, 4, 4] of 64" in done.stdout
    given, model = reference("model_swiglu"), EgoM2P.from_pretrained(tmp_path)
    logits = model.masked_logits(given["tokens"], given["is_input"], given["is_target"])
    assert all((logits[n] - e).abs().max() < 1e-4 for n, e in given["logits"].items())


def test_tokenizers_come_back_with_their_constants(released, tmp_path):
    for name in ("cam", "gaze"):
        run_cli("import-released", released / f"{name}.pth", "--out", tmp_path / name, "--num-heads", 4)
        given, tokenizer = reference(f"vqvae_{name}"), tokenizers.load(tmp_path / name)
        assert torch.equal(tokenizer.encode_normalized(given["input"]), given["ids"])
    assert tokenizers.load(tmp_path / "cam").args.mean == CAMERA_MEAN
    poses = np.tile(np.eye(4, dtype=np.float32), (60, 1, 1))
    assert tokenizers.load(tmp_path / "cam").encode(poses).shape == (30,)
    assert tokenizers.load(tmp_path / "gaze").decode(np.zeros(30, int)).shape == (60, 3)


def test_released_sizes_have_known_heads():
    """Heads from the name: any released size and variant divides."""
    assert all(dim % heads == 0 for (_, dim), heads in HEADS.items())
    state = reference("model_swiglu")["state_dict"]
    with pytest.raises(Exception, match="give --num-heads"):
        convert_model(state, "base", None, {}, "x.pth")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/egom2p_was_here",)


@pytest.mark.parametrize("where", ["args", "model", "top"])
def test_a_malicious_file_runs_nothing(tmp_path, where):
    marker = "/tmp/egom2p_was_here"
    content = {"model": {}, "args": argparse.Namespace()}
    if where == "top":
        content = Malicious()
    else:
        content[where] = argparse.Namespace(x=Malicious()) if where == "args" else {"mask_token": Malicious()}
    torch.save(content, tmp_path / "evil.pth")
    done = run_cli("import-released", tmp_path / "evil.pth", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "refused" in done.stderr
    assert not os.path.exists(marker)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("damage", "words"), [("cut", "not a whole torch checkpoint"), ("pickle", "refused"),
                                               ("empty", "expected a dict with 'model'"),
                                               ("strange", "neither an EgoM2P checkpoint"), ("half", "lacks"),
                                               ("missing", "no checkpoint")])
def test_wrong_files_get_one_line(released, tmp_path, damage, words):
    path = tmp_path / "file.pth"
    state = dict(reference("model_swiglu")["state_dict"])
    if damage == "cut":
        path.write_bytes((released / "model.pth").read_bytes()[:40_000])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    elif damage == "empty":
        torch.save({}, path)
    elif damage == "strange":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    elif damage == "half":
        write_released(path, {k: v for k, v in state.items() if not k.startswith("decoder.1.mlp")}, model="x")
    done = run_cli("import-released", path, "--out", tmp_path / "out", "--num-heads", 4, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


SIZES = [(name, dim, heads) for (name, dim), heads in HEADS.items()]
DEPTHS = {"tiny": 6, "small": 8, "base": 12, "large": 24, "xlarge": 24}
FEW = ModalitySet([Modality("rgb", 100, (5, 4, 4)), Modality("cam", 50, (30,))])


@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
@pytest.mark.parametrize(("size", "dim", "heads"), SIZES, ids=lambda v: str(v))
def test_released_sizes_run_forward_and_backward(size, dim, heads, variant, rng):
    """Every size and variant, those whose dim does not divide by 6 too. Blocks repeat, so two of each stand for all;
    the full depths are built on the meta device, and run in the slow test."""
    with torch.device("meta"):
        whole = EgoM2P(FEW, ModelArgs(dim, heads, DEPTHS[size], DEPTHS[size], variant=variant))
    assert len(whole.encoder) == DEPTHS[size]
    with torch.device("meta"):
        model = EgoM2P(FEW, ModelArgs(dim, heads, 1, 1, variant=variant))
    run_once(model, torch.float32, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dim", "heads"), SIZES, ids=lambda v: str(v))
def test_released_sizes_run_whole(size, dim, heads, rng):
    """Full depth, in bfloat16 so that xlarge fits this machine's memory."""
    with torch.device("meta"):
        model = EgoM2P(FEW, ModelArgs(dim, heads, DEPTHS[size], DEPTHS[size]))
    run_once(model, torch.bfloat16, rng)


def run_once(model, dtype, rng):
    """Materialise a meta model with small random weights; one loss and backward; every parameter gets a gradient."""
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-0.03, 0.03) if parameter.ndim > 1 else parameter.fill_(1.0)
        for modality, embedding in zip(FEW, model.embeddings.values(), strict=True):
            embedding.position = position_table(modality.grid, model.args.dim).to(dtype)
    tokens = {i: rng.integers(0, m.vocab_size, m.num_tokens) for i, m in enumerate(FEW)}
    batch = pack([MaskedSample(n, *Masker(MaskArgs(30, 30), FEW, 0).mask(tokens, n)) for n in range(4)], 2)
    loss, _ = model(batch, torch.full((len(batch.targets),), 0.01, dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
