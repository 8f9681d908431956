"""Processes that tell each other how it went, as two real processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from ecg_jax.errors import UserError
from ecg_jax.training.agreement import answers, on_first

# Each prints what it saw as one line of JSON. Process 0 runs what `on_first` is given, process 1 hears of it.
TWO = """
import json, sys
import jax
port, process = int(sys.argv[1]), int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
from ecg_jax.errors import UserError
from ecg_jax.training.agreement import NoAnswer, answers, on_first

ran, seen = [], {}
def act(result=None, error=None):
    ran.append(process)
    if error: raise error
    return result
def outcome(function, *args, **kwargs):
    try: return function(*args, **kwargs)
    except (UserError, NoAnswer, OSError) as error: return f"{type(error).__name__}: {error}"

seen["answers"] = answers("a question", {"from": process})
seen["result"] = on_first("a thing", lambda: act([1, "two"]))
seen["again"] = on_first("a thing", lambda: act([3]))
seen["refused"] = outcome(on_first, "a thing", lambda: act(error=UserError("do this instead")))
seen["failed"] = outcome(on_first, "opening a file", lambda: act(error=OSError("no such disk")))
if process == 1:
    seen["silence"] = outcome(answers, "a question that nobody else heard", "me", wait_s=0.2)
seen["ran"] = ran
print(json.dumps(seen))
"""


def test_two_processes_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(process)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        first, second = (
            json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running
        )
    finally:
        for process in running:
            process.kill()
    for name, expected in {
        "answers": [{"from": 0}, {"from": 1}],
        "result": [1, "two"],
        "again": [3],
        "refused": "UserError: do this instead",
    }.items():
        assert first[name] == second[name] == expected
    assert first["failed"] == "OSError: no such disk"
    assert second["failed"] == "NoAnswer: process 0 failed at opening a file: OSError: no such disk"
    silence = "NoAnswer: process 0 did not answer about a question that nobody else heard within 0.2 s"
    assert second["silence"] == silence
    assert first["ran"] == [0, 0, 0, 0]
    assert second["ran"] == []


def test_one_process_asks_nobody():
    assert jax.process_count() == 1
    assert answers("a question", 7) == [7]
    assert on_first("a thing", lambda: 7) == 7
    with pytest.raises(UserError, match="do this"):
        on_first("a thing", lambda: (_ for _ in ()).throw(UserError("do this")))
