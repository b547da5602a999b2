"""`egom2p quickstart`: the whole job on a CPU. World, tokenizers, shards, training, predictions, evaluation, report.

Every stage is the ordinary command's function with the ordinary YAML; this file only puts them in order,
times them, and keeps the two cores busy (the tokenizers are independent, so two train side by side).
"""

import json
import logging
import os
import runpy
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from egom2p import own
from egom2p.config import load, read_json, to_plain
from egom2p.data.clips import Clip, count_clips
from egom2p.data.loader import DatasetArgs
from egom2p.data.shardtools import SHARD_CLIPS, check
from egom2p.datasets.world import write_world
from egom2p.errors import UserError
from egom2p.evaluation.results import changes_since, reliability, table, write_results
from egom2p.evaluation.run import Task, evaluate, predict_clip
from egom2p.evaluation.takes import take_of
from egom2p.files import write_whole
from egom2p.generation.pipeline import Pipeline
from egom2p.generation.recordings import GenerateArgs, generate_files
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.processes import forks
from egom2p.training.log import read_metrics
from egom2p.training.pretraining import PretrainConfig, pretrain
from egom2p.training.tokenizer_training import TokenizerConfig
from egom2p.visualize import plots
from egom2p.visualize.report import OwnPart, Report, write_report

log = logging.getLogger(__name__)

TARGETS = ("cam", "gaze", "depth")
EVAL_TASKS = ("rgb2cam", "rgb2gaze", "rgb2depth", "depth2rgb")


@dataclass(frozen=True)
class WorldSet:
    """One data set of procedural clips."""

    clips: int
    seed: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuickstartConfig:
    """size: side of the frames. train: training sets by name. held_out: clips for the token loss during
    training; test: clips for the result table, seen by nothing before. lanes: tokenizer configs trained side
    by side. training: the train YAML. recipes: how each target is generated; drawn: how one draw of a picture is made,
    shown in the report beside it. tokenizer_overrides: key=value.
    recordings_share: of the training's samples, from the user's own recordings when there are any."""

    size: int
    train: dict[str, WorldSet]
    held_out: WorldSet
    test: WorldSet
    lanes: tuple[tuple[str, ...], ...]
    training: str
    recipes: dict[str, TargetArgs] = field(default_factory=dict)
    drawn: dict[str, TargetArgs] = field(default_factory=dict)
    tokenizer_overrides: tuple[str, ...] = ()
    train_overrides: tuple[str, ...] = ()
    tasks: tuple[str, ...] = EVAL_TASKS
    recordings_share: float = 0.25


def quickstart(out: Path, config_path: Path, inputs: list[Path], recordings: Path | None = None,
               gaze_units: str = "") -> Path:
    """Run every stage below `out`; finished stages are kept when it is run again. Returns the report's path.

    inputs: videos to predict from at the end. recordings: a folder of videos (with side files, docs/data.md) to train
    on beside the world; a share of them is held aside, predicted and measured.
    """
    config = load(QuickstartConfig, config_path)
    for path in inputs:
        if not path.is_file():
            raise UserError(f"--inputs: there is no file {path}")
    if recordings and not recordings.is_dir():
        raise UserError(f"--recordings: there is no folder {recordings}")
    out.mkdir(parents=True, exist_ok=True)
    asked = {"recordings": str(recordings.resolve())} if recordings else {}
    stages = Stages(out / "stages.json", {**to_plain(config), **asked})
    with stages.run("world"):
        _make_world(config, out / "clips")
    shares = None
    if recordings:
        with stages.run("recordings"):
            shares = own.take_recordings(recordings, out, config.size, gaze_units)
    with stages.run("tokenizers"):
        names = _train_tokenizers(config, out)
    with stages.run("encode"):
        _encode([*config.train, *([own.NAME] if shares else [])], out, names)
    with stages.run("train"):
        training = load(PretrainConfig, config.training, _train_overrides(config, out, names))
        pretrain(_with_recordings(training, config.recordings_share) if shares else training)
    with stages.run("evaluate"):
        model = EgoM2P.from_pretrained(out / "model")
        evaluation = evaluate(model, config.tasks, str(out / "clips/test/*.tar"), config.recipes, shown=3)
    print(table(evaluation.summary))
    with stages.run("generate"):
        wanted = GenerateArgs(TARGETS, recipes=config.recipes)
        pipeline = Pipeline(model)
        folders, failed = generate_files(pipeline, inputs, out / "generated", wanted)
        for reason in failed.values():
            log.warning("left out: %s", reason)
        mine = _own(config, pipeline, shares) if shares else None
    if mine and mine.summary:
        print(f"{own.NAME}, the clips held aside:\n{table(mine.summary)}")
    with stages.run("report"):
        _report(config, out, evaluation, stages.seconds, [(f.name, f / "preview.png") for f in folders], mine, pipeline)
    write_results(out, evaluation, {"seconds": stages.seconds, **({own.NAME: mine.summary} if mine else {})})
    print(f"report: {out / 'report.html'}\nresults: {out / 'results.json'}")
    return out / "report.html"


class Stages:
    """Times the stages and remembers what earlier runs of the same configuration spent on them."""

    def __init__(self, path: Path, config: dict) -> None:
        self.path, self.config = path, config
        known = read_json(path) if path.exists() else {"config": config, "seconds": {}}
        if known["config"] != config:
            raise UserError(f"{path.parent} holds a quickstart with another configuration; choose another --out or "
                            f"remove it")
        self.seconds: dict[str, float] = known["seconds"]

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        print(f"--- {name}" + (f" (took {self.seconds[name]:.0f} s last time)" if name in self.seconds else ""),
              flush=True)
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = max(spent, self.seconds.get(name, 0.0))
        write_whole(self.path, json.dumps({"config": self.config, "seconds": self.seconds}))


def _make_world(config: QuickstartConfig, clips: Path) -> None:
    sets = {**{f"train/{name}": s for name, s in config.train.items()}, "held_out": config.held_out,
            "test": config.test}
    for name, entry in sets.items():
        if not (clips / name / "done").exists():
            write_world(clips / name, entry.clips, entry.seed, config.size, Path(name).name, entry.without)
            (clips / name / "done").touch()


def _train_tokenizers(config: QuickstartConfig, out: Path) -> dict[str, str]:
    """Train the lanes side by side, one thread each; returns {modality: export folder}."""
    overrides = [f"data.clips={out}/clips/train/*/*.tar", f"eval.clips={out}/clips/held_out/*.tar",
                 *config.tokenizer_overrides]
    lanes, folders, totals = [], {}, {}
    for number, lane in enumerate(config.lanes):
        commands = []
        for path in lane:
            entry = load(TokenizerConfig, path, overrides)
            folder = out / "tokenizers" / entry.tokenizer.name
            folders[entry.tokenizer.name] = str(folder)
            totals[folder] = entry.train.steps
            if (folder / f"checkpoints/step_{entry.train.steps:08d}/state.json").exists():
                continue
            commands.append(["tokenizer", "train", path, f"run.dir={folder}", "train.threads=1", *overrides])
        lanes.append(_Lane(commands, out / f"tokenizers-{number}.log"))
    with tqdm(total=sum(totals.values()), desc="tokenizers", unit="step") as bar, _to_the_end(lanes):
        while not _all_done(lanes):
            time.sleep(0.5)
            last = {f.name: read_metrics(f)[-1:] for f in totals}
            bar.n = sum(records[0]["step"] for records in last.values() if records)
            bar.set_postfix_str(", ".join(f"{n} {r[0]['error']:.3f}" for n, r in last.items() if r and "error" in r[0]))
    return folders


class _Lane:
    """Commands of egom2p run one after the other in the background, on one thread each."""

    def __init__(self, commands: list[list[str]], log_path: Path) -> None:
        self.commands, self.log_path = commands, log_path
        self.process: BaseProcess | None = None

    def advance(self) -> bool:
        """Start the next command when the last one ended; True when all are done."""
        if self.process is not None:
            if self.process.is_alive():
                return False
            if self.process.exitcode:
                lines = self.log_path.read_text().splitlines()[-1:] or ["no output"]
                raise UserError(f"{self.process.name} failed: {lines[0]} (all of it in {self.log_path})")
        if not self.commands:
            return True
        words = self.commands.pop(0)
        self.process = forks().Process(target=_run_command, args=(words, self.log_path, dict(os.environ)),
                                       name=f"egom2p {' '.join(words[:3])}")
        self.process.start()
        return False

    def stop(self) -> None:
        """Not to leave a process behind: a training saves first."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _run_command(words: list[str], log_path: Path, environment: dict[str, str]) -> None:
    """`python -m egom2p WORDS` in this process; what it prints is added to a file."""
    os.environ.update(environment)
    with log_path.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv[1:] = words
    runpy.run_module("egom2p", run_name="__main__", alter_sys=True)


@contextmanager
def _to_the_end(lanes: list[_Lane]) -> Iterator[None]:
    """When one lane fails, or the user leaves, the others end too."""
    try:
        yield
    finally:
        for lane in lanes:
            lane.stop()


def _all_done(lanes: list[_Lane]) -> bool:
    done = [lane.advance() for lane in lanes]
    return all(done)


def _encode(train: list[str], out: Path, folders: dict[str, str]) -> None:
    """Encode the training sets side by side and the held-out set, then check every shard."""
    def command(name: str) -> list[str]:
        return ["tokenizer", "encode", *folders.values(), "--clips", f"{out}/clips/{name}/*.tar", "--out",
                f"{out}/tokens", "--dataset", Path(name).name, "--workers", "0"]

    names = [f"train/{name}" for name in train]
    lanes = [_Lane([command(n) for n in names[i::2] + (["held_out"] if i else [])], out / f"encode-{i}.log")
             for i in range(2)]
    clips = [count_clips(f"{out}/clips/{name}/*.tar") for name in [*names, "held_out"]]
    expected = len(folders) * sum(-(-count // SHARD_CLIPS) for count in clips)
    with tqdm(total=expected, desc="encode", unit="shard") as bar, _to_the_end(lanes):
        while not _all_done(lanes):
            time.sleep(0.5)
            bar.n = len(list((out / "tokens").glob("*/*/*.tar")))
            bar.refresh()
    problems, files, _ = check(f"{out}/tokens/*/*/*.tar")
    if problems:
        raise UserError(f"{len(problems)} problems in the shards, the first: {problems[0]}")
    print(f"shards check: {files} token files, no problem")


def _train_overrides(config: QuickstartConfig, out: Path, folders: dict[str, str]) -> list[str]:
    return [f"run.dir={out}/model", f"data.root={out}/tokens",
            *(f"modalities.{n}.tokenizer={f}" for n, f in folders.items()), *config.train_overrides]


def _with_recordings(training: PretrainConfig, share: float) -> PretrainConfig:
    """The training with the recordings as one more data set, of such a share of the samples."""
    datasets = training.data.datasets
    weight = sum(d.weight for d in datasets.values()) * share / (1 - share)
    return replace(training, data=replace(training.data, datasets={**datasets, own.NAME: DatasetArgs(weight)}))


def _sheets(clips: Iterable[tuple[Clip, dict[str, np.ndarray]]], kinds: dict[str, str]) -> list[tuple[str, Any]]:
    """(caption, figure) of clips and what was predicted for them."""
    return [(f"clip {clip.key}", plots.clip_sheet(clip.signals["rgb"], clip.signals, predicted, kinds, ""))
            for clip, predicted in clips]


def _own(config: QuickstartConfig, pipeline: Pipeline, shares: own.Shares) -> OwnPart:
    """The report's part about the user's own recordings."""
    kinds = {m.name: m.signal for m in pipeline.model.modalities}
    sheets = _sheets(own.predict_aside(pipeline, shares, TARGETS, config.recipes), kinds)
    text = (f"{shares.trained + shares.aside} clips of {shares.recordings} recordings: {shares.trained} were trained "
            f"on beside the world, {shares.aside} held aside (the last part of each recording). ")
    text += "The clips below were held aside." if shares.aside else "Those below are among the ones trained on."
    measured = own.measure(pipeline.model, config.tasks, shares, config.recipes)
    return OwnPart(text, sheets, measured.summary if measured else {})


def _report(config: QuickstartConfig, out: Path, evaluation, seconds: dict[str, float],
            pictures: list[tuple[str, Path]], mine: OwnPart | None, pipeline: Pipeline) -> None:
    model_dir = out / "model"
    environment = read_json(model_dir / "environment.json")
    metrics = read_metrics(model_dir)
    training = load(PretrainConfig, model_dir / "config.yaml")
    kinds = {n: m.signal for n, m in training.modalities.items()}
    facts = [("clips", f"{sum(s.clips for s in config.train.values())} for training, {config.test.clips} held out"),
             ("samples seen", f"{training.num_steps * training.train.batch_size:,}"),
             ("device", f"{environment['device']}, {environment['threads']} threads"),
             ("torch", environment["torch"]), ("commit", (environment["commit"] or "none")[:10])]
    shown = _merge_shown(evaluation.shown)
    sheets = _sheets(shown, kinds)
    takes = [take_of(clip, kinds, predicted) for clip, predicted in shown]
    drawn = _drawn(config, evaluation.shown, pipeline)
    during = [(f"{p.stem} at step {int(p.parent.name[5:])}", p)
              for p in sorted((model_dir / "pictures").glob("*/*.png"))[-4:]]
    write_report(out / "report.html", Report(
        "EgoM2P on the procedural world", evaluation.summary, metrics, sheets, seconds, facts, pictures, during, mine,
        takes, {name: reliability(rows) for name, rows in evaluation.rows.items()}, changes_since(out, evaluation),
        drawn))


def _drawn(config: QuickstartConfig, shown: dict, pipeline: Pipeline) -> list[tuple[str, Any]]:
    """(caption, figure) of each task whose target is drawn: truth, the mean that is measured, and one draw."""
    figures = []
    for name, pairs in shown.items():
        task = Task.parse(name, pipeline.model.modalities.names)
        if task.target not in config.drawn or not pairs:
            continue
        target, rows = task.target, []
        for clip, predicted in pairs:
            draw = predict_clip(pipeline, clip, task.inputs, {target: config.drawn[target]})
            rows.append({f"true {target}": clip.signals[pipeline.tokenizer(target).modality.clip_signal],
                         "predicted: the mean, as measured": predicted[target], "one draw": draw[target]})
        figures.append((f"{name}, the first clips", plots.draws_figure(rows)))
    return figures


def _merge_shown(shown: dict) -> list[tuple]:
    """Predictions of all tasks for the clips that have every one of them."""
    clips: dict[str, tuple] = {}
    for pairs in shown.values():
        for clip, predicted in pairs:
            known = clips.setdefault(clip.key, (clip, {}))
            known[0].signals.update(clip.signals)
            known[1].update({k: v for k, v in predicted.items() if k != "ceiling"})
    return sorted(clips.values(), key=lambda pair: -len(pair[1]))[:3]
