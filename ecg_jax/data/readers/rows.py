"""Tables beside the recordings of a corpus: .csv or the first sheet of an .xlsx, cells as text."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ecg_jax.data.recording import cannot_read
from ecg_jax.errors import UserError


def read_rows(path: Path, columns: Sequence[str], publisher: str) -> Iterator[dict[str, str]]:
    """The rows of a table that has at least these columns and one row.

    Args:
      path: .csv (UTF-8, with or without byte order mark) or .xlsx.
      columns: names of the first line that must be there; others are kept too.
      publisher: who publishes the table, for the advice in a message.

    Yields:
      Column name -> stripped text; an empty cell is "".

    Raises:
      UserError: it cannot be read, lacks a column (names the column and those found), has a row of another
        number of cells, or no row.
    """
    advice = f"take the file as {publisher} has it"
    rows = _xlsx_rows(path, advice) if path.suffix.lower() == ".xlsx" else _csv_rows(path, advice)
    _, names = next(rows, (0, []))
    names = [name.strip() for name in names]
    # The first column of a table that pandas wrote has no name.
    missing = [name or "''" for name in columns if name not in names]
    if missing:
        found = ", ".join(name for name in names if name) or "no columns"
        raise UserError(f"{path} has no column {', '.join(missing)} (found: {found}); {advice}.")
    n_rows = 0
    for line, cells in rows:
        if not any(cells):
            continue  # spreadsheets end in empty lines
        if len(cells) != len(names):
            raise UserError(
                f"{path}: line {line} has {len(cells)} cells, its first line {len(names)}; {advice}."
            )
        n_rows += 1
        yield {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
    if not n_rows:
        raise UserError(f"{path} has no rows; {advice}.")


def _csv_rows(path: Path, advice: str) -> Iterator[tuple[int, list[str]]]:
    try:
        # utf-8-sig: Excel begins a file with a byte order mark.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for cells in reader:
                yield reader.line_num, cells
    except OSError as error:
        raise cannot_read(path, error) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table: {error}; {advice}.") from error


def _xlsx_rows(path: Path, advice: str) -> Iterator[tuple[int, list[str]]]:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError) as error:
        raise UserError(f"{path} is no .xlsx table: {error}; {advice}.") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        sheet = book.worksheets[0]
        # The size a sheet states may be wrong; without it openpyxl reads to the end.
        sheet.reset_dimensions()
        width = None
        for line, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            texts = [_text(cell) for cell in cells]
            width = len(texts) if width is None else width
            # Empty cells at the end of a row are left out of the file.
            yield line, texts + [""] * (width - len(texts))
    finally:
        book.close()


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def convert_cell(
    path: Path, record_id: str, row: dict[str, str], column: str, convert: Callable[[str], Any], expected: str
) -> Any:
    """A cell as what it must be.

    Args:
      path: the table, for the message.
      record_id: the row, for the message.
      row: from `read_rows`.
      column: its column.
      convert: text -> value; raises ValueError or KeyError where the text is something else.
      expected: what the cell must be, for the message.

    Raises:
      UserError: it is not; names the table, the row, the column and the cell.
    """
    try:
        return convert(row[column])
    except (ValueError, KeyError, OverflowError):
        text = row[column] if len(row[column]) <= 80 else row[column][:80] + "..."
        raise UserError(
            f"{path}: the row of {record_id or 'no record'} has {text!r} in column {column}, which must be "
            f"{expected}; correct that row."
        ) from None


def not_empty(text: str) -> str:
    """The text itself.

    Raises:
      ValueError: it is empty.
    """
    if not text:
        raise ValueError
    return text


def age_or_none(text: str) -> float | None:
    """Years; None for an empty cell.

    Raises:
      ValueError: not a number of 0 or more.
    """
    if not text:
        return None
    age = float(text)
    if not 0 <= age < float("inf"):
        raise ValueError
    return age


def sex_or_none(text: str) -> str | None:
    """ "F" or "M" from F, M, female, male in any case; None for an empty cell.

    Raises:
      KeyError: anything else.
    """
    return {"f": "F", "female": "F", "m": "M", "male": "M", "": None}[text.lower()]
