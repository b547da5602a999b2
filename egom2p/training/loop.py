"""The one training loop, read from top to bottom. Pretraining and tokenizer training are its tasks.

A step: take this rank's micro-batches, learn how many targets the whole global batch has (one small
all-reduce), back-propagate each micro-batch's share of the global loss, clip, update, log. Everything
random is derived from (seed, step), so the step and the weights are all there is to resume from.
"""

import gc
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from egom2p.config import dump, read_yaml, to_plain
from egom2p.data.loader import tolerated
from egom2p.distributed import (
    World,
    barrier,
    check_same_everywhere,
    max_over_ranks,
    multiplies_bfloat16,
    process_group,
    shorten_timeout,
    sum_over_ranks,
)
from egom2p.errors import Preempted, UserError
from egom2p.export import CONFIG
from egom2p.lock import RunLock
from egom2p.model.attention import newest_flash_attention
from egom2p.model.flops import peak_flops
from egom2p.training.arguments import TrainArgs
from egom2p.training.average import WeightAverage
from egom2p.training.checkpoint import Checkpoints, restore_average, restore_optimizer, restore_weights
from egom2p.training.guard import Guard
from egom2p.training.log import MetricsLog, environment, summary, write_to_run
from egom2p.training.optim import make_optimizer, make_schedule
from egom2p.training.parallel import full_tensor, gradients_stay_local, spread, unsharded_root
from egom2p.training.profile import StepProfiler
from egom2p.training.stop import StopRequest

log = logging.getLogger(__name__)

WAITS_TOO_LONG = 0.25  # share of a step's time that waiting for data may take before it is said

GARBAGE_STEPS = 50  # steps between two collections
REPORT_STEPS = 1000  # steps after which left out ones are counted at the latest
WAIT_S = 5.0  # between two looks at a checkpoint that is being written

# Keys that may change when a run is resumed: they move the work around or add to it, and change no step.
MAY_CHANGE = ("run.", "data.workers", "data.cache", "train.micro_batch_size", "train.steps", "train.tokens",
              "train.timeout_s", "train.first_timeout_s", "train.parallel", "train.max_skipped", "train.profile",
              "data.max_damaged", "data.retry_s",
              "log.", "checkpoint.", "resume.", "debug.", "generation.")


class Task(Protocol):
    """What differs between trainings."""

    model: nn.Module
    tokens_per_sample: int

    def fingerprint(self) -> str: ...
    def steps(self, steps: range) -> Iterator[Any]:
        """This rank's StepBatch of each step."""
    def begin_step(self, batch: Any) -> None:
        """Called before the micro-batches, on every rank: collective sums."""
    def loss(self, micro: Any, forward: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """This micro-batch's additive share of the global loss, its vector of sums for `figures`, and (B,) whether each
        sample's own loss is not finite."""
    def figures(self, sums: Tensor) -> dict[str, float]:
        """Sums over all ranks -> logged figures; must hold `loss`."""
    def learns(self, name: str, step: int) -> bool:
        """Whether a parameter is changed in `step` (counted from 0); its gradient is dropped otherwise."""
    def after_step(self, step: int, skipped: Tensor) -> None:
        """After the optimiser; skipped: 1.0 on the device when the step was left out."""
    def faster_data(self) -> str:
        """What would make reading faster, in words; "" when nothing is known."""
    def evaluate(self) -> dict[str, float]: ...
    def predict(self, folder: Path) -> dict[str, float]:
        """Figures of `eval.tasks`; pictures go to `folder`. Every rank calls it."""
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None: ...
    def inspect(self, batch: Any) -> list[dict[str, Any]]:
        """One row a sample of this rank: what it is and its own loss. For `debug.replay_step`."""


def run_training(config: Any, make_task: Any) -> Path:
    """Train as `config` says; `make_task(config, world)` builds the Task. Returns the run's folder.

    Raises Preempted after SIGTERM or SIGUSR1, when a checkpoint has been saved.
    """
    set_up_torch(config.train)
    with process_group(config.train.first_timeout_s) as world:
        if config.train.precision == "bfloat16" and world.is_main and not multiplies_bfloat16(world.device):
            log.warning("this CPU has no bfloat16 products and imitates them, some forty times slower than float32: "
                        "train.precision=float32 is the faster one here")
        task = make_task(config, world)
        check_same_everywhere(task.fingerprint(), "the data differ between hosts: {} others than rank 0's; bring all "
                                                  "copies to the same state")
        run_dir, replaying = Path(config.run.dir), bool(config.debug.replay_step)
        _check_same_run(config, run_dir, config.resume.force)
        if replaying and not (run_dir / "config.yaml").exists():
            raise UserError(f"{run_dir} holds no run whose step could be replayed; correct run.dir")
        if (run_dir / CONFIG).is_file():
            raise UserError(f"{run_dir} holds an export, which would be taken for the run's result; choose another "
                            f"run.dir")
        if not replaying:
            _check_not_longer(run_dir, config.train.num_steps(task.tokens_per_sample))
        with RunLock(run_dir, world.is_main and not replaying) as lock:
            if world.is_main and not replaying:
                write_to_run(run_dir / "config.yaml", dump(config))
                write_to_run(run_dir / "environment.json", json.dumps(environment(task.fingerprint()), indent=1))
            barrier()
            loop = Loop(config, task, world, run_dir)
            loop.replay(config.debug.replay_step) if replaying else loop.run(lock)
    return run_dir


class Loop:
    """The state of one training in this process."""

    def __init__(self, config: Any, task: Task, world: World, run_dir: Path) -> None:
        self.config, self.task, self.world, self.run_dir = config, task, world, run_dir
        dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        self.model = task.model.to(world.device, dtype).train()
        if config.train.compile:
            self.model.compile()
        self.total = config.train.num_steps(task.tokens_per_sample)
        self.schedule = make_schedule(config.optim, config.train.batch_size, self.total,
                                      task.tokens_per_sample * config.train.batch_size)
        replayed = config.debug.replay_step or None
        self.checkpoints = Checkpoints(run_dir, config.checkpoint, world.is_main and not replayed)
        if world.is_main and not replayed:
            self.checkpoints.check_disk()
        folder, state = self._find_checkpoint(before=replayed)
        if folder is None and getattr(task, "unstarted", None):
            raise task.unstarted
        exported = restore_weights(folder, self.model) if folder else {}
        self.forward = spread(self.model, config.train.parallel, world, config.train.precision, config.train.reduce)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        if folder:
            restore_optimizer(folder, self.model, self.optimizer)
        if folder and self.average:
            restore_average(exported, self.average)
        self.step, self.damaged = state.get("step", 0), state.get("damaged", 0)
        self._say_other_length(state.get("total", self.total))
        self.said_slow = False
        self.guard = Guard(world.device, config.train.max_skipped, state)
        self.metrics = MetricsLog(run_dir, config.log, self.step, self.total, to_plain(config),
                                  world.is_main and not replayed)

    def _say_other_length(self, planned: int) -> None:
        """Say what a run that was made longer or shorter does to the learning rate."""
        if planned != self.total:
            batch = self.config.train.batch_size
            old = make_schedule(self.config.optim, batch, planned, self.task.tokens_per_sample * batch)
            log.warning("this run was planned for %d steps and now has %d: from step %d on the learning rate follows "
                        "the new length and is %.3g there, where the old schedule has %.3g", planned, self.total,
                        self.step, self.schedule(self.step), old(min(self.step, planned)))

    def run(self, lock: RunLock) -> None:
        """Train to the end, or until asked to stop."""
        started, first = time.perf_counter(), self.step
        try:
            with (StopRequest(self.world) as stop, closing(self.task.steps(range(self.step, self.total))) as batches,
                  closing(StepProfiler(self.config.train.profile, self.run_dir, self.world)) as profiler,
                  garbage_collected_by_steps() as collect):
                self._run(stop, batches, lock, profiler, collect)
        finally:
            self.checkpoints.close()
            self.metrics.close()
        if self.world.is_main:
            took = tqdm.format_interval(time.perf_counter() - started)
            print(f"{self.run_dir}: step {self.total} of {self.total}, {self.total - first} steps in {took}; "
                  f"{summary(self.run_dir)}")

    def _run(self, stop: StopRequest, batches: Iterator[Any], lock: RunLock, profiler: StepProfiler,
             collect_garbage: Callable[[int], None]) -> None:
        every = self.config
        if self.world.size > 2 and self.step < self.total:
            self._settle_reduction_layout()
        waited, logged_at, logged_step = 0.0, time.perf_counter(), self.step
        first = True
        while self.step < self.total:
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            self._count_damage(batch.damaged)
            lr = self.schedule(self.step)
            with profiler.step(self.step + 1):
                sums, grad_norm = self._train_step(batch, lr)
            self.step += 1
            collect_garbage(self.step)
            self.metrics.advance()
            if self.step % REPORT_STEPS == 0:  # also where neither log nor checkpoint is asked for
                self.guard.report()
            stopping = stop.agreed() and self.step < self.total
            if self._due(every.log.every) or self.step == 1:
                stop.meet()  # a lost rank is noticed on the hosts, before this one waits for its device
                now = time.perf_counter()
                self._log(sums, grad_norm, lr, (now - logged_at) / (self.step - logged_step),
                          waited / (self.step - logged_step))
                waited, logged_at, logged_step = 0.0, time.perf_counter(), self.step
            if every.eval.every and (self._due(every.eval.every) or self.step == self.total):
                before = time.perf_counter()
                try:
                    self._evaluate()
                except UserError:
                    # Held-out data that went away must not cost the steps since the last checkpoint. (Of several ranks
                    # nobody knows whether all failed.)
                    if self.world.size == 1:
                        self._save()
                    raise
                logged_at += time.perf_counter() - before  # training speed leaves evaluation out
            if self._due(every.checkpoint.every) or self.step == self.total or stopping:
                self._save()
            if stopping:
                self._leave()
            self.checkpoints.check()
            lock.check()
            if first:
                shorten_timeout(self.config.train.timeout_s, stop.group)
                first = False
        self._wait_for_writer()
        barrier()

    def replay(self, step: int) -> None:
        """Run up to `step` (counted from 1) and write down that step's figures and samples. Nothing is saved or
        logged."""
        if not 0 < step <= self.total:
            raise UserError(f"debug.replay_step={step} is not a step of this run (1 .. {self.total})")
        if self.step < step - 1:
            log.info("replaying %d steps from step %d to get there", step - 1 - self.step, self.step)
        for batch in self.task.steps(range(self.step, step)):
            samples = self._inspect(batch) if self.step == step - 1 else []
            sums, grad_norm = self._train_step(batch, self.schedule(self.step))
            self.step += 1
        figures = self.task.figures(sum_over_ranks(sums.clone()))
        everyone: list[Any] = [samples]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            torch.distributed.all_gather_object(everyone, samples)
        if self.world.is_main:
            rows = sorted((row for part in everyone for row in part), key=lambda r: r["sample"])
            path = self.run_dir / f"replay_step_{step}.json"
            path.write_text(json.dumps({"step": step, **figures, "grad_norm": grad_norm.item(), "samples": rows},
                                       indent=1))
            worst = sorted(rows, key=lambda r: math.inf if r["loss"] is None else r["loss"], reverse=True)
            print(f"step {step}: loss {figures['loss']}, gradient norm {grad_norm.item()}; {len(rows)} samples in "
                  f"{path}; highest losses: "
                  + ", ".join(f"{r['sample']} ({r.get('key', '')}) {r['loss']}" for r in worst[:5]))
        barrier()

    def _train_step(self, batch: Any, lr: float) -> tuple[Tensor, Tensor]:
        """Accumulate the global batch's gradient, clip, update. Returns this rank's sums and the gradient norm."""
        self.task.begin_step(batch)
        sums: Tensor | None = None
        losses, suspects = [], []
        for index, micro in enumerate(batch.micro_batches):
            with gradients_stay_local(self.forward, index < len(batch.micro_batches) - 1):
                with self._autocast():
                    loss, part, doubtful = self.task.loss(micro.to(self.world.device), self.forward)
                # Gradients are averaged over ranks; the shares of the loss are meant to be summed.
                (loss * self.world.size).backward()
            sums = part if sums is None else sums + part
            losses.append(loss.detach())
            suspects.append(doubtful)
        for name, parameter in self.model.named_parameters():
            if not self.task.learns(name, self.step):
                parameter.grad = None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or float("inf")))
        skipped = self.guard.judge(self.step, grad_norm, losses, suspects,
                                   [m.numbers.tolist() for m in batch.micro_batches])
        self.optimizer.found_inf = skipped  # fused AdamW leaves everything as it is when this is 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.step, skipped)
        self.task.after_step(self.step, skipped)
        return sums, grad_norm

    def _settle_reduction_layout(self) -> None:
        """Let DistributedDataParallel settle its buckets before the first step counts.

        It regroups gradients after its first backward pass, and above two ranks the grouping decides the order of
        summation. So that a resumed run sums as the first one did, one pass over the samples of step 0 goes ahead, its
        gradients thrown away.
        """
        batch = next(self.task.steps(range(1)))
        self.task.begin_step(batch)
        with self._autocast():
            loss, _, _ = self.task.loss(batch.micro_batches[-1].to(self.world.device), self.forward)
        (loss * 0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(-1, torch.ones((), device=self.world.device))

    def _log(self, sums: Tensor, grad_norm: Tensor, lr: float, seconds: float, waited: float) -> None:
        figures = self.task.figures(sum_over_ranks(sums.clone()))
        self.guard.report()
        self._check_damage()
        batch = self.config.train.batch_size
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else _peak_rss()
        flops = figures.pop("flops", 0.0)
        if flops:
            figures["tflops"] = flops / seconds / 1e12
            peak = peak_flops(torch.cuda.get_device_name()) if self.world.device.type == "cuda" else None
            figures.update({"mfu": flops / seconds / (peak * self.world.size)} if peak else {})
        if waited > WAITS_TOO_LONG * seconds and self.step > 1 and not self.said_slow and self.world.is_main:
            self.said_slow = True
            log.warning("%.0f %% of the time is spent waiting for data%s", 100 * waited / seconds,
                        self.task.faster_data())
        self.metrics.write({"step": self.step, **figures, "lr": lr, "grad_norm": grad_norm.item(),
                            "skipped": self.guard.skipped,
                            "samples_per_s": batch / seconds, "tokens_per_s": figures.get("tokens", 0) / seconds,
                            "data_wait_s": waited,
                            "data_wait_share": waited / seconds, "eta_s": (self.total - self.step) * seconds,
                            "peak_memory_gb": memory / 1e9})

    def _evaluate(self) -> None:
        before = time.perf_counter()
        args, pictures = self.config.eval, self.run_dir / "pictures" / f"step_{self.step:08d}"
        self.model.eval()
        averaged = self.average.in_place() if self.average else nullcontext()
        with torch.no_grad(), self._autocast(), averaged, unsharded_root(self.forward):
            figures = self.task.evaluate()
            if args.tasks and (self._due(args.tasks_every or args.every) or self.step == self.total):
                figures |= self.task.predict(pictures)
        self.model.train()
        if figures:
            self.metrics.write({"step": self.step, **figures, "eval_s": time.perf_counter() - before},
                               sorted(pictures.glob("*.png")) if self.world.is_main else [])

    @torch.no_grad()
    def _inspect(self, batch: Any) -> list[dict[str, Any]]:
        with self._autocast():
            return self.task.inspect(batch)

    def _save(self) -> None:
        self._wait_for_writer()
        state = {"fingerprint": self.task.fingerprint(), "damaged": self._check_damage(), "total": self.total,
                 **self.guard.state()}
        self.checkpoints.save(self.step, self.task.export, self.model, self.optimizer, state, self.average)
        if not self.config.checkpoint.background:
            self._wait_for_writer()

    def _wait_for_writer(self) -> None:
        """Until the last checkpoint is on disk, every rank together: rank 0 may wait for a slow disk longer than
        train.timeout_s (checkpoint.retry_s), and the others must not count it as lost."""
        pause = min(WAIT_S, self.config.train.timeout_s / 4)
        while max_over_ranks(torch.tensor(float(self.checkpoints.busy(pause)), device=self.world.device)):
            pass
        self.checkpoints.check()

    def _leave(self) -> None:
        """After a request to stop: wait for the checkpoint on every rank, then raise Preempted."""
        self._wait_for_writer()
        barrier()
        raise Preempted(f"stopped as asked after step {self.step} of {self.total}, checkpoint saved; start the same "
                        f"command again to go on")

    def _find_checkpoint(self, before: int | None) -> tuple[Path | None, dict[str, Any]]:
        """Folder and state of the newest whole checkpoint, the same on all ranks; (None, {}) at the start of a run."""
        found = self.checkpoints.newest_whole(before) if self.world.is_main else None
        if self.world.size > 1:
            shared = [found]
            torch.distributed.broadcast_object_list(shared, src=0)
            found = shared[0]
        if found is None:
            return None, {}
        folder, state = found
        if state["fingerprint"] != self.task.fingerprint() and not self.config.resume.force:
            raise UserError(f"{folder}: the data changed since this checkpoint (clips, shards or modalities differ), "
                            f"so the data order would "
                            "too; restore the shards, choose another run.dir, or insist with resume.force=true")
        log.info("resuming %s from step %d of %d", self.run_dir, state["step"], self.total)
        # The count of damaged clips is kept for the whole run; the first rank carries what was seen before.
        return folder, {**state, "damaged": state["damaged"] if self.world.is_main else 0}

    def _count_damage(self, damaged: list[str]) -> None:
        for message in damaged:
            log.error("left out: %s", message)
        self.damaged += len(damaged)

    def _check_damage(self) -> int:
        """Clips left out so far on all ranks. Raises UserError on all of them when they are too many."""
        damaged = int(sum_over_ranks(torch.tensor(float(self.damaged), device=self.world.device)).item())
        share, seen = self.config.data.max_damaged, self.step * self.config.train.batch_size
        if damaged > tolerated(share, seen):
            raise UserError(f"{damaged} of {seen} clips were unreadable, more than data.max_damaged={share}; "
                            "`egom2p shards check` lists the damaged files")
        return damaged

    def _autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0


@contextmanager
def garbage_collected_by_steps() -> Iterator[Callable[[int], None]]:
    """Python's collector runs every GARBAGE_STEPS steps and not when it likes: on many ranks some rank is always
    collecting, and all of them wait for it (as torchtitan does)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield lambda step: gc.collect(1) if step % GARBAGE_STEPS == 0 else None
    finally:
        if enabled:
            gc.enable()


def _check_same_run(config: Any, run_dir: Path, force: bool) -> None:
    """Refuse to write into the folder of another run; the differences are named."""
    differing = "" if force else what_differs(config, run_dir)
    if differing:
        raise UserError(f"{run_dir} holds another run ({differing}); choose another run.dir, or insist with "
                        f"resume.force=true")


def _check_not_longer(run_dir: Path, steps: int) -> None:
    """Refuse to call a run finished at fewer steps than it has."""
    try:
        state = json.loads((run_dir / "checkpoints/latest/state.json").read_text())
        done = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: an earlier one will be taken
        return
    if done > steps:
        raise UserError(f"{run_dir} holds step {done}, beyond the {steps} asked for; choose another run.dir or more "
                        f"steps")


def what_differs(config: Any, run_dir: Path, may_change: tuple[str, ...] = MAY_CHANGE) -> str:
    """What of a configuration is not as the run in a folder has it, keys that begin with `may_change` left aside; ""
    when nothing is, or there is no run."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return ""
    old = _flatten(OmegaConf.to_container(read_yaml(path)))
    new = _flatten(to_plain(config))
    # A key the old file lacks is an option younger than the run, unless it adds data or modalities.
    compared = old.keys() | {k for k in new if k.startswith(("data.datasets.", "modalities.", "loss.weights."))}
    differing = [k for k in sorted(compared) if old.get(k) != new.get(k) and not k.startswith(may_change)
                 and not (k.startswith("modalities.") and k.endswith(".tokenizer"))]  # checked by what it makes
    return "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing[:8])


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, child in tree.items() for k, v in _flatten(child, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def set_up_torch(args: TrainArgs) -> None:
    """Threads, seed and whether operations must repeat bit by bit, before the process computes anything."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Sums inside the switch (NVLS, CollNet) add in an order of their own; NCCL reads this when the group is made.
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree,CollnetDirect,CollnetChain")
        # MKL's products repeat bit by bit from process to process only when asked to, and by any number of threads only
        # strictly (oneMKL's guide, Conditional Numerical Reproducibility). Read at the first product.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available():
        newest_flash_attention(torch.cuda.get_device_capability()[0])


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
