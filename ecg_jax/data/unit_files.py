"""Files of a store that is being written: names, what is renamed into place, whether a unit is finished and whole."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import itertools
import json
import os
import re
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ecg_jax.data.progress import Progress
from ecg_jax.data.record_table import checksum_keys, unit_table
from ecg_jax.data.recording import Problem
from ecg_jax.data.store import BYTES_PER_SAMPLE, PARTIAL, checksum
from ecg_jax.errors import UserError
from ecg_jax.files import replace_file

# What is not a sidecar raises one of these on the way to a table.
_NO_SIDECAR = (ValueError, KeyError, TypeError, OverflowError)

# As `UnitWriter.finish` writes it.
_SIDECAR_BEGIN = re.compile(rb'\{"samples": ([0-9]+), "rows": \[')


def write_in_store(store: Path, path: Path, data: bytes) -> None:
    """Writes a file of a store; what a killed process leaves lies in `.partial/` and goes with it."""
    replace_file(path, data, temporary_path(store / PARTIAL, path.name))


def temporary_path(folder: Path, name: str) -> Path:
    """A name that no other process has, on this or any other host: process numbers repeat over hosts and containers."""
    return folder / f"{name}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}.tmp"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is gone in the end, unless it was renamed."""
    with open(path, "xb") as file:
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or missing disk into a sentence.

    Raises:
      UserError: instead of an OSError. Readers turn theirs into `BadRecording`; this one is about writing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full while writing the store {path}; free some space and run the same command "
                "again: it goes on where it stopped."
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"Cannot write the store {path}: {error.strerror}{where}; when that is mended, run the same "
            "command again: it goes on where it stopped."
        ) from error


def sidecar_path(store: Path, unit: int) -> Path:
    return store / PARTIAL / f"unit-{unit:06d}.json"


def chunk_path(store: Path, unit: int) -> Path:
    return store / "signal" / "c" / str(unit) / "0"


def finished_units(store: Path, units: Iterable[int]) -> list[int]:
    """Those of some units that have been put into place, as far as the ends of the sidecar and the size of the chunk
    file tell: the sidecars of 11 million recordings are gigabytes, which only `verified_units` reads.
    """
    return [unit for unit in units if _in_place(store, unit)]


def _in_place(store: Path, unit: int) -> bool:
    try:
        with open(sidecar_path(store, unit), "rb") as file:
            begin = _SIDECAR_BEGIN.match(file.read(64))
            file.seek(-1, os.SEEK_END)
            return (
                begin is not None and file.read() == b"}" and _has_chunk(store, unit, samples=int(begin[1]))
            )
    except FileNotFoundError:
        return False


def _has_chunk(store: Path, unit: int, samples: int) -> bool:
    """Whether a unit's chunk file is long enough; it may be longer, for finalisation extends it with zeros.

    Raises:
      FileNotFoundError: there is none.
    """
    return not samples or chunk_path(store, unit).stat().st_size >= samples * BYTES_PER_SAMPLE


def read_sidecar(store: Path, unit: int) -> dict | None:
    """The sidecar of a finished unit; None when the unit must be done (again).

    Raises:
      OSError: it is there and cannot be read, which does not say that it is damaged.
    """
    try:
        sidecar = json.loads(sidecar_path(store, unit).read_bytes())
        _check_sidecar(sidecar)
        return sidecar if _has_chunk(store, unit, sidecar["samples"]) else None
    except (FileNotFoundError, *_NO_SIDECAR):
        return None


def _check_sidecar(sidecar: dict) -> None:
    """Raises one of `_NO_SIDECAR` when it is not what `UnitWriter.finish` writes."""
    end = 0
    for row in sidecar["rows"]:
        if row["offset"] != end or not row["length"] > 0 or len(bytes.fromhex(row["checksum"])) != 16:
            raise ValueError("a row does not follow the one before it")
        end += row["length"]
    if sidecar["samples"] != end:
        raise ValueError("the rows are not all of the unit")
    for problem in sidecar["problems"]:
        Problem(**problem)


class DamagedUnits(UserError):
    """Units are damaged: a chunk file does not hold what its sidecar says, or the sidecar is none.

    Attributes:
      what: the sentence without what to do.
      units: their numbers; they do not count as finished any more.
    """

    def __init__(self, store: Path, n_units: int, units: list[int]):
        self.what = (
            f"{len(units)} of the {n_units} chunk files written to {store} do not hold what their sidecars "
            f"say, or those are damaged (the first is {chunk_path(store, units[0])}), so check that disk"
        )
        self.units = units
        super().__init__(f"{self.what}; the same command writes them again and keeps the others.")


class VerifiedUnit(NamedTuple):
    """A finished unit that holds what was written."""

    samples: int
    problems: list[Problem]
    table: object
    """Its rows, a `pyarrow.Table`."""
    keys: np.ndarray
    """uint64 [n, 2], see `checksum_keys`."""


def _verify(store: Path, unit: int, schema, values) -> VerifiedUnit | None:
    """Reads one unit; None where its sidecar is damaged, or samples differ from the checksums in it."""
    sidecar = read_sidecar(store, unit)
    if sidecar is None:
        return None
    try:
        # A table and not the rows, which take ten times as much.
        table = unit_table(sidecar["rows"], schema, values)
    except _NO_SIDECAR:
        return None
    if sidecar["samples"]:
        with open(chunk_path(store, unit), "rb") as file:
            for row in sidecar["rows"]:
                # `read_sidecar` has seen that the file is long enough.
                data = file.read(row["length"] * BYTES_PER_SAMPLE)
                if checksum(np.frombuffer(data, "<i2")) != row["checksum"]:
                    return None
    problems = [Problem(**problem) for problem in sidecar["problems"]]
    return VerifiedUnit(sidecar["samples"], problems, table, checksum_keys(sidecar["rows"]))


def verified_units(store: Path, n_units: int, schema, values, progress: bool) -> Iterator[VerifiedUnit]:
    """All units in order, after comparing each unit's samples with the checksums in its sidecar.

    A unit may have been written days before, by a run that was interrupted, or on another host: what a disk did to it
    since must not become a complete store.

    Raises:
      DamagedUnits: some are damaged; their sidecars are removed, so that the next run does them again.
      OSError: one is there and cannot be read; nothing is removed.
    """
    paths = [chunk_path(store, unit) for unit in range(n_units)]
    ends = np.cumsum([path.stat().st_size if path.exists() else 0 for path in paths]).tolist()
    # Reading and hashing let other threads run.
    workers = min(8, len(os.sched_getaffinity(0)))
    damaged: list[int] = []
    waiting: deque = deque()
    units = iter(range(n_units))
    with (
        Progress(f"verify {store}", ends[-1], of_bytes=True, show=progress) as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        try:
            while True:
                # Only so many at once: what is done early waits in memory for its turn.
                for unit in itertools.islice(units, 2 * workers - len(waiting)):
                    waiting.append((unit, pool.submit(_verify, store, unit, schema, values)))
                if not waiting:
                    break
                unit, future = waiting.popleft()
                found = future.result()
                bar.update(ends[unit])
                if found is None:
                    sidecar_path(store, unit).unlink(missing_ok=True)
                    damaged.append(unit)
                elif not damaged:
                    yield found
        finally:
            for _, future in waiting:
                future.cancel()
    if damaged:
        raise DamagedUnits(store, n_units, damaged)
