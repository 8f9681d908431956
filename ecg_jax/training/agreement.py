"""Processes of one run that must not part: what one of them did is known to all before any goes on.

Messages go through JAX's coordination service, not through the devices: they may wait with a limit, say whom they wait
for, and are safe where one process has failed and the others have not.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from ecg_jax.errors import UserError

#: Seconds that a process waits for the word of another; above all for a slow disk there.
WAIT_S = 1800.0

_COUNTS = itertools.count()  # every process comes by the same agreements in the same order


class NoAnswer(RuntimeError):
    """A process did not answer in time, or is gone: nothing the user did wrong, and running again continues."""


class FirstFailed(RuntimeError):
    """Process 0 said that it failed; it ends the run itself, with its own traceback and exit code."""


def answers(topic: str, answer: Any, *, wait_s: float = WAIT_S) -> list[Any]:
    """What every process says to a question that all of them come to.

    Args:
        topic: what it is about, as in "process 3 did not answer about <topic>".
        answer: of this process; JSON-able.
        wait_s: seconds to wait for each process.

    Returns:
        The answers in the order of the processes, the same on every process.

    Raises:
        NoAnswer: a process did not answer in time.
    """
    if jax.process_count() == 1:
        return [answer]
    key = _key(topic)
    _say(f"{key}/{jax.process_index()}", answer)
    return [_hear(f"{key}/{process}", topic, process, wait_s) for process in range(jax.process_count())]


def on_first(topic: str, action: Callable[[], Any], *, wait_s: float = WAIT_S) -> Any:
    """What `action` returns on process 0, on every process; elsewhere it does not run.

    Args:
        topic: what it is about, as in "process 0 did not answer about <topic>".
        action: returns what JSON can hold.
        wait_s: seconds that the others wait for process 0.

    Raises:
        UserError: process 0 raised it; every process does, with the same sentence.
        FirstFailed: process 0 failed in another way, which it raises itself.
        NoAnswer: process 0 did not answer in time.
    """
    if jax.process_count() == 1:
        return action()
    key = _key(topic)
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            _say(key, {"refused": str(error)})
            raise
        except BaseException as error:
            _say(key, {"failed": f"{type(error).__name__}: {error}"})
            raise
        _say(key, {"result": result})
        return result
    heard = _hear(key, topic, 0, wait_s)
    if "refused" in heard:
        raise UserError(heard["refused"])
    if "failed" in heard:
        raise FirstFailed(f"process 0 failed at {topic}: {heard['failed']}")
    return heard["result"]


def _key(topic: str) -> str:
    return f"ecg_jax/{next(_COUNTS)}/{topic}"


def _client():
    # JAX has no public name for it; its own multihost_utils and Orbax reach it in this way.
    from jax._src import distributed

    return distributed.global_state.client


def _say(key: str, message: Any) -> None:
    _client().key_value_set(key, json.dumps(message))


def _hear(key: str, topic: str, process: int, wait_s: float) -> Any:
    try:
        return json.loads(_client().blocking_key_value_get(key, round(wait_s * 1000)))
    except jax.errors.JaxRuntimeError as error:
        why = (
            f"within {wait_s:g} s" if "DEADLINE_EXCEEDED" in str(error) else f"({str(error).splitlines()[0]})"
        )
        raise NoAnswer(f"process {process} did not answer about {topic} {why}") from error
