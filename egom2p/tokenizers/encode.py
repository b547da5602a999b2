"""Clips -> token shards, `ROOT/MODALITY/DATASET/shard-000000.tar`, 1 000 clips each."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from egom2p.data.clips import Clip, count_clips, expand_paths, read_clips
from egom2p.data.shardtools import SHARD_CLIPS
from egom2p.data.tarindex import index_tars, npy_bytes, write_tar
from egom2p.data.tokens import encode_tokens
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.origin import Origin

log = logging.getLogger(__name__)

BATCH = 16


def encode_clips(tokenizers: list[Tokenizer], pattern: str, root: Path, dataset: str = "") -> dict[str, int]:
    """Tokenise every clip of `pattern`; returns clips written by modality.

    `dataset` overrides the name in the clips. A clip that lacks a signal, or whose signal carries no
    measurement or is not finite, is left out of that modality and counted. Shards already whole are kept when
    they are of just these clips, so an interrupted run goes on where it stopped; when the clips have changed
    since, their shard is written anew. Several processes may encode into one folder: each shard is written whole.
    """
    expand_paths(pattern)
    sources = {t.modality.clip_signal for t in tokenizers}
    written = dict.fromkeys((t.modality.name for t in tokenizers), 0)
    clips = tqdm(read_clips(pattern, sources), total=count_clips(pattern), desc="encode", unit="clip")
    folders = set()
    prints = {t.modality.name: t.fingerprint() for t in tokenizers}
    for name, number, chunk in _shards(clips, dataset):
        for tokenizer in tokenizers:
            path = root / tokenizer.modality.name / name / f"shard-{number:06d}.tar"
            origin = Origin(path.parent)
            origin.check(prints[tokenizer.modality.name], pattern)
            _encode_shard(path, tokenizer, chunk, origin)
            folders.add(path.parent)
    for folder in sorted(folders):
        entries = index_tars(sorted(folder.glob("*.tar")))
        written[folder.parent.name] += sum(len(e.keys) for e in entries)
    return written


def _encode_shard(path: Path, tokenizer: Tokenizer, clips: list[Clip], origin: Origin) -> None:
    """Write one shard, unless it is there already and of these clips."""
    now = _content(clips, tokenizer.modality.clip_signal)
    before = origin.shard(path.name)
    if path.exists() and before == now:
        return
    if path.exists():
        log.warning("%s: its clips %s; it is encoded anew", path,
                    "have changed since it was encoded" if before else "are not on record")
    write_tar(path, ({"__key__": clip.key, "npy": npy_bytes(ids)} for clip, ids in _tokenise(tokenizer, clips)))
    origin.record(path.name, now)


def _content(clips: list[Clip], signal: str) -> str:
    """Hash of the keys of clips and of one signal of theirs."""
    digest = hashlib.blake2b(digest_size=16)
    for clip in clips:
        if signal in clip.signals:
            array = clip.signals[signal]
            digest.update(f"{clip.key} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


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


def _tokenise(tokenizer: Tokenizer, clips: list[Clip]) -> Iterator[tuple[Clip, np.ndarray]]:
    """Clip and stored ids of every clip that has the signal, in order."""
    source = tokenizer.modality.clip_signal
    having = [c for c in clips if source in c.signals]
    for clip in having:
        tokenizer.check(clip.signals[source], clip.key)
    measured = [c for c in having if np.any(tokenizer.observed(c.signals[source]))]
    if len(measured) < len(having):
        lost = sorted({c.key for c in having} - {c.key for c in measured})
        log.warning("'%s': %d of %d clips carry no finite measurement and go without it (%s%s)",
                    tokenizer.modality.name, len(lost),
                    len(having), ", ".join(lost[:5]), ", ..." if len(lost) > 5 else "")
    usable = iter(measured)
    while batch := list(islice(usable, BATCH)):
        signals = [c.signals[source] for c in batch]
        for clip, signal, ids in zip(batch, signals, tokenizer.encode_many(signals), strict=True):
            yield clip, encode_tokens(ids, tokenizer.observed(signal), tokenizer.modality)
