"""Where tokens come from: `encode.json` beside token shards, and whether a model, its tokens and its tokenizers belong
together.

The released shards carry no such note; of them only grids, vocabularies and kinds of signal can be compared.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from egom2p import resources
from egom2p.config import read_json
from egom2p.data.tokens import TokenDataset
from egom2p.errors import UserError
from egom2p.files import write_whole
from egom2p.lock import FileLock
from egom2p.modalities import Modality, ModalitySet
from egom2p.tokenizers import check_fits, load
from egom2p.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

NOTE = "encode.json"
FORMER_NOTE = "origin.json"  # its name until version 0.2.0, when it held a hash for each shard and nothing else of it


class Origin:
    """`encode.json` beside the shards of one modality and data set.

    tokenizer: fingerprint of the one that made them; clips: the pattern they were made from; shards {name: record}, a
    record being clips (number), content (hash of the clips' bytes), stamp (of the tars they lay in) and left_out
    {reason: keys}; and, over all shards, clips and left_out {reason: number} as `total`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NOTE
        self.lock = FileLock(folder / f".{NOTE}.lock")

    def claim(self, tokenizer: Tokenizer, clips: str) -> None:
        """Shards of one folder come from one tokenizer and one set of clips; anything else is refused, never mixed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock:
            found = self.read()
            if not found and any(self.folder.glob("*.tar")):
                raise UserError(f"{self.folder} holds shards of unknown origin; choose another --out or --dataset, or "
                                f"remove it")
            own = tokenizer.fingerprint()
            found = found or {"tokenizer": own, "clips": clips, "shards": {}}
            for what, value in (("tokenizer", own), ("clips", clips)):
                fits = found.get(what) == value or (what == "tokenizer" and tokenizer.made(found.get(what, "")))
                if not fits:
                    raise UserError(f"{self.folder} holds tokens of other {what} ({found.get(what)!r}, now {value!r}); "
                                    f"choose another --out or --dataset, or remove it")
            self._write(found)

    def read(self) -> dict[str, Any]:
        """The note as it is on disk; {} when there is none."""
        former = self.folder / FORMER_NOTE
        if self.path.exists() or not former.exists():
            return read_json(self.path) if self.path.exists() else {}
        note = read_json(former)
        return {**note, "shards": {name: {"content": content} for name, content in note.get("shards", {}).items()}}

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Write down what is in a shard."""
        with self.lock:
            note = self.read()
            shards = {**note.get("shards", {}), name: record}
            self._write({**note, "total": _total(shards.values()), "shards": dict(sorted(shards.items()))})

    def forget(self, names: Iterable[str]) -> None:
        """Shards that are not there any more."""
        with self.lock:
            note = self.read()
            shards = {name: record for name, record in note["shards"].items() if name not in set(names)}
            self._write({**note, "total": _total(shards.values()), "shards": shards})

    def _write(self, note: dict) -> None:
        write_whole(self.path, json.dumps(note, indent=1))


def _total(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    clips, left_out = 0, Counter()
    for record in records:
        clips += record.get("clips", 0)
        left_out.update({reason: len(keys) for reason, keys in record.get("left_out", {}).items()})
    return {"clips": clips, "left_out": dict(left_out)}


def folders_of(datasets: Iterable[TokenDataset]) -> list[tuple[str, Path]]:
    """(modality, local folder) of all shards of some data sets."""
    return [(name, folder) for dataset in datasets for name, folders in sorted(dataset.folders().items())
            for folder in folders]


def origins_of(folders: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """{modality: fingerprint of the tokenizer that made its tokens}, for those whose shards say so.

    Raises UserError when one modality's shards come from two tokenizers.
    """
    found: dict[str, tuple[str, Path]] = {}
    for name, folder in folders:
        maker = Origin(folder).read().get("tokenizer")
        if maker and found.setdefault(name, (maker, folder))[0] != maker:
            other, where = found[name]
            raise UserError(f"'{name}': the tokens in {where} and in {folder} were made by different tokenizers "
                            f"({other} and {maker}); encode both with one, or leave a data set out")
    return {name: maker for name, (maker, _) in found.items()}


def check_tokenizers(modalities: ModalitySet, origins: Mapping[str, str]) -> dict[str, str]:
    """The origins, completed by the tokenizers that the configuration names.

    Raises UserError for a tokenizer that is not there, is for another kind of signal or grid, or is not the one that
    made the tokens. One that would have to be fetched from the Hub and cannot be is only warned of.
    """
    known = dict(origins)
    for modality in modalities:
        tokenizer = _tokenizer_of(modality) if modality.tokenizer else None
        own = tokenizer.fingerprint() if tokenizer is not None else ""
        if own and (maker := known.setdefault(modality.name, own)) != own and not tokenizer.made(maker):
            raise UserError(f"modalities.{modality.name}.tokenizer: {modality.tokenizer} ({own}) did not make the "
                            f"tokens of '{modality.name}' ({known[modality.name]}); name the one that did, or "
                            f"encode the clips with this one into another folder")
    return known


def origin_problems(folders: list[tuple[str, Path]], modalities: ModalitySet | None) -> list[str]:
    """What is wrong with where tokens come from, one line a modality; for `egom2p shards check`."""
    problems = []
    for name in dict.fromkeys(name for name, _ in folders):
        entry = ModalitySet(m for m in modalities or () if m.name == name)
        try:
            check_tokenizers(entry, origins_of((n, folder) for n, folder in folders if n == name))
        except UserError as error:
            problems.append(str(error))
    return problems


def content_of(folders: Iterable[tuple[str, Path]]) -> str:
    """A hash of what the shards' notes say was encoded and by which tokenizer; "" when none says anything."""
    notes = [[name, note.get("tokenizer"), {shard: r.get("content") for shard, r in note.get("shards", {}).items()}]
             for name, folder in folders if (note := Origin(folder).read())]
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest() if notes else ""


def _tokenizer_of(modality: Modality) -> Tokenizer | None:
    """The tokenizer that a modality names, which fits it; None when it cannot be fetched."""
    try:
        tokenizer = load(modality.tokenizer)
    except UserError as error:
        if _may_be_remote(modality.tokenizer):
            log.warning("modalities.%s.tokenizer cannot be checked: %s", modality.name, error)
            return None
        raise UserError(f"modalities.{modality.name}.tokenizer: {error}") from error
    check_fits(tokenizer, modality)
    return tokenizer


def _may_be_remote(name: str) -> bool:
    """Whether a name can only be a Hub repository: OWNER/NAME, and no folder OWNER here."""
    path = resources.locate(name)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists() \
        and not path.parent.is_dir()
