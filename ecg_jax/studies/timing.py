"""Times of programs that take turns, so that whatever slows the machine down slows all of them down."""

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

#: Calls of one program in a row, at most.
MOST_CALLS = 100


class Timing(NamedTuple):
    """Seconds of one call over the repeats: the median, the quartiles, and the shortest."""

    median: float
    low: float
    high: float
    best: float


def seconds_of(run: Callable[[], Any], calls: int = 1) -> float:
    """Mean seconds of `calls` calls in a row of a function that returns arrays which may not be there yet.

    An accelerator does what it is sent one after the other, and the host does not wait in between. A CPU would run
    calls that do not depend on each other at the same time, and with few threads they can block each other for ever.
    """
    waits = jax.default_backend() == "cpu"
    begin = time.perf_counter()
    for _ in range(calls):
        result = run()
        if waits:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def time_in_turns(
    work: dict[Hashable, Callable[[], Any]], *, repeats: int, least_s: float = 0.05, warm_up: int = 1
) -> dict[Hashable, Timing]:
    """Times functions, one after the other in each of `repeats` turns; every turn begins with another one.

    Args:
        work: name -> function without arguments that returns the arrays it computes.
        repeats: turns.
        least_s: a function that takes less is called several times in a row, as steps of a training run follow each
            other, and the mean counts.
        warm_up: calls of each before anything is timed.

    Returns:
        Name -> seconds of one call.
    """
    if not work:
        return {}
    calls, seconds = {}, {name: [] for name in work}
    for name, run in work.items():
        for _ in range(warm_up):
            jax.block_until_ready(run())
        calls[name] = int(np.clip(np.ceil(least_s / max(seconds_of(run), 1e-9)), 1, MOST_CALLS))
    names = list(work)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(work[name], calls[name]))
    return {
        name: Timing(*(float(q) for q in np.percentile(times, (50, 25, 75))), best=min(times))
        for name, times in seconds.items()
    }
