"""The figures and tables of a study as files: what `ecg-jax scaling`, `cka` and `efficiency` leave behind and `ecg-jax
report` reads.

A folder holds NAME.png, NAME.svg and NAME.csv of each figure, NAME.csv of each table, the numbers of the study
(scaling.json, ...), and `figures.json`, which says of each figure what it shows, what it does not show, and what it was
made of. That is removed before anything else is written and comes last: a folder that has it is whole. From before the
first file until then a hidden marker says whose the files are.
"""

import contextlib
import csv
import dataclasses
import datetime
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import to_svg
from ecg_jax.files import read_object, write_atomic
from ecg_jax.studies.report.read import check_fields

INDEX = "figures.json"
#: One cell of a figure's data; None and NaN are empty.
Value = str | int | float | bool | None
_DPI = 150
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_OF_FIGURE = (".png", ".svg", ".csv")
# In a folder whose study is being written, or was cut short.
_UNFINISHED = ".unfinished"
# A sweep's, on its studies.
_NOTES = ("made_of.json", "failed.json")
# A cell may name hundreds of runs, which csv takes for damage.
_LONGEST_CELL = 2**30
# Of the index, of each figure in it, and of what `about` may hold.
_INDEX_FIELDS = {"kind": str, "about": dict, "figures": list}
_ENTRY_FIELDS = {"name": str, "title": str, "shows": str, "does_not_show": str, "picture": bool}
_ABOUT_FIELDS = {
    "command": (list, str), "runs": list, "versions": dict, "device": (str, type(None)), "date": str, "study": str
}  # fmt: skip
# Suffix of a picture -> what is in its first bytes; an SVG is as wide as it says.
_HEAD_BYTES = 4096
SVG_WIDTH = re.compile(rb'<svg[^>]*? width="(\d+(?:\.\d+)?)pt"')
_HEADS = {".png": re.compile(rb"\A\x89PNG\r\n\x1a\n"), ".svg": SVG_WIDTH}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure with its data, or a table.

    Attributes:
        name: of its files, lower case.
        title: a short heading.
        shows: one paragraph, what can be read from it; plain text.
        does_not_show: one paragraph, what must not be read from it; plain text.
        columns, rows: its data, every number that is drawn; None is an empty cell.
        picture: a matplotlib Figure; None for a table.
    """

    name: str
    title: str
    shows: str
    does_not_show: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    picture: Any = None


@dataclasses.dataclass(frozen=True)
class FigureFolder:
    """A folder as it was written.

    Attributes:
        folder: where.
        kind: "scaling", "cka", "efficiency", ...
        about: what it was made of: command, runs, versions, date, device.
        figures: in the order of writing; `picture` is the path of the .png, or None for a table.
    """

    folder: Path
    kind: str
    about: dict[str, Any]
    figures: tuple[Figure, ...]


def check_folder(folder: str | Path, kind: str, study: str | None = None) -> None:
    """Refuses an --output that is not for the figures of this study; nothing is written.

    Args:
        folder: it may be missing, empty, or hold the figures of an earlier study of the same kind, or what one that
            was cut short has left.
        kind: as `write_figures` has it.
        study: `about["study"]` of a kind that has several.

    Raises:
        UserError: it is a file, or holds the figures of another study, or something else than figures.
    """
    folder = Path(folder)
    try:
        folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"cannot write into --output={folder}: {error.strerror}; name another folder"
        ) from error
    if not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder")
    if not (folder / INDEX).exists():
        others = [path.name for path in _visible(folder) if path.name not in _NOTES]
        if others and not (folder / _UNFINISHED).exists():
            raise UserError(
                f"--output={folder} holds something else than figures, or a study that was cut short ({others[0]}); "
                "name another folder"
            )
        return
    before = _index_of(folder)
    if before is None:
        raise UserError(
            f"{folder / INDEX} is damaged; remove {folder}, or name another folder than --output={folder}"
        )
    if (before["kind"], before["about"].get("study")) != (kind, study):
        raise UserError(f"--output={folder} holds the figures of another study; choose another folder")


def open_folder(folder: str | Path, kind: str, study: str | None = None) -> Path:
    """Makes a folder that `check_folder` does not refuse and tries to write into it, before any work is done.

    Raises:
        UserError: it cannot be written, or see `check_folder`.
    """
    check_folder(folder, kind, study)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into --output={folder}: {error.strerror}; name another folder"
        ) from error
    return Path(folder)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read --output={folder}: {error.strerror}; name another folder") from error


def _index_of(folder: Path) -> dict[str, Any] | None:
    """The index of the study in a folder; None where there is none that this module wrote."""
    try:
        index = json.loads((folder / INDEX).read_text())
        names = [entry["name"] for entry in index["figures"]]
        known = isinstance(index["kind"], str) and isinstance(index["about"], dict)
        return index if known and all(map(_NAME.fullmatch, names)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_figures(
    folder: str | Path,
    kind: str,
    figures: Sequence[Figure],
    about: dict[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Writes a study: its own files, figures with their data, and the index last.

    All are drawn first, then the index of an earlier study in the folder is removed, and what only that one had: a
    study that is cut short leaves either the one before or no index.

    Args:
        folder: made if needed; see `check_folder` for what should not be in it.
        kind: of the study.
        figures: each name once.
        about: what the figures were made of, as JSON can hold it.
        files: name -> content of the study's own files.

    Returns:
        The files written, the index last.

    Raises:
        UserError: the folder cannot be written.
        ValueError: a name twice or not a file's, or a row that does not fit its columns; nothing is written then.
    """
    folder = Path(folder)
    names = [figure.name for figure in figures]
    content = dict(files or {})
    for figure in figures:
        if not _NAME.fullmatch(figure.name) or names.count(figure.name) > 1:
            raise ValueError(f"{figure.name!r} is no name of a figure, or is there twice")
        try:
            content[f"{figure.name}.csv"] = data_csv(figure.columns, figure.rows)
        except ValueError as error:
            raise ValueError(f"{figure.name}: {error}") from error
        if figure.picture is not None:
            buffer = io.BytesIO()
            figure.picture.savefig(buffer, format="png", dpi=_DPI)
            content[f"{figure.name}.png"] = buffer.getvalue()
            content[f"{figure.name}.svg"] = to_svg(figure.picture)
    entries = [
        {field: getattr(figure, field) for field in ("name", "title", "shows", "does_not_show")}
        | {"picture": figure.picture is not None}
        for figure in figures
    ]
    index = {"kind": kind, "about": about, "figures": entries}
    content[INDEX] = (json.dumps(index, indent=1, allow_nan=False) + "\n").encode()
    before = _index_of(folder) or {"figures": []}
    old = [f"{entry['name']}{suffix}" for entry in before["figures"] for suffix in _OF_FIGURE]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _UNFINISHED).touch()
        for name in (INDEX, *old):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    for name, data in content.items():
        write_atomic(folder / name, data)
    with contextlib.suppress(OSError):  # which would say nothing beside an index
        (folder / _UNFINISHED).unlink()
    return [folder / name for name in content]


def data_csv(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> bytes:
    """A figure's data as CSV; undefined numbers are empty cells.

    Raises:
        ValueError: a row does not fit the columns.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells, {len(columns)} columns")
        lines.writerow(["" if value is None or value != value else value for value in row])
    return text.getvalue().encode()


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a CSV file, as text.

    Raises:
        UserError: it is missing, no CSV, empty, or has rows of different lengths.
    """
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise _damaged(path) from error
    finally:
        csv.field_size_limit(before)
    if not columns or any(len(row) != len(columns) or "\0" in "".join(row) for row in (columns, *rows)):
        raise _damaged(path)
    return columns, rows


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is missing or damaged; run the command that wrote it again")


def read_figures(folder: str | Path) -> FigureFolder:
    """Reads a folder that `write_figures` wrote; cells come back as text.

    Raises:
        UserError: there is no such folder, or a file of it is missing or damaged; names the file.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise _damaged(path)
    index = read_object(path)
    check_fields(path, index, _INDEX_FIELDS)
    about, entries = index["about"], index["figures"]
    check_fields(path, about, {name: kind for name, kind in _ABOUT_FIELDS.items() if name in about}, "about")
    for i, entry in enumerate(entries):
        check_fields(path, entry, _ENTRY_FIELDS, f"figures[{i}]")
    names = [entry["name"] for entry in entries]
    lists = [about[name] for name in ("command", "runs") if name in about]
    if (
        not names
        or len(set(names)) < len(names)
        or not all(map(_NAME.fullmatch, (index["kind"], *names)))
        or not all(isinstance(each, str) for listed in lists for each in listed)
        or ("date" in about and not _is_moment(about["date"]))
    ):
        raise _damaged(path)
    figures = []
    for entry in entries:
        columns, rows = read_csv(folder / f"{entry['name']}.csv")
        picture = folder / f"{entry['name']}.png" if entry["picture"] else None
        for suffix, head in _HEADS.items() if picture else ():
            _check_head(picture.with_suffix(suffix), head)
        texts = (entry[field] for field in ("name", "title", "shows", "does_not_show"))
        figures.append(Figure(*texts, columns, rows, picture))
    return FigureFolder(folder, index["kind"], about, tuple(figures))


def _is_moment(text: str) -> bool:
    """Whether a date says a time and its zone."""
    try:
        return datetime.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _check_head(path: Path, head: re.Pattern[bytes]) -> None:
    try:
        with path.open("rb") as file:
            known = head.search(file.read(_HEAD_BYTES))
    except OSError as error:
        raise _damaged(path) from error
    if not known:
        raise _damaged(path)
