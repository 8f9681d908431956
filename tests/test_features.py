"""Non-overlapping crops, padded batches, averages per record."""

import numpy as np
import pytest

from conftest import load_golden
from ecg_jax.evaluation import features

GOLDEN = load_golden("metrics")


def test_features_of_every_crop_in_batches_of_one_shape():
    signal = np.arange(10_000, dtype=np.int16)[:, None] + np.zeros(12, np.int16)
    shapes = []

    def read_crops(starts, window):
        return np.stack([signal[s : s + window] for s in starts])

    def encode(crops):
        shapes.append(crops.shape)
        return np.stack([crops[:, 0, 0], crops.sum(axis=(1, 2))], axis=1).astype(np.float32)

    starts = np.arange(0, 2300, 100)
    got = features.compute_features(encode, read_crops, starts, 100, batch_size=8)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[:, 0], starts)
    np.testing.assert_allclose(got[:, 1], [12 * (100 * s + 4950) for s in starts])
    assert shapes == [(8, 100, 12)] * 3  # 23 crops, the last batch padded


def test_an_encoder_that_diverged_is_refused():
    def encode(crops):
        return np.where(crops[:, 0, :1] == 0, np.nan, 1.0)

    with pytest.raises(ValueError, match="not finite for 1 of 3"):
        features.compute_features(
            encode, lambda s, w: np.ones((len(s), w, 12), np.int16) * s[:, None, None], np.arange(3), 4, 2
        )
    with pytest.raises(ValueError, match="no crop"):
        features.compute_features(encode, None, [], 4, 2)


def test_golden_average_of_crop_probabilities():
    from scipy.special import expit

    probabilities = expit(GOLDEN["in/logits"].astype(np.float64))
    n = len(GOLDEN["in/targets_per_record"])
    got = features.mean_per_record(probabilities, GOLDEN["in/record_id"], n)
    np.testing.assert_allclose(got, GOLDEN["out/prob_aggregated_f64"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got, GOLDEN["out/prob_aggregated"], rtol=5e-7)


def test_average_per_record_in_any_order():
    generator = np.random.default_rng(0)
    record = generator.permutation(np.repeat(np.arange(10), generator.integers(1, 5, 10)))
    values = generator.random((len(record), 3))
    expected = np.stack([values[record == r].mean(axis=0) for r in range(10)])
    np.testing.assert_allclose(features.mean_per_record(values, record, 10), expected)
    with pytest.raises(ValueError, match="1 of 11 records"):
        features.mean_per_record(values, record, 11)
