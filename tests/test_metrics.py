"""AUROC, average precision, MAE: parity with the golden arrays, scikit-learn and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import load_golden
from ecg_jax.evaluation import metrics

GOLDEN = load_golden("metrics")
GROUPS = ["", "nan/", "noagg/"]


def _case(group):
    """Targets and scores of a group of the golden file."""
    targets, scores = GOLDEN["in/targets_per_record"], GOLDEN["out/prob_aggregated"]
    if group == "nan/":
        targets = GOLDEN["nan/in/targets"]
    if group == "noagg/":
        # Ties decide here, and they are ties of the float32 sigmoid.
        from scipy.special import expit

        targets, scores = targets[GOLDEN["in/record_id"]], expit(GOLDEN["in/logits"])
    return targets, scores


@pytest.mark.parametrize("group", GROUPS)
def test_golden_auroc(group):
    targets, scores = _case(group)
    per_class = metrics.auroc(targets, scores)
    np.testing.assert_allclose(per_class, GOLDEN[f"{group}out/auroc_per_class"], rtol=0, atol=1e-12)
    assert abs(metrics.micro_auroc(targets, scores) - GOLDEN[f"{group}out/auroc_micro"]) < 1e-12
    for undefined, key in (("half", "macro_auroc_half"), ("exclude", "macro_auroc_skip")):
        if f"{group}out/{key}" in GOLDEN:
            got = metrics.macro_auroc(targets, scores, undefined)
            assert abs(got - GOLDEN[f"{group}out/{key}"]) < 1e-12


def test_golden_mae():
    per_target, flattened = metrics.mean_absolute_error(GOLDEN["mae/in/targets"], GOLDEN["mae/in/preds"])
    # The stored values were averaged in float32.
    np.testing.assert_allclose(per_target, GOLDEN["mae/out/per_target"], rtol=5e-7)
    np.testing.assert_allclose(flattened, GOLDEN["mae/out/flattened"], rtol=5e-7)


def _brute_force(y, s):
    positive, negative = s[y == 1], s[y == 0]
    if not len(positive) or not len(negative):
        return np.nan
    return np.mean((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative))


SAMPLES = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.integers(1, 60), st.integers(1, 4), st.integers(1, 6))
def test_auroc_is_the_share_of_pairs_won(generator, n, n_classes, n_levels):
    """With ties (few distinct scores), masked targets and undefined classes."""
    targets = generator.choice([0.0, 1.0, np.nan], (n, n_classes), p=[0.5, 0.35, 0.15])
    scores = generator.integers(0, n_levels, (n, n_classes)).astype(float)
    expected = [_brute_force(targets[:, k], scores[:, k]) for k in range(n_classes)]
    np.testing.assert_allclose(metrics.auroc(targets, scores), expected, atol=1e-12)
    np.testing.assert_allclose(
        metrics.micro_auroc(targets, scores), _brute_force(targets.ravel(), scores.ravel()), atol=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(SAMPLES)
def test_auroc_invariances(generator):
    targets = generator.integers(0, 2, (40, 3)).astype(float)
    targets[0], targets[1] = 0, 1
    scores = generator.integers(0, 9, (40, 3)).astype(float)
    expected = metrics.auroc(targets, scores)
    order = generator.permutation(40)
    np.testing.assert_allclose(metrics.auroc(targets[order], scores[order]), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.auroc(targets, np.exp(scores) - 7), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.auroc(targets, -scores), 1 - expected, atol=1e-12)
    np.testing.assert_allclose(metrics.auroc(1 - targets, scores), 1 - expected, atol=1e-12)


def test_counts_equal_repeated_records():
    generator = np.random.default_rng(0)
    targets, scores = generator.integers(0, 2, (30, 2)), generator.integers(0, 5, (30, 2))
    counts = generator.integers(0, 4, (30, 70))  # more resamples than one block
    got = metrics.resampled_auroc(targets, scores, counts)
    micro = metrics.resampled_micro_auroc(targets, scores, counts)
    for r in (0, 13, 69):
        rows = np.repeat(np.arange(30), counts[:, r])
        np.testing.assert_allclose(got[r], metrics.auroc(targets[rows], scores[rows]), atol=1e-12)
        np.testing.assert_allclose(micro[r], metrics.micro_auroc(targets[rows], scores[rows]), atol=1e-12)


def test_average_precision_equals_sklearn():
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, (200, 3)).astype(float)
    scores = generator.integers(0, 12, (200, 3)) / 12
    targets[:20, 1] = np.nan
    targets[:, 2] = 0
    got = metrics.average_precision(targets, scores)
    known = ~np.isnan(targets[:, 1])
    assert abs(got[0] - average_precision_score(targets[:, 0], scores[:, 0])) < 1e-12
    assert abs(got[1] - average_precision_score(targets[known, 1], scores[known, 1])) < 1e-12
    assert np.isnan(got[2])


def test_macro_rules():
    per_class = np.array([[0.9, np.nan, 0.7], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(metrics.macro(per_class), [0.8, np.nan])
    np.testing.assert_allclose(metrics.macro(per_class, "half"), [0.7, 0.5])
    with pytest.raises(ValueError, match="undefined"):
        metrics.macro(per_class, "zero")


def test_class_counts_ignore_unknown():
    n_pos, n_neg = metrics.class_counts(np.array([[1, 0], [np.nan, 0], [1, 1]]))
    assert n_pos.tolist() == [2, 1]
    assert n_neg.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        (np.array([[0.5]]), np.array([[1.0]]), "0, 1 or NaN"),
        (np.array([[1.0]]), np.array([[np.nan]]), "scores"),
        (np.ones((2, 2)), np.ones((2, 3)), "must both be"),
    ],
)
def test_bad_input_is_refused(targets, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auroc(targets, scores)
