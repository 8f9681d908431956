"""The picture of a robustness suite: one panel for each family of conditions, the clean score across all of them."""

import io
from pathlib import Path

import numpy as np

from ecg_jax.files import write_atomic

# Okabe and Ito's palette, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREY, _LIGHT = "#0072B2", "#D55E00", "#6E6E6E", "#E4E4E4"

#: Family -> (title of its panel, label of its horizontal axis).
PANELS = {
    "leads": ("Leads of the device", "leads (derivable ones are derived)"),
    "swapped_leads": ("Swapped cables", "cables"),
    "baseline_wander": ("Baseline wander", "SNR in dB"),
    "powerline_50hz": ("Powerline, 50 Hz", "SNR in dB"),
    "powerline_60hz": ("Powerline, 60 Hz", "SNR in dB"),
    "muscle": ("Muscle noise", "SNR in dB"),
    "sampling_rate": ("Rate of the device", "samples per second"),
    "duration": ("Length of the recording", "first seconds kept"),
}
METRICS = {"macro_auroc": "macro AUROC", "mae": "mean absolute error (z-scores)"}


def robustness_curves(results: dict, path: str | Path) -> None:
    """Draws the scores of all conditions with their intervals, easiest condition on the left.

    The dashed line and its band are the clean score and its interval. Conditions stand at equal distances.
    Orange diamonds: the paired difference to the clean score excludes 0. Hollow markers: recordings shorter than
    the window, filled with zeros.

    Args:
        results: what robustness.json holds; null is drawn as a gap.
        path: picture to write (.png, .svg, .pdf).

    Raises:
        ValueError: no family, or an unknown one or metric.
        UserError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = results["families"]
    unknown = [each["family"] for each in families if each["family"] not in PANELS]
    if not families or unknown or results["metric"] not in METRICS:
        raise ValueError(f"nothing to draw, or unknown: families {unknown}, metric {results['metric']!r}")
    columns = min(4, len(families))
    rows = -(-len(families) // columns)
    width, head, foot = 0.6 + 2.9 * columns, 0.5, 0.35
    height = head + foot + 2.7 * rows
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    clean = _numbers(results["clean"])
    scores = [np.stack([_numbers(entry) for entry in family["conditions"]]) for family in families]
    bottom, top = _limits(np.concatenate([clean[None], *scores]), results["metric"])
    for axes in grid.ravel()[len(families) :]:
        axes.set_visible(False)
    for axes, family, values in zip(grid.ravel(), families, scores, strict=False):
        _draw_panel(axes, family, values, clean)
        axes.set_ylim(bottom, top)
        if results["metric"] == "macro_auroc" and bottom < 0.5:
            axes.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
    for axes in grid[:, 0]:
        axes.set_ylabel(METRICS[results["metric"]])

    name, boot = results["probe"]["model"], results["bootstrap"]
    title = f"{results['task']}, {name}: {results['n_records']} test records"
    figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=12, va="top", weight="bold")
    entries = [entry for family in families for entry in family["conditions"]]
    note = f"Bars: {100 * boot['level']:g} % intervals, resampled by {boot['unit']}. Dashed, band: clean recordings."
    if any(_differs(entry) for entry in entries):
        note += " Orange: paired difference to clean excludes 0."
    if any(entry["padded"] for entry in entries):
        note += " Hollow: shorter than the window, filled with zeros."
    if results["metric"] == "macro_auroc" and bottom < 0.5:
        note += " Dotted: chance."
    figure.text(0.1 / width, 0.1 / height, note, fontsize=8.5, color=_GREY, va="bottom", wrap=True)
    figure.tight_layout(rect=(0, foot / height, 1, 1 - head / height), w_pad=1.0, h_pad=1.4)
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=130)
    write_atomic(path, buffer.getvalue())


def _numbers(entry: dict) -> np.ndarray:
    """float64 [3]: point, low, high."""
    return np.array(
        [np.nan if entry[name] is None else entry[name] for name in ("point", "low", "high")], float
    )


def _differs(entry: dict) -> bool:
    """Whether the interval of the paired difference to the clean records excludes 0."""
    low, high = entry["difference"]["low"], entry["difference"]["high"]
    return low is not None and (low > 0 or high < 0)


def _limits(values: np.ndarray, metric: str) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.06 * (high - low) + 0.005
    return low - margin, min(high + margin, 1.005) if metric == "macro_auroc" else high + margin


def _draw_panel(axes, family: dict, values: np.ndarray, clean: np.ndarray) -> None:
    """One family; `values` float64 [n, 3]."""
    entries = family["conditions"]
    title, xlabel = PANELS[family["family"]]
    x = np.arange(len(entries))
    axes.axhspan(clean[1], clean[2], color=_GREY, alpha=0.15, linewidth=0, zorder=0)
    axes.axhline(clean[0], color=_GREY, linewidth=1.2, linestyle="--", zorder=1)
    if family["unit"] is not None:
        axes.plot(x, values[:, 0], color=_BLUE, linewidth=1.0, alpha=0.6, zorder=2)
    for position, entry, (value, low, high) in zip(x, entries, values, strict=True):
        color, marker = (_ORANGE, "D") if _differs(entry) else (_BLUE, "o")
        face = "white" if entry["padded"] else color
        axes.vlines(position, low, high, color=color, linewidth=1.8, zorder=3)
        axes.plot(
            position, value, marker, markersize=5.5, markerfacecolor=face, markeredgecolor=color, zorder=4
        )
    labels = [entry["label"] if entry["value"] is None else f"{entry['value']:g}" for entry in entries]
    axes.set_xticks(x, labels, fontsize=8 if family["unit"] is None else 9)
    axes.set_xlim(-0.5, len(entries) - 0.5)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color=_LIGHT, linewidth=0.6)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(labelleft=True)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
