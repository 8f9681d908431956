"""One call for every metric: each equals its definition on the sample, on resamples and with units left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.evaluation import bootstrap, calibration, metrics, scoring

CODES = np.arange(60) // 3


def _data(metric, generator, n=60, n_classes=4):
    """Targets with some unknown and predictions with ties."""
    if metric in ("mae", "r2"):
        targets = generator.normal(5, 2, (n, n_classes))
        predictions = targets + generator.normal(0, 1, targets.shape)
    else:
        targets = (generator.random((n, n_classes)) < 0.3).astype(float)
        predictions = np.round(np.clip(0.3 * targets + generator.random(targets.shape) * 0.7, 0, 1), 2)
    targets[generator.random(targets.shape) < 0.1] = np.nan
    return targets, predictions


ON_SAMPLE = {
    "auroc": metrics.auroc,
    "average_precision": metrics.average_precision,
    "brier": calibration.brier,
    "mae": lambda t, p: metrics.mean_absolute_error(t, p)[0],
    "r2": metrics.r2,
    "micro_auroc": metrics.micro_auroc,
    "fmax": metrics.fmax,
}


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_resamples_equal_repeated_records(metric):
    targets, predictions = _data(metric, np.random.default_rng(0))
    counts, left_out = bootstrap.draw(CODES, 700, seed=0), bootstrap.leave_one_out(CODES)
    scored = scoring.score(metric, targets, predictions, counts, left_out)
    K = 1 if metric in ("micro_auroc", "fmax") else 4
    assert scored.metric == metric
    assert scored.per_class.shape == (K,)
    assert scored.resampled.shape == (700, K)
    assert scored.left_out.shape == (20, K)
    if metric == "ece":  # its bins are those of the whole sample: see test_metrics.py
        return
    on_sample = ON_SAMPLE[metric]
    np.testing.assert_allclose(scored.per_class, on_sample(targets, predictions), atol=1e-12)
    for r in (0, 511, 512, 699):
        rows = np.repeat(np.arange(60), counts[:, r])
        np.testing.assert_allclose(
            scored.resampled[r], on_sample(targets[rows], predictions[rows]), atol=1e-12
        )
    kept = CODES != 7
    np.testing.assert_allclose(scored.left_out[7], on_sample(targets[kept], predictions[kept]), atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1).map(np.random.default_rng), st.sampled_from(sorted(scoring.METRICS)))
def test_weights_scale_and_order_do_not_matter(generator, metric):
    targets, predictions = _data(metric, generator, n=20)
    counts = generator.integers(0, 3, (20, 5))
    expected = scoring.score(metric, targets, predictions, counts)
    order = generator.permutation(20)
    for got in (
        scoring.score(metric, targets[order], predictions[order], counts[order]),
        scoring.score(metric, targets, predictions, counts * 2.5),
    ):
        np.testing.assert_allclose(got.per_class, expected.per_class, atol=1e-12)
        np.testing.assert_allclose(got.resampled, expected.resampled, atol=1e-11)


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_unknown_targets_never_touch_a_score(metric):
    """Whatever is predicted where the target is unknown."""
    targets, predictions = _data(metric, np.random.default_rng(1))
    counts = bootstrap.draw(CODES, 20, seed=0)
    other = np.where(np.isnan(targets), 1 - predictions, predictions)
    assert (other != predictions).any()
    one, same = (scoring.score(metric, targets, p, counts) for p in (predictions, other))
    np.testing.assert_allclose(one.per_class, same.per_class, atol=1e-12)
    np.testing.assert_allclose(one.resampled, same.resampled, atol=1e-12)


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_a_class_without_known_targets_is_undefined(metric):
    targets, predictions = _data(metric, np.random.default_rng(2))
    targets[:, 1] = np.nan
    scored = scoring.score(metric, targets, predictions, np.ones((60, 3)))
    if metric in ("micro_auroc", "fmax"):
        assert np.isfinite(scored.per_class).all()
    else:
        np.testing.assert_array_equal(np.isnan(scored.per_class), [False, True, False, False])
        assert np.isfinite(scored.macro()).all()


def test_half_is_a_rule_of_auroc_alone():
    targets = np.column_stack([np.arange(20) % 2, np.zeros(20)])
    predictions = np.random.default_rng(0).random((20, 2))
    scores = {
        m: scoring.score(m, targets, predictions, np.ones((20, 2))) for m in ("auroc", "average_precision")
    }
    auroc = scores["auroc"]
    assert auroc.macro("half").point == pytest.approx((auroc.per_class[0] + 0.5) / 2)
    precision = scores["average_precision"]
    assert precision.macro("half").point == precision.macro("exclude").point == precision.per_class[0]
    with pytest.raises(ValueError, match="undefined"):
        precision.macro("zero")


def test_other_metrics_are_refused():
    with pytest.raises(ValueError, match="accuracy"):
        scoring.score("accuracy", np.ones((2, 1)), np.ones((2, 1)), np.ones((2, 1)))


def test_counts_of_other_records_are_refused():
    for metric in scoring.METRICS:
        with pytest.raises(ValueError, match=r"must be \[2, R\]"):
            scoring.score(metric, np.array([[0.0], [1.0]]), np.ones((2, 1)), np.ones((3, 4)))
