"""What to measure for each kind of signal, and the trivial predictions to measure against.

Adding a metric means adding one entry here. `MeasureArgs` fixes what papers leave open: alignments and units. A name
with an `@` (ate_m@sim3, rte_m@1s, gaze_hit@5deg) is a variant: in results.json, and not in the short tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from egom2p import geometry
from egom2p.data.clips import RATES
from egom2p.errors import UserError
from egom2p.evaluation.camera import ate, degenerate, horizons, rre, rte
from egom2p.evaluation.depth import DEPTH_ALIGNMENTS, align_depth, depth_errors
from egom2p.evaluation.gaze import gaze_angle_deg, gaze_distance, gaze_hits, gaze_mse
from egom2p.evaluation.video import psnr_db, ssim
from egom2p.signals.kind import Statistics

POSE_ALIGNMENTS = {"se3": "a centred rigid SE(3) fit", "sim3": "a Sim(3) fit", "none": "no fit"}
HIGHER_IS_BETTER = {"psnr_db", "ssim", "delta1", "delta2", "delta3", "gaze_hit", "codes_used", "perplexity"}
VARIANT = "@"
ALL_ALIGNMENTS = ("none", "se3", "sim3", "sim3_first_s")
HIT_DEGREES = (2, 5, 10)


@dataclass(frozen=True)
class MeasureArgs:
    """pose_alignment: before ate_m: se3 (centred rigid), sim3 (with scale) or none (both from their own first pose);
    the others stand beside it.
    pose_delta: frames between the poses of rte_m and rre_deg. depth_alignment: none (the prediction is metric inverse
    depth), median (of depth) or scale_shift (least squares in inverse depth); depth_per: what is aligned together, a
    clip or a frame."""

    pose_alignment: Literal["se3", "sim3", "none"] = "se3"
    pose_delta: int = 1
    depth_alignment: Literal["none", "median", "scale_shift"] = "scale_shift"
    depth_per: Literal["clip", "frame"] = "clip"

    def __post_init__(self) -> None:
        if self.pose_delta < 1:
            raise ValueError("pose_delta must be at least 1")


@dataclass(frozen=True)
class Measure:
    """metrics(prediction, truth, meta) -> {metric: value}, meta being the clip's; baselines(statistics, truth) ->
    {name: prediction}; over_time(prediction, truth) -> (T,) error of each frame, named by `curve`; alignment: what is
    fitted before the errors are taken; `main` is the metric that ranks clips; doubt(truth): why some of them mean
    little on a clip, "" if they do not."""

    metrics: Callable[[np.ndarray, np.ndarray, dict[str, Any]], dict[str, float]]
    baselines: Callable[[Statistics, np.ndarray], dict[str, np.ndarray]]
    over_time: Callable[[np.ndarray, np.ndarray], np.ndarray]
    curve: str
    main: str
    alignment: str
    doubt: Callable[[np.ndarray], str] = lambda truth: ""


def pose_measure(args: MeasureArgs) -> Measure:
    text = f"ATE after {POSE_ALIGNMENTS[args.pose_alignment]}; RTE and RRE at delta {args.pose_delta}"
    return Measure(partial(_pose_metrics, args=args), _pose_baselines, partial(_pose_over_time, args=args),
                   "position error, m",
                   "ate_m", text, degenerate)


def _pose_metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any],
                  args: MeasureArgs) -> dict[str, float]:
    """The published three, ATE after every alignment (without a fit: both from their own first pose), relative errors
    at every horizon. Fits with scale are nan where the true motion is degenerate."""
    rate = meta.get("rate") or meta.get("rates", {}).get("cam", RATES["cam"])
    if len(truth) <= args.pose_delta:
        raise UserError(f"measures.pose_delta={args.pose_delta} needs longer clips than of {len(truth)} poses")
    ours, theirs = (geometry.relative_to_first(poses.astype(np.float64)) for poses in (predicted, truth))
    aligned = (ours, theirs) if args.pose_alignment == "none" else (predicted, truth)
    found = {"ate_m": ate(*aligned, args.pose_alignment), "rte_m": rte(predicted, truth, args.pose_delta),
             "rre_deg": rre(predicted, truth, args.pose_delta)}
    scaleless = degenerate(truth)
    for alignment in ALL_ALIGNMENTS:
        fitted = truth[: round(rate)] if alignment.endswith("first_s") else truth
        meaningless = alignment.startswith("sim3") and (scaleless or bool(degenerate(fitted)))
        found[f"ate_m@{alignment}"] = float("nan") if meaningless else ate(ours, theirs, alignment, rate)
    for name, delta in horizons(len(truth), rate).items():
        found[f"rte_m@{name}"], found[f"rre_deg@{name}"] = rte(predicted, truth, delta), rre(predicted, truth, delta)
    return found


def _pose_over_time(predicted: np.ndarray, truth: np.ndarray, args: MeasureArgs) -> np.ndarray:
    if args.pose_alignment == "none":
        predicted, truth = (geometry.relative_to_first(poses.astype(np.float64)) for poses in (predicted, truth))
    points, target = predicted[:, :3, 3].astype(np.float64), truth[:, :3, 3].astype(np.float64)
    if args.pose_alignment != "none":
        points = geometry.align(points, target, args.pose_alignment == "sim3")
    return np.linalg.norm(points - target, axis=1)


def _pose_baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    still = np.tile(np.eye(4), (len(truth), 1, 1))
    found = {"no motion": still}
    if "mean_signal" in statistics:
        found["mean trajectory"] = geometry.nine_to_pose(statistics["mean_signal"].astype(np.float64))
        line = still.copy()
        line[:, 2, 3] = np.linspace(0, float(statistics["mean_length"][0]), len(truth))
        found["straight line of mean length"] = line
    return found


def gaze_measure(args: MeasureArgs) -> Measure:
    return Measure(_gaze_metrics, _gaze_baselines, _gaze_over_time, "squared error", "gaze_mse",
                   "none; frames with valid gaze")


def _gaze_metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any]) -> dict[str, float]:
    found = {"gaze_mse": gaze_mse(predicted, truth)}
    if "side" in meta:
        found["gaze_px"] = gaze_distance(predicted, truth) * meta["side"]
        if "intrinsics" in meta:
            matrix = np.array(meta["intrinsics"], np.float64)
            found["gaze_deg"] = gaze_angle_deg(predicted, truth, matrix, meta["side"])
            found |= {f"gaze_hit@{d}deg": gaze_hits(predicted, truth, matrix, meta["side"], d) for d in HIT_DEGREES}
    return found


def _gaze_over_time(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.where(truth[:, 2] > 0, ((predicted[:, :2] - truth[:, :2]) ** 2).mean(1), np.nan)


def _gaze_baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    found = {"frame centre": np.broadcast_to([0.5, 0.5], (len(truth), 2))}
    if "mean_signal" in statistics:
        found["mean gaze"] = np.broadcast_to(statistics["mean_signal"], (len(truth), 2))
    return found


def depth_measure(args: MeasureArgs) -> Measure:
    text = f"{DEPTH_ALIGNMENTS[args.depth_alignment]} per {args.depth_per}; pixels with a reading"
    return Measure(partial(_depth_metrics, args=args), _depth_baselines, partial(_depth_over_time, args=args), "AbsRel",
                   "abs_rel", text)


def _depth_metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any],
                   args: MeasureArgs) -> dict[str, float]:
    truth = truth.astype(np.float32)
    return depth_errors(align_depth(predicted, truth, args.depth_alignment, args.depth_per), truth)


def _depth_over_time(predicted: np.ndarray, truth: np.ndarray, args: MeasureArgs) -> np.ndarray:
    truth = truth.astype(np.float32)
    aligned = align_depth(predicted, truth, args.depth_alignment, args.depth_per)
    return np.array([depth_errors(a, t)["abs_rel"] for a, t in zip(aligned, truth, strict=True)])


def _depth_baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    flat = {"flat plane": np.zeros(truth.shape, np.float32)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape[1:]:
        flat["mean depth image"] = np.broadcast_to(statistics["mean_signal"], truth.shape)
    return flat


def rgb_measure(args: MeasureArgs) -> Measure:
    return Measure(_rgb_metrics, _rgb_baselines, _rgb_over_time, "PSNR, dB", "psnr_db", "none")


def _rgb_metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any]) -> dict[str, float]:
    return {"psnr_db": psnr_db(predicted, truth), "ssim": ssim(predicted, truth)}


def _rgb_over_time(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.array([psnr_db(a, b) for a, b in zip(predicted, truth, strict=True)])


def _rgb_baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    grey = {"grey frame": np.full(truth.shape, 128, np.uint8)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape[1:]:
        grey["mean frame"] = np.broadcast_to(statistics["mean_signal"].round().astype(np.uint8), truth.shape)
    return grey


def motion_measure(args: MeasureArgs) -> Measure:
    return Measure(_motion_metrics, _motion_baselines, _motion_over_time, "root mean square error", "rmse", "none")


def _motion_metrics(predicted: np.ndarray, truth: np.ndarray, meta: dict[str, Any]) -> dict[str, float]:
    return {"rmse": float(np.sqrt(((predicted.astype(np.float64) - truth) ** 2).mean()))}


def _motion_over_time(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.sqrt(((predicted.astype(np.float64) - truth) ** 2).mean(1))


def _motion_baselines(statistics: Statistics, truth: np.ndarray) -> dict[str, np.ndarray]:
    found = {"zero": np.zeros(truth.shape)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape:
        found["mean signal"] = statistics["mean_signal"]
        found["constant mean"] = np.broadcast_to(statistics["mean_signal"].mean(0), truth.shape)
    return found


# A measure for each kind of signal.
MEASURES: dict[str, Callable[[MeasureArgs], Measure]] = {
    "pose": pose_measure, "gaze": gaze_measure, "depth": depth_measure, "rgb": rgb_measure, "motion": motion_measure,
}


def is_better(metric: str, a: float, b: float) -> bool:
    """Whether value `a` of the metric is better than `b`."""
    return a > b if metric.partition(VARIANT)[0] in HIGHER_IS_BETTER else a < b


def without_padding(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A picture without the margins that fill it up to whole patches, all around."""
    if truth.ndim < 3 or made.shape[1:3] == truth.shape[1:3]:
        return made
    (top, height), (left, width) = (((have - want) // 2, want) for have, want in zip(made.shape[1:3], truth.shape[1:3],
                                                                                    strict=True))
    return made[:, top : top + height, left : left + width]
