"""Intervals of a power law over runs and test recordings, comparison with simpler laws, and the held-out largest rung.

A study has 3 to 5 rungs, 1 to 5 seeds, and one set of test recordings for all runs. Resampling so few runs would end
at the extremes among them, so runs are simulated from the fitted curve instead:

    log value* (run) = log f(n) + patients (run) + σ sqrt(ν / χ²_ν) z

where `patients` is the log of the run's error on a resample of the patients over its error on all of them, the same
resample for every run, so that what the runs share stays shared; z is normal and σ the scatter of the runs about the
curve with its ν degrees of freedom (`power_law.Scatter`), by rung where rungs lie off the curve further than their
seeds explain. Every simulated study is fitted by least squares. For a power law without offset and without test
recordings these are exactly the t intervals of a straight line of logarithms.

Over 300 simulated studies of 5 rungs, 3 seeds and 1 % noise, 95 % intervals of the exponent held it 95 to 96 % of the
time (percentile intervals from resampled seeds 83 %), also with an offset and test recordings; with 5 single runs 94 %.
Rungs that lie off the curve by as much as seeds differ leave 92 % of 5 rungs and 84 % of 3, which cannot show it; see
tests/benchmarks/results/2026-11-22-scaling-coverage.md.
"""

from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval, interval
from ecg_jax.studies import power_law
from ecg_jax.studies.power_law import Fits, PowerLaw

LEVEL = 0.95
#: Smaller p-values of lack of fit make models be compared over rungs instead of runs.
LACK_OF_FIT = 0.05


class ScalingFit(NamedTuple):
    """A power law with intervals; low and high are NaN where the points say nothing of the spread."""

    law: PowerLaw
    a: Interval
    b: Interval
    c: Interval | None
    """None for a fit without offset."""
    sizes: np.ndarray
    """[M], where the curve and its band are given."""
    curve: np.ndarray
    """[M]"""
    low: np.ndarray
    """[M], of the curve (not of single runs), at each size for itself."""
    high: np.ndarray
    """[M]"""
    over: tuple[str, ...]
    """What the intervals contain: some of "runs", "recordings"."""
    runs_of_rung: int
    """Largest number of runs of one rung."""
    remarks: tuple[str, ...]
    """Sentences on what the intervals do not contain and what to know of the fit."""


class HeldOut(NamedTuple):
    """What the smaller rungs say of the largest one."""

    size: float
    observed: float
    """Geometric mean over the runs of the largest rung; the prediction is for this."""
    predicted: Interval | None
    """None where the smaller rungs do not determine the curve; then so are the next two."""
    error: float | None
    """predicted / observed − 1: positive where the curve promised a larger loss or error than was found."""
    inside: bool | None
    """Whether the observed value lies in the interval of the prediction."""
    law: PowerLaw | None
    """The curve through the smaller rungs."""
    remark: str


class Candidate(NamedTuple):
    """One model of a comparison."""

    name: str
    """"no scaling", "power law" or "power law with offset"."""
    parameters: int
    aicc: float | None
    """None where it is undefined."""
    left_out_error: float | None
    """Root mean square error of log values, rungs left out in turn; None where too few rungs are left."""
    remark: str


class ModelComparison(NamedTuple):
    """What the points support."""

    candidates: tuple[Candidate, ...]
    best: str | None
    """Smallest AICc, or the simplest within 2 of it; None where AICc cannot decide."""
    best_left_out: str | None
    """Smallest error on rungs left out, or the simplest within 10 % of it; None with too few rungs."""
    verdict: str


def _simulated(law: PowerLaw, n, log_patients, n_resamples: int, generator) -> np.ndarray:
    """Values [R, P] of simulated studies at the sizes n; see the head of this file."""
    n = np.asarray(n, dtype=np.float64)
    scatter, rung = law.scatter, power_law.rungs_of(n)
    spread = np.zeros((n_resamples, 1))
    if scatter.dof:
        spread = scatter.sd * np.sqrt(scatter.dof / generator.chisquare(scatter.dof, size=(n_resamples, 1)))
    if scatter.together:
        each = generator.normal(size=(n_resamples, rung.max() + 1)) / np.sqrt(np.bincount(rung))
        normal = each[:, rung]
    else:
        normal = generator.normal(size=(n_resamples, len(n)))
    # With one degree of freedom some draws are beyond what a float holds; the quantiles are not.
    logs = np.log(law.predict(n)) + np.clip(spread * normal, -100, 100)
    return np.exp(logs if log_patients is None else logs + log_patients)


def _log_patients(points, resampled_errors) -> tuple[np.ndarray | None, int]:
    """Log ratios [R', P] of errors on resamples to errors on all recordings, and how many resamples were left out."""
    if resampled_errors is None:
        return None, 0
    resampled = np.asarray(resampled_errors, dtype=np.float64)
    if resampled.ndim != 2 or resampled.shape[0] != len(points):
        raise ValueError(f"resampled errors {resampled.shape} are not one row for each of {len(points)} runs")
    usable = (np.isfinite(resampled) & (resampled > 0)).all(axis=0)
    if not usable.any():
        raise ValueError("no resample has a positive error for every run")
    return np.log(resampled[:, usable] / np.asarray(points)[:, None]).T, int((~usable).sum())


def _decided(law: PowerLaw, n, fits: Fits) -> PowerLaw:
    """The law with a verdict that holds for its profile and for what the simulated studies add: test recordings."""

    def either(profile, values):
        found = interval(0.0, values, LEVEL)
        return min(profile[0], found.low), max(profile[1], found.high)

    shares = None
    if law.c_range:
        largest = float(law.predict(np.max(n)))
        # Of each study's own value: patients who move all errors alike leave the share as it is.
        simulated = fits.c / fits.predict([np.max(n)])[:, 0]
        shares = either([c / largest for c in law.c_range], simulated)
    return power_law.decided(law, either(law.b_range, fits.b), shares)


def bootstrap_fit(
    n,
    points,
    resampled_errors=None,
    *,
    offset: bool,
    sizes=None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ScalingFit:
    """Fit a power law and find intervals of its parameters and its curve.

    Args:
        n: [P], size of each run.
        points: [P], its loss or its error on all test recordings, positive.
        resampled_errors: [P, R], its error on R resamples of the patients, the same resamples for all runs; None for
            losses, whose intervals are over runs only. Resamples on which an error is undefined or 0 are left out.
        offset: whether c is fitted.
        sizes: [M], where to give the curve; 60 from the smallest to the largest n by default.
        n_resamples: number of simulated studies; with `resampled_errors`, as many as these have.
        seed: of NumPy's default generator.

    Raises:
        ValueError: shapes that do not match, or values that are not positive.
    """
    n, points = np.asarray(n, dtype=np.float64), np.asarray(points, dtype=np.float64)
    law = power_law.fit_power_law(n, points, offset=offset)
    log_patients, left_out = _log_patients(points, resampled_errors)
    sizes = np.geomspace(n.min(), n.max(), 60) if sizes is None else np.asarray(sizes, dtype=np.float64)
    over = (("runs",) if law.scatter.dof else ()) + (("recordings",) if log_patients is not None else ())
    R = n_resamples if log_patients is None else len(log_patients)
    if over:
        simulated = _simulated(law, n, log_patients, R, np.random.default_rng(seed))
        fits = power_law.fit_many(n, simulated, offset=offset)
        law = _decided(law, n, fits)
    else:
        fits = Fits(*(np.full(1, np.nan) for _ in range(4)))
    curve, curves = law.predict(sizes), fits.predict(sizes)
    low, high = (np.quantile(curves, (1 + sign * LEVEL) / 2, axis=0) for sign in (-1, 1))
    runs_of_rung = int(np.bincount(power_law.rungs_of(n)).max())
    return ScalingFit(
        law,
        interval(law.a, fits.a, LEVEL),
        interval(law.b, fits.b, LEVEL),
        interval(law.c, fits.c, LEVEL) if offset else None,
        sizes,
        curve,
        low,
        high,
        over,
        runs_of_rung,
        tuple(_remarks(law, runs_of_rung, log_patients is not None, left_out)),
    )


def _remarks(law: PowerLaw, runs_of_rung: int, recordings: bool, left_out: int):
    if law.reason:
        yield law.reason
    scatter = law.scatter
    if not scatter.dof:
        yield "no run is left over to show how runs differ, so other seeds are not in the interval"
    elif runs_of_rung == 1:
        yield (
            "one seed: seeds are not repeated, the spread of runs is taken from their scatter about the curve "
            f"({scatter.dof} degrees of freedom), which is right only if the curve is"
        )
    elif scatter.together:
        yield (
            f"rungs lie off the curve further than their seeds explain (p = {scatter.lack_of_fit:.2g}): the intervals "
            f"take their scatter ({scatter.dof} degrees of freedom) instead of that of the seeds"
        )
    if not recordings:
        yield "other test recordings are not in the interval"
    if left_out:
        yield f"{left_out} resamples of the patients with an undefined error or an error of 0 were left out"


def predict_largest(
    n, points, resampled_errors=None, *, offset: bool, n_resamples: int = 1000, seed: int = 0
) -> HeldOut:
    """Fit without the largest rung, predict its mean on the same test recordings, and compare.

    The interval is for the mean of as many runs as the largest rung has, so it contains their spread too.

    Args:
        n, points, resampled_errors, offset, n_resamples, seed: as in `bootstrap_fit`.

    Raises:
        ValueError: as in `bootstrap_fit`.
    """
    n, points = np.asarray(n, dtype=np.float64), np.asarray(points, dtype=np.float64)
    rung = power_law.rungs_of(n)
    held = rung == rung.max()
    size, observed = float(np.exp(np.log(n[held]).mean())), float(np.exp(np.log(points[held]).mean()))
    parameters, left = 2 + offset, int(rung.max())
    if left < parameters + 1:
        return HeldOut(
            size,
            observed,
            None,
            None,
            None,
            None,
            f"{left} smaller rungs do not determine {parameters} parameters: no prediction",
        )
    law = power_law.fit_power_law(n[~held], points[~held], offset=offset)
    log_patients, _ = _log_patients(points, resampled_errors)
    R = n_resamples if log_patients is None else len(log_patients)
    generator = np.random.default_rng(seed)
    smaller = None if log_patients is None else log_patients[:, ~held]
    fits = power_law.fit_many(n[~held], _simulated(law, n[~held], smaller, R, generator), offset=offset)
    logs = np.log(fits.predict([size])[:, 0])
    scatter = law.scatter
    if scatter.dof:
        t = generator.standard_t(scatter.dof, size=R)
        logs = logs + scatter.sd * t / np.sqrt(1 if scatter.together else held.sum())
    if log_patients is not None:
        logs = logs - log_patients[:, held].mean(axis=1)
    # With one degree of freedom draws overflow, quantiles of their logarithms do not.
    log_interval = interval(float(np.log(law.predict(size))), logs, LEVEL)
    predicted = Interval(*(float(each) for each in np.exp(log_interval)))
    inside = bool(predicted.low <= observed <= predicted.high)
    error = predicted.point / observed - 1
    law = _decided(law, n[~held], fits)
    remark = "; ".join(_remarks(law, int(np.bincount(rung[~held]).max()), log_patients is not None, 0))
    if not law.identifiable:
        return HeldOut(size, observed, None, None, None, law, remark)
    return HeldOut(size, observed, predicted, error, inside, law, remark)


MODELS = ("no scaling", "power law", "power law with offset")


def _log_curve(k: int, n, points, at, weights) -> np.ndarray:
    """Log values [M] at the sizes `at` of the model of k parameters fitted to points [P], a constant with weights."""
    if k == 1:
        return np.full(len(at), np.average(np.log(points), weights=weights))
    return np.log(power_law.robust_fit(n, points, offset=k == 3)[0].predict(at)[0])


def _left_out_error(k: int, n, points, rung, weights) -> float | None:
    """Root mean square of the log mean of a rung less its prediction by the others; None with too few of those."""
    sizes = int(rung.max()) + 1
    if sizes - 1 < k:
        return None
    errors = []
    for held in (rung == i for i in range(sizes)):
        predicted = _log_curve(k, n[~held], points[~held], n[held], weights[~held])
        errors.append(float((np.log(points[held]) - predicted).mean()))
    return float(np.sqrt(np.mean(np.square(errors))))


def compare_models(n, points) -> ModelComparison:
    """Compare no scaling, a power law and a power law with offset on the same runs.

    AICc = m log(Σ w r² / m) + 2 K + 2 K (K + 1) / (m − K − 1) with K parameters, the spread being one, the weights w
    of the robust fit of the richest model, and m runs; but m rungs, with the means of their residuals, where these lie
    off the richest model further than their seeds explain, as then seeds do not count for more points (Hurvich & Tsai
    1989). It is undefined for m <= K + 1. Patients are the same for all runs, so that other test recordings would move
    all values alike: the comparison is over runs only.

    Args:
        n: [P], size of each run.
        points: [P], its loss or its error on all test recordings.

    Returns:
        All models with their scores, the best by either and a sentence. `best` is the simplest model whose AICc is
        within 2 of the smallest, `best_left_out` the simplest whose error is within 10 % of the smallest. Where AICc is
        undefined for the latter model, there is no `best`.

    Raises:
        ValueError: as in `power_law.fit_power_law`.
    """
    n, points = np.asarray(n, dtype=np.float64), np.asarray(points, dtype=np.float64)
    laws = [None, *(power_law.fit_power_law(n, points, offset=offset) for offset in (False, True))]
    rung = power_law.rungs_of(n)
    sizes = int(rung.max()) + 1
    richest = min(3, sizes - 1)
    weights, by_rung = np.ones(len(n)), False
    if richest > 1:
        _, _, residuals, corner = power_law.robust_fit(n, points, offset=richest == 3)
        weights = power_law.weights_of(residuals, corner)
        lack_of_fit = laws[richest - 1].scatter.lack_of_fit
        by_rung = lack_of_fit is not None and lack_of_fit < LACK_OF_FIT
    unit = rung if by_rung else np.arange(len(n))
    m = int(unit.max()) + 1
    candidates = []
    for k, (name, law) in enumerate(zip(MODELS, laws, strict=True), start=1):
        residuals = np.log(points) - _log_curve(k, n, points, n, weights)
        total = np.bincount(unit, weights)
        squares = np.bincount(unit, weights * residuals) ** 2 / total**2 * total / np.bincount(unit)
        # Residuals of exact values are rounding and tell no model from another.
        variance = max(float(squares.sum()) / m, 1e-20)
        K = k + 1
        aicc = None
        if sizes > k and m > K + 1:
            aicc = m * np.log(variance) + 2 * K + 2 * K * (K + 1) / (m - K - 1)
        remark = "" if law is None else law.reason
        if aicc is None:
            why = f"needs more than {k} sizes" if sizes <= k else f"is undefined for {m} {_units(by_rung)}"
            remark = "; ".join(filter(None, [f"AICc {why}", remark]))
        error = _left_out_error(k, n, points, rung, weights)
        candidates.append(Candidate(name, k, None if aicc is None else float(aicc), error, remark))
    best = best_left_out = None
    defined = [each for each in candidates if each.aicc is not None]
    scored = [each for each in candidates if each.left_out_error is not None]
    if len(scored) > 1:
        least = min(each.left_out_error for each in scored)
        best_left_out = next(each for each in scored if each.left_out_error <= 1.1 * least)
    # AICc that cannot score the model that predicts best would choose among the others only.
    if len(defined) > 1 and (best_left_out is None or best_left_out in defined):
        least = min(each.aicc for each in defined)
        best = next(each for each in defined if each.aicc <= least + 2)
    verdict = _comparison_verdict(defined, best, best_left_out, laws, _units(by_rung), m)
    names = [None if each is None else each.name for each in (best, best_left_out)]
    return ModelComparison(tuple(candidates), *names, verdict)


def _units(by_rung: bool) -> str:
    return "rungs" if by_rung else "runs"


def _comparison_verdict(defined, best, best_left_out, laws, units: str, m: int) -> str:
    """The comparison in words."""
    if best is None and best_left_out is None:
        return f"too few points to compare models: {m} {units}"
    parts = []
    if best is None:
        parts.append(
            f"AICc cannot decide over {m} {units}; {best_left_out.name} predicts left-out rungs best"
        )
    else:
        others = ", ".join(
            f"{each.aicc - best.aicc:+.1f} for {each.name}" for each in defined if each is not best
        )
        parts.append(f"{best.name} is best supported (AICc over {m} {units}: {others})")
        if best_left_out is not None and best_left_out.name != best.name:
            parts.append(f"but {best_left_out.name} predicts left-out rungs better")
    chosen = laws[(best or best_left_out).parameters - 1]
    if chosen is not None and chosen.reason:
        parts.append(chosen.reason)
    return "; ".join(parts)
