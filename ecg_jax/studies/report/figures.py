"""What a report draws: which rows, classes and records, with the sentences that say so."""

import io
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.data.preprocessing import MICROVOLTS_PER_MV
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import report_plots
from ecg_jax.evaluation.calibration import reliability
from ecg_jax.evaluation.drawing import MOST_MODELS, Looks, to_svg
from ecg_jax.evaluation.drawing import looks_of as looks_of_names
from ecg_jax.evaluation.label_efficiency_plot import MAJORITY, error_figure
from ecg_jax.evaluation.plots import LOOKS, ecg_paper
from ecg_jax.evaluation.robustness_plot import explanation, robustness_figure
from ecg_jax.studies.report.cells import SCORES, number
from ecg_jax.studies.report.load import Curves
from ecg_jax.studies.report.read import MODES
from ecg_jax.studies.report.rows import ECG_FEATURES, RANDOM_INIT, SUPERVISED, Entry, TaskScores, all_rows
from ecg_jax.studies.report.task_tables import curve_intervals, efficiency_intervals

# Rows and classes that a picture still shows legibly; the tables hold all of them.
_FOREST_MODELS, _FOREST_CLASSES = 6, 40
_CALIBRATED_MODELS, _WORST_CLASSES = 4, 2
_PANELS = 6
_COLOURS_OF_PAPER, _PAPER_WIDTH = 24, 1170

#: Which recordings a report draws: those of corpora that everybody may pass on, all, none.
RECORDINGS = ("open", "all", "none")
#: Corpora of which no recording may be passed on: who has them signed an agreement.
CLOSED = ("mimic", "echonext")


@dataclass(frozen=True)
class Picture:
    """An image with what it shows in words."""

    data: bytes
    kind: str
    """"svg+xml" or "png"."""
    alt: str
    caption: str
    width: int
    """Pixels at its natural size."""


def _svg(data: bytes, alt: str, caption: str) -> Picture:
    points = float(re.search(rb'width="([\d.]+)pt"', data)[1])
    return Picture(data, "svg+xml", alt, caption, round(points * 4 / 3))


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

    twins = [entry for entry in task.entries.values() if entry.row.baseline == RANDOM_INIT]
    reference = twins[0].scored.per_class[kept] if twins else None
    data = report_plots.class_forest(
        [classes[k] for k in kept],
        n[kept].tolist(),
        {entry.row.label: values(entry) for entry in shown},
        looks,
        reference,
        "MAE" if regression else "AUROC",
        None if regression else 0.5,
        task.first.results["bootstrap"]["level"],
        twins[0].row.label if twins else "",
    )
    what = "mean absolute error" if regression else "AUROC"
    each = "target" if regression else "class"
    return _svg(
        data,
        f"{what} of {len(kept)} {'targets' if regression else 'classes'} of {task.task} with intervals, for "
        f"{', '.join(entry.row.label for entry in shown)}.",
        f"{task.task}: {what} of every {each} with its interval, sorted by the best model; "
        f"n: {'known values' if regression else 'positive test records'}.{note}",
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
            _svg(
                report_plots.mode_panels(panels[part], references[part], order, looks),
                f"Scores of {', '.join(names)} in the modes {', '.join(order)} on {tasks}.",
                f"{tasks}: checkpoints in each mode with intervals. Grey: baselines, the best where there are several.",
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
    return _svg(
        report_plots.calibration(panels, looks),
        f"Reliability diagrams of {task.task}: all classes pooled and {', '.join(worst)}.",
        f"{task.task}: how often the class was there for each predicted probability, and below how many predictions "
        f"fall into each tenth. Beside all classes pooled, those with the largest calibration error of "
        f"{best.row.label}.{note}",
    )


def regression(task: TaskScores) -> Picture:
    """Predicted against true values of the best model."""
    best = task.best_probe
    targets = task.first.predictions["targets"].astype(np.float64)
    known = (~np.isnan(targets)).sum(axis=0)
    kept = np.sort(np.argsort(-known, kind="stable")[:_PANELS])
    panels = [(task.first.classes[k], targets[:, k], best.predictions[0][:, k]) for k in kept]
    note = f" The {_PANELS} targets known most often are drawn." if len(kept) < targets.shape[1] else ""
    return _svg(
        report_plots.predicted_against_true(panels, best.row.label),
        f"Predicted against true values of {', '.join(panel[0] for panel in panels)} by {best.row.label}.",
        f"{task.task}: values predicted by {best.row.label} against the true ones, in standard deviations of the "
        f"training targets; dashed: equal.{note}",
    )


def _with_looks(names: Sequence[str], looks: Looks) -> Looks:
    """Looks of the first names that fit into a picture: those of the page, and for others what is left."""
    names = list(dict.fromkeys(names))[:MOST_MODELS]
    known = {name: looks[name] for name in names if name in looks}
    spare = [look for look in LOOKS if look not in known.values()]
    return known | dict(zip([name for name in names if name not in known], spare, strict=False))


def _cut(names: Sequence[str], drawn: Looks) -> str:
    """A sentence where not all are drawn."""
    return f" The first {len(drawn)} of {len(names)} are drawn." if len(drawn) < len(names) else ""


def label_efficiency(task: str, curves: Sequence[Curves], looks: Looks) -> Picture:
    """Errors by number of labels."""
    metric = curves[0].content["metric"]
    names = [name for curve in curves for model, name in curve.names.items() if model != MAJORITY]
    drawn = _with_looks(names, looks)
    studies = [(curve.content, curve.names) for curve in curves]
    return _svg(
        to_svg(error_figure(studies, drawn)),
        f"{SCORES[metric]} on {task} by number of labelled training records for {', '.join(drawn)}.",
        f"{task}: what is left to the best score by number of labelled training records, not counting those that "
        f"penalties and layers are chosen on; mean over seeds with {efficiency_intervals(curves)}; "
        f"lines: fitted curves.{_cut(names, drawn)}",
    )


def robustness(task: str, curves: Sequence[Curves], looks: Looks) -> Picture:
    """Scores under disturbances."""
    names = [curve.model for curve in curves]
    drawn = _with_looks(names, looks)
    suites = {curve.model: curve.content for curve in curves if curve.model in drawn}
    families = dict.fromkeys(
        family["family"].replace("_", " ") for suite in suites.values() for family in suite["families"]
    )
    metric = SCORES[curves[0].content["metric"]]
    return _svg(
        to_svg(robustness_figure(suites, drawn)),
        f"{metric} on {task} under {', '.join(families)} for {', '.join(drawn)}.",
        f"{task}: score when the test records are disturbed, with {curve_intervals(curves)}. "
        f"{explanation(list(suites.values()))}{_cut(names, drawn)}",
    )


@dataclass(frozen=True)
class Example:
    """A test record with what was predicted for it."""

    picture: Picture
    heading: str
    record_id: str
    predicted: list[tuple[str, float, float]]
    """(class, true target, predicted probability), from likely to unlikely."""


def choose_examples(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, tuple[int, int]]:
    """Records worth looking at: (record, class) each.

    Args:
        targets: [n, K] of 0, 1, NaN.
        probabilities: [n, K].

    Returns:
        "most confident and right": the class that is there and has the highest probability; "most confident and
        wrong": the largest difference between target and probability; "least sure": the known class closest to 0.5.
        A record is chosen once; what there is none of is left out.
    """
    known = ~np.isnan(targets)
    error = np.abs(np.where(known, targets, np.nan) - probabilities)
    rules = {
        "Most confident and right": np.where(targets == 1, probabilities, -np.inf),
        "Most confident and wrong": np.where(known & (error > 0.5), error, -np.inf),
        "Least sure": np.where(known, -np.abs(probabilities - 0.5), -np.inf),
    }
    chosen: dict[str, tuple[int, int]] = {}
    for name, worth in rules.items():
        worth = worth.copy()
        worth[[record for record, _ in chosen.values()]] = -np.inf
        record, k = np.unravel_index(np.argmax(worth), worth.shape)
        if np.isfinite(worth[record, k]):
            chosen[name] = int(record), int(k)
    return chosen


def examples(task: TaskScores, recordings: str) -> tuple[list[Example], str]:
    """Recordings that the best probe is most and least sure of, and a sentence: whose, or why there are none.

    Args:
        task: of which.
        recordings: one of `RECORDINGS`.
    """
    results = task.best_probe.result.results
    tested_on = results["store"] if results["test_store"] is None else results["test_store"]
    corpus = tested_on["corpus"]
    if recordings == "none":
        return [], "No recordings are shown: the report was made with `--recordings=none`."
    if recordings == "open" and corpus in CLOSED:
        return [], (
            f"No recordings are shown: those of {corpus} are lent under an agreement and must not be passed on; a "
            "report that stays with those who signed it shows them with `--recordings=all`."
        )
    try:
        store = Store(tested_on["path"])
    except UserError:
        return [], f"No recordings are shown: the store {tested_on['path']} cannot be opened here."
    try:
        return _examples(task, store, tested_on)
    finally:
        store.close()


def _examples(task: TaskScores, store: Store, tested_on: dict[str, str]) -> tuple[list[Example], str]:
    best = task.best_probe
    predictions = best.result.predictions
    rows = predictions["row"].astype(np.int64)
    same = rows.max(initial=0) < len(store) and np.array_equal(
        store.column("record_id")[rows].astype(str), predictions["record_id"].astype(str)
    )
    if store.fingerprint != tested_on["fingerprint"] or not same:
        return [], f"No recordings are shown: the store {tested_on['path']} has changed since the probe."
    targets = task.first.predictions["targets"].astype(np.float64)
    found = []
    for name, (i, k) in choose_examples(targets, best.predictions[0]).items():
        order = np.argsort(-best.predictions[0][i], kind="stable")
        listed = [
            (task.first.classes[c], float(targets[i, c]), float(best.predictions[0][i, c])) for c in order
        ]
        signal = store.read(int(rows[i])).astype(np.float64) / MICROVOLTS_PER_MV
        record = str(predictions["record_id"][i])
        class_name, there = task.first.classes[k], "there" if targets[i, k] == 1 else "not there"
        sentence = f"{class_name} is {there}, predicted with {number(float(best.predictions[0][i, k]))}"
        found.append(
            Example(
                Picture(
                    _paper(signal, store.rate_hz, store.leads),
                    "png",
                    f"Twelve-lead ECG of record {record}: {sentence}.",
                    f"Record {record}: {sentence}.",
                    _PAPER_WIDTH,
                ),
                name,
                record,
                listed,
            )
        )
    return found, f"Recordings that {best.row.label}, the best probe of the task, is most and least sure of."


def _paper(signal: np.ndarray, rate_hz: float, leads: Sequence[str]) -> bytes:
    """An ECG on paper as a PNG of few colours: a fifth of the size, and the eye sees no difference."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ecg.png"
        ecg_paper(signal, rate_hz, leads, path, dpi=110)
        buffer = io.BytesIO()
        with Image.open(path) as image:
            quantised = image.convert("RGB").quantize(_COLOURS_OF_PAPER, dither=Image.Dither.NONE)
            quantised.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
