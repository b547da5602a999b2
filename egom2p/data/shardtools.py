"""`egom2p shards`: check, stats, index, convert and random shards."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from egom2p.data.clips import expand_paths
from egom2p.data.loader import DataArgs
from egom2p.data.tarindex import index_tars, npy_bytes, read_at, write_tar
from egom2p.data.tokens import encode_tokens, load_array, place_of
from egom2p.errors import UserError
from egom2p.modalities import Modality, ModalitySet

log = logging.getLogger(__name__)

SHARD_CLIPS = 1000


class Checked(NamedTuple):
    """problems and notes, each {file, key, problem}, and the number of files read. A note is no damage: a clip may lack
    a modality."""

    problems: list[dict]
    files: int
    notes: list[dict]


def check(pattern: str, modalities: ModalitySet | None = None) -> Checked:
    """Read every token file that `pattern` names.

    Looks for damaged or empty tars, files that are not plain integer arrays, shapes that differ within a
    folder, ids outside the vocabulary (when `modalities` are given), keys held twice, and shards or keys
    that one modality has and another lacks.
    """
    problems: list[dict] = []
    keys: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    shapes: dict[Path, tuple] = {}
    files = 0
    for entry in tqdm(index_tars(_tars(pattern)), desc="check", unit="shard"):
        if entry.damage:
            problems.append({"file": str(entry.path), "key": "", "problem": entry.damage})
        modality = _modality_of(entry.path, modalities)
        seen: set[str] = set()
        for key, _, offset, size in entry.token_files():
            files += 1
            problem = "key occurs twice" if key in seen else _file_problem(entry.path, offset, size, modality, shapes)
            seen.add(key)
            if problem:
                problems.append({"file": str(entry.path), "key": key, "problem": problem})
        place = place_of(entry.path)
        keys.setdefault((str(place.root), place.dataset, entry.path.name), {})[place.modality] = seen
    missing, notes = _pairing_problems(keys)
    return Checked(problems + missing, files, notes)


def modality_folders(pattern: str) -> list[tuple[str, Path]]:
    """(modality, folder) of the shards that `pattern` names."""
    return sorted({(place_of(path).modality, path.parent) for path in _tars(pattern)})


def stats(pattern: str) -> list[dict]:
    """One row a folder of shards: shards, clips, bytes, shape, dtype, distinct ids, share of the commonest id,
    unobserved share."""
    rows: dict[Path, dict] = {}
    counts: dict[Path, np.ndarray] = {}
    for entry in tqdm(index_tars(_tars(pattern)), desc="stats", unit="shard"):
        row = rows.setdefault(entry.path.parent, {"folder": str(entry.path.parent), "shards": 0, "clips": 0, "bytes": 0,
                                                  "unobserved": 0})
        for column, more in (("shards", 1), ("clips", len(entry.keys)), ("bytes", entry.size)):
            row[column] += more
        for offset, size in zip(entry.offsets.tolist(), entry.sizes.tolist(), strict=True):
            array = load_array(read_at(entry.path, offset, size))
            missing = (array == 65535) if array.dtype == np.uint16 else array < 0
            row.update(shape=list(array.shape), dtype=str(array.dtype),
                       unobserved=row["unobserved"] + int(missing.sum()))
            count = np.bincount(array[~missing].reshape(-1).astype(np.int64),
                                minlength=len(counts.get(entry.path.parent, ())))
            count[: len(counts.get(entry.path.parent, ()))] += counts.get(entry.path.parent, 0)
            counts[entry.path.parent] = count
    for folder, row in rows.items():
        total = max(1, int(counts[folder].sum()))
        row.update(distinct_ids=int((counts[folder] > 0).sum()), commonest_share=float(counts[folder].max() / total),
                   unobserved=row["unobserved"] / max(1, total + row["unobserved"]))
    return list(rows.values())


def convert(pattern: str, out: Path) -> int:
    """Rewrite token tars (or folders of loose files) in the compact form: uint16 `.npy`, 1 000 clips a shard as
    they are. Below `out` the path keeps `MODALITY/DATASET/NAME`; a folder named `token` is dropped. Returns clips.
    """
    count = 0
    groups: dict[Path, list[tuple[str, bytes]]] = {}
    for entry in tqdm(index_tars(_tars(pattern)), desc="convert", unit="shard"):
        if entry.damage:
            raise UserError(f"{entry.path}: {entry.damage}; mend or remove it first, nothing of it was converted")
        rows = sorted((key, offset, size) for key, _, offset, size in entry.token_files())
        place = place_of(entry.path)
        target = out / place.modality / place.dataset / entry.path.name
        count += _write(target, ((key, read_at(entry.path, offset, size)) for key, offset, size in rows))
    for path in expand_paths(pattern) if not count else []:
        if path.suffix in (".npz", ".npy"):
            groups.setdefault(path.parent, []).append((path.stem, path.read_bytes()))
    for folder, rows in groups.items():
        for number in range(0, len(rows), SHARD_CLIPS):
            target = out / folder.parent.name / folder.name / f"shard-{number // SHARD_CLIPS:06d}.tar"
            count += _write(target, sorted(rows)[number : number + SHARD_CLIPS])
    if not count:
        raise UserError(f"{pattern}: no token file there to convert")
    return count


def write_random(data: DataArgs, eval_datasets: tuple[str, ...], modalities: ModalitySet, root: Path, count: int,
                 seed: int = 0) -> None:
    """Random tokens in the layout a config expects: `count` clips of each data set, for dry runs and benchmarks."""
    sets = {**{name: entry.modalities for name, entry in data.datasets.items()}, **dict.fromkeys(eval_datasets, ())}
    for number, (name, only) in enumerate(tqdm(sets.items(), desc="random shards", unit="set")):
        for modality in modalities:
            if only and modality.name not in only:
                continue
            rng = np.random.default_rng([seed, number, modalities.index_of(modality.name)])
            for shard, start in enumerate(range(0, count, SHARD_CLIPS)):
                clips = range(start, min(start + SHARD_CLIPS, count))
                path = root / modality.name / name / f"shard-{shard:06d}.tar"
                drawn = (rng.integers(0, modality.vocab_size, modality.grid) for _ in clips)
                _write_arrays(path, ((f"{i:08d}", ids.astype(modality.token_dtype))
                                     for i, ids in zip(clips, drawn, strict=True)))


def _write(path: Path, rows) -> int:
    return _write_arrays(path, ((key, _compact(load_array(data))) for key, data in rows))


def _write_arrays(path: Path, rows) -> int:
    return write_tar(path, ({"__key__": key, "npy": npy_bytes(array)} for key, array in rows))


def _compact(array: np.ndarray) -> np.ndarray:
    """uint16 where every id fits, unobserved positions marked in the storage type's own way."""
    if array.dtype == np.uint16:
        return array
    fits = array.max(initial=0) < 65535
    modality = Modality("tokens", 65535 if fits else 2**31 - 1, (array.size,))
    return encode_tokens(array, array >= 0, modality)


def _file_problem(path: Path, offset: int, size: int, modality: Modality | None, shapes: dict[Path, tuple]) -> str:
    """"" when the file is a plain integer array that fits its neighbours and the vocabulary."""
    try:
        array = load_array(read_at(path, offset, size))
    except Exception as error:
        return f"unreadable ({error})"
    if array.dtype.kind not in "iu":
        return f"holds {array.dtype}, expected integers"
    expected = shapes.setdefault(path.parent, array.shape) if modality is None else modality.grid
    if array.shape != tuple(expected):
        return f"shape {array.shape}, expected {tuple(expected)}"
    ids = array
    if array.dtype == np.uint16:
        ids = array[array != 65535]
    elif array.min(initial=0) == -1:
        ids = array[array >= 0]
    if modality is not None and ids.size and (ids.max() >= modality.vocab_size or ids.min() < 0):
        wrong = ids.max() if ids.max() >= modality.vocab_size else ids.min()
        return f"token id {wrong} outside 0 .. {modality.vocab_size - 1}"
    return ""


def _pairing_problems(keys: dict) -> tuple[list[dict], list[dict]]:
    """Shards of one data set and number that exist for some modalities only; notes on keys only some of them hold."""
    problems, notes = [], []
    by_set: dict[tuple[str, str], set[str]] = {}
    for (folder, dataset, _), held in keys.items():
        by_set.setdefault((folder, dataset), set()).update(held)
    for (folder, dataset, shard), held in sorted(keys.items()):
        for absent in sorted(by_set[folder, dataset] - held.keys()):
            problems.append({"file": f"{folder}/{absent}/{dataset}/{shard}", "key": "",
                             "problem": "whole shard missing for this modality"})
        everything = set().union(*held.values())
        for name, own in sorted(held.items()):
            lacking = sorted(everything - own)
            if lacking:
                more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
                notes.append({"file": f"{folder}/{name}/{dataset}/{shard}", "key": lacking[0],
                              "problem": f"absent here while other modalities hold it{more}"})
    return problems, notes


def _tars(pattern: str) -> list[Path]:
    return [p for p in expand_paths(pattern) if p.suffix == ".tar"]


def _modality_of(path: Path, modalities: ModalitySet | None) -> Modality | None:
    name = place_of(path).modality
    return modalities.by_name(name) if modalities is not None and name in modalities.names else None


