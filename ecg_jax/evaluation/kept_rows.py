"""What is measured of single recordings of a store: only of the rows asked for, kept in files that grow.

    FOLDER/000000.npz    of rows 0 to 4095: rows int64 [n], and of the i-th array of each of them values_i
                         [sum(counts_i), ...] and counts_i int64 [n]

A file holds the rows that were asked for so far, in any order, and is replaced when others of its range are. A run
that ends early goes on with the file it was at.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic

#: Rows of a store that share a file.
PART_RECORDS = 4096
#: From so many recordings on, processes are started. Threads gain nothing, the work is many small NumPy calls:
#: 1,000 recordings of 10 s take 4.0 s (ECG features) and 0.9 s (signatures) in one thread, 5.1 and 1.7 s in two
#: threads, 3.2 and 1.7 s in two processes, about 1.2 s of which they take to start.
PROCESSES_FROM = 2000
#: Recordings sent to a process at a time, and recordings under way.
_CHUNK, _UNDER_WAY = 32, 2048

#: (signal int16 [T, 12] microvolts, samples per second) -> arrays of that recording.
Measure = Callable[[np.ndarray, float], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Ragged:
    """Arrays of n recordings, one after the other."""

    values: np.ndarray
    """[sum(counts), ...]."""
    counts: np.ndarray
    """int64 [n], how many of the values each recording has."""

    def take(self, index: np.ndarray) -> Ragged:
        """Those of the recordings at these places, in that order."""
        starts, counts = (np.cumsum(self.counts) - self.counts)[index], self.counts[index]
        shift = starts - (np.cumsum(counts) - counts)
        return Ragged(self.values[np.arange(counts.sum()) + np.repeat(shift, counts)], counts)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        """From one array [count, ...] of each recording; at least one recording."""
        return cls(np.concatenate(arrays), np.array([len(array) for array in arrays], np.int64))

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        """One after the other; at least one part."""
        return cls(np.concatenate([p.values for p in parts]), np.concatenate([p.counts for p in parts]))


def measured(
    store: Store, rows: np.ndarray, measure: Measure, folder: Path | None = None, label: str = "records"
) -> tuple[Ragged, ...]:
    """Arrays of recordings of a store, from a folder or computed, in processes if there are many.

    Args:
        store: open store.
        rows: int [n], which of its recordings, increasing, at least one.
        measure: a function of a module, so that processes can call it; it gives every recording as many arrays, the
            i-th of them of one type and of one shape but for its first axis.
        folder: keeps what is computed, made if needed; for one store and one version of `measure`. None keeps nothing.
        label: what to call the work in progress bars and messages.

    Returns:
        For each array of `measure` those of all rows, in their order.

    Raises:
        UserError: the store is damaged, the folder cannot be written to, or a process was ended from outside.
    """
    from tqdm import tqdm

    rows = np.asarray(rows, np.int64)
    groups = np.split(rows, np.flatnonzero(np.diff(rows // PART_RECORDS)) + 1)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot keep {label} in {folder}: {error.strerror}; name another folder."
            ) from error
    paths = [None if folder is None else folder / f"{group[0] // PART_RECORDS:06d}.npz" for group in groups]
    n_missing = sum(len(_missing(group, _load(path))) for group, path in zip(groups, paths, strict=True))
    found = []
    with _Worker(measure, n_missing, label) as worker, tqdm(
        total=n_missing, desc=f"{label} of {store.path.name}", unit="record", delay=5.0, leave=False, disable=None
    ) as bar:  # fmt: skip
        for group, path in zip(groups, paths, strict=True):
            kept = _load(path)
            missing = _missing(group, kept)
            if len(missing):
                computed = list(zip(*worker.each(store, missing, bar), strict=True))
                kept = _joined(kept, missing, tuple(Ragged.of(arrays) for arrays in computed))
                if path is not None:
                    _save(path, *kept)
            order = np.argsort(kept[0])
            index = order[np.searchsorted(kept[0], group, sorter=order)]
            found.append([ragged.take(index) for ragged in kept[1]])
    return tuple(Ragged.join(parts) for parts in zip(*found, strict=True))


_Kept = tuple[np.ndarray, tuple[Ragged, ...]]


def _missing(rows: np.ndarray, kept: _Kept | None) -> np.ndarray:
    return rows if kept is None else np.setdiff1d(rows, kept[0])


def _joined(kept: _Kept | None, rows: np.ndarray, computed: tuple[Ragged, ...]) -> _Kept:
    if kept is None:
        return rows, computed
    pairs = zip(kept[1], computed, strict=True)
    return np.concatenate([kept[0], rows]), tuple(Ragged.join(pair) for pair in pairs)


def _save(path: Path, rows: np.ndarray, arrays: tuple[Ragged, ...]) -> None:
    buffer = io.BytesIO()
    named = {f"values_{i}": ragged.values for i, ragged in enumerate(arrays)}
    named |= {f"counts_{i}": ragged.counts for i, ragged in enumerate(arrays)}
    np.savez(buffer, rows=rows, **named)
    write_atomic(path, buffer.getvalue())


def _load(path: Path | None) -> _Kept | None:
    """What a file holds; None where there is none, or a damaged one, which is then made anew."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path) as file:
            n = (len(file.files) - 1) // 2
            return file["rows"], tuple(Ragged(file[f"values_{i}"], file[f"counts_{i}"]) for i in range(n))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _measure_chunk(measure: Measure, signals: list[np.ndarray], rate_hz: float) -> list[tuple]:
    return [measure(each, rate_hz) for each in signals]


def _start_process() -> None:
    """Runs once in each process."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # a process is one core's work; BLAS would start as many threads again in each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        # A parent killed with SIGKILL cannot stop its processes: they notice and leave.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


class _Worker:
    """Measures recordings here, or in processes if there are many; to be used in a `with` statement."""

    def __init__(self, measure: Measure, n_records: int, label: str):
        self._measure, self._label = measure, label
        cores = len(os.sched_getaffinity(0))
        self._pool = None
        if n_records >= PROCESSES_FROM and cores > 1:
            # spawn, not fork: the parent may run threads (JAX, tqdm, a notebook's kernel).
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(cores, context, _start_process)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, store: Store, rows: np.ndarray, bar) -> Iterator[tuple[np.ndarray, ...]]:
        """The arrays of one recording after the other."""
        if self._pool is None:
            for row in rows.tolist():
                yield self._measure(store.read(row), store.rate_hz)
                bar.update()
            return
        for begin in range(0, len(rows), _UNDER_WAY):
            some = rows[begin : begin + _UNDER_WAY].tolist()
            try:
                futures = [
                    self._pool.submit(
                        _measure_chunk,
                        self._measure,
                        [store.read(r) for r in some[i : i + _CHUNK]],
                        store.rate_hz,
                    )
                    for i in range(0, len(some), _CHUNK)
                ]
                for future in futures:
                    arrays = future.result()
                    yield from arrays
                    bar.update(len(arrays))
            except BrokenProcessPool as error:
                raise UserError(
                    f"A process that computed {self._label} of {store.path} ended abruptly, perhaps for want of "
                    "memory; what was finished is kept, run the command again."
                ) from error
