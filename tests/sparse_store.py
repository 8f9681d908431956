"""A store of the size of HEEDB that takes no disk: a full table of records over chunk files that are holes.

11 million records of 10 s are 634 GB to whoever lists the folder and a table of some hundred megabytes to the disk.
Every signal reads as zeros and every checksum is that of zeros. What it proves is what depends on the number of
records: opening, selecting, shuffling, memory. What it cannot prove is the speed of a disk.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.record_table import ROW_GROUP, Fingerprint, record_schema
from ecg_jax.data.store import BYTES_PER_SAMPLE, FORMAT_VERSION, checksum
from ecg_jax.data.writer import array_metadata, unit_size

# Site-years of HEEDB (spec §6): all there are, and the sizes of those that are rungs of the paper's ladder.
PARTITIONS = tuple(
    f"{site}-{year}"
    for site, years in {
        "S0001": (1987, 1988, 1994, 2006, 2007, 2011, 2013, *range(2015, 2022)),
        "S0002": (1993, 1997, 1998, 2000, 2003, 2004, 2008, 2009, 2013, 2015, 2016, 2018, 2020, 2022),
        "S0003": (1990, 1994, 2009, 2010, 2013),
        "S0004": (2019,),
    }.items()
    for year in years
)
RUNGS = {"S0001-1987": 18_000, "S0003-1990": 45_000, "S0001-2019": 106_000, "S0001-2007": 753_000}
FOLDS = 20
CODES = tuple(f"C{code:03d}" for code in range(120))


def write_sparse_store(
    path: str | Path,
    n_records: int = 11_000_000,
    patients: int | None = None,
    seconds: float = 10,
    seed: int = 0,
) -> Path:
    """Writes a store of corpus "heedb" whose chunk files are holes, a function of its arguments only.

    Records stand in order of their partition, as `prepare` would write them; patients recur over partitions, a fold is
    a function of the patient, one record in 200 is marked as a duplicate of the one before it, label set `dx` has 0 to
    5 of 120 codes a record, the first ones common and the last ones rare.

    Args:
      path: folder to write; must not exist.
      n_records: rows of the table.
      patients: how many there are to draw from; None: 1.8 million for 11 million records.
      seconds: length of each record.
      seed: of patients, folds, labels.

    Returns:
      The path as `Path`.
    """
    import pyarrow.parquet

    path = Path(path)
    patients = max(1, round(n_records * 1.8 / 11)) if patients is None else patients
    preprocessing = Preprocessing()
    length = round(seconds * preprocessing.rate_hz)
    per_unit = unit_size(n_records)
    n_units = -(-n_records // per_unit)
    chunk_samples = -(-min(per_unit, n_records) * length // 240) * 240
    for unit in range(n_units):
        folder = path / "signal" / "c" / str(unit)
        folder.mkdir(parents=True)
        with open(folder / "0", "wb") as file:
            os.truncate(file.fileno(), chunk_samples * BYTES_PER_SAMPLE)

    bounds = np.cumsum(partition_sizes(n_records))
    counts = np.zeros(len(CODES), np.int64)
    schema = record_schema(("dx",))
    with pyarrow.parquet.ParquetWriter(path / "records.parquet", schema, compression="zstd") as writer:
        for first in range(0, n_records, ROW_GROUP):
            rows = np.arange(first, min(first + ROW_GROUP, n_records))
            table, codes = _table(rows, bounds, patients, length, per_unit, chunk_samples, seed, schema)
            counts += codes
            writer.write_table(table, row_group_size=ROW_GROUP)
    _write_metadata(path, n_records, n_units, chunk_samples, counts, preprocessing)
    return path


def partition_sizes(n_records: int) -> np.ndarray:
    """int64 [34], records of each of `PARTITIONS`: the paper's for its rungs, scaled; the others share the rest."""
    scale = n_records / 11_000_000
    fixed = {name: round(size * scale) for name, size in RUNGS.items()}
    others = [name for name in PARTITIONS if name not in RUNGS]
    rest = n_records - sum(fixed.values())
    edges = np.linspace(0, rest, len(others) + 1).astype(np.int64)
    sizes = {**fixed, **dict(zip(others, np.diff(edges), strict=True))}
    return np.array([sizes[name] for name in PARTITIONS], np.int64)


def _table(rows, bounds, patients, length, per_unit, chunk_samples, seed, schema):
    """The records `rows` as a table, and int64 [120] how many carry each code."""
    import pyarrow as pa

    rng = np.random.default_rng((seed, int(rows[0])))
    n = len(rows)
    patient = rng.integers(patients, size=n)
    site_year = np.array([name.replace("-", "/").encode() for name in PARTITIONS])
    partition = np.searchsorted(bounds, rows, side="right")
    record_id = _text(n, b"de_", _digits(rows, 9))
    source = _text(n, b"WFDB/", _letters(site_year[partition]), b"/de_", _digits(rows, 9), b".hea")
    duplicate = (rng.integers(200, size=n) == 0) & (np.arange(n) > 0)
    before = pa.array(np.maximum(np.arange(n) - 1, 0), mask=~duplicate)
    n_codes = rng.integers(6, size=n)
    code = (len(CODES) * rng.random(int(n_codes.sum())) ** 2).astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(n_codes)]).astype(np.int32)
    zeros = pa.array([checksum(np.zeros((length, 12), np.int16))])
    sex = pa.array(["F", "M", None]).take(pa.array(rng.choice(3, n, p=[0.49, 0.49, 0.02])))
    columns = {
        "record_id": record_id,
        "patient_id": _text(n, b"", _digits(patient, 9)),
        "corpus": pa.array(["heedb"]).take(pa.array(np.zeros(n, np.int32))),
        "fold": (_scrambled(patient) % FOLDS + 1).astype(np.int32),
        "offset": rows // per_unit * chunk_samples + rows % per_unit * length,
        "length": np.full(n, length, np.int64),
        "checksum": zeros.take(pa.array(np.zeros(n, np.int32))),
        "source_file": source,
        "source_rate": np.where(rng.random(n) < 0.5, 250.0, 500.0),
        "age": np.round(rng.uniform(18, 95, n), 1),
        "sex": sex,
        "missing_leads": np.zeros(n, np.int32),
        "saturated": np.zeros(n, np.int64),
        "duplicate_of": record_id.take(before),
        "flags": pa.ListArray.from_arrays(np.zeros(n + 1, np.int32), pa.array([], pa.string())),
        "labels_dx": pa.ListArray.from_arrays(ends, pa.array(CODES).take(pa.array(code))),
    }
    table = pa.table([pa.array(columns[name]) for name in schema.names], schema=schema)
    return table, np.bincount(code, minlength=len(CODES))


def _scrambled(values: np.ndarray) -> np.ndarray:
    """uint64 [n]: neighbours far apart (Fibonacci hashing)."""
    return (values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)


def _digits(values: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, width], decimal digits with leading zeros."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    return (values[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def _letters(values: np.ndarray) -> np.ndarray:
    """uint8 [n, width] of byte strings that are all of one width."""
    return values.view(np.uint8).reshape(len(values), -1)


def _text(n: int, *parts):
    """A string array from parts that are bytes, the same in each row, or uint8 [n, width]."""
    import pyarrow as pa

    parts = [
        np.broadcast_to(np.frombuffer(part, np.uint8), (n, len(part))) if isinstance(part, bytes) else part
        for part in parts
    ]
    letters = np.concatenate(parts, axis=1)
    ends = np.arange(n + 1, dtype=np.int32) * letters.shape[1]
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(letters))


def _write_metadata(path, n_records, n_units, chunk_samples, counts, preprocessing) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path / "records.parquet") as file:
        fingerprint = Fingerprint(preprocessing)
        for group in range(file.num_row_groups):
            fingerprint.update(file.read_row_group(group, ["record_id", "checksum"]))
    array = array_metadata(n_units * chunk_samples, chunk_samples)
    (path / "signal" / "zarr.json").write_text(json.dumps(array))
    attributes = {
        "format_version": FORMAT_VERSION,
        "corpus": "heedb",
        "source": "",
        "source_rate": None,
        "source_digest": "",
        "clip_mv": None,
        "duplicates": "keep",
        "assume_gain": None,
        "fold_source": "a hash of the patient",
        "leads": list(preprocessing.leads),
        "rate_hz": preprocessing.rate_hz,
        "unit": "uV",
        "n_records": n_records,
        "fingerprint": fingerprint.hexdigest(),
        "preprocessing": preprocessing.to_dict(),
        "classes": {"dx": list(CODES)},
        "class_info": {
            "dx": {code: {"count": int(n), "description": ""} for code, n in zip(CODES, counts, strict=True)}
        },
        "values": {},
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ecg_jax": attributes}}
    (path / "problems.jsonl").write_text("")
    (path / "zarr.json").write_text(json.dumps(group))
