"""Clips -> token shards, `ROOT/MODALITY/DATASET/shard-000000.tar`, 1 000 clips each.

What is in a shard depends on the clips alone. Any number of processes, of one torchrun or of several jobs, shares the
work: a shard of a modality belongs to whoever holds its lock, and one that is on record in `encode.json` is done.
In each process worker processes read, decode and normalise, the process itself runs the networks on batches, and a
thread writes, so that memory does not grow with the shards.
"""

import hashlib
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from egom2p.data.clips import ClipIndex
from egom2p.data.loader import in_order
from egom2p.data.shardtools import SHARD_CLIPS
from egom2p.data.tarindex import npy_bytes, write_tar
from egom2p.data.tokens import encode_tokens
from egom2p.distributed import World, environment_world
from egom2p.errors import DamagedClip, UserError
from egom2p.lock import FileLock
from egom2p.processes import cores
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.origin import Origin

log = logging.getLogger(__name__)

CHUNK_BYTES = 32e6  # of normalised signals that a worker hands over at once
LARGEST_CHUNK = 128
MAX_WORKERS = 16
AHEAD = 2  # chunks read ahead a worker
WAITING_TO_BE_WRITTEN = 2  # shards
POLL_S = 1.0


@dataclass(frozen=True)
class EncodeArgs:
    """dataset: name of the data set, instead of the one in the clips. batch: clips that a network takes at once (0 =
    what the tokenizer asks for). workers: reading processes beside this one (-1 = the cores that it has to itself)."""

    dataset: str = ""
    batch: int = 0
    workers: int = -1

    def __post_init__(self) -> None:
        if self.batch < 0 or self.workers < -1:
            raise UserError("--batch and --workers must not be below 0")


@dataclass(frozen=True)
class Shard:
    """clips: numbers in the index, in order."""

    dataset: str
    number: int
    clips: list[int]

    @property
    def file(self) -> str:
        return f"shard-{self.number:06d}.tar"


def encode_clips(tokenizers: list[Tokenizer], pattern: str, root: Path, args: EncodeArgs = EncodeArgs(),
                 world: World | None = None) -> dict[str, dict]:
    """Tokenise every clip of `pattern`; returns, by modality, what is on disk afterwards: {clips, left_out {reason:
    number}}. Ranks other than 0 return when there is nothing left for them to take.

    A clip that lacks a signal, or whose signal is damaged or carries no measurement, is left out of that modality and
    named, with the reason, in `encode.json`. Shards already whole are kept when they are of just these clips; when the
    clips have changed since, their shard is written anew. Meanwhile torch has at most the threads that the reading
    processes leave. Raises UserError for clips that a tokenizer is not for, for a key that two clips of a data set
    share, and for shards of an earlier, longer list of clips.
    """
    index = ClipIndex(pattern)
    plan = shards_of(index, args.dataset)
    _refuse_left_over(tokenizers, plan, root)
    return encode_shards(tokenizers, index, plan, root, pattern, args, world)


def encode_shards(tokenizers: list[Tokenizer], index: ClipIndex, plan: list[Shard], root: Path, source: str,
                  args: EncodeArgs = EncodeArgs(), world: World | None = None) -> dict[str, dict]:
    """`encode_clips` for shards of one's own making. source: where the clips are from, in words; a folder's shards must
    all say the same."""
    world = world or environment_world()
    own = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    workers = args.workers if args.workers >= 0 else min(MAX_WORKERS, max(0, own - 1))
    folders: dict[tuple[str, str], Origin] = {}
    for tokenizer in tokenizers:
        for name in {shard.dataset for shard in plan}:
            folders[tokenizer.modality.name, name] = origin = Origin(root / tokenizer.modality.name / name)
            origin.claim(tokenizer, source)
    work = _Work(tokenizers, index, folders)
    first = world.rank * len(plan) // world.size
    left = [*plan[first:], *plan[:first]]
    with (tqdm(total=len(index) * len(tokenizers), desc="encode", unit="signal", disable=not world.is_main) as bar,
          _threads(max(1, own - workers))):
        while left := _encode(work, left, args.batch, workers, bar):
            if not world.is_main:
                return {}
            time.sleep(POLL_S)  # others are at the rest; should they die, it falls to this one
    return _summary(folders)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """At most so many of torch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(number, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shards_of(index: ClipIndex, dataset: str = "") -> list[Shard]:
    """Clips by shard, each data set cut every SHARD_CLIPS clips."""
    clips: dict[str, list[int]] = defaultdict(list)
    for number in range(len(index)):
        clips[dataset or _dataset_of(index, number)].append(number)
    for name, numbers in clips.items():
        _refuse_equal_keys(index, name, numbers)
    return [Shard(name, start // SHARD_CLIPS, numbers[start : start + SHARD_CLIPS])
            for name, numbers in clips.items() for start in range(0, len(numbers), SHARD_CLIPS)]


def _refuse_equal_keys(index: ClipIndex, dataset: str, numbers: list[int]) -> None:
    """Modalities are paired by key, so that two clips of one key would be mixed."""
    if twice := index.first_twice(numbers):
        one, other = twice
        raise UserError(f"{index.path(one)} and {index.path(other)} both hold a clip {index.keys[one]} of '{dataset}'; "
                        f"encode them as two data sets, each with its own --dataset")


def _refuse_left_over(tokenizers: list[Tokenizer], plan: list[Shard], root: Path) -> None:
    """Shards on record of clips that are no longer among these would stay and be trained on."""
    for name in sorted({shard.dataset for shard in plan}):
        wanted = {shard.file for shard in plan if shard.dataset == name}
        for tokenizer in tokenizers:
            origin = Origin(root / tokenizer.modality.name / name)
            over = [n for n in origin.read().get("shards", {}) if n not in wanted]
            there = [n for n in over if (origin.folder / n).exists()]
            if there:
                raise UserError(f"{origin.folder / there[0]} is of clips that are not among these any more (there were "
                                f"more when it was encoded); remove it, or choose another --out")
            if over:
                origin.forget(over)


def _dataset_of(index: ClipIndex, number: int) -> str:
    try:
        return index.read(number, set()).dataset or "clips"
    except DamagedClip:
        return "clips"


def _encode(work: "_Work", shards: list[Shard], batch: int, workers: int, bar: tqdm) -> list[Shard]:
    """Encode whatever of `shards` nobody else is at; returns those that others are at."""
    held: list[Shard] = []
    tasks = _tasks(work, shards, held, bar)
    try:
        first = next(tasks, None)
        if first is None:
            return held
        chunks = in_order(_Reader(work.tokenizers, work.index), chain([first], tasks), workers, AHEAD)
        with ThreadPoolExecutor(1, "write") as writer:
            waiting: list[Future] = []
            for shard in _shards_of_ids(work, chunks, batch, bar):
                waiting.append(writer.submit(shard.write))
                while len(waiting) > WAITING_TO_BE_WRITTEN:
                    waiting.pop(0).result()
            for written in waiting:
                written.result()
    finally:
        work.release_all()
    return held


def _shards_of_ids(work: "_Work", chunks: Iterator["_Chunk"], batch: int, bar: tqdm) -> Iterator["_OpenShard"]:
    """Run the networks over the chunks; each shard when its last chunk is through."""
    shard = None
    for chunk in chunks:
        shard = shard or _OpenShard(work, chunk.shard, batch)
        shard.add(chunk)
        bar.update(chunk.signals)
        if chunk.is_last:
            yield shard
            shard = None


class _Work:
    """What is to be encoded by what, and who is at it."""

    def __init__(self, tokenizers: list[Tokenizer], index: ClipIndex, folders: dict[tuple[str, str], Origin]) -> None:
        self.tokenizers, self.index, self.folders = {t.modality.name: t for t in tokenizers}, index, folders
        self.known = {place: origin.read()["shards"] for place, origin in folders.items()}
        self.locks: dict[Path, FileLock] = {}
        self.seen: set[tuple[str, str, int]] = set()  # shards done before, for the progress bar

    def take(self, name: str, shard: Shard) -> bool | None:
        """True when the shard of that modality is this process's to encode, False when it is done, None when another
        process is at it."""
        if self._is_done(name, shard, self.known[name, shard.dataset].get(shard.file)):
            return False
        lock = FileLock(self.path(name, shard).with_name(f".{shard.file}.lock"))
        if not lock.take():
            return None
        record = self.folders[name, shard.dataset].read()["shards"].get(shard.file)
        if self._is_done(name, shard, record):  # by another process, since this one looked
            lock.release()
            return False
        if self.path(name, shard).exists():
            log.warning("%s: its clips %s; it is encoded anew", self.path(name, shard),
                        "have changed since it was encoded" if record else "are not on record")
        self.locks[self.path(name, shard)] = lock
        return True

    def path(self, name: str, shard: Shard) -> Path:
        return self.folders[name, shard.dataset].folder / shard.file

    def release_all(self) -> None:
        for lock in self.locks.values():
            lock.release()
        self.locks.clear()

    def _is_done(self, name: str, shard: Shard, record: dict | None) -> bool:
        if not record or not self.path(name, shard).exists():
            return False
        if record.get("stamp") == self.index.stamp(shard.clips):
            return True
        signal = self.tokenizers[name].modality.clip_signal
        return record["content"] == _hash(_content(self.index, number, signal) for number in shard.clips)


@dataclass
class _Task:
    """Some clips of a shard, for the modalities `names`."""

    shard: Shard
    clips: list[int]
    names: list[str]
    is_last: bool


@dataclass
class _Chunk:
    """The clips of a task, read: for each modality keys, units (n, ...) float32, observed (n, *grid), left_out {key:
    reason}, and for every clip, in order, a hash of its bytes."""

    shard: Shard
    names: list[str]
    is_last: bool
    signals: int
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    units: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    content: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def pin_memory(self) -> "_Chunk":
        """Called by torch's DataLoader when a GPU will take the units."""
        self.units = {name: x.pin_memory() for name, x in self.units.items()}
        return self


def _tasks(work: _Work, shards: list[Shard], held: list[Shard], bar: tqdm) -> Iterator[_Task]:
    """Tasks of the shards that this process gets hold of; those others are at go to `held`."""
    size = _chunk_size(list(work.tokenizers.values()))
    for shard in shards:
        taken = {name: work.take(name, shard) for name in work.tokenizers}
        names = [name for name, mine in taken.items() if mine]
        if None in taken.values():
            held.append(shard)
        done = {(name, shard.dataset, shard.number) for name, mine in taken.items() if mine is False} - work.seen
        work.seen |= done
        bar.update(len(shard.clips) * len(done))
        for start in range(0, len(shard.clips) if names else 0, size):
            yield _Task(shard, shard.clips[start : start + size], names, start + size >= len(shard.clips))


def _chunk_size(tokenizers: list[Tokenizer]) -> int:
    """Clips a task, such that a chunk has about CHUNK_BYTES."""
    sides = [(t.args.num_frames, t.frame_size) for t in tokenizers if t.modality.kind.is_picture]
    size = sum(frames * side * side * 3 * 4 for frames, side in sides)
    return int(np.clip(CHUNK_BYTES // size, 1, LARGEST_CHUNK)) if size else LARGEST_CHUNK


class _Reader(Dataset):
    """Task -> chunk, in a worker process."""

    def __init__(self, tokenizers: dict[str, Tokenizer], index: ClipIndex) -> None:
        self.tokenizers, self.index = tokenizers, index

    def __getitem__(self, task: _Task) -> _Chunk:
        chunk = _Chunk(task.shard, task.names, task.is_last, len(task.clips) * len(task.names))
        for name in task.names:
            kept = [r for r in (self._read(number, name, chunk) for number in task.clips) if r is not None]
            if kept:
                chunk.units[name] = self.tokenizers[name].stack([units for units, _ in kept], whole_grid=True)
                chunk.observed[name] = np.stack([observed for _, observed in kept])
        return chunk

    def _read(self, number: int, name: str, chunk: _Chunk) -> tuple[np.ndarray, np.ndarray] | None:
        """(network units, observed) of one clip; None, and the reason in the chunk, when it goes without."""
        tokenizer, key = self.tokenizers[name], self.index.keys[number]
        source = tokenizer.modality.clip_signal
        content, signal, reason = "", None, f"has no '{source}'"
        try:
            files = self.index.files(number, {source})
            content = _hash_files(key, source, files)
            signal = self.index.decode(number, files).signals.get(source)
        except DamagedClip as error:
            reason = f"damaged ({error.__cause__})"
        chunk.content[name].append(content)
        if signal is None:
            chunk.left_out[name][key] = reason
            return None
        tokenizer.check(signal, key)
        observed = tokenizer.observed(signal)
        if not np.any(observed):
            chunk.left_out[name][key] = f"its '{source}' carries no finite measurement"
            return None
        chunk.keys[name].append(key)
        return tokenizer.signal.normalize(signal), observed


def _content(index: ClipIndex, number: int, signal: str) -> str:
    """Hash of the bytes of one clip's signal; "" when they cannot be read."""
    try:
        return _hash_files(index.keys[number], signal, index.files(number, {signal}))
    except DamagedClip:
        return ""


def _hash_files(key: str, signal: str, files: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(f"{key} {signal}".encode(), digest_size=16)
    for suffix in sorted(files.keys() - {"json"}):
        digest.update(suffix.encode() + files[suffix])
    return digest.hexdigest()


def _hash(parts: Iterator[str] | list[str]) -> str:
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


class _OpenShard:
    """A shard that is being encoded: signals wait until a batch is full, ids until the shard is."""

    def __init__(self, work: _Work, shard: Shard, batch: int) -> None:
        self.work, self.shard, self.batch = work, shard, batch
        self.waiting: dict[str, list[tuple[list[str], Tensor, np.ndarray]]] = defaultdict(list)
        self.ids: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
        self.left_out: dict[str, dict[str, str]] = defaultdict(dict)
        self.content: dict[str, list[str]] = defaultdict(list)
        self.names: list[str] = []

    def add(self, chunk: _Chunk) -> None:
        self.names = chunk.names
        for name in chunk.names:
            self.content[name] += chunk.content[name]
            self.left_out[name].update(chunk.left_out[name])
            if name in chunk.units:
                self.waiting[name].append((chunk.keys[name], chunk.units[name], chunk.observed[name]))
            tokenizer = self.work.tokenizers[name]
            size = self.batch or tokenizer.encode_batch
            if sum(len(keys) for keys, _, _ in self.waiting[name]) >= size or chunk.is_last:
                self._encode(tokenizer, name, size)

    def _encode(self, tokenizer: Tokenizer, name: str, size: int) -> None:
        parts = self.waiting.pop(name, [])
        if not parts:
            return
        keys = [key for part in parts for key in part[0]]
        units, observed = torch.cat([x for _, x, _ in parts]), np.concatenate([o for _, _, o in parts])
        ids = np.concatenate([tokenizer.encode_units(batch) for batch in units.split(size)])
        self.ids[name] += [(key, encode_tokens(own, seen, tokenizer.modality))
                           for key, own, seen in zip(keys, ids, observed, strict=True)]

    def write(self) -> None:
        """Write the shard of each modality, put it on record and give its lock back."""
        stamp = self.work.index.stamp(self.shard.clips)
        for name in self.names:
            path = self.work.path(name, self.shard)
            lock = self.work.locks.pop(path)
            if not lock.lost:
                write_tar(path, ({"__key__": key, "npy": npy_bytes(ids)} for key, ids in self.ids[name]))
                reasons: dict[str, list[str]] = defaultdict(list)
                for key, reason in self.left_out[name].items():
                    reasons[reason].append(key)
                record = {"clips": len(self.ids[name]), "content": _hash(self.content[name]), "stamp": stamp,
                          "left_out": reasons}
                self.work.folders[name, self.shard.dataset].record(self.shard.file, record)
            lock.release()


def _summary(folders: dict[tuple[str, str], Origin]) -> dict[str, dict]:
    """By modality, over its data sets: {clips, left_out {reason: number}}; what was left out is said in the log."""
    found: dict[str, dict] = {}
    for (name, _), origin in folders.items():
        note = origin.read()
        total = note.get("total", {"clips": 0, "left_out": {}})
        entry = found.setdefault(name, {"clips": 0, "left_out": Counter()})
        entry["clips"] += total["clips"]
        entry["left_out"].update(total["left_out"])
        for reason, number in total["left_out"].items():
            keys = [key for record in note["shards"].values() for key in record["left_out"].get(reason, [])]
            log.warning("'%s': %d of %d clips go without it: %s (%s%s); all of them in %s", name, number,
                        total["clips"] + sum(total["left_out"].values()), reason, ", ".join(keys[:5]),
                        ", ..." if number > 5 else "", origin.path)
    return found
