"""The tables of a report, once for the page, CSV and LaTeX alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ecg_jax.evaluation.ranking import mean_ranks
from ecg_jax.studies.report.load import Collection, Curves, Result
from ecg_jax.studies.report.rows import Row, TaskScores, all_rows

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
_SECTIONS = ("pretrained", "baselines")


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


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with a true minus sign; a dash for None and NaN."""
    if value is None or not np.isfinite(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


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


def _texts(values: Iterable[Any]) -> list[Cell]:
    return [value if isinstance(value, Cell) else Cell(str(value)) for value in values]


def _sections(rows: Sequence[Row]) -> list[int]:
    """Index of the first baseline, if models precede it."""
    first = next((i for i, row in enumerate(rows) if row.baseline), 0)
    return [first] if first else []


def _mark(entry) -> str:
    return "best" if entry.best else "tied" if entry.rank.rank == 1 else ""


def level(scores: dict[str, TaskScores]) -> str:
    """ "95 %" of the intervals."""
    return f"{100 * next(iter(scores.values())).first.results['bootstrap']['level']:g} %"


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
                else interval(entry.point, entry.low, entry.high, _mark(entry))
            )
        body.append([*_texts((row.model, row.mode or DASH)), *cells])
    some_regression = any(task.first.regression for task in scores.values())
    units = (
        " Mean absolute errors (MAE) are in standard deviations of the training targets."
        if some_regression
        else ""
    )
    return Table(
        "main",
        f"Scores with {level(scores)} intervals from resampled patients. Bold: the best of a task; underlined: not "
        "told from it (the interval of the paired difference on the same resamples holds 0). "
        f"↑ higher is better, ↓ lower.{units}",
        ["model", "mode", *(f"{task} {SCORES[scores[task].first.metric].split()[-1]}" for task in tasks)],
        body,
        2,
        [("", 2), *((group, len(of_group)) for group, of_group in groups.items())],
        _sections(rows),
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
    if not verdict["clean"]:
        return "not clean", verdict["verdict"]
    pretraining = verdict["pretraining"]
    pretrained = result.results["checkpoint"] is not None
    near = [verdict["near_identical_train_test"]] + (
        [pretraining["near_identical_test"]] if pretraining else []
    )
    unexamined = None in near or (pretrained and pretraining is None)
    return "partly examined" if unexamined else "clean", verdict["verdict"]


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
        probes.setdefault((result.model, result.mode, trained, str(result.workdir)), []).append(result)
    rows = []
    for (model, mode, checkpoint, workdir), results in probes.items():
        dates = sorted({result.results["date"][:10] for result in results})
        seeds = sorted({result.results["seed"] for result in results})
        rows.append(
            _texts(
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
        _texts((path, corpus, fingerprint[:12], ", ".join(tasks)))
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
            _texts(
                (
                    task.task, results["group"], results["store"]["corpus"], _state_cell(task_state(task)), *sizes,
                    results["n_records"], patients, len(results["per_class"]),
                    f"{min(per_class)} to {max(per_class)}", len(results["classes_dropped"]),
                    results["bootstrap"]["unit"],
                )
            )
        )  # fmt: skip
    return Table(
        "tasks",
        "Records, patients and classes of every task. n per class: positive test records of the rarest and the "
        "commonest class (of a regression, records with a known value).",
        [
            "task", "group", "corpus", "leakage", "train records", "val records", "test records", "test patients",
            "classes", "n per class", "classes dropped", "resampled by",
        ],
        rows,
        4,
    )  # fmt: skip


def exclusions(scores: dict[str, TaskScores]) -> Table:
    """Everything that was left out, with the reason."""
    rows = []
    for task in scores.values():
        results = task.first.results
        rows += [
            _texts((task.task, "class dropped", name, why))
            for name, why in results["classes_dropped"].items()
        ]
        rows += [
            _texts((task.task, "class undefined in test", name, "no positive or no negative test record"))
            for name in results["classes_undefined_in_test"]
        ]
        rows += [
            _texts((task.task, "records excluded", where, f"{count} {reason}"))
            for where, reason, count in _counts(results["records_excluded"])
        ]
    if not rows:
        rows = [_texts(("all tasks", "nothing", DASH, DASH))]
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


def score_table(task: TaskScores) -> Table:
    """All rows of a task from best to worst: rank, difference to the best, p-values and further scores."""
    results = task.first.results
    resamples = results["bootstrap"]["resamples"]
    extra = [
        name
        for name in SCORES
        if name != task.first.metric and any(name in entry.result.results["metrics"] for entry in task.probes)
    ]
    rows = []
    for entry in task.ranked:
        rank = entry.rank
        difference, p = Cell("best"), None
        if rank.to_best is not None:
            difference, p = interval(*rank.to_best.difference, sign=True), rank.to_best.p_value
        seeds = f"mean of {entry.seeds} seeds" if entry.seeds else ""
        cells = [
            entry.row.model, entry.row.mode or DASH, interval(entry.point, entry.low, entry.high, _mark(entry)),
            rank.rank, difference, p_value(p, resamples), p_value(rank.p_holm, resamples),
        ]  # fmt: skip
        if seeds:
            cells[0] = Cell(entry.row.model, f"({seeds})")
        for name in extra:
            known = entry.result is not None and name in entry.result.results["metrics"]
            triple = (
                entry.result.results["metrics"][name] if known else {"point": None, "low": None, "high": None}
            )
            cells.append(interval(**triple))
        rows.append(_texts(cells))
    return Table(
        f"scores_{task.task}",
        f"{task.task}: all rows from best to worst. Differences to the best are paired, on {resamples} resamples of "
        "the same test records; p is two-sided, corrected by Holm over all rows and tasks of the report.",
        [
            "model", "mode", SCORES[task.first.metric], "rank", "difference to the best", "p", "p (Holm)",
            *(SCORES[name] for name in extra),
        ],
        rows,
        2,
    )  # fmt: skip


def class_table(task: TaskScores) -> Table:
    """Every class of a task: how often, and the score of every probe."""
    first = task.first.results["per_class"]
    regression = task.first.regression
    score = "mae" if regression else "auroc"
    counts = {"n": "known"} if regression else {"n_pos": "positive", "n_neg": "negative"}
    rows = []
    for name, about in first.items():
        cells = [name, about["description"] or DASH, *(about[count] for count in counts)]
        for entry in task.probes:
            own = entry.result.results["per_class"][name]
            cells.append(interval(own[score], own["ci_low"], own["ci_high"]))
        rows.append(_texts(cells))
    return Table(
        f"classes_{task.task}",
        f"{task.task}: {'mean absolute error' if regression else 'AUROC'} of every "
        f"{'target' if regression else 'class'} with its interval; a dash: undefined in the test records.",
        ["class", "meaning", *(f"n {word}" for word in counts.values()), *(e.row.label for e in task.probes)],
        rows,
        2,
    )


def layer_tables(collection: Collection) -> list[Table]:
    """For each model and mode with a choice of layers: tasks by layers, the validation score as a shade."""
    probes: dict[tuple[str, str], list[Result]] = {}
    for result in collection.results:
        if result.results["layers"] is not None:
            probes.setdefault((result.model, result.mode), []).append(result)
    tables = []
    for (model, mode), results in probes.items():
        layers = list(dict.fromkeys(name for r in results for name in r.results["layers"]["validation"]))
        rows = []
        for result in results:
            found = result.results["layers"]
            validation = found["validation"]
            known = [value for value in validation.values() if value is not None]
            low, high = (min(known), max(known)) if known else (0.0, 0.0)
            cells = []
            for name in layers:
                if name not in validation or validation[name] is None:
                    cells.append(Cell(DASH, mark="mute"))
                    continue
                value = validation[name]
                share = (value - low) / (high - low) if high > low else 0.5
                shade = 1 - share if result.regression else share
                cells.append(Cell(number(value), mark="best" if name == found["chosen"] else "", shade=shade))
            rows.append([Cell(result.task), *cells])
        name = "layers_" + "".join(c if c.isalnum() else "_" for c in f"{model}_{mode}")
        tables.append(
            Table(
                name,
                f"{model}, {mode}: validation score by layer (macro AUROC; of regressions, mean absolute error). The "
                "darker, the better within a task; bold: the one chosen.",
                ["task", *layers],
                rows,
            )
        )
    return tables


def robustness_table(task: str, curves: Sequence[Curves]) -> Table:
    """Scores under every condition, beside the clean records."""
    rows = []
    for curve in curves:
        clean = curve.content["clean"]
        rows.append(
            _texts((curve.model, "clean", DASH, interval(clean["point"], clean["low"], clean["high"]), DASH))
        )
        for family in curve.content["families"]:
            for condition in family["conditions"]:
                value = interval(*(condition[k] for k in ("point", "low", "high")))
                change = interval(**condition["difference"], sign=True)
                family_name = family["family"].replace("_", " ")
                rows.append(_texts((curve.model, family_name, condition["label"], value, change)))
    metric = SCORES[curves[0].content["metric"]]
    return Table(
        f"robustness_{task}",
        f"{task}: {metric} when the test records are disturbed, and the paired change from the clean ones.",
        ["model", "disturbance", "condition", metric, "change"],
        rows,
        3,
    )


def efficiency_table(task: str, curves: Sequence[Curves]) -> Table:
    """Scores by number of labelled records, mean over seeds, with the fitted curve."""
    sizes = sorted({size for curve in curves for size in curve.content["sizes"]})
    rows = []
    for curve in curves:
        at = {size: i for i, size in enumerate(curve.content["sizes"])}
        for name, model in curve.content["models"].items():
            cells = [number(np.mean(model["scores"][at[size]])) if size in at else DASH for size in sizes]
            fit = model["fit"]
            fitted = DASH if fit is None else f"{fit['C']:.3g}·n^{MINUS}{fit['a']:.3g} + {fit['L0']:.3g}"
            rows.append(_texts((name, fitted, *cells)))
    return Table(
        f"label_efficiency_{task}",
        f"{task}: {SCORES[curves[0].content['metric']]} by number of labelled training records, mean over seeds; "
        "fitted: what is left to the best score (1 less AUROC, or the error) as C·n^-a + L0.",
        ["model", "fitted", *(f"n = {size}" for size in sizes)],
        rows,
        2,
    )
