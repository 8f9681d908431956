"""Processes that tell each other how it went, as two real processes."""

import json

import jax
import pytest

from ecg_jax.errors import UserError
from ecg_jax.training.agreement import answers, on_first
from process_runs import Processes

# Each prints what it saw as one line of JSON. Process 0 runs what `on_first` is given, process 1 hears of it. At last
# process 0 fails, and waits on its way out, as for a write in progress, until process 1 has given up otherwise.
TWO = """
import json, os, sys, time
import jax
from ecg_jax.errors import UserError
from ecg_jax.training import agreement, distributed
from ecg_jax.training.agreement import FirstFailed, NoAnswer, answers, on_first

ran, seen = [], {}
def act(result=None, error=None):
    ran.append(PROCESS)
    if error: raise error
    return result
def outcome(function, *args, **kwargs):
    try: return function(*args, **kwargs)
    except (UserError, FirstFailed, NoAnswer, OSError) as error: return f"{type(error).__name__}: {error}"

class Write:
    def __enter__(self): pass
    def __exit__(self, *error):
        while PROCESS == 0 and "waiting for its end" not in open(f"{os.environ['FOLDER']}/1.err").read():
            time.sleep(0.05)

coordinator, processes, process = [word.partition("=")[2] for word in sys.argv[1:]]
with distributed.initialise(coordinator, int(processes), int(process), run="test"), Write():
    seen["answers"] = answers("a question", {"from": PROCESS})
    seen["result"] = on_first("a thing", lambda: act([1, "two"]))
    seen["again"] = on_first("a thing", lambda: act([3]))
    seen["refused"] = outcome(on_first, "a thing", lambda: act(error=UserError("do this instead")))
    seen["failed"] = outcome(on_first, "opening a file", lambda: act(error=OSError("no such disk")))
    if PROCESS == 1:
        seen["silence"] = outcome(answers, "a question that nobody else heard", "me", wait_s=0.2)
    else:
        next(agreement._COUNTS)
    seen["ran"] = ran
    print(json.dumps(seen), flush=True)
    on_first("saving step 6", lambda: act(error=MemoryError("of a host")))
"""


def test_two_processes_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    with Processes(tmp_path, 2, code=TWO) as running:
        codes, out, err = running.finish()
    first, second = (json.loads(out[process].splitlines()[-1]) for process in (0, 1))
    for name, expected in {
        "answers": [{"from": 0}, {"from": 1}],
        "result": [1, "two"],
        "again": [3],
        "refused": "UserError: do this instead",
    }.items():
        assert first[name] == second[name] == expected
    assert first["failed"] == "OSError: no such disk"
    assert second["failed"] == "FirstFailed: process 0 failed at opening a file: OSError: no such disk"
    silence = "NoAnswer: process 0 did not answer about a question that nobody else heard within 0.2 s"
    assert second["silence"] == silence
    assert first["ran"] == [0, 0, 0, 0]
    assert second["ran"] == []
    # What failed on process 0 ends both with its code, and its traceback is there.
    assert codes == {0: 1, 1: 1}, err
    assert "Traceback" in err[0]
    assert "MemoryError: of a host" in err[0]
    assert "process 0 failed at saving step 6: MemoryError: of a host; waiting for its end" in err[1]
    assert "failed: MemoryError: of a host" in err[1]


def test_one_process_asks_nobody():
    assert jax.process_count() == 1
    assert answers("a question", 7) == [7]
    assert on_first("a thing", lambda: 7) == 7
    with pytest.raises(UserError, match="do this"):
        on_first("a thing", lambda: (_ for _ in ()).throw(UserError("do this")))
