"""The tables and the picture of a sweep, made of what its runs wrote."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import plots
from ecg_jax.files import write_atomic
from ecg_jax.studies import comparison, comparison_tables
from ecg_jax.studies.comparison import FinishedRun
from ecg_jax.sweep_entry import STORE
from ecg_jax.sweep_file import Run, Sweep
from ecg_jax.sweep_folder import DAMAGED, PROBE, RUN, damage, is_compared, lacking, spent
from ecg_jax.sweep_locks import held_for_tables
from ecg_jax.sweep_table import collect, loss_table, write_table
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
    """Writes results_table.* of all runs, and results.* of the finished ones.

    Args:
        wait: for another process that writes them now.

    Raises:
        Busy: another process writes them, and `wait` is False.
        UserError: a file cannot be written.
    """
    with held_for_tables(output, wait):
        table = collect(sweep, output)
        write_table(table, output)
        damaged = {row["name"]: row["error"] for row in table.to_pylist() if row["state"] == DAMAGED}
        if not sweep.probes:
            if lines := loss_table(table):
                text = "\n".join(
                    [f"# {sweep.path}", "", *lines, *([f"**{sweep.note}**", ""] * bool(sweep.note))]
                )
                write_atomic(output / "results.md", text.encode())
            return Tables({}, damaged)
        finished, unreadable = read_finished(sweep, output)
        damaged = unreadable | damaged
        if not finished:
            return Tables({}, damaged)
        done = {run.name for run in finished}
        rows = [row for row in table.to_pylist() if row["name"] in done]
        trained = {row["train_recordings"] for row in rows}
        recordings = trained.pop() if len(trained) == 1 else None
        note = " ".join(filter(None, (sweep.note, _own_note(rows, output))))
        results = {
            "sweep": sweep.path,
            "note": note.replace("{recordings}", str(recordings or "differing numbers of")),
            "train_recordings": recordings,
            "missing": [run.name for run in sweep.runs if run.name not in done],
            "lacking": {run.name: left for run in sweep.runs if (left := lacking(output, run))},
            **comparison.compare(finished),
        }
        write_atomic(
            output / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
        )
        write_atomic(output / "results.csv", comparison_tables.to_csv(results).encode())
        write_atomic(output / "results.md", comparison_tables.to_markdown(results).encode())
        try:
            _draw(results, output / "results.png")
        except OSError as error:
            raise UserError(f"cannot write {output / 'results.png'}: {error.strerror}") from error
    return Tables(results, damaged)


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
        if is_compared(output, run):
            try:
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
        results = json.loads((folder / PROBE / "results.json").read_text())
        with np.load(folder / PROBE / "predictions.npz") as file:
            predictions = dict(file)
        n = len(predictions["targets"])
        twins = predictions["probabilities_random_init_seeds"]
        lengths = {name: len(predictions[name]) for name in ("record_id", "patient_id", "probabilities")}
        for name, length in (lengths | {"probabilities_random_init_seeds": twins.shape[1]}).items():
            if length != n:
                raise ValueError(f"predictions.npz has {length} of {name}, not {n}")
        needed = (
            "macro_auroc",
            "bootstrap",
            "baselines",
            "pretraining_config",
            "n_patients",
            "encoder_parameters",
        )
        for name in needed:
            results[name]
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
