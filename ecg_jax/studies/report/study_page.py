"""The page of `ecg-jax report` for a study: what was run, curves, results, and the figures of its commands."""

import datetime
from collections.abc import Sequence
from html import escape

from ecg_jax.studies.report import board_tables, figures, run_tables, study_figures, tables, task_tables
from ecg_jax.studies.report.boards import Board
from ecg_jax.studies.report.cells import DASH, Cell, Table, count, number
from ecg_jax.studies.report.design import anchors, in_order, run_folder, shortened, shown_path
from ecg_jax.studies.report.figure_parts import figure_parts
from ecg_jax.studies.report.html import by_task, gallery, of_curves, verdict
from ecg_jax.studies.report.page import Beside, Folded, Page, Part, box, command_html, paragraph
from ecg_jax.studies.report.rows import ECG_FEATURES, RANDOM_INIT, SUPERVISED, TaskScores
from ecg_jax.studies.report.study import Study

#: Commands whose figures a study is expected to have.
_COMMANDS = ("scaling", "cka", "efficiency")
_HEADINGS = {"scaling": "Scaling", "cka": "Similarity (CKA)", "efficiency": "Efficiency"}
_GALLERIES = 3  # tasks whose recordings are shown


def build(
    title: str,
    study: Study,
    boards: Sequence[Board],
    now: datetime.datetime,
    command: Sequence[str],
    shown: str,
    beside: Beside,
) -> Page:
    """The page of a study.

    Args:
        title: of the page.
        study: what was found.
        boards: of `boards.make_boards`.
        now: when the report is made.
        command: that makes it, word by word.
        shown: which recordings, one of `recordings.RECORDINGS`.
        beside: the files beside the page.
    """
    page = Page(title, beside)
    tasks = _tasks(study, boards)
    page.top(
        paragraph(f"{_summary(study, boards)} Reported on {now:%Y-%m-%d}.", "about"),
        command_html(command),
        *_missing(study, boards),
        *([verdict(tasks)] if tasks else []),
        paragraph(
            "Every number can be followed to the disk: folders are written from the folder given to the report on. "
            "Tables of probes name the one whose `results.json` holds the score of a run; baselines, ranks and "
            "differences are computed for this page from the `predictions.npz` beside it. Each table and figure links "
            "to its data.",
            "about",
        ),
    )
    if study.runs:
        page.section("run", "What was run", _run_parts(study))
        page.section("made-with", "What it was made with", _made_with_parts(study))
        if curves := study_figures.loss_curves(study):
            page.section("losses", "Loss curves", curves)
    if boards:
        looks = study_figures.objective_looks(study)
        page.section("results", "Results", _results(study, boards, looks))
        if modes := study_figures.modes(boards, looks, study):
            page.section("modes", "Objectives, mode by mode", modes)
    kinds = dict.fromkeys(each.kind for each in study.figures)
    for kind in sorted(
        kinds, key=lambda kind: _COMMANDS.index(kind) if kind in _COMMANDS else len(_COMMANDS)
    ):
        found = [each for each in study.figures if each.kind == kind]
        heading = _HEADINGS[kind] if kind in _HEADINGS else kind.replace("_", " ").capitalize()
        parts = [part for each in found for part in figure_parts(each, study, page)]
        page.section(f"figures-{kind}", heading, parts)
    if boards:
        page.section("classes", "Class by class", _classes(boards))
        page.section("layers", "Layers", _layers(study))
        page.section(
            "tasks-and-leakage",
            "Tasks and leakage",
            [tables.task_table(tasks), shortened(tables.leakage_table(tasks), study.folders)],
        )
        page.section("left-out", "What was left out", [shortened(tables.exclusions(tasks), study.folders)])
    _curve_sections(page, study)
    if boards:
        page.section("examples", "Recordings", _recordings(boards, shown))
    return page


def _tasks(study: Study, boards: Sequence[Board]) -> dict[str, TaskScores]:
    """Task -> all its results, of every mode."""
    found: dict[str, TaskScores] = {}
    for board in boards:
        results = study.collection.of_task(board.task)
        found.setdefault(board.task, TaskScores(board.task, results, board.scores.entries))
    return found


def _summary(study: Study, boards: Sequence[Board]) -> str:
    runs = study.runs
    parts = []
    if runs:
        objectives, backbones = in_order(runs, "objective"), in_order(runs, "backbone")
        parts.append(
            f"{count(len(runs), 'run')}, {len(study.finished)} finished, of {count(len(objectives), 'objective')} on "
            f"{count(len(backbones), 'backbone')}"
        )
        flops = [run.train_flops for run in runs if run.train_flops is not None]
        hours = [run.device_hours for run in runs if run.device_hours is not None]
        cost = f"{run_tables.scaled(sum(flops))}FLOP of training by formula" if flops else ""
        timed = f"{number(sum(hours), 2)} device-hours of pretraining" if hours else ""
        parts += [part for part in (cost, timed) if part]
    if boards:
        n_tasks = len({board.task for board in boards})
        parts.append(f"{count(len(study.members), 'probe')} of {count(n_tasks, 'task')}")
    if study.figures:
        parts.append(f"figures of {', '.join(dict.fromkeys(each.kind for each in study.figures))}")
    return "; ".join(parts) + "."


def _missing(study: Study, boards: Sequence[Board]) -> list[str]:
    """What the study lacks, and what is made up, in boxes that are seen."""
    lines, runs = [], study.runs
    if behind := [run for run in runs if run not in study.finished]:
        names = ", ".join(run.name for run in behind[:5])
        more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
        lines.append(f"{len(behind)} of {count(len(runs), 'run')} are not finished: {names}{more}.")
    if warned := [run.name for run in runs if run.warnings]:
        names = ", ".join(warned[:5]) + (f" and {len(warned) - 5} more" if len(warned) > 5 else "")
        lines.append(f"{count(len(warned), 'run')} warned of a collapse while training: {names}.")
    for sweep in study.sweeps:
        if stale := sweep.missing(study.finished):
            lines.append(
                f"results.csv of {shown_path(sweep.folder, study.folders)} lacks {count(len(stale), 'finished run')}, "
                f"as {stale[0]}: run its `ecg-jax sweep` with `--collect`."
            )
    if runs and not boards:
        lines.append("No probe is among the folders: nothing here says how good the features are.")
    elif without := [run for run in runs if run.objective and not run.probes]:
        lines.append(f"{count(len(without), 'run')} without a finished probe.")
    lines += _without_baselines(boards)
    seeds = [len(own) for board in boards for row, own in board.members.items() if not row.baseline]
    if seeds and max(seeds) == 1:
        lines.append(
            "Every group is a single seed: differences between groups may be those between seeds, which no interval "
            "here holds."
        )
    if absent := [name for name in _COMMANDS if name not in [each.kind for each in study.figures]]:
        commands = ", ".join(f"`ecg-jax {name}`" for name in absent)
        lines.append(f"Without figures of {commands}: give their folders too, or a sweep that ran them.")
    parts = []
    if lines:
        parts.append(box("warn", [paragraph("What this study lacks", "warn"), *map(paragraph, lines)]))
    made_up = study.synthetic
    tested = dict.fromkeys(board.task for board in boards if board_tables.of_synthetic(board))
    if made_up or tested:
        said = []
        if made_up:
            said.append(
                f"SYNTHETIC recordings: {len(made_up)} of {count(len(runs), 'run')} were pretrained on them. Their "
                "losses, and curves and fits through them, say nothing about ECGs."
            )
        if tested:
            said.append(
                f"SYNTHETIC recordings: {', '.join(tested)} {'are' if len(tested) > 1 else 'is'} tested on them. Such "
                "scores check the machinery and say nothing about ECGs."
            )
        parts.append(box("bad", [paragraph(text, "bad") for text in said]))
    return parts


def _without_baselines(boards: Sequence[Board]) -> list[str]:
    missing: dict[str, dict[str, None]] = {}
    for board in boards:
        there = {row.baseline for row in board.scores.entries}
        for name in (SUPERVISED, RANDOM_INIT, ECG_FEATURES):
            if name not in there and not (board.mode == "supervised" and name == RANDOM_INIT):
                missing.setdefault(name, {})[board.task] = None
    sentences = {
        SUPERVISED: "No encoder trained from scratch (mode=supervised) on {}: whether pretraining pays at all is open "
        "there.",
        RANDOM_INIT: "No random initialisation beside the probes of {}.",
        ECG_FEATURES: "No simple ECG features beside the probes of {}.",
    }
    return [sentences[name].format(", ".join(tasks)) for name, tasks in missing.items()]


def _run_parts(study: Study) -> list[Part]:
    parts: list[Part] = [run_tables.cost_table(study)]
    if unfinished := run_tables.unfinished_table(study):
        parts.append(unfinished)
    parts += [run_tables.runs_table(study), run_tables.stores_table(study)]
    for i, sweep in enumerate(study.sweeps, start=1):
        where = shown_path(sweep.folder, study.folders)
        parts.append(paragraph(f"Sweep `{where}` of the file `{sweep.file}`. {sweep.note}"))
        if sweep.lines:
            table = run_tables.sweep_table(sweep.lines, f"sweep_{i}_results", where)
            parts.append(Folded(f"results.csv of {where}", [table]))
    return parts


def _made_with_parts(study: Study) -> list[Part]:
    parts: list[Part] = [run_tables.made_with_table(study)]
    revisions = {(run.revision, run.dirty) for run in study.runs if run.revision}
    if len(revisions) > 1:
        parts.append(
            paragraph(
                "The runs are of several revisions of the code: a difference may be one of code.", "warn"
            )
        )
    parts.append(paragraph("Configs: what all runs share once, then what differs, objective by objective."))
    return parts + [Folded(heading, found) for heading, found in run_tables.config_tables(study)]


def _results(study: Study, boards: Sequence[Board], looks) -> list[Part]:
    parts: list[Part] = []
    compact = {board.name: board_tables.compact_table(board, study) for board in boards}
    if places := board_tables.places_parts(boards):
        parts += ["<h3>Over all tasks</h3>", *places]
    for board in boards:
        parts.append(f"<h3>{escape(board.task)}, {board.mode}</h3>")
        if said := board_tables.warning(board).strip():
            parts.append(paragraph(said, "bad"))
        if compact[board.name] is not None:
            parts.append(compact[board.name])
        parts += [
            study_figures.forest(board, looks),
            board_tables.groups_table(board, study),
            Folded("Every run, as its results.json has it", [board_tables.single_table(board, study)]),
        ]
    resamples = sorted({board.scores.first.results["bootstrap"]["resamples"] for board in boards})
    comparisons = sum(len(board.scores.entries) - 1 for board in boards)
    least = 2 * comparisons / (resamples[-1] + 1)
    few = (
        f" With {resamples[-1]} resamples and {comparisons} comparisons no corrected p can be below "
        f"{min(1.0, least):.2g}: use more resamples."
        if least > 0.05
        else ""
    )
    parts.append(
        paragraph(
            "All rows of a task are scored on the same resamples of its test records; a row of one run shows the "
            "interval of its results.json, one of several seeds the percentile interval of their mean. Differences, "
            f"ranks and p-values are from percentiles.{few}",
            "about",
        )
    )
    return parts


def _classes(boards: Sequence[Board]) -> list[Part]:
    parts: list[Part] = []
    for board in boards:
        scores = board.scores
        looks = figures.looks_by_place(scores)
        inside: list[Part] = [board_tables.class_table(board)]
        # Predictions are those of single runs: a mean over seeds is not what any of them said.
        own = figures.looks_by_place(board.runs)
        inside.append(
            figures.regression(board.runs) if board.regression else figures.calibration(board.runs, own)
        )
        what = "Predictions" if board.regression else "Calibration"
        each = "target" if board.regression else "class"
        summary = f"{board.task}, {board.mode}: every {each} of the best groups, {what.lower()}"
        parts.append(Folded(summary, [figures.forest(scores, looks), *inside]))
    return parts


def _layers(study: Study) -> list[Part]:
    """The layer that each probe chose, a table for each mode."""
    ids, found = anchors(study), []
    modes: dict[str, list] = {}
    for member in study.members:
        if member.result.results["layers"] is not None:
            modes.setdefault(member.result.mode, []).append(member)
    for mode, members in modes.items():
        names = list(dict.fromkeys(member.result.task for member in members))
        chosen: dict[str, dict[str, Cell]] = {}
        of_model = {}
        for member in members:
            layers = member.result.results["layers"]
            value = layers["validation"].get(layers["chosen"])
            chosen.setdefault(member.result.model, {})[member.result.task] = Cell(
                layers["chosen"], f"({number(value)})"
            )
            of_model[member.result.model] = member
        rows = [
            [
                Cell(run_folder(of_model[model].run, study.folders), link=ids[of_model[model].run.name]),
                *(of[name] if name in of else Cell(DASH, mark="mute") for name in names),
            ]
            for model, of in chosen.items()
        ]
        found.append(
            Table(
                f"layers_{mode}",
                f"{mode}: the layer that each probe chose by the score beside it, on the validation records (macro "
                "AUROC; of regressions, mean absolute error). All layers' scores are in its results.json.",
                ["folder", *names],
                rows,
                1 + len(names),
            )
        )
    if not found:
        return [paragraph("No probe chose among layers.")]
    return [Folded("The layer that each probe chose", found)]


def _curve_sections(page: Page, study: Study) -> None:
    collection = study.collection
    if collection.efficiency:
        parts = of_curves(
            collection.efficiency,
            lambda task, curves: figures.label_efficiency(task, curves, {}),
            task_tables.efficiency_table,
            task_tables.saving_table,
        )
        page.section("label-efficiency", "Label efficiency", parts)
    if collection.robustness:
        parts = of_curves(
            collection.robustness,
            lambda task, curves: figures.robustness(task, curves, {}),
            task_tables.robustness_table,
        )
        page.section("robustness", "Robustness", parts)


def _recordings(boards: Sequence[Board], shown: str) -> list[Part]:
    first = {board.task: board for board in reversed(boards) if not board.regression}
    chosen = [board.runs for board in boards if board in list(first.values())][:_GALLERIES]
    if not chosen:
        return [paragraph("No task is a classification.")]
    parts = by_task(chosen, lambda task: gallery(task, shown))
    if len(first) > len(chosen):
        parts.append(paragraph(f"The first {len(chosen)} of {len(first)} tasks."))
    return parts
