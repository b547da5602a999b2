"""Clips -> token shards, `ROOT/MODALITY/DATASET/shard-000000.tar`, 1 000 clips each."""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from egom2p.config import read_json
from egom2p.data.clips import Clip, count_clips, expand_paths, read_clips
from egom2p.data.tarindex import index_tars, npy_bytes, write_tar
from egom2p.data.tokens import encode_tokens
from egom2p.errors import UserError
from egom2p.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
SHARD_CLIPS = 1000
BATCH = 16


def encode_clips(tokenizers: list[Tokenizer], pattern: str, root: Path, dataset: str = "") -> dict[str, int]:
    """Tokenise every clip of `pattern`; returns clips written by modality.

    `dataset` overrides the name in the clips. A clip that lacks a signal, or whose signal carries no
    measurement or is not finite, is left out of that modality and counted. Shards already whole are kept,
    so an interrupted run goes on where it stopped.
    """
    expand_paths(pattern)
    sources = {t.modality.clip_signal for t in tokenizers}
    written = dict.fromkeys((t.modality.name for t in tokenizers), 0)
    clips = tqdm(read_clips(pattern, sources), total=count_clips(pattern), desc="encode", unit="clip")
    folders = set()
    origins = {t.modality.name: {"tokenizer": t.fingerprint(), "clips": pattern} for t in tokenizers}
    for name, number, chunk in _shards(clips, dataset):
        for tokenizer in tokenizers:
            path = root / tokenizer.modality.name / name / f"shard-{number:06d}.tar"
            _check_origin(path.parent, origins[tokenizer.modality.name])
            if not path.exists():
                _write_shard(path, tokenizer, chunk)
            folders.add(path.parent)
    for folder in sorted(folders):
        entries = index_tars(sorted(folder.glob("*.tar")))
        written[folder.parent.name] += sum(len(e.keys) for e in entries)
    return written


def _check_origin(folder: Path, origin: dict[str, str]) -> None:
    """Shards of one folder come from one tokenizer and one set of clips; anything else is refused, never mixed."""
    note = folder / ORIGIN
    if note.exists():
        found = read_json(note)
        for what, value in origin.items():
            if found.get(what) != value:
                raise UserError(f"{folder} holds tokens of other {what} ({found.get(what)!r}, now {value!r}); choose "
                                f"another --out or --dataset, or remove it")
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards of unknown origin; choose another --out or --dataset, or remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(origin, indent=1))


def _shards(clips: Iterable[Clip], dataset: str) -> Iterator[tuple[str, int, list[Clip]]]:
    """(data set, shard number, clips), each data set cut every SHARD_CLIPS clips."""
    pending: dict[str, list[Clip]] = {}
    numbers: dict[str, int] = {}
    for clip in clips:
        name = dataset or clip.dataset or "clips"
        pending.setdefault(name, []).append(clip)
        if len(pending[name]) == SHARD_CLIPS:
            yield name, numbers.get(name, 0), pending.pop(name)
            numbers[name] = numbers.get(name, 0) + 1
    for name, rest in pending.items():
        yield name, numbers.get(name, 0), rest


def _write_shard(path: Path, tokenizer: Tokenizer, clips: list[Clip]) -> None:
    write_tar(path, ({"__key__": clip.key, "npy": npy_bytes(ids)} for clip, ids in _tokenise(tokenizer, clips)))


def _tokenise(tokenizer: Tokenizer, clips: list[Clip]) -> Iterator[tuple[Clip, np.ndarray]]:
    """Clip and stored ids of every clip that has the signal, in order."""
    source = tokenizer.modality.clip_signal
    having = [c for c in clips if source in c.signals]
    measured = [c for c in having if np.any(tokenizer.observed(c.signals[source]))]
    if len(measured) < len(having):
        lost = sorted({c.key for c in having} - {c.key for c in measured})
        log.warning("'%s': %d of %d clips carry no finite measurement and go without it (%s%s)",
                    tokenizer.modality.name, len(lost),
                    len(having), ", ".join(lost[:5]), ", ..." if len(lost) > 5 else "")
    usable = iter(measured)
    while batch := list(islice(usable, BATCH)):
        signals = [c.signals[source] for c in batch]
        if len({s.shape for s in signals}) > 1:
            raise UserError(f"clips {batch[0].key} to {batch[-1].key} differ in the shape of '{source}'; encode them "
                            f"from separate patterns")
        for clip, signal, ids in zip(batch, signals, tokenizer.encode_many(signals), strict=True):
            if ids.shape != tokenizer.modality.grid:
                raise UserError(f"clip {clip.key}: '{source}' of shape {signal.shape} makes a grid {list(ids.shape)}, "
                                f"but tokenizer "
                                f"'{tokenizer.modality.name}' is for {list(tokenizer.modality.grid)}; resize the clips")
            yield clip, encode_tokens(ids, tokenizer.observed(signal), tokenizer.modality)
