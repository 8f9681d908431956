"""`ecg-jax scaling`: losses and errors of finished runs over their size, with fitted power laws."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import looks_of
from ecg_jax.probe_output import plain
from ecg_jax.probe_provenance import made_with
from ecg_jax.studies import scaling_correlations, scaling_fits
from ecg_jax.studies.figure_folder import Figure, check_folder, write_figures
from ecg_jax.studies.scaling_figures import curves_figure, short_label
from ecg_jax.studies.scaling_fits import PUBLISHED, PUBLISHED_IN, Fitted, by_kind, fit_curve
from ecg_jax.studies.scaling_overviews import correlation_figure, exponents_figure, training_figure
from ecg_jax.studies.scaling_points import (
    AXES,
    BEST_LOSS,
    ERROR,
    LOSS,
    MEAN,
    Curve,
    error_curves,
    families,
    loss_curves,
    usable,
)
from ecg_jax.studies.scaling_tables import tables
from ecg_jax.studies.study_runs import StudyRun, find_runs

DESCRIPTION = """\
Fits power laws to the validation losses and downstream errors of finished runs over the number of their recordings,
and over training windows, operations and device-hours where these are not in proportion to it.

  ecg-jax scaling --runs sweeps/ladder --output=studies/scaling

A DIR is the --output of `ecg-jax sweep`, a run of `ecg-jax pretrain`, a probe of `ecg-jax probe`, or a folder of such.
There is one curve for each objective, backbone, task and mode of probe, and for the mean over tasks; settings in which
runs of one size differ part curves. Writes scaling.json (fits, intervals, verdicts, every point with its folder), and
each picture and table as files with figures.json, which `ecg-jax report` reads.
"""
KIND, RESULT = "scaling", "scaling.json"
MOST_RESAMPLES = 1_000_000
_MODES = ("linear", "frozen", "finetune")


def scaling(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    axes: Sequence[str] = tuple(AXES),
    tasks: Sequence[str] = (),
    modes: Sequence[str] = (),
    resamples: int = 1000,
    hold_out: bool = True,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Fits, draws and writes a scaling study; prints what is left out.

    Args:
        runs: folders, see `study_runs.find_runs`.
        output: folder for the results, made if needed.
        axes: to fit over, of `scaling_points.AXES`; recordings always.
        tasks, modes: of probes; all if empty.
        resamples: of the patients, and simulated studies for losses.
        hold_out: predict the largest size from the others.
        command: that made it, for the record.

    Returns:
        What scaling.json holds.

    Raises:
        UserError: nothing to fit, runs that do not belong together, damaged files, or an output that cannot be written;
            nothing is written then.
    """
    output = Path(output)
    check_folder(output, KIND)
    found = find_runs(runs)
    chosen, left_out = usable(found)
    notes = [f"{name} is left out: {why}" for name, why in left_out.items()]
    for line in notes:
        print(line, flush=True)

    def note(line: str) -> None:
        if line not in notes:
            notes.append(line)
            print(line, flush=True)

    if not chosen:
        raise UserError(
            f"{', '.join(map(str, runs))}: no run is finished, so there is nothing to fit; finish pretraining first"
        )
    grouped = families(chosen)
    curves = [
        *loss_curves(grouped, LOSS, note),
        *loss_curves(grouped, BEST_LOSS, note),
        *error_curves(grouped, tasks=tasks, modes=modes, resamples=resamples, note=note),
    ]
    _check_curves(curves, chosen, tasks, modes)
    if not any(curve.quantity == ERROR for curve in curves):
        note("no run has a finished probe of these tasks and modes: losses only")
    fits = _fit(curves, [axis for axis in AXES if axis in axes and axis != "recordings"], hold_out, resamples)
    of_recordings = [fit for fit in fits if fit.axis == "recordings"]
    correlated = scaling_correlations.correlations(of_recordings)
    about = {
        "command": list(command),
        "runs": [str(run.folder) for run in chosen],
        "device": ", ".join(sorted({run.device_kind for run in chosen if run.device_kind})) or None,
        **made_with(("ecg-jax", "jax", "numpy", "scipy", "matplotlib")),
    }
    results = plain(
        {
            "about": about,
            "level": 0.95,
            "resamples": resamples,
            "left_out": notes,
            "remarks": list(scaling_fits.remarks_on(of_recordings)),
            "published": {"exponents_of_the_loss": PUBLISHED, "source": PUBLISHED_IN},
            "fits": [scaling_fits.described(fit) for fit in fits],
            "correlations": [scaling_correlations.correlated(each) for each in correlated],
        }
    )
    figures = _draw(fits, correlated, grouped, chosen)
    content = (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
    write_figures(output, KIND, figures, about, {RESULT: content})
    return results


def _check_curves(curves: Sequence[Curve], runs: Sequence[StudyRun], tasks, modes) -> None:
    if not curves:
        raise UserError("no finished run has a validation loss or a finished probe; there is nothing to fit")
    # The lowest loss is drawn nowhere, see `_draw`.
    if max((curve.n_rungs for curve in curves if curve.quantity != BEST_LOSS), default=0) < 2:
        sizes = sorted({run.recordings for run in runs})
        raise UserError(
            f"no curve has runs of more than one size (numbers of recordings: {', '.join(map(str, sizes[:6]))}); a "
            "scaling study needs runs of the same settings on at least two, better five, sizes"
        )
    tested = {curve.task for curve in curves if curve.quantity == ERROR}
    known = {probe.task for run in runs for probe in run.probes}
    if unknown := [task for task in tasks if task not in known]:
        there = ", ".join(sorted(known)) or "none"
        raise UserError(f"no run has a finished probe of --tasks={','.join(unknown)}; there are {there}")
    if (tasks or modes) and not tested:
        raise UserError(f"no run has a finished probe of mode {', '.join(modes)} on its last checkpoint")


def _fit(curves: Sequence[Curve], axes: Sequence[str], hold_out: bool, resamples: int) -> list[Fitted]:
    settings = {"hold_out": hold_out, "resamples": resamples}
    first = [fit_curve(curve, "recordings", **settings) for curve in curves]
    # The lowest loss stands beside the last one over recordings; more of it would say the same again.
    others = [
        fit_curve(fit.curve, axis, over_recordings=fit, **settings)
        for axis in axes
        for fit in first
        if fit.curve.quantity != BEST_LOSS
    ]
    return first + others


def _draw(fits: Sequence[Fitted], correlated, grouped, runs: Sequence[StudyRun]) -> list[Figure]:
    """Pictures and tables, in the order of a reader."""
    looks = looks_of(list(dict.fromkeys(short_label(family) for family in grouped)))
    kinds = by_kind([fit for fit in fits if fit.curve.quantity != BEST_LOSS])
    means = {(mode, metric) for _, _, mode, metric, task, _ in kinds if task == MEAN}
    figures: list[Figure | None] = [training_figure(grouped)]
    for (axis, quantity, mode, metric, task, _), own in kinds.items():
        # Over other axes of the errors only the mean over tasks, where there is one. Windows in proportion to the
        # recordings would be the same picture again; operations are not, as they differ between backbones.
        single = quantity == ERROR and task != MEAN and (mode, metric) in means
        same = axis == "windows" and all(fit.remark for fit in own)
        if axis == "recordings" or not (single or same):
            figures.append(curves_figure(own, looks))
    figures.append(exponents_figure(fits))
    chosen = [each for each in correlated if each.task == MEAN or (each.mode, each.metric) not in means]
    figures += [correlation_figure(each) for each in chosen]
    figures += tables(fits, correlated, runs)
    return _named_apart([figure for figure in figures if figure is not None])


def _named_apart(figures: Sequence[Figure]) -> list[Figure]:
    """Figures with a number in the names that would be there again: means over other tasks, tasks spelt alike."""
    named: dict[str, Figure] = {}
    for figure in figures:
        name, again = figure.name, 2
        while name in named:
            name, again = f"{figure.name}_{again}", again + 1
        named[name] = replace(figure, name=name)
    return list(named.values())


def main(argv: list[str]) -> int:
    """`ecg-jax scaling`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax scaling",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--runs",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders of sweeps, runs and probes; several as --runs A B or --runs=A,B",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--x",
        default=",".join(AXES),
        metavar="AXES",
        help="axes to fit over beside recordings, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="of the probes (default: all)")
    parser.add_argument("--modes", metavar="MODE,...", help="of the probes (default: all)")
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="R",
        help="of the test patients, and simulated studies for losses (default: %(default)s)",
    )
    parser.add_argument(
        "--no-hold-out",
        action="store_true",
        help="leave out the prediction of the largest size from the others",
    )
    options = parser.parse_args(argv)
    folders = [part for each in options.runs for part in each.split(",") if part]
    lists: dict[str, list[str]] = {}
    for name, known in (("x", tuple(AXES)), ("tasks", ()), ("modes", _MODES)):
        given = getattr(options, name)
        lists[name] = [] if given is None else [part for part in given.split(",") if part]
        if given is not None and not lists[name]:
            raise UserError(f"--{name}={given} names nothing; leave --{name} out to take all")
        if unknown := [value for value in lists[name] if known and value not in known]:
            raise UserError(f"--{name}={','.join(unknown)} is not among {', '.join(known)}")
    if not 100 <= options.resamples <= MOST_RESAMPLES:
        wrong = "too few for an interval" if options.resamples < 100 else "more than memory and time allow"
        raise UserError(f"--resamples={options.resamples} is {wrong}; give 100 to {MOST_RESAMPLES}")
    results = scaling(
        folders,
        options.output,
        axes=lists["x"],
        tasks=lists["tasks"],
        modes=lists["modes"],
        resamples=options.resamples,
        hold_out=not options.no_hold_out,
        command=["ecg-jax", "scaling", *argv],
    )
    print(summary(results))
    print(f"  written to {options.output}")
    return 0


def summary(results: dict[str, Any]) -> str:
    """The fits over recordings in a line each, for the console."""
    lines = []
    means = {(fit["mode"], fit["metric"]) for fit in results["fits"] if fit["task"] == MEAN}
    for fit in results["fits"]:
        if fit["task"] not in ("", MEAN) and (fit["mode"], fit["metric"]) in means:
            continue
        if fit["axis"] != "recordings" or fit["quantity"] == BEST_LOSS:
            continue
        what = "validation loss" if fit["quantity"] == LOSS else f"error of {fit['task']}, {fit['mode']}"
        text = fit["verdict"]
        if fit["drawn_form"]:
            b = fit["fits"][fit["drawn_form"]]["b"]
            ends = "no interval" if b["low"] is None else f"{b['low']:.3g} to {b['high']:.3g}"
            text = f"b = {b['point']:.3g} ({ends}) by the {fit['drawn_form']}; {text}"
        lines.append(f"  {fit['curve']}, {what}: {text}")
    lines += [f"  note: {remark}" for remark in results["remarks"]]
    return "\n".join([f"{len(results['about']['runs'])} runs, 95 % intervals", *lines])
