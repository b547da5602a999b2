"""`egom2p shards`: check, stats, index, convert and random shards."""

import itertools
import logging
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from egom2p.data.clips import expand_paths, expand_pattern
from egom2p.data.loader import DataArgs, DatasetArgs
from egom2p.data.remote import is_remote
from egom2p.data.storage import DAMAGE
from egom2p.data.tarindex import index_tars, npy_bytes, read_at, write_tar
from egom2p.data.tokens import (
    ShardPlace,
    encode_tokens,
    join_by_key,
    load_array,
    path_of,
    place_loose,
    place_of,
    token_entries,
)
from egom2p.errors import UserError
from egom2p.files import walk
from egom2p.modalities import Modality, ModalitySet
from egom2p.processes import forks

log = logging.getLogger(__name__)

SHARD_CLIPS = 1000
SHARD = "shard-000000.tar"
RATE_FILES = 300
LARGEST_ID = 1 << 26  # of a vocabulary that could have a head


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
    # {(root, data set): {shard: {modality: keys}}}
    keys: dict[tuple[str, str], dict[str, dict[str, dict[str, None]]]] = {}
    shapes: dict[Path, tuple] = {}
    files = 0
    for shard, entry in tqdm(token_entries(_token_files(pattern)), desc="check", unit="shard"):
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
        shards = keys.setdefault((str(place.root), place.dataset), {})
        shards.setdefault(shard, {}).setdefault(place.modality, {}).update(dict.fromkeys(seen))
    for shards in keys.values():
        place_loose(shards)
        join_by_key(shards)
    missing, notes = _pairing_problems(keys)
    return Checked(problems + missing, files, notes)


def modality_folders(pattern: str) -> list[tuple[str, Path]]:
    """(modality, folder) of the shards that `pattern` names."""
    return sorted({(place_of(path).modality, path.parent) for path in _token_files(pattern)})


def stats(pattern: str) -> list[dict]:
    """One row a folder of shards: shards, clips, bytes, shape, dtype, distinct ids, share of the commonest id,
    unobserved share, and the number of unreadable files (`check` names each)."""
    rows: dict[Path, dict] = {}
    counts: dict[Path, np.ndarray] = {}
    for shard, entry in tqdm(token_entries(_token_files(pattern)), desc="stats", unit="shard"):
        row = rows.setdefault(entry.path.parent, {"folder": str(entry.path.parent), "shards": 0, "clips": 0, "bytes": 0,
                                                  "unobserved": 0, "unreadable": 0})
        files = list(entry.token_files())
        for column, more in (("shards", bool(shard)), ("clips", len(files)), ("bytes", entry.size)):
            row[column] += more
        for _, _, offset, size in files:
            try:
                array = _integers(load_array(read_at(entry.path, offset, size)))
                if array.max(initial=0) > LARGEST_ID:
                    raise ValueError("ids that no vocabulary has")
            except DAMAGE:
                row["unreadable"] += 1
                continue
            missing = (array == 65535) if array.dtype == np.uint16 else array < 0
            row.update(shape=list(array.shape), dtype=str(array.dtype),
                       unobserved=row["unobserved"] + int(missing.sum()))
            count = np.bincount(array[~missing].reshape(-1).astype(np.int64),
                                minlength=len(counts.get(entry.path.parent, ())))
            count[: len(counts.get(entry.path.parent, ()))] += counts.get(entry.path.parent, 0)
            counts[entry.path.parent] = count
    for folder, row in rows.items():
        count = counts.get(folder, np.zeros(1, np.int64))
        total = max(1, int(count.sum()))
        row.update(distinct_ids=int((count > 0).sum()), commonest_share=float(count.max(initial=0) / total),
                   unobserved=row["unobserved"] / max(1, total + row["unobserved"]))
    return list(rows.values())


class Converted(NamedTuple):
    """files: token files below the target; shards written now, and kept from before; rates: token files a second that
    one core reads of the old and of the new form."""

    files: int
    written: int
    kept: int
    rates: tuple[float, float]


def convert(pattern: str, out: Path, names: Iterable[str] = (), workers: int = 1) -> Converted:
    """Rewrite token tars (or folders of loose files) in the compact form, `OUT/MODALITY/DATASET/NAME.tar`: uint16
    `.npy`, tars clip by clip as they are, loose files 1 000 a shard.

    names: modalities, by which folders are told apart (`placed`). Shards that are there already, younger than their
    source and with its keys, are kept, so that a stopped run goes on. Raises UserError for a path that cannot be
    placed, for two sources of one shard, and for damage, before anything of that shard is written.
    """
    names = set(names) | _listed(pattern)
    jobs = [*_tar_jobs(pattern, out, names), *_loose_jobs(pattern, out, names)]
    if not jobs:
        raise UserError(f"{pattern}: no token file there to convert")
    taken: dict[Path, Path] = {}
    for job in jobs:
        if (other := taken.setdefault(job.target, job.sources[0][0])) != job.sources[0][0]:
            raise UserError(f"{other} and {job.sources[0][0]} would both become {job.target}; convert them one after "
                            f"the other, each with its own --out")
    written = 0
    with ProcessPoolExecutor(max(1, workers), mp_context=forks()) as pool:
        run = pool.map(_convert, jobs) if workers > 1 else map(_convert, jobs)
        for was_written in tqdm(run, total=len(jobs), desc="convert", unit="shard"):
            written += was_written
    largest = max(jobs, key=lambda job: len(job.sources))
    return Converted(sum(len(job.sources) for job in jobs), written, len(jobs) - written, _reading_rates(largest))


def placed(path: Path, names: set[str]) -> ShardPlace:
    """Where a token file belongs: by the one folder above it that is called like a modality; the data set is the folder
    in it or, where that is `token` or there is none, the one around it. Without such a name `MODALITY/DATASET/FILE` is
    taken as it says. Raises UserError when that leaves a doubt."""
    folders = path.parent.parts
    named = [i for i, folder in enumerate(folders) if folder in names]
    inner = {i: [f for f in folders[i + 1 :] if f != "token"] for i in named}
    fit = [i for i in named if len(inner[i]) <= 1 and (inner[i] or i)]
    if len(fit) == 1:
        at = fit[0]
        return ShardPlace(Path(*folders[:at]), folders[at], inner[at][0] if inner[at] else folders[at - 1])
    if not named and len(folders) >= 2 and folders[-1] != "token":
        return ShardPlace(Path(*folders[:-2]), folders[-2], folders[-1])
    reason = "which folder is the modality and which the data set" if named else "no folder of it is a modality"
    raise UserError(f"{path}: cannot tell where it belongs ({reason}; known are {', '.join(sorted(names)) or 'none'}); "
                    f"name the modalities in brackets, as in 'tokens/[rgb,cam]/*.tar', or give --config")


def _listed(pattern: str) -> set[str]:
    """Names in the brackets of a pattern."""
    return {name for group in re.findall(r"\[([^\[\]]*,[^\[\]]*)\]", pattern) for name in group.split(",")}


class _Job(NamedTuple):
    """A shard to write: (file, offset, size) of each key, whole files with size -1."""

    target: Path
    keys: list[str]
    sources: list[tuple[Path, int, int]]


def _tar_jobs(pattern: str, out: Path, names: set[str]) -> Iterator[_Job]:
    for entry in index_tars([p for p in _expand_or_none(pattern) if p.suffix == ".tar"]):
        if entry.damage:
            raise UserError(f"{entry.path}: {entry.damage}; mend or remove it first, nothing of it was converted")
        place = placed(entry.path, names)
        rows = sorted((key, (entry.path, offset, size)) for key, _, offset, size in entry.token_files())
        if rows:
            _refuse_encoded(out / place.modality / place.dataset)
            yield _Job(out / place.modality / place.dataset / entry.path.name, [k for k, _ in rows],
                       [source for _, source in rows])


def _loose_jobs(pattern: str, out: Path, names: set[str]) -> Iterator[_Job]:
    folders: dict[ShardPlace, list[Path]] = {}
    for path in _loose(pattern):
        folders.setdefault(placed(path, names), []).append(path)
    keys: dict[tuple[Path, str], set[str]] = {}  # of all modalities of a data set, so that a shard is of the same clips
    for place, paths in folders.items():
        keys.setdefault((place.root, place.dataset), set()).update(p.stem for p in paths)
    for place, paths in folders.items():
        shards = {key: i // SHARD_CLIPS for i, key in enumerate(sorted(keys[place.root, place.dataset]))}
        folder = out / place.modality / place.dataset
        parts = itertools.groupby(sorted(paths, key=lambda p: p.stem), key=lambda p: shards[p.stem])
        jobs = [_Job(folder / f"shard-{shard:06d}.tar", [p.stem for p in part], [(p, 0, -1) for p in part])
                for shard, part in ((shard, list(part)) for shard, part in parts)]
        _refuse_others(folder, [job.target for job in jobs])
        _refuse_loss(jobs)
        yield from jobs


def _refuse_others(folder: Path, targets: Iterable[Path]) -> None:
    """Raises UserError when shards lie in `folder` that are not written now: they would be read with the new ones; and
    when a note says that a tokenizer made what is there: it would vouch for the new ones."""
    _refuse_encoded(folder)
    others = sorted(set(folder.glob("shard-*.tar")) - set(targets))
    if others:
        raise UserError(f"{others[0]} is of an earlier, longer set and would be mixed in; choose another --out or "
                        "remove it")


def _refuse_encoded(folder: Path) -> None:
    if (folder / "encode.json").exists():
        raise UserError(f"{folder} holds tokens that `tokenizer encode` made, with its note; choose another --out")


def _refuse_loss(jobs: list[_Job]) -> None:
    """Raises UserError when shards that are there hold clips that those to be written would not."""
    there = {key for job in jobs if job.target.exists() for key in index_tars([job.target])[0].keys}
    lost = sorted(there - {key for job in jobs for key in job.keys})
    if lost:
        raise UserError(f"{jobs[0].target.parent} holds {len(lost)} clips that are not among these files, such as "
                        f"{lost[0]}, and would lose them; convert all files of a data set at once, or choose another "
                        "--out")


def _loose(pattern: str) -> list[Path]:
    files = []
    for path in map(Path, expand_pattern(pattern)):
        files += [p for p in walk(path) if p.suffix in (".npz", ".npy")] if path.is_dir() else []
    found = [] if files else [p for p in _expand_or_none(pattern) if p.suffix in (".npz", ".npy")]
    return [*files, *found]


def _expand_or_none(pattern: str) -> list[Path]:
    try:
        return expand_paths(pattern)
    except UserError:
        return []


def _convert(job: _Job) -> bool:
    """Write a shard, unless it is there."""
    if _is_converted(job):
        return False
    _write_arrays(job.target, ((key, _read_compact(key, source))
                               for key, source in zip(job.keys, job.sources, strict=True)))
    return True


def _read_compact(key: str, source: tuple[Path, int, int]) -> np.ndarray:
    try:
        return _compact(_integers(load_array(_bytes(source))))
    except DAMAGE as error:
        raise UserError(f"{source[0]}: {key}: {' '.join(str(error).split())}; mend or remove it first, nothing of its "
                        "shard was written") from error


def _is_converted(job: _Job) -> bool:
    if not job.target.exists():
        return False
    newest = max(path.stat().st_mtime_ns for path in {path for path, _, _ in job.sources})
    return job.target.stat().st_mtime_ns >= newest and index_tars([job.target])[0].keys == job.keys


def _bytes(source: tuple[Path, int, int]) -> bytes:
    path, offset, size = source
    return path.read_bytes() if size < 0 else read_at(path, offset, size)


def _reading_rates(job: _Job) -> tuple[float, float]:
    """Token files a second of the old and of the new form of one shard, read and decoded here."""
    new = index_tars([job.target])[0]
    places = [(job.target, int(o), int(n)) for o, n in zip(new.offsets, new.sizes, strict=True)]
    rates = []
    for sources in (job.sources[:RATE_FILES], places[:RATE_FILES]):
        for source in sources[:8]:  # headers and descriptors are warm for both
            load_array(_bytes(source))
        started = time.perf_counter()
        for source in sources:
            load_array(_bytes(source))
        rates.append(len(sources) / max(time.perf_counter() - started, 1e-9))
    return rates[0], rates[1]


def write_random(data: DataArgs, eval_datasets: tuple[str, ...], modalities: ModalitySet, root: Path, count: int,
                 seed: int = 0) -> None:
    """Random tokens in the layout a config expects, below `root` in place of its data.root: `count` clips of each data
    set, for dry runs and benchmarks. Raises UserError where a data set's own path leaves no room for such shards."""
    held_out = {name: replace(data.datasets.get(name, DatasetArgs()), modalities=()) for name in eval_datasets}
    jobs: list[tuple[list[int], Modality, list[Path]]] = []
    for number, (name, entry) in enumerate({**data.datasets, **held_out}.items()):
        for modality in modalities:
            folder = _random_folder(root, name, entry, modality, modalities)
            if folder is not None:
                shards = [folder / f"shard-{i:06d}.tar" for i in range(-(-count // SHARD_CLIPS))]
                _refuse_others(folder, shards)
                jobs.append(([seed, number, modalities.index_of(modality.name)], modality, shards))
    for key, modality, shards in tqdm(jobs, desc="random shards", unit="folder"):
        rng = np.random.default_rng(key)
        for path, start in zip(shards, range(0, count, SHARD_CLIPS), strict=True):
            clips = range(start, min(start + SHARD_CLIPS, count))
            drawn = (rng.integers(0, modality.vocab_size, modality.grid) for _ in clips)
            _write_arrays(path, ((f"{i:08d}", ids.astype(modality.token_dtype))
                                 for i, ids in zip(clips, drawn, strict=True)))


def _random_folder(root: Path, name: str, entry: DatasetArgs, modality: Modality, modalities: ModalitySet
                   ) -> Path | None:
    """Where a data set's shards of a modality lie; None when it has none."""
    if entry.modalities and modality.name not in entry.modalities:
        return None
    pattern = path_of(modality, modalities, name, entry.path)
    if pattern is None:
        return None
    folder, shard = (Path(pattern).parent, Path(pattern).name) if pattern.endswith(".tar") else (Path(pattern), "*")
    outside = folder.is_absolute() or ".." in folder.parts
    if is_remote(pattern) or outside or any(c in str(folder) for c in "*?{") or not fnmatch(SHARD, shard):
        raise UserError(f"data.datasets.{name}.path: nothing can be written for '{pattern}'; name one folder a "
                        "modality below data.root, as in '[rgb,cam]/NAME'")
    return root / folder


def _write_arrays(path: Path, rows) -> int:
    return write_tar(path, ({"__key__": key, "npy": npy_bytes(array)} for key, array in rows))


def _integers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise ValueError(f"holds {array.dtype}, tokens are integers")
    return array


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
    flat = modality is not None and array.shape == (modality.num_tokens,)  # read as well
    if array.shape != tuple(expected) and not flat:
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
    for (folder, dataset), shards in sorted(keys.items()):
        modalities = set().union(*shards.values())
        for shard, held in sorted((shard, held) for shard, held in shards.items() if held):
            for absent in sorted(modalities - held.keys()):
                problems.append({"file": f"{folder}/{absent}/{dataset}/{shard}", "key": "",
                                 "problem": "whole shard missing for this modality"})
            everything = set().union(*held.values())
            for name, own in sorted(held.items()):
                lacking = sorted(everything - own.keys())
                if lacking:
                    more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
                    notes.append({"file": f"{folder}/{name}/{dataset}/{shard}", "key": lacking[0],
                                  "problem": f"absent here while other modalities hold it{more}"})
    return problems, notes


def _token_files(pattern: str) -> list[Path]:
    """Tars and loose token files that `pattern` names."""
    files = [*(p for p in _expand_or_none(pattern) if p.suffix == ".tar"), *_loose(pattern)]
    if not files:
        raise UserError(f"{pattern}: no tar and no loose .npz or .npy file there; give a folder of them or a pattern "
                        "such as 'tokens/*/*/*.tar'")
    return files


def _modality_of(path: Path, modalities: ModalitySet | None) -> Modality | None:
    name = place_of(path).modality
    return modalities.by_name(name) if modalities is not None and name in modalities.names else None


