"""The roofline of a device, measured: how fast it copies and how fast it multiplies matrices (Williams, Waterman and
Patterson 2009). No program takes less than its operations at that rate, or its traffic at that bandwidth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecg_jax.studies.timing import seconds_of, time_in_turns

#: Precision of a run -> precision of its matrix products (as `ecg_jax.pretrain` runs them).
MATMUL_PRECISION = {"float32": "highest", "bfloat16": "default"}

_LARGEST_MATRIX = 2**14  # rows
#: float32 numbers, 128 MiB and 1 GiB, of which a copy holds two arrays: more than the caches of most processors.
_SMALLEST_COPY, _LARGEST_COPY = 2**25, 2**28


class Roofline(NamedTuple):
    """What a device reaches at best."""

    copy_bytes_per_s: float
    """Bytes read and bytes written, together, of a copy of `copy_bytes`."""
    flops_per_s: dict[str, float]
    """Precision -> operations of a square matrix product, 2 for a multiply-add."""
    matrix_rows: dict[str, int]
    """Precision -> rows of the matrices it was measured with."""
    copy_bytes: int
    """Size of the array that was copied."""

    def seconds(self, *, flops: float, moved_bytes: float, precision: str) -> float:
        """The time that a program of so many operations and so much traffic takes at least."""
        return max(flops / self.flops_per_s[precision], moved_bytes / self.copy_bytes_per_s)

    def bound(self, *, flops: float, moved_bytes: float, precision: str) -> str:
        """Which of the two that time is made of: "compute" or "copy"."""
        compute = flops / self.flops_per_s[precision] >= moved_bytes / self.copy_bytes_per_s
        return "compute" if compute else "copy"


def measure_roofline(*, budget_s: float = 2.0, repeats: int = 5) -> Roofline:
    """The roofline of the first device: the best of `repeats` turns.

    Args:
        budget_s: about how long the measurement may take once its programs are compiled; sizes follow from it.
        repeats: turns of copy and products.
    """
    precisions = list(MATMUL_PRECISION)
    share = budget_s / (repeats + 1) / (len(precisions) + 1)
    work, rows = {}, {}
    for precision in precisions:
        rows[precision] = 256
        work[precision] = _product(rows[precision], precision)
        while rows[precision] < _LARGEST_MATRIX and _seconds(work[precision]) < share / 4:
            rows[precision] *= 2
            work[precision] = _product(rows[precision], precision)
    numbers = _SMALLEST_COPY
    work["copy"] = _copy(numbers)
    while numbers < _LARGEST_COPY and _seconds(work["copy"]) < share / 2:
        numbers *= 2
        work["copy"] = _copy(numbers)
    timings = time_in_turns(work, repeats=repeats, least_s=share / 2)
    return Roofline(
        copy_bytes_per_s=2 * 4 * numbers / timings["copy"].best,
        flops_per_s={name: 2 * rows[name] ** 3 / timings[name].best for name in precisions},
        matrix_rows=rows,
        copy_bytes=4 * numbers,
    )


def _seconds(run) -> float:
    jax.block_until_ready(run())
    return seconds_of(run)


def _product(rows: int, precision: str):
    """A function that multiplies two square matrices."""
    a = jnp.full((rows, rows), 0.5, precision)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=MATMUL_PRECISION[precision]))
    return lambda: multiply(a, a)


def _copy(numbers: int):
    """A function that reads one array and writes another of the same size.

    The result takes the place of the last one, so that no fresh memory is mapped. Adding one keeps it a program: a bare
    copy may be handed to the allocator or to one core.
    """
    source, target = jnp.zeros(numbers), [jnp.ones(numbers)]
    add = jax.jit(lambda source, target: source + 1, donate_argnums=1, keep_unused=True)

    def run():
        target[0] = add(source, target[0])
        return target[0]

    return run
