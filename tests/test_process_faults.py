"""What happens to the other processes of a run when one is killed, told to stop, stuck or missing."""

import itertools
import signal
import socket
import time

import pytest

from ecg_jax.training.metric_writers import read_log
from process_runs import COMMAND, Processes, logged
from test_pretrain import arguments, checksums, finish

CHANGES = {"tensorboard": False, "monitor__probe_every": 0, "model__layers": 1}


def stands_still(workdir):
    """Whether nothing was logged for much longer than a step takes, and for two seconds at least."""
    times = []

    def still():
        now, lines = time.monotonic(), len(read_log(workdir))
        times.extend([now] * (lines - len(times)))
        steps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
        return now - times[-1] > max(10 * steps[len(steps) // 2], 2.0)

    return still


def steps_saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(("victim", "stopped"), [(0, False), (2, True)])
def test_sigkill_of_one_process_during_a_step(tmp_path, synthetic_store, victim, stopped):
    """The others name it, end with code 75, and the run goes on from its newest checkpoint.

    A process that is stopped first leaves the others waiting in a collective, as on GPUs; else gloo fails.
    """
    workdir = tmp_path / "run"
    changes = CHANGES | {"batch_size": 6, "checkpoint_every": 3}
    args = arguments(workdir, synthetic_store, steps=100_000, **changes)
    with Processes(tmp_path / "outputs", 3, args=args) as running:
        running.wait(lambda: logged(workdir, 7))
        if stopped:
            running.kill(victim, signal.SIGSTOP)
            running.wait(stands_still(workdir))
        running.kill(victim, signal.SIGKILL)
        codes, _, err = running.finish()
    assert codes.pop(victim) == -signal.SIGKILL
    for process, code in codes.items():
        assert code == 75, err[process]
        assert f"process {victim} on {socket.gethostname()} is lost: its connection is closed" in err[process]
        assert "run the same command again" in err[process]
    if stopped:
        return  # that the run goes on is seen once
    last = steps_saved(workdir)[-1]
    code, out, stderr = finish(arguments(workdir, synthetic_store, steps=last + 1, **changes))
    assert code == 0, stderr
    assert f"continuing at step {last} of {last + 1}" in out


def stop_and_compare(tmp_path, store, send):
    workdir = tmp_path / "run"
    args = arguments(workdir, store, steps=100_000, **CHANGES)
    with Processes(tmp_path / "outputs", 2, args=args) as running:
        running.wait(lambda: logged(workdir, 4))
        send(running)
        codes, out, err = running.finish()
    assert codes == {0: 0, 1: 0}, err
    last = steps_saved(workdir)[-1]
    assert all(f"preemption at step {last} of 100000: saved" in text for text in out.values()), out
    assert checksums(workdir, last)
    assert read_log(workdir)[-1]["step"] == last


def test_sigterm_to_one_process(tmp_path, synthetic_store):
    stop_and_compare(tmp_path, synthetic_store, lambda running: running.kill(1, signal.SIGTERM))


def test_sigterm_to_the_process_group(tmp_path, synthetic_store):
    stop_and_compare(tmp_path, synthetic_store, lambda running: running.kill_group(signal.SIGTERM))


STUCK = """
import time
from ecg_jax import pretrain
from ecg_jax.training import watchdog

watchdog.SLOW = 60  # the beginning and compiling may take long on a busy machine

def batches_that_stop(*args, **fields):
    batches = real(*args, **fields)
    def next_or_hang():
        for _ in range(4):
            yield next(batches)
        wait_for_ever()
    return next_or_hang()

def wait_for_ever():
    time.sleep(10_000)

real = pretrain.train_batches
if PROCESS == 1:
    pretrain.train_batches = batches_that_stop
"""


def test_a_stuck_process_is_ended_by_the_watchdog(tmp_path, synthetic_store):
    """The one that waits for its data and the one that waits for the other both write down their stacks."""
    workdir = tmp_path / "run"
    # As many steps as elsewhere: their number is part of the compiled program.
    args = arguments(workdir, synthetic_store, steps=100_000, stall_timeout_s=10, **CHANGES)
    with Processes(tmp_path / "outputs", 2, code=STUCK + COMMAND, args=args) as running:
        codes, _, err = running.finish()
    assert codes == {0: 75, 1: 75}, err
    assert any("no progress for 10 s in " in text for text in err.values()), err
    stacks = [(workdir / f"stacks-{i}.txt").read_text() for i in (0, 1)]
    assert "process 1 in reading the batch of step 5 since" in stacks[1]
    assert "wait_for_ever" in stacks[1]
    assert "wait_for_ever" in err[1]
    assert "process 0 in step" in stacks[0]
    assert "pretrain.py" in stacks[0]


def test_a_port_in_use(tmp_path, synthetic_store):
    """Process 0 says so at once, before it joins anything."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        workdir = tmp_path / "run"
        args = arguments(workdir, synthetic_store)
        code, _, err = finish(
            [*args, f"--coordinator=127.0.0.1:{port}", "--num-processes=2", "--process-id=0"]
        )
    assert code == 2, err
    sentences = [line for line in err.splitlines() if line.startswith("ecg-jax pretrain: error:")]
    assert len(sentences) == 1
    assert f"cannot listen on port {port}" in sentences[0]
    assert "Address already in use" in sentences[0]
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, "not started by srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JAX detects no cluster here"),
    ],
    ids=["slurm", "mpi", "kubernetes"],
)
def test_a_half_configured_cluster_is_refused(tmp_path, synthetic_store, monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    workdir = tmp_path / "run"
    code, _, err = finish(arguments(workdir, synthetic_store))
    assert code == 2, err
    assert err.count("ecg-jax pretrain: error:") == 1
    assert sentence in err
    assert "--num-processes=1" in err
    assert not workdir.exists()


def test_a_process_that_never_starts(tmp_path, synthetic_store):
    """Those that wait name it, whether it is process 0 or another, and end with code 75."""
    args = [*arguments(tmp_path / "run", synthetic_store), "--init-timeout=2"]
    with (
        Processes(tmp_path / "without 2", 3, args=args, start=[0, 1]) as without_2,
        Processes(tmp_path / "without 0", 3, args=args, start=[1]) as without_0,
    ):
        codes, out, err = without_2.finish()
        assert codes[0] == 75, err
        assert "process 0 of 3 on " in out[0]
        # Process 1 may have come too late itself.
        assert "2 of 3 did not start within 2 s" in err[0]
        assert codes[1] == 75, err
        codes, _, err = without_0.finish()
        assert codes == {1: 75}, err
        assert f"process 0 of 3 was not to be found at {without_0.coordinator} within 2 s" in err[1]
    assert not (tmp_path / "run").exists()
