"""Pictures of clips, predictions and training, as matplotlib figures. Colours follow the signal everywhere."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from egom2p import geometry
from egom2p.signals import KINDS

TRUE, PREDICTED, CEILING = "#222222", "#d1495b", "#8d96a3"
MODALITY_COLOURS = ["#00798c", "#edae49", "#d1495b", "#66a182", "#2e4057", "#8d96a3"]
DEPTH_MAP = KINDS["depth"].colours

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
                     "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})


def loss_curves(metrics: list[dict[str, Any]]) -> plt.Figure:
    """Training loss and held-out loss by modality over steps; nats a token."""
    train = [m for m in metrics if "loss" in m]
    held = [m for m in metrics if "eval_s" in m]
    names = sorted({k[5:] for m in train for k in m if k.startswith("loss/")})
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, records, prefix, title in ((axes[0], train, "loss/", "training (each step's batch)"),
                                         (axes[1], held, "eval/loss/", "held out, fixed masks")):
        for name, colour in zip(names, MODALITY_COLOURS, strict=False):
            points = [(m["step"], m[prefix + name]) for m in records if prefix + name in m]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=name, lw=1.6)
        axis.set(xlabel="step", title=title)
        axis.legend()
    axes[0].set_ylabel("cross-entropy, nats a token")
    fig.tight_layout()
    return fig


def trajectory_3d(axis: Any, truth: np.ndarray, predicted: np.ndarray) -> None:
    """(T, 4, 4) poses in the first camera's frame, x right, z forward, height up; both from the origin."""
    for poses, colour, label in ((truth, TRUE, "true"), (predicted, PREDICTED, "predicted")):
        points = geometry.relative_to_first(poses.astype(np.float64))[:, :3, 3]
        axis.plot(points[:, 0], points[:, 2], -points[:, 1], color=colour, lw=2, label=label)
        axis.scatter(*points[-1, [0, 2]], -points[-1, 1], color=colour, s=18)
    limits = np.array([axis.get_xlim3d(), axis.get_ylim3d(), axis.get_zlim3d()])
    centre, half = limits.mean(1), max(0.25, np.ptp(limits, axis=1).max() / 2)
    axis.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half),
             zlim=(centre[2] - half, centre[2] + half))
    axis.set_xlabel("right, m", labelpad=-6)
    axis.set_ylabel("forward, m", labelpad=-6)
    axis.set_zlabel("up, m", labelpad=-6)
    axis.tick_params(labelsize=6, pad=-3)


def printable(text: str) -> str:
    """With file names that are no UTF-8 made so."""
    return text.encode("utf-8", "replace").decode()


def clip_sheet(rgb: np.ndarray, truth: dict[str, np.ndarray], predicted: dict[str, np.ndarray], kinds: dict[str, str],
               title: str) -> plt.Figure:
    """One clip: frames with gaze drawn on them, depth and rgb rows true and predicted, the trajectory in 3-D.

    truth and predicted are {modality: raw signal}; kinds {modality: signal kind}. Truth may be absent.
    """
    by_kind = {kind: name for name, kind in kinds.items() if name in predicted}
    picture_rows = [("rgb, gaze" if "gaze" in by_kind else "rgb", rgb, None)]
    for kind in KINDS.values():
        name = by_kind.get(kind.name)
        if name and kind.shown:
            if name in truth and truth[name] is not rgb:
                picture_rows.append((f"{name}, true", kind.shown(truth[name], False), kind.colours))
            picture_rows.append((f"{name}, predicted", kind.shown(predicted[name], True), kind.colours))
    frames = np.linspace(0, len(rgb) - 1, 5).astype(int)
    with_path = "pose" in by_kind
    fig = plt.figure(figsize=(1.7 * (5 + 2.2 * with_path), 1.75 * len(picture_rows) + 0.4))
    grid = fig.add_gridspec(len(picture_rows), 6 if with_path else 5, width_ratios=[1] * 5 + [2.2] * with_path,
                            wspace=0.05, hspace=0.08)
    for row, (label, video, colours) in enumerate(picture_rows):
        for column, frame in enumerate(frames):
            axis = fig.add_subplot(grid[row, column])
            limits = {"vmin": 0, "vmax": 1} if colours else {}
            axis.imshow(video[min(frame, len(video) - 1)], cmap=colours, interpolation="nearest", **limits)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0 and "gaze" in by_kind:
                name = by_kind["gaze"]
                draw_gaze(axis, video.shape[1], frame / max(1, len(rgb) - 1), truth.get(name), predicted[name])
    if with_path:
        axis = fig.add_subplot(grid[:, 5], projection="3d")
        name = by_kind["pose"]
        trajectory_3d(axis, truth.get(name, predicted[name]), predicted[name])
        if name in truth:
            axis.legend(loc="upper left", fontsize=8)
    fig.suptitle(printable(title), x=0.02, ha="left", fontsize=10, parse_math=False)
    return fig


def draws_figure(rows: list[dict[str, np.ndarray]]) -> plt.Figure:
    """One row a clip: two moments of each of its (T, H, W, 3) pictures {caption: frames}."""
    captions = list(rows[0])
    fig, axes = plt.subplots(len(rows), 2 * len(captions), figsize=(3.4 * len(captions), 1.75 * len(rows) + 0.3),
                             squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.06})
    for number, pictures in enumerate(rows):
        for column, axis in enumerate(axes[number]):
            caption = captions[column // 2]
            frames = pictures[caption]
            axis.imshow(frames[len(frames) * (1 + 2 * (column % 2)) // 4], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if number == 0 and column % 2 == 0:
                axis.set_title(caption, fontsize=9, loc="left")
    return fig


def error_figure(rows: Any, measure: Any, title: str) -> plt.Figure:
    """Left: error over the clip, mean and 10-90 % band over clips. Right: histogram of the clips' errors beside their
    means.

    rows: evaluation.results.TaskRows; measure: evaluation.measures.Measure.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=[1, 1.1])
    curves = np.array(rows.curves["model"], np.float64)
    share = np.linspace(0, 1, curves.shape[1])
    with np.errstate(all="ignore"):
        low, high = np.nanpercentile(curves, [10, 90], axis=0)
        left.fill_between(share, low, high, color=PREDICTED, alpha=0.2, label="10 to 90 % of clips")
        left.plot(share, np.nanmean(curves, 0), color=PREDICTED, label="mean")
    left.set(xlabel="share of the clip", ylabel=measure.curve, title="over time")
    left.legend()
    values = np.array(rows.rows["model"][measure.main], np.float64)
    baselines = {s: float(np.nanmean(m[measure.main])) for s, m in rows.rows.items() if s.startswith("baseline")}
    right.hist(values[np.isfinite(values)], bins=min(40, max(8, len(values) // 4)), color=PREDICTED, alpha=0.75)
    marks = {"model": (np.nanmean(values), PREDICTED), "ceiling": (np.nanmean(rows.rows["ceiling"][measure.main]),
                                                                   CEILING),
             "other clip's input": (np.nanmean(rows.rows["shuffled"][measure.main]), "#edae49"),
             **{k.removeprefix("baseline: "): (v, TRUE) for k, v in baselines.items()}}
    for (label, (value, colour)), dash in zip(marks.items(), ["-", ":", "--", "-.", (0, (1, 1)), (0, (5, 1))],
                                              strict=False):
        right.axvline(value, color=colour, ls=dash, lw=1.5, label=f"{label} {value:.3g}")
    right.set(xlabel=measure.main, ylabel="clips", title=f"{len(values)} clips, means as lines")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    fig.suptitle(printable(title), fontsize=9, parse_math=False)
    fig.tight_layout()
    return fig


def draw_gaze(axis: Any, side: int, moment: float, truth: np.ndarray | None, predicted: np.ndarray) -> None:
    """Gaze at `moment` in [0, 1] of the clip: true as a white ring, predicted as a cross."""
    for gaze, style in ((truth, {"marker": "o", "mec": "white", "mfc": "none", "ms": 9, "mew": 1.6}),
                        (predicted, {"marker": "x", "mec": "#00e5ff", "ms": 8, "mew": 2})):
        if gaze is not None:
            x, y, valid = gaze[round(moment * (len(gaze) - 1))]
            if valid:
                axis.plot(x * side - 0.5, y * side - 0.5, **style)
    axis.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))


def gaze_figure(times: np.ndarray, gaze: np.ndarray) -> plt.Figure:
    """x and y of a (T, 3) gaze over time."""
    fig, axis = plt.subplots(figsize=(6, 2.4))
    for column, label, colour in ((0, "x", "#00798c"), (1, "y", "#d1495b")):
        axis.plot(times, np.where(gaze[:, 2] > 0, gaze[:, column], np.nan), label=label, color=colour)
    axis.set(xlabel="seconds", ylabel="frame sides", ylim=(-0.2, 1.2))
    axis.legend()
    fig.tight_layout()
    return fig


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
