"""Programs of clusters that are not there, for a temporary PATH: each writes down how it was called; `srun` starts
local processes with the variables of a SLURM step, as `srun --kill-on-bad-exit=1` does.
"""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

SRUN = """\
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    assert command.pop(0) == "--kill-on-bad-exit=1"
tasks = int(os.environ["SLURM_NTASKS"])
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": "1"}
running = {}
for i in range(tasks):
    own = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0"}
    running[i] = subprocess.Popen(command, env=os.environ | step | own, start_new_session=True)
# scancel reads the numbers of the sessions, each of which holds a task and all it started.
with open(os.environ["FAKE_STEPS"], "w") as file:
    file.write(" ".join(str(task.pid) for task in running.values()))
codes = []
while running:
    for i, task in list(running.items()):
        if task.poll() is None:
            continue
        del running[i]
        codes.append(task.returncode if task.returncode >= 0 else 128 - task.returncode)
        if task.returncode:
            for other in running.values():
                os.killpg(other.pid, signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(codes))
"""

SCANCEL = """\
import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
for task in open(os.environ["FAKE_STEPS"]).read().split():
    os.killpg(int(task), signal.SIGTERM)
"""

#: The command itself, for tests that are only about what comes after it: EXIT_CODES has one word for each task.
PRETEND = """\
import os, signal, sys, time
word = os.environ["EXIT_CODES"].split()[int(os.environ.get("SLURM_PROCID", "0"))]
if word == "hangs":
    time.sleep(600)
if word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "saves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(f"saved-{os.getpid()}", "w").close()))
    open(f"waits-{os.getpid()}", "w").close()
    time.sleep(600)
sys.exit(int(word))
"""


def write_program(folder: Path, name: str, python: str) -> None:
    """An executable that first writes its name and arguments as a line into the file $CALLS."""
    note = (
        "import json, os, sys\n"
        "with open(os.environ['CALLS'], 'a') as calls:\n"
        f"    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
    )
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{note}{python}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cluster:
    """A folder to submit from, and programs that stand for a cluster's.

    Attributes:
      folder: where jobs start, with `.venv/bin/activate` in it.
      bin: comes first in the PATH of `environment`.
      environment: of everything that is started.
    """

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{self.bin}:$PATH"\n')
        self._calls = folder / "calls"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = kept | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "FAKE_STEPS": str(folder / "steps"),
            "HOME": str(folder),
            "JAX_NUM_CPU_DEVICES": "1",
            "https_proxy": "http://a-proxy-that-would-hang:1",
        }
        for name, python in {"srun": SRUN, "scancel": SCANCEL, "scontrol": "", "ecg-jax": PRETEND}.items():
            write_program(self.bin, name, python)

    def real_command(self) -> None:
        """`ecg-jax` becomes the real one."""
        write_program(self.bin, "ecg-jax", "from ecg_jax.cli import entry_point; entry_point()\n")

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of all calls of a program so far."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [words[1:] for words in map(json.loads, lines) if words[0] == name]

    def start_job(self, script: Path, **variables: str) -> subprocess.Popen:
        """What sbatch would do with a batch script: its `#SBATCH` options become variables, and it runs."""
        options = dict(
            re.findall(
                r"--([\w-]+)(?:=(\S+))?", " ".join(re.findall(r"^#SBATCH (.*)", script.read_text(), re.M))
            )
        )
        ntasks = int(options["nodes"]) * int(options["ntasks-per-node"])
        job = {
            "SLURM_JOB_ID": str(free_job_id()),
            "SLURM_NTASKS": str(ntasks),
            "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
            "SLURM_GPUS_PER_NODE": options["gpus-per-node"],
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_PROCID": "0",  # SLURM sets it in the batch shell too
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = self.environment | job | variables
        return subprocess.Popen(["bash", str(script)], cwd=self.folder, env=environment, **pipes)


def free_job_id() -> int:
    """A SLURM job number whose port (61440 + number % 4096, as JAX counts) nobody listens on."""
    for number in range(os.getpid() % 4096, os.getpid() % 4096 + 4096):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 61440 + number % 4096))
            except OSError:
                continue
            return number + 4096
    raise RuntimeError("no port of JAX's SLURM range is free")


def until(condition, process, seconds=600):
    """Waits for something that a process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
