"""`ecg-jax prepare --shard=i/n` and `--merge`: the same bytes as one call, whatever happens to a shard."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ecg_files import ecg, write_record
from ecg_jax.data import attempt, progress, record_table
from ecg_jax.data.shard import Shard, shards_of
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import main, prepare
from prepare_source import N_MADE, files_of, write_source

N_UNITS = 4  # of `N_MADE` recordings


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("source"))
    # Three twins, far apart, so that some shard sees only the later ones.
    for name in ("patient000/twin", "patient020/twin", "patient049/twin"):
        write_record(folder / name[:10], name[11:], ecg(2.6, 240.0, 0), rate=240)
    return folder


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


def finished(store: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("unit-")) for path in (store / ".partial").glob("unit-*.json"))


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_and_a_merge_write_the_bytes_of_one_call(run, reference, tmp_path, order):
    for index in order:
        summary = run(shard=f"{index}/3")
        units = list(range(index, N_UNITS, 3))
        assert (summary.units, summary.converted) == (len(units), summary.recordings)
        assert set(units) <= set(finished(tmp_path / "s"))
        with pytest.raises(UserError, match="incomplete"):
            Store(tmp_path / "s")
    summary = run(merge=True)
    assert (summary.written, summary.already_complete) == (N_MADE - 1, False)
    assert summary.problems["duplicate_signal"] == 3
    assert files_of(tmp_path / "s") == reference


def test_dropping_duplicates_is_the_same_too(run, source, tmp_path):
    prepare("wfdb", source, tmp_path / "one", workers=1, progress=False, duplicates="drop")
    for index in range(2):
        run(shard=f"{index}/2", duplicates="drop", workers=2)
    run(merge=True, duplicates="drop")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "one")
    assert len(Store(tmp_path / "s")) == N_MADE - 4


def test_a_call_for_everything_finishes_what_shards_left(run, reference, tmp_path):
    run(shard="1/3")
    chunk = tmp_path / "s/signal/c/1/0"
    before = chunk.stat().st_ino
    run()
    assert chunk.stat().st_ino == before
    assert files_of(tmp_path / "s") == reference


def test_a_finished_shard_does_nothing_again_nor_on_a_complete_store(run, reference, tmp_path):
    run(shard="0/1")
    assert run(shard="0/1").converted == 0
    run(merge=True)
    summary = run(shard="0/1")
    assert summary.already_complete
    assert "nothing done" in str(summary)
    assert run(merge=True).already_complete
    assert files_of(tmp_path / "s") == reference


def test_shards_of_another_number_go_on(run, reference, tmp_path):
    """The array was submitted again with more tasks; some have no unit of their own."""
    run(shard="0/2")
    converted = [run(shard=f"{index}/6").converted for index in range(6)]
    assert [n > 0 for n in converted] == [False, True, False, True, False, False]
    run(merge=True)
    assert files_of(tmp_path / "s") == reference


def test_two_row_groups_are_those_of_one_table():
    """What `finalise` writes in lots is what writing the whole table at once gives."""
    import io

    import pyarrow as pa
    import pyarrow.parquet

    n = record_table.ROW_GROUP + 1000
    ids = np.arange(n)
    table = pa.table({"record_id": pa.array(ids).cast(pa.string()), "fold": pa.array(ids % 10, pa.int32())})
    whole, lots = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table.combine_chunks(), whole, compression="zstd")
    parts = (table.slice(0, record_table.ROW_GROUP), table.slice(record_table.ROW_GROUP))
    record_table.write_parquet(lots, table.schema, (part.combine_chunks() for part in parts))
    assert lots.getvalue() == whole.getvalue()


@pytest.mark.parametrize("group", [1, 7, 50])
@pytest.mark.parametrize("drop", [False, True])
def test_final_tables_do_not_depend_on_the_row_group(monkeypatch, group, drop):
    import pyarrow as pa

    rng = np.random.default_rng(0)
    n = 40
    records = pa.table(
        {
            "record_id": [f"r{i}" for i in range(n)],
            "offset": pa.array(np.zeros(n, np.int64)),
            "duplicate_of": pa.nulls(n, pa.string()),
        }
    )
    records = pa.concat_tables([records.slice(0, 13), records.slice(13)])
    keys = rng.integers(0, 12, (n, 1)).astype(np.uint64).repeat(2, axis=1)
    first = record_table.first_with_same_checksum(keys)
    expected_first = [next(j for j in range(n) if keys[j, 0] == keys[i, 0]) for i in range(n)]
    assert first.tolist() == expected_first
    rows = [i for i in range(n) if not drop or expected_first[i] == i]
    monkeypatch.setattr(record_table, "ROW_GROUP", group)
    tables = list(record_table.final_tables(records, np.arange(n) * 10, first, drop))
    assert [len(table) for table in tables[:-1]] == [group] * (len(tables) - 1)
    found = pa.concat_tables(tables).to_pydict()
    assert found["record_id"] == [f"r{i}" for i in rows]
    assert found["offset"] == [10 * i for i in rows]
    assert found["duplicate_of"] == [
        None if expected_first[i] == i else f"r{expected_first[i]}" for i in rows
    ]


# ---------------------------------------------------------------- what a shard is


def test_shards_cover_all_units_once():
    for count in (1, 3, 64, 3000):
        units = [unit for index in range(count) for unit in Shard(index, count).units(2686)]
        assert sorted(units) == list(range(2686))
    assert shards_of([0, 3, 7, 67, 71], 64) == "--shard=0/64, 3/64, 7/64"
    assert shards_of(list(range(40)), 40, most=2) == "--shard=0/40, 1/40 and 38 more"


@pytest.mark.parametrize(
    "text",
    ["", "3", "3/", "/64", "3/64/2", "-1/3", "+1/3", "1/-3", " 1/3", "1.0/3", "01/3", "1/3\n", "a/b", "١/3"],
)
def test_a_shard_that_is_none_is_a_sentence(run, tmp_path, text):
    with pytest.raises(UserError, match="--shard is i/n") as refusal:
        run(shard=text)
    assert ("SLURM_ARRAY_TASK_ID" in str(refusal.value)) == text.startswith("/")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("text", "range_"), [("3/3", "0 to 2"), ("64/3", "0 to 2"), ("1/1", "0 to 0")])
def test_a_shard_that_does_not_exist_is_a_sentence(run, text, range_):
    with pytest.raises(UserError, match=rf"--shard={text} does not exist: .* from {range_}, .*--array="):
        run(shard=text)
    with pytest.raises(UserError, match="does not exist"):
        run(shard="0/0")


def test_a_merge_of_nothing_or_with_a_shard_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"one of them"):
        run(shard="0/3", merge=True)
    with pytest.raises(UserError, match=r"nothing to merge .*no shard"):
        run(merge=True)
    assert not (tmp_path / "s").exists()


def test_a_merge_names_the_shards_that_are_missing(run, tmp_path):
    run(shard="1/3")
    with pytest.raises(UserError, match=r"3 of 4 units .* with --shard=0/3, 2/3 first"):
        run(merge=True)
    assert finished(tmp_path / "s") == [1]
    run(shard="0/3")
    with pytest.raises(UserError, match=r"1 of 4 units .* with --shard=2/3 first"):
        run(merge=True)


def test_a_merge_after_an_interrupted_call_says_to_run_it_without(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ecg_jax.prepare.finalise", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    (tmp_path / "s/.partial/unit-000002.json").unlink()
    with pytest.raises(UserError, match="run the same command without --merge first"):
        run(merge=True)


def test_a_merge_is_as_strict_as_a_call(run):
    for index in range(2):
        run(shard=f"{index}/2")
    with pytest.raises(UserError, match="has a problem"):
        run(merge=True, strict=True)
    assert run(merge=True).problems["missing_signal"]


# ---------------------------------------------------------------- hosts that see different things


def test_a_host_that_lists_other_recordings_is_refused_with_what_differs(source, tmp_path):
    mount = tmp_path / "source"
    shutil.copytree(source, mount)
    store = tmp_path / "s"
    prepare("wfdb", mount, store, shard="0/3", workers=1, progress=False)
    shutil.rmtree(mount / "patient033")
    for options in ({"shard": "1/3"}, {"merge": True}, {}, {"dry_run": True}):
        with pytest.raises(
            UserError, match=r"list of recordings differs \(103 there, 101 now; they part .* after"
        ):
            prepare("wfdb", mount, store, workers=1, progress=False, **options)
    for suffix in ("hea", "dat"):
        (mount / f"patient000/r000.{suffix}").rename(mount / f"patient000/zzz.{suffix}")
    with pytest.raises(UserError, match="the first is patient000/r000 there and patient000/r001 now"):
        prepare("wfdb", mount, store, shard="1/3", workers=1, progress=False)
    assert finished(store) == [0, 3]


def test_labels_that_changed_are_told_from_recordings_that_changed(source, tmp_path, monkeypatch):
    prepare("wfdb", source, tmp_path / "s", shard="0/3", workers=1, progress=False)
    monkeypatch.setattr("ecg_jax.data.corpora.listing.Listing.digest", lambda self: "another")
    with pytest.raises(UserError, match=r"differs \(103 both times; so labels, folds or patients"):
        prepare("wfdb", source, tmp_path / "s", shard="1/3", workers=1, progress=False)


def test_shards_of_different_settings_are_refused(run):
    run(shard="0/3")
    with pytest.raises(UserError, match="clip mv differs"):
        run(shard="1/3", clip_mv=3.0)
    with pytest.raises(UserError, match="duplicates differs"):
        run(merge=True, duplicates="drop")


@pytest.mark.parametrize("code", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_the_first_plan_stays(tmp_path, monkeypatch, code):
    """Also on a drive without hard links."""
    if code is not None:

        def link(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", link)
    for text in (b"first", b"second"):
        attempt._write_once(tmp_path / "plan.json", text)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"plan.json": b"first"}


# ---------------------------------------------------------------- real processes

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
# A recording waits until the file of its name is put into this folder.
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


def test_a_shard_that_was_killed_goes_on_and_the_merge_is_equal(source, reference, run, tmp_path):
    """SIGKILL, again and again, each time when one more unit is done or in the middle of one."""
    store = tmp_path / "s"
    gate = tmp_path / "gate"
    gate.mkdir()
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


def test_a_full_disk_in_a_merge(run, reference, tmp_path, monkeypatch):
    for index in range(2):
        run(shard=f"{index}/2")
    original, calls = os.fsync, 0

    def full(fd):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            run(merge=True)
    assert not list((tmp_path / "s").rglob("*.tmp"))
    run(merge=True)
    assert files_of(tmp_path / "s") == reference


def test_a_flipped_byte_is_named_by_the_merge_and_only_that_unit_is_done_again(run, reference, tmp_path):
    store = tmp_path / "s"
    for index in range(3):
        run(shard=f"{index}/3")
    chunk = store / "signal/c/2/0"
    data = bytearray(chunk.read_bytes())
    data[12345] ^= 1
    chunk.write_bytes(data)
    inodes = {unit: (store / f"signal/c/{unit}/0").stat().st_ino for unit in range(N_UNITS)}
    with pytest.raises(UserError, match=r"1 of the 4 chunk files .*signal/c/2/0.*; run --shard=2/3 again"):
        run(merge=True)
    assert not (store / "zarr.json").exists()
    with pytest.raises(UserError, match=r"1 of 4 units .*--shard=2/3 first"):
        run(merge=True)
    assert run(shard="2/3").converted == 32
    changed = [u for u, inode in inodes.items() if (store / f"signal/c/{u}/0").stat().st_ino != inode]
    assert changed == [2]
    run(merge=True)
    assert files_of(store) == reference


def test_a_flipped_byte_after_a_call_for_everything_is_named_by_a_merge_too(run, reference, tmp_path):
    run(shard="0/1")
    chunk = tmp_path / "s/signal/c/3/0"
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 128
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"signal/c/3/0.*; the same command without --merge writes them"):
        run(merge=True)
    run()
    assert files_of(tmp_path / "s") == reference


def test_leftovers_of_another_host_are_removed_when_they_are_old(run, tmp_path):
    run(shard="1/3")
    folder = tmp_path / "s/.partial/shard-1-of-3"
    names = {name: folder / f"unit-000001.{name}.0123.tmp" for name in ("fresh", "old")}
    for path in names.values():
        path.write_bytes(b"x")
    hours_ago = time.time() - 2 * attempt.LEFTOVER_S
    os.utime(names["old"], (hours_ago, hours_ago))
    run(shard="1/3")
    assert [name for name, path in names.items() if path.exists()] == ["fresh"]
    run(shard="0/3")
    assert names["fresh"].exists()


# ---------------------------------------------------------------- what is told


def test_dry_run_writes_nothing(run, source, tmp_path, monkeypatch):
    survey = run(dry_run=True, shard="1/3")
    assert not (tmp_path / "s").exists()
    assert (survey.recordings, survey.units, survey.shard_units, survey.done_units) == (103, 4, 1, 0)
    assert survey.bytes_needed == survey.shard_recordings * 57_600
    assert "if recordings last 10 s" in str(survey)
    for index in range(2):
        run(shard=f"{index}/3")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    survey = run(dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
    assert (survey.done_units, survey.done_recordings, survey.missing) == (3, 71, "--shard=2/3")
    assert survey.bytes_each == pytest.approx(2.7 * 240 * 24, rel=0.1)
    assert "done already       71 recordings in 3 units" in str(survey)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert "not enough" in str(run(dry_run=True))
    run(shard="2/3")
    run(merge=True)
    assert "the store is complete" in str(run(dry_run=True))


def test_command_in_shards(source, tmp_path, capsys):
    store = str(tmp_path / "s")
    assert main(["wfdb", str(source), store, "--workers=2", "--shard=0/1"]) == 0
    captured = capsys.readouterr()
    assert re.search(
        r"shard 0/1 of wfdb is done, 103 recordings in 4 units; 103 of them in this call", captured.out
    )
    assert "Next:" not in captured.out
    assert main(["wfdb", str(source), store, "--dry-run"]) == 0
    assert "done already       103 recordings in 4 units" in capsys.readouterr().out
    assert main(["wfdb", str(source), store, "--merge"]) == 0
    captured = capsys.readouterr()
    assert "Next: ecg-jax pretrain" in captured.out
    assert re.search(r"verify .*: [\d.]+ MB in [\d.]+ s, [\d.]+ [MG]B/s", captured.err)


def test_help_explains_a_slurm_array(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "sbatch --array=0-63" in text
    assert "--shard=$SLURM_ARRAY_TASK_ID/64" in text
    assert "--merge" in text


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("prepare heedb, shard 3/64", 171_875, 40_000) as bar:
        for now in np.arange(0.0, 200.0):
            bar.update(int(412 * now))
    assert capsys.readouterr().err.splitlines() == [
        "prepare heedb, shard 3/64: 171 875 recordings, 40 000 recordings done before",
        "prepare heedb, shard 3/64: 64 720 of 171 875 recordings, 412/s, 4 min 20 s left",
        "prepare heedb, shard 3/64: 89 440 of 171 875 recordings, 412/s, 3 min 20 s left",
        "prepare heedb, shard 3/64: 114 160 of 171 875 recordings, 412/s, 2 min 20 s left",
        "prepare heedb, shard 3/64: 81 988 recordings in 3 min 19 s, 412/s",
    ]
    with progress.Progress("verify s", 634_000_000_000, of_bytes=True) as bar:
        now = 1000.0
        bar.update(0)
        now = 1100.0
        bar.update(120_500_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "verify s: 0.0 MB of 634.0 GB, 0.0 MB/s, no end known"
    assert lines[2].startswith("verify s: 120.5 GB of 634.0 GB, 133.")
    with progress.Progress("quiet", 5, show=False) as bar:
        now = 9999.0
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress("prepare heedb", 100, 40) as bar:
        bar.update(60)
    text = capsys.readouterr().err
    assert "\r" in text
    assert "100/100" in text


def test_durations():
    texts = {0: "0.0 s", 9.94: "9.9 s", 59: "59 s", 61: "1 min 1 s", 7500: "2 h 5 min", 100_000: "1 d 3 h"}
    assert {seconds: progress.duration_text(seconds) for seconds in texts} == texts
