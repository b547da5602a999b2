"""The files that come with the code: `cfgs/`, `tokenizers/` and `scripts/slurm/`, in a checkout or inside a wheel.

A path that exists wins; else the file of that name that was shipped. So `cfgs/train/debug.yaml` means the same in a
clone and, after `pip install`, in any folder.
"""

import difflib
import importlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from egom2p.errors import UserError

FOLDERS = ("cfgs", "tokenizers", "scripts/slurm")
PACKAGE = Path(__file__).parent
COMMIT = "COMMIT"


def root() -> Path:
    """The folder that holds FOLDERS: the checkout, or where `setup.py` puts them in a wheel."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


@cache
def commit() -> str | None:
    """The commit that this code is of: the checkout's, or what `egom2p submit` noted when it froze the code."""
    note = root() / COMMIT
    if root() != PACKAGE.parent:  # not a checkout: whatever repository lies around it is not ours
        return (note.read_text().strip() or None) if note.is_file() else None
    try:
        git = subprocess.run(["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() if git.returncode == 0 else None


def locate(path: str | Path) -> Path:
    """`path` itself when it exists, else the shipped file or folder of that name, else `path` unchanged."""
    path = Path(path)
    if path.exists() or path.is_absolute() or not path.parts:
        return path
    shipped = root() / path
    return shipped if is_shipped(path) and shipped.exists() else path


def load_object(name: str) -> Any:
    """What `package.module:attribute` names, in a module that is installed or lies in the working directory. Raises
    ImportError or AttributeError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), attribute)


def is_shipped(path: Path) -> bool:
    """Whether a relative path lies in one of the shipped folders (and does not climb out of it)."""
    return ".." not in path.parts and any(path.parts[: len(Path(f).parts)] == Path(f).parts for f in FOLDERS)


def configs() -> dict[str, str]:
    """{name: first comment line} of every shipped YAML, sorted."""
    found = {}
    for folder in ("cfgs", "tokenizers"):
        for path in sorted((root() / folder).rglob("*.yaml")):
            lines = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
            found[path.relative_to(root()).as_posix()] = lines[0] if lines else ""
    return found


def read_config(name: str) -> str:
    """The text of the shipped YAML `name`."""
    return _known(name).read_text()


def copy_config(name: str, target: Path, included: list[Path]) -> list[Path]:
    """Copy the shipped YAML `name` and the `included` ones it needs below `target`, laid out as they are; none is
    overwritten. Returns the copies."""
    files = dict.fromkeys([_known(name), *included])
    wanted = {target / p.resolve().relative_to(root().resolve()): p for p in files}
    taken = [copy for copy in wanted if copy.exists()]
    if taken:
        raise UserError(f"{taken[0]} exists already; choose another --copy folder or remove it")
    for copy, source in wanted.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return list(wanted)


def _known(name: str) -> Path:
    known = configs()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no shipped configuration '{name}'{hint} (`egom2p configs` lists them)")
    return root() / name
