"""Pictures of `ecg-jax report`: classes, modes, calibration, regressions."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation.drawing import Looks, add_legend, new_figure, plain_axes
from ecg_jax.evaluation.plots import FEW_POSITIVES, GREY, LOOKS


def class_forest(
    classes: Sequence[str],
    n: Sequence[int],
    models: dict[str, np.ndarray],
    looks: Looks,
    reference: np.ndarray | None,
    score: str,
    chance: float | None,
    level: float,
    reference_label: str = "random initialisation",
):
    """Score of every class with its interval, models side by side, best first by the first model.

    Args:
        classes: K names.
        n: K numbers written beside them: positive test records, or known values.
        models: name -> float [K, 3] (score, low, high); NaN where undefined.
        looks: of the models.
        reference: [K], drawn as grey bars; None for none.
        score: what the axis is called.
        chance: a dashed line, if it is near; None for errors, of which lower is better.
        level: of the intervals.
        reference_label: what the grey bars are called.

    Returns:
        A figure.
    """
    first = next(iter(models.values()))[:, 0]
    last = -np.inf if chance is not None else np.inf
    order = np.argsort(np.where(np.isnan(first), last, first), kind="stable")
    order = order[::-1] if chance is not None else order
    row_inch = 0.2 + 0.1 * len(models)
    figure = new_figure(5.4, 1.3 + row_inch * len(order) + 0.18 * np.ceil((len(models) + 1) / 2))
    axes = figure.subplots()
    shifts = (0.72 / len(models)) * ((len(models) - 1) / 2 - np.arange(len(models)))
    rows = -np.arange(len(order), dtype=np.float64)
    for i in range(1, len(order), 2):
        axes.axhspan(-i - 0.5, -i + 0.5, color="#F5F5F5", zorder=0)
    # One path for each model, broken between classes: a tenth of the file that a line for each class makes.
    breaks = np.full(len(order), np.nan)
    for (name, intervals), shift in zip(models.items(), shifts, strict=True):
        color, marker = looks[name]
        value, low, high = intervals[order].T
        style = {"color": color, "clip_on": False, "zorder": 3}
        x, y = (
            np.stack(parts, axis=1).ravel() for parts in ((low, high, breaks), (*[rows + shift] * 2, breaks))
        )
        axes.plot(x, y, linewidth=1.5, solid_capstyle="butt", **style)
        axes.plot(value, rows + shift, marker, markersize=4.5, linestyle="none", **style)
    defined = np.any([~np.isnan(intervals[order, 0]) for intervals in models.values()], axis=0)
    for y in rows[~defined]:
        axes.text(0.5, y, "undefined in the test records", fontsize=8, color=GREY, va="center", ha="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    if reference is not None:
        x = np.where(defined, reference[order], np.nan)
        y = np.stack([rows - 0.42, rows + 0.42, breaks], axis=1).ravel()
        axes.plot(np.repeat(x, 3), y, color=GREY, linewidth=2, alpha=0.7, zorder=2)
    extra = []
    if reference is not None:
        extra.append({"color": GREY, "linewidth": 2, "alpha": 0.7, "label": reference_label})
    if chance is not None:
        drawn = [*models.values()] if reference is None else [*models.values(), reference[:, None]]
        values = np.concatenate([values.ravel() for values in drawn])
        values = values[np.isfinite(values)]
        left = np.floor(values.min() * 20) / 20 - 0.01 if values.size else 0.45
        if left < chance:
            axes.axvline(chance, color=GREY, linewidth=1, linestyle="--", zorder=1)
            extra.append({"color": GREY, "linewidth": 1, "linestyle": "--", "label": "chance"})
        axes.set_xlim(left, 1.005)
    axes.set_ylim(-len(order) + 0.5, 0.5)
    axes.set_yticks(-np.arange(len(order)), [f"{classes[k]}  (n={n[k]})" for k in order])
    plain_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    few = [chance is not None and n[k] < FEW_POSITIVES for k in order]
    for text, grey in zip(axes.get_yticklabels(), few, strict=True):
        text.set_color(GREY if grey else "black")
    note = f"\ngrey names: fewer than {FEW_POSITIVES} positive test records" if any(few) else ""
    axes.set_xlabel(f"{score} with {100 * level:g} % interval{note}", fontsize=9)
    add_legend(figure, {name: looks[name] for name in models}, extra, columns=2)
    return figure


def mode_panels(
    panels: Sequence[tuple[str, str, dict[str, dict[str, Sequence[float]]]]],
    references: Sequence[dict[str, float]],
    modes: Sequence[str],
    looks: Looks,
):
    """Scores of checkpoints mode by mode: a panel for each task, a line for each model.

    Args:
        panels: (task, score, model -> mode -> (point, low, high)) each.
        references: of each panel, name -> score of a baseline, drawn across the panel.
        modes: in order.
        looks: of the models.

    Returns:
        A figure.
    """
    looks = {name: looks[name] for name in dict.fromkeys(name for _, _, models in panels for name in models)}
    dashes = dict(
        zip(dict.fromkeys(name for lines in references for name in lines), ("--", ":", "-."), strict=False)
    )
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    legend_rows = -(-(len(looks) + len(dashes)) // 2)
    figure = new_figure(max(3.9, 2.6 * columns), 2.5 * rows + 0.2 + 0.2 * legend_rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    place = {mode: i for i, mode in enumerate(modes)}
    width = min(0.5, 0.12 * (len(looks) - 1))
    shifts = dict(
        zip(looks, np.linspace(-width / 2, width / 2, len(looks)) if len(looks) > 1 else [0.0], strict=True)
    )
    for axes, (task, score, models), lines in zip(grid.flat, panels, references, strict=False):
        for model, of_mode in models.items():
            color, marker = looks[model]
            shown = [mode for mode in modes if mode in of_mode]
            x = [place[mode] + shifts[model] for mode in shown]
            values = np.array([of_mode[mode] for mode in shown], dtype=float)
            axes.plot(x, values[:, 0], color=color, linewidth=1.4, alpha=0.6, zorder=2)
            for at, (value, low, high) in zip(x, values, strict=True):
                axes.plot([at, at], [low, high], color=color, linewidth=1.6, zorder=3)
                axes.plot([at], [value], marker, color=color, markersize=5.5, zorder=4)
        for name, value in lines.items():
            axes.axhline(value, color=GREY, linewidth=1.1, linestyle=dashes[name], zorder=1)
        axes.set_xlim(-0.5, len(modes) - 0.5)
        axes.set_xticks(range(len(modes)), modes)
        axes.set_title(task, loc="left", fontsize=9)
        axes.set_ylabel(score, fontsize=8)
        plain_axes(axes, "y")
    extra = [
        {"color": GREY, "linewidth": 1.1, "linestyle": dash, "label": name} for name, dash in dashes.items()
    ]
    add_legend(figure, looks, extra, columns=min(2, columns))
    return figure


def calibration(
    panels: Sequence[tuple[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]], looks: Looks
):
    """Reliability diagrams with the number of predictions in each bin below.

    Args:
        panels: (title, model -> (mean probability [b], share of positives [b], number [b])) each; NaN for empty bins.
        looks: of the models.

    Returns:
        A figure.
    """
    looks = {name: looks[name] for name in dict.fromkeys(name for _, models in panels for name in models)}
    legend_rows = -(-(len(looks) + 1) // 2)
    figure = new_figure(max(3.9, 2.5 * len(panels)), 3.5 + 0.2 * legend_rows)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (title, models) in zip(grid.T, panels, strict=True):
        upper, lower = column
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
        for name, (said, seen, count) in models.items():
            color, marker = looks[name]
            filled = count > 0
            upper.plot(
                said[filled],
                seen[filled],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.3,
                clip_on=False,
            )
            edges = np.linspace(0, 1, len(count) + 1)
            lower.stairs(np.maximum(count, 0.5), edges, color=color, linewidth=1.3, baseline=0.5)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.set_title(title, loc="left", fontsize=9)
        lower.set_yscale("log")
        lower.minorticks_off()
        lower.set_xlabel("predicted probability", fontsize=8)
        for axes in column:
            plain_axes(axes)
    grid[0, 0].set_ylabel("share of positives", fontsize=8)
    grid[1, 0].set_ylabel("predictions", fontsize=8)
    add_legend(
        figure, looks, [{"color": GREY, "linewidth": 1, "linestyle": "--", "label": "perfect"}], columns=2
    )
    return figure


def predicted_against_true(panels: Sequence[tuple[str, np.ndarray, np.ndarray]], model: str):
    """Predicted against true values of a regression, a panel for each target.

    Args:
        panels: (target, true [n], predicted [n]) each, z-scores; NaN where unknown.
        model: whose predictions these are.

    Returns:
        A figure, the points as an image in it.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(3.2, 2.5 * columns), 2.6 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (target, true, predicted) in zip(grid.flat, panels, strict=False):
        known = ~np.isnan(true)
        ends = np.concatenate([true[known], predicted[known]]) if known.any() else np.zeros(1)
        low, high = float(ends.min()) - 0.1, float(ends.max()) + 0.1
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=1)
        alpha = float(np.clip(200 / max(known.sum(), 1), 0.08, 0.6))
        axes.plot(true[known], predicted[known], "o", color=LOOKS[0][0], markersize=2.5, alpha=alpha,
                  markeredgewidth=0, rasterized=True)  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(f"{target} (n={known.sum()})", loc="left", fontsize=9)
        axes.set_xlabel("true (z)", fontsize=8)
        plain_axes(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{model} (z)", fontsize=8)
    return figure
