"""Reading the big tables around MIMIC-IV-ECG as columns, and joining them by study or by patient and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ecg_jax.data.readers.columns import read_batches
from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError


def find_table(source: Path, name: str) -> Path | None:
    """`name` or `name`.gz in the folder, None if it has neither."""
    return next((path for path in (source / name, source / f"{name}.gz") if path.is_file()), None)


def read_columns(
    path: Path, columns: Mapping[str, str], keep: Callable[[dict], object] | None = None
) -> dict[str, np.ndarray]:
    """Some columns of a CSV file, gzipped or not.

    Args:
      path: the file.
      columns: name -> "int", "float", "time", "bool" or "text".
      keep: called with parts of the table as name -> `pyarrow.Array`; the boolean array it gives tells which
        rows to keep, so that of a table too big for memory only those are held. None keeps all.

    Returns:
      name -> array [m]: int64; float64 with NaN for an empty cell; int64 seconds since 1970; bool; object,
      with None for an empty cell.

    Raises:
      UserError: the file cannot be read, lacks a column, or a cell is not what it must be. A cell of an
        "int", "time" or "bool" column must not be empty.
    """
    import pyarrow as pa

    parts = []
    for batch in read_batches(path, columns, "PhysioNet"):
        if keep is not None:
            batch = batch.filter(keep(dict(zip(batch.schema.names, batch.columns, strict=True))))
        parts.append(batch)
    table = pa.Table.from_batches(parts)
    found = {}
    for name, kind in columns.items():
        column = table.column(name)
        if kind in ("int", "time", "bool") and column.null_count:
            row = column.combine_chunks().is_null().to_numpy(zero_copy_only=False).argmax()
            raise UserError(
                f"{path}: row {row + 1} (of those used) has nothing in column {name}; correct that row."
            )
        if kind == "time":
            column = column.cast(pa.int64())
        found[name] = column.to_numpy()
    return found


def take(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A table's column [m] of numbers at rows [n] from `find_rows`: float64 [n], NaN where the row is -1."""
    found = np.full(len(rows), np.nan)
    found[rows >= 0] = column[rows[rows >= 0]]
    return found


def find_rows(
    studies: np.ndarray, table: Mapping[str, np.ndarray], key: str, path: Path
) -> tuple[np.ndarray, list[Problem]]:
    """The row of each study in a table.

    Args:
      studies: int64 [n].
      table: columns [m] from `read_columns`, of which rows with the same key are compared.
      key: name of the column of studies, int64.
      path: the table, for the problems.

    Returns:
      (int64 [n], problems): -1 for a study without a row, and for one with several rows that contradict each
      other, which is one problem each. Of several rows that agree the first counts.
    """
    order = np.argsort(table[key], kind="stable")
    ordered = table[key][order]
    if not len(ordered):
        return np.full(len(studies), -1), []
    one, other = order[:-1], order[1:]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    differ = np.zeros(len(twice), bool)
    for column in table.values():
        a, b = column[one[twice]], column[other[twice]]
        both_unknown = np.isnan(a) & np.isnan(b) if column.dtype.kind == "f" else False
        differ |= (a != b) & ~np.asarray(both_unknown)
    contradictory = np.unique(ordered[twice[differ]])
    # The first row of each study, as order is stable.
    place = np.searchsorted(ordered, studies).clip(max=len(ordered) - 1)
    doubtful = np.isin(studies, contradictory)
    rows = np.where((ordered[place] == studies) & ~doubtful, order[place], -1)
    problems = [
        Problem(
            str(study),
            "contradictory_rows",
            "unknown",
            f"{path.name} has rows with {key} {study} that contradict each other, so what it says of the recording is "
            "taken as unknown.",
        )
        for study in np.unique(studies[doubtful]).tolist()
    ]
    return rows, problems


def nearest(
    patient: np.ndarray,
    time: np.ndarray,
    patients: np.ndarray,
    times: np.ndarray,
    values: np.ndarray,
    within: int,
) -> np.ndarray:
    """Each recording's nearest measurement of the same patient.

    Args:
      patient, time: int64 [n], patients and seconds of the recordings.
      patients, times: int64 [m], those of the measurements, in any order.
      values: float64 [m].
      within: seconds the two may be apart.

    Returns:
      float64 [n], NaN without a measurement. Of two equally near the earlier, of two at one time the first,
      counts.
    """
    found = np.full(len(patient), np.nan)
    if not len(patients):
        return found
    # One number that sorts by patient, then time: ids have 8 digits, and 2^34 s are the years to 2514.
    key, keys = (patient << 34) + time, (patients << 34) + times
    order = np.argsort(keys, kind="stable")
    keys, values, patients, times = keys[order], values[order], patients[order], times[order]
    after = np.searchsorted(keys, key)
    before = np.searchsorted(keys, keys[(after - 1).clip(min=0)])
    best = np.full(len(patient), within + 1)
    for place, there in ((before, after > 0), (after, after < len(keys))):
        place = place.clip(max=len(keys) - 1)
        apart = np.abs(times[place] - time)
        better = there & (patients[place] == patient) & (apart < best)
        found[better], best[better] = values[place[better]], apart[better]
    return found
