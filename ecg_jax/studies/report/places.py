"""Mean places over tasks, with intervals, and their table."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.report.cells import DASH, Cell, Table, interval
from ecg_jax.studies.report.rows import SUPERVISED, TaskScores


class Placed(NamedTuple):
    """The rows of one task by their labels."""

    points: Mapping[str, float]
    resampled: Mapping[str, np.ndarray]
    """float64 [R] each, on the same resamples."""
    lower_is_better: bool
    compared: frozenset[str]
    """Labels of the rows that the baselines stand beside."""


def placed(scores: TaskScores, resampled: Mapping[str, np.ndarray]) -> Placed:
    """The rows of a task.

    Args:
        scores: of the task.
        resampled: label -> float64 [R], its macro score.
    """
    entries = {entry.row.label: entry for entry in scores.entries.values()}
    kinds = [None] if any(row.baseline is None for row in scores.entries) else [SUPERVISED]
    compared = frozenset(label for label, entry in entries.items() if entry.row.baseline in kinds)
    points = {label: entry.point for label, entry in entries.items()}
    return Placed(points, resampled, scores.first.regression, compared)


def mean_places(tasks: Sequence[Placed], level: float) -> dict[str, Interval]:
    """Mean place of each row over tasks, 1 for the best, with its percentile interval, best first.

    On every resample the rows are ordered anew by their scores, ties sharing the mean of their places. Resample r of
    one task stands beside resample r of the others: what was drawn together is counted together. A row that is not in
    every task has no mean place, and takes none from the others.

    Args:
        tasks: at least one.
        level: of the intervals.

    Returns:
        Label -> its mean place; {} where no row but baselines is in every task.
    """
    from scipy.stats import rankdata

    labels = [label for label in tasks[0].resampled if all(label in task.resampled for task in tasks)]
    if not any(label in task.compared for task in tasks for label in labels):
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


def places_table(
    name: str, columns: Mapping[str, Sequence[Placed]], level: float, before: str = "", after: str = ""
) -> Table | None:
    """Rows by their mean places; None where no column has any.

    Args:
        name: of the table.
        columns: what the tasks of a column have in common, "" for nothing -> the tasks, at least two.
        level: of the intervals.
        before, after: sentences around the caption.
    """
    places = {column: mean_places(tasks, level) for column, tasks in columns.items()}
    places = {column: found for column, found in places.items() if found}
    labels = sorted(
        dict.fromkeys(label for found in places.values() for label in found),
        key=lambda label: min(found[label].point for found in places.values() if label in found),
    )
    if not labels:
        return None
    best = {column: min(value.point for value in found.values()) for column, found in places.items()}
    body = [
        [
            Cell(label),
            *(
                interval(*found[label], mark="best" if found[label].point == best[column] else "", digits=1)
                if label in found
                else Cell(DASH, mark="mute")
                for column, found in places.items()
            ),
        ]
        for label in labels
    ]
    return Table(
        name,
        f"{before}Mean place of each row over tasks, with its interval. On each task the best score has place 1, and "
        "the order is made anew on every resample. Tasks with the same test patients share their resamples, of others "
        "patients who are in two count as two. A row that is not in every task of a column has no place in it. Places "
        f"of close rows are uncertain, and their intervals lean to the middle.{after}",
        [
            "row",
            *(f"mean place{column and f', {column}'} ({len(columns[column])} tasks)" for column in places),
        ],
        body,
        1,
    )
