"""Pretraining loss against downstream error in a scaling study, as they are and as residuals of their curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.correlation import Correlation, correlate
from ecg_jax.studies.power_law import fit_many
from ecg_jax.studies.scaling_fits import WITH, Fitted, by_kind, remarks_on
from ecg_jax.studies.scaling_points import ERROR, LOSS


@dataclass(frozen=True)
class Correlated:
    """Pretraining loss and error of the runs of one task and mode.

    Attributes:
        task, mode, metric, tasks: of the errors.
        labels: [P], the family of each run.
        names: [P], of the runs.
        recordings: [P].
        losses, errors: [P].
        residuals: [P], log of the error over the fitted curve at its size.
        loss_residuals: [P], the same of the loss.
        against: what -> correlations: "loss and error", "loss and residual error" (without intervals: it is near 0 by
            construction), "residual loss and residual error".
        without_fit: labels of families whose error no curve was determined for; their runs have NaN residuals.
        remarks: of `remarks_on`.
    """

    task: str
    mode: str
    metric: str
    tasks: tuple[str, ...]
    labels: list[str]
    names: list[str]
    recordings: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    residuals: np.ndarray
    loss_residuals: np.ndarray
    against: dict[str, list[Correlation]]
    without_fit: tuple[str, ...]
    remarks: tuple[str, ...]


PAIRS = ("loss and error", "loss and residual error", "residual loss and residual error")
BY_CONSTRUCTION = (
    "near 0 whatever the truth: the loss is mostly a trend over the recordings, and the curve of the error took that "
    "trend off; no interval"
)


def correlations(fits: Sequence[Fitted]) -> list[Correlated]:
    """Loss against error for every kind of error, over the recordings axis.

    Args:
        fits: of losses ("loss") and errors, over recordings.
    """
    losses = {each.curve.family.label: each for each in fits if each.curve.quantity == LOSS}
    errors = [each for each in fits if each.curve.quantity == ERROR and each.curve.family.label in losses]
    return [found for own in by_kind(errors).values() if (found := _correlated(own, losses))]


def _residuals(fit: Fitted) -> np.ndarray:
    """log(value / curve) of each run; NaN where no curve is determined."""
    if fit.drawn is None:
        return np.full(len(fit.curve.values), np.nan)
    return np.log(fit.curve.values / fit.forms[fit.drawn].law.predict(fit.at))


def _resampled_residuals(fit: Fitted) -> np.ndarray:
    """The same [P, R] on resamples of the patients, each after a curve of its own; NaN where there is none."""
    resampled = fit.curve.resampled
    residuals = np.full(resampled.shape, np.nan)
    usable = (np.isfinite(resampled) & (resampled > 0)).all(axis=0)
    if fit.drawn is not None and usable.any():
        curves = fit_many(fit.at, resampled[:, usable].T, offset=fit.drawn == WITH)
        residuals[:, usable] = np.log(resampled[:, usable] / curves.predict(fit.at).T)
    return residuals


def _trends(fit: Fitted) -> np.ndarray:
    """What the curve of the error has besides its level, as columns [P, 2]: log n, and the offset's d log f / dc."""
    offset = np.zeros(len(fit.curve.values))
    if fit.drawn == WITH:
        offset = 1 / fit.forms[WITH].law.predict(fit.at)
    # Runs of a single size were fitted nowhere; over recordings x is where all others were.
    return np.stack([np.log(fit.x), offset], axis=1)


def _correlated(fits: Sequence[Fitted], losses: dict[str, Fitted]) -> Correlated | None:
    """Of one kind of error; None where no run has both."""
    rows: list[dict[str, Any]] = []
    without = []
    for fit in fits:
        curve, of_loss = fit.curve, losses[fit.curve.family.label]
        residuals, resampled_residuals, trends = _residuals(fit), _resampled_residuals(fit), _trends(fit)
        loss_of = {
            run.name: (value, residual)
            for run, value, residual in zip(
                of_loss.curve.runs, of_loss.curve.values, _residuals(of_loss), strict=True
            )
        }
        if fit.drawn is None:
            without.append(curve.family.label)
        for i, run in enumerate(curve.runs):
            if run.name in loss_of:
                loss, loss_residual = loss_of[run.name]
                rows.append(
                    {
                        "label": curve.family.label, "name": run.name, "recordings": run.recordings,
                        "rung": int(curve.rungs[i]), "loss": loss, "error": curve.values[i],
                        "residual": residuals[i], "loss_residual": loss_residual, "resampled": curve.resampled[i],
                        "resampled_residual": resampled_residuals[i], "trends": trends[i],
                    }
                )  # fmt: skip
    if not rows:
        return None
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    with np.errstate(divide="ignore", invalid="ignore"):
        log_resampled = np.log(columns["resampled"])
    logs = {"loss": np.log(columns["loss"]), "error": np.log(columns["error"])}
    pairs = (
        (logs["loss"], logs["error"], log_resampled, None),
        (logs["loss"], columns["residual"], columns["resampled_residual"], None),
        (columns["loss_residual"], columns["residual"], columns["resampled_residual"], columns["trends"]),
    )
    against: dict[str, list[Correlation]] = {}
    for pair, (x, y, others, trends) in zip(PAIRS, pairs, strict=True):
        known = np.isfinite(x) & np.isfinite(y)
        against[pair] = []
        if known.any():
            against[pair] = correlate(
                x[known],
                y[known],
                groups=columns["label"][known].tolist(),
                rungs=columns["rung"][known].tolist(),
                resampled_y=others[known],
                trends=None if trends is None else trends[known],
            )
    against[PAIRS[1]] = [_without_interval(each) for each in against[PAIRS[1]]]
    curve = fits[0].curve
    return Correlated(
        curve.task, curve.mode, curve.metric, curve.tasks, columns["label"].tolist(), columns["name"].tolist(),
        columns["recordings"], columns["loss"], columns["error"], columns["residual"], columns["loss_residual"],
        against, tuple(without), remarks_on(fits),
    )  # fmt: skip


def _without_interval(found: Correlation) -> Correlation:
    """A correlation with a trend that is taken off by construction; seeds within rungs have none."""
    if found.pearson is None or found.spearman is None or found.name == "seeds within rungs":
        return found
    pearson, spearman = (Interval(each.point, np.nan, np.nan) for each in (found.pearson, found.spearman))
    remark = "; ".join(filter(None, (found.remark, BY_CONSTRUCTION)))
    return found._replace(pearson=pearson, spearman=spearman, over=(), remark=remark)


def correlated(found: Correlated) -> dict[str, Any]:
    """Correlations as scaling.json holds them."""
    return {
        "task": found.task,
        "mode": found.mode,
        "metric": found.metric,
        "tasks": list(found.tasks),
        "without_fit": list(found.without_fit),
        "runs": found.names,
        "correlations": {
            pair: [
                {
                    **each._asdict(),
                    "pearson": each.pearson and each.pearson._asdict(),
                    "spearman": each.spearman and each.spearman._asdict(),
                }
                for each in own
            ]
            for pair, own in found.against.items()
        },
    }
