"""The folders of a sweep's runs: who works on which run, and how far each run is.

Several processes may work in one sweep's folder at a time, on one host or on many, each on a run of its own.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ecg_jax.errors import Stopped, UserError
from ecg_jax.files import read_jsonl, write_atomic
from ecg_jax.json_fields import Kind, number, object_of, or_null, whole
from ecg_jax.probe_provenance import made_with
from ecg_jax.sweep_damage import STATUS_FIELDS, Damaged, Unfit, check, damage, read_checked, readable
from ecg_jax.sweep_file import Run
from ecg_jax.sweep_locks import LOCK, held, is_held
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import LOG_NAME

STATUS = "status.json"
ERROR = "error.txt"  # the traceback of a run that failed
TIMES = "times.jsonl"  # seconds of each attempt at pretraining and probing

#: Folders of a run: its pretraining, the probe that the sweep compares, and the others, each in one of its name.
RUN, PROBE, FURTHER = "run", "probe", "probes"
#: In the folder of a further probe, written after each store: store -> folders of its tasks, null before it has any.
MADE = "finished.json"

_BUSY_S = 2.0  # in which whoever only asks for the state of a run has let go of its lock
_TAIL = 65_536  # bytes at the end of a log that are looked at for its last step
_FOLDERS = Kind(
    "a list of folders",  # empty where a store serves no task
    lambda value: isinstance(value, list) and all(isinstance(folder, str) for folder in value),
)
VERSIONS = ("ecg-jax", "jax", "flax", "optax", "numpy")

FINISHED, RUNNING, FAILED, STOPPED, DIED, BEGUN, NOT_BEGUN, WAITING, DAMAGED = (
    "finished", "running", "failed", "stopped", "died", "begun", "not begun", "waiting", "damaged"
)  # fmt: skip


class State(NamedTuple):
    """How far a run is.

    `kind` is one of finished, running (a process holds it), failed (with `error`), stopped (asked to), died (its
    process ended without a word, which `error` says), begun, not begun, waiting (for the run that it begins with) and
    damaged (which `error` says too). `step` is the last one known, None before the first. `more` says what it waits
    for, or which of its probes are still to be made.
    """

    kind: str
    step: int | None
    error: str
    more: str = ""

    def __str__(self) -> str:
        at = "" if self.step is None or self.kind == FINISHED else f" at step {self.step}"
        return f"{self.kind}{at}{self.more}"


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
def claimed(output: Path, run: Run, is_done: Callable[[], bool]) -> Iterator[RunStatus | None]:
    """Holds a run and keeps its status, whatever ends the work on it; gives None when nothing is to be done by now.

    Args:
        output: folder of the sweep.
        run: to work on.
        is_done: asked once the run is held.

    Raises:
        Busy: another process works on the run.
        UserError: its folder cannot be written.
    """
    folder = output / run.name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    with held(folder / LOCK, lambda: f"the run {run.name} is being worked on by {_holder(folder)}", _BUSY_S):
        if is_done():
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
    """Whether a run is pretrained, probed, and probed again as often as it asks for."""
    return is_compared(output, run) and not lacking(output, run)


def is_compared(output: Path, run: Run) -> bool:
    """Whether a run has what the tables of the sweep compare.

    results.json is the last thing a probe writes; of a run without that probe its status says it, unless somebody
    removed what it trained, to have it made anew.
    """
    if run.probe_config is not None:
        with readable(output / run.name):
            return (output / run.name / PROBE / "results.json").exists()
    status = _readable_status(output, run)
    ended = status is not None and (status["state"] == FINISHED or (bool(run.further) and _has_ended(status)))
    return ended and last_step(output / run.name / RUN) is not None


def is_pretrained(output: Path, run: Run) -> bool:
    """Whether another run may begin with its parameters."""
    if is_compared(output, run):
        return True
    status = _readable_status(output, run)
    return status is not None and _has_ended(status) and bool(finished_steps(output / run.name / RUN))


def may_begin(output: Path, run: Run) -> bool:
    """Whether the run that it begins with, if any, is there."""
    return run.init is None or is_pretrained(output, run.init)


def _has_ended(status: dict[str, Any]) -> bool:
    """Whether its pretraining has, after which alone its parameters are counted."""
    return status["parameters"] is not None


def _readable_status(output: Path, run: Run) -> dict[str, Any] | None:
    try:
        return read_status(output / run.name)
    except UserError:  # damaged, which whoever takes the run up says
        return None


def lacking(output: Path, run: Run) -> list[str]:
    """Names of the further probes of a run that are not finished on all stores that they were begun with."""
    folders = {further.name: output / run.name / FURTHER / further.name for further in run.further}
    return [name for name, folder in folders.items() if not is_made(folder)]


def is_made(folder: Path) -> bool:
    """Whether a further probe is finished on every store that it was begun with; False before the first."""
    stores = _stores_of(folder)
    return bool(stores) and read_made(folder).keys() == stores.keys()


def read_made(folder: Path) -> dict[str, list[str]]:
    """Store -> the folders, from that of a further probe, in which its results lie; of the stores it is finished on.

    Of several tasks there are as many folders, and none of a store that serves no task of the probe.
    """
    with readable(folder):
        return {
            store: tasks
            for store, tasks in _stores_of(folder).items()
            if tasks is not None and all((folder / task / "results.json").exists() for task in tasks)
        }


def _stores_of(folder: Path) -> dict[str, list[str] | None]:
    """What the `MADE` of a further probe says; {} where it is missing or damaged, and the probe is made again."""
    try:
        return read_checked(folder / MADE, {"stores": object_of(or_null(_FOLDERS))})["stores"]
    except (OSError, ValueError):
        return {}


def state_of(output: Path, run: Run) -> State:
    """How far a run is; writes nothing.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        return _state_of(output, run)
    except Damaged as error:
        return State(DAMAGED, None, str(error))


def _state_of(output: Path, run: Run) -> State:
    """The same.

    Raises:
        Damaged: the folder of the run cannot be read.
    """
    folder = output / run.name
    step = last_step(folder / RUN)
    left = lacking(output, run) if is_compared(output, run) else []
    more = f", lacks the probe{'s' if len(left) > 1 else ''} {', '.join(left)}" if left else ""
    try:
        while True:
            status = read_status(folder)
            busy = status is not None and is_held(folder / LOCK)
            # A process that ended, or began, between the two looks has written another status.
            if busy or status == read_status(folder):
                break
    except Damaged as error:
        return State(FINISHED if is_finished(output, run) else DAMAGED, step, str(error))
    if is_finished(output, run):
        return State(FINISHED, step, "")
    if busy:
        return State(RUNNING, step, "", more)
    if step is None and not may_begin(output, run):
        return State(WAITING, None, "", f" for {run.init.name}")
    if status is None:  # made before there were status files, or never
        return State(NOT_BEGUN if step is None else BEGUN, step, "", more)
    if status["state"] == RUNNING:
        at = "before its first logged step" if step is None else f"at step {step}"
        error = f"ended without a word {at} ({_holder(folder)}, since {status['began']})"
        return State(DIED, step, error, more)
    # A probe that was asked for later, or whose results were removed to have it made anew.
    return State(BEGUN if status["state"] == FINISHED else status["state"], step, status["error"], more)


def read_status(folder: Path) -> dict[str, Any] | None:
    """`status.json` of a run's folder; None when there is none.

    Raises:
        Damaged: it lacks a field, or has one of another type, is no JSON, or cannot be read.
    """
    path = folder / STATUS
    try:
        value = json.loads(read_shared(path))
        check(STATUS, value, STATUS_FIELDS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Damaged(f"{path} is damaged; remove it ({error})") from error
    return value


def read_shared(path: Path) -> str:
    """The text of a file that another host may be replacing, which NFS says once with ESTALE."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return path.read_text()


def spent(folder: Path) -> dict[str, float | None]:
    """Seconds of all attempts at pretraining and at probing a run, its further probes too; None: none was measured.

    Raises:
        UserError: the file that says it is damaged, or cannot be read.
    """
    path = folder / TIMES
    with readable(path):
        entries = read_jsonl(path) if path.exists() else []
    found: dict[str, list[float]] = {"pretrain": [], "probe": []}
    for line, entry in enumerate(entries, start=1):
        for what, seconds in entry.items():
            part = PROBE if what.startswith(f"{FURTHER}/") else what
            with damage(path, "remove that line"):
                if part not in found:
                    raise Unfit(f"line {line}: {what!r} is no part of a run")
                check(f"line {line}", entry, {what: number(0)})
            found[part].append(seconds)
    return {what: sum(seconds) if seconds else None for what, seconds in found.items()}


def last_step(run: Path) -> int | None:
    """The last step that a pretraining run logged or saved; None before the first.

    Only the end of its log is read: it may be long.

    Raises:
        Damaged: its folder cannot be read.
    """
    try:
        with readable(run):
            steps, log = finished_steps(run)[-1:], _tail(run / LOG_NAME)
    except UserError as error:
        raise Damaged(str(error)) from error
    for line in log.split(b"\n"):
        # The first line may have lost its beginning, the last one its end.
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            check(LOG_NAME, entry, {"step": whole(0)})
            steps.append(entry["step"])
    return max(steps, default=None)


def _tail(path: Path) -> bytes:
    """The end of a file, b"" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _holder(folder: Path) -> str:
    try:
        status = read_status(folder)
    except UserError:
        status = None
    return f"process {status['process']} on {status['host']}" if status else "another process"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
