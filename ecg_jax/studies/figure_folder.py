"""The figures and tables of a study as files: what `ecg-jax scaling`, `cka` and `efficiency` leave behind and `ecg-jax
report` reads.

A folder holds NAME.png, NAME.svg and NAME.csv of each figure, NAME.csv of each table, and `figures.json`, which is
written last and says of each what it shows, what it does not show, and what it was made of.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import to_svg
from ecg_jax.files import write_atomic

INDEX = "figures.json"
_DPI = 150
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


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
    rows: Sequence[Sequence[str | int | float | bool | None]]
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


def write_figures(
    folder: str | Path, kind: str, figures: Sequence[Figure], about: dict[str, Any]
) -> list[Path]:
    """Writes figures with their data, and the index last.

    Args:
        folder: made if needed.
        kind: of the study.
        figures: each name once.
        about: what the figures were made of, as JSON can hold it.

    Returns:
        The files written, the index last.

    Raises:
        UserError: the folder cannot be written.
        ValueError: a name twice or not a file's, or a row that does not fit its columns.
    """
    folder = Path(folder)
    names = [figure.name for figure in figures]
    for figure in figures:
        if not _NAME.fullmatch(figure.name) or names.count(figure.name) > 1:
            raise ValueError(f"{figure.name!r} is no name of a figure, or is there twice")
        if wrong := [row for row in figure.rows if len(row) != len(figure.columns)]:
            raise ValueError(f"{figure.name}: a row of {len(wrong[0])} cells, {len(figure.columns)} columns")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    written = []

    def write(name: str, data: bytes) -> None:
        write_atomic(folder / name, data)
        written.append(folder / name)

    for figure in figures:
        if figure.picture is not None:
            buffer = io.BytesIO()
            figure.picture.savefig(buffer, format="png", dpi=_DPI)
            write(f"{figure.name}.png", buffer.getvalue())
            write(f"{figure.name}.svg", to_svg(figure.picture))
        write(f"{figure.name}.csv", _to_csv(figure).encode())
    entries = [
        {field: getattr(figure, field) for field in ("name", "title", "shows", "does_not_show")}
        | {"picture": figure.picture is not None}
        for figure in figures
    ]
    index = {"kind": kind, "about": about, "figures": entries}
    write(INDEX, (json.dumps(index, indent=1, allow_nan=False) + "\n").encode())
    return written


def _to_csv(figure: Figure) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(figure.columns)
    for row in figure.rows:
        lines.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return text.getvalue()


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
            with open(path, newline="", encoding="utf-8") as file:
                columns, *rows = csv.reader(file)
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
