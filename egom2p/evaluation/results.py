"""What an evaluation leaves: rows of single clips, their summary with intervals, tables and files."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.config import read_json
from egom2p.data.clips import Clip
from egom2p.errors import UserError
from egom2p.evaluation.measures import VARIANT, is_better

log = logging.getLogger(__name__)

BOOTSTRAP = 2000
DRAWN_AT_ONCE = 4_000_000
RESULTS, CLIPS = "results.json", "clips.json"


@dataclass
class TaskRows:
    """Per-clip figures of one task: rows[source][metric] is a list over clips; source is `model`, `shuffled`,
    `ceiling` or `baseline: NAME`. curves[source] (clips, T): error of each frame. doubts: of each clip, why some
    figures mean little on it. confidences: how sure the model was of each clip, the geometric mean of the
    probabilities that it gave the ids it chose. main: the metric that ranks clips. asked: clips that were chosen, of
    which `keys` could be predicted and measured."""

    keys: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    main: str = ""
    asked: int = 0

    def add(self, source: str, metrics: dict[str, float]) -> None:
        for metric, value in metrics.items():
            self.rows.setdefault(source, {}).setdefault(metric, []).append(value)

    def add_all(self, clips: Sequence[dict[str, dict[str, float]]]) -> None:
        """{source: {metric: figure}} of every clip. What some clips have no figure of (gaze in degrees, without
        intrinsics) is nan there."""
        names: dict[str, dict[str, float]] = {}
        for clip in clips:
            for source, metrics in clip.items():
                names.setdefault(source, {}).update(dict.fromkeys(metrics, float("nan")))
        for clip in clips:
            for source, nothing in names.items():
                self.add(source, nothing | clip.get(source, {}))


@dataclass
class Evaluation:
    """summary {task: {metric: {value, baseline, ...}}}, rows by task, a few predictions for plots, and what it is all
    about: model, step, code, data and recipes."""

    summary: dict[str, dict[str, dict]]
    rows: dict[str, TaskRows]
    shown: dict[str, list[tuple[Clip, dict[str, np.ndarray]]]]
    about: dict[str, Any] = field(default_factory=dict)


def summarise(rows: TaskRows) -> dict[str, dict]:
    """Means over clips, the strongest baseline of each metric, and 95 % paired bootstrap intervals of the gains."""
    summary = {}
    for metric, values in rows.rows["model"].items():
        higher = is_better(metric, 1, 0)
        baselines = {s.removeprefix("baseline: "): mean_of_finite(m[metric]) for s, m in rows.rows.items()
                     if s.startswith("baseline")}
        known = {n: v for n, v in baselines.items() if np.isfinite(v)} or baselines
        best = min(known, key=lambda n: -baselines[n] if higher else baselines[n])
        mine, shuffled = np.array(values), np.array(rows.rows["shuffled"][metric])
        clips = int(np.isfinite(mine).sum())
        trivial = np.array(rows.rows[f"baseline: {best}"][metric])
        summary[metric] = {"value": mean_of_finite(mine), "baseline": baselines[best],
                           "shuffled": mean_of_finite(shuffled),
                           "ceiling": mean_of_finite(rows.rows["ceiling"][metric]), "baseline_name": best,
                           "clips": clips, "coverage": clips / max(rows.asked, len(mine)),
                           "doubtful": dict(Counter(filter(None, rows.doubts))),
                           "better": "higher" if higher else "lower", "baselines": baselines,
                           "ci95": bootstrap(mine), "shuffled_minus_value_ci95": bootstrap(shuffled - mine),
                           "baseline_minus_value_ci95": bootstrap(trivial - mine)}
    return summary


def reliability(rows: TaskRows, parts: int = 4) -> dict[str, Any]:
    """Whether the clips that the model is surer of are those it predicts better, by the main metric.

    {metric, agreement, parts}: agreement is Spearman's rank correlation of confidence with quality, 1 when the surest
    is always the best, 0 when confidence tells nothing; parts, from the least sure to the surest: clips, and the mean
    of their confidences and of the metric. {} when there is nothing to rank.
    """
    values, sure = np.array(rows.rows["model"].get(rows.main, []), np.float64), np.array(rows.confidences, np.float64)
    if len(values) != len(sure) or len(values) < 2:
        return {}
    known = np.isfinite(values) & np.isfinite(sure)
    values, sure = values[known], sure[known]
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(sure) == 0:
        return {}
    quality = values if is_better(rows.main, 1, 0) else -values
    agreement = float(np.corrcoef(_ranks(sure), _ranks(quality))[0, 1])
    order = np.argsort(sure, kind="stable")
    told = [{"clips": len(part), "confidence": float(sure[part].mean()), rows.main: float(values[part].mean())}
            for part in np.array_split(order, min(parts, len(order)))]
    return {"metric": rows.main, "agreement": agreement, "parts": told}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value in ascending order, equal ones at the mean of their places."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


@dataclass(frozen=True)
class Change:
    """A figure of this evaluation beside the one that lay in its folder before: means over the clips that both have,
    and the 95 % interval of the difference, paired by clip."""

    task: str
    metric: str
    before: float
    now: float
    ci95: list[float]

    @property
    def is_real(self) -> bool:
        return self.ci95[0] > 0 or self.ci95[1] < 0


def changes_since(out: Path, evaluation: Evaluation) -> tuple[dict[str, Any], list[Change]]:
    """(`about` of the evaluation that `out` holds, what differs from it now); ({}, []) when it holds none, or one on
    other clips. Variants are left out."""
    if not (out / RESULTS).exists() or not (out / CLIPS).exists():
        return {}, []
    about, old = read_json(out / RESULTS).get("about", {}), read_json(out / CLIPS)
    changes = []
    for task, rows in evaluation.rows.items():
        known = {key: i for i, key in enumerate(old.get(task, {}).get("keys", []))}
        pairs = [(i, known[key]) for i, key in enumerate(rows.keys) if key in known]
        for metric, values in rows.rows["model"].items() if pairs else ():
            theirs = old[task]["rows"]["model"].get(metric)
            if VARIANT in metric or theirs is None:
                continue
            now, before = (np.array(side, np.float64)[list(picked)]
                           for side, picked in zip((values, theirs), zip(*pairs, strict=True), strict=True))
            if not np.array_equal(now, before, equal_nan=True):
                changes.append(Change(task, metric, mean_of_finite(before), mean_of_finite(now),
                                      bootstrap(now - before)))
    return (about, changes) if changes else ({}, [])


def mean_of_finite(values: Any) -> float:
    """Over the clips where there is a number; nan when there is none."""
    values = np.asarray(values, np.float64)
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def bootstrap(values: np.ndarray, resamples: int = BOOTSTRAP) -> list[float]:
    """95 % percentile interval of the mean over clips (seeded; nan clips left out)."""
    values = values[np.isfinite(values)]
    if not len(values):
        return [float("nan")] * 2
    rng, most = np.random.default_rng(0), max(1, DRAWN_AT_ONCE // len(values))
    means = np.concatenate([values[rng.integers(0, len(values), (min(most, resamples - start), len(values)))].mean(1)
                            for start in range(0, resamples, most)])
    return [float(v) for v in np.percentile(means, [2.5, 97.5])]


def write_results(out: Path, evaluation: Evaluation, extra: dict | None = None) -> None:
    """`results.json` (the summary, each task's metrics, and `about`) and `clips.json` (per-clip rows) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    told = {**evaluation.summary, "about": evaluation.about,
            "reliability": {name: reliability(rows) for name, rows in evaluation.rows.items()}, **(extra or {})}
    (out / RESULTS).write_text(json.dumps(told, indent=1))
    rows = {name: {"keys": r.keys, "rows": r.rows, "doubts": r.doubts, "confidences": r.confidences}
            for name, r in evaluation.rows.items()}
    (out / CLIPS).write_text(json.dumps(rows))


def check_same_model(out: Path, about: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Raises UserError when `out` holds results of another model. Those of another step of the same run give way, and
    those of another protocol, which is said."""
    path = out / RESULTS
    known = read_json(path) if path.exists() else {}
    before, asked = known.get("about", {}), known.get("protocol", {})
    if before and about["weights"] != before["weights"] and about["model"] != before["model"]:
        raise UserError(f"{out} holds results of another model ({before['model']}, step {before['step']}); choose "
                        f"another --out or remove it")
    if other := [key for key in ("tasks", "data", "limit", "measures") if asked and asked.get(key) != protocol[key]]:
        log.warning("%s holds an evaluation with %s %s, which gives way to this one; another --out keeps both", out,
                    other[0], asked.get(other[0]))


def table(summary: dict[str, dict[str, dict]], published: dict[str, dict[str, float]] | None = None) -> str:
    """The summary as text: one line a task and metric, variants left out; beside it what was published, if anything."""
    lines = [f"{'task':12} {'metric':9} {'model':>9} {'baseline':>9} {'shuffled':>9} {'ceiling':>9}  clips  strongest "
             f"baseline"]
    variants = 0
    for task, metrics in summary.items():
        for metric, f in metrics.items():
            if VARIANT in metric:
                variants += 1
                continue
            figures = " ".join(f"{f[k]:9.4f}" for k in ("value", "baseline", "shuffled", "ceiling"))
            theirs = (published or {}).get(task, {}).get(metric)
            told = f"  (published: {theirs:g})" if theirs is not None else ""
            lines.append(f"{task:12} {metric:9} {figures}  {f['clips']:5}  {f['baseline_name']}{told}")
        first = next(iter(metrics.values()))
        if first.get("coverage", 1) < 1:
            lines.append(f"{task:12} answers for {first['coverage']:.1%} of the clips that were chosen")
        if first.get("doubtful"):
            kinds = ", ".join(f"{n} {kind}" for kind, n in first["doubtful"].items())
            lines.append(f"{task:12} {kinds} clips: fits with scale mean nothing there and leave them out")
    if variants:
        lines.append(f"and {variants} variants (other alignments, horizons, thresholds) in {RESULTS}")
    return "\n".join(lines)
