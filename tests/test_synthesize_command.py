"""`ecg-jax synthesize`: any size, any number of processes, interrupted and killed; and what it refuses."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ecg_jax.synthesize as command
from ecg_jax import cli
from ecg_jax.data.recording import limb_residual
from ecg_jax.data.store import PARTIAL, Store
from ecg_jax.data.synthetic_signal import draw_signal
from ecg_jax.errors import UserError
from ecg_jax.synthesize import synthesize


def files(path):
    """Digest of every file of a store."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "one"
    synthesize(path, records=70, seconds=2.5, workers=1, progress=False)
    return files(path)


def test_two_processes_write_the_same_bytes(small, tmp_path):
    synthesize(tmp_path / "two", records=70, seconds=2.5, workers=2, progress=False)
    assert files(tmp_path / "two") == small
    assert len([name for name in small if name.startswith("signal/c/")]) == 3


def test_another_seed_is_another_set(small, tmp_path):
    store = synthesize(tmp_path / "s", records=70, seconds=2.5, seed=1, workers=1, progress=False)
    other = files(store.path)
    assert all(other[name] != small[name] for name in small if name.startswith("signal/c/"))


def test_interrupted_the_same_command_goes_on(small, tmp_path, monkeypatch):
    drawn_indices = []

    def stop_at_50(seed, index, case, rate):
        drawn_indices.append(index)
        if index == 50:
            raise KeyboardInterrupt
        return draw_signal(seed, index, case, rate)

    monkeypatch.setattr(command, "draw_signal", stop_at_50)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "s", records=70, seconds=2.5, workers=1, progress=False)
    with pytest.raises(UserError, match="incomplete"):
        Store(tmp_path / "s")
    assert drawn_indices == list(range(51))
    drawn_indices.clear()
    monkeypatch.setattr(
        command, "draw_signal", lambda s, i, c, r: drawn_indices.append(i) or draw_signal(s, i, c, r)
    )
    synthesize(tmp_path / "s", records=70, seconds=2.5, workers=1, progress=False)
    assert drawn_indices == list(range(32, 70))
    assert files(tmp_path / "s") == small
    drawn_indices.clear()
    assert synthesize(tmp_path / "s", records=70, seconds=2.5, workers=1).synthetic
    assert drawn_indices == []


def test_killed_the_same_command_goes_on(tmp_path):
    arguments = ["--records=2000", "--seconds=2.5", "--workers=2", "--seed=5"]
    program = [sys.executable, "-c", "import sys; from ecg_jax.cli import main; sys.exit(main(sys.argv[1:]))"]
    store = tmp_path / "killed"
    process = subprocess.Popen([*program, "synthesize", str(store), *arguments], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((store / PARTIAL).glob("unit-*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (store / "zarr.json").exists()
    done = subprocess.run(
        [*program, "synthesize", str(store), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2000 synthetic recordings of 2.5 s" in done.stdout
    assert not (store / PARTIAL).exists()
    whole = synthesize(tmp_path / "whole", records=2000, seconds=2.5, seed=5, workers=1, progress=False)
    assert files(store) == files(whole.path)


def test_other_arguments_do_not_go_on(small, tmp_path, capsys):
    store = str(tmp_path / "s")
    assert cli.main(["synthesize", store, "--records=40", "--seconds=2.5", "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert "40 synthetic recordings of 2.5 s" in out
    assert "No result from it says anything about ECG" in out
    for other, named in (
        ("--seed=1", "seed differs (0 there, 1 now)"),
        ("--shuffle-labels", "shuffle labels differs"),
        ("--distinct=4", "distinct differs"),
    ):
        assert cli.main(["synthesize", store, "--records=40", "--seconds=2.5", other]) == 2
        assert named in capsys.readouterr().err


def test_repeated_signals_differ_by_microvolts_and_keep_the_identities(tmp_path):
    store = synthesize(tmp_path / "s", records=300, seconds=2.5, distinct=3, workers=1, progress=False)
    assert len(set(store.column("checksum"))) == 300
    for row in (3, 131, 299):
        signal, source = store.read(row).astype(int), store.read(row % 3).astype(int)
        np.testing.assert_array_equal(signal[:, :6], source[:, :6])
        assert np.ptp(signal - source, axis=0).max() == 0
        assert (signal - source).max() <= 63
        assert limb_residual(signal.astype(np.float64)).max() == 0.0
        assert store.column("labels_rhythm")[row] == store.column("labels_rhythm")[row % 3]
    assert len(set(store.column("patient_id"))) == 150
    # Age and sex are the patient's own, also where the signal is that of another.
    people = zip(*(store.column(name) for name in ("patient_id", "age", "sex")), strict=True)
    assert len(set(people)) == 150


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--records=0"], "--records is from 1 to 1000000000, not 0"),
        (["--records=10000000000000"], "--records is from 1 to"),
        (["--records=10", "--patients=11"], "--patients is from 1 to the number of records (10)"),
        (["--records=10", "--patients=0"], "--patients"),
        (["--records=10", "--seconds=1"], "--seconds is from 2.5 to 600"),
        (["--records=10", "--seconds=nan"], "--seconds"),
        (["--records=10", "--seed=-1"], "--seed"),
        (["--records=10", "--workers=0"], "--workers"),
        (["--records=38", "--shuffle-labels"], "--shuffle-labels needs at least 20 patients, not 19"),
        (["--records=10", "--distinct=5000"], "--distinct is from 1 to 4096"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, capsys, arguments, named):
    assert cli.main(["synthesize", str(tmp_path / "s"), *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert cli.main(["synthesize", str(tmp_path), "--records=5"]) == 2
    assert "is not empty and not a store" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=600_000)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage)
    assert cli.main(["synthesize", str(tmp_path / "s"), "--records=11000000", "--workers=1"]) == 2
    assert "needs 633.6 GB more, but its disk has 0.0 GB free" in capsys.readouterr().err
