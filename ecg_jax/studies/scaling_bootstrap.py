"""Intervals of a power law over runs and test recordings, comparison with simpler laws, and the held-out largest rung.

A study has 3 to 5 rungs, 1 to 5 seeds, and one set of test recordings for all runs. Resampling so few runs would end
at the extremes among them, so runs are simulated from the fitted curve instead:

    log value* (run) = log f(n) + patients (run) + σ sqrt(ν / χ²_ν) z

where `patients` is the log of the run's error on a resample of the patients over its error on all of them, the same
resample for every run, so that what the runs share stays shared; z is normal and σ the scatter of the runs about the
curve with its ν degrees of freedom (`power_law.Scatter`), by rung where rungs lie off the curve further than their
seeds explain. Every simulated study is fitted by least squares. For a power law without offset and without test
recordings these are exactly the t intervals of a straight line of logarithms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval, interval
from ecg_jax.studies import power_law
from ecg_jax.studies.power_law import Fits, PowerLaw

LEVEL = 0.95


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
    n_seeds: int
    """Largest number of runs of one rung."""
    remarks: tuple[str, ...]
    """Sentences on what the intervals do not contain and what to know of the fit."""


class HeldOut(NamedTuple):
    """What the smaller rungs say of the largest one."""

    size: float
    observed: float
    """Geometric mean over the runs of the largest rung; the prediction is for this."""
    predicted: Interval | None
    """None where the smaller rungs do not determine the curve."""
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
    """Smallest AICc, or the simplest within 2 of it; None where none is defined."""
    best_left_out: str | None
    """Smallest error on rungs left out."""
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


def bootstrap_fit(
    n,
    points,
    resampled_errors=None,
    seeds: Sequence[int] | None = None,
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
        seeds: [P], the seed of each run; None if they are not known.
        offset: whether c is fitted.
        sizes: [M], where to give the curve; 60 from the smallest to the largest n by default.
        n_resamples: number of simulated studies; with `resampled_errors`, as many as these have.
        seed: of NumPy's default generator.

    Raises:
        ValueError: shapes that do not match, values that are not positive, or a rung with the same seed twice.
    """
    n, points = np.asarray(n, dtype=np.float64), np.asarray(points, dtype=np.float64)
    law = power_law.fit_power_law(n, points, offset=offset)
    rung = power_law.rungs_of(n)
    if seeds is not None and len(set(zip(rung.tolist(), seeds, strict=True))) < len(n):
        raise ValueError("a rung has the same seed twice")
    log_patients, left_out = _log_patients(points, resampled_errors)
    sizes = np.geomspace(n.min(), n.max(), 60) if sizes is None else np.asarray(sizes, dtype=np.float64)
    over = (("runs",) if law.scatter.dof else ()) + (("recordings",) if log_patients is not None else ())
    remarks = list(_remarks(law, int(np.bincount(rung).max()), log_patients is not None, left_out))
    R = n_resamples if log_patients is None else len(log_patients)
    if over:
        simulated = _simulated(law, n, log_patients, R, np.random.default_rng(seed))
        fits = power_law.fit_many(n, simulated, offset=offset)
    else:
        fits = Fits(*(np.full(1, np.nan) for _ in range(4)))
    curve, curves = law.predict(sizes), fits.predict(sizes)
    low, high = (np.quantile(curves, (1 + sign * LEVEL) / 2, axis=0) for sign in (-1, 1))
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
        int(np.bincount(rung).max()),
        tuple(remarks),
    )


def _remarks(law: PowerLaw, n_seeds: int, recordings: bool, left_out: int):
    if law.reason:
        yield law.reason
    scatter = law.scatter
    if not scatter.dof:
        yield "no run is left over to show how runs differ, so other seeds are not in the interval"
    elif n_seeds == 1:
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
    return HeldOut(size, observed, predicted, predicted.point / observed - 1, inside, law, law.reason)


_MODELS = (("no scaling", 1), ("power law", 2), ("power law with offset", 3))


def compare_models(n, points) -> ModelComparison:
    """Compare no scaling, a power law and a power law with offset on the same runs.

    Args:
        n: [P], size of each run.
        points: [P], its loss or error.

    Raises:
        ValueError: as in `power_law.fit_power_law`.
    """
    n, points = np.asarray(n, dtype=np.float64), np.asarray(points, dtype=np.float64)
    logs, rung = np.log(points), power_law.rungs_of(n)
    sizes = int(rung.max()) + 1

    def predict(k: int, rows, at) -> np.ndarray:
        if k == 1:
            return np.full(len(at), np.median(logs[rows]))
        return np.log(power_law.fit_power_law(n[rows], points[rows], offset=k == 3).predict(at))

    candidates = []
    everything = np.ones(len(n), dtype=bool)
    for name, k in _MODELS:
        residuals = logs - predict(k, everything, n)
        square, p = float(residuals @ residuals), len(n)
        aicc = None
        if sizes >= k and p > k + 2:
            aicc = p * np.log(max(square, 1e-16 * p) / p) + 2 * (k + 1) + 2 * (k + 1) * (k + 2) / (p - k - 2)
        error = None
        if sizes - 1 >= k:
            errors = [
                logs[rung == i].mean() - predict(k, rung != i, n[rung == i]).mean() for i in range(sizes)
            ]
            error = float(np.sqrt(np.mean(np.square(errors))))
        remark = "" if aicc is not None else f"AICc is undefined for {p} runs and {k} parameters"
        candidates.append(Candidate(name, k, aicc, error, remark))
    defined = [each for each in candidates if each.aicc is not None]
    best = None
    if defined:
        least = min(each.aicc for each in defined)
        best = next(each.name for each in defined if each.aicc <= least + 2)
    scored = [each for each in candidates if each.left_out_error is not None]
    best_left_out = min(scored, key=lambda each: each.left_out_error).name if scored else None
    return ModelComparison(tuple(candidates), best, best_left_out, f"best by AICc: {best}")
