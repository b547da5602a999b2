"""Invariant 7, and every YAML in the repository parses and builds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from egom2p.ablate import SweepConfig, combinations
from egom2p.config import build, dump, included_files, load, read_json, to_plain
from egom2p.errors import UserError
from egom2p.generation.schedule import RecipeConfig
from egom2p.modalities import ModalitySet
from egom2p.model.egom2p import EgoM2P
from egom2p.quickstart import QuickstartConfig
from egom2p.training.pretraining import PretrainConfig
from egom2p.training.tokenizer_training import TokenizerConfig, make_tokenizer
from tests.conftest import ROOT, run_cli

TRAIN = sorted((ROOT / "cfgs/train").glob("*.yaml"))
TOKENIZERS = sorted((ROOT / "tokenizers").glob("*/*.yaml"))
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
    ("masking.components=[{weight: 1}]", "alpha"), ("init.form=x", "did you mean 'from'"),
    ("data.datasets=[full]", "data.datasets must be a mapping (NAME: value), not a list"),
    ("modalities.cam.grid.0=15", "modalities.cam.grid must be a list, not a mapping"),
    ("data.workers=-1", "workers must not be below 0"), ("data.max_damaged=2", "max_damaged from 0 to 1"),
    ("model.num_heads=0", "at least 1"), ("masking.components=[]", "at least one"),
    ("masking.target_tokens=0", "at least 1"), ("optim.betas=[1.5,0.9]", "below 1"),
    ("optim.weight_decay=-1", "not be below 0"), ("checkpoint.every=-1", "not be below 0"),
    ("log.every=-1", "not be below 0")])
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
                        ("include: broken.yaml", "includes itself"), ("include: 5", "a file's name or a list"),
                        ("include: [5]", "a file's name or a list"), ("include: {a: b}", "a file's name or a list"),
                        ("include: [cfgs/train/debug.yaml]\nmodalities: [rgb]\n", "modalities must be a mapping")):
        broken.write_text(text)
        with pytest.raises(UserError, match=words):
            load(PretrainConfig, broken)


def test_dump_reads_back_to_an_equal_config(tmp_path):
    config = load(PretrainConfig, ROOT / "cfgs/train/egom2p_base.yaml", ["init.from=somewhere"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(PretrainConfig, tmp_path / "config.yaml") == config
    assert to_plain(config)["init"]["from"] == "somewhere"


@dataclass(frozen=True)
class Part:
    name: str = ""
    size: int = 1


@dataclass(frozen=True)
class Whole:
    """One field of every kind that a configuration may have."""

    number: float = 0.0
    text: str = ""
    maybe: str | None = None
    either: int | list[int] = 0
    flag: bool = False
    items: list[int] = field(default_factory=list)
    pair: tuple[float, ...] = ()
    named: dict[str, Part] = field(default_factory=dict)
    choice: Literal["plain", "fancy"] = "plain"
    part: Part = field(default_factory=Part)
    optional: Part | None = None
    from_: str = ""


@pytest.fixture
def whole(tmp_path):
    def read(*overrides: str) -> Whole:
        (tmp_path / "whole.yaml").write_text("{}\n")
        return load(Whole, tmp_path / "whole.yaml", overrides)

    return read


@pytest.mark.parametrize(("override", "message"), [
    ("number=[1]", "number (F) must be a number, not [1]"),
    ("items=3", "items (F) must be a list, not 3"),
    ("items=[1,two]", "items[1] (F) must be a whole number, not 'two'"),
    ("text=[a]", "text (F) must be text (in quotes), not ['a']"),
    ("flag=3", "flag (F) must be bool, not 3"),
    ("part=3", "part (F) must be a mapping, not 3"),
    ("named=3", "named (F) must be a mapping, not 3"),
    ("named.a=3", "named.a (F) must be a mapping, not 3"),
    ("named.a.size=x", "named.a.size (F) must be a whole number, not 'x'"),
    ("either=x", "either (F) must be a list, not 'x'"),  # the last of the kinds it may have
    ("choice=fanzy", "choice (F): 'fanzy' is not one of plain, fancy; did you mean 'fancy'?"),
    ("choice=3", "choice (F): 3 is not one of plain, fancy; it may be one of plain, fancy"),
    ("part.sise=3", "unknown key 'sise' in part (F); did you mean 'size'?"),
    ("zzz=3", "unknown key 'zzz' in the configuration (F); it may be one of number, text, maybe, either, flag, items, "
              "pair, named, choice, part, optional, from")])
def test_what_is_said_to_the_letter(whole, tmp_path, override, message):
    with pytest.raises(UserError) as error:
        whole(override)
    assert str(error.value) == message.replace("(F)", f"({tmp_path / 'whole.yaml'})")


def test_a_file_that_is_no_mapping_inside(tmp_path):
    with pytest.raises(UserError, match=r"^the configuration \(f\) must be a mapping, not 3$"):
        build(Whole, 3, "", "f")


@pytest.mark.parametrize(("overrides", "expected"), [
    (["number=2"], Whole(number=2.0)), (["items=[3.0]"], Whole(items=[3])), (["pair=[1,2.5]"], Whole(pair=(1.0, 2.5))),
    (["either=[1,2]"], Whole(either=[1, 2])), (["either=4"], Whole(either=4)), (["maybe=null"], Whole()),
    (["flag=true"], Whole(flag=True)), (["from=x"], Whole(from_="x")),
    (["named.a.size=2"], Whole(named={"a": Part("", 2)})), (["named.a.size=2", "named.a=null"], Whole()),
    # What YAML would take for a number stays text where text is meant, at any depth.
    (["text=4711"], Whole(text="4711")), (["text=007"], Whole(text="007")), (["text=1e3"], Whole(text="1e3")),
    (["text=true"], Whole(text="true")), (["maybe=12"], Whole(maybe="12")), (["from=1"], Whole(from_="1")),
    (["part.name=12"], Whole(part=Part("12"))), (["named.a.name=3"], Whole(named={"a": Part("3")})),
    (["optional.name=5"], Whole(optional=Part("5"))), (["part.size=12"], Whole(part=Part("", 12)))])
def test_values_of_every_kind(whole, overrides, expected):
    found = whole(*overrides)
    assert found == expected
    assert {k: type(v) for k, v in vars(found).items()} == {k: type(v) for k, v in vars(expected).items()}


def test_included_files_of_included_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for file, text in (("a.yaml", "include: [sub/b.yaml, d.yaml]\ntext: a\n"), ("sub/b.yaml", "include: c.yaml\n"),
                       ("sub/c.yaml", "text: c\nnumber: 2\n"), ("d.yaml", "number: 3\n")):
        (tmp_path / file).write_text(text)
    assert included_files(tmp_path / "a.yaml") == [tmp_path / n for n in ("sub/b.yaml", "sub/c.yaml", "d.yaml")]
    assert load(Whole, tmp_path / "a.yaml") == Whole(text="a", number=3.0)


def test_json_that_cannot_be_read(tmp_path):
    (tmp_path / "good.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "good.json") == {"a": 1}
    with pytest.raises(UserError, match=f"^no file {tmp_path / 'none.json'}$"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a":\n 1')
    with pytest.raises(UserError, match=f"^{tmp_path / 'bad.json'}: unreadable JSON: Expecting .* delimiter: line 2"):
        read_json(tmp_path / "bad.json")


def test_a_path_with_what_yaml_takes_for_a_comment():
    config = load(PretrainConfig, ROOT / "cfgs/train/debug.yaml", ["run.dir=runs/exp #2", "data.root=a b"])
    assert config.run.dir == "runs/exp #2" and config.data.root == "a b"


def test_shipped_files_are_included_from_any_folder(tmp_path, monkeypatch):
    """By their own names, and by the way up and down from where a shipped one would lie."""
    (tmp_path / "cfgs/train").mkdir(parents=True)
    for name, include in (("mine.yaml", "cfgs/train/debug.yaml"), ("cfgs/train/own.yaml", "debug.yaml"),
                          ("cfgs/train/up.yaml", "../train/debug.yaml")):
        (tmp_path / name).write_text(f"include: [{include}]\ntrain: {{steps: 7}}\n")
    assert load(PretrainConfig, tmp_path / "mine.yaml").train.steps == 7
    monkeypatch.chdir(tmp_path)
    for name in ("cfgs/train/own.yaml", "cfgs/train/up.yaml"):
        assert load(PretrainConfig, name).train.steps == 7
    with pytest.raises(UserError, match=r"no configuration file .*nowhere\.yaml"):
        (tmp_path / "mine.yaml").write_text("include: [nowhere.yaml]\n")
        load(PretrainConfig, tmp_path / "mine.yaml")
