"""Correlations of loss and error: SciPy's on cells, coverage, and what few points do not say."""

import numpy as np
import pytest

from ecg_jax.studies.correlation import correlate

RUNGS = [18, 45, 106, 753, 11000]


def cells(n_groups, n_rungs, n_seeds=1):
    """(groups, rungs) of a full grid of runs."""
    groups = np.repeat([f"objective {g}" for g in range(n_groups)], n_rungs * n_seeds).tolist()
    return groups, np.tile(np.repeat(RUNGS[:n_rungs], n_seeds), n_groups).tolist()


def test_the_numbers_are_scipys_with_fishers_interval():
    from scipy.stats import pearsonr, spearmanr

    generator = np.random.default_rng(0)
    rungs = list(range(12))
    x = generator.normal(size=12)
    y = 0.7 * x + generator.normal(size=12)
    (pooled, alone) = correlate(x, y, groups=["cpc"] * 12, rungs=rungs, n_resamples=40_000)
    expected = pearsonr(x, y)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(pooled.pearson, [expected.statistic, low, high], atol=0.01)
    np.testing.assert_allclose(pooled.spearman.point, spearmanr(x, y).statistic)
    assert (pooled.name, alone.name) == ("all runs", "cpc")
    np.testing.assert_allclose(alone.pearson, pooled.pearson, atol=0.01)


def test_seeds_are_not_taken_for_more_points():
    generator = np.random.default_rng(1)
    groups, rungs = cells(1, 5, 3)
    trend = np.repeat(np.arange(5.0), 3)
    x, y = (-trend + 0.01 * generator.normal(size=15) for _ in range(2))
    once = correlate(x[::3], y[::3], groups=groups[::3], rungs=rungs[::3])[0]
    thrice = correlate(x, y, groups=groups, rungs=rungs)
    assert thrice[0].n_units == once.n_units == 5
    assert thrice[0].n_runs == 15
    # Five points in perfect order: a rank correlation of 1 with a long way down.
    assert thrice[0].spearman.point == pytest.approx(1)
    assert thrice[0].spearman.low < 0.4
    # At the same rung the seeds of x and y have nothing to do with each other, whatever the trend.
    seeds = thrice[-1]
    assert seeds.name == "seeds within rungs"
    assert seeds.pearson.low < 0 < seeds.pearson.high


def test_seeds_within_rungs_correlate_where_they_do():
    generator = np.random.default_rng(2)
    groups, rungs = cells(2, 5, 3)
    quality = generator.normal(size=30)
    found = correlate(quality, quality + 0.1 * generator.normal(size=30), groups=groups, rungs=rungs)[-1]
    assert found.pearson.low > 0.9
    assert found.n_units == 30


def test_objectives_are_compared_within_themselves():
    # Within each objective y falls with x, over both it rises.
    groups, rungs = cells(2, 5)
    x = np.concatenate([np.arange(5.0), 10 + np.arange(5.0)])
    y = np.concatenate([-np.arange(5.0), 20 - np.arange(5.0)]) + 0.1 * np.sin(np.arange(10))
    pooled, within, *each = correlate(x, y, groups=groups, rungs=rungs)
    assert pooled.pearson.point > 0.8
    assert "curves are mixed" in pooled.remark
    assert within.pearson.high < -0.9
    assert within.spearman.high < 0
    assert [one.name for one in each] == ["objective 0", "objective 1"]
    assert all(one.pearson.high < -0.9 for one in each)


def test_too_few_points_have_no_number():
    groups, rungs = cells(1, 3, 3)
    found = correlate(np.arange(9.0), np.arange(9.0) ** 2, groups=groups, rungs=rungs)
    assert found[0].pearson is None
    assert found[0].spearman is None
    assert found[0].remark == "too few points for an interval: 3 points"
    groups, rungs = cells(2, 3)
    within = correlate(np.arange(6.0), np.arange(6.0), groups=groups, rungs=rungs)[1]
    assert within.pearson is not None
    groups, rungs = cells(2, 2)
    within = correlate(np.arange(4.0), np.arange(4.0), groups=groups, rungs=rungs)[1]
    assert within.remark == "too few points for an interval: 4 points less 2 that were fitted"
    groups, rungs = cells(1, 5)
    assert "does not vary" in correlate(np.ones(5), np.arange(5.0), groups=groups, rungs=rungs)[0].remark


def test_other_patients_widen_the_interval_unless_they_move_all_runs_alike():
    generator = np.random.default_rng(3)
    groups, rungs = cells(1, 5)
    x = np.arange(5.0)
    y = x + 0.3 * generator.normal(size=5)
    shared = y[:, None] + generator.normal(size=2000)
    own = y[:, None] + generator.normal(size=(5, 2000))

    def width(resampled):
        found = correlate(x, y, groups=groups, rungs=rungs, resampled_y=resampled, n_resamples=2000)[0]
        low, high = np.arctanh([found.pearson.low, found.pearson.high])
        return high - low, found

    without, _ = width(None)
    alike, found = width(shared)
    assert found.over == ("runs", "recordings")
    assert alike == pytest.approx(without, rel=1e-6)
    assert width(own)[0] > 1.1 * without


@pytest.mark.parametrize(("correlation", "n_groups", "n_rungs"), [(0.0, 1, 5), (0.9, 1, 5), (0.6, 5, 3)])
def test_intervals_hold_the_truth_as_often_as_they_say(correlation, n_groups, n_rungs):
    generator = np.random.default_rng(4)
    groups, rungs = cells(n_groups, n_rungs)
    offsets = np.repeat(10.0 * np.arange(n_groups), n_rungs)
    hits = 0
    for study in range(150):
        x = generator.normal(size=len(groups))
        y = correlation * x + np.sqrt(1 - correlation**2) * generator.normal(size=len(groups))
        found = correlate(x + offsets, y - offsets, groups=groups, rungs=rungs, n_resamples=500, seed=study)
        pearson = found[min(n_groups, 2) - 1].pearson
        hits += pearson.low <= correlation <= pearson.high
    # Fewer than 133 of 150 at 95 % happen once in a thousand times.
    assert hits >= 133


def test_residuals_are_counted_by_what_they_have_left():
    from scipy.stats import pearsonr

    generator = np.random.default_rng(6)
    trend = np.linspace(0, 1, 9)
    x, y = 3 * trend + generator.normal(size=(2, 9))
    (found, _) = correlate(
        x, y, groups=["cpc"] * 9, rungs=list(range(9)), trends=trend[:, None], n_resamples=40_000
    )
    # A partial correlation has the interval of one point less for each variable that is held constant.
    line = np.c_[np.ones(9), trend]
    left = [each - line @ np.linalg.lstsq(line, each, rcond=None)[0] for each in (x, y)]
    point = pearsonr(*left).statistic
    ends = np.tanh(np.arctanh(point) + np.array([-1.96, 1.96]) / np.sqrt(9 - 1 - 3))
    np.testing.assert_allclose(found.pearson, [point, *ends], atol=0.01)
    # What is a trend of one group only is taken off there only, and only there counted.
    groups = ["a"] * 4 + ["b"] * 4
    two = correlate(
        x[:8], y[:8], groups=groups, rungs=[0, 1, 2, 3] * 2, trends=np.r_[trend[:4], np.zeros(4)][:, None]
    )
    assert [each.name for each in two] == ["within curves", "a", "b"]
    assert [each.pearson is None for each in two] == [False, True, False]
    assert two[1].remark == "too few points for an interval: 4 points less 2 that were fitted"


def test_values_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        correlate([1.0, 2.0], [1.0], groups=["a", "a"], rungs=[1, 2])
    with pytest.raises(ValueError, match="finite"):
        correlate([1.0, np.nan], [1.0, 2.0], groups=["a", "a"], rungs=[1, 2])
