"""Writing a store: fixed work units, one chunk file each, and a finalisation that makes them one Zarr array.

The sorted list of records is cut into units whose size depends on the number of records only, so the bytes
of a store do not depend on the number of processes. A unit is a chunk file plus a sidecar in `.partial/`,
both renamed into place when complete; the sidecar comes last, so a unit with a sidecar is done. `zarr.json`
of the group is the very last file of a store: before it exists the store is incomplete and can be continued.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing, Processed
from ecg_jax.data.recording import Problem, Recording, strict_error
from ecg_jax.data.store import BYTES_PER_SAMPLE, FORMAT_VERSION, PARTIAL, checksum
from ecg_jax.errors import UserError
from ecg_jax.files import replace_file

# Chunk lengths are rounded up to this many samples (a second at 240 Hz), so that small changes keep the
# array shape.
CHUNK_ROUNDING = 240


def unit_size(n_records: int) -> int:
    """Records per unit: about 64 units of at least 32 and at most 4096 records (236 MB at 10 s each)."""
    return min(max(-(-n_records // 64), 32), 4096)


def write_in_store(store: Path, path: Path, data: bytes) -> None:
    """Writes a file of a store; what a killed process leaves lies in `.partial/` and goes with it."""
    replace_file(path, data, store / PARTIAL / f"{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or missing disk into a sentence.

    Raises:
      UserError: instead of an OSError. Readers turn theirs into `BadRecording`; this one is about writing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full while writing the store {path}; free some space and run the same command "
                "again: it goes on where it stopped."
            ) from error
        raise UserError(f"Cannot write the store {path}: {error.strerror} ({error.filename}).") from error


def sidecar_path(store: Path, unit: int) -> Path:
    return store / PARTIAL / f"unit-{unit:06d}.json"


def chunk_path(store: Path, unit: int) -> Path:
    return store / "signal" / "c" / str(unit) / "0"


class UnitWriter:
    """Writes one unit: append processed recordings, note problems, finish; unfinished files vanish."""

    def __init__(self, store: Path, unit: int, corpus: str):
        self.store, self.unit, self.corpus = store, unit, corpus
        self.rows: list[dict] = []
        self.problems: list[Problem] = []
        self._samples = 0
        self._temporary = store / PARTIAL / f"unit-{unit:06d}.{os.getpid()}.tmp"
        self._file = None

    def __enter__(self) -> UnitWriter:
        self._file = open(self._temporary, "wb")
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, recording: Recording, processed: Processed, source_file: str) -> None:
        """Adds one recording; its row's `offset` is relative to the unit until finalisation."""
        self._file.write(np.ascontiguousarray(processed.signal, "<i2").data)
        self.rows.append(
            {
                "record_id": recording.record_id,
                "patient_id": recording.patient_id,
                "corpus": self.corpus,
                "fold": recording.fold,
                "offset": self._samples,
                "length": len(processed.signal),
                "checksum": checksum(processed.signal),
                "source_file": source_file,
                "source_rate": float(recording.rate),
                "age": recording.age,
                "sex": recording.sex,
                "missing_leads": processed.missing_mask,
                "saturated": processed.saturated,
                "flags": processed.flags,
                **{f"labels_{name}": codes for name, codes in recording.labels.items()},
                **{f"values_{name}": numbers for name, numbers in recording.values.items()},
            }
        )
        self._samples += len(processed.signal)
        self.problems += processed.problems

    def finish(self) -> None:
        """Puts chunk file, then sidecar, in place."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._samples:
            target = chunk_path(self.store, self.unit)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._temporary, target)
        sidecar = {
            "samples": self._samples,
            "rows": self.rows,
            "problems": [vars(problem) for problem in self.problems],
        }
        write_in_store(self.store, sidecar_path(self.store, self.unit), json.dumps(sidecar).encode())


def read_sidecar(store: Path, unit: int) -> dict | None:
    """The sidecar of a finished unit; None when the unit must be done (again)."""
    try:
        sidecar = json.loads(sidecar_path(store, unit).read_bytes())
        _check_sidecar(sidecar)
        if sidecar["samples"] == 0:
            return sidecar
        # Finalisation extends chunk files with zeros; if it was interrupted, they may already be longer.
        size = chunk_path(store, unit).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return sidecar if size >= sidecar["samples"] * BYTES_PER_SAMPLE else None


def _check_sidecar(sidecar: dict) -> None:
    """Raises ValueError, KeyError or TypeError when it is not what `UnitWriter.finish` writes."""
    end = 0
    for row in sidecar["rows"]:
        if row["offset"] != end or not row["length"] > 0 or len(bytes.fromhex(row["checksum"])) != 16:
            raise ValueError("a row does not follow the one before it")
        end += row["length"]
    if sidecar["samples"] != end:
        raise ValueError("the rows are not all of the unit")
    for problem in sidecar["problems"]:
        Problem(**problem)
    keys = sorted({key for row in sidecar["rows"] for key in row})
    label_sets = [key.removeprefix("labels_") for key in keys if key.startswith("labels_")]
    values: dict[str, dict] = {key.removeprefix("values_"): {} for key in keys if key.startswith("values_")}
    for name, numbers in values.items():
        for row in sidecar["rows"]:
            numbers.update(row.get(f"values_{name}", {}))
    _unit_table(sidecar["rows"], record_schema(label_sets, values), values)


def finalise(
    store: Path,
    *,
    n_units: int,
    preprocessing: Preprocessing,
    attributes: dict,
    label_sets: Sequence[str],
    classes: dict[str, list[str]] | None,
    descriptions: dict[str, dict[str, str]],
    first_problems: Sequence[Problem],
    drop_duplicates: bool,
    strict: bool,
    values: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Makes a store out of finished units.

    Args:
      store: its folder; every unit is finished.
      n_units: number of units.
      preprocessing: the contract the units were written under.
      attributes: what else goes into the group's attributes (corpus, source, settings, fold_source).
      label_sets: names of the label sets a record may have.
      classes: label set -> class names in order; None takes the sorted codes that occur and leaves out a set
        without any.
      descriptions: label set -> class -> text, may be incomplete.
      first_problems: problems found before any recording was read.
      drop_duplicates: leave later records with an identical signal out of the table.
      strict: an identical signal is an error.
      values: value set -> name -> description, see `Listing.values`.

    Raises:
      UserError: a unit is damaged, a duplicate under `strict`, no recording is left, or the disk is full.
    """
    import pyarrow as pa

    schema = record_schema(label_sets, values)
    tables, samples = [], []
    problems = [vars(problem) for problem in first_problems]
    for unit_samples, unit_problems, table in _verified_units(store, n_units, schema, values):
        samples.append(unit_samples)
        problems += unit_problems
        tables.append(table)
    chunk_samples = -(-max(samples) // CHUNK_ROUNDING) * CHUNK_ROUNDING
    first = np.repeat(np.arange(n_units) * chunk_samples, [len(table) for table in tables])
    records = pa.concat_tables(tables)
    records = _replace(records, "offset", first + records.column("offset").to_numpy())
    records, duplicates = mark_duplicates(records, drop_duplicates)
    if strict and duplicates:
        raise strict_error(Problem(**duplicates[0]))
    problems += duplicates
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    write_in_store(store, store / "problems.jsonl", lines.encode())
    if not len(records):
        # Nothing to continue: leave the explanation only, so that another try may use the same folder.
        shutil.rmtree(store / PARTIAL)
        kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(p["kind"] for p in problems).most_common())
        raise UserError(
            f"No recording could be read ({kinds}); each is explained in {store / 'problems.jsonl'}."
        )

    counts = {name: _count(records.column(f"labels_{name}")) for name in label_sets}
    if classes is None:
        classes = {name: sorted(counts[name]) for name in label_sets if counts[name]}
        records = records.drop_columns([f"labels_{name}" for name in label_sets if name not in classes])
    class_info = {
        name: {
            code: {
                "count": counts[name][code],
                "description": descriptions[name][code] if code in descriptions.get(name, {}) else "",
            }
            for code in codes
        }
        for name, codes in classes.items()
    }
    for unit in range(n_units):
        if samples[unit]:
            os.truncate(chunk_path(store, unit), chunk_samples * BYTES_PER_SAMPLE)
    _write_parquet(store, records)
    array = array_metadata(n_units * chunk_samples, chunk_samples)
    write_in_store(store, store / "signal" / "zarr.json", _json(array))
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "ecg_jax": {
                "format_version": FORMAT_VERSION,
                **attributes,
                "leads": list(preprocessing.leads),
                "rate_hz": preprocessing.rate_hz,
                "unit": "uV",
                "n_records": len(records),
                "fingerprint": fingerprint(records, preprocessing),
                "preprocessing": preprocessing.to_dict(),
                "classes": classes,
                "class_info": class_info,
                "values": {name: dict(numbers) for name, numbers in values.items()},
            }
        },
    }
    write_in_store(store, store / "zarr.json", _json(group))
    shutil.rmtree(store / PARTIAL)


def _verified_units(store: Path, n_units: int, schema, values) -> list[tuple]:
    """(samples, problems, table) of all units, after comparing each unit's samples with the checksums in its sidecar.

    A unit may have been written days before, by a run that was interrupted: what a disk did to it since must
    not become a complete store.

    Raises:
      UserError: a unit is damaged; its sidecar is removed, so that the next run does it again.
    """

    def verified(unit: int) -> tuple | None:
        sidecar = read_sidecar(store, unit)
        if sidecar is None:
            return None
        if sidecar["samples"]:
            with open(chunk_path(store, unit), "rb") as file:
                for row in sidecar["rows"]:
                    # `read_sidecar` has seen that the file is long enough.
                    data = file.read(row["length"] * BYTES_PER_SAMPLE)
                    if checksum(np.frombuffer(data, "<i2")) != row["checksum"]:
                        return None
        # A table and not the rows: those of millions of records would not fit into memory.
        return sidecar["samples"], sidecar["problems"], _unit_table(sidecar["rows"], schema, values)

    # Reading and hashing let other threads run.
    with concurrent.futures.ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        units = list(pool.map(verified, range(n_units)))
    damaged = [unit for unit, found in enumerate(units) if found is None]
    if damaged:
        for unit in damaged:
            sidecar_path(store, unit).unlink(missing_ok=True)
        raise UserError(
            f"{len(damaged)} of the {n_units} chunk files written to {store} do not hold what was written (the "
            f"first is {chunk_path(store, damaged[0])}), so check that disk; the same command writes them again "
            "and keeps the others."
        )
    return units


def mark_duplicates(records, drop: bool):
    """Sets `duplicate_of` to the id of the first record with an identical signal.

    Args:
      records: `pyarrow.Table` in order of the store.
      drop: leave the later ones out.

    Returns:
      The table to keep and one problem (as dict) per duplicate.
    """
    import pyarrow as pa

    codes = records.column("checksum").combine_chunks().dictionary_encode().indices.to_numpy()
    _, first_of_code = np.unique(codes, return_index=True)
    first = first_of_code[codes]
    duplicate = first != np.arange(len(records))
    ids = records.column("record_id").combine_chunks().take(pa.array(first, mask=~duplicate))
    records = _replace(records, "duplicate_of", ids)
    problems = []
    for i in np.flatnonzero(duplicate):
        row, original = records.slice(i, 1).to_pylist()[0], records.slice(first[i], 1).to_pylist()[0]
        detail = f"its signal is identical to that of {original['record_id']}"
        if row["patient_id"] != original["patient_id"]:
            detail += f", but the patients differ ({row['patient_id']} and {original['patient_id']})"
        if row["fold"] != original["fold"]:
            detail += (
                f"; the folds differ ({row['fold']} and {original['fold']}), so one leaks into the other"
            )
        action = "dropped" if drop else "kept"
        problems.append(vars(Problem(row["record_id"], "duplicate_signal", action, detail + ".")))
    return (records.filter(pa.array(~duplicate)) if drop else records), problems


def fingerprint(records, preprocessing: Preprocessing) -> str:
    """SHA-256 over the preprocessing contract and every record's id and checksum, in order."""
    digest = hashlib.sha256(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())
    for batch in records.select(["record_id", "checksum"]).to_batches(max_chunksize=65536):
        for record_id, total in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(f"\0{record_id}\0{total}".encode())
    return digest.hexdigest()


def array_metadata(n_samples: int, chunk_samples: int) -> dict:
    """`zarr.json` of the signal array (Zarr v3 core specification)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_samples, 12],
        "data_type": "int16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_samples, 12]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": ["sample", "lead"],
        "attributes": {},
    }


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


def _unit_table(rows: list[dict], schema, values: Mapping[str, Iterable[str]]):
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


def _replace(records, name: str, values):
    import pyarrow as pa

    index = records.schema.get_field_index(name)
    field = records.schema.field(index)
    return records.set_column(index, field, pa.array(values, field.type))


def _count(column) -> Counter:
    """How many records carry each code of a list<string> column."""
    import pyarrow.compute

    values = pyarrow.compute.value_counts(pyarrow.compute.list_flatten(column)).to_pylist()
    return Counter({item["values"]: item["counts"] for item in values})


def _write_parquet(store: Path, records) -> None:
    """The same rows give the same bytes: one chunk per column, so row groups do not depend on the units."""
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(records.combine_chunks(), sink, compression="zstd")
    write_in_store(store, store / "records.parquet", sink.getvalue())


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
