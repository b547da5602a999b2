"""`egom2p ablate SWEEP.yaml`: a base configuration, axes of changes, seeds; every combination trained, then compared.

Runs go one after the other, each `egom2p train` in a process of its own, below `out` in a folder that says its values.
A run that is finished is not run again, one that was stopped goes on, one that fails is named and harms no other.
"""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from egom2p.compare import Row, compare, comparison_text, write_comparison
from egom2p.config import load, read_json
from egom2p.errors import Preempted, UserError
from egom2p.files import write_whole
from egom2p.training.loop import MAY_CHANGE, what_differs
from egom2p.training.pretraining import PretrainConfig

log = logging.getLogger(__name__)

# Of runs that are compared; to resume one, its end may change.
MAY_DIFFER = tuple(key for key in MAY_CHANGE if key not in ("train.steps", "train.tokens"))

FINISHED = "ablation.json"


@dataclass(frozen=True)
class SweepConfig:
    """base: a train YAML; out: folder of the runs; axes: {key: [values]} or {name: {label: [overrides]}}; overrides: of
    every run; seeds: of every combination; figures: that are compared (all when empty); protocol, data: an evaluation
    of every finished run (a YAML below cfgs/eval, and clips instead of its own)."""

    base: str
    out: str
    axes: dict[str, Any]
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    figures: tuple[str, ...] = ()
    protocol: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("give at least one seed")
        for name, axis in self.axes.items():
            if not axis or not isinstance(axis, (list, dict)):
                raise ValueError(f"axes.{name} must be a list of values, or labels with lists of overrides")
        changes = [c for name, axis in self.axes.items() for _, some in _choices(name, axis) for c in some]
        for key in {c.partition("=")[0] for c in (*self.overrides, *changes)} & {"train.seed", "run.dir"}:
            raise ValueError(f"{key} is set for each run; give " + ("seeds: [0, 1, 2]" if key == "train.seed" else
                                                                  "out, the folder of all of them"))


@dataclass(frozen=True)
class Combination:
    """One run to make: its folder and the overrides of the base."""

    folder: Path
    overrides: list[str]


def combinations(sweep: SweepConfig) -> list[Combination]:
    """Every combination of the axes with every seed, in order."""
    found = []
    for parts in product(*(list(_choices(name, axis)) for name, axis in sweep.axes.items())):
        for seed in sweep.seeds:
            labels = [label for label, _ in parts] + ([f"seed={seed}"] if len(sweep.seeds) > 1 else [])
            folder = Path(sweep.out) / (",".join(labels) or "base")
            changes = [change for _, changes in parts for change in changes]
            found.append(Combination(folder, [*sweep.overrides, *changes, f"train.seed={seed}", f"run.dir={folder}"]))
    return found


def _choices(name: str, axis: Any) -> Iterator[tuple[str, list[str]]]:
    """(label, overrides) of each value of an axis."""
    if isinstance(axis, dict):
        for label, changes in axis.items():
            yield f"{name}={label}", [str(c) for c in changes or []]
    else:
        for value in axis:
            yield f"{name.rpartition('.')[2]}={value}", [f"{name}={json.dumps(value)}"]


def ablate(sweep: SweepConfig, send: Callable[[list[PretrainConfig], list[int]], Any] | None = None) -> list[Row]:
    """Train what is not finished, evaluate it, and compare what is; or hand to `send` all configurations and the
    numbers of those that are not trained.

    Every configuration is checked before the first run starts. Raises UserError when nothing could be compared.
    """
    runs = combinations(sweep)
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError("two combinations have the same name; label them differently")
    configs = []
    for run in runs:
        configs.append(load(PretrainConfig, sweep.base, run.overrides))
        known, asked = _finished(run.folder), _asked(sweep, run)
        if changed := {k: v for k, v in known.items() if v != asked[k]}:
            now = {k: asked[k] for k in changed}
            raise UserError(f"{run.folder} was run with {changed}, now {now}; choose another out or remove it")
        forced = configs[-1].resume.force
        if not forced and (other := what_differs(configs[-1], run.folder, MAY_DIFFER if known else MAY_CHANGE)):
            forcing = ", or put resume: {force: true} into the base to compare what is there" if known else ""
            raise UserError(f"{run.folder} holds another run ({other}); choose another out{forcing}")
    if send:
        missing = [n for n, (run, config) in enumerate(zip(runs, configs, strict=True))
                   if not _finished(run.folder) and not _trained(run.folder, config)]
        if missing:
            send(configs, missing)
        else:
            print("every run is trained; the same command without --submit evaluates and compares")
        return []
    failed = []
    for number, run in enumerate(runs, 1):
        if _finished(run.folder):
            continue
        print(f"--- run {number} of {len(runs)}: {run.folder.name}", flush=True)
        if not _run(sweep, run):
            failed.append(run.folder)
    done = [f for f in folders if f not in failed]
    for folder in failed:
        log.warning("%s failed; it is left out of the comparison, and tried again next time", folder)
    if not done:
        raise UserError("no run of the sweep succeeded; the output above says why")
    rows, groups = compare(done, sweep.figures)
    write_comparison(Path(sweep.out), rows, groups)
    print(comparison_text(rows))
    return rows


def _run(sweep: SweepConfig, run: Combination) -> bool:
    """Train and evaluate one combination. Whether that went well."""
    commands = [["train", sweep.base, *run.overrides]]
    if sweep.protocol:
        data = ["--data", sweep.data] if sweep.data else []
        out = ["--out", str(run.folder / "eval")]
        commands.append(["eval", str(run.folder), "--protocol", sweep.protocol, *data, *out])
    for command in commands:
        if _call(command):
            return False
    write_whole(run.folder / FINISHED, json.dumps(_asked(sweep, run), indent=1))
    return True


def _call(command: list[str]) -> int:
    """Exit code of a command of ours. Ctrl-C reaches it as well, and SIGTERM is handed on; it is waited for, since it
    may save what it has. Then raises KeyboardInterrupt or Preempted, whatever it made of that."""
    asked: list[int] = []
    process: subprocess.Popen | None = None

    def hand_on(number: int, _: Any) -> None:
        asked.append(number)
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        process = subprocess.Popen([sys.executable, "-m", "egom2p", *command])
        if asked:
            process.terminate()
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                asked.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if signal.SIGINT in asked:
        raise KeyboardInterrupt
    if asked or process.returncode == Preempted.EXIT_CODE:
        raise Preempted("the sweep stops here; start the same command again to go on")
    return process.returncode


def _trained(folder: Path, config: PretrainConfig) -> bool:
    """Whether the last checkpoint is that of the last step."""
    state = folder / "checkpoints/latest/state.json"
    return state.exists() and read_json(state)["step"] >= config.num_steps


def _asked(sweep: SweepConfig, run: Combination) -> dict[str, Any]:
    return {"overrides": run.overrides, "protocol": sweep.protocol, "data": sweep.data}


def _finished(folder: Path) -> dict[str, Any]:
    """What a finished run was made with; {} when it is not finished."""
    path = folder / FINISHED
    known = read_json(path) if path.exists() else {}
    return known if isinstance(known, dict) else {"overrides": known}  # a list, before version 0.2.0
