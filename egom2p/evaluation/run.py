"""`egom2p eval`: a trained model on held-out clips, beside what is trivial and what is possible.

For every task and clip: the model's prediction; the trivial baselines; the same model with its inputs
taken from another clip (the control: if that is no worse, the input is not used); and the tokenizer's own
reconstruction (the ceiling).

Clips go through in blocks of BATCH, dealt to the ranks in turn; each block's rows are written when it is done, so an
evaluation that was stopped goes on where it was, and the figures do not depend on the number of ranks.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from egom2p import resources, tokenizers
from egom2p.config import read_json, to_plain
from egom2p.data.clips import Clip, ClipIndex
from egom2p.distributed import World, barrier
from egom2p.errors import UserError
from egom2p.evaluation.measures import MEASURES, MeasureArgs, is_better, without_padding
from egom2p.evaluation.results import Evaluation, TaskRows, check_same_model, summarise, write_results
from egom2p.generation.pipeline import Pipeline
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs, name_unknown, recipes_of
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

BATCH = 16
ROWS_VERSION = 4  # of what a row holds: older ones are measured anew


@dataclass(frozen=True)
class ProtocolConfig:
    """A YAML below cfgs/eval/: everything that makes two evaluations comparable. data: pattern of clip tars; limit: at
    most so many clips, spread evenly over the data (0 = all); recipes {target modality: TargetArgs}; published {task:
    {metric: value}}: which columns are the published ones, and what was published."""

    tasks: tuple[str, ...]
    data: str
    limit: int = 0
    seed: int = 0
    recipes: dict[str, TargetArgs] = field(default_factory=dict)
    measures: MeasureArgs = MeasureArgs()
    published: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """`rgb2cam`: condition on rgb, predict cam. Several conditions are joined by +, as in rgb+depth2cam."""

    name: str
    inputs: tuple[str, ...]
    target: str

    @classmethod
    def parse(cls, name: str, known: list[str]) -> "Task":
        # A modality's own name may hold a 2.
        cuts = [(name[:i].split("+"), name[i + 1 :]) for i, letter in enumerate(name) if letter == "2"]
        inputs, target = next((c for c in cuts if {*c[0], c[1]} <= set(known)), cuts[0] if cuts else ([name], ""))
        for part in (*inputs, target):
            if part not in known:
                raise UserError(f"task '{name}' names no modality '{part}' of this model; write INPUT2TARGET with "
                                f"{', '.join(known)}")
        if target in inputs:
            raise UserError(f"task '{name}' shows what it asks for")
        return cls(name, tuple(inputs), target)


def evaluate(model: EgoM2P, task_names: Iterable[str], data: str, recipes: dict[str, TargetArgs], limit: int = 0,
             seed: int = 0, shown: int = 0, out: Path | None = None, measures: MeasureArgs | None = None,
             world: World | None = None) -> Evaluation:
    """Run the tasks on the clips that `data` names (at most `limit`), and summarise.

    recipes: {target modality: TargetArgs}; a target without one gets the defaults. out: folder that keeps each block's
    rows, from which a stopped evaluation goes on; without it everything stays in memory. world: this process among
    others; every one returns the whole Evaluation when `out` is a folder they share. shown: predictions kept for plots.
    """
    runner = _Runner(model, list(task_names), data, recipes, limit, seed, shown, out, measures or MeasureArgs(), world)
    return runner.run()


class _Runner:
    def __init__(self, model: EgoM2P, task_names: list[str], data: str, recipes: dict[str, TargetArgs], limit: int,
                 seed: int, shown: int, out: Path | None, measures: MeasureArgs, world: World | None,
                 trust_torchscript: bool = False) -> None:
        self.model, self.recipes, self.seed, self.shown = model, recipes_of(model.generation, recipes), seed, shown
        name_unknown(recipes, model.modalities.names)
        self.tasks = [Task.parse(name, model.modalities.names) for name in task_names]
        used = {n for t in self.tasks for n in (*t.inputs, t.target)}
        self.loaded = tokenizers.load_for(model.modalities, used, model.device, model.folder, trust_torchscript,
                                          model.origins)
        self.sources = {t.modality.clip_signal for t in self.loaded.values()}
        self.measures = {name: MEASURES[t.modality.signal](measures) for name, t in self.loaded.items()}
        self.clips = ClipIndex(data)
        repeated = len(self.clips) - len(set(self.clips.keys))
        if repeated:
            raise UserError(f"{data}: {repeated} clip keys occur twice; evaluate the data sets one by one")
        total = len(self.clips)
        self.chosen = _spread(total, limit)
        self.rank, self.size = (world.rank, world.size) if world else (0, 1)
        self.folder = out / "rows" if out else None
        chosen = [self.clips.keys[i] for i in self.chosen]
        asked = {t.target: to_plain(self.recipes[t.target]) for t in self.tasks}
        weights, stamps = model.fingerprint(), self.clips.stamps()
        prints = {name: t.fingerprint() for name, t in self.loaded.items()}
        self.identity = _digest([task_names, asked, seed, to_plain(measures), chosen, stamps, weights, prints, BATCH,
                                 ROWS_VERSION])
        self.about = {"model": str(_home(model)), "step": _step(model), "weights": weights,
                      "commit": resources.commit(), "torch": torch.__version__, "data": data, "clips": len(chosen),
                      "data_fingerprint": _digest([chosen, stamps]), "tokenizers": prints, "recipes": asked,
                      "seed": seed}
        self.done: dict[tuple[str, str], dict] = {}
        self.pictures: dict[str, list] = {t.name: [] for t in self.tasks}

    def run(self) -> Evaluation:
        blocks = [self.chosen[i : i + BATCH] for i in range(0, len(self.chosen), BATCH)]
        self._load_rows()
        keys = self.clips.keys
        for block in tqdm(blocks[self.rank :: self.size], desc="evaluate", unit="block", disable=self.rank > 0):
            pending = [t for t in self.tasks if any((t.name, keys[i]) not in self.done for i in block)
                       or len(self.pictures[t.name]) < self.shown]
            if pending:
                self._keep(self._run_block(block, pending))
        if self.folder and self.size > 1:
            barrier()
            self._load_rows()
        rows = {t.name: self._gather(t) for t in self.tasks}
        return Evaluation({name: summarise(r) for name, r in rows.items()}, rows, self.pictures, self.about)

    def best_median_worst(self, task: Task, rows: TaskRows) -> list[tuple[str, Clip, dict[str, np.ndarray]]]:
        """(which, clip with all its signals, predictions) of three telling clips, predicted once more."""
        main = self.measures[task.target].main
        values = np.array(rows.rows["model"][main])
        order = np.argsort(-values if is_better(main, 1, 0) else values)
        order = [i for i in order if np.isfinite(values[i])]
        places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]} if order else {}
        found, numbers = [], {k: i for i, k in enumerate(self.clips.keys)}
        for which, place in places.items():
            clip = self.clips.read(numbers[rows.keys[place]])
            tokens = {n: self._encode([clip], n)[clip.key] for n in (*task.inputs, task.target)}
            made = self._predict(task, [tokens], [clip.key])[0][0]
            found.append((f"{which}: {main} {values[place]:.4g}", clip, {task.target: made}))
        return found

    def _load_rows(self) -> None:
        """Rows of this same evaluation that are on disk already."""
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder and self.folder.is_dir() else []:
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the line that a kill cut off
                if row.get("of") == self.identity:
                    self.done[row["task"], row["key"]] = row

    def _keep(self, rows: list[dict]) -> None:
        for row in rows:
            self.done[row["task"], row["key"]] = row
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.rank}-of-{self.size}.jsonl"
            with path.open("a+b") as file:
                if file.tell():  # a kill's half line must not spoil the next
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")
                file.write("".join(json.dumps({"of": self.identity, **row}) + "\n" for row in rows).encode())

    def _run_block(self, block: list[int], tasks: list[Task]) -> list[dict]:
        clips = list(self.clips.readable(block, self.sources))
        tokens = {name: self._encode(clips, name) for name in self.loaded}
        lacking = {self.clips.keys[i] for i in block} - {c.key for c in clips}
        rows = []
        for task in tasks:
            usable = [c for c in clips if all(c.key in tokens[n] for n in (*task.inputs, task.target))]
            rows += [{"task": task.name, "key": key, "unusable": True}
                     for key in (*lacking, *(c.key for c in clips if c not in usable))]
            rows += self._run_task(task, usable, tokens) if usable else []
        return rows

    def _run_task(self, task: Task, clips: list[Clip], tokens: dict[str, dict[str, np.ndarray]]) -> list[dict]:
        tokenizer = self.loaded[task.target]
        measure, source = self.measures[task.target], tokenizer.modality.clip_signal
        keys = [c.key for c in clips]
        own = [{n: tokens[n][k] for n in task.inputs} for k in keys]
        predicted, sure = self._predict(task, own, keys)
        # The control: inputs of the next clip of the block, the same random numbers.
        control = self._predict(task, [*own[1:], own[0]], keys)[0] if len(own) > 1 else [None]
        rows = []
        for clip, mine, shuffled, confidence in zip(clips, predicted, control, sure, strict=True):
            truth = clip.signals[source]
            ids = tokens[task.target][clip.key]
            # What was not observed has ids too; another one in its place would spoil the frames beside it.
            ceiling = tokenizer.decode(ids if ids.min() >= 0 else tokenizer.encode(truth))
            guesses = {"model": mine, "shuffled": shuffled, "ceiling": ceiling,
                       **{f"baseline: {n}": g for n, g in measure.baselines(tokenizer.statistics, truth).items()}}
            guesses = {s: without_padding(g, truth) for s, g in guesses.items() if g is not None}
            meta = {**clip.meta, "rate": clip.meta.get("rates", {}).get(source)}
            figures = {s: measure.metrics(g, truth, meta) for s, g in guesses.items()}
            figures.setdefault("shuffled", dict.fromkeys(figures["model"], float("nan")))
            curve = {"model": [round(float(x), 6) for x in measure.over_time(guesses["model"], truth)]}
            rows.append({"task": task.name, "key": clip.key, "rows": figures, "curves": curve,
                         "doubt": measure.doubt(truth), "confidence": confidence})
            if len(self.pictures[task.name]) < self.shown:
                self.pictures[task.name].append((clip, {task.target: guesses["model"], "ceiling": guesses["ceiling"]}))
        return rows

    def _encode(self, clips: list[Clip], name: str) -> dict[str, np.ndarray]:
        """{key: ids, -1 where not observed} of the clips that have the modality."""
        tokenizer = self.loaded[name]
        source = tokenizer.modality.clip_signal
        for clip in clips:
            if source in clip.signals:
                tokenizer.check(clip.signals[source], clip.key)
        have = [c for c in clips if source in c.signals and np.any(tokenizer.observed(c.signals[source]))]
        made = tokenizer.encode_observed([c.signals[source] for c in have]) if have else []
        return {c.key: ids for c, ids in zip(have, made, strict=True)}

    def _predict(self, task: Task, tokens: list[dict[str, np.ndarray]],
                 keys: list[str]) -> tuple[list[np.ndarray], list[float]]:
        condition = {n: np.stack([t[n] for t in tokens]) for n in task.inputs}
        return predict(self.model, self.loaded[task.target], condition, task.target,
                       self.recipes[task.target], self.seed, keys)

    def _gather(self, task: Task) -> TaskRows:
        rows = TaskRows(main=self.measures[task.target].main, asked=len(self.chosen))
        found = [self.done.get((task.name, self.clips.keys[number]), {}) for number in self.chosen]
        found = [row for row in found if "rows" in row]
        if not found:
            raise UserError(f"task {task.name}: none of {len(self.chosen)} clips has "
                            f"{', '.join((*task.inputs, task.target))}")
        for row in found:
            rows.keys.append(row["key"])
            rows.doubts.append(row["doubt"])
            rows.confidences.append(row["confidence"])
            for source, curve in row["curves"].items():
                rows.curves.setdefault(source, []).append(curve)
        rows.add_all([row["rows"] for row in found])
        return rows


def evaluate_to(out: Path, model: EgoM2P, protocol: ProtocolConfig, world: World | None = None,
                trust_torchscript: bool = False) -> Evaluation:
    """Evaluate as a protocol says, resuming what `out` holds; results.json, clips.json and plots go there."""
    runner = _Runner(model, list(protocol.tasks), protocol.data, protocol.recipes, protocol.limit, protocol.seed, 0,
                     out, protocol.measures, world, trust_torchscript)
    check_same_model(out, runner.about, to_plain(protocol))
    evaluation = runner.run()
    if runner.rank == 0:
        from egom2p.visualize import plots

        write_results(out, evaluation, {"protocol": to_plain(protocol)})
        kinds = {m.name: m.signal for m in model.modalities}
        for task in runner.tasks:
            rows, measure = evaluation.rows[task.name], runner.measures[task.target]
            plots.save(plots.error_figure(rows, measure, f"{task.name}: {measure.alignment}"),
                       out / f"{task.name}_errors.png")
            for which, clip, predicted in runner.best_median_worst(task, rows):
                frames = clip.signals.get("rgb", np.full((16, 48, 48, 3), 40, np.uint8))
                title = f"{task.name}, {which}, clip {clip.key}"
                sheet = plots.clip_sheet(frames, clip.signals, predicted, kinds, title)
                plots.save(sheet, out / f"{task.name}_{which.partition(':')[0]}.png")
    return evaluation


def _home(model: EgoM2P) -> Path | None:
    """The run or export that a model was loaded from."""
    if model.folder is None:
        return None
    folder = model.folder.resolve()
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _step(model: EgoM2P) -> int | None:
    """The training step of a model that was loaded from a checkpoint."""
    state = model.folder / "state.json" if model.folder else None
    return read_json(state).get("step") if state and state.is_file() else None


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Reconstruction:
    """Of encoding and decoding clips: errors by metric, one a clip; the ids that came up; and what it took."""

    errors: dict[str, list[float]]
    used: set[int]
    clips: int
    encode_s: float
    decode_s: float


def reconstruct(tokenizer: Tokenizer, data: str, limit: int = 0) -> Reconstruction:
    """Encode and decode the clips that have the tokenizer's signal, at most `limit` (0 = all), spread evenly. Raises
    UserError when none has it."""
    source = tokenizer.modality.clip_signal
    measure = MEASURES[tokenizer.modality.signal](MeasureArgs())
    rows, used, seconds = TaskRows(), set(), [0.0, 0.0]
    index = ClipIndex(data, having=source)
    for clip in tqdm(index.readable(_spread(len(index), limit), {source}), desc="reconstruct", unit="clip"):
        truth = clip.signals[source]
        if np.any(tokenizer.observed(truth)):
            started = time.perf_counter()
            ids = tokenizer.encode(truth)
            encoded = time.perf_counter()
            back = tokenizer.decode(ids)
            seconds = [seconds[0] + encoded - started, seconds[1] + time.perf_counter() - encoded]
            used.update(ids.reshape(-1).tolist())
            rows.keys.append(clip.key)
            rows.add("ceiling", measure.metrics(without_padding(back, truth), truth, clip.meta))
    if not rows.keys:
        raise UserError(f"{data}: no clip there has a usable '{source}'")
    return Reconstruction(rows.rows["ceiling"], used, len(rows.keys), *seconds)


def reconstruction_table(tokenizer: Tokenizer, data: str, limit: int = 0) -> str:
    """Mean, median and worst error of encoding and decoding, one line a metric, and how many ids are in use."""
    made = reconstruct(tokenizer, data, limit)
    lines = [f"{'metric':10} {'mean':>10} {'median':>10} {'worst':>10}"]
    for metric, values in made.errors.items():
        worst = np.nanmin(values) if is_better(metric, 1, 0) else np.nanmax(values)
        lines.append(f"{metric:10} {np.nanmean(values):10.5f} {np.nanmedian(values):10.5f} {worst:10.5f}")
    return "\n".join([*lines, f"{made.clips} clips, {len(made.used)} of {tokenizer.modality.vocab_size} ids used"])


def comparison_table(named: dict[str, Tokenizer], data: str, limit: int = 0) -> str:
    """Tokenizers of one signal side by side on the same clips: mean errors, what a clip costs, what of the codebook is
    used, and speed one clip at a time. Raises UserError for tokenizers of different signals."""
    signals = {t.modality.clip_signal for t in named.values()}
    if len(signals) > 1:
        raise UserError(f"these tokenizers are for different signals ({', '.join(sorted(signals))}); compare those of "
                        f"one")
    made = {name: reconstruct(t, data, limit) for name, t in named.items()}
    rows: dict[str, list[str]] = {}
    for metric in next(iter(made.values())).errors:
        rows[metric] = [f"{np.nanmean(m.errors[metric]):.5f}" for m in made.values()]
    modalities = [t.modality for t in named.values()]
    rows["tokens a clip"] = [f"{m.num_tokens}" for m in modalities]
    rows["bits a clip"] = [f"{m.num_tokens * math.log2(m.vocab_size):.0f}" for m in modalities]
    rows["ids used"] = [f"{len(r.used)} of {m.vocab_size}" for r, m in zip(made.values(), modalities, strict=True)]
    rows["parameters"] = [f"{sum(p.numel() for p in t.parameters()):,}" for t in named.values()]
    rows["encode, clips/s"] = [f"{r.clips / r.encode_s:.1f}" for r in made.values()]
    rows["decode, clips/s"] = [f"{r.clips / r.decode_s:.1f}" for r in made.values()]
    width = max(20, *map(len, named))
    table = [f"{'':16} " + " ".join(f"{name:>{width}}" for name in named)]
    table += [f"{row:16} " + " ".join(f"{value:>{width}}" for value in values) for row, values in rows.items()]
    return "\n".join([*table, f"{next(iter(made.values())).clips} clips, {next(iter(named.values())).device}"])


def predict(model: EgoM2P, tokenizer: Tokenizer, condition: dict[str, np.ndarray], target: str, recipe: TargetArgs,
            seed: int, keys: list[str]) -> tuple[list[np.ndarray], list[float]]:
    """Raw signals of `target` for a batch of clips, given token grids of the condition, and how sure the model was of
    each (`TaskRows.confidences`)."""
    codes = {target: tokenizer.codes().detach()} if recipe.expected else None
    made = generate(model, condition, {target: recipe}, seed=seed, keys=keys, codes=codes)
    sure = np.exp(np.log(np.maximum(made.confidence[target], 1e-12)).mean(1)).tolist()
    return made.signals(target, tokenizer), sure


def predict_clip(pipeline: Pipeline, clip: Clip, inputs: Iterable[str],
                 targets: dict[str, TargetArgs]) -> dict[str, np.ndarray]:
    """{target: raw signal} of one clip, given its own signals of `inputs`; targets {modality: how it is asked for}."""
    shown = {name: pipeline.tokenizer(name) for name in inputs}
    condition = {name: t.encode_observed([clip.signals[t.modality.clip_signal]]) for name, t in shown.items()}
    return {name: predict(pipeline.model, pipeline.tokenizer(name), condition, name, recipe, 0, [clip.key])[0][0]
            for name, recipe in targets.items()}


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` of so many clips, evenly spread; all of them when it is 0."""
    if limit < 0:
        raise UserError(f"at most {limit} clips are none; 0 means all of them")
    return list(range(total)) if not limit or limit >= total else [i * total // limit for i in range(limit)]
