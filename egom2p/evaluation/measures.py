"""What to measure for each kind of signal, and the trivial predictions to measure against.

Adding a metric means adding one entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from egom2p import geometry
from egom2p.evaluation.camera import ate, rre, rte
from egom2p.evaluation.depth import align_inverse_depth, depth_errors
from egom2p.evaluation.gaze import gaze_mse
from egom2p.evaluation.video import psnr_db, ssim

HIGHER_IS_BETTER = {"psnr_db", "ssim", "delta1"}


@dataclass(frozen=True)
class Measure:
    """metrics(prediction, truth) -> {metric: value}; baselines(statistics, truth) -> {name: prediction};
    alignment: what is fitted before the errors are taken."""

    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    baselines: Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]
    alignment: str


def _pose_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {"ate_m": ate(predicted, truth), "rte_m": rte(predicted, truth), "rre_deg": rre(predicted, truth)}


def _pose_baselines(statistics: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, np.ndarray]:
    still = np.tile(np.eye(4), (len(truth), 1, 1))
    found = {"no motion": still}
    if "mean_signal" in statistics:
        found["mean trajectory"] = geometry.nine_to_pose(statistics["mean_signal"].astype(np.float64))
        line = still.copy()
        line[:, 2, 3] = np.linspace(0, float(statistics["mean_length"][0]), len(truth))
        found["straight line of mean length"] = line
    return found


def _gaze_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {"gaze_mse": gaze_mse(predicted, truth)}


def _gaze_baselines(statistics: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, np.ndarray]:
    centre = np.broadcast_to([0.5, 0.5], (len(truth), 2))
    mean = {"mean gaze": np.broadcast_to(statistics["mean_signal"], (len(truth), 2))} if "mean_signal" in statistics else {}
    return {"frame centre": centre, **mean}


def _depth_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    truth = truth.astype(np.float32)
    errors = depth_errors(align_inverse_depth(predicted, truth), truth)
    return {k: errors[k] for k in ("abs_rel", "rmse_m", "delta1")}


def _depth_baselines(statistics: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, np.ndarray]:
    flat = {"flat plane": np.zeros(truth.shape, np.float32)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape[1:]:
        flat["mean depth image"] = np.broadcast_to(statistics["mean_signal"], truth.shape)
    return flat


def _rgb_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {"psnr_db": psnr_db(predicted, truth), "ssim": ssim(predicted, truth)}


def _rgb_baselines(statistics: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, np.ndarray]:
    grey = {"grey frame": np.full(truth.shape, 128, np.uint8)}
    if "mean_signal" in statistics and statistics["mean_signal"].shape == truth.shape[1:]:
        grey["mean frame"] = np.broadcast_to(statistics["mean_signal"].round().astype(np.uint8), truth.shape)
    return grey


MEASURES = {
    "pose": Measure(_pose_metrics, _pose_baselines, "ATE after a centred rigid SE(3) fit; RTE and RRE at delta 1"),
    "gaze": Measure(_gaze_metrics, _gaze_baselines, "none; frames with valid gaze"),
    "depth": Measure(_depth_metrics, _depth_baselines, "scale and shift in inverse depth per clip; pixels with a reading"),
    "rgb": Measure(_rgb_metrics, _rgb_baselines, "none"),
}


def is_better(metric: str, a: float, b: float) -> bool:
    return a > b if metric in HIGHER_IS_BETTER else a < b
