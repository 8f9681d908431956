"""Non-overlapping crops, padded batches, averages per record."""

import numpy as np
import pytest

from conftest import load_golden
from ecg_jax.evaluation import features

GOLDEN = load_golden("metrics")


def test_a_last_batch_is_filled_up_and_cut_again():
    shapes = []

    def encode(crops):
        shapes.append(crops.shape)
        return {"first": crops[:, 0, 0], "sum": crops.sum(axis=(1, 2))}

    crops = np.arange(5 * 4 * 12, dtype=np.int16).reshape(5, 4, 12)
    got = features.encode_padded(encode, crops, batch_size=8)
    assert shapes == [(8, 4, 12)]
    np.testing.assert_array_equal(got["first"], crops[:, 0, 0])
    np.testing.assert_array_equal(got["sum"], crops.sum(axis=(1, 2)))


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
