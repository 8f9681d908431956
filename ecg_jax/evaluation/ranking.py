"""Ranks of models with ties, as the ECG benchmarks give them, and p-values corrected for a whole table.

For one task, models are ordered by their score. The best leads the first group, and every model whose interval of the
paired difference to it contains 0 shares its rank. The best of the others leads the next group, and so on. A group's
rank is 1 + the number of models in better groups (1, 1, 3), so that a model's rank does not depend on how the models
before it tie. Being tied is not transitive: a model may share a rank with the leader of its group and still differ
from another member.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Comparison, Interval, Scored
from ecg_jax.evaluation.scoring import LOWER_IS_BETTER


class Rank(NamedTuple):
    """One model's place in one task."""

    model: str
    rank: int
    """From 1, shared by the models of a group."""
    value: Interval
    """Macro mean of the model's score."""
    leader: str
    """The best model of its group (itself, if it leads)."""
    to_best: Comparison | None
    """This model minus the best of the task; None for the best."""
    p_holm: float | None = None
    """The p-value of `to_best` after `correct`; None before, for the best, and where it is undefined."""


def rank_models(
    scores: Mapping[str, Scored],
    undefined: str = "exclude",
    level: float = 0.95,
    kind: str = "percentile",
) -> list[Rank]:
    """Rank models that were scored by one metric on the same targets and resamples.

    Args:
        scores: by model. Brier score, calibration error and mean absolute error are better when lower.
        undefined: what becomes of undefined classes, as in `Scored.macros`.
        level: of the intervals.
        kind: "percentile" or "bca" intervals, as in `bootstrap.intervals`.

    Returns:
        Best first; of equal scores in the order given.

    Raises:
        ValueError: no models, models that are not paired (see `bootstrap.compare`), or a model whose score is
            undefined.
    """
    if not scores:
        raise ValueError("there are no models to rank")
    values = {model: scored.macro(undefined, level, kind) for model, scored in scores.items()}
    for model, value in values.items():
        if np.isnan(value.point):
            raise ValueError(f"the score of {model} is undefined, so that it has no rank")
    sign = 1 if next(iter(scores.values())).metric in LOWER_IS_BETTER else -1
    order = sorted(scores, key=lambda model: sign * values[model].point)

    def minus(model: str, other: str) -> Comparison:
        return bootstrap.compare(scores[model], scores[other], undefined, level, kind)

    to_best = {model: None if model == order[0] else minus(model, order[0]) for model in order}
    ranks, waiting = [], order
    while waiting:
        leader, place = waiting[0], len(ranks) + 1
        tied = [leader]
        for model in waiting[1:]:
            difference = (to_best[model] if leader == order[0] else minus(model, leader)).difference
            # An undefined interval shows no difference.
            if not (difference.low > 0 or difference.high < 0):
                tied.append(model)
        ranks += [Rank(model, place, values[model], leader, to_best[model]) for model in tied]
        waiting = [model for model in waiting if model not in tied]
    return ranks


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values that control the chance of any false rejection among all M tests (Holm 1979).

    With p sorted ascending, adjusted p_(i) = max_{j ≤ i} min(1, (M − j + 1) p_(j)).

    Args:
        p_values: [M]; NaN (no test) is left out of M and stays NaN.

    Returns:
        float64 [M], in the order given.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    adjusted = np.full(len(p_values), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(factors * p_values[order], 1.0))
    return adjusted


def correct(table: Mapping[str, list[Rank]]) -> dict[str, list[Rank]]:
    """Fill `p_holm`: every comparison to the best model, in all tasks of a table, is one test of `holm`.

    With R resamples p is at least 2 / (R + 1), so that a table of M comparisons can only show a difference at 5 % if
    R ≥ 40 M or so.

    Args:
        table: the ranks of each task, from `rank_models`.
    """
    entries = [
        (task, i, rank.to_best.p_value)
        for task, ranks in table.items()
        for i, rank in enumerate(ranks)
        if rank.to_best is not None
    ]
    corrected = {task: list(ranks) for task, ranks in table.items()}
    for (task, i, _), p in zip(entries, holm([p for _, _, p in entries]), strict=True):
        corrected[task][i] = corrected[task][i]._replace(p_holm=None if np.isnan(p) else float(p))
    return corrected


def mean_ranks(table: Mapping[str, list[Rank]], groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Mean rank of each model over the tasks of each group.

    Args:
        table: the ranks of each task, from `rank_models`.
        groups: the group of each task of the table.

    Returns:
        By group, in the order of their first tasks, the mean rank by model, lowest first. A model that was not scored
        on every task of a group has no mean rank there: it would be one over other tasks.

    Raises:
        ValueError: a task without a group.
    """
    homeless = [task for task in table if task not in groups]
    if homeless:
        raise ValueError(f"no group is given for {', '.join(homeless)}")
    tasks: dict[str, list[str]] = {}
    for task in table:
        tasks.setdefault(groups[task], []).append(task)
    result = {}
    for group, members in tasks.items():
        of_task = [{rank.model: rank.rank for rank in table[task]} for task in members]
        complete = [model for model in of_task[0] if all(model in ranks for ranks in of_task)]
        means = {model: float(np.mean([ranks[model] for ranks in of_task])) for model in complete}
        result[group] = dict(sorted(means.items(), key=lambda item: item[1]))
    return result
