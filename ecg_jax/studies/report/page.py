"""A page: one HTML file without scripts and without anything from elsewhere, that links to the files beside it."""

import base64
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from ecg_jax.studies.report.cells import Cell, Table, number
from ecg_jax.studies.report.pictures import Picture
from ecg_jax.studies.report.recordings import Example
from ecg_jax.studies.report.style import CSS

#: Every page says so in its head, and nothing else is overwritten.
GENERATOR = '<meta name="generator" content="ecg-jax report">'
#: Of the files that a table is written as; and of all that lie beside a page.
TABLE_SUFFIXES = (".csv", ".tex")
SUFFIXES = (*TABLE_SUFFIXES, ".png", ".svg")
# Longer tables are folded.
_LONG = 18
# Characters up to which a name, or a folder of a path, is not broken.
_LONGEST_NAME = 36
_DARKEST = (126, 178, 217)


def _cell(cell: Cell, numeric: bool) -> str:
    text = escape(cell.text)
    if _is_name(cell.text):
        text = re.sub("([^/]{4})/", r"\1/<wbr>", text)
    if cell.link:
        text = f'<a href="#{escape(cell.link)}">{text}</a>'
    if cell.mark == "best":
        text = f"<b>{text}</b>"
    elif cell.mark == "tied":
        text = f"<u>{text}</u>"
    if cell.interval:
        text += f'<span class="i">{escape(cell.interval)}</span>'
    classes = [cell.mark] if cell.mark else []
    style = ""
    if cell.shade is not None:
        red, green, blue = (round(255 + (dark - 255) * cell.shade) for dark in _DARKEST)
        classes.append("heat")
        style = f' style="background:rgb({red},{green},{blue})"'
    elif numeric:
        classes.append("n")
    elif _is_name(cell.text):
        classes.append("w")
    elif len(cell.text) > 12:
        classes.append("t" if len(cell.text) <= 40 else "long" if len(cell.text) <= 160 else "prose")
    anchor = f' id="{escape(cell.anchor)}"' if cell.anchor else ""
    return anchor + (f' class="{" ".join(classes)}"' if classes else "") + style + f">{text}"


def _is_name(text: str) -> bool:
    """Whether a text is a name or a path, to be broken between folders only."""
    return " " not in text and all(len(part) <= _LONGEST_NAME for part in text.split("/"))


def _head_class(table: Table, i: int) -> str:
    kind = (
        "l"
        if i < table.text_columns
        else "heat"
        if any(row[i].shade is not None for row in table.rows)
        else "n"
    )
    return f"{kind} bad" if i in table.bad_columns else kind


def table_html(table: Table, links: str = "", fold: bool = True) -> str:
    """A table in a box that scrolls sideways by itself; its first column is the rows' headings.

    Args:
        table: with at least one row.
        links: to its files, HTML.
        fold: whether a long one is behind a line that opens it.
    """
    links = f" {links}" if links else ""
    lines = [
        f'<div class="scroll" id="table-{escape(table.name)}" tabindex="0" '
        f'role="region" aria-label="{escape(table.caption)}">',
        f"<table><caption><span>{escape(table.caption)}{links}</span></caption>",
        "<thead>",
    ]
    if table.spans:
        cells = [
            f'<th colspan="{n}" scope="colgroup">{escape(label)}</th>'
            if label
            else f'<td colspan="{n}"></td>'
            for label, n in table.spans
        ]
        lines.append(f'<tr class="spans">{"".join(cells)}</tr>')
    heads = [
        f'<th scope="col" class="{_head_class(table, i)}">{escape(name)}</th>'
        for i, name in enumerate(table.head)
    ]
    lines += [f"<tr>{''.join(heads)}</tr>", "</thead>", "<tbody>"]
    for i, row in enumerate(table.rows[: table.most]):
        cells = [f'<th scope="row"{_cell(row[0], False)}</th>']
        cells += [
            f"<td{_cell(cell, k >= table.text_columns)}</td>" for k, cell in enumerate(row[1:], start=1)
        ]
        section = ' class="section"' if i in table.sections else ""
        lines.append(f"<tr{section}>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    html = "\n".join(lines)
    if len(table.rows) <= _LONG or not fold:
        return html
    about = re.split(r"[.;] ", table.caption, maxsplit=1)[0].rstrip(".")
    return f"<details><summary>{escape(about)} ({len(table.rows)} rows)</summary>\n{html}\n</details>"


def _smallest(picture: Picture) -> int:
    """Pixels below which a picture cannot be read: there its box scrolls."""
    return round(picture.width * (0.6 if picture.kind == "png" else 0.72))


def picture_html(picture: Picture, links: str = "") -> str:
    """An image, in the file itself, with what it shows and does not show, and links to its files."""
    data = base64.b64encode(picture.data).decode()
    words = [f"<figcaption>{escape(picture.caption)}"]
    if links:
        words.append(f" {links}")
    for heading, text in (("Shows.", picture.shows), ("Does not show.", picture.does_not_show)):
        if text:
            words.append(f"<p><b>{heading}</b> {inline(text)}</p>")
    return (
        f'<figure id="{escape(picture.name)}"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(picture.alt)}">'
        f'<img alt="{escape(picture.alt)}" style="min-width:{_smallest(picture)}px" '
        f'src="data:image/{picture.kind};base64,{data}"></div>\n{"".join(words)}</figcaption></figure>'
    )


def inline(text: str) -> str:
    """Text as HTML; what stands in backticks is set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, see `inline`."""
    text = inline(text)
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


def command_html(words: Sequence[str]) -> str:
    """A command to be copied, broken between words only."""
    text = " ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in words)
    return f'<p class="about">Made by <code>{text}</code></p>'


def box(mark: str, lines: Iterable[str]) -> str:
    """Paragraphs in a box that is seen.

    Args:
        mark: "good", "warn" or "bad".
        lines: HTML.
    """
    return f'<div class="verdict {mark}" role="note">{"".join(lines)}</div>'


@dataclass(frozen=True)
class Beside:
    """The files beside a page.

    Attributes:
        folder: theirs, as the page links to it.
        suffixes: of those that are written.
    """

    folder: str
    suffixes: Sequence[str] = SUFFIXES

    def links(self, name: str, suffixes: Iterable[str]) -> str:
        """Links, in HTML, to those files of a table or picture that are written."""
        return " ".join(
            f'<a href="{escape(quote(f"{self.folder}/{name}{suffix}"))}">{suffix[1:].upper()}</a>'
            for suffix in suffixes
            if suffix in self.suffixes
        )


@dataclass(frozen=True)
class Gallery:
    """Recordings with what was predicted for them."""

    examples: Sequence[Example]


@dataclass(frozen=True)
class Folded:
    """Parts behind a line that opens them."""

    summary: str
    parts: Sequence["Part"]


Part = str | Table | Picture | Gallery | Folded


class Page:
    """Sections in order, with the tables and pictures they show.

    Args:
        title: of the page.
        beside: the files beside it.
    """

    def __init__(self, title: str, beside: Beside):
        self.title, self.beside = title, beside
        self.tables: list[Table] = []
        self.pictures: list[Picture] = []
        self._top: list[str] = []
        self._sections: list[tuple[str, str, list[str]]] = []
        self._promised: set[str] = set()

    def top(self, *parts: str) -> None:
        """Adds HTML above the table of contents."""
        self._top += parts

    def free_name(self, name: str) -> str:
        """A name of files, this one or with a number, that nothing on the page has; from now on it is taken."""
        taken = {each.name for each in (*self.tables, *self.pictures)} | self._promised
        n, free = 1, name
        while free in taken:
            n += 1
            free = f"{name}_{n}"
        self._promised.add(free)
        return free

    def section(self, name: str, heading: str, parts: Iterable[Part]) -> None:
        """Adds a section of HTML, tables, pictures, recordings, and such behind a line."""
        self._sections.append((name, heading, [self._part(part) for part in parts]))

    def _part(self, part: Part, fold: bool = True) -> str:
        if isinstance(part, Table):
            self.tables.append(part)
            return table_html(part, self.beside.links(part.name, TABLE_SUFFIXES), fold)
        if isinstance(part, Picture):
            self.pictures.append(part)
            return picture_html(part, self.beside.links(part.name, part.files))
        if isinstance(part, Gallery):
            return f'<div class="examples">{"".join(map(self._example, part.examples))}</div>'
        if isinstance(part, Folded):
            inside = "\n".join(self._part(each, False) for each in part.parts)
            return f"<details><summary>{escape(part.summary)}</summary>\n{inside}\n</details>"
        return part

    def _example(self, example: Example) -> str:
        truth = [name for name, target, _ in example.predicted if target == 1]
        predicted = ", ".join(f"{name} {number(p)}" for name, _, p in example.predicted[:6])
        return (
            f"<article><h4>{escape(example.heading)}: {escape(example.record_id)}</h4>{self._part(example.picture)}"
            + paragraph(f"True: {', '.join(truth) or 'none of the classes'}. Predicted: {predicted}.")
            + "</article>"
        )

    def html(self) -> str:
        """The whole file."""
        contents = "".join(
            f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in self._sections
        )
        body = "\n".join(
            f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(lines) + "\n</section>"
            for name, heading, lines in self._sections
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{GENERATOR}\n<title>{escape(self.title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n"
            + "\n".join(self._top)
            + f'\n<nav aria-label="Contents"><h2>Contents</h2><ol>{contents}</ol></nav>\n{body}\n'
            "</main>\n</body>\n</html>\n"
        )
