"""Finds finished probes in workdirs, reads them, and refuses what is damaged or does not belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation.tasks import TASKS
from ecg_jax.studies.report.read import PREDICTIONS, RESULTS, read_efficiency, read_result, read_robustness

ROBUSTNESS, EFFICIENCY = "robustness.json", "label_efficiency.json"
#: What a report may be made of beside probes, for messages.
OTHERS = "of a sweep, a pretraining run, or figures"
# Predictions that are the same but for the machine that made them differ by less; those of another training set, or
# of a head with other penalties to choose from, by more.
SAME_PREDICTIONS, _SAME_FEATURES = 1e-6, 1e-3


@dataclass(frozen=True)
class Result:
    """One finished probe of one task."""

    folder: Path
    workdir: Path
    """As given on the command line; `folder` is it or lies in it."""
    model: str
    """Its name in the report: `results["model"]`, with the workdir's name where several share it."""
    results: dict[str, Any]
    predictions: dict[str, np.ndarray]

    @property
    def task(self) -> str:
        return self.results["task"]

    @property
    def mode(self) -> str:
        return self.results["mode"]

    @property
    def kind(self) -> str:
        return self.results["kind"]

    @property
    def regression(self) -> bool:
        return self.kind == "regression"

    @property
    def metric(self) -> str:
        return self.results["metric"]

    @property
    def classes(self) -> list[str]:
        return self.predictions["classes"].tolist()


@dataclass(frozen=True)
class Curves:
    """A robustness.json or label_efficiency.json."""

    path: Path
    model: str
    """The probe's label; "" of label efficiency, which names its models itself."""
    task: str
    content: dict[str, Any]
    names: dict[str, str]
    """Of label efficiency: model in the file -> its name in the report, which no other file's model of the task has."""


@dataclass(frozen=True)
class Collection:
    """All that a report is made of."""

    results: list[Result]
    robustness: list[Curves]
    efficiency: list[Curves]

    def of_task(self, task: str) -> list[Result]:
        """Results of one task, in the order of the workdirs."""
        return [result for result in self.results if result.task == task]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> its tasks, both in the order of the benchmark, then of appearance."""
        known = list(TASKS)
        order = sorted(self.results, key=lambda r: known.index(r.task) if r.task in TASKS else len(known))
        groups: dict[str, list[str]] = {}
        for result in order:
            tasks = groups.setdefault(result.results["group"], [])
            if result.task not in tasks:
                tasks.append(result.task)
        return groups

    @property
    def tasks(self) -> list[str]:
        """Tasks, group by group."""
        return [task for tasks in self.groups.values() for task in tasks]


def load(workdirs: Sequence[str | Path]) -> Collection:
    """Everything that a report can be made of.

    Args:
        workdirs: folders of a probe each, or of one folder for each task.

    Raises:
        UserError: a workdir holds no finished probe, a file is damaged or lacks a field, or probes of a task do not
            belong together; names the file and the field.
    """
    results, robustness, efficiency = [], [], []
    for workdir in map(Path, workdirs):
        folders = _folders(workdir)
        found = 0
        for folder in folders:
            if (folder / RESULTS).is_file():
                contents, predictions = read_result(folder)
                result = Result(folder, workdir, contents["model"], contents, predictions)
                if any(result.folder.resolve() == other.folder.resolve() for other in results):
                    raise UserError(f"{folder} is given twice; name every folder once.")
                results.append(result)
                found += 1
            elif (folder / PREDICTIONS).exists() or folder.name in TASKS:
                raise UserError(
                    f"{folder} is incomplete: it has no {RESULTS}; run its `ecg-jax probe` command again."
                )
            found += read_curves(folder, robustness, efficiency)
        if not found:
            raise UserError(
                f"{workdir} holds no {RESULTS}, nor does a folder in it, and deeper ones are not looked at; give the "
                f"folder of a finished `ecg-jax probe`, or {OTHERS}."
            )
    if not results:
        raise UserError(
            f"None of the folders holds a {RESULTS}; give the folder of a finished `ecg-jax probe`, or {OTHERS}."
        )
    results = _named(results)
    collection = Collection(results, labelled(robustness, results), distinct(efficiency))
    for task in collection.tasks:
        _check_comparable(collection.of_task(task))
    check_intervals(results)
    return collection


def read_curves(folder: Path, robustness: list[Curves], efficiency: list[Curves]) -> int:
    """Adds what a folder holds of robustness and label efficiency, and says how many files that were."""
    found = 0
    for name, read, into in (
        (ROBUSTNESS, read_robustness, robustness),
        (EFFICIENCY, read_efficiency, efficiency),
    ):
        path = folder / name
        if path.is_file():
            content = read(path)
            into.append(Curves(path, "", content["task"], content, {}))
            found += 1
    return found


def _folders(workdir: Path) -> list[Path]:
    """The workdir, the folders in it by name, and where `ecg-jax robustness` writes in those."""
    if not workdir.is_dir():
        raise UserError(
            f"There is no folder {workdir}; give that of a finished `ecg-jax probe`, or {OTHERS}."
        )
    try:
        inside = sorted(path for path in workdir.iterdir() if path.is_dir())
        return [workdir, *inside, *(path / "robustness" for path in inside if (path / "robustness").is_dir())]
    except OSError as error:
        raise UserError(f"Cannot read the folder {workdir}: {error.strerror}.") from error


def _named(results: list[Result]) -> list[Result]:
    """Results whose models have names of their own: the workdir's is added where probes share model, mode and task.

    Raises:
        UserError: two are of the same model, mode and task, and their workdirs have the same name too.
    """

    def clashes(results):
        seen: dict[tuple, Result] = {}
        for result in results:
            other = seen.setdefault((result.model, result.mode, result.task), result)
            if other is not result:
                yield other, result

    shared = {result.model for pair in clashes(results) for result in pair}
    named = [
        replace(result, model=f"{result.model} ({result.workdir.name})") if result.model in shared else result
        for result in results
    ]
    for first, second in clashes(named):
        raise UserError(
            f"{first.folder} and {second.folder} both hold task {first.task} of the model "
            f"{first.results['model']} in mode {first.mode}; give one of them, or rename a folder."
        )
    return named


def labelled(curves: list[Curves], results: list[Result]) -> list[Curves]:
    """Robustness curves with the names of their probes, and of their folders where probes share one."""
    of_folder = {result.folder.resolve(): f"{result.model}, {result.mode}" for result in results}
    labelled, taken = [], set()
    for curve in curves:
        folder, probe = curve.path.parent.resolve(), curve.content["probe"]
        probed = [of_folder[path] for path in (folder, folder.parent) if path in of_folder]
        name = probed[0] if probed else f"{probe['model']}, {probe['mode']}"
        if (curve.task, name) in taken:
            name = f"{name} ({curve.path.parent})"
        taken.add((curve.task, name))
        labelled.append(replace(curve, model=name))
    return labelled


def distinct(curves: list[Curves]) -> list[Curves]:
    """Label efficiency whose models have names of their own within a task: folders are added where files share one."""
    named = []
    for curve in curves:
        others = [other for other in curves if other.task == curve.task and other is not curve]
        shared = {name for other in others for name in other.content["models"]}
        folders = [other.path.parent.name for other in others]
        folder = curve.path.parent if curve.path.parent.name in folders else curve.path.parent.name
        names = {name: f"{name} ({folder})" if name in shared else name for name in curve.content["models"]}
        named.append(replace(curve, names=names))
    return named


def _check_comparable(results: Sequence[Result]) -> None:
    """Refuses results of one task that were not trained and tested alike.

    Raises:
        UserError: another kind, group, store, training, validation or test records, targets, classes, baselines or
            resampling; names two folders.
    """
    first = results[0]
    for other in results[1:]:
        if differ := differing(first, other):
            raise UserError(
                f"{first.folder} and {other.folder} both hold task {first.task}, but differ in "
                f"{', '.join(differ)}, so that they cannot stand in one table; probe them on the same store "
                "with the same config."
            )


def differing(first: Result, other: Result) -> list[str]:
    """Fields in which two results of one task were not trained and tested alike; [] where they can be compared."""
    return [
        what
        for what, same in (
            ("kind", first.kind == other.kind),
            ("group", first.results["group"] == other.results["group"]),
            ("store.fingerprint", _fingerprint(first, "store") == _fingerprint(other, "store")),
            ("test_store", _fingerprint(first, "test_store") == _fingerprint(other, "test_store")),
            ("split.fingerprint", _fingerprint(first, "split") == _fingerprint(other, "split")),
            ("classes", first.classes == other.classes),
            ("record_id", np.array_equal(*(r.predictions["record_id"] for r in (first, other)))),
            ("targets", _equal(first, other, "targets", SAME_PREDICTIONS)),
            ("probabilities_majority", _equal(first, other, "probabilities_majority", SAME_PREDICTIONS)),
            (
                "probabilities_ecg_features",
                _equal(first, other, "probabilities_ecg_features", _SAME_FEATURES),
            ),
            ("bootstrap", first.results["bootstrap"] == other.results["bootstrap"]),
        )
        if not same
    ]


def check_intervals(results: Sequence[Result]) -> None:
    """Refuses tasks whose intervals mean different things, which one table would show alike.

    Raises:
        UserError: another level, kind of interval or rule for undefined classes; names two folders.
    """
    names = ("level", "interval", "undefined")
    for other in results[1:]:
        settings = [result.results["bootstrap"] for result in (results[0], other)]
        if differing := [f"bootstrap.{name}" for name in names if settings[0][name] != settings[1][name]]:
            raise UserError(
                f"{results[0].folder} and {other.folder} differ in {', '.join(differing)}, so that their intervals "
                "cannot stand in one report; probe them with the same config.bootstrap."
            )


def _fingerprint(result: Result, name: str) -> str | None:
    """Of the store, the test store (None where it is the same) or the split."""
    entry = result.results[name]
    return None if entry is None else entry["fingerprint"]


def _equal(first: Result, second: Result, name: str, tolerance: float) -> bool:
    """Whether an array of predictions.npz is the same in both; one that is in neither is."""
    arrays = [r.predictions[name] for r in (first, second) if name in r.predictions]
    if len(arrays) < 2:
        return True
    return arrays[0].shape == arrays[1].shape and np.allclose(*arrays, rtol=0, atol=tolerance, equal_nan=True)
