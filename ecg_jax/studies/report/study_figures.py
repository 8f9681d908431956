"""What the report of a study draws: loss curves, groups of runs with their intervals, objectives mode by mode."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation import report_plots
from ecg_jax.evaluation.drawing import MOST_MODELS, Looks, add_legend, looks_of, new_figure, plain_axes
from ecg_jax.evaluation.plots import GREY
from ecg_jax.studies.report.board_tables import seeds_said, tested, warning
from ecg_jax.studies.report.boards import Board
from ecg_jax.studies.report.cells import SCORES, count, number
from ecg_jax.studies.report.design import grid, in_order, rung_of, rungs
from ecg_jax.studies.report.pictures import Picture, drawn
from ecg_jax.studies.report.read import MODES
from ecg_jax.studies.report.rows import RANDOM_INIT, SUPERVISED
from ecg_jax.studies.report.study import Study
from ecg_jax.studies.study_runs import StudyRun

_POINTS = 150  # of one curve: more cannot be seen
_DASHES = ("-", "--", ":", "-.")
_FOREST_ROWS = 60
_COLUMNS = 3


def loss_curves(study: Study) -> list[Picture]:
    """Training and validation loss over windows, a panel for each objective."""
    runs = [run for run in study.runs if run.objective and run.log]
    return [
        picture
        for key, name in (("loss", "training"), ("val_loss", "validation"))
        if (picture := _losses(runs, key, name)) is not None
    ]


def _points(run: StudyRun, key: str) -> np.ndarray:
    """float64 [n, 3]: step, windows, loss; at most `_POINTS`, first and last among them."""
    batch = run.config["batch_size"]
    found = [(e["step"], e["step"] * batch, e[key]) for e in run.log if key in e and e[key] is not None]
    points = np.array(found, dtype=np.float64).reshape(-1, 3)
    if len(points) > _POINTS:
        points = points[np.linspace(0, len(points) - 1, _POINTS).round().astype(int)]
    return points


def _losses(runs: Sequence[StudyRun], key: str, name: str) -> Picture | None:
    curves = {run.name: points for run in runs if len(points := _points(run, key))}
    runs = [run for run in runs if run.name in curves]
    # Single points are no curves; the last losses are in the table of runs.
    if max(map(len, curves.values()), default=0) < 2:
        return None
    objectives, backbones, sizes = in_order(runs, "objective"), in_order(runs, "backbone"), rungs(runs)
    in_grid = grid([(run.group, run) for run in runs]) is not None and len(sizes) <= len(_DASHES)
    groups = list(dict.fromkeys(run.group for run in runs))
    looks = looks_of(backbones if in_grid else groups)
    dashes = dict(zip(sizes, _DASHES, strict=False)) if in_grid else dict.fromkeys(sizes, "-")
    columns = min(_COLUMNS, len(objectives))
    rows = -(-len(objectives) // columns)
    shown = {label: look for label, look in list(looks.items())[: 2 * MOST_MODELS]}
    extra = [
        {"color": GREY, "linestyle": dash, "linewidth": 1.3, "label": sizes[size]}
        for size, dash in dashes.items()
        if in_grid and len(sizes) > 1
    ]
    legend_columns = 2 if columns < 3 else 3
    below = 0.22 * -(-(len(shown) + len(extra)) // legend_columns)
    figure = new_figure(max(4.2, 3.3 * columns), 2.7 * rows + 0.2 + below)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(objectives) :]:
        axes.set_axis_off()
    for axes, objective in zip(panels.flat, objectives, strict=False):
        for run in (run for run in runs if run.objective == objective):
            colour, marker = looks[run.backbone if in_grid else run.group]
            points = curves[run.name]
            few = len(points) <= 12
            axes.plot(
                points[:, 1], points[:, 2], color=colour, linestyle=dashes[rung_of(run)], linewidth=1.2,
                marker=marker if few else None, markersize=3.5,
            )  # fmt: skip
        values = np.concatenate([curves[run.name][:, 2] for run in runs if run.objective == objective])
        finite = values[np.isfinite(values)]
        if finite.size and finite.min() > 0 and finite.max() / finite.min() > 20:
            axes.set_yscale("log")
        axes.set_title(objective, loc="left", fontsize=9)
        axes.set_xlabel("windows trained on", fontsize=8)
        plain_axes(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"{name} loss", fontsize=8)
    add_legend(figure, shown, extra, columns=legend_columns)
    made_up = sum(bool(run.synthetic) for run in runs)
    synthetic = (
        f" {made_up} of these {len(runs)} runs were trained on SYNTHETIC recordings: their losses say nothing about "
        "ECGs."
        if made_up
        else ""
    )
    coded = (
        "colours are backbones, line styles rungs"
        if in_grid and len(sizes) > 1
        else f"colours are {'backbones' if in_grid else 'groups'}"
    )
    cut = (
        f" The first {len(shown)} of {len(looks)} groups are in the legend."
        if len(shown) < len(looks)
        else ""
    )
    ends = ", ".join(
        f"{objective} {min(ends):.3g} to {max(ends):.3g}" if len(ends) > 1 else f"{objective} {ends[0]:.3g}"
        for objective in objectives
        if (ends := [float(curves[run.name][-1, 2]) for run in runs if run.objective == objective])
    )
    unfinished = sum(not run.finished for run in runs)
    going = f" {unfinished} of them are not finished." if unfinished else ""
    held = (
        " Runs of different stores or rungs may be validated on different recordings: only those with the same ones "
        "can be compared."
        if key == "val_loss"
        else " A training loss falls below that of new recordings where a model learns its own by heart."
    )
    return drawn(
        figure,
        f"figure_{name}_loss",
        alt=f"{name.capitalize()} loss over windows trained on, of {len(runs)} runs of {', '.join(objectives)}.",
        caption=f"{name.capitalize()} loss as it was logged, over windows (steps times batch size); {coded}.{cut}",
        shows=f"How {len(runs)} runs learned, and which had stopped learning when they ended. Last values: {ends}."
        f"{going}",
        does_not_show="Which objective is better: losses of different objectives have different units, and one "
        "objective's loss depends on the window and the masks. A lower loss need not mean better features."
        f"{held}{synthetic}",
        columns=("run", "objective", "backbone", "rung", "seed", "step", "windows", name + "_loss"),
        rows=[
            (run.name, run.objective, run.backbone, run.rung, run.seed, int(step), int(windows), float(loss))
            for run in runs
            for step, windows, loss in curves[run.name]
        ],
    )


def _two_lines(name: str) -> str:
    """A long name with what stands in brackets on a line of its own."""
    return name.replace(" (", "\n(", 1) if len(name) > 34 else name


def objective_looks(study: Study) -> Looks:
    """Colour and marker of each objective."""
    return looks_of(in_order(study.runs, "objective"))


def forest(board: Board, looks: Looks) -> Picture:
    """Groups and baselines with their intervals, best first, each seed a small ring."""
    ranked = board.scores.ranked[:_FOREST_ROWS]
    left_out = len(board.scores.entries) - len(ranked)
    metric = SCORES[board.scores.first.metric]
    names = [_two_lines(entry.row.model) for entry in ranked]
    row_inch = 0.3 if any("\n" in name for name in names) else 0.2
    figure = new_figure(7.4, 1.2 + row_inch * len(ranked) + 0.2 * -(-(len(looks) + 2) // 3))
    axes = figure.subplots()
    rows, used = [], {}
    for i, entry in enumerate(ranked):
        members = board.members_of(entry.row)
        objective = members[0].run.objective if members and not entry.row.baseline else ""
        colour, marker = GREY, "d"
        if objective in looks:
            colour, marker = used[objective] = looks[objective]
        triple = [np.nan if v is None else v for v in (entry.point, entry.low, entry.high)]
        axes.plot(triple[1:], [-i, -i], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
        axes.plot(triple[0], -i, marker, color=colour, markersize=5, zorder=4)
        seeds = [m.result.results[m.result.metric] for m in members] if len(members) > 1 else []
        axes.plot(
            seeds, [-i] * len(seeds), "o", markerfacecolor="none", color=colour, markersize=3.5, zorder=5
        )
        rows.append((entry.row.model, entry.row.mode, *map(float, triple), entry.rank.rank, len(members)))
        for member in members if len(members) > 1 else ():
            value = member.result.results[member.result.metric]
            rows.append((member.result.model, "single seed", value, None, None, None, 1))
    if not board.regression:
        axes.axvline(0.5, color=GREY, linewidth=1, linestyle="--", zorder=1)
    labels = [f"{name}  ({entry.rank.rank})" for name, entry in zip(names, ranked, strict=True)]
    axes.set_yticks(-np.arange(len(ranked)), labels)
    axes.set_ylim(-len(ranked) + 0.4, 0.6)
    plain_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    for text, entry in zip(axes.get_yticklabels(), ranked, strict=True):
        text.set_color(GREY if entry.row.baseline else "black")
    axes.set_xlabel(metric.rstrip(" ↑↓"), fontsize=9)
    extra = [{"color": GREY, "marker": "d", "linewidth": 1.4, "markersize": 5, "label": "baselines"}]
    if not board.regression:
        extra.append({"color": GREY, "linestyle": "--", "linewidth": 1, "label": "chance"})
    add_legend(figure, used, extra, columns=3)
    repeated = any(len(board.members_of(entry.row)) > 1 for entry in ranked)
    best, tied = ranked[0], sum(entry.rank.rank == 1 for entry in board.scores.entries.values())
    others = " No other row ties with it."
    if tied > 1:
        others = f" {count(tied - 1, 'row')} {'are' if tied > 2 else 'is'} not told from it."
    cut = f" The {len(ranked)} best of {len(ranked) + left_out} rows are drawn." if left_out else ""
    return drawn(
        figure,
        f"figure_ranks_{board.name}",
        alt=f"{metric} of {len(ranked)} groups and baselines on {board.task} in mode {board.mode}, with intervals.",
        caption=f"{board.task}, {board.mode}: {tested(board)}, in the order of ranks, which stand in brackets; "
        f"colours are objectives{', rings single seeds' if repeated else ''}.{cut}",
        shows=f"Which groups score best: {best.row.model} with {number(best.point)} "
        f"[{number(best.low)}, {number(best.high)}].{others}",
        does_not_show="Differences: rows are tested on the same records, so that overlapping bars can differ and the "
        "ranks, from paired differences, decide. Groups also differ in their numbers of recordings, parameters and "
        f"steps.{seeds_said(board)}{warning(board)}",
        columns=("row", "mode", board.scores.first.metric, "low", "high", "rank", "seeds"),
        rows=rows,
    )


def _references(boards: Sequence[Board], backbone: str, rung: tuple) -> dict[str, float]:
    """Best scores of a panel's own baselines, over its modes.

    Encoders trained from scratch are of the backbone, whatever the rung of the run that gave the architecture.
    """
    points: dict[str, list[float]] = {}
    for board in boards:
        for row, entry in board.scores.entries.items():
            beside = board.twins[row] if row in board.twins else board.members_of(row)
            of_panel = any(
                m.run.backbone == backbone and (row.baseline == SUPERVISED or rung_of(m.run) == rung)
                for m in beside
            )
            if row.baseline in (RANDOM_INIT, SUPERVISED) and of_panel:
                points.setdefault(row.baseline, []).append(entry.point)
    best = min if boards[0].regression else max
    return {name: best(points[name]) for name in (RANDOM_INIT, SUPERVISED) if name in points}


def modes(boards: Sequence[Board], looks: Looks, study: Study) -> list[Picture]:
    """Objectives mode by mode: a panel for each task and backbone, at the largest rung that has several modes."""
    tasks: dict[str, list[Board]] = {}
    for board in boards:
        tasks.setdefault(board.task, []).append(board)
    sizes = list(rungs(study.runs))
    panels, references = [], []
    for task, own in tasks.items():
        if len(own) < 2:
            continue
        placed: dict[tuple, dict[str, dict[str, list[float]]]] = {}
        for board in own:
            first = [
                (row.label, members[0].run) for row, members in board.members.items() if not row.baseline
            ]
            places = grid(first)
            entries = {entry.row.label: entry for entry in board.scores.entries.values()}
            for (objective, backbone, rung), label in (places or {}).items():
                entry = entries[label]
                triple = [np.nan if v is None else v for v in (entry.point, entry.low, entry.high)]
                placed.setdefault((backbone, rung), {}).setdefault(objective, {})[board.mode] = triple
        for backbone in dict.fromkeys(backbone for backbone, _ in placed):
            several = [
                rung for rung in sizes if any(len(of) > 1 for of in placed.get((backbone, rung), {}).values())
            ]
            if several:
                metric = SCORES[own[0].scores.first.metric]
                panels.append((f"{task}, {backbone}", metric, placed[(backbone, several[-1])]))
                references.append(_references(own, backbone, several[-1]))
    if not panels:
        return []
    order = [mode for mode in MODES if any(mode in of for _, _, models in panels for of in models.values())]
    pictures = []
    for start in range(0, len(panels), 6):
        part = slice(start, start + 6)
        names = "; ".join(panel[0] for panel in panels[part])
        pictures.append(
            drawn(
                report_plots.mode_panels(panels[part], references[part], order, looks),
                f"figure_modes_{start // 6 + 1}",
                alt=f"Scores of objectives in the modes {', '.join(order)} on {names}.",
                caption=f"Objectives in each mode with intervals, at the largest rung probed in several modes: {names}."
                " Grey: in any mode, the best random initialisation of the encoders drawn, and the best encoder of the "
                "backbone trained from scratch.",
                shows="Whether the order of objectives is the same in all modes, and what a larger head or finetuning "
                "adds to each.",
                does_not_show="What the modes cost, and whether their learning rates suit each objective alike. A "
                "finetuned encoder is to be held against one trained from scratch, a frozen one against a random "
                "initialisation.",
                columns=("panel", "objective", "mode", "point", "low", "high"),
                rows=[
                    *(
                        (panel, objective, mode, *map(float, triple))
                        for panel, _, models in panels[part]
                        for objective, of in models.items()
                        for mode, triple in of.items()
                    ),
                    *(
                        (panel[0], name, "baseline", float(value), None, None)
                        for panel, lines in zip(panels[part], references[part], strict=True)
                        for name, value in lines.items()
                    ),
                ],
            )
        )
    return pictures
