"""Depth metrics. Eigen et al., "Depth Map Prediction from a Single Image", NeurIPS 2014.

Predictions are inverse depth up to scale and shift; the alignment (Ranftl et al., MiDaS, 2020) is a
least-squares scale and shift in inverse depth over all pixels of the clip with a reading.
"""

import numpy as np

MIN_INVERSE = 1e-3  # metres^-1: a fitted inverse depth below it counts as 1 km


DEPTH_ALIGNMENTS = {"none": "no alignment", "median": "median of depth",
                    "scale_shift": "scale and shift in inverse depth"}


def has_reading(reference: np.ndarray) -> np.ndarray:
    """Where metres are known; an endless depth is no reading, as for the tokenizers."""
    return np.isfinite(reference) & (reference > 0)


def align_depth(predicted: np.ndarray, reference: np.ndarray, alignment: str = "scale_shift",
                per: str = "clip") -> np.ndarray:
    """Predicted inverse depth (T, H, W) -> metres, aligned with (T, H, W) reference metres (0 = no reading).

    alignment: none (the prediction is metric inverse depth), median (one factor that makes the medians of depth equal,
    Zhou et al. 2017) or scale_shift (least squares in inverse depth, MiDaS). per: clip or frame.
    """
    if per == "frame":
        return np.concatenate([align_depth(p[None], r[None], alignment)
                               for p, r in zip(predicted, reference, strict=True)])
    if alignment == "scale_shift":
        return align_inverse_depth(predicted, reference)
    metres = 1 / np.maximum(predicted.astype(np.float64), MIN_INVERSE)
    seen = has_reading(reference)
    if alignment == "median" and seen.any():
        metres *= np.median(reference[seen].astype(np.float64)) / np.median(metres[seen])
    return metres


def align_inverse_depth(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Relative inverse depth -> metres, by the scale and shift that fit 1 / reference best.

    predicted (T, H, W) in any linear units of inverse depth; reference (T, H, W) metres, 0 = no reading.
    """
    seen = has_reading(reference)
    if not seen.any():
        return np.full(predicted.shape, 1 / MIN_INVERSE)
    x, y = predicted[seen].astype(np.float64), 1 / reference[seen].astype(np.float64)
    spread = x.var()
    scale = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > 1e-12 else 0.0
    inverse = scale * predicted.astype(np.float64) + y.mean() - scale * x.mean()
    return 1 / np.maximum(inverse, MIN_INVERSE)


def depth_errors(metres: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """abs_rel, rmse_m, delta_1.25^k (share of pixels whose ratio is below) and silog (scale-invariant error of the
    natural logarithm, Eigen et al. equation 1 with lambda 1: the spread of the log ratio), over pixels with a
    reading."""
    seen = has_reading(reference)
    if not seen.any():
        return dict.fromkeys(("abs_rel", "rmse_m", "delta1", "delta2", "delta3", "silog"), float("nan"))
    p, r = metres[seen].astype(np.float64), reference[seen].astype(np.float64)
    ratio = np.maximum(p / r, r / p)
    return {"abs_rel": float((np.abs(p - r) / r).mean()), "rmse_m": float(np.sqrt(((p - r) ** 2).mean())),
            **{f"delta{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)}, "silog": float(np.log(p / r).std())}
