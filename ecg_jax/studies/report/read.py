"""Reads the files that a report is made of, and refuses what is damaged, of another version or edited."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.files import read_object

RESULTS, PREDICTIONS = "results.json", "predictions.npz"
MODES = ("linear", "frozen", "finetune", "supervised")
METRICS = ("macro_auroc", "mae")
#: Unit of resampling, as `bootstrap.units` calls it -> what is resampled.
UNITS = {
    "patient": "resampled patients",
    "record": "resampled records, as no patient is known",
    "patient where known, else record": "resampled patients, and records whose patient is not known",
}

_NUMBER, _TEXT, _DICT, _LIST, _WHOLE = (int, float, type(None)), str, dict, list, int
_INTERVAL = {"ci_low": _NUMBER, "ci_high": _NUMBER}
_FIELDS: dict[str, Any] = {
    "task": _TEXT, "group": _TEXT, "kind": _TEXT, "metric": _TEXT, "mode": _TEXT, "model": _TEXT,
    **_INTERVAL, "metrics": _DICT, "per_class": _DICT, "n_records": _WHOLE, "n_patients": (int, type(None)),
    "baselines": _DICT, "layers": (dict, type(None)), "leakage": (dict, type(None)), "classes_dropped": _DICT,
    "classes_undefined_in_test": _LIST, "split": _DICT, "records_excluded": _DICT, "bootstrap": _DICT,
    "checkpoint": (dict, type(None)), "store": _DICT, "test_store": (dict, type(None)), "seed": _WHOLE,
    "versions": _DICT, "date": _TEXT,
}  # fmt: skip
_FINGERPRINT = {"fingerprint": _TEXT}
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
# Names of an interval's ends, where an entry has all of them.
_ENDS = {("ci_low", "ci_high"): _INTERVAL, ("low", "high"): _TRIPLE}
# Array -> kinds of its dtype; the others are predictions.
_ARRAYS = {
    "record_id": "U", "patient_id": "U", "row": "iu", "targets": "fiub", "probabilities": "f", "classes": "U"
}  # fmt: skip


def check_fields(path: Path, entry: Any, fields: dict[str, Any], where: str = "") -> None:
    """Raises UserError naming the first field that is missing, of another type, not finite, or half an interval."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: the field {where or 'of the file'} is not an object; was the file edited?")
    prefix = f"{where}." if where else ""
    for name, kind in fields.items():
        if name not in entry:
            raise UserError(
                f"{path} lacks the field {prefix}{name}; write it again with this version of ecg_jax."
            )
        value = entry[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(
                f"{path}: the field {prefix}{name} is {value!r}, which it cannot be; was it edited?"
            )
    for names, both in _ENDS.items():
        if both.keys() <= fields.keys():
            # A point may lie outside: intervals are of resamples.
            low, high = (entry[name] for name in names)
            if (low is None) != (high is None) or (low is not None and low > high):
                named = " and ".join(f"{prefix}{name}" for name in names)
                raise UserError(
                    f"{path}: the fields {named} are {low} and {high}, which is no interval; was it edited?"
                )


def read_result(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What results.json and predictions.npz of a finished probe hold.

    Raises:
        UserError: names the file and the field.
    """
    path = folder / RESULTS
    results = read_object(path)
    check_fields(path, results, _FIELDS)
    for name, known in (("mode", MODES), ("kind", tuple(_OF_KIND)), ("metric", METRICS)):
        _check_known(path, name, results[name], known)
    metric = results["metric"]
    if metric != ("mae" if results["kind"] == "regression" else "macro_auroc"):
        raise UserError(f"{path}: the fields kind and metric do not fit ({results['kind']}, {metric}).")
    check_fields(path, results, {metric: (int, float)})
    check_fields(path, results["bootstrap"], _BOOTSTRAP, "bootstrap")
    _check_known(path, "bootstrap.unit", results["bootstrap"]["unit"], tuple(UNITS))
    check_fields(path, results["store"], _STORE, "store")
    if results["test_store"] is not None:
        check_fields(path, results["test_store"], _STORE, "test_store")
    check_fields(path, results["split"], _FINGERPRINT, "split")
    if results["leakage"] is not None:
        _check_leakage(path, results["leakage"])
    for name, entry in results["metrics"].items():
        check_fields(path, entry, _TRIPLE, f"metrics.{name}")
    for name, entry in results["per_class"].items():
        check_fields(path, entry, _CLASS | _OF_KIND[results["kind"]], f"per_class.{name}")
    for name, entry in results["baselines"].items():
        if entry is not None:
            check_fields(path, entry, {metric: (int, float), **_INTERVAL}, f"baselines.{name}")
        if name == "random_init" and entry is not None:
            check_fields(path, entry, {"mode": _TEXT}, "baselines.random_init")
            _check_known(path, "baselines.random_init.mode", entry["mode"], MODES)
            check_fields(path, entry, {"seeds": _LIST}, "baselines.random_init")
            for i, seed in enumerate(entry["seeds"]):
                check_fields(path, seed, {"seed": _WHOLE}, f"baselines.random_init.seeds[{i}]")
    if results["layers"] is not None:
        check_fields(path, results["layers"], {"chosen": _TEXT, "validation": _DICT}, "layers")
        of_layer = results["layers"]["validation"]
        check_fields(path, of_layer, dict.fromkeys(of_layer, _NUMBER), "layers.validation")
    return results, _read_predictions(folder / PREDICTIONS, results)


def _check_known(path: Path, name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{path}: the field {name} is {value!r}, not one of {', '.join(known)}.")


def _check_leakage(path: Path, verdict: dict[str, Any]) -> None:
    count = (int, type(None))
    fields = {"verdict": _TEXT, "near_identical_train_test": count, "pretraining": (dict, type(None))}
    check_fields(path, verdict, fields, "leakage")
    if "clean" not in verdict or not isinstance(verdict["clean"], bool):
        raise UserError(f"{path}: the field leakage.clean must be true or false; probe again.")
    if verdict["pretraining"] is not None:
        check_fields(path, verdict["pretraining"], {"near_identical_test": count}, "leakage.pretraining")
    if "pretraining_problem" in verdict:
        check_fields(path, verdict, {"pretraining_problem": (str, type(None))}, "leakage")
    if "examined" in verdict:
        examined = verdict["examined"]
        names = ("identical", "near_identical", "pretraining")
        # null: there was no pretraining.
        if not isinstance(examined, dict) or any(
            name not in examined or examined[name] not in (True, False, None) for name in names
        ):
            raise UserError(f"{path}: leakage.examined must say true, false or null of {', '.join(names)}.")


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
    except (ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
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
        if array.dtype.kind not in (_ARRAYS[name] if name in _ARRAYS else _ARRAYS["probabilities"]):
            raise UserError(
                f"{path}: the array {name} is of {array.dtype}, which it cannot be; run its `ecg-jax probe` command "
                "again."
            )
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


def read_robustness(path: Path) -> dict[str, Any]:
    """What a robustness.json holds.

    Raises:
        UserError: names the file and the field.
    """
    content = read_object(path)
    fields = {
        "task": _TEXT,
        "metric": _TEXT,
        "clean": _DICT,
        "families": _LIST,
        "probe": _DICT,
        "bootstrap": _DICT,
    }
    check_fields(path, content, fields)
    _check_known(path, "metric", content["metric"], METRICS)
    check_fields(path, content["probe"], {"model": _TEXT, "mode": _TEXT}, "probe")
    _check_resampling(path, content["bootstrap"])
    check_fields(path, content["clean"], _TRIPLE, "clean")
    _check_filled(path, "families", content["families"])
    for i, family in enumerate(content["families"]):
        where = f"families[{i}]"
        check_fields(path, family, {"family": _TEXT, "unit": (str, type(None)), "conditions": _LIST}, where)
        _check_filled(path, f"{where}.conditions", family["conditions"])
        for j, condition in enumerate(family["conditions"]):
            inner = f"{where}.conditions[{j}]"
            check_fields(path, condition, {"label": _TEXT, "value": _NUMBER, **_TRIPLE}, inner)
            check_fields(path, condition, {"difference": _DICT}, inner)
            check_fields(path, condition["difference"], _TRIPLE, f"{inner}.difference")
            if "padded" not in condition or not isinstance(condition["padded"], bool):
                raise UserError(f"{path}: the field {inner}.padded must be true or false; write it again.")
    return content


def read_efficiency(path: Path) -> dict[str, Any]:
    """What a label_efficiency.json holds.

    Raises:
        UserError: names the file and the field.
    """
    content = read_object(path)
    fields = {
        "task": _TEXT,
        "metric": _TEXT,
        "sizes": _LIST,
        "models": _DICT,
        "saving": _DICT,
        "bootstrap": _DICT,
    }
    check_fields(path, content, fields)
    _check_known(path, "metric", content["metric"], METRICS)
    _check_resampling(path, content["bootstrap"])
    _check_filled(path, "sizes", content["sizes"])
    _check_filled(path, "models", content["models"])
    if not all(isinstance(size, int) and size > 0 for size in content["sizes"]):
        raise UserError(f"{path}: sizes must hold numbers of records above 0; was it edited?")
    for name, model in content["models"].items():
        where = f"models.{name}"
        of_size = dict.fromkeys(("scores", "mean", "low", "high"), _LIST)
        check_fields(path, model, of_size | {"fit": (dict, type(None))}, where)
        for field in of_size:
            if len(model[field]) != len(content["sizes"]):
                raise UserError(
                    f"{path}: {where}.{field} has not one entry for each of sizes; write it again."
                )
        if not all(isinstance(seeds, list) and seeds for seeds in model["scores"]):
            raise UserError(
                f"{path}: {where}.scores must hold the scores of at least one seed for every size."
            )
        for size, *triple in zip(content["sizes"], model["mean"], model["low"], model["high"], strict=True):
            check_fields(path, dict(zip(_TRIPLE, triple, strict=True)), _TRIPLE, f"{where} of size {size}")
        for size, scores in zip(content["sizes"], model["scores"], strict=True):
            of_seed = {f"scores[{i}]": value for i, value in enumerate(scores)}
            check_fields(path, of_seed, dict.fromkeys(of_seed, _NUMBER), f"{where} of size {size}")
        if model["fit"] is not None:
            check_fields(path, model["fit"], dict.fromkeys(("C", "a", "L0"), (int, float)), f"{where}.fit")
    for name, others in content["saving"].items():
        check_fields(
            path, others, dict.fromkeys(others, _DICT) if isinstance(others, dict) else {}, f"saving.{name}"
        )
        for other, entry in others.items():
            where = f"saving.{name}.{other}"
            for each in (name, other):
                _check_known(path, where, each, tuple(content["models"]))
            if "undefined" in entry:
                continue
            check_fields(path, entry, {"by_size": _LIST}, where)
            for i, size in enumerate(entry["by_size"]):
                factor = dict.fromkeys(("factor", "low", "high", "least", "most"), _NUMBER)
                factor |= dict.fromkeys(("factor_open", "low_open", "high_open"), (str, type(None)))
                check_fields(path, size, {"size": (int, float), **factor}, f"{where}.by_size[{i}]")
    return content


def _check_resampling(path: Path, settings: dict[str, Any]) -> None:
    check_fields(path, settings, {"unit": _TEXT, "level": float}, "bootstrap")
    _check_known(path, "bootstrap.unit", settings["unit"], tuple(UNITS))


def _check_filled(path: Path, name: str, values: Any) -> None:
    if not values:
        raise UserError(
            f"{path}: the field {name} is empty, so that there is nothing to show; write it again."
        )
