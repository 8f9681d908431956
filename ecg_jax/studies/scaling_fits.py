"""Fits of the curves of a scaling study over each axis, their verdicts, and what of them goes into scaling.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.correlation import Correlation, correlate
from ecg_jax.studies.power_law import SAME_SIZE, fit_many
from ecg_jax.studies.scaling_bootstrap import (
    HeldOut,
    ModelComparison,
    ScalingFit,
    bootstrap_fit,
    compare_models,
    predict_largest,
)
from ecg_jax.studies.scaling_points import AXES, ERROR, Curve, axis_of, populations

WITHOUT, WITH = "power law", "power law with offset"
#: Curves are drawn so many times beyond the largest size, dashed.
BEYOND = 4.0
#: Exponents of the validation loss over recordings that the paper reports (arXiv:2605.12241); the recordings, the
#: sizes and the training behind them are not those of any study here.
PUBLISHED = {"cpc": 0.189, "jepa": 0.062}
PUBLISHED_IN = "arXiv:2605.12241"


@dataclass(frozen=True)
class Fitted:
    """A curve over one axis.

    Attributes:
        curve: the points.
        axis: of `scaling_points.AXES`.
        x: [P], where each run lies; None where it is not known of all.
        at: [P], what was fitted over: x, of a compute axis the geometric mean of the runs of one rung.
        forms: form -> fit; {} where there is none.
        held_out: form -> prediction of the largest rung.
        comparison: of models; None on other axes than recordings, and for a single rung.
        remark: why there is no fit, or none of its own; "" if there is one.
    """

    curve: Curve
    axis: str
    x: np.ndarray | None
    at: np.ndarray | None
    forms: dict[str, ScalingFit]
    held_out: dict[str, HeldOut]
    comparison: ModelComparison | None
    remark: str

    @property
    def described(self) -> str:
        """The form that the paper fits (spec §8): losses without offset, errors with one."""
        return WITH if self.curve.quantity == ERROR else WITHOUT

    @property
    def drawn(self) -> str | None:
        """The form to draw: the described one if the points determine it, else the one without offset if they do."""
        for form in (self.described, WITHOUT):
            if form in self.forms and self.forms[form].law.identifiable:
                return form
        return None

    @property
    def verdict(self) -> str:
        """What the points say, in a sentence."""
        if not self.forms:
            return self.remark
        law = self.forms[self.described].law
        text = law.reason or "identifiable"
        if not law.identifiable and self.drawn:
            text += f"; without offset: {self.forms[self.drawn].law.reason or 'identifiable'}"
        return f"{self.described}: {text}" + (f"; {self.remark}" if self.remark else "")


def fit_curve(
    curve: Curve, axis: str, *, hold_out: bool, resamples: int, over_recordings: Fitted | None = None
) -> Fitted:
    """Fits both forms over one axis.

    Args:
        curve: the points.
        axis: of `AXES`.
        over_recordings: the same curve over recordings, which is not fitted again over what is in proportion to them.
        hold_out: predict the largest rung from the others.
        resamples: simulated studies where a curve has no resamples of patients.
    """

    def nothing(remark: str, x=None) -> Fitted:
        return Fitted(curve, axis, x, None, {}, {}, None, remark)

    places = [axis_of(run, axis) for run in curve.runs]
    if any(place is None for place in places):
        missing = [run.name for run, place in zip(curve.runs, places, strict=True) if place is None]
        return nothing(f"no fit: {AXES[axis]} of {', '.join(missing[:3])} are not known")
    x = np.array(places, float)
    if curve.n_rungs < 2:
        return nothing("no fit: all runs are of one size", x)
    at = x if axis == "recordings" else _of_rungs(x, curve.rungs)
    if axis != "recordings":
        ratio = float((at / curve.recordings).mean())
        if over_recordings is not None and np.ptp(at / curve.recordings) <= 0.01 * ratio:
            return _stretched(over_recordings, axis, x, at, ratio)
        if np.ptp(at) <= SAME_SIZE * at.min():
            return nothing(f"no fit: {AXES[axis]} are the same at every size", x)
    sizes = np.geomspace(at.min(), BEYOND * at.max(), 80)
    settings = {"n_resamples": resamples}
    forms = {
        form: bootstrap_fit(at, curve.values, curve.resampled, offset=form == WITH, sizes=sizes, **settings)
        for form in (WITHOUT, WITH)
    }
    held = {}
    if hold_out:
        held = {
            form: predict_largest(at, curve.values, curve.resampled, offset=form == WITH, **settings)
            for form in (WITHOUT, WITH)
        }
    comparison = compare_models(at, curve.values) if axis == "recordings" else None
    return Fitted(curve, axis, x, at, forms, held, comparison, "")


def _stretched(fit: Fitted, axis: str, x: np.ndarray, at: np.ndarray, ratio: float) -> Fitted:
    """A fit over recordings, as it is over what is `ratio` times them: a' = a ratio^b."""

    def law(old):
        return old._replace(a=old.a * ratio**old.b)

    forms = {}
    for form, old in fit.forms.items():
        new = law(old.law)
        # The ends of a' would need b of every simulated study.
        a = Interval(new.a, np.nan, np.nan)
        forms[form] = old._replace(law=new, a=a, sizes=old.sizes * ratio)
    held = {
        form: old._replace(size=old.size * ratio, law=old.law and law(old.law))
        for form, old in fit.held_out.items()
    }
    remark = (
        f"{AXES[axis]}: {ratio:.4g} times the recordings at every size, so the exponent is that over recordings, and "
        "the two cannot be told apart"
    )
    return Fitted(fit.curve, axis, x, at, forms, held, None, remark)


def _of_rungs(x: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Geometric means over the runs of a rung: seeds of one size may take other times, and are of one size still."""
    means = np.bincount(rungs, np.log(x)) / np.bincount(rungs)
    return np.exp(means[rungs])


def by_kind(fits: Sequence[Fitted]) -> dict[tuple, list[Fitted]]:
    """Fits by their axis and what their values are; errors of other tasks share no picture and no correlation."""
    kinds: dict[tuple, list[Fitted]] = {}
    for fit in fits:
        curve = fit.curve
        key = (fit.axis, curve.quantity, curve.mode, curve.metric, curve.task, curve.tasks)
        kinds.setdefault(key, []).append(fit)
    return kinds


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
    losses = {each.curve.family.label: each for each in fits if each.curve.quantity == "loss"}
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
    return np.stack([np.log(fit.at), offset], axis=1)


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
        against, tuple(without),
    )  # fmt: skip


def _without_interval(found: Correlation) -> Correlation:
    """A correlation with a trend that is taken off by construction; seeds within rungs have none."""
    if found.pearson is None or found.spearman is None or found.name == "seeds within rungs":
        return found
    pearson, spearman = (Interval(each.point, np.nan, np.nan) for each in (found.pearson, found.spearman))
    remark = "; ".join(filter(None, (found.remark, BY_CONSTRUCTION)))
    return found._replace(pearson=pearson, spearman=spearman, over=(), remark=remark)


def described(fit: Fitted) -> dict[str, Any]:
    """A fit as scaling.json holds it; numbers may be NaN."""
    curve = fit.curve
    return {
        "curve": curve.family.label,
        "objective": curve.family.objective,
        "backbone": curve.family.backbone,
        "settings": curve.family.settings,
        "quantity": curve.quantity,
        "task": curve.task,
        "tasks": list(curve.tasks),
        "mode": curve.mode,
        "metric": curve.metric,
        "axis": fit.axis,
        "n_runs": len(curve.runs),
        "n_rungs": curve.n_rungs,
        "moves_with_size": list(curve.family.moving),
        "remarks": list(populations(curve.runs)),
        "points": [
            {
                "run": run.name,
                "folder": source,
                "seed": run.seed,
                "recordings": run.recordings,
                "x": None if fit.x is None else fit.x[i],
                "fitted_at": None if fit.at is None else fit.at[i],
                "value": curve.values[i],
            }
            for i, (run, source) in enumerate(zip(curve.runs, curve.sources, strict=True))
        ],
        "described_form": fit.described,
        "drawn_form": fit.drawn,
        "verdict": fit.verdict,
        "fits": {form: _form(each) for form, each in fit.forms.items()},
        "model_comparison": None if fit.comparison is None else _comparison(fit.comparison),
        "largest_held_out": {form: _held(each) for form, each in fit.held_out.items()},
        "published_exponent": published(fit),
    }


def published(fit: Fitted) -> float | None:
    """The paper's exponent for this quantity and objective, None where it reports none."""
    if fit.curve.quantity == ERROR or fit.axis != "recordings":
        return None
    objective = fit.curve.family.objective
    return PUBLISHED[objective] if objective in PUBLISHED else None  # noqa: SIM401


def _form(fit: ScalingFit) -> dict[str, Any]:
    law = fit.law
    return {
        **{name: getattr(fit, name) and getattr(fit, name)._asdict() for name in ("a", "b", "c")},
        "converged": law.converged,
        "identifiable": law.identifiable,
        "reason": law.reason,
        "b_profile": list(law.b_range),
        "c_profile": law.c_range and list(law.c_range),
        "scatter": law.scatter._asdict(),
        "intervals_over": list(fit.over),
        "runs_of_rung": fit.runs_of_rung,
        "remarks": list(fit.remarks),
        "band": {
            "x": fit.sizes.tolist(),
            "curve": fit.curve.tolist(),
            "low": fit.low.tolist(),
            "high": fit.high.tolist(),
        },
    }


def _comparison(found: ModelComparison) -> dict[str, Any]:
    return {**found._asdict(), "candidates": [each._asdict() for each in found.candidates]}


def _held(found: HeldOut) -> dict[str, Any]:
    return {
        "size": found.size,
        "observed": found.observed,
        "predicted": found.predicted and found.predicted._asdict(),
        "error": found.error,
        "inside": found.inside,
        "b": found.law and found.law.b,
        "remark": found.remark,
    }


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
