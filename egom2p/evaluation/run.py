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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from egom2p import tokenizers
from egom2p.config import to_plain
from egom2p.data.clips import Clip, ClipIndex, read_clips
from egom2p.errors import UserError
from egom2p.evaluation.measures import MEASURES, MeasureArgs, is_better, make_measures
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.base import Tokenizer
from egom2p.training.distributed import World, barrier

log = logging.getLogger(__name__)

BATCH = 16
BOOTSTRAP = 2000


@dataclass(frozen=True)
class ProtocolConfig:
    """A YAML below cfgs/eval/: everything that makes two evaluations comparable. data: pattern of clip tars; limit: at most
    so many clips, spread evenly over the data (0 = all); recipes {target modality: TargetArgs}."""

    tasks: tuple[str, ...]
    data: str
    limit: int = 0
    seed: int = 0
    recipes: dict[str, TargetArgs] = field(default_factory=dict)
    measures: MeasureArgs = MeasureArgs()


@dataclass(frozen=True)
class Task:
    """`rgb2cam`: condition on rgb, predict cam. Several conditions are joined by +, as in rgb+depth2cam."""

    name: str
    inputs: tuple[str, ...]
    target: str

    @classmethod
    def parse(cls, name: str, known: list[str]) -> "Task":
        inputs, _, target = name.partition("2")
        task = cls(name, tuple(inputs.split("+")), target)
        for part in (*task.inputs, target):
            if part not in known:
                raise UserError(f"task '{name}' names no modality '{part}' of this model; write INPUT2TARGET with {', '.join(known)}")
        return task


@dataclass
class TaskRows:
    """Per-clip figures of one task: rows[source][metric] is a list over clips; source is `model`, `shuffled`,
    `ceiling` or `baseline: NAME`. curves[source] (clips, T): error of each frame."""

    keys: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, source: str, metrics: dict[str, float]) -> None:
        for metric, value in metrics.items():
            self.rows.setdefault(source, {}).setdefault(metric, []).append(value)


@dataclass
class Evaluation:
    """summary {task: {metric: {value, baseline, ...}}}, rows by task, and a few predictions for plots."""

    summary: dict[str, dict[str, dict]]
    rows: dict[str, TaskRows]
    shown: dict[str, list[tuple[Clip, dict[str, np.ndarray]]]]


def evaluate(model: EgoM2P, task_names: Iterable[str], data: str, recipes: dict[str, TargetArgs], limit: int = 0, seed: int = 0, shown: int = 0,
             out: Path | None = None, measures: MeasureArgs = MeasureArgs(), world: World | None = None) -> Evaluation:  # noqa: B008 - frozen
    """Run the tasks on the clips that `data` names (at most `limit`), and summarise.

    recipes: {target modality: TargetArgs}; a target without one gets the defaults. out: folder that keeps each block's
    rows, from which a stopped evaluation goes on; without it everything stays in memory. world: this process among
    others; every one returns the whole Evaluation when `out` is a folder they share. shown: predictions kept for plots.
    """
    runner = _Runner(model, list(task_names), data, recipes, limit, seed, shown, out, measures, world)
    return runner.run()


class _Runner:
    def __init__(self, model: EgoM2P, task_names: list[str], data: str, recipes: dict[str, TargetArgs], limit: int, seed: int, shown: int,
                 out: Path | None, measures: MeasureArgs, world: World | None) -> None:
        self.model, self.recipes, self.seed, self.shown = model, recipes, seed, shown
        self.tasks = [Task.parse(name, model.modalities.names) for name in task_names]
        self.loaded = load_tokenizers(model, {n for t in self.tasks for n in (*t.inputs, t.target)})
        self.sources = {t.modality.clip_signal for t in self.loaded.values()}
        self.measures = make_measures(measures)
        self.clips = ClipIndex(data)
        total = len(self.clips)
        self.chosen = list(range(total)) if not limit or limit >= total else [i * total // limit for i in range(limit)]
        self.rank, self.size = (world.rank, world.size) if world else (0, 1)
        self.folder = out / "rows" if out else None
        described = [task_names, to_plain(recipes), seed, to_plain(measures), [self.clips.keys[i] for i in self.chosen], _weights_hash(model), BATCH]
        self.identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        self.done: dict[tuple[str, str], dict] = {}
        self.pictures: dict[str, list] = {t.name: [] for t in self.tasks}

    def run(self) -> Evaluation:
        blocks = [self.chosen[i : i + BATCH] for i in range(0, len(self.chosen), BATCH)]
        self._load_rows()
        keys = self.clips.keys
        for block in tqdm(blocks[self.rank :: self.size], desc="evaluate", unit="block", disable=self.rank > 0):
            pending = [t for t in self.tasks if any((t.name, keys[i]) not in self.done for i in block) or len(self.pictures[t.name]) < self.shown]
            if pending:
                self._keep(self._run_block(block, pending))
        if self.folder and self.size > 1:
            barrier()
            self._load_rows()
        rows = {t.name: self._gather(t) for t in self.tasks}
        return Evaluation({name: _summarise(r) for name, r in rows.items()}, rows, self.pictures)

    def best_median_worst(self, task: Task, rows: TaskRows) -> list[tuple[str, Clip, dict[str, np.ndarray]]]:
        """(which, clip with all its signals, predictions) of three telling clips, predicted once more."""
        main = self.measures[self.loaded[task.target].modality.signal].main
        values = np.array(rows.rows["model"][main])
        order = np.argsort(-values if is_better(main, 1, 0) else values)
        order = [i for i in order if np.isfinite(values[i])]
        places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]} if order else {}
        found, numbers = [], {k: i for i, k in enumerate(self.clips.keys)}
        for which, place in places.items():
            clip = self.clips.read(numbers[rows.keys[place]])
            tokens = {n: self._encode([clip], n)[clip.key] for n in (*task.inputs, task.target)}
            made = self._predict(task, [tokens], [clip.key])[0]
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
            with (self.folder / f"{self.rank}-of-{self.size}.jsonl").open("a") as file:
                file.write("".join(json.dumps({"of": self.identity, **row}) + "\n" for row in rows))

    def _run_block(self, block: list[int], tasks: list[Task]) -> list[dict]:
        clips = [c for i in block if (c := self.clips.read(i, self.sources)) is not None]
        tokens = {name: self._encode(clips, name) for name in self.loaded}
        lacking = {self.clips.keys[i] for i in block} - {c.key for c in clips}
        rows = []
        for task in tasks:
            usable = [c for c in clips if all(c.key in tokens[n] for n in (*task.inputs, task.target))]
            rows += [{"task": task.name, "key": key, "unusable": True} for key in (*lacking, *(c.key for c in clips if c not in usable))]
            rows += self._run_task(task, usable, tokens) if usable else []
        return rows

    def _run_task(self, task: Task, clips: list[Clip], tokens: dict[str, dict[str, np.ndarray]]) -> list[dict]:
        tokenizer = self.loaded[task.target]
        measure, source = self.measures[tokenizer.modality.signal], tokenizer.modality.clip_signal
        keys = [c.key for c in clips]
        own = [{n: tokens[n][k] for n in task.inputs} for k in keys]
        predicted = self._predict(task, own, keys)
        # The control: inputs of the next clip of the block, the same random numbers.
        control = self._predict(task, [*own[1:], own[0]], keys) if len(own) > 1 else [None]
        rows = []
        for clip, mine, shuffled in zip(clips, predicted, control, strict=True):
            truth = clip.signals[source]
            ceiling = tokenizer.decode(np.maximum(tokens[task.target][clip.key], 0))
            guesses = {"model": mine, "shuffled": shuffled, "ceiling": ceiling,
                       **{f"baseline: {n}": g for n, g in measure.baselines(tokenizer.statistics, truth).items()}}
            figures = {s: measure.metrics(g, truth, clip.meta) for s, g in guesses.items() if g is not None}
            figures.setdefault("shuffled", dict.fromkeys(figures["model"], float("nan")))
            curve = {"model": [round(float(x), 6) for x in measure.over_time(mine, truth)]}
            rows.append({"task": task.name, "key": clip.key, "rows": figures, "curves": curve})
            if len(self.pictures[task.name]) < self.shown:
                self.pictures[task.name].append((clip, {task.target: mine, "ceiling": ceiling}))
        return rows

    def _encode(self, clips: list[Clip], name: str) -> dict[str, np.ndarray]:
        """{key: ids, -1 where not observed} of the clips that have the modality."""
        tokenizer = self.loaded[name]
        source = tokenizer.modality.clip_signal
        have = [c for c in clips if source in c.signals and np.any(tokenizer.observed(c.signals[source]))]
        made = tokenizer.encode_many([c.signals[source] for c in have]) if have else []
        return {c.key: np.where(tokenizer.observed(c.signals[source]), ids, -1) for c, ids in zip(have, made, strict=True)}

    def _predict(self, task: Task, tokens: list[dict[str, np.ndarray]], keys: list[str]) -> list[np.ndarray]:
        condition = {n: np.stack([t[n] for t in tokens]) for n in task.inputs}
        return predict(self.model, self.loaded[task.target], condition, task.target, self.recipes.get(task.target, TargetArgs()), self.seed, keys)

    def _gather(self, task: Task) -> TaskRows:
        rows = TaskRows()
        for number in self.chosen:
            row = self.done.get((task.name, self.clips.keys[number]), {})
            if "rows" in row:
                rows.keys.append(row["key"])
                for source, metrics in row["rows"].items():
                    rows.add(source, metrics)
                for source, curve in row["curves"].items():
                    rows.curves.setdefault(source, []).append(curve)
        if len(rows.keys) < 2:
            raise UserError(f"task {task.name}: {len(rows.keys)} of {len(self.chosen)} clips have {', '.join((*task.inputs, task.target))}; it needs at least 2")
        return rows


def _weights_hash(model: EgoM2P) -> str:
    """A digest of the weights that is quick to take: a few entries of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        digest.update(name.encode() + flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tokenizers(model: EgoM2P, names: Iterable[str]) -> dict[str, Tokenizer]:
    """The tokenizers of the named modalities, on the model's device, checked against its grids."""
    loaded = {}
    for name in sorted(names):
        modality = model.modalities.by_name(name)
        if not modality.tokenizer:
            raise UserError(f"modality '{name}' names no tokenizer; set modalities.{name}.tokenizer in the model's config.json")
        tokenizer = loaded[name] = tokenizers.load(modality.tokenizer).to(model.device)
        own = tokenizer.modality
        if (own.vocab_size, own.grid) != (modality.vocab_size, modality.grid):
            raise UserError(f"tokenizer {modality.tokenizer} makes {list(own.grid)} tokens of {own.vocab_size} ids, but the model's "
                            f"'{name}' is {list(modality.grid)} of {modality.vocab_size}")
    return loaded


def evaluate_to(out: Path, model: EgoM2P, protocol: ProtocolConfig, world: World | None = None) -> Evaluation:
    """Evaluate as a protocol says, resuming what `out` holds; results.json, clips.json and plots go there."""
    from egom2p.visualize import plots

    runner = _Runner(model, list(protocol.tasks), protocol.data, protocol.recipes, protocol.limit, protocol.seed, 0, out, protocol.measures, world)
    evaluation = runner.run()
    if runner.rank == 0:
        write_results(out, evaluation, {"protocol": to_plain(protocol)})
        kinds = {m.name: m.signal for m in model.modalities}
        for task in runner.tasks:
            rows, measure = evaluation.rows[task.name], runner.measures[kinds[task.target]]
            plots.save(plots.error_figure(rows, measure, f"{task.name}: {measure.alignment}"), out / f"{task.name}_errors.png")
            for which, clip, predicted in runner.best_median_worst(task, rows):
                frames = clip.signals.get("rgb", np.full((16, 48, 48, 3), 40, np.uint8))
                plots.save(plots.clip_sheet(frames, clip.signals, predicted, kinds, f"{task.name}, {which}, clip {clip.key}"), out / f"{task.name}_{which.partition(':')[0]}.png")
    return evaluation


def write_results(out: Path, evaluation: Evaluation, extra: dict | None = None) -> None:
    """`results.json` (the summary, each task's metrics) and `clips.json` (per-clip rows) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({**evaluation.summary, **(extra or {})}, indent=1))
    rows = {name: {"keys": r.keys, "rows": r.rows} for name, r in evaluation.rows.items()}
    (out / "clips.json").write_text(json.dumps(rows))


def table(summary: dict[str, dict[str, dict]]) -> str:
    """The summary as text: one line a task and metric."""
    lines = [f"{'task':12} {'metric':9} {'model':>9} {'baseline':>9} {'shuffled':>9} {'ceiling':>9}  clips  strongest baseline"]
    for task, metrics in summary.items():
        for metric, f in metrics.items():
            figures = " ".join(f"{f[k]:9.4f}" for k in ("value", "baseline", "shuffled", "ceiling"))
            lines.append(f"{task:12} {metric:9} {figures}  {f['clips']:5}  {f['baseline_name']}")
    return "\n".join(lines)


def reconstruction_table(tokenizer: Tokenizer, data: str, limit: int = 0) -> str:
    """Mean, median and worst error of encoding and decoding, one line a metric, and how many ids are in use."""
    source = tokenizer.modality.clip_signal
    rows, used = TaskRows(), set()
    for clip in tqdm(_limited(data, limit, {source}), desc="reconstruct", unit="clip"):
        if source in clip.signals and np.any(tokenizer.observed(clip.signals[source])):
            ids = tokenizer.encode(clip.signals[source])
            used.update(ids.reshape(-1).tolist())
            rows.keys.append(clip.key)
            rows.add("ceiling", MEASURES[tokenizer.modality.signal].metrics(tokenizer.decode(ids), clip.signals[source], clip.meta))
    if not rows.keys:
        raise UserError(f"{data}: no clip there has a usable '{source}'")
    lines = [f"{'metric':10} {'mean':>10} {'median':>10} {'worst':>10}"]
    for metric, values in rows.rows["ceiling"].items():
        worst = np.nanmin(values) if is_better(metric, 1, 0) else np.nanmax(values)
        lines.append(f"{metric:10} {np.nanmean(values):10.5f} {np.nanmedian(values):10.5f} {worst:10.5f}")
    return "\n".join([*lines, f"{len(rows.keys)} clips, {len(used)} of {tokenizer.modality.vocab_size} ids used"])


def predict(model: EgoM2P, tokenizer: Tokenizer, condition: dict[str, np.ndarray], target: str, recipe: TargetArgs,
            seed: int, keys: list[str]) -> list[np.ndarray]:
    """Raw signals of `target` for a batch of clips, given token grids of the condition."""
    codes = {target: tokenizer.codes().detach()} if recipe.expected else None
    made = generate(model, condition, {target: recipe}, seed=seed, keys=keys, codes=codes)
    if recipe.expected:
        return [tokenizer.decode_from_codes(c) for c in made.expected[target]]
    return [tokenizer.decode(ids) for ids in made.tokens[target]]


def _summarise(rows: TaskRows) -> dict[str, dict]:
    """Means over clips, the strongest baseline of each metric, and 95 % paired bootstrap intervals of the gains."""
    summary = {}
    for metric, values in rows.rows["model"].items():
        baselines = {s.removeprefix("baseline: "): np.nanmean(m[metric]) for s, m in rows.rows.items() if s.startswith("baseline")}
        best = min(baselines, key=lambda n: -baselines[n] if is_better(metric, 1, 0) else baselines[n])
        mine, shuffled = np.array(values), np.array(rows.rows["shuffled"][metric])
        trivial = np.array(rows.rows[f"baseline: {best}"][metric])
        summary[metric] = {"value": float(np.nanmean(mine)), "baseline": float(baselines[best]), "shuffled": float(np.nanmean(shuffled)),
                           "ceiling": float(np.nanmean(rows.rows["ceiling"][metric])), "baseline_name": best, "clips": len(mine),
                           "baselines": {k: float(v) for k, v in baselines.items()},
                           "ci95": bootstrap(mine), "shuffled_minus_value_ci95": bootstrap(shuffled - mine),
                           "baseline_minus_value_ci95": bootstrap(trivial - mine)}
    return summary


def bootstrap(values: np.ndarray, resamples: int = BOOTSTRAP) -> list[float]:
    """95 % percentile interval of the mean over clips (seeded; nan clips left out)."""
    values = values[np.isfinite(values)]
    if not len(values):
        return [float("nan")] * 2
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    return [float(v) for v in np.percentile(means, [2.5, 97.5])]


def _limited(data: str, limit: int, only: set[str]) -> Iterator[Clip]:
    return islice(read_clips(data, only), limit or None)
