"""Pictures of `ecg-jax efficiency`: the roofline with every training step on it, speeds, and growth of cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ecg_jax.evaluation.drawing import new_figure
from ecg_jax.evaluation.plots import GREY, LIGHT
from ecg_jax.studies.cost_scaling import points_of
from ecg_jax.studies.efficiency_report import in_flops
from ecg_jax.studies.published_costs import Compared
from ecg_jax.studies.roofline import Roofline

#: Backbone -> colour, marker and name. Okabe and Ito's palette: told apart by colour-blind readers.
LOOKS = {
    "s4": ("#0072B2", "o", "S4"),
    "transformer": ("#D55E00", "s", "Transformer"),
    "net1d": ("#009E73", "^", "Net1D"),
}
_LINES = {"float32": "-", "bfloat16": "--"}


def draw_table(rows: Sequence[dict[str, Any]], roofline: Roofline, device: str):
    """A picture: the roofline with every training step; windows per second; peak memory.

    Args:
        rows: of `efficiency.measure`; those that failed are left out.
        roofline: of the device.
        device: its name.
    """
    rows = [row for row in rows if "programs" in row]
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    groups = sorted(
        dict.fromkeys((row["objective"], row["precision"], row["batch"]) for row in rows),
        key=lambda group: objectives.index(
            group[0]
        ),  # what differs in precision or batch only lies side by side
    )
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    height = max(4.6, 0.19 * len(groups) * (len(backbones) + 0.8) + 1.4)
    figure = new_figure(15, height)
    roof, speed, memory = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _draw_roofline(roof, rows, roofline)
    if height > 7:  # a column of bars is not a reason for a column of powers of ten
        roof.set_box_aspect(1.0)
        roof.set_anchor("N")

    bar = 0.8 / len(backbones)
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    labels = [
        "\n".join([o, *([p] if len(precisions) > 1 else []), *([f"batch {b}"] if len(batches) > 1 else [])])
        for o, p, b in groups
    ]
    for row in rows:
        color, _, _ = LOOKS[row["backbone"]]
        step = row["programs"]["step"]
        y = groups.index((row["objective"], row["precision"], row["batch"]))
        y += (backbones.index(row["backbone"]) - (len(backbones) - 1) / 2) * bar
        looks = {"color": color, "alpha": 1.0 if row["precision"] == precisions[0] else 0.55}
        speed.barh(y, step["windows_per_s"], 0.9 * bar, **looks)
        low, high = step["windows_per_s_low"], step["windows_per_s_high"]
        speed.plot([low, high], [y, y], color="black", linewidth=1.2)
        text = (
            f" {step['windows_per_s']:.3g}"
            if step["windows_per_s"] < 1000
            else f" {step['windows_per_s']:.0f}"
        )
        speed.text(max(high, step["windows_per_s"]), y, text, va="center", fontsize=8)
        memory.barh(y, step["peak_bytes"] / 1e9, 0.9 * bar, **looks)
        memory.text(step["peak_bytes"] / 1e9, y, f" {step['peak_bytes'] / 1e9:.3g}", va="center", fontsize=8)
    speed.set_title("training step, windows per second", loc="left", fontsize=11)
    memory.set_title("training step, peak memory in GB", loc="left", fontsize=11)
    for axes in (speed, memory):
        axes.set_yticks(range(len(groups)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{device}: {', '.join(precisions)}, batch {', '.join(map(str, batches))}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    return figure


def flop_per_byte(row: dict[str, Any]) -> float:
    """Operations of a training step, by formula, for each byte that the compiler estimates; or at least moves."""
    step = row["programs"]["step"]
    return step["flops_per_window"] * row["batch"] / (step["compiler_bytes"] or step["least_bytes"])


def _draw_roofline(axes, rows: Sequence[dict[str, Any]], roofline: Roofline) -> None:
    """Operations per second over operations per byte that the compiler estimates, both logarithmic."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    steps = [(row, row["programs"]["step"]) for row in rows]
    xs = [flop_per_byte(row) for row in rows]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    ridge = [roofline.flops_per_s[name] / roofline.copy_bytes_per_s for name in precisions]
    ends = np.geomspace(min([*xs, *ridge]) / 10, max([*xs, *ridge]) * 10, 200)
    for name in precisions:
        roof = np.minimum(roofline.flops_per_s[name], ends * roofline.copy_bytes_per_s)
        label = f"{in_flops(roofline.flops_per_s[name])} in {name}, copy {roofline.copy_bytes_per_s / 1e9:.3g} GB/s"
        axes.plot(ends, roof, _LINES[name], color=GREY, linewidth=1.4, label=label)
    for x, (row, step) in zip(xs, steps, strict=True):
        color, marker, _ = LOOKS[row["backbone"]]
        filled = color if row["precision"] == precisions[0] else "white"
        axes.plot(
            x, step["flops_per_s"], marker, color=color, markerfacecolor=filled, markersize=7, alpha=0.85
        )
    handles = [
        Line2D([], [], linestyle="", marker=LOOKS[name][1], color=LOOKS[name][0], label=LOOKS[name][2])
        for name in dict.fromkeys(row["backbone"] for row in rows)
    ]
    if len(precisions) > 1:
        open_marker = {"linestyle": "", "marker": "o", "color": GREY, "markerfacecolor": "white"}
        handles.append(Line2D([], [], **open_marker, label=f"{precisions[1]} (open; bars paler)"))
    handles += axes.get_lines()[: len(precisions)]
    axes.legend(handles=handles, fontsize=8.5, loc="lower right", framealpha=0.9, edgecolor="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Two decades at least, so that every axis has labelled powers of ten, and room for the legend below the points.
    top = 2 * max(roofline.flops_per_s[name] for name in precisions)
    low = min(*(step["flops_per_s"] for _, step in steps), top / 40)
    axes.set_ylim(low * (low / top) ** 0.45, top)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("roofline, each point one objective's training step", loc="left", fontsize=11)
    axes.set_xlabel("FLOP per byte (FLOPs by formula, bytes estimated by the compiler)")
    axes.set_ylabel("FLOP/s")
    axes.grid(which="major", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_scaling(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], about: dict[str, Any]):
    """A picture: time and memory over window length and over batch, a line for each backbone.

    Args:
        rows: of `cost_scaling.measure_scaling`.
        fits: of `cost_scaling.fit_all`.
        about: provenance.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = new_figure(11, 8)
    panels = figure.subplots(2, 2, sharex="col")
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    costs = (
        ("time", "seconds", 1.0, "time in s"),
        ("memory", "temporary_bytes", 1e9, "memory without parameters in GB"),
    )
    places = {
        "window": (
            "length of the window in s",
            f"growing windows, {about['windows_at_each_length']} at a time",
        ),
        "batch": ("windows in the batch", f"growing batch, windows of {about['window_s']:g} s"),
    }
    for column, (axis, (x_label, title)) in enumerate(places.items()):
        for line, (cost, field, unit, y_label) in enumerate(costs):
            axes = panels[line][column]
            lowest, ticks = [], set()
            for backbone in backbones:
                points = points_of(rows, backbone, axis, field)
                if not len(points):
                    continue
                color, marker, name = LOOKS[backbone]
                fit = [f for f in fits if (f["backbone"], f["axis"], f["cost"]) == (backbone, axis, cost)]
                error = (
                    f" ± {fit[0]['standard_error']:.2f}"
                    if fit and fit[0]["standard_error"] is not None
                    else ""
                )
                said = (
                    f": exponent {fit[0]['exponent']:.2f}{error}, last doubling {fit[0]['last']:.2f}"
                    if fit
                    else ""
                )
                axes.plot(points[:, 0], points[:, 1] / unit, marker=marker, color=color, label=name + said)
                if cost == "time":
                    low, high = (
                        points_of(rows, backbone, axis, f"seconds_{end}")[:, 1] for end in ("low", "high")
                    )
                    axes.vlines(points[:, 0], low, high, color=color, linewidth=1.2)
                lowest.append((points[0, 1] / unit, points))
                ticks |= set(points[:, 0])
            if lowest:
                start, points = min(lowest, key=lambda pair: pair[0])
                xs = points[[0, -1], 0]
                axes.plot(xs, 0.6 * start * xs / xs[0], ":", color=GREY, label="proportional")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.set_ylabel(y_label)
            axes.grid(which="major", color=LIGHT, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** 0.32)  # room for the legend
            axes.legend(frameon=False, fontsize=8.5, loc="upper left")
            if line == 0:
                axes.set_title(title, loc="left", fontsize=11)
            else:
                axes.set_xlabel(x_label)
    figure.suptitle(
        f"Encoder, forward and backward pass: {about['device_kind']}, {about['precisions'][0]}",
        x=0.01,
        ha="left",
        fontsize=12,
        weight="bold",
    )
    return figure


def draw_published(compared: Sequence[Compared]):
    """A picture: parameters and operations, published and ours, and our formula counted as theirs.

    Args:
        compared: of `published_costs.compare`.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    titles = {
        "parameters": "parameters, million",
        "forward": "forward, GFLOP a crop",
        "backward": "forward and backward, GFLOP a crop",
    }
    backbones = list(dict.fromkeys(row.backbone for row in compared))
    figure = new_figure(12, 1.5 + 0.9 * len(backbones))
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for row in compared:
            if row.quantity != quantity:
                continue
            y, (color, marker, _) = backbones.index(row.backbone), LOOKS[row.backbone]
            axes.barh(y - 0.19, row.published, 0.34, color="#B8B8B8")
            axes.barh(y + 0.19, row.ours, 0.34, color=color)
            axes.plot(row.counted, y - 0.19, marker, color="black", markerfacecolor="white", markersize=6)
            digits = f"about {row.digits}" if row.about else row.digits
            axes.text(max(row.published, row.counted), y - 0.19, f"   {digits}", va="center", fontsize=9)
            axes.text(row.ours, y + 0.19, f"  {row.ours:.4g}  (x {row.ratio:.2f})", va="center", fontsize=9)
        axes.set_title(title, loc="left", fontsize=11)
        axes.margins(x=0.42)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(backbones)), [LOOKS[name][2] for name in backbones])
    panels[0].invert_yaxis()
    open_marker = {"linestyle": "", "marker": "o", "color": "black", "markerfacecolor": "white"}
    handles = [
        Patch(color="#B8B8B8", label="published (arXiv 2605.12241)"),
        Patch(
            color=LOOKS[backbones[0]][0],
            label="ours, in the backbone's colour; in brackets published over ours",
        ),
        Line2D([], [], **open_marker, label="our formula, counted as published"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure
