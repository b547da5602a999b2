"""`train.profile=FROM:TO`: what the steps of a run are made of, as torch's profiler sees them."""

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from egom2p.distributed import World

log = logging.getLogger(__name__)

SHOWN = 25


def profiled_steps(text: str) -> range:
    """`FROM:TO`, steps counted from 1, both included -> the range; empty for "". ValueError for anything else."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ValueError(f"profile must be FROM:TO, two steps counted from 1 such as 20:25, not '{text}'")
    return range(int(first), int(last) + 1)


class StepProfiler:
    """Profiles the steps in `text` and writes RUN/profile/rank0.json (a trace for ui.perfetto.dev or chrome://tracing),
    rank0.txt (the costliest operations) and, on CUDA, rank0_memory.pickle (for pytorch.org/memory_viz), by rank."""

    def __init__(self, text: str, run_dir: Path, world: World) -> None:
        self.steps, self.folder, self.world = profiled_steps(text), run_dir / "profile", world
        self.profiler: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, counted from 1."""
        if number not in self.steps:
            yield
            return
        if self.profiler is None:
            self._start()
        yield
        if number == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled so far, if anything."""
        if self.profiler is None:
            return
        self.profiler.__exit__(None, None, None)
        name = self.folder / f"rank{self.world.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(f"{name}.json")
            sums = self.profiler.key_averages()
            by = "self_cuda_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
            name.with_suffix(".txt").write_text(sums.table(sort_by=by, row_limit=SHOWN) + "\n")
            if self.world.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{name}_memory.pickle")
        except (OSError, RuntimeError) as error:  # looking at a run must not end it
            log.warning("%s: the profile cannot be written (%s)", self.folder, error)
        else:
            log.info("profile of steps %d to %d in %s", self.steps[0], self.steps[-1], self.folder)
        if self.world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler, self.steps = None, range(0)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            with contextlib.suppress(RuntimeError):
                torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
        self.profiler = profile(activities=activities, record_shapes=True)
        self.profiler.__enter__()
