"""One ECG recording as it leaves a file: signal in millivolts, rate, lead names, identity, labels.

Letters: T samples, C leads. The canonical order is I, II, III, aVR, aVL, aVF, V1-V6; leads are matched by
name and never by position.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence

import numpy as np

from ecg_jax.errors import UserError

CANONICAL_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The six limb leads are linear in I and II (Einthoven and Goldberger): lead = LIMB[k] @ (I, II).
LIMB = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [-0.5, -0.5], [1.0, -0.5], [-0.5, 1.0]])

_INDEX = {name.lower(): i for i, name in enumerate(CANONICAL_LEADS)}

# A limb lead further than this from what I and II say is reported. Rounding to steps of 4.88 uV
# explains 0.015 mV.
LIMB_TOLERANCE_MV = 0.05

# Robust range = distance between the 0.1 and 99.9 percentile of a lead. Over the real recordings with proven
# gains the largest lead measures 0.9-15 mV and the median lead 0.46-4.5 mV; outside the limits below it is no
# surface ECG in millivolts, and no guess about its gain is better than refusing it.
MIN_LARGEST_RANGE_MV = 0.1
MAX_MEDIAN_RANGE_MV = 10.0


# Every kind of problem, with what is done. `refused` recordings are not in the store, all others are.
KINDS = {
    "missing_header": "refused: a signal file without readable .hea",
    "header_refused": "refused: the header breaks the WFDB format",
    "header_repaired": "read: the record name in a Challenge header was not valid",
    "missing_signal": "refused: the signal file is missing or cannot be read",
    "truncated_signal": "refused: the signal file is shorter than its header promises",
    "signal_refused": "refused: the signal file is not what its header describes, e.g. of another size",
    "table_refused": "refused: a .csv or .npy file is not a table of numbers",
    "array_refused": "refused: an HDF5 or NumPy file does not hold the array its corpus publishes",
    "bad_checksum": "refused: the samples do not match the header's checksum",
    "no_checksum": "kept: the header's checksums are all zero",
    "mixed_rates": "refused: leads with several samples per frame",
    "skewed_leads": "refused: leads shifted in time",
    "implausible_rate": "refused: fewer than 50 or more than 20 000 samples per second",
    "no_standard_leads": "refused: none of the twelve leads",
    "no_signal": "refused: every lead is absent, constant or NaN",
    "unknown_unit": "refused: the unit is not a voltage",
    "unit_assumed": "mV used: the header gives no unit, which WFDB defines as mV",
    "unit_detected": "millivolts, or tenths of one: an array without unit, told by its amplitudes (CODE-15)",
    "standardised_unit": "PTB-XL's standard deviations used: an array of z-scores, whose unit is lost (EchoNext)",
    "uncalibrated": "refused unless --assume-gain: the header gives no gain",
    "ambiguous_gain": "refused unless --assume-gain: a gain right in some .mat files, wrong in others",
    "inconsistent_gains": "refused unless --assume-gain: gains that contradict the limb leads (LUDB)",
    "gain_assumed": "--assume-gain used instead of the header",
    "gain_corrected": "1000/mV used: the gain of early Challenge 2020 headers is proven wrong",
    "negative_gain": "kept, polarity as the header says: negative gains turn leads upside down",
    "implausible_amplitude": "refused: no ECG has such millivolts, so gain or unit is wrong",
    "nan_samples": "interpolated: NaN samples",
    "saturated": "kept: samples at the limit of the file's number format",
    "beyond_int16": "clipped: samples beyond +-32.767 mV",
    "flat_leads": "treated as absent: constant or all-NaN leads",
    "partly_flat_leads": "kept: leads that stand still for a second or more",
    "derived_leads": "derived: absent limb leads computed from two others",
    "missing_leads": "zeros: leads neither there nor derivable",
    "too_few_leads": "refused: fewer leads than the tasks of its corpus are defined on (ZZU: 9 of 12)",
    "lead_order_assumed": "canonical order used: a signal file without lead names",
    "extra_leads": "ignored: leads outside the twelve",
    "repeated_leads": "first used: two leads of one name",
    "reordered_leads": "reordered by name: leads in another order",
    "lead_spelling": "matched by name: unusual spelling, e.g. lower case",
    "limb_leads_disagree": "kept: limb leads contradict each other by more than 0.05 mV",
    "short": "kept: shorter than 2.5 s",
    "missing_part": "left out: a part of the corpus, or what a table names, is not in SOURCE",
    "extra_partition": "kept: a site and year beyond those the paper was trained on (HEEDB)",
    "listed_duplicate": "left out: the corpus' own list has them as duplicates; one line for each partition (HEEDB)",
    "no_patient": "kept, in no test: the corpus' table does not say whose recordings these are (HEEDB)",
    "contradictory_rows": "unknown, or (diagnoses of HEEDB) united: a table's rows about the recording differ",
    "no_table_row": "kept without labels, in no test: the corpus' table has no row for the recording",
    "no_diagnosis": "kept without labels: the header has no diagnosis (PTB), or the table no row (HEEDB)",
    "unknown_label": "ignored: a code the corpus' own table does not know",
    "duplicate_id": "refused: an earlier recording has this id",
    "duplicate_signal": "kept and marked, or dropped: an earlier recording has this signal",
    "unexpected_error": "refused: something this program did not foresee; please report it",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that was wrong with one recording, and what was done: a line of `problems.jsonl`.

    Attributes:
      record: the record id.
      kind: one of `KINDS`.
      action: what was done: `refused`, `kept`, `corrected`, ...
      detail: a sentence with the numbers.
    """

    record: str
    kind: str
    action: str
    detail: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of problem {self.kind!r}")


class BadRecording(UserError):
    """A recording that cannot be used; `problem` says why. Other recordings go on."""

    def __init__(self, record: str, kind: str, detail: str):
        super().__init__(f"Recording {record} cannot be used ({kind}): {detail}")
        self.problem = Problem(record, kind, "refused", detail)

    def __reduce__(self):
        return BadRecording, (self.problem.record, self.problem.kind, self.problem.detail)


# What a name alone can make go wrong: the file is not there, as opposed to not readable just now.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def is_absent(error: OSError) -> bool:
    """Whether an error says that a file is not there, which is a fault of one recording.

    Any other (permissions, a failing disk, a lost network drive) will hit the next recordings too, so it has
    to end the command: a store without them would look complete.
    """
    return error.errno in _NOT_THERE


def cannot_read(path: str | os.PathLike, error: OSError) -> UserError:
    """What an error other than a missing file becomes."""
    reason = error.strerror or str(error)
    return UserError(
        f"Cannot read {path}: {reason}; make it readable and run the same command again (`ecg-jax prepare` goes "
        "on where it stopped)."
    )


def strict_error(problem: Problem) -> UserError:
    """What `--strict` makes of a problem."""
    return UserError(
        f"Recording {problem.record} has a problem ({problem.kind}, would be {problem.action}): "
        f"{problem.detail} Without --strict it is noted in problems.jsonl and the rest goes on."
    )


@dataclasses.dataclass
class Recording:
    """One recording in physical units, before any preprocessing.

    Attributes:
      record_id: unique within its corpus.
      signal: float [T, C], millivolts; NaN where the file says a sample is invalid.
      rate: samples per second.
      leads: C lead names as the file spells them.
      patient_id: the patient, None if unknown.
      fold: the corpus' own fold, None if it has none.
      labels: label set -> codes, None where they are unknown.
      values: value set -> name -> number (a measurement, or 0 and 1); names left out and NaN are unknown.
      age: years, None if unknown.
      sex: "F", "M" or None.
      rail_samples: samples at the limit of the converter's number format, over the canonical leads.
      problems: what was wrong with the file but did not stop its use.
    """

    record_id: str
    signal: np.ndarray
    rate: float
    leads: tuple[str, ...]
    patient_id: str | None = None
    fold: int | None = None
    labels: dict[str, list[str] | None] = dataclasses.field(default_factory=dict)
    values: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    age: float | None = None
    sex: str | None = None
    rail_samples: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def report(self, kind: str, action: str, detail: str) -> None:
        """Notes a problem that did not stop the recording's use."""
        self.problems.append(Problem(self.record_id, kind, action, detail))


def canonical_index(name: str) -> int | None:
    """Position of a lead name in the canonical order, ignoring case and blanks; None for any other lead."""
    key = name.strip().lower()
    return _INDEX.get(key)


@dataclasses.dataclass(frozen=True)
class CanonicalSignal:
    """Twelve leads in canonical order.

    Attributes:
      signal: float64 [T, 12] millivolts; a missing lead is zeros.
      missing: bool [12], leads neither present nor derivable.
      derived: bool [12], limb leads computed from two others.
      flat: bool [12], leads present in the file but constant or all NaN. They carry no ECG and count as
        absent, so they are then derived or missing.
    """

    signal: np.ndarray
    missing: np.ndarray
    derived: np.ndarray
    flat: np.ndarray


def to_canonical(signal: np.ndarray, leads: Sequence[str]) -> CanonicalSignal:
    """Orders leads by name and derives absent limb leads from any two that are there.

    Leads outside the twelve (vx, vy, vz, MLII, ...) are ignored. Of two leads with one name the first is
    used. I and II are preferred as the source, then the next in canonical order: any two limb leads
    determine all six (III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2).

    Args:
      signal: [T, C] in any one unit; NaN allowed.
      leads: C names.

    Returns:
      A `CanonicalSignal` with NaNs where the source had them.

    Raises:
      ValueError: signal is not [T, C] for C names.
    """
    signal = np.asarray(signal, np.float64)
    if signal.ndim != 2 or signal.shape[1] != len(leads):
        raise ValueError(f"signal of shape {signal.shape} for {len(leads)} lead names")
    out = np.zeros((len(signal), 12))
    present = np.zeros(12, bool)
    flat = np.zeros(12, bool)
    for c, name in enumerate(leads):
        i = canonical_index(name)
        if i is None or present[i] or flat[i]:
            continue
        column = signal[:, c]
        finite = column[np.isfinite(column)]
        if finite.size == 0 or finite.min() == finite.max():
            flat[i] = True
            continue
        out[:, i] = column
        present[i] = True
    derived = np.zeros(12, bool)
    sources = np.flatnonzero(present[:6])[:2]
    if len(sources) == 2:
        derived[:6] = ~present[:6]
        # Solve source = LIMB[sources] @ (I, II) once and read every absent limb lead off I and II.
        basis = LIMB @ np.linalg.inv(LIMB[sources])
        for i in np.flatnonzero(derived):
            out[:, i] = basis[i, 0] * out[:, sources[0]] + basis[i, 1] * out[:, sources[1]]
    return CanonicalSignal(out, ~(present | derived), derived, flat)


def limb_residual(signal: np.ndarray) -> np.ndarray:
    """Largest distance of III, aVR, aVL, aVF from what I and II say: [T, 12] canonical -> [T], same unit."""
    expected = signal[:, :2] @ LIMB[2:].T
    return np.abs(signal[:, 2:6] - expected).max(axis=1)


def robust_range(signal: np.ndarray) -> np.ndarray:
    """Distance between the 0.1 and 99.9 percentile of each lead: [T, C] -> [C], NaN-free input."""
    # At least one sample at each end is left out, else a single spike decides for a short recording.
    k = min(max(1, round(0.001 * (len(signal) - 1))), (len(signal) - 1) // 2)
    order = np.partition(signal, (k, len(signal) - 1 - k), axis=0)
    return order[len(signal) - 1 - k] - order[k]


def check_amplitude(record_id: str, signal: np.ndarray, missing: np.ndarray) -> None:
    """Refuses a recording whose millivolts cannot be those of a surface ECG.

    Args:
      record_id: for the message.
      signal: [T, 12] millivolts, canonical, without NaN.
      missing: bool [12].

    Raises:
      BadRecording: `no_signal` when no lead has any signal, `implausible_amplitude` outside the limits above.
    """
    if missing.all():
        raise BadRecording(record_id, "no_signal", "every lead is absent, constant or all NaN.")
    ranges = robust_range(signal[:, ~missing])
    if ranges.max() < MIN_LARGEST_RANGE_MV:
        largest = f"{ranges.max():.3g} mV in its largest lead"
        raise BadRecording(
            record_id,
            "implausible_amplitude",
            f"the signal spans only {largest} (an ECG spans more than {MIN_LARGEST_RANGE_MV} mV), so the "
            "gain or unit in its header is probably wrong; correct the header.",
        )
    if np.median(ranges) > MAX_MEDIAN_RANGE_MV:
        raise BadRecording(
            record_id,
            "implausible_amplitude",
            f"the median lead spans {np.median(ranges):.3g} mV (an ECG spans less than "
            f"{MAX_MEDIAN_RANGE_MV:g} mV), so the gain or unit in its header is probably wrong; correct the "
            "header.",
        )
