"""The design of a study: where a run stands among objectives, backbones and rungs, and how places are written."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ecg_jax.studies.report.cells import DASH, Table
from ecg_jax.studies.report.study import Study
from ecg_jax.studies.study_runs import StudyRun


def shown_path(path: str | Path, folders: Sequence[Path]) -> str:
    """A path from the folder given on the command line on, that folder's own name first; others as they are."""
    whole = Path(path).resolve()
    for folder in folders:
        top = folder.resolve()
        if top == whole or top in whole.parents:
            return (Path(top.name) / whole.relative_to(top)).as_posix()
    return str(path)


def run_folder(run: StudyRun, folders: Sequence[Path]) -> str:
    """Where a run lies, as `shown_path` writes it."""
    return f"{run.name} (gone)" if run.folder is None else shown_path(run.folder, folders)


def anchors(study: Study) -> dict[str, str]:
    """Id of each run on the page, by its name."""
    return {run.name: f"run-{i}" for i, run in enumerate(study.runs, start=1)}


def in_order(runs: Sequence[StudyRun], name: str) -> list[str]:
    """Objectives or backbones ("objective", "backbone") in order of appearance."""
    return list(dict.fromkeys(getattr(run, name) for run in runs if getattr(run, name)))


def rungs(runs: Sequence[StudyRun]) -> dict[tuple[str, bool | None], str]:
    """Rungs from small to large: (rung, whether its recordings are synthetic) -> its heading.

    The heading says how many recordings that were, and that they were synthetic.
    """
    found: dict[tuple[str, bool | None], set[int | None]] = {}
    for run in runs:
        if run.objective:
            found.setdefault(rung_of(run), set()).add(run.recordings)

    def size(key) -> tuple[float, str]:
        known = [n for n in found[key] if n is not None]
        return (max(known) if known else float("inf")), key[0]

    headings = {}
    for key in sorted(found, key=size):
        rung = key[0]
        known = sorted(n for n in found[key] if n is not None)
        n = "" if not known else str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
        kinds = dict.fromkeys(made_up(run) for run in runs if run.objective and rung_of(run) == key)
        kind = " or ".join(kind for kind in kinds if kind)
        words = " ".join(part for part in (n, "recordings", kind and f"({kind})") if part)
        name = f"rung {rung}" if rung and rung != n else ""
        headings[key] = ": ".join(part for part in (name, words) if part) if n or kind else name or DASH
    return headings


def made_up(run: StudyRun) -> str:
    """ "synthetic" where a run's recordings are, "with synthetic ones" where some of its several stores' are, or ""."""
    if not run.synthetic:
        return ""
    return "with synthetic ones" if "," in run.config["store"] else "synthetic"


def shorten(text: str, folders: Sequence[Path]) -> str:
    """A sentence whose whole paths are written as by `shown_path`."""
    for folder in folders:
        # Runs note paths as their commands were given them, which may be relative.
        for top in {str(folder), str(folder.resolve())}:
            if "/" in top:
                text = re.sub(rf"(?<![\w./-]){re.escape(top)}(?![\w-])", folder.resolve().name, text)
    return text


def shortened(table: Table, folders: Sequence[Path]) -> Table:
    """A table of such sentences."""
    rows = [[replace(cell, text=shorten(cell.text, folders)) for cell in row] for row in table.rows]
    return replace(table, rows=rows)


def rung_of(run: StudyRun) -> tuple[str, bool | None]:
    """Key of `rungs`."""
    return run.rung, run.synthetic


def grid(runs_of: Sequence[tuple[str, StudyRun]]) -> dict[tuple[str, str, tuple], str] | None:
    """(objective, backbone, rung) -> group, where every such place has one group; None where groups differ otherwise.

    Args:
        runs_of: (group, one of its runs) each.
    """
    places: dict[tuple[str, str, tuple], str] = {}
    for group, run in runs_of:
        if not run.objective:
            continue
        place = run.objective, run.backbone, rung_of(run)
        if places.setdefault(place, group) != group:
            return None
    return places or None
