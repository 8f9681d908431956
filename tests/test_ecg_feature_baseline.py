"""The baseline of simple ECG features: only what a task needs is computed, kept, and probed as any layer is."""

from types import SimpleNamespace

import numpy as np
import pytest

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import ecg_features, kept_rows
from ecg_jax.evaluation.ecg_feature_baseline import LAYER, ecg_feature_layers, kept_in
from ecg_jax.evaluation.ecg_features import FeatureTable, store_features
from ecg_jax.evaluation.examples import Part
from ecg_jax.evaluation.linear import fit_linear


@pytest.fixture(scope="module")
def store(synthetic_store):
    return Store(synthetic_store)


def examples(store, train, val, test, kind="multilabel"):
    """Two classes by the row's number: even, and a multiple of three; not known to the features."""
    parts = [
        Part(
            store, np.array(rows), np.stack([np.array(rows) % 2 == 0, np.array(rows) % 3 == 0], axis=1) * 1.0
        )
        for rows in (train, val, test)
    ]
    task = SimpleNamespace(kind=kind, name="made")
    scale = (np.zeros(2), np.ones(2)) if kind == "regression" else None
    return SimpleNamespace(
        train=parts[0], val=parts[1], test=parts[2], task=task, classes=["even", "third"], scale=scale
    )


@pytest.fixture
def measured_signals(monkeypatch):
    """How many recordings have been measured."""
    found, measure = [], ecg_features.ecg_features
    monkeypatch.setattr(
        ecg_features, "ecg_features", lambda signal, rate: found.append(signal) or measure(signal, rate)
    )
    return found


def test_only_records_of_the_task_are_computed_and_kept(store, tmp_path, monkeypatch, measured_signals):
    monkeypatch.setattr(kept_rows, "PART_RECORDS", 8)
    chosen = examples(store, [0, 9, 3, 11], [4, 20], [2])
    layers = ecg_feature_layers(chosen, tmp_path)
    assert len(measured_signals) == 7
    assert sorted(path.name for path in kept_in(tmp_path, store).iterdir()) == [
        "000000.npz", "000001.npz", "000002.npz",
    ]  # fmt: skip
    assert layers.layers == (LAYER,)
    raw = store_features(store, np.array([0, 9, 3, 11, 2]))
    table = FeatureTable.fit(raw[:4])
    for part, expected in ((chosen.train, raw[:4]), (chosen.test, raw[4:])):
        features, record = layers.of(part, LAYER)
        np.testing.assert_array_equal(features, table.transform(expected))
        np.testing.assert_array_equal(record, np.arange(len(expected)))

    measured_signals.clear()
    again = ecg_feature_layers(examples(store, [0, 9, 3, 12], [4, 20], [2]), tmp_path)
    assert again.layers == (LAYER,)
    assert len(measured_signals) == 1  # row 12; the others are kept, row 11 as well
    measured_signals.clear()
    ecg_feature_layers(chosen, tmp_path)
    assert measured_signals == []


def test_damaged_files_are_made_anew(store, tmp_path, measured_signals):
    rows = np.arange(6)
    folder = kept_in(tmp_path, store)
    expected = store_features(store, rows, folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damage in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damage)
        measured_signals.clear()
        np.testing.assert_array_equal(store_features(store, rows, folder), expected)
        assert len(measured_signals) == 6
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep ECG features in"):
        ecg_feature_layers(examples(store, [0, 1], [2], [3]), tmp_path / "file")


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_without_a_feature_that_varies_the_training_mean_is_predicted(store, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(
        ecg_features, "ecg_features", lambda *_: np.full(len(ecg_features.FEATURE_NAMES), 7.0)
    )
    chosen = examples(store, [0, 1, 2, 3, 5], [6, 7, 8, 9], [10, 11, 12], kind)
    fitted = fit_linear(ecg_feature_layers(chosen, tmp_path), chosen, l2_grid=[1e-3], solver="lbfgs")
    np.testing.assert_allclose(fitted.test, np.tile([2 / 5, 2 / 5], (3, 1)), atol=1e-4)


def test_a_single_training_record(store, tmp_path):
    chosen = examples(store, [0], [1], [2, 3])
    features, _ = ecg_feature_layers(chosen, tmp_path).of(chosen.test, LAYER)
    np.testing.assert_array_equal(features, np.zeros((2, 1)))
