"""One's own recordings in the quickstart: prepared at its size, a share held aside, predicted and measured."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from egom2p.data.clips import Clip, ClipIndex, write_clips
from egom2p.datasets.card import describe
from egom2p.datasets.prepare import PrepareArgs, prepare
from egom2p.errors import UserError
from egom2p.evaluation.results import Evaluation
from egom2p.evaluation.run import Task, evaluate, predict_clip
from egom2p.files import write_whole
from egom2p.generation.pipeline import Pipeline
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P

NAME = "recordings"
ASIDE = 0.2  # share of each recording that is held aside: its end


@dataclass(frozen=True)
class Shares:
    """Clips that are trained on and clips that are held aside, of so many recordings; in which folders."""

    trained: int
    aside: int
    recordings: int
    train_folder: Path
    aside_folder: Path


def take_recordings(folder: Path, out: Path, size: int, gaze_units: str = "") -> Shares:
    """Prepare the videos in `folder` (as `egom2p prepare video` does) below OUT/recordings and deal their clips to
    OUT/clips/train/recordings and OUT/clips/recordings.

    Where some lie in val/ or test/, those are held aside. Else it is the last fifth of each recording; where every one
    is too short for that, the last clip of all; a single clip is trained on, and nothing is held aside.
    """
    card = prepare("video", folder, out / NAME, PrepareArgs(size=size, gaze_units=gaze_units))
    print(describe(card))
    if not card["clips"]:
        raise UserError(f"{folder}: no clip could be made of what lies there; the reasons are named above")
    tars = sorted((out / NAME).glob("*/*.tar"))
    indices = [ClipIndex.of([tar]) for tar in tars]
    aside = [len(index) if tar.parent.name != "train" else 0 for tar, index in zip(tars, indices, strict=True)]
    if sum(aside) == card["clips"]:
        raise UserError(f"{folder}: all recordings lie in val/ or test/; put those to train on into train/")
    if not any(aside):
        aside = [int(len(index) * ASIDE) for index in indices]
    if not any(aside) and card["clips"] > 1:
        aside[-1] = 1
    shares = Shares(card["clips"] - sum(aside), sum(aside), len(tars), out / "clips/train" / NAME, out / "clips" / NAME)
    sources = json.dumps([index.stamps() for index in indices])
    both = list(zip(indices, aside, strict=True))
    _write(shares.train_folder, (i.read(n) for i, held in both for n in range(len(i) - held)), sources)
    _write(shares.aside_folder, (i.read(n) for i, held in both for n in range(len(i) - held, len(i))), sources)
    return shares


def _write(folder: Path, clips: Iterator[Clip], sources: str) -> None:
    """One tar of clips, none when there are none, unless it was written from the same ones before."""
    note = folder / "done"
    if note.exists():
        if note.read_text() != sources:
            raise UserError(f"{folder}: the recordings changed since this quickstart began; choose another --out or "
                            f"remove it")
        return
    first = next(clips, None)
    if first is not None:
        write_clips(folder / "clips.tar", chain([first], clips))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, sources)


def measure(model: EgoM2P, tasks: Iterable[str], shares: Shares, recipes: dict[str, TargetArgs]) -> Evaluation | None:
    """The tasks on the clips held aside, as far as at least two of them have what a task needs; None when none has."""
    if not shares.aside:
        return None
    index = ClipIndex(str(shares.aside_folder))
    sources = {m.name: m.clip_signal for m in model.modalities}
    held = [index.signals(i) for i in range(len(index))]
    usable = []
    for name in tasks:
        task = Task.parse(name, model.modalities.names)
        if sum({sources[n] for n in (*task.inputs, task.target)} <= signals for signals in held) > 1:
            usable.append(name)
    return evaluate(model, usable, str(shares.aside_folder), recipes) if usable else None


def predict_aside(pipeline: Pipeline, shares: Shares, targets: Iterable[str], recipes: dict[str, TargetArgs],
                  shown: int = 3) -> list[tuple[Clip, dict[str, np.ndarray]]]:
    """(clip, {target: signal}) from the rgb of some clips held aside, spread over them; of the trained ones when none
    is aside."""
    index = ClipIndex(str(shares.aside_folder if shares.aside else shares.train_folder))
    asked, made = pipeline.recipes(recipes), []
    for number in np.unique(np.linspace(0, len(index) - 1, shown).astype(int)):
        clip = index.read(int(number))
        made.append((clip, predict_clip(pipeline, clip, ["rgb"], {t: asked[t] for t in targets})))
    return made
