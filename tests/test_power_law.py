"""Power law fits: known exponents from simulated runs, SciPy as the other estimator, and what is not identifiable."""

import numpy as np
import pytest

from ecg_jax.studies.power_law import decided, fit_many, fit_power_law, rungs_of

RUNGS = np.array([18e3, 45e3, 106e3, 753e3, 11e6])
RUNS = np.repeat(RUNGS, 3)


def noisy(values, sd=0.01, seed=0, shape=()):
    return values * np.exp(sd * np.random.default_rng(seed).normal(size=(*shape, len(values))))


@pytest.mark.parametrize("exponent", [0.189, 0.062])
def test_published_exponents_are_recovered(exponent):
    # The standard error of the slope of 15 logarithms with 1 % noise is 0.0011: 4 of them.
    law = fit_power_law(RUNS, noisy(3 * RUNS**-exponent, seed=1), offset=False)
    assert law.converged
    assert law.identifiable
    assert abs(law.b - exponent) < 0.0045
    assert law.b_range[0] < exponent < law.b_range[1]
    many = fit_many(RUNS, noisy(3 * RUNS**-exponent, shape=(1000,)), offset=False)
    log_n = np.log(RUNS) - np.log(RUNS).mean()
    error = 0.01 / np.sqrt(log_n @ log_n)
    assert abs(many.b.mean() - exponent) < 4 * error / np.sqrt(1000)
    assert abs(many.b.std() / error - 1) < 0.1


def test_an_offset_is_recovered_where_it_shows():
    truth = 0.4 * RUNS**-0.189 + 0.05
    exact = fit_power_law(RUNS, truth, offset=True)
    np.testing.assert_allclose([exact.a, exact.b, exact.c], [0.4, 0.189, 0.05], rtol=1e-4)
    many = fit_many(RUNS, noisy(truth, shape=(300,)), offset=True)
    assert many.converged.mean() > 0.99
    assert abs(np.median(many.b) - 0.189) < 0.005
    assert abs(np.median(many.c) - 0.05) < 0.002


def test_fits_are_scipys():
    from scipy.optimize import least_squares

    values = noisy(0.4 * RUNS**-0.25 + 0.03, seed=3, shape=(4,))
    fits = fit_many(RUNS, values, offset=True, corner=0.01)
    for r, row in enumerate(values):

        def residuals(p, row=row):
            return np.log(row) - np.log(np.exp(p[0]) * RUNS ** -p[1] + p[2])

        found = least_squares(
            residuals,
            [np.log(0.4), 0.25, 0.03],
            bounds=([-np.inf, 0, 0], [np.inf, 2, row.min()]),
            loss="soft_l1",
            f_scale=0.01,
            x_scale=[1, 0.1, 0.01],
            ftol=1e-14,
            xtol=1e-14,
            gtol=1e-14,
        )
        np.testing.assert_allclose([fits.b[r], fits.c[r]], found.x[1:], rtol=2e-3)


def test_a_straight_line_of_logarithms_has_the_intervals_of_regression():
    from scipy.stats import linregress
    from scipy.stats import t as student

    values = noisy(2 * RUNGS**-0.1, seed=4)
    law = fit_power_law(RUNGS, values, offset=False)
    line = linregress(np.log(RUNGS), np.log(values))
    half = student.isf(0.025, 3) * line.stderr
    np.testing.assert_allclose(law.b, -line.slope, rtol=1e-6)
    np.testing.assert_allclose(law.b_range, [-line.slope - half, -line.slope + half], atol=0.01 * half)


def test_a_run_gone_astray_does_not_bend_the_curve():
    values = noisy(3 * RUNS**-0.189, seed=5)
    clean = fit_power_law(RUNS, values, offset=False).b
    values[-1] *= 1.5
    bent = abs(fit_many(RUNS, values[None], offset=False).b[0] - clean)
    assert bent > 0.01
    assert abs(fit_power_law(RUNS, values, offset=False).b - clean) < bent / 4


def test_seeds_that_agree_and_rungs_that_do_not():
    on = fit_power_law(RUNS, noisy(RUNS**-0.2, seed=6), offset=False)
    assert not on.scatter.together
    assert on.scatter.dof == 13
    assert 0.006 < on.scatter.sd < 0.016
    off = noisy(RUNS**-0.2 * np.repeat([1.05, 0.95, 1.0, 1.05, 0.95], 3), sd=0.001, seed=6)
    rungs_off = fit_power_law(RUNS, off, offset=False)
    assert rungs_off.scatter.together
    assert rungs_off.scatter.dof == 3
    assert rungs_off.scatter.lack_of_fit < 1e-6


@pytest.mark.parametrize(
    ("n", "values", "offset", "said"),
    [
        (RUNGS[:3], 0.4 * RUNGS[:3] ** -0.2 + 0.05, True, "at least 4 distinct sizes, there are 3"),
        (RUNS[:9], noisy(RUNS[:9] ** -0.2), True, "at least 4 distinct sizes, there are 3"),
        (RUNGS[:2], RUNGS[:2] ** -0.2, False, "at least 3 distinct sizes, there are 2"),
        (RUNGS[:1], RUNGS[:1] ** -0.2, False, "at least 3 distinct sizes, there are 1"),
        (RUNS, np.full(15, 0.3), True, "the same at every size"),
        (RUNS, np.full(15, 0.3), False, "the same at every size"),
        (RUNS, noisy(np.full(15, 0.3), 0.05, seed=2), True, "no scaling at all, is not excluded"),
        (RUNS[:12], noisy(0.1 * RUNS[:12] ** -0.05 + 0.1, 0.01), True, "not identifiable"),
    ],
)
def test_what_the_points_do_not_determine(n, values, offset, said):
    law = fit_power_law(n, values, offset=offset)
    assert not law.identifiable
    assert law.reason.startswith("not identifiable")
    assert said in law.reason


def test_identifiable_fits_have_ends_inside_the_bounds():
    law = fit_power_law(RUNS, noisy(7.6 * RUNS**-0.5 + 0.05), offset=True)
    assert law.identifiable
    assert 0 < law.c_range[0] < law.c < law.c_range[1] < law.predict(11e6)
    # A curve without an offset to speak of says that it may do without.
    plain = fit_power_law(RUNS, noisy(RUNS**-0.3), offset=True)
    assert "an offset of 0 is not excluded" in plain.reason


def test_a_search_that_did_not_end_determines_nothing():
    law = fit_power_law(RUNS, noisy(RUNS**-0.3), offset=False)
    assert law.identifiable
    lost = decided(law._replace(converged=False), law.b_range, None)
    assert not lost.identifiable
    assert "did not end" in lost.reason


def test_values_that_rise_stop_at_the_bound():
    law = fit_power_law(RUNS, noisy(0.1 * RUNS**0.05), offset=False)
    assert law.b == 0
    assert "do not fall with size" in law.reason


def test_rungs_are_sizes_that_differ():
    assert rungs_of([45e3, 18_010, 18e3, 18_400, 106e3]).tolist() == [1, 0, 0, 0, 2]
    assert (
        fit_power_law([18e3, 18_010, 45e3, 45_100, 106e3], np.arange(5, 0, -1.0), offset=False).n_sizes == 3
    )


@pytest.mark.parametrize("values", [[1.0, 0.0, 1.0], [1.0, np.nan, 1.0], [1.0, 2.0]])
def test_values_that_are_not_positive_are_refused(values):
    with pytest.raises(ValueError, match=r"positive|one for one"):
        fit_power_law(RUNGS[:3], values, offset=False)
