"""What a report draws of probes: which rows and classes, with the sentences that say what it shows and does not."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation import report_plots
from ecg_jax.evaluation.calibration import reliability
from ecg_jax.evaluation.drawing import MOST_MODELS, Looks
from ecg_jax.evaluation.drawing import looks_of as looks_of_names
from ecg_jax.evaluation.label_efficiency_plot import MAJORITY, error_figure
from ecg_jax.evaluation.plots import FEW_POSITIVES, LOOKS
from ecg_jax.evaluation.robustness_plot import explanation, robustness_figure
from ecg_jax.studies.report.cells import SCORES, number
from ecg_jax.studies.report.load import Curves
from ecg_jax.studies.report.pictures import Picture, drawn
from ecg_jax.studies.report.read import MODES
from ecg_jax.studies.report.rows import ECG_FEATURES, RANDOM_INIT, SUPERVISED, Entry, TaskScores, all_rows
from ecg_jax.studies.report.task_tables import curve_intervals, efficiency_intervals

# Rows and classes that a picture still shows legibly; the tables hold all of them.
_FOREST_MODELS, _FOREST_CLASSES = 6, 40
_CALIBRATED_MODELS, _WORST_CLASSES = 4, 2
_PANELS = 6


def _best(task: TaskScores, most: int) -> tuple[list[Entry], str]:
    """Probes from best to worst, at most so many, and a sentence where some are left out."""
    probes = [entry for entry in task.ranked if entry.result is not None]
    left_out = len(probes) - most
    return probes[:most], f" The {most} best of {len(probes)} are drawn." if left_out > 0 else ""


def looks_of(scores: dict[str, TaskScores]) -> Looks:
    """Colour and marker of every probe and, by its name alone, of every model."""
    probes = [row for row in all_rows(scores) if row.baseline in (None, SUPERVISED)]
    models = dict.fromkeys(row.model for row in probes if not row.baseline)
    return looks_of_names([row.label for row in probes]) | looks_of_names(list(models))


def looks_by_place(task: TaskScores) -> Looks:
    """Colour and marker of every probe of one task, the best ones apart from each other."""
    return looks_of_names([entry.row.label for entry in task.ranked if entry.result is not None])


def forest(task: TaskScores, looks: Looks) -> Picture:
    """Every class of a task with the probes side by side."""
    shown, note = _best(task, _FOREST_MODELS)
    first = task.first.results["per_class"]
    regression = task.first.regression
    score, count = ("mae", "n") if regression else ("auroc", "n_pos")
    classes = list(first)
    n = np.array([first[name][count] for name in classes])
    kept = np.sort(np.argsort(-n, kind="stable")[:_FOREST_CLASSES])
    if len(kept) < len(classes):
        note += f" Of {len(classes)} classes the {len(kept)} commonest are drawn; the table has all."

    def values(entry):
        per_class = entry.result.results["per_class"]
        rows = [[per_class[classes[k]][name] for name in (score, "ci_low", "ci_high")] for k in kept]
        return np.array(rows, dtype=np.float64)

    twins = [entry for entry in task.ranked if entry.row.baseline == RANDOM_INIT]
    reference = twins[0].scored.per_class[kept] if twins else None
    if len(twins) > 1:
        note += f" Grey: {twins[0].row.label}, the best of {len(twins)} random initialisations."
    intervals = {entry.row.label: values(entry) for entry in shown}
    figure = report_plots.class_forest(
        [classes[k] for k in kept],
        n[kept].tolist(),
        intervals,
        looks,
        reference,
        "MAE" if regression else "AUROC",
        None if regression else 0.5,
        task.first.results["bootstrap"]["level"],
        "the best random initialisation" if len(twins) > 1 else twins[0].row.label if twins else "",
    )
    what = "mean absolute error" if regression else "AUROC"
    each = "target" if regression else "class"
    rows = [
        (classes[k], int(n[k]), label, *map(float, of_model[i]))
        for label, of_model in intervals.items()
        for i, k in enumerate(kept)
    ]
    if twins:
        rows += [
            (classes[k], int(n[k]), twins[0].row.label, float(reference[i]), None, None)
            for i, k in enumerate(kept)
        ]
    best = intervals[shown[0].row.label]
    defined = [i for i in range(len(kept)) if not np.isnan(best[i, 0])]
    ends = sorted(defined, key=lambda i: best[i, 0], reverse=not regression)
    extremes = (
        f"{shown[0].row.label}, the best in the mean, is best at {classes[kept[ends[0]]]} "
        f"({number(best[ends[0], 0])}) and worst at {classes[kept[ends[-1]]]} ({number(best[ends[-1], 0])})."
        if len(ends) > 1
        else "There is one class to be compared by."
        if ends
        else "No class is defined in the test records."
    )
    few = sum(bool(n[k] < FEW_POSITIVES) for k in kept)
    thin = (
        f" {few} of the classes have fewer than {FEW_POSITIVES} positive test records: resamples of so few hold too "
        "little of what other records would show, and their intervals are not to be believed."
        if few and not regression
        else ""
    )
    return drawn(
        figure,
        f"figure_classes_{task.task}",
        alt=f"{what} of {len(kept)} {'targets' if regression else 'classes'} of {task.task} with intervals, for "
        f"{', '.join(entry.row.label for entry in shown)}.",
        caption=f"{task.task}: {what} of every {each} with its interval, sorted by the best model; "
        f"n: {'known values' if regression else 'positive test records'}.{note}",
        shows=f"On which {'targets' if regression else 'classes'} models are good and where they differ. {extremes}",
        does_not_show="Whether two models differ on a class: the intervals of both are about the same test records, "
        "so that models whose bars overlap can still differ, and of many classes compared some seem to differ by "
        f"chance. The paired differences of the means are in the rankings.{thin}",
        columns=(each, "n", "model", "mae" if regression else "auroc", "low", "high"),
        rows=rows,
    )


def modes(scores: dict[str, TaskScores], looks: Looks) -> list[Picture]:
    """Checkpoints compared mode by mode, a panel for each task."""
    panels, references = [], []
    present = {
        entry.row.mode
        for task in scores.values()
        for entry in task.entries.values()
        if not entry.row.baseline
    }
    order = [mode for mode in MODES if mode in present]
    names = list(
        dict.fromkeys(e.row.model for t in scores.values() for e in t.entries.values() if not e.row.baseline)
    )[:MOST_MODELS]
    for task in scores.values():
        models: dict[str, dict] = {}
        lines: dict[str, list[float]] = {SUPERVISED: [], RANDOM_INIT: [], ECG_FEATURES: []}
        for entry in task.entries.values():
            row = entry.row
            if row.model in names and not row.baseline:
                interval = [np.nan if v is None else v for v in (entry.point, entry.low, entry.high)]
                models.setdefault(row.model, {})[row.mode] = interval
            elif row.baseline in lines:
                lines[row.baseline].append(entry.point)
        if models:
            panels.append((task.task, SCORES[task.first.metric], models))
            best = min if task.first.regression else max
            references.append({name: best(points) for name, points in lines.items() if points})
    pictures = []
    for start in range(0, len(panels), _PANELS):
        part = slice(start, start + _PANELS)
        tasks = ", ".join(panel[0] for panel in panels[part])
        pictures.append(
            drawn(
                report_plots.mode_panels(panels[part], references[part], order, looks),
                f"figure_modes_{start // _PANELS + 1}",
                alt=f"Scores of {', '.join(names)} in the modes {', '.join(order)} on {tasks}.",
                caption=f"{tasks}: checkpoints in each mode with intervals. Grey: baselines, the best where there are "
                "several.",
                shows="What a checkpoint gains from a larger head or from finetuning, and whether the order of the "
                "checkpoints stays the same from mode to mode. A finetuned encoder should be held against the one "
                "trained from scratch, a frozen one against the random initialisation.",
                does_not_show="The cost of a mode: finetuning trains the whole encoder. Modes have their own learning "
                "rates and numbers of steps, and a mode that loses may be tuned worse. Intervals are over test "
                "records, not over seeds of training.",
                columns=("task", "score", "model", "mode", "point", "low", "high"),
                rows=[
                    *(
                        (task, metric.split(" ↑")[0].split(" ↓")[0], model, mode, *map(float, values))
                        for task, metric, models in panels[part]
                        for model, of_mode in models.items()
                        for mode, values in of_mode.items()
                    ),
                    *(
                        (
                            panel[0],
                            panel[1].split(" ↑")[0].split(" ↓")[0],
                            name,
                            "baseline",
                            value,
                            None,
                            None,
                        )
                        for panel, lines in zip(panels[part], references[part], strict=True)
                        for name, value in lines.items()
                    ),
                ],
            )
        )
    return pictures


def calibration(task: TaskScores, looks: Looks) -> Picture:
    """Reliability over all classes, and of the classes where the best model is calibrated worst."""
    shown, note = _best(task, _CALIBRATED_MODELS)
    targets = task.first.predictions["targets"].astype(np.float64)
    best = shown[0]
    per_class = best.result.results["per_class"]
    errors = {name: entry["ece"] for name, entry in per_class.items() if entry["ece"] is not None}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:_WORST_CLASSES]

    def bins(entry, columns):
        # A pooled diagram is that of one class with every entry.
        selected = entry.predictions[0][:, columns].reshape(-1, 1)
        return tuple(part[0] for part in reliability(targets[:, columns].reshape(-1, 1), selected))

    everything = list(range(targets.shape[1]))
    panels = [("all classes pooled", {entry.row.label: bins(entry, everything) for entry in shown})]
    for name in worst:
        k = task.first.classes.index(name)
        panels.append((f"{name} (ECE {errors[name]:.3f})", {e.row.label: bins(e, [k]) for e in shown}))
    ece = best.result.results["metrics"]["ece"]["point"] if "ece" in best.result.results["metrics"] else None
    mean = f" Its mean ECE over classes is {number(ece)}." if ece is not None else ""
    return drawn(
        report_plots.calibration(panels, looks),
        f"figure_calibration_{task.task}",
        alt=f"Reliability diagrams of {task.task}: all classes pooled and {', '.join(worst)}.",
        caption=f"{task.task}: how often the class was there for each predicted probability, and below how many "
        f"predictions fall into each tenth. Beside all classes pooled, those with the largest calibration error of "
        f"{best.row.label}.{note}",
        shows=f"Whether a predicted probability can be taken at its word on these test records.{mean}",
        does_not_show="Calibration elsewhere: where a class is rarer or commoner than here, the same probabilities are "
        "wrong. Points of few predictions scatter and have no intervals; pooled classes can be calibrated in the mean "
        "while each is off.",
        columns=("panel", "model", "bin", "mean_predicted", "share_positive", "n"),
        rows=[
            (title, model, b, float(said), float(seen), int(count))
            for title, models in panels
            for model, parts in models.items()
            for b, (said, seen, count) in enumerate(zip(*parts, strict=True))
        ],
    )


def regression(task: TaskScores) -> Picture:
    """Predicted against true values of the best model."""
    best = task.best_probe
    targets = task.first.predictions["targets"].astype(np.float64)
    known = (~np.isnan(targets)).sum(axis=0)
    kept = np.sort(np.argsort(-known, kind="stable")[:_PANELS])
    panels = [(task.first.classes[k], targets[:, k], best.predictions[0][:, k]) for k in kept]
    note = f" The {_PANELS} targets known most often are drawn." if len(kept) < targets.shape[1] else ""
    r2 = [best.result.results["per_class"][panel[0]]["r2"] for panel in panels]
    explained = ", ".join(f"{panel[0]} {number(value)}" for panel, value in zip(panels, r2, strict=True))
    records = best.result.predictions["record_id"]
    return drawn(
        report_plots.predicted_against_true(panels, best.row.label),
        f"figure_regression_{task.task}",
        alt=f"Predicted against true values of {', '.join(panel[0] for panel in panels)} by {best.row.label}.",
        caption=f"{task.task}: values predicted by {best.row.label} against the true ones, in standard deviations of "
        f"the training targets; dashed: equal.{note}",
        shows=f"How far single predictions are off, and whether extremes are pulled to the mean. R²: {explained}.",
        does_not_show="An interval of a single prediction, or the other models. A cloud that leans is what any model "
        "of little information does, and no fault of its own; units are standard deviations, not those of the target.",
        columns=("target", "record_id", "true_z", "predicted_z"),
        rows=[
            (target, str(record), float(y), float(said))
            for target, true, predicted in panels
            for record, y, said in zip(records, true, predicted, strict=True)
            if not np.isnan(y)
        ],
    )


def _with_looks(names: Sequence[str], looks: Looks) -> Looks:
    """Looks of the first names that fit into a picture: those of the page, and for others what is left."""
    names = list(dict.fromkeys(names))[:MOST_MODELS]
    known = {name: looks[name] for name in names if name in looks}
    spare = [look for look in LOOKS if look not in known.values()]
    return known | dict(zip([name for name in names if name not in known], spare, strict=False))


def _cut(names: Sequence[str], shown: Looks) -> str:
    """A sentence where not all are drawn."""
    return f" The first {len(shown)} of {len(names)} are drawn." if len(shown) < len(names) else ""


def label_efficiency(task: str, curves: Sequence[Curves], looks: Looks) -> Picture:
    """Errors by number of labels."""
    metric = curves[0].content["metric"]
    names = [name for curve in curves for model, name in curve.names.items() if model != MAJORITY]
    shown = _with_looks(names, looks)
    studies = [(curve.content, curve.names) for curve in curves]
    triples = ("mean", "low", "high")
    return drawn(
        error_figure(studies, shown),
        f"figure_label_efficiency_{task}",
        alt=f"{SCORES[metric]} on {task} by number of labelled training records for {', '.join(shown)}.",
        caption=f"{task}: what is left to the best score by number of labelled training records, not counting those "
        f"that penalties and layers are chosen on; mean over seeds with {efficiency_intervals(curves)}; "
        f"lines: fitted curves.{_cut(names, shown)}",
        shows="How many labelled records a model needs for a score: of two curves the lower one needs fewer, and their "
        "horizontal distance is by which factor.",
        does_not_show="What happens beyond the sizes drawn: a fitted curve is a description within them, and its floor "
        "a guess. The validation records that penalties are chosen on have labels too and are not counted.",
        columns=("model", "labelled_records", "score", *triples),
        rows=[
            (curve.names[name], size, metric, *(model[field][i] for field in triples))
            for curve in curves
            for name, model in curve.content["models"].items()
            if name == MAJORITY or curve.names[name] in shown
            for i, size in enumerate(curve.content["sizes"])
        ],
    )


def robustness(task: str, curves: Sequence[Curves], looks: Looks) -> Picture:
    """Scores under disturbances."""
    names = [curve.model for curve in curves]
    shown = _with_looks(names, looks)
    suites = {curve.model: curve.content for curve in curves if curve.model in shown}
    families = dict.fromkeys(
        family["family"].replace("_", " ") for suite in suites.values() for family in suite["families"]
    )
    metric = SCORES[curves[0].content["metric"]]
    triple = ("point", "low", "high")
    losses = [
        (condition["difference"]["point"], model, family["family"], condition["label"])
        for model, suite in suites.items()
        for family in suite["families"]
        for condition in family["conditions"]
        if condition["difference"]["point"] is not None
    ]
    worst = ""
    if losses:
        sign = 1 if metric.endswith("↑") else -1
        change, model, family, label = min(losses, key=lambda loss: sign * loss[0])
        worst = (
            f" The largest loss: {model}, {family.replace('_', ' ')} at {label}, {number(change, sign=True)}."
        )
    return drawn(
        robustness_figure(suites, shown),
        f"figure_robustness_{task}",
        alt=f"{metric} on {task} under {', '.join(families)} for {', '.join(shown)}.",
        caption=f"{task}: score when the test records are disturbed, with {curve_intervals(curves)}. "
        f"{explanation(list(suites.values()))}{_cut(names, shown)}",
        shows=f"Which disturbances cost a model its score, and from which strength on.{worst}",
        does_not_show="Real disturbances: these are simulated, one at a time, on the same test records. Nothing was "
        "trained on disturbed records; a model that was may order otherwise.",
        columns=("model", "disturbance", "condition", *triple),
        rows=[
            *(
                (model, "clean", None, *(suite["clean"][k] for k in triple))
                for model, suite in suites.items()
            ),
            *(
                (model, family["family"], condition["label"], *(condition[k] for k in triple))
                for model, suite in suites.items()
                for family in suite["families"]
                for condition in family["conditions"]
            ),
        ],
    )
