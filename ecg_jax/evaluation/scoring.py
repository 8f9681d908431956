"""One call for every metric: the value on the sample, on resamples, and with one unit left out each time."""

import numpy as np

from ecg_jax.evaluation import calibration, metrics
from ecg_jax.evaluation.bootstrap import Scored

#: What computes each metric from targets, predictions [n, K] and counts [n, R]: [R, K], or [R] for one number.
METRICS = {
    "auroc": metrics.resampled_auroc,
    "average_precision": metrics.resampled_average_precision,
    "brier": calibration.resampled_brier,
    "ece": calibration.resampled_ece,
    "mae": metrics.resampled_mae,
    "r2": metrics.resampled_r2,
    "micro_auroc": metrics.resampled_micro_auroc,
    "fmax": metrics.resampled_fmax,
}
LOWER_IS_BETTER = ("brier", "ece", "mae")


def score(metric: str, targets, predictions, counts, left_out=None) -> Scored:
    """One metric of one model.

    Args:
        metric: a name of `METRICS`. "auroc", "average_precision", "brier", "ece" (10 bins of equal width), "mae" and
            "r2" are per class, "micro_auroc" and "fmax" one number (K = 1).
        targets: [n, K] of 0, 1, NaN; of real numbers and NaN for "mae" and "r2".
        predictions: [n, K].
        counts: [n, R] from `bootstrap.draw` or `bootstrap.counts_of`.
        left_out: [n, U] from `bootstrap.leave_one_out`, for BCa intervals; None if none are asked for.

    Raises:
        ValueError: another metric; see the functions of `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")

    def resampled(drawn) -> np.ndarray:
        values = METRICS[metric](targets, predictions, drawn)
        return values[:, None] if values.ndim == 1 else values

    return Scored(
        metric,
        resampled(np.ones((len(targets), 1)))[0],
        resampled(counts),
        None if left_out is None else resampled(left_out),
    )
