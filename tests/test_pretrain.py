"""The pretraining command end to end: logs, checkpoints, exact resume, faults, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.training.checkpoint import resolve_checkpoint
from ecg_jax.training.metric_writers import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    read_log,
    read_warnings,
    rewind_log,
)

TINY = {
    "model.width": "16",
    "model.state": "4",
    "model.layers": "2",
    "data.window_s": "0.5",
    "objective.steps_ahead": "4",
    "objective.negatives": "8",
    "batch_size": "8",
    "steps": "24",
    "log_every": "1",
    "checkpoint_every": "5",
    "data.max_val_crops": "20",
}


def arguments(workdir, prepared, **changes):
    fields = (
        TINY
        | {"store": str(prepared)}
        | {name.replace("__", "."): str(value) for name, value in changes.items()}
    )
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["pretrain", "--config=configs/cpc.py", f"--workdir={workdir}", *overrides]


def environment(devices=2):
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}


def start(args, before=""):
    code = f"{before}from ecg_jax.cli import entry_point; entry_point()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment(), **pipes)


def finish(args):
    process = start(args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def trajectory(workdir):
    """What must not depend on interruptions: every logged number but the clock's."""
    clock = ("windows_per_s", "data_wait", "save_seconds", "peak_memory_gib")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in read_log(Path(workdir))]


def checksums(workdir, step):
    """CRC-32 of every saved array of a checkpoint: equal means bit-identical."""
    meta = json.loads((Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return meta["checksums"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, synthetic_store):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(arguments(workdir, synthetic_store))
    assert code == 0, err
    return workdir, out


def test_run_writes_what_it_promises(finished):
    workdir, out = finished
    assert {p.name for p in workdir.iterdir()} == {
        ".lock", "checkpoints", "config.json", "log.jsonl", "made_with.json", "preprocessing.json", "selection.json",
        "tensorboard",
    }  # fmt: skip
    log = read_log(workdir)
    assert [entry["step"] for entry in log] == list(range(1, 25))
    for entry in log:
        assert np.isfinite([entry["loss"], entry["accuracy"], entry["grad_norm"]]).all()
        assert 2 < entry["rankme"] <= 16
        assert 0.03 < entry["feature_std"] < 2
        assert "probe_auroc" not in entry, "the store has no labels of a known task"
        assert ("val_loss" in entry) == (entry["step"] in (5, 10, 15, 20, 24))
    assert log[-1]["loss"] < log[0]["loss"]
    assert read_warnings(workdir) == []
    assert "no online probe: the store, of corpus 'synthetic', has labels of no task to watch" in out
    assert "continu" not in out
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
    best = min((entry for entry in log if "val_loss" in entry), key=lambda entry: entry["val_loss"])["step"]
    assert kept == {20, 24, best}
    contract = json.loads((workdir / "preprocessing.json").read_text())
    assert contract["window_s"] == 0.5
    assert contract["rate_hz"] == 240
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 16


def tensorboard_losses(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def assert_tensorboard_equals_log(workdir):
    expected = [(entry["step"], entry["loss"]) for entry in read_log(workdir)]
    np.testing.assert_allclose(tensorboard_losses(workdir), expected, rtol=1e-6)


def test_tensorboard_reads_the_events(finished):
    assert_tensorboard_equals_log(finished[0])


def test_warnings_are_kept_apart_from_numbers_and_rewound_with_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MultiWriter(JsonlWriter(tmp_path), TensorBoardWriter(tmp_path, 0))
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1.0 / step})
        for text in ("first", "second"):
            writer.write_texts(step, {"warning": f"{text} at {step}"})
    writer.close()
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    rewind_log(tmp_path, 2)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    assert read_warnings(tmp_path) == [
        (1, "first at 1"), (1, "second at 1"), (2, "first at 2"), (2, "second at 2"),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors("warning")][:2] == [
        (1, b"first at 1"), (1, b"second at 1"),
    ]  # fmt: skip


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_any_moment_and_continued_is_bit_identical(tmp_path, finished, synthetic_store):
    workdir = tmp_path / "killed"
    args = arguments(workdir, synthetic_store)

    def logged(step):
        return lambda: (workdir / "log.jsonl").exists() and any(e["step"] >= step for e in read_log(workdir))

    def saving():
        folder = workdir / "checkpoints"
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())

    kill_when(start(args), logged(3))  # before the first checkpoint
    kill_when(start(args), saving)
    kill_when(start(args), logged(12))
    code, out, err = finish(args)
    assert code == 0, err
    assert re.search(r"continuing at step (5|10) of 24", out)
    assert trajectory(workdir) == trajectory(finished[0])
    assert checksums(workdir, 24) == checksums(finished[0], 24)
    assert_tensorboard_equals_log(workdir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stop_signal_saves_and_exits_cleanly(tmp_path, finished, synthetic_store, number, code):
    workdir = tmp_path / "stopped"
    args = arguments(workdir, synthetic_store)
    process = start(args)
    while not ((workdir / "log.jsonl").exists() and len(read_log(workdir)) >= 7):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    stopped_at = int(re.search(rf"{number.name} at step (\d+) of 24: saved", out).group(1))
    assert "done" not in out
    assert resolve_checkpoint(workdir) == (workdir, stopped_at)
    code, out, err = finish(args)
    assert code == 0, err
    assert f"continuing at step {stopped_at} of 24" in out
    assert checksums(workdir, 24) == checksums(finished[0], 24)


def damage_state(checkpoint):
    """Cuts the largest data file of a checkpoint in half."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_damaged_latest_checkpoint_falls_back_and_says_so(tmp_path, finished, synthetic_store):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished[0], workdir)
    damage_state(workdir / "checkpoints" / "24")
    code, out, err = finish(arguments(workdir, synthetic_store))
    assert code == 0, err
    assert "checkpoint 24 is damaged" in err
    assert "continuing at step 20 of 24" in out
    assert (workdir / "damaged_checkpoints" / "24").is_dir()
    assert checksums(workdir, 24) == checksums(finished[0], 24)
    assert trajectory(workdir) == trajectory(finished[0])


def test_flipped_bits_are_found_by_the_checksum(tmp_path, finished, synthetic_store, capsys):
    """What the storage format does not notice, ours does: here the stored checksum stands for a changed
    array.
    """
    workdir = tmp_path / "flipped"
    shutil.copytree(finished[0], workdir)
    meta = workdir / "checkpoints" / "24" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["params/head/kernel"] ^= 1
    meta.write_text(json.dumps(content))
    code, _, err = finish(arguments(workdir, synthetic_store))
    assert code == 0, err
    assert "checkpoint 24 is damaged (the checksums of its arrays do not match)" in err


def refusal(capsys, args):
    """Runs a command that must refuse: exit code 2, one line on stderr."""
    code = cli.main(args)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1, err
    return err


def test_every_checkpoint_damaged(tmp_path, finished, synthetic_store, capsys):
    workdir = tmp_path / "ruined"
    shutil.copytree(finished[0], workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        damage_state(checkpoint)
    code = cli.main(arguments(workdir, synthetic_store))
    err = capsys.readouterr().err
    assert code == 2
    assert "every checkpoint" in err.splitlines()[-1]
    assert len(list((workdir / "damaged_checkpoints").iterdir())) >= 2, "nothing is deleted"


def test_diverging_run_names_step_and_checkpoint(tmp_path, synthetic_store, capsys):
    args = arguments(tmp_path / "run", synthetic_store, optimiser__learning_rate=1e30)
    code = cli.main(args)
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert re.search(r"(loss|grad_norm) is (nan|inf) at step \d+; no checkpoint was written yet", err)
    assert not any(p.name.isdigit() for p in (tmp_path / "run" / "checkpoints").iterdir())


def test_divergence_after_a_checkpoint_names_it(tmp_path, finished, synthetic_store, monkeypatch):
    """A loss that turns NaN later stops the run and leaves the good checkpoint as the latest."""
    from ecg_jax import pretrain as module

    config = load_config("configs/cpc.py")
    for name, value in (
        TINY | {"store": str(synthetic_store), "checkpoint_every": "3", "steps": "9"}
    ).items():
        override(config, name, value)
    calls, real = [], jax.device_get

    def poisoned(tree):
        tree = real(tree)
        if isinstance(tree, dict) and "grad_norm" in tree:
            calls.append(1)
            if len(calls) == 5:
                return tree | {"loss": np.float32("nan")}
        return tree

    monkeypatch.setattr(module.jax, "device_get", poisoned)
    with pytest.raises(
        UserError, match=r"loss is nan at step 5; the last good checkpoint is .*/checkpoints/3\."
    ):
        pretrain(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser__lr": 1}, "optimiser has no field 'lr'"),
        ({"modle__width": 8}, "did you mean 'model'"),
        ({"seed": 0.5}, "--config.seed='0.5' is not a value of type int"),
        ({"precision": "float16"}, "config.precision='float16' is unknown; known: float32, bfloat16"),
        ({"batch_size": 12}, "config.batch_size=12 does not divide over 8 devices"),
        ({"store": "/nowhere"}, "There is no store at /nowhere"),
        ({"data__window_s": 60}, "leaves no recording to train on"),
        ({"data__rate_hz": 500}, "has 240 samples per second, config.data.rate_hz is 500"),
        ({"model__backbone": "rnn"}, "config.model.backbone='rnn' is unknown; known: s4"),
        ({"model__bidirectional": True}, "lets CPC see the token it predicts"),
        ({"model__state": 5}, "config.model.state=5 must be even"),
        ({"objective__steps_ahead": 60}, "must lie between 1 and 59"),
        ({"batch_size": 0}, "config.batch_size=0 must be positive"),
        ({"epochs": "inf"}, "config.epochs=inf must be a finite number"),
        ({"optimiser__b1": 2}, "config.optimiser.b1=2.0 must be at least 0 and below 1"),
        ({"optimiser__factors__head": -1}, "config.optimiser.factors.head=-1.0 must not be negative"),
        ({"optimiser__warmup_steps": 1000}, "config.optimiser.warmup_steps=1000 exceeds the 24 steps"),
        ({"seed": 10**22}, "must be below 2^63"),
        ({"recipe": "released"}, "the config has no field 'recipe'"),
        ({"monitor__task": "sex"}, "There is no task 'sex'; known: ningbo, "),
        ({"monitor__task": "ptbxl_super"}, "Task ptbxl_super needs a store of corpus 'ptbxl'"),
        ({"monitor__probe_records": 0}, "config.monitor.probe_records=0 must be positive"),
        ({"monitor__min_rankme": -1}, "config.monitor.min_rankme=-1.0 must not be negative"),
    ],
)
def test_bad_config_is_refused_in_one_sentence(tmp_path, synthetic_store, capsys, changes, message):
    err = refusal(capsys, arguments(tmp_path / "run", synthetic_store, **changes))
    assert message in err
    assert not (tmp_path / "run").exists(), "nothing is half-written"


def test_workdir_of_another_run_is_refused(finished, synthetic_store, capsys):
    err = refusal(capsys, arguments(finished[0], synthetic_store, model__width=32))
    assert "holds another run: it differs in model.width (16 there, 32 now)" in err


def test_unwritable_workdir_is_refused(tmp_path, synthetic_store, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write into --workdir" in refusal(
        capsys, arguments(tmp_path / "file" / "run", synthetic_store)
    )


def test_a_store_and_a_file_are_no_workdir(tmp_path, synthetic_store, capsys):
    before = sorted(path.name for path in synthetic_store.iterdir())
    err = refusal(capsys, arguments(synthetic_store, synthetic_store))
    assert "is a store; choose another folder" in err
    assert sorted(path.name for path in synthetic_store.iterdir()) == before
    (tmp_path / "file").write_text("")
    assert "is a file; choose a folder" in refusal(capsys, arguments(tmp_path / "file", synthetic_store))


def test_missing_store_is_refused(tmp_path, capsys):
    err = refusal(capsys, ["pretrain", "--config=configs/cpc.py", f"--workdir={tmp_path}"])
    assert "config.store is not set" in err


def test_another_store_is_refused_on_resume(tmp_path, finished, capsys):
    from ecg_jax.data.selection import select_records, write_selection
    from ecg_jax.data.store import Store
    from ecg_jax.data.synthetic import write_synthetic_store

    workdir, store = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished[0], workdir)
    write_synthetic_store(store, n_records=40, seconds=6.0, seed=1)
    assert "differs in store_fingerprint" in refusal(capsys, arguments(workdir, store))
    config = workdir / "config.json"
    fields = json.loads(config.read_text()) | {"store_fingerprint": Store(store).fingerprint}
    config.write_text(json.dumps(fields))
    assert "recordings differs in the content of its stores" in refusal(capsys, arguments(workdir, store))
    selection = select_records(Store(store), window_samples=120, val_folds=1)
    write_selection(workdir / "selection.json", selection)
    assert cli.main(arguments(workdir, store)) == 2
    assert "was trained on another store" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_checkpoints_without_a_config_are_not_adopted(tmp_path, finished, synthetic_store, capsys, content):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "config.json").unlink()
    if content is not None:
        (workdir / "config.json").write_text(content)
    err = refusal(capsys, arguments(workdir, synthetic_store, seed=5))
    assert "config.json is missing or damaged" in err


def test_run_without_a_checkpoint_may_be_started_anew(tmp_path, synthetic_store, capsys):
    workdir = tmp_path / "run"
    assert cli.main(arguments(workdir, synthetic_store, optimiser__learning_rate=1e30)) == 2
    capsys.readouterr()
    assert cli.main(arguments(workdir, synthetic_store, steps=2)) == 0
    assert [entry["step"] for entry in read_log(workdir)] == [1, 2]


def test_second_process_in_one_workdir_is_refused(tmp_path, synthetic_store, capsys):
    workdir = tmp_path / "run"
    process = start(arguments(workdir, synthetic_store, steps=100_000))
    while not (workdir / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    err = refusal(capsys, arguments(workdir, synthetic_store, steps=100_000))
    process.kill()
    process.communicate()
    assert "another `ecg-jax pretrain` is using" in err
    assert f"(held by process {process.pid} on " in err


def test_fewer_steps_than_done_are_refused(finished, synthetic_store, capsys):
    code = cli.main(arguments(finished[0], synthetic_store, steps=10))
    assert code == 2
    assert "is at step 24 already, beyond the 10 steps asked for" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b'{"step": 1}\n\n{"step": 3}\n', b"[1, 2]\n", b"\x00\xff\xfe\n"])
def test_damaged_log_is_set_aside(tmp_path, finished, synthetic_store, capsys, damage):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "log.jsonl").write_bytes(damage)
    assert cli.main(arguments(workdir, synthetic_store)) == 0
    assert "a new log begins" in capsys.readouterr().err
    (aside,) = workdir.glob("log.jsonl.damaged-*")
    assert aside.read_bytes() == damage
    assert read_log(workdir) == []


def test_run_continues_on_a_store_that_has_moved(tmp_path, finished, synthetic_store):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished[0], workdir)
    shutil.copytree(synthetic_store, moved)
    shutil.rmtree(workdir / "checkpoints" / "24")
    code, out, err = finish(arguments(workdir, moved))
    assert code == 0, err
    assert "continuing at step 20 of 24" in out
    assert checksums(workdir, 24) == checksums(finished[0], 24)


def test_checkpoint_that_cannot_be_written_stops_the_run_in_one_sentence(tmp_path, synthetic_store):
    """Files may grow to 100 kB here, as on a disk that is nearly full: logs fit, a checkpoint does not."""
    args = arguments(tmp_path / "run", synthetic_store, model__width=96)
    small_files = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    process = start(args, before=small_files)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "a checkpoint could not be written to" in last
    assert "there is no complete one yet" in last
    code, out, err = finish(args)
    assert code == 0, err
    assert "continuing" not in out


def test_finished_run_is_a_no_op(finished, synthetic_store):
    before = trajectory(finished[0])
    code, out, err = finish(arguments(finished[0], synthetic_store))
    assert code == 0, err
    assert "continuing at step 24 of 24" in out
    assert trajectory(finished[0]) == before


def test_longer_run_continues_a_finished_one(tmp_path, finished, synthetic_store):
    workdir = tmp_path / "longer"
    shutil.copytree(finished[0], workdir)
    code, out, err = finish(arguments(workdir, synthetic_store, steps=26))
    assert code == 0, err
    assert "continuing at step 24 of 26" in out
    assert [entry["step"] for entry in read_log(workdir)] == list(range(1, 27))
