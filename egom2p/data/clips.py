"""Clips: aligned raw signals, stored as WebDataset tars (`KEY.<signal>.npy`, `KEY.rgb.mp4`, `KEY.depth.mkv`,
`KEY.json`; `data.storage` says what is in them).

Known signals and their arrays:
  rgb    (T, H, W, 3) uint8
  depth  (T, H, W) float16, metres along the optical axis, 0 = no reading
  cam    (T, 4, 4) float32, world_from_camera, OpenCV axes, metres
  gaze   (T, 3) float32, x and y in units of the square frame's side, valid (1 or 0)
Any other name is a (T, C) float array of its own.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from egom2p.data.remote import is_remote, local_copies
from egom2p.data.storage import DAMAGE, DECODERS, Store, from_file, to_file
from egom2p.data.tarindex import TarEntry, index_tars, read_at, write_tar
from egom2p.errors import DamagedClip, UserError
from egom2p.files import walk

log = logging.getLogger(__name__)

RATES = {"rgb": 8.0, "depth": 8.0, "cam": 30.0, "gaze": 30.0}


@dataclass(frozen=True)
class Clip:
    """One aligned sample. `signals` maps a signal's name to its array, any of them absent.

    meta: `source` (recording), `start` (seconds into it), `rates` {signal: Hz}, `intrinsics` (3 x 3 nested
    list, pixels of the stored frames), and whatever a data set adds.
    """

    key: str
    dataset: str
    signals: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)


def write_clips(path: Path, clips: Iterable[Clip], store: Store = "npy") -> int:
    """Write one tar, aside and then renamed, so that it is whole or absent. Returns the number of clips."""
    return write_tar(path, (to_files(clip, store) for clip in clips))


def expand_paths(pattern: str) -> list[Path]:
    """Files named by a glob with `[a,b]` lists and `{000..010}` ranges, sorted; of a folder, all tars in it. UserError
    when none exists."""
    paths: list[Path] = []
    for text in expand_pattern(pattern):
        path = Path(text)
        if not path.exists() and any(c in text for c in "*?"):
            found = matches(path)
        else:
            found = [path] if path.exists() else []
        for one in found:
            paths += sorted(p for p in walk(one) if p.suffix == ".tar") if one.is_dir() else [one]
    if not paths:
        raise UserError(f"no file matches {pattern}; give a folder of tars or a pattern such as 'clips/*.tar'")
    return list(dict.fromkeys(paths))


def matches(pattern: Path) -> list[Path]:
    """What a path with `*` and `?` names, relative or absolute, sorted."""
    return sorted(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))


def _local_paths(pattern: str) -> list[Path]:
    """As `expand_paths`, of a URL the copies in the cache."""
    if not is_remote(pattern):
        return expand_paths(pattern)
    paths = local_copies(expand_pattern(pattern))
    if not paths:
        raise UserError(f"no tar at {pattern}")
    return paths


def expand_pattern(pattern: str) -> list[str]:
    """Expand `[a,b]` lists (the released notation) and `{a,b}`, `{000..010}` braces; what exists under just this name
    is no pattern."""
    if not is_remote(pattern) and os.path.exists(pattern):  # False, and no error, for a list that is no name
        return [pattern]
    try:
        return list(braceexpand(re.sub(r"\[([^\[\]]*,[^\[\]]*)\]", r"{\1}", pattern)))
    except ValueError as error:
        raise UserError(f"{pattern}: {error}; braces and brackets must come in pairs") from error


def read_clips(pattern: str, only: set[str] | None = None) -> Iterator[Clip]:
    """Clips of every tar that `pattern` names, in file order; `only` limits which signals are decoded.

    A tar that breaks off is read up to the break and named in the log; a clip that cannot be decoded is named and
    skipped.
    """
    index = ClipIndex(pattern)
    yield from index.readable(range(len(index)), only)


def count_clips(pattern: str) -> int:
    """Number of clips that `pattern` names, from the tar headers alone."""
    return len(ClipIndex(pattern))


class ClipIndex:
    """The clips that `pattern` names, read in any order: whole, some signals of them, or one. A pattern may be a URL
    (hf://, s3://, https://); its tars are fetched first, into the default cache of shards and at most what that holds.

    having: only clips that have this signal. keys (N,); shard_sizes (S,) clips a tar.
    """

    is_remote = False

    def __init__(self, pattern: str, having: str = "") -> None:
        self.is_remote = is_remote(pattern)
        self._build([p for p in _local_paths(pattern) if p.suffix == ".tar"], pattern, having)

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "ClipIndex":
        """The clips of some tars, in this order."""
        index = cls.__new__(cls)
        index._build(paths, str(paths[0].parent) if paths else "no tar", "")
        return index

    def _build(self, paths: Sequence[Path], pattern: str, having: str) -> None:
        self.rows: list[tuple[str, TarEntry, dict[str, tuple[int, int]]]] = []
        sizes = []
        for entry in index_tars(list(paths)):
            clips: dict[str, dict[str, tuple[int, int]]] = {}
            places = zip(entry.offsets.tolist(), entry.sizes.tolist(), strict=True)
            for key, suffix, place in zip(entry.keys, entry.suffixes, places, strict=True):
                clips.setdefault(key, {})[suffix] = place
            found = [(key, entry, members) for key, members in clips.items()
                     if not having or any(signal_of(suffix) == having for suffix in members)]
            self.rows += found
            sizes.append(len(found))
        if not self.rows:
            raise UserError(f"{pattern}: no clip there" + (f" has the signal '{having}'" if having else ""))
        self.keys = [key for key, _, _ in self.rows]
        self.shard_sizes = np.array([s for s in sizes if s], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def first_twice(self, numbers: Iterable[int]) -> tuple[int, int] | None:
        """The first two of some clips that have one key, None when each has its own."""
        seen: dict[str, int] = {}
        for number in numbers:
            if (other := seen.setdefault(self.keys[number], number)) != number:
                return other, number
        return None

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time of each tar: what tells clips that were replaced from the old ones."""
        tars = {tar.path: tar for _, tar, _ in self.rows}
        return [(tar.path.name, tar.size, self._written(tar)) for tar in tars.values()]

    def _written(self, tar: TarEntry) -> int:
        """When a tar was written; 0 for a copy of a remote one, of which that says only when it was fetched."""
        return 0 if self.is_remote else tar.mtime_ns

    def path(self, number: int) -> Path:
        """The tar that clip `number` lies in."""
        return self.rows[number][1].path

    def signals(self, number: int) -> set[str]:
        """Names of the signals of clip `number`, which is not read for them."""
        return {signal_of(suffix) for suffix in self.rows[number][2]} - {""}

    def read(self, number: int, only: set[str] | None = None) -> Clip:
        """Clip `number` with its signals, or those named in `only`. Raises DamagedClip."""
        return self.decode(number, self.files(number, only))

    def readable(self, numbers: Iterable[int], only: set[str] | None = None) -> Iterator[Clip]:
        """Those of some clips that can be decoded; the others are named in the log."""
        for number in numbers:
            try:
                yield self.read(number, only)
            except DamagedClip as error:
                log.warning("%s; it is left out", error)

    def files(self, number: int, only: set[str] | None = None) -> dict[str, bytes]:
        """{suffix: bytes} of clip `number`: of its json and its signals, or those named in `only`. Raises
        DamagedClip."""
        _, tar, members = self.rows[number]
        wanted = [s for s in members if s == "json" or (signal_of(s) and (only is None or signal_of(s) in only))]
        with self._damage(number):
            return {suffix: read_at(tar.path, *members[suffix], (tar.size, tar.mtime_ns)) for suffix in wanted}

    def decode(self, number: int, files: dict[str, bytes]) -> Clip:
        """Clip `number` of the bytes of its files. Raises DamagedClip."""
        with self._damage(number):
            meta = json.loads(files.get("json", b"{}"))
            if not isinstance(meta, dict):
                raise ValueError("its json is no mapping")
            signals = {signal_of(suffix): from_file(suffix.rpartition(".")[2], data)
                       for suffix, data in files.items() if signal_of(suffix)}
            return Clip(self.keys[number], meta.get("dataset", ""), signals, meta)

    def stamp(self, numbers: Iterable[int]) -> str:
        """A hash of where some clips lie and when their tars were written: equal stamps, equal clips."""
        digest = hashlib.blake2b(digest_size=16)
        for number in numbers:
            key, tar, members = self.rows[number]
            digest.update(f"{key} {tar.path.name} {tar.size} {self._written(tar)} {sorted(members.items())}\n"
                          .encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @contextlib.contextmanager
    def _damage(self, number: int) -> Iterator[None]:
        try:
            yield
        except MemoryError:  # of this machine: what a file claims is checked before
            raise
        except (*DAMAGE, UserError) as error:
            key, tar, _ = self.rows[number]
            raise DamagedClip(f"{tar.path}: clip {key} is damaged ({error})") from error

    def read_signal(self, number: int, signal: str) -> np.ndarray:
        """One raw signal of clip `number`, which must have it. Raises DamagedClip."""
        return self.read(number, {signal}).signals[signal]


def signal_of(suffix: str) -> str:
    """`rgb` of the file suffix `rgb.mp4`; "" when it is no signal's file."""
    name, _, extension = suffix.rpartition(".")
    return name if extension in DECODERS else ""


def to_files(clip: Clip, store: Store = "npy") -> dict[str, str | bytes]:
    """A WebDataset sample: `__key__` and {suffix: bytes}."""
    rates = {**RATES, **clip.meta.get("rates", {})}
    stored = {name: to_file(array, store, rates.get(name, 1.0)) for name, array in clip.signals.items()}
    meta = json.dumps({"dataset": clip.dataset, **clip.meta}, sort_keys=True).encode()
    return {"__key__": clip.key, **{f"{name}.{extension}": data for name, (extension, data) in stored.items()},
            "json": meta}
