"""`egom2p compare`: runs and evaluations side by side, and which of their differences are real.

A subject is a run (the last figures of `metrics.jsonl`, and of `RUN/eval` when it was evaluated) or a folder that
`egom2p eval` wrote. Subjects whose names differ in `seed=N` only are one group. Every group is compared with the first:

- where both have figures of single clips, by a bootstrap over clips, paired, and over seeds (2 000 resamples, 95 %);
- else, with two seeds or more on each side, by Welch's interval over seeds;
- else not at all, and the table says so.
"""

import csv
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from egom2p.config import read_json, read_yaml
from egom2p.errors import UserError
from egom2p.evaluation.measures import is_better
from egom2p.evaluation.results import BOOTSTRAP, RESULTS, mean_of_finite
from egom2p.training.log import HELD_OUT, last_figures, read_metrics
from egom2p.visualize import plots
from egom2p.visualize.plots import plt

log = logging.getLogger(__name__)

# Student's t, 97.5 %, by degrees of freedom from 1.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class Subject:
    """figures {name: value}; clips {name: {key: value}} for those that are means over clips; curve (n, 3): step,
    seconds of training, loss; measures: how an evaluation measured."""

    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    clips: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    measures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One figure of one group. spread: standard deviation over seeds, nan for one; low, high: 95 % interval of the
    difference to the first group, nan when it is not known."""

    group: str
    figure: str
    mean: float
    spread: float
    seeds: int
    difference: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """In a word or two, for the table."""
        if np.isnan(self.low):
            return "" if self.difference == 0 else "?"
        if not self.is_real:
            return "same"
        higher = is_better(self.figure.rpartition("/")[2], 1, 0)
        return "better" if (self.difference > 0) == higher else "worse"


def compare(folders: Sequence[Path], figures: Sequence[str] = ()) -> tuple[list[Row], dict[str, list[Subject]]]:
    """Rows of every group and figure (those named, else all that the first group has), and the groups. Raises UserError
    for a folder without figures and for a figure that nobody has."""
    groups: dict[str, list[Subject]] = {}
    for folder in folders:
        groups.setdefault(_group_of(folder, folders), []).append(read_subject(folder))
    first = next(iter(groups.values()))
    _say_what_differs([s for subjects in groups.values() for s in subjects])
    known = {name: None for subjects in groups.values() for s in subjects for name in s.figures}
    if unknown := [f for f in figures if f not in known]:
        raise UserError(f"no figure '{unknown[0]}'; there are {', '.join(known)}")
    rows = []
    for group, subjects in groups.items():
        for figure in figures or known:
            values = [s.figures[figure] for s in subjects if figure in s.figures]
            if values:
                reference = [s.figures[figure] for s in first if figure in s.figures]
                difference = float(np.mean(values) - np.mean(reference)) if reference else float("nan")
                low, high = np.nan, np.nan
                if subjects is not first:
                    told = _interval(first, subjects, figure)
                    difference, low, high = told or (difference, low, high)
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
                rows.append(Row(group, figure, float(np.mean(values)), spread, len(values), difference, low, high))
    return rows, groups


def read_subject(folder: Path) -> Subject:
    """What a run or an evaluation left. Raises UserError when it left no figure."""
    subject = Subject(folder)
    if (folder / "metrics.jsonl").exists():
        _read_run(folder, subject)
    for place in (folder, folder / "eval"):
        if (place / RESULTS).exists():
            _read_evaluation(place, subject)
    if not subject.figures:
        raise UserError(f"{folder}: neither a run (metrics.jsonl) nor an evaluation (results.json)")
    return subject


def _read_run(folder: Path, subject: Subject) -> None:
    rows = read_metrics(folder)
    batch = read_yaml(folder / "config.yaml").train.batch_size
    points, seconds, before = [], 0.0, 0
    for row in rows:
        if row.get("samples_per_s"):
            seconds += (row["step"] - before) * batch / row["samples_per_s"]
            before = row["step"]
        if (losses := [v for k, v in row.items() if k.startswith(HELD_OUT)]):
            points.append((row["step"], seconds, float(np.mean(losses))))
    last = last_figures(rows)
    held_out = [v for k, v in last.items() if k.startswith(HELD_OUT)]
    subject.figures.update(({"eval/loss": float(np.mean(held_out))} if held_out else {})
                           | {k: v for k, v in last.items() if (k == "loss" or k.startswith("eval/"))
                              and isinstance(v, float) and k != "eval/tasks_s"})
    subject.curve = np.array(points or [(r["step"], 0.0, r["loss"]) for r in rows if r.get("loss") is not None])


def _say_what_differs(subjects: Sequence[Subject]) -> None:
    """Figures of one name are of one kind only where they were measured alike."""
    evaluated = [s for s in subjects if s.measures]
    for other in evaluated[1:]:
        if changed := [k for k, v in evaluated[0].measures.items() if other.measures.get(k) != v]:
            log.warning("%s and %s were measured differently (%s: %s and %s), so that their differences may be of that "
                        "alone", evaluated[0].folder, other.folder, changed[0], evaluated[0].measures[changed[0]],
                        other.measures.get(changed[0]))
            return


def _read_evaluation(folder: Path, subject: Subject) -> None:
    subject.measures = read_json(folder / RESULTS).get("protocol", {}).get("measures", {})
    for task, entry in read_json(folder / "clips.json").items():
        for metric, values in entry["rows"]["model"].items():
            name = f"{task}/{metric}"
            subject.clips[name] = dict(zip(entry["keys"], values, strict=True))
            subject.figures[name] = mean_of_finite(values)


def _group_of(folder: Path, all_folders: Sequence[Path]) -> str:
    """A folder's name without its seed; its whole path where another folder has the same name."""
    name = str(folder) if sum(f.name == folder.name for f in all_folders) > 1 else folder.name
    return re.sub(r",?seed=\d+", "", name).strip(",") or "base"


def _interval(first: list[Subject], others: list[Subject], figure: str) -> tuple[float, float, float] | None:
    """others - first and its 95 % interval; None when there is nothing to tell from."""
    if all(figure in s.clips for s in (*first, *others)):
        return _paired(first, others, figure)
    a, b = ([s.figures[figure] for s in group if figure in s.figures] for group in (first, others))
    if min(len(a), len(b)) < 2:
        return None
    errors = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    freedom = sum(errors) ** 2 / max(sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True)), 1e-300)
    t = T975[min(int(freedom), len(T975)) - 1] if freedom >= 1 else T975[0]
    middle, half = float(np.mean(b) - np.mean(a)), t * float(np.sqrt(sum(errors)))
    return middle, middle - half, middle + half


def _paired(first: list[Subject], others: list[Subject], figure: str) -> tuple[float, float, float] | None:
    """Of the clips that all have, by resampling clips (the same ones for both) and, where there are several, seeds."""
    keys = sorted(set.intersection(*(set(s.clips[figure]) for s in (*first, *others))))
    tables = [np.array([[s.clips[figure][k] for k in keys] for s in group]) for group in (first, others)]
    finite = np.isfinite(np.concatenate(tables)).all(0)
    tables = [t[:, finite] for t in tables]
    if not finite.any():
        return None
    most, shared = max(len(s.clips[figure]) for s in (*first, *others)), int(finite.sum())
    if shared < most:
        log.warning("%s of %s and %s: compared on the %d clips that both have, of up to %d", figure,
                    first[0].folder.name, others[0].folder.name, shared, most)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(BOOTSTRAP):
        clips = rng.integers(0, tables[0].shape[1], tables[0].shape[1])
        drawn = [t[rng.integers(0, len(t), len(t))][:, clips].mean() for t in tables]
        means.append(drawn[1] - drawn[0])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(tables[1].mean() - tables[0].mean()), float(low), float(high)


def comparison_text(rows: list[Row]) -> str:
    """One block a figure: mean, spread over seeds, difference to the first group with its interval, verdict."""
    width = max(len("group"), *(len(r.group) for r in rows))
    lines = []
    for figure in dict.fromkeys(r.figure for r in rows):
        lines.append(f"{figure:{width}} {'mean':>10} {'sd':>9} {'seeds':>5}  difference to the first [95 %]")
        for r in (r for r in rows if r.figure == figure):
            spread = "" if np.isnan(r.spread) else f"{r.spread:.4f}"
            told = "" if np.isnan(r.low) else f"[{r.low:+.4f}, {r.high:+.4f}] "
            difference = f"{r.difference:+.4f} {told}{r.verdict}" if r.difference else ""
            lines.append(f"{r.group:{width}} {r.mean:10.4f} {spread:>9} {r.seeds:5}  {difference}".rstrip())
        lines.append("")
    if any(r.verdict == "?" for r in rows):
        lines.append("?: one seed and no figures of single clips, so nothing tells whether the difference is real")
    return "\n".join(lines).rstrip()


def write_comparison(out: Path, rows: list[Row], groups: dict[str, list[Subject]]) -> None:
    """compare.csv, compare.json and, where there are runs, compare.png: held-out loss against steps and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("group", "figure", "mean", "spread", "seeds", "difference", "low", "high", "verdict")
    with (out / "compare.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([[getattr(r, n) for n in names] for r in rows])
    (out / "compare.json").write_text(json.dumps([{n: getattr(r, n) for n in names} for r in rows], indent=1))
    if any(len(s.curve) for subjects in groups.values() for s in subjects):
        plots.save(_curves(groups), out / "compare.png")


def _curves(groups: dict[str, list[Subject]]):
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for number, (group, subjects) in enumerate(groups.items()):
        colour = plt.cm.tab10.colors[number % 10]
        for index, subject in enumerate(s for s in subjects if len(s.curve)):
            for axis, column in zip(axes, (0, 1), strict=True):
                axis.plot(subject.curve[:, column], subject.curve[:, 2], color=colour, lw=1.4, marker="o", ms=3,
                          label=group if not index else None)
    axes[0].set(xlabel="step", ylabel="held-out loss, mean over modalities")
    axes[1].set(xlabel="seconds of training")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return fig
