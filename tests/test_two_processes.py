"""Two real processes as one run, against one process with as many devices."""

import signal
import subprocess
import sys
import time

import numpy as np

from ecg_jax.training.metric_writers import read_log
from process_runs import COMMAND, LOCAL
from test_online_probe import as_ptbxl
from test_pretrain import arguments, checksums, environment, finish
from test_process_faults import CHANGES


def launch_two(args):
    """Starts the command as two processes of one device each."""
    ecg_jax = [sys.executable, "-c", COMMAND]
    command = [sys.executable, str(LOCAL), "--processes", "2", "--", *ecg_jax, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(devices=1), **pipes)


def test_two_processes_equal_one(tmp_path, synthetic_store):
    store = as_ptbxl(synthetic_store, tmp_path / "store")  # with labels for the online probe
    # SGD-like settings: a large epsilon keeps Adam from turning rounding noise into full-size steps.
    changes = {"optimiser__eps": 1.0, "steps": 12, "monitor__probe_every": 6, "model__layers": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = finish(arguments(one, store, **changes))
    assert code == 0, err
    process = launch_two(arguments(two, store, **changes))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    logs = [read_log(workdir) for workdir in (one, two)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 13))
    for name in ("loss", "accuracy", "grad_norm", "rankme", "feature_std"):
        values = [[entry[name] for entry in log] for log in logs]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4, err_msg=name)
    assert np.isclose(logs[1][-1]["val_loss"], logs[0][-1]["val_loss"], rtol=1e-4)
    probed = [[(e["step"], e["probe_auroc"]) for e in log if "probe_auroc" in e] for log in logs]
    # Ranks of scores that differ by rounding: near ties may fall the other way.
    np.testing.assert_allclose(probed[1], probed[0], atol=0.01)
    assert [step for step, _ in probed[1]] == [6, 12]


def test_ctrl_c_at_the_launcher_stops_both_at_the_same_step(tmp_path, synthetic_store):
    workdir = tmp_path / "run"
    args = arguments(workdir, synthetic_store, steps=100_000, **CHANGES)
    process = launch_two(args)
    while not ((workdir / "log.jsonl").exists() and len(read_log(workdir)) >= 4):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "preemption at step" in out
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert checksums(workdir, steps[-1])
    assert read_log(workdir)[-1]["step"] == steps[-1]
