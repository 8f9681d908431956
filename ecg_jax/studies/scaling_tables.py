"""The tables of a scaling study: parameters with verdicts, models compared, largest sizes predicted, every point."""

from collections.abc import Sequence

from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.figure_folder import Figure
from ecg_jax.studies.scaling_correlations import Correlated
from ecg_jax.studies.scaling_fits import PUBLISHED_IN, Fitted, published
from ecg_jax.studies.scaling_points import axis_of
from ecg_jax.studies.study_runs import StudyRun

_CURVE = ("curve", "quantity", "task", "mode", "metric", "axis")


def _curve(fit: Fitted) -> list[str]:
    curve = fit.curve
    return [curve.family.label, curve.quantity, curve.task, curve.mode, curve.metric, fit.axis]


def _triple(value: Interval | None) -> list[float | None]:
    return [None, None, None] if value is None else [float(each) for each in value]


def tables(
    fits: Sequence[Fitted], correlated: Sequence[Correlated], runs: Sequence[StudyRun]
) -> list[Figure]:
    """All tables; see the head of this file."""
    made = [
        _exponents(fits),
        _models(fits),
        _held_out(fits),
        _correlations(correlated),
        _points(fits),
        _runs(runs),
    ]
    return [table for table in made if table.rows]


def _exponents(fits: Sequence[Fitted]) -> Figure:
    names = [f"{p}{end}" for p in "abc" for end in ("", "_low", "_high")]
    rows = []
    for fit in fits:
        if not fit.forms:
            rows.append(
                [*_curve(fit), "", False, len(fit.curve.runs), fit.curve.n_rungs, *[None] * 9, False, fit.remark,
                 "", "", published(fit)]
            )  # fmt: skip
        for form, found in fit.forms.items():
            rows.append(
                [*_curve(fit), form, form == fit.drawn, len(fit.curve.runs), fit.curve.n_rungs,
                 *_triple(found.a), *_triple(found.b), *_triple(found.c), found.law.identifiable, found.law.reason,
                 " and ".join(found.over), "; ".join(filter(None, (fit.remark, *found.remarks))), published(fit)]
            )  # fmt: skip
    return Figure(
        "fits",
        "Fitted parameters",
        "Every fit of a N^-b (power law) and a N^-b + c (with offset) over every axis, with 95 % intervals of its "
        "parameters, whether the points determine them, and the reason. `drawn` marks the form in the pictures: that "
        "of the paper (losses without offset, errors with one) where it is determined, else the one without offset. "
        f"`published` is the exponent of the paper ({PUBLISHED_IN}) where it reports one, from other recordings and "
        "sizes; it is no result of these runs.",
        "Parameters of a fit that is not identifiable are where a search ended, and no estimates. The parameter a is "
        "the value at N = 1, far outside the points, and goes with b. Exponents of the two forms are not the same "
        "quantity.",
        (*_CURVE, "form", "drawn", "n_runs", "n_rungs", *names, "identifiable", "reason", "intervals_over", "remarks",
         "published"),
        rows,
    )  # fmt: skip


def _models(fits: Sequence[Fitted]) -> Figure:
    rows = [
        [*_curve(fit), each.name, each.parameters, each.aicc, each.left_out_error, each.name == fit.comparison.best,
         each.name == fit.comparison.best_left_out, each.remark, fit.comparison.verdict]
        for fit in fits if fit.comparison is not None for each in fit.comparison.candidates
    ]  # fmt: skip
    return Figure(
        "models",
        "Does it scale at all?",
        "No scaling (a constant), a power law, and a power law with offset for the same points: AICc (smaller is "
        "better; the simplest within 2 of the smallest is named best), and the error of log values when each size in "
        "turn is left out and predicted by the others.",
        "With a handful of sizes AICc is often undefined and rarely decisive; a constant that is named best does not "
        "prove that more recordings do nothing, it says that these runs do not show that they do.",
        (*_CURVE, "model", "parameters", "aicc", "left_out_error", "best_by_aicc", "best_left_out", "remark",
         "verdict"),
        rows,
    )  # fmt: skip


def _held_out(fits: Sequence[Fitted]) -> Figure:
    rows = [
        [*_curve(fit), form, form == fit.drawn, each.size, each.observed, *_triple(each.predicted), each.error,
         each.inside, each.remark]
        for fit in fits for form, each in fit.held_out.items()
    ]  # fmt: skip
    return Figure(
        "largest_size_predicted",
        "The largest size, predicted from the others",
        "Each curve is fitted without its largest size and predicts the mean of the runs there, with a 95 % interval "
        "that contains their spread too; the error is predicted over found, less 1.",
        "One size held out is one test of extrapolation, over the step from the second largest size to it and no "
        "further. Where the smaller sizes do not determine the parameters there is no prediction. With an offset, and "
        "single runs or sizes that lie off the curve, intervals of those that there are held the largest size 75 to "
        "83 % of the time (simulated).",
        (*_CURVE, "form", "drawn", "size", "found", "predicted", "low", "high", "error", "inside", "remark"),
        rows,
    )  # fmt: skip


def _correlations(correlated: Sequence[Correlated]) -> Figure:
    rows = [
        [of.task, of.mode, of.metric, pair, each.name, each.n_runs, each.n_units, *_triple(each.pearson),
         *_triple(each.spearman), " and ".join(each.over), each.remark]
        for of in correlated for pair, own in of.against.items() for each in own
    ]  # fmt: skip
    return Figure(
        "correlations",
        "Correlations of pretraining loss and downstream error",
        "Pearson and Spearman correlations of logarithms with 95 % intervals. The unit is the cell (curve and size) "
        "with the mean over its seeds; 'seeds within rungs' compares runs of one cell with each other.",
        "Across objectives losses are not comparable: the rows 'all runs' of several curves mix their scales and are "
        "printed to be seen, not to be believed. Loss and error correlate already because both fall with size; loss "
        "and residual error are near 0 by construction, whatever the truth, and have no interval.",
        ("task", "mode", "metric", "pair", "over", "n_runs", "n_units", "pearson", "pearson_low", "pearson_high",
         "spearman", "spearman_low", "spearman_high", "intervals_over", "remark"),
        rows,
    )  # fmt: skip


def _points(fits: Sequence[Fitted]) -> Figure:
    rows = [
        [*_curve(fit)[:5], run.name, run.seed, run.recordings, float(fit.curve.values[i]), fit.curve.sources[i]]
        for fit in fits if fit.axis == "recordings" for i, run in enumerate(fit.curve.runs)
    ]  # fmt: skip
    return Figure(
        "points",
        "Every point",
        "Each value that was fitted, with the run and the folder that it was read from.",
        "Values of one task and mode are comparable across runs; losses only within an objective.",
        (*_CURVE[:5], "run", "seed", "recordings", "value", "folder"),
        rows,
    )


def _runs(runs: Sequence[StudyRun]) -> Figure:
    axes = ("recordings", "windows", "flops", "device_hours")
    rows = [
        [run.name, run.objective, run.backbone, run.rung, run.seed, *(axis_of(run, axis) for axis in axes),
         run.steps, run.devices, run.device_kind, run.val_loss, run.best_val_loss, len(run.warnings), run.unmeasured,
         run.fingerprints["store"], run.fingerprints["selection"], str(run.folder)]
        for run in runs
    ]  # fmt: skip
    return Figure(
        "runs",
        "Runs and what they cost",
        "The runs that the study is made of, with their size, training windows, operations by formula (forward and "
        "backward pass of every training step; spec of the formula: multiply-adds of convolutions and matrix products "
        "count 2, FFTs and the optimiser 0), and measured device-hours.",
        "Device-hours hold compilation, validation and checkpoints, and nothing of attempts that were killed "
        "(`unmeasured` counts them); they compare only runs on the same devices, alone on their machine.",
        ("run", "objective", "backbone", "rung", "seed", *axes, "steps", "devices", "device_kind", "val_loss",
         "best_val_loss", "collapse_warnings", "unmeasured", "store_fingerprint", "selection_fingerprint", "folder"),
        rows,
    )  # fmt: skip
