"""Offline targets: where labels lie, reading them beside crops, and everything that may be wrong with a set."""

import json
import multiprocessing
import os
import shutil
import signal
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax import cli
from ecg_jax.data.preprocessing import Preprocessing, Processed
from ecg_jax.data.recording import CANONICAL_LEADS, Recording
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.data.targets import (
    MAX_CODES,
    TOKEN_SAMPLES,
    Grid,
    Targets,
    TargetsWriter,
    label_range,
    names,
)
from ecg_jax.data.writer import PARTIAL, UnitWriter, finalise
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import tokens_of

LENGTHS = (1301, 700, 77, 1201, 333, 1000, 641)


def write_store(path, signals, per_unit=4):
    """A store that holds just these int16 signals [T, 12], in folds 1, 2, 3, 1, ..."""
    (path / PARTIAL).mkdir(parents=True)
    none = np.zeros(12, bool)
    units = [range(i, min(i + per_unit, len(signals))) for i in range(0, len(signals), per_unit)]
    for unit, numbers in enumerate(units):
        with UnitWriter(path, unit, "made") as writer:
            for i in numbers:
                recording = Recording(f"r{i}", np.zeros((1, 12)), 240.0, CANONICAL_LEADS, fold=i % 3 + 1)
                writer.append(recording, Processed(signals[i], none, none, none, 0, []), "")
            writer.finish()
    finalise(
        path,
        n_units=len(units),
        preprocessing=Preprocessing(),
        attributes={"corpus": "made", "source": "", "fold_source": "made"},
        label_sets=(),
        classes={},
        descriptions={},
        first_problems=[],
        drop_duplicates=False,
        strict=False,
    )
    return path


def numbered(i, length):
    """A signal whose sample t is 2000 i + t: it tells record and position of each sample."""
    return np.repeat((2000 * i + np.arange(length, dtype=np.int16))[:, None], 12, axis=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    signals = [numbered(i, length) for i, length in enumerate(LENGTHS)]
    return Store(write_store(tmp_path_factory.mktemp("targets") / "store", signals))


@pytest.fixture
def copy(store, tmp_path):
    return Store(shutil.copytree(store.path, tmp_path / "copy", ignore=shutil.ignore_patterns("targets")))


def write(store, name="set", codes=20, seed=0):
    """A set of random labels; returns them."""
    with TargetsWriter(store, name) as writer:
        assert (np.asarray(writer.labels) == -1).all()
        writer.labels[:] = np.random.default_rng(seed).integers(-1, codes, len(writer.labels))
        labels = np.array(writer.labels)
        writer.finish(np.arange(codes * 3, dtype=np.float32).reshape(codes, 3), {"seed": seed})
    return labels


def test_store_begins_records_at_odd_samples(store):
    offset, length = store.column("offset"), store.column("length")
    ends = offset + length
    touching = offset[1:] == ends[:-1]
    assert (touching & (offset[1:] % 2 == 1)).any()
    assert (touching & (offset[1:] % 2 == 0)).any()


def test_tokens_are_those_of_the_encoder():
    for samples in (1, 2, 599, 600, 601):
        assert -(-samples // TOKEN_SAMPLES) == tokens_of(samples)


def test_records_own_disjoint_labels(store):
    first, last = label_range(store.column("offset"), store.column("length"))
    assert (first[1:] >= last[:-1]).all()
    assert (last > first).all()


def test_what_is_written_is_read_at_every_offset(copy):
    labels = write(copy)
    targets = Targets(copy, "set")
    assert targets.codes == 20
    assert targets.centroids.shape == (20, 3)
    offset, length = copy.column("offset"), copy.column("length")
    for row in range(len(copy)):
        starts = offset[row] + np.arange(length[row] - 60)
        found = targets.read(starts, 30)
        assert found.dtype == np.int16
        assert found.shape == (len(starts), 30)
        for start, own in zip(starts, found, strict=True):
            np.testing.assert_array_equal(own, labels[start // 2 : start // 2 + 30])


def test_no_token_gets_a_label_of_another_record(copy):
    with TargetsWriter(copy, "owner") as writer:
        for row, (first, last) in enumerate(zip(*label_range(*_extent(copy)), strict=True)):
            writer.labels[first:last] = row
        writer.finish(np.zeros((len(copy), 1), np.float32), {})
    targets = Targets(copy, "owner")
    for row, (offset, length) in enumerate(zip(*_extent(copy), strict=True)):
        for window in (5, 6, 76, 77):
            found = targets.read(offset + np.arange(length - window + 1), tokens_of(window))
            assert set(found.ravel()) <= {row, -1}
            # An even window lies wholly within what its record owns.
            assert window % 2 or (found == row).all()
            assert (found[:, :-1] == row).all()
        assert (targets.read([offset + length - 1], 50)[0, 1:] == -1).all(), "beyond the record"


def _extent(store):
    return store.column("offset"), store.column("length")


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(2, 40),
    st.integers(0, 4),
)
def test_windows_take_every_label_of_their_record_once(lengths, begin, window, trim):
    """For windows described wholly (as an encoder does) and only in their middle (as the spectrum does)."""
    lengths = np.array(lengths)
    offsets = begin + np.cumsum(lengths) - lengths
    tokens = tokens_of(window)
    grid = Grid(window=window, stride=window, skipped=0, tokens=tokens)
    if trim and tokens > 2 * trim:
        tokens -= 2 * trim
        grid = Grid(window=window, stride=2 * tokens, skipped=trim, tokens=tokens)
    windows = grid.windows(offsets, lengths)
    taken = np.concatenate([[], *(np.arange(a, b) for a, b in zip(windows.first, windows.last, strict=True))])
    first, last = label_range(offsets, lengths)
    long_enough = lengths >= window
    owned = [np.arange(a, b) for a, b in zip(first[long_enough], last[long_enough], strict=True)]
    np.testing.assert_array_equal(taken, np.concatenate([[], *owned]))
    assert len(windows.starts) == grid.count(lengths).sum()
    for start, a, b in zip(*windows, strict=True):
        row = np.searchsorted(offsets, start, side="right") - 1
        assert offsets[row] <= start <= offsets[row] + lengths[row] - window, "no window leaves its record"
        # What a window does not describe is taken from it at the ends of the record only.
        described = grid.first_token(start)
        assert a >= described or a == first[row]
        assert b <= described + grid.tokens or b == last[row]


def test_crops_outside_every_record_are_refused(store, copy):
    write(copy)
    targets = Targets(copy, "set")
    end = int((store.column("offset") + store.column("length")).max())
    for start in (-1, end):
        with pytest.raises(ValueError, match="outside every record"):
            targets.read(np.array([0, start]), 3)
    assert targets.read(np.array([], np.int64), 3).shape == (0, 3)


def test_meta_counts_what_was_written(copy):
    labels = write(copy, codes=20)
    meta = json.loads((copy.path / "targets" / "set" / "meta.json").read_text())
    assert meta["counts"] == [int((labels == code).sum()) for code in range(20)]
    assert meta["tokens_without_label"] == (labels == -1).sum()
    assert meta["seed"] == 0


def test_as_many_codes_as_int16_holds(copy):
    with TargetsWriter(copy, "many") as writer:
        writer.labels[0] = MAX_CODES - 1
        writer.finish(np.zeros((MAX_CODES, 1), np.float32), {})
    assert Targets(copy, "many").read([0], 1)[0, 0] == MAX_CODES - 1
    assert Targets(copy, "many").meta["counts"][-1] == 1


def test_fingerprint_follows_the_labels(copy):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(copy, name, seed=seed)
    a, b, c = (Targets(copy, name).fingerprint for name in "abc")
    assert a == b != c
    assert names(copy) == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
def test_a_store_with_targets_is_still_a_store(copy, store):
    before = copy.fingerprint
    write(copy)
    again = Store(copy.path)
    assert again.fingerprint == before
    np.testing.assert_array_equal(again.read(3, verify=True), store.read(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(copy.path, mode="r")
        offset = copy.column("offset")[3]
        np.testing.assert_array_equal(group["signal"][offset : offset + 1201], store.read(3))
    assert [name for name, _ in group.arrays()] == ["signal"]


def test_preparing_again_leaves_the_targets(tmp_path):
    from ecg_jax.prepare import prepare

    source = tmp_path / "source"
    source.mkdir()
    import wfdb

    wave = np.sin(np.arange(2400) / 30)[:, None] * np.linspace(0.2, 1, 12)
    wfdb.wrsamp("a", 240, ["mV"] * 12, list(CANONICAL_LEADS), wave, fmt=["16"] * 12, write_dir=str(source))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    labels = write(Store(tmp_path / "s"))
    assert prepare("wfdb", source, tmp_path / "s", workers=1, progress=False).already_complete
    np.testing.assert_array_equal(Targets(Store(tmp_path / "s"), "set").read([0], len(labels))[0], labels)


def test_nothing_is_overwritten(copy):
    labels = write(copy)
    with pytest.raises(UserError, match="set exists; choose another --name"):
        TargetsWriter(copy, "set")
    np.testing.assert_array_equal(Targets(copy, "set").read([0], 200)[0], labels[:200])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "-a", "a b", "ä", "a\n", "x" * 65])
def test_odd_names_are_refused(copy, name):
    for use in (Targets, TargetsWriter):
        with pytest.raises(UserError, match="cannot name a set of targets"):
            use(copy, name)
    assert not (copy.path / "targets").exists()


def test_missing_set_names_those_there_are(copy):
    with pytest.raises(UserError, match=r"has no targets 'other' .there are: none yet"):
        Targets(copy, "other")
    write(copy)
    with pytest.raises(UserError, match=r"has no targets 'other' .there are: set."):
        Targets(copy, "other")


def test_labels_of_another_store_are_refused(copy, tmp_path):
    write(copy)
    other = write_synthetic_store(tmp_path / "other", 4, seconds=5.0)
    shutil.copytree(copy.path / "targets", other / "targets")
    with pytest.raises(UserError, match="made from another content of the store"):
        Targets(Store(other), "set")


@pytest.mark.parametrize("file", ["labels.npy", "centroids.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "garbage"])
def test_damaged_files_are_refused(copy, file, damage):
    write(copy)
    path = copy.path / "targets" / "set" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "short": content[:-3], "garbage": os.urandom(len(content))}[damage])
    with pytest.raises(UserError, match=r"targets .*set are damaged"):
        Targets(copy, "set")


@pytest.mark.parametrize(
    "change",
    [
        {"codes": 19},
        {"fingerprint": "0"},
        {"labels_sha256": "0"},
        {"tokens": 3},
        {"codes": "20", "fingerprint": None},
        {"centroids_sha256": 1},
    ],
)
def test_changed_meta_is_refused(copy, change):
    write(copy)
    path = copy.path / "targets" / "set" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"targets .*set are damaged"):
        Targets(copy, "set")
    path.write_text("[]")
    with pytest.raises(UserError, match=r"targets .*set are damaged"):
        Targets(copy, "set")


def test_labels_that_are_no_codes_are_found_when_read(copy):
    write(copy)
    labels = np.lib.format.open_memmap(copy.path / "targets" / "set" / "labels.npy", "r+")
    labels[100] = 20
    labels.flush()
    targets = Targets(copy, "set")
    targets.read([0], 100)
    with pytest.raises(UserError, match=r"damaged .labels.npy holds a label"):
        targets.read([0], 101)


def test_leaving_without_finishing_leaves_nothing(copy):
    def stopped():
        with TargetsWriter(copy, "set") as writer:
            writer.labels[:10] = 3
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        stopped()
    assert list((copy.path / "targets").iterdir()) == []
    with pytest.raises(UserError, match=r"has no targets 'set'"):
        Targets(copy, "set")
    write(copy)


def _killed(path):
    with TargetsWriter(Store(path), "set") as writer:
        writer.labels[:] = 7
        writer.labels.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_is_invisible_and_replaced(copy):
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(copy.path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (copy.path / "targets" / "set").exists()
    assert [path.name for path in (copy.path / "targets").iterdir()] == [".set.partial"]
    assert names(copy) == []
    with pytest.raises(UserError, match=r"has no targets 'set' .there are: none yet"):
        Targets(copy, "set")
    labels = write(copy)
    np.testing.assert_array_equal(Targets(copy, "set").read([0], 300)[0], labels[:300])
    assert sorted(path.name for path in (copy.path / "targets").iterdir()) == ["set"]
    files = {path.name for path in (copy.path / "targets" / "set").iterdir()}
    assert files == {"labels.npy", "centroids.npy", "meta.json"}


def test_two_writers_of_one_name(copy):
    second = TargetsWriter(copy, "set")
    with TargetsWriter(copy, "set") as first:
        with pytest.raises(UserError, match=r"Another `ecg-jax cluster` is writing"), second:
            pass
        first.labels[:] = 0
        first.finish(np.zeros((1, 1), np.float32), {})
    with pytest.raises(UserError, match="exists; choose another --name"), second:
        pass
    assert Targets(copy, "set").read([0], 1)[0, 0] == 0


def test_full_and_read_only_disks_are_one_sentence(copy, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with (
            pytest.raises(UserError, match="No space left on device; free some space"),
            TargetsWriter(copy, "a"),
        ):
            pass
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"), TargetsWriter(copy, "a") as writer:
            writer.finish(np.zeros((1, 1), np.float32), {})
    assert list((copy.path / "targets").iterdir()) == []


def test_command_is_listed(capsys):
    assert cli.main(["--help"]) == 0
    assert "cluster" in capsys.readouterr().out
