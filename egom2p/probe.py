"""`egom2p probe`: how much of a label is in features, by a linear or an attentive probe and cross-validation.

Labels come from a CSV of `key,label[,group]`. Words are classes (balanced cross-entropy; figure: balanced accuracy, the
mean of the classes' recalls), numbers are regressed (figure: R2). Every clip is predicted once, by the probe that was
trained on the other folds; the 95 % interval is a bootstrap over clips. Clips of one group, such as a recording, are
all in one fold and drawn together, since neighbours tell of each other; where there are fewer groups than folds they
are not used. The baseline is what a probe without features reaches.
"""

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egom2p.errors import UserError
from egom2p.features import read_features

log = logging.getLogger(__name__)

RESAMPLES = 2000


@dataclass(frozen=True)
class ProbeResult:
    """figure: balanced accuracy or R2, with its 95 % interval and what no features give; recalls {class: recall};
    groups: into how many the clips fall, 0 where each stands for itself."""

    name: str
    figure: float
    low: float
    high: float
    baseline: float
    clips: int
    recalls: dict[str, float]
    groups: int = 0

    def __str__(self) -> str:
        lines = [f"{self.name} {self.figure:.3f} [{self.low:.3f}, {self.high:.3f}], without features "
                 f"{self.baseline:.3f}; {self.clips} clips" + (f" in {self.groups} groups" if self.groups else "")]
        return "\n".join([*lines, *(f"  {name:20} {recall:.3f}" for name, recall in self.recalls.items())])


class Linear(nn.Module):
    """(n, dim), or the mean over tokens of (n, tokens, dim) -> (n, outputs)."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean(1) if x.ndim == 3 else x)


class Attentive(nn.Module):
    """One learned query over the tokens, then linear (as in V-JEPA, Bardes et al. 2024, without the MLP)."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(dim, 1), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.query(x).softmax(1) * x).sum(1))


def probe(folder: Path, labels: Path, kind: Literal["linear", "attentive"] = "linear", folds: int = 5, seed: int = 0,
          steps: int = 300) -> ProbeResult:
    """Cross-validate a probe. Raises UserError for labels that do not fit, or features without tokens for an attentive
    one."""
    keys, features = read_features(folder)
    known, groups = _read_labels(labels)
    kept = [i for i, key in enumerate(keys) if key in known]
    if len(kept) < 2 * folds:
        raise UserError(f"{labels}: {len(kept)} of {len(keys)} clips with features have a label; {folds} folds need at "
                        f"least {2 * folds}")
    if kind == "attentive" and features.ndim != 3:
        raise UserError(f"{folder} holds pooled features; an attentive probe needs `egom2p features ... --pool none`")
    x, words = torch.from_numpy(features[kept]), [known[keys[i]] for i in kept]
    numbers = _numbers(words)
    target, outputs, classes = _targets(words, numbers)
    members = _members([groups.get(keys[i], "") for i in kept], folds)
    order = np.random.default_rng(seed).permutation(len(members))
    predicted = torch.zeros(len(kept), outputs)
    for fold in range(folds):
        test = torch.from_numpy(np.concatenate([members[g] for g in order[fold::folds]]))
        train = torch.tensor(sorted(set(range(len(kept))) - set(test.tolist())))
        mean, std = x[train].flatten(0, -2).mean(0), x[train].flatten(0, -2).std(0) + 1e-6
        torch.manual_seed(seed)
        network = {"linear": Linear, "attentive": Attentive}[kind](x.shape[-1], outputs)
        _fit(network, (x[train] - mean) / std, target[train], bool(classes), steps)
        with torch.no_grad():
            predicted[test] = network((x[test] - mean) / std)
    if classes:
        hits = (predicted.argmax(1) == target).numpy()
        return _summary("balanced accuracy", lambda i: _recalls(hits[i], target.numpy()[i], classes)[0], members,
                        1 / len(classes), _recalls(hits, target.numpy(), classes)[1])
    off, truth = (predicted[:, 0] - target).numpy(), target.numpy()
    return _summary("R2", lambda i: 1 - (off[i] ** 2).mean() / max(truth[i].var(), 1e-12), members, 0.0, {})


def _members(groups: list[str], folds: int) -> list[np.ndarray]:
    """Numbers of the clips of each group; every clip by itself where there are fewer groups than folds."""
    groups = [group or f"clip {i}" for i, group in enumerate(groups)]
    names = list(dict.fromkeys(groups))
    if len(names) < folds:
        log.warning("the clips are of %d groups, fewer than the %d folds, so neighbours are in different folds",
                    len(names), folds)
        return [np.array([i]) for i in range(len(groups))]
    found: dict[str, list[int]] = {name: [] for name in names}
    for i, group in enumerate(groups):
        found[group].append(i)
    return [np.array(clips) for clips in found.values()]


NOTHING = ("na", "n/a", "nan", "inf", "-inf")  # what programs write where there is no label


def _read_labels(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """{key: label} and {key: group}."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8; save it as CSV in UTF-8") from error
    if not rows or not {"key", "label"} <= rows[0].keys():
        raise UserError(f"{path}: expected a CSV with the columns key and label")
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for row in rows:
        for name, values in zip(("label", "group"), found, strict=True):
            if (row.get(name) or "na").strip().lower() in NOTHING:
                continue
            if values.setdefault(row["key"], row[name]) != row[name]:
                raise UserError(f"{path}: clip {row['key']} has two {name}s, {values[row['key']]} and {row[name]}")
    return found


def _numbers(words: list[str]) -> np.ndarray | None:
    """The labels as numbers, None when one is a word or they are a few whole numbers, which are classes."""
    try:
        numbers = np.array([float(w) for w in words])
    except ValueError:
        return None
    whole = np.all(numbers == numbers.round()) and len(set(words)) <= 20
    return None if whole or not np.isfinite(numbers).all() else numbers


def _targets(words: list[str], numbers: np.ndarray | None) -> tuple[Tensor, int, list[str]]:
    """(n,) targets, outputs of the probe, names of the classes."""
    if numbers is not None:
        return torch.from_numpy((numbers - numbers.mean()) / max(numbers.std(), 1e-12)).float(), 1, []
    classes = sorted(set(words))
    if len(classes) < 2:
        raise UserError(f"all labels are '{classes[0]}'; there is nothing to tell apart")
    return torch.tensor([classes.index(w) for w in words]), len(classes), classes


def _fit(network: nn.Module, x: Tensor, target: Tensor, is_class: bool, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if is_class:
        counts = torch.bincount(target, minlength=int(target.max()) + 1).clamp(min=1)
        weight = F.pad(len(target) / counts / len(counts), (0, network.out.out_features - len(counts)))
    for _ in range(steps):
        optimizer.zero_grad()
        out = network(x)
        loss = F.cross_entropy(out, target, weight) if is_class else F.mse_loss(out[:, 0], target)
        loss.backward()
        optimizer.step()
        schedule.step()


def _recalls(hits: np.ndarray, target: np.ndarray, classes: list[str]) -> tuple[float, dict[str, float]]:
    """(mean, by class) share of each class's clips that were told rightly."""
    found = {name: float(hits[target == i].mean()) for i, name in enumerate(classes) if (target == i).any()}
    return float(np.mean(list(found.values()))), found


def _summary(name: str, figure: Callable[[np.ndarray], float], members: list[np.ndarray], baseline: float,
             recalls: dict[str, float]) -> ProbeResult:
    rng, everything = np.random.default_rng(0), np.sort(np.concatenate(members))
    alone = np.concatenate(members) if len(members) == len(everything) else None
    draws = (rng.integers(0, len(members), len(members)) for _ in range(RESAMPLES))
    drawn = [figure(np.concatenate([members[g] for g in groups]) if alone is None else alone[groups])
             for groups in draws]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ProbeResult(name, float(figure(everything)), float(low), float(high), baseline, len(everything), recalls,
                       0 if len(members) == len(everything) else len(members))
