"""The page of `ecg-jax report` for probes: its sections in order."""

import datetime
from collections.abc import Iterable, Sequence
from html import escape

from ecg_jax.studies.report import figures, recordings, tables, task_tables
from ecg_jax.studies.report.load import Collection, Curves
from ecg_jax.studies.report.page import Beside, Gallery, Page, command_html, paragraph
from ecg_jax.studies.report.rows import TaskScores


def build(
    title: str,
    collection: Collection,
    scores: dict[str, TaskScores],
    now: datetime.datetime,
    command: Sequence[str],
    shown: str,
    beside: Beside,
) -> Page:
    """The page of a report.

    Args:
        title: of the page.
        collection: what was loaded.
        scores: its rows, of `rows.score_tasks`.
        now: when the report is made.
        command: that makes it, word by word.
        shown: one of `recordings.RECORDINGS`.
        beside: the files beside the page.
    """
    page = Page(title, beside)
    classified = [task for task in scores.values() if not task.first.regression]
    regressions = [task for task in scores.values() if task.first.regression]
    n_probes, looks = len(collection.results), figures.looks_of(scores)
    page.top(
        paragraph(
            f"{n_probes} probes of {len(scores)} task{'s' if len(scores) > 1 else ''} and their baselines, reported on "
            f"{now:%Y-%m-%d}.",
            "about",
        ),
        command_html(command),
        verdict(scores),
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
            *([places] if (places := tables.mean_places_table(scores)) else []),
            *methods(scores),
        ],
    )
    page.section(
        "tasks-and-leakage", "Tasks and leakage", [tables.task_table(scores), tables.leakage_table(scores)]
    )
    page.section("left-out", "What was left out", [tables.exclusions(scores)])
    page.section(
        "rankings",
        "Rankings, task by task",
        by_task(scores.values(), lambda t: [task_tables.score_table(t)]),
    )
    page.section(
        "classes",
        "Class by class",
        by_task(scores.values(), lambda t: [figures.forest(t, looks), task_tables.class_table(t)]),
    )
    page.section("modes", "Checkpoints, mode by mode", figures.modes(scores, looks))
    if classified:
        page.section(
            "calibration", "Calibration", by_task(classified, lambda t: [figures.calibration(t, looks)])
        )
    if regressions:
        page.section("regressions", "Regressions", by_task(regressions, lambda t: [figures.regression(t)]))
    page.section(
        "layers",
        "Layers",
        task_tables.layer_tables(collection) or [paragraph("No probe chose among layers.")],
    )
    page.section(
        "label-efficiency",
        "Label efficiency",
        of_curves(
            collection.efficiency,
            lambda task, curves: figures.label_efficiency(task, curves, looks),
            task_tables.efficiency_table,
            task_tables.saving_table,
        )
        or [
            paragraph("No label_efficiency.json is among the folders; `ecg-jax label-efficiency` writes one.")
        ],
    )
    page.section(
        "robustness",
        "Robustness",
        of_curves(
            collection.robustness,
            lambda task, curves: figures.robustness(task, curves, looks),
            task_tables.robustness_table,
        )
        or [paragraph("No robustness.json is among the folders; `ecg-jax robustness` writes one.")],
    )
    if classified:
        page.section("examples", "Recordings", by_task(classified, lambda t: gallery(t, shown)))
    return page


def by_task(tasks: Iterable[TaskScores], parts) -> list:
    """Parts of each task under its name."""
    found = []
    for task in tasks:
        found += [f"<h3>{escape(task.task)}</h3>", *parts(task)]
    return found


def of_curves(curves: Sequence[Curves], draw, *tabulate) -> list:
    """Picture and tables of the curves of each task."""
    found = []
    for task in dict.fromkeys(curve.task for curve in curves):
        of_task = [curve for curve in curves if curve.task == task]
        found += [
            f"<h3>{escape(task)}</h3>",
            draw(task, of_task),
            *(table(task, of_task) for table in tabulate),
        ]
    return found


def verdict(scores: dict[str, TaskScores]) -> str:
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
        paragraph(sentences[state].format(", ".join(of_state[state])), tables.MARKS[state])
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
    return [paragraph(f"Made with {text}.", "about") for text in versions]


def methods(scores: dict[str, TaskScores]) -> list[str]:
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
        paragraph(
            f"Intervals: {settings['interval']}, {100 * settings['level']:g} %, {resamples}, from "
            f"{tables.resampled(tables.units(scores))}. Undefined classes: {settings['undefined']}. Intervals and "
            "p-values are about other test records, not about another seed of training: random initialisations are the "
            "mean over their seeds, taken as given. The rows of a task are ranked on the same resamples of its test "
            "records; Holm's correction is over all "
            f"{comparisons} comparisons with the best of a task.{task_tables.p_values_are_percentile(settings)}{few}",
            "about",
        )
    ]


def gallery(task: TaskScores, shown: str) -> list[str | Gallery]:
    """Recordings of a task with the sentence that says whose, or why there are none."""
    found, sentence = recordings.examples(task, shown)
    return [paragraph(sentence), *([Gallery(found)] if found else [])]
