"""Converting units of recordings, in this process or in several: the work behind `ecg_jax.prepare`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import Entry, Listing, hash_fold
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.progress import Progress
from ecg_jax.data.recording import BadRecording, Problem, cannot_read, strict_error
from ecg_jax.data.shard import WHOLE, Shard
from ecg_jax.data.unit_files import disk_errors, finished_units, read_sidecar
from ecg_jax.data.workers import do_all, stopped
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
    units = shard.units(len(job.units))
    finished = finished_units(job.store, units)
    if job.strict:
        for unit in finished:
            sidecar = read_sidecar(job.store, unit)
            if sidecar is not None and sidecar["problems"]:
                raise strict_error(Problem(**sidecar["problems"][0]))
    todo = sorted(set(units) - set(finished))
    total, done = (sum(len(job.units[unit]) for unit in part) for part in (units, finished))
    what = f"prepare {job.corpus}" + ("" if shard == WHOLE else f", shard {shard}")
    tasks = (_task(job, unit, folder) for unit in todo)
    with Progress(what, total, done, show=progress) as bar:
        do_all(_convert_unit, tasks, min(workers, len(todo)), bar)
        return bar.fresh


def _convert_unit(task: Task, count: Callable[[], None]) -> None:
    """Reads, processes and writes one unit; calls `count` after each recording."""
    read = CORPORA[task.corpus].read
    with disk_errors(task.store), UnitWriter(task.store, task.unit, task.corpus, task.folder) as writer:
        for number, entry in enumerate(task.entries):
            if stopped():
                return
            if number:
                count()
            try:
                recording = read(task.source, entry, task.assume_gain)
                processed = task.preprocessing.apply(recording)
            except BadRecording as error:
                if error.problem.kind in ("missing_header", "missing_signal"):
                    _check_source(task, entry)
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


# Their headers were seen when they were listed. The tables of other corpora also name files that a partial download
# does not have, which is no reason to stop.
_HEADERS_SEEN = ("challenge", "wfdb", "ptb", "heedb", "heedb_emory")


def _check_source(task: Task, entry: Entry) -> None:
    """Tells a recording that is missing from a SOURCE of which a part has gone, e.g. a drive that is not mounted.

    Raises:
      UserError: SOURCE, a folder in it that held the recording, or its header is not there any more.
    """
    folders = [task.source / folder for folder in reversed(Path(entry.file).parents)]
    if task.corpus not in _HEADERS_SEEN:
        folders = folders[:2]
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
    if task.corpus in _HEADERS_SEEN and not os.path.lexists(task.source / entry.file):
        raise UserError(
            f"{task.source / entry.file} was there when SOURCE was listed and has vanished; bring it back, or give "
            "another STORE for what is left."
        )
