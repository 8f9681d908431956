"""Mean places over tasks, with intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Interval


class Placed(NamedTuple):
    """The rows of one task by their labels."""

    points: Mapping[str, float]
    resampled: Mapping[str, np.ndarray]
    """float64 [R] each, on the same resamples."""
    lower_is_better: bool


def mean_places(tasks: Sequence[Placed], level: float) -> dict[str, Interval]:
    """Mean place of each row over tasks, 1 for the best, with its percentile interval, best first.

    On every resample the rows are ordered anew by their scores, ties sharing the mean of their places; tasks are
    resampled each by itself, so that patients who are in two tasks count as two. A row that is not in every task has no
    mean place, and takes none from the others.

    Args:
        tasks: at least one.
        level: of the intervals.
    """
    from scipy.stats import rankdata

    labels = [label for label in tasks[0].resampled if all(label in task.resampled for task in tasks)]
    if not labels:
        return {}
    R = min(len(task.resampled[labels[0]]) for task in tasks)
    points, resampled = np.zeros(len(labels)), np.zeros((R, len(labels)))
    for task in tasks:
        sign = 1 if task.lower_is_better else -1
        points += rankdata([sign * task.points[label] for label in labels]) / len(tasks)
        values = np.stack([task.resampled[label][:R] for label in labels], axis=1)
        places = rankdata(np.nan_to_num(sign * values), axis=1)
        resampled += np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, places) / len(tasks)
    found = dict(zip(labels, bootstrap.intervals(points, resampled, level), strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1].point))
