"""The one training loop, read from top to bottom. Pretraining and tokenizer training are its tasks.

A step: take this rank's micro-batches, learn how many targets the whole global batch has (one small
all-reduce), back-propagate each micro-batch's share of the global loss, clip, update, log. Everything
random is derived from (seed, step), so the step and the weights are all there is to resume from.
"""

import contextlib
import json
import logging
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from egom2p.config import dump, read_yaml, to_plain
from egom2p.errors import UserError
from egom2p.model.blocks import compile_blocks
from egom2p.model.flops import peak_flops
from egom2p.training.checkpoint import Checkpoints, restore
from egom2p.training.distributed import World, barrier, process_group, sum_over_ranks
from egom2p.training.log import MetricsLog, environment
from egom2p.training.optim import make_optimizer, make_schedule

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: they move the work around or add to it, and change no step.
MAY_CHANGE = ("run.", "data.workers", "train.micro_batch_size", "train.steps", "train.tokens", "train.timeout_s",
              "log.", "checkpoint.", "eval.", "resume.")


@dataclass(frozen=True)
class RunArgs:
    """dir: folder of the run; starting a command again in the same folder resumes it."""

    dir: str


@dataclass(frozen=True)
class ResumeArgs:
    """force: resume although the configuration or the data changed."""

    force: bool = False


@dataclass(frozen=True)
class TrainArgs:
    """batch_size is the global batch; micro_batch_size what one process computes at a time (0 = all of its part).
    One of steps and tokens (samples x budget) says how long. precision: compute type, weights stay float32
    (float64 computes and stores in float64). deterministic: refuse operations that vary from run to run.
    compile: torch.compile the blocks, with dynamic lengths."""

    batch_size: int
    steps: int = 0
    tokens: int = 0
    micro_batch_size: int = 0
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    deterministic: bool = False
    compile: bool = False
    threads: int = 0
    timeout_s: int = 600

    def __post_init__(self) -> None:
        if bool(self.steps) == bool(self.tokens):
            raise ValueError("give one of steps and tokens")
        if self.batch_size < 1:
            raise ValueError("batch_size must be at least 1")

    def num_steps(self, tokens_per_sample: int) -> int:
        return self.steps or -(-self.tokens // (tokens_per_sample * self.batch_size))

    def micro_batch(self, world: int) -> int:
        """Samples a process computes at a time."""
        if self.batch_size % world:
            fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise UserError(f"train.batch_size={self.batch_size} does not divide by {world} processes; use one of {fits[:12]} processes")
        return min(self.micro_batch_size or self.batch_size, self.batch_size // world)


@dataclass(frozen=True)
class EvalArgs:
    """every: steps between evaluations on held-out data (0 = never); the rest says on what."""

    every: int = 0
    samples: int = 64
    root: str = ""
    datasets: tuple[str, ...] = ()
    clips: str = ""


class Task(Protocol):
    """What differs between trainings."""

    model: nn.Module
    tokens_per_sample: int

    def fingerprint(self) -> str: ...
    def steps(self, steps: range) -> Iterator[Any]:
        """This rank's StepBatch of each step."""
    def begin_step(self, batch: Any) -> None:
        """Called before the micro-batches, on every rank: collective sums."""
    def loss(self, micro: Any, forward: nn.Module) -> tuple[Tensor, Tensor]:
        """This micro-batch's additive share of the global loss, and its vector of sums for `figures`."""
    def figures(self, sums: Tensor) -> dict[str, float]:
        """Sums over all ranks -> logged figures; must hold `loss`."""
    def after_step(self, step: int) -> None: ...
    def evaluate(self) -> dict[str, float]: ...
    def export(self, folder: Path) -> None: ...


def run_training(config: Any, make_task: Any) -> Path:
    """Train as `config` says; `make_task(config, world)` builds the Task. Returns the run's folder."""
    with process_group(config.train.timeout_s) as world:
        _set_up_torch(config.train)
        task = make_task(config, world)
        run_dir = Path(config.run.dir)
        _check_same_run(config, run_dir, config.resume.force)
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(dump(config))
            (run_dir / "environment.json").write_text(json.dumps(environment(task.fingerprint()), indent=1))
        barrier()
        _Loop(config, task, world, run_dir).run()
    return run_dir


class _Loop:
    def __init__(self, config: Any, task: Task, world: World, run_dir: Path) -> None:
        self.config, self.task, self.world, self.run_dir = config, task, world, run_dir
        dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        self.model = task.model.to(world.device, dtype).train()
        if config.train.compile:
            compile_blocks(self.model)
        self.total = config.train.num_steps(task.tokens_per_sample)
        self.schedule = make_schedule(config.optim, config.train.batch_size, self.total,
                                      task.tokens_per_sample * config.train.batch_size)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.checkpoints = Checkpoints(run_dir, config.checkpoint)
        self.damaged = 0
        self.step = self._resume()
        self.forward = self.model if world.size == 1 else DistributedDataParallel(
            self.model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)
        self.metrics = MetricsLog(run_dir, config.log, self.step, self.total, to_plain(config), world.is_main)

    def run(self) -> None:
        every = self.config
        waited, logged_at, logged_step = 0.0, time.perf_counter(), self.step
        batches = self.task.steps(range(self.step, self.total))
        while self.step < self.total:
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            self._count_damage(batch.damaged)
            lr = self.schedule(self.step)
            sums, grad_norm = self._train_step(batch, lr)
            self.step += 1
            self.metrics.advance()
            if self._due(every.log.every) or self.step == 1:
                now = time.perf_counter()
                self._log(sums, grad_norm, lr, (now - logged_at) / (self.step - logged_step), waited / (self.step - logged_step))
                waited, logged_at, logged_step = 0.0, time.perf_counter(), self.step
            if every.eval.every and (self._due(every.eval.every) or self.step == self.total):
                before = time.perf_counter()
                self._evaluate()
                logged_at += time.perf_counter() - before  # training speed leaves evaluation out
            if self._due(every.checkpoint.every) or self.step == self.total:
                self._save()
        self.metrics.close()

    def _train_step(self, batch: Any, lr: float) -> tuple[Tensor, Tensor]:
        """Accumulate the global batch's gradient, clip, update. Returns this rank's sums and the gradient norm."""
        self.task.begin_step(batch)
        sums: Tensor | None = None
        for index, micro in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.forward.no_sync():
                with self._autocast():
                    loss, part = self.task.loss(micro.to(self.world.device), self.forward)
                # DistributedDataParallel averages over ranks; the shares of the loss are meant to be summed.
                (loss * self.world.size).backward()
            sums = part if sums is None else sums + part
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(self.step)
        return sums, grad_norm

    def _log(self, sums: Tensor, grad_norm: Tensor, lr: float, seconds: float, waited: float) -> None:
        figures = self.task.figures(sum_over_ranks(sums.clone()))
        if not torch.isfinite(grad_norm):
            raise UserError(f"step {self.step}: the gradient is not finite (loss {figures['loss']}); lower optim.lr or look at the data. "
                            f"The last checkpoint in {self.checkpoints.folder} is from before")
        batch = self.config.train.batch_size
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else _peak_rss()
        flops = figures.pop("flops", 0.0)
        if flops:
            figures["tflops"] = flops / seconds / 1e12
            peak = peak_flops(torch.cuda.get_device_name()) if self.world.device.type == "cuda" else None
            figures.update({"mfu": flops / seconds / (peak * self.world.size)} if peak else {})
        self.metrics.write({"step": self.step, **figures, "lr": lr, "grad_norm": grad_norm.item(), "samples_per_s": batch / seconds,
                            "tokens_per_s": figures.get("tokens", 0) / seconds, "data_wait_s": waited,
                            "data_wait_share": waited / seconds, "eta_s": (self.total - self.step) * seconds, "peak_memory_gb": memory / 1e9})

    def _evaluate(self) -> None:
        before = time.perf_counter()
        self.model.eval()
        with torch.no_grad(), self._autocast():
            figures = self.task.evaluate()
        self.model.train()
        if figures:
            self.metrics.write({"step": self.step, **figures, "eval_s": time.perf_counter() - before})

    def _save(self) -> None:
        if self.world.is_main:
            self.checkpoints.save(self.step, self.task.export, self.model, self.optimizer,
                                  {"fingerprint": self.task.fingerprint(), "damaged": self.damaged})
        barrier()

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if any; returns the step to go on from."""
        found = self.checkpoints.newest_whole() if self.world.is_main else None
        if self.world.size > 1:
            shared = [found]
            torch.distributed.broadcast_object_list(shared, src=0)
            found = shared[0]
        if found is None:
            return 0
        folder, state = found
        if state["fingerprint"] != self.task.fingerprint() and not self.config.resume.force:
            raise UserError(f"{folder}: the data changed since this checkpoint (clips, shards or modalities differ), so the data order would "
                            "too; restore the shards, choose another run.dir, or insist with resume.force=true")
        restore(folder, self.model, self.optimizer)
        self.damaged = state["damaged"]
        log.info("resuming %s from step %d of %d", self.run_dir, state["step"], self.total)
        return state["step"]

    def _count_damage(self, damaged: list[str]) -> None:
        for message in damaged:
            log.warning("left out: %s", message)
        self.damaged += len(damaged)
        share = self.config.data.max_damaged
        seen = (self.step + 1) * self.config.train.batch_size / self.world.size
        if self.damaged > max(share * seen, 10):
            raise UserError(f"{self.damaged} of {seen:.0f} clips were unreadable, more than data.max_damaged={share}; "
                            "`egom2p shards check` lists the damaged files")

    def _autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0


def _check_same_run(config: Any, run_dir: Path, force: bool) -> None:
    """Refuse to write into the folder of another run; the differences are named."""
    path = run_dir / "config.yaml"
    if not path.exists() or force:
        return
    old = _flatten(OmegaConf.to_container(read_yaml(path)))
    new = _flatten(to_plain(config))
    # A key the old file lacks is an option younger than the run, unless it adds data or modalities.
    compared = old.keys() | {k for k in new if k.startswith(("data.datasets.", "modalities."))}
    differing = [k for k in sorted(compared) if old.get(k) != new.get(k) and not k.startswith(MAY_CHANGE)]
    if differing:
        shown = "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing[:8])
        raise UserError(f"{run_dir} holds another run ({shown}); choose another run.dir, or insist with resume.force=true")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, child in tree.items() for k, v in _flatten(child, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def _set_up_torch(args: TrainArgs) -> None:
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
