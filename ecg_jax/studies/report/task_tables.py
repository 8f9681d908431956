"""Tables of one task: its ranking, its classes, its layers and curves."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation.label_efficiency_plot import has_draws
from ecg_jax.evaluation.scoring import score
from ecg_jax.studies.report.cells import DASH, MINUS, SCORES, Cell, Table, interval, number, p_value, texts
from ecg_jax.studies.report.load import Collection, Curves, Result
from ecg_jax.studies.report.rows import MAJORITY, Entry, TaskScores
from ecg_jax.studies.report.tables import resampled

# Names of the further scores in results.json -> those of `scoring.METRICS`.
_SCORED_AS = {
    "micro_auroc": "micro_auroc", "macro_auprc": "average_precision", "fmax": "fmax", "brier": "brier", "ece": "ece",
    "r2": "r2",
}  # fmt: skip


def p_values_are_percentile(settings: dict) -> str:
    """A sentence where intervals and p-values are not of one kind, so that they can disagree."""
    if settings["interval"] == "percentile":
        return ""
    return (
        f" Ties are told by the {settings['interval']} interval of the paired difference, p-values are from its "
        "percentiles: near 0.05 the two can disagree."
    )


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
            entry.row.model, entry.row.mode or DASH, interval(entry.point, entry.low, entry.high, entry.mark),
            rank.rank, difference, p_value(p, resamples), p_value(rank.p_holm, resamples),
        ]  # fmt: skip
        if seeds:
            cells[0] = Cell(entry.row.model, f"({seeds})")
        for name in extra:
            if entry.result is None:
                cells.append(Cell(number(_baseline_score(name, task, entry)), mark="mute"))
            elif name in entry.result.results["metrics"]:
                cells.append(interval(**entry.result.results["metrics"][name]))
            else:
                cells.append(Cell(DASH, mark="mute"))
        rows.append(texts(cells))
    return Table(
        f"scores_{task.task}",
        f"{task.task}: all rows from best to worst. Differences to the best are paired, on {resamples} resamples of "
        "the same test records; p is two-sided, corrected by Holm over all rows and tasks of the report."
        f"{p_values_are_percentile(results['bootstrap'])}",
        [
            "model", "mode", SCORES[task.first.metric], "rank", "difference to the best",
            *(("p", "p (Holm)") if results["bootstrap"]["interval"] == "percentile" else
              ("p (percentile)", "p (percentile, Holm)")),
            *(SCORES[name] for name in extra),
        ],
        rows,
        2,
    )  # fmt: skip


def _baseline_score(name: str, task: TaskScores, entry: Entry) -> float | None:
    """A further score of a baseline, mean over its seeds; None for Challenge scores, which need thresholds."""
    if name not in _SCORED_AS:
        return None
    targets = task.first.predictions["targets"].astype(np.float64)
    once = np.ones((len(targets), 1))
    seeds = [score(_SCORED_AS[name], targets, array, once) for array in entry.predictions]
    undefined = task.first.results["bootstrap"]["undefined"]
    return float(np.mean([seed.macros(undefined)[0] for seed in seeds]))


def class_table(task: TaskScores) -> Table:
    """Every class of a task: how often, and the score of every probe."""
    first = task.first.results["per_class"]
    regression = task.first.regression
    name_of_score = "mae" if regression else "auroc"
    settings = task.first.results["bootstrap"]
    # The majority guess has the same score in every class.
    baselines = [e for e in task.entries.values() if e.result is None and e.row.baseline != MAJORITY]
    intervals = [e.scored.class_intervals(settings["level"], settings["interval"]) for e in baselines]
    counts = {"n": "known"} if regression else {"n_pos": "positive", "n_neg": "negative"}
    rows = []
    for k, (name, about) in enumerate(first.items()):
        cells = [name, about["description"] or DASH, *(about[count] for count in counts)]
        for entry in task.probes:
            own = entry.result.results["per_class"][name]
            cells.append(interval(own[name_of_score], own["ci_low"], own["ci_high"]))
        cells += [interval(*of_class[k]) for of_class in intervals]
        rows.append(texts(cells))
    return Table(
        f"classes_{task.task}",
        f"{task.task}: {'mean absolute error' if regression else 'AUROC'} of every "
        f"{'target' if regression else 'class'} with its interval; a dash: undefined in the test records.",
        [
            "class",
            "meaning",
            *(f"n {word}" for word in counts.values()),
            *(e.row.label for e in [*task.probes, *baselines]),
        ],
        rows,
        2,
    )


def layer_tables(collection: Collection) -> list[Table]:
    """For each model and mode with a choice of layers: tasks by layers, the validation score as a shade."""
    probes: dict[tuple[str, str], list[Result]] = {}
    for result in (result for task in collection.tasks for result in collection.of_task(task)):
        if result.results["layers"] is not None:
            probes.setdefault((result.model, result.mode), []).append(result)
    tables, taken = [], set()
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
        stem = name = "layers_" + "".join(c if c.isalnum() else "_" for c in f"{model}_{mode}")
        n = 1
        while name.lower() in taken:
            n += 1
            name = f"{stem}_{n}"
        taken.add(name.lower())
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
            texts((curve.model, "clean", DASH, interval(clean["point"], clean["low"], clean["high"]), DASH))
        )
        for family in curve.content["families"]:
            for condition in family["conditions"]:
                value = interval(*(condition[k] for k in ("point", "low", "high")))
                change = interval(**condition["difference"], sign=True)
                family_name = family["family"].replace("_", " ")
                rows.append(texts((curve.model, family_name, condition["label"], value, change)))
    metric = SCORES[curves[0].content["metric"]]
    return Table(
        f"robustness_{task}",
        f"{task}: {metric} when the test records are disturbed, and the paired change from the clean ones; "
        f"{curve_intervals(curves)}.",
        ["model", "disturbance", "condition", metric, "change"],
        rows,
        3,
    )


def curve_intervals(curves: Sequence[Curves]) -> str:
    """ "95 % intervals from resampled patients", each kind once."""
    settings = dict.fromkeys(
        (c.content["bootstrap"]["level"], c.content["bootstrap"]["unit"]) for c in curves
    )
    return "; ".join(f"{100 * level:g} % intervals from {resampled({'': unit})}" for level, unit in settings)


def efficiency_intervals(curves: Sequence[Curves]) -> str:
    """The same of label efficiency, whose intervals hold draws of subsets where there are several."""
    several = any(has_draws(curve.content) for curve in curves)
    return curve_intervals(curves) + (" and draws of subsets" if several else "")


def efficiency_table(task: str, curves: Sequence[Curves]) -> Table:
    """Scores by number of labelled records, mean over seeds, with the fitted curve."""
    sizes = sorted({size for curve in curves for size in curve.content["sizes"]})
    rows = []
    for curve in curves:
        at = {size: i for i, size in enumerate(curve.content["sizes"])}
        for name, model in curve.content["models"].items():
            cells = [
                interval(*(model[field][at[size]] for field in ("mean", "low", "high")))
                if size in at
                else DASH
                for size in sizes
            ]
            fit = model["fit"]
            fitted = DASH if fit is None else f"{fit['C']:.3g}·n^{MINUS}{fit['a']:.3g} + {fit['L0']:.3g}"
            rows.append(texts((curve.names[name], fitted, *cells)))
    return Table(
        f"label_efficiency_{task}",
        f"{task}: {SCORES[curves[0].content['metric']]} by number of labelled training records, mean over seeds, with "
        f"{efficiency_intervals(curves)}; penalty and layer are chosen on the validation records, "
        "which are not counted; "
        "fitted: what is left to the best score (1 less AUROC, or the error) as C·n^-a + L0.",
        ["model", "fitted", *(f"n = {size}" for size in sizes)],
        rows,
        2,
    )


def _share(size: dict) -> Cell:
    """A factor with its interval; what lies beyond the measured sizes is said to be less or more than the end."""

    def text(field: str) -> str:
        side = size[f"{field}_open"]
        if side is None:
            return number(size[field], 2)
        return f"{side} {number(size['least' if side == '<' else 'most'], 2)}"

    point = text("factor")
    between = f"[{text('low')}, {text('high')}]"
    return Cell(point, between, "mute" if point == DASH else "")


def saving_table(task: str, curves: Sequence[Curves]) -> Table:
    """How many of another model's labelled records a model needs for the same score."""
    rows = []
    for curve in curves:
        for better, others in curve.content["saving"].items():
            for other, entry in others.items():
                names = curve.names[better], curve.names[other]
                if "undefined" in entry:
                    rows.append(texts((*names, DASH, entry["undefined"])))
                    continue
                for size in entry["by_size"]:
                    rows.append(texts((*names, size["size"], _share(size))))
    rows = rows or [texts((DASH, DASH, DASH, DASH))]
    return Table(
        f"label_saving_{task}",
        f"{task}: the share of the other model's labelled training records that a model needs for the same score, by "
        "the fitted curves; validation records are not counted; < and >: beyond the sizes measured; a dash: "
        "not defined.",
        ["model", "other model", "records of the other", "share needed"],
        rows,
        2,
    )
