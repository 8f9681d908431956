"""The tables and the picture of a sweep, made of what its runs wrote."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import plots
from ecg_jax.files import write_atomic
from ecg_jax.studies import comparison, comparison_tables
from ecg_jax.studies.comparison import FinishedRun
from ecg_jax.sweep_damage import PROBE_FIELDS, Unfit, damage, read_checked, readable
from ecg_jax.sweep_entry import STORE
from ecg_jax.sweep_file import Run, Sweep
from ecg_jax.sweep_folder import DAMAGED, PROBE, RUN, is_compared, lacking, spent
from ecg_jax.sweep_locks import held_for_tables
from ecg_jax.sweep_table import collect, loss_table, table_files
from ecg_jax.training.metric_writers import read_log, read_warnings

OF_THE_SAMPLE = (
    "Pretrained on {recordings} recordings of the sample that ships with the package: a check that everything "
    "runs, and no comparison."
)
OF_SYNTHETIC = (
    "Pretrained or probed on synthetic recordings, all or some of its runs: it shows that everything runs, and nothing "
    "about ECG."
)


class Tables(NamedTuple):
    """What was written.

    Attributes:
        results: what results.json holds, {} while no probe is finished and of a sweep without probes.
        damaged: run -> what of its files cannot be read.
    """

    results: dict[str, Any]
    damaged: dict[str, str]


def write_tables(sweep: Sweep, output: Path, wait: bool = True) -> Tables:
    """Writes results_table.* of all runs, and results.* of the finished ones; nothing before all of them are made.

    Args:
        wait: for another process that writes them now.

    Raises:
        Busy: another process writes them, and `wait` is False.
        UserError: a file cannot be written.
    """
    with held_for_tables(output, wait):
        finished, unreadable = read_finished(sweep, output) if sweep.probes else ([], {})
        table = collect(sweep, output, unreadable)
        rows = table.to_pylist()
        damaged = {row["name"]: row["error"] for row in rows if row["state"] == DAMAGED}
        files, results = table_files(table), {}
        if finished:
            results = _results(sweep, output, finished, rows, damaged)
            files |= {
                "results.json": (json.dumps(results, indent=1, allow_nan=False) + "\n").encode(),
                "results.csv": comparison_tables.to_csv(results).encode(),
                "results.md": comparison_tables.to_markdown(results).encode(),
                "results.png": _picture(results),
            }
        elif not sweep.probes and (lines := loss_table(table)):
            note = [f"**{sweep.note}**", ""] * bool(sweep.note)
            files["results.md"] = "\n".join([f"# {sweep.path}", "", *lines, *note]).encode()
        for name, content in files.items():
            write_atomic(output / name, content)
    return Tables(results, damaged)


def _results(
    sweep: Sweep,
    output: Path,
    finished: Sequence[FinishedRun],
    rows: Sequence[dict[str, Any]],
    damaged: Mapping[str, str],
) -> dict[str, Any]:
    """What results.json holds; `rows` are those of the table of all runs."""
    done = {run.name for run in finished}
    rows = [row for row in rows if row["name"] in done]
    trained = {row["train_recordings"] for row in rows}
    recordings = trained.pop() if len(trained) == 1 else None
    note = " ".join(filter(None, (sweep.note, _own_note(rows, output))))
    probed = [run for run in sweep.runs if run.name in done and run.name not in damaged]
    return {
        "sweep": sweep.path,
        "note": note.replace("{recordings}", str(recordings or "differing numbers of")),
        "train_recordings": recordings,
        "missing": [run.name for run in sweep.runs if run.name not in done],
        "lacking": {run.name: left for run in probed if (left := lacking(output, run))},
        **comparison.compare(finished),
    }


def _own_note(rows: list[dict[str, Any]], output: Path) -> str:
    """What has to be said of results on made-up recordings, and on the sample, whatever the sweep's file says."""
    if any(row["synthetic"] for row in rows):
        return OF_SYNTHETIC
    sample = output / STORE
    if not (sample / "zarr.json").exists():
        return ""
    is_sample = {row["store_fingerprint"] == Store(sample).fingerprint for row in rows}
    return OF_THE_SAMPLE if is_sample == {True} else ""


def read_finished(sweep: Sweep, output: Path) -> tuple[list[FinishedRun], dict[str, str]]:
    """The runs of a sweep that can be compared, in its order; and run -> what is damaged, of those that are."""
    finished, damaged = [], {}
    for run in sweep.runs:
        try:
            with readable(output / run.name):
                if is_compared(output, run):
                    finished.append(_read(run, output / run.name))
        except UserError as error:
            damaged[run.name] = str(error)
    return finished, damaged


def _read(run: Run, folder: Path) -> FinishedRun:
    """A finished run.

    Raises:
        UserError: one of its files is damaged.
    """
    with damage(folder / PROBE):
        results = read_checked(folder / PROBE / "results.json", PROBE_FIELDS)
        with np.load(folder / PROBE / "predictions.npz") as file:
            predictions = dict(file)
        _check_predictions(predictions)
        if wrong := comparison.contradiction(results, predictions):
            raise Unfit(f"results.json: {wrong}")
    return FinishedRun(
        name=run.name,
        group=run.group,
        results=results,
        predictions=predictions,
        log=read_log(folder / RUN),
        warnings=read_warnings(folder / RUN),
        seconds=spent(folder)["pretrain"],
        init=run.init.group if run.init else "",
    )


def _check_predictions(arrays: dict[str, np.ndarray]) -> None:
    """Refuses arrays of predictions.npz that are missing, do not fit each other, or hold what no probe writes.

    Raises:
        Unfit: names the file and the array.
    """
    wanted = {"classes": "K", "targets": "nK", "record_id": "n", "patient_id": "n", "probabilities": "nK"}
    wanted[comparison.TWINS] = "SnK"
    wanted |= {
        name: "nK" for name in ("probabilities_ecg_features", "probabilities_majority") if name in arrays
    }
    sizes: dict[str, int] = {}
    for name, axes in wanted.items():
        if name not in arrays:
            raise Unfit(f"predictions.npz lacks the array {name}")
        array = arrays[name]
        fits = array.ndim == len(axes) and all(
            size == sizes.setdefault(axis, size) and size
            for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
            raise Unfit(f"predictions.npz: the array {name} is {list(array.shape)}, not [{expected}]")
        if "K" in axes and name != "classes":
            known = np.isin(array, (0, 1)) | np.isnan(array) if name == "targets" else np.isfinite(array)
            if not known.all():
                raise Unfit(f"predictions.npz: the array {name} holds values that it cannot hold")


def _picture(results: dict[str, Any]) -> bytes:
    """What results.png holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.png"
        try:
            _draw(results, path)
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot draw results.png in {folder}: {error.strerror}") from error


def _draw(results: dict[str, Any], path: Path) -> None:
    def interval(entry):
        return tuple(
            float("nan") if entry[name] is None else entry[name]
            for name in ("macro_auroc", "ci_low", "ci_high")
        )

    random = {
        group: interval(entry)
        for entry in results["baselines"]
        if entry["baseline"] == comparison.RANDOM_INIT
        for group in entry["groups"]
    }
    patients = f", {results['n_patients']} patients" if results["n_patients"] else ""
    plots.seeds_forest(
        [entry["group"] for entry in results["groups"]],
        [interval(entry) for entry in results["groups"]],
        [entry["each_seed"] for entry in results["groups"]],
        [random[entry["group"]] for entry in results["groups"]],
        next(e["macro_auroc"] for e in results["baselines"] if e["baseline"] == comparison.MAJORITY),
        path,
        title=f"{results['task']}: {results['n_records']} test records{patients}",
        note=results["note"],
        level=results["bootstrap"]["level"],
    )
