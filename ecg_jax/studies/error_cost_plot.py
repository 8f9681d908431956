"""The picture of error against cost: a panel for each cost, colours by backbone, markers by objective."""

import math
from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation.drawing import new_figure, plain_axes
from ecg_jax.evaluation.plots import GREY
from ecg_jax.studies.efficiency_plots import LOOKS
from ecg_jax.studies.power_law import rungs_of

#: Objective -> marker.
MARKERS = {"cpc": "o", "jepa": "s", "data2vec": "^", "dinosr": "v", "hubertpp": "D", "hubert": "P"}
# Of these costs many points have the same value, and are drawn side by side.
_SHARED = ("parameters", "flops_per_window")
_SMALLEST, _LARGEST = 4.5, 10.0


def draw_error_cost(
    points: Sequence, fronts: dict, costs: dict[str, tuple[str, bool]], error: str, title: str
):
    """A panel for each cost; front points ringed and joined.

    Args:
        points: of `error_cost.points_of`.
        fronts: of `error_cost.fronts`.
        costs: name -> axis label, and whether less is better.
        error: what the error is.
        title: of the picture.
    """
    figure = new_figure(13, 8.2)
    panels = figure.subplots(2, 3, sharey=True)
    sizes = _sizes(points)
    for axes, (name, (label, less)) in zip(panels.flat, costs.items(), strict=False):
        _draw_panel(axes, points, fronts[name], name, sizes)
        note = " (equal ones side by side)" if name in _SHARED else "" if less else " (more is better)"
        axes.set_xlabel(label + note, fontsize=9)
        plain_axes(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel(error, fontsize=9)
    _draw_legend(panels.flat[-1], points, sizes)
    figure.suptitle(f"Error against cost: {title}", x=0.01, ha="left", fontsize=12, weight="bold")
    return figure


def _draw_panel(axes, points: Sequence, front: dict, name: str, sizes: dict[int, int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if not front:
        axes.text(0.5, 0.5, "not known of these runs", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
        return
    objectives = list(dict.fromkeys(point.objective for point in points))
    values = [points[i].costs[name] for i in front]
    low, high = _log_limits(values)
    step = 0.022 * math.log(high / low) if name in _SHARED else 0.0
    places = {}
    for i in front:
        point = points[i]
        aside = step * (objectives.index(point.objective) - (len(objectives) - 1) / 2)
        places[i] = point.costs[name] * math.exp(aside)
    ringed = sorted((i for i, (on, _) in front.items() if on), key=places.get)
    axes.plot(
        [places[i] for i in ringed], [points[i].error for i in ringed], color=GREY, linewidth=1.0, zorder=1
    )
    for i, x in places.items():
        point = points[i]
        color, size = LOOKS[point.backbone][0], _size(point.recordings, sizes)
        axes.plot([x, x], [point.low, point.high], color=color, linewidth=1.0, alpha=0.55, zorder=2)
        axes.plot(
            x, point.error, MARKERS[point.objective], color=color, markersize=size, alpha=0.9, zorder=3,
            markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
        if i in ringed:
            axes.plot(
                x, point.error, "o", color="black", markerfacecolor="none", markersize=size + 6, zorder=4
            )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    few = math.log10(high / low) < 1.5
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    if few:
        axes.xaxis.set_major_formatter(_in_words)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _in_words(value: float, _=None) -> str:
    """A tick of an axis of less than two decades: 2 M, 500 k, 0.02."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g}"


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis around positive values, at least a factor of two apart."""
    low, high = min(values), max(values)
    room = max(0.12 * math.log(high / low), 0.35)
    return low * math.exp(-room), high * math.exp(room)


def _sizes(points: Sequence) -> dict[int, int]:
    """Recordings of a point -> their rung: curves whose sizes differ by a few have marks of one size."""
    recordings = [point.recordings for point in points]
    return dict(sorted(zip(recordings, rungs_of(recordings).tolist(), strict=True)))


def _size(recordings: int, sizes: dict[int, int]) -> float:
    last = max(sizes.values())
    return float(np.interp(sizes[recordings], (0, last), (_SMALLEST, _LARGEST))) if last else 7.0


def _draw_legend(axes, points: Sequence, sizes: dict[int, int]) -> None:
    """What colours, markers, sizes and rings are, in the panel that has no cost."""
    from matplotlib.lines import Line2D

    def mark(**style):
        return Line2D([], [], **{"linestyle": "", "marker": "o", "color": GREY, "markersize": 7, **style})

    backbones = dict.fromkeys(point.backbone for point in points)
    objectives = dict.fromkeys(point.objective for point in points)
    handles = [mark(color=LOOKS[name][0], label=LOOKS[name][2]) for name in backbones]
    handles += [mark(marker=MARKERS[name], label=name) for name in objectives]
    one_of_each = {rung: n for n, rung in sizes.items()}.values()
    if len(one_of_each) > 1:
        handles += [
            mark(markersize=_size(n, sizes), label=f"{n:,} recordings".replace(",", " ")) for n in one_of_each
        ]
    handles.append(
        mark(color="black", markerfacecolor="none", markersize=11, label="no point is better in both (front)")
    )
    handles.append(
        Line2D([], [], color=GREY, linewidth=1.0, label="95 % interval (in the backbone's colour)")
    )
    axes.set_axis_off()
    axes.legend(handles=handles, loc="center left", frameon=False, fontsize=9, labelspacing=0.7)
