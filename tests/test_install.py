"""What is installed is what is cloned: a wheel in an environment of its own, used from another folder."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from egom2p import resources
from tests.conftest import ROOT, common_folder, made_once, run_cli


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    return next(made_once(common_folder(tmp_path_factory) / "wheel", make_wheel).glob("egom2p-*.whl"))


def make_wheel(folder: Path) -> None:
    source = folder / "source"  # a copy: building writes beside the sources
    listing = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.strip("\0").split("\0") if files.returncode == 0 else []:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs `egom2p ARGS` of the installed wheel in a folder that is no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    # torch and the other requirements come from this environment; its editable install of the checkout does not.
    Path(site, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "work").mkdir()

    def run(*args, code: int = 0) -> str:
        done = subprocess.run([folder / "env/bin/egom2p", *map(str, args)], cwd=folder / "work", capture_output=True,
                              text=True, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)})
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.work, run.python = folder / "work", python
    return run


def test_a_wheel_holds_every_shipped_file_once(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if "/shipped/" in n]
    wanted = {f"egom2p/shipped/{p.relative_to(ROOT).as_posix()}" for folder in resources.FOLDERS
              for p in (ROOT / folder).rglob("*") if p.is_file()}
    assert set(names) == wanted
    assert "egom2p/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_installed_code_is_not_the_checkout(installed):
    where = subprocess.run([installed.python, "-c", "import egom2p; print(egom2p.__file__)"], cwd=installed.work,
                           capture_output=True, text=True, check=True).stdout
    assert str(ROOT / "egom2p") not in where


@pytest.mark.slow
def test_installed_commands_find_their_files(installed):
    assert installed("--version").strip() == run_version()
    assert "cfgs/train/debug.yaml" in installed("configs")
    installed("shards", "random", "cfgs/train/debug.yaml", "--out", "runs/debug/tokens", "--count", 24)
    installed("train", "cfgs/train/debug.yaml", "train.steps=2", "eval.every=0")
    assert (installed.work / "runs/debug/run/checkpoints/latest/model.safetensors").is_file()
    installed("submit", "cfgs/train/debug.yaml", "run.dir=job", "--dry-run")
    assert "#SBATCH" in (installed.work / "job/frozen/train.sbatch").read_text()
    # The protocol is found: what is missing is its data.
    said = installed("eval", "runs/debug/run", "--protocol", "cfgs/eval/adt_cam.yaml", code=2)
    assert "no configuration file" not in said


def test_a_config_is_copied_with_what_it_includes(installed):
    copied = installed("configs", "cfgs/train/quickstart.yaml", "--copy", "mine").split()
    assert sorted(copied) == ["mine/cfgs/data/world.yaml", "mine/cfgs/modalities/world.yaml",
                              "mine/cfgs/model/world.yaml", "mine/cfgs/train/quickstart.yaml"]
    assert "exists already" in installed("configs", "cfgs/train/quickstart.yaml", "--copy", "mine", code=2)
    assert "did you mean cfgs/train/debug.yaml" in installed("configs", "cfgs/train/debgu.yaml", code=2)


@pytest.mark.slow
def test_installed_quickstart(installed):
    """The whole job from the wheel, on few clips and steps."""
    config = installed.work / "tiny.yaml"
    installed("configs", "cfgs/quickstart.yaml", "--copy", "copy")
    config.write_text("include: [copy/cfgs/quickstart.yaml]\ntrain: {rooms: {clips: 8}, walks: {clips: 8}}\n"
                      "held_out: {clips: 4}\ntest: {clips: 8}\ndrawn: {rgb: {steps: 2}}\n"
                      "tokenizer_overrides: [train.steps=4, train.batch_size=4, optim.warmup_steps=1]\n"
                      "train_overrides: [train.steps=4, train.batch_size=4, eval.every=0, optim.warmup_steps=1]\n")
    installed("quickstart", "--out", "quick", "--config", config)
    assert (installed.work / "quick/report.html").is_file()


def run_version() -> str:
    import egom2p

    return f"egom2p {egom2p.__version__}"


def test_a_path_that_exists_wins_over_a_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resources.locate("cfgs/train/debug.yaml") == resources.root() / "cfgs/train/debug.yaml"
    (tmp_path / "cfgs/train").mkdir(parents=True)
    (tmp_path / "cfgs/train/debug.yaml").write_text("mine")
    assert resources.locate("cfgs/train/debug.yaml").read_text() == "mine"
    for other in ("setup.py", "cfgs/../setup.py", "egom2p/export.py", "cfgs/none.yaml"):
        assert str(resources.locate(other)) == other


def test_configs_lists_every_yaml_with_its_comment():
    listed = run_cli("configs").stdout.splitlines()
    assert len(listed) == len([*(ROOT / "cfgs").rglob("*.yaml"), *(ROOT / "tokenizers").rglob("*.yaml")])
    assert all(len(line.split(maxsplit=1)) == 2 for line in listed)
