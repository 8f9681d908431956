"""The picture of label-efficiency studies: error over the number of labelled records, on logarithmic axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.evaluation.drawing import Looks, add_legend, looks_of, new_figure, plain_axes, save
from ecg_jax.evaluation.plots import GREY

#: The constant guess, drawn as a line across.
MAJORITY = "majority"
_AXIS = {"macro_auroc": "1 − macro AUROC", "mae": "mean absolute error (z-scores)"}
# The logarithm of no error at all cannot be drawn.
_LEAST = 1e-6


def error_curves(results: dict[str, Any], path: str | Path) -> None:
    """Draws the models of one study.

    Args:
        results: what label_efficiency.json holds.
        path: picture to write (.png, .svg, .pdf).

    Raises:
        ValueError: another metric than those of a task.
        UserError: the picture cannot be written.
    """
    names = {name: name for name in results["models"]}
    figure = error_figure([(results, names)], looks_of([name for name in names if name != MAJORITY]))
    level, unit = 100 * results["bootstrap"]["level"], results["bootstrap"]["unit"]
    over = f"by {unit}" + (", and draws of subsets" if has_draws(results) else "")
    title = f"{results['task']}: {results['n_test']} test records"
    figure.suptitle(f"{title}\nbars: {level:g} % intervals, resampled {over}", fontsize=10)
    save(figure, path)


def has_draws(results: dict[str, Any]) -> bool:
    """Whether scores are of several draws of the subsets, over which intervals are then taken too."""
    return any(len(seeds) > 1 for model in results["models"].values() for seeds in model["scores"])


def error_figure(studies: Sequence[tuple[dict[str, Any], Mapping[str, str]]], looks: Looks):
    """Mean errors with their intervals, the fitted curves, and the constant guess, of studies of one task.

    Args:
        studies: (what label_efficiency.json holds, model in it -> its name in the picture) each.
        looks: of the names; models without are left out, and the constant guess needs none.

    Returns:
        A figure.

    Raises:
        ValueError: another metric than those of a task.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    metric = studies[0][0]["metric"]
    if metric not in _AXIS:
        raise ValueError(f"metric {metric!r} is none of {', '.join(_AXIS)}")

    def error(scores) -> np.ndarray:
        scores = np.array(scores, dtype=np.float64)
        return np.maximum(scores if metric == "mae" else 1 - scores, _LEAST)

    drawn = [
        (looks[names[name]], study["sizes"], model)
        for study, names in studies
        for name, model in study["models"].items()
        if name != MAJORITY and names[name] in looks
    ]
    figure = new_figure(5.8, 4.2 + 0.2 * -(-(len(drawn) + 2) // 2))
    axes = figure.subplots()
    for i, ((colour, marker), sizes, model) in enumerate(drawn):
        # Side by side, so that intervals do not hide each other.
        x = np.array(sizes, dtype=np.float64) * 1.02 ** (i - (len(drawn) - 1) / 2)
        mean, ends = error(model["mean"]), np.sort([error(model["low"]), error(model["high"])], axis=0)
        bars = [np.maximum(mean - ends[0], 0), np.maximum(ends[1] - mean, 0)]
        axes.errorbar(x, mean, bars, color=colour, marker=marker, markersize=5, linestyle="none", capsize=3)
        if fit := model["fit"]:
            grid = np.geomspace(min(sizes), max(sizes), 200)
            axes.plot(grid, fit["C"] * grid ** -fit["a"] + fit["L0"], color=colour, linewidth=1.3)
    guesses = [study["models"][MAJORITY] for study, _ in studies if MAJORITY in study["models"]]
    extra = []
    if guesses:
        axes.axhline(float(error(guesses[0]["mean"][0])), color=GREY, linestyle=":", linewidth=1.2)
        extra.append({"color": GREY, "linestyle": ":", "linewidth": 1.2, "label": "majority guess"})
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Of a few draws Student's t makes bars that would squeeze everything else: the axis is of the means.
    middles = np.concatenate([error(model["mean"]) for _, _, model in drawn])
    if np.isfinite(middles).any():
        axes.set_ylim(0.6 * np.nanmin(middles), 1.6 * np.nanmax(middles))
    sizes = sorted({size for study, _ in studies for size in study["sizes"]})
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=30 if len(sizes) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("labelled training records (validation records not counted)", fontsize=9)
    axes.set_ylabel(_AXIS[metric], fontsize=9)
    plain_axes(axes)
    shown = {name: looks[name] for _, names in studies for name in names.values() if name in looks}
    add_legend(figure, shown, extra, columns=2)
    return figure
