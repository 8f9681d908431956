"""Correlation of pretraining loss and downstream error over the runs of a study.

Runs of one objective and rung that differ by their seed only are nearly one point, and counting each would make a
trend over 5 rungs look like one of 15: the unit is the cell (objective, rung) with the mean of its runs. Losses of
different objectives are not comparable (spec §8), so across objectives only deviations from each objective's own mean
are correlated. Loss and error both fall with the number of recordings, which alone makes them correlate; whether a
lower loss goes with a lower error at the same rung is what the seeds within rungs say. Residuals of fitted curves have
lost a degree of freedom for every parameter, and of few rungs they are alike by construction (all residuals of a line
through 3 points are multiples of one vector): the trends that were fitted are taken off both sides again, and counted.

Intervals: with Fisher's z = artanh r, draws tanh(z + (z_p − mean z_p) + normal / sqrt(m − 2 − k)) for m units of
which k means and trends are taken off (a partial correlation's, Fisher 1924), z_p on resamples of the patients; for
ranks the variance is (1 + r²/2) times that (Bonett & Wright 2000). Of residuals of curves, 5 to 15 of 3 to 5 rungs,
these held the truth 92 to 96 % of the time, and without the trends counted 78 % (15 curves of 3 rungs).

Drawing runs with replacement instead has intervals that are too short: of normal points with one objective, 5 rungs
and a single seed, 95 % percentile intervals of Pearson's r held 83 to 91 % of the time, with each point there three
times as if it were three runs 52 to 58 %, these 94 to 97 % (ranks 98 to 100 %); over several objectives with 3 to 5
rungs 93 to 95 % (ranks 92 to 97 %, and 83 to 90 % where r is 0.9, which ranks of so few understate).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval, interval

LEVEL = 0.95


class Correlation(NamedTuple):
    """One correlation, or why there is none."""

    name: str
    """The group, or "all runs", "within curves", "seeds within rungs"."""
    pearson: Interval | None
    spearman: Interval | None
    n_runs: int
    n_units: int
    """Cells, or runs where seeds are compared."""
    over: tuple[str, ...]
    """What the intervals contain: some of "runs", "recordings"."""
    remark: str
    """What to know of it, or why there is no number; "" if nothing."""


def _centred(values, codes) -> np.ndarray:
    """Values [..., m] less the mean of their group, codes [m]."""
    onehot = np.eye(int(codes.max()) + 1)[codes]
    return values - (values @ onehot / onehot.sum(axis=0)) @ onehot.T


def _ranked(values, codes) -> np.ndarray:
    """Ranks [..., m] within each group, ties sharing their mean."""
    from scipy.stats import rankdata

    ranks = np.empty(np.shape(values))
    for code in np.unique(codes):
        members = codes == code
        ranks[..., members] = rankdata(np.asarray(values)[..., members], axis=-1)
    return ranks


def _correlation(x, y) -> np.ndarray:
    """Correlation of centred values; NaN where one does not vary."""
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (x * y).sum(axis=-1) / scale, np.nan)


def _interval(x, y, resampled, codes, dof: int, ranks: bool, n_resamples: int, generator) -> Interval | None:
    """Interval of the correlation of deviations from the groups' means; None if one of them does not vary."""
    from scipy.special import ndtri

    arrange = _ranked if ranks else (lambda values, codes: values)
    x = _centred(arrange(x, codes), codes)
    point = float(_correlation(x, _centred(arrange(y, codes), codes)))
    if np.isnan(point):
        return None
    # Perfect order is one of finitely many: half a swap of neighbours away from it, or rounding.
    edge = 1 - (0.5 / (x**2).sum() if ranks else 1e-12)
    z = np.arctanh(np.clip(point, -edge, edge))
    # Quantiles of the normal in random order: draws of it would have ends of their own, the same in every study.
    normal = generator.permutation(ndtri((np.arange(n_resamples) + 0.5) / n_resamples))
    draws = z + normal * np.sqrt((1 + point**2 / 2 if ranks else 1) / dof)
    if resampled is not None:
        others = _correlation(x, _centred(arrange(resampled, codes), codes))
        z_others = np.arctanh(np.clip(others, -edge, edge))
        # Resampling adds noise to noise and so weakens every correlation: only how it spreads counts.
        draws = draws + z_others - np.nanmean(z_others)
    found = interval(point, np.tanh(draws), LEVEL)
    # A perfect order was taken half a swap back, and its interval ends there.
    return Interval(point, min(found.low, point), max(found.high, point))


def _less_trends(trends, codes):
    """What takes the mean and the trends [m, K] off each group, [m, m], and its number of parameters by group."""
    off, parameters = np.zeros((len(codes), len(codes))), []
    for code in range(int(codes.max()) + 1):
        own = np.flatnonzero(codes == code)
        vectors, scale, _ = np.linalg.svd(np.c_[np.ones(len(own)), trends[own]], full_matrices=False)
        vectors = vectors[:, scale > 1e-9 * scale[0]]
        off[np.ix_(own, own)] = np.eye(len(own)) - vectors @ vectors.T
        parameters.append(vectors.shape[1])
    return off, np.array(parameters)


def _one(name, x, y, resampled, codes, n_runs, n_resamples, generator, remark="", trends=0) -> Correlation:
    """The correlation of units x, y [m] (resampled [R, m]) less the means of the groups codes [m], with `trends`
    parameters besides those means taken off already."""
    over = ("runs",) if resampled is None else ("runs", "recordings")
    taken = int(codes.max()) + 1 + trends
    dof = len(x) - 2 - taken
    if dof < 1:
        needed = f"{len(x)} points" + (f" less {taken} that were fitted" if taken > 1 else "")
        return Correlation(
            name, None, None, n_runs, len(x), over, f"too few points for an interval: {needed}"
        )
    both = [_interval(x, y, resampled, codes, dof, ranks, n_resamples, generator) for ranks in (False, True)]
    if both[0] is None or both[1] is None:
        return Correlation(name, None, None, n_runs, len(x), over, "the loss or the error does not vary")
    return Correlation(name, both[0], both[1], n_runs, len(x), over, remark)


def correlate(
    x,
    y,
    *,
    groups: Sequence[str],
    rungs: Sequence,
    resampled_y=None,
    trends=None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[Correlation]:
    """Pearson and Spearman correlations of x and y with intervals.

    Args:
        x: [P], pretraining loss of each run; pass logarithms where power laws are expected.
        y: [P], its downstream error; likewise.
        groups: [P], what makes losses comparable, a curve: the objective, with backbone or settings if these differ.
        rungs: [P], its rung (any label that is equal for runs of the same size).
        resampled_y: [P, R], y on R resamples of the patients, the same for all runs; None: over runs only. Resamples
            with a value that is not finite are left out.
        trends: [P, K], of residuals: what was fitted to each group besides its level (a column of zeros: not fitted
            there). It is taken off x and y within each group, and each trend takes a degree of freedom.
        n_resamples: number of draws without `resampled_y`.
        seed: of NumPy's default generator.

    Returns:
        "all runs" (with a warning if there are several groups; not of residuals of several, which are within each
        already), "within curves" (if there are several groups), every group in order of appearance, and "seeds within
        rungs" (cells' means taken off). Where there are too few points the intervals are None and the remark says why.

    Raises:
        ValueError: shapes that do not match or values that are not finite.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (x.ndim == 1 and x.shape == y.shape == (len(groups),) == (len(rungs),) and len(x)):
        raise ValueError(
            f"{x.shape} x, {y.shape} y, {len(groups)} groups and {len(rungs)} rungs do not match"
        )
    if not np.isfinite(np.stack([x, y])).all():
        raise ValueError("a correlation needs finite values")
    resampled = None
    if resampled_y is not None:
        resampled = np.asarray(resampled_y, dtype=np.float64)
        if resampled.ndim != 2 or len(resampled) != len(x):
            raise ValueError(f"resampled values {resampled.shape} are not one row for each of {len(x)} runs")
        resampled = resampled[:, np.isfinite(resampled).all(axis=0)].T
        if not len(resampled):
            raise ValueError("no resample has a finite value for every run")
        n_resamples = len(resampled)
    generator = np.random.default_rng(seed)
    names = list(dict.fromkeys(groups))
    cells = list(dict.fromkeys(zip(groups, rungs, strict=True)))
    cell = np.array([cells.index(each) for each in zip(groups, rungs, strict=True)])
    mean = np.eye(len(cells))[cell] / np.bincount(cell)
    group = np.array([names.index(each) for each, _ in cells])
    x_cell, y_cell = x @ mean, y @ mean
    resampled_cell = None if resampled is None else resampled @ mean
    extra = np.zeros(len(names), dtype=np.int64)
    if trends is not None:
        off, parameters = _less_trends(mean.T @ np.asarray(trends, dtype=np.float64), group)
        x_cell, y_cell, extra = x_cell @ off, y_cell @ off, parameters - 1
        resampled_cell = None if resampled is None else resampled_cell @ off

    def over_cells(name, members, codes, remark=""):
        some = None if resampled_cell is None else resampled_cell[:, members]
        runs = int(np.isin(cell, np.flatnonzero(members)).sum())
        fitted = int(extra[np.unique(group[members])].sum())
        return _one(
            name, x_cell[members], y_cell[members], some, codes, runs, n_resamples, generator, remark, fitted
        )

    everything = np.ones(len(cells), dtype=bool)
    found = []
    if trends is None or len(names) == 1:
        several = "curves are mixed, and losses of different objectives have other scales" * (len(names) > 1)
        found.append(over_cells("all runs", everything, np.zeros(len(cells), dtype=np.int64), several))
    if len(names) > 1:
        found.append(over_cells("within curves", everything, group))
    for code, name in enumerate(names):
        members = group == code
        found.append(over_cells(name, members, np.zeros(members.sum(), dtype=np.int64)))
    repeated = np.bincount(cell)[cell] > 1
    if repeated.any():
        some = None if resampled is None else resampled[:, repeated]
        codes = np.unique(cell[repeated], return_inverse=True)[1]
        found.append(
            _one(
                "seeds within rungs",
                x[repeated],
                y[repeated],
                some,
                codes,
                int(repeated.sum()),
                n_resamples,
                generator,
            )
        )
    return found
