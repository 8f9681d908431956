"""What is fitted in a scaling study: for each objective and backbone the losses and errors of its runs over their size.

Errors of different runs are compared on the same test records, and resampled by the same draws of patients: those of
one store are drawn once, over all tasks that are tested on it, as a patient of two tasks is one person.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.scoring import score
from ecg_jax.json_fields import whole, wrong_field
from ecg_jax.studies.report.read import RESULTS
from ecg_jax.studies.report.rows import disagreement
from ecg_jax.studies.scaling_curves import (
    AXES,
    BEST_LOSS,
    ERROR,
    LOSS,
    MEAN,
    Curve,
    axis_of,
    loss_curves,
    populations,
)
from ecg_jax.studies.scaling_families import Family, families, usable
from ecg_jax.studies.study_runs import StudyProbe, StudyRun

__all__ = [
    "AXES", "BEST_LOSS", "ERROR", "LOSS", "MEAN", "Curve", "Family", "axis_of", "error_curves", "families",
    "loss_curves", "populations", "usable",
]  # fmt: skip

#: Mode of a probe without pretraining.
SUPERVISED = "supervised"
_SCORED = {"macro_auroc": "auroc", "mae": "mae"}


@dataclass
class _Task:
    """Probes of one task and mode that were made alike.

    `label` is the task, with the name of the probe where it was probed in several ways; pairs hold the number of the
    family, the run and its probe.
    """

    label: str
    task: str
    mode: str
    pairs: list[tuple[int, StudyRun, StudyProbe]] = field(default_factory=list)

    @property
    def probe(self) -> StudyProbe:
        """One of them."""
        return self.pairs[0][2]


def error_curves(
    found: Sequence[Family],
    *,
    tasks: Sequence[str],
    modes: Sequence[str],
    resamples: int,
    note: Callable[[str], None],
) -> list[Curve]:
    """The downstream errors of every family on every task and mode, and their means over tasks.

    The patients of a test store are drawn once for all runs and tasks. The mean is over the tasks that all families
    with errors of the mode and metric have, real ones if there are any, so that means compare.

    Args:
        found: families.
        tasks, modes: to take; all if empty.
        resamples: R.
        note: hears what is left out, and what of the runs is not known.

    Raises:
        UserError: runs were probed in other ways or tested on other records, or predictions are damaged.
    """
    for run in (run for family in found for run in family.runs):
        for remark in run.remarks:
            note(f"{run.name}: {remark}")
    probed = _tasks(found, tasks, modes, note)
    for each in probed:
        _check_alike(each)
    draws = _draws(probed, resamples)
    own: list[list[Curve]] = [[] for _ in found]
    for each in probed:
        # Those of one task at a time: they are large.
        row_of, counts = draws[each.probe.tested_on]
        drawn = counts[[row_of[unit] for unit in _units(each.probe)]]
        for number, family in enumerate(found):
            pairs = [(run, probe) for i, run, probe in each.pairs if i == number]
            points = [(run, probe, _resampled(probe, drawn)) for run, probe in pairs]
            if curve := _curve(family, each, points, note):
                own[number].append(curve)
    means = _means(found, probed, own, note)
    return [curve for curves, mean in zip(own, means, strict=True) for curve in (*curves, *mean)]


def _tasks(found: Sequence[Family], tasks, modes, note) -> list[_Task]:
    """The probes of last checkpoints by task and mode.

    What a run was probed twice for in one way counts once, the main probe first. Where a run was probed for a task in
    several ways they are parted, for all runs alike, by the name under which each way was seen first.
    """
    kept: dict[tuple[str, str], list[tuple[int, StudyRun, StudyProbe, tuple]]] = {}
    for number, family in enumerate(found):
        for run in family.runs:
            seen: dict[tuple, StudyProbe] = {}
            for probe in run.probes:
                wanted = (not tasks or probe.task in tasks) and (not modes or probe.mode in modes)
                if probe.mode == SUPERVISED or not wanted:
                    continue
                if probe.step != run.step:
                    ends = f"it probed step {probe.step}, and the run ends at {run.step}"
                    note(f"{probe.folder} is left out: {ends}")
                    continue
                way = _way(probe)
                first = seen.setdefault((probe.task, probe.mode, way), probe)
                if first is probe:
                    kept.setdefault((probe.task, probe.mode), []).append((number, run, probe, way))
                else:
                    note(f"{probe.folder} is left out: it is the same probe as {first.folder}")
    made: dict[tuple[str, str], _Task] = {}
    for (task, mode), rows in kept.items():
        several = len({run.name for _, run, _, _ in rows}) < len(rows)
        name_of: dict[tuple, str] = {}
        for number, run, probe, way in rows:
            name = name_of.setdefault(way, probe.name)
            label = f"{task} ({name})" if several else task
            made.setdefault((label, mode), _Task(label, task, mode)).pairs.append((number, run, probe))
    return list(made.values())


def _way(probe: StudyProbe) -> tuple:
    """How a task was probed."""
    if wrong := wrong_field(probe.results["config"], {"seed": whole(0)}, "config."):
        raise UserError(f"{probe.folder / RESULTS} is damaged: {wrong}; run its probe again")
    settings = tuple((name, str(value)) for name, value in sorted(probe.settings.items()))
    return probe.trained_on, probe.tested_on, probe.results["config"]["seed"], settings


def _check_alike(task: _Task) -> None:
    """Refuses runs that were probed in other ways, tested on other records, or scored in another way.

    Runs of one curve are its points, and those of others stand beside it.
    """
    (number, first, probe), *others = task.pairs
    tested, settings = _tested(probe), probe.settings
    of_run = {first.name: probe}
    for other_number, run, other in others:
        there = other.settings
        if of_run.setdefault(run.name, other) is not other:
            raise UserError(
                f"{of_run[run.name].folder} and {other.folder} are two probes of {run.name} for {task.label}, "
                f"{task.mode}, under one name; move one of them away"
            )
        differ = [name for name, value in _tested(other).items() if not _same(value, tested[name])]
        differ += [
            f"{name} ({settings.get(name)} and {there.get(name)})"
            for name in sorted(settings.keys() | there.keys())
            if settings.get(name) != there.get(name)
        ]
        if differ:
            would = "be points of one curve" if number == other_number else "be compared"
            raise UserError(
                f"{probe.folder} and {other.folder} would {would} ({first.name} and {run.name}), but differ in "
                f"{', '.join(differ)}; probe all runs alike, or give only runs or --tasks that were"
            )


def _tested(probe: StudyProbe) -> dict[str, Any]:
    """What two probes were tested on, by what it is called."""
    arrays = probe.predictions("record_id", "patient_id", "targets", "classes")
    return {
        "store": (probe.trained_on, probe.tested_on),
        "test records": arrays["record_id"],
        "patients": arrays["patient_id"],
        "classes": arrays["classes"],
        "labels": arrays["targets"],
        "metric": probe.metric,
        "rule for undefined classes": probe.results["bootstrap"]["undefined"],
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


def _units(probe: StudyProbe) -> list[str]:
    """What is drawn with each test record: its patient, or where that is not known the record."""
    arrays = probe.predictions("record_id", "patient_id")
    pairs = zip(arrays["record_id"].tolist(), arrays["patient_id"].tolist(), strict=True)
    return [f"patient {patient}" if patient else f"record {record}" for record, patient in pairs]


def _draws(tasks: Sequence[_Task], resamples: int) -> dict[str, tuple[dict[str, int], np.ndarray]]:
    """Test store -> unit -> row, and how often each unit is in each resample, uint16 [U, R].

    The units are those of all tasks that are tested on the store, so that tasks have the same draws of a patient.
    """
    units: dict[str, set[str]] = {}
    for task in tasks:
        units.setdefault(task.probe.tested_on, set()).update(_units(task.probe))
    draws = {}
    for store, members in units.items():
        row_of = {unit: row for row, unit in enumerate(sorted(members))}
        seed = int.from_bytes(hashlib.sha256(store.encode()).digest()[:8], "little")
        draws[store] = row_of, bootstrap.draw(np.arange(len(row_of)), resamples, seed=seed)
    return draws


def _resampled(probe: StudyProbe, drawn: np.ndarray) -> np.ndarray:
    """Errors [R] on resamples, from counts [n, R].

    Raises:
        UserError: the predictions do not score what results.json says.
    """
    arrays = probe.predictions("targets", "probabilities")
    scored = (
        bootstrap.bootstrap_auroc(arrays["targets"], arrays["probabilities"], drawn)
        if probe.metric == "macro_auroc"
        else score(_SCORED[probe.metric], arrays["targets"], arrays["probabilities"], drawn)
    )
    computed, macro, _ = scored.macros(probe.results["bootstrap"]["undefined"])
    said = 1 - probe.error if probe.metric == "macro_auroc" else probe.error
    if wrong := disagreement(probe.metric, said, computed):
        raise UserError(f"{probe.folder / RESULTS}: {wrong}; run its `ecg-jax probe` command again")
    return 1 - macro if probe.metric == "macro_auroc" else macro


def _curve(family: Family, task: _Task, points, note) -> Curve | None:
    """The points (run, probe, resampled errors) that have a logarithm."""
    kept = []
    for run, probe, values in points:
        if np.isfinite(probe.error) and probe.error > 0:
            kept.append((run, probe, values))
        else:
            why = f"its error is {probe.error:g}, which has no logarithm"
            note(f"{run.name} is left out of {task.label}, {task.mode}: {why}")
    if not kept:
        return None
    runs, probes, values = zip(*kept, strict=True)
    return Curve(
        family,
        ERROR,
        task.label,
        task.mode,
        task.probe.metric,
        (task.label,),
        runs,
        tuple(str(probe.folder) for probe in probes),
        np.array([probe.error for probe in probes]),
        np.stack(values),
        task.probe.synthetic,
    )


def _means(
    found: Sequence[Family], tasks: Sequence[_Task], own: list[list[Curve]], note
) -> list[list[Curve]]:
    """For every family the means over the tasks of a mode and metric, of the runs that have them all."""
    means: list[list[Curve]] = [[] for _ in found]
    for mode, metric in dict.fromkeys((task.mode, task.probe.metric) for task in tasks):
        where = f"the mean over tasks, {mode}, {metric}"
        of_kind = [task for task in tasks if (task.mode, task.probe.metric) == (mode, metric)]
        labels = _to_average(of_kind, own, where, note)
        if len(labels) < 2:
            if len(of_kind) > 1:
                note(f"there is no {where.removeprefix('the ')}: fewer than two are left")
            continue
        for number, curves in enumerate(own):
            parts = [
                curve for label in labels for curve in curves if (curve.task, curve.mode) == (label, mode)
            ]
            if len(parts) < len(labels):
                continue  # none of these tasks, see `_to_average`
            if mean := _mean(found[number], parts, where, note):
                means[number].append(mean)
    return means


def _to_average(tasks: Sequence[_Task], own: list[list[Curve]], where: str, note) -> list[str]:
    """Labels of the tasks to take the mean over: each task once, real ones if there are any, that all families have."""
    chosen = {task.task: task for task in reversed(tasks)}
    once = [task for task in tasks if chosen[task.task] is task]
    if again := [task.label for task in tasks if task not in once]:
        note(f"{where}, takes each task once, without {', '.join(again)}")
    real = [task for task in once if not task.probe.synthetic]
    if real and len(real) < len(once):
        made_up = [task.label for task in once if task.probe.synthetic]
        note(f"{where}, is over real recordings, without the synthetic ones of {', '.join(made_up)}")
        once = real
    having = {
        task.label: {
            number
            for number, curves in enumerate(own)
            if any((curve.task, curve.mode) == (task.label, task.mode) for curve in curves)
        }
        for task in once
    }
    everyone = set().union(*having.values())
    shared = [label for label, members in having.items() if members == everyone]
    if missing := [label for label in having if label not in shared]:
        note(f"{where}, is without {', '.join(missing)}: not all curves have runs with it")
    return shared


def _mean(family: Family, parts: Sequence[Curve], where: str, note) -> Curve | None:
    names = set.intersection(*({run.name for run in curve.runs} for curve in parts))
    every = {run.name: run for curve in parts for run in curve.runs}
    for name in every:
        if name not in names:
            lacks = [curve.task for curve in parts if name not in {run.name for run in curve.runs}]
            note(f"{name} is left out of {where}: it has no {', '.join(lacks)}")
    if not names:
        return None
    rows = [[i for i, run in enumerate(curve.runs) if run.name in names] for curve in parts]
    runs = tuple(parts[0].runs[i] for i in rows[0])
    sources = [[curve.sources[i] for i in row] for curve, row in zip(parts, rows, strict=True)]
    return Curve(
        family,
        ERROR,
        MEAN,
        parts[0].mode,
        parts[0].metric,
        tuple(curve.task for curve in parts),
        runs,
        tuple(",".join(each) for each in zip(*sources, strict=True)),
        np.mean([curve.values[row] for curve, row in zip(parts, rows, strict=True)], axis=0),
        np.mean([curve.resampled[row] for curve, row in zip(parts, rows, strict=True)], axis=0),
        any(curve.synthetic for curve in parts),
    )
