"""WFDB headers: one parser for the strict format and for the dialects of the Challenge files.

Format: https://physionet.org/physiotools/wag/header-5.htm. A record line `NAME N_SIGNALS RATE N_SAMPLES
...`, one line per signal `FILE FORMAT[xS][:SKEW][+OFFSET] GAIN[(BASELINE)][/UNIT] BITS ZERO INITIAL CHECKSUM
BLOCK LEAD`, then comments.
"""

from __future__ import annotations

import dataclasses
import math
import re

# mV per unit, keys in lower case. Both micro signs: U+00B5 and U+03BC.
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "\u00b5v": 1e-3, "\u03bcv": 1e-3, "v": 1e3, "nv": 1e-6}

_RECORD_NAME = re.compile(r"[-\w]+(/\d+)?")
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?")
_GAIN = re.compile(r"(-?\d*\.?\d*(?:[eE][-+]?\d+)?)(?:\((-?\d+)\))?(?:/(\S+))?")


class HeaderError(ValueError):
    """The header breaks the format; the message says how."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """One signal line.

    Attributes:
      file: name of the file holding the samples.
      format: storage format (16, 212, ...).
      samples_per_frame: 1 unless the record mixes rates.
      skew: frames this signal lags behind.
      byte_offset: bytes before the first sample (24 in Challenge .mat files).
      gain: integers per unit; None if the header gives none or 0, which WFDB calls uncalibrated.
      baseline: integer of 0 units.
      unit: as spelled; None if the header gives none.
      initial: first sample, None if not given.
      checksum: 16-bit sum of the samples, None if not given.
      lead: description field, usually the lead name.
    """

    file: str
    format: str
    samples_per_frame: int
    skew: int
    byte_offset: int
    gain: float | None
    baseline: int
    unit: str | None
    initial: int | None
    checksum: int | None
    lead: str


@dataclasses.dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
      name: record name.
      rate: frames per second.
      n_samples: frames, None if not given.
      signals: one per signal line.
      comments: comment lines without "#", stripped.
      repairs: what had to be repaired, empty for a valid header.
    """

    name: str
    rate: float
    n_samples: int | None
    signals: tuple[Signal, ...]
    comments: tuple[str, ...]
    repairs: tuple[str, ...]


def parse_header(text: str, repair: bool) -> Header:
    """Parses the text of a .hea file.

    Args:
      text: the whole file.
      repair: accept and note what a strict reader refuses: a record name with ".mat" behind it, missing
        signal lines' trailing fields are always accepted, as the format says.

    Returns:
      The header.

    Raises:
      HeaderError: not a single-segment header with signals.
    """
    lines = [line.strip() for line in text.splitlines()]
    comments = tuple(line.lstrip("#").strip() for line in lines if line.startswith("#"))
    content = [line for line in lines if line and not line.startswith("#")]
    if not content:
        raise HeaderError("the header is empty.")
    fields = content[0].split()
    name, repairs = fields[0], []
    if not _RECORD_NAME.fullmatch(name):
        if not repair:
            raise HeaderError(f"the record line begins with {name!r}, which is no valid record name.")
        repairs.append(f"record name {name!r}")
        name = name.rsplit(".", 1)[0]
        if not _RECORD_NAME.fullmatch(name):
            raise HeaderError(f"the record line begins with {fields[0]!r}, which is no record name.")
    if "/" in name:
        raise HeaderError("it is a multi-segment record; its segments are read as records of their own.")
    try:
        n_signals = int(fields[1])
        # RATE[/COUNTER_RATE[(BASE)]]; without a rate WFDB assumes 250, a guess this reader does not make.
        rate = float(fields[2].split("/")[0])
        n_samples = int(fields[3]) if len(fields) > 3 else None
    except (IndexError, ValueError):
        raise HeaderError(
            f"the record line {content[0]!r} lacks number of signals, rate or length."
        ) from None
    if n_signals < 1 or not math.isfinite(rate) or rate <= 0 or (n_samples is not None and n_samples < 0):
        raise HeaderError(f"the record line {content[0]!r} has no signals, rate or length.")
    if len(content) - 1 < n_signals:
        raise HeaderError(f"the header promises {n_signals} signals and describes {len(content) - 1}.")
    signals = tuple(_parse_signal(line) for line in content[1 : 1 + n_signals])
    # WFDB writes 0 for "unknown length".
    return Header(name, rate, n_samples or None, signals, comments, tuple(repairs))


def _parse_signal(line: str) -> Signal:
    fields = line.split(maxsplit=8)
    if len(fields) < 2:
        raise HeaderError(f"the signal line {line!r} has no format.")
    storage = _FORMAT.fullmatch(fields[1])
    if not storage:
        raise HeaderError(f"the signal line {line!r} has the format {fields[1]!r}.")
    gain, baseline, unit = None, None, None
    if len(fields) > 2:
        match = _GAIN.fullmatch(fields[2])
        if not match:
            raise HeaderError(f"the signal line {line!r} has the gain {fields[2]!r}.")
        try:
            gain = float(match[1]) if match[1] else None
        except ValueError:
            raise HeaderError(f"the signal line {line!r} has the gain {fields[2]!r}.") from None
        baseline, unit = match[2], match[3]
    try:
        zero = int(fields[4]) if len(fields) > 4 else 0
        initial = int(fields[5]) if len(fields) > 5 else None
        total = int(fields[6]) if len(fields) > 6 else None
    except ValueError:
        raise HeaderError(f"the signal line {line!r} has a field that is no number.") from None
    return Signal(
        file=fields[0],
        format=storage[1],
        samples_per_frame=int(storage[2] or 1),
        skew=int(storage[3] or 0),
        byte_offset=int(storage[4] or 0),
        gain=gain if gain and math.isfinite(gain) else None,
        baseline=zero if baseline is None else int(baseline),
        unit=unit,
        initial=initial,
        checksum=total,
        lead=fields[8].strip() if len(fields) > 8 else "",
    )


def parse_comments(comments: tuple[str, ...]) -> dict:
    """Age, sex and diagnoses from header comments, in all the dialects met.

    `Age: 65`, `age: 81`, `<age>: 51`, `Age: NaN`; `Sex: Female`, `F`, `female`; `Dx: 426783006,164889003`
    (SNOMED) or `Dx: RBBB` (abbreviation, kept as it is).

    Returns:
      {"age": float or None, "sex": "F", "M" or None, "dx": list of codes; None if there is no Dx line}.
    """
    found: dict[str, str] = {}
    for comment in comments:
        key, colon, value = comment.partition(":")
        if colon:
            found.setdefault(key.strip().strip("<>").lower(), value.strip())
    age, sex, dx = None, None, None
    if "age" in found:
        try:
            age = float(found["age"])
        except ValueError:
            age = None
        if age is not None and not (math.isfinite(age) and age >= 0):
            age = None
    if "sex" in found:
        sex = {"f": "F", "female": "F", "m": "M", "male": "M"}.get(found["sex"].lower())
    if "dx" in found:
        codes = (code.strip() for code in found["dx"].split(","))
        dx = sorted({code for code in codes if code and code.lower() not in ("unknown", "nan", "none")})
    return {"age": age, "sex": sex, "dx": dx}
