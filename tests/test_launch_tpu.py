"""The script for Cloud TPU slices, with a program that stands for gcloud."""

import subprocess
from pathlib import Path

import pytest

from fake_cluster import Cluster, until, write_program

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


GCLOUD = """\
import subprocess
words, states = " ".join(sys.argv[1:]), os.environ["FAKE_STATES"]
lines = open(states).read().splitlines()
if " list " in words:
    print(lines[0])
    open(states, "w").write("\\n".join(lines[1:]) + "\\n")
    sys.exit(lines[0] == "no answer")
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


def test_a_question_that_gcloud_does_not_answer_is_asked_again(tpu):
    done, did = tpu_run(tpu, ["no answer", "PROVISIONING", "no answer", "ACTIVE", "ACTIVE"], EXIT_CODES="0")
    assert done.returncode == 0, done.stderr
    assert did == ["scp", "ssh", "ssh"]
    done, did = tpu_run(tpu, ["no answer"] * 30, POLL_S="0")
    assert done.returncode == 75
    assert "gcloud does not say" in done.stderr
    assert did == ["scp", "ssh", "ssh"], "nothing was made or deleted"


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
    second = subprocess.run(["bash", "-c", remote], env=tpu.environment, cwd=tpu.folder, timeout=300)
    assert second.returncode == first.wait(timeout=300) == 0
    assert marks.read_text().split() == ["start", "saved", "start"]


def test_two_launchers_of_one_slice_are_refused(tpu):
    with (tpu.folder / ".tpu_vm.cpc.lock").open("w") as held:
        subprocess.run(["flock", "-n", str(held.fileno())], pass_fds=[held.fileno()], check=True)
        done, did = tpu_run(tpu, ["ACTIVE"] * 9, EXIT_CODES="0")
    assert done.returncode == 2
    assert "another launch/tpu_vm.sh is looking after cpc" in done.stderr
    assert did == []
