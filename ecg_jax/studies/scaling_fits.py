"""Fits of the curves of a scaling study over each axis, their verdicts, and what of them goes into scaling.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.power_law import SAME_SIZE
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
    def identified(self) -> str:
        """What the points say of the parameters, form by form until one is determined."""
        if not self.forms:
            return self.remark
        law = self.forms[self.described].law
        text = law.reason or "identifiable"
        if not law.identifiable and self.described != WITHOUT:
            text += f"; without offset: {self.forms[WITHOUT].law.reason or 'identifiable'}"
        return f"{self.described}: {text}"

    @property
    def verdict(self) -> str:
        """What the points say, in a sentence."""
        return f"{self.identified}; {self.remark}" if self.forms and self.remark else self.identified


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


def remarks_on(fits: Sequence[Fitted]) -> tuple[str, ...]:
    """Sentences on the recordings that fits rest on: other ones at other sizes, made-up ones."""
    said = populations([run for fit in fits for run in fit.curve.runs])
    if any(fit.curve.synthetic for fit in fits):
        said += ("errors are of SYNTHETIC test recordings: they say nothing about ECGs",)
    return said


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
        "remarks": list(remarks_on([fit])),
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
