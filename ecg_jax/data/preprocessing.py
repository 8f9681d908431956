"""The preprocessing contract: what was done to a signal, as data to be stored, compared and executed."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

from ecg_jax.data.recording import (
    CANONICAL_LEADS,
    LIMB_TOLERANCE_MV,
    BadRecording,
    Problem,
    Recording,
    canonical_index,
    check_amplitude,
    limb_residual,
    to_canonical,
)
from ecg_jax.errors import UserError, closest

MICROVOLTS_PER_MV = 1000.0
INT16_MAX = 32767

# Shorter recordings cannot fill the 2.5 s window of the published recipes; they are kept and flagged.
SHORT_S = 2.5

# A lead that does not move for so long has lost its electrode: baseline noise alone changes every recorder's
# last bit.
PARTLY_FLAT_S = 1.0

# Below, the QRS complex itself is gone; above, no ECG recorder works and the header is wrong.
MIN_RATE_HZ, MAX_RATE_HZ = 50, 20_000

NAN_RULE = "interpolate: linear inside, zero before the first and hold after the last valid sample, per lead"
RESAMPLER = "soxr VHQ per lead in float64, odd reflection at both ends, floor(T * rate_hz / rate) samples"


@dataclasses.dataclass(frozen=True)
class Processed:
    """A recording after `Preprocessing.apply`.

    Attributes:
      signal: int16 [T', 12] microvolts.
      missing: bool [12], leads that are neither in the file nor derivable; their samples are zero.
      derived: bool [12], limb leads computed from two others.
      flat: bool [12], leads that were in the file without any signal.
      saturated: samples at the converter's limit in the file, clipped at `clip_mv`, or beyond int16
        microvolts.
      problems: those of the recording and those found here.
    """

    signal: np.ndarray
    missing: np.ndarray
    derived: np.ndarray
    flat: np.ndarray
    saturated: int
    problems: list[Problem]

    @property
    def missing_mask(self) -> int:
        """Bit i set: canonical lead i is missing."""
        return int(sum(1 << int(i) for i in np.flatnonzero(self.missing)))

    @property
    def flags(self) -> list[str]:
        """The kinds of all problems, sorted, without repetition."""
        return sorted({p.kind for p in self.problems})


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The executable contract between files, stores, checkpoints and embeddings.

    Attributes:
      leads: lead names in the order of the last axis.
      unit: unit of the values a model sees. Stores hold int16 microvolts, a thousandth of it.
      rate_hz: samples per second after resampling.
      nan_rule: what happens to NaN samples.
      resampler: how the rate is changed.
      clip_mv: values beyond +-clip_mv are set to it (after resampling); None clips nothing.
      window_s: seconds of a crop; None in a store, set by a training run.
      normalisation: name of the input normalisation of a training run; "none" in a store.
      kept_leads: those of `leads` that a training run sees, in their order; the others are zero microvolts to it, as a
        missing lead is in a store. All of them in a store, and in contracts from before there was a choice.
    """

    leads: tuple[str, ...] = CANONICAL_LEADS
    unit: str = "mV"
    rate_hz: float = 240.0
    nan_rule: str = NAN_RULE
    resampler: str = RESAMPLER
    clip_mv: float | None = None
    window_s: float | None = None
    normalisation: str = "none"
    kept_leads: tuple[str, ...] = CANONICAL_LEADS

    def to_dict(self) -> dict:
        """The contract as JSON-able values; `kept_leads` only where some lead is left out."""
        values = dataclasses.asdict(self) | {"leads": list(self.leads), "kept_leads": list(self.kept_leads)}
        if self.kept_leads == CANONICAL_LEADS:
            # A contract of all leads stays what it was before there was a choice, and so do the keys made of it.
            del values["kept_leads"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """The contract from `to_dict`.

        Raises:
          UserError: a field is missing or unknown, or `kept_leads` are not leads in canonical order.
        """
        values = {"kept_leads": list(CANONICAL_LEADS)} | values
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        if missing or unknown:
            raise UserError(
                f"The preprocessing contract has missing fields {missing} and unknown fields {unknown}; "
                "it was written by another version of ecg_jax."
            )
        kept = tuple(values["kept_leads"])
        # A name that no lead has would be a lead that is left out.
        if not kept or kept != tuple(lead for lead in CANONICAL_LEADS if lead in kept):
            raise UserError(
                f"The preprocessing contract has kept_leads={list(kept)}; they must be some of "
                f"{', '.join(CANONICAL_LEADS)}, spelt and ordered like this and each once."
            )
        return cls(**{**values, "leads": tuple(values["leads"]), "kept_leads": kept})

    def check_compatible(
        self, other: Preprocessing, this: str = "the first", that: str = "the second"
    ) -> None:
        """Checks that signals made under both contracts mean the same.

        Window, normalisation and kept leads belong to a run, not to the stored signals, and are not compared.

        Args:
          other: the contract to compare with.
          this: how to call the owner of `self` in the message.
          that: how to call the owner of `other`.

        Raises:
          UserError: names the fields that differ, with both values.
        """
        differing = [
            f"{name} is {getattr(self, name)!r} in {this} but {getattr(other, name)!r} in {that}"
            for name in ("leads", "unit", "rate_hz", "nan_rule", "resampler", "clip_mv")
            if getattr(self, name) != getattr(other, name)
        ]
        if differing:
            raise UserError("The preprocessing differs: " + "; ".join(differing) + ".")

    @property
    def window_samples(self) -> int:
        """Samples of a crop: round(window_s * rate_hz).

        Raises:
          UserError: no window is set.
        """
        if self.window_s is None:
            raise UserError("This preprocessing contract has no window (window_s); a training run sets it.")
        return round(self.window_s * self.rate_hz)

    def apply(self, recording: Recording) -> Processed:
        """Brings a recording under the contract.

        Order: leads by name, NaN rule, derivation of limb leads, plausibility, resampling, clipping,
        rounding to microvolts. The result depends on the recording and the contract only; it has all leads, of which
        `models.inputs.to_model_input` keeps `kept_leads`.

        Args:
          recording: signal [T, C] in millivolts.

        Returns:
          The int16 signal and everything worth knowing about it.

        Raises:
          BadRecording: the recording is empty, has none of the twelve leads, or an implausible amplitude.
          UserError: the contract asks for something this code cannot do.
        """
        if self.leads != CANONICAL_LEADS or self.unit != "mV" or self.nan_rule != NAN_RULE:
            raise UserError(
                f"This version of ecg_jax cannot apply the preprocessing contract {self.to_dict()}."
            )
        if self.resampler != RESAMPLER:
            raise UserError(f"This version of ecg_jax cannot apply the resampler {self.resampler!r}.")
        if not (np.isfinite(recording.rate) and MIN_RATE_HZ <= recording.rate <= MAX_RATE_HZ):
            raise BadRecording(
                recording.record_id,
                "implausible_rate",
                f"the header says {recording.rate:g} samples per second, outside "
                f"{MIN_RATE_HZ}-{MAX_RATE_HZ}.",
            )
        problems = list(recording.problems)

        def report(kind: str, action: str, detail: str) -> None:
            problems.append(Problem(recording.record_id, kind, action, detail))

        known = [c for c, name in enumerate(recording.leads) if canonical_index(name) is not None]
        names = tuple(recording.leads[c] for c in known)
        _report_names(recording, report)
        signal = np.asarray(recording.signal, np.float64)
        filled, n_nan = fill_nan(signal if len(known) == signal.shape[1] else signal[:, known])
        if n_nan:
            report("nan_samples", "interpolated", f"{n_nan} samples are NaN, all leads together.")
        canonical = to_canonical(filled, names)
        check_amplitude(recording.record_id, canonical.signal, canonical.missing)
        _report_leads(canonical, recording.rate, report)

        signal = resample(canonical.signal, recording.rate, self.rate_hz)
        limit = INT16_MAX / MICROVOLTS_PER_MV if self.clip_mv is None else self.clip_mv
        beyond = int((np.abs(signal) > limit).sum())
        saturated = recording.rail_samples + beyond
        if recording.rail_samples:
            report(
                "saturated",
                "kept",
                f"{recording.rail_samples} samples at the limit of the file's number format.",
            )
        if beyond and self.clip_mv is None:
            report("beyond_int16", "clipped", f"{beyond} samples beyond +-{limit} mV.")
        microvolts = np.rint(np.clip(signal, -limit, limit) * MICROVOLTS_PER_MV).astype(np.int16)
        if len(microvolts) < round(SHORT_S * self.rate_hz):
            report("short", "kept", f"{len(microvolts) / self.rate_hz:.2f} s, shorter than {SHORT_S} s.")
        return Processed(
            microvolts,
            canonical.missing,
            canonical.derived,
            canonical.flat,
            saturated,
            _one_per_kind(problems),
        )


def parse_leads(text: str) -> tuple[str, ...]:
    """The leads that `config.data.leads` names, in canonical order.

    Args:
      text: names separated by commas, in any order, matched as those of a recording are; "" for all.

    Raises:
      UserError: a name is unknown or there twice.
    """
    if not text:
        return CANONICAL_LEADS
    numbers = [canonical_index(name) for name in text.split(",")]
    for name, number in zip(text.split(","), numbers, strict=True):
        if number is None:
            raise UserError(
                f"config.data.leads={text!r}: {name!r} is no lead{closest(name, CANONICAL_LEADS)}"
            )
        if numbers.count(number) > 1:
            raise UserError(
                f"config.data.leads={text!r} names the lead {CANONICAL_LEADS[number]} twice; name each lead once"
            )
    return tuple(lead for number, lead in enumerate(CANONICAL_LEADS) if number in numbers)


def fill_nan(signal: np.ndarray) -> tuple[np.ndarray, int]:
    """Replaces NaN per lead: linear inside, zero before the first and hold after the last valid sample.

    This is what the reference conversion does (spec 1.3: pandas `interpolate`, then NaN to zero in the
    model). A lead whose valid samples are none or all alike becomes NaN throughout: it carries no signal.

    Args:
      signal: float64 [T, C].

    Returns:
      The filled signal and the number of NaN samples in leads that have valid ones.
    """
    invalid = ~np.isfinite(signal)
    if not invalid.any():
        return signal, 0
    out = signal.copy()
    time = np.arange(len(signal))
    count = 0
    for c in np.flatnonzero(invalid.any(axis=0)):
        valid = ~invalid[:, c]
        values = signal[valid, c]
        if values.size == 0 or values.min() == values.max():
            out[:, c] = np.nan
            continue
        count += int(invalid[:, c].sum())
        out[:, c] = np.interp(time, time[valid], values, left=0.0)
    return out, count


def resample(signal: np.ndarray, rate: float, target: float) -> np.ndarray:
    """Band-limited resampling of [T, C] to [floor(T * target / rate), C], all within the recording.

    soxr's filter sees zeros outside a signal, so a lead that does not start at zero would ring at its ends;
    an odd reflection of about half a second on each side keeps value and slope instead.

    Args:
      signal: float64 [T, C], no NaN.
      rate: its samples per second.
      target: wanted samples per second.
    """
    if rate == target:
        return signal
    import soxr

    length = int(Fraction(len(signal)) * Fraction(target) / Fraction(rate))
    if len(signal) < 2:
        return np.repeat(signal, length, axis=0)
    # Padding must be a whole number of samples at both rates, else the output is shifted by part of a sample.
    ratio = (Fraction(target) / Fraction(rate)).limit_denominator(2000)
    blocks = -(-round(0.5 * rate) // ratio.denominator)
    pad = blocks * ratio.denominator
    skip = blocks * ratio.numerator
    padded = np.pad(signal, ((pad, pad), (0, 0)), mode="reflect", reflect_type="odd")
    out = soxr.resample(padded, rate, target, quality="VHQ")
    return out[skip : skip + length]


def _report_names(recording: Recording, report) -> None:
    """Notes lead names that needed more than a look: ignored, doubled, reordered, oddly spelled."""
    index = [canonical_index(name) for name in recording.leads]
    ignored = [name for name, i in zip(recording.leads, index, strict=True) if i is None]
    if ignored:
        report("extra_leads", "ignored", f"leads outside the standard twelve: {', '.join(ignored)}.")
    known = [i for i in index if i is not None]
    if len(set(known)) < len(known):
        report("repeated_leads", "first used", f"lead names {', '.join(recording.leads)}.")
    elif known != sorted(known):
        report("reordered_leads", "reordered by name", f"the file has {', '.join(recording.leads)}.")
    # AVR, AVL, AVF is PTB-XL's normal spelling and no reason for 21 799 lines.
    odd = [
        name
        for name, i in zip(recording.leads, index, strict=True)
        if i is not None and name not in (CANONICAL_LEADS[i], CANONICAL_LEADS[i].upper())
    ]
    if odd:
        report("lead_spelling", "matched by name", f"{', '.join(odd)}.")


def _report_leads(canonical, rate: float, report) -> None:
    """Notes flat, derived and missing leads and limb leads that contradict each other."""

    def names(mask: np.ndarray) -> str:
        return ", ".join(CANONICAL_LEADS[i] for i in np.flatnonzero(mask))

    if canonical.flat.any():
        report("flat_leads", "treated as absent", f"constant or all NaN: {names(canonical.flat)}.")
    if canonical.derived.any():
        report("derived_leads", "derived", f"computed from two other limb leads: {names(canonical.derived)}.")
    if canonical.missing.any():
        report("missing_leads", "zeros", f"neither there nor derivable: {names(canonical.missing)}.")
    still = (longest_still_run(canonical.signal) >= PARTLY_FLAT_S * rate) & ~canonical.missing
    if still.any():
        report("partly_flat_leads", "kept", f"constant for {PARTLY_FLAT_S:g} s or longer: {names(still)}.")
    if not canonical.missing[:6].any():
        residual = limb_residual(canonical.signal)
        wrong = np.flatnonzero(residual > LIMB_TOLERANCE_MV)
        if len(wrong):
            report(
                "limb_leads_disagree",
                "kept",
                f"limb leads contradict each other by up to {residual.max():.2f} mV in {len(wrong)} of "
                f"{len(residual)} samples (from sample {wrong[0]} to {wrong[-1]}).",
            )


def longest_still_run(signal: np.ndarray) -> np.ndarray:
    """Length of the longest run of equal samples of each lead: [T, C] -> [C]."""
    longest = np.zeros(signal.shape[1], int)
    for c in range(signal.shape[1]):
        moves = np.flatnonzero(signal[1:, c] != signal[:-1, c])
        longest[c] = np.diff(moves, prepend=-1, append=len(signal) - 1).max()
    return longest


def _one_per_kind(problems: list[Problem]) -> list[Problem]:
    """The first problem of each kind: one line per recording and kind."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.kind, problem)
    return list(first.values())
