"""Joining processes, what the environment says about them, losing one, and the watchdog, without training anything."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from ecg_jax import cli
from ecg_jax.errors import UserError
from ecg_jax.training import distributed, launchers, peers
from ecg_jax.training.agreement import FirstFailed
from process_runs import PATIENCE, Processes, local

SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        (SRUN, 4),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NUM_NODES": "2"}, 1),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"JOB_COMPLETION_INDEX": "3"}, 0),
        ({"WORLD_SIZE": "1"}, 1),
    ],
)
def test_expected_processes(environ, expected):
    assert launchers.expected_processes(environ)[0] == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_NTASKS": "4"}, ["SLURM_NTASKS=4", "SLURM_PROCID", "srun ecg-jax pretrain"]),
        ({n: v for n, v in SRUN.items() if n != "SLURM_LOCALID"}, ["SLURM_LOCALID not set", "srun"]),
        ({"SLURM_JOB_NUM_NODES": "2"}, ["SLURM_JOB_NUM_NODES=2", "srun"]),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, ["srun started 2 tasks", "SLURM_NTASKS=4"]),
        ({"SLURM_NTASKS": "many"}, ["SLURM_NTASKS='many' is not a number"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_RANK"]),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE=2", "MPI"]),
        ({"WORLD_SIZE": "8", "RANK": "0"}, ["WORLD_SIZE=8", "torchrun"]),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_COORDINATOR_ADDRESS"]),
    ],
)
def test_half_configured_environments_are_refused(environ, words):
    with pytest.raises(UserError) as refusal:
        launchers.expected_processes(environ)
    assert all(word in str(refusal.value) for word in words)


def test_a_coordinator_on_loopback_serves_one_host():
    launchers.check_hosts("127.0.0.1:1234", {})
    launchers.check_hosts("node1:1234", SRUN)
    launchers.check_hosts("localhost:1234", SRUN | {"SLURM_STEP_NUM_NODES": "1"})
    for coordinator in ("127.0.0.1:1234", "localhost:1234", "[::1]:1234"):
        with pytest.raises(UserError, match=r"from its own host only, but SLURM_STEP_NUM_NODES=2"):
            launchers.check_hosts(coordinator, SRUN)
    for wrong in ("node1", "node1:", ":80", "node1:eighty", "node1:70000"):
        with pytest.raises(UserError, match="not of the form HOST:PORT"):
            launchers.check_hosts(wrong, {})


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),  # one for each task, all visible to both
        ({"SLURM_GPUS_ON_NODE": "2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}, [0]),  # bound to its own
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "2,3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_gpus_of_a_slurm_task(variables, devices):
    assert launchers.slurm_devices(SRUN | variables) == devices


@pytest.mark.parametrize(("gpus", "tasks"), [(4, "2(x2)"), (8, "1(x2)")])
def test_gpus_without_a_task_are_refused(gpus, tasks):
    environ = SRUN | {"SLURM_GPUS_ON_NODE": str(gpus), "SLURM_STEP_TASKS_PER_NODE": tasks}
    with pytest.raises(UserError, match=f"has {gpus} GPUs and {tasks[0]} task.*--ntasks-per-node={gpus}"):
        launchers.slurm_devices(environ)


def test_tasks_on_node():
    for node, expected in enumerate((4, 4, 3, 0)):
        environ = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)}
        assert launchers.tasks_on_node(environ) == expected


def test_other_commands_refuse_to_be_one_of_several():
    with pytest.raises(UserError, match="`ecg-jax probe` works in one process, but 4 were started"):
        launchers.refuse_several("probe", SRUN)
    with pytest.raises(UserError, match="but 2 were started"):
        launchers.refuse_several("probe", {"OMPI_COMM_WORLD_SIZE": "2"})
    launchers.refuse_several("probe", {"SLURM_NTASKS": "4"})  # typed into an allocation: it runs once
    launchers.refuse_several("probe", {})


def test_every_other_command_asks_before_it_starts(monkeypatch, capsys):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    for command in cli.COMMANDS:
        if command not in cli.IN_SEVERAL:
            assert cli.main([command, "--nonsense"]) == 2
            assert f"`ecg-jax {command}` works in one process" in capsys.readouterr().err


JOIN = """
HEARTBEAT_S = 60
import os, sys, time
from ecg_jax import cli, pretrain
from ecg_jax.errors import UserError
from ecg_jax.training import distributed
from ecg_jax.training.watchdog import Watchdog

def main(argv):
    numbers = [word.partition("=")[2] for word in argv[-3:]] if len(argv) > 2 else None
    together = distributed.initialise(
        *((numbers[0], int(numbers[1]), int(numbers[2])) if numbers else (None, None, None)),
        init_timeout_s=120, heartbeat_s=HEARTBEAT_S, run="test")
    with together:
        import jax
        print("joined", jax.process_index(), jax.process_count(), sorted(n for n in os.environ if "_proxy" in n))
        sys.stdout.flush()
        work()

pretrain.main = main
"""
END = (
    "\nfrom ecg_jax.cli import entry_point; sys.argv = ['ecg-jax', 'pretrain', *sys.argv[1:]]; entry_point()"
)


def joined(running):
    return all("joined" in text for text in running.texts("out").values())


def test_a_mistake_on_one_process_ends_all_with_its_sentence(tmp_path):
    work = "def work():\n  if PROCESS == 0: raise UserError('the folder is taken')\n  time.sleep(10_000)"
    with Processes(tmp_path, 3, code=f"{JOIN}{work}{END}") as running:
        codes, _, err = running.finish()
    assert codes == {0: 2, 1: 2, 2: 2}, err
    assert "ecg-jax pretrain: error: the folder is taken" in err[0]
    for process in (1, 2):
        assert "process 0 of 3 on " in err[process]
        assert "failed: the folder is taken" in err[process]


def test_a_process_without_its_devices_ends_all_at_once(tmp_path):
    """As when a driver fails on one host: the others do not wait for what JAX tells each other of devices."""
    platform = "import os; os.environ['JAX_PLATFORMS'] = ('cpu', 'nonsense')[PROCESS]"
    code = f"{platform}{JOIN}def work(): pass{END}"
    with Processes(tmp_path, 2, code=code) as running:
        codes, _, err = running.finish()
    assert codes == {0: 2, 1: 2}, err
    assert re.search(
        r"ecg-jax pretrain: error: process 1 of 2 on \S+ cannot use its devices: .*JAX_PLATFORMS", err[1]
    )
    assert re.search(
        r"process 0 of 2 on \S+ ends: process 1 of 2 on \S+ failed: process 1 of 2 on \S+ cannot use", err[0]
    )
    assert not any("Traceback" in text for text in err.values()), err


class NoPeers:
    """Stands for the other processes."""

    name, process = "process 0 of 2 on here", 0

    def __init__(self):
        self.told = []

    def tell(self, *message, **more):
        self.told.append(message)

    def wait_for_loss(self, seconds):
        pass


def test_a_port_that_is_taken_after_all_have_met_is_named(monkeypatch):
    peers = NoPeers()
    monkeypatch.setattr(distributed, "meet", lambda *args, **more: peers)
    monkeypatch.setattr(distributed.atexit, "register", lambda *args: None)
    monkeypatch.setattr(distributed, "_peers", None)  # set by the test

    def fail(*args, **more):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="cannot listen on port 1234 of the coordinator node1:1234: UNKNOWN"):
        distributed.initialise("node1:1234", 2, 0)
    assert [code for _, code in peers.told] == [2]


@pytest.mark.parametrize("name", ["init", "heartbeat"])
@pytest.mark.parametrize("seconds", [0.4, -1.0, float("nan")])
def test_timeouts_below_a_second_are_refused(name, seconds):
    with pytest.raises(UserError, match=f"--{name}-timeout={seconds:g} is too short"):
        distributed.initialise("node1:1234", 2, 0, **{f"{name}{'_timeout' * (name == 'init')}_s": seconds})


def test_strangers_do_not_keep_process_0_from_meeting_the_others():
    """Some connect and say nothing, one says something now and then and never an end."""
    with local.reserved_port() as port, contextlib.ExitStack() as stack:
        address, met = f"127.0.0.1:{port}", []
        deadline = time.monotonic() + 25
        first = threading.Thread(
            target=lambda: met.extend(peers._receive_all(address, port, 2, "the run", deadline, 25.0))
        )
        first.start()
        while True:
            try:
                strangers = [socket.create_connection(("127.0.0.1", port))]
                break
            except OSError:
                time.sleep(0.05)
        strangers += [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for stranger in strangers:
            stack.enter_context(stranger)

        def drip():
            with contextlib.suppress(OSError):
                while True:
                    strangers[0].send(b"x")
                    time.sleep(0.2)

        threading.Thread(target=drip, daemon=True).start()
        second = peers._join("127.0.0.1", port, 2, 1, "the run", deadline, 25.0)
        first.join()
        stack.enter_context(second.connection)
        stack.enter_context(met[0].connection)
    assert [peer.process for peer in met] == [1]


def test_an_ending_process_says_what_fails_in_it(capfd):
    def said(error):
        try:
            raise error
        except type(error):
            thread = threading.Thread(target=peers._say_what_fails_here)
            thread.start()
            thread.join()
        return capfd.readouterr().err

    text = said(ZeroDivisionError("a bug"))
    assert "Traceback" in text
    assert "ZeroDivisionError: a bug" in text
    for error in (UserError("a sentence"), FirstFailed("of process 0"), jax.errors.JaxRuntimeError("lost")):
        assert said(error) == ""


def test_a_process_that_falls_silent_is_lost(tmp_path):
    """As when its host is gone: nothing closes the connection."""
    code = f"{JOIN}HEARTBEAT_S = 3\ndef work(): time.sleep(10_000){END}"
    with Processes(tmp_path, 3, code=code) as running:
        running.wait(lambda: joined(running))
        running.kill(1, signal.SIGSTOP)
        codes = {process: running.children[process].wait(timeout=PATIENCE) for process in (0, 2)}
        running.kill(1, signal.SIGKILL)
        _, _, err = running.finish()
    assert codes == {0: 75, 2: 75}, err
    for process in codes:
        assert "process 1 on " in err[process]
        assert "nothing was heard of it for 3 s" in err[process]


def test_slurm_processes_find_each_other(tmp_path, monkeypatch):
    """By the variables that srun sets, past an HTTP proxy."""
    monkeypatch.setenv("http_proxy", "http://proxy:1")

    def variables(process):
        tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        mine = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": port}
        return SRUN | tasks | mine | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}

    with local.reserved_port() as number:
        port = str(number)
        with Processes(tmp_path, 2, code=f"{JOIN}def work(): pass{END}", env=variables) as running:
            codes, out, err = running.finish()
    assert codes == {0: 0, 1: 0}, err
    for process in (0, 1):
        assert f"process {process} of 2 on " in out[process]
        assert f"coordinator localhost:{port}, waiting up to 120 s for all" in out[process]
        assert f"joined {process} 2 []" in out[process]
        assert "warning: http_proxy unset" in err[process]


WATCH = """
import sys, time
from pathlib import Path
from ecg_jax.training.watchdog import Watchdog

def dawdle(seconds):
    time.sleep(seconds)
"""


def watch(code, *args):
    command = [sys.executable, "-c", WATCH + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_the_watchdog_ends_what_does_not_move(tmp_path):
    code = """
with Watchdog(0.3, Path(sys.argv[1])) as watchdog:
    watchdog.beat("step 7")
    dawdle(10_000)
"""
    done = watch(code, tmp_path)
    assert done.returncode == 75, done.stderr
    assert "no progress for 0.3 s in step 7, since " in done.stderr
    assert "dawdle" in done.stderr
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert "process 0 in step 7 since" in stacks
    assert "in dawdle" in stacks
    assert "stacks-0.txt" in done.stderr


def test_the_watchdog_is_patient_with_what_is_slow(tmp_path):
    code = """
with Watchdog(0.3) as watchdog:
    watchdog.beat("the checkpoint of step 7", slow=True)
    dawdle(10_000)
"""
    done = watch(code)
    assert done.returncode == 75
    assert "no progress for 1.5 s in the checkpoint of step 7" in done.stderr


def test_the_watchdog_leaves_alone_what_moves_or_does_not_want_it():
    code = """
with Watchdog(2.0) as watchdog:
    for step in range(60):
        watchdog.beat(f"step {step}")
        dawdle(0.05)
with Watchdog(0.0) as watchdog:
    dawdle(1.0)
with Watchdog(0.5):
    pass
dawdle(1.0)
"""
    done = watch(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_watchdog_does_not_count_time_in_which_the_process_was_stopped():
    code = """
with Watchdog(1.0) as watchdog:
    print("watched", flush=True)
    sys.stdin.readline()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", WATCH + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"watched\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(7)  # longer than the patience with a beginning
    child.send_signal(signal.SIGCONT)
    _, err = child.communicate(b"go on\n", timeout=PATIENCE)
    assert child.returncode == 0, err


def launch(n, code, *options):
    command = [sys.executable, local.__file__, "-n", str(n), *options, "--", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_launch_names_the_process_that_failed_first(tmp_path):
    me = "import sys, os, time; me = int(sys.argv[-1].partition('=')[2]); print('I am', me, flush=True); "
    done = launch(2, me + "time.sleep(10_000 * (me == 0)); sys.exit(3)", "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 3
    assert "launch: process 1 of 2 failed first: exit code 3" in done.stderr
    assert [(tmp_path / "logs" / f"process-{i}.log").read_text() for i in (0, 1)] == ["I am 0\n", "I am 1\n"]
    # One that is killed, and one that says that the run can be continued.
    done = launch(2, me + "os.kill(os.getpid(), 9) if me else (time.sleep(1), sys.exit(75))")
    assert done.returncode == 75
    assert "launch: process 1 of 2 failed first: killed by SIGKILL" in done.stderr
    assert launch(2, "pass").returncode == 0
