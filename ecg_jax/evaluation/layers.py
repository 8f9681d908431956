"""A learned mixture of the layers of an encoder under one linear head.

The features are Σ_l s_l x̃_l with s = softmax(a) and x̃_l the standardised features of layer l (Peters et al., NAACL
2018, equation 1), standardised once more by the head. For given s the head is a convex problem; with its weight w in
the coordinates of the mixture, the gradient of the whole objective J with respect to s is, by the envelope theorem,

    ∂J/∂s_l = Σ_i r_i · (x̃_l,i w) + l2 Σ_dk w_dk² (C_d s)_l,        r_i = ∂loss/∂logits_i,

where C_d is the covariance between layers of feature d (the penalty is on the weight in units of the mixture's standard
deviation). The few numbers a are found by L-BFGS on that gradient, each step with a solve that starts from the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ecg_jax.evaluation.heads import LinearHead, LogisticProblem, Solution, _blocks, descending, standardise
from ecg_jax.evaluation.ridge import RidgeProblem

#: Evaluations of the objective for each penalty: a handful of weights need no more.
_EVALUATIONS = 20


@dataclass(frozen=True)
class MixtureFit:
    """A mixture and its head for one l2."""

    mixture: dict[str, float]
    """Layer -> s_l; they sum to one."""
    weights: dict[str, np.ndarray]
    """Layer -> float64 [D, K] on the raw features of that layer."""
    bias: np.ndarray
    """float64 [K]."""
    solution: Solution
    """Of the head, on the mixed features."""
    converged: bool
    """Whether the weights s did, within `_EVALUATIONS`; `solution` says it of the head for these weights."""


class Mixture:
    """The problem above on one set of training features.

    Args:
        features: layer -> float [n, D], all of one width.
        targets: [n, K]; as in `LogisticProblem`, of a regression as in `RidgeProblem`.
        weights: [n] weight of each crop.
        regression: whether the loss is the squared error.

    Raises:
        ValueError: layers of different widths, or as in the problem of the head.
    """

    def __init__(self, features: dict[str, np.ndarray], targets, weights, regression: bool):
        self.names = tuple(features)
        if len({array.shape for array in features.values()}) != 1:
            widths = {name: array.shape[1] for name, array in features.items()}
            raise ValueError(f"a mixture needs layers of one width, not {widths}")
        self.targets, self.sample_weights, self.regression = (
            targets,
            np.asarray(weights, np.float64),
            regression,
        )
        self.standards = {name: standardise(array, weights) for name, array in features.items()}
        self.features = {
            name: ((array - self.standards[name].mean) / self.standards[name].scale).astype(np.float32)
            for name, array in features.items()
        }
        share = self.sample_weights / self.sample_weights.sum()
        n_layers, width = len(self.names), next(iter(features.values())).shape[1]
        self.covariance = np.zeros((width, n_layers, n_layers))
        for i, first in enumerate(self.names):
            for j, second in enumerate(self.names[: i + 1]):
                products = np.einsum("n,nd,nd->d", share, self.features[first], self.features[second])
                self.covariance[:, i, j] = self.covariance[:, j, i] = products

    def _mixed(self, s: np.ndarray) -> np.ndarray:
        """float32 [n, D]."""
        return sum(
            np.float32(weight) * self.features[name] for name, weight in zip(self.names, s, strict=True)
        )

    def _solve(self, s, l2: float, start: LinearHead | None, tolerance: float, max_steps: int) -> Solution:
        mixed = self._mixed(s)
        if self.regression:
            return RidgeProblem(mixed, self.targets, self.sample_weights).solve(l2)
        problem = LogisticProblem(mixed, self.targets, self.sample_weights)
        return problem.solve(l2, start=start, tolerance=tolerance, max_steps=max_steps)

    def _gradient(self, s: np.ndarray, head: LinearHead, l2: float) -> tuple[float, np.ndarray]:
        """(J, ∂J/∂s [n_layers]) at the head that is best for s."""
        known = ~np.isnan(self.targets)
        total = sum(self.sample_weights[rows] @ known[rows] for rows in _blocks(len(known)))
        value, gradient = 0.0, np.zeros(len(s))
        for rows in _blocks(len(self.targets)):
            of_layer = [self.features[name][rows].astype(np.float64) @ head.weight for name in self.names]
            z = sum(weight * each for weight, each in zip(s, of_layer, strict=True)) + head.bias
            y = np.where(known[rows], self.targets[rows], 0.0)
            v = self.sample_weights[rows, None] * known[rows] / total
            if self.regression:
                loss, residual = 0.5 * (z - y) ** 2, z - y
            else:
                loss, residual = np.logaddexp(0.0, z) - y * z, 1 / (1 + np.exp(-np.clip(z, -700, 700))) - y
            value += float(np.sum(v * loss))
            gradient += [float(np.sum(v * residual * each)) for each in of_layer]
        squares = np.sum(head.weight**2, axis=1)  # [D]
        spread = np.einsum("d,dlm,m->l", squares, self.covariance, s)
        return value + 0.5 * l2 * float(s @ spread), gradient + l2 * spread

    def path(self, l2_grid, tolerance: float = 1e-6, max_steps: int = 1000) -> Iterator[MixtureFit]:
        """The mixture and head of every l2, strongest first, each from the last one's.

        Starts from equal weights; J is not convex in a, so this is a local optimum.
        """
        a, head = np.zeros(len(self.names)), None
        for l2 in descending(l2_grid):
            a, solution, converged = self._fit(a, head, l2, tolerance, max_steps)
            head, s = solution.head, _softmax(a)
            weights, bias = {}, solution.head.bias.copy()
            for name, weight in zip(self.names, s, strict=True):
                standard = self.standards[name]
                weights[name] = weight * solution.head.weight / standard.scale[:, None]
                bias -= standard.mean @ weights[name]
            mixture = dict(zip(self.names, s.tolist(), strict=True))
            yield MixtureFit(mixture, weights, bias, solution, converged)

    def _fit(self, a, head: LinearHead | None, l2: float, tolerance: float, max_steps: int):
        """(a, solution of the head, whether a converged) for one l2."""
        from scipy.optimize import minimize

        latest = {"head": head}

        def objective(a):
            s = _softmax(a)
            latest["head"] = self._solve(s, l2, latest["head"], tolerance, max_steps).head
            value, gradient = self._gradient(s, latest["head"], l2)
            return value, s * (gradient - s @ gradient)

        # Bounds keep a softmax from running off to weights that are zero for ever.
        bounds = [(-10.0, 10.0)] * len(a)
        options = {"maxfun": _EVALUATIONS, "maxiter": _EVALUATIONS, "gtol": 10 * tolerance}
        found = minimize(objective, a, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        solution = self._solve(_softmax(found.x), l2, latest["head"], tolerance, max_steps)
        return found.x, solution, bool(found.success)


def _softmax(a: np.ndarray) -> np.ndarray:
    powers = np.exp(a - a.max())
    return powers / powers.sum()
