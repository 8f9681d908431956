"""Power laws of a loss or an error over size, and what the points of a study can say about them.

    f(n) = a n^(−b) + c,      a > 0,  0 <= b <= 2,  0 <= c < f(largest n)

(Hestness et al., arXiv:1712.00409; spec §8: the pretraining loss without c, the downstream error with it). n is the
number of recordings, of windows, or the compute. Residuals are of the logarithm, so that a per cent counts the same at
every size, with the loss 2 s² (sqrt(1 + (r/s)²) − 1) (soft L1) that lets a run gone astray pull with a bounded force.

The parameters of the search are A = f(n_max), b, and the share φ = c / A that no amount of data removes, because
log f = log A + log((1 − φ) (n/n_max)^(−b) + φ) is linear in log A and both others have plain bounds. The minimum over
a fixed grid of (b, φ) starts a damped Gauss-Newton iteration, for any number of resamples at once.
"""

from typing import NamedTuple

import numpy as np

#: Largest exponent; published exponents of losses and errors over data are 0.05 to 0.5.
MAX_EXPONENT = 2.0
#: Largest share of the value at the largest size that the offset may take: beyond it the curve is a constant.
MAX_SHARE = 0.99
#: Runs whose sizes differ by less than this share are of one rung (seeds may draw a few recordings more or less).
SAME_SIZE = 0.05
#: Corner of the soft L1 loss, in robust standard deviations of the residuals: bounds the pull of a run gone astray and
#: is least squares for the others.
CORNER = 3.0
#: With fewer runs to spare than this the fit is by least squares: which of 5 points is the one that is off cannot be
#: told, and 95 % intervals of robust fits to 5 single runs held the exponent 92 to 93 % of the time.
ROBUST_FROM = 5
#: Smallest corner, in log units: residuals below 0.01 % are rounding, and exact values have none.
MIN_CORNER = 1e-4
#: Lack of fit with a smaller p-value keeps the scatter of rungs and the spread of seeds apart (Bancroft 1964); with one
#: rung to spare, whose scatter alone makes intervals of t with one degree of freedom, the p-value must be smaller.
POOLING = {True: 0.25, False: 0.05}
_STEPS = 60


class Fits(NamedTuple):
    """Curves of R resamples; each field is [R]."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    converged: np.ndarray

    def predict(self, n) -> np.ndarray:
        """Values [R, M] of every curve at the sizes n [M]."""
        n = np.asarray(n, dtype=np.float64)
        return self.a[:, None] * n ** -self.b[:, None] + self.c[:, None]


class Scatter(NamedTuple):
    """How far runs lie from a fitted curve, in natural logarithms (0.01 is one per cent)."""

    sd: float
    """Standard deviation of one run, or of all runs of a rung together times the root of their number."""
    dof: int
    """Degrees of freedom of `sd`; 0: the points say nothing of it and `sd` is 0."""
    together: bool
    """Whether the runs of a rung deviate together: rungs lie off the curve further than their seeds explain."""
    lack_of_fit: float | None
    """p-value of the F test that they do; None without repeated seeds or without a rung to spare."""


class PowerLaw(NamedTuple):
    """One fitted curve with what can be said about it."""

    a: float
    b: float
    c: float
    """0 for a fit without offset."""
    offset: bool
    """Whether c was fitted."""
    converged: bool
    flat: bool
    """Whether the values are the same at every size."""
    identifiable: bool
    reason: str
    """One sentence: why it is not identifiable, or what to know of it; "" if there is nothing to say."""
    b_range: tuple[float, float]
    """Exponents that the points do not exclude: 95 % profile interval by the F distribution, over runs only."""
    c_range: tuple[float, float] | None
    """The same of the offset; None for a fit without."""
    scatter: Scatter
    n_sizes: int

    def predict(self, n) -> np.ndarray:
        """Values of the curve at sizes n."""
        return self.a * np.asarray(n, dtype=np.float64) ** -self.b + self.c


def rungs_of(n) -> np.ndarray:
    """The rung of every run, int [P], 0 for the smallest: sizes closer than `SAME_SIZE` are of one rung."""
    n = np.asarray(n, dtype=np.float64)
    order = np.argsort(n, kind="stable")
    ordered = n[order]
    rung = np.empty(len(n), dtype=np.int64)
    rung[order] = np.concatenate([[0], np.cumsum(ordered[1:] > (1 + SAME_SIZE) * ordered[:-1])])
    return rung


def _checked(n, values) -> tuple[np.ndarray, np.ndarray]:
    n, values = np.asarray(n, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if n.ndim != 1 or values.shape[-1:] != n.shape or not len(n):
        raise ValueError(f"sizes {n.shape} and values {values.shape} are not one for one")
    for name, each in (("sizes", n), ("values", values)):
        if not (np.isfinite(each) & (each > 0)).all():
            raise ValueError(f"a power law needs positive {name}")
    return n, values


def _log_shape(x, b, share):
    """log((1 − φ) e^(−b x) + φ) for x = log(n / n_max); the arguments are broadcast."""
    return np.log((1 - share) * np.exp(-b * x) + share)


def _axes(offset: bool) -> tuple[np.ndarray, np.ndarray]:
    """Exponents and shares among which a search begins."""
    b = np.concatenate([[0.0], np.geomspace(0.004, MAX_EXPONENT, 48)])
    share = np.concatenate([np.linspace(0, 0.9, 25), np.linspace(0.92, MAX_SHARE, 6)])
    return b, share if offset else np.zeros(1)


def _cost(residuals, corner):
    if np.isinf(corner):
        return (residuals**2).sum(axis=-1)
    return 2 * corner**2 * (np.sqrt(1 + (residuals / corner) ** 2) - 1).sum(axis=-1)


def weights_of(residuals, corner: float) -> np.ndarray:
    """Weights of log residuals in the robust loss, 1 for least squares (an infinite corner)."""
    return np.ones_like(residuals) if np.isinf(corner) else 1 / np.sqrt(1 + (residuals / corner) ** 2)


def _start(x, y, offset: bool) -> np.ndarray:
    """The best point (log A, b, φ) of the grid by least squares, for every row of y: [R, 3]."""
    grid = [each.ravel() for each in np.meshgrid(*_axes(offset), indexing="ij")]
    shapes = _log_shape(x, grid[0][:, None], grid[1][:, None])
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    # The residual sum of squares less what does not depend on the grid point.
    best = ((centred**2).sum(axis=1) - 2 * y @ centred.T).argmin(axis=1)
    return np.stack([(y - shapes[best]).mean(axis=1), grid[0][best], grid[1][best]], axis=1)


def _refine(x, y, at, free: tuple[bool, bool], corner: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise the robust loss over log A and what is free of (b, φ), for every row of y.

    Args:
        x: [P], log(n / n_max).
        y: [R, P], log values.
        at: [R, 3], where to start; what is not free stays there.
        free: whether b and φ are searched.
        corner: of the soft L1 loss; infinite for least squares.

    Returns:
        (parameters [R, 3] of log A, b, φ; cost [R]; converged [R]).
    """
    at = np.array(at)
    upper = np.array([np.inf, MAX_EXPONENT, MAX_SHARE])
    lower = np.array([-np.inf, 0.0, 0.0])
    searched = np.array([True, *free])
    damping = np.full(len(y), 1e-3)
    residuals = y - at[:, :1] - _log_shape(x, at[:, 1:2], at[:, 2:])
    cost = _cost(residuals, corner)
    active = np.ones(len(y), dtype=bool)
    for _ in range(_STEPS):
        rows = np.flatnonzero(active)
        if not rows.size:
            break
        here, r = at[rows], residuals[rows]
        falling = np.exp(-here[:, 1:2] * x)
        value = (1 - here[:, 2:]) * falling + here[:, 2:]
        jacobian = np.stack(
            [np.ones_like(r), -(1 - here[:, 2:]) * falling * x / value, (1 - falling) / value], axis=2
        )
        weighted = jacobian * weights_of(r, corner)[:, :, None]
        gradient = np.einsum("rpi,rp->ri", weighted, r)
        matrix = np.einsum("rpi,rpj->rij", weighted, jacobian)
        # A parameter at a bound that would go beyond it stays there.
        held = ~searched | ((here <= lower) & (gradient <= 0)) | ((here >= upper) & (gradient >= 0))
        gradient = np.where(held, 0.0, gradient)
        matrix = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix)
        diagonal = np.einsum("rii->ri", matrix)
        matrix = (
            matrix + np.eye(3) * (damping[rows, None] * diagonal + np.where(held, 1.0, 1e-14))[:, :, None]
        )
        step = np.linalg.solve(matrix, gradient[:, :, None])[:, :, 0]
        there = np.clip(here + step, lower, upper)
        new = y[rows] - there[:, :1] - _log_shape(x, there[:, 1:2], there[:, 2:])
        new_cost = _cost(new, corner)
        better = new_cost <= cost[rows]
        taken = rows[better]
        # No step worth taking, or no change of the cost beyond rounding.
        settled = (np.abs(there - here).max(axis=1) < 1e-9) | (
            np.abs(new_cost - cost[rows]) <= 1e-11 * cost[rows]
        )
        at[taken], residuals[taken], cost[taken] = there[better], new[better], new_cost[better]
        damping[rows] = np.where(better, np.maximum(damping[rows] / 10, 1e-12), damping[rows] * 10)
        active[rows] = ~settled & (damping[rows] < 1e10)
    return at, cost, ~active


def _natural(n_max: float, at: np.ndarray, converged: np.ndarray) -> Fits:
    """The curves of search parameters [R, 3]."""
    largest = np.exp(at[:, 0])
    return Fits((1 - at[:, 2]) * largest * n_max ** at[:, 1], at[:, 1], at[:, 2] * largest, converged)


def fit_many(n, values, *, offset: bool, corner: float = np.inf) -> Fits:
    """Curves through R sets of values at the same sizes.

    Args:
        n: [P], sizes, several runs of one size allowed.
        values: [R, P], positive.
        offset: whether c is fitted; else it is 0.
        corner: of the soft L1 loss in log units; infinite (least squares) for resamples of a fitted curve, which
            hold no outliers.

    Raises:
        ValueError: shapes that do not match, or sizes or values that are not positive.
    """
    n, values = _checked(n, values)
    x, y = np.log(n / n.max()), np.log(values)
    at, _, converged = _refine(x, y, _start(x, y, offset), (True, offset), corner)
    return _natural(n.max(), at, converged)


def scatter_of(residuals, rung, n_parameters: int, corner: float) -> Scatter:
    """Spread of runs about their curve of `n_parameters`, from log residuals [P] and rungs [P]; see `Scatter`.

    With ψ the bounded residuals of the robust loss, mean squares are of ψ / mean(ψ'), which is the residual itself in
    least squares and has the variance of the robust estimate otherwise (Huber 1973).
    """
    from scipy.special import fdtrc

    weight = weights_of(residuals, corner)
    pulled = residuals * weight / (weight**3).mean()
    runs, sizes = len(residuals), int(rung.max()) + 1
    counts = np.bincount(rung, minlength=sizes)
    means = np.bincount(rung, pulled, minlength=sizes) / counts
    within, between = float(((pulled - means[rung]) ** 2).sum()), float((counts * means**2).sum())
    dof, spare, repeats = runs - n_parameters, sizes - n_parameters, runs - sizes
    if repeats <= 0 or spare <= 0:
        # Without repeated seeds all scatter is that of rungs; without a rung to spare the seeds are all there is.
        dof = max(spare, 0) if repeats <= 0 else repeats
        square = (between if repeats <= 0 else within) / dof if dof else 0.0
        return Scatter(float(np.sqrt(square)), dof, False, None)
    ratio = (between / spare) / (within / repeats) if within > 0 else (np.inf if between > 0 else 0.0)
    p = float(fdtrc(spare, repeats, ratio))
    if p < POOLING[spare > 1]:
        return Scatter(float(np.sqrt(between / spare)), spare, True, p)
    return Scatter(float(np.sqrt((within + between) / dof)), dof, False, p)


def robust_fit(n, values, *, offset: bool) -> tuple[Fits, np.ndarray, np.ndarray, float]:
    """One robust fit, without a verdict.

    Args:
        n, values, offset: as in `fit_power_law`.

    Returns:
        (curve, R = 1; its log value, exponent and share at the largest size; log residuals [P]; corner of the loss).
    """
    n, values = _checked(n, values)
    if values.ndim != 1:
        raise ValueError("one value for each size; fit_many takes rows of them")
    x, y = np.log(n / n.max()), np.log(values)
    spare = len(n) - 2 - offset
    corner, at = np.inf, _start(x, y[None], offset)
    for _ in range(6):
        at, _, converged = _refine(x, y[None], at, (True, offset), corner)
        residuals = (y - at[0, 0]) - _log_shape(x, at[0, 1], at[0, 2])
        if spare < ROBUST_FROM:
            break
        sd = 1.4826 * np.median(np.abs(residuals)) * np.sqrt(len(n) / spare)
        before, corner = corner, max(CORNER * sd, MIN_CORNER)
        if abs(before - corner) < 0.01 * corner:
            break
    return _natural(n.max(), at, converged), at[0], residuals, corner


def _profile(x, y, at, residuals, corner, scatter: Scatter, which: int, offset: bool) -> np.ndarray:
    """Values of parameter `which` (1: b, 2: φ) that the points allow, with the curve there: [2, 3], low and high.

    {θ: min over the others of cost(θ) <= cost + σ² F(0.95; 1, ν)}, its ends found on a grid that is made finer once
    in the cells where they lie (Bates & Watts 1988, §6.1). An end beyond a bound is the bound.
    """
    from scipy.special import fdtri

    bound = (np.inf, MAX_EXPONENT, MAX_SHARE)[which]
    free = (which != 1, offset and which != 2)
    slope = float((weights_of(residuals, corner) ** 3).mean())
    limit = float(_cost(residuals, corner)) + slope * scatter.sd**2 * fdtri(1, scatter.dof, 0.95)
    # A sum of squares of rounding errors has no interval.
    limit += 1e-12 * len(y)

    others = _axes(offset)[2 - which]

    def curves(values):
        pairs = (np.repeat(values, len(others)), np.tile(others, len(values)))
        b, share = pairs if which == 1 else pairs[::-1]
        shapes = _log_shape(x, b[:, None], share[:, None])
        costs = ((y - shapes - (y - shapes).mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        best = costs.reshape(len(values), -1).argmin(axis=1) + len(others) * np.arange(len(values))
        starts = np.stack([(y - shapes[best]).mean(axis=1), b[best], share[best]], axis=1)
        return _refine(x, np.tile(y, (len(values), 1)), starts, free, corner)

    here = at[which]
    ends = []
    for end in (0.0, bound):
        inside, outside, found = here, end, at
        for finer in range(3):
            # Finer towards the estimate: intervals are mostly much shorter than the way to the bound.
            steps = np.linspace(0, 1, 25) ** (2 if finer == 0 else 1)
            values = inside + (outside - inside) * steps
            fitted, cost, _ = curves(values)
            beyond = np.flatnonzero(cost > limit)
            if not beyond.size:
                found = fitted[-1]
                break
            first = max(int(beyond[0]), 1)
            inside, outside, found = values[first - 1], values[first], fitted[first - 1]
        ends.append(found)
    return np.array(ends)


def decided(law: PowerLaw, b_range, share_range) -> PowerLaw:
    """The law with its verdict: whether the points determine it, and the reason.

    Args:
        law: fitted.
        b_range, share_range: exponents, and shares of the offset in the value at the largest size (None without
            offset), that are not excluded, of whatever the verdict is to hold for.
    """
    offset, needed, (low, high) = law.offset, 3 + law.offset, b_range
    no_offset = offset and share_range[0] <= 0
    bound = f"the bound of {MAX_EXPONENT:g}"
    nothing = "an exponent of 0, so no scaling at all, is not excluded"
    too_few = f"{needed - 1} parameters need at least {needed} distinct sizes, there are {law.n_sizes}"
    for so, why in (
        (law.n_sizes < needed, too_few),
        (law.flat, "the values are the same at every size"),
        (not law.scatter.dof, "no degree of freedom is left to tell noise from curve"),
        (not law.converged, "the search for the best curve did not end"),
        (offset and low <= 0, f"{nothing}, and then a and c are one number"),
        (high >= MAX_EXPONENT and (offset or low <= 0), f"exponents from {low:.3g} to {bound} fit as well"),
        (no_offset and share_range[1] >= 0.95, "an offset of none and of all of the value fit as well"),
    ):
        if so:
            return law._replace(identifiable=False, reason=f"not identifiable: {why}")
    for so, what in (
        (law.b == 0, "the values do not fall with size: the exponent is at its bound 0"),
        (low <= 0, nothing),
        (high >= MAX_EXPONENT, f"the exponent reaches {bound}"),
        (no_offset, "an offset of 0 is not excluded: a power law without offset may do"),
    ):
        if so:
            return law._replace(identifiable=True, reason=what)
    return law._replace(identifiable=True, reason="")


def fit_power_law(n, values, *, offset: bool) -> PowerLaw:
    """Robust fit of a power law with a verdict whether the points determine it.

    Args:
        n: [P], sizes, several runs (seeds) of one size allowed.
        values: [P], losses or errors, positive.
        offset: whether c is fitted; else it is 0.

    Returns:
        The curve. It is not identifiable if there are fewer sizes than parameters and one, if the values are constant,
        if the exponents that the points allow reach from bound to bound, or with an offset, if they reach either bound
        (a and c are then not told apart) or the offset may be anything from none to all of the value.

    Raises:
        ValueError: as in `fit_many`; or values of more than one row.
    """
    fits, at, residuals, corner = robust_fit(n, values, offset=offset)
    n, values = _checked(n, values)
    rung = rungs_of(n)
    sizes = int(rung.max()) + 1
    scatter = scatter_of(residuals, rung, 2 + offset, corner)
    a, b, c, converged = (each[0].item() for each in fits)
    x, y = np.log(n / n.max()), np.log(values)
    b_range, c_range, share_range = (0.0, MAX_EXPONENT), None, None
    if offset:
        share_range, c_range = (0.0, 1.0), (0.0, float(np.exp(at[0])))
    if scatter.dof and sizes > 1:
        low, high = _profile(x, y, at, residuals, corner, scatter, 1, offset)[:, 1]
        b_range = (float(low), float(high))
        if offset:
            ends = _profile(x, y, at, residuals, corner, scatter, 2, True)
            share_range = tuple(ends[:, 2])
            c_range = tuple((ends[:, 2] * np.exp(ends[:, 0])).tolist())
    flat = float(np.ptp(y)) < 1e-9
    law = PowerLaw(a, b, c, offset, converged, flat, False, "", b_range, c_range, scatter, sizes)
    return decided(law, b_range, share_range)
