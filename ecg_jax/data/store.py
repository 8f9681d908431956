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

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ecg_jax.data.chunk_files import ChunkFiles
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError

FORMAT_VERSION = 1
PARTIAL = ".partial"
SYNTHETIC = "synthetic"  # the corpus of signals that were made up
BYTES_PER_SAMPLE = 24  # 12 leads of int16


def digest_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
                f"The store {path} is incomplete; run the command that began it again (`ecg-jax prepare` or "
                "`ecg-jax synthesize`) to go on."
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
      chunk_samples, n_chunks: samples of each chunk, and how many chunks the array has.
      chunk_files: the files of the chunks that hold records.
    """

    def __init__(self, path: str | os.PathLike, check_files: bool = True):
        """Opens a store.

        Args:
          path: its folder.
          check_files: look whether every chunk file is there in full; damage is found when reading otherwise.

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
        self._identities = 0, ()
        self._table_digest: str | None = None
        self.chunk_samples, self.n_chunks = _read_array_metadata(self.path / "signal" / "zarr.json")
        self.chunk_files = ChunkFiles(
            self.path, self.chunk_samples * BYTES_PER_SAMPLE, self._occupied_chunks()
        )
        if check_files:
            self.chunk_files.check()

    def __len__(self) -> int:
        return self.attributes["n_records"]

    @property
    def synthetic(self) -> bool:
        """Whether its signals were made up; every result from it has to say so."""
        return self.corpus == SYNTHETIC

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
        if types.is_string(column.type):
            # One object for each different text: millions of records share patients, corpora and checksums.
            chunks, end = column.dictionary_encode().unify_dictionaries().chunks, 0
            texts = np.array([*(chunks[0].dictionary.to_pylist() if chunks else ()), None], object)
            for chunk in chunks:
                begin, end = end, end + len(chunk)
                out[begin:end] = texts[chunk.indices.fill_null(len(texts) - 1).to_numpy()]
        else:
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
            self._table_digest = digest_of(self.path / "records.parquet")
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
        chunks, within = np.divmod(starts, self.chunk_samples)
        if starts.min() < 0 or chunks.max() >= self.n_chunks or within.max() + n_samples > self.chunk_samples:
            raise ValueError("a crop lies outside the store or straddles two chunks")
        size = n_samples * BYTES_PER_SAMPLE
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        self.chunk_files.read(chunks, within * BYTES_PER_SAMPLE, size, buffer)
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
        offsets, lengths = self._places
        signal = self.read_crops(offsets[index : index + 1], int(lengths[index]))[0]
        if verify:
            record_id, expected = self._identity(index)
            if checksum(signal) != expected:
                raise UserError(
                    f"Record {record_id} of the store {self.path} is damaged (its checksum differs); "
                    "prepare the store anew."
                )
        return signal

    def row_groups(self, *names: str) -> Iterator[tuple[int, Mapping]]:
        """The columns `names`, or all, in the pieces in which the table lies on disk: a million rows at a time.

        Yields:
          (number of the first row, `pyarrow.Table` of the columns).

        Raises:
          UserError: the table is missing, damaged or has no such column.
        """
        path = self.path / "records.parquet"
        with _table_errors(path):
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, list(names) or None)
                    if names and table.num_columns != len(names):
                        raise UserError(
                            f"The store {self.path} has not all of the columns {', '.join(names)}."
                        )
                    yield first, table
                    first += len(table)

    def close(self) -> None:
        """Closes the chunk files; the next read opens them again."""
        self.chunk_files.close()

    def __getstate__(self) -> dict:
        # Of 11 million records the table is 3 GB and the places are 176 MB: a worker reads itself what it needs.
        left_out = ("_records", "_places", "_identities")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: Mapping) -> None:
        self.__dict__.update(state)
        self._records = None
        self._identities = 0, ()

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """(offset, length) of each record, int64 [n] each; read when first needed."""
        return self.column("offset"), self.column("length")

    def _identity(self, index: int) -> tuple[str, str]:
        """(record id, checksum) of a row. Ids and checksums of the piece of the table it lies in are kept."""
        first, table = self._identities
        if not first <= index < first + len(table):
            for first, table in self.row_groups("record_id", "checksum"):
                if index < first + len(table):
                    break
            self._identities = first, table
        return table["record_id"][index - first].as_py(), table["checksum"][index - first].as_py()

    def _occupied_chunks(self) -> frozenset[int]:
        """The chunks that hold records, without ever holding a column of the table.

        Raises:
          UserError: the table has another number of rows than the store, or a record outside the array.
        """
        occupied, rows = np.zeros(self.n_chunks, bool), 0
        for _, table in self.row_groups("offset"):
            chunks = table["offset"].to_numpy() // self.chunk_samples
            rows += len(chunks)
            if len(chunks) and not 0 <= chunks.min() <= chunks.max() < self.n_chunks:
                raise UserError(
                    f"The store {self.path} is damaged: records.parquet has a record outside the signal array; "
                    "prepare it anew."
                )
            occupied[chunks] = True
        if rows != len(self):
            raise UserError(
                f"The store {self.path} is damaged: records.parquet has {rows} rows instead of {len(self)}; "
                "prepare it anew."
            )
        return frozenset(np.flatnonzero(occupied).tolist())


@contextlib.contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    """Turns a table that cannot be read into a sentence."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path}: the file is missing or damaged; prepare the store anew."
        ) from error


def _read_table(path: Path, column: str | None = None):
    """The whole table, or the part of it that is one column (no column if there is none of that name)."""
    import pyarrow.parquet

    with _table_errors(path):
        if column is None:
            return pyarrow.parquet.read_table(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read([column] if column in file.schema_arrow.names else [])


def _read_array_metadata(path: Path) -> tuple[int, int]:
    """(samples per chunk, number of chunks) of the signal array."""
    try:
        metadata = json.loads(path.read_text())
        samples, _ = metadata["shape"]
        chunk_samples, _ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        n_chunks = samples // chunk_samples
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"Cannot read {path}: the file is missing or damaged; prepare the store anew."
        ) from error
    return chunk_samples, n_chunks
