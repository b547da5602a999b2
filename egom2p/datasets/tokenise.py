"""`egom2p tokens`: raw recordings -> token shards in one pass, no clips kept.

Sequences go through in groups: prepared into a folder beside the shards (`OUT-prepared`), encoded into one shard a
modality and split, `OUT/MODALITY/DATASET[_SPLIT]/shard-NUMBER.tar`, and their clips removed. Keys and ids are those of
`prepare` and `tokenizer encode`; only the division into shards is another. Given again, the command goes on where it
was: what is finished is noted in `OUT-prepared`. A few clips stay there for the contact sheet.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egom2p.config import read_json
from egom2p.data.clips import ClipIndex, write_clips
from egom2p.datasets.card import write_card
from egom2p.datasets.prepare import (
    Job,
    Plan,
    PrepareArgs,
    has_failed,
    is_done,
    plan_jobs,
    record_path,
    run_jobs,
    set_name,
)
from egom2p.errors import UserError
from egom2p.files import write_whole
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.encode import EncodeArgs, Shard, encode_shards
from egom2p.tokenizers.origin import Origin

log = logging.getLogger(__name__)

NOTE = "tokens.json"
KEPT_CLIPS = 12


def tokenise(name: str, root: Path, out: Path, tokenizers: list[Tokenizer], args: PrepareArgs,
             only: tuple[str, ...] = (), group: int = 32, encoding: EncodeArgs | None = None) -> dict[str, Any]:
    """Tokenise every sequence (or those in `only`) of data set `name`, `group` of them a shard. Returns the card.

    Who is in a group stays: sequences that come later make groups, and shards, of their own. A group one of whose
    sequences changed is done anew; UserError when another one of it is not there any more to be prepared again.
    """
    clips = prepared_beside(out)
    plan = plan_jobs(name, root, clips, args, only)
    note = _Note.of(clips / NOTE, {"group": group, "sequences": list(only)})
    jobs = {job.sequence: job for job in plan.jobs}
    for number, sequences in enumerate(note.grouped(list(jobs))):
        there = [jobs[sequence] for sequence in sequences if sequence in jobs]
        if number in note.done and not _has_news(name, root, clips, plan, there, note.failed.get(str(number), [])):
            continue
        if number in note.done | note.stale:
            gone = [sequence for sequence in sequences if sequence not in jobs]
            if gone:
                raise UserError(f"shard {number} of {out} must be made anew, since a recording of it changed, but "
                                f"{gone[0]} of it is not below {root} any more; put it back or choose another --out")
            log.warning("group %d changed since it was encoded; it is prepared and encoded anew", number)
            note.write(done=note.done - {number}, stale=note.stale | {number})
            for job in there:
                record_path(clips, job.file).unlink(missing_ok=True)
            note.write(stale=note.stale - {number})
        run_jobs(name, root, clips, plan, there)
        files = [job.file for job in there]
        _encode_group(tokenizers, set_name(name), clips, files, number, out, encoding or EncodeArgs())
        failed = [job.sequence for job in there if has_failed(clips, job)]
        note.write(done=note.done | {number}, failed={**note.failed, str(number): failed})
        _keep_some(clips, files)
    return write_card(clips, set_name(name), plan.skipped)


@dataclass
class _Note:
    """What is finished, on disk: groups (sequences of each), done (numbers of groups whose shards are whole), stale
    (numbers of those to be prepared and encoded anew), failed {number: sequences that gave nothing}."""

    path: Path
    settings: dict[str, Any]
    groups: list[list[str]]
    done: set[int]
    stale: set[int]
    failed: dict[str, list[str]]

    @classmethod
    def of(cls, path: Path, settings: dict[str, Any]) -> "_Note":
        known = read_json(path) if path.exists() else settings
        begun = {k: known.get(k) for k in settings}
        if begun != settings:
            raise UserError(f"{path.parent} was begun with {begun}, now {settings}; choose another --out")
        if known.get("done") and "groups" not in known:
            raise UserError(f"{path.parent} was begun by an older version, which did not note what is in which shard; "
                            f"choose another --out")
        return cls(path, settings, known.get("groups", []), set(known.get("done", ())), set(known.get("stale", ())),
                   known.get("failed", {}))

    def grouped(self, sequences: list[str]) -> list[list[str]]:
        """Groups on record that are begun, and then the sequences that are in none."""
        kept = self.groups[: max(self.done | self.stale, default=-1) + 1]
        taken, size = {sequence for group in kept for sequence in group}, self.settings["group"]
        others = [sequence for sequence in sequences if sequence not in taken]
        self.groups = kept + [others[i : i + size] for i in range(0, len(others), size)]
        self.write()
        return self.groups

    def write(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        write_whole(self.path, json.dumps({**self.settings, "groups": self.groups, "done": sorted(self.done),
                                           "stale": sorted(self.stale), "failed": self.failed}))


def _has_news(name: str, root: Path, clips: Path, plan: Plan, jobs: list[Job], failed: list[str]) -> bool:
    """Whether the shards of a finished group are out of date: a sequence changed, or one that `failed` when it was
    encoded, and is tried again here, has clips now."""
    if any(not is_done(clips, job) and not has_failed(clips, job) for job in jobs):
        return True
    again = [job for job in jobs if has_failed(clips, job)]
    failed = {*failed, *(job.sequence for job in again)}
    if again:
        run_jobs(name, root, clips, plan, again)
    return any(job.sequence in failed and is_done(clips, job) for job in jobs)


def prepared_beside(out: Path) -> Path:
    """Where the clips, records, card and contact sheet of the shards `out` go."""
    return out.with_name(f"{out.name}-prepared")


def _encode_group(tokenizers: list[Tokenizer], dataset: str, clips: Path, files: Sequence[str], number: int, out: Path,
                  encoding: EncodeArgs) -> None:
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for file in files for path in clips.glob(f"*/{file}.tar")):
        splits.setdefault(path.parent.name, []).append(path)
    for split, paths in splits.items():
        index = ClipIndex.of(paths)
        shard = Shard(dataset if split == "train" else f"{dataset}_{split}", number, list(range(len(index))))
        encode_shards(tokenizers, index, [shard], out, f"{_origin_of(dataset)}{split}", encoding)
    _drop_emptied(dataset, number, out, set(splits))


def _drop_emptied(dataset: str, number: int, out: Path, splits: set[str]) -> None:
    """Remove the shards that a group has of splits in which none of its clips is any more."""
    for folder in sorted(p for p in out.glob("*/*") if p.is_dir()):
        origin, shard = Origin(folder), folder / f"shard-{number:06d}.tar"
        made_from = origin.read().get("clips", "")
        split = made_from.removeprefix(_origin_of(dataset))
        if shard.exists() and split != made_from and split not in splits:
            shard.unlink()
            origin.forget([shard.name])


def _origin_of(dataset: str) -> str:
    return f"egom2p tokens {dataset}, "


def _keep_some(clips: Path, files: Sequence[str]) -> None:
    """Remove a group's clips but for the first of each sequence, as long as there are not KEPT_CLIPS of them."""
    sample = clips / "sample" / "sample.tar"
    index = ClipIndex.of([sample]) if sample.exists() else None
    kept = {key: index.read(i) for i, key in enumerate(index.keys)} if index else {}
    tars = [path for file in files for path in clips.glob(f"*/{file}.tar")]
    more = [ClipIndex.of([path]).read(0) for path in tars[: KEPT_CLIPS - len(kept)]]
    if more:
        write_clips(sample, {**kept, **{clip.key: clip for clip in more}}.values(), "mp4")
    for path in tars:
        path.unlink()
