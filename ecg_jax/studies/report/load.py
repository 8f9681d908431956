"""Finds finished probes in workdirs, reads them, and refuses what is damaged or does not belong together."""

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation.tasks import TASKS

RESULTS, PREDICTIONS = "results.json", "predictions.npz"
ROBUSTNESS, EFFICIENCY = "robustness.json", "label_efficiency.json"
MODES = ("linear", "frozen", "finetune", "supervised")

_NUMBER, _TEXT, _DICT, _LIST, _WHOLE = (int, float, type(None)), str, dict, list, int
_INTERVAL = {"ci_low": _NUMBER, "ci_high": _NUMBER}
_FIELDS: dict[str, Any] = {
    "task": _TEXT, "group": _TEXT, "kind": _TEXT, "metric": _TEXT, "mode": _TEXT, "model": _TEXT,
    **_INTERVAL, "metrics": _DICT, "per_class": _DICT, "n_records": _WHOLE, "n_patients": (int, type(None)),
    "baselines": _DICT, "layers": (dict, type(None)), "leakage": (dict, type(None)), "classes_dropped": _DICT,
    "classes_undefined_in_test": _LIST, "split": _DICT, "records_excluded": _DICT, "bootstrap": _DICT,
    "checkpoint": (dict, type(None)), "store": _DICT, "seed": _WHOLE, "versions": _DICT, "date": _TEXT,
}  # fmt: skip
_BOOTSTRAP = {"unit": _TEXT, "resamples": _WHOLE, "level": float, "undefined": _TEXT, "interval": _TEXT}
_STORE = {"path": _TEXT, "corpus": _TEXT, "fingerprint": _TEXT}
_CLASS = {"ci_low": _NUMBER, "ci_high": _NUMBER, "description": _TEXT}
_OF_KIND = {
    "regression": {"mae": _NUMBER, "r2": _NUMBER, "n": _WHOLE},
    "multilabel": {"auroc": _NUMBER, "average_precision": _NUMBER, "brier": _NUMBER, "ece": _NUMBER,
                   "n_pos": _WHOLE, "n_neg": _WHOLE},
}  # fmt: skip
_OF_KIND["binary"] = _OF_KIND["multilabel"]
_TRIPLE = {"point": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_ARRAYS = ("record_id", "patient_id", "row", "targets", "probabilities", "classes")


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
            result = None
            if (folder / RESULTS).is_file():
                result = _read_result(folder, workdir)
                if any(result.folder.resolve() == other.folder.resolve() for other in results):
                    raise UserError(f"{folder} is given twice; name every folder once.")
                results.append(result)
                found += 1
            elif (folder / PREDICTIONS).exists() or folder.name in TASKS:
                raise UserError(
                    f"{folder} is incomplete: it has no {RESULTS}; run its `ecg-jax probe` command again."
                )
            for name, read, into in (
                (ROBUSTNESS, _check_robustness, robustness),
                (EFFICIENCY, _check_efficiency, efficiency),
            ):
                path = folder / name
                if path.is_file():
                    content = _read_json(path)
                    read(path, content)
                    into.append(Curves(path, "", content["task"], content))
                    found += 1
        if not found:
            raise UserError(
                f"{workdir} holds no {RESULTS}, nor does a folder in it; give the --workdir of a finished "
                "`ecg-jax probe`."
            )
    if not results:
        raise UserError(
            f"None of the folders holds a {RESULTS}; give the --workdir of a finished `ecg-jax probe`."
        )
    results = _named(results)
    collection = Collection(results, _labelled(robustness, results), efficiency)
    for task in collection.tasks:
        _check_comparable(collection.of_task(task))
    return collection


def _folders(workdir: Path) -> list[Path]:
    """The workdir, the folders in it by name, and where `ecg-jax robustness` writes in those."""
    if not workdir.is_dir():
        raise UserError(f"There is no folder {workdir}; give the --workdir of a finished `ecg-jax probe`.")
    try:
        inside = sorted(path for path in workdir.iterdir() if path.is_dir())
        return [workdir, *inside, *(path / "robustness" for path in inside if (path / "robustness").is_dir())]
    except OSError as error:
        raise UserError(f"Cannot read the folder {workdir}: {error.strerror}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); write it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; write it again.")
    return content


def _check_fields(path: Path, entry: Any, fields: dict[str, Any], where: str = "") -> None:
    """Raises UserError naming the first field that is missing or of another type."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: the field {where or 'of the file'} is not an object; was the file edited?")
    prefix = f"{where}." if where else ""
    for name, kind in fields.items():
        if name not in entry:
            raise UserError(
                f"{path} lacks the field {prefix}{name}; write it again with this version of ecg_jax."
            )
        value = entry[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{path}: the field {prefix}{name} is {value!r}, which it cannot be; was it edited?"
            )


def _read_result(folder: Path, workdir: Path) -> Result:
    path = folder / RESULTS
    results = _read_json(path)
    _check_fields(path, results, _FIELDS)
    for name, known in (("mode", MODES), ("kind", tuple(_OF_KIND)), ("metric", ("macro_auroc", "mae"))):
        if results[name] not in known:
            raise UserError(f"{path}: the field {name} is {results[name]!r}, not one of {', '.join(known)}.")
    metric = results["metric"]
    if metric != ("mae" if results["kind"] == "regression" else "macro_auroc"):
        raise UserError(f"{path}: the fields kind and metric do not fit ({results['kind']}, {metric}).")
    _check_fields(path, results, {metric: (int, float)})
    _check_fields(path, results["bootstrap"], _BOOTSTRAP, "bootstrap")
    _check_fields(path, results["store"], _STORE, "store")
    if results["leakage"] is not None:
        _check_leakage(path, results["leakage"])
    for name, entry in results["metrics"].items():
        _check_fields(path, entry, _TRIPLE, f"metrics.{name}")
    for name, entry in results["per_class"].items():
        _check_fields(path, entry, _CLASS | _OF_KIND[results["kind"]], f"per_class.{name}")
    for name, entry in results["baselines"].items():
        if entry is not None:
            _check_fields(path, entry, {metric: (int, float), **_INTERVAL}, f"baselines.{name}")
    if results["layers"] is not None:
        _check_fields(path, results["layers"], {"chosen": _TEXT, "validation": _DICT}, "layers")
    predictions = _read_predictions(folder / PREDICTIONS, results)
    return Result(folder, workdir, results["model"], results, predictions)


def _check_leakage(path: Path, verdict: dict[str, Any]) -> None:
    count = (int, type(None))
    fields = {"verdict": _TEXT, "near_identical_train_test": count, "pretraining": (dict, type(None))}
    _check_fields(path, verdict, fields, "leakage")
    if "clean" not in verdict or not isinstance(verdict["clean"], bool):
        raise UserError(f"{path}: the field leakage.clean must be true or false; probe again.")
    if verdict["pretraining"] is not None:
        _check_fields(path, verdict["pretraining"], {"near_identical_test": count}, "leakage.pretraining")


def _read_predictions(path: Path, results: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of predictions.npz, checked against each other and against results.json."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} is incomplete: it has no {path.name}; run its `ecg-jax probe` command again."
        )
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except OSError as error:
        raise UserError(
            f"{path} is damaged and cannot be read; run its `ecg-jax probe` command again."
        ) from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); run its `ecg-jax probe` command again.") from error
    for name in _ARRAYS:
        if name not in arrays:
            raise UserError(f"{path} lacks the array {name}; run its `ecg-jax probe` command again.")
    n, K = results["n_records"], len(results["per_class"])
    shapes = dict.fromkeys(arrays, (n, K)) | dict.fromkeys(("record_id", "patient_id", "row"), (n,))
    shapes["classes"] = (K,)
    for name, array in arrays.items():
        if name.startswith("val_"):
            continue
        expected = shapes[name]
        if array.shape != expected and not (name.endswith("_seeds") and array.shape[1:] == expected):
            raise UserError(
                f"{path} does not belong to {RESULTS}: its array {name} is {list(array.shape)}, not "
                f"{list(expected)}; run the `ecg-jax probe` command again."
            )
        if name.startswith("probabilities") and not np.isfinite(array).all():
            raise UserError(f"{path}: the array {name} holds values that are not finite; probe again.")
    if arrays["classes"].tolist() != list(results["per_class"]):
        raise UserError(
            f"{path} does not belong to {RESULTS}: its array classes differs from the field per_class; run the "
            "`ecg-jax probe` command again."
        )
    return arrays


def _check_robustness(path: Path, content: dict[str, Any]) -> None:
    _check_fields(path, content, {"task": _TEXT, "metric": _TEXT, "clean": _DICT, "families": _LIST})
    _check_fields(path, content, {"probe": _DICT})
    _check_fields(path, content["probe"], {"model": _TEXT, "mode": _TEXT}, "probe")
    _check_fields(path, content["clean"], _TRIPLE, "clean")
    for i, family in enumerate(content["families"]):
        where = f"families[{i}]"
        _check_fields(path, family, {"family": _TEXT, "unit": (str, type(None)), "conditions": _LIST}, where)
        for j, condition in enumerate(family["conditions"]):
            inner = f"{where}.conditions[{j}]"
            _check_fields(
                path, condition, {"label": _TEXT, "value": _NUMBER, **_TRIPLE, "difference": _DICT}, inner
            )
            _check_fields(path, condition["difference"], _TRIPLE, f"{inner}.difference")


def _check_efficiency(path: Path, content: dict[str, Any]) -> None:
    _check_fields(
        path, content, {"task": _TEXT, "metric": _TEXT, "sizes": _LIST, "models": _DICT, "saving": _DICT}
    )
    for name, model in content["models"].items():
        _check_fields(path, model, {"scores": _LIST, "fit": (dict, type(None))}, f"models.{name}")
        if len(model["scores"]) != len(content["sizes"]):
            raise UserError(
                f"{path}: models.{name}.scores has not one entry for each of sizes; write it again."
            )
        if model["fit"] is not None:
            _check_fields(path, model["fit"], {k: _NUMBER for k in ("C", "a", "L0")}, f"models.{name}.fit")
    for name, others in content["saving"].items():
        for other, entry in others.items() if isinstance(others, dict) else ():
            if "undefined" not in entry:
                _check_fields(path, entry, {"by_size": _LIST}, f"saving.{name}.{other}")


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


def _labelled(curves: list[Curves], results: list[Result]) -> list[Curves]:
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


def _check_comparable(results: Sequence[Result]) -> None:
    """Refuses results of one task that were not trained and tested alike.

    Raises:
        UserError: another kind, group, store, training or test records, targets, classes or resampling; names two
            folders.
    """
    first = results[0]
    for other in results[1:]:
        differing = [
            what
            for what, same in (
                ("kind", first.kind == other.kind),
                ("group", first.results["group"] == other.results["group"]),
                ("store.fingerprint", _fingerprint(first) == _fingerprint(other)),
                ("classes", first.classes == other.classes),
                ("record_id", np.array_equal(*(r.predictions["record_id"] for r in (first, other)))),
                ("targets", _equal(first, other, "targets")),
                ("probabilities_majority", _equal(first, other, "probabilities_majority")),
                ("bootstrap", first.results["bootstrap"] == other.results["bootstrap"]),
            )
            if not same
        ]
        if differing:
            raise UserError(
                f"{first.folder} and {other.folder} both hold task {first.task}, but differ in "
                f"{', '.join(differing)}, so that they cannot stand in one table; probe them on the same store "
                "with the same config."
            )


def _fingerprint(result: Result) -> str:
    return result.results["store"]["fingerprint"]


def _equal(first: Result, second: Result, name: str) -> bool:
    """Whether an array of predictions.npz is the same in both; one that is in neither is."""
    arrays = [r.predictions[name] for r in (first, second) if name in r.predictions]
    if len(arrays) < 2:
        return True
    return arrays[0].shape == arrays[1].shape and np.allclose(*arrays, rtol=0, atol=1e-6, equal_nan=True)
