"""Shards of `ecg-jax prepare` as processes: killed, twice at once, without locks, on a full disk."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from prepare_source import files_of, finished, write_source_with_twins

COMMAND = """
import sys
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
source, store, workers, shard = sys.argv[1:5]
try:
    prepare("wfdb", source, store, workers=int(workers), shard=shard or None, merge=not shard, progress=False)
except UserError as error:
    sys.exit(f"UserError: {error}")
"""
# The first recording waits until the folder GATE has a file `open`.
WAITING = """
import os, pathlib, time
from ecg_jax.data.corpora import wfdb
original = wfdb.read
def read(source, entry, assume_gain):
    gate = pathlib.Path(os.environ["GATE"])
    (gate / f"reading-{os.getpid()}").touch()
    while not (gate / "open").exists():
        time.sleep(0.01)
    return original(source, entry, assume_gain)
wfdb.read = read
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source_with_twins(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The bytes of one call."""
    store = tmp_path_factory.mktemp("reference") / "store"
    prepare("wfdb", source, store, workers=1, progress=False)
    return files_of(store)


@pytest.fixture
def run(source, tmp_path):
    """Calls `prepare` on a store of its own."""

    def call(**options):
        return prepare("wfdb", source, tmp_path / "s", **{"workers": 1, "progress": False, **options})

    return call


def start(
    source: Path, store: Path, shard: str, workers: int = 1, gate: Path | None = None, before: str = ""
):
    code = before + (WAITING if gate else "") + COMMAND
    return subprocess.Popen(
        [sys.executable, "-c", code, source, store, str(workers), shard],
        env={**os.environ, **({"GATE": str(gate)} if gate else {})},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process=None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture
def gate(tmp_path):
    folder = tmp_path / "gate"
    folder.mkdir()
    return folder


def test_a_shard_that_was_killed_goes_on_and_the_merge_is_equal(source, reference, run, tmp_path, gate):
    """SIGKILL in the middle of its first unit."""
    store = tmp_path / "s"
    process = start(source, store, "0/2", gate=gate)
    wait_for(lambda: list(gate.glob("reading-*")), process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert finished(store) == []
    assert len(list((store / ".partial/shard-0-of-2").glob("*.tmp"))) == 1
    # Nothing of it disturbs the other shard, which leaves alone what is not its own.
    run(shard="1/2")
    assert len(list((store / ".partial/shard-0-of-2").glob("*.tmp"))) == 1
    with pytest.raises(UserError, match=r"2 of 4 units .*--shard=0/2"):
        run(merge=True)
    again = start(source, store, "0/2")
    assert again.wait(120) == 0, again.stderr.read()
    assert not list((store / ".partial").rglob("*.tmp"))
    run(merge=True)
    assert files_of(store) == reference


def test_two_hosts_with_the_same_shard_at_once(source, reference, run, tmp_path, gate):
    store = tmp_path / "s"
    first = start(source, store, "1/2", gate=gate)
    wait_for(lambda: list(gate.glob("reading-*")), first)
    second = start(source, store, "1/2", gate=gate)
    assert second.wait(120) == 1
    assert re.search(
        rf"UserError: Shard 1/2 .* is running already \(process {first.pid} on", second.stderr.read()
    )
    # So are, with its name, whatever would finish the store, and other numbers of shards; not another shard.
    for options in ({}, {"merge": True}):
        with pytest.raises(
            UserError, match=rf"being written by shard 1/2 \(process {first.pid} on .*wait until"
        ):
            run(**options)
    with pytest.raises(UserError, match=r"Shard 1/2 .* is running .* use --shard=i/2"):
        run(shard="0/3")
    assert run(shard="0/2").units == 2
    (gate / "open").touch()
    assert first.wait(120) == 0, first.stderr.read()
    run(merge=True)
    assert files_of(store) == reference


def test_the_same_shard_twice_on_a_drive_without_locks(source, reference, run, tmp_path, gate):
    """Work is done twice, and nothing else: the bytes are the same, whoever writes them last."""
    unlocked = (
        "import errno, fcntl\n"
        "def flock(*_):\n    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = flock\n"
    )
    store = tmp_path / "s"
    processes = [start(source, store, "0/1", gate=gate, before=unlocked) for _ in range(2)]
    wait_for(lambda: len(list(gate.glob("reading-*"))) == 2)
    (gate / "open").touch()
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
        assert "cannot be locked (No locks available)" in process.stderr.read()
    run(merge=True)
    assert files_of(store) == reference


def test_a_shard_nobody_knows_of_cannot_spoil_a_finished_store(source, reference, run, tmp_path, gate):
    """On a drive whose locks do not reach other hosts a merge cannot see that a shard still runs."""
    unlocked = "import fcntl\nfcntl.flock = lambda *_: None\n"
    store = tmp_path / "s"
    late = start(source, store, "0/2", gate=gate, before=unlocked)
    wait_for(lambda: list(gate.glob("reading-*")), late)
    run(shard="0/2")
    run(shard="1/2")
    run(merge=True)
    assert files_of(store) == reference
    (gate / "open").touch()
    assert late.wait(120) == 1
    assert "UserError: Cannot write the store" in late.stderr.read()
    assert files_of(store) == reference


def test_several_shards_at_once(source, reference, run, tmp_path):
    store = tmp_path / "s"
    processes = [start(source, store, f"{index}/3") for index in range(3)]
    for process in processes:
        assert process.wait(240) == 0, process.stderr.read()
    run(merge=True)
    assert files_of(store) == reference


def test_a_full_disk_in_a_shard(source, reference, run, tmp_path):
    """A limit on file size is the full disk an ordinary user can make."""
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    )
    store = tmp_path / "s"
    run(shard="1/2")
    full = start(source, store, "0/2", before=limit)
    assert full.wait(120) == 1
    assert "UserError: Cannot write the store" in full.stderr.read()
    assert finished(store) == [1, 3]
    assert not list((store / ".partial").rglob("*.tmp"))
    with pytest.raises(UserError, match=r"2 of 4 units .*--shard=0/2"):
        run(merge=True)
    run(shard="0/2")
    run(merge=True)
    assert files_of(store) == reference
