"""`ecg-jax prepare` interrupted: the same bytes always, whatever kills it, and full disks."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from ecg_files import ecg, write_record
from ecg_jax.data import workers, writer
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from prepare_source import files_of, interrupt_finalisation, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    store = tmp_path_factory.mktemp("reference") / "store"
    summary = prepare("wfdb", source, store, workers=1, progress=False)
    return files_of(store), summary


# ---------------------------------------------------------------- the same bytes


def test_one_and_two_workers_write_the_same_bytes(source, reference, tmp_path):
    prepare("wfdb", source, tmp_path / "s", workers=2, progress=False)
    assert files_of(tmp_path / "s") == reference[0]
    assert not (tmp_path / "s" / ".partial").exists()


def test_complete_store_is_left_alone(source, reference, tmp_path):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    summary = prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert summary.already_complete
    assert "nothing done" in str(summary)
    assert (summary.written, summary.problems) == (reference[1].written, reference[1].problems)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")} == times


COMMAND = (
    "import sys; from ecg_jax.prepare import prepare; "
    "prepare('wfdb', sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), progress=False)"
)
# Dies by SIGKILL at the n-th call of the functions that put files in place.
DYING = """
import os, shutil, signal, sys
count = int(sys.argv[4])
def dying(function):
    def call(*args, **kwargs):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.replace, os.truncate, os.unlink = map(dying, (os.replace, os.truncate, os.unlink))
shutil.rmtree = dying(shutil.rmtree)
"""


def test_killed_at_every_step_and_resumed_gives_the_same_bytes(source, reference, tmp_path):
    """One store, killed again and again until it gets through: no run may spoil an earlier one."""
    store = tmp_path / "s"
    # All but the last two die among the units; the last one gets through.
    for step in (0, 1, 2, 4, 5, 3, 2, 1, 3, 6, 8, 100):
        run = subprocess.run([sys.executable, "-c", DYING + COMMAND, source, store, "1", str(step)])
        assert run.returncode == (0 if step == 100 else -signal.SIGKILL)
        if not (store / "zarr.json").exists():
            with pytest.raises(UserError, match=r"incomplete|not a store|no store"):
                Store(store)
    assert files_of(store) == reference[0]


# 13 puts problems.jsonl into place, 16 to 19 extend chunk files, 20 is records.parquet, 25 zarr.json, 26 on the end.
@pytest.mark.parametrize("step", [12, 13, 14, 15, 17, 20, 22, 24, 25, 26, 27, 29, 33])
def test_killed_in_finalisation_and_resumed_gives_the_same_bytes(source, reference, tmp_path, step):
    run = subprocess.run([sys.executable, "-c", DYING + COMMAND, source, tmp_path / "s", "1", str(step)])
    assert run.returncode == -signal.SIGKILL
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """Five units that take a while, and the bytes of their store."""
    folder = tmp_path_factory.mktemp("long")
    signals = [ecg(12.0, 500.0, i) for i in range(3)]
    for i in range(160):
        write_record(folder / "source", f"r{i:03d}", signals[i % 3] + i * 1e-3)
    prepare("wfdb", folder / "source", folder / "store", workers=1, progress=False)
    return folder / "source", files_of(folder / "store")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_and_resumed_gives_the_same_bytes(long_source, tmp_path, sent):
    source, expected = long_source
    for _ in range(5):  # on a busy machine it may be through before the signal comes
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, source, tmp_path / "s", "2"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # A shell starts what it sends to the background with SIGINT ignored, and that is inherited.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not list((tmp_path / "s" / ".partial").glob("unit-*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(sent)
        if process.wait(30) != 0:
            break
        shutil.rmtree(tmp_path / "s")
    assert process.returncode != 0
    assert not (tmp_path / "s" / "zarr.json").exists()
    # Workers must not outlive the parent.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and group_is_alive(process.pid):
        time.sleep(0.05)
    assert not group_is_alive(process.pid)
    with pytest.raises(UserError, match="incomplete"):
        Store(tmp_path / "s")
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == expected


def group_is_alive(group: int) -> bool:
    """Whether a process of the group still runs (one that ended but was not waited for does not count)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_stopped_worker_abandons_its_unit(source, reference, tmp_path, monkeypatch):
    class StopAfterTen:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 10

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_stop", StopAfterTen())
        patch.setattr("ecg_jax.prepare.finalise", lambda *_, **__: None)
        with pytest.raises(UserError, match="incomplete"):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not list((tmp_path / "s" / ".partial").glob("unit-*"))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize("method", ["submit", "wait"])
def test_a_pool_that_breaks_is_a_sentence(source, tmp_path, monkeypatch, method):
    """Also one that breaks while the first units are handed out."""

    def broken(*_, **__):
        raise BrokenProcessPool("died")

    where = workers.concurrent.futures if method == "wait" else workers.concurrent.futures.ProcessPoolExecutor
    monkeypatch.setattr(where, method, broken)
    with pytest.raises(UserError, match=r"A worker process died .*run the same command again"):
        prepare("wfdb", source, tmp_path / "s", workers=2, progress=False)


def test_unit_without_chunk_file_is_done_again(source, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    (tmp_path / "s" / "signal/c/1/0").unlink()
    with open(tmp_path / "s" / "signal/c/2/0", "r+b") as file:
        file.truncate(100)
    (tmp_path / "s" / ".partial" / "unit-000000.json").write_text("{")
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


def test_flipped_byte_in_unfinished_work_does_not_become_a_store(source, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    chunk = tmp_path / "s" / "signal/c/1/0"
    data = bytearray(chunk.read_bytes())
    data[12345] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"1 of the 4 chunk files .*signal/c/1/0.*again"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not (tmp_path / "s" / "zarr.json").exists()
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize(
    ("at_once", "damage"),
    [
        (True, lambda sidecar: []),
        (True, lambda sidecar: None),
        (True, lambda sidecar: {**sidecar, "samples": "many"}),
        (True, lambda sidecar: {**sidecar, "rows": 3}),
        (False, lambda sidecar: {**sidecar, "rows": sidecar["rows"][1:]}),
        (False, lambda sidecar: {**sidecar, "rows": [{**row, "age": "old"} for row in sidecar["rows"]]}),
        (False, lambda sidecar: {**sidecar, "problems": [{"kind": "x"}]}),
        (True, lambda sidecar: {"samples": 0}),
    ],
)
def test_sidecar_of_another_shape_has_its_unit_done_again(source, reference, tmp_path, at_once, damage):
    """Not at once where only reading all of it tells, which is left to the end, as with other damage of the disk."""
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    sidecar = tmp_path / "s" / ".partial" / "unit-000001.json"
    sidecar.write_text(json.dumps(damage(json.loads(sidecar.read_text()))))
    if not at_once:
        with pytest.raises(
            UserError, match=r"1 of the 4 chunk files .*signal/c/1/0.*the same command writes"
        ):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_damaged_plan_is_a_sentence(source, tmp_path, text):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    (tmp_path / "s" / ".partial" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


@pytest.mark.parametrize("text", [None, "{\n", "[]\n", '{"kind": "x"}\n', '"text"\n'])
def test_complete_store_without_its_problems_is_a_sentence(source, tmp_path, text):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    if text is None:
        (tmp_path / "s" / "problems.jsonl").unlink()
    else:
        (tmp_path / "s" / "problems.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"problems\.jsonl(: No such| is damaged)"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


def test_complete_store_that_cannot_be_read_is_a_sentence(source, tmp_path, monkeypatch):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    original = Path.read_text

    def read_text(self, *args, **kwargs):
        if self.name == "zarr.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UserError, match=r"Cannot read .*zarr\.json: Permission denied"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize(("code", "call"), [(errno.EDQUOT, 3), *((errno.ENOSPC, call) for call in range(12))])
def test_full_disk_is_a_sentence_and_the_next_run_goes_on(
    source, reference, tmp_path, monkeypatch, code, call
):
    """The n-th fsync fails: in a chunk, a sidecar, or a file of the finalisation."""
    remaining = call
    original = os.fsync

    def full(fd):
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError(code, os.strerror(code))
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not (tmp_path / "s" / "zarr.json").exists()
    assert not list((tmp_path / "s").rglob("*.tmp"))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


def test_full_disk_in_a_worker_process(source, tmp_path):
    """A limit on file size is the full disk an ordinary user can make."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); " + COMMAND
    )
    run = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "s", "2"], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "UserError: Cannot write the store" in run.stderr
    assert not (tmp_path / "s" / "zarr.json").exists()
