"""Plain tables: .csv with lead names in its first line, .npy [T, C] with lead names given.

Neither format knows its rate and unit, so both must be given: a guess would be a wrong amplitude or time
  axis.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecg_jax.data.readers.header import MILLIVOLTS
from ecg_jax.data.recording import BadRecording, Recording, canonical_index
from ecg_jax.errors import UserError


def read_table(
    path: Path, record_id: str, rate: float | None, unit: str | None, leads: Sequence[str] | None = None
) -> Recording:
    """Reads one .csv or .npy file.

    Args:
      path: .csv (first line: lead names; an empty cell is NaN; a column called "time" or "t" is left out) or
        .npy of shape [T, C].
      record_id: the id to give it.
      rate: samples per second.
      unit: mV, uV, V or nV.
      leads: the C lead names of a .npy file; ignored for .csv, which names its own.

    Returns:
      The recording in millivolts.

    Raises:
      UserError: rate, unit or lead names are not given or not known.
      BadRecording: `table_refused` when the file is not such a table, `no_standard_leads`.
    """
    if rate is None or unit is None:
        raise UserError(
            f"{path.name} says neither rate nor unit; give both, e.g. 500 samples per second and uV."
        )
    if unit.lower() not in MILLIVOLTS:
        raise UserError(f"The unit {unit!r} is none of mV, uV, V, nV.")
    if path.suffix.lower() == ".csv":
        names, values = _read_csv(path, record_id)
    else:
        if leads is None:
            raise UserError(f"{path.name} has no lead names; give them in the order of its columns.")
        names, values = tuple(leads), _read_npy(path, record_id, len(leads))
    if all(canonical_index(name) is None for name in names):
        raise BadRecording(
            record_id,
            "no_standard_leads",
            f"none of its columns is one of the twelve leads: {', '.join(names)}.",
        )
    return Recording(record_id, values * MILLIVOLTS[unit.lower()], float(rate), names)


def _read_csv(path: Path, record_id: str) -> tuple[tuple[str, ...], np.ndarray]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            names = [name.strip() for name in next(rows)]
            wanted = [c for c, name in enumerate(names) if name.lower() not in ("time", "t", "")]
            values = []
            for row in rows:
                if not row:
                    continue
                # Decimal commas, or a value lost, would shift the columns without a word.
                if len(row) != len(names):
                    raise ValueError(f"line {rows.line_num} has {len(row)} cells, its header {len(names)}")
                values.append([float(row[c]) if row[c].strip() else np.nan for c in wanted])
    except (OSError, StopIteration, ValueError, csv.Error) as error:
        detail = f"{path.name} is no table of numbers below a line of lead names: {error}."
        raise BadRecording(record_id, "table_refused", detail) from error
    return tuple(names[c] for c in wanted), np.array(values, float).reshape(len(values), len(wanted))


def _read_npy(path: Path, record_id: str, n_leads: int) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadRecording(record_id, "table_refused", f"{path.name} is no .npy array: {error}.") from error
    if values.ndim != 2 or values.shape[1] != n_leads or values.dtype.kind not in "iuf":
        detail = f"{path.name} holds {values.dtype} {values.shape}, not numbers [T, {n_leads}]."
        raise BadRecording(record_id, "table_refused", detail)
    return values.astype(float)
