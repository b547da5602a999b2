"""Where figures go: `metrics.jsonl` always, Weights & Biases when asked, a progress bar on rank 0."""

import contextlib
import json
import logging
import math
import os
import platform
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from egom2p import resources
from egom2p.errors import UserError
from egom2p.files import write_whole

log = logging.getLogger(__name__)

HELD_OUT = "eval/loss/"  # what the names of held-out losses begin with
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LogArgs:
    """every: steps between logged steps. wandb: also log to Weights & Biases (WANDB_MODE=offline works),
    under the name `project`."""

    every: int = 10
    wandb: bool = False
    project: str = "egom2p"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError("every must not be below 0")


class MetricsLog:
    """Appends one JSON object a logged step. On resume, lines after `step` are cut off."""

    def __init__(self, run_dir: Path, args: LogArgs, step: int, total: int, config: dict[str, Any],
                 active: bool) -> None:
        self.active, self.wandb = active, None
        if not active:
            return
        self.path, self.lines = run_dir / METRICS, []
        cut_after(self.path, step)
        self.bar = tqdm(total=total, initial=step, desc=run_dir.name, unit="step",
                        bar_format="{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} steps | {elapsed}{postfix}")
        if args.wandb:
            self.wandb = start_wandb(run_dir, args.project, config)

    def write(self, figures: dict[str, float], pictures: Sequence[Path] = ()) -> None:
        """One line of metrics.jsonl; figures and pictures also to Weights & Biases when that is on."""
        if not self.active:
            return
        # JSON has no NaN: a figure that is not finite is null.
        self.lines.append(json.dumps({k: v if math.isfinite(v) else None for k, v in figures.items()}) + "\n")
        self._flush()
        if "loss" in figures:
            self.bar.set_postfix_str(progress_text(figures), refresh=False)
        if self.wandb:
            self._write_wandb(figures, pictures)

    def _write_wandb(self, figures: dict[str, float], pictures: Sequence[Path]) -> None:
        """To Weights & Biases. What goes wrong there is said once and never stops a training."""
        import wandb

        try:
            images = {f"pictures/{p.stem}": wandb.Image(str(p)) for p in pictures}
            self.wandb.log({k: v for k, v in figures.items() if k != "step"} | images, step=int(figures["step"]))
        except Exception as error:
            log.warning("Weights & Biases fails (%s); the run goes on without, %s has every figure",
                        " ".join(str(error).split())[:200], self.path)
            self.wandb = None

    def _flush(self) -> None:
        """Append the lines not yet on disk. While the disk refuses they wait, and no half line stays behind."""
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                try:
                    file.write("".join(self.lines).encode())
                    file.flush()
                except OSError:
                    os.truncate(self.path, size)
                    raise
            self.lines.clear()
        except OSError as error:
            log.warning("%s: %d lines not written yet (%s)", self.path, len(self.lines), error)

    def advance(self) -> None:
        if self.active:
            self.bar.update(1)

    def close(self) -> None:
        if self.active:
            if self.lines:
                self._flush()
            self.bar.close()
            if self.wandb:
                with contextlib.suppress(Exception):
                    self.wandb.finish()


def start_wandb(run_dir: Path, project: str, config: dict[str, Any]) -> Any:
    """A Weights & Biases run under an id of its own, kept in RUN/wandb_id so that a resumed training goes on in it.

    Without a key, or when the service cannot be reached, it logs offline (`wandb sync` sends it later).
    """
    import wandb

    note = run_dir / "wandb_id"
    if not note.exists():
        write_to_run(note, uuid.uuid4().hex[:12] + "\n")
    told = {"project": project, "name": run_dir.name, "dir": str(run_dir), "config": config}
    # Without `finish_timeout` the end of a run waits for a service that went away as long as it takes.
    usual = {"console": "off", **({"finish_timeout": 60} if "finish_timeout" in wandb.Settings.model_fields else {})}
    offline = {"mode": "offline", "settings": wandb.Settings(**usual)}
    if "WANDB_MODE" in os.environ:
        online: dict[str, Any] = {"settings": wandb.Settings(**usual),
                                  "resume": "allow" if os.environ["WANDB_MODE"] == "online" else None}
    elif not _has_wandb_key():
        log.warning("no Weights & Biases key (wandb login, or WANDB_API_KEY); logging offline below %s", run_dir)
        online = offline
    else:
        online = {"settings": wandb.Settings(**usual, init_timeout=60), "resume": "allow"}
    for how in (online, offline):
        try:
            # After a failed start its id stays taken in this process; the run's own is kept for the next start.
            return wandb.init(**told, **how, id=note.read_text().strip() if how is online else uuid.uuid4().hex[:12])
        except Exception as error:
            log.warning("Weights & Biases cannot start (%s)%s", " ".join(str(error).split())[:200],
                        "; logging offline" if how is online else "; the run goes on without")
    return None


def _has_wandb_key() -> bool:
    """Whether a key is in the environment or in the netrc file that `wandb login` writes."""
    import wandb

    try:
        return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    except Exception:
        return False


def progress_text(figures: dict[str, float]) -> str:
    """What the progress bar shows of a logged step: loss, samples/s, real tokens/s, FLOP utilisation (FLOP/s where the
    device's peak is unknown), share of the time spent waiting for data, peak memory and time left."""
    speed = f"{figures['tflops']:.3g} TFLOP/s" if "tflops" in figures else ""
    speed = f"{figures['mfu']:.1%} MFU" if "mfu" in figures else speed
    parts = [f"loss {figures['loss']:.4f}", f"{figures['samples_per_s']:.3g} samples/s",
             f"{_short(figures['tokens_per_s'])} tokens/s", speed,
             f"data wait {figures['data_wait_share']:.1%}", f"{figures['peak_memory_gb']:.1f} GB",
             f"{tqdm.format_interval(figures['eta_s'])} left"]
    return " | ".join(p for p in parts if p)


def _short(number: float) -> str:
    return tqdm.format_sizeof(number) if number >= 1000 else f"{number:.0f}"


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that lie after `step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (record := _parse(line)) and record["step"] <= step]
    write_to_run(path, "".join(f"{line}\n" for line in kept))


def write_to_run(path: Path, text: str) -> None:
    """Write a file of the run, whole or not at all. Raises UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space or choose another run.dir") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged objects of a run, in order."""
    path = run_dir / METRICS
    return [r for line in path.read_text().splitlines() if (r := _parse(line))] if path.exists() else []


def last_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every figure that was logged, gaps (a step left out) passed over."""
    last: dict[str, Any] = {}
    for row in rows:
        last.update({k: v for k, v in row.items() if v is not None})
    return last


def environment(index_hash: str) -> dict[str, Any]:
    """What `environment.json` records: commit, versions, host, index hash."""
    return {"command": sys.argv, "commit": resources.commit(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "cuda": torch.version.cuda
            if torch.cuda.is_available() else None,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "host": socket.gethostname(), "threads": torch.get_num_threads(), "index_hash": index_hash}


def _processor() -> str:
    """The CPU's name where /proc tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def summary(run_dir: Path) -> str:
    """A run's last loss and the best of each held-out figure, in words."""
    rows = read_metrics(run_dir)
    losses = [r["loss"] for r in rows if r.get("loss") is not None]
    held_out = sorted({k for r in rows for k in r if k.startswith("eval/") and "loss" in k})
    best = [f"{k} {min(r[k] for r in rows if r.get(k) is not None):.4f}" for k in held_out
            if any(r.get(k) is not None for r in rows)]
    parts = ([f"last loss {losses[-1]:.4f}"] if losses else []) + ([f"best {', '.join(best)}"] if best else [])
    return "; ".join(parts)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and "step" in record else None
    except ValueError:
        return None
