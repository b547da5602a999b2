"""Clips: aligned raw signals, stored as WebDataset tars (`KEY.<signal>.npy`, `KEY.rgb.mp4`, `KEY.json`).

Known signals and their arrays:
  rgb    (T, H, W, 3) uint8
  depth  (T, H, W) float16, metres along the optical axis, 0 = no reading
  cam    (T, 4, 4) float32, world_from_camera, OpenCV axes, metres
  gaze   (T, 3) float32, x and y in units of the square frame's side, valid (1 or 0)
Any other name is a (T, C) float array of its own.
"""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from egom2p.data.tarindex import index_tars, npy_bytes, write_tar
from egom2p.data.video import decode_video
from egom2p.errors import UserError

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


def write_clips(path: Path, clips: Iterable[Clip]) -> int:
    """Write one tar, aside and then renamed, so that it is whole or absent. Returns the number of clips."""
    return write_tar(path, map(_to_files, clips))


def expand_paths(pattern: str) -> list[Path]:
    """Files named by a glob with `[a,b]` lists and `{000..010}` ranges, sorted. UserError when none exists."""
    paths = []
    for text in expand_pattern(pattern):
        path = Path(text)
        if path.is_dir():
            paths += sorted(path.rglob("*.tar"))
        elif any(c in text for c in "*?"):
            anchor = Path(path.anchor or ".")
            paths += sorted(anchor.glob(str(path.relative_to(path.anchor)) if path.anchor else text))
        elif path.exists():
            paths.append(path)
    if not paths:
        raise UserError(f"no file matches {pattern}; give a folder of tars or a pattern such as 'clips/*.tar'")
    return paths


def expand_pattern(pattern: str) -> list[str]:
    """Expand `[a,b]` lists (the released notation) and `{a,b}`, `{000..010}` braces."""
    return list(braceexpand(re.sub(r"\[([^\[\]]*,[^\[\]]*)\]", r"{\1}", pattern)))


def read_clips(pattern: str, only: set[str] | None = None) -> Iterator[Clip]:
    """Clips of every tar that `pattern` names, in file order; `only` limits which signals are decoded.

    A tar that breaks off is read up to the break and named in the log; a clip that cannot be decoded is
    named and skipped.
    """
    for path in expand_paths(pattern):
        yield from _read_tar(path, only)


class ClipIndex:
    """The clips that `pattern` names, read one at a time and in any order. A clip that cannot be decoded is None."""

    def __init__(self, pattern: str) -> None:
        self.rows: list[tuple[str, Path, dict[str, tuple[int, int]]]] = []
        for entry in index_tars([p for p in expand_paths(pattern) if p.suffix == ".tar"]):
            files: dict[str, dict[str, tuple[int, int]]] = {}
            for key, suffix, offset, size in zip(entry.keys, entry.suffixes, entry.offsets.tolist(), entry.sizes.tolist(), strict=True):
                files.setdefault(key, {})[suffix] = (offset, size)
            self.rows += [(key, entry.path, members) for key, members in files.items()]
        if not self.rows:
            raise UserError(f"{pattern}: no clip there")
        self.keys = [key for key, _, _ in self.rows]
        repeated = len(self.keys) - len(set(self.keys))
        if repeated:
            raise UserError(f"{pattern}: {repeated} clip keys occur twice; evaluate the data sets one by one")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int, only: set[str] | None = None) -> Clip | None:
        """Clip `number` with its signals, or those named in `only`."""
        key, path, members = self.rows[number]
        with path.open("rb") as file:
            files = {}
            for suffix, (offset, size) in members.items():
                if suffix == "json" or only is None or suffix.partition(".")[0] in only:
                    file.seek(offset)
                    files[suffix] = file.read(size)
        return next(_decode_clip(path, key, files), None)


def count_clips(pattern: str) -> int:
    """Number of clips that `pattern` names, from the tar headers alone."""
    total = 0
    for path in expand_paths(pattern):
        with tarfile.open(path) as tar:
            total += len({name.partition(".")[0] for name in tar.getnames()})
    return total


def _read_tar(path: Path, only: set[str] | None) -> Iterator[Clip]:
    try:
        with tarfile.open(path, "r:") as tar:
            key, files = "", {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key and files:
                    yield from _decode_clip(path, key, files)
                    files = {}
                key = stem
                if suffix == "json" or only is None or suffix.partition(".")[0] in only:
                    files[suffix] = tar.extractfile(member).read()
            if files:
                yield from _decode_clip(path, key, files)
    except (tarfile.TarError, OSError, EOFError) as error:
        log.warning("%s: unreadable from here on, the clips before it are used (%s)", path, error)


def _decode_clip(path: Path, key: str, files: dict[str, bytes]) -> Iterator[Clip]:
    """Yield the clip, or nothing (with a warning) when it is damaged."""
    try:
        meta = json.loads(files.pop("json", b"{}"))
        signals = {}
        for suffix, data in files.items():
            name, _, ext = suffix.partition(".")
            if ext == "npy":
                signals[name] = np.load(io.BytesIO(data), allow_pickle=False)
            elif ext == "mp4":
                signals[name] = decode_video(data)[0]
        yield Clip(key, meta.get("dataset", ""), signals, meta)
    except (ValueError, OSError, EOFError) as error:
        log.warning("%s: clip %s is damaged and skipped (%s)", path, key, error)


def _to_files(clip: Clip) -> dict[str, str | bytes]:
    files = {f"{name}.npy": npy_bytes(array) for name, array in clip.signals.items()}
    meta = json.dumps({"dataset": clip.dataset, **clip.meta}, sort_keys=True).encode()
    return {"__key__": clip.key, **files, "json": meta}
