"""Scores of the PhysioNet/CinC Challenges 2020 and 2021 (Perez Alday et al. 2020; Reyna et al. 2021).

A diagnosis said in place of the true one earns a reward w_jk that says how much harm the mistake does. With the true
classes L and the predicted classes P of recording i, as 0/1 vectors over the scored classes,

    s_i(P) = Σ_j Σ_k L_ij w_jk P_ik / max(|L_i ∪ P_i|, 1)
    score  = (Σ_i s_i(P) − Σ_i s_i(N)) / (Σ_i s_i(L) − Σ_i s_i(N)),   N: sinus rhythm, for every recording,

so that 1 is perfect, 0 is what saying sinus rhythm throughout earns, and below 0 is worse than that. Codes that the
organisers score as one diagnosis are one class here: true or predicted if any of them is, its probability their mean.

Our classes are columns named by SNOMED CT codes; columns that are not scored are ignored, and a scored class without
a column counts as never true and never predicted (`align` lists both). An unknown target (NaN), which the Challenges
do not have, takes its class out of that recording's sums and union. Where the perfect and the inactive score are
equal (every recording plain sinus rhythm) the score is undefined: NaN, where the scorer of 2021 says 0.
"""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation.bootstrap import Scored

_TABLES = Path(__file__).parent.parent / "assets" / "challenge"
YEARS = (2020, 2021)
SINUS_RHYTHM = "426783006"
# Scored as one diagnosis in 2020, where the table of weights still has a row for each.
_EQUIVALENT_2020 = (
    ("713427006", "59118001"),  # complete and other right bundle branch block
    ("284470004", "63593006"),  # premature atrial contraction, supraventricular premature beats
    ("427172004", "17338001"),  # premature ventricular contractions, ventricular premature beats
)


class _Table(NamedTuple):
    codes: tuple[tuple[str, ...], ...]
    """The codes of each scored class, S of them."""
    weights: np.ndarray
    """float64 [S, S]."""


@functools.cache
def _table(year: int) -> _Table:
    if year not in YEARS:
        raise ValueError(f"year must be 2020 or 2021, not {year!r}")
    with open(_TABLES / str(year) / "weights.csv", newline="") as file:
        header, *rows = csv.reader(file)
    merged = {code: pair for pair in _EQUIVALENT_2020 for code in pair}
    classes = [merged.get(cell, tuple(cell.split("|"))) for cell in header[1:]]
    first = [i for i, codes in enumerate(classes) if codes not in classes[:i]]
    weights = np.array([[float(cell) for cell in row[1:]] for row in rows])
    return _Table(tuple(classes[i] for i in first), weights[np.ix_(first, first)])


class Alignment(NamedTuple):
    """Which of our columns belongs to which scored class."""

    membership: np.ndarray
    """bool [S, K]: column k is (one of the codes of) scored class s."""
    classes: list[str]
    """Scored classes by their codes, equal ones joined by "|": S names."""
    absent: list[str]
    """Scored classes without a column."""
    unscored: list[str]
    """Our codes that are not scored."""


def scores_any(year: int, codes) -> bool:
    """Whether a Challenge scores any of these SNOMED CT codes."""
    scored = {code for of_class in _table(year).codes for code in of_class}
    return not scored.isdisjoint(str(code) for code in codes)


def align(year: int, codes) -> Alignment:
    """Match our columns with the scored classes of a year.

    Args:
        year: 2020 (24 classes of 27 codes) or 2021 (26 of 30).
        codes: K SNOMED CT codes, as str.

    Raises:
        ValueError: another year, a code that occurs twice, or no scored code.
    """
    codes, table = [str(code) for code in codes], _table(year)
    if len(set(codes)) != len(codes):
        raise ValueError("a code occurs twice")
    membership = np.array([[code in of_class for code in codes] for of_class in table.codes], dtype=bool)
    if not membership.any():
        raise ValueError(
            f"none of the classes is scored by the Challenge of {year}: are they SNOMED CT codes?"
        )
    classes = ["|".join(of_class) for of_class in table.codes]
    absent = [name for name, present in zip(classes, membership.any(axis=1), strict=True) if not present]
    unscored = [code for code, scored in zip(codes, membership.any(axis=0), strict=True) if not scored]
    return Alignment(membership, classes, absent, unscored)


def _merged_targets(alignment: Alignment, targets) -> tuple[np.ndarray, np.ndarray]:
    """Targets and which of them are known over the scored classes: float64 [n, S] of 0 and 1, bool [n, S].

    A merged class is known where one of its codes is true or all are known.
    """
    targets = np.asarray(targets, dtype=np.float64)
    if targets.ndim != 2 or targets.shape[1] != alignment.membership.shape[1]:
        raise ValueError(f"targets {targets.shape} must be [n, {alignment.membership.shape[1]}]")
    if not np.all((targets == 0) | (targets == 1) | np.isnan(targets)):
        raise ValueError("targets must be 0, 1 or NaN (unknown)")
    belongs = alignment.membership.T.astype(np.float64)
    true = (targets == 1) @ belongs > 0
    return true.astype(np.float64), true | (np.isnan(targets) @ belongs == 0)


def _rewards(weights, true, known, predicted) -> np.ndarray:
    """s_i of each recording: [n], from [n, S] of 0 and 1."""
    predicted = predicted * known
    union = np.maximum(true, predicted).sum(axis=1)
    return np.einsum("is,is->i", true @ weights, predicted) / np.maximum(union, 1)


class _Rewards(NamedTuple):
    observed: np.ndarray
    correct: np.ndarray
    inactive: np.ndarray

    def score(self, counts) -> np.ndarray:
        """Score of each resample: [R]."""
        gained, possible = self.observed - self.inactive, self.correct - self.inactive
        # Sums of differences that cancel to rounding are the undefined case.
        total = possible @ counts
        defined = np.abs(total) > 1e-12 * (np.abs(self.correct) @ counts + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(defined, gained @ counts / total, np.nan)


def _all_rewards(year: int, codes, targets, outputs) -> _Rewards:
    alignment, weights = align(year, codes), _table(year).weights
    outputs = np.asarray(outputs)
    if outputs.shape != np.shape(targets) or not np.isin(outputs, (0, 1)).all():
        raise ValueError(f"outputs must be 0 or 1 for each of the targets {np.shape(targets)}")
    true, known = _merged_targets(alignment, targets)
    predicted = (outputs.astype(np.float64) @ alignment.membership.T > 0).astype(np.float64)
    inactive = np.zeros_like(true)
    inactive[:, [SINUS_RHYTHM in of_class for of_class in _table(year).codes]] = 1
    return _Rewards(*(_rewards(weights, true, known, said) for said in (predicted, true, inactive)))


def challenge_score(year: int, codes, targets, outputs) -> float:
    """The Challenge score of 0/1 outputs.

    Args:
        year: 2020 or 2021.
        codes: K SNOMED CT codes, the columns.
        targets: [n, K] of 0, 1, NaN.
        outputs: [n, K] of 0, 1 (or bool).

    Returns:
        The score, at most 1; NaN where it is undefined.

    Raises:
        ValueError: see `align`; shapes differ, or other values.
    """
    rewards = _all_rewards(year, codes, targets, outputs)
    return float(rewards.score(np.ones((len(rewards.observed), 1)))[0])


def bootstrap_challenge_score(year: int, codes, targets, outputs, counts, left_out=None) -> Scored:
    """The Challenge score on the sample and on resamples, as one number (K = 1).

    Args:
        year, codes, targets, outputs: as in `challenge_score`.
        counts: [n, R] from `bootstrap.draw`.
        left_out: [n, U] from `bootstrap.leave_one_out`, for BCa intervals.

    Raises:
        ValueError: as in `challenge_score`.
    """
    rewards = _all_rewards(year, codes, targets, outputs)
    return Scored(
        f"challenge_{year}",
        rewards.score(np.ones((len(rewards.observed), 1))),
        rewards.score(np.asarray(counts, dtype=np.float64))[:, None],
        None if left_out is None else rewards.score(np.asarray(left_out, dtype=np.float64))[:, None],
    )


def _merged_probabilities(alignment: Alignment, probabilities) -> np.ndarray:
    """Mean probability of the codes of each scored class: [n, S], 0 for a class without a column."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] != alignment.membership.shape[1]:
        raise ValueError(f"probabilities {probabilities.shape} must be [n, {alignment.membership.shape[1]}]")
    if np.isnan(probabilities).any():
        raise ValueError("probabilities must not be NaN")
    return probabilities @ alignment.membership.T / np.maximum(alignment.membership.sum(axis=1), 1)


def binarise(year: int, codes, probabilities, thresholds) -> np.ndarray:
    """Outputs of the Challenge: a scored class is predicted where its probability reaches its threshold.

    Args:
        year, codes: as in `challenge_score`.
        probabilities: [n, K]; those of codes scored as one diagnosis are averaged.
        thresholds: [K] from `tune_thresholds`.

    Returns:
        bool [n, K]; columns of one diagnosis agree, columns that are not scored are False.

    Raises:
        ValueError: see `align`; probabilities are not [n, K] or NaN, thresholds are not [K].
    """
    alignment, thresholds = align(year, codes), np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != (alignment.membership.shape[1],):
        raise ValueError(f"thresholds {thresholds.shape} must be [{alignment.membership.shape[1]}]")
    of_column = _merged_probabilities(alignment, probabilities) @ alignment.membership
    return (of_column >= thresholds) & alignment.membership.any(axis=0)


def _best_cut(probability, gain) -> tuple[float, float]:
    """The threshold that collects most gain [n] from recordings whose probability [n] reaches it, and that gain.

    Of equal ones the highest, of all thresholds between two neighbouring probabilities the middle; inf is "never".
    """
    order = np.argsort(-probability, kind="stable")
    ordered = probability[order]
    collected = np.concatenate([[0.0], np.cumsum(gain[order])])
    # A cut may not part equal probabilities.
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
    best = cuts[np.argmax(collected[cuts])]
    if best == 0:
        return np.inf, 0.0
    if best == len(ordered):
        return ordered[-1] / 2, collected[best]
    return (ordered[best - 1] + ordered[best]) / 2, collected[best]


def _ascend(
    weights, true, known, probabilities, thresholds, classes, max_sweeps: int
) -> tuple[np.ndarray, float]:
    """Coordinate ascent of Σ s_i from the given thresholds [S]: (thresholds, Σ s_i)."""
    thresholds, value_of = thresholds.copy(), true @ weights * known
    predicted = (probabilities >= thresholds) * known.astype(np.float64)
    reward, union = (value_of * predicted).sum(axis=1), np.maximum(true, predicted).sum(axis=1)
    for _ in range(max_sweeps):
        improved = False
        for k in classes:
            without = reward - value_of[:, k] * predicted[:, k]
            union_without = union - predicted[:, k] * (1 - true[:, k])
            union_with = union_without + known[:, k] * (1 - true[:, k])
            gain = (without + value_of[:, k]) / np.maximum(union_with, 1) - without / np.maximum(
                union_without, 1
            )
            gain = np.where(known[:, k], gain, 0.0)
            threshold, best = _best_cut(probabilities[:, k], gain)
            # Rounding must not pass for progress, or equal settings would follow each other for ever.
            if best <= gain @ predicted[:, k] + 1e-9:
                continue
            improved, thresholds[k] = True, threshold
            predicted[:, k] = (probabilities[:, k] >= threshold) & known[:, k]
            reward = without + value_of[:, k] * predicted[:, k]
            union = union_without + predicted[:, k] * (1 - true[:, k])
        if not improved:
            break
    return thresholds, float((reward / np.maximum(union, 1)).sum())


def tune_thresholds(year: int, codes, targets, probabilities, max_sweeps: int = 50) -> np.ndarray:
    """Thresholds per class that maximise the Challenge score on the given recordings: give it validation, never test.

    Coordinate ascent: with all other classes fixed, what each recording gains from predicting one class does not
    depend on the threshold, so that its best threshold is the best prefix of the recordings sorted by probability,
    found exactly. Sweeps over the classes end when none improves. Deterministic; it starts once from predicting
    nothing and once from predicting every class as often as it is true, and keeps the better end.

    Args:
        year, codes: as in `challenge_score`.
        targets: [n, K] of 0, 1, NaN.
        probabilities: [n, K].
        max_sweeps: at most so many.

    Returns:
        float64 [K] for `binarise`: columns of one diagnosis share a threshold; inf for a class that is better never
        predicted, and for columns that are not scored.

    Raises:
        ValueError: as in `challenge_score`.
    """
    alignment, weights = align(year, codes), _table(year).weights
    true, known = _merged_targets(alignment, targets)
    merged = _merged_probabilities(alignment, probabilities)
    if len(merged) != len(true):
        raise ValueError(
            f"targets {np.shape(targets)} and probabilities {np.shape(probabilities)} differ in shape"
        )
    classes = np.flatnonzero(alignment.membership.any(axis=1))
    never = np.full(len(weights), np.inf)
    as_common = never.copy()
    for k in classes:
        n_true = int(true[:, k].sum())
        if n_true:
            as_common[k] = np.sort(merged[known[:, k], k])[-n_true]
    ends = [_ascend(weights, true, known, merged, start, classes, max_sweeps) for start in (never, as_common)]
    best = max(ends, key=lambda end: end[1])[0]
    result = np.full(alignment.membership.shape[1], np.inf)
    for k in classes:
        result[alignment.membership[k]] = best[k]
    return result
