"""`egom2p import-released`: real layout, nothing executed, one line when it cannot be."""

import argparse
import os
import pickle
from pathlib import Path

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
from tests.conftest import SHARED, run_cli
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
    """Full depth; of xlarge, whose gradients alone are 12 GB, the first three blocks of each side. In float32:
    bfloat16 takes half the memory, and a CPU without such products fifty times as long."""
    depth = min(DEPTHS[size], 3) if size == "xlarge" else DEPTHS[size]
    with torch.device("meta"):
        model = EgoM2P(FEW, ModelArgs(dim, heads, depth, depth))
    run_once(model, torch.float32, rng)


def run_once(model, dtype, rng):
    """Materialise a meta model with small random weights; one loss and backward; every parameter gets a gradient."""
    model = model.to(dtype).to_empty(device="cpu")
    noise = torch.empty(1_000_003).uniform_(-0.03, 0.03)  # drawn once and laid end to end: much the cheaper
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    ends = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()]
                    parameter.copy_(ends.view_as(parameter))
                else:
                    parameter.fill_(1.0)
        for modality, embedding in zip(FEW, model.embeddings.values(), strict=True):
            embedding.position = position_table(modality.grid, model.args.dim).to(dtype)
    tokens = {i: rng.integers(0, m.vocab_size, m.num_tokens) for i, m in enumerate(FEW)}
    batch = pack([MaskedSample(n, *Masker(MaskArgs(12, 12), FEW, 0).mask(tokens, n)) for n in range(4)], 2)
    loss, _ = model(batch, torch.full((len(batch.targets),), 0.01, dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_scalars_of_the_schedules_by_both_names(tmp_path, core):
    """What the released training loop leaves in the optimizer's groups, as numpy 1 and numpy 2 pickle it."""
    state = dict(reference("vqvae_cam")["state_dict"])
    groups = [{"lr": np.float64(1e-4), "weight_decay": np.float32(0.05), "step": np.int64(7)}]
    write_released(tmp_path / "a.pth", state, optimizer={"state": {}, "param_groups": groups}, domain="cam")
    rename_pickle(tmp_path / "a.pth", b"numpy._core.multiarray", f"{core}.multiarray".encode())
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 4)
    assert "tokenizer 'cam'" in done.stdout


def rename_pickle(path, old: bytes, new: bytes) -> None:
    """Change a module's name in the pickle inside a torch file."""
    import zipfile

    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            members[info.filename] = archive.read(info)
    for name, data in members.items():
        if name.endswith("data.pkl"):
            assert b"multiarray" in data
            members[name] = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("name", "heads"), [("main_swiglu_numpy1", "model_swiglu"), ("camera", "vqvae_cam")])
def test_checkpoints_as_the_released_code_writes_them(tmp_path, name, heads):
    path = SHARED / f"data/released/{name}.pth"
    if not path.exists():
        pytest.skip(f"the released-style checkpoints are not at {path.parent}")
    run_cli("import-released", path, "--out", tmp_path, "--num-heads", 4)
    given = reference(heads)
    if name == "camera":
        assert torch.equal(tokenizers.load(tmp_path).encode_normalized(given["input"]), given["ids"])
        return
    logits = EgoM2P.from_pretrained(tmp_path).masked_logits(given["tokens"], given["is_input"], given["is_target"])
    assert all((logits[n] - e).abs().max() < 1e-4 for n, e in given["logits"].items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_are_stripped(tmp_path, prefix):
    state = {prefix + k: v for k, v in reference("vqvae_cam")["state_dict"].items()}
    write_released(tmp_path / "a.pth", state, domain="cam")
    run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 4)
    given = reference("vqvae_cam")
    assert torch.equal(tokenizers.load(tmp_path / "out").encode_normalized(given["input"]), given["ids"])


def test_averaged_weights(tmp_path):
    state = reference("vqvae_cam")["state_dict"]
    worse = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"model": worse, "model_ema": dict(state), "args": argparse.Namespace()}, tmp_path / "a.pth")
    run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 4, "--ema")
    given = reference("vqvae_cam")
    assert torch.equal(tokenizers.load(tmp_path / "out").encode_normalized(given["input"]), given["ids"])
    torch.save({"model": dict(state), "args": argparse.Namespace()}, tmp_path / "b.pth")
    done = run_cli("import-released", tmp_path / "b.pth", "--out", tmp_path / "c", "--ema", check=False)
    assert done.returncode == 2
    assert "model_ema" in done.stderr


@pytest.mark.parametrize("thing", [Malicious(), Path("x"), np.zeros(3), np.str_("text")],
                         ids=lambda t: type(t).__name__)
def test_a_refusal_names_what_it_stumbled_on(tmp_path, thing):
    torch.save({"model": {}, "args": argparse.Namespace(x=thing)}, tmp_path / "a.pth")
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "Please file an issue" not in done.stderr
    if not isinstance(thing, np.str_):  # its dtype is a stand-in here, and the value becomes nothing
        assert any(word in done.stderr for word in ("system", "Path", "_reconstruct"))


def test_a_scalar_that_would_be_a_pointer_is_nothing(tmp_path):
    """Numpy's own scalar of an object dtype takes the file's bytes as an address."""
    from egom2p.compat.released import _Dtype, _scalar

    for code, raw in (("O8", bytes(8)), ("V8", bytes(8)), ("f8", bytes(4)), ("U3", bytes(12))):
        assert _scalar(_Dtype(code, False, True), raw) is None
    dtype = _Dtype("f8", False, True)
    dtype.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert _scalar(dtype, np.array(2.5, ">f8").tobytes()) == 2.5


def test_reviv_checkpoints(tmp_path):
    """Hands and body have tokens and a table of their own; raw pictures have a projection and no tokens."""
    state = dict(reference("model_swiglu")["state_dict"])
    dim = state["mask_token"].shape[-1]
    torch.manual_seed(0)
    for name, vocab in (("tok_lhand", 1024), ("tok_body", 2048)):
        table = torch.randn(vocab, dim)
        for side, key in (("encoder", "token_emb.weight"), ("decoder", "token_emb.weight")):
            state[f"{side}_embeddings.{name}.{key}"] = table
        state[f"decoder_embeddings.{name}.to_logits.weight"] = table
        for side in ("encoder", "decoder"):
            state[f"{side}_embeddings.{name}.mod_emb"] = torch.randn(1, 1, dim)
            state[f"{side}_embeddings.{name}.pos_emb"] = reviv_positions(dim)[None]
    for name in ("rgb512", "rgb@256"):
        state[f"encoder_embeddings.{name}.proj.weight"] = torch.randn(dim, 768)
        state[f"encoder_embeddings.{name}.pos_emb"] = torch.randn(1, 4096, dim)
    write_released(tmp_path / "a.pth", state, model="reviv_mini_swiglu")
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 4)
    assert "left out: rgb512 (raw input, no tokens), rgb@256 (raw input, no tokens)" in done.stdout
    model = EgoM2P.from_pretrained(tmp_path / "out")
    hand = model.modalities.by_name("lhand")
    assert (hand.grid, hand.vocab_size, hand.signal, hand.positions) == ((30, 7), 1024, "motion", "reviv")
    assert torch.allclose(model.embeddings["lhand"].position, reviv_positions(dim), atol=1e-6)
    state["encoder_embeddings.tok_body.pos_emb"] = torch.randn(1, 210, dim)
    write_released(tmp_path / "b.pth", state, model="reviv_mini_swiglu")
    done = run_cli("import-released", tmp_path / "b.pth", "--out", tmp_path / "x", "--num-heads", 4, check=False)
    assert done.returncode == 2
    assert "position table of 'tok_body'" in done.stderr


def test_revivs_metric_depth_is_warned_of(tmp_path, caplog):
    """It is no relative inverse depth, which is all that a tokenizer here would make of its tokens."""
    state = dict(reference("model_swiglu")["state_dict"])
    for key in [k for k in state if ".tok_depth." in k]:
        state[key.replace(".tok_depth.", ".tok_depth_512.")] = state[key]
    write_released(tmp_path / "a.pth", state, model="reviv_mini_swiglu")
    command = ("import-released", tmp_path / "a.pth", "--num-heads", 4, "--tokenizers")
    run_cli(*command, "depth=tokenizers/cosmos/depth", "--out", tmp_path / "plain")
    assert "metric depth" not in caplog.text
    run_cli(*command, "depth_512=tokenizers/cosmos/depth_dv8x16x16", "--out", tmp_path / "metric")
    assert "depth_512 is metric depth" in caplog.text


def test_tokenizers_are_of_the_models_modalities(tmp_path, caplog):
    write_released(tmp_path / "a.pth", reference("model_swiglu")["state_dict"], model="mini_swiglu")
    command = ("import-released", tmp_path / "a.pth", "--num-heads", 4, "--out", tmp_path / "out", "--tokenizers")
    done = run_cli(*command, "tok_cam=x", check=False)
    assert done.returncode == 2 and "no modality 'tok_cam'" in done.stderr and not (tmp_path / "out").exists()
    run_cli(*command, "cam=tokenizers/cosmos/rgb,gaze=nowhere/gaze")
    assert "is for rgb, but 'cam' is pose" in caplog.text and "nowhere/gaze, is not on this machine" in caplog.text


@pytest.mark.parametrize(("change", "words"), [("causal", "causal decoders"), ("heads", "--num-heads")])
def test_checkpoints_of_another_function_are_refused(tmp_path, change, words):
    """Of the authors' own registry and constructor; their tensors have the shapes of the plain ones."""
    state, heads = dict(reference("model_swiglu")["state_dict"]), 7 if change == "heads" else 4
    name = f"egom2p_base_12e_12d_swiglu_nobias{'_causal' * (change == 'causal')}"
    write_released(tmp_path / "a.pth", state, model=name)
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", heads, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_modality_embedding_of_the_decoders_own_is_named(tmp_path):
    state = dict(reference("model_swiglu")["state_dict"])
    state["decoder_embeddings.tok_cam.mod_emb"] = state["decoder_embeddings.tok_cam.mod_emb"] + 5
    write_released(tmp_path / "a.pth", state, model="mini_swiglu")
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 4)
    assert "left out: tok_cam's modality embedding of the decoder" in done.stdout and "tok_gaze's" not in done.stdout


def test_heads_of_a_tokenizer_are_checked(tmp_path):
    write_released(tmp_path / "a.pth", reference("vqvae_cam")["state_dict"], model="vqvae")
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", "--num-heads", 5, check=False)
    assert done.returncode == 2 and "check --num-heads" in done.stderr


def reviv_positions(dim: int) -> torch.Tensor:
    """As a meshgrid of (7 groups, 30 frames) flattened, which is what the authors' code makes of it."""
    quarter = dim // 4
    rates = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    w, h = torch.meshgrid(torch.arange(7.0, dtype=torch.float64), torch.arange(30.0, dtype=torch.float64),
                          indexing="ij")
    angles = [w.reshape(-1, 1) * rates, h.reshape(-1, 1) * rates]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


def test_a_hand_tokenizer_is_named(tmp_path):
    state = dict(reference("vqvae_cam")["state_dict"])
    state["encoder.conv.weight"] = torch.zeros(24, 3, 2, 3)
    write_released(tmp_path / "a.pth", state, domain="lhand")
    done = run_cli("import-released", tmp_path / "a.pth", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "hand or body tokenizer" in done.stderr
