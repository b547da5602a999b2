"""`egom2p features`: the encoder's features of clips, for other work.

`OUT/features-000000.safetensors`, a file for every FILE_CLIPS clips, holds `features` in float16, (n, dim) or (n,
tokens, dim), and in its metadata the clips' keys in that order. Any number of processes shares the files by locks;
finished ones are kept, so a stopped command goes on. A clip that lacks an input goes without and is named and counted.
"""

import csv
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from egom2p import tokenizers
from egom2p.config import read_json, to_plain
from egom2p.data.clips import Clip, ClipIndex
from egom2p.distributed import World
from egom2p.errors import DamagedClip, UserError
from egom2p.files import aside, write_whole
from egom2p.lock import FileLock
from egom2p.model.egom2p import EgoM2P

log = logging.getLogger(__name__)

FILE_CLIPS = 512
BATCH = 16
NOTE = "features.json"
POLL_S = 1.0


@dataclass(frozen=True)
class FeatureArgs:
    """inputs: modalities that are shown, together. layers: encoder blocks to run, all and the last norm when -1. pool:
    mean over the tokens, or none. label: an entry of the clips' json that goes into labels.csv."""

    inputs: tuple[str, ...]
    layers: int = -1
    pool: Literal["mean", "none"] = "mean"
    label: str = ""


def write_features(model: EgoM2P, pattern: str, out: Path, args: FeatureArgs, world: World,
                   trust_torchscript: bool = False) -> int:
    """Features of all clips of `pattern` into `out`; returns how many clips have some. Raises UserError for inputs and
    layers that the model does not have, and when `out` holds features of something else."""
    index = ClipIndex(pattern)
    _refuse_equal_keys(index)
    loaded = _loaded(model, args, trust_torchscript)
    made_by = {name: tokenizer.fingerprint() for name, tokenizer in loaded.items()}
    what = {"model": model.fingerprint(), "clips": pattern, "stamps": index.stamps(), "tokenizers": made_by,
            **to_plain(args)}
    _claim(out, json.loads(json.dumps(what)))
    groups = [range(i, min(i + FILE_CLIPS, len(index))) for i in range(0, len(index), FILE_CLIPS)]
    first = world.rank * len(groups) // world.size
    left = [*groups[first:], *groups[:first]]
    with tqdm(total=len(left), desc="features", unit="file", disable=not world.is_main) as bar:
        while left := [group for group in left if not _is_written(out, model, loaded, index, group, args, bar)]:
            if not world.is_main:
                break
            time.sleep(POLL_S)  # others are at the rest; should they die, it falls to this one
    if args.label and world.is_main:
        _write_labels(out / "labels.csv", index, args.label)
    return sum(len(_keys(path)) for path in sorted(out.glob("features-*.safetensors")))


def _refuse_equal_keys(index: ClipIndex) -> None:
    """Features and labels are paired by key, so that two clips of one key would get each other's."""
    if twice := index.first_twice(range(len(index))):
        one, other = twice
        raise UserError(f"{index.path(one)} and {index.path(other)} both hold a clip {index.keys[one]}; write the "
                        f"features of each data set by themselves, with its own --clips and --out")


def _is_written(out: Path, model: EgoM2P, loaded: dict, index: ClipIndex, group: range, args: FeatureArgs,
                bar: tqdm) -> bool:
    """Whether the file of these clips is there, perhaps by this process, now; False when another is at it."""
    path = out / f"features-{group.start // FILE_CLIPS:06d}.safetensors"
    lock = FileLock(out / f".{path.name}.lock")
    if not path.exists():
        if not lock.take():
            return False
        try:
            if not path.exists():
                _write_file(path, model, loaded, index, group, args)
        finally:
            lock.release()
    bar.update(1)
    return True


def read_features(folder: Path) -> tuple[list[str], np.ndarray]:
    """(keys, (n, dim) or (n, tokens, dim) float32) of a folder. Raises UserError when it holds none."""
    paths = sorted(folder.glob("features-*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no features there; `egom2p features MODEL --clips ... --out {folder}` writes them")
    keys, parts = [], []
    for path in paths:
        keys += _keys(path)
        with safe_open(path, "np") as file:
            parts.append(file.get_tensor("features").astype(np.float32))
    if not keys:
        raise UserError(f"{folder}: no clip there has features; they all lacked an input")
    return keys, np.concatenate([p for p in parts if len(p)])


def _loaded(model: EgoM2P, args: FeatureArgs, trust_torchscript: bool) -> dict[str, tokenizers.Tokenizer]:
    known = model.modalities.names
    if strangers := [n for n in args.inputs if n not in known]:
        raise UserError(f"the model has no modality '{strangers[0]}'; --inputs are of {', '.join(known)}")
    if not -1 <= args.layers <= model.args.encoder_depth:
        raise UserError(f"--layer must lie in 0 .. {model.args.encoder_depth}, the model's encoder blocks")
    return tokenizers.load_for(model.modalities, args.inputs, model.device, model.folder, trust_torchscript,
                               model.origins)


def _claim(out: Path, what: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / f".{NOTE}.lock"):
        if not (out / NOTE).exists():
            write_whole(out / NOTE, json.dumps(what, indent=1))
    if read_json(out / NOTE) != what:
        raise UserError(f"{out} holds features of another model, other clips or other options; choose another --out or "
                        f"remove it")


def _write_file(path: Path, model: EgoM2P, loaded: dict, index: ClipIndex, group: range, args: FeatureArgs) -> None:
    keys, parts = [], []
    usable = list(_readable(index, group, loaded))
    for start in range(0, len(usable), BATCH):
        batch = usable[start : start + BATCH]
        tokens = {n: torch.from_numpy(t.encode_observed([c.signals[t.modality.clip_signal] for c in batch]))
                  for n, t in loaded.items()}
        with torch.no_grad():
            made = model.encode(tokens, None if args.layers < 0 else args.layers)
        rows = torch.cat([made[n] for n in args.inputs], 1)
        if args.pool == "mean":
            shown = torch.cat([tokens[n].flatten(1) >= 0 for n in args.inputs], 1).to(rows.device)
            rows = rows.sum(1) / shown.sum(1, keepdim=True)
        parts.append(rows.half().cpu())
        keys += [c.key for c in batch]
    part = aside(path)
    whole = torch.cat(parts) if parts else torch.zeros(0, model.args.dim, dtype=torch.float16)
    save_file({"features": whole.contiguous()}, part, {"keys": json.dumps(keys)})
    part.replace(path)


def _readable(index: ClipIndex, group: range, loaded: dict) -> Iterator[Clip]:
    """Clips that have every input, measured."""
    sources = {t.modality.clip_signal: t for t in loaded.values()}
    lost = []
    for number in group:
        try:
            clip = index.read(number, set(sources))
            for source, tokenizer in sources.items():
                if source in clip.signals:
                    tokenizer.check(clip.signals[source], clip.key)
            if all(s in clip.signals and np.any(t.observed(clip.signals[s])) for s, t in sources.items()):
                yield clip
                continue
        except DamagedClip as error:
            log.warning("%s", error)
        lost.append(index.keys[number])
    if lost:
        log.warning("%d clips go without features, they lack %s (%s%s)", len(lost), " or ".join(sources),
                    ", ".join(lost[:5]), ", ..." if len(lost) > 5 else "")


def _keys(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["keys"])


def _write_labels(path: Path, index: ClipIndex, label: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["key", "label", "group"])
    for clip in index.readable(range(len(index)), set()):
        if clip.meta.get(label) is not None:
            writer.writerow([clip.key, clip.meta[label], clip.meta.get("source", "")])
    write_whole(path, text.getvalue())
