"""The folder of a sweep: which sweep it belongs to, who works on which run, and how far each run is.

Several processes may work in one folder at a time, on one host or on many, each on a run of its own. A run is held by
a lock on its folder's `.lock`, the declaration and the sample by a short one on the sweep's, the tables by one of their
own. The file system must keep its locks between the hosts.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ecg_jax.errors import Stopped, UserError
from ecg_jax.files import read_jsonl, write_atomic
from ecg_jax.probe_provenance import made_with
from ecg_jax.sweep_entry import SLURM, STORE
from ecg_jax.sweep_file import Run, Sweep, differences, plain
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import LOG_NAME

LOCK = ".lock"
STATUS = "status.json"
ERROR = "error.txt"  # the traceback of a run that failed
TIMES = "times.jsonl"  # seconds of each attempt at pretraining and probing

_DECLARATION = "sweep.json"
_TABLES_LOCK = ".tables.lock"
_BUSY_S = 2.0  # in which whoever only asks for the state of a run has let go of its lock
_SHORT_S = 600.0  # for which the lock on declaration and sample may be held
_TAIL = 65_536  # bytes at the end of a log that are looked at for its last step
_STATUS_FIELDS = (
    "state", "error", "attempts", "host", "process", "began", "ended", "parameters", "recordings", "device", "versions",
)  # fmt: skip
VERSIONS = ("ecg-jax", "jax", "flax", "optax", "numpy")

FINISHED, RUNNING, FAILED, STOPPED, DIED, BEGUN, NOT_BEGUN, DAMAGED = (
    "finished", "running", "failed", "stopped", "died", "begun", "not begun", "damaged"
)  # fmt: skip


class Busy(UserError):
    """Another process works on the run."""


class Damaged(UserError):
    """Files of a run cannot be read; the other runs can."""


class State(NamedTuple):
    """How far a run is.

    `kind` is one of finished, running (a process holds it), failed (with `error`), stopped (asked to), died (its
    process ended without a word, which `error` says), begun, not begun and damaged (which `error` says too). `step` is
    the last one known, None before the first.
    """

    kind: str
    step: int | None
    error: str

    def __str__(self) -> str:
        at = "" if self.step is None or self.kind == FINISHED else f" at step {self.step}"
        return f"{self.kind}{at}"


def declare(sweep: Sweep, output: Path) -> None:
    """Makes the folder this sweep's, or refuses it.

    A sweep may gain runs later; runs that are there already must not have changed.

    Raises:
        UserError: the folder holds something else; runs that differ, or are missing now, are named.
    """
    check_folder(sweep, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into --output={output}: {error.strerror}") from error
    with held_shortly(output):
        check_folder(sweep, output)  # as it is now that nobody else writes it
        text = (json.dumps({"sweep": sweep.path, "runs": _declared(sweep)}, indent=1) + "\n").encode()
        path = output / _DECLARATION
        if not path.exists() or path.read_bytes() != text:
            write_atomic(path, text)


def check_folder(sweep: Sweep, output: Path) -> None:
    """Refuses a folder that is not this sweep's, see `declare`; writes nothing."""
    path = output / _DECLARATION
    # Listed before it is looked for: whatever else a sweep writes comes after its declaration.
    entries = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    if not path.exists():
        if any(n not in (STORE, LOCK, SLURM) and not n.startswith(f".{_DECLARATION}.") for n in entries):
            raise UserError(f"{output} holds something else than a sweep; choose another --output")
        return
    runs = _declared(sweep)
    try:
        before = json.loads(_read(path))["runs"]
        gone = [name for name in before if name not in runs]
        changed = {name: differences(before[name], runs[name]) for name in before if name in runs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; choose another --output") from error
    if gone:
        raise UserError(
            f"{output} belongs to another sweep: it has the runs {', '.join(gone[:5])}, which {sweep.path} has "
            "not; choose another --output"
        )
    for name, differ in changed.items():
        if differ:
            raise UserError(
                f"{output} belongs to another sweep: its run {name} differs in {', '.join(sorted(differ)[:5])}; "
                "choose another --output, or give the run another name"
            )


def _declared(sweep: Sweep) -> dict[str, Any]:
    return {
        run.name: {
            "group": run.group,
            "config": plain(run.config),
            "probe": run.probe_config and plain(run.probe_config),
            "targets": run.targets,
            "store": run.store,
        }
        for run in sweep.runs
    }


@contextlib.contextmanager
def held_shortly(output: Path) -> Iterator[None]:
    """Holds the lock on what all processes of a sweep begin with: declaration and sample store."""
    refusal = (
        f"another process has held {output / LOCK} for {_SHORT_S:g} s; end it, or choose another --output"
    )
    with _held(output / LOCK, lambda: refusal, _SHORT_S):
        yield


@contextlib.contextmanager
def held_for_tables(output: Path, wait: bool) -> Iterator[None]:
    """Holds the lock on the tables.

    Raises:
        Busy: another process writes them, and `wait` is False.
    """
    with _held(
        output / _TABLES_LOCK,
        lambda: f"another process writes the tables of {output}",
        float("inf") if wait else 0.0,
    ):
        yield


@contextlib.contextmanager
def held_long(path: Path) -> Iterator[None]:
    """Holds a lock for as long as the work takes that only one process does for all; says so when it has to wait."""
    with _held(path, lambda: f"another process holds {path}", float("inf")):
        yield


@contextlib.contextmanager
def _held(path: Path, refusal: Callable[[], str], wait_s: float) -> Iterator[None]:
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
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() >= until:
                raise Busy(refusal())
            if wait_s == float("inf") and not waited:
                print(f"{refusal()}; waiting for it", file=sys.stderr, flush=True)
            waited = True
            time.sleep(0.05)
        yield


def _lock(file: IO, how: int) -> bool:
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


class RunStatus:
    """`status.json` of a run that this process holds: who works on it since when, and what became of it."""

    def __init__(self, folder: Path):
        self._path = folder / STATUS
        before = read_status(folder)
        self._value: dict[str, Any] = {
            "state": RUNNING,
            "error": "",
            "attempts": 1 + (before["attempts"] if before else 0),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": _now(),
            "ended": None,
            "parameters": before["parameters"] if before else None,
            "recordings": before["recordings"] if before else None,
            "device": None,
            "versions": made_with(VERSIONS)["versions"],
        }
        self._write()

    def note(self, **facts: Any) -> None:
        """Adds facts of the run: `parameters`, `recordings` of its store, `device`."""
        self._value |= facts
        self._write()

    def end(self, state: str, error: str = "") -> None:
        """The last word of this process."""
        self.note(state=state, error=error, ended=_now())

    def _write(self) -> None:
        write_atomic(self._path, (json.dumps(self._value, indent=1) + "\n").encode())


@contextlib.contextmanager
def claimed(output: Path, run: Run) -> Iterator[RunStatus | None]:
    """Holds a run and keeps its status, whatever ends the work on it; gives None when the run is finished by now.

    Raises:
        Busy: another process works on the run.
        UserError: its folder cannot be written.
    """
    folder = output / run.name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    with _held(folder / LOCK, lambda: f"the run {run.name} is being worked on by {_holder(folder)}", _BUSY_S):
        if is_finished(output, run):
            yield None
            return
        (folder / ERROR).unlink(missing_ok=True)
        status = RunStatus(folder)
        try:
            yield status
        except BaseException as error:
            # What ended the run is raised, also where a full disk keeps it from being written down.
            with contextlib.suppress(UserError, OSError):
                if isinstance(error, Stopped) or not isinstance(error, Exception):
                    status.end(STOPPED)
                else:
                    if not isinstance(error, UserError):
                        (folder / ERROR).write_text("".join(traceback.format_exception(error)))
                    status.end(FAILED, reason(error, folder))
            raise
        status.end(FINISHED)


def reason(error: Exception, folder: Path) -> str:
    """Why the run in `folder` failed, in one line; of what is no mistake of the user's, where the traceback lies."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else ""
    if isinstance(error, UserError):
        return first
    more = f" (all of it in {folder / ERROR})" if (folder / ERROR).is_file() else ""
    return f"{type(error).__name__}: {first}{more}"


def is_finished(output: Path, run: Run) -> bool:
    """results.json is the last thing a probe writes; of a run without probe its status says it."""
    if run.probe_config is not None:
        return (output / run.name / "probe" / "results.json").exists()
    try:
        status = read_status(output / run.name)
    except UserError:  # damaged, which whoever takes the run up says
        return False
    return status is not None and status["state"] == FINISHED


def state_of(output: Path, run: Run) -> State:
    """How far a run is; writes nothing.

    Raises:
        UserError: the file system has no locks.
    """
    folder = output / run.name
    step = last_step(folder / "run")
    try:
        while True:
            status = read_status(folder)
            held = status is not None and _is_held(folder / LOCK)
            # A process that ended, or began, between the two looks has written another status.
            if held or status == read_status(folder):
                break
    except Damaged as error:
        return State(FINISHED if is_finished(output, run) else DAMAGED, step, str(error))
    if is_finished(output, run):
        return State(FINISHED, step, "")
    if status is None:  # made before there were status files, or never
        return State(NOT_BEGUN if step is None else BEGUN, step, "")
    if held:
        return State(RUNNING, step, "")
    if status["state"] == RUNNING:
        at = "before its first logged step" if step is None else f"at step {step}"
        error = f"ended without a word {at} ({_holder(folder)}, since {status['began']})"
        return State(DIED, step, error)
    # A probe whose results were removed to have it made anew.
    return State(BEGUN if status["state"] == FINISHED else status["state"], step, status["error"])


def read_status(folder: Path) -> dict[str, Any] | None:
    """`status.json` of a run's folder; None when there is none.

    Raises:
        Damaged: it lacks a field, is no JSON, or cannot be read.
    """
    path = folder / STATUS
    try:
        value = json.loads(_read(path))
        for name in _STATUS_FIELDS:
            value[name]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged; remove it") from error
    return value


def _read(path: Path) -> str:
    """The text of a file that another host may be replacing, which NFS says once with ESTALE."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return path.read_text()


@contextlib.contextmanager
def damage(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while the files of a finished run are read becomes one sentence."""
    try:
        yield
    except Exception as error:  # of json, zipfile, numpy, a missing key, ...
        text = next(iter(str(error).splitlines()), "")
        raise Damaged(
            f"{folder} is damaged ({type(error).__name__}: {text}); remove it, and it is made anew"
        ) from error


def spent(folder: Path) -> dict[str, float | None]:
    """Seconds of all attempts at pretraining and at probing a run; None where none was measured."""
    path = folder / TIMES
    entries = read_jsonl(path) if path.exists() else []
    found = {what: [entry[what] for entry in entries if what in entry] for what in ("pretrain", "probe")}
    return {what: sum(seconds) if seconds else None for what, seconds in found.items()}


def last_step(run: Path) -> int | None:
    """The last step that a pretraining run logged or saved; None before the first.

    Only the end of its log is read: it may be long.
    """
    steps = finished_steps(run)[-1:]
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), (run / LOG_NAME).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        for line in file.read().split(b"\n"):
            # The first line may have lost its beginning, the last one its end.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                steps.append(int(json.loads(line)["step"]))
    return max(steps, default=None)


def _holder(folder: Path) -> str:
    try:
        status = read_status(folder)
    except UserError:
        status = None
    return f"process {status['process']} on {status['host']}" if status else "another process"


def _is_held(path: Path) -> bool:
    """Whether a process holds a lock file.

    Raises:
        UserError: the file system has no locks, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return not _lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
