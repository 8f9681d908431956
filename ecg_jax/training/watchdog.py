"""A thread that ends a run which makes no progress: a collective that waits for ever, a disk that does not answer.

A stuck process is no error to anybody: JAX's heartbeats come from other threads, and a cluster's clock runs on. So the
loop says what it begins, and when nothing new begins for too long, the stacks of all threads are written down and the
run ends with exit code 75, to be started again by whoever does that.
"""

import faulthandler
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from ecg_jax.training import distributed

#: How much longer than the timeout what is slow by nature may take: compiling, reading and writing a checkpoint.
SLOW = 5.0


class Watchdog:
    """Ends the run when `beat` is not called for too long; use as a context manager.

    All processes of a run end: the first that is stuck for too long tells the others, and each writes down its own
    stacks, to stderr and to `folder/stacks-PROCESS.txt`. Time in which the process was stopped or the computer slept
    does not count.
    """

    def __init__(self, timeout_s: float, folder: Path | None = None):
        """Begins nothing yet.

        Args:
            timeout_s: seconds without a beat after which the run ends; 0: never.
            folder: of the run, for the stacks; None: stderr only.
        """
        self._timeout_s = timeout_s
        self._folder = folder
        self._process = distributed.process_id()  # JAX would start its devices to tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("the beginning", slow=True)

    def beat(self, what: str, *, slow: bool = False) -> None:
        """Says what begins now.

        Args:
            what: completes "no progress since ... in <what>".
            slow: whether it may take `SLOW` times as long.
        """
        # One assignment: the thread sees the old beat or the new one.
        self._beat = (what, self._timeout_s * (SLOW if slow else 1.0), time.strftime("%H:%M:%S"), object())

    def __enter__(self) -> "Watchdog":
        if self._timeout_s:
            distributed.when_stuck(self.dump)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, self._timeout_s / 10)
        current, waited, last = None, 0.0, time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            what, limit, since, mark = self._beat
            # A long gap is one in which this thread did not run either.
            waited = waited + min(now - last, 2 * pause) if mark is current else 0.0
            current, last = mark, now
            if waited > limit:
                self.dump()
                where = f"; stacks in {self._stacks}" if self._folder else ""
                distributed.end_run(
                    f"no progress for {limit:g} s in {what}, since {since}{where}; run the same command again to "
                    "continue from the newest checkpoint"
                )

    @property
    def _stacks(self) -> Path:
        return self._folder / f"stacks-{self._process}.txt"

    def dump(self) -> None:
        """Writes down what this process was doing, and the stacks of all its threads."""
        what, _, since, _ = self._beat
        headline = f"process {self._process} in {what} since {since}; its threads:"
        distributed.say(f"ecg-jax: {headline}")
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if self._folder:
            # Perhaps it is the folder's disk that does not answer.
            writing = threading.Thread(target=self._write, args=(headline,), daemon=True)
            writing.start()
            writing.join(5.0)

    def _write(self, headline: str) -> None:
        try:
            with self._stacks.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {headline}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            distributed.say(f"ecg-jax: {self._stacks} cannot be written: {error.strerror}")
