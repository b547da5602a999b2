"""`egom2p eval`: a trained model on held-out clips, beside what is trivial and what is possible.

For every task and clip: the model's prediction; the trivial baselines; the same model with its inputs
taken from another clip (the control: if that is no worse, the input is not used); and the tokenizer's own
reconstruction (the ceiling).
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from egom2p import tokenizers
from egom2p.data.clips import Clip, read_clips
from egom2p.errors import UserError
from egom2p.evaluation.measures import MEASURES, is_better
from egom2p.generation.sampler import generate
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

BATCH = 16
BOOTSTRAP = 2000


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
    `ceiling` or `baseline: NAME`."""

    keys: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, source: str, metrics: dict[str, float]) -> None:
        for metric, value in metrics.items():
            self.rows.setdefault(source, {}).setdefault(metric, []).append(value)


@dataclass
class Evaluation:
    """summary {task: {metric: {value, baseline, ...}}}, rows by task, and the first few predictions for plots."""

    summary: dict[str, dict[str, dict]]
    rows: dict[str, TaskRows]
    shown: dict[str, list[tuple[Clip, dict[str, np.ndarray]]]]


def evaluate(model: EgoM2P, task_names: Iterable[str], data: str, recipes: dict[str, TargetArgs], limit: int = 0,
             seed: int = 0, shown: int = 0) -> Evaluation:
    """Run the tasks on the clips that `data` names (at most `limit`), and summarise.

    recipes: {target modality: TargetArgs}; a target without one gets the defaults.
    """
    tasks = [Task.parse(name, model.modalities.names) for name in task_names]
    loaded = load_tokenizers(model, {n for t in tasks for n in (*t.inputs, t.target)})
    tokens, keys = _encode_all(loaded, data, limit)
    rows, pictures = {}, {}
    for task in tasks:
        rows[task.name], pictures[task.name] = _run_task(model, loaded, task, data, tokens, keys, recipes, seed, shown)
    summary = {name: _summarise(r) for name, r in rows.items()}
    return Evaluation(summary, rows, pictures)


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


def write_results(out: Path, evaluation: Evaluation, extra: dict | None = None) -> None:
    """`results.json` (the summary) and `clips.json` (per-clip rows) into `out`."""
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
            rows.add("ceiling", MEASURES[tokenizer.modality.signal].metrics(tokenizer.decode(ids), clip.signals[source]))
    if not rows.keys:
        raise UserError(f"{data}: no clip there has a usable '{source}'")
    lines = [f"{'metric':10} {'mean':>10} {'median':>10} {'worst':>10}"]
    for metric, values in rows.rows["ceiling"].items():
        worst = np.nanmin(values) if is_better(metric, 1, 0) else np.nanmax(values)
        lines.append(f"{metric:10} {np.nanmean(values):10.5f} {np.nanmedian(values):10.5f} {worst:10.5f}")
    return "\n".join([*lines, f"{len(rows.keys)} clips, {len(used)} of {tokenizer.modality.vocab_size} ids used"])


def _encode_all(loaded: dict[str, Tokenizer], data: str, limit: int) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """{modality: {clip key: ids, -1 where not observed}} and the keys in file order."""
    tokens: dict[str, dict[str, np.ndarray]] = {name: {} for name in loaded}
    keys: list[str] = []
    sources = {t.modality.clip_signal for t in loaded.values()}
    for batch in _batches(tqdm(_limited(data, limit, sources), desc="encode clips", unit="clip")):
        keys += [c.key for c in batch]
        for name, tokenizer in loaded.items():
            source = tokenizer.modality.clip_signal
            have = [c for c in batch if source in c.signals and np.any(tokenizer.observed(c.signals[source]))]
            for clip, ids in zip(have, tokenizer.encode_many([c.signals[source] for c in have]) if have else [], strict=True):
                tokens[name][clip.key] = np.where(tokenizer.observed(clip.signals[source]), ids, -1)
    if len(set(keys)) < len(keys):
        raise UserError(f"{data}: clip keys occur twice; evaluate the data sets one by one")
    return tokens, keys


def _run_task(model: EgoM2P, loaded: dict[str, Tokenizer], task: Task, data: str, tokens: dict, keys: list[str],
              recipes: dict[str, TargetArgs], seed: int, shown: int) -> tuple[TaskRows, list]:
    usable = [k for k in keys if all(k in tokens[n] for n in (*task.inputs, task.target))]
    if len(usable) < 2:
        raise UserError(f"task {task.name}: {len(usable)} of {len(keys)} clips have {', '.join((*task.inputs, task.target))}; it needs at least 2")
    other = dict(zip(usable, [*usable[1:], usable[0]], strict=True))
    tokenizer, recipe = loaded[task.target], recipes.get(task.target, TargetArgs())
    measure = MEASURES[tokenizer.modality.signal]
    rows, pictures = TaskRows(), []
    source = tokenizer.modality.clip_signal
    clips = (c for c in read_clips(data) if c.key in other)
    for batch in _batches(tqdm(islice(clips, len(usable)), total=len(usable), desc=task.name, unit="clip")):
        names = [c.key for c in batch]
        predicted = predict(model, tokenizer, {n: np.stack([tokens[n][k] for k in names]) for n in task.inputs}, task.target, recipe, seed, names)
        control = predict(model, tokenizer, {n: np.stack([tokens[n][other[k]] for k in names]) for n in task.inputs}, task.target, recipe, seed, names)
        for clip, mine, shuffled in zip(batch, predicted, control, strict=True):
            truth = clip.signals[source]
            ceiling = tokenizer.decode(np.maximum(tokens[task.target][clip.key], 0))
            rows.keys.append(clip.key)
            rows.add("model", measure.metrics(mine, truth))
            rows.add("shuffled", measure.metrics(shuffled, truth))
            rows.add("ceiling", measure.metrics(ceiling, truth))
            for name, guess in measure.baselines(tokenizer.statistics, truth).items():
                rows.add(f"baseline: {name}", measure.metrics(guess, truth))
            if len(pictures) < shown:
                pictures.append((clip, {task.target: mine, "ceiling": ceiling}))
    return rows, pictures


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


def _batches(clips: Iterable[Clip]) -> Iterator[list[Clip]]:
    clips = iter(clips)
    while batch := list(islice(clips, BATCH)):
        yield batch
