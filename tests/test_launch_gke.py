"""What is rendered for GKE: YAML, its parameters, and the shell of its pods."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml  # a dependency of Flax

from fake_cluster import Cluster, until, write_program

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


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


def test_jax_finds_the_processes_of_a_jobset_and_may_ask_what_it_asks(cluster, monkeypatch):
    """JAX's own detection, in front of a Kubernetes that holds what was rendered."""
    from jax._src.clusters.k8s_cluster import K8sCluster

    parts = documents(cluster, **GPU)
    (workers,) = parts["JobSet"]["spec"]["replicatedJobs"]
    jobset = parts["JobSet"]["metadata"]["name"]
    # As the JobSet controller names what it makes.
    job_name = f"{jobset}-{workers['name']}-0"
    asked = []

    class Api:
        def list_namespaced_pod(self, **_):
            asked.append(("pods", "list"))
            owner = SimpleNamespace(controller=True, kind="Job")
            labels = {"job-name": job_name}
            pod = SimpleNamespace(name=f"{job_name}-2-abcde", labels=labels, owner_references=[owner])
            return SimpleNamespace(items=[SimpleNamespace(metadata=pod)])

        def read_namespaced_job(self, name, **_):
            asked.append(("jobs", "get"))
            assert name == job_name
            labels = {"jobset.sigs.k8s.io/jobset-name": jobset}
            spec = SimpleNamespace(parallelism=workers["template"]["spec"]["parallelism"])
            return SimpleNamespace(metadata=SimpleNamespace(name=job_name, labels=labels), spec=spec)

    class Detected(K8sCluster):
        _core_api, _batch_api, _ApiException = Api(), Api(), OSError

        @classmethod
        def _namespace(cls):
            return "default"

    monkeypatch.setenv("HOSTNAME", "localhost")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    address = Detected.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    assert address.partition(":")[0] == f"{job_name}-0.{jobset}"
    assert (Detected.get_process_count(), Detected.get_process_id()) == (4, 2)
    rules = parts["Role"]["rules"]
    allowed = {(name, verb) for rule in rules for name in rule["resources"] for verb in rule["verbs"]}
    assert asked
    assert set(asked) <= allowed


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
        ("trap 'exit 0' TERM; kill -TERM $PPID; while true; do sleep 0.1; done", False, 75),
    ],
)
def test_a_pod_that_was_told_to_stop_is_not_a_finished_one(cluster, command, stop, code):
    (workers,) = documents(cluster, **GPU)["JobSet"]["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    pod = subprocess.Popen([*container["command"], "bash", "-c", command], cwd=cluster.folder)
    if stop:
        until((cluster.folder / "up").exists, pod)
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=300) == code
