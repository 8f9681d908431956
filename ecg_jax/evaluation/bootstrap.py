"""Confidence intervals and tests by resampling patients.

Records of one patient are not independent, so the unit that is drawn with replacement is the patient with all
their records (cluster bootstrap); a record whose patient is unknown is a unit of its own. A resample is kept
as counts, how often each record was drawn, and two models are compared on the same counts (paired).

Intervals are percentile intervals or BCa intervals (Efron 1987), which correct a bias of the median and a standard
error that changes with the value; their acceleration needs the scores with one unit left out each time
(`leave_one_out`). A class without positives or negatives in a resample is left out of that resample's macro mean; the
reference implementation counts its AUROC 0.5 instead, which can push the point estimate out of its own interval
(`undefined="half"` reproduces that).
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


def leave_one_out(codes, max_groups: int = 1000) -> np.ndarray:
    """Samples with one unit left out each time, as counts: what the acceleration of a BCa interval is made of.

    With more than `max_groups` units, groups of units are left out instead, unit u in group u mod max_groups. The
    skewness of a mean of g influences is 1/sqrt(g) of theirs and there are 1/g as many, so the acceleration has the
    same expectation.

    Args:
        codes: int [n], the unit of each record (from `units`).
        max_groups: at most so many samples.

    Returns:
        uint8 [n, U]: 0 for the records left out, 1 for the others.
    """
    group = np.asarray(codes) % max_groups
    return (group[:, None] != np.arange(group.max() + 1)).astype(np.uint8)


def _quantiles(ordered, n_defined, probability) -> np.ndarray:
    """Quantiles of each column by linear interpolation between order statistics, as NumPy's default.

    Args:
        ordered: [R, K], sorted down the columns, NaN last.
        n_defined: [K], values that are not NaN, at least one.
        probability: [K].
    """
    position = probability * (n_defined - 1)
    lower = np.floor(position).astype(np.int64)
    upper, columns = np.minimum(lower + 1, n_defined - 1), np.arange(ordered.shape[1])
    low, high = ordered[lower, columns], ordered[upper, columns]
    return low + (high - low) * (position - lower)


def _bca_probabilities(points, resampled, n_defined, left_out, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Which quantiles of the resampled values are the ends of BCa intervals: ([K], [K]).

    With z₀ = Φ⁻¹(share of resampled values below the point, ties half), a = Σ d³ / (6 (Σ d²)^(3/2)) where d are mean
    minus leave-one-out values, and z = Φ⁻¹((1 ± level)/2), the ends are Φ(z₀ + (z₀ + z) / (1 − a (z₀ + z)))
    (Efron 1987; the acceleration as in Efron & Tibshirani 1993, eq. 14.15).
    """
    from scipy.special import ndtr, ndtri

    share = ((resampled < points).sum(axis=0) + 0.5 * (resampled == points).sum(axis=0)) / n_defined
    # A point beyond all its resamples would have infinite bias: it counts as half a resample away from the end.
    z0 = ndtri(np.clip(share, 0.5 / n_defined, 1 - 0.5 / n_defined))
    defined = ~np.isnan(left_out)
    mean = np.where(defined, left_out, 0.0).sum(axis=0) / np.maximum(defined.sum(axis=0), 1)
    d = np.where(defined, mean - left_out, 0.0)
    # Differences that are rounding of equal values would make an acceleration of noise.
    d[np.abs(d) < 1e-13] = 0.0
    spread = (d**2).sum(axis=0) ** 1.5
    acceleration = np.where(spread > 0, (d**3).sum(axis=0) / (6 * np.where(spread > 0, spread, 1.0)), 0.0)

    def end(z: float) -> np.ndarray:
        shifted = z0 + z
        room = 1 - acceleration * shifted
        # Past the pole the map is at its limit.
        inside = z0 + shifted / np.where(room > 0, room, 1.0)
        return ndtr(np.where(room > 0, inside, np.sign(shifted) * np.inf))

    return end(ndtri((1 - level) / 2)), end(ndtri((1 + level) / 2))


def intervals(points, resampled, level: float = 0.95, kind: str = "percentile", left_out=None):
    """Intervals of K quantities at once; resampled values that are NaN are left out.

    Args:
        points: [K], the values on the full sample.
        resampled: [R, K].
        level: of confidence.
        kind: "percentile", the (1 ± level)/2 quantiles of the resampled values, or "bca", bias-corrected and
            accelerated.
        left_out: [U, K], the values on the samples of `leave_one_out`, which "bca" needs.

    Returns:
        list[Interval]. Low and high are NaN where no resample is defined or the point is not. If all resampled values
        are equal, both ends are that value. In a BCa interval a point beyond all resampled values counts as half a
        resample away from them, and the acceleration is 0 where leaving out a unit changes nothing.

    Raises:
        ValueError: another kind, or "bca" without `left_out`.
    """
    points, resampled = np.asarray(points, dtype=np.float64), np.asarray(resampled, dtype=np.float64)
    ordered, n_defined = np.sort(resampled, axis=0), (~np.isnan(resampled)).sum(axis=0)
    usable = (n_defined > 0) & ~np.isnan(points)
    if kind == "percentile":
        ends = [np.full(len(points), (1 + sign * level) / 2) for sign in (-1, 1)]
    elif kind == "bca":
        if left_out is None:
            raise ValueError("a BCa interval needs the scores on leave_one_out samples")
        ends = [np.full(len(points), np.nan) for _ in range(2)]
        ends[0][usable], ends[1][usable] = _bca_probabilities(
            points[usable], resampled[:, usable], n_defined[usable], np.asarray(left_out)[:, usable], level
        )
    else:
        raise ValueError(f'kind must be "percentile" or "bca", not {kind!r}')
    low, high = np.full(len(points), np.nan), np.full(len(points), np.nan)
    for found, end in ((low, ends[0]), (high, ends[1])):
        found[usable] = _quantiles(ordered[:, usable], n_defined[usable], end[usable])
    return [Interval(*map(float, triple)) for triple in zip(points, low, high, strict=True)]


def interval(point, resampled, level: float = 0.95, kind: str = "percentile", left_out=None) -> Interval:
    """Interval of one quantity from its value, its resampled values [R] and leave-one-out values [U].

    Everything else as in `intervals`.
    """
    columns = [None if values is None else np.asarray(values)[:, None] for values in (resampled, left_out)]
    return intervals([point], columns[0], level, kind, columns[1])[0]


def seed_deviations(points, n_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How far the mean over all seeds may lie from the mean over S of them.

    Each value is s / sqrt(S) times Student's t with S - 1 degrees of freedom, s the standard deviation of the figures
    over seeds: resampling a handful of seeds instead would end at the extremes among them, and cover 83 % of the time
    with five when 95 % are said. Several figures of the same seeds (scores at several sizes, or of two models) deviate
    together, as they do from seed to seed: with d_i = figures of seed i minus their mean, a draw is
    Σ_i w_i d_i / sqrt(S c), w_i normal and c chi-squared with S - 1 degrees of freedom.

    Args:
        points: [..., S], figures of each seed.
        n_resamples: R.
        generator: generators in the same state give the same w and c for any figures of S seeds, so that differences
            of models that share their seeds stay paired.

    Returns:
        float64 [R, ...]; 0 for a single seed: its interval knows nothing of other seeds.
    """
    points = np.asarray(points, dtype=np.float64)
    S = points.shape[-1]
    if S == 1:
        return np.zeros((n_resamples, *points.shape[:-1]))
    spread = generator.chisquare(S - 1, size=n_resamples)
    weights = generator.normal(size=(n_resamples, S)) / np.sqrt(S * spread)[:, None]
    # From the first seed's figure, so that equal figures deviate by exactly nothing.
    deviations = points - points[..., :1]
    deviations -= deviations.mean(axis=-1, keepdims=True)
    return np.tensordot(weights, deviations, axes=(1, -1))


def hierarchical_interval(points, resampled, deviations, level: float = 0.95) -> Interval:
    """Mean over seeds with its percentile interval over patients and seeds.

    Args:
        points: [S], one figure for each seed on all test records.
        resampled: [S, R], the same on every resample of the patients, NaN where it is undefined.
        deviations: [R], see `seed_deviations`.
        level: of confidence.
    """
    over_patients = np.mean(np.asarray(resampled, dtype=np.float64), axis=0)
    return interval(np.mean(points), over_patients + deviations, level)


def p_value(differences) -> float:
    """Two-sided p-value of a paired difference from its resampled values [R], by inverting percentile intervals.

        p = min(1, 2 min(1 + #{d ≤ 0}, 1 + #{d ≥ 0}) / (R + 1))

    (Davison & Hinkley 1997, §4.2 for the correction by 1, which keeps p from being 0). NaN values are left out.

    Returns:
        p, NaN if no resample is defined; p < 0.05 where the 95 % percentile interval excludes 0, but for rounding
        by one resample.
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[~np.isnan(differences)]
    if not differences.size:
        return float("nan")
    smaller = 1 + min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * smaller / (len(differences) + 1)))


class Scored(NamedTuple):
    """One metric of one model on the full sample and on every resample; see `scoring.score`.

    A metric that is one number for all classes (micro AUROC, Fmax, a Challenge score) has K = 1.
    """

    metric: str
    """A name of `scoring.METRICS`, or "challenge_2020", "challenge_2021"."""
    per_class: np.ndarray
    """float64 [K], NaN where undefined."""
    resampled: np.ndarray
    """float64 [R, K], NaN where undefined."""
    left_out: np.ndarray | None = None
    """float64 [U, K] on the samples of `leave_one_out`, which BCa intervals need; None if not computed."""

    def class_intervals(self, level: float = 0.95, kind: str = "percentile") -> list[Interval]:
        """One interval per class, as in `intervals`."""
        return intervals(self.per_class, self.resampled, level, kind, self.left_out)

    def macros(self, undefined: str) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Mean over classes on the sample, on the resamples [R] and with units left out [U] (None if not computed).

        `undefined` as in `metrics.macro`, applied within each resample; "half" is the reference's rule for AUROC, and
        classes undefined in another metric are left out under either rule.
        """
        rule = undefined if self.metric == "auroc" or undefined not in ("half", "exclude") else "exclude"
        left_out = None if self.left_out is None else metrics.macro(self.left_out, rule)
        return float(metrics.macro(self.per_class, rule)), metrics.macro(self.resampled, rule), left_out

    def macro(self, undefined: str = "exclude", level: float = 0.95, kind: str = "percentile") -> Interval:
        """Interval of the mean over classes; `undefined` as in `macros`, the rest as in `intervals`."""
        point, resampled, left_out = self.macros(undefined)
        return interval(point, resampled, level, kind, left_out)


def bootstrap_auroc(targets, scores, counts, left_out=None) -> Scored:
    """AUROC per class on the full sample and on the given resamples.

    Args:
        targets: [n, K] of 0, 1, NaN.
        scores: [n, K].
        counts: [n, R] from `draw` or `counts_of`.
        left_out: [n, U] from `leave_one_out`, for BCa intervals.

    Raises:
        ValueError: as in `metrics.resampled_auroc`.
    """
    return Scored(
        "auroc",
        metrics.auroc(targets, scores),
        metrics.resampled_auroc(targets, scores, counts),
        None if left_out is None else metrics.resampled_auroc(targets, scores, left_out),
    )


class Comparison(NamedTuple):
    """A paired difference of two models, the first minus the second."""

    difference: Interval
    p_value: float
    """See `p_value`; NaN where the difference is undefined."""


def _check_paired(first: Scored, second: Scored) -> None:
    paired = (
        first.metric == second.metric
        and first.resampled.shape == second.resampled.shape
        and np.array_equal(np.isnan(first.resampled), np.isnan(second.resampled))
        and np.array_equal(np.isnan(first.per_class), np.isnan(second.per_class))
    )
    if not paired:
        raise ValueError(
            "the two models were not scored by the same metric on the same targets and resamples"
        )


def compare(
    first: Scored,
    second: Scored,
    undefined: str = "exclude",
    level: float = 0.95,
    kind: str = "percentile",
) -> Comparison:
    """Macro mean of the first model minus the second's, on the same resamples, with its p-value.

    Both must come from the same targets and counts; then the same classes are undefined in both.

    Raises:
        ValueError: other metrics, shapes or undefined classes, so they were not paired; see also `intervals`.
    """
    _check_paired(first, second)
    one, other = first.macros(undefined), second.macros(undefined)
    left_out = None if one[2] is None or other[2] is None else one[2] - other[2]
    resampled = one[1] - other[1]
    return Comparison(interval(one[0] - other[0], resampled, level, kind, left_out), p_value(resampled))


def macro_difference(
    first: Scored, second: Scored, undefined: str = "exclude", level: float = 0.95, kind: str = "percentile"
) -> Interval:
    """The interval of `compare`."""
    return compare(first, second, undefined, level, kind).difference
