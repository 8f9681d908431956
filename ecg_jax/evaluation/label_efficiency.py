"""Label efficiency: how the error of a linear probe falls with the number of labelled training records.

Nested patient-wise subsets of the training records are probed on the same frozen features; the error e (1 less macro
AUROC, or the mean absolute error of z-scores) is described by

    e(N) = C N^(−a) + L0,      C > 0, a > 0, L0 >= 0,

a power law that levels off at L0 (as in Hestness et al., arXiv:1712.00409, for whole models). The label-saving factor
r = N* / N compares two models: N* is the number of records at which the better one, by its curve, has the error of the
other, by its own, at N. r = 0.25 means that a quarter of the labels will do.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.data.stratify import nested_subsets
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.evaluation.examples import Examples, Fitted, Part
from ecg_jax.evaluation.linear import LayerFeatures, fit_linear
from ecg_jax.evaluation.probe_scores import SCORED_AS, majority_guess
from ecg_jax.evaluation.scoring import score
from ecg_jax.files import write_atomic

#: Sizes below which a curve of three numbers is not fitted.
MIN_SIZES = 4


def patient_subsets(examples: Examples, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Nested subsets of the training records, patients kept together, classes in proportion.

    Returns:
        For every fraction the indices into `examples.train.rows`, int64, ascending.
    """
    patients = examples.train.column("patient_id")
    groups = [f"patient {p}" if p else f"record {i}" for i, p in enumerate(patients)]
    labels: list[list[str]] = [[] for _ in groups]
    if examples.task.kind != "regression":
        for i, k in zip(*np.nonzero(examples.train.targets == 1), strict=True):
            labels[i].append(examples.classes[k])
    return nested_subsets(labels, groups, fractions, seed)


def fit_subset(features: LayerFeatures, examples: Examples, chosen: np.ndarray, **how: Any) -> Fitted:
    """A linear probe that sees the labels of some training records only.

    A class that these do not show both positives and negatives of (a number of which they know fewer than two) is
    predicted as a constant, the mean of its labels among them, which is all that they say about it, and so scores an
    AUROC of 0.5; without any label it is 0.5, of a number the mean of all training records.

    Of the labels of other training records only two things are used: numbers are scored in units of the standard
    deviation of all training records, and values outside 1-99 % of those are unknown (`targets.standardised`). A ridge
    regression with an intercept predicts the same in any unit. Penalty and layer are chosen on all validation records,
    whatever the size of the subset.

    Args:
        features: of all parts.
        examples: all of them.
        chosen: int, indices into `examples.train.rows`.
        **how: of `linear.fit_linear`.
    """
    targets = examples.train.targets[chosen]
    known = ~np.isnan(targets)
    if examples.task.kind == "regression":
        trainable = known.sum(axis=0) > 1
        usable = trainable & (~np.isnan(examples.val.targets)).any(axis=0)
    else:
        trainable = metrics.has_both_kinds(targets)
        usable = trainable & metrics.has_both_kinds(examples.val.targets)
    unlabelled = 0.0 if examples.task.kind == "regression" else 0.5
    sums = np.where(known, targets, 0.0).sum(axis=0, dtype=np.float64)
    constant = np.where(known.any(axis=0), sums / np.maximum(known.sum(axis=0), 1), unlabelled)
    parts = {name: getattr(examples, name) for name in ("val", "test")}
    predictions = {name: np.tile(constant, (len(part.rows), 1)) for name, part in parts.items()}
    constant_classes = [examples.classes[k] for k in np.flatnonzero(~trainable)]
    report: dict[str, Any] = {"constant": constant_classes, "l2": None, "layers": None}
    if usable.any():

        def some(part: Part) -> Part:
            return dataclasses.replace(part, targets=part.targets[:, trainable])

        train = Part(examples.train.store, examples.train.rows[chosen], targets[:, trainable])
        classes = [examples.classes[k] for k in np.flatnonzero(trainable)]
        scale = None if examples.scale is None else tuple(each[trainable] for each in examples.scale)
        smaller = dataclasses.replace(
            examples, train=train, **{n: some(p) for n, p in parts.items()}, classes=classes, scale=scale
        )
        fitted = fit_linear(features, smaller, **how)
        predictions["val"][:, trainable], predictions["test"][:, trainable] = fitted.val, fitted.test
        report |= fitted.report
    return Fitted(predictions["val"], predictions["test"], report)


class FitStore:
    """Finished fits of one workdir, found again by what they depend on."""

    def __init__(self, folder: Path, shared: dict[str, Any]):
        """Fits in a folder; `shared` is JSON-able and says what all of them depend on."""
        self._folder, self._shared = folder, json.dumps(shared, sort_keys=True)

    def _path(self, model: str, chosen: np.ndarray) -> Path:
        digest = hashlib.sha256(f"{self._shared}\0{model}\0".encode())
        digest.update(np.asarray(chosen, np.int64).tobytes())
        return self._folder / f"{digest.hexdigest()[:32]}.npz"

    def read(self, model: str, chosen: np.ndarray) -> tuple[np.ndarray, dict] | None:
        """(test predictions [n, K], report) of a finished fit; None if there is none or its file is damaged."""
        path = self._path(model, chosen)
        try:
            with np.load(path) as file:
                return file["test"], json.loads(str(file["report"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, model: str, chosen: np.ndarray, fitted: Fitted) -> None:
        """Keeps a fit.

        Raises:
            UserError: it cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, test=fitted.test, report=np.array(json.dumps(fitted.report)))
        write_atomic(self._path(model, chosen), buffer.getvalue())


@dataclass(frozen=True)
class Curve:
    """Scores of one model at S sizes for M seeds, on the test records and on R resamples of their patients."""

    sizes: np.ndarray
    """float64 [S, M], training records of each subset."""
    scores: np.ndarray
    """float64 [S, M]."""
    resampled: np.ndarray
    """float64 [R, S, M]."""

    def intervals(self, seed: int, level: float) -> list[bootstrap.Interval]:
        """Mean over seeds of every size, with its interval over patients and seeds (`bootstrap.seed_deviations`)."""
        deviations = self._deviations(self.scores, seed)
        return [
            bootstrap.hierarchical_interval(points, self.resampled[:, s].T, deviations[:, s], level)
            for s, points in enumerate(self.scores)
        ]

    def replicates(self, metric: str, seed: int) -> np.ndarray:
        """Errors as they might have been with other patients and seeds: float64 [R, S].

        Deviations of seeds multiply: they are those of the logarithms of errors, which the curve is fitted to. Models
        with the same `seed` deviate together where they do so from draw to draw.
        """
        over_patients = errors_of(self.resampled.mean(axis=2), metric)
        deviations = self._deviations(np.log(errors_of(self.scores, metric)), seed)
        # Of two seeds Student's t has no mean: errors must stay numbers, however far off.
        return over_patients * np.exp(np.clip(deviations, -10, 10))

    def _deviations(self, figures: np.ndarray, seed: int) -> np.ndarray:
        return bootstrap.seed_deviations(figures, len(self.resampled), np.random.default_rng([seed, 1]))


def score_fits(examples: Examples, predictions: list[list[np.ndarray]], sizes, counts) -> Curve:
    """Scores predictions[size][seed] [n, K] on the test records and on the resamples counts [n, R]."""
    metric, targets = SCORED_AS[examples.task.metric], examples.test.targets
    known: dict[int, tuple[float, np.ndarray]] = {}

    def macro(prediction: np.ndarray) -> tuple[float, np.ndarray]:
        # Seeds share the fit on all records.
        if id(prediction) not in known:
            point, resampled, _ = score(metric, targets, prediction, counts).macros("exclude")
            known[id(prediction)] = point, resampled
        return known[id(prediction)]

    scored = [[macro(prediction) for prediction in of_size] for of_size in predictions]
    points = np.array([[point for point, _ in of_size] for of_size in scored])
    resampled = np.array([[each for _, each in of_size] for of_size in scored])  # [S, M, R]
    return Curve(np.asarray(sizes, np.float64), points, np.moveaxis(resampled, 2, 0))


@dataclass(frozen=True)
class PowerLaw:
    """e(N) = C N^(−a) + L0."""

    C: float
    a: float
    L0: float

    def error(self, n) -> np.ndarray:
        """e at n records."""
        return self.C * np.asarray(n, dtype=np.float64) ** -self.a + self.L0

    def records(self, error: float) -> float:
        """The n at which e(n) = error; infinite if the curve stays above it."""
        with np.errstate(over="ignore"):
            return float(((error - self.L0) / self.C) ** (-1 / self.a)) if error > self.L0 else float("inf")


def fit_power_law(sizes, errors, start: PowerLaw | None = None) -> PowerLaw:
    """Least squares of log e(N) on the logarithms of measured errors: relative deviations count, small errors too.

    Solved in log C, log a and log L0 from several starts (the sum of squares has local minima); log L0 may run down to
    1e-6 of the smallest error, which is no floor at all.

    Args:
        sizes: [S] records, S >= 4, not all equal.
        errors: [S], above 0.
        start: where to start instead, for a resample of data that were fitted before.

    Raises:
        ValueError: fewer sizes, or an error that is not above 0.
    """
    from scipy.optimize import least_squares

    sizes, errors = np.asarray(sizes, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(np.unique(sizes)) < MIN_SIZES or len(sizes) != len(errors):
        raise ValueError(f"a curve of three numbers needs {MIN_SIZES} sizes, not {len(np.unique(sizes))}")
    if not (errors > 0).all():
        raise ValueError("errors must be above 0")
    centre = np.exp(np.log(sizes).mean())
    x, y, smallest = np.log(sizes / centre), np.log(errors), errors.min()

    def residuals(theta):
        return np.logaddexp(theta[0] - np.exp(theta[1]) * x, theta[2]) - y

    low = np.log([1e-8 * smallest, 1e-3, 1e-6 * smallest])
    high = np.log([1e4 * errors.max(), 10.0, 2 * errors.max()])
    if start is None:
        middle = np.median(errors)
        starts = [
            np.log([max(middle - share * smallest, 0.01 * middle), a, share * smallest])
            for a in (0.1, 0.5, 1.5)
            for share in (0.02, 0.6, 0.98)
        ]
    else:
        starts = [np.log([start.C * centre**-start.a, start.a, start.L0])]
    found = [
        least_squares(residuals, np.clip(theta, low + 1e-9, high - 1e-9), bounds=(low, high), x_scale=1.0)
        for theta in starts
    ]
    log_c, log_a, log_floor = min(found, key=lambda result: result.cost).x
    a = float(np.exp(log_a))
    return PowerLaw(float(np.exp(log_c)) * centre**a, a, float(np.exp(log_floor)))


def errors_of(scores, metric: str) -> np.ndarray:
    """What is left to the best score: 1 less the AUROC, or the error itself; at least 1e-6, for its logarithm."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.maximum(scores if metric == "mae" else 1 - scores, 1e-6)


@dataclass(frozen=True)
class FittedCurve:
    """The power law of one model and of its replicates."""

    law: PowerLaw
    replicates: list[PowerLaw | None]
    """R, in the order of the resamples; None where the resample's scores are undefined."""

    def report(self, level: float) -> dict[str, Any]:
        """{"C", "a", "L0", and of each "<name>_low", "<name>_high"}."""
        drawn = [law for law in self.replicates if law is not None]
        entry: dict[str, Any] = {}
        for name in ("C", "a", "L0"):
            values = [getattr(law, name) for law in drawn]
            point, low, high = bootstrap.interval(getattr(self.law, name), values, level)
            entry |= {name: point, f"{name}_low": low, f"{name}_high": high}
        return entry


def fit_curve(curve: Curve, metric: str, seed: int) -> FittedCurve | None:
    """Fits the mean over seeds and, for the interval, every replicate (`Curve.replicates`).

    Returns:
        None with fewer than `MIN_SIZES` different sizes, or if no score changes with the size.
    """
    sizes, errors = curve.sizes.mean(axis=1), errors_of(curve.scores.mean(axis=1), metric)
    if len(np.unique(sizes)) < MIN_SIZES or np.isnan(errors).any() or np.ptp(errors) < 1e-9:
        return None
    law = fit_power_law(sizes, errors)
    replicates = [
        None if np.isnan(row).any() else fit_power_law(sizes, row, start=law)
        for row in curve.replicates(metric, seed)
    ]
    return FittedCurve(law, replicates)


#: Rounding of a fit must not put a factor of 1 at the largest size beyond what was measured.
_ROUNDING = 1.001


def label_saving(better: FittedCurve, other: FittedCurve, sizes, level: float) -> list[dict[str, Any]]:
    """r = N* / N at every size, with a percentile interval from the replicates of both models.

    Both errors are those of the curves: against a measured error the factor would tell noise of one size from a model
    that needs fewer labels. Where N* lies outside the measured sizes a curve would be extrapolated, so that a factor is
    only known to lie below `least` = smallest / N or above `most` = largest / N. Such replicates count like all others:
    an end of the interval that falls among them is open.

    Args:
        better, other: curves with paired replicates (`fit_curve` on the same resamples and seeds).
        sizes: [S], of both models.
        level: of confidence.

    Returns:
        For each size {"size", "labels", "factor", "low", "high", "least", "most", "undefined", and "factor_open",
        "low_open", "high_open"}. An open factor or end is NaN and flagged "<" (below `least`) or ">" (above `most`),
        the flag is None for others; "undefined" says why the factor is open. Without replicates of both models (scores
        undefined in more than half of the resamples) both ends are NaN and not open.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    smallest, largest = sizes.min() / _ROUNDING, sizes.max() * _ROUNDING
    pairs = [pair for pair in zip(better.replicates, other.replicates, strict=True) if None not in pair]
    enough = len(pairs) >= 0.5 * len(better.replicates)
    why = {
        None: None,
        "<": f"extrapolates: fewer than the {sizes.min():.0f} records measured",
        ">": f"extrapolates: more than the {sizes.max():.0f} records measured",
    }

    def needed(ours: PowerLaw, theirs: PowerLaw, size: float) -> float:
        return float(np.clip(ours.records(float(theirs.error(size))), smallest, largest))

    def opened(n: float) -> tuple[float, str | None]:
        """n, or NaN with the side on which it lies beyond the sizes."""
        side = "<" if n <= smallest else ">" if n >= largest else None
        return (n, None) if side is None else (float("nan"), side)

    entries = []
    for size in sizes:
        n, side = opened(needed(better.law, other.law, size))
        ends = [(float("nan"), None)] * 2
        if enough:
            drawn = [needed(*pair, size) for pair in pairs]
            ends = [opened(float(end)) for end in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])]
        (low, low_side), (high, high_side) = ends
        entries.append(
            {
                "size": round(size),
                "labels": n,
                "factor": n / size,
                "low": low / size,
                "high": high / size,
                "least": sizes.min() / size,
                "most": sizes.max() / size,
                "factor_open": side,
                "low_open": low_side,
                "high_open": high_side,
                "undefined": why[side],
            }
        )
    return entries


def majority_scores(examples: Examples, counts) -> tuple[float, np.ndarray]:
    """Score of the constant guess, on the test records and on resamples [R]: the same with any number of labels."""
    guess = majority_guess(examples)
    point, resampled, _ = score(SCORED_AS[examples.task.metric], examples.test.targets, guess, counts).macros(
        "exclude"
    )
    return point, resampled
