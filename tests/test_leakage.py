"""The verdict beside results: what of the test recordings training or pretraining has seen."""

import json

import numpy as np
import pytest

from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.errors import UserError
from ecg_jax.evaluation import leakage, near_duplicates
from ecg_jax.evaluation import signatures as signatures_module
from ecg_jax.evaluation.leakage import find_overlap, identical_pairs, shared_patients, verdict
from ecg_jax.evaluation.signatures import signatures
from store_files import write_store


def signal(index):
    return synthetic_recording(5, index, 8.0, 240.0, noise_mv=0.02)[0].signal


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows 0-5 train, 6-9 test: 6 is row 0 bit for bit, 7 is row 1 louder, 8 shares patient p2, 9 is clean."""
    records = [(f"train{i}", f"p{i}", 1, signal(i)) for i in range(6)]
    records += [
        ("copy", "p6", 10, signal(0)),
        ("louder", "p7", 10, 1.2 * signal(1)),
        ("same patient", "p2", 10, signal(8)),
        ("clean", None, 10, signal(9)),
    ]
    return write_store(tmp_path_factory.mktemp("stores") / "store", records)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """Another corpus with the clean test recording, shifted, and the same patient names, which mean others."""
    records = [("x", "p2", 1, signal(20)), ("y", "p7", 1, signal(9)[120:]), ("z", "p9", 2, signal(8))]
    return write_store(tmp_path_factory.mktemp("stores") / "pretraining", records, corpus="other")


TRAIN, TEST = np.arange(6), np.arange(6, 10)


def test_verdict_counts_each_kind(store, pretraining, tmp_path):
    found = verdict(store, TEST, TRAIN, pretraining, near=True, cache=tmp_path / "signatures")
    assert found == json.loads(json.dumps(found))
    sentence = found.pop("verdict")
    assert found == {
        "identical_train_test": 1,
        "near_identical_train_test": 1,
        "patients_train_test": 1,
        "records_train_test": ["copy", "louder"],
        "pretraining": {
            "store": str(pretraining.path),
            "fingerprint": pretraining.fingerprint,
            "identical_test": 1,
            "near_identical_test": 1,
            "same_patients": None,
            "records_test": ["same patient", "clean"],
        },
        "examined": {"identical": True, "near_identical": True, "pretraining": True},
        "clean": False,
    }
    assert sentence == (
        "Of 4 test recordings, the training and validation recordings hold 1 bit for bit and 1 near-identical, "
        "patients in both: 1; of 4 test recordings, the 3 pretraining recordings hold 1 bit for bit and 1 "
        "near-identical, patients cannot be compared (other corpora, or no ids)."
    )
    assert len(list((tmp_path / "signatures").iterdir())) == 2


def test_clean_and_unexamined(store):
    found = verdict(store, np.array([9]), TRAIN, None, near=True, pretrained=False)
    assert found["clean"]
    assert found["pretraining"] is None
    assert found["examined"] == {"identical": True, "near_identical": True, "pretraining": None}
    assert found["verdict"].endswith("there was no pretraining.")
    assert found["patients_train_test"] is None  # the one test recording has no patient id
    found = verdict(store, np.array([9]), TRAIN, None, near=True)
    assert found["examined"]["pretraining"] is False
    assert found["verdict"].endswith("pretraining recordings were not examined.")


def test_without_near_nothing_is_claimed_about_it(store, pretraining):
    found = verdict(store, TEST, TRAIN, pretraining, near=False)
    assert found["near_identical_train_test"] is None
    assert found["pretraining"]["near_identical_test"] is None
    assert found["records_train_test"] == ["copy"]
    assert found["examined"] == {"identical": True, "near_identical": False, "pretraining": True}
    assert found["verdict"].count("near-identical ones were not looked for)") == 2


def test_of_too_many_only_identical_ones_are_looked_for(store, pretraining, monkeypatch):
    """The side that is small enough is still searched in full, and the sentence says what was not."""
    monkeypatch.setattr(near_duplicates, "MAX_RECORDINGS", 5)
    described = []
    monkeypatch.setattr(
        leakage,
        "signatures",
        lambda of, rows, cache: described.append(of.path) or signatures(of, rows, cache),
    )
    found = verdict(store, TEST, TRAIN, pretraining, near=True)
    assert described == [store.path, pretraining.path]
    assert found["near_identical_train_test"] is None
    assert found["pretraining"]["near_identical_test"] == 1
    assert found["examined"] == {"identical": True, "near_identical": False, "pretraining": True}
    assert (
        "(near-identical ones were not looked for: 6 recordings are more than 5), patients"
        in found["verdict"]
    )
    monkeypatch.setattr(near_duplicates, "MAX_RECORDINGS", 2)
    described.clear()
    found = verdict(store, np.array([9]), TRAIN, pretraining, near=True)
    assert described == []
    assert found["clean"]
    assert not found["examined"]["near_identical"]


def test_signatures_cover_what_is_compared_and_nothing_else(store, monkeypatch):
    """Row 5 takes no part; the test and training recordings of a store are described together, once each."""
    described, describe = [], signatures_module.describe_signal
    monkeypatch.setattr(
        signatures_module, "describe_signal", lambda x, *rest: described.append(x) or describe(x, *rest)
    )
    verdict(store, np.array([9]), np.array([2, 3, 4]), store, near=True, pretraining_rows=np.array([2, 3, 9]))
    np.testing.assert_array_equal(described, [store.read(row) / np.float32(1000.0) for row in (2, 3, 4, 9)])


def test_recordings_without_beats_are_told(tmp_path, store):
    short = write_store(tmp_path / "short", [("a", None, 1, signal(3)[:300]), ("b", None, 1, signal(40))])
    found = verdict(store, np.arange(2), TRAIN, None, near=True, test_store=short)
    assert "0 near-identical (1 of the test recordings, too short or without beats, were" in found["verdict"]


def test_only_pretraining_rows_count(store):
    """An encoder pretrained on the training folds of the same store has not seen the test fold."""
    found = verdict(store, np.array([9]), TRAIN, store, near=True, pretraining_rows=TRAIN)
    assert found["clean"]
    assert found["pretraining"]["identical_test"] == 0
    on_all = verdict(store, np.array([8]), TRAIN, store, near=True)["pretraining"]
    assert (on_all["same_patients"], on_all["identical_test"], on_all["near_identical_test"]) == (1, 1, 0)


def test_pretraining_on_several_stores(store, pretraining):
    """What any of them holds counts once, and each is named."""
    both = [(store, TRAIN), (pretraining, np.arange(3))]
    found = verdict(store, TEST, TRAIN, both, near=True)
    assert not found["clean"]
    assert found["examined"] == {"identical": True, "near_identical": True, "pretraining": True}
    told = found["pretraining"]
    assert told["records_test"] == ["copy", "louder", "same patient", "clean"]
    assert (told["identical_test"], told["near_identical_test"], told["same_patients"]) == (2, 2, 1)
    assert told["store"] == f"{store.path}, {pretraining.path}"
    assert told["fingerprint"] not in (store.fingerprint, pretraining.fingerprint)
    assert f"the 3 pretraining recordings of {pretraining.path} hold 1 bit for bit" in found["verdict"]
    assert verdict(store, TEST, TRAIN, [], near=False)["examined"]["pretraining"] is False


def test_pretraining_on_the_test_recordings_themselves(store):
    """The same row of the same store is the recording itself: pretrained on, it has been seen."""
    found = verdict(store, TEST, TRAIN, store, near=False)
    assert found["pretraining"]["identical_test"] == len(TEST)
    assert not found["clean"]


def test_another_test_store(store, pretraining):
    found = verdict(store, np.arange(3), TRAIN, None, near=True, test_store=pretraining)
    assert (found["identical_train_test"], found["near_identical_train_test"]) == (0, 0)
    assert found["patients_train_test"] is None
    assert found["clean"]


def test_pairs_and_patients(store, pretraining):
    every = np.arange(len(store))
    assert identical_pairs(store, every, store, every) == [(0, 6)]
    assert identical_pairs(store, TEST, store, TRAIN) == [(6, 0)]
    assert identical_pairs(store, every, pretraining, np.arange(3)) == [(8, 2)]
    assert shared_patients(store, TEST, store, TRAIN) == ["p2"]
    assert shared_patients(store, TEST, pretraining, np.arange(3)) is None


def test_identical_and_near_are_not_counted_twice(store, tmp_path):
    records = [("a", None, 1, signal(0)), ("b", None, 1, 1.3 * signal(0))]
    other = write_store(tmp_path / "other", records)
    described = signatures(store, np.array([0])), signatures(other)
    overlap = find_overlap(store, np.array([0]), other, np.arange(2), described)
    assert (overlap.identical, overlap.near, overlap.rows) == ([0], [], [0])


def test_another_rate(store, tmp_path):
    slow = write_store(tmp_path / "slow", [("a", None, 1, signal(0)[::2])], rate=120.0)
    with pytest.raises(UserError, match="one rate"):
        verdict(store, TEST, TRAIN, slow, near=True)
