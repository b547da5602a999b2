"""A prepared data set's card: `card.json`, and a contact sheet to look at."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egom2p import geometry
from egom2p.config import read_json
from egom2p.data.clips import ClipIndex
from egom2p.datasets.checks import Statistics
from egom2p.datasets.cutting import SECONDS
from egom2p.files import write_whole
from egom2p.visualize import plots
from egom2p.visualize.plots import plt

DOUBTFUL_REPROJECTION = 0.12


def write_card(out: Path, name: str, skipped: Sequence[str] = ()) -> dict[str, Any]:
    """Add up the records below `out`, write card.json and contact_sheet.png, and return the card. skipped: lines about
    files that are part of no sequence."""
    records = [read_json(p) for p in sorted((out / "records").glob("*.json"))]
    counts: Counter = Counter()
    clips: Counter = Counter()
    by_split: Counter = Counter()
    for record in records:
        counts.update(record["counts"])
        clips.update(record["stats"]["clips"])
        by_split[record["split"]] += record["counts"].get("clips kept", 0)
    kept = counts.pop("clips kept", 0)
    histograms = {n: np.sum([r["stats"]["histograms"][n] for r in records], 0) if records else np.zeros(len(e) - 1)
                  for n, e in Statistics.EDGES.items()}
    errors = [e for r in records for e in r["stats"]["reprojection"]]
    median = float(np.median(errors)) if errors else 0.0
    failed = {r["sequence"]: r["error"] for r in records if r["error"] and not r.get("skipped")}
    no_recording = [f"{r['sequence']}: {r['error']}" for r in records if r.get("skipped")]
    card = {"dataset": name, "sequences": len(records), "failed": failed, "skipped": [*skipped, *no_recording],
            "notes": {r["sequence"]: r["notes"] for r in records if r.get("notes")}, "clips": kept,
            "clips_by_split": {k: v for k, v in sorted(by_split.items()) if v}, "hours": kept * SECONDS / 3600,
            "left_out": dict(sorted(counts.items())),
            "coverage": {n: clips[n] / kept for n in sorted(clips)} if kept else {}, **_pose_moments(records),
            "distributions": {n: _quantiles(h, Statistics.EDGES[n]) for n, h in histograms.items() if h.sum()},
            "reprojection": None}
    if errors:
        card["reprojection"] = {"clips": len(errors), "median": median, "doubtful": median > DOUBTFUL_REPROJECTION}
    write_whole(out / "card.json", json.dumps(card, indent=1))
    if kept:
        draw_sheet(out, card, histograms)
    return card


def describe(card: dict[str, Any]) -> str:
    """The card in a few lines."""
    lines = [f"{card['dataset']}: {card['clips']} clips ({card['hours']:.2f} h) of {card['sequences']} sequences; "
             + ", ".join(f"{k} {v}" for k, v in card["clips_by_split"].items())]
    lines.append("coverage: " + ", ".join(f"{k} {v:.0%}" for k, v in card["coverage"].items()))
    lines += [f"left out: {v} {k}" for k, v in card["left_out"].items()]
    lines += [f"failed: {k}: {v}" for k, v in list(card["failed"].items())[:10]]
    if card["skipped"]:
        lines.append(f"skipped: {len(card['skipped'])} files or folders, named above and in card.json")
    if card["reprojection"] and card["reprojection"]["doubtful"]:
        lines.append(f"WARNING: poses, depth and intrinsics disagree (median {card['reprojection']['median']:.0%}): "
                     f"check axes, direction and units")
    return "\n".join(lines)


def _pose_moments(records: list[dict]) -> dict[str, list[float]]:
    """Mean and standard deviation of the nine numbers of first_from_camera: what a camera tokenizer normalises with."""
    count = sum(r["stats"]["pose_count"] for r in records)
    if not count:
        return {}
    mean = np.sum([r["stats"]["pose_sum"] for r in records], 0) / count
    squares = np.sum([r["stats"]["pose_squares"] for r in records], 0) / count
    return {"pose_mean": mean.tolist(), "pose_std": np.sqrt(np.maximum(squares - mean**2, 0)).tolist()}


def _quantiles(histogram: np.ndarray, edges: np.ndarray) -> dict[str, float]:
    share = np.cumsum(histogram) / histogram.sum()
    return {f"p{round(q * 100)}": float(edges[1:][np.searchsorted(share, q - 1e-9)])
            for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def draw_sheet(out: Path, card: dict[str, Any], histograms: dict[str, np.ndarray]) -> None:
    """contact_sheet.png: twelve clips' middle frames with gaze, four with depth, trajectories from above,
    distributions."""
    index = ClipIndex.of(sorted(out.glob("*/*.tar")))
    chosen = [index.read(int(i)) for i in np.unique(np.linspace(0, len(index) - 1, 12).astype(int))]
    fig = plt.figure(figsize=(13, 9.6))
    grid = fig.add_gridspec(4, 12, hspace=0.35, wspace=0.25)
    for number, clip in enumerate(chosen):
        axis = fig.add_subplot(grid[number // 6, 2 * (number % 6) : 2 * (number % 6) + 2])
        axis.imshow(clip.signals["rgb"][8], interpolation="nearest")
        if "gaze" in clip.signals:
            plots.draw_gaze(axis, clip.signals["rgb"].shape[1], 8 / 15, None, clip.signals["gaze"])
        axis.set_title(f"{clip.key[-26:]}", fontsize=6, pad=2)
        axis.axis("off")
    with_depth = [c for c in chosen if "depth" in c.signals][:4]
    for number, clip in enumerate(with_depth):
        axis = fig.add_subplot(grid[2, 2 * number : 2 * number + 2])
        depth = clip.signals["depth"][8].astype(np.float32)
        seen = depth[depth > 0] if np.any(depth > 0) else np.zeros(1)
        axis.imshow(np.where(depth > 0, depth, np.nan), cmap=plots.DEPTH_MAP + "_r", vmin=seen.min(), vmax=seen.max())
        axis.set_title(f"depth, {seen.min():.2f} m (bright) to {seen.max():.2f} m", fontsize=6, pad=2)
        axis.axis("off")
    axis = fig.add_subplot(grid[2, 9:12])
    for clip, colour in zip([c for c in chosen if "cam" in c.signals], plt.cm.tab20.colors, strict=False):
        path = geometry.relative_to_first(clip.signals["cam"].astype(np.float64))[:, :3, 3]
        axis.plot(path[:, 0], path[:, 2], color=colour, lw=1.2)
    axis.set(xlabel="right, m", ylabel="forward, m", title="trajectories from the first camera")
    axis.set_aspect("equal", adjustable="datalim")
    shown = [n for n in histograms if histograms[n].sum()]
    for number, name in enumerate(shown):
        width = 12 // max(1, len(shown))
        axis = fig.add_subplot(grid[3, number * width : (number + 1) * width])
        edges = Statistics.EDGES[name]
        axis.bar(edges[:-1], histograms[name] / histograms[name].sum(), np.diff(edges), align="edge",
                 color=plots.MODALITY_COLOURS[number])
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.set_yticks([])
    fig.suptitle(f"{card['dataset']}: {card['clips']} clips, {card['hours']:.2f} h, "
                 + ", ".join(f"{k} {v:.0%}" for k, v in card["coverage"].items()), fontsize=11, y=0.94)
    plots.save(fig, out / "contact_sheet.png")
