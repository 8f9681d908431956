"""The picture of robustness suites: one panel for each family of conditions, the clean score across all of them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.evaluation.drawing import Looks, add_legend, looks_of, new_figure, plain_axes, save
from ecg_jax.evaluation.plots import GREY

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
_CHANCE = 0.5


def robustness_curves(results: dict, path: str | Path) -> None:
    """Draws the suite of one probe.

    Args:
        results: what robustness.json holds.
        path: picture to write (.png, .svg, .pdf).

    Raises:
        ValueError: no family, or an unknown metric.
        UserError: the picture cannot be written.
    """
    name, boot = results["probe"]["model"], results["bootstrap"]
    figure = robustness_figure({name: results}, looks_of([name]), columns=4, legend=False)
    title = f"{results['task']}, {name}: {results['n_records']} test records"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    note = f"Bars: {100 * boot['level']:g} % intervals, resampled by {boot['unit']}. {explanation([results])}"
    width = int(15 * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(note, width), x=0.01, ha="left", fontsize=8.5, color=GREY)
    save(figure, path, dpi=130)


def explanation(suites: Sequence[dict[str, Any]]) -> str:
    """What marks in a picture of these suites mean."""
    conditions = [entry for suite in suites for family in suite["families"] for entry in family["conditions"]]
    text = "Dashed: clean recordings."
    if not all(_differs(entry) for entry in conditions):
        text += " Hollow: the interval of the paired difference to clean holds 0."
    if any(entry["padded"] for entry in conditions):
        text += " *: shorter than the window, filled with zeros."
    if suites[0]["metric"] == "macro_auroc" and _limits(suites)[0] < _CHANCE:
        text += " Dotted: chance."
    return text


def robustness_figure(
    suites: Mapping[str, dict[str, Any]], looks: Looks, columns: int = 3, legend: bool = True
):
    """Scores of all conditions with their intervals, easiest condition on the left; see `explanation`.

    Conditions stand at equal distances, in the order of the first suite that has them. The band around the clean score
    of a single suite is its interval.

    Args:
        suites: name -> what robustness.json holds, all of one task; null is drawn as a gap.
        looks: of the names.
        columns: of panels, at most.
        legend: whether the names are listed.

    Returns:
        A figure.

    Raises:
        ValueError: no family, or an unknown metric.
    """
    metric = next(iter(suites.values()))["metric"]
    units = {family["family"]: family["unit"] for suite in suites.values() for family in suite["families"]}
    if not units or metric not in METRICS:
        raise ValueError(f"nothing to draw: {len(units)} families, metric {metric!r}")
    columns = min(columns, len(units))
    rows = -(-len(units) // columns)
    below = 0.2 * -(-len(suites) // 2) if legend else 0.0
    figure = new_figure(max(3.9, 2.8 * columns), 2.6 * rows + 0.5 + below)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(units) :]:
        axes.set_axis_off()
    bottom, top = _limits(list(suites.values()))
    for axes, (family, unit) in zip(grid.flat, units.items(), strict=False):
        conditions = {
            name: entry["conditions"]
            for name, suite in suites.items()
            for entry in suite["families"]
            if entry["family"] == family
        }
        _draw_panel(axes, conditions, {name: suites[name]["clean"] for name in conditions}, unit, looks)
        title, xlabel = PANELS[family] if family in PANELS else (family.replace("_", " "), unit or "")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8.5)
        axes.set_ylim(bottom, top)
        if metric == "macro_auroc" and bottom < _CHANCE:
            axes.axhline(_CHANCE, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    for axes in grid[:, 0]:
        axes.set_ylabel(METRICS[metric], fontsize=9)
    if legend:
        add_legend(figure, {name: looks[name] for name in suites}, columns=2)
    return figure


def _numbers(entry: dict) -> np.ndarray:
    """float64 [3]: point, low, high."""
    return np.array(
        [np.nan if entry[name] is None else entry[name] for name in ("point", "low", "high")], float
    )


def _differs(entry: dict) -> bool:
    """Whether the interval of the paired difference to the clean records excludes 0."""
    low, high = entry["difference"]["low"], entry["difference"]["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _limits(suites: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Of the vertical axis, for everything to be seen."""
    entries = [entry for suite in suites for family in suite["families"] for entry in family["conditions"]]
    values = np.concatenate([_numbers(entry) for entry in (*entries, *(suite["clean"] for suite in suites))])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.06 * (high - low) + 0.005
    return low - margin, min(high + margin, 1.005) if suites[0]["metric"] == "macro_auroc" else high + margin


def _draw_panel(
    axes, suites: dict[str, list[dict]], clean: dict[str, dict], unit: str | None, looks: Looks
) -> None:
    """One family: the conditions of each suite, and its score on clean records."""
    ticks = {}
    for entry in (entry for conditions in suites.values() for entry in conditions):
        text = entry["label"] if entry["value"] is None or unit is None else f"{entry['value']:g}"
        ticks[entry["label"]] = f"{text}*" if entry["padded"] else text
    place = {label: i for i, label in enumerate(ticks)}
    shifts = 0.12 * (np.arange(len(suites)) - (len(suites) - 1) / 2)
    for (name, conditions), shift in zip(suites.items(), np.clip(shifts, -0.35, 0.35), strict=True):
        colour, marker = looks[name]
        score, low, high = _numbers(clean[name])
        if len(suites) == 1:
            axes.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0, zorder=0)
        axes.axhline(
            score, color=GREY if len(suites) == 1 else colour, linewidth=1.1, linestyle="--", zorder=1
        )
        x = np.array([place[entry["label"]] for entry in conditions]) + shift
        values = np.stack([_numbers(entry) for entry in conditions])
        if unit:
            axes.plot(x, values[:, 0], color=colour, linewidth=1.0, alpha=0.6, zorder=2)
        axes.vlines(x, values[:, 1], values[:, 2], color=colour, linewidth=1.6, zorder=3)
        style = {"markersize": 5, "markeredgecolor": colour, "linestyle": "none", "zorder": 4}
        for differs, face in ((True, colour), (False, "white")):
            chosen = np.array([_differs(entry) == differs for entry in conditions])
            axes.plot(x[chosen], values[chosen, 0], marker, markerfacecolor=face, **style)
    texts = list(ticks.values())
    crowded = sum(map(len, texts)) > 24
    axes.set_xticks(
        range(len(texts)), texts, rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_xlim(-0.5, len(texts) - 0.5)
    plain_axes(axes, "y")
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelleft=True)
