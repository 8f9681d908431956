"""`ecg-jax efficiency`: what backbones and objectives cost on this device, beside what the device can do at most."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from ml_collections import ConfigDict

import ecg_jax
from ecg_jax.config_checks import MOST_SAMPLES, check_config
from ecg_jax.config_flags import load_config, override, split_overrides, with_argument
from ecg_jax.errors import UserError, closest
from ecg_jax.models.encoder import BACKBONES
from ecg_jax.probe_provenance import made_with
from ecg_jax.run_setup import CONFIGS, DTYPES, flatten
from ecg_jax.studies import (
    cost_scaling,
    efficiency_figures,
    efficiency_report,
    flops,
    published_costs,
    tune_conv,
)
from ecg_jax.studies.cost_scaling import Point
from ecg_jax.studies.efficiency import Cell, measure
from ecg_jax.studies.efficiency_programs import encoder_parameters
from ecg_jax.studies.error_cost import error_cost_figures
from ecg_jax.studies.figure_folder import open_folder, write_figures
from ecg_jax.studies.programs import without_compilation_cache
from ecg_jax.studies.roofline import measure_roofline

DESCRIPTION = """\
Measures, for every backbone and objective, parameters, operations, traffic, memory, compile time and windows per second
on the first device, and what that is of the device's own roofline, which is measured first. Puts the published figures
of parameters and operations beside ours, and with --results the error of probed runs over what they cost. Writes
efficiency.json, efficiency.md and every figure as PNG, SVG and CSV (figures.json) into --output.

  ecg-jax efficiency --output=runs/efficiency
  ecg-jax efficiency --output=runs/s4 --backbones=s4 --objectives=cpc,jepa --precisions=float32,bfloat16 --batch=64,256
  ecg-jax efficiency --quick --output=runs/efficiency --results=runs/study
  ecg-jax efficiency --scaling --output=runs/efficiency_scaling
  ecg-jax efficiency --tune-conv --output=ecg_jax/models/conv_table.json
"""
EPILOG = """\
config:
  --config.a.b=VALUE    changes a field in every config that declares it, e.g. --config.model.conv=fft
"""

#: What --quick changes in the configs that declare it: a run that shows that everything works, not how fast it is.
QUICK = {
    "model.width": "64",
    "model.layers": "2",
    "model.ff_width": "256",
    "model.filters": "(16,32,64)",
    "model.blocks": "(1,1,2)",  # data2vec and DinoSR read two layers as wide as the tokens
}

#: Fields that are no overrides, because several values of them make several rows.
_OPTIONS = {
    "precision": "--precisions",
    "batch_size": "--batch",
    "data.window_s": "--window",
    "model.backbone": "--backbones",
    "objective.name": "--objectives",
}

#: Of the figures: what the command is called, and which of its two studies they are of.
KIND, TABLE, SCALING = "efficiency", "table", "scaling"

_QUICK_BATCH, _BATCH, _WINDOW = "8", "64", 2.5

#: Seconds of a window for --scaling.
WINDOWS_S = (2.5, 5.0, 10.0, 20.0)
#: The window's own points have a fraction of the batch: a window of 20 s is eight times as long as one of 2.5 s.
WINDOW_SHARE = 16


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Options and (field, value) of each `--config.a.b=value`.

    Raises:
        UserError: a value that cannot be.
    """
    parser = argparse.ArgumentParser(
        prog="ecg-jax efficiency",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="folder to write; with --tune-conv the table to add to",
    )
    lists = {"backbones": tuple(BACKBONES), "objectives": tuple(CONFIGS), "precisions": tuple(DTYPES)}
    for name, known in lists.items():
        default = "both, float32 with --quick or --scaling" if name == "precisions" else "all"
        parser.add_argument(f"--{name}", metavar="A,B", help=f"of {', '.join(known)} (default: {default})")
    parser.add_argument(
        "--batch", metavar="N,M", help=f"windows in a batch; several make rows (default: {_BATCH})"
    )
    parser.add_argument("--window", type=float, metavar="S", help=f"seconds in a window (default: {_WINDOW})")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of all programs (default: 5)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="narrow and shallow models in float32, small batch, two turns: to try it out",
    )
    parser.add_argument(
        "--results",
        metavar="DIR,...",
        help="folders of sweeps, runs or probes: draws their downstream errors over what the runs cost",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--scaling",
        action="store_true",
        help="cost of the encoder over window length and batch, with exponents; of one objective, one precision, and "
        "batches up to --batch",
    )
    kind.add_argument(
        "--tune-conv",
        action="store_true",
        help="time the algorithms of the S4 convolution for model.conv=auto",
    )
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    given = [name for name in (*lists, "batch", "window") if getattr(options, name) is not None]
    if options.tune_conv and (given or overrides):
        name = given[0] if given else f"config.{overrides[0][0]}"
        raise UserError(
            f"--{name} says nothing with --tune-conv, which takes --output, --quick and --repeats"
        )
    defaults = {**lists, "precisions": ("float32",) if options.quick else tuple(DTYPES)}
    if options.results is not None and (options.scaling or options.tune_conv):
        other = "--scaling" if options.scaling else "--tune-conv"
        raise UserError(f"--results says nothing with {other}; it belongs to the table")
    if options.results is not None and not options.results.strip(","):
        raise UserError("--results names no folder; name those of sweeps, runs or probes, or leave it out")
    options.results = [part for part in (options.results or "").split(",") if part]
    for name, known in lists.items():
        text = getattr(options, name)
        names = defaults[name] if text is None else _names(f"--{name}", text, known)
        setattr(options, name, names)
    default = _QUICK_BATCH if options.quick else _BATCH
    options.batch = _batches(default if options.batch is None else options.batch)
    if options.scaling:
        for name in ("objectives", "precisions", "batch"):
            if name in given and len(getattr(options, name)) > 1:
                raise UserError(f"--{name} has several values, --scaling takes one")
        options.objectives, options.precisions = options.objectives[:1], options.precisions[:1]
    options.window = _WINDOW if options.window is None else options.window
    if not (math.isfinite(options.window) and options.window > 0):
        raise UserError(f"--window={options.window:g} must be a positive number of seconds")
    options.repeats = (2 if options.quick else 5) if options.repeats is None else options.repeats
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats} must be at least 1")
    return options, overrides


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in known:
            raise UserError(f"{option}={text}: {name!r} is unknown{closest(name, known)}")
    if not names:
        raise UserError(f"{option} is empty; known: {', '.join(known)}")
    return names


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise UserError(f"--batch={text} must be a whole number above 0, or several with commas")
    return batches


def run_config(
    backbone: str,
    objective: str,
    *,
    precision: str,
    batch: int,
    window_s: float,
    quick: bool,
    overrides: Sequence[tuple[str, str]],
) -> ConfigDict:
    """The shipped config of an objective, for a backbone and what the command line says.

    S4 output vectors are length-corrected for the window that is measured, as in a run of that window.

    Raises:
        UserError: no run could have this config.
    """
    config = load_config(with_argument(CONFIGS[objective], backbone=backbone))
    if window_s * config.data.rate_hz > MOST_SAMPLES:
        raise UserError(
            f"--window={window_s:g} is too long: at {config.data.rate_hz:g} Hz it has more than {MOST_SAMPLES} samples"
        )
    tokens = flops.tokens_of_window(window_s, config.data.rate_hz)
    fields = {
        "precision": precision,
        "batch_size": batch,
        "data.window_s": window_s,
        "model.l_max": max(tokens, 1),
    }
    declared = flatten(config.to_dict())
    for path, value in [*fields.items(), *(QUICK.items() if quick else ()), *overrides]:
        if path in _OPTIONS and (path, value) in overrides:
            raise UserError(f"--config.{path} has an option of its own; use {_OPTIONS[path]}")
        if path in declared:
            override(config, path, str(value))
    if objective == "hubert":
        config.data.targets = "random"  # of which only the number counts
    if config.accumulate > 0 and batch % config.accumulate:
        raise UserError(
            f"a batch of {batch} windows does not divide into the {config.accumulate} parts of config.accumulate"
        )
    # A run spreads its batch over all devices, the measurement uses one.
    parts = jax.device_count() * max(1, config.accumulate)
    config.batch_size = -(-batch // parts) * parts
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{objective} on {backbone}: {error}") from error
    config.batch_size = batch
    return config


def _check_overrides(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Refuses a field that no config declares, with what `override` says about the first of them."""
    pairs = [(objective, backbone) for objective in options.objectives for backbone in options.backbones]
    shipped = [
        load_config(with_argument(CONFIGS[objective], backbone=backbone)) for objective, backbone in pairs
    ]
    for path, value in overrides:
        if not any(path in flatten(config.to_dict()) for config in shipped):
            override(shipped[0], path, value)


def provenance(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Where figures come from: device, versions and options. No date and no name of a machine."""
    device = jax.devices()[0]
    versions = {"ecg_jax": ecg_jax, "jax": jax, "jaxlib": jaxlib, "flax": flax}
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "processors": len(os.sched_getaffinity(0)),
        "versions": {name: module.__version__ for name, module in versions.items()},
        "precisions": options.precisions,
        "batches": options.batch,
        "window_s": options.window,
        "repeats": options.repeats,
        "quick": options.quick,
        "overrides": dict(overrides),
    }


def _made_of(options: argparse.Namespace, study: str, runs: Sequence[str]) -> dict[str, Any]:
    """What stands in the index of the figures."""
    made = made_with(["ecg_jax", "jax", "jaxlib", "flax", "numpy", "matplotlib"])
    device = jax.devices()[0].device_kind
    return {
        "command": ["ecg-jax", "efficiency", *options.argv],
        "study": study,
        "runs": list(runs),
        "device": device,
        **made,
    }


def _encoder_parameters(backbone: str) -> int:
    return encoder_parameters(published_costs.shipped_config(backbone))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _say(line: str) -> None:
    print(line, flush=True)


def table(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Measures every backbone with every objective and writes table and picture.

    Raises:
        UserError: a config that no run could have, or the folder cannot be written.
    """
    cells = [
        Cell(backbone, objective, precision, batch)
        for precision in options.precisions
        for batch in options.batch
        for backbone in options.backbones
        for objective in options.objectives
    ]
    fields = {"window_s": options.window, "quick": options.quick, "overrides": overrides}
    configs = {
        cell: run_config(cell.backbone, cell.objective, precision=cell.precision, batch=cell.batch, **fields)
        for cell in cells
    }
    folder = open_folder(options.output, KIND, TABLE)
    # Read before anything is measured: a folder that holds no results costs nothing then.
    errors, runs = error_cost_figures(options.results, _say) if options.results else ([], [])
    about = provenance(options, overrides)
    roofline = measure_roofline(budget_s=0.1 if options.quick else 2.0)
    _say(efficiency_report.describe(roofline, about["device_kind"]))
    # Compile times are of one program at a time, but with --quick, where they tell nothing.
    workers = min(4, about["processors"]) if options.quick and about["platform"] == "cpu" else 1
    rows = measure(configs, roofline, repeats=options.repeats, workers=workers, say=_say)
    compared = published_costs.compare({name: _encoder_parameters(name) for name in options.backbones})
    figures = [
        *efficiency_figures.table_figures(rows, roofline, about),
        efficiency_figures.published_figure(compared),
        *errors,
    ]
    files = {
        "efficiency.json": _json({**about, "roofline": roofline._asdict(), "rows": rows}),
        "efficiency.md": efficiency_report.report(rows, compared, roofline, about).encode(),
    }
    write_figures(folder, KIND, figures, _made_of(options, TABLE, runs), files)
    for head, cells, text_columns in (
        (efficiency_report.COST_HEAD, efficiency_report.cost_cells(rows), 3),
        (efficiency_report.MEMORY_HEAD, efficiency_report.memory_cells(rows), 3),
        (efficiency_report.SPEED_HEAD, efficiency_report.speed_cells(rows), 3),
        (efficiency_report.PUBLISHED_HEAD, efficiency_report.published_cells(compared), 2),
    ):
        print(f"\n{efficiency_report.aligned(head, cells, text_columns)}")
    print(f"\n{efficiency_report.NOTES}\n{efficiency_report.PUBLISHED_NOTES}")
    print(f"\nwritten: {folder}/efficiency.json, efficiency.md, figures.json and the files of each figure")


def scaling(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Measures the encoder of each backbone over window and batch and writes exponents and picture.

    Raises:
        UserError: a config that no run could have, or the folder cannot be written.
    """
    (largest,) = options.batch
    fixed = max(1, largest // WINDOW_SHARE)
    batches = [largest // share for share in (16, 8, 4, 2, 1) if largest >= share]
    places = [("window", window, window, fixed) for window in WINDOWS_S]
    places += [("batch", batch, options.window, batch) for batch in batches]
    configs = {}
    for backbone in options.backbones:
        for axis, x, window, batch in places:
            configs[Point(backbone, axis, x)] = run_config(
                backbone,
                options.objectives[0],
                precision=options.precisions[0],
                batch=batch,
                window_s=window,
                quick=options.quick,
                overrides=overrides,
            )
    folder = open_folder(options.output, KIND, SCALING)
    rows = cost_scaling.measure_scaling(configs, repeats=options.repeats, say=_say)
    fits = cost_scaling.fit_all(rows)
    about = provenance(options, overrides) | {
        "batches": batches,
        "windows_at_each_length": fixed,
        "objective": options.objectives[0],
    }
    files = {"scaling.json": _json({**about, "rows": rows, "fits": fits})}
    figure = efficiency_figures.scaling_figure(rows, fits, about)
    write_figures(folder, KIND, [figure], _made_of(options, SCALING, []), files)
    print(f"\n{efficiency_report.aligned(efficiency_report.FIT_HEAD, efficiency_report.fit_cells(fits))}")
    print(f"\nwritten: {folder}/scaling.json, .png, .svg, .csv, figures.json")


def main(argv: list[str]) -> int:
    """Entry point of `ecg-jax efficiency`."""
    options, overrides = parse_arguments(argv)
    options.argv = list(argv)
    # What --quick compiled is kept for its next run: it does not tell how long that takes.
    with contextlib.nullcontext() if options.quick else without_compilation_cache():
        if options.tune_conv:
            tune_conv.tune(Path(options.output), quick=options.quick, repeats=options.repeats, say=_say)
            return 0
        _check_overrides(options, overrides)
        (scaling if options.scaling else table)(options, overrides)
    return 0
