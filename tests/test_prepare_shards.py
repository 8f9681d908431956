"""`ecg-jax prepare --shard=i/n` and `--merge`: the same bytes as one call, whatever happens to a shard."""

import errno
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from ecg_jax.data import attempt
from ecg_jax.data.shard import Shard, shards_of
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import main, prepare
from prepare_source import N_MADE, N_UNITS, files_of, finished, write_source_with_twins


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
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"nothing to merge .*no shard"):
            run(merge=True, dry_run=dry_run)
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
    with pytest.raises(
        UserError, match=r"run the same command without --merge, or with --shard=i/n .* first"
    ):
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


# ---------------------------------------------------------------- disks


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
    with pytest.raises(
        UserError,
        match=r"1 of the 4 chunk files .*signal/c/2/0.*; run the same command with --shard=2/3 again",
    ):
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
    with pytest.raises(UserError, match=r"signal/c/3/0.*; run the same command without --merge, or"):
        run(merge=True)
    run()
    assert files_of(tmp_path / "s") == reference


@pytest.mark.parametrize("name", ["unit-000001.json", "0"])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_damaged(run, reference, tmp_path, monkeypatch, name):
    """ESTALE and EIO of a busy network drive must not cost units."""
    run(shard="0/1")

    def failing(original):
        def call(self, *arguments, **options):
            if self.name == name:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
            return original(self, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(Path.read_bytes))
        patch.setattr(Path, "stat", failing(Path.stat))
        with pytest.raises(UserError, match=rf"Stale file handle \(.*{name}\).* run the same command again"):
            run(merge=True)
    assert finished(tmp_path / "s") == list(range(N_UNITS))
    run(merge=True)
    assert files_of(tmp_path / "s") == reference


def test_what_is_done_is_told_without_reading_it(run, monkeypatch):
    """The sidecars of 11 million recordings are gigabytes."""
    run(shard="0/1")
    monkeypatch.setattr("ecg_jax.data.unit_files._check_sidecar", lambda _: pytest.fail("a sidecar was read"))
    assert run(shard="0/1").converted == 0


def test_locks_that_have_just_gone_are_no_error(run, tmp_path, monkeypatch):
    """Another process finishes the store and removes them meanwhile."""
    run(shard="1/3")
    monkeypatch.setattr(attempt, "_shards_seen", lambda _: [Shard(0, 2), Shard(1, 3)])
    assert attempt.last_count(tmp_path / "s") == 3
    shutil.rmtree(tmp_path / "s/.partial")
    assert attempt.last_count(tmp_path / "s") == 1
    monkeypatch.undo()
    assert attempt.last_count(tmp_path / "s") == 1


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
    with pytest.raises(UserError, match=r"1 of 4 units .*--shard=2/3 first"):
        run(dry_run=True, merge=True)
    survey = run(dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
    assert (survey.done_units, survey.done_recordings, survey.missing) == (3, 71, "--shard=2/3")
    assert survey.bytes_each == pytest.approx(2.7 * 240 * 24, rel=0.1)
    assert "done already       71 recordings in 3 units" in str(survey)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert "not enough" in str(run(dry_run=True))
    run(shard="2/3")
    assert run(dry_run=True, merge=True).done_units == 4
    assert not (tmp_path / "s/zarr.json").exists()
    run(merge=True)
    assert run(dry_run=True, merge=True).complete
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
