"""What the figures of a scaling study say, and what they do not."""

from collections.abc import Sequence

import numpy as np

from ecg_jax.evaluation.bootstrap import Interval
from ecg_jax.studies.scaling_fits import Fitted, remarks_on
from ecg_jax.studies.scaling_points import ERROR

#: Simulated studies: tests/benchmarks/results/2026-11-22-scaling-coverage.md.
OFF_THE_CURVE = (
    "Few sizes, or sizes of other recordings, may lie off every such curve by as much as seeds differ without that it "
    "shows: then what is called a 95 % interval held the exponent 92 % of the time with 5 sizes and 84 % with 3 "
    "(simulated)."
)


def shown(value: Interval) -> str:
    """A number with its interval."""
    if not np.isfinite([value.low, value.high]).all():
        return f"{value.point:.3g} (no interval)"
    return f"{value.point:.3g} ({value.low:.3g} to {value.high:.3g})"


def one_by_one(fit: Fitted) -> str:
    """A curve in a sentence, without its full stop."""
    name = fit.curve.family.label
    if fit.drawn is None:
        return f"{name}: {fit.verdict}"
    found = fit.forms[fit.drawn]
    text = f"{name}: b = {shown(found.b)}"
    if found.c is not None:
        text += f", c = {shown(found.c)}"
    text += f" from {len(fit.curve.runs)} runs of {fit.curve.n_rungs} sizes"
    if fit.drawn != fit.described:
        text += f", without offset, as with one it is {fit.forms[fit.described].law.reason}"
    if found.law.reason:
        text += f" ({found.law.reason})"
    if fit.comparison is not None and fit.comparison.best is not None:
        text += f"; best by AICc: {fit.comparison.best}"
    if fit.drawn in fit.held_out and fit.held_out[fit.drawn].predicted is not None:
        held = fit.held_out[fit.drawn]
        text += (
            f"; without the largest size the curve predicts {shown(held.predicted)} there, "
            f"and {held.observed:.3g} was found ({100 * held.error:+.1f} %)"
        )
        if held.law.reason and held.law.reason != found.law.reason:
            text += f", though of the smaller sizes {held.law.reason}"
    return text


def in_short(fits: Sequence[Fitted]) -> list[str]:
    """Many curves in a few sentences, without their full stops; each with its interval is in the table of fits."""
    drawn = [fit for fit in fits if fit.drawn]
    said = []
    for objective in dict.fromkeys(fit.curve.family.objective for fit in drawn):
        own = [fit for fit in drawn if fit.curve.family.objective == objective]
        b = [fit.forms[fit.drawn].b for fit in own]
        names = ", ".join(fit.curve.family.label.removeprefix(f"{objective} ") for fit in own)
        each = ", ".join(f"{value.point:.3g} ({value.low:.3g} to {value.high:.3g})" for value in b)
        said.append(f"Exponents b of {objective} ({names}): {each}")
    missing: dict[str, list[str]] = {}
    for fit in fits:
        if fit.drawn is None:
            missing.setdefault(fit.identified, []).append(fit.curve.family.label)
    said += [f"No curve is determined for {', '.join(names)} ({why})" for why, names in missing.items()]
    plain = [fit.curve.family.label for fit in drawn if fit.drawn != fit.described]
    if plain:
        said.append(f"Drawn without offset, as three parameters are not identifiable: {', '.join(plain)}")
    held = [fit.held_out[fit.drawn] for fit in drawn if fit.drawn in fit.held_out]
    if held := [each for each in held if each.predicted is not None]:
        errors = [100 * each.error for each in held]
        inside = sum(each.inside for each in held)
        said.append(
            f"Without the largest size the curves predict it {min(errors):+.1f} to {max(errors):+.1f} % off, and in "
            f"{inside} of {len(held)} cases it lies in the predicted interval"
        )
    return said


def limits(fits: Sequence[Fitted]) -> str:
    """What curves do not show, from what is known of their runs."""
    runs = [run for fit in fits for run in fit.curve.runs]
    said = []
    if any(fit.curve.quantity != ERROR for fit in fits):
        said.append(
            "Losses of different objectives have different scales and targets (of teachers, of codes) and are not "
            "comparable: neither their heights nor, strictly, their exponents."
        )
    said.append(_of_updates(fits))
    drawn = [fit for fit in fits if fit.drawn]
    if drawn:
        fewest = min(fit.curve.n_rungs for fit in drawn)
        said.append(
            f"A curve through {fewest} sizes is a description of those; what is dashed has been measured by nobody."
        )
        if fewest <= 4 or len({run.fingerprints["store"] for run in runs}) > 1:
            said.append(OFF_THE_CURVE)
    seeds = min((len({run.seed for run in fit.curve.runs}) for fit in drawn), default=0)
    if any(fit.axis == "device_hours" for fit in fits):
        said.append(
            "Device-hours hold compilation, validation and checkpoints, which weigh most in short runs, and compare "
            "only runs on the same devices, alone on their machine; seeds of a size are fitted at their mean, and the "
            "intervals take that for exact: how long the same run takes another time is not in them."
        )
    if seeds == 1:
        said.append(
            "With one seed a size, how much seeds differ is read off the scatter about the curve, which is right only "
            "if the curve is."
        )
    if warned := {run.name for run in runs if run.warnings}:
        said.append(f"{len(warned)} of these runs warned of a collapse while they trained.")
    if moving := list(
        dict.fromkeys(name for fit in fits for name in fit.curve.family.moving if _is_told(name))
    ):
        said.append(f"Settings move with the size, and cannot be told from it: {', '.join(moving[:6])}.")
    return " ".join([*said, *sentences(remarks_on(fits))])


def sentences(remarks: Sequence[str]) -> list[str]:
    """Remarks with capitals and full stops."""
    return [f"{text[0].upper()}{text[1:]}." for text in remarks]


def _is_told(name: str) -> bool:
    """Whether a field that moves with the size is not said otherwise."""
    return name not in ("store_fingerprint", "steps", "epochs")


def _of_updates(fits: Sequence[Fitted]) -> str:
    """How training windows go with recordings."""
    ratios, constant = [], True
    for fit in fits:
        windows = np.array([run.windows for run in fit.curve.runs], float)
        ratios.append(windows / fit.curve.recordings)
        constant &= np.ptp(windows) <= 0.01 * windows.mean()
    every = np.concatenate(ratios)
    if np.ptp(every) <= 0.05 * every.mean():
        return (
            f"Every run saw {every.mean():.3g} windows of each recording, so the number of updates grows with the "
            "number of recordings, and the effects of data and of training cannot be told apart."
        )
    if constant:
        return (
            "Every size was trained for the same number of windows, so that small sizes saw each recording more often "
            f"({every.max():.3g} to {every.min():.3g} times): these are exponents at this length of training."
        )
    times = f"{every.min():.3g} to {every.max():.3g} times"
    return f"Runs saw each recording {times}: data and training move together in part."
