"""Ridge regression of several targets, each with its own unknown values, in closed form for a whole grid of penalties.

For target k with weight w_k, intercept b_k and standardised features x̃ = (x − μ)/σ,

    minimise  ½ Σ_i v_ik (y_ik − w_k·x̃_i − b_k)² / Σ_i v_ik  +  (l2/2) |w_k|²,

where v_ik is the weight of crop i, zero where the target is NaN. With C the weighted covariance of x̃ over the known
crops of a target and c its covariance with the target, w = (C + l2 I)⁻¹ c: one eigendecomposition of C serves all
penalties, and all targets that are known for the same crops. With unit weights, scikit-learn's `Ridge(alpha=l2 * n)`
on x̃ has the same solution.
"""

from collections.abc import Iterator

import numpy as np

from ecg_jax.evaluation.heads import LinearHead, Solution, _blocks, descending, standardise


class RidgeProblem:
    """The objective above on one set of training features.

    Args:
        features: float [n, D].
        targets: float [n, K], NaN where unknown; every target needs two known values.
        weights: [n] weight of each crop, None for equal ones.

    Raises:
        ValueError: shapes differ, a feature is not finite, or a target is known for fewer than two crops.
    """

    def __init__(self, features, targets, weights=None):
        features, targets = np.asarray(features), np.asarray(targets, dtype=np.float64)
        n = len(features)
        if targets.ndim != 2 or len(targets) != n:
            raise ValueError(f"features {features.shape} need targets [{n}, K], not {targets.shape}")
        known = ~np.isnan(targets)
        if (known.sum(axis=0) < 2).any():
            few = np.flatnonzero(known.sum(axis=0) < 2).tolist()
            raise ValueError(f"targets {few} are known for fewer than two training crops")
        weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
        standard = standardise(features, weights)
        self.mean, self.scale = standard.mean, standard.scale
        self.n_targets = targets.shape[1]
        # Targets that are known for the same crops share a covariance and its eigenvectors.
        _, group = np.unique(known, axis=1, return_inverse=True)
        group = np.ravel(group)
        self._groups = [
            (columns, *self._moments(features, targets[:, columns], weights * known[:, columns[0]]))
            for columns in (np.flatnonzero(group == g) for g in range(group.max() + 1))
        ]

    def _moments(self, features, targets, weights):
        """(axes [D, D], eigenvalues [D], axes' covariance with the targets [D, K], means [D] and [K]), standardised."""
        width, n_targets = features.shape[1], targets.shape[1]
        weights = weights / weights.sum()
        sums = np.zeros(width + n_targets)
        products = np.zeros((width, width + n_targets))
        y = np.where(weights[:, None] > 0, targets, 0.0)
        y_guess = weights @ y
        for rows in _blocks(len(features)):
            x = (features[rows] - self.mean) / self.scale
            both = np.hstack([x, y[rows] - y_guess])
            sums += weights[rows] @ both
            products += (x * weights[rows, None]).T @ both
        covariance = products - np.outer(sums[:width], sums)
        eigenvalues, axes = np.linalg.eigh(covariance[:, :width])
        along = axes.T @ covariance[:, width:]
        return axes, np.clip(eigenvalues, 0.0, None), along, sums[:width], y_guess + sums[width:]

    def solve(self, l2: float) -> Solution:
        """The solution for one l2, above 0.

        Raises:
            ValueError: l2 not above 0.
        """
        if not l2 > 0:
            raise ValueError(f"l2 is {l2}, it must be above 0")
        weight, bias, gradient = np.zeros((len(self.mean), self.n_targets)), np.zeros(self.n_targets), 0.0
        for columns, axes, eigenvalues, along, x_mean, y_mean in self._groups:
            rotated = along / (eigenvalues + l2)[:, None]
            weight[:, columns] = axes @ rotated
            bias[columns] = y_mean - x_mean @ weight[:, columns]
            residual = (eigenvalues + l2)[:, None] * (axes.T @ weight[:, columns]) - along
            gradient = max(gradient, float(np.abs(residual).max()))
        raw = weight / self.scale[:, None]
        # One step of a closed form; the gradient left is rounding.
        return Solution(
            LinearHead(raw, bias - self.mean @ raw), float(l2), True, gradient, 1, self._value(weight, l2)
        )

    def _value(self, weight, l2: float) -> float:
        """Sum of the objective over targets, up to the variance of the targets, which no weight changes."""
        value = 0.5 * l2 * float(np.sum(weight**2))
        for columns, axes, eigenvalues, along, _, _ in self._groups:
            rotated = axes.T @ weight[:, columns]
            value += float(np.sum(0.5 * eigenvalues[:, None] * rotated**2 - along * rotated))
        return value

    def path(self, l2_grid) -> Iterator[Solution]:
        """`solve` for every l2, strongest first."""
        for l2 in descending(l2_grid):
            yield self.solve(l2)
