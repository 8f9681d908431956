"""Downstream error over what a pretrained encoder cost: parameters, operations, speed, device-hours.

A point is a family of runs at one size (objective, backbone, what else differs, and the recordings), the mean over its
seeds. It lies on the front of a cost if no other point of the same task and mode has both a smaller error and a smaller
cost, one of them strictly; since errors are estimates, the front is also taken on every resample of the test patients
(the same for all points), and the share of resamples in which a point lies on it is said.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap
from ecg_jax.run_setup import flatten
from ecg_jax.studies import flops
from ecg_jax.studies.efficiency_plots import LOOKS
from ecg_jax.studies.efficiency_programs import encoder_parameters
from ecg_jax.studies.error_cost_plot import draw_error_cost
from ecg_jax.studies.figure_folder import Figure
from ecg_jax.studies.scaling_points import MEAN, Curve, error_curves, families, usable
from ecg_jax.studies.study_runs import StudyRun, find_runs

RESAMPLES = 1000
#: More tasks than this are drawn as their mean only; all are in the table.
MOST_TASKS = 6
_MOST_NAMED = 3  # in a title

#: Cost -> what it is called on an axis, and whether less of it is better.
COSTS = {
    "parameters": ("parameters of the encoder", True),
    "flops_per_window": ("encoder forward, FLOP a window", True),
    "train_flops": ("training, FLOP in total", True),
    "windows_per_s": ("training windows a second, in the run", False),
    "device_hours": ("device-hours of pretraining", True),
}


@dataclass(frozen=True)
class Point:
    """Runs of one family and size on one task.

    Attributes:
        label: of the family.
        objective, backbone: of the runs.
        recordings: that each was pretrained on, the mean where seeds differ by a few.
        runs: names, a run for each seed.
        error, low, high: mean over seeds with its 95 % interval over patients, and over seeds where there are several.
        resampled: float64 [R], the mean over seeds on every resample of the patients.
        costs: means over seeds by the names of `COSTS`; None where a run does not know.
        begun, killed: how many of the runs begin with another run's parameters, or had an attempt without a measured
            end; see `costs_of`.
        devices: kinds that the runs were made on.
    """

    label: str
    objective: str
    backbone: str
    recordings: int
    runs: tuple[str, ...]
    error: float
    low: float
    high: float
    resampled: np.ndarray
    costs: dict[str, float | None]
    begun: int
    killed: int
    devices: tuple[str, ...]


def costs_of(run: StudyRun) -> dict[str, float | None]:
    """What a run's encoder costs to use, and what the run cost; None where it is not known.

    Windows a second are all windows of the run over all its seconds, with start, compilation and validation; they and
    device-hours are not known of a run with an attempt that was killed. A run that begins with another's parameters has
    no training cost here: what those cost would belong to it.
    """
    window = {name: run.config["data"][name] for name in ("window_s", "rate_hz")}
    config = {"model": run.config["model"], "data": window}
    parameters, forward = _of_encoder(json.dumps(config, sort_keys=True))
    whole = not _begins_with_another(run)
    return {
        "parameters": parameters,
        "flops_per_window": forward,
        "train_flops": run.train_flops if whole else None,
        "windows_per_s": run.windows_per_s,
        "device_hours": run.device_hours if whole else None,
    }


def _begins_with_another(run: StudyRun) -> bool:
    return bool(flatten(run.config).get("init.checkpoint"))


@functools.cache
def _of_encoder(config: str) -> tuple[int | None, int | None]:
    """Parameters and operations; None for a config from before a field that they depend on."""
    fields = ConfigDict(json.loads(config))
    try:
        return encoder_parameters(fields), flops.encoder_cost(fields).forward
    except (ValueError, KeyError, AttributeError, TypeError):
        return None, None


def points_of(curve: Curve) -> list[Point]:
    """A point for each size of a curve; the numbers of recordings of its seeds may differ by a few."""
    points = []
    for rung in range(curve.n_rungs):
        chosen = np.flatnonzero(curve.rungs == rung)
        runs = [curve.runs[i] for i in chosen]
        values, resampled = curve.values[chosen], curve.resampled[chosen]
        deviations = bootstrap.seed_deviations(values, resampled.shape[1], np.random.default_rng(0))
        interval = bootstrap.hierarchical_interval(values, resampled, deviations)
        each = [costs_of(run) for run in runs]
        points.append(
            Point(
                curve.family.label,
                curve.family.objective,
                curve.family.backbone,
                round(np.mean([run.recordings for run in runs])),
                tuple(run.name for run in runs),
                *interval,
                resampled.mean(axis=0),
                {name: _mean([costs[name] for costs in each]) for name in COSTS},
                sum(map(_begins_with_another, runs)),
                sum(run.unmeasured > 0 for run in runs),
                tuple(sorted({run.device_kind for run in runs if run.device_kind})),
            )
        )
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def on_front(costs: np.ndarray, errors: np.ndarray, *, less: bool) -> np.ndarray:
    """Which points no other dominates.

    Args:
        costs: [P].
        errors: [P, R], each column on its own.
        less: whether a smaller cost is the better one.

    Returns:
        bool [P, R]. Points that are equal in both do not dominate each other; an undefined error is on no front.
    """
    costs = np.asarray(costs, float) * (1 if less else -1)
    errors = np.asarray(errors, float)
    front = ~np.isnan(errors)
    for p in range(len(costs)):
        no_worse = (costs[:, None] <= costs[p]) & (errors <= errors[p])
        better = (costs[:, None] < costs[p]) | (errors < errors[p])
        front[p] &= ~(no_worse & better).any(axis=0)
    return front


def fronts(points: Sequence[Point]) -> dict[str, dict[int, tuple[bool, float]]]:
    """Cost -> number of a point -> whether it lies on the front, and the share of resamples in which it does. Points
    whose cost is not known are left out.
    """
    found = {}
    for name, (_, less) in COSTS.items():
        known = [i for i, point in enumerate(points) if point.costs[name] is not None]
        if not known:
            found[name] = {}
            continue
        costs = np.array([points[i].costs[name] for i in known])
        now = on_front(costs, np.array([[points[i].error] for i in known]), less=less)[:, 0]
        share = on_front(costs, np.stack([points[i].resampled for i in known]), less=less).mean(axis=1)
        found[name] = {i: (bool(n), float(s)) for i, n, s in zip(known, now, share, strict=True)}
    return found


def error_cost_figures(
    folders: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> tuple[list[Figure], list[str]]:
    """A figure for each task and mode with points, and the folders of the runs in them.

    Args:
        folders: see `study_runs.find_runs`.
        say: hears which runs are left out.

    Raises:
        UserError: no finished run in the folders was probed, runs were probed in other ways or tested on other records
            (see `error_curves`), or a file of one is damaged.
    """
    runs, left_out = usable(find_runs(folders))
    for name, why in left_out.items():
        say(f"{name} is left out: {why}")
    curves = error_curves(families(runs), tasks=(), modes=(), resamples=RESAMPLES, note=say)
    if not curves:
        raise UserError(
            f"--results={','.join(folders)}: no finished pretraining run there has a probe of its last step; "
            "probe one, or leave --results out"
        )
    by_task: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in curves:
        by_task.setdefault((curve.task, curve.mode, curve.metric), []).append(curve)
    tasks = {task for task, _, _ in by_task if task != MEAN}
    figures = [
        _figure(of_task, picture=len(tasks) <= MOST_TASKS or task == MEAN)
        for (task, _, _), of_task in by_task.items()
    ]
    return figures, list(dict.fromkeys(str(run.folder) for curve in curves for run in curve.runs))


def _figure(curves: Sequence[Curve], *, picture: bool) -> Figure:
    """Of the curves of one task, mode and metric, which were tested on the same records; a mean is over `tasks`."""
    task, mode, metric, tasks = (getattr(curves[0], name) for name in ("task", "mode", "metric", "tasks"))
    points = [point for curve in curves for point in points_of(curve)]
    found = fronts(points)
    error = "1 - macro AUROC" if metric == "macro_auroc" else "mean absolute error"
    named = ", ".join(tasks)
    several = named if len(tasks) <= _MOST_NAMED else f"{len(tasks)} tasks"
    where = f"the mean over {several}, {mode}" if task == MEAN else f"{task}, {mode}"
    return Figure(
        "error_cost_" + re.sub(r"[^a-z0-9]+", "_", f"{task}_{mode}_{metric}".lower()).strip("_"),
        f"Error against cost: {where}",
        (f"The mean over {named}. " if task == MEAN else "") + _shows(points, found, error),
        _does_not_show(points),
        (
            "family", "objective", "backbone", "recordings", "seeds", "runs", "error", "error_low", "error_high",
            *COSTS, *(f"front_{name}" for name in COSTS), *(f"front_share_{name}" for name in COSTS), "devices",
        ),
        [
            (
                p.label, p.objective, p.backbone, p.recordings, len(p.runs), " ".join(p.runs), p.error, p.low, p.high,
                *p.costs.values(),
                *(found[name][i][0] if i in found[name] else None for name in COSTS),
                *(found[name][i][1] if i in found[name] else None for name in COSTS),
                ", ".join(p.devices),
            )
            for i, p in enumerate(points)
        ],
        draw_error_cost(points, found, COSTS, error, where) if picture else None,
    )  # fmt: skip


def _shows(points: Sequence[Point], found, error: str) -> str:
    named = {
        "parameters": "parameters",
        "flops_per_window": "operations of the encoder's forward pass for a window",
        "train_flops": "operations of training",
        "windows_per_s": "windows a second in the run",
        "device_hours": "device-hours",
    }
    said = []
    for name, front in found.items():
        members = [(points[i], share) for i, (on, share) in front.items() if on]
        if members:
            listed = ", ".join(
                f"{LOOKS[p.backbone][2]} {p.objective} ({p.recordings} recordings, in {share:.0%} of resamples)"
                for p, share in members[:4]
            )
            more = f" and {len(members) - 4} more" if len(members) > 4 else ""
            said.append(f"over {named[name]} {listed}{more}")
    missing = [named[name] for name, front in found.items() if len(front) < len(points)]
    seeds = sorted({len(p.runs) for p in points})
    over = f"{seeds[0]} seeds" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]} seeds"
    over = "one seed" if seeds[-1] == 1 else f"the mean over {over}"
    return (
        f"{error} with 95 % intervals over what it costs, {len(points)} points; each is {over} at one size "
        "(a larger mark for more recordings). Ringed are the points that no other beats in both: "
        f"{'; '.join(said)}. The share is how often a point is there when the test patients are drawn again, the same "
        "draws for all points."
        + (f" Not known of every run: {', '.join(missing)}." if missing else "")
        + _unpriced(points)
    )


def _unpriced(points: Sequence[Point]) -> str:
    """Which runs have no training cost, and why."""
    all_runs = sum(len(p.runs) for p in points)
    begun, killed = sum(p.begun for p in points), sum(p.killed for p in points)
    text = ""
    if begun:
        text += (
            f" {begun} of {all_runs} runs begin with another run's parameters, whose cost would belong to theirs: they "
            "are not in the panels of operations of training and device-hours, and their recordings are those of the "
            "second run alone."
        )
    if killed:
        text += (
            f" {killed} of {all_runs} runs had an attempt that was killed, whose time is not known: they are not in "
            "the panels of windows a second and device-hours."
        )
    return text


def _does_not_show(points: Sequence[Point]) -> str:
    devices = sorted({device for p in points for device in p.devices})
    single = any(len(p.runs) == 1 for p in points)
    text = (
        "Points differ in more than the cost on the axis, so that a smaller error beside a larger cost is no effect of "
        "the cost. Where intervals overlap, which of two points is on the front is not settled. Operations are counted "
        "by formula without FFTs. Windows a second and device-hours hold start, compilation and validation, which "
        "dominate short runs"
    )
    text += (
        f"; the runs were made on {', '.join(devices)}, and these two costs compare only on one kind of device."
        if len(devices) > 1
        else ", and are of the device that the runs had, not of the one that the other figures were measured on."
    )
    if single:
        text += " Points of a single seed have intervals over patients alone: another seed may lie outside of them."
    return text
