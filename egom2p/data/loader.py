"""Token shards -> packed micro-batches, one list an optimiser step.

`TokenStream` answers "what is global sample number i"; `StepLoader` turns steps into this rank's
micro-batches, in worker processes when asked. A step's samples are a pure function of (seed, step): no
state but the step is needed to go on.
"""

import contextlib
import gc
import hashlib
import heapq
import logging
import math
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.process
import multiprocessing.queues
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from egom2p.data.batch import MaskedSample, PackedBatch, pack, with_tensors
from egom2p.data.masking import MaskArgs, Masker
from egom2p.data.order import MixtureOrder, PassOrder
from egom2p.data.remote import ShardCache, default_cache
from egom2p.data.tokens import TokenDataset
from egom2p.errors import DamagedClip, UserError
from egom2p.modalities import ModalitySet

log = logging.getLogger(__name__)

OPEN_FILES = 65536

@dataclass(frozen=True)
class DatasetArgs:
    """weight: sampling weight. modalities: those to use, all when empty. input_only: never asked for in this
    data set. path: below data.root when it is not `[MODALITIES]/NAME`; `[a,b]` lists name modalities."""

    weight: float = 1.0
    modalities: tuple[str, ...] = ()
    input_only: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceArgs:
    """Of any training's data. workers: loader processes a rank (0 = in the training process). shuffle_shards: shards
    whose clips are mixed together. max_damaged: share of unreadable clips beyond which (and beyond ten) the run ends;
    0: any ends it."""

    workers: int = 0
    shuffle_shards: int = 16
    max_damaged: float = 0.01

    def __post_init__(self) -> None:
        if self.workers < 0 or self.shuffle_shards < 1 or not 0 <= self.max_damaged <= 1:
            raise ValueError("workers must not be below 0, shuffle_shards at least 1, and max_damaged from 0 to 1")


def tolerated(share: float, clips: int) -> float:
    """How many of so many clips may be unreadable, `share` being data.max_damaged."""
    return max(share * clips, 10) if share else 0


@dataclass(frozen=True, kw_only=True)
class DataArgs(SourceArgs):
    """root: folder of the token shards; datasets: the mixture, by name. root and a data set's path may be URLs (s3://,
    hf://, https://, pipe:); their shards are kept in the folder `cache`, at most cache_gb of them, and a fetch that
    fails is tried again for up to retry_s seconds."""

    root: str
    datasets: dict[str, DatasetArgs]
    cache: str = ""
    cache_gb: float = 50.0
    retry_s: float = 300.0

    def shard_cache(self) -> ShardCache:
        return ShardCache(Path(self.cache) if self.cache else default_cache(), self.cache_gb * 1e9, self.retry_s)


@dataclass
class StepBatch:
    """One rank's part of a global batch: micro-batches, and the samples that could not be read. parcel: what it came
    in."""

    step: int
    micro_batches: list[PackedBatch]
    damaged: list[str] = field(default_factory=list)
    parcel: "_Parcel | None" = None

    def to(self, device: torch.device) -> "StepBatch":
        """On the device: what came in a parcel by one copy, which the host does not wait for."""
        if self.parcel is not None:
            return replace(self.parcel, flat=self.parcel.flat.to(device, non_blocking=True)).open()
        return replace(self, micro_batches=[m.to(device) for m in self.micro_batches])

    def pin_memory(self) -> "StepBatch":
        """Called by torch's DataLoader when a GPU will take the batch."""
        return StepBatch(self.step, [m.pin_memory() for m in self.micro_batches], self.damaged)


class TokenStream:
    """Global sample number -> MaskedSample."""

    def __init__(self, args: DataArgs, modalities: ModalitySet, masking: MaskArgs, seed: int,
                 redraw: bool = True) -> None:
        self.args, self.modalities = args, modalities
        for name, entry in args.datasets.items():
            unknown = set(entry.modalities + entry.input_only) - set(modalities.names)
            if unknown:
                raise UserError(f"data set '{name}' names an unknown modality '{sorted(unknown)[0]}'")
        if not args.datasets or not sum(d.weight for d in args.datasets.values()) > 0:
            raise UserError("data.datasets needs at least one data set with a weight above 0")
        self.cache = args.shard_cache()
        self.datasets = [TokenDataset.open(args.root, name, entry.path, modalities, entry.modalities, self.cache)
                         for name, entry in args.datasets.items()]
        self.mixture = MixtureOrder([d.weight for d in args.datasets.values()], seed)
        self.passes = [PassOrder(d.shard_sizes, args.shuffle_shards, seed, salt)
                       for salt, d in enumerate(self.datasets)]
        self.maskers = [Masker(masking, _with_input_only(modalities, entry.input_only), seed, redraw)
                        for entry in args.datasets.values()]

        self.windows = [-1] * len(self.datasets)
        self.present = [d.present() for d in self.datasets]
        self.num_tokens = np.array([m.num_tokens for m in modalities])

    def fingerprint(self) -> str:
        """Hash of the index; a resumed run must see the same one."""
        return hashlib.sha256("".join(d.fingerprint() for d in self.datasets).encode()).hexdigest()

    def locate(self, number: int) -> tuple[int, int]:
        """(data set index, clip number) of a global sample number."""
        dataset, draw = self.mixture.locate(number)
        return dataset, self.passes[dataset].element(draw)

    def cost(self, number: int) -> int:
        """Tokens of a sample, from the index and its mask budgets alone (unobserved positions are not known yet)."""
        dataset, element = self.locate(number)
        counts = np.where(self.present[dataset][:, element], self.num_tokens, 0)
        num_inputs, num_targets, _ = self.maskers[dataset].plan(counts, number)
        return int(num_inputs.sum() + num_targets.sum())

    def sample(self, number: int, group: int = 0) -> MaskedSample:
        """Raises DamagedClip."""
        dataset, draw = self.mixture.locate(number)
        self._read_ahead(dataset, draw)
        tokens = self.datasets[dataset].read(self.passes[dataset].element(draw)).tokens
        return MaskedSample(number, *self.maskers[dataset].mask(tokens, number), group)


    def _read_ahead(self, dataset: int, draw: int) -> None:
        """When a window of shards begins, fetch the remote ones of the next."""
        if self.datasets[dataset].is_remote:
            window, following = self.passes[dataset].window(draw)
            if window > self.windows[dataset]:
                self.windows[dataset] = window
                for shard in following:
                    self.cache.ahead(self.datasets[dataset].shard_files(shard))


class FixedSet:
    """A fixed list of held-out clips with fixed masks, the same at every evaluation.

    Clips are spread evenly over the data sets; masks depend on the position in the list only.
    """

    def __init__(self, datasets: list[TokenDataset], modalities: ModalitySet, masking: MaskArgs, samples: int) -> None:
        self.datasets, self.samples = datasets, samples
        self.masker = Masker(masking, modalities, seed=0)

    def sample(self, number: int, group: int = 0) -> MaskedSample:
        dataset = self.datasets[number % len(self.datasets)]
        share = -(-self.samples // len(self.datasets))
        element = (number // len(self.datasets)) * len(dataset) // share
        return MaskedSample(number, *self.masker.mask(dataset.read(element).tokens, number), group)


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt out to ranks and micro-batches.

    Without costs sample j goes to rank j mod world, then into micro-batches in order. With costs, samples go,
    the heaviest first, to the lightest micro-batch of all ranks (micro_batch_size is then a mean), so that
    token counts balance. Either way it is a pure function of the step.
    """

    batch_size: int
    micro_batch_size: int
    group_samples: int
    rank: int = 0
    world: int = 1

    def numbers(self, step: int) -> np.ndarray:
        """Global sample numbers of this rank in `step` (steps count from 0)."""
        return np.arange(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)

    @property
    def num_micro(self) -> int:
        """Micro-batches of one rank in a step; the same on every rank, also where samples are not."""
        return -(-self.batch_size // (self.world * self.micro_batch_size))

    def deal(self, step: int, cost: Callable[[int], int] | None) -> list[list[int]]:
        """Sample numbers of each of this rank's micro-batches in `step`, ascending."""
        if cost is None or self.num_micro * self.world == 1:
            numbers, size = self.numbers(step).tolist(), self.micro_batch_size
            return [numbers[i * size : (i + 1) * size] for i in range(self.num_micro)]
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        costs = sorted(((cost(n), n) for n in numbers), key=lambda pair: (-pair[0], pair[1]))
        bins = [(0, index, []) for index in range(self.num_micro * self.world)]
        for tokens, number in costs:
            load, index, members = heapq.heappop(bins)
            heapq.heappush(bins, (load + tokens, index, [*members, number]))
        mine = sorted((index, members) for _, index, members in bins if index % self.world == self.rank)
        return [sorted(members) for _, members in mine]

    def group(self, number: int) -> int:
        return (number % self.batch_size) // self.group_samples

    @property
    def num_groups(self) -> int:
        return -(-self.batch_size // self.group_samples)


class StepDataset(Dataset):
    """Step -> StepBatch; the index of a torch DataLoader is the step itself."""

    def __init__(self, stream: TokenStream | FixedSet, num_modalities: int, plan: BatchPlan) -> None:
        self.stream, self.num_modalities, self.plan = stream, num_modalities, plan

    def __getitem__(self, step: int) -> StepBatch:
        micro, damaged = [], []
        for numbers in self.plan.deal(step, getattr(self.stream, "cost", None)):
            samples = []
            for number in numbers:
                try:
                    samples.append(self.stream.sample(number, self.plan.group(number)))
                except DamagedClip as error:
                    damaged.append(f"sample {number}: {error}")
            micro.append(pack(samples, self.num_modalities))
        return StepBatch(step, micro, damaged)


def step_loader(dataset: StepDataset, steps: range, workers: int) -> Iterator[StepBatch]:
    """Steps in order, read ahead by `workers` processes (0 = here)."""
    for batch in in_order(_Parcels(dataset) if workers else dataset, steps, workers, ahead=4):
        yield batch.open() if isinstance(batch, _Parcel) else batch


def in_order(dataset: Dataset, order: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """`dataset[i]` for each i of `order`, which is asked for its next only when a worker is free for it; read ahead by
    `workers` forked processes, `ahead` each (0 = here).

    A UserError in a worker is raised here; a worker that dies ends everything with a UserError that says why.
    """
    options = {"prefetch_factor": ahead, "multiprocessing_context": _WorkerContext()} if workers else {}
    if workers:
        _raise_open_files()
    loader = DataLoader(_Answers(dataset) if workers else dataset, batch_size=None, sampler=order, num_workers=workers,
                        pin_memory=torch.cuda.is_available(), worker_init_fn=_start_worker if workers else None,
                        **options)
    answers = iter(loader)
    try:
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
            yield answer
    except RuntimeError as error:
        raise _worker_lost(error) from error
    finally:
        # The workers end now, not when the last traceback that holds their iterator is gone.
        getattr(answers, "_shutdown_workers", lambda: None)()


def _raise_open_files() -> None:
    """More open files for this process, as far as the system lets it: shards, and a descriptor for every step on its
    way from a worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Answers(Dataset):
    """A worker's side: a user's mistake is an answer, so that it arrives without torch's traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except UserError as error:
            return error


class _Parcels(Dataset):
    """A StepDataset whose steps travel as one tensor."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> "StepBatch | _Parcel":
        return _Parcel.of(self.dataset[step])


@dataclass
class _Place:
    """Stands for a tensor in a parcel: where in the one it lies."""

    start: int
    shape: tuple[int, ...]


@dataclass
class _Parcel:
    """A StepBatch on its way from a worker: its tensors end to end in one, which takes one file descriptor instead of
    ten a micro-batch, and one pinned copy."""

    batch: StepBatch  # its micro-batches with places for tensors
    flat: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch) -> "StepBatch | _Parcel":
        tensors: list[torch.Tensor] = []

        def put(tensor: torch.Tensor) -> _Place:
            place = _Place(sum(map(len, tensors)), tuple(tensor.shape))
            tensors.append(tensor.reshape(-1))
            return place

        micro = [with_tensors(m, put) for m in batch.micro_batches]
        if len({t.dtype for t in tensors}) != 1:
            return batch
        return cls(replace(batch, micro_batches=micro), torch.cat(tensors))

    def open(self) -> StepBatch:
        """The batch, its tensors views of the one."""
        def take(place: _Place) -> torch.Tensor:
            return self.flat[place.start : place.start + math.prod(place.shape)].view(place.shape)

        micro = [with_tensors(m, take, _Place) for m in self.batch.micro_batches]
        return replace(self.batch, micro_batches=micro, parcel=self)

    def pin_memory(self) -> "_Parcel":
        return replace(self, flat=self.flat.pin_memory())


class _WorkerPopen(multiprocessing.popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()


class _WorkerProcess(multiprocessing.context.ForkProcess):
    @staticmethod
    def _Popen(process: multiprocessing.process.BaseProcess) -> _WorkerPopen:
        return _WorkerPopen(process)


class _WorkerQueue(multiprocessing.queues.Queue):
    @staticmethod
    def _on_queue_feeder_error(error: Exception, _: object) -> None:
        """A batch that cannot be handed over would be printed and dropped, and the training would wait for ever."""
        print(f"loader worker: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)


class _WorkerContext(multiprocessing.context.ForkContext):
    """Forked processes that are killed where others would be asked to leave with a signal, which loader workers
    ignore, and that end when they cannot hand over a batch."""

    Process = _WorkerProcess

    def Queue(self, maxsize: int = 0) -> _WorkerQueue:
        return _WorkerQueue(maxsize, ctx=self)


def _start_worker(_: int) -> None:
    """Workers leave signals to the training process, which ends them when it ends."""
    torch.set_num_threads(1)
    gc.enable()  # the training process, which was forked, collects garbage by its steps
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _worker_lost(error: RuntimeError) -> Exception:
    """What to tell of an error that torch's DataLoader raised because of its workers; any other error as it is."""
    said = " ".join(str(error).split())
    if not any(words in said for words in LOST_WORDS):
        return error
    shared = f"{shutil.disk_usage('/dev/shm').total / 2**20:.3g} MiB" if Path("/dev/shm").is_dir() else "absent"
    return UserError(f"a loader worker was lost ({said[:200]}). Memory is full, or /dev/shm, through which workers "
                     f"hand over their batches ({shared}); give a container more (docker --shm-size=8g), or set fewer "
                     f"data.workers (0 needs none)")


# How torch and the kernel say so (torch/utils/data/dataloader.py, ATen/MapAllocator.cpp).
LOST_WORDS = ("is killed by signal", "exited unexpectedly", "Bus error", "shared memory", "unable to write to file",
              "No space left on device")


def _with_input_only(modalities: ModalitySet, names: tuple[str, ...]) -> ModalitySet:
    return ModalitySet(replace(m, target=False) if m.name in names else m for m in modalities)
