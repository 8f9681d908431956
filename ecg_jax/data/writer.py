"""Writing a store: fixed work units, one chunk file each, and a finalisation that makes them one Zarr array.

The sorted list of records is cut into units whose size depends on the number of records only, so the bytes
of a store do not depend on the number of processes. A unit is a chunk file plus a sidecar in `.partial/`,
both renamed into place when complete; the sidecar comes last, so a unit with a sidecar is done. `zarr.json`
of the group is the very last file of a store: before it exists the store is incomplete and can be continued.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing, Processed
from ecg_jax.data.record_table import (
    Fingerprint,
    count_codes,
    duplicate_problems,
    final_tables,
    first_with_same_checksum,
    record_schema,
    write_parquet,
)
from ecg_jax.data.recording import Problem, Recording, strict_error
from ecg_jax.data.store import BYTES_PER_SAMPLE, FORMAT_VERSION, PARTIAL, checksum, digest_of
from ecg_jax.data.unit_files import (
    VerifiedUnit,
    chunk_path,
    new_file,
    sidecar_path,
    temporary_path,
    verified_units,
    write_in_store,
)
from ecg_jax.data.unit_files import (
    read_sidecar as read_sidecar,  # for who imports it from here
)
from ecg_jax.errors import UserError
from ecg_jax.files import replace_file

# Chunk lengths are rounded up to this many samples (a second at 240 Hz), so that small changes keep the
# array shape.
CHUNK_ROUNDING = 240


def unit_size(n_records: int) -> int:
    """Records per unit: about 64 units of at least 32 and at most 4096 records (236 MB at 10 s each)."""
    return min(max(-(-n_records // 64), 32), 4096)


class UnitWriter:
    """Writes one unit: append processed recordings, note problems, finish; unfinished files vanish.

    What is not finished lies in `folder`, by default `.partial/`; shards have one each.
    """

    def __init__(self, store: Path, unit: int, corpus: str, folder: Path | None = None):
        self.store, self.unit, self.corpus = store, unit, corpus
        self.rows: list[dict] = []
        self.problems: list[Problem] = []
        self._samples = 0
        self._folder = store / PARTIAL if folder is None else folder
        self._temporary = temporary_path(self._folder, f"unit-{unit:06d}")
        self._file = None

    def __enter__(self) -> UnitWriter:
        self._file = open(self._temporary, "wb")
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._file.close()  # writes what is buffered, for which there may be no space
        finally:
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
        path = sidecar_path(self.store, self.unit)
        replace_file(path, json.dumps(sidecar).encode(), temporary_path(self._folder, path.name))


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
    progress: bool = False,
) -> None:
    """Makes a store out of finished units.

    Every unit is read and compared with its checksums first. The table of records lies in a file meanwhile, of
    which only a part is in memory: of 11 million records it is gigabytes.

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
      strict: a problem, or an identical signal, is an error.
      values: value set -> name -> description, see `Listing.values`.
      progress: tell how far reading is.

    Raises:
      DamagedUnits: some units are damaged.
      UserError: a problem under `strict`, no recording is left, or the disk is full.
    """
    import pyarrow as pa

    schema = record_schema(label_sets, values)
    partial = store / PARTIAL
    with (
        new_file(temporary_path(partial, "problems.jsonl")) as lines,
        new_file(temporary_path(partial, "records.arrow")) as rows,
    ):
        problems = _ProblemLines(lines, strict)
        for problem in first_problems:
            problems.add(problem)
        samples, counts, keys = _gather(
            verified_units(store, n_units, schema, values, progress), rows, schema, problems
        )
        chunk_samples = -(-int(samples.max()) // CHUNK_ROUNDING) * CHUNK_ROUNDING
        first = first_with_same_checksum(keys)
        del keys
        with pa.memory_map(rows.name) as mapped:
            records = pa.ipc.open_file(mapped).read_all()
            for problem in duplicate_problems(records, first, drop_duplicates):
                problems.add(problem)
            _put_in_place(lines, store / "problems.jsonl")
            if len(records):
                _close_shards(store)
                for unit in np.flatnonzero(samples).tolist():
                    os.truncate(chunk_path(store, unit), chunk_samples * BYTES_PER_SAMPLE)
                offsets = np.repeat(np.arange(n_units) * chunk_samples, counts)
                offsets += records.column("offset").to_numpy()
                tables = functools.partial(final_tables, records, offsets, first, drop_duplicates)
                described = _write_records(
                    store, tables, schema, label_sets, classes, descriptions, preprocessing
                )
                del tables
            del records
    if not len(first):
        # Nothing to continue: leave the explanation only, so that another try may use the same folder.
        shutil.rmtree(partial, ignore_errors=True)
        told = ", ".join(f"{kind} {n}" for kind, n in problems.kinds.most_common())
        raise UserError(
            f"No recording could be read ({told}); each is explained in {store / 'problems.jsonl'}."
        )
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
                **described,
                "values": {name: dict(numbers) for name, numbers in values.items()},
            }
        },
    }
    write_in_store(store, store / "zarr.json", _json(group))
    # A network drive keeps files that are still open, as the lock of `prepare` is, which comes back for it.
    shutil.rmtree(partial, ignore_errors=True)


class _ProblemLines:
    """problems.jsonl while it is written: a line each, not kept, for of millions of recordings each may have one."""

    def __init__(self, file: IO[bytes], strict: bool):
        self.kinds: Counter[str] = Counter()
        self._file, self._strict = file, strict

    def add(self, problem: Problem) -> None:
        """Writes one, or raises it as UserError under `strict`."""
        if self._strict:
            raise strict_error(problem)
        self.kinds[problem.kind] += 1
        self._file.write((json.dumps(vars(problem), ensure_ascii=False) + "\n").encode())


def _gather(units: Iterator[VerifiedUnit], rows: IO[bytes], schema, problems: _ProblemLines) -> tuple:
    """Puts the rows of all units into an Arrow file; returns samples and records per unit, int64 [units], and the
    checksums, uint64 [n, 2].
    """
    import pyarrow as pa

    samples, counts, keys = [], [], []
    with pa.ipc.new_file(rows, schema) as file:
        for unit in units:
            samples.append(unit.samples)
            counts.append(len(unit.table))
            keys.append(unit.keys)
            file.write_table(unit.table)
            for problem in unit.problems:
                problems.add(problem)
    rows.flush()
    return np.array(samples), np.array(counts), np.concatenate(keys)


def _put_in_place(file: IO[bytes], path: Path) -> None:
    """Renames a file of `new_file`, after what was written has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)


def _close_shards(store: Path) -> None:
    """Takes from shards the folders they write in: on a drive whose locks do not reach other hosts one may still run,
    and must put no file into the store any more.
    """
    for folder in (store / PARTIAL).glob("shard-*-of-*"):
        shutil.rmtree(folder)


def _write_records(
    store: Path,
    tables: Callable[[], Iterator],
    schema,
    label_sets: Sequence[str],
    classes: dict[str, list[str]] | None,
    descriptions: dict[str, dict[str, str]],
    preprocessing: Preprocessing,
) -> dict:
    """Writes records.parquet; returns what the group's attributes say of it.

    Args:
      tables: called twice; gives the rows as `pyarrow.Table` of one row group each.
    """
    counts = {name: Counter() for name in label_sets}
    for table in tables():
        for name in label_sets:
            counts[name] += count_codes(table.column(f"labels_{name}"))
    if classes is None:
        classes = {name: sorted(counts[name]) for name in label_sets if counts[name]}
        for name in label_sets:
            if name not in classes:
                schema = schema.remove(schema.get_field_index(f"labels_{name}"))
    fingerprint, n_records = Fingerprint(preprocessing), 0

    def written() -> Iterator:
        nonlocal n_records
        for table in tables():
            fingerprint.update(table)
            n_records += len(table)
            yield table.select(schema.names)

    with new_file(temporary_path(store / PARTIAL, "records.parquet")) as file:
        write_parquet(file, schema, written())
        _put_in_place(file, store / "records.parquet")
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
    return {
        "n_records": n_records,
        "fingerprint": fingerprint.hexdigest(),
        "table_digest": digest_of(store / "records.parquet"),
        "preprocessing": preprocessing.to_dict(),
        "classes": classes,
        "class_info": class_info,
    }


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


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
