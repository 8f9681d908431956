"""The figures and tables of a study as files: what `ecg-jax scaling`, `cka` and `efficiency` leave behind and `ecg-jax
report` reads.

A folder holds NAME.png, NAME.svg and NAME.csv of each figure, NAME.csv of each table, the numbers of the study
(scaling.json, ...), and `figures.json`, which says of each figure what it shows, what it does not show, and what it was
made of. That is removed before anything else is written and comes last: a folder that has it is whole.
"""

import csv
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import to_svg
from ecg_jax.files import write_atomic

INDEX = "figures.json"
#: One cell of a figure's data; None and NaN are empty.
Value = str | int | float | bool | None
_DPI = 150
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
# Of one figure; and of all files of a study that was cut short, with the notes of a sweep on its studies.
_OF_FIGURE = (".png", ".svg", ".csv")
_OF_STUDY = (*_OF_FIGURE, ".json", ".md")
# A cell may name hundreds of runs, which csv takes for damage.
_LONGEST_CELL = 2**30


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
        folder: it may be missing, empty, or hold the figures of an earlier study of the same kind.
        kind: as `write_figures` has it.
        study: `about["study"]` of a kind that has several.

    Raises:
        UserError: it is a file, or holds the figures of another study, or something else than figures.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder")
    if not (folder / INDEX).exists():
        for path in _visible(folder):
            if path.is_dir() or path.suffix not in _OF_STUDY:
                raise UserError(
                    f"--output={folder} holds something else than figures ({path.name}); name another folder"
                )
        return
    before = _index_of(folder)
    if before is None:
        raise UserError(
            f"{folder / INDEX} is damaged; remove it, or name another folder than --output={folder}"
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
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index if known and all(map(_NAME.fullmatch, names)) else None


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
        for name in (INDEX, *old):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    for name, data in content.items():
        write_atomic(folder / name, data)
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


def _from_csv(path: Path) -> list[list[str]]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    finally:
        csv.field_size_limit(before)


def read_figures(folder: str | Path) -> FigureFolder:
    """Reads a folder that `write_figures` wrote; cells come back as text.

    Raises:
        UserError: there is no such folder, or a file of it is missing or damaged; names the file.
    """
    folder = Path(folder)
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        figures = []
        for entry in index["figures"]:
            path = folder / f"{entry['name']}.csv"
            columns, *rows = _from_csv(path)
            picture = folder / f"{entry['name']}.png"
            if entry["picture"]:
                path = picture
                path.stat()
                path.with_suffix(".svg").stat()
            texts = (entry[field] for field in ("name", "title", "shows", "does_not_show"))
            figures.append(Figure(*texts, columns, rows, picture if entry["picture"] else None))
        return FigureFolder(folder, index["kind"], index["about"], tuple(figures))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged; run the command that wrote {folder} again") from error
