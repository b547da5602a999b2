"""Invariant 7, and every YAML in the repository parses and builds."""

from pathlib import Path

import pytest
import torch

from egom2p.ablate import SweepConfig, combinations
from egom2p.config import dump, load, to_plain
from egom2p.errors import UserError
from egom2p.generation.schedule import RecipeConfig
from egom2p.modalities import ModalitySet
from egom2p.model.egom2p import EgoM2P
from egom2p.quickstart import QuickstartConfig
from egom2p.training.pretraining import PretrainConfig
from egom2p.training.tokenizer_training import TokenizerConfig, make_tokenizer
from tests.conftest import ROOT, run_cli

TRAIN = sorted((ROOT / "cfgs/train").glob("*.yaml"))
TOKENIZERS = sorted((ROOT / "tokenizers").glob("*/config.yaml"))
QUICKSTARTS = sorted((ROOT / "cfgs").glob("*.yaml"))
PROTOCOLS = sorted((ROOT / "cfgs/eval").glob("*.yaml"))
RECIPES = sorted((ROOT / "cfgs/generate").glob("*.yaml"))
SWEEPS = sorted((ROOT / "cfgs/ablations").glob("*.yaml"))
FRAGMENTS = sorted(p for kind in ("model", "data", "modalities") for p in (ROOT / "cfgs" / kind).glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_yaml_is_left_out():
    known = {*PROTOCOLS, *TRAIN, *TOKENIZERS, *QUICKSTARTS, *RECIPES, *FRAGMENTS, *SWEEPS}
    assert {*(ROOT / "cfgs").rglob("*.yaml"), *(ROOT / "tokenizers").rglob("*.yaml")} == known


@pytest.mark.parametrize("path", TRAIN, ids=name)
def test_train_config_builds(path):
    config = load(PretrainConfig, path)
    with torch.device("meta"):
        EgoM2P(ModalitySet.from_config(config.modalities), config.model)
    assert config.train.num_steps(config.masking.input_tokens + config.masking.target_tokens) > 0


@pytest.mark.parametrize("path", TOKENIZERS, ids=name)
def test_tokenizer_config_builds(path):
    tokenizer = make_tokenizer(load(TokenizerConfig, path).tokenizer)
    assert tokenizer.codes().shape[0] == tokenizer.modality.vocab_size


@pytest.mark.parametrize("path", QUICKSTARTS, ids=name)
def test_quickstart_config_builds(path):
    config = load(QuickstartConfig, path)
    for lane in config.lanes:
        for tokenizer in lane:
            load(TokenizerConfig, ROOT / tokenizer, config.tokenizer_overrides)
    load(PretrainConfig, ROOT / config.training, config.train_overrides)


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_sweep_builds(path):
    sweep = load(SweepConfig, path)
    for run in combinations(sweep):
        load(PretrainConfig, ROOT / sweep.base, run.overrides)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_builds(path):
    assert load(RecipeConfig, path).targets


@pytest.mark.parametrize("path", FRAGMENTS, ids=name)
def test_fragment_is_used_or_usable(path, tmp_path):
    """A model, data or modality file takes its place in a whole train config."""
    kind = path.parent.name
    others = {"model": "tiny", "data": "egom2p", "modalities": "egom2p"}
    if kind != "model" and path.stem == "world":
        others = {"model": "world", "data": "world", "modalities": "world"}
    files = [path if kind == k else ROOT / "cfgs" / k / f"{v}.yaml" for k, v in others.items()]
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"include: [{', '.join(map(str, files))}]\nrun: {{dir: x}}\ntrain: {{steps: 1, batch_size: 1}}\n")
    config = load(PretrainConfig, whole)
    with torch.device("meta"):
        EgoM2P(ModalitySet.from_config(config.modalities), config.model)


def test_base_recipe_is_the_released_one():
    config = load(PretrainConfig, ROOT / "cfgs/train/egom2p_base.yaml")
    with torch.device("meta"):
        model = EgoM2P(ModalitySet.from_config(config.modalities), config.model)
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters - 396e6) < 0.01 * 396e6
    trunk = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("embeddings", "heads")))
    assert abs(trunk - 198e6) < 0.01 * 198e6
    # The released run took 120 048 steps, 0.7 % more than 500e9 / (4096 * 1024).
    assert config.train.num_steps(4096) == 119_210
    assert abs(sum(d.weight for d in config.data.datasets.values()) - 1) < 1e-6


def test_unknown_key_names_the_nearest_and_the_file():
    done = run_cli("train", "cfgs/train/debug.yaml", "train.stpes=3", check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "egom2p: unknown key 'stpes' in train (cfgs/train/debug.yaml); did you mean 'steps'?"


@pytest.mark.parametrize(("override", "words"), [
    ("train.steps=soon", "train.steps"), ("train.batch_size=2.5", "whole number"), ("model.variant=relu", "swiglu"),
    ("data.workers=true", "whole number"), ("nonsense", "key=value"), ("trian.steps=3", "did you mean 'train'"),
    ("model.dim=50", "divide"), ("train.tokens=100", "one of steps and tokens"),
    ("modalities.rgb.grid=[0,4,4]", "grid"),
    ("masking.components=[{weight: 1}]", "alpha"), ("init.form=x", "did you mean 'from'")])
def test_bad_value_is_one_line(override, words):
    with pytest.raises(UserError) as error:
        config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", [override])
        ModalitySet.from_config(config.modalities)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"did you mean .*debug\.yaml"):
        load(PretrainConfig, ROOT / "cfgs/train/debgu.yaml")
    broken = tmp_path / "broken.yaml"
    for text, words in (("a: [1", "not valid YAML"), ("- 1\n- 2\n", "mapping"),
                        ("include: broken.yaml", "includes itself")):
        broken.write_text(text)
        with pytest.raises(UserError, match=words):
            load(PretrainConfig, broken)


def test_dump_reads_back_to_an_equal_config(tmp_path):
    config = load(PretrainConfig, ROOT / "cfgs/train/egom2p_base.yaml", ["init.from=somewhere"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(PretrainConfig, tmp_path / "config.yaml") == config
    assert to_plain(config)["init"]["from"] == "somewhere"
