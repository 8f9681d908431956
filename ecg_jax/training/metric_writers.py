"""Where a run's numbers go: log.jsonl and TensorBoard, with clu's method names and without TensorFlow; and
how fast it is.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.files import read_jsonl, write_atomic
from ecg_jax.json_fields import LOGGED, refusal, whole

LOG_NAME = "log.jsonl"

#: Tag of a text that says what looks wrong; its lines hold nothing else but the step.
WARNING = "warning"


class JsonlWriter:
    """One JSON object for each written step and each text, appended and flushed line by line."""

    def __init__(self, workdir: Path):
        self.path = workdir / LOG_NAME
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Appends {"step": step, **scalars} as one line."""
        self._append({"step": step, **scalars})

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Appends {"step": step, **texts} as one line."""
        self._append({"step": step, **texts})

    def _append(self, entry: dict) -> None:
        line = (json.dumps(entry) + "\n").encode()
        while line:
            line = line[self._file.write(line) :]

    def flush(self) -> None:
        """Writes through to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars and texts as TensorBoard event files under `workdir/tensorboard`."""

    def __init__(self, workdir: Path, start: int):
        """Begins a new event file; what earlier files hold after step `start` is marked as superseded."""
        # TensorBoard's own protobufs and file writer: no TensorFlow needed.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.path = workdir / "tensorboard"
        self._writer = EventFileWriter(str(self.path))
        restart = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=start + 1, wall_time=time.time(), session_log=restart))

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one event that holds every scalar."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Writes one event that holds every text."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary import text_pb

        values = [value for tag, text in texts.items() for value in text_pb(tag, text).value]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def flush(self) -> None:
        """Writes pending events."""
        self._writer.flush()

    def close(self) -> None:
        """Writes pending events and closes the file."""
        self._writer.close()


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; free some space or mend the folder, and run the same command again to "
        "continue from the newest checkpoint"
    )


class MultiWriter:
    """Hands every call to each of its writers.

    What the disk refuses becomes a UserError.
    """

    def __init__(self, *writers):
        self._writers = writers

    def _each(self, method: str, *args) -> None:
        for writer in self._writers:
            try:
                getattr(writer, method)(*args)
            except OSError as error:
                raise _unwritable(writer.path, error) from error

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars to all writers."""
        self._each("write_scalars", step, scalars)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Writes the texts to all writers."""
        self._each("write_texts", step, texts)

    def flush(self) -> None:
        """Flushes all writers."""
        self._each("flush")

    def close(self) -> None:
        """Closes all writers."""
        self._each("close")


def read_log(workdir: Path) -> list[dict]:
    """The logged steps of log.jsonl in order, [] when there is none.

    Raises:
        UserError: as in `files.read_jsonl`, or what was logged is no number.
    """
    entries, step = [entry for entry in _read_lines(workdir) if WARNING not in entry], whole(0)
    for entry in entries:
        for name, value in entry.items():
            kind = step if name == "step" else LOGGED
            if not kind.holds(value):
                wrong = refusal(name, value, kind)
                raise UserError(
                    f"{workdir / LOG_NAME} is damaged: at step {entry['step']} {wrong}; was it edited?"
                )
    return entries


def read_warnings(workdir: Path) -> list[tuple[int, str]]:
    """(step, sentence) of every warning in log.jsonl in order; errors as in `files.read_jsonl`."""
    return [(entry["step"], entry[WARNING]) for entry in _read_lines(workdir) if WARNING in entry]


def _read_lines(workdir: Path) -> list[dict]:
    path = workdir / LOG_NAME
    entries = read_jsonl(path) if path.exists() else []
    if any(not isinstance(entry.get("step"), int) for entry in entries):
        raise UserError(f"{path} holds lines without a step; is it another program's file?")
    return entries


def rewind_log(workdir: Path, step: int) -> None:
    """Drops what was logged after `step`: those steps are about to be run, and logged, again.

    A damaged log is set aside, said on stderr, and a new one begins: it is no reason not to go on.
    """
    path = workdir / LOG_NAME
    try:
        kept = [entry for entry in _read_lines(workdir) if entry["step"] <= step]
    except UserError as error:
        aside = path.with_name(f"{LOG_NAME}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        print(f"warning: {error} It is now {aside.name}, and a new log begins.", file=sys.stderr)
        kept = []
    write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


class RateMeter:
    """Windows per second, and the share of time the loop waited for data, since the last reading.

    The first step compiles and is left out.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._step: int | None = None

    def restart(self, step: int) -> None:
        """Begins anew at the end of `step`."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting."""
        begin = time.perf_counter()
        yield
        if self._step is not None:
            self._waited += time.perf_counter() - begin

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last restart or reading, at the end of `step`; {} when no step was timed."""
        if self._step is None or step <= self._step:
            return {}
        elapsed = time.perf_counter() - self._since
        rates = {
            "windows_per_s": (step - self._step) * self._batch_size / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self.restart(step)
        return rates
