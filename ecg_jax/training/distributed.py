"""Several processes as one run: joining them, and being told to stop."""

import os
import signal
from types import TracebackType

import jax
import numpy as np

from ecg_jax import cpu
from ecg_jax.errors import UserError


def initialise(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to its run; call it before any device is used.

    Either all three arguments are given (as `launch/local.py` does), or none: then a run under `srun` with
    more than one task joins through the SLURM variables, and anything else is a run of one process.

    Args:
        coordinator: "host:port" of process 0.
        num_processes: how many there are.
        process_id: which one this is.

    Raises:
        UserError: only some of the three are given.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if all(given):
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id={process_id} is not below --num-processes={num_processes}")
        jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)
        _forget_own_cache()
    elif any(given):
        raise UserError(
            "--coordinator, --num-processes and --process-id belong together; give all three or none"
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
        _forget_own_cache()


def _forget_own_cache() -> None:
    """Compiled programs of several processes are kept only where the user says: JAX wants one folder that all of them
    share, and a home directory may belong to one host.
    """
    if cpu.own_cache:
        jax.config.update("jax_enable_compilation_cache", False)


class StopSignal:
    """Remembers a SIGTERM or SIGINT instead of dying of it, so that the loop can save first. A second one
    kills.

    Use as a context manager; read `received` between steps. Inactive, it changes nothing: in a run of several
    processes JAX itself watches for SIGTERM, so that all of them stop at the same step.
    """

    def __init__(self, *, active: bool):
        self._active = active
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT) if self._active else ():
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._previous[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def first_says(answer: bool) -> bool:
    """The answer of process 0, on every process: each judges by its own floating point, and they must not part."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
