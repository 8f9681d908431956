"""Are probabilities right as probabilities: Brier score, expected calibration error, reliability bins.

Arrays and resamples as in `metrics.py`: targets [n, K] of 0, 1, NaN (that record is left out of that class),
probabilities [n, K] in [0, 1], counts [n, R]. Both errors are defined wherever a target is known, with one kind of
target too: lower is better, 0 is best.
"""

from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation.metrics import as_matrices, count_blocks, weighted_means

#: Bins of the calibration error unless another number is given.
N_BINS = 10


def _as_probabilities(targets, probabilities) -> tuple[np.ndarray, np.ndarray]:
    targets, probabilities = as_matrices(targets, probabilities)
    if probabilities.size and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("probabilities must lie between 0 and 1")
    return targets, probabilities


def resampled_brier(targets, probabilities, counts) -> np.ndarray:
    """Brier score per class, the mean of (p − y)² (Brier 1950), for many resamples.

    Args:
        targets: [n, K] of 0, 1, NaN.
        probabilities: [n, K].
        counts: [n, R], how often each record is drawn in each resample.

    Returns:
        float64 [R, K], NaN where no drawn record of a class is known.

    Raises:
        ValueError: as in `metrics.resampled_auroc`, or probabilities outside [0, 1].
    """
    targets, probabilities = _as_probabilities(targets, probabilities)
    return weighted_means((probabilities - targets) ** 2, ~np.isnan(targets), counts)


def brier(targets, probabilities) -> np.ndarray:
    """Brier score per class: float64 [K]; see `resampled_brier`."""
    return resampled_brier(targets, probabilities, np.ones((len(targets), 1)))[0]


def _bins(targets, probabilities, n_bins: int, kind: str) -> np.ndarray:
    """Which bin of its class each entry is in: int [n, K].

    Raises:
        ValueError: another kind, or no bins.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} must be at least 1")
    if kind == "equal_width":
        return np.minimum((probabilities * n_bins).astype(np.int64), n_bins - 1)
    if kind != "equal_mass":
        raise ValueError(f'kind must be "equal_width" or "equal_mass", not {kind!r}')
    bins = np.zeros(targets.shape, dtype=np.int64)
    for k in range(targets.shape[1]):
        known = np.sort(probabilities[~np.isnan(targets[:, k]), k])
        if len(known):
            # Each edge is the first probability of the next bin, so that equal probabilities share a bin.
            edges = known[np.arange(1, n_bins) * len(known) // n_bins]
            bins[:, k] = np.searchsorted(edges, probabilities[:, k], side="right")
    return bins


def resampled_ece(
    targets, probabilities, counts, n_bins: int = N_BINS, kind: str = "equal_width"
) -> np.ndarray:
    """Expected calibration error per class (Naeini et al. 2015), for many resamples.

        ECE = Σ_b (n_b / n) |mean of y in bin b − mean of p in bin b|

    Bins are laid over the whole sample and stay where they are in every resample. ECE of a finite sample is biased
    upwards and a resample adds its own noise, so that percentile intervals of it sit high: a well calibrated model
    lies near their lower end.

    Args:
        targets: [n, K] of 0, 1, NaN.
        probabilities: [n, K].
        counts: [n, R], how often each record is drawn in each resample.
        n_bins: bins per class.
        kind: "equal_width" cuts [0, 1] into bins of one width; "equal_mass" into bins with equally many known
            records of the class, equal probabilities staying together.

    Returns:
        float64 [R, K], NaN where no drawn record of a class is known.

    Raises:
        ValueError: as in `resampled_brier`, another kind, or no bins.
    """
    from scipy.sparse import csr_array

    targets, probabilities = _as_probabilities(targets, probabilities)
    n, K = targets.shape
    known, bins = ~np.isnan(targets), _bins(targets, probabilities, n_bins, kind)
    record, k = np.nonzero(known)
    gap = (probabilities - targets)[record, k]
    # Row k n_bins + b sums the gaps of bin b: n_b (mean p − mean y) of the drawn records.
    gaps = csr_array((gap, (k * n_bins + bins[record, k], record)), shape=(K * n_bins, n))
    result = np.empty((np.shape(counts)[1], K))
    for where, block in count_blocks(counts, n):
        block = block.astype(np.float64)
        total = np.abs(gaps @ block).reshape(K, n_bins, -1).sum(axis=1)
        with np.errstate(invalid="ignore"):
            result[where] = (total / (known.T.astype(np.float64) @ block)).T
    return result


def ece(targets, probabilities, n_bins: int = N_BINS, kind: str = "equal_width") -> np.ndarray:
    """Expected calibration error per class: float64 [K]; see `resampled_ece`."""
    return resampled_ece(targets, probabilities, np.ones((len(targets), 1)), n_bins, kind)[0]


class Reliability(NamedTuple):
    """A reliability diagram: what was said against what happened, per class and bin."""

    predicted: np.ndarray
    """float64 [K, n_bins], mean probability, NaN for an empty bin."""
    observed: np.ndarray
    """float64 [K, n_bins], share of positives, NaN for an empty bin."""
    n: np.ndarray
    """int64 [K, n_bins], records."""


def reliability(targets, probabilities, n_bins: int = N_BINS, kind: str = "equal_width") -> Reliability:
    """The bins behind `ece`; arguments and errors as in `resampled_ece`."""
    targets, probabilities = _as_probabilities(targets, probabilities)
    known, bins = ~np.isnan(targets), _bins(targets, probabilities, n_bins, kind)

    def total(values) -> np.ndarray:
        values = np.where(known, values, 0.0)
        columns = [np.bincount(bins[:, k], values[:, k], minlength=n_bins) for k in range(targets.shape[1])]
        return np.array(columns).reshape(-1, n_bins)

    n = total(np.ones_like(probabilities))
    with np.errstate(invalid="ignore"):
        return Reliability(total(probabilities) / n, total(targets) / n, n.astype(np.int64))
