"""Checkpoints that are whole or absent.

`RUN/checkpoints/step_00001000/` holds the model's export (`config.json`, `model.safetensors`), the
optimiser (`optimizer.safetensors`) and `state.json` with the step, the data fingerprint and a checksum of
every file. It is written aside, flushed to disk and renamed; then the link `latest` is swapped. No pickle.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from egom2p.errors import UserError
from egom2p.model.export import WEIGHTS, load_weights

log = logging.getLogger(__name__)

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class CheckpointArgs:
    """every: steps between checkpoints (0 = only at the end); keep_last: how many are kept."""

    every: int = 1000
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError("keep_last must be at least 1")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, args: CheckpointArgs) -> None:
        self.folder, self.args = run_dir / "checkpoints", args

    def save(self, step: int, export: Callable[[Path], None], model: nn.Module, optimizer: torch.optim.Optimizer,
             state: dict[str, Any]) -> Path:
        """Write step `step`; afterwards drop all but the last `keep_last`."""
        final = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{final.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            export(aside)
            save_file(optimizer_tensors(model, optimizer), aside / OPTIMIZER)
            files = {p.name: _checksum(p) for p in sorted(aside.iterdir())}
            (aside / STATE).write_text(json.dumps({"step": step, **state, "files": files}, indent=1))
            for path in [*aside.iterdir(), aside]:
                _flush(path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{final}: checkpoint not written ({error}); earlier ones are untouched. "
                            "Free space or move run.dir, then start the same command again") from error
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        self._point_latest_to(final)
        for old in self.steps()[: -self.args.keep_last]:
            shutil.rmtree(self.folder / f"step_{old:08d}")
        return final

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest checkpoint whose files are all as written; damaged ones are named and skipped."""
        for step in reversed(self.steps()):
            folder = self.folder / f"step_{step:08d}"
            try:
                state = json.loads((folder / STATE).read_text())
                damaged = [name for name, digest in state["files"].items() if _checksum(folder / name) != digest]
            except (OSError, ValueError, KeyError) as error:
                damaged = [str(error)]
            if not damaged:
                self._point_latest_to(folder)
                return folder, state
            log.warning("%s is damaged (%s); trying the one before", folder, ", ".join(damaged))
        return None

    def _point_latest_to(self, folder: Path) -> None:
        link = self.folder / ".latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self.folder / "latest")
        _flush(self.folder)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimiser state from a whole checkpoint, in place."""
    load_weights(model, load_file(folder / WEIGHTS), folder / WEIGHTS)
    tensors = load_file(folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        keys = [k for k in tensors if k.rpartition("|")[0] == name]
        if keys:
            optimizer.state[parameter] = {k.rpartition("|")[2]: _place(tensors[k], parameter) for k in keys}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{parameter|entry: tensor} of the optimiser's state."""
    return {f"{name}|{entry}": value.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            for entry, value in optimizer.state.get(parameter, {}).items()}


def _place(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Moments live with their parameter; the fused step counter too."""
    return tensor.to(parameter.device)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
