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

#: 1/128, 1/64, ..., 1.
FRACTIONS = tuple(2.0**-k for k in range(7, -1, -1))

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
    predicted as a constant, which is all that they say about it, and so scores an AUROC of 0.5. Penalty and layer are
    chosen on all validation records, whatever the size of the subset.

    Args:
        features: of all parts.
        examples: all of them.
        chosen: int, indices into `examples.train.rows`.
        **how: of `linear.fit_linear`.
    """
    targets = examples.train.targets[chosen]
    if examples.task.kind == "regression":
        trainable = (~np.isnan(targets)).sum(axis=0) > 1
        usable = trainable & (~np.isnan(examples.val.targets)).any(axis=0)
        constant = np.zeros(len(trainable))  # the mean of z-scores
    else:
        trainable = metrics.has_both_kinds(targets)
        usable = trainable & metrics.has_both_kinds(examples.val.targets)
        constant = np.nanmean(examples.train.targets, axis=0)
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

    def means(self, seeds: np.ndarray) -> np.ndarray:
        """float64 [R, S]: replicate r is on resample r, averaged over the seeds drawn in it, seeds [R, M]."""
        return np.take_along_axis(self.resampled, seeds[:, None, :], axis=2).mean(axis=2)


def draw_seeds(n_resamples: int, n_seeds: int, seed: int) -> np.ndarray:
    """int [R, M]: which seeds each replicate is made of; a drawn seed brings its whole chain of subsets."""
    return np.random.default_rng([seed, 1]).integers(0, n_seeds, (n_resamples, n_seeds))


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


def fit_curve(curve: Curve, metric: str, seeds: np.ndarray) -> FittedCurve | None:
    """Fits the mean over seeds and, for the interval, every replicate (patients and seeds resampled).

    Returns:
        None with fewer than `MIN_SIZES` different sizes, or if no score changes with the size.
    """
    sizes, errors = curve.sizes.mean(axis=1), errors_of(curve.scores.mean(axis=1), metric)
    if len(np.unique(sizes)) < MIN_SIZES or np.isnan(errors).any() or np.ptp(errors) < 1e-9:
        return None
    law = fit_power_law(sizes, errors)
    means = errors_of(curve.means(seeds), metric)
    replicates = [None if np.isnan(row).any() else fit_power_law(sizes, row, start=law) for row in means]
    return FittedCurve(law, replicates)


def label_saving(better: FittedCurve, other: FittedCurve, sizes, level: float) -> list[dict[str, Any]]:
    """r = N* / N at every size, with an interval from the replicates of both models.

    Both errors are those of the curves: against a measured error the factor would tell noise of one size from a model
    that needs fewer labels. Where N* lies outside the measured sizes the factor would extrapolate and is NaN, with the
    reason; a replicate there counts as undefined, and the interval is NaN if more than half of them are.

    Args:
        better, other: curves with paired replicates (`fit_curve` on the same resamples and seeds).
        sizes: [S], of both models.
        level: of confidence.

    Returns:
        One {"size", "labels", "factor", "low", "high", "undefined"} for each size.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    smallest, largest = sizes.min(), sizes.max()

    def needed(ours: PowerLaw, theirs: PowerLaw, size: float) -> tuple[float, str | None]:
        n = ours.records(float(theirs.error(size)))
        # Rounding of the fit must not make a factor of 1 at an end an extrapolation.
        if n > 1.001 * largest:
            return float("nan"), f"extrapolates: more than the {largest:.0f} records measured"
        if n < smallest / 1.001:
            return float("nan"), f"extrapolates: fewer than the {smallest:.0f} records measured"
        return n, None

    entries = []
    pairs = [pair for pair in zip(better.replicates, other.replicates, strict=True) if None not in pair]
    for size in sizes:
        n, why = needed(better.law, other.law, size)
        drawn = np.array([needed(*pair, size)[0] for pair in pairs])
        _, low, high = bootstrap.interval(n / size, drawn / size, level)
        n_defined = (~np.isnan(drawn)).sum()
        if why is not None or n_defined < 0.5 * len(better.replicates):
            low = high = float("nan")
        entries.append(
            {"size": round(size), "labels": n, "factor": n / size, "low": low, "high": high, "undefined": why}
        )
    return entries


def majority_scores(examples: Examples, counts) -> tuple[float, np.ndarray]:
    """Score of the constant guess, on the test records and on resamples [R]: the same with any number of labels."""
    guess = majority_guess(examples)
    point, resampled, _ = score(SCORED_AS[examples.task.metric], examples.test.targets, guess, counts).macros(
        "exclude"
    )
    return point, resampled
