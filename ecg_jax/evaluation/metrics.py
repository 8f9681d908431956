"""Scores of predictions against targets: AUROC, average precision, Fmax, mean absolute error, R².

Every function takes plain arrays: `targets` and `scores` are [n, K] (n records or crops, K classes), targets of a
classification are 0, 1 or NaN, and a NaN target leaves that record out of that class only. Brier score and
calibration error are in `calibration.py`.

Each `resampled_...` takes `counts` [n, R], how often each record is drawn in each of R resamples: counts become
weights in the sums below, so that a record is ranked, binned or compared once for any number of resamples. That is
what makes the bootstrap of `bootstrap.py` fast. AUROC is computed from ranks (the Mann-Whitney statistic, ties count
one half), not from a curve:

    AUROC = Σ_{i positive} (#{j negative: s_j < s_i} + ½ #{j negative: s_j = s_i}) / (n_pos n_neg)
"""

import numpy as np

# Resamples handled at once: bounds the memory of running sums over records [n, block].
_BLOCK = 512
# Numbers of one array [steps, resamples]: with fewer steps than 8192 a block of resamples stays whole.
_STEPS_AT_ONCE = 1 << 22
_COUNTED_AT_ONCE = 1 << 16

#: Thresholds of Fmax, as in the protein function challenges it comes from: 0, 0.01, ..., 1.
FMAX_THRESHOLDS = np.arange(101) / 100


def as_matrices(targets, scores) -> tuple[np.ndarray, np.ndarray]:
    """Targets and scores as float64 [n, K]; a vector counts as one class.

    Raises:
        ValueError: shapes differ, a target is not 0, 1 or NaN, or a score is NaN.
    """
    targets = np.asarray(targets, dtype=np.float64)
    scores = np.asarray(scores, dtype=np.float64)
    if targets.ndim == 1:
        targets, scores = targets[:, None], np.atleast_2d(scores.T).T
    if targets.shape != scores.shape or targets.ndim != 2:
        raise ValueError(f"targets {targets.shape} and scores {scores.shape} must both be [n, K]")
    if not np.all((targets == 0) | (targets == 1) | np.isnan(targets)):
        raise ValueError("targets must be 0, 1 or NaN (unknown)")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    return targets, scores


def class_counts(targets) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives per class of [n, K] targets, NaN ignored: (n_pos [K], n_neg [K])."""
    targets = np.asarray(targets)
    n_pos, n_neg = (np.zeros(targets.shape[1:], dtype=np.int64) for _ in range(2))
    # In blocks and without a cast: targets of a thousand classes may fill much of the memory.
    for first in range(0, len(targets), _COUNTED_AT_ONCE):
        block = targets[first : first + _COUNTED_AT_ONCE]
        n_pos += (block == 1).sum(axis=0)
        n_neg += (block == 0).sum(axis=0)
    return n_pos, n_neg


def has_both_kinds(targets) -> np.ndarray:
    """bool [K]: classes of [n, K] targets with a positive and a negative, which training and AUROC need."""
    n_pos, n_neg = class_counts(targets)
    return (n_pos > 0) & (n_neg > 0)


def count_blocks(counts, n: int, per_record: int = 1) -> list[tuple[slice, np.ndarray]]:
    """Counts [n, R] in blocks of resamples as (which resamples, [n, at most _BLOCK]).

    float32 where every sum of counts and half counts is exact in it, also if each record is counted `per_record` times,
    else float64.

    Raises:
        ValueError: counts are not [n, R].
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or len(counts) != n:
        raise ValueError(f"counts {counts.shape} must be [{n}, R]")
    most = 2**23 // max(per_record, 1)  # float32 holds halves exactly up to here
    exact = counts.dtype.kind in "bui" and counts.sum(axis=0, dtype=np.int64).max(initial=0) < most
    dtype = np.float32 if exact else np.float64
    starts = range(0, counts.shape[1], _BLOCK)
    return [
        (slice(s, s + _BLOCK), np.ascontiguousarray(counts[:, s : s + _BLOCK], dtype=dtype)) for s in starts
    ]


def _narrower(blocks, n_steps: int):
    """Blocks of `count_blocks` with so few resamples each that [n_steps, resamples] stays small."""
    width = max(1, _STEPS_AT_ONCE // n_steps)
    for where, block in blocks:
        for first in range(0, block.shape[1], width):
            some = block[:, first : first + width]
            yield slice(where.start + first, where.start + first + some.shape[1]), some


def _sums(step, rows, n_steps: int, n: int, weight=1.0):
    """Sparse [n_steps, n] that adds `weight` times record `rows[j]` to step `step[j]`."""
    from scipy.sparse import csr_array

    # 1 and ½ are exact in float32, and a product with float64 counts is float64.
    data = np.broadcast_to(np.float32(weight), len(rows))
    return csr_array((data, (step, rows)), shape=(n_steps, n))


def _auroc_of_one_class(targets, scores, rows, blocks, n_resamples: int) -> np.ndarray:
    """AUROC of one class under every column of counts.

    Args:
        targets: [m], scores: [m].
        rows: int [m], which row of counts belongs to each entry.
        blocks: counts [n, R] from `count_blocks`.
        n_resamples: R.

    Returns:
        float64 [R], NaN where a resample holds no positive or no negative.
    """
    positive, negative = targets == 1, targets == 0
    if positive.sum() > negative.sum():
        # The mirror image has the same AUROC, and the work below grows with the number of positives.
        positive, negative, scores = negative, positive, -scores
    auroc = np.full(n_resamples, np.nan)
    if not positive.any() or not negative.any():
        return auroc
    n = len(blocks[0][1]) if blocks else 0
    # Steps are the distinct scores of positives, ascending. A negative counts from the first step above it on; one
    # that ties with a step counts half there and fully from the next on.
    steps, step_of_positive = np.unique(scores[positive], return_inverse=True)
    neg_rows = rows[negative]
    below = np.searchsorted(steps, scores[negative], side="left")
    above = np.searchsorted(steps, scores[negative], side="right")
    n_steps = len(steps) + 1  # the last one lies above all positives
    positives = _sums(step_of_positive, rows[positive], n_steps, n)
    negatives = _sums(below, neg_rows, n_steps, n, 0.5) + _sums(above, neg_rows, n_steps, n, 0.5)
    for where, block in _narrower(blocks, n_steps):
        drawn = (positives @ block).astype(np.float64)
        beaten = np.cumsum(negatives @ block, axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # 0/0, an undefined class, is NaN and meant to be
            auroc[where] = np.einsum("er,er->r", drawn, beaten) / (drawn.sum(axis=0) * beaten[-1])
    return auroc


def resampled_auroc(targets, scores, counts) -> np.ndarray:
    """AUROC per class for many resamples of the records at once.

    Args:
        targets: [n, K] of 0, 1, NaN.
        scores: [n, K], any monotone scale.
        counts: [n, R], how often each record is drawn in each resample (any non-negative weights do).

    Returns:
        float64 [R, K], NaN where a class has no positive or no negative among the drawn records.

    Raises:
        ValueError: shapes differ, targets other than 0, 1, NaN, or NaN scores.
    """
    targets, scores = as_matrices(targets, scores)
    blocks, rows = count_blocks(counts, len(targets)), np.arange(len(targets))
    result = np.empty((np.shape(counts)[1], targets.shape[1]))
    for k in range(targets.shape[1]):
        result[:, k] = _auroc_of_one_class(targets[:, k], scores[:, k], rows, blocks, len(result))
    return result


def resampled_micro_auroc(targets, scores, counts) -> np.ndarray:
    """Micro AUROC (all classes pooled into one ranking) for many resamples of the records: float64 [R].

    Arguments and errors as in `resampled_auroc`.
    """
    targets, scores = as_matrices(targets, scores)
    rows = np.repeat(np.arange(len(targets)), targets.shape[1])
    blocks = count_blocks(counts, *targets.shape)
    return _auroc_of_one_class(targets.ravel(), scores.ravel(), rows, blocks, np.shape(counts)[1])


def auroc(targets, scores) -> np.ndarray:
    """AUROC per class: float64 [K], NaN for a class without positives or without negatives.

    Arguments and errors as in `resampled_auroc`.
    """
    return resampled_auroc(targets, scores, np.ones((len(targets), 1)))[0]


def micro_auroc(targets, scores) -> float:
    """AUROC over all non-NaN (record, class) entries pooled; NaN if they are all of one kind."""
    return float(resampled_micro_auroc(targets, scores, np.ones((len(targets), 1)))[0])


def macro(per_class, undefined: str = "exclude"):
    """Unweighted mean over the last axis, the classes.

    Args:
        per_class: [..., K], NaN for undefined classes.
        undefined: "exclude" leaves undefined classes out of the mean; "half" counts them 0.5, as the
            reference implementation does (which drags macro AUROC and its bootstrap intervals towards 0.5).

    Returns:
        float64 [...]; NaN where no class is defined under "exclude".

    Raises:
        ValueError: another value of `undefined`.
    """
    per_class = np.asarray(per_class, dtype=np.float64)
    defined = ~np.isnan(per_class)
    if undefined == "half":
        return np.where(defined, per_class, 0.5).mean(axis=-1)
    if undefined == "exclude":
        with np.errstate(invalid="ignore"):
            return np.where(defined, per_class, 0.0).sum(axis=-1) / defined.sum(axis=-1)
    raise ValueError(f'undefined must be "exclude" or "half", not {undefined!r}')


def macro_auroc(targets, scores, undefined: str = "exclude") -> float:
    """Macro AUROC of [n, K] targets and scores; see `auroc` and `macro`."""
    return float(macro(auroc(targets, scores), undefined))


def resampled_average_precision(targets, scores, counts) -> np.ndarray:
    """Average precision Σ (R_t − R_{t−1}) P_t per class, the area under the precision-recall curve.

    One step per distinct score, so ties are one threshold (as in scikit-learn); no interpolation.

    Returns:
        float64 [R, K], NaN where a class has no positive or no negative among the drawn records.

    Raises:
        ValueError: as in `resampled_auroc`, whose arguments these are.
    """
    targets, scores = as_matrices(targets, scores)
    n, n_classes = targets.shape
    blocks = count_blocks(counts, n)
    result = np.full((np.shape(counts)[1], n_classes), np.nan)
    for k in range(n_classes):
        pos_rows, neg_rows = np.flatnonzero(targets[:, k] == 1), np.flatnonzero(targets[:, k] == 0)
        if not len(pos_rows) or not len(neg_rows):
            continue
        # Recall rises only at scores of positives: they are the steps, descending. A negative counts from the first
        # step that is not above it.
        steps, step_of_positive = np.unique(-scores[pos_rows, k], return_inverse=True)
        n_steps = len(steps) + 1
        step_of_negative = np.searchsorted(steps, -scores[neg_rows, k], side="left")
        positives = _sums(step_of_positive, pos_rows, n_steps, n)
        negatives = _sums(step_of_negative, neg_rows, n_steps, n)
        for where, block in _narrower(blocks, n_steps):
            drawn = (positives @ block).astype(np.float64)
            true = np.cumsum(drawn, axis=0)
            false = np.cumsum(negatives @ block, axis=0, dtype=np.float64)
            with np.errstate(invalid="ignore"):
                precision = np.where(drawn > 0, true / (true + false), 0.0)
                value = np.einsum("er,er->r", drawn, precision) / true[-1]
            result[where, k] = np.where(false[-1] > 0, value, np.nan)
    return result


def average_precision(targets, scores) -> np.ndarray:
    """Average precision per class: float64 [K], NaN for a class without positives or without negatives.

    Definition and errors as in `resampled_average_precision`.
    """
    return resampled_average_precision(targets, scores, np.ones((len(targets), 1)))[0]


def resampled_fmax(targets, probabilities, counts) -> np.ndarray:
    """Fmax, the sample-centric score of the PTB-XL benchmark (Strodthoff et al. 2021, after Radivojac et al. 2013).

    At a threshold τ a record's predicted classes are those with probability ≥ τ. Precision P(τ) is the mean, over
    records with at least one predicted class, of the share of predicted classes that are true; recall R(τ) the mean,
    over records with at least one true class, of the share of true classes that are predicted; and

        Fmax = max_τ 2 P(τ) R(τ) / (P(τ) + R(τ)),   τ in `FMAX_THRESHOLDS`.

    A class whose target is NaN is left out of both shares of that record. The maximum is taken anew in each resample.

    Returns:
        float64 [R], NaN where no drawn record has a true class.

    Raises:
        ValueError: as in `resampled_auroc`.
    """
    targets, scores = as_matrices(targets, probabilities)
    blocks, n, T = count_blocks(counts, len(targets)), len(targets), len(FMAX_THRESHOLDS)
    passed = np.searchsorted(FMAX_THRESHOLDS, scores, side="right")  # thresholds that are not above the score

    def predicted(entries) -> np.ndarray:
        """How many of the entries [n, K] of each record pass each threshold: [n, T]."""
        record, k = np.nonzero(entries)
        passing = np.bincount(record * (T + 1) + passed[record, k], minlength=n * (T + 1)).reshape(n, T + 1)
        return np.cumsum(passing[:, ::-1], axis=1)[:, -2::-1]

    n_true, n_predicted = (targets == 1).sum(axis=1), predicted(~np.isnan(targets))
    hits = predicted(targets == 1)
    precision = (hits / np.maximum(n_predicted, 1)).T
    recall = (hits / np.maximum(n_true, 1)[:, None]).T
    predicts = (n_predicted > 0).astype(np.float64).T
    result = np.empty(np.shape(counts)[1])
    for where, block in blocks:
        block = block.astype(np.float64)
        n_positive = (n_true > 0).astype(np.float64) @ block
        with np.errstate(invalid="ignore"):
            P, R = precision @ block / (predicts @ block), recall @ block / n_positive
            F = 2 * P * R / (P + R)
        # No prediction at all, or none of them right: F is 0, not undefined.
        result[where] = np.where(n_positive > 0, np.nan_to_num(F).max(axis=0), np.nan)
    return result


def fmax(targets, probabilities) -> float:
    """Fmax of [n, K]; see `resampled_fmax`."""
    return float(resampled_fmax(targets, probabilities, np.ones((len(targets), 1)))[0])


def _regression(targets, predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets with 0 where unknown, predictions, and which targets are known, all [n, K].

    Raises:
        ValueError: shapes differ or a prediction is NaN.
    """
    targets = np.asarray(targets, dtype=np.float64)
    predictions = np.asarray(predictions, dtype=np.float64)
    if targets.shape != predictions.shape or targets.ndim != 2:
        raise ValueError(f"targets {targets.shape} and predictions {predictions.shape} must both be [n, K]")
    if np.isnan(predictions).any():
        raise ValueError("predictions must not be NaN")
    known = ~np.isnan(targets)
    return np.where(known, targets, 0.0), predictions, known


def weighted_means(values, known, counts) -> np.ndarray:
    """Mean of values [n, K] over the drawn records where known: float64 [R, K], NaN where none is drawn."""
    values, known = np.where(known, values, 0.0).T, np.asarray(known, dtype=np.float64).T
    result = np.empty((np.shape(counts)[1], len(values)))
    for where, block in count_blocks(counts, values.shape[1]):
        block = block.astype(np.float64)
        with np.errstate(invalid="ignore"):
            result[where] = (values @ block / (known @ block)).T
    return result


def resampled_mae(targets, predictions, counts) -> np.ndarray:
    """Mean absolute error per target for many resamples.

    Args:
        targets: [n, K], NaN where unknown.
        predictions: [n, K].
        counts: [n, R], how often each record is drawn in each resample.

    Returns:
        float64 [R, K], NaN where no drawn record of a target is known.

    Raises:
        ValueError: shapes differ or a prediction is NaN.
    """
    targets, predictions, known = _regression(targets, predictions)
    return weighted_means(np.abs(predictions - targets), known, counts)


def resampled_r2(targets, predictions, counts) -> np.ndarray:
    """Coefficient of determination per target, 1 − Σ (y − ŷ)² / Σ (y − ȳ)², ȳ the mean of the drawn records.

    Returns:
        float64 [R, K], NaN where the drawn and known values of a target are all equal or there are none.

    Raises:
        ValueError: as in `resampled_mae`, whose arguments these are.
    """
    targets, predictions, known = _regression(targets, predictions)
    # Centred first, so that Σ w y² − (Σ w y)² / Σ w loses no digits to a mean far from 0.
    centre = targets.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    y = np.where(known, targets - centre, 0.0)
    residual = weighted_means((targets - predictions) ** 2, known, counts)
    second = weighted_means(y**2, known, counts)
    variance = second - weighted_means(y, known, counts) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 1e-12 * second, 1 - residual / variance, np.nan)


def mean_absolute_error(targets, predictions) -> tuple[np.ndarray, float]:
    """Mean absolute error of a regression with missing values.

    Args:
        targets: [n, K], NaN where unknown.
        predictions: [n, K].

    Returns:
        (per_target, flattened): float64 [K], the mean over the known records of each target, NaN where none
        is known, and one number over all known entries (so a target counts by how often it is known).

    Raises:
        ValueError: shapes differ or a prediction is NaN.
    """
    targets, predictions, known = _regression(targets, predictions)
    error = np.where(known, np.abs(predictions - targets), 0.0)
    with np.errstate(invalid="ignore"):
        return error.sum(axis=0) / known.sum(axis=0), float(error.sum() / known.sum())


def r2(targets, predictions) -> np.ndarray:
    """Coefficient of determination per target: float64 [K]; see `resampled_r2`."""
    return resampled_r2(targets, predictions, np.ones((len(targets), 1)))[0]
