"""How time and memory of an encoder's forward and backward pass grow with the window and with the batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ecg_jax.studies.efficiency_programs import build, encoder_program
from ecg_jax.studies.programs import DoesNotFit, Program, memory_errors
from ecg_jax.studies.timing import time_in_turns


class Point(NamedTuple):
    """Where a backbone is measured: `axis` is "window" (x in seconds) or "batch" (x in windows)."""

    backbone: str
    axis: str
    x: float


class Fit(NamedTuple):
    """y = a x^exponent."""

    exponent: float
    standard_error: float | None
    """Of the exponent, from the scatter about the line; None for two points."""
    last: float
    """The slope between the two largest x, where a cost that is still bending has got to."""


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of log y over log x.

    Args:
        x, y: at least two positive points with different x, in order of x.
    """
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    exponent = float(centred @ log_y / (centred @ centred))
    error = None
    if len(log_x) > 2:
        residual = log_y - log_y.mean() - exponent * centred
        error = float(np.sqrt(residual @ residual / (len(log_x) - 2) / (centred @ centred)))
    return Fit(exponent, error, float((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])))


def measure_scaling(
    configs: dict[Point, ConfigDict], *, repeats: int, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """One row for each point; programs take turns.

    Args:
        configs: point -> config with its window and `batch_size`.
        repeats: turns.
        say: told about the progress.

    Returns:
        Rows: the fields of the point, `batch`, `window_s`, `seconds` (median; `seconds_low` and `seconds_high` are the
        quartiles), and `temporary_bytes`: what the program takes beside its arguments and results, so without
        parameters. A point that does not fit into memory has `failed` instead of the last ones.
    """
    programs: dict[tuple, Program] = {}
    variables, failed = {}, set()

    def key(config):
        return (config.model.backbone, config.data.window_s, config.batch_size)

    for point, config in configs.items():
        encoder = key(config)[:2]
        if key(config) in programs or key(config) in failed:
            continue
        try:
            with memory_errors():
                if encoder not in variables:
                    variables[encoder] = build(config).encoder_variables()
                program = encoder_program(config, variables[encoder], gradient=True)
                jax.block_until_ready(program.run())
        except DoesNotFit as error:
            failed.add(key(config))
            say(f"{point.backbone} {point.axis} {point.x:g}: {error}")
            continue
        programs[key(config)] = program
        say(f"{point.backbone} {point.axis} {point.x:g}: compiled in {program.compile_s:.1f} s")
    timings = time_in_turns({name: program.run for name, program in programs.items()}, repeats=repeats)
    rows = []
    for point, config in configs.items():
        row = point._asdict() | {"batch": config.batch_size, "window_s": config.data.window_s}
        if key(config) in failed:
            rows.append(row | {"failed": "out of memory"})
            continue
        timing, memory = timings[key(config)], programs[key(config)].memory
        rows.append(
            row
            | {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high}
            | {"temporary_bytes": memory["temporary"]}
        )
    return rows


def points_of(rows: Sequence[dict[str, Any]], backbone: str, axis: str, field: str) -> np.ndarray:
    """[points, 2] of x and a field, in order of x, without the points that failed."""
    pairs = [
        (row["x"], row[field])
        for row in rows
        if (row["backbone"], row["axis"]) == (backbone, axis) and field in row
    ]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def fit_all(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponent of every backbone, axis and cost with two points at least: the fields of `Fit`, and which it is."""
    fits = []
    for backbone, axis in dict.fromkeys((row["backbone"], row["axis"]) for row in rows):
        for cost, field in (("time", "seconds"), ("memory", "temporary_bytes")):
            points = points_of(rows, backbone, axis, field)
            if len(points) >= 2:
                fit = fit_exponent(points[:, 0], points[:, 1])
                fits.append({"backbone": backbone, "axis": axis, "cost": cost, **fit._asdict()})
    return fits
