"""Intervals of scaling fits: regression's own, coverage over simulated studies, and what they say they leave out."""

import numpy as np
import pytest

from ecg_jax.studies.scaling_bootstrap import bootstrap_fit, compare_models, predict_largest

RUNGS = np.array([18e3, 45e3, 106e3, 753e3, 11e6])
RUNS = np.repeat(RUNGS, 3)


def noisy(values, sd=0.01, seed=0):
    return values * np.exp(sd * np.random.default_rng(seed).normal(size=len(values)))


def patients(values, shared, own, seed=1, n_resamples=400):
    """Errors on resamples of the patients: `shared` by all runs, and each run's own deviations."""
    generator = np.random.default_rng(seed)
    common = shared * generator.normal(size=n_resamples)
    return values[:, None] * np.exp(common + own * generator.normal(size=(len(values), n_resamples)))


def test_without_offset_and_patients_the_interval_is_that_of_regression():
    from scipy.special import stdtrit
    from scipy.stats import linregress

    values = noisy(2 * RUNGS**-0.1, seed=4)
    fit = bootstrap_fit(RUNGS, values, offset=False, n_resamples=20_000)
    line = linregress(np.log(RUNGS), np.log(values))
    half = stdtrit(3, 0.975) * line.stderr
    np.testing.assert_allclose(fit.b, [-line.slope, -line.slope - half, -line.slope + half], atol=0.05 * half)
    assert fit.over == ("runs",)
    assert fit.c is None
    # The band is narrowest within the points.
    width = np.log(fit.high / fit.low)
    assert width[0] > width[30] < width[-1]


def test_intervals_hold_the_truth_as_often_as_they_say():
    # Of 100 studies with 95 % intervals, fewer than 87 hits happen less than once in a thousand times.
    exponent = 0.062
    truth, hits, ends = 3 * RUNS**-exponent, 0, 0
    for study in range(100):
        fit = bootstrap_fit(
            RUNS,
            noisy(truth, seed=study),
            offset=False,
            sizes=[11e6],
            n_resamples=300,
            seed=study,
        )
        hits += fit.b.low <= exponent <= fit.b.high
        ends += fit.low[0] <= truth[-1] <= fit.high[0]
    assert hits >= 87
    assert ends >= 87
    assert fit.b.high - fit.b.low < 0.02


def test_intervals_of_an_error_hold_exponent_and_offset():
    truth, hits = 1.32 * RUNS**-0.3 + 0.05, np.zeros(2)
    for study in range(30):
        values = noisy(truth * np.exp(0.02 * np.random.default_rng([study]).normal()), seed=study)
        fit = bootstrap_fit(
            RUNS,
            values,
            patients(values, 0.02, 0.003, seed=study, n_resamples=200),
            offset=True,
            sizes=[11e6],
        )
        hits += [fit.b.low <= 0.3 <= fit.b.high, fit.c.low <= 0.05 <= fit.c.high]
    # 23 of 30 or fewer happen less than once in a thousand times.
    assert (hits >= 24).all()


def test_patients_shared_by_all_runs_move_the_level_and_not_the_exponent():
    values = 3 * RUNS**-0.189
    fit = bootstrap_fit(RUNS, values, patients(values, 0.05, 0.0), offset=False)
    assert fit.b.high - fit.b.low < 1e-6
    # The level moves as the patients do, ± 1.96 of 5 %.
    np.testing.assert_allclose(
        np.log([fit.a.low / fit.a.point, fit.a.high / fit.a.point]), [-0.098, 0.098], atol=0.025
    )
    own = bootstrap_fit(RUNS, values, patients(values, 0.0, 0.05), offset=False)
    assert own.b.high - own.b.low > 0.01
    assert own.over == ("runs", "recordings")


def test_what_an_interval_leaves_out_is_said():
    single = bootstrap_fit(RUNGS, noisy(RUNGS**-0.2), offset=False)
    assert single.runs_of_rung == 1
    assert any(remark.startswith("one seed") for remark in single.remarks)
    assert any("test recordings are not in the interval" in remark for remark in single.remarks)
    two = bootstrap_fit(RUNGS[:2], RUNGS[:2] ** -0.2, offset=False)
    assert two.over == ()
    assert np.isnan([two.b.low, two.b.high, two.low[0]]).all()
    assert any("other seeds are not in the interval" in remark for remark in two.remarks)
    steps = np.repeat([1.05, 0.95, 1.0, 1.05, 0.95], 3)
    off = bootstrap_fit(RUNS, noisy(RUNS**-0.2 * steps, 0.001), offset=False)
    assert any("further than their seeds explain" in remark for remark in off.remarks)
    on = bootstrap_fit(RUNS, noisy(RUNS**-0.2, 0.001), offset=False)
    assert off.b.high - off.b.low > 10 * (on.b.high - on.b.low)


def test_resamples_without_an_error_are_left_out_and_counted():
    values = noisy(RUNS**-0.2)
    resampled = patients(values, 0.02, 0.01)
    resampled[3, 7], resampled[5, 9] = np.nan, 0.0
    fit = bootstrap_fit(RUNS, values, resampled, offset=False)
    assert any(remark.startswith("2 resamples") for remark in fit.remarks)
    assert np.isfinite([fit.b.low, fit.b.high]).all()
    with pytest.raises(ValueError, match="one row for each"):
        bootstrap_fit(RUNS, values, resampled[:4], offset=False)


def test_a_verdict_holds_for_the_intervals_that_are_stated():
    values = noisy(1.32 * RUNS**-0.3 + 0.05, 0.003)
    runs_alone = bootstrap_fit(RUNS, values, offset=True, n_resamples=300).law
    assert runs_alone.identifiable
    assert not runs_alone.reason
    # Patients that move every run on its own by 10 % leave an offset from none to all of the smallest error.
    fit = bootstrap_fit(RUNS, values, patients(values, 0.0, 0.1), offset=True)
    assert fit.c.low == 0
    assert fit.c.high > 0.95 * fit.law.predict(11e6)
    assert not fit.law.identifiable
    assert "an offset of none and of all of the value fit as well" in fit.law.reason
    assert fit.law.reason in fit.remarks
    # Patients that move all runs alike move the level of the offset, but not its share.
    alike = bootstrap_fit(RUNS, values, patients(values, 0.3, 0.0), offset=True)
    assert alike.c.high > fit.c.high
    assert alike.law.identifiable


def test_the_largest_rung_is_predicted_where_the_law_goes_on_and_not_where_it_ends():
    law = 3 * RUNS**-0.1
    inside = [predict_largest(RUNS, noisy(law, seed=s), offset=False, n_resamples=300) for s in range(20)]
    assert sum(each.inside for each in inside) >= 16
    assert max(abs(each.error) for each in inside) < 0.05
    assert all(each.predicted.low < each.predicted.point < each.predicted.high for each in inside)
    end = predict_largest(RUNS, noisy(law * np.where(RUNS.max() == RUNS, 1.1, 1.0)), offset=False)
    assert end.error == pytest.approx(1 / 1.1 - 1, abs=0.02)
    assert end.inside is False
    # Without the floor that there is, too little error is promised, and that the law does not fit is said.
    floor = predict_largest(RUNS, noisy(1.32 * RUNS**-0.3 + 0.05), offset=False)
    assert floor.error < -0.1
    assert "further than their seeds explain" in floor.remark
    assert predict_largest(RUNS, noisy(1.32 * RUNS**-0.3 + 0.05), offset=True).inside
    # An exponent of 0 is not excluded by the smaller sizes, and then three parameters promise nothing.
    flat = predict_largest(RUNS, noisy(np.full(15, 0.3), 0.05, seed=2), offset=True)
    assert flat.predicted is flat.error is flat.inside is None
    assert "no scaling at all, is not excluded" in flat.remark
    few = predict_largest(RUNS[:12], noisy(RUNS[:12] ** -0.3), offset=True)
    assert few.predicted is None
    assert few.remark == "3 smaller rungs do not determine 3 parameters: no prediction"


def test_patients_shared_by_all_runs_do_not_widen_a_prediction_on_the_same_patients():
    values = noisy(3 * RUNS**-0.1)
    alone, shared = (
        predict_largest(RUNS, values, resampled, offset=False, n_resamples=2000).predicted
        for resampled in (None, patients(values, 0.2, 0.0, n_resamples=2000))
    )
    np.testing.assert_allclose(shared.high - shared.low, alone.high - alone.low, rtol=0.1)


@pytest.mark.parametrize(
    ("truth", "best"),
    [
        (np.full(15, 0.3), "no scaling"),
        (3 * RUNS**-0.062, "power law"),
        (1.32 * RUNS**-0.3 + 0.05, "power law with offset"),
    ],
)
def test_models_are_told_apart(truth, best):
    found = compare_models(RUNS, noisy(truth, seed=3))
    assert found.best == best
    assert found.verdict.startswith(f"{best} is best supported (AICc over 15 runs: ")


def test_no_scaling_is_compared_at_its_best():
    # AICc of a constant is that of the variance about the mean; about another value it would be tilted against it.
    n = np.repeat([1e3, 1e4, 1e5, 1e6], [4, 1, 1, 1])
    values = 0.3 * np.exp(0.02 * np.random.default_rng(1).standard_exponential(7))
    found = compare_models(n, values).candidates[0]
    assert found.aicc == pytest.approx(7 * np.log(np.log(values).var()) + 4 + 12 / 4, abs=1e-6)


def test_aicc_is_that_of_regression():
    values = 3 * RUNS**-0.1 * np.exp(np.tile([0.01, -0.01, 0.012], 5))
    values = values * np.repeat([1.0, 1.004, 0.997, 1.002, 1.0], 3)
    found = compare_models(RUNS, values)
    residual = np.log(values) - np.polyval(np.polyfit(np.log(RUNS), np.log(values), 1), np.log(RUNS))
    expected = 15 * np.log(residual @ residual / 15) + 6 + 24 / 11
    # Weights of the robust loss are just below 1.
    assert abs(found.candidates[1].aicc - expected) < 1.5
    left_out = []
    for rung in RUNGS:
        line = np.polyfit(np.log(RUNS[rung != RUNS]), np.log(values[rung != RUNS]), 1)
        left_out.append(np.log(values[rung == RUNS]).mean() - np.polyval(line, np.log(rung)))
    np.testing.assert_allclose(
        found.candidates[1].left_out_error, np.sqrt(np.mean(np.square(left_out))), rtol=0.1
    )


def test_a_comparison_without_the_points_for_it_decides_nothing():
    curved = noisy(1.32 * RUNGS**-0.3 + 0.05, 0.002)
    five = compare_models(RUNGS, curved)
    assert five.best is None
    assert five.best_left_out == "power law with offset"
    assert "AICc is undefined for 5 runs" in five.candidates[2].remark
    assert five.verdict.startswith("AICc cannot decide over 5 runs; power law with offset predicts")
    two = compare_models(RUNGS[:2], RUNGS[:2] ** -0.2)
    assert two.best is None
    assert compare_models(RUNGS[:1], RUNGS[:1] ** -0.2).verdict == "too few points to compare models: 1 runs"
