"""Linear probe: L2-regularised logistic regression per class on features that were computed once.

For class k with weight w_k, intercept b_k and standardised features x̃ = (x − μ)/σ,

    minimise  Σ_i v_ik log(1 + exp(−ỹ_ik (w_k·x̃_i + b_k))) / Σ_i v_ik  +  (l2/2) |w_k|²,      ỹ = ±1,

where v_ik is the weight of crop i, zero where the target is NaN. The problem is convex with one solution, so
unlike a head trained by stochastic gradients the result does not depend on a learning rate, a seed or an
epoch. With unit weights, scikit-learn's `LogisticRegression(C=1 / (l2 * n))` on x̃ has the same solution.

All classes are solved together by L-BFGS in float64: one pass over the features per step, in blocks, no copy
per class. L-BFGS runs in whitened coordinates: with the covariance of x̃ diagonalised as V diag(λ) Vᵀ, and
π_k the prevalence, the Hessian of class k at its starting point is π_k(1−π_k) V diag(λ) Vᵀ + l2 I, and
scaling by its inverse square root makes correlated features harmless (tens of steps instead of thousands).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ecg_jax.evaluation import metrics

# Features up to this size are kept as float64 during a solve; larger ones are converted block by block.
_FLOAT64_BYTES = 1 << 29
_BLOCK_ROWS = 16384
# Multiply-adds of a step up to which one BLAS thread is as fast: several then wait for each other, and where other
# programs run too they wait for a core.
_SMALL = 1 << 24


@dataclass(frozen=True)
class LinearHead:
    """A linear head on raw features; the standardisation of the training features is folded in."""

    weight: np.ndarray
    """float64 [D, K]."""
    bias: np.ndarray
    """float64 [K]."""

    def logits(self, features) -> np.ndarray:
        """float64 [n, K] from features [n, D]."""
        features = np.asarray(features)
        out = np.empty((len(features), self.weight.shape[1]))
        for rows in _blocks(len(features)):
            np.matmul(features[rows].astype(np.float64, copy=False), self.weight, out=out[rows])
        return out + self.bias


@dataclass(frozen=True)
class Solution:
    """A solved head and how well it was solved."""

    head: LinearHead
    l2: float
    converged: bool
    """Whether the gradient reached the tolerance."""
    gradient_norm: float
    """Largest |gradient| of any class's objective, in standardised coordinates."""
    n_steps: int
    objective: float
    """Sum of the objective over classes."""


def _blocks(n: int):
    return [slice(start, min(start + _BLOCK_ROWS, n)) for start in range(0, n, _BLOCK_ROWS)]


@dataclass(frozen=True)
class Standardisation:
    """Mean and scale of features, and the axes and eigenvalues of their correlation, which whiten them."""

    mean: np.ndarray
    """float64 [D]."""
    scale: np.ndarray
    """float64 [D], infinite for a feature that never varies, which so gets weight zero."""
    axes: np.ndarray
    """float64 [D, D], one eigenvector in each column."""
    eigenvalues: np.ndarray
    """float64 [D], not below zero."""


def standardise(features, weights) -> Standardisation:
    """Weighted mean, standard deviation and correlation of features [n, D] under weights [n].

    Raises:
        ValueError: a feature is not finite.
    """
    n, width = features.shape
    weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    # Deviations from a first guess of the mean, so that a large offset does not cancel the variance away.
    guess = features[: min(n, 1024)].mean(axis=0, dtype=np.float64)
    first, second = np.zeros(width), np.zeros((width, width))
    for rows in _blocks(n):
        deviation = features[rows] - guess
        first += weights[rows] @ deviation
        second += (deviation * weights[rows, None]).T @ deviation
    if not np.isfinite(second).all():
        raise ValueError("the features hold values that are not finite")
    mean = guess + first
    covariance = second - np.outer(first, first)
    scale = np.sqrt(np.clip(np.diagonal(covariance), 0.0, None))
    # A feature that never varies (a dead unit) says nothing, and its rounding noise must not be blown up to size 1.
    scale = np.where(scale <= 1e-6 * np.abs(mean), np.inf, scale)
    eigenvalues, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    return Standardisation(mean, scale, axes, np.clip(eigenvalues, 0.0, None))


def check_targets(features: np.ndarray, targets: np.ndarray, record) -> None:
    """Raises ValueError unless targets are [n, K], or [records, K] with the record of each of the n features."""
    n = len(features)
    expected = n if record is None else int(np.max(record)) + 1
    if targets.ndim != 2 or len(targets) != expected or (record is not None and len(record) != n):
        rows = n if record is None else "records"
        raise ValueError(f"features {features.shape} need targets [{rows}, K], not {targets.shape}")


class LogisticProblem:
    """The objective above on one set of training features, ready to be solved for several l2.

    Args:
        features: float [n, D].
        targets: [n, K] of 0, 1, NaN (unknown); every class needs a positive and a negative.
        weights: [n] weight of each crop, None for equal ones.
        standard: mean, scale and axes of more features than these (those of records without labels); None for these.
        record: int [n], the row of `targets` of each crop, so that targets [records, K] need not be repeated for crops;
            None where targets are [n, K]. Every record has a crop.

    Raises:
        ValueError: shapes differ, a feature is not finite, or a class has no positive or no negative.
    """

    def __init__(self, features, targets, weights=None, standard: Standardisation | None = None, record=None):
        features, targets = np.asarray(features), np.asarray(targets)
        n = len(features)
        check_targets(features, targets, record)
        if missing := np.flatnonzero(~metrics.has_both_kinds(targets)).tolist():
            raise ValueError(f"classes {missing} have no positive or no negative among the training targets")
        if features.dtype != np.float64 and features.size * 8 <= _FLOAT64_BYTES:
            features = features.astype(np.float64)
        self.features = features
        # One byte each: at 1M crops of 1000 classes every float64 [n, K] array would take 8 GB.
        self._targets, known = targets == 1, ~np.isnan(targets)
        self._known = None if known.all() else known
        self._record = None if record is None else np.asarray(record)
        self._weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
        self._total, positive = np.zeros((2, targets.shape[1]))
        for rows in _blocks(n):
            of_rows = self._weights[rows]
            positive += of_rows @ self._targets[self._at(rows)]
            self._total += of_rows.sum() if self._known is None else of_rows @ known[self._at(rows)]
        self.prevalence = positive / self._total
        standard = standard or standardise(features, self._weights)
        self.mean, self.scale = standard.mean, standard.scale
        self.axes, self.eigenvalues = standard.axes, standard.eigenvalues

    def _at(self, rows: slice):
        """Where the targets of some crops are."""
        return rows if self._record is None else self._record[rows]

    def _class_weights(self, rows: slice) -> np.ndarray:
        """v_ik / Σ_i v_ik of some rows: [len(rows), K]."""
        weights = self._weights[rows, None] / self._total
        return weights if self._known is None else weights * self._known[self._at(rows)]

    def objective(self, weight, bias, l2: float):
        """Objective summed over classes and its gradient, in standardised coordinates.

        Args:
            weight: float64 [D, K], bias: float64 [K], on standardised features.
            l2: penalty on the weight; the bias carries none.

        Returns:
            (value, gradient of weight [D, K], gradient of bias [K]).
        """
        folded = self._fold(weight, bias)
        value = 0.5 * l2 * float(np.sum(weight**2))
        weight_gradient, bias_gradient = np.zeros_like(weight), np.zeros_like(bias)
        for rows in _blocks(len(self.features)):
            x = self.features[rows].astype(np.float64, copy=False)
            z = x @ folded.weight + folded.bias
            decay = np.exp(-np.abs(z))  # in (0, 1]: neither the loss nor the sigmoid can overflow
            y, class_weights = self._targets[self._at(rows)], self._class_weights(rows)
            value += float(np.sum(class_weights * (np.maximum(z, 0.0) + np.log1p(decay) - y * z)))
            sigmoid = np.where(z >= 0, 1.0, decay) / (1.0 + decay)
            residual = class_weights * (sigmoid - y)
            weight_gradient += x.T @ residual
            bias_gradient += residual.sum(axis=0)
        weight_gradient = (weight_gradient - np.outer(self.mean, bias_gradient)) / self.scale[:, None]
        return value, weight_gradient + l2 * weight, bias_gradient

    @property
    def _small(self) -> bool:
        """Whether the products of a step are over before BLAS threads have met."""
        return self.features.size * len(self.prevalence) < _SMALL

    def _fold(self, weight, bias) -> LinearHead:
        """The same function on raw features."""
        raw = weight / self.scale[:, None]
        return LinearHead(raw, bias - self.mean @ raw)

    def solve(
        self, l2: float, start: LinearHead | None = None, tolerance: float = 1e-6, max_steps: int = 1000
    ) -> Solution:
        """Solve for one l2.

        Args:
            l2: penalty, above 0.
            start: where to start (a solution for a neighbouring l2), None for zero weights and the log odds.
            tolerance: the largest |gradient| that counts as converged.
            max_steps: of L-BFGS.

        Returns:
            The solution; `converged` is False if the tolerance was not reached within max_steps.

        Raises:
            ValueError: l2 not above 0.
        """
        from scipy.optimize import minimize
        from threadpoolctl import threadpool_limits

        if not l2 > 0:
            raise ValueError(f"l2 is {l2}, it must be above 0")
        (width, n_classes), prevalence = (self.features.shape[1], len(self.prevalence)), self.prevalence
        curvature = prevalence * (1 - prevalence)
        whiten = 1 / np.sqrt(self.eigenvalues[:, None] * curvature + l2)  # [D, K]
        bias_scale = 1 / np.sqrt(curvature)

        def unpack(flat):
            u = flat.reshape(width + 1, n_classes)
            return self.axes @ (whiten * u[:-1]), bias_scale * u[-1]

        def whitened(flat):
            value, weight_gradient, bias_gradient = self.objective(*unpack(flat), l2)
            gradient = np.vstack([whiten * (self.axes.T @ weight_gradient), bias_scale * bias_gradient])
            return value, gradient.ravel()

        if start is None:
            weight, bias = np.zeros((width, n_classes)), np.log(prevalence / (1 - prevalence))
        else:
            alive = np.isfinite(self.scale)[:, None]
            weight = np.where(alive, start.weight, 0.0) * np.where(alive, self.scale[:, None], 0.0)
            bias = start.bias + self.mean @ start.weight
        flat = np.vstack([(self.axes.T @ weight) / whiten, bias / bias_scale]).ravel()
        steps, gradient_norm = 0, np.inf
        # The optimiser stops on the whitened gradient; go on more tightly until the true one is small.
        for gtol in (tolerance, tolerance / 30, tolerance / 1000):
            options = {
                "maxiter": max_steps - steps,
                "maxfun": 2 * max_steps,
                "maxcor": 20,
                "gtol": gtol,
                "ftol": 0.0,
            }
            with threadpool_limits(1 if self._small else None, user_api="blas"):
                result = minimize(whitened, flat, jac=True, method="L-BFGS-B", options=options)
            flat, steps = result.x, steps + result.nit
            value, weight_gradient, bias_gradient = self.objective(*unpack(flat), l2)
            gradient_norm = float(max(np.abs(weight_gradient).max(), np.abs(bias_gradient).max()))
            if gradient_norm <= tolerance or steps >= max_steps:
                break
        head = self._fold(*unpack(flat))
        return Solution(head, float(l2), gradient_norm <= tolerance, gradient_norm, steps, float(value))

    def path(self, l2_grid, tolerance: float = 1e-6, max_steps: int = 1000) -> Iterator[Solution]:
        """`solve` for every l2, strongest first, each from the last one's solution."""
        start = None
        for l2 in descending(l2_grid):
            solution = self.solve(l2, start=start, tolerance=tolerance, max_steps=max_steps)
            start = solution.head
            yield solution


def descending(l2_grid) -> list[float]:
    """The different penalties of a grid, strongest first.

    Raises:
        ValueError: the grid is empty.
    """
    grid = sorted({float(l2) for l2 in l2_grid}, reverse=True)
    if not grid:
        raise ValueError("the grid of l2 is empty")
    return grid


@dataclass(frozen=True)
class Candidate:
    """One l2 of the grid: its solve and its validation score."""

    l2: float
    validation_score: float
    converged: bool
    gradient_norm: float
    n_steps: int


@dataclass(frozen=True)
class Selection:
    """The head chosen on the validation records."""

    head: LinearHead
    l2: float
    candidates: list[Candidate]
    """One per l2 of the grid, strongest penalty first."""
    at_edge: str | None
    """The end of the grid that l2 is, "strongest" or "weakest" (a wider grid may do better), or None."""

    @property
    def chosen(self) -> Candidate:
        """The candidate that won."""
        return next(c for c in self.candidates if c.l2 == self.l2)

    @property
    def converged(self) -> bool:
        """Whether the chosen head's solve reached the tolerance."""
        return self.chosen.converged


def crop_weights(record) -> np.ndarray:
    """Weight 1 / (crops of its record) per crop, so that a long recording counts no more than a short one."""
    record = np.asarray(record)
    return 1.0 / np.bincount(record)[record]


def select(
    solutions: Iterable[Solution], score: Callable[[LinearHead], float], lower_is_better: bool = False
) -> Selection:
    """The solution with the best validation score; of equal ones the strongest penalty.

    Args:
        solutions: for falling l2, at least one.
        score: of a head on the validation records; NaN where it is undefined.
        lower_is_better: as for a mean absolute error.

    Raises:
        ValueError: no score is defined.
    """
    sign = -1 if lower_is_better else 1
    best, best_score, candidates = None, -np.inf, []
    for solution in solutions:
        value = score(solution.head)
        candidates.append(
            Candidate(solution.l2, value, solution.converged, solution.gradient_norm, solution.n_steps)
        )
        if sign * value > best_score:
            best, best_score = solution, sign * value
    if best is None:
        raise ValueError("no validation score is defined")
    at_edge = None
    if len(candidates) > 1 and best.l2 in (candidates[0].l2, candidates[-1].l2):
        at_edge = "strongest" if best.l2 == candidates[0].l2 else "weakest"
    return Selection(best.head, best.l2, candidates, at_edge)
