"""What a probe leaves behind: predictions.npz, JSON without NaN, and a few lines for the console."""

import csv
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.plots import FEW_POSITIVES
from ecg_jax.evaluation.probe_scores import Baselines
from ecg_jax.files import write_atomic


def plain(value: Any) -> Any:
    """The same with lists for tuples, Python numbers for NumPy's, and None for what JSON cannot say (NaN)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_predictions(path: Path, examples: Examples, fitted: Fitted, baselines: Baselines) -> None:
    def text(column) -> np.ndarray:
        return np.array([each or "" for each in column], dtype=str)

    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        record_id=text(examples.test.column("record_id")),
        patient_id=text(examples.test.column("patient_id")),
        row=examples.test.rows,
        targets=examples.test.targets,
        probabilities=fitted.test,
        probabilities_random_init_seeds=baselines.random_init,
        probabilities_ecg_features=baselines.ecg_features,
        probabilities_majority=baselines.majority,
        classes=np.array(examples.classes, dtype=str),
        val_record_id=text(examples.val.column("record_id")),
        val_targets=examples.val.targets,
        val_probabilities=fitted.val,
    )
    write_atomic(path, buffer.getvalue())


def write_split(path: Path, examples: Examples) -> None:
    """Who was trained, validated and tested on: a line `record_id,part` for each, to be published with results."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("record_id", "part"))
    writer.writerows(examples.split_table())
    write_atomic(path, text.getvalue().encode())


def is_whole(workdir: Path, mode: str) -> bool:
    """Whether the files beside results.json are there and can be read."""
    names = ["predictions.npz"] + (["linear_probe.npz"] if mode == "linear" else [])
    try:
        for name in names:
            with np.load(workdir / name) as file:
                for array in file.files:
                    file[array]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return False
    return True


def summary(results: dict[str, Any]) -> str:
    """A few lines for the console."""
    metric = results["metric"]

    def line(name: str, entry: dict[str, Any]) -> str:
        if entry[metric] is None:
            return f"  {name:<34}undefined"
        if entry["ci_low"] is None:
            return f"  {name:<34}{entry[metric]:.3f}   no interval: undefined in every resample"
        return f"  {name:<34}{entry[metric]:.3f}   {entry['ci_low']:.3f} to {entry['ci_high']:.3f}"

    unit, level = results["bootstrap"]["unit"], 100 * results["bootstrap"]["level"]
    patients = f" of {results['n_patients']} patients" if results["n_patients"] else ""
    regression = results["kind"] == "regression"
    what = "MAE in standard deviations" if regression else "macro AUROC"
    ours = "from scratch" if results["mode"] == "supervised" else "pretrained"
    baselines, n = results["baselines"], len(results["baselines"]["random_init"]["seeds"])
    random_mode = baselines["random_init"]["mode"]
    how = "" if random_mode == results["mode"] else f", {random_mode}"
    lines = [
        f"{results['task']}, {results['mode']}: {len(results['per_class'])} {'targets' if regression else 'classes'}, "
        f"{results['n_records']} test records{patients}",
        f"  {'':<34}{what}, {level:g} % interval (resampled by {unit})",
        line(ours, results),
        line(f"random initialisation x{n}{how}", baselines["random_init"]),
        line("simple ECG features", baselines["ecg_features"]),
        line("majority guess", baselines["majority"]),
    ]
    if results["difference_to_random_init"] is not None:
        lines.append(line(f"{ours} - random", results["difference_to_random_init"]))
    lines.append(f"  {_chosen(results)}, chosen on {results['split']['n_val']} validation records")
    notes = {
        "classes_dropped": "left out",
        "classes_undefined_in_test": "undefined in the test records",
    }
    if not regression:
        notes["classes_with_few_positives"] = f"with fewer than {FEW_POSITIVES} positive test records"
    for key, what in notes.items():
        names = list(results[key])
        number = results["n_classes_dropped"] if key == "classes_dropped" else len(names)
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            lines.append(f"  {number} classes {what}: {shown}")
    contract = Preprocessing.from_dict(results["preprocessing"])
    if contract.kept_leads != contract.leads:
        lines.append(
            f"  every encoder here sees the leads {', '.join(contract.kept_leads)} alone, the simple ECG features all "
            f"{len(contract.leads)}"
        )
    if results["store"]["corpus"] == SYNTHETIC:
        lines.append("  SYNTHETIC recordings: they test the machinery and say nothing about ECGs")
    if results["mode"] == "linear" and not results["fit"]["converged"]:
        lines.append("  WARNING: the solver did not reach its tolerance; raise --config.linear.max_steps")
    if not results["leakage"]["clean"]:
        lines.append(f"  WARNING: {results['leakage']['verdict']}")
    elif results["leakage"]["pretraining_problem"]:
        lines.append(
            f"  not checked for leakage from pretraining: {results['leakage']['pretraining_problem']}"
        )
    return "\n".join(lines)


def _chosen(results: dict[str, Any]) -> str:
    fit = results["fit"]
    # Of several heads that were trained side by side the first seed's predicts.
    fit = fit["chosen"][0] if "chosen" in fit else fit
    parts = [f"{name} = {fit[name]:g}" for name in ("l2", "learning_rate") if name in fit]
    parts += [f"epoch {fit['best_epoch']}"] if "best_epoch" in fit else []
    parts += [f"layer {results['layers']['chosen']}"] if results["layers"] else []
    return ", ".join(parts)
