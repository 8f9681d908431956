"""Faults around checkpoints in runs of several real processes: a process killed in the middle of a save, a full disk, a
half-deleted checkpoint, another store. Each process is started on its own, so that the end of each is seen.
"""

import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.training.checkpoint import finished_steps
from test_pretrain import arguments, checksums, environment, trajectory

#: Seconds in which every process of a run must end after one was lost. They end at once; the rest is for slow machines.
ENDS_WITHIN_S = 120
SETTINGS = {"steps": 12, "checkpoint_every": 5, "model__layers": 1, "tensorboard": False}

# Runs in a process before the command: calls `at_commit(step)` when a checkpoint is written and about to get its name,
# and `after_commit(step)` when it has it.
HOOKS = """
import os, pathlib, resource, time
def at_commit(step): pass
def after_commit(step): pass
rename = os.rename
def renaming(source, target, *args, **kwargs):
    path = pathlib.Path(target)
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    if step is not None: at_commit(step)
    rename(source, target, *args, **kwargs)
    if step is not None: after_commit(step)
os.rename = renaming
"""


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def start_all(args, processes=2, before=""):
    """Starts the command as processes of one device each, of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"{before}\nfrom ecg_jax.cli import entry_point; entry_point()"
    return [
        subprocess.Popen(
            [
                sys.executable, "-c", code, *args,
                f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={process}",
            ],
            env=environment(devices=1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]  # fmt: skip


def end_all(running, timeout=300):
    """Waits for every process; one that does not end in time fails the test."""
    deadline = time.monotonic() + timeout
    try:
        ended = []
        for process in running:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            ended.append(Ended(process.returncode, out, err))
        return ended
    finally:
        for process in running:
            process.kill()


def finish_all(args, processes=2, before=""):
    return end_all(start_all(args, processes, before))


def assert_finished(ended, resumed_at):
    assert [process.code for process in ended] == [0] * len(ended), [process.err for process in ended]
    assert f"continuing at step {resumed_at} of 12" in ended[0].out


def assert_same_run(workdir, whole):
    """Losses of every step and the last parameters, bit for bit."""
    assert trajectory(workdir) == trajectory(whole)
    assert checksums(workdir, 12) == checksums(whole, 12)


def half_written(workdir):
    """Folders of checkpoints that did not get their names."""
    return [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, synthetic_store):
    """A run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    ended = finish_all(arguments(workdir, synthetic_store, **SETTINGS))
    assert [process.code for process in ended] == [0, 0], [process.err for process in ended]
    assert finished_steps(workdir)[-1] == 12
    return workdir


def test_sigkill_of_one_process_during_a_save(tmp_path, whole, synthetic_store):
    """The checkpoint of step 10 is written but not yet named when a process is killed, first one, then the other."""
    workdir = tmp_path / "run"
    args = arguments(workdir, synthetic_store, **SETTINGS)
    for killed in (1, 0):
        marker = tmp_path / f"saving_{killed}"
        hold = f"def at_commit(step):\n    if step == 10: pathlib.Path({str(marker)!r}).touch(); time.sleep(3600)\n"
        running = start_all(args, before=HOOKS + hold)
        deadline = time.monotonic() + 300
        while not marker.exists():
            assert all(process.poll() is None for process in running), end_all(running)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running[killed].kill()
        ended = end_all(running, ENDS_WITHIN_S)
        assert ended[killed].code == -signal.SIGKILL
        survivor = ended[1 - killed]
        assert survivor.code == 75, survivor.err
        assert re.search(rf"process {killed} on \S+ is lost", survivor.err)
        assert finished_steps(workdir) == [5]
        assert len(half_written(workdir)) == 1, (
            "of both kills together: the second run removed what the first left"
        )

    ended = finish_all(args)
    assert_finished(ended, resumed_at=5)
    assert half_written(workdir) == []
    assert_same_run(workdir, whole)


def test_a_full_disk_during_a_save(tmp_path, whole, synthetic_store):
    """After the checkpoint of step 5 no file may grow beyond 16 kB: logs fit, a checkpoint does not."""
    workdir = tmp_path / "run"
    args = arguments(workdir, synthetic_store, **SETTINGS)
    full = "def after_commit(step): resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))\n"
    for ended in finish_all(args, before=HOOKS + full):
        assert ended.code == 2, ended.err
        assert "Traceback" not in ended.err
        sentences = [
            line for line in ended.err.splitlines() if "a checkpoint could not be written to" in line
        ]
        assert sentences, ended.err
        assert all("the last complete one is step 5. Free some space" in sentence for sentence in sentences)
        assert sum("ecg-jax pretrain: error" in sentence for sentence in sentences) <= 1
    assert finished_steps(workdir) == [5]

    assert_finished(finish_all(args), resumed_at=5)
    assert half_written(workdir) == []
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_half_deleted_checkpoint(tmp_path, whole, synthetic_store, processes):
    """As when someone's clean-up was stopped in the middle: some files of the newest checkpoint are gone."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "12"
    shutil.rmtree(next((newest / "state").glob("ocdbt.process_*")))
    (newest / "meta" / "metadata").unlink()
    ended = finish_all(arguments(workdir, synthetic_store, **SETTINGS), processes)
    assert_finished(ended, resumed_at=10)
    said = [process.err.count("checkpoint 12 is damaged") for process in ended]
    assert said == [1] + [0] * (processes - 1)
    assert (workdir / "damaged_checkpoints" / "12" / "state").is_dir()
    if processes == 2:
        assert_same_run(workdir, whole)
    # What two processes write is what one does, and as much of it.
    one_or_two, two = (list((run / "checkpoints" / "12").rglob("*")) for run in (workdir, whole))
    assert {path.name for path in two if "process" in path.name} == {"ocdbt.process_0"}
    sizes = [sum(path.stat().st_size for path in paths) for paths in (one_or_two, two)]
    assert 2 / 3 < sizes[0] / sizes[1] < 3 / 2, "by timing, the format keeps more or less of its own tables"
    metas = [
        json.loads((run / "checkpoints" / "12" / "meta" / "metadata").read_text()) for run in (workdir, whole)
    ]
    for meta in metas:
        del meta["checksums"]  # of one process they differ by rounding
    assert metas[0] == metas[1]


def test_a_store_that_changed(tmp_path, whole, synthetic_store):
    """Another store of as many recordings, under the path that the run began with."""
    workdir, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(whole, workdir)
    write_synthetic_store(store, n_records=96, seconds=6.0, seed=1)
    args = arguments(workdir, store, **SETTINGS)
    for ended in finish_all(args):
        assert ended.code == 2, ended.err
        assert "Traceback" not in ended.err
        assert "differs in store_fingerprint" in ended.err
    assert finished_steps(workdir)[-1] == 12, "nothing was set aside"
