"""Units of work in several processes, which end with the one that started them."""

from __future__ import annotations

import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ecg_jax.data.progress import Progress
from ecg_jax.errors import UserError

Task = TypeVar("Task")


def do_all(
    do: Callable[[Task, Callable[[], None]], None], tasks: Iterable[Task], workers: int, bar: Progress
) -> None:
    """Does all tasks, in this process for one worker, else in so many others; the first error ends it.

    Args:
      do: gets a task and a function to call after each recording; leaves its task unfinished when `stopped()`. It and
        the tasks can be pickled.
      tasks: made when their turn comes, for all at once may be more than memory holds.
      workers: processes.
      bar: is told how many recordings are done.

    Raises:
      UserError: a worker process died.
    """
    if workers <= 1:
        for task in tasks:
            do(task, lambda: bar.update(bar.fresh + 1))
        return
    # spawn, not fork: this process may run threads (tqdm, pyarrow, a notebook's kernel).
    context = multiprocessing.get_context("spawn")
    stop, counter = context.Event(), context.Value(ctypes.c_int64)
    tasks, waiting = iter(tasks), set()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (stop, counter)) as pool:
        try:
            while True:
                for task in itertools.islice(tasks, 2 * workers - len(waiting)):
                    waiting.add(pool.submit(_do_in_worker, do, task))
                if not waiting:
                    break
                finished, waiting = concurrent.futures.wait(
                    waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    future.result()
                # Without its lock, which a worker that was killed may hold for ever.
                bar.update(counter.get_obj().value)
        except BrokenProcessPool:
            raise UserError(
                "A worker process died (killed, out of memory, or started by a script without "
                '`if __name__ == "__main__"`?); run the same command again, it goes on where it stopped, if need be '
                "with fewer --workers."
            ) from None
        finally:
            # On success nothing is left to stop. On an error or Ctrl-C the workers leave their units unfinished.
            stop.set()
            pool.shutdown(cancel_futures=True)


_stop = threading.Event()
_counter = None  # recordings that all workers together have dealt with; in a worker process only


def stopped() -> bool:
    """Whether this process is a worker whose task is not wanted any more."""
    return _stop.is_set()


def _start(stop, counter) -> None:
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


def _do_in_worker(do: Callable[[Task, Callable[[], None]], None], task: Task) -> None:
    def count() -> None:
        with _counter.get_lock():
            _counter.value += 1

    do(task, count)
