"""Big tables in parts of some columns, as Arrow: tables of millions of rows never become Python objects."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ecg_jax.data.recording import cannot_read
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes parsed at once; a row must fit in, and those of MIMIC's mds_ed.csv have 1,900 cells.
_BLOCK = 1 << 24


def read_batches(
    path: Path, columns: Mapping[str, str], publisher: str, delimiter: str = ","
) -> Iterator[pa.RecordBatch]:
    """Some columns of a CSV file, gzipped or not, in parts and in order.

    Args:
      path: the file.
      columns: name -> "int", "float", "time" (to the second), "bool" or "text".
      publisher: who publishes the table, for the advice in a message.
      delimiter: what stands between cells.

    Yields:
      The columns asked for; an empty cell is null, a quoted empty text is not. At least one part, which may have no
      rows.

    Raises:
      UserError: the file cannot be read, lacks a column, or a cell is not what it must be.
    """
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    _check_header(path, columns, publisher, delimiter)
    types = {"int": pa.int64(), "float": pa.float64(), "time": pa.timestamp("s"), "bool": pa.bool_()}
    types["text"] = pa.string()
    options = {
        "read_options": pa_csv.ReadOptions(block_size=_BLOCK),
        "parse_options": pa_csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
        "convert_options": pa_csv.ConvertOptions(
            include_columns=list(columns),
            column_types={name: types[kind] for name, kind in columns.items()},
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    }
    try:
        with pa_csv.open_csv(path, **options) as reader:
            yield pa.RecordBatch.from_pylist([], schema=reader.schema)
            yield from reader
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not the table {publisher} has: {error}; take the file as it is there."
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def header_of(path: Path, publisher: str, delimiter: str = ",") -> list[str]:
    """The names in the first line of a CSV file, gzipped or not.

    Raises:
      UserError: it cannot be read, or is no text.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            first_line = file.readline().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise cannot_read(path, error if isinstance(error, OSError) else OSError(str(error))) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no CSV file: {error}; take the file as {publisher} has it.") from error
    return next(csv.reader([first_line], delimiter=delimiter), [])


def _check_header(path: Path, columns: Collection[str], publisher: str, delimiter: str) -> None:
    header = header_of(path, publisher, delimiter)
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"{path} is not the table {publisher} has: it has no column {', '.join(missing)}; take the file as "
            "it is there, or remove it to do without."
        )
