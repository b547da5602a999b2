"""`egom2p tokens`: raw recordings -> token shards in one pass, no clips kept.

Sequences go through in groups: prepared into a folder beside the shards (`OUT-prepared`), encoded into one shard a
modality and split, `OUT/MODALITY/DATASET[_SPLIT]/shard-NUMBER.tar`, and their clips removed. Keys and ids are those of
`prepare` and `tokenizer encode`; only the division into shards is another. Given again, the command goes on where it
was: what is finished is noted in `OUT-prepared`. A few clips stay there for the contact sheet.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egom2p.config import read_json
from egom2p.data.clips import ClipIndex, write_clips
from egom2p.datasets.card import write_card
from egom2p.datasets.prepare import PrepareArgs, plan_jobs, record_path, run_jobs, set_name
from egom2p.errors import UserError
from egom2p.files import write_whole
from egom2p.tokenizers.base import Tokenizer
from egom2p.tokenizers.encode import EncodeArgs, Shard, encode_shards

log = logging.getLogger(__name__)

NOTE = "tokens.json"
KEPT_CLIPS = 12


def tokenise(name: str, root: Path, out: Path, tokenizers: list[Tokenizer], args: PrepareArgs,
             only: tuple[str, ...] = (), group: int = 32, encoding: EncodeArgs | None = None) -> dict[str, Any]:
    """Tokenise every sequence (or those in `only`) of data set `name`, `group` of them a shard. Returns the card."""
    clips = prepared_beside(out)
    plan, note = plan_jobs(name, root, clips, args, only), clips / NOTE
    settings = {"group": group, "sequences": list(only)}
    known = read_json(note) if note.exists() else {**settings, "done": []}
    if {k: known[k] for k in settings} != settings:
        begun = {k: known[k] for k in settings}
        raise UserError(f"{out} was begun with {begun}, now {settings}; choose another --out")
    for number, start in enumerate(range(0, len(plan.jobs), group)):
        jobs = plan.jobs[start : start + group]
        files = [job.file for job in jobs]
        changed = run_jobs(name, root, clips, plan, jobs)
        if number in known["done"]:
            if not changed:
                continue
            log.warning("group %d changed since it was encoded; it is prepared and encoded anew", number)
            _forget(clips, files)
            run_jobs(name, root, clips, plan, jobs)
        _encode_group(tokenizers, set_name(name), clips, files, number, out, encoding or EncodeArgs())
        known["done"] = sorted({*known["done"], number})
        write_whole(note, json.dumps(known))
        _keep_some(clips, files)
    return write_card(clips, set_name(name), plan.skipped)


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
        encode_shards(tokenizers, index, [shard], out, f"egom2p tokens {dataset}, {split}", encoding)


def _forget(clips: Path, files: Sequence[str]) -> None:
    for file in files:
        record_path(clips, file).unlink(missing_ok=True)


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
