"""Tables as data: cells with intervals and marks, the same for the page, CSV and LaTeX."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
#: Names of scores for people; those that fall as a model gets better end in a falling arrow.
SCORES = {
    "macro_auroc": "macro AUROC ↑",
    "micro_auroc": "micro AUROC ↑",
    "macro_auprc": "macro AUPRC ↑",
    "fmax": "Fmax ↑",
    "brier": "Brier ↓",
    "ece": "ECE ↓",
    "challenge_2020": "Challenge 2020 ↑",
    "challenge_2021": "Challenge 2021 ↑",
    "mae": "MAE ↓",
    "r2": "R² ↑",
}


@dataclass(frozen=True)
class Cell:
    """One cell: a text, or a value with its interval."""

    text: str
    interval: str = ""
    """"[low, high]" or empty."""
    mark: str = ""
    """"best", "tied" (not told from the best), "good", "warn", "bad", "mute" or ""."""
    shade: float | None = None
    """0 to 1: how dark the cell of a heat map is."""
    anchor: str = ""
    """Id on the page that other cells link to."""
    link: str = ""
    """Anchor that the text leads to."""

    @property
    def plain(self) -> str:
        """All of it as text."""
        return f"{self.text} {self.interval}" if self.interval else self.text


@dataclass(frozen=True)
class Table:
    """A table with its caption; every row has a cell for each column."""

    name: str
    """Of its files, and its anchor."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    """So many columns from the left hold text, the rest numbers."""
    spans: Sequence[tuple[str, int]] = ()
    """(label, number of columns) above the head; empty for none."""
    sections: Sequence[int] = field(default_factory=tuple)
    """Rows above which a line is drawn."""
    bad_columns: Sequence[int] = field(default_factory=tuple)
    """Columns whose heads are a warning."""
    most: int | None = None
    """So many rows stand on the page, all in the files; None for all."""


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with a true minus sign; a dash for None and NaN."""
    if value is None or not np.isfinite(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def count(n: int, what: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def interval(point, low, high, mark: str = "", digits: int = 3, sign: bool = False) -> Cell:
    """ "0.934" with "[0.929, 0.941]"."""
    if point is None or not np.isfinite(point):
        return Cell(DASH, mark="mute")
    between = f"[{number(low, digits, sign)}, {number(high, digits, sign)}]"
    return Cell(number(point, digits, sign), between, mark)


def p_value(p: float | None, resamples: int) -> str:
    """A p-value of a bootstrap, which cannot be smaller than its number of resamples allows."""
    if p is None:
        return DASH
    least = 2 / (resamples + 1)
    return f"≤ {least:.2g}" if p <= least * 1.0001 else f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def texts(values: Iterable[Any]) -> list[Cell]:
    """Cells of a row, of which some may be cells already."""
    return [value if isinstance(value, Cell) else Cell(str(value)) for value in values]
