"""Pictures of a whole scaling study: validation losses over training, exponents side by side, loss against error."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation.drawing import add_legend, looks_of, new_figure, plain_axes
from ecg_jax.evaluation.plots import GREY
from ecg_jax.studies.figure_folder import Figure
from ecg_jax.studies.power_law import rungs_of
from ecg_jax.studies.scaling_correlations import PAIRS, Correlated
from ecg_jax.studies.scaling_figures import ERRORS, count, file_name, log_axes, panels, quantity_of, task_of
from ecg_jax.studies.scaling_fits import PUBLISHED_IN, Fitted, by_kind, published
from ecg_jax.studies.scaling_points import BEST_LOSS, MEAN, Family, populations
from ecg_jax.studies.scaling_words import limits, sentences, shown

_COLUMNS = 3


def training_figure(families: Sequence[Family]) -> Figure | None:
    """Validation loss over training, a panel for each family, a colour for each size; None without any loss."""
    import matplotlib
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    logged = [
        family
        for family in families
        if any(entry.get("val_loss") is not None for run in family.runs for entry in run.log)
    ]
    if not logged:
        return None
    figure, grid = panels(len(logged), width=3.9, height=3.0)
    runs = [run for family in logged for run in family.runs]
    rung = dict(zip((run.name for run in runs), rungs_of([run.recordings for run in runs]), strict=True))
    sizes = [
        np.mean([run.recordings for run in runs if rung[run.name] == i])
        for i in range(max(rung.values()) + 1)
    ]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(sizes)))
    rows = []
    for axes, family in zip(grid, logged, strict=True):
        for run in family.runs:
            batch = run.config["batch_size"]
            points = [(e["step"] * batch, e["val_loss"]) for e in run.log if e.get("val_loss") is not None]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=colors[rung[run.name]],
                linewidth=1.1,
                marker="o",
                markersize=2.5,
            )
            rows += [
                [family.label, run.name, run.seed, run.recordings, x, y, str(run.folder)] for x, y in points
            ]
        axes.set_title(family.label, fontsize=9, loc="left", fontweight="bold")
        axes.set_xlabel("training windows", fontsize=8)
        axes.set_ylabel("validation loss", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3) if len(sizes) < 5 else (1,)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))
        plain_axes(axes)
    handles = [
        Line2D([], [], color=color, linewidth=1.6, label=f"{count(size)} recordings")
        for color, size in zip(colors, sizes, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    several = [run for run in runs if sum(entry.get("val_loss") is not None for entry in run.log) > 1]
    falling = sum(run.val_loss is not None and run.val_loss <= run.best_val_loss for run in several)
    told = (
        f"Runs that measured it more than once: {len(several)}, and in {falling} of them the last value is the "
        "lowest, so that it might have gone on falling."
        if several
        else "It was measured once a run, at the end, which says nothing of whether it would have gone on falling."
    )
    return Figure(
        "training",
        "Validation loss over training",
        f"Every line is one of {len(runs)} pretraining runs, coloured by the number of its recordings: its validation "
        f"loss each time it was measured, over the training windows seen so far. {told}",
        "Panels have axes of their own, and losses of different objectives are not comparable. A curve that still "
        "falls at its end says that the fitted losses are those of this length of training, not of the objective. "
        + " ".join(sentences(populations(runs))),
        ("curve", "run", "seed", "recordings", "windows", "val_loss", "folder"),
        rows,
        figure,
    )


def exponents_figure(fits: Sequence[Fitted]) -> Figure:
    """Exponents over recordings with intervals, a row for each family, a panel for each kind of value.

    Errors of single tasks have none where there is a mean over tasks of their mode and metric; they are in the table.
    """
    kinds = by_kind([fit for fit in fits if fit.axis == "recordings" and fit.curve.quantity != BEST_LOSS])
    kinds = {key: own for key, own in kinds.items() if any(fit.curve.n_rungs > 1 for fit in own)}
    means = {key[2:4] for key in kinds if key[4] == MEAN}
    drawn = [own for key, own in kinds.items() if key[4] in ("", MEAN) or key[2:4] not in means]
    fits = [fit for own in drawn for fit in own]
    labels = list(dict.fromkeys(fit.curve.family.label for fit in fits))
    columns = min(len(drawn), _COLUMNS)
    lines = -(-len(drawn) // columns)
    figure = new_figure(3.0 + 2.9 * columns, lines * (0.34 * len(labels) + 0.9) + 0.8)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for unused in grid.ravel()[len(drawn) :]:
        unused.set_axis_off()
    rows = []
    for axes, own in zip(grid.ravel(), drawn, strict=False):
        curve = own[0].curve
        kind = [curve.quantity, curve.task, curve.mode, curve.metric]
        for fit in own:
            y = labels.index(fit.curve.family.label)
            reference = published(fit)
            if reference and fit.drawn:
                axes.plot(reference, y, linestyle="", marker="*", markersize=9, color="#E69F00", zorder=2)
            if fit.drawn is None:
                axes.annotate(
                    "no curve is determined", (0, y), (5, 0), textcoords="offset points", fontsize=7, color=GREY,
                    va="center",
                )  # fmt: skip
                rows.append([fit.curve.family.label, *kind, "", None, None, None, reference])
                continue
            b = fit.forms[fit.drawn].b
            full = fit.drawn == fit.described
            axes.plot([b.low, b.high], [y, y], color="#0072B2", linewidth=1.3)
            axes.plot(
                b.point, y, linestyle="", marker="o", markersize=5, color="#0072B2",
                markerfacecolor="#0072B2" if full else "white", zorder=3,
            )  # fmt: skip
            rows.append([fit.curve.family.label, *kind, fit.drawn, *map(float, b), reference])
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_xlabel("exponent b", fontsize=9)
        axes.set_title(_heading(own[0]), fontsize=9, loc="left")
        plain_axes(axes, "x")
    for first in grid[:, 0]:
        first.set_yticks(range(len(labels)), labels)
        first.set_ylim(len(labels) - 0.4, -0.6)
    style = {"color": "#0072B2", "marker": "o", "linewidth": 1.3}
    extra = [
        style | {"label": "fitted, 95 % interval"},
        style | {"markerfacecolor": "white", "label": "without offset: three parameters are not determined"},
        {
            "color": "#E69F00",
            "marker": "*",
            "markersize": 9,
            "linestyle": "",
            "label": f"paper, {PUBLISHED_IN}",
        },
    ]
    add_legend(figure, {}, extra, columns=1 if columns < 2 else 3)
    determined = sum(fit.drawn is not None for fit in fits)
    return Figure(
        "exponents_over_recordings",
        "Exponents over recordings",
        f"The exponent b of each curve with its 95 % interval: losses fall as a N^-b, errors as a N^-b + c. "
        f"{determined} of {len(fits)} curves are determined by their points. An interval that holds 0 does not "
        "exclude that the quantity stays the same at every size."
        + (" Errors of single tasks are in the table of fits." if means else ""),
        "Exponents with and without offset are not the same quantity: an offset takes up what does not fall, and makes "
        "the exponent of the rest larger. Stars are the paper's, from other recordings, sizes of 18 thousand to 11 "
        "million and longer training; they are printed for reference and no result of these runs. "
        + limits(fits),
        ("curve", "quantity", "task", "mode", "metric", "form", "b", "low", "high", "published"),
        rows,
        figure,
    )


def _heading(fit: Fitted) -> str:
    task = task_of(fit)
    return f"{quantity_of(fit)}\n{task}" if task else quantity_of(fit)


def correlation_figure(found: Correlated) -> Figure:
    """Loss against error: as they are, and after what the size explains is taken off."""
    objectives = list(dict.fromkeys(label.split(" ")[0] for label in found.labels))
    looks = looks_of(objectives)
    figure = new_figure(13.2, 4.6)
    grid = figure.subplots(1, 3)
    residual_name = "error over its curve"
    columns = (
        (found.losses, found.errors, "validation loss", ERRORS[found.metric]),
        (found.losses, np.exp(found.residuals), "validation loss", residual_name),
        (
            np.exp(found.loss_residuals),
            np.exp(found.residuals),
            "validation loss over its curve",
            residual_name,
        ),
    )
    for axes, pair, (x, y, x_name, y_name) in zip(grid, PAIRS, columns, strict=True):
        for objective, (color, marker) in looks.items():
            own = np.array([label.split(" ")[0] == objective for label in found.labels])
            axes.plot(x[own], y[own], linestyle="", marker=marker, markersize=5, color=color, alpha=0.85)
        log_axes(axes)
        axes.set_xlabel(x_name, fontsize=9)
        axes.set_ylabel(y_name, fontsize=9)
        axes.set_title(_best_line(found, pair), fontsize=8, loc="left")
        if not np.isfinite(x * y).any():
            axes.set_title(f"{pair}: no curve is determined", fontsize=8, loc="left")
        plain_axes(axes)
    add_legend(figure, looks, columns=6)
    for handle in figure.legends[0].legend_handles:
        handle.set_linestyle("")
    rows = [
        [label, name, int(n), *map(float, numbers)]
        for label, name, n, *numbers in zip(
            found.labels, found.names, found.recordings, found.losses, found.errors, found.loss_residuals,
            found.residuals, strict=True,
        )
    ]  # fmt: skip
    lines = [_best_line(found, pair).split("\n") for pair in PAIRS if found.against[pair]]
    said = ". ".join(f"{line[0].capitalize()}: {'; '.join(line[1:])}" for line in lines)
    task = f"mean of {len(found.tasks)} tasks" if found.task == MEAN else found.task
    return Figure(
        file_name("correlation", found.mode, found.task, found.metric),
        f"Pretraining loss and downstream error: {task}, {found.mode}",
        f"Each marker is one of {len(found.names)} runs. Left: its error over its last validation loss; middle: what "
        "is left of the error when the curve fitted over the number of recordings is divided out; right: the same of "
        "both. The axes are logarithmic, and correlations are of logarithms. " + said + ".",
        "Losses of different objectives have different scales, so that a trend across colours means nothing; the "
        "correlations named are within curves (objective and backbone), of the means over seeds at each size. Loss and "
        "error both fall with the number of recordings, which alone correlates them. In the middle there is nothing to "
        "be found, and so no interval: the loss is mostly a trend over the recordings, and the curve of the error took "
        "that trend off, so that the correlation is near 0 whatever the truth. The right panel looks past the size, at "
        "what few sizes leave: its correlation takes a degree of freedom off for every parameter of the curve."
        + (
            f" No curve is determined for {', '.join(found.without_fit)}: left out there."
            if found.without_fit
            else ""
        )
        + "".join(f" {text}" for text in sentences(found.remarks)),
        ("curve", "run", "recordings", "val_loss", "error", "log_loss_residual", "log_error_residual"),
        rows,
        figure,
    )


def _best_line(found: Correlated, pair: str) -> str:
    """The correlation within curves, or of the only one."""
    named = {each.name: each for each in found.against[pair]}
    if not named:
        return pair
    each = named["within curves"] if "within curves" in named else named["all runs"]
    if each.pearson is None or each.spearman is None:
        return f"{pair}\n{each.remark}"
    where = "within curves" if each.name == "within curves" else "one curve"
    if pair == PAIRS[1]:
        numbers = f"{each.pearson.point:.2g}, near 0 by construction: no interval"
    else:
        numbers = f"{shown(each.pearson)}, of ranks {shown(each.spearman)}"
    return f"{pair}\nr = {numbers}\n{where}, {each.n_units} cells"
