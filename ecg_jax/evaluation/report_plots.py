"""Pictures of `ecg-jax report` as SVG: classes, modes, calibration, labels, disturbances, regressions.

Text stays text: it is set in whatever sans-serif font the reader's machine has, and laid out with DejaVu Sans, which is
wider than most.
"""

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ecg_jax.evaluation.plots import FEW_POSITIVES

# Okabe and Ito's palette: told apart by colour-blind readers; the marker says the same.
_LOOKS = (
    ("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "s"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#8C6D1F", "<"),
)  # fmt: skip
_COLOURS = [colour for colour, _ in _LOOKS]
_MARKERS = [marker for _, marker in _LOOKS]
_GREY, _LIGHT = "#6E6E6E", "#E4E4E4"
#: Most models that one picture shows legibly.
MOST_MODELS = len(_LOOKS)
#: Colour and marker by name.
Looks = Mapping[str, tuple[str, str]]


def _figure(width_inch: float, height_inch: float):
    """A figure that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _svg(figure) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ecg_jax",
        "font.sans-serif": ["DejaVu Sans"],
    }
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    # Comments, metadata, names of groups and digits far below a pixel are half of the file.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue().decode(), flags=re.DOTALL)
    text = re.sub(r"\n\s*", " ", text).replace("> <", "><")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r'="[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), text).encode()


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name, so that a name looks alike in all pictures of a page; up to 64 differ."""
    n = len(_COLOURS)
    return {name: (_COLOURS[i % n], _MARKERS[(i + i // n) % n]) for i, name in enumerate(names)}


def _plain_axes(axes, grid: str = "both") -> None:
    axes.grid(axis=grid, color=_LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _legend(figure, looks, extra=(), columns: int = 3) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.4, label=name)
        for name, (color, marker) in looks.items()
    ]
    handles += [Line2D([], [], **style) for style in extra]
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


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
) -> bytes:
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
        SVG.
    """
    first = next(iter(models.values()))[:, 0]
    last = -np.inf if chance is not None else np.inf
    order = np.argsort(np.where(np.isnan(first), last, first), kind="stable")
    order = order[::-1] if chance is not None else order
    row_inch = 0.2 + 0.1 * len(models)
    figure = _figure(5.4, 1.3 + row_inch * len(order) + 0.18 * np.ceil((len(models) + 1) / 2))
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
        axes.text(0.5, y, "undefined in the test records", fontsize=8, color=_GREY, va="center", ha="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    if reference is not None:
        x = np.where(defined, reference[order], np.nan)
        y = np.stack([rows - 0.42, rows + 0.42, breaks], axis=1).ravel()
        axes.plot(np.repeat(x, 3), y, color=_GREY, linewidth=2, alpha=0.7, zorder=2)
    extra = []
    if reference is not None:
        extra.append({"color": _GREY, "linewidth": 2, "alpha": 0.7, "label": reference_label})
    if chance is not None:
        drawn = [*models.values()] if reference is None else [*models.values(), reference[:, None]]
        values = np.concatenate([values.ravel() for values in drawn])
        values = values[np.isfinite(values)]
        left = np.floor(values.min() * 20) / 20 - 0.01 if values.size else 0.45
        if left < chance:
            axes.axvline(chance, color=_GREY, linewidth=1, linestyle="--", zorder=1)
            extra.append({"color": _GREY, "linewidth": 1, "linestyle": "--", "label": "chance"})
        axes.set_xlim(left, 1.005)
    axes.set_ylim(-len(order) + 0.5, 0.5)
    axes.set_yticks(-np.arange(len(order)), [f"{classes[k]}  (n={n[k]})" for k in order])
    _plain_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    few = [chance is not None and n[k] < FEW_POSITIVES for k in order]
    for text, grey in zip(axes.get_yticklabels(), few, strict=True):
        text.set_color(_GREY if grey else "black")
    note = f"\ngrey names: fewer than {FEW_POSITIVES} positive test records" if any(few) else ""
    axes.set_xlabel(f"{score} with {100 * level:g} % interval{note}", fontsize=9)
    _legend(figure, {name: looks[name] for name in models}, extra, columns=2)
    return _svg(figure)


def mode_panels(
    panels: Sequence[tuple[str, str, dict[str, dict[str, Sequence[float]]]]],
    references: Sequence[dict[str, float]],
    modes: Sequence[str],
    looks: Looks,
) -> bytes:
    """Scores of checkpoints mode by mode: a panel for each task, a line for each model.

    Args:
        panels: (task, score, model -> mode -> (point, low, high)) each.
        references: of each panel, name -> score of a baseline, drawn across the panel.
        modes: in order.
        looks: of the models.

    Returns:
        SVG.
    """
    looks = {name: looks[name] for name in dict.fromkeys(name for _, _, models in panels for name in models)}
    dashes = dict(
        zip(dict.fromkeys(name for lines in references for name in lines), ("--", ":", "-."), strict=False)
    )
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    legend_rows = -(-(len(looks) + len(dashes)) // 2)
    figure = _figure(max(3.9, 2.6 * columns), 2.5 * rows + 0.2 + 0.2 * legend_rows)
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
            axes.axhline(value, color=_GREY, linewidth=1.1, linestyle=dashes[name], zorder=1)
        axes.set_xlim(-0.5, len(modes) - 0.5)
        axes.set_xticks(range(len(modes)), modes)
        axes.set_title(task, loc="left", fontsize=9)
        axes.set_ylabel(score, fontsize=8)
        _plain_axes(axes, "y")
    extra = [
        {"color": _GREY, "linewidth": 1.1, "linestyle": dash, "label": name} for name, dash in dashes.items()
    ]
    _legend(figure, looks, extra, columns=min(2, columns))
    return _svg(figure)


def calibration(
    panels: Sequence[tuple[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]], looks: Looks
) -> bytes:
    """Reliability diagrams with the number of predictions in each bin below.

    Args:
        panels: (title, model -> (mean probability [b], share of positives [b], number [b])) each; NaN for empty bins.
        looks: of the models.

    Returns:
        SVG.
    """
    looks = {name: looks[name] for name in dict.fromkeys(name for _, models in panels for name in models)}
    legend_rows = -(-(len(looks) + 1) // 2)
    figure = _figure(max(3.9, 2.5 * len(panels)), 3.5 + 0.2 * legend_rows)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (title, models) in zip(grid.T, panels, strict=True):
        upper, lower = column
        upper.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--", zorder=1)
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
            _plain_axes(axes)
    grid[0, 0].set_ylabel("share of positives", fontsize=8)
    grid[1, 0].set_ylabel("predictions", fontsize=8)
    _legend(
        figure, looks, [{"color": _GREY, "linewidth": 1, "linestyle": "--", "label": "perfect"}], columns=2
    )
    return _svg(figure)


def label_efficiency(
    models: dict[str, tuple[Sequence[float], Sequence[Sequence[float]], dict[str, float] | None]],
    score: str,
    lower_is_better: bool,
) -> bytes:
    """Score by number of labelled records: every seed a dot, the mean a line, the fit dashed.

    Args:
        models: name -> (sizes [S], scores of every seed at each size, {"C", "a", "L0"} of the fit or None).
        score: what the axis is called.
        lower_is_better: whether the score is an error; otherwise the fit is of 1 less the score.

    Returns:
        SVG.
    """
    looks = looks_of(list(models))
    figure = _figure(5.4, 3.5 + 0.2 * -(-(len(models) + 1) // 2))
    axes = figure.subplots()
    for name, (sizes, scores, fit) in models.items():
        color, marker = looks[name]
        for size, seeds in zip(sizes, scores, strict=True):
            axes.plot(
                [size] * len(seeds), seeds, marker, color=color, markersize=3, alpha=0.4, linestyle="none"
            )
        axes.plot(
            sizes,
            [np.mean(seeds) for seeds in scores],
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.6,
        )
        if fit is not None:
            x = np.geomspace(min(sizes), max(sizes), 60)
            left = fit["C"] * x ** -fit["a"] + fit["L0"]
            axes.plot(x, left if lower_is_better else 1 - left, color=color, linewidth=1.2, linestyle="--")
    axes.set_xscale("log", base=2)
    sizes = sorted({size for of_model, _, _ in models.values() for size in of_model})
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=30 if len(sizes) > 6 else 0)
    axes.minorticks_off()
    axes.set_xlabel("labelled training records", fontsize=9)
    axes.set_ylabel(score, fontsize=9)
    _plain_axes(axes)
    fitted = any(fit is not None for _, _, fit in models.values())
    _legend(figure, looks, [{"color": _GREY, "linestyle": "--", "label": "fit"}] if fitted else [], columns=2)
    return _svg(figure)


def robustness(
    families: dict[str, tuple[str, dict[str, list[tuple[str, float | None, float, float, float]]]]],
    clean: dict[str, Sequence[float]],
    score: str,
) -> bytes:
    """Score under every disturbance: a panel for each family, a line for each model, the clean score across.

    Args:
        families: name -> (unit, model -> [(label, value or None, score, low, high)]).
        clean: model -> (score, low, high) on undisturbed records.
        score: what the axis is called.

    Returns:
        SVG.
    """
    looks = looks_of(list(clean))
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    figure = _figure(max(3.9, 2.6 * columns), 2.4 * rows + 0.3 + 0.2 * -(-(len(looks) + 1) // 2))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(families) :]:
        axes.set_axis_off()
    for i, (axes, (family, (unit, models))) in enumerate(zip(grid.flat, families.items(), strict=False)):
        labels = list(dict.fromkeys(c[0] for conditions in models.values() for c in conditions))
        # Distances along the axis would crowd 50 to 500 Hz at one end: one step for each condition, in order.
        ordered = all(c[1] is not None for conditions in models.values() for c in conditions)
        if ordered:
            value_of = {c[0]: c[1] for conditions in models.values() for c in conditions}
            labels.sort(key=value_of.__getitem__)
        for model, conditions in models.items():
            color, marker = looks[model]
            axes.axhline(clean[model][0], color=color, linewidth=1, linestyle="--", zorder=1)
            x = np.array([labels.index(c[0]) for c in conditions])
            order = np.argsort(x)
            values = np.array([[np.nan if v is None else v for v in c[2:]] for c in conditions], dtype=float)[
                order
            ]
            x = x[order]
            axes.vlines(x, values[:, 1], values[:, 2], color=color, linewidth=1.5)
            axes.plot(x, values[:, 0], marker, color=color, markersize=4.5, linewidth=1.3,
                      linestyle="-" if ordered else "none")  # fmt: skip
        values = [value_of[label] for label in labels] if ordered else []
        ticks = [f"{value:g}" for value in values] if len(set(values)) == len(labels) and unit else labels
        crowded = sum(map(len, ticks)) > 22
        axes.set_xticks(
            range(len(labels)), ticks, rotation=40 if crowded else 0, ha="right" if crowded else "center"
        )
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_title(f"{family} ({unit})" if unit and unit != family else family, loc="left", fontsize=9)
        _plain_axes(axes, "y")
        if i % columns == 0:
            axes.set_ylabel(score, fontsize=8)
        else:
            axes.tick_params(axis="y", labelleft=False)
    _legend(figure, looks, [{"color": _GREY, "linestyle": "--", "label": "clean records"}], columns=2)
    return _svg(figure)


def predicted_against_true(panels: Sequence[tuple[str, np.ndarray, np.ndarray]], model: str) -> bytes:
    """Predicted against true values of a regression, a panel for each target.

    Args:
        panels: (target, true [n], predicted [n]) each, z-scores; NaN where unknown.
        model: whose predictions these are.

    Returns:
        SVG, the points as an image in it.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(3.2, 2.5 * columns), 2.6 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (target, true, predicted) in zip(grid.flat, panels, strict=False):
        known = ~np.isnan(true)
        ends = np.concatenate([true[known], predicted[known]]) if known.any() else np.zeros(1)
        low, high = float(ends.min()) - 0.1, float(ends.max()) + 0.1
        axes.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", zorder=1)
        alpha = float(np.clip(200 / max(known.sum(), 1), 0.08, 0.6))
        axes.plot(true[known], predicted[known], "o", color=_LOOKS[0][0], markersize=2.5, alpha=alpha,
                  markeredgewidth=0, rasterized=True)  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(f"{target} (n={known.sum()})", loc="left", fontsize=9)
        axes.set_xlabel("true (z)", fontsize=8)
        _plain_axes(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{model} (z)", fontsize=8)
    return _svg(figure)
