"""Pictures: loss curve, one ECG on paper, AUROC per class with intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecg_jax.files import read_jsonl

#: Colour and marker of one model after the other. Okabe and Ito's palette: told apart by colour-blind readers; the
#: marker says the same.
LOOKS = (
    ("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "s"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#8C6D1F", "<"),
)  # fmt: skip
#: Of baselines, notes and chance; of grids.
GREY, LIGHT = "#6E6E6E", "#E4E4E4"
_BLUE, _ORANGE, _GREY = LOOKS[0][0], LOOKS[1][0], GREY

# Printed ECG paper: 1 mm and 5 mm lines.
_PAPER, _THIN, _THICK, _TRACE = "#FFF6F4", "#F8D3CD", "#EFA79E", "#101010"
_MM_PER_S, _MM_PER_MV, _MM_PER_INCH = 25.0, 10.0, 25.4

# Label -> key of a line of log.jsonl.
LOSSES = {"training": "loss", "validation": "val_loss"}
ACCURACIES = {"training": "accuracy", "validation": "val_accuracy"}

# A percentile interval from fewer positives than this is too narrow to be believed.
FEW_POSITIVES = 10
_LAYOUT = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))


def _figure(width_inch: float, height_inch: float):
    """A figure that belongs to no window system: drawing never needs or changes a display backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | Path, dpi: float) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=dpi)
    temporary.replace(path)


def ecg_paper(
    signal,
    rate_hz: float,
    leads: Sequence[str],
    path: str | Path,
    title: str = "",
    start_s: float = 0.0,
    dpi: float = 150,
) -> None:
    """Writes one 12-lead ECG on paper.

    Args:
        signal, rate_hz, leads, title, start_s: see `paper_figure`.
        path: file to write (.png, .pdf, .svg).
        dpi: of the picture.

    Raises:
        ValueError: a lead is not there, or nothing is left to draw.
    """
    _save(paper_figure(signal, rate_hz, leads, title, start_s), path, dpi)


def paper_figure(signal, rate_hz: float, leads: Sequence[str], title: str = "", start_s: float = 0.0):
    """One 12-lead ECG on pink paper at 25 mm/s and 10 mm/mV: 3 rows of 4 leads and lead II throughout.

    The columns follow each other in time, as on an electrocardiograph: of 10 s, column 1 shows 0-2.5 s,
    column 2 2.5-5 s and so on, above the same 10 s of lead II. Every row begins with a calibration pulse of 1
    mV for 0.2 s. One millimetre of paper is one millimetre of the picture at its own dpi, so a print without
    scaling can be measured with a ruler.

    Args:
        signal: [T, C] in millivolts; NaN leaves a gap.
        rate_hz: samples per second.
        leads: C names, the twelve usual ones in any order.
        title: printed above the grid.
        start_s: where the strip begins; it shows 10 s, or what there is.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: a lead is not there, or nothing is left to draw.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    signal = np.asarray(signal, dtype=np.float64)
    missing = [name for row in _LAYOUT for name in row if name not in leads]
    if missing:
        raise ValueError(f"lead(s) {', '.join(missing)} are not among {', '.join(leads)}")
    first = round(start_s * rate_hz)
    shown = signal[first : first + round(10 * rate_hz)]
    if len(shown) < 2:
        raise ValueError(f"the recording ends before {start_s} s")
    column_of = {name: c for c, name in enumerate(leads)}

    duration = len(shown) / rate_hz
    margin, pulse_mm, row_mm, head_mm, foot_mm = 5.0, 10.0, 30.0, 15.0, 10.0
    strip_mm = duration * _MM_PER_S
    width = np.ceil((2 * margin + pulse_mm + strip_mm) / 5) * 5
    baselines = [foot_mm + row_mm * (3 - row) + row_mm / 2 for row in range(4)]
    height = foot_mm + 4 * row_mm + head_mm

    figure = _figure(width / _MM_PER_INCH, height / _MM_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), facecolor=_PAPER)
    axes.set_axis_off()
    figure.patch.set_facecolor(_PAPER)
    for step, color, line_width in ((1, _THIN, 0.35), (5, _THICK, 0.7)):
        xs, ys = np.arange(0, width + step, step), np.arange(0, height + step, step)
        lines = [[(x, 0), (x, height)] for x in xs] + [[(0, y), (width, y)] for y in ys]
        axes.add_collection(LineCollection(lines, colors=color, linewidths=line_width, zorder=0))

    origin = margin + pulse_mm
    # A thin halo keeps text readable on the grid; a box would hide the trace of a neighbouring row.
    text = {"zorder": 4, "path_effects": [withStroke(linewidth=2.0, foreground=_PAPER)]}
    trace = {"color": _TRACE, "linewidth": 0.8, "solid_joinstyle": "round", "zorder": 3}
    x = origin + np.arange(len(shown)) / rate_hz * _MM_PER_S
    for row, baseline in enumerate(baselines):
        pulse_x = margin + np.array([0.0, 2.0, 2.0, 7.0, 7.0, 9.0])
        axes.plot(pulse_x, baseline + np.array([0, 0, 1, 1, 0, 0]) * _MM_PER_MV, **trace)
        names = _LAYOUT[row] if row < 3 else ("II",)
        edges = np.linspace(0, len(shown), len(names) + 1).round().astype(int)
        for i, name in enumerate(names):
            part = slice(edges[i], min(edges[i + 1] + 1, len(shown)))
            axes.plot(x[part], baseline + shown[part, column_of[name]] * _MM_PER_MV, **trace)
            label_x = origin + edges[i] / rate_hz * _MM_PER_S
            if i:
                tick = [baseline - 3.5, baseline - 2.0, np.nan, baseline + 2.0, baseline + 3.5]
                axes.plot(np.full(5, label_x), tick, color=_TRACE, linewidth=0.8, zorder=3)
            axes.text(label_x + 1.2, baseline + 10.5, name, fontsize=9, weight="bold", **text)
    axes.text(margin, height - 5, title, fontsize=10, va="center", **text)
    scale = f"25 mm/s    10 mm/mV    {rate_hz:g} samples/s    {start_s:g} to {start_s + duration:.4g} s"
    axes.text(margin, 5, scale, fontsize=8, va="center", **text)
    return figure


def loss_curve(
    log: str | Path,
    path: str | Path,
    title: str = "",
    losses: dict[str, str] = LOSSES,
    accuracies: dict[str, str] = ACCURACIES,
) -> None:
    """Training and validation loss over steps, and accuracy below it where it was logged.

    Args:
        log: a run's log.jsonl, one object with "step" per line.
        path: picture to write.
        title: of the picture.
        losses: label -> key of the losses.
        accuracies: label -> key of the accuracies. Keys that no line has are left out.

    Raises:
        ValueError: no line of the log holds any of the losses.
    """
    entries = read_jsonl(Path(log))

    def points(key):
        pairs = [(e["step"], e[key]) for e in entries if key in e and e[key] is not None]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    panels = [
        ("loss", {label: points(key) for label, key in losses.items()}),
        ("accuracy", {label: points(key) for label, key in accuracies.items()}),
    ]
    panels = [(name, {k: p for k, p in lines.items() if len(p)}) for name, lines in panels]
    panels = [(name, lines) for name, lines in panels if lines]
    if not panels or panels[0][0] != "loss":
        raise ValueError(f"{log} holds none of {', '.join(losses.values())}")
    figure = _figure(7.0, 1.0 + 2.6 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(grid, panels, strict=True):
        for (label, xy), color in zip(lines.items(), (_BLUE, _ORANGE, _GREY), strict=False):
            few = len(xy) <= 40
            axes.plot(
                xy[:, 0], xy[:, 1], color=color, label=label, marker="o" if few else None, markersize=3.5
            )
        axes.set_ylabel(name)
        axes.grid(color=LIGHT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    if all((xy[:, 1] > 0).all() for xy in panels[0][1].values()):
        values = np.concatenate([xy[:, 1] for xy in panels[0][1].values()])
        if values.max() / values.min() > 20:
            grid[0].set_yscale("log")
    grid[-1].set_xlabel("step")
    grid[0].set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    _save(figure, path, dpi=130)


def auroc_forest(
    classes: Sequence[str],
    n_pos: Sequence[int],
    models: dict[str, np.ndarray],
    macro: dict[str, Sequence[float]],
    path: str | Path,
    title: str = "",
    level: float = 0.95,
) -> None:
    """AUROC of every class with its interval, best first, and macro AUROC set apart below.

    The names of classes with fewer than `FEW_POSITIVES` positives are grey: their intervals promise too much.

    Args:
        classes: K names.
        n_pos: K numbers of positive test records, written beside the names.
        models: name -> float [K, 3] (AUROC, low, high), at most three; sorted by the first. A class whose
            AUROC is NaN is listed as undefined.
        macro: name -> (macro AUROC, low, high) of the same models.
        path: picture to write.
        title: of the picture.
        level: of the intervals.
    """
    styles = dict(zip(models, ((_BLUE, "o", 5.5), (_ORANGE, "D", 4.5), (_GREY, "s", 4.5)), strict=False))
    shifts = dict(zip(models, 0.3 * (np.arange(len(models))[::-1] - (len(models) - 1) / 2), strict=True))
    first = next(iter(models.values()))[:, 0]
    order = np.argsort(np.where(np.isnan(first), -1.0, first), kind="stable")[::-1]
    positions = [*(float(-i) for i in range(len(order))), -len(order) - 0.4]
    row_inch = 0.36 if len(order) <= 30 else 0.26
    figure = _figure(7.2, 1.4 + row_inch * (len(order) + 1.4))
    axes = figure.subplots()

    def draw(y, name, interval, larger=0.0):
        value, low, high = interval
        color, marker, size = styles[name]
        style = {"color": color, "clip_on": False, "zorder": 3}  # a marker at 1.0 is drawn whole
        axes.plot([low, high], [y + shifts[name]] * 2, linewidth=1.8, solid_capstyle="butt", **style)
        axes.plot([value], [y + shifts[name]], marker, markersize=size + larger, linestyle="none", **style)

    for y, k in zip(positions, order, strict=False):
        if np.isnan(first[k]):
            axes.text(0.5, y, "  undefined in the test records", va="center", fontsize=8, color=_GREY)
            continue
        for name, intervals in models.items():
            draw(y, name, intervals[k])
    for name, interval in macro.items():
        draw(positions[-1], name, interval, larger=1.5)
    axes.axhline(positions[-1] + 0.7, color="#BBBBBB", linewidth=0.8)
    for name, (color, marker, size) in styles.items():
        axes.plot([], [], marker, color=color, markersize=size, label=name, linestyle="none")

    axes.axvline(0.5, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    lows = np.concatenate([intervals[:, 1] for intervals in models.values()])
    lowest = np.nanmin(lows) if np.isfinite(lows).any() else 0.5
    axes.set_xlim(min(0.45, np.floor(lowest * 20) / 20 - 0.01), 1.005)
    axes.set_ylim(positions[-1] - 0.7, 0.7)
    axes.set_yticks(positions, [*(f"{classes[k]}  (n={n_pos[k]})" for k in order), "macro AUROC"])
    axes.tick_params(axis="y", length=0)
    few = [n_pos[k] < FEW_POSITIVES for k in order]
    for text, grey in zip(axes.get_yticklabels(), few, strict=False):
        text.set_color(_GREY if grey else "black")
    axes.grid(axis="x", color=LIGHT, linewidth=0.6, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    note = f"\nn: positive test records; grey names: fewer than {FEW_POSITIVES}" if any(few) else ""
    axes.set_xlabel(f"AUROC with {100 * level:g} % interval (dashed: chance){note}")
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="lower right", ncols=len(models), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    _save(figure, path, dpi=130)


def seeds_forest(
    groups: Sequence[str],
    intervals: Sequence[Sequence[float]],
    seeds: Sequence[Sequence[float]],
    baselines: Sequence[Sequence[float]],
    chance: float,
    path: str | Path,
    title: str = "",
    note: str = "",
    level: float = 0.95,
) -> None:
    """Macro AUROC of groups of runs: the mean over seeds with its interval, and every seed as a small dot.

    Args:
        groups: G names, drawn from top to bottom.
        intervals: G of (mean, low, high).
        seeds: for each group the values of its seeds.
        baselines: G of (value, low, high) of the randomly initialised encoder that a group is compared with, a
            vertical line across the group's row with a shade as wide as its interval.
        chance: value of the majority guess, a dashed line across all rows.
        path: picture to write.
        title: of the picture.
        note: said below the picture.
        level: of the intervals.
    """
    import textwrap

    rows = -np.arange(len(groups), dtype=float)
    lines = textwrap.wrap(note, 125)
    figure = _figure(7.6, 1.75 + 0.46 * len(groups) + 0.17 * len(lines))
    axes = figure.subplots()
    for y, (value, low, high) in zip(rows, baselines, strict=True):
        axes.fill_between([low, high], y - 0.5, y + 0.5, color=_ORANGE, alpha=0.13, linewidth=0, zorder=1)
        axes.plot(
            [value, value], [y - 0.5, y + 0.5], color=_ORANGE, linewidth=1.4, solid_capstyle="butt", zorder=2
        )
    for y, (mean, low, high), values in zip(rows, intervals, seeds, strict=True):
        axes.plot([low, high], [y + 0.1] * 2, color=_BLUE, linewidth=2, solid_capstyle="butt", zorder=4)
        axes.plot([mean], [y + 0.1], "o", color=_BLUE, markersize=7, zorder=5)
        # White rims keep dots apart that nearly coincide.
        axes.plot(
            values, [y - 0.2] * len(values), "o", color=_BLUE, markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.6, alpha=0.75, zorder=4,
        )  # fmt: skip
    axes.axvline(chance, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    legend = (
        ({"marker": "o", "markersize": 7, "color": _BLUE, "linewidth": 2}, "mean over seeds"),
        (
            {"marker": "o", "markersize": 4.5, "color": _BLUE, "linestyle": "none", "alpha": 0.75},
            "single seed",
        ),
        ({"color": _ORANGE, "linewidth": 1.4}, "random initialisation"),
        ({"color": _GREY, "linewidth": 1, "linestyle": "--"}, "majority guess"),
    )
    for style, label in legend:
        axes.plot([], [], label=label, **style)

    everything = np.concatenate([np.ravel(intervals), np.ravel(baselines), *map(np.ravel, seeds), [chance]])
    everything = everything[np.isfinite(everything)]
    margin = 0.04 * (everything.max() - everything.min()) + 0.005
    axes.set_xlim(everything.min() - margin, min(everything.max() + margin, 1.005))
    axes.set_ylim(rows[-1] - 0.5, 0.5)
    axes.set_yticks(rows, groups)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"macro AUROC with {100 * level:g} % intervals over test patients and seeds")
    axes.set_title(title, loc="left", fontsize=11)
    height = figure.get_figheight()
    figure.text(0.02, 0.1 / height, "\n".join(lines), fontsize=8, color=_GREY, va="bottom")
    below = 0.12 + 0.17 * len(lines)
    figure.legend(
        loc="lower center",
        ncols=len(legend),
        frameon=False,
        fontsize=8.5,
        bbox_to_anchor=(0.5, below / height),
    )
    figure.tight_layout(rect=(0, (below + 0.3) / height, 1, 1))
    _save(figure, path, dpi=130)
