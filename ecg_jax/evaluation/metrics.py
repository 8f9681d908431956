"""Scores of predictions against targets: AUROC, average precision, mean absolute error.

Every function takes plain arrays: `targets` and `scores` are [n, K] (n records or crops, K classes), targets
are 0, 1 or NaN, and a NaN target leaves that record out of that class only.

AUROC is computed from ranks (the Mann-Whitney statistic, ties count one half), not from a curve:

    AUROC = Σ_{i positive} (#{j negative: s_j < s_i} + ½ #{j negative: s_j = s_i}) / (n_pos n_neg)

so that one sort of the negatives serves any number of resamples, given as how often each record was drawn:
the counts become weights in the sums above. That is what makes the bootstrap of `bootstrap.py` fast.
"""

import numpy as np

# Resamples handled at once: a block of cumulative counts (n_neg x block x 8 bytes) should stay in cache.
_BLOCK = 64


def _as_matrix(targets, scores):
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
    targets = np.asarray(targets, dtype=np.float64)
    return (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)


def has_both_kinds(targets) -> np.ndarray:
    """bool [K]: classes of [n, K] targets with a positive and a negative, which training and AUROC need."""
    n_pos, n_neg = class_counts(targets)
    return (n_pos > 0) & (n_neg > 0)


def _auroc_of_one_class(targets, scores, rows, counts) -> np.ndarray:
    """AUROC of one class under every column of counts.

    Args:
        targets: [m], scores: [m].
        rows: int [m], which row of counts belongs to each entry.
        counts: [n, R] how often each record is drawn in each resample.

    Returns:
        float64 [R], NaN where a resample holds no positive or no negative.
    """
    positive, negative = targets == 1, targets == 0
    pos_scores, pos_rows = scores[positive], rows[positive]
    order = np.argsort(scores[negative], kind="stable")
    neg_scores, neg_rows = scores[negative][order], rows[negative][order]
    below = np.searchsorted(neg_scores, pos_scores, side="left")
    not_above = np.searchsorted(neg_scores, pos_scores, side="right")

    auroc = np.empty(counts.shape[1])
    for start in range(0, counts.shape[1], _BLOCK):
        block = np.ascontiguousarray(counts[:, start : start + _BLOCK], dtype=np.float64)
        # Row j of `cumulative`: drawn negatives among the j lowest scores. Exact, integers below 2^53.
        cumulative = np.zeros((len(neg_rows) + 1, block.shape[1]))
        np.cumsum(block[neg_rows], axis=0, out=cumulative[1:])
        weights = block[pos_rows]
        n_pairs = weights.sum(axis=0) * cumulative[-1]
        won = np.einsum("ir,ir->r", weights, cumulative[below] + cumulative[not_above]) / 2
        with np.errstate(invalid="ignore"):  # 0/0, an undefined class, is NaN and meant to be
            auroc[start : start + _BLOCK] = won / n_pairs
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
    targets, scores = _as_matrix(targets, scores)
    counts = np.asarray(counts)
    rows = np.arange(len(targets))
    columns = [
        _auroc_of_one_class(targets[:, k], scores[:, k], rows, counts) for k in range(targets.shape[1])
    ]
    return np.stack(columns, axis=1) if columns else np.empty((counts.shape[1], 0))


def resampled_micro_auroc(targets, scores, counts) -> np.ndarray:
    """Micro AUROC (all classes pooled into one ranking) for many resamples of the records: float64 [R].

    Arguments and errors as in `resampled_auroc`.
    """
    targets, scores = _as_matrix(targets, scores)
    rows = np.repeat(np.arange(len(targets)), targets.shape[1])
    return _auroc_of_one_class(targets.ravel(), scores.ravel(), rows, np.asarray(counts))


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


def average_precision(targets, scores) -> np.ndarray:
    """Area under the precision-recall curve per class, as average precision Σ (R_t − R_{t−1}) P_t.

    One step per distinct score, so ties are one threshold (as in scikit-learn); no interpolation.

    Returns:
        float64 [K], NaN for a class without positives or without negatives.

    Raises:
        ValueError: as in `resampled_auroc`.
    """
    targets, scores = _as_matrix(targets, scores)
    result = np.full(targets.shape[1], np.nan)
    for k in range(targets.shape[1]):
        known = ~np.isnan(targets[:, k])
        y, s = targets[known, k], scores[known, k]
        if not 0 < y.sum() < len(y):
            continue
        order = np.argsort(-s, kind="stable")
        y, s = y[order], s[order]
        last_of_tie = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)
        true_positives = np.cumsum(y)[last_of_tie]
        precision = true_positives / (last_of_tie + 1)
        recall = true_positives / true_positives[-1]
        result[k] = np.sum(np.diff(recall, prepend=0.0) * precision)
    return result


def mean_absolute_error(targets, predictions) -> tuple[np.ndarray, float]:
    """Mean absolute error of a regression with missing values.

    Args:
        targets: [n, K], NaN where unknown.
        predictions: [n, K].

    Returns:
        (per_target, flattened): float64 [K], the mean over the known records of each target, NaN where none
        is known, and one number over all known entries (so a target counts by how often it is known).

    Raises:
        ValueError: shapes differ.
    """
    targets = np.asarray(targets, dtype=np.float64)
    predictions = np.asarray(predictions, dtype=np.float64)
    if targets.shape != predictions.shape:
        raise ValueError(f"targets {targets.shape} and predictions {predictions.shape} differ in shape")
    known = ~np.isnan(targets)
    error = np.where(known, np.abs(predictions - np.where(known, targets, 0.0)), 0.0)
    with np.errstate(invalid="ignore"):
        return error.sum(axis=0) / known.sum(axis=0), float(error.sum() / known.sum())
