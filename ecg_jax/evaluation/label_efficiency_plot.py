"""The picture of a label-efficiency study: error over the number of labelled records, on logarithmic axes."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.files import write_atomic

# Okabe and Ito's palette, told apart by colour-blind readers; markers tell the models apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#6E6E6E"

_AXIS = {"macro_auroc": "1 − macro AUROC", "mae": "mean absolute error (z-scores)"}


def error_curves(results: dict[str, Any], path: str | Path) -> None:
    """Draws mean errors with their intervals, the fitted curves, and the constant guess.

    Args:
        results: what label_efficiency.json holds.
        path: picture to write.

    Raises:
        ValueError: another metric than those of a task.
        UserError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if results["metric"] not in _AXIS:
        raise ValueError(f"metric {results['metric']!r} is none of {', '.join(_AXIS)}")
    error = np.array if results["metric"] == "mae" else lambda scores: 1 - np.array(scores)
    figure = Figure(figsize=(7, 5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = np.array(results["sizes"], dtype=np.float64)
    models = {name: model for name, model in results["models"].items() if name != "majority"}
    for i, (name, model) in enumerate(models.items()):
        # Side by side, so that intervals do not hide each other.
        x = sizes * 1.02 ** (i - (len(models) - 1) / 2)
        mean, ends = error(model["mean"]), np.sort([error(model["low"]), error(model["high"])], axis=0)
        colour = _COLOURS[i % len(_COLOURS)]
        bars = [np.maximum(mean - ends[0], 0), np.maximum(ends[1] - mean, 0)]
        axes.errorbar(
            x,
            mean,
            bars,
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle="none",
            capsize=3,
            label=name,
        )
        if fit := model["fit"]:
            grid = np.geomspace(sizes.min(), sizes.max(), 200)
            axes.plot(grid, fit["C"] * grid ** -fit["a"] + fit["L0"], color=colour, linewidth=1.3)
    constant = float(error(results["models"]["majority"]["mean"][0]))
    axes.axhline(constant, color=_GREY, linestyle=":", linewidth=1.2, label="majority")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in results["sizes"]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("labelled training records")
    axes.set_ylabel(_AXIS[results["metric"]])
    level = 100 * results["bootstrap"]["level"]
    axes.set_title(
        f"{results['task']}: {results['n_test']} test records, bars {level:g} % over "
        f"{results['bootstrap']['unit']}s and subsets",
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=Path(path).suffix[1:])
    write_atomic(Path(path), buffer.getvalue())
