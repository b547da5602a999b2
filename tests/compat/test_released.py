"""`egom2p import-released`: real layout, nothing executed, one line when it cannot be."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from egom2p import EgoM2P, tokenizers
from egom2p.compat.released import CAMERA_MEAN, HEADS, convert_model
from egom2p.model.egom2p import ModelArgs
from tests.conftest import run_cli
from tests.model.test_parity import reference, write_released


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The three released kinds of file, at a small size."""
    folder = tmp_path_factory.mktemp("released")
    write_released(folder / "model.pth", reference("model_swiglu")["state_dict"], model="fm_mini_2e_2d_swiglu_nobias", in_domains="tok_rgb")
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


@pytest.mark.parametrize(("damage", "words"), [("cut", "not a whole torch checkpoint"), ("pickle", "refused"), ("empty", "expected a dict with 'model'"),
                                               ("strange", "neither an EgoM2P checkpoint"), ("half", "lacks"), ("missing", "no checkpoint")])
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


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xlarge"])
@pytest.mark.parametrize("variant", ["gelu", "swiglu", "swiglu_qknorm"])
def test_released_sizes_build(size, variant):
    """On the meta device; the widths 1020 and 2046 of the released large SwiGLU models too."""
    from egom2p.config import read_yaml
    from egom2p.modalities import Modality, ModalitySet
    from tests.conftest import ROOT

    args = dict(read_yaml(ROOT / f"cfgs/model/{size}.yaml")["model"])
    widths = [(args["dim"], args["num_heads"])] + [(d, h) for (n, d), h in HEADS.items() if n == size and d != args["dim"]]
    for dim, heads in widths:
        with torch.device("meta"):
            EgoM2P(ModalitySet([Modality("rgb", 100, (5, 4, 4)), Modality("cam", 50, (30,))]), ModelArgs(**{**args, "dim": dim, "num_heads": heads, "variant": variant}))
