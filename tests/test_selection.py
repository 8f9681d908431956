"""Which recordings a run uses, and the file that says so."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.data import ladder
from ecg_jax.data import selection as selection_module
from ecg_jax.data.corpora import heedb, heedb_emory
from ecg_jax.data.mixture import StoreSet
from ecg_jax.data.selection import (
    read_selection,
    select_as_configured,
    select_records,
    use_selection,
    write_selection,
)
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.workdir import difference

WINDOW = 600


class FakeStore:
    """A records table without signals."""

    leads, rate_hz = ("I",), 240.0

    def __init__(self, corpus="made", fingerprint="f" * 64, **columns):
        self.corpus, self.fingerprint, self.path = corpus, fingerprint, f"fake_{corpus}"
        n = len(columns["patient_id"])
        self.columns = {
            "length": np.full(n, 900), "fold": np.ones(n, int), "duplicate_of": pa.nulls(n, pa.string()),
            "record_id": [f"{corpus}{i}" for i in range(n)], "source_file": [""] * n,
            "checksum": [hashlib.md5(f"{fingerprint}{i}".encode()).hexdigest() for i in range(n)],
        } | columns  # fmt: skip

    def arrow_column(self, name):
        column = self.columns[name]
        return pa.chunked_array([column] if isinstance(column, pa.Array) else [pa.array(column)])

    def __len__(self):
        return len(self.columns["patient_id"])


def select(store, **changes):
    return select_records(store, **{"window_samples": WINDOW, "val_folds": 0, **changes})


def people(n, each=4, first=0):
    return [f"p{first + i // each}" for i in range(n)]


@pytest.fixture(scope="module")
def store(synthetic_store):
    return Store(synthetic_store)


def test_selection_splits_by_fold_and_leaves_out_short_and_duplicate(store):
    fold = store.column("fold")
    selection = select(store, val_folds=2)
    largest = np.unique(fold)[-2:]
    assert set(fold[selection.val]) <= set(largest)
    assert not set(fold[selection.train]) & set(largest)
    assert len(selection.train) + len(selection.val) == len(store)
    none_held = select(store)
    assert len(none_held.val) == 0
    assert len(none_held.train) == len(store)
    with pytest.raises(UserError, match="leaves no recording to train on"):
        select(store, window_samples=10**6, val_folds=1, max_records=10)


def test_duplicates_and_short_records_are_left_out_and_counted():
    fake = FakeStore(
        length=np.array([600, 599, 600, 600]), fold=np.array([1, 1, 2, 3]), patient_id=list("pqrs"),
        duplicate_of=pa.array([None, None, "a", None]),
    )  # fmt: skip
    selection = select(fake, val_folds=1, max_records=10)
    np.testing.assert_array_equal(selection.train, [0])
    np.testing.assert_array_equal(selection.val, [3])
    assert (selection.too_short, selection.duplicates) == (1, 1)
    assert "1 shorter than a window left out; 1 duplicate signals left out" in selection.describe()


def test_records_of_no_fold_are_trained_on():
    fake = FakeStore(fold=[1, -1, None, 2, 3], patient_id=list("abcde"))
    selection = select(fake, val_folds=3)
    np.testing.assert_array_equal(selection.train, [1, 2])
    np.testing.assert_array_equal(selection.val, [0, 3, 4])


def cut_as_before(patients, records, size):
    """The rule of runs begun before selections were files, record by record."""
    owner = [
        record if patient is None else patient for patient, record in zip(patients, records, strict=True)
    ]
    hashed = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in owner]
    return sorted(sorted(range(len(owner)), key=lambda i: (hashed[i], i))[:size]), owner


@pytest.mark.parametrize("size", [1, 2, 17, 100, 250, 399])
def test_a_cut_takes_the_patients_it_always_took_and_no_part_of_one(size):
    rng = np.random.default_rng(0)
    patients = [None if rng.random() < 0.1 else f"p{rng.integers(120)}" for _ in range(400)]
    fake = FakeStore(patient_id=patients)
    before, owner = cut_as_before(patients, fake.columns["record_id"], size)
    assert select(fake, max_records=size, whole_patients=False).train.tolist() == before
    whole = select(fake, max_records=size).train.tolist()
    assert set(whole) <= set(before)
    taken = {owner[row] for row in whole}
    left = {owner[row] for row in range(400)} - taken
    if size > 5:  # smaller than a patient: as much of one as fits
        assert sorted(row for row in range(400) if owner[row] in taken) == whole
        assert size - len(whole) < max(owner.count(name) for name in left)


def test_a_first_patient_with_too_many_records_is_cut():
    fake = FakeStore(patient_id=["one"] * 9)
    assert select(fake, max_records=4).train.tolist() == [0, 1, 2, 3]


def test_smaller_rung_is_contained_in_larger_and_keeps_patients_whole():
    fake = FakeStore(patient_id=people(400))
    rungs = [set(select(fake, max_records=m).train) for m in (42, 80, 400)]
    assert [len(rung) for rung in rungs] == [40, 80, 400]
    assert rungs[0] < rungs[1] < rungs[2]
    assert all({row // 4 * 4 + i for i in range(4)} <= rungs[0] for row in rungs[0])


def test_a_rung_has_its_number(monkeypatch):
    monkeypatch.setitem(ladder.SIZES, "45k", 48)
    fake = FakeStore(patient_id=people(400))
    rung = select(fake, rung="45k")
    assert len(rung.train) == 48
    assert "cut down from 400 by rung 45k" in rung.describe()
    assert len(select(fake, rung="11m").train) == 400
    np.testing.assert_array_equal(rung.train, select(fake, max_records=48).train)
    assert "by data.max_records" in select(fake, max_records=48).describe()


def test_rungs_are_cut_from_all_stores_together():
    a = FakeStore(corpus="one", fingerprint="a", patient_id=people(200))
    b = FakeStore(corpus="two", fingerprint="b", patient_id=people(200, first=1000))
    both = StoreSet([a, b])
    small, large = (select(both, max_records=m) for m in (100, 300))
    assert set(small.train) < set(large.train)
    assert len(small.train) == 100
    counts = [len(small.rows_of(number)[0]) for number in range(2)]
    assert sum(counts) == 100
    assert min(counts) > 25, "neither store is preferred"
    train, val = small.rows_of(1)
    assert set(train) <= set(range(200))
    assert len(val) == 0


def test_equal_ids_of_two_corpora_are_two_patients_and_of_one_corpus_one():
    ids = people(40)
    fake = {"corpus": "one", "patient_id": ids}
    apart = StoreSet(
        [FakeStore(**fake, fingerprint="a"), FakeStore(**fake | {"corpus": "two"}, fingerprint="b")]
    )
    together = StoreSet([FakeStore(**fake, fingerprint="a"), FakeStore(**fake, fingerprint="b")])
    assert len(select(apart, max_records=4).train) == 4
    rows = select(together, max_records=8).train
    assert len(rows) == 8
    assert len({ids[row % 40] for row in rows}) == 1
    assert len(select(apart, max_records=12).train) == 12
    assert len(select(together, max_records=12).train) == 8


def test_each_store_holds_out_its_own_folds():
    a = FakeStore(corpus="one", fingerprint="a", patient_id=list("abc"), fold=[1, 2, 3])
    b = FakeStore(corpus="two", fingerprint="b", patient_id=list("def"), fold=[18, 19, 20])
    selection = select(StoreSet([a, b]), val_folds=1)
    assert selection.val.tolist() == [2, 5]
    assert [part.tolist() for part in selection.rows_of(1)] == [[0, 1], [2]]


def heedb_store(*partitions, each=30):
    files = [f"WFDB/{name.replace('-', '/')}/01/de_{i}.hea" for name in partitions for i in range(each)]
    return FakeStore(corpus="heedb", fingerprint="h", patient_id=people(len(files)), source_file=files)


def emory_store(*years):
    return FakeStore(
        corpus="heedb_emory", fingerprint="e", patient_id=list("ab") * len(years),
        source_file=[f"WFDB/{year}/{i}.hea" for year in years for i in range(2)],
    )  # fmt: skip


def test_the_ladder_has_the_papers_partitions():
    everything = ladder.PARTITIONS["11m"]
    assert len(everything) == len(set(everything)) == 44
    assert {name for names in ladder.PARTITIONS.values() for name in names} == set(everything)
    assert ladder.PARTITIONS["45k"] == ("S0003-1990",)
    assert set(everything) == set(heedb.PARTITIONS) | set(heedb_emory.PARTITIONS) | {"code15"}


def test_paper_rung_takes_its_partition():
    fake = heedb_store("S0001-1987", "S0001-2007", "S0004-2019")
    rung = select(fake, ladder="paper", rung="753k")
    np.testing.assert_array_equal(rung.train, np.arange(30, 60))
    assert rung.missing == ()
    assert "rung 753k of the paper" in rung.describe()
    fake.columns["fold"] = [1, 2] * 45
    held = select(fake, ladder="paper", rung="18k", val_folds=1)
    np.testing.assert_array_equal(held.val, np.arange(1, 30, 2))
    cut = select(fake, ladder="paper", rung="753k", max_records=8)
    assert len(cut.train) == 8
    assert set(cut.train) <= set(range(30, 60))


def test_paper_rung_of_several_corpora():
    code15 = FakeStore(corpus="code15", fingerprint="c", patient_id=list("xyz"))
    stores = StoreSet([heedb_store("S0001-1987"), emory_store(2010, 2018), code15])
    everything = select(stores, ladder="paper", rung="11m")
    assert len(everything.train) == len(stores)
    assert len(everything.missing) == 44 - 4
    assert not {"S0001-1987", "emory-2010", "emory-2018", "code15"} & set(everything.missing)
    np.testing.assert_array_equal(select(stores, ladder="paper", rung="18k").train, np.arange(30))


def test_the_papers_last_rung_takes_nothing_else():
    stores = StoreSet(
        [heedb_store("S0001-1987", "S0005-2024"), FakeStore("ptbxl", "x", patient_id=list("xyz"))]
    )
    np.testing.assert_array_equal(select(stores, ladder="paper", rung="11m").train, np.arange(30))
    assert len(select(stores, rung="11m").train) == 63


@pytest.mark.parametrize("rung", ["45k", "11m"])
def test_paper_rung_without_its_partitions_is_refused(rung):
    with pytest.raises(UserError, match=rf"config.data.ladder=paper: rung {rung} is made of .* none of it"):
        select(FakeStore(patient_id=list("ab")), ladder="paper", rung=rung)


@pytest.fixture
def kept(store, tmp_path):
    selection = select(store, val_folds=2, max_records=20)
    write_selection(tmp_path / "selection.json", selection)
    return selection, tmp_path / "selection.json"


def test_selection_comes_back_from_its_file(kept, store):
    selection, path = kept
    again = read_selection(path)
    np.testing.assert_array_equal(again.train, selection.train)
    np.testing.assert_array_equal(again.val, selection.val)
    assert again.fingerprint == selection.fingerprint
    assert (again.rule, again.sources, again.available) == (
        selection.rule,
        selection.sources,
        selection.available,
    )
    content = json.loads(path.read_text())
    assert content["fingerprint"] == selection.fingerprint
    assert content["stores"][0]["train"] == len(selection.train)
    assert "whole patients" in content["rule"]
    assert use_selection(path, store, WINDOW).fingerprint == selection.fingerprint


def test_selection_file_says_whether_its_cut_was_reached(tmp_path):
    fake = FakeStore(patient_id=people(40))
    rules = {size: select(fake, max_records=size).to_dict()["rule"] for size in (20, 40, 90)}
    assert "at most 20 records" in rules[20]
    assert "reached" not in rules[20]
    assert all("(not reached: there are 40)" in rules[size] for size in (40, 90))


def test_first_selection_files_are_read(kept):
    selection, path = kept
    content = json.loads(path.read_text())
    del content["held_elsewhere"]
    path.write_text(json.dumps(content))
    assert read_selection(path).fingerprint == selection.fingerprint


def test_a_kept_selection_of_this_rule_and_store_is_not_made_again(tmp_path, monkeypatch):
    fake, path = FakeStore(patient_id=people(40)), tmp_path / "selection.json"
    data = load_config("configs/cpc.py").data.to_dict() | {"max_records": 20, "val_folds": 0}
    made = select_as_configured(fake, data, WINDOW, path)
    write_selection(path, made)
    other = FakeStore(fingerprint="o", patient_id=people(40))
    again = [
        select_as_configured(fake, data | {"max_records": 8}, WINDOW, path),
        select_as_configured(fake, data, WINDOW - 1, path),
        select_as_configured(other, data, WINDOW, path),
    ]
    assert made.fingerprint not in {each.fingerprint for each in (again[0], again[2])}
    assert again[1].rule != made.rule

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(selection_module, "_masks", never)
    assert select_as_configured(fake, data, WINDOW, path).fingerprint == made.fingerprint
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match="is no selection"):
        select_as_configured(fake, data, WINDOW, path)


def test_selection_of_several_stores_comes_back(tmp_path):
    stores = StoreSet([heedb_store("S0001-1987", each=13), emory_store(2010)])
    selection = select(stores, max_records=9)
    write_selection(tmp_path / "s.json", selection)
    again = read_selection(tmp_path / "s.json")
    np.testing.assert_array_equal(again.train, selection.train)
    assert again.fingerprint == selection.fingerprint


def test_fingerprint_tells_other_rows_and_other_stores():
    a = FakeStore(fingerprint="a", patient_id=people(40))
    prints = {
        select(a, max_records=8).fingerprint,
        select(a, max_records=12).fingerprint,
        select(FakeStore(fingerprint="b", patient_id=people(40)), max_records=8).fingerprint,
    }
    assert len(prints) == 3
    assert select(a, rung="18k").fingerprint == select(a).fingerprint, "the rule does not count, the rows do"


def test_selection_file_is_small(tmp_path):
    n = 1_000_000
    train = FakeStore(patient_id=pa.array(np.arange(n) // 6).cast(pa.string()), record_id=[""] * n)
    write_selection(tmp_path / "s.json", select(train, rung="106k"))
    assert (tmp_path / "s.json").stat().st_size < 0.2 * n


@pytest.mark.parametrize("damage", ["cut", "bits", "field", "none", "version", "other"])
def test_damaged_selection_is_refused(kept, damage):
    _, path = kept
    content = json.loads(path.read_text())
    if damage == "bits":
        content["stores"][0]["train_rows"] = content["stores"][0]["val_rows"]
    elif damage == "field":
        del content["available"]
    elif damage == "version":
        content["version"] = 7
    text = path.read_text()[:-40] if damage == "cut" else json.dumps([] if damage == "other" else content)
    path.write_text(text)
    if damage == "none":
        path.unlink()
    message = {
        "none": "cannot read the selection", "version": "has version 7", "cut": "is no selection",
        "other": "is no selection",
    }.get(damage, "is damaged")  # fmt: skip
    with pytest.raises(UserError, match=message):
        read_selection(path)


def test_selection_of_another_store_or_of_shorter_windows_is_refused(kept, store):
    _, path = kept
    with pytest.raises(UserError, match="was made of other stores"):
        use_selection(path, FakeStore(patient_id=["a"]), WINDOW)
    with pytest.raises(UserError, match="shorter than a window of 1200"):
        use_selection(path, store, 1200)


def test_difference_names_what_differs(store):
    now = select(store, val_folds=1)
    assert difference(now, select(store, val_folds=1, rung="18k")) is None
    assert "val_folds (2 there, 1 now)" in difference(select(store, val_folds=2), now)
    assert "max_records (9 there, None now)" in difference(select(store, val_folds=1, max_records=9), now)
    other = select(FakeStore(patient_id=["a"]))
    assert difference(other, now) == "the content of its stores"


def test_config_names_a_selection(kept, store):
    selection, path = kept
    config = load_config("configs/cpc.py:data=11m")
    assert len(select_as_configured(store, config.data.to_dict(), WINDOW).train) > 20
    override(config, "data.selection", str(path))
    used = select_as_configured(store, config.data.to_dict(), WINDOW)
    assert used.fingerprint == selection.fingerprint


def test_configs_of_before_cut_as_they_did():
    fake = FakeStore(patient_id=people(40))
    before = {"val_folds": 0, "max_records": 10}
    assert len(select_as_configured(fake, before, WINDOW).train) == 10
    now = load_config("configs/cpc.py").data.to_dict() | before
    assert len(select_as_configured(fake, now, WINDOW).train) == 8
