"""Every dependency earns its place, and the public names carry types."""

import ast
import functools
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Where a distribution's name is not the module's.
MODULES = {"PyYAML": "yaml", "pillow": "PIL", "vector-quantize-pytorch": "vector_quantize_pytorch"}


def requirements() -> list[str]:
    lines = [line for line in (ROOT / "req.txt").read_text().splitlines() if line and not line.startswith("#")]
    return [re.match(r"[A-Za-z0-9_-]+", line)[0] for line in lines]


@functools.cache
def imported_modules() -> set[str]:
    found = set()
    for path in (ROOT / "egom2p").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", requirements())
def test_every_requirement_is_imported(name):
    assert MODULES.get(name, name) in imported_modules()


def test_every_import_is_required_or_optional():
    # Behind one clear line that says what to install.
    optional = {"projectaria_tools", "rollingdepth", "video_depth_anything", "botocore", "aiohttp",
                "rerun"}
    own = set(sys.stdlib_module_names) | {"egom2p"}
    assert imported_modules() - own - {MODULES.get(n, n) for n in requirements()} <= optional


USER = """
import numpy as np
from egom2p import EgoM2P, Pipeline, tokenizers

model = EgoM2P.from_pretrained("runs/x")
model.generate({"rgb": np.zeros((1, 5, 3, 3))}, ["cam"])
tokenizer = tokenizers.load("a")
ids: np.ndarray = tokenizer.encode(np.zeros((60, 3)))
clip = Pipeline.from_pretrained("x")("v.mp4", ["cam"])
print(clip.signals["cam"].shape, tokenizer.modality.grid)
"""


@pytest.mark.slow
def test_a_users_code_passes_strict_type_checks(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER + 'wrong: int = tokenizer.encode(np.zeros((60, 3)))\n')
    # torch's own types, minutes to read, are left out: nothing that a user touches here is one.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\nfollow_imports = silent\n"
                                       "[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", tmp_path / "user.py",
               tmp_path / "wrong.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (error,) = [line for line in done.stdout.splitlines() if "error:" in line]
    assert done.returncode == 1 and "wrong.py" in error, done.stdout


HEAVY = ("torch._dynamo", "torchvision", "timm", "torchmetrics", "scipy", "matplotlib", "wandb")


def test_what_is_slow_to_import_is_imported_where_it_is_needed():
    """Together they would more than double the time that every command and every rank takes to start."""
    code = ("import sys, egom2p.generation.recordings, egom2p.training.pretraining, "
            "egom2p.training.tokenizer_training\n"
            f"print(*sys.modules.keys() & {set(HEAVY)})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
