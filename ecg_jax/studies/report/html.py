"""The page: one HTML file without scripts and without anything from elsewhere."""

import base64
import datetime
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape

from ecg_jax.studies.report import figures, tables, task_tables
from ecg_jax.studies.report.cells import Cell, Table, number
from ecg_jax.studies.report.figures import Example, Picture
from ecg_jax.studies.report.load import Collection, Curves
from ecg_jax.studies.report.rows import TaskScores
from ecg_jax.studies.report.style import CSS

#: Every page says so in its head, and nothing else is overwritten.
GENERATOR = '<meta name="generator" content="ecg-jax report">'
# Longer tables are folded.
_LONG = 14
_DARKEST = (126, 178, 217)


def _cell(cell: Cell, numeric: bool) -> str:
    text = escape(cell.text)
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
    elif len(cell.text) > 12:
        classes.append("long" if len(cell.text) > 40 else "t")
    return (f' class="{" ".join(classes)}"' if classes else "") + style + f">{text}"


def _head_class(table: Table, i: int) -> str:
    kind = (
        "l"
        if i < table.text_columns
        else "heat"
        if any(row[i].shade is not None for row in table.rows)
        else "n"
    )
    return f"{kind} bad" if i in table.bad_columns else kind


def table_html(table: Table) -> str:
    """A table in a box that scrolls sideways by itself; its first column is the rows' headings."""
    lines = [
        f'<div class="scroll" id="table-{escape(table.name)}" tabindex="0" '
        f'role="region" aria-label="{escape(table.caption)}">',
        f"<table><caption><span>{escape(table.caption)}</span></caption>",
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
    for i, row in enumerate(table.rows):
        cells = [f'<th scope="row"{_cell(row[0], False)}</th>']
        cells += [
            f"<td{_cell(cell, k >= table.text_columns)}</td>" for k, cell in enumerate(row[1:], start=1)
        ]
        section = ' class="section"' if i in table.sections else ""
        lines.append(f"<tr{section}>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    html = "\n".join(lines)
    if len(table.rows) <= _LONG:
        return html
    return f"<details><summary>Table of {len(table.rows)} rows</summary>\n{html}\n</details>"


def _smallest(picture: Picture) -> int:
    """Pixels below which a picture cannot be read: there its box scrolls."""
    return round(picture.width * (0.6 if picture.kind == "png" else 0.72))


def picture_html(picture: Picture) -> str:
    """An image with its caption, in the file itself."""
    data = base64.b64encode(picture.data).decode()
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(picture.alt)}">'
        f'<img alt="{escape(picture.alt)}" style="min-width:{_smallest(picture)}px" '
        f'src="data:image/{picture.kind};base64,{data}"></div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _paragraph(text: str, kind: str = "") -> str:
    """A paragraph; what stands in backticks is set as code."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


class Page:
    """Sections in order, with the tables they show.

    Args:
        title: of the page.
    """

    def __init__(self, title: str):
        self.title = title
        self.tables: list[Table] = []
        self._top: list[str] = []
        self._sections: list[tuple[str, str, list[str]]] = []

    def top(self, *parts: str) -> None:
        """Adds HTML above the table of contents."""
        self._top += parts

    def section(self, name: str, heading: str, parts: Iterable[str | Table | Picture]) -> None:
        """Adds a section of HTML, tables and pictures."""
        lines = []
        for part in parts:
            if isinstance(part, Table):
                self.tables.append(part)
                lines.append(table_html(part))
            else:
                lines.append(picture_html(part) if isinstance(part, Picture) else part)
        self._sections.append((name, heading, lines))

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


def build(
    title: str,
    collection: Collection,
    scores: dict[str, TaskScores],
    now: datetime.datetime,
    command: Sequence[str],
    recordings: str = "open",
) -> Page:
    """The page of a report.

    Args:
        title: of the page.
        collection: what was loaded.
        scores: its rows, of `rows.score_tasks`.
        now: when the report is made.
        command: that makes it, word by word.
        recordings: one of `figures.RECORDINGS`.
    """
    page = Page(title)
    classified = [task for task in scores.values() if not task.first.regression]
    regressions = [task for task in scores.values() if task.first.regression]
    n_probes, looks = len(collection.results), figures.looks_of(scores)
    page.top(
        _paragraph(
            f"{n_probes} probes of {len(scores)} task{'s' if len(scores) > 1 else ''} and their baselines, reported on "
            f"{now:%Y-%m-%d}.",
            "about",
        ),
        _command(command),
        _verdict(scores),
    )
    page.section(
        "compared",
        "What was compared",
        [tables.compared(collection), tables.stores(scores), *_versions(collection)],
    )
    page.section(
        "results",
        "Results",
        [
            tables.main_table(collection, scores),
            tables.mean_rank_table(collection, scores),
            *_methods(scores),
        ],
    )
    page.section(
        "tasks-and-leakage", "Tasks and leakage", [tables.task_table(scores), tables.leakage_table(scores)]
    )
    page.section("left-out", "What was left out", [tables.exclusions(scores)])
    page.section(
        "rankings",
        "Rankings, task by task",
        _by_task(scores.values(), lambda t: [task_tables.score_table(t)]),
    )
    page.section(
        "classes",
        "Class by class",
        _by_task(scores.values(), lambda t: [figures.forest(t, looks), task_tables.class_table(t)]),
    )
    page.section("modes", "Checkpoints, mode by mode", figures.modes(scores, looks))
    if classified:
        page.section(
            "calibration", "Calibration", _by_task(classified, lambda t: [figures.calibration(t, looks)])
        )
    if regressions:
        page.section("regressions", "Regressions", _by_task(regressions, lambda t: [figures.regression(t)]))
    page.section(
        "layers",
        "Layers",
        task_tables.layer_tables(collection) or [_paragraph("No probe chose among layers.")],
    )
    page.section(
        "label-efficiency",
        "Label efficiency",
        _curves(
            collection.efficiency,
            lambda task, curves: figures.label_efficiency(task, curves, looks),
            task_tables.efficiency_table,
            task_tables.saving_table,
        )
        or [
            _paragraph(
                "No label_efficiency.json is among the folders; `ecg-jax label-efficiency` writes one."
            )
        ],
    )
    page.section(
        "robustness",
        "Robustness",
        _curves(
            collection.robustness,
            lambda task, curves: figures.robustness(task, curves, looks),
            task_tables.robustness_table,
        )
        or [_paragraph("No robustness.json is among the folders; `ecg-jax robustness` writes one.")],
    )
    if classified:
        page.section("examples", "Recordings", _by_task(classified, lambda t: _examples(t, recordings)))
    return page


def _command(words: Sequence[str]) -> str:
    """A command to be copied, broken between words only."""
    text = " ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in words)
    return f'<p class="about">Made by <code>{text}</code></p>'


def _by_task(tasks: Iterable[TaskScores], parts) -> list:
    found = []
    for task in tasks:
        found += [f"<h3>{escape(task.task)}</h3>", *parts(task)]
    return found


def _curves(curves: Sequence[Curves], draw, *tabulate) -> list:
    found = []
    for task in dict.fromkeys(curve.task for curve in curves):
        of_task = [curve for curve in curves if curve.task == task]
        found += [
            f"<h3>{escape(task)}</h3>",
            draw(task, of_task),
            *(table(task, of_task) for table in tabulate),
        ]
    return found


def _verdict(scores: dict[str, TaskScores]) -> str:
    """The leakage verdicts in a box."""
    of_state: dict[str, list[str]] = {}
    for name, task in scores.items():
        of_state.setdefault(tables.task_state(task), []).append(name)
    sentences = {
        "not clean": "LEAKAGE FOUND in {}: test recordings or patients were seen before. Do not cite these scores.",
        "not audited": "NOT AUDITED for leakage: {}.",
        "partly examined": "No leakage found, but not everything was examined: {}.",
        "clean": "No leakage found: {}.",
    }
    worst = max(of_state, key=tables.STATES.index)
    lines = "".join(
        _paragraph(sentences[state].format(", ".join(of_state[state])), tables.MARKS[state])
        for state in reversed(tables.STATES)
        if state in of_state
    )
    link = '<p><a href="#table-leakage">What the audits say</a></p>'
    return f'<div class="verdict {tables.MARKS[worst]}" role="note">{lines}{link}</div>'


def _versions(collection: Collection) -> list[str]:
    versions = {
        ", ".join(f"{name} {value}" for name, value in result.results["versions"].items()): None
        for result in collection.results
    }
    return [_paragraph(f"Made with {text}.", "about") for text in versions]


def _methods(scores: dict[str, TaskScores]) -> list[str]:
    """How the numbers were made, in a few sentences."""
    # Level, kind of interval and rule for undefined classes are those of all tasks, see `load`.
    settings = next(iter(scores.values())).first.results["bootstrap"]
    tasks_of: dict[int, list[str]] = {}
    for name, task in scores.items():
        tasks_of.setdefault(task.first.results["bootstrap"]["resamples"], []).append(name)
    resamples = "; ".join(
        f"{n} resamples" + (f" ({', '.join(tasks)})" if len(tasks_of) > 1 else "")
        for n, tasks in tasks_of.items()
    )
    comparisons = sum(len(task.entries) - 1 for task in scores.values())
    least = min(1.0, 2 * comparisons / (max(tasks_of) + 1))
    few = (
        f" With {max(tasks_of)} resamples and {comparisons} comparisons no corrected p can be below "
        f"{least:.2g}: use more resamples."
        if least > 0.05
        else ""
    )
    return [
        _paragraph(
            f"Intervals: {settings['interval']}, {100 * settings['level']:g} %, {resamples}, from "
            f"{tables.resampled(tables.units(scores))}. Undefined classes: {settings['undefined']}. Intervals and "
            "p-values are about other test records, not about another seed of training: random initialisations are the "
            "mean over their seeds, taken as given. The rows of a task are ranked on the same resamples of its test "
            "records; Holm's correction is over all "
            f"{comparisons} comparisons with the best of a task.{task_tables.p_values_are_percentile(settings)}{few}",
            "about",
        )
    ]


def _examples(task: TaskScores, recordings: str) -> list[str]:
    found, sentence = figures.examples(task, recordings)
    parts = [_paragraph(sentence)]
    if found:
        parts.append(f'<div class="examples">{"".join(map(_example, found))}</div>')
    return parts


def _example(example: Example) -> str:
    shown = example.predicted[:6]
    truth = [name for name, target, _ in example.predicted if target == 1]
    predicted = ", ".join(f"{name} {number(p)}" for name, _, p in shown)
    return (
        f"<article><h4>{escape(example.heading)}: {escape(example.record_id)}</h4>{picture_html(example.picture)}"
        + _paragraph(f"True: {', '.join(truth) or 'none of the classes'}. Predicted: {predicted}.")
        + "</article>"
    )
