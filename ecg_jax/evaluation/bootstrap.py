"""Confidence intervals by resampling patients.

Records of one patient are not independent, so the unit that is drawn with replacement is the patient with all
their records (cluster bootstrap); a record whose patient is unknown is a unit of its own. A resample is kept
as counts, how often each record was drawn, and two models are compared on the same counts (paired).

Intervals are percentile intervals. A class without positives or negatives in a resample is left out of that
resample's macro mean; the reference implementation counts it 0.5 instead, which can push the point estimate
out of its own interval (`undefined="half"` reproduces that).
"""

from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation import metrics


class Interval(NamedTuple):
    """A point estimate on the full sample with its interval from the resamples."""

    point: float
    low: float
    high: float


def units(patient_ids, n_records: int) -> tuple[np.ndarray, str]:
    """What is drawn in a resample: the patient where known, otherwise the record.

    Args:
        patient_ids: [n] of str or int with None (or NaN, or "") for unknown, or None if no patient is known.
        n_records: n.

    Returns:
        (codes, name): int64 [n], 0 to n_units - 1, equal for records drawn together; and what to call
        the unit: "patient", "record", or "patient where known, else record".
    """
    if patient_ids is None:
        return np.arange(n_records), "record"
    known = np.array([p is not None and p == p and p != "" for p in patient_ids], dtype=bool)
    if len(known) != n_records:
        raise ValueError(f"{len(known)} patient ids for {n_records} records")
    if not known.any():
        return np.arange(n_records), "record"
    keys = [
        ("patient", str(p)) if k else ("record", str(i))
        for i, (p, k) in enumerate(zip(patient_ids, known, strict=True))
    ]
    code_of: dict = {}
    codes = np.array([code_of.setdefault(key, len(code_of)) for key in keys], dtype=np.int64)
    return codes, "patient" if known.all() else "patient where known, else record"


def draw(codes, n_resamples: int, seed: int) -> np.ndarray:
    """Draw as many units as there are, with replacement, `n_resamples` times.

    Args:
        codes: int [n], the unit of each record, 0 to n_units - 1 (from `units`).
        n_resamples: R.
        seed: of NumPy's default generator; the same seed gives the same resamples.

    Returns:
        uint16 [n, R]: how often each record is in each resample.
    """
    codes = np.asarray(codes)
    n_units = int(codes.max()) + 1
    generator = np.random.default_rng(seed)
    per_unit = np.empty((n_units, n_resamples), dtype=np.uint16)
    for r in range(n_resamples):
        per_unit[:, r] = np.bincount(generator.integers(0, n_units, n_units), minlength=n_units)
    return per_unit[codes]


def counts_of(indices) -> np.ndarray:
    """Counts [n, R] of resamples given as record indices [R, n] (each row drawn with replacement from n)."""
    indices = np.asarray(indices, dtype=np.int64)
    return np.stack([np.bincount(row, minlength=indices.shape[1]) for row in indices], axis=1)


def interval(point, resampled, level: float = 0.95) -> Interval:
    """Percentile interval: the (1 ± level)/2 quantiles of the resampled values, NaN ones left out.

    Args:
        point: the value on the full sample.
        resampled: float [R].
        level: of confidence.

    Returns:
        The interval; low and high are NaN if no resample is defined.
    """
    resampled = np.asarray(resampled, dtype=np.float64)
    resampled = resampled[~np.isnan(resampled)]
    if not resampled.size:
        return Interval(float(point), float("nan"), float("nan"))
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(point), float(low), float(high))


class AurocBootstrap(NamedTuple):
    """AUROC of one model on the full sample and on every resample."""

    per_class: np.ndarray
    """float64 [K], NaN where undefined."""
    resampled: np.ndarray
    """float64 [R, K], NaN where undefined."""

    def class_intervals(self, level: float = 0.95) -> list[Interval]:
        """One interval per class."""
        return [interval(self.per_class[k], self.resampled[:, k], level) for k in range(len(self.per_class))]

    def macro(self, undefined: str = "exclude", level: float = 0.95) -> Interval:
        """Interval of macro AUROC; `undefined` as in `metrics.macro`, applied within each resample."""
        return interval(
            metrics.macro(self.per_class, undefined), metrics.macro(self.resampled, undefined), level
        )


def bootstrap_auroc(targets, scores, counts) -> AurocBootstrap:
    """AUROC per class on the full sample and on the given resamples.

    Args:
        targets: [n, K] of 0, 1, NaN.
        scores: [n, K].
        counts: [n, R] from `draw` or `counts_of`.

    Raises:
        ValueError: as in `metrics.resampled_auroc`.
    """
    return AurocBootstrap(metrics.auroc(targets, scores), metrics.resampled_auroc(targets, scores, counts))


def bootstrap_micro_auroc(targets, scores, counts, level: float = 0.95) -> Interval:
    """Interval of micro AUROC; arguments as in `bootstrap_auroc`."""
    resampled = metrics.resampled_micro_auroc(targets, scores, counts)
    return interval(metrics.micro_auroc(targets, scores), resampled, level)


def macro_difference(
    first: AurocBootstrap, second: AurocBootstrap, undefined: str = "exclude", level: float = 0.95
) -> Interval:
    """Interval of macro AUROC of the first model minus the second's, on the same resamples.

    Both must come from the same targets and counts; then the same classes are undefined in both.

    Raises:
        ValueError: they have other shapes or other undefined classes, so they were not paired.
    """
    paired = first.resampled.shape == second.resampled.shape and np.array_equal(
        np.isnan(first.resampled), np.isnan(second.resampled)
    )
    if not paired:
        raise ValueError("the two models were not scored on the same targets and resamples")
    difference = metrics.macro(first.resampled, undefined) - metrics.macro(second.resampled, undefined)
    point = metrics.macro(first.per_class, undefined) - metrics.macro(second.per_class, undefined)
    return interval(point, difference, level)
