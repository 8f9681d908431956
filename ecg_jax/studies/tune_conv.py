"""Times the algorithms of the S4 convolution on this device, for the table from which `model.conv="auto"` chooses."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.models import hippo
from ecg_jax.models.convolution import candidates, convolve
from ecg_jax.models.s4 import kernel_bases
from ecg_jax.studies.programs import DoesNotFit, compile_program, memory_errors
from ecg_jax.studies.timing import seconds_of, time_in_turns

LENGTHS = (75, 150, 300, 600, 1200, 2400, 5000)
WIDTHS = (64, 512)
STATE, HEAD_STATE = 8, 64
HEAD_LENGTH = 300
DTYPES = ("float32", "bfloat16")

#: Tokens in a batch: 64 windows of 2.5 s on a CPU, enough to fill an accelerator elsewhere.
_TOKENS = {"cpu": 19_200}
_MOST_TOKENS = 153_600
_HOPELESS = 3.0


class Case(NamedTuple):
    """A row of the table, but for its result; the fields of `convolution.choose`."""

    dtype: str
    channels: int
    width: int
    state: int
    length: int


def all_cases() -> list[Case]:
    """Backbone layers at every length, and the heads of 64 states at 2.5 s."""
    backbone = itertools.product(DTYPES, (1, 2), WIDTHS, (STATE,), LENGTHS)
    heads = itertools.product(DTYPES, (1, 2), WIDTHS, (HEAD_STATE,), (HEAD_LENGTH,))
    return [Case(*case) for case in (*backbone, *heads)]


def make_inputs(rng: np.random.Generator, *, batch: int, length: int, width: int, state: int, channels: int):
    """Random tokens and output vectors, and the state matrices of a freshly made layer (spec §3.2).

    Returns:
        u [H, B, L], C [c, H, N/2, 2], the layer's basis, and weights [H, B, L] for a loss; float32.
    """
    pairs = {
        name: np.broadcast_to(np.stack([value.real, value.imag], -1), (width, state // 2, 2))
        for name, value in zip(("Lambda", "P", "B"), hippo.dplr_hippo(state), strict=True)
    }
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), width)
    basis = kernel_bases({**pairs, "log_dt": log_dt}, length=length, l_max=length)
    shapes = ((width, batch, length), (channels, width, state // 2, 2), (width, batch, length))
    u, C, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return u, C, basis, weights


def time_case(case: Case, *, tokens: int, repeats: int) -> dict[str, float]:
    """Algorithm -> seconds of its forward and backward pass (gradients of u and C), median of turns; those that do not
    fit into memory are left out, and one that takes `_HOPELESS` times as long as another is timed once.

    Raises:
        DoesNotFit: "fft" itself, with which all others are compared.
    """
    rng = np.random.default_rng(0)
    u, C, basis, weights = make_inputs(
        rng,
        batch=max(1, tokens // case.length),
        length=case.length,
        width=case.width,
        state=case.state,
        channels=case.channels,
    )
    inputs = (
        jnp.asarray(u, case.dtype),
        jnp.asarray(C),
        jax.tree.map(jnp.asarray, basis),
        jnp.asarray(weights),
    )
    work, once = {}, {}
    for algorithm in candidates(case.length, case.state):

        def loss(u, C, basis, weights, algorithm=algorithm):
            return jnp.vdot(convolve(u, C, basis, algorithm=algorithm), weights)

        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        try:
            program = compile_program(both, *inputs, precision=case.dtype)[1]
            with memory_errors():
                jax.block_until_ready(program.run())
                once[algorithm] = seconds_of(program.run)
        except DoesNotFit:
            if algorithm == "fft":
                raise
            continue
        work[algorithm] = program.run
    limit = _HOPELESS * min(once.values())
    work = {name: run for name, run in work.items() if once[name] <= limit or name == "fft"}
    return once | {
        name: timing.median for name, timing in time_in_turns(work, repeats=repeats, least_s=0.02).items()
    }


def row_of(case: Case, seconds: dict[str, float], device_kind: str) -> dict[str, Any]:
    """The row of a case: the fastest algorithm, and how many times as fast as "fft" each one is."""
    relative = {name: round(seconds["fft"] / value, 3) for name, value in seconds.items()}
    best = min(seconds, key=seconds.get)
    return {"device_kind": device_kind, **case._asdict(), "algorithm": best, "relative": relative}


def read_table(path: Path) -> dict[str, Any]:
    """A table that is there, or an empty one.

    Raises:
        UserError: the file is no such table.
    """
    if not path.exists():
        return {"provenance": {}, "rows": []}
    try:
        table = json.loads(path.read_text())
        return {"provenance": table.get("provenance") or {}, "rows": [dict(row) for row in table["rows"]]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--output={path} is there and is no table of convolutions; name another file"
        ) from error


def merged(
    table: dict[str, Any], rows: list[dict[str, Any]], kind: str, about: dict[str, Any]
) -> dict[str, Any]:
    """The table with these rows of a device kind in the place of those for the same cases."""

    def key(row):
        return (row["device_kind"], *(row[field] for field in Case._fields))

    new = {key(row): row for row in rows}
    kept = [row for row in table["rows"] if key(row) not in new]
    return {
        "provenance": {**table["provenance"], kind: about},
        "rows": sorted([*kept, *rows], key=lambda row: tuple(map(str, key(row)[:3])) + key(row)[3:]),
    }


def tune(path: Path, *, quick: bool, repeats: int, say: Callable[[str], None]) -> None:
    """Times every case on the first device and merges the rows into a table.

    Args:
        path: of the table; rows of other devices in it stay.
        quick: two small cases only, to see that it works.
        repeats: turns of the algorithms of a case.
        say: told each result.

    Raises:
        UserError: the file is no table or cannot be written.
    """
    table = read_table(path)
    write_atomic(path, _text(table))  # says now, not after an hour, if that cannot be done
    device = jax.devices()[0]
    cases = [Case("float32", c, 8, STATE, 75) for c in (1, 2)] if quick else all_cases()
    tokens = 600 if quick else _TOKENS.get(device.platform, _MOST_TOKENS)
    about = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "what": "speed relative to fft, forward and backward pass, median of turns",
        "tokens": tokens,
        "repeats": repeats,
    }
    for number, case in enumerate(cases, start=1):
        what = f"{case.length} tokens, width {case.width}, {case.state} states, {case.dtype}"
        what += ", bidirectional" if case.channels == 2 else ", causal"
        try:
            with memory_errors():
                seconds = time_case(case, tokens=tokens, repeats=repeats)
        except DoesNotFit as error:
            say(f"{number}/{len(cases)} {what}: left out, {error}")
            continue
        row = row_of(case, seconds, device.device_kind)
        table = merged(table, [row], device.device_kind, about)
        write_atomic(path, _text(table))
        speeds = ", ".join(f"{name} {value:.2f}" for name, value in row["relative"].items())
        say(f"{number}/{len(cases)} {what}: {speeds}")
    say(f"written: {path}")


def _text(table: dict[str, Any]) -> bytes:
    """JSON with one row in a line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    about = json.dumps(table["provenance"], indent=1)
    return f'{{"provenance": {about},\n "rows": [\n{rows}\n ]}}\n'.encode()
