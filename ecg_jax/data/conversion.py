"""Converting units of recordings, in this process or in several: the work behind `ecg_jax.prepare`."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import Entry, Listing, hash_fold
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import BadRecording, Problem, cannot_read, strict_error
from ecg_jax.data.writer import UnitWriter, disk_errors, read_sidecar
from ecg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of `prepare` after its arguments have been checked."""

    corpus: str
    source: Path
    store: Path
    strict: bool
    assume_gain: float | None
    preprocessing: Preprocessing
    listing: Listing
    settings: dict  # what makes a store this store; compared before continuing one
    units: list[list[Entry]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One unit of a job: all a worker process is told."""

    corpus: str
    source: Path
    store: Path
    unit: int
    entries: list[Entry]
    preprocessing: Preprocessing
    strict: bool
    assume_gain: float | None


def _task(job: Job, unit: int) -> Task:
    return Task(
        job.corpus,
        job.source,
        job.store,
        unit,
        job.units[unit],
        job.preprocessing,
        job.strict,
        job.assume_gain,
    )


def convert(job: Job, workers: int, progress: bool) -> None:
    """Converts all units that are not done yet.

    Raises:
      UserError: the first problem under `strict`, a full disk, a worker process that died.
    """
    from tqdm import tqdm

    todo, done = [], 0
    for unit, entries in enumerate(job.units):
        sidecar = read_sidecar(job.store, unit)
        if sidecar is None:
            todo.append(unit)
            continue
        if job.strict and sidecar["problems"]:
            raise strict_error(Problem(**sidecar["problems"][0]))
        done += len(entries)
    bar = tqdm(
        total=len(job.listing.entries),
        initial=done,
        unit="rec",
        desc=f"prepare {job.corpus}",
        disable=not progress,
        mininterval=0.5,
    )
    with bar:
        if workers == 1 or len(todo) <= 1:
            for unit in todo:
                bar.update(_convert_unit(_task(job, unit)))
            return
        _convert_in_processes(job, todo, min(workers, len(todo)), bar)


def _convert_in_processes(job: Job, todo: list[int], workers: int, bar) -> None:
    # spawn, not fork: the parent may run threads (tqdm, pyarrow, a notebook's kernel).
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (stop,)) as pool:
        futures = [pool.submit(_convert_unit, _task(job, unit)) for unit in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                bar.update(future.result())
        except BrokenProcessPool:
            raise UserError(
                "A worker process died (killed, or out of memory?); run the same command again, it goes on "
                "where it stopped, if need be with fewer --workers."
            ) from None
        finally:
            # On success nothing is left to stop. On an error or Ctrl-C the workers leave their units
            # unfinished.
            stop.set()
            pool.shutdown(cancel_futures=True)


_stop = threading.Event()


def _start_worker(stop) -> None:
    """Runs once in each worker process."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        # A parent killed with SIGKILL cannot stop its workers: they notice and leave.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed arrays: a third of a worker's time went into page faults otherwise.

    Does nothing where the C library has no `mallopt`.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    trim_threshold, mmap_threshold = -1, -3  # names of <malloc.h>
    library.mallopt(trim_threshold, 256 << 20)
    library.mallopt(mmap_threshold, 32 << 20)


def _convert_unit(task: Task) -> int:
    """Reads, processes and writes one unit; returns the number of recordings dealt with."""
    read = CORPORA[task.corpus].read
    with disk_errors(task.store), UnitWriter(task.store, task.unit, task.corpus) as writer:
        for entry in task.entries:
            if _stop.is_set():
                return 0
            try:
                recording = read(task.source, entry, task.assume_gain)
                processed = task.preprocessing.apply(recording)
            except BadRecording as error:
                if error.problem.kind in ("missing_header", "missing_signal"):
                    _check_source(task.source, entry)
                if task.strict:
                    raise strict_error(error.problem) from error
                writer.problems.append(error.problem)
                continue
            except (UserError, MemoryError):
                raise
            except OSError as error:
                raise cannot_read(error.filename or task.source / entry.file, error) from error
            except Exception as error:
                # One strange file must not end the conversion of millions; it is told, with what went wrong.
                detail = f"{entry.file}: {type(error).__name__}: {error}"
                problem = Problem(entry.record_id, "unexpected_error", "refused", detail)
                if task.strict:
                    raise strict_error(problem) from error
                writer.problems.append(problem)
                continue
            if task.strict and processed.problems:
                raise strict_error(processed.problems[0])
            if recording.fold is None:
                recording.fold = hash_fold(recording.patient_id or recording.record_id)
            writer.append(recording, processed, entry.file)
        writer.finish()
    return len(task.entries)


def _check_source(source: Path, entry: Entry) -> None:
    """Tells a recording that is missing from a SOURCE that has gone, e.g. an unmounted drive.

    Raises:
      UserError: SOURCE, or the folder in it that held the recording, is not there any more or is empty.
    """
    folders = [source]
    if len(Path(entry.file).parts) > 1:
        folders.append(source / Path(entry.file).parts[0])
    for folder in folders:
        try:
            with os.scandir(folder) as content:
                there = next(content, None) is not None
        except OSError:
            there = False
        if not there:
            raise UserError(
                f"The folder {folder} has vanished or is empty now; bring it back (a drive that was unmounted?) "
                "and run the same command again: it goes on where it stopped."
            )
