"""`records.parquet`: its columns, the rows of a unit as a table, duplicates, fingerprint, bytes.

Nothing here holds the table of all records more than once: of 11 million records it is gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import Problem

# Rows written at once, each lot a row group: pyarrow's own size, so that tables of up to so many rows are one group.
ROW_GROUP = 1 << 20

# Duplicates looked up at once.
_BATCH = 1 << 16


def record_schema(label_sets: Sequence[str], values: Iterable[str] = ()):
    """Columns of `records.parquet`, a `pyarrow.Schema`, for these label sets and value sets."""
    import pyarrow as pa

    strings = pa.list_(pa.string())
    return pa.schema(
        [
            ("record_id", pa.string()),
            ("patient_id", pa.string()),
            ("corpus", pa.string()),
            ("fold", pa.int32()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("checksum", pa.string()),
            ("source_file", pa.string()),
            ("source_rate", pa.float64()),
            ("age", pa.float64()),
            ("sex", pa.string()),
            ("missing_leads", pa.int32()),
            ("saturated", pa.int64()),
            ("duplicate_of", pa.string()),
            ("flags", strings),
            *((f"labels_{name}", strings) for name in label_sets),
            *((f"values_{name}", pa.list_(pa.float64())) for name in values),
        ]
    )


def unit_table(rows: list[dict], schema, values: Mapping[str, Iterable[str]]):
    """Rows of one unit as a table; a record without a label set has an empty list there. The numbers of a value set
    become a list in the order of its names, null where unknown.
    """
    import pyarrow as pa

    def numbers(row: dict, name: str) -> list[float | None]:
        known = row.get(f"values_{name}", {})
        found = (known.get(key, math.nan) for key in values[name])
        return [number if math.isfinite(number) else None for number in found]

    empty = {name: [] for name in schema.names if name.startswith("labels_")}
    filled = [{**empty, **row, **{f"values_{name}": numbers(row, name) for name in values}} for row in rows]
    return pa.Table.from_pylist(filled, schema=schema)


def checksum_keys(rows: list[dict]) -> np.ndarray:
    """uint64 [n, 2]: the 128-bit checksums of the rows, which as text take several times as much."""
    return np.frombuffer(bytes.fromhex("".join(row["checksum"] for row in rows)), ">u8").reshape(-1, 2)


def first_with_same_checksum(keys: np.ndarray) -> np.ndarray:
    """For every record, the first one with an identical signal: int64 [n], its own number where there is none before.

    Args:
      keys: uint64 [n, 2], see `checksum_keys`.
    """
    # lexsort is stable: of equal ones the first comes first.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    begins = np.ones(len(keys), bool)
    begins[1:] = False
    for half in range(2):
        ordered = keys[order, half]
        begins[1:] |= ordered[1:] != ordered[:-1]
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    return first


def duplicate_problems(records, first: np.ndarray, dropped: bool) -> Iterator[Problem]:
    """One problem for each record whose signal an earlier one has.

    Args:
      records: `pyarrow.Table` of all records.
      first: int64 [n], see `first_with_same_checksum`.
      dropped: whether they are left out.
    """
    columns = records.select(["record_id", "patient_id", "fold"])
    rows = np.flatnonzero(first != np.arange(len(first)))
    for begin in range(0, len(rows), _BATCH):
        batch = rows[begin : begin + _BATCH]
        pairs = zip(columns.take(batch).to_pylist(), columns.take(first[batch]).to_pylist(), strict=True)
        for row, original in pairs:
            detail = f"its signal is identical to that of {original['record_id']}"
            if row["patient_id"] != original["patient_id"]:
                detail += f", but the patients differ ({row['patient_id']} and {original['patient_id']})"
            if row["fold"] != original["fold"]:
                detail += (
                    f"; the folds differ ({row['fold']} and {original['fold']}), so one leaks into the other"
                )
            action = "dropped" if dropped else "kept"
            yield Problem(row["record_id"], "duplicate_signal", action, detail + ".")


def final_tables(records, offsets: np.ndarray, first: np.ndarray, drop_duplicates: bool) -> Iterator:
    """The rows of a store with `offset` and `duplicate_of`, `ROW_GROUP` at a time, as `pyarrow.Table` each.

    Args:
      records: `pyarrow.Table` of all records.
      offsets: int64 [n], in the whole `signal` array.
      first: int64 [n], see `first_with_same_checksum`.
      drop_duplicates: leave later records with an identical signal out.
    """
    import pyarrow as pa

    duplicate = first != np.arange(len(first))
    rows = np.flatnonzero(~duplicate) if drop_duplicates else np.arange(len(first))
    ids = records.column("record_id")
    for begin in range(0, len(rows), ROW_GROUP):
        part = rows[begin : begin + ROW_GROUP]
        table = records.slice(part[0], part[-1] + 1 - part[0]).combine_chunks()
        if len(table) > len(part):
            table = table.take(part - part[0])
        table = _replace(table, "offset", pa.array(offsets[part]))
        copies = np.flatnonzero(duplicate[part])
        # Few records have one: only their ids are looked up.
        which = np.zeros(len(part), np.int64)
        which[copies] = np.arange(len(copies))
        of = pa.chunked_array([ids.take(first[part[copies]]).combine_chunks()], pa.string())
        table = _replace(table, "duplicate_of", of.take(pa.array(which, mask=~duplicate[part])))
        yield table.combine_chunks()


def _replace(records, name: str, values):
    index = records.schema.get_field_index(name)
    field = records.schema.field(index)
    return records.set_column(index, field, values)


def count_codes(column) -> Counter:
    """How many records carry each code of a list<string> column."""
    import pyarrow.compute

    values = pyarrow.compute.value_counts(pyarrow.compute.list_flatten(column)).to_pylist()
    return Counter({item["values"]: item["counts"] for item in values})


class Fingerprint:
    """SHA-256 over the preprocessing contract and every record's id and checksum, in order."""

    def __init__(self, preprocessing: Preprocessing):
        self._digest = hashlib.sha256(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())

    def update(self, records) -> None:
        """Adds the next records, a `pyarrow.Table`."""
        for batch in records.select(["record_id", "checksum"]).to_batches(max_chunksize=_BATCH):
            ids, totals = (column.to_pylist() for column in batch.columns)
            text = "".join(f"\0{record_id}\0{total}" for record_id, total in zip(ids, totals, strict=True))
            self._digest.update(text.encode())

    def hexdigest(self) -> str:
        """Its hexadecimal digits."""
        return self._digest.hexdigest()


def write_parquet(file: IO[bytes], schema, tables: Iterable) -> None:
    """Writes tables, one row group each, of at most `ROW_GROUP` rows and one chunk per column.

    The same rows give the same bytes, as the row groups do not depend on the units.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as parquet:
        for table in tables:
            parquet.write_table(table, row_group_size=ROW_GROUP)
