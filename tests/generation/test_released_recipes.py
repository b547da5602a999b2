"""The four released recipes from a plain mp4, with imported motion tokenizers and Cosmos stand-ins of the released
grid."""

import json
import shutil

import numpy as np
import pytest
import torch

from egom2p.data.video import decode_video
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.signals.writers import write_video
from tests.conftest import ROOT, run_cli
from tests.model.test_parity import reference, write_released
from tests.tokenizers.test_cosmos import Decoder, Encoder

FILES = {"rgb2cam": {"cam.npy", "cam.tum", "cam_colmap"}, "rgb2gaze": {"gaze.npy"},
         "rgb2depth": {"depth.npy", "depth.mp4"}, "depth2rgb": {"rgb.mp4"}}


@pytest.fixture(scope="module")
def released_like(tmp_path_factory):
    """A small model over the released grids, its four tokenizers, and a 25 fps video of 100 x 60 pixels."""
    folder = tmp_path_factory.mktemp("released_like")
    for name in ("cam", "gaze"):
        write_released(folder / f"{name}.pth", reference(f"vqvae_{name}")["state_dict"])
        run_cli("import-released", folder / f"{name}.pth", "--out", folder / name, "--num-heads", 4)
    for name in ("rgb", "depth"):
        (folder / name).mkdir()
        config = json.loads((ROOT / "tokenizers/cosmos" / name / "config.json").read_text())
        config["modality"]["vocab_size"] = 2100
        (folder / name / "config.json").write_text(json.dumps(config))
        torch.jit.script(Encoder(4, 8)).save(str(folder / name / "encoder.jit"))
        torch.jit.script(Decoder(4, 8)).save(str(folder / name / "decoder.jit"))
    torch.manual_seed(0)
    modalities = ModalitySet([Modality(n, 2100, (5, 32, 32), n, tokenizer=str(folder / n)) for n in ("rgb", "depth")]
                             + [Modality("cam", 32, (30,), "pose", tokenizer=str(folder / "cam")),
                                Modality("gaze", 32, (30,), "gaze", tokenizer=str(folder / "gaze"))])
    EgoM2P(modalities, ModelArgs(24, 2, 1, 1)).save_pretrained(folder / "model")
    write_video(folder / "walk.mp4", np.random.default_rng(0).integers(0, 255, (50, 60, 100, 3)).astype(np.uint8), 25)
    return folder


@pytest.mark.parametrize("recipe", FILES)
def test_recipe_from_an_mp4(released_like, tmp_path, recipe):
    run_cli("generate", released_like / "model", "--recipe", f"cfgs/generate/{recipe}.yaml", "--inputs",
            released_like / "walk.mp4", "--out", tmp_path)
    folder = tmp_path / "walk"
    assert FILES[recipe] | {"preview.png", "generated.json"} <= {p.name for p in folder.iterdir()}
    shapes = {"cam.npy": (60, 4, 4), "gaze.npy": (60, 3), "depth.npy": (16, 256, 256)}
    for name in FILES[recipe] & shapes.keys():
        assert np.load(folder / name).shape == shapes[name]
    for name in (n for n in FILES[recipe] if n.endswith(".mp4")):
        frames, rate = decode_video(folder / name)
        assert frames.shape == (16, 256, 256, 3)
        assert rate == 8
    settings = next(iter(json.loads((folder / "generated.json").read_text())["recipes"].values()))
    assert (settings["temperature"], settings["guidance"], settings["top_p"]) == (0.01, 2.0, 0.8)


def test_real_token_grids(released_like, examples, tmp_path):
    """The authors' rgb token grids (ids to 64 000) are refused by a 2 100-id model in one line, naming the file."""
    done = run_cli("generate", released_like / "model", "--recipe", "cfgs/generate/rgb2cam.yaml", "--inputs",
                   examples / "rgb2cam_egoexo.npz",
                   "--out", tmp_path, check=False)
    assert done.returncode == 2
    assert "rgb2cam_egoexo.npz" in done.stderr


def test_programs_that_come_with_a_model(released_like, tmp_path):
    """A .jit file is a program: inside a model's own folder it runs only when the user says so; beside it, as a folder
    that the user wrote down, it runs."""
    bundle = tmp_path / "model"
    shutil.copytree(released_like / "model", bundle)
    shutil.copytree(released_like / "rgb", bundle / "rgb")
    shutil.copytree(released_like / "gaze", bundle / "gaze")
    config = json.loads((bundle / "config.json").read_text())
    for name, entry in config["modalities"].items():
        entry["tokenizer"] = str(bundle / name)
    (bundle / "config.json").write_text(json.dumps(config))
    command = ("generate", bundle, "--targets", "gaze", "--inputs", released_like / "walk.mp4",
               "--out", tmp_path / "out")
    done = run_cli(*command, check=False)
    assert done.returncode == 2
    assert "encoder.jit: TorchScript is a program" in done.stderr
    assert "--trust-torchscript" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("egom2p:")]) == 1
    run_cli(*command, "--trust-torchscript")
    assert (tmp_path / "out/walk/gaze.npy").exists()
