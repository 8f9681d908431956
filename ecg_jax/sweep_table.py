"""One row for each run of a sweep, finished or not: settings, losses, speed, probe, provenance.

| column | meaning |
|---|---|
| name, group, state | of the run; state as in `sweep_folder.State` |
| init | name of the run whose parameters it begins with |
| error | why it failed, or what is known of a process that ended without a word |
| seed | of pretraining |
| config.FIELD | each field in which configs differ, of its own type (lists: JSON); null where a config has none |
| step | the last one known |
| loss, best_loss | the last and the lowest logged one, in training |
| val_loss, best_val_loss | the same, in validation |
| windows_per_s | median over the logged steps |
| seconds, probe_seconds | of all attempts at pretraining, and at all its probes, that ended by themselves |
| attempts | how often a process took the run up |
| parameters, encoder_parameters | trainable ones of the whole objective, and of the encoder alone |
| train_recordings | that it was trained on, of the `store_recordings` in its store, or stores |
| synthetic | whether any recordings were synthetic that it was pretrained on, or probed by the probe of this table |
| train_windows | crops that it was trained on so far: step times batch size |
| train_flops | operations of those by formula (`studies.flops`), forward and backward; null where there is none |
| device_hours | of all attempts at pretraining, in hours; null unless each was measured (`run_starts.cost_of`) |
| task, n_records, n_patients | of the probe's test set |
| macro_auroc, ci_low, ci_high | of the probe with its interval |
| difference_to_random_init and _ci_low, _ci_high | paired, on the same patients |
| random_init, ecg_features, majority, each with _ci_low, _ci_high | macro AUROC of the baselines |
| collapse_warnings | how many, in pretraining |
| store, store_fingerprint, selection_fingerprint | pretrained on |
| probe_store, probe_store_fingerprint | probed on |
| device, host, began, ended | of the last attempt; times in UTC |
| version_PACKAGE | of ecg-jax, jax, flax, optax and numpy at the last attempt |
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ecg_jax.data.selection import SELECTION_NAME
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.errors import UserError
from ecg_jax.json_fields import ANY_TEXT, or_null
from ecg_jax.run_setup import flatten
from ecg_jax.run_starts import Damaged, cost_of, read_starts
from ecg_jax.studies.flops import training_flops
from ecg_jax.sweep_damage import PROBE_FIELDS, SELECTION_FIELDS, check, damage, read_checked, readable
from ecg_jax.sweep_damage import Damaged as DamagedRun
from ecg_jax.sweep_file import Run, Sweep, plain
from ecg_jax.sweep_folder import (
    DAMAGED,
    FINISHED,
    PROBE,
    RUN,
    STATUS,
    VERSIONS,
    read_status,
    spent,
    state_of,
)
from ecg_jax.training.metric_writers import read_log, read_warnings

TABLE = "results_table"

_TEXT, _INT, _FLOAT = "string", "int64", "float64"
_BASELINES = ("random_init", "ecg_features", "majority")
_BEFORE = {"name": _TEXT, "group": _TEXT, "state": _TEXT, "error": _TEXT, "seed": _INT, "init": _TEXT}
_INTERVALS = ("difference_to_random_init", *_BASELINES)
_AFTER = {
    "step": _INT,
    **dict.fromkeys(("loss", "best_loss", "val_loss", "best_val_loss", "windows_per_s"), _FLOAT),
    "seconds": _FLOAT,
    "probe_seconds": _FLOAT,
    **dict.fromkeys(("attempts", "parameters", "encoder_parameters"), _INT),
    **dict.fromkeys(("train_recordings", "store_recordings", "train_windows"), _INT),
    **dict.fromkeys(("train_flops", "device_hours"), _FLOAT),
    "task": _TEXT,
    "n_records": _INT,
    "n_patients": _INT,
    **dict.fromkeys(("macro_auroc", "ci_low", "ci_high"), _FLOAT),
    **{f"{name}{end}": _FLOAT for name in _INTERVALS for end in ("", "_ci_low", "_ci_high")},
    "collapse_warnings": _INT,
    "synthetic": "bool",
    **dict.fromkeys(("store", "store_fingerprint", "selection_fingerprint"), _TEXT),
    **dict.fromkeys(("probe_store", "probe_store_fingerprint", "device", "host", "began", "ended"), _TEXT),
    **{f"version_{name}": _TEXT for name in VERSIONS},
}


def collect(sweep: Sweep, output: str | Path, unreadable: Mapping[str, str] = MappingProxyType({})):
    """The table of a sweep, in its order of runs; columns as this module says.

    Args:
        sweep: from `load_sweep`.
        output: its folder; runs that it lacks are rows without results.
        unreadable: run -> what of its probe is damaged that this table does not look at.

    Returns:
        A pyarrow.Table. A run whose files are damaged has the state "damaged", and its error says where.
    """
    import pyarrow as pa

    output = Path(output)
    fields = _differing([flatten(plain(run.config)) for run in sweep.runs])
    rows = [_row(output, run, unreadable) for run in sweep.runs]
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in _BEFORE.items()}
    for name, values in fields.items():
        columns[f"config.{name}"] = _column(values)
    columns |= {name: pa.array([row[name] for row in rows], kind) for name, kind in _AFTER.items()}
    return pa.table(columns)


def _differing(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its value in each config, of the fields in which they differ; seeds have a column of their own."""
    names = list(dict.fromkeys(name for config in configs for name in config))
    values = {name: [config.get(name) for config in configs] for name in names}
    differ = {name for name, each in values.items() if any(value != each[0] for value in each)}
    return {name: values[name] for name in names if name in differ - {"seed", "store"}}


def _column(values: list[Any]):
    """A column of the type that its values share; JSON where they share none."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        kinds = {float}
    for kind, name in ((bool, "bool"), (int, _INT), (float, _FLOAT), (str, _TEXT)):
        if kinds == {kind}:
            return pa.array([None if value is None else kind(value) for value in values], name)
    return pa.array([None if value is None else json.dumps(value) for value in values], _TEXT)


def _row(output: Path, run: Run, unreadable: Mapping[str, str]) -> dict[str, Any]:
    folder = output / run.name
    row = dict.fromkeys(_BEFORE | _AFTER) | {"name": run.name, "group": run.group, "seed": run.config.seed}
    row["init"] = run.init and run.init.name
    try:
        with readable(folder):
            state = state_of(output, run)
            row |= {"state": state.kind, "error": state.error or None, "step": state.step}
            row |= _of_status(folder) | _of_pretraining(folder)
            if run.name in unreadable:
                raise DamagedRun(unreadable[run.name])
            probed = _of_probe(folder) if run.probe_config else {}
            row |= probed | {"synthetic": row["synthetic"] or probed["synthetic"]} if probed else {}
            row |= _cost(folder, run, row)
    except UserError as error:
        row |= {"state": DAMAGED, "error": str(error)}
    return row


def _of_status(folder: Path) -> dict[str, Any]:
    status = read_status(folder)
    if status is None:
        return {}
    names = ("attempts", "parameters", "device", "host", "began", "ended")
    with damage(folder / STATUS):
        check(STATUS, status["versions"], dict.fromkeys(VERSIONS, ANY_TEXT), "versions.")
        versions = {f"version_{name}": status["versions"][name] for name in VERSIONS}
    return {name: status[name] for name in names} | {"store_recordings": status["recordings"]} | versions


def _of_pretraining(folder: Path) -> dict[str, Any]:
    seconds = spent(folder)
    row: dict[str, Any] = {"seconds": seconds["pretrain"], "probe_seconds": seconds[PROBE]}
    run = folder / RUN
    if not (run / "config.json").is_file():
        return row
    with damage(run):
        config = json.loads((run / "config.json").read_text())
        for name in ("store", "store_fingerprint", "selection_fingerprint"):
            # Runs of before the ladder have no selection.
            row[name] = config.get(name)
            check("config.json", row, {name: or_null(ANY_TEXT)})
        if (run / SELECTION_NAME).is_file():
            selection = read_checked(run / SELECTION_NAME, SELECTION_FIELDS)
            row["train_recordings"] = selection["train"]
            row["synthetic"] = any(store["corpus"] == SYNTHETIC for store in selection["stores"])
    log = read_log(run)
    for name in ("loss", "val_loss"):
        values = [entry[name] for entry in log if entry.get(name) is not None]
        best = min((value for value in values if math.isfinite(value)), default=None)
        row |= {name: values[-1] if values else None, f"best_{name}": best}
    rates = [entry["windows_per_s"] for entry in log if entry.get("windows_per_s") is not None]
    row["windows_per_s"] = float(np.median(rates)) if rates else None
    row["collapse_warnings"] = len(read_warnings(run))
    return row


def _cost(folder: Path, run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """What pretraining took, as far as the other columns and the config tell."""
    cost: dict[str, Any] = {}
    if row["step"] is not None:
        cost["train_windows"] = row["step"] * run.config.batch_size
        with contextlib.suppress(ValueError):  # no formula
            cost["train_flops"] = float(training_flops(run.config) * cost["train_windows"])
    try:
        starts = read_starts(folder / RUN)
    except Damaged:  # no reason to leave out the run's results; `ecg-jax report` says what is wrong
        return cost
    if starts:
        cost["device_hours"] = cost_of(starts).device_hours
    elif row["seconds"] is not None and row["device"]:  # a run from before starts were noted
        with damage(folder / STATUS):
            cost["device_hours"] = row["seconds"] * int(row["device"].partition(" x ")[0]) / 3600
    return cost


def _of_probe(folder: Path) -> dict[str, Any]:
    path = folder / PROBE / "results.json"
    if not path.is_file():
        return {}
    with damage(folder / PROBE):
        results = read_checked(path, PROBE_FIELDS)
        with np.load(folder / PROBE / "predictions.npz"):  # its table of contents, which a cut file lacks
            pass
        names = ("task", "n_records", "n_patients", "encoder_parameters", "macro_auroc", "ci_low", "ci_high")
        row = {name: results[name] for name in names}
        row |= {
            "probe_store": results["store"]["path"],
            "probe_store_fingerprint": results["store"]["fingerprint"],
            "synthetic": results["store"]["corpus"] == SYNTHETIC,
        }
        intervals = {name: results["baselines"][name] for name in _BASELINES}
        intervals["difference_to_random_init"] = results["difference_to_random_init"]
        for name, value in intervals.items():
            row |= {
                name: value["macro_auroc"],
                f"{name}_ci_low": value["ci_low"],
                f"{name}_ci_high": value["ci_high"],
            }
    return row


def table_files(table) -> dict[str, bytes]:
    """Name -> content of results_table.parquet and results_table.csv."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    files = {}
    for ending, write in ((".parquet", parquet.write_table), (".csv", csv.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        files[f"{TABLE}{ending}"] = sink.getvalue().to_pybytes()
    return files


def loss_table(table) -> list[str]:
    """Lines of a Markdown table of losses by group, for sweeps that only pretrain; [] while no run is finished."""
    rows = [row for row in table.to_pylist() if row["state"] == FINISHED]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)

    def mean(own, name):
        values = [row[name] for row in own if row[name] is not None]
        return f"{np.mean(values):.4g}" if values else ""

    columns = {
        "steps": "step",
        "loss": "loss",
        "validation loss": "val_loss",
        "best": "best_val_loss",
        "windows/s": "windows_per_s",
        "seconds": "seconds",
    }
    if not groups:
        return []
    lines = [f"| group | seeds | {' | '.join(columns)} |", f"|---|--:|{'--:|' * len(columns)}"]
    for group, own in groups.items():
        cells = [mean(own, name) for name in columns.values()]
        lines.append(f"| {group} | {len(own)} | {' | '.join(cells)} |")
    said = "Means over seeds; losses of different objectives, or of other windows, have different units."
    return [*lines, "", said]
