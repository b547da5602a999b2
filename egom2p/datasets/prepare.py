"""`egom2p prepare`: raw sequences -> clips, a card and a contact sheet.

Each sequence becomes `OUT/SPLIT/SEQUENCE.tar` (absent when nothing of it is kept) and `OUT/records/SEQUENCE.json` with
what was kept, what was dropped and why. Sequences are independent: any number of processes writes the same files, a
second run does only what is missing, and one that fails is written down and harms no other.
"""

import importlib
import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.data.clips import write_clips
from egom2p.datasets import ADAPTERS
from egom2p.datasets.card import write_card
from egom2p.datasets.checks import Statistics
from egom2p.datasets.cutting import cut, safe
from egom2p.datasets.recording import BadSequence
from egom2p.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareArgs:
    """size: side of the stored frames in pixels; limit: clips a sequence (0 = all); workers: processes (0 = all
    cores)."""

    size: int = 256
    limit: int = 0
    workers: int = 0


def prepare(name: str, root: Path, out: Path, args: PrepareArgs, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Prepare every sequence (or those in `only`) of data set `name`. Returns the card."""
    adapter = make_adapter(name)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected {adapter.layout}")
    sequences = adapter.sequences(root)
    missing = set(only) - set(sequences)
    if missing:
        raise UserError(f"{root} has no sequence '{sorted(missing)[0]}'; there are {len(sequences)}, the first "
                        f"{', '.join(sequences[:3])}")
    sequences = [s for s in sequences if not only or s in only]
    _check_same_settings(out, name, args)
    waiting = [s for s in sequences if not record_path(out, s).exists()]
    workers = min(args.workers or os.cpu_count() or 1, max(1, len(waiting)))
    bar = tqdm(total=len(sequences), initial=len(sequences) - len(waiting), desc=f"prepare {name}", unit="sequence")
    for record in _run(name, root, out, args, waiting, workers):
        bar.update(1)
        if record["error"]:
            log.warning("%s: left out: %s", record["sequence"], record["error"])
    bar.close()
    return write_card(out, set_name(name))


def record_path(out: Path, sequence: str) -> Path:
    return out / "records" / f"{safe(sequence)}.json"


def make_adapter(name: str):
    """The adapter of a data set, by its name or as `package.module:Class`; UserError lists those there are."""
    if name not in ADAPTERS and ":" not in name:
        raise UserError(f"no data set '{name}'; there are {', '.join(sorted(ADAPTERS))}, or name your own as "
                        f"package.module:Class")
    module, _, attribute = ADAPTERS.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"data set '{name}': {error}; write package.module:Class of an importable module") from error


def set_name(name: str) -> str:
    """What the clips of a data set are labelled with: its name, or the adapter's own for a package.module:Class."""
    return make_adapter(name).name if ":" in name else name


def _check_same_settings(out: Path, name: str, args: PrepareArgs) -> None:
    note = out / "prepare.json"
    settings = {"dataset": name, "size": args.size, "limit": args.limit}
    if note.exists() and json.loads(note.read_text()) != settings:
        raise UserError(f"{out} was prepared with {json.loads(note.read_text())}, now {settings}; choose another --out "
                        f"or remove it")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings))


def _run(name: str, root: Path, out: Path, args: PrepareArgs, sequences: list[str], workers: int) -> Iterator[dict]:
    if workers <= 1:
        for sequence in sequences:
            yield prepare_sequence(name, root, out, args, sequence)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(prepare_sequence, name, root, out, args, s) for s in sequences]):
            yield done.result()


def prepare_sequence(name: str, root: Path, out: Path, args: PrepareArgs, sequence: str) -> dict[str, Any]:
    """One sequence -> its tar and its record, which is returned. Never raises for what the sequence holds."""
    counts, stats, error, split, seconds = Counter(), Statistics(), "", "", 0.0
    try:
        recording = make_adapter(name).open(root, sequence)
        split = recording.split
        if recording.rgb is not None and len(recording.rgb.times):
            seconds = float(np.ptp(recording.rgb.times))
        clips = cut(recording, set_name(name), args.size, args.limit, counts, stats)
        first = next(clips, None)
        if first is not None:
            write_clips(out / recording.split / f"{safe(sequence)}.tar", chain([first], clips))
    except UserError:
        raise
    except Exception as problem:  # whatever is wrong with this sequence must not cost the others
        error = f"{type(problem).__name__}: {problem}" if not isinstance(problem, BadSequence) else str(problem)
        for tar in out.glob(f"*/{safe(sequence)}.tar"):
            tar.unlink()
        counts, stats = Counter({"sequences that failed": 1}), Statistics()
    record = {"sequence": sequence, "split": split, "error": error, "seconds": seconds, "counts": dict(counts),
              "stats": stats.plain()}
    path = record_path(out, sequence)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(record))
    aside.replace(path)
    return record
