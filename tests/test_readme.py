"""Every command in README.md runs, with small budgets; only the test script itself is left out."""

import os
import re
import shlex
import subprocess

import numpy as np
import pytest

from egom2p.signals.writers import write_video
from tests.conftest import ROOT, run_cli, start_torchrun
from tests.model.test_parity import reference, write_released

SMALLER = {"--clips 500": "--clips 12", "--size 48": "--size 24"}
ADDED = {"tokenizer train": ["train.steps=3", "train.batch_size=4", "optim.warmup_steps=1"],
         "import-released": ["--num-heads", "4"]}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def places(finished, tmp_path_factory):
    """What the README's file names stand for here."""
    folder = tmp_path_factory.mktemp("readme")
    write_video(folder / "my_video.mp4", np.random.default_rng(0).integers(0, 255, (50, 48, 64, 3)).astype(np.uint8),
                25)
    write_released(folder / "egom2p_base.pth", reference("model_swiglu")["state_dict"],
                   model="fm_base_12e_12d_swiglu_nobias")
    for name, kind in (("camera", "cam"), ("gaze", "gaze")):
        write_released(folder / f"{name}_tokenizer.pth", reference(f"vqvae_{kind}")["state_dict"], model="vqvae")
    (folder / "my_videos").mkdir()
    write_video(folder / "my_videos/walk.mp4",
                np.random.default_rng(1).integers(0, 255, (75, 48, 64, 3)).astype(np.uint8), 25)
    files = {n: str(folder / n) for n in ("my_videos", "my_video.mp4", "egom2p_base.pth", "camera_tokenizer.pth",
                                          "gaze_tokenizer.pth")}
    return {"runs/quickstart": str(finished[0]), **files, "runs/": f"{folder}/runs/"}


def test_readme_opens_with_the_two_commands():
    assert commands()[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_page(finished_alone, places):
    """One after the other: later ones use what earlier ones wrote."""
    added = {**ADDED, "quickstart": ["--config", finished_alone[1]]}
    for command in commands():
        if command.startswith("bash scripts/"):
            continue
        for old, new in (*SMALLER.items(), *places.items()):
            command = command.replace(old, new)
        words = shlex.split(command)
        if words[0] == "torchrun":
            process = start_torchrun(2, *words[words.index("egom2p") + 1 :])
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, f"{command}\n{output[-3000:]}"
            continue
        assert words[0] == "egom2p", command
        run_cli(*words[1:], *next((extra for verb, extra in added.items() if command.startswith(f"egom2p {verb}")), []))


def test_library_example_names_what_exists():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    imports = next(line for line in code.splitlines() if line.startswith("from egom2p import"))
    exec(imports, {})


@pytest.mark.slow
def test_quickstart_script(finished_alone):
    """`bash scripts/quickstart.sh` makes or finds its environment and goes on with a quickstart that is there: the
    model stays, the report is made anew."""
    out, config, video, _ = finished_alone
    model = (out / "model/checkpoints/latest/model.safetensors").read_bytes()
    before = (out / "report.html").stat().st_mtime_ns
    done = subprocess.run(["bash", "scripts/quickstart.sh", "--out", out, "--config", config, "--inputs", video],
                          cwd=ROOT, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model/checkpoints/latest/model.safetensors").read_bytes() == model
    assert (out / "report.html").stat().st_size > 100_000 and (out / "report.html").stat().st_mtime_ns > before
