"""Real processes as one run, as a cluster would start them: all in one process group, each with its own output."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ecg_jax.training.metric_writers import read_log
from test_pretrain import environment

LOCAL = Path(__file__).parents[1] / "launch" / "local.py"
PATIENCE = 300  # seconds that a test waits before it gives up

_SPEC = importlib.util.spec_from_file_location("launch_local", LOCAL)
local = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local)

# JAX lets process 0 alone keep what it compiled. On CPUs the others' programs have keys of their own, so they would be
# compiled in every test. JAX has no public name for it.
KEEP_COMPILED = """
from jax._src import compilation_cache, compiler

def write(key, seconds, name, backend, executable, callbacks):
    real_write(key, seconds, name, backend, executable, callbacks)
    if compiler.distributed.global_state.process_id and seconds >= 0.5:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

real_write, compiler._cache_write = compiler._cache_write, write
"""
COMMAND = KEEP_COMPILED + "from ecg_jax.cli import entry_point; entry_point()"


class Processes:
    """N processes, each running `code` with the process's number in `PROCESS`; a context manager that leaves none."""

    def __init__(self, folder, n, *, code=COMMAND, args=(), devices=1, start=None, env=None):
        """Starts those of the processes 0 .. n-1 that `start` names, all by default.

        With `env`, a function from the process's number to variables, they are given no arguments of ours.
        """
        self._held = local.reserved_port()
        self.coordinator = f"127.0.0.1:{self._held.__enter__()}"
        self._folder, self.children = Path(folder), {}
        self._folder.mkdir(parents=True, exist_ok=True)
        for i in range(n) if start is None else start:
            numbers = [f"--coordinator={self.coordinator}", f"--num-processes={n}", f"--process-id={i}"]
            with (self._folder / f"{i}.out").open("w") as out, (self._folder / f"{i}.err").open("w") as err:
                self.children[i] = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        f"PROCESS = {i}\n{code}",
                        *args,
                        *(numbers if env is None else ()),
                    ],
                    env=environment(devices) | (env(i) if env else {}),
                    stdout=out,
                    stderr=err,
                    process_group=next(iter(self.children.values())).pid if self.children else 0,
                )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
            child.wait()
        self._held.__exit__(None, None, None)

    def kill(self, process, number):
        self.children[process].send_signal(number)

    def kill_group(self, number):
        os.killpg(next(iter(self.children.values())).pid, number)

    def finish(self):
        """Exit codes, stdouts and stderrs of all, by process."""
        codes = {i: child.wait(timeout=PATIENCE) for i, child in self.children.items()}
        return codes, self.texts("out"), self.texts("err")

    def texts(self, kind):
        return {i: (self._folder / f"{i}.{kind}").read_text() for i in self.children}

    def wait(self, done):
        """Until `done()`, as long as all live."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert all(child.poll() is None for child in self.children.values()), self.texts("err")
            assert time.monotonic() < deadline, self.texts("err")
            time.sleep(0.02)


def logged(workdir, steps):
    """Whether that many steps are in the log."""
    return (workdir / "log.jsonl").exists() and len(read_log(workdir)) >= steps


#: Before the command: writes down the batches, and the files and folders that a process makes through Python.
RECORD = """
import json, os, sys, zlib
from ecg_jax import pretrain
from ecg_jax.data.store import Store

trail = open(f"{os.environ['TRAIL']}-{PROCESS}.jsonl", "a", buffering=1)

def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and set(str(arguments[1])) & set("wax+"):
        print(json.dumps({"written": arguments[0]}), file=trail)
    elif event in ("os.mkdir", "os.rename"):
        print(json.dumps({"written": str(arguments[event == "os.rename"])}), file=trail)

class Recorded:
    def __init__(self, batches):
        self._batches = batches
    def __next__(self):
        batch = next(self._batches)
        for i, row, signal in zip(batch["record_index"], batch["row"], batch["signal"]):
            print(json.dumps({"taken": [int(i), int(row), zlib.crc32(signal.tobytes())]}), file=trail)
        return batch
    def close(self):
        self._batches.close()

def read_crops(store, starts, *rest, **more):
    print(json.dumps({"read": [int(start) for start in starts]}), file=trail)
    return real_read(store, starts, *rest, **more)

real_batches, real_read = pretrain.train_batches, Store.read_crops
pretrain.train_batches = lambda *a, **k: Recorded(real_batches(*a, **k))
Store.read_crops = read_crops
sys.addaudithook(audit)
"""


def trail(prefix, process, kind):
    """What a process wrote down of one kind, in order."""
    lines = Path(f"{prefix}-{process}.jsonl").read_text().splitlines()
    return [entry[kind] for entry in map(json.loads, lines) if kind in entry]
