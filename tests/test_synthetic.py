"""Synthetic ECG: identities, labels that are true, determinism."""

import numpy as np
import pytest
import scipy.signal

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import limb_residual
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import AXES, RHYTHMS, ST, synthetic_recording, write_synthetic_store


@pytest.mark.parametrize("index", range(8))
def test_limb_leads_obey_the_identities_and_nothing_is_wrong(index):
    recording, _ = synthetic_recording(0, index)
    assert limb_residual(recording.signal).max() < 1e-12
    assert Preprocessing().apply(recording).problems == []


def test_same_arguments_same_recording_and_other_arguments_another():
    one, _ = synthetic_recording(0, 5)
    two, _ = synthetic_recording(0, 5)
    np.testing.assert_array_equal(one.signal, two.signal)
    assert one.labels == two.labels
    assert not np.array_equal(one.signal, synthetic_recording(0, 6)[0].signal)
    assert not np.array_equal(one.signal, synthetic_recording(1, 5)[0].signal)


@pytest.mark.parametrize(("seconds", "rate"), [(10.0, 500.0), (2.5, 240.0), (7.3, 100.0)])
def test_length_and_rate(seconds, rate):
    recording, _ = synthetic_recording(0, 0, seconds, rate)
    assert recording.signal.shape == (round(seconds * rate), 12)
    assert recording.rate == rate


def beats_of(recording):
    energy = (np.diff(recording.signal, axis=0) ** 2).sum(axis=1)
    peaks, _ = scipy.signal.find_peaks(
        energy, height=0.25 * energy.max(), distance=int(0.25 * recording.rate)
    )
    return peaks


def test_heart_rate_and_rhythm_are_what_the_labels_say():
    spreads = {rhythm: [] for rhythm in RHYTHMS}
    for index in range(40):
        recording, truth = synthetic_recording(0, index, seconds=30.0)
        intervals = np.diff(beats_of(recording)) / recording.rate
        assert 60 / np.median(intervals) == pytest.approx(truth.heart_rate, rel=0.15)
        spreads[truth.rhythm].append(intervals.std() / intervals.mean())
        assert set(recording.labels["synthetic"]) == {truth.rhythm, truth.st, truth.axis}
        assert recording.labels["rhythm"] == [truth.rhythm]
    assert min(spreads["irregular"]) > max(spreads["sinus"] + spreads["brady"] + spreads["tachy"])


def test_axis_is_what_the_labels_say():
    """Sign of the net QRS in I and aVF: left axis +-, right axis -+, normal ++."""
    for index in range(30):
        recording, truth = synthetic_recording(0, index)
        area = recording.signal - np.median(recording.signal, axis=0)
        extreme = area[np.abs(area[:, :6]).max(axis=1).argmax()]
        if truth.axis == "axis_left":
            assert extreme[0] > 0 > extreme[5]
        if truth.axis == "axis_right":
            assert extreme[5] > 0 > extreme[0]


def test_all_labels_occur():
    seen = {label for index in range(60) for label in synthetic_recording(0, index)[0].labels["synthetic"]}
    assert seen == set(RHYTHMS + ST + AXES)


def test_synthetic_store(tmp_path):
    write_synthetic_store(tmp_path / "a", 40, seconds=3.0)
    write_synthetic_store(tmp_path / "b", 40, seconds=3.0)
    store = Store(tmp_path / "a")
    assert len(store) == 40
    assert store.fingerprint == Store(tmp_path / "b").fingerprint
    assert (
        store.fingerprint != Store(write_synthetic_store(tmp_path / "c", 40, seed=1, seconds=3.0)).fingerprint
    )
    folds = dict(zip(store.column("patient_id"), store.column("fold"), strict=True))
    assert len(folds) == 20
    assert all(folds[p] == f for p, f in zip(store.column("patient_id"), store.column("fold"), strict=True))
    expected = Preprocessing().apply(synthetic_recording(0, 33, 3.0, 240.0)[0]).signal
    np.testing.assert_array_equal(store.read(33, verify=True), expected)


def test_synthetic_store_of_repeated_signals(tmp_path):
    store = Store(write_synthetic_store(tmp_path / "a", 100, seconds=3.0, distinct=8))
    assert len(store) == 100
    assert set(store.column("duplicate_of")) == {None}
    np.testing.assert_array_equal(store.read(9).astype(int) - 9, store.read(1).astype(int) - 1)
