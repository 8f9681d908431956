"""The scripts that start runs on clusters, with fake programs of these clusters and, for SLURM, real processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml  # a dependency of Flax

from ecg_jax.training.metric_writers import read_log
from fake_cluster import Cluster, free_job_id, write_program
from test_pretrain import arguments

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("slurm/*"), LAUNCH / "tpu_vm.sh"])
SIZE = "#SBATCH --account=lab --partition=gpu --nodes=1 --gpus-per-node=2 --ntasks-per-node=2"


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def until(condition, process, seconds=240):
    """Waits for something that a process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    out, _ = job.communicate(timeout=60)
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


@pytest.mark.parametrize(
    ("codes", "code"),
    [("75 75", 75), ("75 hangs", 137), ("killed hangs", 137), ("hangs killed", 137), ("134 hangs", 137)],
)
def test_what_running_again_can_mend_is_requeued(cluster, codes, code):
    assert run_job(cluster, codes, SLURM_JOB_ID="4711")[0] == code
    assert cluster.calls("scontrol") == [["requeue", "4711"]]


@pytest.mark.parametrize(
    ("codes", "code"), [("0 0", 0), ("2 2", 2), ("2 hangs", 2), ("hangs 1", 1), ("130 130", 130), ("75 2", 2)]
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
    assert code == 75
    assert "after 20 restarts, not requeued" in out
    assert cluster.calls("scontrol") == []
    run_job(cluster, "75 75", SLURM_RESTART_COUNT="19")
    assert len(cluster.calls("scontrol")) == 1


def test_another_number_of_tasks_than_gpus_is_refused(cluster):
    script = changed(cluster, ["ecg-jax"], SIZE.replace("gpus-per-node=2", "gpus-per-node=h100:4"))
    job = cluster.start_job(script)
    out, _ = job.communicate(timeout=60)
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
    job.communicate(timeout=60)
    assert job.returncode == 137
    assert cluster.calls("scontrol") == []


def test_two_processes_train_through_the_batch_script_and_go_on_after_its_time_limit(
    cluster, synthetic_store
):
    cluster.real_command()
    workdir = cluster.folder / "run"
    (cluster.folder / "configs").symlink_to(ROOT / "configs")
    script = changed(cluster, ["ecg-jax", *arguments(workdir, synthetic_store, steps=100_000)])

    def logged():
        return len(read_log(workdir)) if (workdir / "log.jsonl").exists() else 0

    job = cluster.start_job(script)
    until(lambda: logged() >= 4, job)
    job.send_signal(signal.SIGUSR1)  # two minutes before the time limit
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    assert "cpc on s4" in out
    assert re.search(r"float32, 2 x cpu", out)
    assert "preemption at step" in out
    assert "at the time limit, requeued (restart 1)" in out
    assert len(cluster.calls("scontrol")) == 1
    saved = read_log(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(saved)).is_dir()

    job = cluster.start_job(script, SLURM_RESTART_COUNT="1")
    until(lambda: logged() >= saved + 3, job)
    # The user stops it: `scancel --signal=TERM`, which reaches the tasks and not the batch shell.
    identity = {"SLURM_JOB_ID": "1"}
    subprocess.run(["scancel", "--signal=TERM", "1"], env=cluster.environment | identity, check=True)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    assert f"continuing at step {saved} of 100000" in out
    assert len(cluster.calls("scontrol")) == 1, "a job that was stopped is not requeued"
    steps = [entry["step"] for entry in read_log(workdir)]
    assert steps == list(range(1, steps[-1] + 1))
    assert np.isfinite([entry["loss"] for entry in read_log(workdir)]).all()


# SLURM, preparing

SBATCH = """\
import subprocess, re
print(700 + (any("MERGE" in word for word in sys.argv)), end=";cluster\\n")
array = re.search(r"--array=0-(\\d+)", " ".join(sys.argv))
extra = {"MERGE": "1"} if "--export=ALL,MERGE=1" in sys.argv else {}
for i in range(int(array[1]) + 1) if array else [None]:
    task = {} if i is None else {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "1"}
    environment = os.environ | extra | task | {"SLURM_CPUS_PER_TASK": "8"}
    subprocess.run(["bash", sys.argv[-1]], env=environment, check=True, stdout=sys.stderr)
"""


def test_prepare_submits_an_array_and_its_merge(cluster):
    write_program(cluster.bin, "sbatch", SBATCH)
    submit = [LAUNCH / "slurm" / "prepare.sh", "heedb", "raw data", "stores/heedb", "3"]
    environment = cluster.environment | {"EXIT_CODES": "0"}
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


# GKE

RENDER = [sys.executable, str(LAUNCH / "gke" / "render.py")]
RUN = ["ecg-jax", "pretrain", "--config=configs/cpc.py", "--workdir=/shared/runs/a $b"]
GPU = {
    "name": "cpc-11m",
    "nodes": "4",
    "gpu": "nvidia-h100-80gb:8",
    "image": "reg/ecg-jax:1",
    "claim": "shared",
}


def render(cluster, *extra, command=RUN, **options):
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    everything = [*RENDER, *words, *extra, "--", *command]
    return subprocess.run(everything, env=cluster.environment, capture_output=True, text=True)


def documents(cluster, **options):
    done = render(cluster, "--dry-run", **options)
    assert done.returncode == 0, done.stderr
    assert "__" not in done.stdout.replace("double underscores", "")
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def test_jobset_of_gpu_nodes(cluster):
    parts = documents(cluster, **GPU)
    assert set(parts) == {"ServiceAccount", "Role", "RoleBinding", "JobSet"}
    jobset = parts["JobSet"]
    assert jobset["metadata"] == {"name": "cpc-11m", "namespace": "default"}
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert workers["replicas"] == 1
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    assert job["completionMode"] == "Indexed", "JAX reads the pod's index"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["args"] == [word.replace("$", "$$") for word in RUN]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}
    # Restarted unless one of the exit codes says that it would end the same way again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert 75 not in rule["onExitCodes"]["values"]
    assert 2 in rule["onExitCodes"]["values"]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    # The account of the pods may read what JAX asks for.
    assert pod["serviceAccountName"] == parts["ServiceAccount"]["metadata"]["name"]
    assert parts["RoleBinding"]["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    assert parts["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    allowed = {
        (resource, verb) for r in parts["Role"]["rules"] for resource in r["resources"] for verb in r["verbs"]
    }
    assert {("pods", "list"), ("jobs", "get"), ("services", "list")} <= allowed


def test_jobset_of_a_tpu_slice(cluster):
    parts = documents(cluster, **(GPU | {"gpu": None, "tpu": "tpu-v5-lite-podslice:4x4:4"}))
    pod = parts["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "CPC"}, "--name=CPC"),
        ({"name": "a" * 41}, "up to 40"),
        ({"nodes": "0"}, "--nodes"),
        ({"gpu": "h100"}, "--gpu=TYPE:COUNT"),
        ({"gpu": None}, "--gpu=TYPE:COUNT"),
        ({"gpu": None, "tpu": "v5:4x4:4", "nodes": "2"}, "are not the 16 of topology 4x4"),
        ({"image": "two words"}, "--image"),
        ({"claim": "A_B"}, "--claim"),
        ({"command": ["rm", "-r"]}, "beginning with ecg-jax"),
        ({"command": ["ecg-jax", "pretrain", "--workdir=runs/a"]}, "under /shared"),
    ],
)
def test_render_refuses_in_one_sentence(cluster, change, says):
    write_program(cluster.bin, "kubectl", "")
    done = render(cluster, **(GPU | change))
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cluster.calls("kubectl") == []


def test_render_hands_over_to_kubectl_and_never_replaces_a_run(cluster):
    write_program(cluster.bin, "kubectl", "text = sys.stdin.read()\nsys.exit('kind: JobSet' in text)\n")
    assert render(cluster, **GPU).returncode == 1, "the run is there already"
    assert cluster.calls("kubectl") == [["apply", "-f", "-"], ["create", "-f", "-"]]


@pytest.mark.parametrize(
    ("command", "stop", "code"),
    [
        ("exit 0", False, 0),
        ("exit 2", False, 2),
        ("exit 75", False, 75),
        ("trap 'exit 0' TERM; touch up; while true; do sleep 0.1; done", True, 75),
        ("trap 'exit 2' TERM; touch up; while true; do sleep 0.1; done", True, 2),
    ],
)
def test_a_pod_that_was_told_to_stop_is_not_a_finished_one(cluster, command, stop, code):
    (workers,) = documents(cluster, **GPU)["JobSet"]["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    pod = subprocess.Popen([*container["command"], "bash", "-c", command], cwd=cluster.folder)
    if stop:
        until((cluster.folder / "up").exists, pod)
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=60) == code


# TPU

GCLOUD = """\
import subprocess
words, states = " ".join(sys.argv[1:]), os.environ["FAKE_STATES"]
lines = open(states).read().splitlines()
if " list " in words:
    print(lines[0])
    open(states, "w").write("\\n".join(lines[1:]) + "\\n")
elif " ssh " in words and "pip install" not in words:
    command = next(word for word in sys.argv if word.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", command.removeprefix("--command=")], cwd=os.environ["HOME"]).returncode)
"""


@pytest.fixture
def tpu(cluster):
    write_program(cluster.bin, "gcloud", GCLOUD)
    write_program(cluster.bin, "git", "")
    (cluster.folder / "ecg_jax").mkdir()
    cluster.environment |= {"POLL_S": "0.05", "FAKE_STATES": str(cluster.folder / "states")}
    return cluster


def tpu_run(cluster, states, **variables):
    (cluster.folder / "states").write_text("\n".join(states) + "\n")
    command = [LAUNCH / "tpu_vm.sh", "cpc", "--", "ecg-jax", "pretrain", "--workdir=/shared/a b"]
    environment = cluster.environment | variables
    done = subprocess.run(
        command, cwd=cluster.folder, env=environment, capture_output=True, text=True, timeout=60
    )
    did = [
        next(w for w in ("list", "create", "delete", "scp", "ssh") if w in words)
        for words in cluster.calls("gcloud")
    ]
    return done, [word for word in did if word != "list"]


def test_a_tpu_slice_is_made_waited_for_and_used(tpu):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"]
    done, did = tpu_run(tpu, states, EXIT_CODES="0")
    assert done.returncode == 0, done.stderr
    assert did == ["create", "scp", "ssh", "ssh"]
    assert tpu.calls("ecg-jax") == [["pretrain", "--workdir=/shared/a b"]]
    assert "exit code 0" in done.stdout
    assert all("--worker=all" in words for words in tpu.calls("gcloud") if "ssh" in words or "scp" in words)


def test_a_preempted_tpu_slice_is_made_anew(tpu):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"]
    done, did = tpu_run(tpu, states, EXIT_CODES="0")
    assert done.returncode == 0, done.stderr
    assert did == ["scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]


def test_a_slice_that_saved_because_it_is_shut_down_is_not_a_finished_one(tpu):
    told = "first = not os.path.exists('told'); open('told', 'w')\n"
    told += "if first: print('preemption at step 3 of 9: saved; run the same command again to continue')\n"
    write_program(tpu.bin, "ecg-jax", told)
    done, _ = tpu_run(tpu, ["ACTIVE"] * 4)
    assert done.returncode == 0, done.stderr
    assert len(tpu.calls("ecg-jax")) == 2


def test_the_sentence_that_the_tpu_script_looks_for_is_the_commands():
    sentence = "run the same command again to continue"
    assert sentence in (LAUNCH / "tpu_vm.sh").read_text()
    assert sentence in (ROOT / "ecg_jax" / "pretrain.py").read_text()


@pytest.mark.parametrize(("code", "starts", "ends"), [("2", 1, 2), ("75", 3, 75), ("130", 1, 130)])
def test_a_tpu_command_that_fails(tpu, code, starts, ends):
    done, _ = tpu_run(tpu, ["ACTIVE"] * 9, EXIT_CODES=code, MAX_RESTARTS="2")
    assert done.returncode == ends, done.stderr
    assert len(tpu.calls("ecg-jax")) == starts


def test_a_command_left_behind_on_a_host_is_stopped_before_the_next_starts(tpu):
    marks = tpu.folder / "marks"
    write_program(
        tpu.bin,
        "ecg-jax",
        "import signal, time\n"
        f"def mark(word): open({str(marks)!r}, 'a').write(word + ' ')\n"
        "mark('start')\n"
        "def stop(*_): time.sleep(0.3); mark('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"while open({str(marks)!r}).read().count('start') == 1: time.sleep(0.02)\n",
    )
    dry = [LAUNCH / "tpu_vm.sh", "--dry-run", "cpc", "--", "ecg-jax", "pretrain"]
    done = subprocess.run(dry, env=tpu.environment, cwd=tpu.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tpu.calls("gcloud") == []
    # Bash reads its own quoting.
    last = done.stdout.splitlines()[-1]
    printed = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {last}"], text=True).split("\0")
    (remote,) = [word.removeprefix("--command=") for word in printed if word.startswith("--command=")]
    first = subprocess.Popen(["bash", "-c", remote], env=tpu.environment, cwd=tpu.folder)
    until(lambda: marks.exists() and (tpu.folder / ".ecg_jax.pid").exists(), first)
    second = subprocess.run(["bash", "-c", remote], env=tpu.environment, cwd=tpu.folder, timeout=60)
    assert second.returncode == first.wait(timeout=60) == 0
    assert marks.read_text().split() == ["start", "saved", "start"]


def test_two_launchers_of_one_slice_are_refused(tpu):
    with (tpu.folder / ".tpu_vm.cpc.lock").open("w") as held:
        subprocess.run(["flock", "-n", str(held.fileno())], pass_fds=[held.fileno()], check=True)
        done, did = tpu_run(tpu, ["ACTIVE"] * 9, EXIT_CODES="0")
    assert done.returncode == 2
    assert "another launch/tpu_vm.sh is looking after cpc" in done.stderr
    assert did == []


def test_a_job_number_gives_the_port_that_jax_computes(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    number = free_job_id()
    monkeypatch.setenv("SLURM_JOB_ID", str(number))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[07-08]")
    address = SlurmCluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    assert address == f"node07:{61440 + number % 4096}"
