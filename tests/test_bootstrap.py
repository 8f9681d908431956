"""Patient bootstrap: golden resamples, brute force, clusters, BCa against SciPy; coverage is in test_coverage.py."""

import numpy as np
import pytest

from conftest import load_golden
from ecg_jax.evaluation import bootstrap, metrics, scoring

GOLDEN = load_golden("metrics")


@pytest.fixture(scope="module")
def golden():
    targets, counts = GOLDEN["in/targets_per_record"], bootstrap.counts_of(GOLDEN["bootstrap/in/ids"])
    first = bootstrap.bootstrap_auroc(targets, GOLDEN["out/prob_aggregated"], counts)
    second = bootstrap.bootstrap_auroc(targets, GOLDEN["bootstrap/in/prob_second_model"], counts)
    return targets, counts, first, second


@pytest.mark.parametrize(("undefined", "key"), [("half", "macro_half"), ("exclude", "macro_skip")])
def test_golden_resamples_and_intervals(golden, undefined, key):
    _, _, first, _ = golden
    scores = metrics.macro(first.resampled, undefined)
    np.testing.assert_allclose(scores, GOLDEN[f"bootstrap/out/{key}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        first.macro(undefined), GOLDEN[f"bootstrap/out/{key}_point_low_high"], atol=1e-6
    )


def test_golden_micro_and_difference(golden):
    targets, counts, first, second = golden
    micro = scoring.score("micro_auroc", targets, GOLDEN["out/prob_aggregated"], counts)
    np.testing.assert_allclose(micro.macro(), GOLDEN["bootstrap/out/micro_point_low_high"], atol=1e-6)
    difference = bootstrap.macro_difference(first, second, "half")
    expected = GOLDEN["bootstrap/out/macro_half_difference_point_low_high"]
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_equals_sklearn_per_resample():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(3)
    targets = generator.integers(0, 2, (60, 2))
    scores = generator.integers(0, 20, (60, 2)) / 20 + 0.2 * targets
    codes, _ = bootstrap.units(generator.integers(0, 25, 60), 60)
    counts = bootstrap.draw(codes, 40, seed=1)
    got = bootstrap.bootstrap_auroc(targets, scores, counts).resampled
    for r in range(40):
        rows = np.repeat(np.arange(60), counts[:, r])
        expected = [roc_auc_score(targets[rows, k], scores[rows, k]) for k in range(2)]
        np.testing.assert_allclose(got[r], expected, atol=1e-12)


def test_records_of_a_patient_are_drawn_together():
    codes, name = bootstrap.units(["a", "b", "a", "c", "b"], 5)
    counts = bootstrap.draw(codes, 500, seed=0)
    assert name == "patient"
    assert (counts[0] == counts[2]).all()
    assert (counts[1] == counts[4]).all()
    # As many patients as there are, in every resample.
    assert (counts[[0, 1, 3]].sum(axis=0) == 3).all()
    assert len(np.unique(counts[0])) == 4  # 0, 1, 2 and 3 times all occur


def test_unknown_patients_are_units_of_their_own():
    assert bootstrap.units(None, 3)[1] == "record"
    assert bootstrap.units([None, None], 2)[1] == "record"
    codes, name = bootstrap.units(["a", None, "a", None, float("nan"), ""], 6)
    assert name == "patient where known, else record"
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 5
    with pytest.raises(ValueError, match="patient ids"):
        bootstrap.units(["a"], 2)


def test_same_seed_same_resamples():
    codes = np.arange(50)
    assert (bootstrap.draw(codes, 20, seed=5) == bootstrap.draw(codes, 20, seed=5)).all()
    assert (bootstrap.draw(codes, 20, seed=5) != bootstrap.draw(codes, 20, seed=6)).any()
    # More resamples continue the same sequence.
    assert (bootstrap.draw(codes, 30, seed=5)[:, :20] == bootstrap.draw(codes, 20, seed=5)).all()


def test_interval_contains_the_point_and_half_drags_it_down():
    generator = np.random.default_rng(0)
    targets = np.column_stack([generator.random(200) < 0.4, generator.random(200) < 0.01])
    targets[0, 1] = True
    scores = targets + generator.normal(0, 1, targets.shape)
    result = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(200), 1000, seed=0))
    assert result.macro().low < result.macro().point < result.macro().high
    # The rare class is missing from many resamples, and counting those 0.5 widens the interval downwards.
    assert np.isnan(result.resampled[:, 1]).sum() > 20
    assert result.macro("half").low < result.macro().low - 0.02


def test_permuting_records_with_their_counts_changes_nothing():
    generator = np.random.default_rng(2)
    targets, scores = generator.integers(0, 2, (50, 3)), generator.random((50, 3))
    counts = bootstrap.draw(np.arange(50) // 2, 200, seed=0)
    order = generator.permutation(50)
    one = bootstrap.bootstrap_auroc(targets, scores, counts)
    other = bootstrap.bootstrap_auroc(targets[order], scores[order], counts[order])
    np.testing.assert_allclose(one.macro(), other.macro(), atol=1e-12)
    np.testing.assert_allclose(one.class_intervals(), other.class_intervals(), atol=1e-12)


def test_difference_refuses_unpaired_models():
    targets, scores = np.arange(20)[:, None] % 2, np.arange(20.0)[:, None]
    one = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(20), 30, seed=0))
    other = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(20), 40, seed=0))
    with pytest.raises(ValueError, match="same targets"):
        bootstrap.macro_difference(one, other)
    assert bootstrap.macro_difference(one, one) == (0.0, 0.0, 0.0)


def test_undefined_interval_is_nan():
    result = bootstrap.bootstrap_auroc(np.zeros((5, 1)), np.arange(5.0)[:, None], np.ones((5, 3)))
    assert np.isnan(result.macro()).all()


def test_bca_equals_scipy():
    """The same resamples and leave-one-out values give SciPy's interval, for a skewed statistic."""
    from scipy import stats

    generator = np.random.default_rng(0)
    sample = generator.exponential(size=40)
    found = stats.bootstrap(
        (sample,), np.var, n_resamples=999, confidence_level=0.9, method="BCa", rng=generator
    )
    left_out = [np.var(np.delete(sample, i)) for i in range(40)]
    got = bootstrap.interval(np.var(sample), found.bootstrap_distribution, 0.9, "bca", left_out)
    np.testing.assert_allclose(got[1:], found.confidence_interval, rtol=1e-12)
    percentile = bootstrap.interval(np.var(sample), found.bootstrap_distribution, 0.9)
    assert got.high > percentile.high  # the long tail lies above


def test_percentile_equals_numpy_column_by_column():
    generator = np.random.default_rng(1)
    resampled = generator.normal(size=(101, 5))
    resampled[generator.random(resampled.shape) < 0.2] = np.nan
    resampled[:, 3] = np.nan
    resampled[1:, 4] = np.nan
    found = bootstrap.intervals(np.zeros(5), resampled, 0.8)
    for k in (0, 1, 2, 4):
        expected = np.nanquantile(resampled[:, k], [0.1, 0.9])
        np.testing.assert_allclose(found[k][1:], expected, atol=1e-14)
    assert np.isnan(found[3][1:]).all()
    assert found[4].low == found[4].high == resampled[0, 4]


def test_degenerate_bca_intervals_follow_the_stated_rules():
    values = np.linspace(0.4, 0.6, 99)
    # All resamples equal: the interval is that value.
    assert bootstrap.interval(1.0, np.ones(50), kind="bca", left_out=np.ones(10)) == (1.0, 1.0, 1.0)
    # Leaving out a unit changes nothing: bias is still corrected, and here there is none.
    flat = bootstrap.interval(0.5, values, kind="bca", left_out=np.full(10, 0.5))
    np.testing.assert_allclose(flat, bootstrap.interval(0.5, values), atol=1e-12)
    # A point beyond all resampled values: finite, and at that end of them.
    above = bootstrap.interval(0.9, values, kind="bca", left_out=[0.9, 0.91, 0.88])
    assert 0.58 < above.low < above.high <= 0.6
    below = bootstrap.interval(0.1, values, kind="bca", left_out=[0.1, 0.11, 0.08])
    assert 0.4 <= below.low < below.high < 0.42
    # The largest acceleration there is, one unit deciding all, with much bias: still an interval.
    left_out = np.append(np.zeros(200), -1.0)
    for point in (0.39, 0.41, 0.59, 0.61):
        for sign in (-1, 1):
            found = bootstrap.interval(point, values, 0.999, "bca", sign * left_out)
            assert 0.4 <= found.low <= found.high <= 0.6
    # A unit whose absence leaves the score undefined says nothing about its acceleration.
    left_out = np.linspace(0.45, 0.55, 20) ** 2
    np.testing.assert_array_equal(
        bootstrap.interval(0.5, values, kind="bca", left_out=left_out),
        bootstrap.interval(0.5, values, kind="bca", left_out=np.append(left_out, np.nan)),
    )
    assert np.isnan(bootstrap.interval(np.nan, values, kind="bca", left_out=left_out)).all()


def test_intervals_refuse_other_kinds():
    with pytest.raises(ValueError, match="normal"):
        bootstrap.interval(0.5, [0.4, 0.6], kind="normal")
    with pytest.raises(ValueError, match="leave_one_out"):
        bootstrap.interval(0.5, [0.4, 0.6], kind="bca")


def test_leave_one_out_leaves_out_units():
    counts = bootstrap.leave_one_out([0, 1, 0, 2])
    assert counts.tolist() == [[0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]]
    grouped = bootstrap.leave_one_out(np.arange(2500) // 2, max_groups=100)
    assert grouped.shape == (2500, 100)
    assert (grouped[0::2] == grouped[1::2]).all()
    assert ((1 - grouped).sum(axis=1) == 1).all()
    assert (1 - grouped).sum(axis=0).min() == 24


def test_groups_of_units_have_the_acceleration_of_units():
    """The mean of a skewed sample: one unit or ten left out each time, the same BCa interval but for noise."""
    sample = np.random.default_rng(0).exponential(size=5000)
    resampled = sample.mean() + np.random.default_rng(1).normal(0, 1, 5000) / np.sqrt(5000)
    ends = []
    for max_groups in (5000, 500):
        kept = bootstrap.leave_one_out(np.arange(5000), max_groups)
        left_out = (sample @ kept) / kept.sum(axis=0)
        ends.append(bootstrap.interval(sample.mean(), resampled, 0.95, "bca", left_out))
    width = ends[0].high - ends[0].low
    np.testing.assert_allclose(ends[0], ends[1], atol=0.02 * width)


def test_p_value_inverts_the_percentile_interval():
    """p falls below 5 % as the 95 % interval comes to exclude 0."""
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 1999)
    assert bootstrap.p_value(values) > 0.9
    for shift in np.linspace(1.5, 2.5, 21):
        found, p = bootstrap.interval(shift, values + shift), bootstrap.p_value(values + shift)
        assert (found.low > 0) == (p < 0.05) or abs(p - 0.05) < 0.002
        assert p == bootstrap.p_value(-values - shift)  # two-sided
    assert bootstrap.p_value(values + 10) == 2 / 2000
    assert bootstrap.p_value(np.zeros(100)) == 1.0
    assert bootstrap.p_value([np.nan, 1.0, 2.0, -1.0]) == 1.0
    assert np.isnan(bootstrap.p_value([np.nan]))


def test_comparisons_of_macro():
    generator = np.random.default_rng(5)
    targets = generator.integers(0, 2, (90, 3))
    codes = np.arange(90) // 3
    counts, left_out = bootstrap.draw(codes, 400, seed=0), bootstrap.leave_one_out(codes)
    weak, strong = (
        bootstrap.bootstrap_auroc(targets, d * targets + generator.normal(size=(90, 3)), counts, left_out)
        for d in (0.2, 2.0)
    )
    for kind in ("percentile", "bca"):
        found = bootstrap.compare(strong, weak, kind=kind)
        assert found.difference.low > 0
        assert found.p_value == 2 / 401
        assert found.difference == bootstrap.macro_difference(strong, weak, kind=kind)
        mean = strong.per_class.mean() - weak.per_class.mean()
        assert found.difference.point == pytest.approx(mean, abs=1e-12)
    with pytest.raises(ValueError, match="leave_one_out"):
        bootstrap.compare(strong._replace(left_out=None), weak, kind="bca")


def test_seed_deviations_are_students_t_and_figures_of_the_same_seeds_deviate_together():
    from scipy import stats

    points = np.array([0.70, 0.74, 0.78, 0.71])
    drawn = bootstrap.seed_deviations(points, 100_000, np.random.default_rng(0))
    expected = points.std(ddof=1) / 2 * stats.t(3).ppf([0.025, 0.25, 0.75, 0.975])
    np.testing.assert_allclose(np.quantile(drawn, [0.025, 0.25, 0.75, 0.975]), expected, rtol=0.03)
    both = bootstrap.seed_deviations(
        np.stack([points, 2 * points + 1, -points]), 50, np.random.default_rng(0)
    )
    assert both.shape == (50, 3)
    np.testing.assert_allclose(both[:, 0], both[:, 1] / 2, atol=1e-12)
    np.testing.assert_allclose(both[:, 0], -both[:, 2], atol=1e-12)
    # Models of the same seeds stay paired, and equal ones do not differ.
    alone = bootstrap.seed_deviations(points, 50, np.random.default_rng(0))
    np.testing.assert_allclose(alone, both[:, 0], atol=1e-12)
    assert (bootstrap.seed_deviations(np.full((2, 3), 0.7), 5, np.random.default_rng(0)) == 0).all()
    single = bootstrap.seed_deviations(np.array([[0.7], [0.8]]), 5, np.random.default_rng(0))
    np.testing.assert_array_equal(single, np.zeros((5, 2)))


def test_interval_over_patients_and_seeds_has_both():
    generator = np.random.default_rng(1)
    points = np.array([0.70, 0.74, 0.78])
    resampled = points[:, None] + 0.05 * generator.normal(size=20_000)
    deviations = bootstrap.seed_deviations(points, 20_000, generator)
    both = bootstrap.hierarchical_interval(points, resampled, deviations)
    patients = bootstrap.hierarchical_interval(points, resampled, np.zeros(20_000))
    assert both.point == patients.point == pytest.approx(points.mean())
    assert patients.high - patients.point == pytest.approx(1.96 * 0.05, rel=0.05)
    assert both.high - both.point > 1.2 * (patients.high - patients.point)
