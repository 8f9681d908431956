"""Sections of a study's page that commands have drawn: their figures and tables, and what those were made of."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from ecg_jax.studies.figure_folder import Figure, FigureFolder
from ecg_jax.studies.report import run_tables
from ecg_jax.studies.report.cells import Table, count, texts
from ecg_jax.studies.report.design import shorten, shortened, shown_path
from ecg_jax.studies.report.page import Folded, Page, Part, box, inline, paragraph
from ecg_jax.studies.report.pictures import of_files
from ecg_jax.studies.report.study import Study, sweep_of
from ecg_jax.studies.study_runs import StudyRun
from ecg_jax.sweep_folder import read_status

_LONGEST = 200  # rows of a folder's table on the page


def figure_parts(found: FigureFolder, study: Study, page: Page) -> list[Part]:
    """What a command's folder holds: where, made of what, its figures and tables."""
    about, where = found.about, shown_path(found.folder, study.folders)
    parts: list[Part] = [paragraph(f"Of `{where}`{_of_date(about)}.", "about")]
    runs = _runs_of(found, study)
    if older := _ended_after(runs, about):
        text = f"Older than {count(older, 'run')} that they were made of: run the command again."
        parts.append(box("warn", [paragraph(text)]))
    if made_up := sum(run.synthetic is True for run in runs):
        text = f"{made_up} of the {count(len(runs), 'run')} were pretrained on SYNTHETIC recordings."
        parts.append(paragraph(text, "bad"))
    said = [
        (name, "; ".join(about[name]) if name == "runs" else _words(about[name]))
        for name in ("command", "runs", "versions", "device")
        if about.get(name)
    ]
    if said:
        name = page.free_name(f"{found.kind}_about")
        rows = [texts((what, shorten(words, study.folders))) for what, words in said]
        table = Table(name, f"What the figures of {where} were made of.", ["field", "value"], rows, 2)
        parts.append(Folded("What these figures were made of", [table]))
    for figure in found.figures:
        parts += _figure(figure, found, page, study)
    return parts


def _of_date(about: dict) -> str:
    return f", made on {about['date'][:10]}" if "date" in about else ""


def _words(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _runs_of(found: FigureFolder, study: Study) -> list[StudyRun]:
    """Runs of the study that the figures of a folder were made of."""
    if "runs" not in found.about:
        return []
    paths = [Path(path) for path in found.about["runs"]]
    resolved, ends = [path.resolve() for path in paths], [path.parts[-2:] for path in paths]
    # A sweep may have been moved with its figures since.
    sweep = found.folder.resolve().parent.parent

    def is_in(folder: Path) -> bool:
        return folder in resolved or (folder.parent.parent == sweep and folder.parts[-2:] in ends)

    return [run for run in study.runs if run.folder is not None and is_in(run.folder.resolve())]


def _ended_after(runs: Sequence[StudyRun], about: dict) -> int:
    """How many of the runs that figures were made of a sweep has ended since."""
    if "date" not in about:
        return 0
    made, n = datetime.datetime.fromisoformat(about["date"]), 0
    for run in runs:
        status = None if sweep_of(run) is None else read_status(run.folder.parent)
        if status is not None and status["ended"] is not None:
            n += datetime.datetime.fromisoformat(status["ended"]) > made
    return n


def _figure(figure: Figure, found: FigureFolder, page: Page, study: Study) -> list[Part]:
    """A figure or table of a folder, as it was drawn there."""
    name = page.free_name(f"{found.kind}_{figure.name}")
    heading = f"<h3>{escape(figure.title)}</h3>"
    words = {"shows": figure.shows, "does_not_show": figure.does_not_show}
    if figure.picture is not None:
        files = {
            suffix: figure.picture.with_suffix(suffix).read_bytes() for suffix in (".png", ".svg", ".csv")
        }
        return [heading, of_files(name, files, alt=f"{figure.title}.", caption=figure.title, **words)]
    n = len(figure.rows)
    more = f" The first {_LONGEST} of {n} rows; its files have all." if n > _LONGEST else ""
    table = run_tables.figure_rows(name, f"{figure.title}.{more}", figure.columns, figure.rows)
    rows = replace(table, most=_LONGEST)
    return [
        heading,
        shortened(rows, study.folders),
        f"<p><b>Shows.</b> {inline(figure.shows)}</p>",
        f"<p><b>Does not show.</b> {inline(figure.does_not_show)}</p>",
    ]
