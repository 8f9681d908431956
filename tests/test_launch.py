"""The batch scripts for SLURM, with programs that stand for its own and real processes."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.training.metric_writers import read_log
from fake_cluster import Cluster, free_job_id, until, write_program
from prepare_source import N_MADE, write_source
from test_pretrain import arguments

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("slurm/*"), LAUNCH / "tpu_vm.sh"])
SIZE = "#SBATCH --account=lab --partition=gpu --nodes=1 --gpus-per-node=2 --ntasks-per-node=2"


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def changed(cluster, command, size=SIZE):
    """The batch script as a user has it after changing the three places."""
    text = (LAUNCH / "slurm" / "pretrain.sbatch").read_text()
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("# CHANGE")]
    assert len(places) == 3
    news = {
        "#SBATCH": size,
        "ENVIRONMENT": "ENVIRONMENT=.venv",
        "COMMAND": f"COMMAND=({shlex.join(command)})",
    }
    for place in places:
        at = next(i for i in range(place, len(lines)) if re.match(r"#SBATCH|\w+=", lines[i]))
        lines[at] = news.pop(re.match(r"#?\w+", lines[at])[0])
    script = cluster.folder / "pretrain.sbatch"
    script.write_text("\n".join(lines) + "\n")
    return script


def run_job(cluster, exit_codes, **variables):
    script = changed(cluster, ["ecg-jax", "pretrain", "--workdir=a folder"])
    job = cluster.start_job(script, EXIT_CODES=exit_codes, **variables)
    out, _ = job.communicate(timeout=300)
    return job.returncode, out


# Every script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_stop_at_errors(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o100, "is not executable"


def test_batch_options_come_before_any_command():
    for script in LAUNCH.glob("slurm/*.sbatch"):
        lines = script.read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
        assert [line for line in lines[:first] if line.startswith("#SBATCH")]


# SLURM, one run


def test_what_the_job_asks_slurm_for():
    text = (LAUNCH / "slurm" / "pretrain.sbatch").read_text()
    asked = " ".join(re.findall(r"^#SBATCH (.*)", text, re.M)).split()
    options = dict(word.removeprefix("--").partition("=")[::2] for word in asked)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    # To the batch shell, as USR1: so it can tell the time limit from a SIGTERM that somebody sent.
    assert options["signal"] == "B:USR1@120"
    assert {"requeue", "open-mode", "output", "account", "partition"} <= set(options)
    assert options["open-mode"] == "append"


def test_dry_run_prints_the_step_and_starts_nothing(cluster):
    script = changed(cluster, ["ecg-jax", "pretrain", "--workdir=a folder"])
    environment = cluster.environment | {"DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", script], env=environment, cwd=cluster.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    step = next(line for line in done.stdout.splitlines() if line.startswith("srun"))
    assert shlex.split(step)[-3:] == ["ecg-jax", "pretrain", "--workdir=a folder"]
    assert SIZE in done.stdout
    assert cluster.calls("srun") == cluster.calls("ecg-jax") == []


@pytest.mark.parametrize("codes", ["75 75", "75 hangs", "killed hangs", "hangs killed", "134 hangs"])
def test_what_running_again_can_mend_is_requeued(cluster, codes):
    # srun returns 137 for a task that it killed because another had ended.
    assert run_job(cluster, codes, SLURM_JOB_ID="4711")[0] in (75, 137)
    assert cluster.calls("scontrol") == [["requeue", "4711"]]


@pytest.mark.parametrize(
    ("codes", "code"), [("0 0", 0), ("2 2", 2), ("2 hangs", 2), ("hangs 1", 1), ("130 130", 130)]
)
def test_the_rest_is_not(cluster, codes, code):
    got, out = run_job(cluster, codes)
    assert got == code, out
    assert cluster.calls("scontrol") == []
    assert ("not requeued" in out) == (code != 0)
    assert not list(cluster.folder.glob(".exit-codes*"))


def test_a_command_that_is_not_there_is_not_requeued(cluster):
    (cluster.bin / "ecg-jax").unlink()
    code, out = run_job(cluster, "0 0")
    assert code == 127, out
    assert cluster.calls("scontrol") == []


def test_requeues_are_bounded(cluster):
    code, out = run_job(cluster, "75 75", SLURM_RESTART_COUNT="20")
    assert code in (75, 137)
    assert "after 20 restarts, not requeued" in out
    assert cluster.calls("scontrol") == []
    run_job(cluster, "75 75", SLURM_RESTART_COUNT="19")
    assert len(cluster.calls("scontrol")) == 1


def test_another_number_of_tasks_than_gpus_is_refused(cluster):
    script = changed(cluster, ["ecg-jax"], SIZE.replace("gpus-per-node=2", "gpus-per-node=h100:4"))
    job = cluster.start_job(script)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 2
    assert "--ntasks-per-node=2 must equal the 4 GPUs of a node" in out
    assert cluster.calls("srun") == []


def test_a_cancelled_job_is_not_requeued(cluster):
    script = changed(cluster, ["ecg-jax"])
    job = cluster.start_job(script, EXIT_CODES="hangs hangs")
    until(lambda: len(cluster.calls("ecg-jax")) == 2, job)
    job.send_signal(signal.SIGTERM)  # scancel: to the batch shell too ...
    until((cluster.folder / "steps").exists, job)
    for task in (cluster.folder / "steps").read_text().split():
        os.killpg(int(task), signal.SIGKILL)  # ... and in the end SIGKILL to the tasks
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 137
    assert "after SIGTERM to the job, not requeued" in out
    assert cluster.calls("scontrol") == []


def test_two_processes_train_through_the_batch_script_and_go_on_after_its_time_limit(
    cluster, synthetic_store
):
    cluster.real_command()
    workdir = cluster.folder / "run"
    (cluster.folder / "configs").symlink_to(ROOT / "configs")
    small = {"model__layers": 1, "tensorboard": False, "steps": 100_000}
    script = changed(cluster, ["ecg-jax", *arguments(workdir, synthetic_store, **small)])

    def logged():
        return len(read_log(workdir)) if (workdir / "log.jsonl").exists() else 0

    job = cluster.start_job(script)
    until(lambda: logged() >= 1, job)
    job.send_signal(signal.SIGUSR1)  # two minutes before the time limit
    out, _ = job.communicate(timeout=600)
    assert job.returncode == 0, out
    assert "cpc on s4" in out
    assert re.search(r"float32, 2 x cpu", out)
    assert "preemption at step" in out
    assert "at the time limit, requeued (restart 1)" in out
    assert len(cluster.calls("scontrol")) == 1
    saved = read_log(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(saved)).is_dir()

    def checkpoints():
        return [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]

    # The system kills one of the two tasks, wherever it is; srun ends the other.
    job = cluster.start_job(script, SLURM_RESTART_COUNT="1")
    until(lambda: max(checkpoints()) > saved, job)
    task = (cluster.folder / "steps").read_text().split()[1]
    os.killpg(int(task), signal.SIGKILL)
    out, _ = job.communicate(timeout=600)
    assert job.returncode == 137, out
    assert f"continuing at step {saved} of 100000" in out
    assert "requeued (restart 2)" in out
    assert len(cluster.calls("scontrol")) == 2
    steps = [entry["step"] for entry in read_log(workdir)]
    assert steps == list(range(1, steps[-1] + 1))
    assert np.isfinite([entry["loss"] for entry in read_log(workdir)]).all()


def test_a_job_that_is_told_to_save_and_stop_is_not_requeued(cluster):
    """`scancel --signal=TERM` reaches the tasks, with the shell around each of them, and not the batch shell."""
    job = cluster.start_job(changed(cluster, ["ecg-jax"]), EXIT_CODES="saves saves", SLURM_JOB_ID="1")
    until(lambda: len(list(cluster.folder.glob("waits-*"))) == 2, job)
    identity = {"SLURM_JOB_ID": "1"}
    subprocess.run(["scancel", "--signal=TERM", "1"], env=cluster.environment | identity, check=True)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert len(list(cluster.folder.glob("saved-*"))) == 2
    assert cluster.calls("scontrol") == []


def test_a_job_number_gives_the_port_that_jax_computes(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    number = free_job_id()
    monkeypatch.setenv("SLURM_JOB_ID", str(number))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[07-08]")
    address = SlurmCluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    assert address == f"node07:{61440 + number % 4096}"


# SLURM, preparing

SBATCH = """\
import subprocess, re
print(700 + (any("MERGE" in word for word in sys.argv)), end=";cluster\\n")
array = re.search(r"--array=0-(\\d+)", " ".join(sys.argv))
extra = {"MERGE": "1"} if "--export=ALL,MERGE=1" in sys.argv else {}
for i in range(int(array[1]) + 1) if array else [None]:
    task = {} if i is None else {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "1"}
    environment = os.environ | extra | task
    subprocess.run(["bash", sys.argv[-1]], env=environment, check=True, stdout=sys.stderr)
"""


def test_prepare_submits_an_array_and_its_merge(cluster):
    write_program(cluster.bin, "sbatch", SBATCH)
    submit = [LAUNCH / "slurm" / "prepare.sh", "heedb", "raw data", "stores/heedb", "3"]
    environment = cluster.environment | {"EXIT_CODES": "0", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(submit, env=environment, cwd=cluster.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "array 700 of 3 shards, merged by job 701" in done.stdout
    parts = [f"--shard={i}/3" for i in range(3)] + ["--merge"]
    assert cluster.calls("ecg-jax") == [
        ["prepare", "heedb", "raw data", "stores/heedb", part, "--workers=8"] for part in parts
    ]
    array, merge = cluster.calls("sbatch")
    assert "--array=0-2" in array
    assert "--dependency=afterok:700" in merge


def test_an_array_and_its_merge_make_a_store(cluster):
    from ecg_jax.data.store import Store

    cluster.real_command()
    write_program(cluster.bin, "sbatch", SBATCH)
    source = write_source(cluster.folder / "raw data")
    submit = [LAUNCH / "slurm" / "prepare.sh", "wfdb", source, "store", "2"]
    environment = cluster.environment | {"SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(submit, env=environment, cwd=cluster.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = len(Store(cluster.folder / "store"))
    assert N_MADE - 10 < written < N_MADE
    assert f"{written} records of wfdb" in done.stderr


def test_prepare_dry_run_submits_nothing(cluster):
    write_program(cluster.bin, "sbatch", "")
    submit = [LAUNCH / "slurm" / "prepare.sh", "--dry-run", "heedb", "raw", "store", "64"]
    done = subprocess.run(submit, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--array=0-63" in done.stdout
    assert "--dependency=afterok:" in done.stdout
    assert "--shard=TASK/64" in done.stdout
    assert cluster.calls("sbatch") == []
    assert subprocess.run(submit[:-1], env=cluster.environment, capture_output=True).returncode == 2
