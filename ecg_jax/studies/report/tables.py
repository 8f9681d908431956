"""The tables of a report."""

from collections.abc import Sequence
from typing import Any

from ecg_jax.data.store import SYNTHETIC
from ecg_jax.evaluation.ranking import mean_ranks
from ecg_jax.studies.report.cells import DASH, SCORES, Cell, Table, interval, texts
from ecg_jax.studies.report.load import Collection, Result
from ecg_jax.studies.report.places import placed, places_table
from ecg_jax.studies.report.read import UNITS
from ecg_jax.studies.report.rows import Row, TaskScores, all_rows


def _sections(rows: Sequence[Row]) -> list[int]:
    """Index of the first baseline, if models precede it."""
    first = next((i for i, row in enumerate(rows) if row.baseline), 0)
    return [first] if first else []


def level(scores: dict[str, TaskScores]) -> str:
    """ "95 %" of the intervals."""
    return f"{100 * next(iter(scores.values())).first.results['bootstrap']['level']:g} %"


def resampled(units: dict[str, str]) -> str:
    """What the intervals are made from, in words.

    Args:
        units: task -> unit of resampling.
    """
    of_unit: dict[str, list[str]] = {}
    for task, unit in units.items():
        of_unit.setdefault(UNITS[unit], []).append(task)
    if len(of_unit) == 1:
        return next(iter(of_unit))
    return "; ".join(f"{unit} ({', '.join(tasks)})" for unit, tasks in of_unit.items())


def units(scores: dict[str, TaskScores]) -> dict[str, str]:
    """Task -> unit of resampling."""
    return {name: task.first.results["bootstrap"]["unit"] for name, task in scores.items()}


def leads_said(probes: Sequence[tuple[str, Result]]) -> str:
    """A sentence where encoders see some leads only, else "".

    Args:
        probes: each with the name of its row.
    """
    kept: dict[str, dict[str, None]] = {}
    for name, result in probes:
        # A contract of all leads says nothing of them.
        contract = ({"preprocessing": {}} | result.results)["preprocessing"]
        if "kept_leads" in contract:
            kept.setdefault(", ".join(contract["kept_leads"]), {})[name] = None
    everyone = {name for name, _ in probes}
    who = [
        f"{'all encoders' if everyone == set(names) else ', '.join(names)} of the leads {leads} alone"
        for leads, names in kept.items()
    ]
    return f" Fed with some leads: {'; '.join(who)}. Simple ECG features are of all twelve." if who else ""


def main_table(collection: Collection, scores: dict[str, TaskScores]) -> Table:
    """Rows model and mode, columns tasks by group."""
    rows = all_rows(scores)
    groups = collection.groups
    tasks = [task for group in groups.values() for task in group]
    body = []
    for row in rows:
        cells = []
        for task in tasks:
            entry = scores[task].entries.get(row)
            cells.append(
                Cell(DASH, mark="mute")
                if entry is None
                else interval(entry.point, entry.low, entry.high, entry.mark)
            )
        body.append([*texts((row.model, row.mode or DASH)), *cells])
    leaks = {task: MARKS[task_state(scores[task])] == "bad" for task in tasks}
    heads = [
        f"{task} {SCORES[scores[task].first.metric].split()[-1]}"
        + (f" ({task_state(scores[task])})" if leaks[task] else "")
        for task in tasks
    ]
    some_regression = any(task.first.regression for task in scores.values())
    errors = (
        " Mean absolute errors (MAE) are in standard deviations of the training targets."
        if some_regression
        else ""
    )
    return Table(
        "main",
        f"Scores with {level(scores)} intervals from {resampled(units(scores))}. Bold: the best of a task; "
        "underlined: not told from it (the interval of the paired difference on the same resamples holds 0). "
        f"↑ higher is better, ↓ lower.{errors}"
        f"{leads_said([(result.model, result) for result in collection.results])}",
        ["model", "mode", *heads],
        body,
        2,
        [("", 2), *((group, len(of_group)) for group, of_group in groups.items())],
        _sections(rows),
        [k + 2 for k, task in enumerate(tasks) if leaks[task]],
    )


def mean_rank_table(collection: Collection, scores: dict[str, TaskScores]) -> Table:
    """Mean rank of every row in each group of tasks and over all."""
    rows, groups = all_rows(scores), collection.groups
    ranks = {task: scores[task].ranks for task in scores}
    means = mean_ranks(ranks, {task: group for group, tasks in groups.items() for task in tasks})
    columns = {group: len(tasks) for group, tasks in groups.items()}
    if len(groups) > 1:
        means |= mean_ranks(ranks, dict.fromkeys(ranks, "all tasks"))
        columns["all tasks"] = len(ranks)
    body = []
    for row in rows:
        cells = [Cell(row.model), Cell(row.mode or DASH)]
        for group in columns:
            of_model = means[group]
            if row.label in of_model:
                mean = of_model[row.label]
                cells.append(Cell(f"{mean:.2f}", mark="best" if mean == min(of_model.values()) else ""))
            else:
                cells.append(Cell(DASH, mark="mute"))
        body.append(cells)
    return Table(
        "mean_ranks",
        "Mean rank among all rows of a task: 1 for the best and for those not told from it, the others 1 + the number "
        "of rows in better groups. Bold: the lowest; a dash: not scored on every task of the group.",
        ["model", "mode", *(f"{name} ({n} task{'s' if n > 1 else ''})" for name, n in columns.items())],
        body,
        2,
        sections=_sections(rows),
    )


def mean_places_table(scores: dict[str, TaskScores]) -> Table | None:
    """Mean place of every row over all tasks, with its interval; None for a single task."""
    if len(scores) < 2:
        return None
    settings = next(iter(scores.values())).first.results["bootstrap"]
    tasks = [
        placed(
            task,
            {e.row.label: e.scored.macros(settings["undefined"])[1] for e in task.entries.values()},
        )
        for task in scores.values()
    ]
    return places_table("mean_places", {"": tasks}, settings["level"])


def leakage_table(scores: dict[str, TaskScores]) -> Table:
    """What the audit of every task says; probes with the same verdict share a line."""
    rows = []
    for task in scores.values():
        verdicts: dict[str, list[Result]] = {}
        for result in task.results:
            verdicts.setdefault(leakage(result)[1], []).append(result)
        for sentence, results in verdicts.items():
            state, _ = leakage(results[0])
            who = "all probes" if len(verdicts) == 1 else "; ".join(f"{r.model}, {r.mode}" for r in results)
            rows.append([Cell(task.task), _state_cell(state), Cell(who), Cell(sentence)])
    return Table(
        "leakage",
        "Whether test recordings or their patients were seen in training or pretraining. Clean means that nothing was "
        "found in what was examined; the sentence says what that was.",
        ["task", "verdict", "probes", "what was found"],
        rows,
        4,
    )


def leakage(result: Result) -> tuple[str, str]:
    """("clean", "partly examined", "not clean" or "not audited", the audit's sentence)."""
    verdict = result.results["leakage"]
    if verdict is None:
        return "not audited", "No audit came with the result."
    sentence = verdict["verdict"]
    pretrained = result.mode != "supervised"
    problem = pretrained and "pretraining_problem" in verdict and verdict["pretraining_problem"]
    if problem:
        sentence = f"{sentence} {problem}"
    if not verdict["clean"]:
        return "not clean", sentence
    if "examined" in verdict:
        # null: there was nothing of the kind to examine.
        unexamined = problem or False in verdict["examined"].values()
        return "partly examined" if unexamined else "clean", sentence
    pretraining = verdict["pretraining"]
    near = [verdict["near_identical_train_test"]] + (
        [pretraining["near_identical_test"]] if pretraining else []
    )
    unexamined = None in near or (pretrained and pretraining is None)
    return "partly examined" if unexamined else "clean", sentence


#: From harmless to harmful.
STATES = ("clean", "partly examined", "not audited", "not clean")


def task_state(task: TaskScores) -> str:
    """The worst verdict of a task's probes."""
    return max((leakage(result)[0] for result in task.results), key=STATES.index)


#: How a verdict is shown.
MARKS = {"clean": "good", "partly examined": "warn", "not audited": "bad", "not clean": "bad"}


def _state_cell(state: str) -> Cell:
    return Cell(state.upper() if MARKS[state] == "bad" else state, mark=MARKS[state])


def compared(collection: Collection) -> Table:
    """The probes: model, mode, checkpoint, tasks, folders."""
    probes: dict[tuple, list[Result]] = {}
    for result in collection.results:
        checkpoint = result.results["checkpoint"]
        trained = "none" if checkpoint is None else f"{checkpoint['run']}, step {checkpoint['step']}"
        if result.mode == "supervised":
            trained = "none" if checkpoint is None else f"architecture of {checkpoint['run']}"
        probes.setdefault((result.model, result.mode, trained, str(result.workdir)), []).append(result)
    rows = []
    for (model, mode, checkpoint, workdir), results in probes.items():
        dates = sorted({result.results["date"][:10] for result in results})
        seeds = sorted({result.results["seed"] for result in results})
        rows.append(
            texts(
                (
                    model, mode, checkpoint, workdir, " to ".join(dict.fromkeys((dates[0], dates[-1]))),
                    len(results), ", ".join(map(str, seeds)),
                )
            )
        )  # fmt: skip
    return Table(
        "compared",
        "Probes, the checkpoints they are of, and where they lie.",
        ["model", "mode", "checkpoint", "folder", "date", "tasks", "seed"],
        rows,
        5,
    )


def stores(scores: dict[str, TaskScores]) -> Table:
    """The stores the tasks are of."""
    of_store: dict[tuple[str, str, str], list[str]] = {}
    for task in scores.values():
        store = task.first.results["store"]
        key = store["path"], store["corpus"], store["fingerprint"]
        of_store.setdefault(key, []).append(task.task)
    rows = [
        texts(
            (
                path,
                f"{corpus} (no ECGs)" if corpus == SYNTHETIC else corpus,
                fingerprint[:12],
                ", ".join(tasks),
            )
        )
        for (path, corpus, fingerprint), tasks in of_store.items()
    ]
    head = ["store", "corpus", "fingerprint", "tasks"]
    return Table(
        "stores", "Stores of recordings, with the first digits of their fingerprints.", head, rows, 4
    )


def task_table(scores: dict[str, TaskScores]) -> Table:
    """What each task is tested on, and whether it leaks."""
    rows = []
    for task in scores.values():
        results = task.first.results
        split = results["split"]
        sizes = [str(split[name]) if name in split else DASH for name in ("n_train", "n_val")]
        if task.first.regression:
            per_class = [entry["n"] for entry in results["per_class"].values()]
        else:
            per_class = [entry["n_pos"] for entry in results["per_class"].values()]
        patients = "unknown" if results["n_patients"] is None else results["n_patients"]
        rows.append(
            texts(
                (
                    task.task, results["group"], results["store"]["corpus"], _state_cell(task_state(task)),
                    results["bootstrap"]["unit"], *sizes, results["n_records"], patients, len(results["per_class"]),
                    f"{min(per_class)} to {max(per_class)}", len(results["classes_dropped"]),
                )
            )
        )  # fmt: skip
    return Table(
        "tasks",
        "Records, patients and classes of every task. n per class: positive test records of the rarest and the "
        "commonest class (of a regression, records with a known value).",
        [
            "task", "group", "corpus", "leakage", "resampled by", "train records", "val records", "test records",
            "test patients", "classes", "n per class", "classes dropped",
        ],
        rows,
        5,
    )  # fmt: skip


def exclusions(scores: dict[str, TaskScores]) -> Table:
    """Everything that was left out, with the reason."""
    rows = []
    for task in scores.values():
        results = task.first.results
        rows += [
            texts((task.task, "class dropped", name, why)) for name, why in results["classes_dropped"].items()
        ]
        rows += [
            texts((task.task, "class undefined in test", name, "no positive or no negative test record"))
            for name in results["classes_undefined_in_test"]
        ]
        rows += [
            texts((task.task, "records excluded", where, f"{count} {reason}"))
            for where, reason, count in _counts(results["records_excluded"])
        ]
    if not rows:
        rows = [texts(("all tasks", "nothing", DASH, DASH))]
    return Table(
        "exclusions",
        "Classes and records that were left out. A class undefined in the test records is in no macro score.",
        ["task", "left out", "which", "why"],
        rows,
        4,
    )


def _counts(tree: dict[str, Any], where: str = "") -> list[tuple[str, str, int]]:
    """(where, reason in words, number) of nested counts; zeros are left out."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _counts(value, f"{where}, {name}" if where else name)
        elif value:
            found.append((where or "store", name.replace("_", " "), value))
    return found
