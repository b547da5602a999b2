"""What an evaluation leaves: rows of single clips, their summary with intervals, tables and files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.config import read_json
from egom2p.data.clips import Clip
from egom2p.errors import UserError
from egom2p.evaluation.measures import is_better

BOOTSTRAP = 2000
RESULTS = "results.json"


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
        baselines = {s.removeprefix("baseline: "): np.nanmean(m[metric]) for s, m in rows.rows.items()
                     if s.startswith("baseline")}
        best = min(baselines, key=lambda n: -baselines[n] if is_better(metric, 1, 0) else baselines[n])
        mine, shuffled = np.array(values), np.array(rows.rows["shuffled"][metric])
        trivial = np.array(rows.rows[f"baseline: {best}"][metric])
        summary[metric] = {"value": float(np.nanmean(mine)), "baseline": float(baselines[best]),
                           "shuffled": float(np.nanmean(shuffled)),
                           "ceiling": float(np.nanmean(rows.rows["ceiling"][metric])), "baseline_name": best,
                           "clips": len(mine), "better": "higher" if is_better(metric, 1, 0) else "lower",
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


def write_results(out: Path, evaluation: Evaluation, extra: dict | None = None) -> None:
    """`results.json` (the summary, each task's metrics, and `about`) and `clips.json` (per-clip rows) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    told = {**evaluation.summary, "about": evaluation.about, **(extra or {})}
    (out / RESULTS).write_text(json.dumps(told, indent=1))
    rows = {name: {"keys": r.keys, "rows": r.rows} for name, r in evaluation.rows.items()}
    (out / "clips.json").write_text(json.dumps(rows))


def check_same_model(out: Path, about: dict[str, Any]) -> None:
    """Raises UserError when `out` holds results of another model. Those of another step of the same run give way."""
    path = out / RESULTS
    before = read_json(path).get("about", {}) if path.exists() else {}
    if before and about["weights"] != before["weights"] and about["model"] != before["model"]:
        raise UserError(f"{out} holds results of another model ({before['model']}, step {before['step']}); choose "
                        f"another --out or remove it")


def table(summary: dict[str, dict[str, dict]]) -> str:
    """The summary as text: one line a task and metric."""
    lines = [f"{'task':12} {'metric':9} {'model':>9} {'baseline':>9} {'shuffled':>9} {'ceiling':>9}  clips  strongest "
             f"baseline"]
    for task, metrics in summary.items():
        for metric, f in metrics.items():
            figures = " ".join(f"{f[k]:9.4f}" for k in ("value", "baseline", "shuffled", "ceiling"))
            lines.append(f"{task:12} {metric:9} {figures}  {f['clips']:5}  {f['baseline_name']}")
    return "\n".join(lines)
