"""The curves of a scaling study with their bands, and what its other pictures share with them."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ecg_jax.evaluation.drawing import add_legend, new_figure, plain_axes
from ecg_jax.evaluation.plots import GREY
from ecg_jax.studies.figure_folder import Figure
from ecg_jax.studies.scaling_fits import PUBLISHED_IN, WITHOUT, Fitted, published
from ecg_jax.studies.scaling_points import AXES, BEST_LOSS, ERROR, LOSS, MEAN, Family
from ecg_jax.studies.scaling_words import in_short, limits, one_by_one, shown

_QUANTITIES = {LOSS: "validation loss", BEST_LOSS: "lowest validation loss"}
ERRORS = {"macro_auroc": "1 - macro AUROC", "mae": "mean absolute error (SD)"}
_COLUMNS = 3


def short_label(family: Family) -> str:
    """A family's label without its objective, which panels are named by."""
    return family.label.removeprefix(f"{family.objective} ")


def quantity_of(fit: Fitted) -> str:
    """What the values are, for an axis."""
    return ERRORS[fit.curve.metric] if fit.curve.quantity == ERROR else _QUANTITIES[fit.curve.quantity]


def task_of(fit: Fitted) -> str:
    """Of which task the values are, for a title; "" of losses."""
    curve = fit.curve
    if curve.quantity != ERROR:
        return ""
    task = f"mean of {len(curve.tasks)} tasks" if curve.task == MEAN else curve.task
    return f"{task}, {curve.mode}"


def file_name(*parts: str) -> str:
    """Words as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", "_".join(filter(None, parts)).lower()).strip("_")


def panels(n: int, width: float = 4.4, height: float = 3.9):
    columns = min(n, _COLUMNS)
    rows = -(-n // columns)
    figure = new_figure(max(width * columns, 6.4), height * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[n:]:
        unused.set_axis_off()
    return figure, grid[:n]


def count(value: float) -> str:
    """18 k, 11 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def log_axes(axes, sizes: Sequence[float] = ()) -> None:
    """Logarithmic axes whose ticks can be read, also over less than a decade; ticks of x at `sizes`, if any."""
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.set_yscale("log")
    for each, limits_of in ((axes.xaxis, axes.get_xlim), (axes.yaxis, axes.get_ylim)):
        each.set_minor_locator(ticker.NullLocator())
        low, high = limits_of()
        if high / low < 12:
            each.set_major_locator(ticker.MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
            each.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
            each.set_view_interval(low, high, ignore=True)
        elif high / low < 100:
            each.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            each.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
    if len(sizes):
        ticks = [size for size, following in pairwise([*sizes, np.inf]) if following > 1.25 * size]
        axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))


def curves_figure(fits: Sequence[Fitted], looks) -> Figure | None:
    """The curves of one kind over one axis, a panel for each objective; None without runs of two sizes.

    Args:
        fits: of one kind, see `scaling_fits.by_kind`.
        looks: of `drawing.looks_of` for the short labels of all families.
    """
    fits = [fit for fit in fits if fit.x is not None]
    if all(fit.curve.n_rungs < 2 for fit in fits):
        return None
    objectives = list(dict.fromkeys(fit.curve.family.objective for fit in fits))
    figure, grid = panels(len(objectives))
    rows: list[list] = []
    for axes, objective in zip(grid, objectives, strict=True):
        own = [fit for fit in fits if fit.curve.family.objective == objective]
        for fit in own:
            _draw(axes, fit, looks[short_label(fit.curve.family)], rows)
        axes.set_title(objective, fontsize=10, loc="left", fontweight="bold")
        axes.set_ylabel(quantity_of(own[0]), fontsize=9)
        axes.set_xlabel(AXES[own[0].axis], fontsize=9)
        places = np.unique(np.concatenate([fit.x for fit in own]))
        log_axes(axes, places if own[0].axis == "recordings" else ())
        plain_axes(axes)
        lines = [_in_panel(fit) for fit in own]
        for i, (fit, text) in enumerate(zip(reversed(own), reversed(lines), strict=True)):
            color = looks[short_label(fit.curve.family)][0]
            axes.annotate(
                text, (0, 0), (4, 4 + 10 * i), xycoords="axes fraction", textcoords="offset points",
                fontsize=7, color=color,
            )  # fmt: skip
        # Room below the points for those lines.
        low, high = axes.get_ylim()
        axes.set_ylim(low * (low / high) ** (0.06 + 0.06 * len(own)), high)
    first = fits[0]
    if first.curve.quantity == ERROR:  # errors compare between objectives, losses do not
        ends = np.array([axes.get_ylim() for axes in grid])
        top = ends[:, 1].max()
        for axes in grid:
            axes.set_ylim(ends[:, 0].min(), min(top, 1.0) if first.curve.metric == "macro_auroc" else top)
    used = {short_label(fit.curve.family): looks[short_label(fit.curve.family)] for fit in fits}
    extra = [
        {"color": GREY, "linestyle": "-", "label": "fitted, with 95 % band"},
        {"color": GREY, "linestyle": "--", "label": "beyond the largest size"},
    ]
    if any(_held(fit) for fit in fits):
        extra.append(
            {"color": GREY, "marker": "o", "markerfacecolor": "white", "linestyle": ":",
             "label": "largest size, predicted from the others"}
        )  # fmt: skip
    add_legend(figure, used, extra)
    task = task_of(first)
    title = f"{quantity_of(first)[0].upper()}{quantity_of(first)[1:]} over {AXES[first.axis]}"
    title += f": {task}" if task else ""
    quantity = "error" if first.curve.quantity == ERROR else first.curve.quantity
    curve = first.curve
    return Figure(
        file_name(quantity, curve.mode, curve.task, curve.metric, first.axis),
        title,
        _shows(fits),
        limits(fits),
        ("what", "curve", first.axis, "value", "low", "high", "seed", "form", "folder"),
        rows,
        figure,
    )


def _in_panel(fit: Fitted) -> str:
    name = short_label(fit.curve.family)
    if fit.drawn is None:
        return f"{name}: no curve is determined"
    found = fit.forms[fit.drawn]
    text = f"{name}: b = {shown(found.b)}"
    return text if fit.drawn == WITHOUT else f"{text}, c = {found.law.c:.3g}"


def _held(fit: Fitted):
    """The prediction of the largest size by the form that is drawn, if there is one."""
    if fit.drawn is None or fit.drawn not in fit.held_out:
        return None
    held = fit.held_out[fit.drawn]
    return held if held.predicted is not None else None


def _draw(axes, fit: Fitted, look, rows: list[list]) -> None:
    color, marker = look
    curve, label = fit.curve, fit.curve.family.label
    spread = None
    if curve.resampled is not None:
        spread = np.nanquantile(curve.resampled, (0.025, 0.975), axis=1)
        # A resample may lie on one side of the value; bars have no negative length.
        bars = np.maximum([curve.values - spread[0], spread[1] - curve.values], 0)
        axes.errorbar(fit.x, curve.values, yerr=bars, fmt="none", ecolor=color, elinewidth=0.7, alpha=0.4)
    axes.plot(fit.x, curve.values, linestyle="", marker=marker, markersize=4.5, color=color, alpha=0.9)
    for i, run in enumerate(curve.runs):
        ends = (None, None) if spread is None else (float(spread[0, i]), float(spread[1, i]))
        rows.append(
            ["run", label, float(fit.x[i]), float(curve.values[i]), *ends, run.seed, "", curve.sources[i]]
        )
    if fit.drawn is None:
        return
    found = fit.forms[fit.drawn]
    inside = found.sizes <= fit.at.max() * 1.0001
    for part, style, alpha in ((inside, "-", 0.18), (_after(inside), "--", 0.07)):
        axes.plot(found.sizes[part], found.curve[part], color=color, linestyle=style, linewidth=1.3)
        if np.isfinite(found.low).all():
            axes.fill_between(
                found.sizes[part], found.low[part], found.high[part], color=color, alpha=alpha, linewidth=0
            )
    for x, y, low, high, within in zip(found.sizes, found.curve, found.low, found.high, inside, strict=True):
        what = "curve" if within else "curve beyond the largest size"
        rows.append([what, label, float(x), float(y), float(low), float(high), None, fit.drawn, ""])
    if held := _held(fit):
        x = held.size * 1.07  # beside the runs that it is compared with
        bars = np.array(
            [[held.predicted.point - held.predicted.low], [held.predicted.high - held.predicted.point]]
        )
        axes.errorbar(
            x, held.predicted.point, yerr=np.maximum(bars, 0), color=color, marker=marker, markersize=5,
            markerfacecolor="white", elinewidth=1.0, capsize=2.5, zorder=3,
        )  # fmt: skip
        sizes = np.geomspace(fit.at.min(), held.size, 40)
        axes.plot(sizes, held.law.predict(sizes), color=color, linestyle=":", linewidth=0.9)
        rows.append(
            ["largest size predicted from the others", label, held.size, *map(float, held.predicted), None,
             fit.drawn, ""]
        )  # fmt: skip


def _after(inside: np.ndarray) -> np.ndarray:
    """What is outside, with the last one inside, so that the lines meet."""
    outside = ~inside
    outside[max(int(inside.sum()) - 1, 0)] = True
    return outside


def _shows(fits: Sequence[Fitted]) -> str:
    """What the figure shows, with its numbers."""
    first = fits[0]
    n = sum(len(fit.curve.runs) for fit in fits)
    seeds = {fit.curve.family.label: len({run.seed for run in fit.curve.runs}) for fit in fits}
    counts = sorted(set(seeds.values()))
    how_many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = (
        f"Each marker is one pretraining run ({n} runs, {how_many} seed{'s' * (counts[-1] > 1)} a curve), both axes "
        f"are logarithmic, and each line is a fitted {first.described}"
    )
    if first.described != WITHOUT:
        text += " (without offset where the points do not determine three parameters)"
    text += ", dashed beyond the largest size; a line is missing where the points determine no curve."
    if over := _over(fits):
        text += f" Shaded is the 95 % interval of the curve over {over}."
    if first.curve.task == MEAN:
        text += f" The error is the mean over {', '.join(first.curve.tasks)}."
    if first.curve.quantity == ERROR:
        text += " Thin bars are the 95 % intervals of single runs over other patients."
    sentences = [one_by_one(fit) for fit in fits] if len(fits) <= 4 else in_short(fits)
    if first.curve.quantity == LOSS and any(published(fit) for fit in fits):
        known = {fit.curve.family.objective: published(fit) for fit in fits if published(fit)}
        stated = ", ".join(f"{value} for {name}" for name, value in known.items())
        sentences.append(
            f"For reference, not ours: the paper ({PUBLISHED_IN}) reports exponents of the loss of {stated}"
        )
    return " ".join([text, *(f"{sentence}." for sentence in sentences)])


def _over(fits: Sequence[Fitted]) -> str:
    parts = {part for fit in fits if fit.drawn for part in fit.forms[fit.drawn].over}
    words = [
        name for part, name in (("runs", "runs (seeds)"), ("recordings", "test patients")) if part in parts
    ]
    return " and ".join(words)
