"""The list of recordings that shards share: made once, believed for a while, looked at again by whatever finishes."""

import hashlib
import os
import threading
import time

import pytest

import heedb_replica as replica
from ecg_jax.data import kept_listing
from ecg_jax.data.corpora import heedb
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from prepare_source import files_of, write_source

SETTINGS = {"corpus": "heedb", "source": "/data/heedb", "source_rate": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heedb")
    replica.write_institution(folder, replica.studies(40, seconds=2.6))  # two units
    return folder


@pytest.fixture
def listed(monkeypatch):
    """One item for each time SOURCE is listed."""
    original, calls = heedb.list_records, []

    def list_records(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(heedb, "list_records", list_records)
    return calls


@pytest.fixture
def run(source, tmp_path):
    def call(**options):
        return prepare("heedb", source, tmp_path / "s", **{"workers": 1, "progress": False, **options})

    return call


def test_shards_list_once_and_the_merge_again(run, source, listed, tmp_path):
    prepare("heedb", source, tmp_path / "one", workers=1, progress=False)
    listed.clear()
    for index in range(2):
        assert run(shard=f"{index}/2").converted > 0
    assert run(shard="1/2", dry_run=True).done_units == 1
    assert len(listed) == 1
    run(merge=True)
    assert len(listed) == 2
    assert files_of(tmp_path / "s") == files_of(tmp_path / "one")
    assert run(shard="0/2").already_complete
    assert len(listed) == 3


def test_a_kept_listing_is_the_one_that_was_listed(source, tmp_path):
    for _ in range(2):
        listing, digest = kept_listing.list_records(source, tmp_path / "s", SETTINGS, True, False, False)
        expected = heedb.list_records(source, None)
        assert list(listing.entries) == list(expected.entries)
        for name in ("problems", "label_sets", "classes", "descriptions", "fold_source", "values"):
            assert getattr(listing, name) == getattr(expected, name)
        assert digest == listing.digest() == expected.digest()


def test_a_source_that_changed_is_noticed_when_it_is_listed_again(listed, tmp_path):
    studies = replica.studies(41, seconds=2.6)
    replica.write_institution(tmp_path / "source", studies[:40])

    def run(**options):
        return prepare("heedb", tmp_path / "source", tmp_path / "s", workers=1, progress=False, **options)

    run(shard="0/2")
    replica.write_signals(tmp_path / "source/I0001/WFDB", studies[40:], mat=False)
    run(shard="1/2")
    assert len(listed) == 1
    for options in ({}, {"merge": True}, {"dry_run": True}):
        with pytest.raises(UserError, match=r"list of recordings differs \(40 there, 41 now"):
            run(**options)
    path = tmp_path / "s/.partial/listing.arrow"
    old = time.time() - kept_listing.KEPT_S - 10
    os.utime(path, (old, old))
    for _ in range(2):
        with pytest.raises(UserError, match=r"list of recordings differs"):
            run(shard="1/2")
    # What did not fit is not kept: with SOURCE as it was, the next one goes on.
    for path in (tmp_path / "source").rglob(f"{studies[40].name}.*"):
        path.unlink()
    assert run(shard="1/2").recordings == 8
    assert len(listed) == 7
    assert run(shard="0/2").recordings == 32
    assert len(listed) == 7


def of_another_source(data):
    changed = data[:-32].replace(b"/data/heedb", b"/data/other")
    return changed + hashlib.sha256(changed).digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1000],
        lambda data: data.replace(b"19900713000003", b"19900713000009"),
        lambda data: data.replace(b'"digest"', b'"dagest"'),
        of_another_source,
    ],
)
def test_a_damaged_list_or_one_of_another_source_is_made_again(source, listed, tmp_path, damage):
    def list_records():
        return kept_listing.list_records(source, tmp_path / "s", SETTINGS, True, False, False)[1]

    digest = list_records()
    path = tmp_path / "s/.partial/listing.arrow"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    assert list_records() == digest
    assert len(listed) == 2
    assert list_records() == digest
    assert len(listed) == 2


def test_shards_that_start_together_wait_for_the_one_that_lists(source, tmp_path, monkeypatch, capsys):
    original, begun, go_on = heedb.list_records, [], threading.Event()

    def list_records(*arguments):
        begun.append(arguments)
        assert go_on.wait(120)
        return original(*arguments)

    monkeypatch.setattr(heedb, "list_records", list_records)
    found = []

    def shard():
        found.append(kept_listing.list_records(source, tmp_path / "s", SETTINGS, True, False, True)[1])

    shards = [threading.Thread(target=shard) for _ in range(3)]
    for thread in shards:
        thread.start()
    told, deadline = "", time.monotonic() + 120
    while told.count("waiting for another shard, which lists SOURCE") < 2 and time.monotonic() < deadline:
        told += capsys.readouterr().err
        time.sleep(0.01)
    go_on.set()
    for thread in shards:
        thread.join(120)
    assert len(begun) == 1
    assert len(found) == 3
    assert len(set(found)) == 1
    told += capsys.readouterr().err
    assert told.count("40 recordings, as another shard listed them") == 2


def test_a_source_that_is_none_leaves_no_folder(tmp_path):
    write_source(tmp_path / "source")
    with pytest.raises(UserError):
        prepare("heedb", tmp_path / "source", tmp_path / "s", shard="0/2", workers=1, progress=False)
    assert not (tmp_path / "s").exists()


def test_a_file_that_another_host_listed_and_this_one_lacks_is_no_refused_recording(run, listed, tmp_path):
    """A unit is done for good, so a drive that shows less than all must not cost recordings."""
    source = tmp_path / "source"
    replica.write_institution(source, replica.studies(40, seconds=2.6))

    def shard(index):
        return prepare("heedb", source, tmp_path / "s", workers=1, progress=False, shard=f"{index}/2")

    shard(0)
    header = sorted(source.rglob("S0003/**/*.hea"))[-1]
    header.rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"{header.name} was there when SOURCE was listed"):
        shard(1)
    (tmp_path / "away").rename(header)
    assert shard(1).converted == 8
    assert len(listed) == 1
