"""Tables of probes in a study: objectives by backbones, groups with ranks, single runs, classes, mean places."""

from collections.abc import Sequence

from ecg_jax.data.store import SYNTHETIC
from ecg_jax.studies.report.boards import Board
from ecg_jax.studies.report.cells import DASH, SCORES, Cell, Table, interval, p_value, texts
from ecg_jax.studies.report.design import anchors, grid, in_order, rung_of, rungs, shown_path
from ecg_jax.studies.report.page import paragraph
from ecg_jax.studies.report.places import placed, places_table
from ecg_jax.studies.report.study import Study
from ecg_jax.studies.report.tables import leads_said, resampled

_MOST_PATHS = 3  # in one cell


def of_synthetic(board: Board) -> bool:
    """Whether a board was tested on made-up recordings."""
    results = board.scores.first.results
    return (results["test_store"] or results["store"])["corpus"] == SYNTHETIC


def warning(board: Board) -> str:
    """Sentences for boards of synthetic recordings and of encoders that see some leads only, else ""."""
    synthetic = " SYNTHETIC recordings, no ECGs: a check of the machinery." if of_synthetic(board) else ""
    named = [(row.model, member.result) for row, own in board.members.items() for member in own]
    return synthetic + leads_said(named)


def tested(board: Board) -> str:
    """ "39 test records of 34 patients, 95 % intervals from resampled patients"."""
    results = board.scores.first.results
    patients = "" if results["n_patients"] is None else f" of {results['n_patients']} patients"
    settings = results["bootstrap"]
    return (
        f"{results['n_records']} test records{patients}, {100 * settings['level']:g} % intervals from "
        f"{resampled({'': settings['unit']})}"
    )


def seeds_said(board: Board) -> str:
    """What intervals know of seeds."""
    numbers = sorted({len(members) for members in board.members.values()})
    if numbers[-1] == 1:
        return " One seed each: intervals know nothing of other seeds."
    few = " rows of one seed know nothing of others" if numbers[0] == 1 else ""
    return " Means over seeds; intervals carry test records and seeds (Student's t)" + (
        f";{few}." if few else "."
    )


def compact_table(board: Board, study: Study) -> Table | None:
    """Objectives by backbones, rung by rung; None where groups differ in anything else, or there is one only."""
    first = [(row, members[0].run) for row, members in board.members.items() if not row.baseline]
    places = grid([(row.label, run) for row, run in first])
    if places is None or len(places) < 2:
        return None
    entries = {entry.row.label: entry for entry in board.scores.entries.values()}
    runs = [run for _, run in first]
    objectives, backbones = in_order(runs, "objective"), in_order(runs, "backbone")
    headings = {key: heading for key, heading in rungs(study.runs).items() if key in map(rung_of, runs)}
    columns = [
        (key, backbone)
        for key in headings
        for backbone in backbones
        if any(place[1:] == (backbone, key) for place in places)
    ]
    body = []
    for objective in objectives:
        cells = [Cell(objective)]
        for key, backbone in columns:
            place = objective, backbone, key
            if place not in places:
                cells.append(Cell(DASH, mark="mute"))
                continue
            entry = entries[places[place]]
            cells.append(interval(entry.point, entry.low, entry.high, entry.mark))
        body.append(cells)
    spans = [("", 1)] + [
        (heading, n) for key, heading in headings.items() if (n := sum(k == key for k, _ in columns))
    ]
    several = len(headings) > 1
    names = [f"{backbone}, {key[0]}" if several else backbone for key, backbone in columns]
    if len(set(names)) < len(names):
        names = [f"{backbone}, {headings[key]}" for key, backbone in columns]
    return Table(
        f"grid_{board.name}",
        f"{board.task}, {board.mode}: {SCORES[board.scores.first.metric]} by objective, backbone and rung; "
        f"{tested(board)}.{seeds_said(board)} Bold: the best of the table of ranks below, baselines included; "
        f"underlined: not told from it.{warning(board)}",
        ["objective", *names],
        body,
        1,
        spans,
    )


def _from(members, study: Study) -> Cell:
    """Where a row's numbers lie."""
    if not members:
        return Cell(DASH, mark="mute")
    paths = [shown_path(member.result.folder, study.folders) for member in members]
    more = f" and {len(paths) - _MOST_PATHS} more" if len(paths) > _MOST_PATHS else ""
    link = anchors(study)[members[0].run.name] if len(members) == 1 else ""
    return Cell("; ".join(paths[:_MOST_PATHS]) + more, link=link)


def groups_table(board: Board, study: Study) -> Table:
    """Groups and baselines from best to worst, with ranks and the folders they come from."""
    resamples = board.scores.first.results["bootstrap"]["resamples"]
    body = []
    for entry in board.scores.ranked:
        rank, members = entry.rank, board.members_of(entry.row)
        difference, p = Cell("best"), None
        if rank.to_best is not None:
            difference, p = interval(*rank.to_best.difference, sign=True), rank.to_best.p_value
        gain = Cell(DASH, mark="mute")
        if entry.row.label in board.gains:
            gain = interval(*board.gains[entry.row.label], sign=True)
        seeds = str(len(members)) if members else DASH if entry.seeds is None else str(entry.seeds)
        body.append(
            texts(
                (
                    entry.row.model, entry.row.mode or DASH, _from(members, study),
                    interval(entry.point, entry.low, entry.high, entry.mark), seeds, rank.rank, difference,
                    p_value(p, resamples), p_value(rank.p_holm, resamples), gain,
                )
            )
        )  # fmt: skip
    return Table(
        f"ranks_{board.name}",
        f"{board.task}, {board.mode}: groups of runs and baselines from best to worst; {tested(board)}."
        f"{seeds_said(board)} Rows share a rank where the interval of the paired difference to the group's best holds "
        f"0; p is two-sided on {resamples} resamples, corrected by Holm over all comparisons of the page. Last column: "
        f"minus the random initialisations of the same encoder{_probed_as(board)}, paired.{warning(board)}",
        [
            "group", "mode", "folder", SCORES[board.scores.first.metric], "seeds", "rank",
            "difference to the best", "p", "p (Holm)", "minus random initialisation",
        ],
        body,
        3,
    )  # fmt: skip


def _probed_as(board: Board) -> str:
    """How random initialisations were probed, where that is not how the runs were."""
    modes = {row.mode for row in board.twins}
    return "" if modes <= {board.mode} else f" under a {' or '.join(sorted(modes))} head"


def single_table(board: Board, study: Study) -> Table:
    """Every run as its results.json has it."""
    ids = anchors(study)
    metric = board.scores.first.metric
    extra = [
        name
        for name in SCORES
        if name != metric
        and any(name in m.result.results["metrics"] for own in board.members.values() for m in own)
    ]
    body = []
    for row, members in board.members.items():
        for member in members:
            results = member.result.results
            cells = [
                Cell(shown_path(member.result.folder, study.folders), link=ids[member.run.name]),
                row.model, row.mode, str(results["seed"]),
                interval(*(results[name] for name in (metric, "ci_low", "ci_high"))),
            ]  # fmt: skip
            for name in extra:
                if name in results["metrics"]:
                    value = results["metrics"][name]
                    cells.append(interval(*(value[k] for k in ("point", "low", "high"))))
                else:
                    cells.append(Cell(DASH, mark="mute"))
            body.append(texts(cells))
    return Table(
        f"single_{board.name}",
        f"{board.task}, {board.mode}: every probe as its results.json has it; intervals are over test records, not "
        f"over seeds.{warning(board)}",
        ["folder", "group", "mode", "seed", SCORES[metric], *(SCORES[name] for name in extra)],
        body,
        3,
    )


def class_table(board: Board) -> Table:
    """Groups by classes, best groups first."""
    first = board.scores.first.results["per_class"]
    name, count = ("mae", "n") if board.regression else ("auroc", "n_pos")
    body = []
    for entry in board.scores.ranked:
        if entry.result is None:
            continue
        own = entry.result.results["per_class"]
        cells = [interval(own[k][name], own[k]["ci_low"], own[k]["ci_high"]) for k in first]
        body.append([*texts((entry.row.model, entry.row.mode)), *cells])
    return Table(
        f"classes_{board.name}",
        f"{board.task}, {board.mode}: {'mean absolute error' if board.regression else 'AUROC'} of every "
        f"{'target' if board.regression else 'class'}, of several seeds the mean; intervals over test records. n: "
        f"{'known values' if board.regression else 'positive test records'}.{warning(board)}",
        ["group", "mode", *(f"{k} (n={about[count]})" for k, about in first.items())],
        body,
        2,
    )


def places_parts(boards: Sequence[Board]) -> list[Table | str]:
    """Mean places of groups over the tasks of each mode; made-up recordings apart, and nothing for a single task."""
    parts: list[Table | str] = []
    for name, before, made_up in (
        ("mean_places", "", False), ("mean_places_synthetic", "SYNTHETIC recordings: ", True)
    ):  # fmt: skip
        own = [board for board in boards if of_synthetic(board) == made_up]
        modes = {
            mode: [board for board in own if board.mode == mode]
            for mode in dict.fromkeys(b.mode for b in own)
        }
        # Of several probes of a run none is the one that its group has on other tasks.
        several = [board.name for of in modes.values() if len(of) > 1 for board in of if board.variants]
        left_out = (
            f" Left out, as runs have several probes of one mode there: {', '.join(several)}."
            if several
            else ""
        )
        columns = {
            mode: [placed(board.scores, board.resampled) for board in kept]
            for mode, of in modes.items()
            if len(kept := [board for board in of if not board.variants]) > 1
        }
        level = boards[0].scores.first.results["bootstrap"]["level"]
        table = places_table(name, columns, level, before, left_out)
        if table is not None:
            parts.append(table)
        elif columns or several:
            parts.append(
                paragraph(f"{before}No mean places: no group of runs is on all tasks of a mode.{left_out}")
            )
    return parts
