"""Converting units of recordings, in this process or in several: the work behind `ecg_jax.prepare`."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import Entry, Listing, hash_fold
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.progress import Progress
from ecg_jax.data.recording import BadRecording, Problem, cannot_read, strict_error
from ecg_jax.data.shard import WHOLE, Shard
from ecg_jax.data.unit_files import disk_errors, read_sidecar
from ecg_jax.data.writer import UnitWriter
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
    units: list[range]  # of entries of the listing
    outline: dict  # of the listing, to tell how it differs from another host's


@dataclasses.dataclass(frozen=True)
class Task:
    """One unit of a job: all a worker process is told."""

    corpus: str
    source: Path
    store: Path
    folder: Path  # for what is not finished
    unit: int
    entries: Sequence[Entry]
    preprocessing: Preprocessing
    strict: bool
    assume_gain: float | None


def _task(job: Job, unit: int, folder: Path) -> Task:
    rows = job.units[unit]
    return Task(
        job.corpus,
        job.source,
        job.store,
        folder,
        unit,
        job.listing.entries[rows.start : rows.stop],
        job.preprocessing,
        job.strict,
        job.assume_gain,
    )


def convert(job: Job, shard: Shard, folder: Path, workers: int, progress: bool) -> int:
    """Converts all units of a shard that are not done yet.

    Args:
      job: what to do.
      shard: which part of it.
      folder: for what is not finished.
      workers: processes.
      progress: tell how far it is.

    Returns:
      how many recordings were dealt with.

    Raises:
      UserError: the first problem under `strict`, a full disk, a worker process that died.
    """
    todo, done, total = [], 0, 0
    for unit in shard.units(len(job.units)):
        total += len(job.units[unit])
        sidecar = read_sidecar(job.store, unit)
        if sidecar is None:
            todo.append(unit)
            continue
        if job.strict and sidecar["problems"]:
            raise strict_error(Problem(**sidecar["problems"][0]))
        done += len(job.units[unit])
    what = f"prepare {job.corpus}" + ("" if shard == WHOLE else f", shard {shard}")
    tasks = (_task(job, unit, folder) for unit in todo)
    with Progress(what, total, done, show=progress) as bar:
        if workers == 1 or len(todo) <= 1:
            for task in tasks:
                _convert_unit(task, lambda: bar.update(bar.fresh + 1))
        else:
            _convert_in_processes(tasks, min(workers, len(todo)), bar)
        return bar.fresh


def _convert_in_processes(tasks: Iterable[Task], workers: int, bar: Progress) -> None:
    # spawn, not fork: the parent may run threads (tqdm, pyarrow, a notebook's kernel).
    context = multiprocessing.get_context("spawn")
    stop, counter = context.Event(), context.Value(ctypes.c_int64)
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (stop, counter)) as pool:
        # Not all at once: the entries of 11 million recordings would all lie in memory.
        waiting = {
            pool.submit(_convert_unit_in_worker, task) for task in itertools.islice(tasks, 2 * workers)
        }
        try:
            while waiting:
                finished, waiting = concurrent.futures.wait(
                    waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    future.result()
                for task in itertools.islice(tasks, len(finished)):
                    waiting.add(pool.submit(_convert_unit_in_worker, task))
                # Without its lock, which a worker that was killed may hold for ever.
                bar.update(counter.get_obj().value)
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
_counter = None  # recordings that all workers together have dealt with; in a worker process only


def _start_worker(stop, counter) -> None:
    """Runs once in each worker process."""
    global _stop, _counter
    _stop, _counter = stop, counter
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


def _convert_unit_in_worker(task: Task) -> None:
    def count() -> None:
        with _counter.get_lock():
            _counter.value += 1

    _convert_unit(task, count)


def _convert_unit(task: Task, count: Callable[[], None]) -> None:
    """Reads, processes and writes one unit; calls `count` after each recording."""
    read = CORPORA[task.corpus].read
    with disk_errors(task.store), UnitWriter(task.store, task.unit, task.corpus, task.folder) as writer:
        for number, entry in enumerate(task.entries):
            if _stop.is_set():
                return
            if number:
                count()
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
        count()


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
