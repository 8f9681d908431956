"""What pretraining costs on this device: of each backbone and objective, operations, traffic, memory and speed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from ecg_jax.studies import flops
from ecg_jax.studies.efficiency_programs import (
    build,
    encoder_program,
    parameter_count,
    step_forward_flops,
    step_program,
)
from ecg_jax.studies.programs import DoesNotFit, Program, memory_errors
from ecg_jax.studies.roofline import Roofline
from ecg_jax.studies.timing import Timing, time_in_turns

#: Programs of a row, in the order of its columns. `forward` is in evaluation mode, the other two in train mode.
PROGRAMS = ("forward", "forward_backward", "step")

_WARM_UP = 2  # the first step of HuBERT++ chooses its prototypes


class Cell(NamedTuple):
    """What a row of the table is about."""

    backbone: str
    objective: str
    precision: str
    batch: int

    def __str__(self) -> str:
        return f"{self.backbone} {self.objective} {self.precision} batch {self.batch}"


def measure(
    configs: dict[Cell, ConfigDict],
    roofline: Roofline,
    *,
    repeats: int,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each cell.

    All programs are compiled and run first and then take turns, so that rows can be compared; all their arrays are in
    memory then, and a cell whose programs do not run beside the others has failed too.

    Args:
        configs: cell -> config of its run.
        roofline: of this device.
        repeats: turns.
        workers: programs that are compiled at the same time; with more than one, `compile_s` and `device_peak_bytes`
            are not those of a program alone.
        say: told about the progress.

    Returns:
        Rows: the fields of the cell; `parameters` and `encoder_parameters` (trainable); `device_peak_bytes` of the
        step as the device saw it (None on a CPU, or where an earlier cell took more); `step_over_encoder`, the time of
        a step over that of the encoder's forward and backward pass; `programs`, for each of `PROGRAMS` the figures
        of `_figures`; and `flops_per_window` and `compiler_flops_per_window`, by formula and as compiled, of the
        `encoder_` and the `step_` both `forward` and `backward`. A cell that does not fit into memory has `failed`
        instead.
    """
    rows, programs = _compile_all(configs, workers, say)
    crowded = _drop_what_does_not_run(programs)
    for cell, config in configs.items():
        if "failed" not in rows[cell] and crowded.intersection(_keys(config).values()):
            rows[cell] = {"failed": "out of memory beside the other rows"}
            say(f"{cell}: {rows[cell]['failed']}")
    say(f"{len(programs)} programs take turns, {repeats} times")
    work = {key: program.run for key, program in programs.items()}
    timings = time_in_turns(work, repeats=repeats, warm_up=0)
    for cell, config in configs.items():
        if "failed" not in rows[cell]:
            keys = _keys(config)
            costs = {
                "step": flops.training_flops(config),
                "forward_backward": flops.encoder_cost(config).total,
            }
            costs["forward"] = flops.encoder_cost(config).forward
            rows[cell] |= _passes(config, {name: programs[keys[name]] for name in PROGRAMS}, rows[cell])
            rows[cell]["programs"] = {
                name: _figures(config, costs[name], programs[keys[name]], timings[keys[name]], roofline)
                for name in PROGRAMS
            }
            seconds = {name: timings[keys[name]].median for name in PROGRAMS}
            rows[cell]["step_over_encoder"] = seconds["step"] / seconds["forward_backward"]
    return [cell._asdict() | row for cell, row in rows.items()]


def _compile_all(
    configs: dict[Cell, ConfigDict], workers: int, say: Callable[[str], None]
) -> tuple[dict[Cell, dict[str, Any]], dict[tuple, Program]]:
    """The first fields of each row, and all programs, compiled and run."""
    families: dict[tuple, list[Cell]] = {}  # cells that share programs, which are compiled once
    for cell, config in configs.items():
        families.setdefault(_keys(config)["forward"], []).append(cell)
    rows: dict[Cell, dict[str, Any]] = {}
    one_at_a_time = threading.Lock()

    def compile_family(cells: list[Cell]) -> dict[tuple, Program]:
        programs: dict[tuple, Program] = {}
        for cell in cells:
            begin = time.perf_counter()
            try:
                with memory_errors():
                    rows[cell], compiled = _compile(configs[cell], programs, one_at_a_time)
            except DoesNotFit as error:
                rows[cell] = {"failed": "out of memory"}
                say(f"{cell}: {error}")
                continue
            programs |= compiled
            say(f"{cell}: compiled and run in {time.perf_counter() - begin:.1f} s")
        return programs

    programs: dict[tuple, Program] = {}
    if workers == 1:
        for family in families.values():
            programs |= compile_family(family)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for compiled in pool.map(compile_family, sorted(families.values(), key=len, reverse=True)):
                programs |= compiled
    return {cell: rows[cell] for cell in configs}, programs


def _passes(config: ConfigDict, programs: dict[str, Program], row: dict[str, Any]) -> dict[str, Any]:
    """Operations of one window, forward and backward, of the encoder and of the step. As compiled, the backward pass is
    what a program has beyond its forward pass: of the encoder what train mode adds too, of the step the update too.
    """
    encoder, parts = flops.encoder_cost(config), flops.training_parts(config).values()
    batch = config.batch_size

    def of_window(total: float | None, less: float | None = 0.0) -> float | None:
        return None if total is None or less is None else (total - less) / batch

    forward, both, step = (programs[name].flops for name in PROGRAMS)
    loss = row.pop("step_forward_compiler_flops")
    return {
        "flops_per_window": {
            "encoder_forward": encoder.forward,
            "encoder_backward": encoder.backward,
            "step_forward": sum(part.forward for part in parts),
            "step_backward": sum(part.backward for part in parts),
        },
        "compiler_flops_per_window": {
            "encoder_forward": of_window(forward),
            "encoder_backward": of_window(both, forward),
            "step_forward": of_window(loss),
            "step_backward": of_window(step, loss),
        },
    }


def _drop_what_does_not_run(programs: dict[tuple, Program]) -> set[tuple]:
    """Runs each program once, now that the arrays of all are in memory; those that fail are taken out and returned."""
    failed = set()
    for key in list(programs):
        try:
            with memory_errors():
                jax.block_until_ready(programs[key].run())
        except DoesNotFit:
            failed.add(key)
            del programs[key]
    return failed


def _keys(config: ConfigDict) -> dict[str, tuple]:
    """Program -> what tells it apart: the encoder is the same for all objectives that leave its config alone."""
    encoder = (config.model.to_json(), config.precision, config.batch_size, config.data.window_s)
    return {name: (name, *encoder, config.objective.name if name == "step" else "") for name in PROGRAMS}


def _compile(
    config: ConfigDict, known: dict, one_at_a_time: threading.Lock
) -> tuple[dict[str, Any], dict[tuple, Program]]:
    """The first fields of a row, and those of its programs that are not known yet; each has been run.

    Programs that run at the same time on a CPU with few threads can block each other: only one does, `one_at_a_time`,
    while other threads compile.
    """
    before, keys = jax.devices()[0].memory_stats(), _keys(config)
    with one_at_a_time:
        model = build(config)
        variables = model.encoder_variables()
        jax.block_until_ready((model.state, variables))
    row = {
        "parameters": parameter_count(model.state.params),
        "encoder_parameters": parameter_count(model.state.params["encoder"]),
        "step_forward_compiler_flops": step_forward_flops(model),
    }
    programs = {keys["step"]: step_program(model)}
    with one_at_a_time:
        for _ in range(_WARM_UP):
            jax.block_until_ready(programs[keys["step"]].run())
    after = jax.devices()[0].memory_stats()
    rose = after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]
    row["device_peak_bytes"] = after["peak_bytes_in_use"] - before["bytes_in_use"] if rose else None
    for name, gradient in (("forward", False), ("forward_backward", True)):
        if keys[name] not in known:
            programs[keys[name]] = encoder_program(config, variables, gradient=gradient)
            with one_at_a_time:
                jax.block_until_ready(programs[keys[name]].run())
    return row, programs


def _figures(
    config: ConfigDict, flops_per_window: int, program: Program, timing: Timing, roofline: Roofline
) -> dict[str, Any]:
    """One program of a row. Speeds are windows per second: the median over turns, and its quartiles. The roofline takes
    the operations by formula and the least traffic; `fraction_of_copy` is the share of the time in which the device
    could copy as much as the compiler estimates.
    """
    batch, precision = config.batch_size, config.precision
    least = {"flops": flops_per_window * batch, "moved_bytes": program.least_bytes, "precision": precision}
    estimated = program.estimated_bytes
    return {
        "flops_per_window": flops_per_window,
        "compiler_flops_per_window": program.flops and program.flops / batch,
        "least_bytes": program.least_bytes,
        "compiler_bytes": estimated,
        "peak_bytes": program.peak_bytes,
        "memory": program.memory,
        "compile_s": program.compile_s,
        "windows_per_s": batch / timing.median,
        "windows_per_s_low": batch / timing.high,
        "windows_per_s_high": batch / timing.low,
        "flops_per_s": flops_per_window * batch / timing.median,
        "bound": roofline.bound(**least),
        "fraction_of_roofline": roofline.seconds(**least) / timing.median,
        "fraction_of_copy": estimated and estimated / roofline.copy_bytes_per_s / timing.median,
    }
