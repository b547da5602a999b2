"""Errors of predictions against the truth: plain functions on arrays, one file a kind of signal."""

HIGHER_IS_BETTER = {"psnr_db", "ssim", "delta1", "delta2", "delta3"}


def is_better(metric: str, a: float, b: float) -> bool:
    """Whether value `a` of the metric is better than `b`."""
    return a > b if metric in HIGHER_IS_BETTER else a < b
