"""`egom2p generate`: recordings in, folders of files out, window by window in constant memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from egom2p.config import to_plain
from egom2p.generation.pipeline import SPREAD, Joined, Pipeline
from egom2p.generation.schedule import TargetArgs
from egom2p.signals.writers import NpyWriter, npy_file
from egom2p.visualize import plots


def generate_files(pipeline: Pipeline, inputs: list[Path], targets: list[str], out: Path, modality: str = "",
                   recipes: dict[str, TargetArgs] | None = None, seed: int = 0, samples: int = 1,
                   overlap: float = 0.5) -> list[Path]:
    """Predict from each recording and write one folder each, window by window in constant memory: signals, tokens,
    preview.png (the first window) and generated.json."""
    return [_generate_file(pipeline, path, targets, out / path.stem, modality, recipes, seed, samples, overlap)
            for path in inputs]


def _generate_file(pipeline: Pipeline, path: Path, targets: list[str], folder: Path, modality: str,
                   recipes: dict[str, TargetArgs] | None,
                   seed: int, samples: int, overlap: float) -> Path:
    joined, kinds = Joined(pipeline, targets), {m.name: m.signal for m in pipeline.model.modalities}
    writers: dict[str, list[Any]] = {}
    count, confidence, starts = 0, dict.fromkeys(targets, 0.0), []
    expected = pipeline.num_windows(path, modality, targets, overlap)
    for window in tqdm(pipeline.windows(path, targets, modality, recipes, seed, samples, overlap), total=expected,
                       desc=path.name, unit="window", disable=expected < 2):
        if not count:
            folder.mkdir(parents=True, exist_ok=True)
            frames = next(iter(window.condition.values()), np.full((16, 48, 48, 3), 40, np.uint8))
            plots.save(plots.clip_sheet(frames, {}, window.signals, kinds, f"{path.name}, {window.start:g} s"),
                       folder / "preview.png")
            tokens = {n: NpyWriter(folder / f"{n}_tokens.npy") for n in targets}
        _append(writers, joined.add(window), folder, pipeline, joined.rates)
        for name in targets:
            tokens[name].append(window.tokens[name][None])
            confidence[name] += float(window.confidence[name].mean())
        starts.append(window.start)
        count += 1
    _append(writers, joined.end(), folder, pipeline, joined.rates)
    for writer in [*tokens.values(), *(w for group in writers.values() for w in group)]:
        writer.close()
    note = {"source": str(path), "windows": count, "starts_s": starts
            if count <= 1000 else starts[:: count // 1000 + 1], "overlap_s": overlap, "targets": targets,
            "seed": seed, "samples": samples, "rates_hz": joined.rates,
            "units": {n: pipeline.kind(n).unit for n in targets},
            "recipes": {n: to_plain(pipeline.recipes(recipes)[n]) for n in targets},
            "mean_confidence": {n: c / count for n, c in confidence.items()},
            "drift": {n: _drift(j) for n, j in joined.drift().items()}}
    (folder / "generated.json").write_text(json.dumps(note, indent=1))
    return folder


def _drift(joins: list[tuple[float, float]]) -> dict[str, float]:
    """Residuals at the joins, and what they add up to if they are independent."""
    if not joins:
        return {"joins": 0}
    metres, degrees = np.array(joins).T
    return {"joins": len(joins), "mean_m": float(metres.mean()), "worst_m": float(metres.max()),
            "accumulated_m": float(np.sqrt((metres**2).sum())),
            "mean_deg": float(degrees.mean()), "worst_deg": float(degrees.max()),
            "accumulated_deg": float(np.sqrt((degrees**2).sum()))}


def _append(writers: dict[str, list[Any]], rows: dict[str, np.ndarray], folder: Path, pipeline: Pipeline,
            rates: dict[str, float]) -> None:
    for name, part in rows.items():
        if not len(part):
            continue
        if name not in writers:
            base = name.removesuffix(SPREAD)
            made = pipeline.kind(base).writers if name == base else (npy_file,)
            writers[name] = [make(folder, name, rates[base]) for make in made]
        for writer in writers[name]:
            writer.append(part)
