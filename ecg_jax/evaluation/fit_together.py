"""Logistic heads of many classes, tasks or subsets and of a whole grid of penalties, solved as one JAX program.

The problems are those of `heads.LogisticProblem`; here each pair of a class and a penalty is a problem of its own, with
its own L-BFGS history and line search, and `jax.vmap` makes one matrix product for all of them. In whitened
coordinates, Z = x̃ V and weight V (h ⊙ u), one step of one problem is

    d = −H g  (two-loop recursion),   ζ = Z (h ⊙ d),   t = argmin_t φ(t),
    u ← u + t d,   z ← z + t ζ,   g = h ⊙ (Zᵀ r(z) + l2 h ⊙ u),

where φ(t) is the objective along d: the logits z + t ζ are linear in t, so the line search passes over n numbers and
multiplies no matrix. The first steps are in float32, the rest in float64, so that the gradient that decides on
convergence is the true one.

On one CPU core, 8000 crops of width 512, 71 classes and 8 penalties take 5.9 s of processor time so, 26 s with
`heads.LogisticProblem.path` and 138 s one problem after the other with this program
(tests/benchmarks/results/2026-11-21-heads.md). On a CPU each run of the program takes all classes under one penalty:
all penalties in one run took 16 s, as strong penalties need 6 steps and weak ones 46. Not measured on a GPU or TPU.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.evaluation import metrics
from ecg_jax.evaluation.heads import (
    LinearHead,
    Solution,
    Standardisation,
    _blocks,
    check_targets,
    descending,
    standardise,
)

_HISTORY = 10
#: Where float32 hands over to float64: its gradients are known to about 1e-6.
_HANDOVER = 3e-5
#: Bytes of one [problems, n] array: there are about eight of them.
_BYTES_AT_ONCE = 1 << 28
_FLOAT32_TOLERANCE = 1e-4
#: Bytes of the features in float64 from which on they are read in blocks, which only "lbfgs" does.
_LARGEST_FEATURES = 1 << 32
#: Below it "lbfgs" takes less than the 4 s that the program takes to compile (one CPU core).
_SMALL_PROBLEM = 5e8


def faster_solver(n_rows: int, width: int, n_classes: int, n_penalties: int) -> str:
    """The faster solver of `linear.fit_linear` for such a problem on this platform, "lbfgs" or "vmap".

    "vmap" wherever the features fit into memory in float64, except for small problems on a CPU, which are solved before
    the program is compiled. Targets take no part: they are taken up for as many classes at once as fit.
    """
    if 8 * n_rows * width > _LARGEST_FEATURES:
        return "lbfgs"
    small = n_rows * width * n_classes * n_penalties < _SMALL_PROBLEM
    return "lbfgs" if small and jax.default_backend() == "cpu" else "vmap"


@dataclass(frozen=True)
class Together:
    """Heads on raw features, for G penalties and K classes."""

    l2: np.ndarray
    """float64 [G], strongest first."""
    weight: np.ndarray
    """float64 [G, D, K]."""
    bias: np.ndarray
    """float64 [G, K]."""
    gradient_norm: np.ndarray
    """float64 [G, K], largest |gradient| in standardised coordinates."""
    n_steps: np.ndarray
    """int [G, K]."""
    objective: np.ndarray
    """float64 [G, K]."""
    tolerance: float
    """What was asked for, or 1e-4 where the device has no float64."""

    @property
    def converged(self) -> np.ndarray:
        """bool [G, K]."""
        return self.gradient_norm <= self.tolerance


def fit_together(
    features,
    targets,
    weights=None,
    l2_grid=(1.0,),
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    standard: Standardisation | None = None,
    penalties_at_once: int | None = None,
    record=None,
) -> Together:
    """Solves every class under every penalty in one program.

    Args:
        features: float [n, D].
        targets: [n, K] of 0, 1, and NaN where unknown or where a row is not of the class's task.
        weights: [n] weight of each row, or [n, K] where classes are of different tasks or subsets of the rows; None for
            equal ones.
        l2_grid: G penalties above 0.
        tolerance: the largest |gradient| that counts as converged, of each problem. 1e-4 where that is more and the
            device has no float64 (TPU).
        max_steps: of L-BFGS; at most half of them in float32.
        standard: of the features; None for that of all rows, under `weights` if they are [n].
        penalties_at_once: how many a run of the program takes; None for all, on a CPU one (all classes in each).
        record: as in `heads.LogisticProblem`; `weights` are those of crops.

    Raises:
        ValueError: shapes differ, a feature is not finite, a class has no positive or no negative, l2 not above 0.
    """
    features, targets = np.asarray(features), np.asarray(targets)
    n, n_classes = len(features), targets.shape[-1]
    check_targets(features, targets, record)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if standard is None:
        standard = standardise(features, weights if weights.ndim == 1 else np.ones(n))
    used = targets
    if weights.ndim == 2 or not weights.all():
        used = np.where(weights.reshape(n, -1) > 0, targets if record is None else targets[record], np.nan)
    if missing := np.flatnonzero(~metrics.has_both_kinds(used)).tolist():
        raise ValueError(f"classes {missing} have no positive or no negative among the training targets")
    l2 = np.array(descending(l2_grid))
    if not (l2 > 0).all():
        raise ValueError(f"l2 is {l2.min()}, it must be above 0")
    # Rows without weight, so that subsets and tasks of nearly the same size share a program.
    padding = (0, _round_up(n) - n)
    Z = np.zeros((n + padding[1], features.shape[1]))
    for rows in _blocks(n):
        Z[rows] = ((features[rows] - standard.mean) / standard.scale) @ standard.axes

    def of_classes(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets, 0 where unknown, and weights that sum to one, of some classes: float64 [len(chunk), n]."""
        some = targets[:, chunk].T if record is None else targets[:, chunk].T[:, record]
        known = ~np.isnan(some)
        v = known * (weights if weights.ndim == 1 else weights[:, chunk].T)
        v /= v.sum(axis=1, keepdims=True)
        y = np.where(known, some, 0.0).astype(np.float64)
        return tuple(np.pad(array, ((0, 0), padding)) for array in (y, v))

    double = jax.default_backend() != "tpu"
    tolerance = float(tolerance if double else max(tolerance, _FLOAT32_TOLERANCE))
    together = penalties_at_once or _penalties_at_once(len(l2))
    groups = [l2[first : first + together] for first in range(0, len(l2), together)]
    at_once = int(min(n_classes, max(1, _BYTES_AT_ONCE // (8 * len(Z) * together))))
    # Chunks of one size compile once; the last is filled up with classes that were solved before.
    chunks = [np.arange(first, first + at_once) % n_classes for first in range(0, n_classes, at_once)]
    # Without it a GPU multiplies float32 with 10 bits of mantissa and a TPU with 7.
    precise = jax.default_matmul_precision("highest")
    with precise, jax.enable_x64(True) if double else contextlib.nullcontext():
        shared = [jnp.asarray(array) for array in (Z, standard.eigenvalues, standard.axes)]

        def solve(chunk: np.ndarray) -> list[np.ndarray]:
            """Everything about some classes, [K, G, ...] each."""
            of_chunk = *of_classes(chunk), tolerance, max_steps
            solved = [jax.device_get(_solve(*shared, some, *of_chunk, double=double)) for some in groups]
            return [np.concatenate(parts, axis=1) for parts in zip(*solved, strict=True)]

        rotated, bias, gradient_norm, n_steps, objective = (
            np.concatenate(parts)[:n_classes] for parts in zip(*map(solve, chunks), strict=True)
        )
    raw = np.einsum("dc,kgc->gdk", standard.axes, rotated.astype(np.float64)) / standard.scale[:, None]
    bias = bias.T - np.einsum("d,gdk->gk", standard.mean, raw)
    return Together(l2, raw, bias, gradient_norm.T, n_steps.T, objective.T, tolerance)


def _penalties_at_once(n_penalties: int) -> int:
    # A CPU gains nothing from more columns, and strong penalties would wait there for the weak ones to converge.
    return 1 if jax.default_backend() == "cpu" else n_penalties


def _round_up(n: int) -> int:
    """The next number with no more than four significant bits: at most 1/8 more."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


def path_together(
    features, targets, weights, l2_grid, tolerance: float = 1e-6, max_steps: int = 1000, record=None
):
    """The same as `heads.LogisticProblem.path`: one `heads.Solution` of all classes for each l2, strongest first."""
    fits = fit_together(features, targets, weights, l2_grid, tolerance, max_steps, record=record)
    return [
        Solution(
            LinearHead(fits.weight[g], fits.bias[g]),
            float(l2),
            bool(fits.converged[g].all()),
            float(fits.gradient_norm[g].max()),
            int(fits.n_steps[g].max()),
            float(fits.objective[g].sum()),
        )
        for g, l2 in enumerate(fits.l2)
    ]


class _State(NamedTuple):
    """One problem between two steps."""

    u: jax.Array  # [D + 1], whitened weight and, last, bias
    z: jax.Array  # [n] logits
    gradient: jax.Array  # [D + 1], of u
    norm: jax.Array  # largest |gradient| in standardised coordinates
    moves: jax.Array  # [m, D + 1], the last steps of u, oldest first
    changes: jax.Array  # [m, D + 1], what the gradient changed by
    n_steps: jax.Array


class _Problem(NamedTuple):
    """What one problem is: targets and weights of the rows, penalty, whitening."""

    y: jax.Array  # [n]
    v: jax.Array  # [n], sums to one
    l2: jax.Array
    h: jax.Array  # [D + 1]


def _loss(problem: _Problem, z):
    return jnp.sum(problem.v * (jnp.logaddexp(0.0, z) - problem.y * z))


def _gradient(Z, axes, problem: _Problem, u, z):
    """(gradient of u, largest |gradient| in standardised coordinates)."""
    residual = problem.v * (jax.nn.sigmoid(z) - problem.y)
    rotated = Z.T @ residual + problem.l2 * problem.h[:-1] * u[:-1]
    bias = residual.sum()
    norm = jnp.maximum(jnp.abs(axes @ rotated).max(), jnp.abs(bias))
    return problem.h * jnp.append(rotated, bias), norm


def _logits(Z, problem: _Problem, u):
    whitened = problem.h * u
    return Z @ whitened[:-1] + whitened[-1]


def _direction(state: _State):
    """−H g by the two-loop recursion (Nocedal and Wright, algorithm 7.4); a pair without curvature is no pair."""
    curvature = jnp.sum(state.moves * state.changes, axis=1)
    valid = curvature > 0
    rho = jnp.where(valid, 1 / jnp.where(valid, curvature, 1.0), 0.0)

    def back(q, pair):
        move, change, rho = pair
        alpha = rho * (move @ q)
        return q - alpha * change, alpha

    def forth(r, pair):
        move, change, rho, alpha = pair
        return r + move * (alpha - rho * (change @ r)), None

    pairs = (state.moves, state.changes, rho)
    q, alpha = jax.lax.scan(back, state.gradient, pairs, reverse=True)
    last = jnp.sum(state.changes[-1] ** 2)
    scale = jnp.where(valid[-1], curvature[-1] / jnp.where(last > 0, last, 1.0), 1.0)
    r, _ = jax.lax.scan(forth, scale * q, (*pairs, alpha))
    return -r


def _line_search(problem: _Problem, u, z, d, along):
    """t > 0 near the minimum of the convex φ(t), by Newton steps between brackets, from t = 1."""
    weight, step = problem.h[:-1] * u[:-1], problem.h[:-1] * d[:-1]
    linear, square = problem.l2 * (weight @ step), problem.l2 * (step @ step)

    def slope(t):
        p = jax.nn.sigmoid(z + t * along)
        first = jnp.sum(problem.v * (p - problem.y) * along) + linear + t * square
        return first, jnp.sum(problem.v * p * (1 - p) * along**2) + square

    start = slope(0.0 * linear)[0]

    def search(carry):
        t, low, high, _, count = carry
        first, second = slope(t)
        low, high = jnp.where(first < 0, t, low), jnp.where(first < 0, high, t)
        done = jnp.abs(first) <= 0.2 * jnp.abs(start)
        newton = t - first / jnp.maximum(second, 1e-30)
        middle = jnp.where(jnp.isinf(high), 4 * t, 0.5 * (low + high))
        inside = (newton > low) & (newton < jnp.minimum(high, 10 * t))
        return jnp.where(done, t, jnp.where(inside, newton, middle)), low, high, done, count + 1

    one = jnp.ones_like(linear)
    begin = (one, 0 * one, jnp.inf * one, start == 0, 0)
    return jax.lax.while_loop(lambda c: ~c[3] & (c[4] < 20), search, begin)[0]


@functools.partial(jax.jit, static_argnames=("double",))
def _solve(Z, eigenvalues, axes, l2, y, v, tolerance, max_steps, *, double: bool):
    """(rotated weight [K, G, D], bias [K, G], gradient norm [K, G], steps [K, G], objective [K, G]).

    Args:
        Z: [n, D] standardised features along their axes.
        eigenvalues, axes: [D] and [D, D].
        l2: [G].
        y, v: [K, n].
    """
    prevalence = jnp.sum(y * v, axis=1)
    curvature = prevalence * (1 - prevalence)

    def whitening(curvature, l2):
        return jnp.append(1 / jnp.sqrt(eigenvalues * curvature + l2), 1 / jnp.sqrt(curvature))

    def over_problems(function, problem_axes):
        """vmap over classes (outer) and penalties (inner) of function(problem, state)."""
        inner = jax.vmap(function, in_axes=(_Problem(None, None, 0, 0), 0))
        return jax.vmap(inner, in_axes=(problem_axes, 0))

    by_class = _Problem(0, 0, None, 0)
    h = jax.vmap(jax.vmap(whitening, (None, 0)), (0, None))(curvature, l2)
    odds = jnp.log(prevalence / (1 - prevalence))
    u = jnp.zeros_like(h).at[..., -1].set(odds[:, None] / h[..., -1])

    def loop(dtype, u, moves, changes, n_steps, until, most):
        Z_, axes_ = Z.astype(dtype), axes.astype(dtype)
        problem = _Problem(y.astype(dtype), v.astype(dtype), l2.astype(dtype), h.astype(dtype))

        def begin(problem, parts):
            u, moves, changes, n_steps = parts
            z = _logits(Z_, problem, u)
            return _State(u, z, *_gradient(Z_, axes_, problem, u, z), moves, changes, n_steps)

        def step(problem, state):
            # Of a problem that has converged, or may take no more steps, nothing moves.
            active = (state.norm > until) & (state.n_steps < most)
            d = jnp.where(active, _direction(state), 0.0)
            along = _logits(Z_, problem, d)
            t = _line_search(problem, state.u, state.z, d, along)
            u, z = state.u + t * d, state.z + t * along
            gradient, norm = _gradient(Z_, axes_, problem, u, z)
            moves = jnp.concatenate([state.moves[1:], (t * d)[None]])
            changes = jnp.concatenate([state.changes[1:], (gradient - state.gradient)[None]])
            return _State(u, z, gradient, norm, moves, changes, state.n_steps + active)

        parts = jax.tree.map(lambda a: a.astype(dtype), (u, moves, changes))
        states = over_problems(begin, by_class)(problem, (*parts, n_steps))

        def unfinished(states):
            return ((states.norm > until) & (states.n_steps < most)).any()

        return jax.lax.while_loop(
            unfinished, functools.partial(over_problems(step, by_class), problem), states
        )

    history = jnp.zeros((*h.shape[:2], _HISTORY, h.shape[2]))
    n_steps = jnp.zeros(h.shape[:2], jnp.int32)
    until = jnp.maximum(tolerance, _HANDOVER) if double else tolerance
    # A problem that stalls in float32 must leave steps for float64.
    states = loop(jnp.float32, u, history, history, n_steps, until, max_steps // 2 if double else max_steps)
    if double:
        parts = states.u, states.moves, states.changes, states.n_steps
        states = loop(jnp.float64, *parts, jnp.asarray(tolerance), max_steps)

    def finish(problem, state):
        whitened = problem.h * state.u
        value = _loss(problem, state.z) + 0.5 * problem.l2 * jnp.sum(whitened[:-1] ** 2)
        return whitened[:-1], whitened[-1], state.norm, state.n_steps, value

    return over_problems(finish, by_class)(_Problem(y, v, l2, h), states)
