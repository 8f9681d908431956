"""Metrics and calibration: parity with the golden arrays, scikit-learn and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import load_golden
from ecg_jax.evaluation import calibration, metrics

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


@settings(deadline=None, max_examples=40)
@given(SAMPLES, st.integers(2, 40), st.integers(1, 6))
def test_average_precision_by_thresholds(generator, n, n_levels):
    """Recall gained at each distinct score times the precision there, with ties and unknown targets."""
    targets = generator.choice([0.0, 1.0, np.nan], (n, 1), p=[0.5, 0.35, 0.15])
    scores = generator.integers(0, n_levels, (n, 1)).astype(float)
    y, s = targets[~np.isnan(targets)], scores[~np.isnan(targets)]
    expected, recall_before = 0.0, 0.0
    for threshold in np.unique(s)[::-1]:
        taken = s >= threshold
        recall = y[taken].sum() / max(y.sum(), 1)
        expected += (recall - recall_before) * y[taken].mean()
        recall_before = recall
    if y.sum() in (0, len(y)):
        expected = np.nan
    np.testing.assert_allclose(metrics.average_precision(targets, scores)[0], expected, atol=1e-12)


def _fmax_by_definition(targets, scores):
    """Record by record and threshold by threshold."""
    best = 0.0
    if not (targets == 1).any():
        return np.nan
    for threshold in metrics.FMAX_THRESHOLDS:
        precisions, recalls = [], []
        for y, s in zip(targets, scores, strict=True):
            known = ~np.isnan(y)
            true = set(np.flatnonzero(known & (y == 1)))
            said = set(np.flatnonzero(known & (s >= threshold)))
            if said:
                precisions.append(len(true & said) / len(said))
            if true:
                recalls.append(len(true & said) / len(true))
        if precisions and np.mean(precisions) + np.mean(recalls) > 0:
            P, R = np.mean(precisions), np.mean(recalls)
            best = max(best, 2 * P * R / (P + R))
    return best


@settings(deadline=None, max_examples=25)
@given(SAMPLES, st.integers(1, 12), st.integers(1, 5))
def test_fmax_by_definition(generator, n, n_classes):
    targets = generator.choice([0.0, 1.0, np.nan], (n, n_classes), p=[0.6, 0.3, 0.1])
    # On the thresholds themselves, between them, and at both ends.
    scores = generator.choice([0.0, 0.25, 0.29, 0.57, 0.9, 1.0, generator.random()], (n, n_classes))
    np.testing.assert_allclose(
        metrics.fmax(targets, scores), _fmax_by_definition(targets, scores), atol=1e-12
    )


def test_fmax_extremes():
    targets = np.array([[1, 0], [0, 1], [0, 0]])
    assert metrics.fmax(targets, targets) == 1
    assert metrics.fmax(targets, 1 - targets) == pytest.approx(
        2 * (1 / 3) * 1 / (1 / 3 + 1)
    )  # all predicted, at 0
    assert np.isnan(metrics.fmax(np.zeros((3, 2)), targets))


def test_r2_equals_sklearn():
    from sklearn.metrics import r2_score

    generator = np.random.default_rng(5)
    targets = generator.normal(1e3, 1, (50, 3))  # far from 0: the variance must not drown in the mean
    predictions = targets + generator.normal(0, 0.5, targets.shape)
    targets[:5, 1] = np.nan
    targets[:, 2] = 7.0
    got = metrics.r2(targets, predictions)
    assert got[0] == pytest.approx(r2_score(targets[:, 0], predictions[:, 0]), abs=1e-10)
    assert got[1] == pytest.approx(r2_score(targets[5:, 1], predictions[5:, 1]), abs=1e-10)
    assert np.isnan(got[2])  # nothing to explain
    assert metrics.r2(targets[:, :1], np.full((50, 1), targets[:, 0].mean()))[0] == pytest.approx(0, abs=1e-9)


def test_brier_equals_sklearn():
    from sklearn.metrics import brier_score_loss

    generator = np.random.default_rng(6)
    targets, p = generator.integers(0, 2, (80, 2)).astype(float), generator.random((80, 2))
    targets[:9, 1] = np.nan
    got = calibration.brier(targets, p)
    assert got[0] == pytest.approx(brier_score_loss(targets[:, 0], p[:, 0]), abs=1e-12)
    assert got[1] == pytest.approx(brier_score_loss(targets[9:, 1], p[9:, 1]), abs=1e-12)
    # Defined with one kind of target too.
    assert calibration.brier([[0.0], [0.0]], [[0.5], [0.1]])[0] == pytest.approx(0.13)


@pytest.mark.parametrize("kind", ["equal_width", "equal_mass"])
def test_calibration_error_by_definition(kind):
    generator = np.random.default_rng(8)
    targets = (generator.random((200, 3)) < 0.4).astype(float)
    targets[generator.random(targets.shape) < 0.1] = np.nan
    p = np.round(generator.beta(1, 3, targets.shape), 2)  # with ties, and some at the edges of bins
    p[0] = 1.0
    counts = generator.integers(0, 3, (200, 4))
    got = calibration.resampled_ece(targets, p, counts, 10, kind)
    bins = calibration.reliability(targets, p, 10, kind)
    for k in range(3):
        y, s, w = (a[~np.isnan(targets[:, k])] for a in (targets[:, k], p[:, k], counts))
        if kind == "equal_width":
            edges = np.array([np.nextafter(i / 10, 1) if i / 10 * 10 < i else i / 10 for i in range(1, 10)])
        else:
            edges = np.sort(s)[[len(s) * i // 10 for i in range(1, 10)]]
        which = np.array([sum(value >= edge for edge in edges) for value in s])
        for r in range(4):
            expected = sum(
                abs((w[which == b, r] * (y - s)[which == b]).sum()) / w[:, r].sum() for b in range(10)
            )
            assert got[r, k] == pytest.approx(expected, abs=1e-12)
        np.testing.assert_array_equal(bins.n[k], np.bincount(which, minlength=10))
        if kind == "equal_mass":  # up to ties
            assert bins.n[k].max() <= 2 * len(y) / 10
    shares, gaps = bins.n / bins.n.sum(axis=1, keepdims=True), np.abs(bins.observed - bins.predicted)
    np.testing.assert_allclose(
        calibration.ece(targets, p, 10, kind), np.nansum(shares * gaps, axis=1), atol=1e-12
    )


def test_calibration_error_knows_calibrated_from_overconfident():
    generator = np.random.default_rng(9)
    p = generator.random((20000, 1))
    targets = (generator.random(p.shape) < p).astype(float)

    def sharpen(p):
        return p**3 / (p**3 + (1 - p) ** 3)

    grid = np.linspace(0, 1, 10001)
    error = np.abs(grid - sharpen(grid)).mean()  # of an endless sample
    for kind in ("equal_width", "equal_mass"):
        assert calibration.ece(targets, p, kind=kind)[0] < 0.015
        assert calibration.ece(targets, sharpen(p), kind=kind)[0] == pytest.approx(error, abs=0.01)


def test_calibration_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.brier([[1.0]], [[1.5]])
    with pytest.raises(ValueError, match="equal_mass"):
        calibration.ece([[1.0]], [[0.5]], kind="quantile")
    with pytest.raises(ValueError, match="n_bins"):
        calibration.ece([[1.0]], [[0.5]], n_bins=0)


def test_regression_refuses_bad_predictions():
    with pytest.raises(ValueError, match="NaN"):
        metrics.mean_absolute_error([[1.0]], [[np.nan]])
    with pytest.raises(ValueError, match="must both be"):
        metrics.r2([[1.0]], [[1.0, 2.0]])


def test_counts_keep_their_precision():
    """Sums of large counts are exact, in whichever type they are taken."""
    targets, scores = np.array([[1.0], [0.0], [0.0]]), np.array([[0.5], [0.5], [0.9]])
    for counts in (np.array([[1], [2**24 + 1], [1]]), np.array([[3], [5], [1]], dtype=np.uint8)):
        b, c = int(counts[1, 0]), int(counts[2, 0])
        assert metrics.resampled_auroc(targets, scores, counts)[0, 0] == (b / 2) / (b + c)


def test_pooled_counts_keep_their_precision():
    """A record counts once for each class in micro AUROC."""
    targets = np.vstack([np.ones((1, 9)), np.zeros((2, 9))])
    scores = np.repeat([[0.5], [0.5], [0.9]], 9, axis=1)
    counts = np.array([[1], [2**21 + 1], [2]])
    expected = (counts[1, 0] / 2) / (counts[1, 0] + 2)
    assert metrics.resampled_micro_auroc(targets, scores, counts)[0] == expected


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


def test_class_counts_of_any_type_in_blocks(monkeypatch):
    targets = np.random.default_rng(0).integers(0, 2, (50, 3))
    expected = metrics.class_counts(targets)
    np.testing.assert_array_equal(expected[0], targets.sum(axis=0))
    monkeypatch.setattr(metrics, "_COUNTED_AT_ONCE", 7)
    for dtype in (bool, np.int8, np.float16, np.float32):
        np.testing.assert_array_equal(metrics.class_counts(targets.astype(dtype)), expected)


@pytest.mark.parametrize("function", [metrics.resampled_micro_auroc, metrics.resampled_average_precision])
def test_many_positives_are_scored_in_narrow_blocks_with_the_same_result(monkeypatch, function):
    generator = np.random.default_rng(0)
    targets, scores = generator.integers(0, 2, (60, 3)), generator.random((60, 3))
    counts = generator.integers(0, 3, (60, 40))
    expected, widths = function(targets, scores, counts), []
    original = metrics._narrower

    def watched(blocks, n_steps):
        for where, block in original(blocks, n_steps):
            widths.append(block.shape[1])
            assert where.stop - where.start == block.shape[1]
            yield where, block

    monkeypatch.setattr(metrics, "_narrower", watched)
    monkeypatch.setattr(metrics, "_STEPS_AT_ONCE", 200)
    np.testing.assert_array_equal(function(targets, scores, counts), expected)
    assert max(widths) < 20
