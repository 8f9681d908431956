"""What is fitted in a scaling study: for each objective and backbone the losses and errors of its runs over their size.

Runs belong to one curve if they differ in nothing but the seed and the recordings. A field of the config that differs
between runs of the same size parts curves (an ablation); one that only moves with the size stays in the curve and is
named, since its effect cannot be told from that of the size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.scoring import score
from ecg_jax.run_setup import flatten
from ecg_jax.studies.power_law import rungs_of
from ecg_jax.studies.study_runs import StudyProbe, StudyRun

#: Axis -> what it is called, with its unit.
AXES = {
    "recordings": "pretraining recordings",
    "windows": "training windows",
    "flops": "training compute (FLOP, by formula)",
    "device_hours": "device-hours of pretraining",
}
LOSS, BEST_LOSS, ERROR = "loss", "best_loss", "error"
#: Task of a curve that is the mean over tasks.
MEAN = "mean"
# What makes no other run, or leads to what is compared itself: the recordings.
_IGNORED = {
    "seed", "store", "selection_fingerprint", "targets_fingerprint", "data.rung", "data.max_records",
    "data.selection", "log_every", "checkpoint_every", "keep_latest", "keep_best", "tensorboard", "stall_timeout_s",
    "data.read_threads", "data.prefetch", "model.conv", "model.remat", "stop_on_collapse",
}  # fmt: skip
#: Mode of a probe without pretraining.
SUPERVISED = "supervised"
_PATHS = (
    "init.checkpoint",
    "data.targets",
)  # folders, another one for each run: whether there is one matters
# What an input is: losses and test records of runs that differ in it are not of one curve.
_INPUT = ("data.window_s", "data.rate_hz", "data.normalisation", "data.leads")
_SCORED = {"macro_auroc": "auroc", "mae": "mae"}


@dataclass(frozen=True)
class Family:
    """Runs that differ in their seed and their recordings.

    Attributes:
        label: objective, backbone, and the settings in which it differs from other families of the two.
        settings: those.
        runs: by size, then seed.
        moving: fields that change with the size.
    """

    label: str
    objective: str
    backbone: str
    settings: dict[str, Any]
    runs: tuple[StudyRun, ...]
    moving: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """One quantity of a family.

    Attributes:
        family: its runs, of which the curve has those below.
        quantity: "loss" (validation, the last one), "best_loss" (the lowest), or "error" (1 - macro AUROC, or MAE).
        task, mode, metric: of errors, "" of losses; task "mean" is the mean over `tasks`.
        tasks: that it is made of.
        runs: P of them.
        sources: [P], the folder that each value was read from; several separated by commas.
        values: float64 [P], positive.
        resampled: float64 [P, R], errors on R resamples of the patients, the same for all runs; None of losses.
    """

    family: Family
    quantity: str
    task: str
    mode: str
    metric: str
    tasks: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    sources: tuple[str, ...]
    values: np.ndarray
    resampled: np.ndarray | None

    @property
    def recordings(self) -> np.ndarray:
        """float64 [P]."""
        return np.array([run.recordings for run in self.runs], float)

    @property
    def rungs(self) -> np.ndarray:
        """int [P], 0 for the smallest size."""
        return rungs_of(self.recordings)

    @property
    def n_rungs(self) -> int:
        """Of different sizes."""
        return int(self.rungs.max()) + 1


def axis_of(run: StudyRun, axis: str) -> float | None:
    """Where a run lies on an axis; None where it is not known."""
    return {
        "recordings": run.recordings,
        "windows": run.windows,
        "flops": run.train_flops,
        "device_hours": run.device_hours,
    }[axis]


def usable(runs: Sequence[StudyRun]) -> tuple[list[StudyRun], dict[str, str]]:
    """Finished runs of which the size is known; and name -> why not, of the others."""
    chosen, left_out = [], {}
    for run in runs:
        if not run.finished:
            left_out[run.name] = run.state
        elif run.recordings is None:
            left_out[run.name] = "it has no selection.json, so its number of recordings is not known"
        else:
            chosen.append(run)
    return chosen, left_out


def families(runs: Sequence[StudyRun]) -> list[Family]:
    """Groups runs, in the order of their first ones.

    Args:
        runs: from `usable`.

    Raises:
        UserError: the input of runs moves with their size, or two runs are the same; names them.
    """
    kinds: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        kinds.setdefault((run.objective, run.backbone), []).append(run)
    return [
        family for (objective, backbone), own in kinds.items() for family in _parted(objective, backbone, own)
    ]


def _fields(run: StudyRun) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in flatten(run.config).items()
        if name not in _IGNORED and not name.startswith(("monitor.", "origin"))
    }
    return fields | {name: bool(fields.get(name)) for name in _PATHS}


def _parted(objective: str, backbone: str, runs: list[StudyRun]) -> list[Family]:
    """Runs of one objective and backbone, parted by what differs at one size."""
    fields = [_fields(run) for run in runs]
    rungs = rungs_of([run.recordings for run in runs])
    names = list(dict.fromkeys(name for each in fields for name in each))
    values = {name: [_hashable(each.get(name)) for each in fields] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    parting: list[str] = []
    partitions: list[list[int]] = []
    for name in differing:
        if len(set(zip(rungs, values[name], strict=True))) == len(set(rungs)):
            continue  # one value for each size: it moves with the size
        order = list(dict.fromkeys(values[name]))
        partition = [order.index(value) for value in values[name]]
        if partition not in partitions:  # fields that go together part once
            parting.append(name)
            partitions.append(partition)
    found: dict[tuple, list[int]] = {}
    for i in range(len(runs)):
        found.setdefault(tuple(values[name][i] for name in parting), []).append(i)
    made = []
    for members in found.values():
        own = sorted((runs[i] for i in members), key=lambda run: (run.recordings, run.seed))
        settings = {name: fields[members[0]].get(name) for name in parting}
        moving = [name for name in differing if len({values[name][i] for i in members}) > 1]
        _check(own, moving)
        shown = [f"{name.split('.')[-1]}={_shown(name, value, own[0])}" for name, value in settings.items()]
        label = ", ".join([f"{objective} {backbone}", *shown])
        made.append(Family(label, objective, backbone, settings, tuple(own), tuple(moving)))
    return made


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(name: str, value: Any, run: StudyRun) -> str:
    if name == "store_fingerprint":
        return "+".join(path.rstrip("/").split("/")[-1] for path in run.config["store"].split(","))
    return str(value)


def _check(runs: list[StudyRun], moving: Sequence[str]) -> None:
    for name in _INPUT:
        if name in moving:
            first, other = next(
                (runs[0], run)
                for run in runs
                if flatten(run.config).get(name) != flatten(runs[0].config).get(name)
            )
            raise UserError(
                f"the runs {first.name} and {other.name} would be points of one curve, but differ in {name} "
                f"({flatten(first.config).get(name)} and {flatten(other.config).get(name)}), so that losses and test "
                "records are not the same; give --runs of one input only"
            )
    seen: dict[tuple[int, int | None], StudyRun] = {}
    for rung, run in zip(rungs_of([run.recordings for run in runs]), runs, strict=True):
        twin = seen.setdefault((int(rung), run.seed), run)
        if twin is not run:
            raise UserError(
                f"the runs {twin.name} and {run.name} have the same settings, size and seed, so that one of them would "
                "count twice; give --runs with one of them"
            )


def loss_curves(found: Sequence[Family], quantity: str, note: Callable[[str], None]) -> list[Curve]:
    """The validation losses of every family; what is left out is noted."""
    curves = []
    for family in found:
        runs, values = [], []
        for run in family.runs:
            value = run.val_loss if quantity == LOSS else run.best_val_loss
            if value is None or not value > 0 or not np.isfinite(value):
                note(f"{run.name} is left out of the losses: its validation loss is {value}")
                continue
            runs.append(run)
            values.append(value)
        if runs:
            sources = tuple(str(run.folder) for run in runs)
            curves.append(
                Curve(family, quantity, "", "", "", (), tuple(runs), sources, np.array(values), None)
            )
    return curves


def error_curves(
    found: Sequence[Family],
    *,
    tasks: Sequence[str],
    modes: Sequence[str],
    resamples: int,
    note: Callable[[str], None],
) -> list[Curve]:
    """The downstream errors of every family on every task and mode, and their means over tasks.

    The patients of the test records are drawn once for all runs of a task.

    Args:
        found: families.
        tasks, modes: to take; all if empty.
        resamples: R.
        note: hears what is left out.

    Raises:
        UserError: runs of a curve were tested on other records, or predictions are damaged.
    """
    drawn: dict[bytes, np.ndarray] = {}
    curves = []
    for family in found:
        by_task: dict[tuple[str, str], list[tuple[StudyRun, StudyProbe]]] = {}
        for run in family.runs:
            for key, probe in _probes(run, tasks, modes, note).items():
                by_task.setdefault(key, []).append((run, probe))
        own = []
        for (task, mode), pairs in by_task.items():
            _check_tested(pairs)
            points = [(run, probe, _resampled(probe, resamples, drawn)) for run, probe in pairs]
            kept = []
            for run, probe, values in points:
                if np.isfinite(probe.error) and probe.error > 0:
                    kept.append((run, probe, values))
                else:
                    why = f"its error is {probe.error:g}, which has no logarithm"
                    note(f"{run.name} is left out of {task}, {mode}: {why}")
            if kept:
                runs, probes, values = zip(*kept, strict=True)
                own.append(
                    Curve(
                        family,
                        ERROR,
                        task,
                        mode,
                        probes[0].metric,
                        (task,),
                        runs,
                        tuple(str(probe.folder) for probe in probes),
                        np.array([probe.error for probe in probes]),
                        np.stack(values),
                    )
                )
        curves += own + _means(family, own)
    return curves


def _probes(run: StudyRun, tasks, modes, note) -> dict[tuple[str, str], StudyProbe]:
    """(task, mode) -> the probe of the last checkpoint; the task with the probe's name where there are several."""
    chosen: dict[tuple[str, str], list[StudyProbe]] = {}
    for probe in run.probes:
        wanted = (not tasks or probe.task in tasks) and (not modes or probe.mode in modes)
        if probe.mode == SUPERVISED or not wanted:
            continue
        if probe.step != run.step:
            note(f"{probe.folder} is left out: it probed step {probe.step}, and the run ends at {run.step}")
            continue
        chosen.setdefault((probe.task, probe.mode), []).append(probe)
    return {
        (task if len(probes) == 1 else f"{task} ({probe.name})", mode): probe
        for (task, mode), probes in chosen.items()
        for probe in probes
    }


def _check_tested(pairs: Sequence[tuple[StudyRun, StudyProbe]]) -> None:
    """Refuses runs of a curve that were tested on other records, or scored in another way."""
    (first, probe), *others = pairs
    records = probe.predictions()["record_id"]
    for run, other in others:
        differ = [
            what
            for what, same in (
                ("store", other.tested_on == probe.tested_on),
                ("test records", np.array_equal(other.predictions()["record_id"], records)),
                ("classes", np.array_equal(other.predictions()["classes"], probe.predictions()["classes"])),
                ("metric", other.metric == probe.metric),
                (
                    "rule for undefined classes",
                    other.results["bootstrap"]["undefined"] == probe.results["bootstrap"]["undefined"],
                ),
            )
            if not same
        ]
        if differ:
            raise UserError(
                f"{probe.folder} and {other.folder} would be points of one curve ({first.name} and {run.name}), but "
                f"differ in {', '.join(differ)}; probe all runs alike, or name one of their --tasks"
            )


def _resampled(probe: StudyProbe, resamples: int, drawn: dict[bytes, np.ndarray]) -> np.ndarray:
    """Errors [R] on resamples of the patients, the same for all probes of the same records."""
    arrays = probe.predictions()
    patients = arrays["patient_id"]
    key = b"\n".join([arrays["record_id"].tobytes(), patients.tobytes()])
    if key not in drawn:
        codes, _ = bootstrap.units(patients.tolist(), len(patients))
        drawn[key] = bootstrap.draw(codes, resamples, seed=0)
    targets, predicted = arrays["targets"], arrays["probabilities"]
    scored = (
        bootstrap.bootstrap_auroc(targets, predicted, drawn[key])
        if probe.metric == "macro_auroc"
        else score(_SCORED[probe.metric], targets, predicted, drawn[key])
    )
    _, macro, _ = scored.macros(probe.results["bootstrap"]["undefined"])
    return 1 - macro if probe.metric == "macro_auroc" else macro


def _means(family: Family, curves: Sequence[Curve]) -> list[Curve]:
    """Means over the tasks of one mode and metric, of the runs that have them all."""
    means = []
    for mode, metric in dict.fromkeys((curve.mode, curve.metric) for curve in curves):
        own = [curve for curve in curves if (curve.mode, curve.metric) == (mode, metric)]
        if len(own) < 2:
            continue
        names = set.intersection(*({run.name for run in curve.runs} for curve in own))
        if not names:
            continue
        rows = [[i for i, run in enumerate(curve.runs) if run.name in names] for curve in own]
        runs = tuple(own[0].runs[i] for i in rows[0])
        means.append(
            Curve(
                family,
                ERROR,
                MEAN,
                mode,
                metric,
                tuple(curve.task for curve in own),
                runs,
                tuple(
                    ",".join(curve.sources[row[i]] for curve, row in zip(own, rows, strict=True))
                    for i in range(len(runs))
                ),
                np.mean([curve.values[row] for curve, row in zip(own, rows, strict=True)], axis=0),
                np.mean([curve.resampled[row] for curve, row in zip(own, rows, strict=True)], axis=0),
            )
        )
    return means


def populations(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    """Sentences on what else differs between the sizes of a curve: validation recordings, stores, made-up ones."""
    said = []
    if len({run.fingerprints["validation"] for run in runs}) > 1:
        said.append(
            "the held-out recordings that losses are measured on are not the same at every size, so that a difference "
            "of populations is part of the exponent of the loss"
        )
    if len({run.fingerprints["store"] for run in runs}) > 1:
        said.append("the stores are not the same at every size: populations and sizes differ together")
    if any(run.synthetic for run in runs):
        said.append("recordings are SYNTHETIC: the numbers test the machinery and say nothing about ECGs")
    return tuple(said)
