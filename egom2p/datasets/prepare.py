"""`egom2p prepare`: raw sequences -> clips, a card and a contact sheet.

Each sequence becomes `OUT/SPLIT/SEQUENCE.tar` (absent when nothing of it is kept) and `OUT/records/SEQUENCE.json` with
what was kept, what was left out and why. Sequences are independent: any number of processes writes the same files, a
second run does what is missing, what failed and what changed since (records hold a stamp of the files they were made
from), and one that fails is written down and harms no other.
"""

import hashlib
import inspect
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.config import read_json
from egom2p.data.clips import write_clips
from egom2p.datasets import ADAPTERS
from egom2p.datasets.card import write_card
from egom2p.datasets.checks import Statistics
from egom2p.datasets.cutting import SECONDS, cut, safe
from egom2p.datasets.recording import RESERVED, Adapter, BadSequence, NotARecording, Recording, stamp_of
from egom2p.errors import UserError
from egom2p.files import write_whole
from egom2p.processes import cores, forks
from egom2p.resources import load_object

log = logging.getLogger(__name__)

LARGEST_EXACT = 128  # pixels a side
LONGEST_NAME = 140  # bytes; file systems take 255 with host, process and endings
VERSION = 2  # of records and clips: older ones are prepared anew


@dataclass(frozen=True)
class PrepareArgs:
    """size: side of the stored frames in pixels; limit: clips a sequence (0 = all); workers: processes (0 = all cores);
    split: what every sequence is for, instead of what the data set's lists say; gaze_units: of gaze files that do not
    say themselves, pixels or normalized; with_wearer: depth that shows the wearer's own body, where a set has both;
    store: npy or mp4 (`data.storage`), "" = as the folder was begun, else mp4 for frames above LARGEST_EXACT; series:
    {name: Hz} of signals of one's own."""

    size: int = 256
    limit: int = 0
    workers: int = 0
    split: str = ""
    gaze_units: str = ""
    with_wearer: bool = False
    store: str = ""
    series: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rate in self.series.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in RESERVED:
                raise UserError(f"--series {name}: a signal's name is of letters, digits and _, and none of "
                                f"{', '.join(RESERVED)}")
            if not 0 < rate < 1e5 or round(SECONDS * rate) < 1:
                raise UserError(f"--series {name}={rate:g}: give Hz below 100 000, at least one value in {SECONDS:g} s")


@dataclass(frozen=True)
class Job:
    """One sequence to prepare: its split by the lists ("" = the adapter's word), its file name, the stamp of its
    files."""

    sequence: str
    split: str
    file: str
    stamp: str


def prepare(name: str, root: Path, out: Path, args: PrepareArgs, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Prepare every sequence (or those in `only`) of data set `name`. Returns the card."""
    plan = plan_jobs(name, root, out, args, only)
    for job in plan.jobs:
        _forget_lost(out, job)
    run_jobs(name, root, out, plan, plan.jobs)
    card = write_card(out, set_name(name), plan.skipped)
    for signal in sorted(set(args.series) - card["coverage"].keys()):
        log.warning("no clip has '%s', which --series asks for", signal)
    return card


@dataclass(frozen=True)
class Plan:
    """What there is to prepare, in order; the arguments as settled for the folder; a line for everything below the root
    that is part of no sequence."""

    jobs: list[Job]
    args: PrepareArgs
    skipped: list[str]


def plan_jobs(name: str, root: Path, out: Path, args: PrepareArgs, only: tuple[str, ...] = ()) -> Plan:
    """Look through `root`, once; what was prepared of sequences that no list holds any more goes. Raises UserError for
    a folder that is not there and for names that are not in it."""
    adapter = make_adapter(name, args)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected {adapter.layout}")
    sequences = adapter.sequences(root)
    missing = set(only) - set(sequences)
    if missing:
        raise UserError(f"{root} has no sequence '{sorted(missing)[0]}'; there are {len(sequences)}, the first "
                        f"{', '.join(sequences[:3])}")
    names = file_names(sequences)
    chosen = [s for s in sequences if not only or s in only]
    splits = None if args.split else adapter.splits(root, chosen)
    unlisted = [s for s in chosen if splits is not None and s not in splits]
    prepared = list(_prepared(out))
    skipped = [*adapter.skipped(root), *(f"{s}: in no split list" for s in unlisted), *_gone(prepared, root, names)]
    for line in skipped:
        log.warning("skipped: %s", line)
    args = _settled(out, name, args)
    _forget_renamed(out, prepared, names)
    for sequence in unlisted:  # by an earlier list: it may be for testing now
        _remove(out, names[sequence])
    return Plan([Job(s, args.split or (splits or {}).get(s, ""), names[s], stamp_of(adapter.files(root, s)))
                 for s in chosen if s not in unlisted], args, skipped)


def run_jobs(name: str, root: Path, out: Path, plan: Plan, jobs: list[Job]) -> list[Job]:
    """Prepare those of the jobs that are missing, failed or changed; returns them."""
    waiting = [job for job in jobs if not is_done(out, job)]
    for record in _run(name, root, out, plan.args, waiting, len(jobs)):
        for line in said_of(record):
            log.warning("%s", line)
    return waiting


def said_of(record: dict[str, Any]) -> list[str]:
    """What a user must know of a prepared sequence: why it failed or gave nothing, and what of it was left out."""
    name = record["sequence"]
    if record["error"]:
        return [f"{name}: left out: {record['error']}"]
    lines = [f"{name}: {note}" for note in record["notes"]]
    if not record["counts"].get("clips kept"):
        reasons = [f"{n} {why}" for why, n in record["counts"].items()]
        short = f"{record['seconds']:.2f} s of video, a clip needs {SECONDS:g}"
        lines.append(f"{name}: no clip: {'; '.join(reasons) or short}")
    return lines


def record_path(out: Path, file: str) -> Path:
    return out / "records" / f"{file}.json"


def file_names(sequences: Sequence[str]) -> dict[str, str]:
    """{sequence: its name as a file name and clip key}; those that come out equal, or too long for a file system with
    what is put behind them, get a hash of their own name."""
    taken = Counter(safe(s) for s in sequences)
    return {s: safe(s) if taken[safe(s)] == 1 and len(os.fsencode(safe(s))) <= LONGEST_NAME else
            f"{_shortened(safe(s))}-{hashlib.sha256(os.fsencode(s)).hexdigest()[:6]}" for s in sequences}


def _shortened(name: str) -> str:
    return os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")


def make_adapter(name: str, args: PrepareArgs | None = None) -> Adapter:
    """The adapter of a data set, by its name or as `package.module:Class`, with those of the arguments that its
    constructor takes; UserError lists those there are."""
    if name not in ADAPTERS and ":" not in name:
        raise UserError(f"no data set '{name}'; there are {', '.join(sorted(ADAPTERS))}, or name your own as "
                        f"package.module:Class")
    try:
        cls = load_object(ADAPTERS.get(name, name))
    except (ImportError, AttributeError) as error:
        raise UserError(f"data set '{name}': {error}; write package.module:Class of a module that is installed or lies "
                        "in the working directory") from error
    wanted = inspect.signature(cls).parameters
    return cls(**{k: v for k, v in (asdict(args) if args else {}).items() if k in wanted})


def set_name(name: str) -> str:
    """What the clips of a data set are labelled with: its name, or the adapter's own for a package.module:Class."""
    return make_adapter(name).name if ":" in name else name


def _settled(out: Path, name: str, args: PrepareArgs) -> PrepareArgs:
    """The arguments, with what `out` was begun with where they leave it open. Raises UserError where they differ."""
    note = out / "prepare.json"
    known = read_json(note) if note.exists() else {}
    if known:
        known = {**dict.fromkeys(("split", "gaze_units"), ""), "with_wearer": False, "store": "npy", "series": {},
                 **known}
    usual = "mp4" if args.size > LARGEST_EXACT else "npy"
    args = replace(args, store=args.store or known.get("store") or usual)
    settings = {"dataset": name, "size": args.size, "limit": args.limit, "split": args.split,
                "gaze_units": args.gaze_units, "with_wearer": args.with_wearer, "store": args.store,
                "series": args.series}
    if known and known != settings:
        was, now = ({k: side.get(k) for k in settings if known.get(k) != settings[k]} for side in (known, settings))
        raise UserError(f"{out} was prepared with {was}, now {now}; choose another --out or remove it")
    if not known:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(settings))
    return args


def _forget_renamed(out: Path, prepared: list[tuple[Path, str]], names: dict[str, str]) -> None:
    """Drop what was prepared of a sequence whose file name is another now (because one that would have the same
    came)."""
    for path, sequence in prepared:
        if sequence in names and names[sequence] != path.stem:
            _remove(out, path.stem)


def _gone(prepared: list[tuple[Path, str]], root: Path, names: dict[str, str]) -> list[str]:
    """A line about what was prepared of sequences that are not below `root` now; [] when there is none. It stays: raw
    data may have been removed on purpose, but one that was renamed or moved to another split is there twice."""
    gone = sorted(sequence for _, sequence in prepared if sequence not in names)
    if not gone:
        return []
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return [f"{gone[0]}{more}: prepared before and not below {root} now; what was made of it stays. Renamed or moved "
            "recordings are there twice: take another --out"]


def _prepared(out: Path) -> Iterator[tuple[Path, str]]:
    """(record, sequence) of everything prepared so far."""
    for path in sorted((out / "records").glob("*.json")):
        yield path, read_json(path).get("sequence", "")


def _forget_lost(out: Path, job: Job) -> None:
    """Drop the record of clips whose tar is gone, so that it is made again."""
    record = _record(out, job)
    if record and record["counts"].get("clips kept") and not (out / record["split"] / f"{job.file}.tar").exists():
        record_path(out, job.file).unlink()


def _remove(out: Path, file: str) -> None:
    record_path(out, file).unlink(missing_ok=True)
    for tar in out.glob(f"*/{file}.tar"):
        tar.unlink()


def is_done(out: Path, job: Job) -> bool:
    """Whether there is a record of this sequence, of these files, that did not fail."""
    record = _record(out, job)
    return record is not None and not record["error"]


def has_failed(out: Path, job: Job) -> bool:
    """Whether there is a record that says why nothing came of these files."""
    record = _record(out, job)
    return record is not None and bool(record["error"])


def _record(out: Path, job: Job) -> dict[str, Any] | None:
    """The record of a job, if it is of these files and this version, and in the split that the lists say now."""
    path = record_path(out, job.file)
    record = read_json(path) if path.exists() else {}
    elsewhere = job.split and not record.get("error") and record.get("split") != job.split
    fits = record.get("version") == VERSION and record.get("stamp") == job.stamp and not elsewhere
    return record if fits else None


def _run(name: str, root: Path, out: Path, args: PrepareArgs, jobs: list[Job], total: int) -> Iterator[dict]:
    workers = min(args.workers or cores(), max(1, len(jobs)))
    with tqdm(total=total, initial=total - len(jobs), desc=f"prepare {name}", unit="sequence") as bar:
        if workers <= 1:
            for job in jobs:
                yield prepare_sequence(name, root, out, args, job)
                bar.update(1)
            return
        with ProcessPoolExecutor(workers, mp_context=forks()) as pool:
            for done in as_completed([pool.submit(prepare_sequence, name, root, out, args, job) for job in jobs]):
                try:
                    yield done.result()
                except BrokenProcessPool as error:
                    raise UserError(f"one of {workers} processes was killed from outside, as for want of memory; what "
                                    "is done is kept, go on with --workers "
                                    f"{max(1, workers // 2)}") from error
                bar.update(1)


def prepare_sequence(name: str, root: Path, out: Path, args: PrepareArgs, job: Job) -> dict[str, Any]:
    """One sequence -> its tar and its record, which is returned. Never raises for what the sequence holds."""
    counts, stats, error, skipped = Counter(), Statistics(), "", False
    recording = Recording(job.sequence, "")
    _remove(out, job.file)
    try:
        adapter = make_adapter(name, args)
        recording = adapter.open(root, job.sequence)
        recording.split = job.split or recording.split
        clips = cut(recording, set_name(name), args.size, args.limit, counts, stats, job.file,
                    {**adapter.rates, **args.series})
        first = next(clips, None)
        if first is not None:
            write_clips(out / recording.split / f"{job.file}.tar", chain([first], clips), args.store)
        _note_losses(recording)
    except (UserError, MemoryError):
        raise
    except Exception as problem:  # whatever is wrong with this sequence must not cost the others
        known = isinstance(problem, BadSequence)
        error = str(problem) if known else f"{type(problem).__name__}: {problem}"
        skipped = isinstance(problem, NotARecording)
        for tar in out.glob(f"*/{job.file}.tar"):
            tar.unlink()
        counts, stats = Counter({"files that are no recording"
                                 if skipped else "sequences that failed": 1}), Statistics()
    times = recording.rgb.times if recording.rgb is not None else ()
    record = {"version": VERSION, "sequence": job.sequence, "stamp": job.stamp, "split": recording.split,
              "error": error,
              "skipped": skipped, "notes": recording.notes, "seconds": float(np.ptp(times)) if len(times) else 0.0,
              "counts": dict(counts), "stats": stats.plain()}
    path = record_path(out, job.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record))
    return record


def _note_losses(recording: Recording) -> None:
    for what, pictures in (("video", recording.rgb), ("depth", recording.depth)):
        losses = pictures.losses if pictures is not None else None
        if losses is not None and (losses.packets or losses.frames):
            recording.notes.append(f"{what}: {losses}")
