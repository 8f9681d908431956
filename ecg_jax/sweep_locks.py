"""Locks of a sweep's folder, for processes of one host or many; its file system must keep them between the hosts.

A run is held by a lock on its folder's `.lock`, the declaration and the sample by a short one on the sweep's, tables,
synthetic stores and studies by one of their own.
"""

import contextlib
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ecg_jax.errors import UserError

LOCK = ".lock"

_TABLES_LOCK = ".tables.lock"
_SHORT_S = 600.0  # for which the lock on declaration and sample may be held


class Busy(UserError):
    """Another process works on the run."""


@contextlib.contextmanager
def held_shortly(output: Path) -> Iterator[None]:
    """Holds the lock on what all processes of a sweep begin with: declaration and sample store."""
    refusal = (
        f"another process has held {output / LOCK} for {_SHORT_S:g} s; end it, or choose another --output"
    )
    with held(output / LOCK, lambda: refusal, _SHORT_S):
        yield


@contextlib.contextmanager
def held_for_tables(output: Path, wait: bool) -> Iterator[None]:
    """Holds the lock on the tables.

    Raises:
        Busy: another process writes them, and `wait` is False.
    """
    with held(
        output / _TABLES_LOCK,
        lambda: f"another process writes the tables of {output}",
        float("inf") if wait else 0.0,
    ):
        yield


@contextlib.contextmanager
def held_long(path: Path) -> Iterator[None]:
    """Holds a lock for as long as the work takes that only one process does for all; says so when it has to wait."""
    with held(path, lambda: f"another process holds {path}", float("inf")):
        yield


@contextlib.contextmanager
def held(path: Path, refusal: Callable[[], str], wait_s: float) -> Iterator[None]:
    """Holds a lock file, for which it waits `wait_s` seconds.

    Raises:
        Busy: `refusal`; another process held it all the time.
        UserError: the file cannot be made, or the file system has no locks.
    """
    until = time.monotonic() + wait_s
    try:
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        waited = False
        while not lock(file, fcntl.LOCK_EX):
            if time.monotonic() >= until:
                raise Busy(refusal())
            if wait_s == float("inf") and not waited:
                print(f"{refusal()}; waiting for it", file=sys.stderr, flush=True)
            waited = True
            time.sleep(0.05)
        yield


def lock(file: IO, how: int) -> bool:
    """Locks an open file until it is closed; False when another process holds it.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"cannot lock {file.name}: {error.strerror}; use another file system") from error
    return True


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file.

    Raises:
        UserError: the file system has no locks, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return not lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
