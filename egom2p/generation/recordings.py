"""`egom2p generate`: recordings in, folders of files out, window by window in constant memory.

A recording's folder is written aside and then takes the place of an older one as a whole, so that results of two calls
never lie beside each other. One that holds just these results already is kept, so that a stopped call goes on where it
was.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.config import read_json, to_plain
from egom2p.errors import UserError
from egom2p.files import aside, remove_abandoned
from egom2p.generation.pipeline import SPREAD, Joined, Pipeline, Window
from egom2p.generation.schedule import TargetArgs
from egom2p.signals.writers import NpyWriter, npy_file

OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)  # the others may be done
log = logging.getLogger(__name__)

NOTE = "generated.json"
STARTS_SHOWN = 1000


@dataclass(frozen=True)
class GenerateArgs:
    """targets: modalities to predict, in order. modality: what the inputs are ("" = the model's first picture
    modality). recipes {target: TargetArgs}, over the model's own. samples: draws a window. overlap: seconds that
    windows share."""

    targets: Sequence[str]
    modality: str = ""
    recipes: dict[str, TargetArgs] = field(default_factory=dict)
    seed: int = 0
    samples: int = 1
    overlap: float = 0.5


def generate_files(pipeline: Pipeline, inputs: Sequence[Path], out: Path,
                   args: GenerateArgs) -> tuple[list[Path], dict[Path, str]]:
    """Predict from each recording and write one folder each: signals, tokens, preview.png (the first window) and
    generated.json. Returns the folders, and {input: reason} of those that could not be read; the others are done."""
    folders, failed = [], {}
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        try:
            folders.append(_generate_file(pipeline, path, out / name, args))
        except UserError as error:
            failed[path] = str(error)
        except OSError as error:
            if error.errno not in OF_ONE_FILE:
                raise
            failed[path] = f"{path}: {error.strerror}"
    return folders, failed


def folder_names(inputs: Sequence[Path]) -> list[str]:
    """A name of its own for each input: its stem; where those are equal, with its ending or the folders above it."""
    names = [path.stem for path in inputs]
    longer = [lambda p: p.name.replace(".", "_"), *(lambda p, n=n: "_".join([*p.absolute().parts[-n:-1], p.stem])
                                                    for n in range(2, 12))]
    for make in longer:
        taken = Counter(names)
        if max(taken.values(), default=1) == 1:
            break
        names = [make(path) if taken[name] > 1 else name for path, name in zip(inputs, names, strict=True)]
    if len(set(names)) < len(names):
        twice = next(path for path, name in zip(inputs, names, strict=True) if names.count(name) > 1)
        raise UserError(f"{twice} is given twice; name each recording once")
    return names


def _generate_file(pipeline: Pipeline, path: Path, folder: Path, args: GenerateArgs) -> Path:
    identity = _identity(pipeline, path, args)
    if _done(folder, identity):
        log.info("%s holds these results already and is kept", folder)
        return folder
    _refuse_foreign(folder, path)
    part, old = aside(folder), aside(folder.with_name(f"{folder.name}.old"))
    for left in (part, old):  # by a process of this number that was killed, as in a container that is started again
        shutil.rmtree(left, ignore_errors=True)
    remove_abandoned(folder)
    part.mkdir(parents=True)
    try:
        note = _write(pipeline, path, part, args)
        (part / NOTE).write_text(json.dumps({**note, "identity": identity}, indent=1))
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _refuse_foreign(folder: Path, path: Path) -> None:
    """Raises UserError unless a folder is absent, empty or holds results of this very recording."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / NOTE).exists():
        raise UserError(f"{folder} holds files that no earlier call of generate wrote; choose another --out or remove "
                        f"it")
    source = read_json(folder / NOTE).get("source", "")
    same = Path(source).resolve() == path.resolve() or (source == Path(source).name and source == path.name)
    if source and not same:
        raise UserError(f"{folder} holds the results of {source}; choose another --out, or remove it")


def _write(pipeline: Pipeline, path: Path, folder: Path, args: GenerateArgs) -> dict[str, Any]:
    """The files of one recording; returns what generated.json says about them."""
    joined = Joined(pipeline, list(args.targets))
    files = _Files(folder, pipeline, joined.rates)
    tokens = {n: NpyWriter(folder / f"{n}_tokens.npy") for n in args.targets}
    confidence, starts = dict.fromkeys(args.targets, 0.0), []
    expected = pipeline.num_windows(path, args.modality, list(args.targets), args.overlap)
    windows = pipeline.windows(path, list(args.targets), args.modality, args.recipes, args.seed, args.samples,
                               args.overlap)
    for window in tqdm(windows, total=expected, desc=path.name, unit="window", disable=expected < 2):
        if not starts:
            _preview(pipeline, path, window, folder)
        files.append(joined.add(window))
        for name in args.targets:
            tokens[name].append(window.tokens[name][None])
            confidence[name] += float(window.confidence[name].mean())
        starts.append(window.start)
    files.append(joined.end())
    for writer in (*tokens.values(), files):
        writer.close()
    shown = args.modality or pipeline.first_picture()
    return {"source": str(path.absolute()), "seconds": round(joined.seconds, 6), "windows": len(starts),
            "starts_s": starts[:: len(starts) // STARTS_SHOWN + 1], "overlap_s": args.overlap,
            "modality": shown, "targets": list(args.targets), "seed": args.seed,
            "samples": args.samples, "rates_hz": joined.rates,
            "units": {n: pipeline.kind(n).unit for n in args.targets},
            "kinds": {n: pipeline.model.modalities.by_name(n).signal for n in (shown, *args.targets)},
            "recipes": {n: to_plain(pipeline.recipes(args.recipes)[n]) for n in args.targets},
            "mean_confidence": {n: c / len(starts) for n, c in confidence.items()},
            "drift": {n: _drift(j) for n, j in joined.drift().items()}}


def _identity(pipeline: Pipeline, path: Path, args: GenerateArgs) -> str:
    """A hash of everything the results depend on: the recording's file, the model, what is asked and how."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"no input file {path}") from error
    asked = {n: to_plain(pipeline.recipes(args.recipes)[n]) for n in args.targets}
    encoded = () if path.suffix in (".npz", ".npy") else (args.modality or pipeline.first_picture(),)
    decoders = {n: pipeline.fingerprint(n) for n in (*encoded, *args.targets)}
    said = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, pipeline.model.fingerprint(), list(asked.items()),
            args.modality, args.seed, args.samples, args.overlap, decoders]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _done(folder: Path, identity: str) -> bool:
    try:
        return json.loads((folder / NOTE).read_text()).get("identity") == identity
    except (OSError, ValueError, AttributeError):
        return False


def _preview(pipeline: Pipeline, path: Path, window: Window, folder: Path) -> None:
    from egom2p.visualize import plots  # matplotlib: half a second

    frames = next(iter(window.condition.values()), np.full((16, 48, 48, 3), 40, np.uint8))
    kinds = {m.name: m.signal for m in pipeline.model.modalities}
    sheet = plots.clip_sheet(frames, {}, window.signals, kinds, f"{path.name}, {window.start:g} s")
    plots.save(sheet, folder / "preview.png")


def _drift(joins: list[tuple[float, float]]) -> dict[str, float]:
    """Residuals at the joins, and what they add up to if they are independent."""
    if not joins:
        return {"joins": 0}
    metres, degrees = np.array(joins).T
    return {"joins": len(joins), "mean_m": float(metres.mean()), "worst_m": float(metres.max()),
            "accumulated_m": float(np.sqrt((metres**2).sum())), "mean_deg": float(degrees.mean()),
            "worst_deg": float(degrees.max()), "accumulated_deg": float(np.sqrt((degrees**2).sum()))}


class _Files:
    """The growing files of all targets and their spreads."""

    def __init__(self, folder: Path, pipeline: Pipeline, rates: dict[str, float]) -> None:
        self.folder, self.pipeline, self.rates = folder, pipeline, rates
        self.writers: dict[str, list[Any]] = {}

    def append(self, rows: dict[str, np.ndarray]) -> None:
        for name, part in rows.items():
            if len(part):
                for writer in self._of(name):
                    writer.append(part)

    def close(self) -> None:
        for group in self.writers.values():
            for writer in group:
                writer.close()

    def _of(self, name: str) -> list[Any]:
        if name not in self.writers:
            target = name.removesuffix(SPREAD)
            made = self.pipeline.kind(target).writers if name == target else (npy_file,)
            self.writers[name] = [make(self.folder, name, self.rates[target]) for make in made]
        return self.writers[name]
