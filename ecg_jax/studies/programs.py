"""A compiled program with what its compiler says of it, and the errors of one that needs more memory than there is."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from ecg_jax.studies.roofline import MATMUL_PRECISION


class Program(NamedTuple):
    """A compiled program and what its compiler says about it, all figures of one call."""

    run: Callable[[], Any]
    """Calls it and returns what it computes, without waiting."""
    compile_s: float
    """Seconds of tracing and compiling; see `without_compilation_cache`."""
    flops: float | None
    """The compiler's count of operations; None where it makes none."""
    estimated_bytes: float | None
    """The compiler's estimate of traffic, every operation's operands and results; None where it makes none."""
    memory: dict[str, int]
    """Bytes: `arguments`, `outputs`, `aliased` (outputs that take the place of arguments), `temporary`."""

    @property
    def least_bytes(self) -> int:
        """A lower bound of traffic: every argument is read once and every output written once, even if everything
        between them stayed on the chip.
        """
        return self.memory["arguments"] + self.memory["outputs"]

    @property
    def peak_bytes(self) -> int:
        """Memory that is taken while it runs, as planned by the compiler."""
        m = self.memory
        return m["arguments"] + m["outputs"] + m["temporary"] - m["aliased"]


class DoesNotFit(Exception):
    """A program needs more memory than there is."""


def device_memory_bytes() -> float:
    """What programs can use: the first device's own limit, or of a computer without one four fifths of its memory."""
    if limits := jax.devices()[0].memory_stats():
        return limits["bytes_limit"]
    return 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compile_program(function, *arguments, precision: str) -> tuple[Callable, Program]:
    """Compiles a jitted function for its arguments.

    Args:
        function: from `jax.jit`.
        arguments: arrays, or shapes and dtypes.
        precision: "float32" or "bfloat16", of its matrix products as a run has them.

    Returns:
        The compiled function, and the `Program` whose `run` calls it with these arguments.

    Raises:
        DoesNotFit: the compiler plans for more memory than there is.
    """
    begin = time.perf_counter()
    with jax.default_matmul_precision(MATMUL_PRECISION[precision]), memory_errors():
        compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    program = Program(
        run=lambda: compiled(*arguments),
        compile_s=seconds,
        flops=cost.get("flops"),
        estimated_bytes=cost.get("bytes accessed"),
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    )
    if program.peak_bytes > (limit := device_memory_bytes()):
        raise DoesNotFit(f"needs {program.peak_bytes / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB are there")
    return compiled, program


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Programs are compiled, not read from JAX's persistent cache, so that their compile time is one."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once, when it compiles for the first time
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the refusal of the device, or of the host, into `DoesNotFit`."""
    try:
        yield
    except MemoryError as error:
        raise DoesNotFit("the host is out of memory") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit("the device is out of memory") from error
