"""Checkpoints that are whole or absent, written in the background.

`RUN/checkpoints/step_00001000/` holds the model's export (`config.json`, `model.safetensors`), the
optimiser (`optimizer.safetensors`) and `state.json` with the step, the data fingerprint and a checksum of
every file. Training waits for a copy into host memory alone; a thread then writes it aside, flushes it to
disk and renames it, and swaps the link `latest`. No pickle. With train.ema the export holds the averaged weights, and
`training.safetensors` those that training goes on from.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from egom2p.errors import UserError
from egom2p.export import WEIGHTS, load_weights
from egom2p.training.average import WeightAverage
from egom2p.training.parallel import full_tensor, like_parameter

log = logging.getLogger(__name__)

OPTIMIZER, TRAINING, STATE = "optimizer.safetensors", "training.safetensors", "state.json"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class CheckpointArgs:
    """every: steps between checkpoints (0 = only at the end); keep_last: how many are kept; milestone_every: steps
    whose checkpoints are kept for good (0 = none). background: write while training goes on. retry_s: how long to go on
    trying when a checkpoint cannot be written (a full disk, a file system that is away) before the run ends."""

    every: int = 1000
    keep_last: int = 2
    milestone_every: int = 0
    background: bool = True
    retry_s: float = 600.0

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError("keep_last must be at least 1")
        if min(self.every, self.milestone_every, self.retry_s) < 0:
            raise ValueError("every, milestone_every and retry_s must not be below 0")


class Snapshot:
    """Copies of weights and optimiser state in host memory, in buffers that are used again by the next copy."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.training: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None,
             keep: bool) -> None:
        """Every rank calls it (shards are gathered); only one that is to `keep` the copy holds it."""
        weights = model.state_dict()
        averaged = average.tensors if average else {}
        for buffers, tensors in ((self.weights, weights | averaged),
                                 (self.training, {name: weights[name] for name in averaged}),
                                 (self.optimizer, optimizer_tensors(model, optimizer))):
            for name, tensor in tensors.items():
                whole = full_tensor(tensor)
                if keep:
                    _copy(buffers, name, whole)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what file systems say that have none


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes."""

    def __init__(self, run_dir: Path, args: CheckpointArgs, is_main: bool = True) -> None:
        self.folder, self.args, self.is_main = run_dir / "checkpoints", args, is_main
        self.snapshot = Snapshot()
        self.writer: threading.Thread | None = None
        self.failure: UserError | None = None
        self.hurry = threading.Event()
        if is_main:
            for leftover in self.folder.glob(".step_*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, export: Callable[[Path, dict[str, Tensor]], None], model: nn.Module,
             optimizer: torch.optim.Optimizer, state: dict[str, Any], average: WeightAverage | None = None) -> None:
        """Copy `step` into host memory, then write it in the background; afterwards drop what need not be kept.

        Every rank calls it. Waits for the checkpoint before, if that is still being written; ranks that must not count
        this one as lost meanwhile ask `busy` together first.
        """
        self.wait()
        self.snapshot.take(model, optimizer, average, self.is_main)
        if not self.is_main:
            return
        self.writer = threading.Thread(target=self._write_until_done, args=(step, export, state),
                                       name=f"checkpoint {step}")
        self.writer.start()

    def busy(self, seconds: float) -> bool:
        """Whether a checkpoint is still being written, after waiting at most so long for it."""
        if self.writer is not None:
            self.writer.join(seconds)
        return self.writer is not None and self.writer.is_alive()

    def wait(self) -> None:
        """Until the last `save` is on disk. Raises UserError when it could not be written."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        self.check()

    def check(self) -> None:
        """Raise UserError when the last `save` has given up."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Let a write under way end, without further retries."""
        self.hurry.set()
        if self.writer is not None:
            self.writer.join()

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def newest_whole(self, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest checkpoint whose files are all as written (of those of a step below `before`);
        damaged ones are named and skipped. Without `before`, `latest` is made to name it."""
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            folder = self.folder / f"step_{step:08d}"
            try:
                state = json.loads((folder / STATE).read_text())
                damaged = [name for name, digest in state["files"].items() if _checksum(folder / name) != digest]
            except (OSError, ValueError, KeyError) as error:
                damaged = [str(error)]
            if not damaged:
                if before is None:
                    self._point_latest_to(folder)
                return folder, state
            log.warning("%s is damaged (%s); trying the one before", folder, ", ".join(damaged))
        return None

    def _write_until_done(self, step: int, export: Callable[[Path, dict[str, Tensor]], None],
                          state: dict[str, Any]) -> None:
        """The thread: try, and while the disk refuses, try again with longer and longer pauses up to retry_s."""
        final, written = self.folder / f"step_{step:08d}", False
        started, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                if not written:
                    self._write(final, step, export, state)
                    written = True
                self._point_latest_to(final)
                self._remove_old(step)
                return
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
            except BaseException as error:  # such as MemoryError: nobody else would learn of it
                self.failure = UserError(f"{final}: checkpoint not written ({type(error).__name__}: {error}); earlier "
                                         "ones are untouched")
                return
            finally:
                shutil.rmtree(self.folder / f".{final.name}.part", ignore_errors=True)
            left = self.args.retry_s - (time.monotonic() - started)
            if left <= 0 or self.hurry.is_set():
                self.failure = UserError(f"{final}: checkpoint not written ({reason}); earlier ones are untouched. "
                                         "Free space or move run.dir, then start the same command again")
                return
            log.warning("%s: checkpoint not written (%s); trying again in %.0f s, giving up in %.0f s", final, reason,
                        pause, left)
            self.hurry.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _write(self, final: Path, step: int, export: Callable[[Path, dict[str, Tensor]], None],
               state: dict[str, Any]) -> None:
        aside = self.folder / f".{final.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        export(aside, self.snapshot.weights)
        save_file(self.snapshot.optimizer, aside / OPTIMIZER)
        if self.snapshot.training:
            save_file(self.snapshot.training, aside / TRAINING)
        files = {p.name: _checksum(p) for p in sorted(aside.iterdir())}
        (aside / STATE).write_text(json.dumps({"step": step, **state, "files": files}, indent=1))
        for path in [*aside.iterdir(), aside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)

    def _remove_old(self, step: int) -> None:
        """Those that need not be kept; one that cannot be removed is named, and tried again after the next."""
        # Later ones can only be damaged: this run went on from before them.
        for old in [s for s in self.steps() if s <= step][: -self.args.keep_last]:
            if not (self.args.milestone_every and old % self.args.milestone_every == 0):
                try:
                    shutil.rmtree(self.folder / f"step_{old:08d}")
                except OSError as error:
                    log.warning("%s cannot be removed (%s)", self.folder / f"step_{old:08d}", error.strerror)

    def check_disk(self) -> None:
        """Raises UserError on a file system without symbolic links, which `latest` is, before anything is trained."""
        link = self.folder / ".link.part"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            link.unlink(missing_ok=True)
            link.symlink_to("step")
            link.unlink()
        except OSError as error:
            if error.errno in NO_LINKS:
                raise UserError(f"{self.folder} is on a disk without symbolic links, which checkpoints need; choose "
                                f"another run.dir") from error

    def _point_latest_to(self, folder: Path) -> None:
        link = self.folder / ".latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self.folder / "latest")
        _flush(self.folder)


def restore_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Load the weights that training goes on from, in place, before the model is spread over processes. Returns those
    of the export, which are others when they are averaged."""
    exported = load_file(folder / WEIGHTS)
    training = load_file(folder / TRAINING) if (folder / TRAINING).exists() else {}
    load_weights(model, exported | training, folder / WEIGHTS)
    return exported


def restore_average(exported: dict[str, Tensor], average: WeightAverage) -> None:
    """Go on with the weights of a checkpoint's export; every rank takes its part of them. In one without an average it
    begins with the weights."""
    for name, parameter in average.model.named_parameters():
        average.tensors[name] = like_parameter(exported[name], parameter)


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state of a whole checkpoint; every rank takes its part of it."""
    tensors = load_file(folder / OPTIMIZER)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("|")
        by_parameter.setdefault(name, {})[entry] = tensor
    for name, parameter in model.named_parameters():
        if name in by_parameter:
            optimizer.state[parameter] = {entry: like_parameter(tensor, parameter)
                                          for entry, tensor in by_parameter[name].items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{parameter|entry: tensor} of the optimiser's state."""
    return {f"{name}|{entry}": value.detach()
            for name, parameter in model.named_parameters()
            for entry, value in optimizer.state.get(parameter, {}).items()}


def _copy(buffers: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    tensor = tensor.detach()
    kept = buffers.get(name)
    if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
        kept = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    kept.copy_(tensor, non_blocking=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
