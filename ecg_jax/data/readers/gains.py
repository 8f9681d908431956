"""How integers become millivolts: the one place that knows about wrong gains.

The Challenge 2020 headers of May and June 2020 carry wrong gains; the .mat integers are microvolts in every
Challenge file, and the later headers say so (1000/mV). Proof: PTB-XL HR records equal records500 of PTB-XL
1.0.x integer by integer, PTB S0001 equals s0010_re to half a microvolt, Georgia files of 2021 hold the same
integers, and the first INCART samples of the headers saying 306000 are k * 1000 / 306 rounded, 306 being
INCART's own gain. (For 1041000, also INCART, the headers alone prove nothing; it is corrected by analogy.)
"""

from __future__ import annotations

import math

import numpy as np

from ecg_jax.data.readers.header import MILLIVOLTS, Header, Signal
from ecg_jax.data.recording import LIMB, BadRecording, Problem, canonical_index
from ecg_jax.errors import UserError

CHALLENGE_GAIN = 1000.0

# What --assume-gain may be. Recorders have 100 to 10 000 integers per mV; beyond these limits one integer is
# more than a millivolt or the noise of any amplifier is thousands of them.
MIN_ASSUMED_GAIN, MAX_ASSUMED_GAIN = 1.0, 1e7

# Gain per mV in the early headers -> corpus. No 16-bit file has such gains rightly: full scale would be 0.1
# mV or less.
IMPOSSIBLE_GAINS = {2_000_000.0: "PTB", 306_000.0: "INCART", 1_041_000.0: "INCART"}
# These occur in right headers of other .mat files too (wfdb2mat keeps the gain of its source), so they are
# corrected only in a header written by the Challenge: one with its comment lines.
EARLY_GAINS = {4880.0: "Georgia", 200.0: "PTB-XL"}
_CHALLENGE_COMMENTS = {"rx", "hx", "sx", "dx"}


def check_assume_gain(value: float | None) -> None:
    """Checks what was given as --assume-gain; None, for not given, is right.

    Raises:
      UserError: not a number from 1 to 10 000 000.
    """
    if value is None:
        return
    if not (math.isfinite(value) and MIN_ASSUMED_GAIN <= value <= MAX_ASSUMED_GAIN):
        raise UserError(
            f"--assume-gain is the number of integers per millivolt, from {MIN_ASSUMED_GAIN:.0f} to "
            f"{MAX_ASSUMED_GAIN:.0f}, not {value}; 1000 means that an integer is a microvolt."
        )


def millivolts_per_count(
    header: Header,
    columns: list[int],
    digital: np.ndarray,
    assume_gain: float | None,
    problems: list[Problem],
    record: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of the ECG leads of a record; corrects what is proven wrong, refuses what is doubtful.

    Args:
      header: the parsed header.
      columns: indices of the signals wanted, all with a canonical lead name.
      digital: int [T, len(columns)], their samples.
      assume_gain: integers per mV to use where the header's gain cannot be trusted; None refuses those
        records.
      problems: appended to.
      record: record id.

    Returns:
      (mV per count [C], count of 0 mV [C]).

    Raises:
      BadRecording: `unknown_unit`, `uncalibrated`, `ambiguous_gain`, `inconsistent_gains`.
    """
    signals = [header.signals[c] for c in columns]

    zero = np.array([s.baseline for s in signals], float)

    def assumed(kind: str, reason: str, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if assume_gain is None:
            raise BadRecording(
                record,
                kind,
                f"{reason}; if you know the true gain, give it with --assume-gain (integers per mV).",
            )
        problems.append(Problem(record, "gain_assumed", f"{assume_gain:g}/mV as asked", f"{reason}."))
        return np.full(len(signals), 1.0 / assume_gain), zero

    unknown = sorted({s.unit for s in signals if s.unit is not None and s.unit.lower() not in MILLIVOLTS})
    if unknown:
        raise BadRecording(
            record, "unknown_unit", f"the header gives the unit {', '.join(unknown)}, not a voltage."
        )
    uncalibrated = [s.lead for s in signals if s.gain is None]
    if uncalibrated:
        return assumed("uncalibrated", f"the header gives no gain for {', '.join(uncalibrated)}", zero)

    if all(s.file.lower().endswith(".mat") for s in signals):
        corpus, doubt = _early_challenge_gain(header, signals)
        if doubt:
            return assumed("ambiguous_gain", doubt, zero)
        if corpus:
            problems.append(
                Problem(
                    record,
                    "gain_corrected",
                    "1000/mV used",
                    f"{signals[0].gain:g}/{signals[0].unit} is the wrong gain of early Challenge 2020 "
                    f"headers of {corpus}.",
                )
            )
            return np.full(len(signals), 1.0 / CHALLENGE_GAIN), zero

    if any(s.unit is None for s in signals):
        problems.append(
            Problem(record, "unit_assumed", "mV used", "the header gives no unit; WFDB defines that as mV.")
        )
    scale = np.array([(1.0 if s.unit is None else MILLIVOLTS[s.unit.lower()]) / s.gain for s in signals])
    if _integers_obey_limb_identities(signals, digital, scale):
        gains = ", ".join(f"{1 / k:.6g}" for k in scale[:6])
        return assumed(
            "inconsistent_gains",
            f"the gains differ between limb leads ({gains} per mV) although the plain integers already "
            "satisfy II = I + III, so they normalise each lead instead of giving its amplitude",
            np.zeros(len(signals)),  # the baselines belong to the same normalisation
        )
    negative = [s for s in signals if s.gain < 0]
    if negative:
        leads = ", ".join(f"{s.lead} {s.gain:g}" for s in negative)
        detail = f"the header gives negative gains ({leads}), which turn these leads upside down."
        problems.append(Problem(record, "negative_gain", "kept, polarity as the header says", detail))
    return scale, zero


def _early_challenge_gain(header: Header, signals: list[Signal]) -> tuple[str | None, str | None]:
    """(corpus whose early header this is or None, reason for doubt or None) of a .mat-backed record."""
    gains = {s.gain * (1.0 / MILLIVOLTS[(s.unit or "mV").lower()]) for s in signals}
    if len(gains) != 1:
        return None, None
    gain = gains.pop()
    if gain in IMPOSSIBLE_GAINS:
        return IMPOSSIBLE_GAINS[gain], None
    if gain not in EARLY_GAINS:
        return None, None
    keys = {comment.partition(":")[0].strip().lower() for comment in header.comments}
    if "creator" in keys:  # wfdb2mat signs its headers
        return None, None
    if keys & _CHALLENGE_COMMENTS:
        return EARLY_GAINS[gain], None
    return None, (
        f"the gain {gain:g}/mV in a .mat record is wrong in early Challenge 2020 headers "
        f"({EARLY_GAINS[gain]}) and right in files made by wfdb2mat, and this header does not tell which it "
        "is"
    )


def _integers_obey_limb_identities(signals: list[Signal], digital: np.ndarray, scale: np.ndarray) -> bool:
    """Whether unequal gains of limb leads are disproved by the integers themselves.

    LUDB: per-lead gains from 347 to 5580 per mV, while II = I + III holds to the integer without them.
    Constant leads are left out, they satisfy anything.
    """
    limb = {}
    for c, signal in enumerate(signals):
        i = canonical_index(signal.lead)
        if i < 6 and i not in limb and float(digital[:, c].max()) - float(digital[:, c].min()) > 20:
            limb[i] = c
    if not {0, 1} <= limb.keys() or len(limb) < 3:
        return False
    used = scale[[limb[i] for i in limb]] / scale[limb[0]]
    # Relative to lead I: gains that are all negative may be equal, gains of both signs are not.
    if used.min() > 0 and used.max() / used.min() < 1.005:
        return False
    one, two = digital[:, limb[0]].astype(float), digital[:, limb[1]].astype(float)
    for i in sorted(limb.keys() - {0, 1}):
        residual = np.abs(digital[:, limb[i]] - LIMB[i, 0] * one - LIMB[i, 1] * two)
        # 3 counts: each lead is rounded on its own.
        if np.percentile(residual, 99) <= 3:
            return True
    return False


def lead_columns(header: Header) -> list[int]:
    """Indices of the signals that are one of the twelve leads."""
    return [c for c, signal in enumerate(header.signals) if canonical_index(signal.lead) is not None]
