"""Sweeps in many processes: real ones that share a folder and are killed, arrays of SLURM jobs, jobs on one host."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ecg_jax import cli, sweep_launch
from ecg_jax.errors import UserError
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_folder import RunStatus
from ecg_jax.sweep_launch import device_shares
from ecg_jax.sweep_slurm import array_script
from ecg_jax.training.metric_writers import read_log
from tiny_sweep import FAILS, LONG, status, trained, write_sweep

ENTRY = "from ecg_jax.cli import entry_point; entry_point()"
WAIT_S = 300.0  # another machine may be many times slower


def environment(**more):
    """One device: a process that starts must not compile for eight."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | more


def start(*args):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", ENTRY, *map(str, args)], env=environment(), **pipes)


def wait_until(condition, process):
    """Polls until the condition holds; what the process said if it ends before."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def last_step(run: Path) -> int:
    try:
        return max((entry["step"] for entry in read_log(run)), default=0)
    except UserError:  # being written
        return 0


def test_two_processes_share_a_sweep_and_a_killed_run_goes_on(tmp_path, synthetic_store, capsys):
    path, output = write_sweep(tmp_path, LONG, 'run("short")'), tmp_path / "out"
    args = ("sweep", path, f"--output={output}", f"--store={synthetic_store}")
    listed = [*map(str, args), "--list"]
    first = start(*args, "--only=long")
    try:
        wait_until(lambda: last_step(output / "long" / "run") >= 7, first)
        second = start(*args)
        out, err = second.communicate(timeout=WAIT_S)
        assert first.poll() is None
        assert second.returncode == 75, (out, err)
        assert f"the run long is being worked on by process {first.pid} on " in err
        assert "other processes are working on long\nrun the same command again" in err
        assert status(output, "short")["state"] == "finished"
        assert cli.main(listed) == 0
        assert re.search(r"long +long +running at step \d+ ", capsys.readouterr().out)
    finally:
        first.kill()
        first.communicate()
    killed_at = last_step(output / "long" / "run")

    assert cli.main(listed) == 0
    assert re.search(
        rf"long: ended without a word at step {killed_at} \(process {first.pid} on ", capsys.readouterr().out
    )
    third = start(*args)
    try:
        wait_until(lambda: last_step(output / "long" / "run") > killed_at, third)
        third.send_signal(signal.SIGTERM)
        out, err = third.communicate(timeout=WAIT_S)
    finally:
        third.kill()
    assert third.returncode == 0, (out, err)
    assert "1 of 2 runs are finished already" in out
    assert (status(output, "long")["state"], status(output, "long")["attempts"]) == ("stopped", 2)
    steps = [entry["step"] for entry in read_log(output / "long" / "run")]
    assert steps == list(range(1, len(steps) + 1))

    assert cli.main([*map(str, args), "--collect"]) == 0
    table = {row["name"]: row for row in pq.read_table(output / "results_table.parquet").to_pylist()}
    assert (table["short"]["state"], table["short"]["step"]) == ("finished", 4)
    assert (table["long"]["state"], table["long"]["step"]) == ("stopped", steps[-1])


#: What sbatch, scontrol and squeue do; of the latter "queue" is what it says.
SBATCH = """#!/bin/bash
[[ $0 != *squeue ]] || exec cat "$(dirname "$0")/queue"
printf '%s\\n' "$*" >> "$(dirname "$0")/calls"
echo "471$(wc -l < "$(dirname "$0")/calls")"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Where an sbatch and a scontrol in PATH write down how they were called; there is a squeue too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scontrol", "squeue"):
        (folder / name).write_text(SBATCH)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "calls"


def test_slurm_array_completes_the_sweep(tmp_path, synthetic_store, slurm, capsys):
    path, output = write_sweep(tmp_path, 'run("a")', 'run("b", seed=1)'), tmp_path / "my out"
    args = [
        "sweep",
        str(path),
        f"--output={output}",
        f"--store={synthetic_store}",
        "--launcher=slurm",
        "--jobs=2",
    ]
    options = "--slurm=--partition=gpu --time=1:00:00"
    assert cli.main([*args, options]) == 0
    assert (
        "submitted 2 runs as the array 4711, and job 4712, which then makes the tables"
        in capsys.readouterr().out
    )
    assert slurm.read_text().splitlines() == [
        f"--parsable {output}/sweep.sbatch",
        f"--parsable --dependency=afterany:4711 {output}/collect.sbatch",
    ]
    # The tasks wait or run: nothing is submitted twice. When one has left the queue without finishing its run, it is.
    queue = slurm.with_name("queue")
    for tasks, message, submitted in (
        (
            "0\n1\n",
            "nothing to run: of 2 runs 0 are finished and 0 being worked on, and 2 wait in the queue",
            2,
        ),
        ("1\n", "1 run already in the queue, of the array 4711: b\nsubmitted 1 run as the array 4713", 4),
        ("", "submitted 2 runs as the array 4715", 6),
    ):
        queue.write_text(tasks)
        assert cli.main([*args, options]) == 0
        assert message in capsys.readouterr().out
        assert len(slurm.read_text().splitlines()) == submitted
    script = (output / "sweep.sbatch").read_text()
    log = f'--output="{output}/slurm/%A_%a.out"'
    for option in ("--array=0-1%2", "--partition=gpu", "--time=1:00:00", "--requeue", log):
        assert f"#SBATCH {option}\n" in script

    tasks = [
        subprocess.Popen(
            ["bash", output / "sweep.sbatch"],
            env=environment(SLURM_ARRAY_TASK_ID=str(task)),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    for task in tasks:
        said, _ = task.communicate(timeout=WAIT_S)
        assert task.returncode == 0, said
    assert [status(output, name)["state"] for name in "ab"] == ["finished", "finished"]
    assert not (output / "results_table.csv").exists()
    done = subprocess.run(
        ["bash", output / "collect.sbatch"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(output / "results_table.parquet").to_pylist()
    assert [(row["name"], row["state"], row["seed"]) for row in rows] == [
        ("a", "finished", 0),
        ("b", "finished", 1),
    ]
    assert all(row["val_loss"] > 0 and row["best_val_loss"] <= row["val_loss"] for row in rows)
    assert all(row["parameters"] > 0 and row["store_recordings"] == 96 for row in rows)
    assert "| a " in (output / "results.md").read_text()
    slurm.unlink()
    slurm.with_name("squeue").write_text("#!/bin/bash\necho 'error: Invalid job id specified' >&2; exit 1\n")
    assert cli.main(args) == 0
    assert "nothing to run: of 2 runs 2 are finished" in capsys.readouterr().out
    assert not slurm.exists()


def run_task(tmp_path, command, before_wait=lambda task: None, **variables):
    """The exit code of an array task whose `ecg-jax` is the Bash program `command`, and what it said."""
    run = load_sweep(str(write_sweep(tmp_path, 'run("a")'))).runs[0]
    script = array_script([run], tmp_path / "out", ["sweep"], [], None, command=["bash", "-c", command])
    (tmp_path / "task").write_text(script)
    task = subprocess.Popen(
        ["bash", tmp_path / "task"],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "99"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    before_wait(task)
    said, _ = task.communicate(timeout=WAIT_S)
    return task.returncode, said


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (2, False), (75, True), (137, True), (130, False)]
)
def test_array_task_is_requeued_where_that_helps(tmp_path, slurm, code, requeued):
    assert run_task(tmp_path, f"exit {code}")[0] == code
    assert slurm.exists() == requeued
    if requeued:
        assert slurm.read_text() == "requeue 99\n"
        slurm.unlink()
        code, said = run_task(tmp_path, f"exit {code}", SLURM_RESTART_COUNT="20")
        assert not slurm.exists()
        assert "after 20 restarts; submit the sweep again" in said


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_array_task_at_its_time_limit_saves_and_is_requeued(tmp_path, slurm, number, requeued):
    """SIGUSR1 is SLURM's warning before the time limit, SIGTERM that somebody cancelled the job."""
    ready = tmp_path / "ready"
    saves = f"trap 'echo saved; exit 0' TERM; touch {ready}; while :; do sleep 0.1; done"

    def warn(task):
        wait_until(ready.exists, task)
        task.send_signal(number)

    code, said = run_task(tmp_path, saves, warn)
    assert (code, slurm.exists()) == (0, requeued)
    assert "saved" in said


def test_what_slurm_refuses_is_one_sentence(tmp_path, synthetic_store, slurm, capsys, monkeypatch):
    path, output = write_sweep(tmp_path, 'run("a")'), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--launcher=slurm"]
    slurm.with_name("sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert cli.main(args) == 2
    assert "failed with exit code 1: sbatch: error: invalid partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(args) == 2
    assert "there is no sbatch in PATH" in capsys.readouterr().err
    for options, message in (
        ("--array=3", "--array is set by the launcher"),
        ("-p gpu", "'-p' is not of the form --option=value"),
        ("--comment='a", "No closing quotation"),
        ("--ntasks-per-node=4", "each run of a sweep is one process on one node"),
        ("--nodes=2", "each run of a sweep is one process on one node"),
    ):
        assert cli.main([*args, f"--slurm={options}"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*args[:-1], "--slurm=--partition=gpu"]) == 2
    assert "--slurm goes with --launcher=slurm" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_dry_run_writes_nothing(tmp_path, synthetic_store, capsys, launcher):
    path, output = write_sweep(tmp_path, 'run("a")', 'run("b", seed=1)'), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    args = ["sweep", str(path), f"--output={output}", f"--launcher={launcher}", "--dry-run", "--jobs=1"]
    assert cli.main(args) == 2
    assert "the run a needs a store; give it as --store=STORE" in capsys.readouterr().err
    assert cli.main([*args, f"--store={synthetic_store}"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines()[:2]] == [
        [name, name, "not", "begun"] for name in "ab"
    ]
    if launcher == "local":
        for name in "ab":
            assert f"ecg-jax sweep {path} --output={output} --store={synthetic_store} --only={name}\n" in out
    else:
        assert "#SBATCH --array=0-1%1\n" in out
        assert "--dependency=afterany:ARRAY" in out
        assert "--collect" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_jobs_on_one_host_report_failures(tmp_path, synthetic_store, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    path, output = write_sweep(tmp_path, FAILS, 'run("a")'), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    assert cli.main([*args, "--jobs=2"]) == 2
    printed = capsys.readouterr()
    assert "fails: failed: The store" in printed.out
    assert printed.err.splitlines()[-1] == "ecg-jax sweep: error: 1 run failed, see above: fails"
    assert status(output, "a")["state"] == "finished"
    assert "4/4" in (output / "a" / "output.log").read_text()
    for more in (["--list"], ["--dry-run"]):
        assert cli.main([*args, *more]) == 0
        assert "last errors:\nfails: The store" in capsys.readouterr().out
    rows = {row["name"]: row for row in pq.read_table(output / "results_table.parquet").to_pylist()}
    assert (rows["fails"]["state"], rows["a"]["state"]) == ("failed", "finished")
    assert rows["fails"]["error"].startswith("The store")
    assert (rows["fails"]["config.data.window_s"], rows["a"]["config.data.window_s"]) == (60.0, 0.5)


def test_exit_code_75_is_reported_to_be_run_again(tmp_path, synthetic_store, capsys, monkeypatch):
    monkeypatch.setattr(sweep_launch, "COMMAND", ("bash", "-c", "exit 75"))
    path, output = write_sweep(tmp_path, 'run("a")', 'run("b", seed=1)'), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--jobs=2"]
    assert cli.main(args) == 75
    assert "not finished: a, b\nrun the same command again" in capsys.readouterr().err
    # A process that the kernel kills leaves no word.
    monkeypatch.setattr(sweep_launch, "COMMAND", ("bash", "-c", "kill -KILL $$"))
    assert cli.main(args) == 2
    assert "2 runs failed, see above: " in capsys.readouterr().err


def test_job_whose_run_another_process_finished_has_not_failed(tmp_path, synthetic_store, monkeypatch):
    path, output = write_sweep(tmp_path, 'run("a")'), tmp_path / "out"
    RunStatus(tmp_path).end("finished")
    trained(None, tmp_path / "run")
    command = f"cp -r {tmp_path}/status.json {tmp_path}/run {output}/a; exit 2"
    monkeypatch.setattr(sweep_launch, "COMMAND", ("bash", "-c", command))
    assert cli.main(["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--jobs=2"]) == 0


def test_each_job_has_its_share_of_the_gpus(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert device_shares(2) == ["4,6", "5"]
    with pytest.raises(UserError, match="--jobs=4 exceeds the 3 GPUs"):
        device_shares(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep_launch.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia3"])
    assert device_shares(2) == ["0", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert device_shares(2) == [None, None]
