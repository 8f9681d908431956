"""The on-disk store: int16 microvolts, time-major, one chunk = one file, read with `os.preadv`.

    STORE/zarr.json            Zarr v3 group; attributes["ecg_jax"] says what the store is (written last)
    STORE/signal/zarr.json     array int16 [samples, 12], uncompressed little-endian, default chunk keys
    STORE/signal/c/<i>/0       chunk i: the records of work unit i, back to back, then zeros (sparse)
    STORE/records.parquet      one row per record
    STORE/problems.jsonl       one line per problem met while preparing

A record never straddles a chunk, so a crop is one `preadv` into the batch; a chunk without records has no
file. Any Zarr v3 reader opens the array.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError

FORMAT_VERSION = 1
PARTIAL = ".partial"
BYTES_PER_SAMPLE = 24  # 12 leads of int16

# Descriptors kept open per process; chunks beyond that are opened for each read. Well under the usual limit
# of 1024.
MAX_OPEN_CHUNKS = 512


def checksum(signal: np.ndarray) -> str:
    """128-bit BLAKE2b of the little-endian bytes of an int16 signal [T, 12], as hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(signal, "<i2").data, digest_size=16).hexdigest()


def read_attributes(path: Path) -> dict:
    """The `ecg_jax` attributes of a complete store.

    Raises:
      UserError: there is no store, it is incomplete, damaged, or of another format version.
    """
    if not path.is_dir():
        raise UserError(
            f"There is no store at {path}; write one with `ecg-jax prepare CORPUS SOURCE {path}`."
        )
    metadata = path / "zarr.json"
    if not metadata.is_file():
        if (path / PARTIAL).is_dir():
            raise UserError(
                f"The store {path} is incomplete; run the `ecg-jax prepare` command that began it again to "
                "go on."
            )
        raise UserError(f"The folder {path} is not a store of ecg_jax (it has no zarr.json).")
    try:
        attributes = json.loads(metadata.read_text())["attributes"]["ecg_jax"]
        version = attributes["format_version"]
    except OSError as error:
        raise UserError(f"Cannot read {metadata}: {error.strerror}; make it readable.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{metadata} does not describe a store of ecg_jax; was it written by another tool?"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"The store {path} has format version {version}, this ecg_jax reads version {FORMAT_VERSION}; "
            "prepare it anew."
        )
    return attributes


class Store:
    """A store opened for reading. Safe to share between threads, and to pickle into worker processes.

    Attributes:
      path: its folder.
      corpus: name of the corpus it was made from.
      leads: names along the last axis of every signal.
      rate_hz: samples per second.
      preprocessing: the contract its signals were made under.
      classes: label set -> class names in fixed order; a record's labels are in column `labels_<set>`.
      class_info: label set -> class name -> {"count": records, "description": text, empty where the corpus
        has none}.
      values: value set -> name -> description with its unit, of the numbers a record may have; see `value_matrix`.
      fold_source: where the folds come from.
      fingerprint: SHA-256 over record ids, checksums and preprocessing.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens a store and checks that every chunk file is there in full.

        Raises:
          UserError: no store, incomplete, another format version, a missing or truncated file.
        """
        self.path = Path(path)
        attributes = read_attributes(self.path)
        self.corpus: str = attributes["corpus"]
        self.leads: tuple[str, ...] = tuple(attributes["leads"])
        self.rate_hz: float = float(attributes["rate_hz"])
        self.preprocessing = Preprocessing.from_dict(attributes["preprocessing"])
        self.classes: dict[str, list[str]] = attributes["classes"]
        self.class_info: dict[str, dict] = attributes["class_info"]
        # Stores written before there were values have no such attribute.
        self.values: dict[str, dict[str, str]] = attributes.get("values", {})
        self.fold_source: str = attributes["fold_source"]
        self.fingerprint: str = attributes["fingerprint"]
        self.attributes: dict = attributes
        self._records = None
        self._table_digest: str | None = None
        self._offsets = self.column("offset")
        self._lengths = self.column("length")
        if len(self) != attributes["n_records"]:
            raise UserError(
                f"The store {self.path} is damaged: records.parquet has {len(self)} rows instead "
                f"of {attributes['n_records']}; prepare it anew."
            )
        self._chunk_samples, self._n_chunks = _read_array_metadata(self.path / "signal" / "zarr.json")
        self._occupied = frozenset(np.unique(self._offsets // max(self._chunk_samples, 1)).tolist())
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        self._check_chunk_files()

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def records(self):
        """One row per record in order of `offset`; read when first needed, not pickled along."""
        if self._records is None:
            self._records = _read_table(self.path / "records.parquet")
        return self._records

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} records of {self.corpus}, {self.rate_hz:g} Hz)"

    def column(self, name: str) -> np.ndarray:
        """A column of `records` as a NumPy array: numbers as such, text and lists as objects, null as None.

        Raises:
          UserError: there is no such column.
        """
        import pyarrow.types as types

        column = self.arrow_column(name)
        if types.is_integer(column.type) and column.null_count == 0:
            return column.to_numpy()
        if types.is_floating(column.type):
            return column.to_numpy()
        out = np.empty(len(column), object)
        out[:] = column.to_pylist()
        return out

    def arrow_column(self, name: str):
        """A column of `records` as a `pyarrow.ChunkedArray`: 11 million strings as objects of Python take gigabytes and
        minutes, in Arrow they take neither.

        Raises:
          UserError: there is no such column.
        """
        # Of 11 million records one column is read in seconds, the whole table is gigabytes.
        table = _read_table(self.path / "records.parquet", name) if self._records is None else self._records
        if name not in table.column_names:
            names = ", ".join(self.records.column_names)
            raise UserError(f"The store {self.path} has no column {name!r}; it has {names}.")
        return table.column(name)

    def table_digest(self) -> str:
        """SHA-256 of `records.parquet`: unlike the fingerprint, which is of signals, it tells other labels, folds,
        patients and values from those.
        """
        if self._table_digest is None:
            with open(self.path / "records.parquet", "rb") as file:
                self._table_digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self._table_digest

    def value_matrix(self, name: str) -> np.ndarray:
        """The numbers of one value set.

        Args:
          name: a key of `values`.

        Returns:
          float64 [n, K] in the order of `values[name]`, NaN where unknown.

        Raises:
          UserError: there is no such value set.
        """
        if name not in self.values:
            known = ", ".join(self.values) or "none"
            raise UserError(f"The store {self.path} has no value set {name!r}; it has {known}.")
        column = _read_table(self.path / "records.parquet", f"values_{name}").column(0).combine_chunks()
        numbers = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        return numbers.reshape(len(self), len(self.values[name]))

    def read_crops(self, starts: np.ndarray, n_samples: int, out: np.ndarray | None = None) -> np.ndarray:
        """Reads crops straight from the chunk files into one array.

        Args:
          starts: int64 [B], first sample of each crop in the whole `signal` array: a record's `offset` plus
            the position within the record. That the crop ends within the record is the caller's care; that
            it ends within the chunk is checked.
          n_samples: length of every crop.
          out: int16 [B, n_samples, 12], C-contiguous, to read into; allocated if None.

        Returns:
          int16 [B, n_samples, 12] microvolts (`out` if given).

        Raises:
          ValueError: a crop leaves its chunk, or `out` does not fit.
          UserError: a chunk file is missing or ends too early.
        """
        starts = np.asarray(starts, np.int64)
        shape = (len(starts), n_samples, 12)
        if out is None:
            out = np.empty(shape, "<i2")
        elif out.shape != shape or out.dtype != np.int16 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous int16 array of shape {shape}")
        if len(starts) == 0 or n_samples == 0:
            return out
        chunks, within = np.divmod(starts, self._chunk_samples)
        if (
            starts.min() < 0
            or chunks.max() >= self._n_chunks
            or within.max() + n_samples > self._chunk_samples
        ):
            raise ValueError("a crop lies outside the store or straddles two chunks")
        size = n_samples * BYTES_PER_SAMPLE
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        fds, preadv = self._fds, os.preadv
        end = 0
        for chunk, position in zip(chunks.tolist(), (within * BYTES_PER_SAMPLE).tolist(), strict=True):
            begin, end = end, end + size
            fd = fds[chunk] if chunk in fds else self._open(chunk)
            if fd is None:
                self._read_uncached(chunk, position, buffer[begin:end])
            elif preadv(fd, (buffer[begin:end],), position) != size:
                self._read_rest(fd, chunk, position, buffer[begin:end])
        return out

    def read(self, index: int, verify: bool = False) -> np.ndarray:
        """Reads one whole record.

        Args:
          index: row of `records`.
          verify: compare the checksum.

        Returns:
          int16 [length, 12] microvolts.

        Raises:
          UserError: a chunk file is missing or short, or the checksum differs.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a store of {len(self)}; rows are 0 to {len(self) - 1}")
        signal = self.read_crops(self._offsets[index : index + 1], int(self._lengths[index]))[0]
        if verify:
            row = self.records.slice(index, 1).to_pylist()[0]
            if checksum(signal) != row["checksum"]:
                raise UserError(
                    f"Record {row['record_id']} of the store {self.path} is damaged (its checksum differs); "
                    "prepare the store anew."
                )
        return signal

    def close(self) -> None:
        """Closes the chunk files; the next read opens them again."""
        with self._lock:
            for fd in self._fds.values():
                if fd is not None:
                    os.close(fd)
            self._fds.clear()

    def __getstate__(self) -> dict:
        # Descriptors and locks belong to one process; a table of 11 million records is 3 GB no worker needs.
        left_out = ("_fds", "_lock", "_records")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: Mapping) -> None:
        self.__dict__.update(state)
        self._records = None
        self._fds = {}
        self._lock = threading.Lock()

    def __del__(self):
        # At interpreter exit modules are gone already, and the system closes what is open.
        if "_fds" in self.__dict__ and not sys.is_finalizing():
            self.close()

    def _chunk_path(self, chunk: int) -> Path:
        return self.path / "signal" / "c" / str(chunk) / "0"

    def _check_chunk_files(self) -> None:
        """One `stat` per chunk that holds records: a damaged copy is found here and not at step 50 000."""
        expected = self._chunk_samples * BYTES_PER_SAMPLE
        for chunk in sorted(self._occupied):
            path = self._chunk_path(chunk)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"The store {self.path} is damaged: its file {path} is missing.") from error
            if size != expected:
                raise UserError(
                    f"The store {self.path} is damaged: its file {path} has {size} bytes instead of "
                    f"{expected}; copy or prepare it again."
                )

    def _open(self, chunk: int) -> int | None:
        """The cached descriptor of a chunk; None when the cache is full or the chunk has no file."""
        with self._lock:
            if chunk in self._fds:
                return self._fds[chunk]
            if len(self._fds) >= MAX_OPEN_CHUNKS or chunk not in self._occupied:
                return None
            try:
                self._fds[chunk] = os.open(self._chunk_path(chunk), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"Cannot open {self._chunk_path(chunk)}: {error.strerror}.") from error
            return self._fds[chunk]

    def _read_uncached(self, chunk: int, position: int, target: memoryview) -> None:
        if chunk not in self._occupied:
            target[:] = bytes(len(target))
            return
        try:
            fd = os.open(self._chunk_path(chunk), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"Cannot open {self._chunk_path(chunk)}: {error.strerror}.") from error
        try:
            self._read_rest(fd, chunk, position, target)
        finally:
            os.close(fd)

    def _read_rest(self, fd: int, chunk: int, position: int, target: memoryview) -> None:
        """Reads until `target` is full: the kernel may hand over less than asked for."""
        done = 0
        while done < len(target):
            n = os.preadv(fd, (target[done:],), position + done)
            if n == 0:
                raise UserError(
                    f"The store {self.path} is damaged: its file {self._chunk_path(chunk)} ends too early; "
                    "copy or prepare it again."
                )
            done += n


def _read_table(path: Path, column: str | None = None):
    """The whole table, or the part of it that is one column (no column if there is none of that name)."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if column is None:
            return pyarrow.parquet.read_table(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read([column] if column in file.schema_arrow.names else [])
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path}: the file is missing or damaged; prepare the store anew."
        ) from error


def _read_array_metadata(path: Path) -> tuple[int, int]:
    """(samples per chunk, number of chunks) of the signal array."""
    try:
        metadata = json.loads(path.read_text())
        samples, _ = metadata["shape"]
        chunk_samples, _ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Cannot read {path}: the file is missing or damaged; prepare the store anew."
        ) from error
    return chunk_samples, samples // chunk_samples
