"""WFDB records: .hea beside .dat or .mat. Format 16 is read directly, every other format by the wfdb package.

Reading format 16 here costs 0.3 ms a record instead of wfdb's 4 ms; the tests compare both on every sample.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

import numpy as np

from ecg_jax.data.readers.gains import lead_columns, millivolts_per_count
from ecg_jax.data.readers.header import Header, HeaderError, Signal, parse_comments, parse_header
from ecg_jax.data.recording import BadRecording, Problem, Recording, cannot_read, canonical_index, is_absent

# WFDB's marker of an invalid sample, and the last valid integer before each limit, for format 16.
INVALID_16 = -32768
RAIL_16 = 32767

_MAT4_INT16 = 30  # MOPT code of a little-endian MATLAB 4 matrix of int16
# Bits per sample of the formats wfdb reads, for finding samples at the limit.
_BITS = {
    "80": 8,
    "508": 8,
    "160": 16,
    "516": 16,
    "24": 24,
    "524": 24,
    "32": 32,
    "212": 12,
    "310": 10,
    "311": 10,
    "61": 16,
}


def read_wfdb(
    path: Path, record_id: str, repair: bool = False, assume_gain: float | None = None
) -> Recording:
    """Reads one WFDB record.

    Args:
      path: the .hea file.
      record_id: the id to give it.
      repair: accept the header faults of Challenge files and report them (`header_repaired`); otherwise such
        a record is refused, as the wfdb package does.
      assume_gain: integers per mV where the header cannot be trusted; see `gains.py`.

    Returns:
      The twelve-lead part of the record and the names of all its leads, in millivolts; age, sex and the
      label set `dx` from the comments if they have a Dx line.

    Raises:
      BadRecording: the record cannot be used; its `problem` says why.
      UserError: a file is there and cannot be read, so that the next ones cannot be either.
    """
    header = load_header(path, record_id, repair)
    problems: list[Problem] = []
    if header.repairs:
        problems.append(Problem(record_id, "header_repaired", "read on", "; ".join(header.repairs) + "."))
    columns = lead_columns(header)
    if not columns:
        leads = ", ".join(s.lead or "(unnamed)" for s in header.signals)
        raise BadRecording(
            record_id, "no_standard_leads", f"none of its leads is one of the twelve: {leads}."
        )
    if any(header.signals[c].samples_per_frame != 1 for c in columns):
        raise BadRecording(
            record_id, "mixed_rates", "its leads have several samples per frame, which is not supported."
        )
    if any(header.signals[c].skew for c in columns):
        raise BadRecording(record_id, "skewed_leads", "its leads are skewed in time, which is not supported.")
    digital, invalid, rail = read_digital(path, header, record_id)
    _check_sums(header, digital, columns, record_id, problems)
    if len(columns) < digital.shape[1]:
        digital, invalid = digital[:, columns], invalid[:, columns]
    scale, zero = millivolts_per_count(header, columns, digital, assume_gain, problems, record_id)
    millivolts = (digital - zero) * scale
    if invalid.any():
        millivolts[invalid] = np.nan
    signal = millivolts
    if len(columns) < len(header.signals):
        # Leads outside the twelve keep their place and name, to be reported, but not their samples.
        signal = np.full((len(digital), len(header.signals)), np.nan)
        signal[:, columns] = millivolts
    comments = parse_comments(header.comments)
    return Recording(
        record_id=record_id,
        signal=signal,
        rate=header.rate,
        leads=tuple(s.lead for s in header.signals),
        labels={} if comments["dx"] is None else {"dx": comments["dx"]},
        age=comments["age"],
        sex=comments["sex"],
        rail_samples=int((((digital >= rail) | (digital <= -rail)) & ~invalid).sum()),
        problems=problems,
    )


def load_header(path: Path, record_id: str, repair: bool) -> Header:
    """Reads and parses a .hea file.

    Raises:
      BadRecording: `missing_header` or `header_refused`.
    """
    data = _read_bytes(path, record_id, "missing_header").removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # an old file's micro sign
    try:
        return parse_header(text, repair)
    except HeaderError as error:
        hint = ""
        if not repair:
            hint = " If this is a PhysioNet Challenge file, the corpus `challenge` reads its dialects."
        raise BadRecording(record_id, "header_refused", f"{path.name}: {error}{hint}") from error


def _read_bytes(path: Path, record_id: str, kind: str) -> bytes:
    """A whole file; one that is missing refuses the recording, one that cannot be read ends the command."""
    try:
        return path.read_bytes()
    except OSError as error:
        if is_absent(error):
            detail = f"cannot read {path.name}: {error.strerror}."
            raise BadRecording(record_id, kind, detail) from error
        raise cannot_read(path, error) from error


def _is_file(path: Path) -> bool:
    """As `Path.is_file`, but a name no file can have is an absent file, and a failing disk is not."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except ValueError:
        return False
    except OSError as error:
        if is_absent(error):
            return False
        raise cannot_read(path, error) from error


def read_digital(path: Path, header: Header, record_id: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The integers of all signals.

    Returns:
      (int [T, C], bool [T, C] marking invalid samples, largest magnitude the number format allows).

    Raises:
      BadRecording: `missing_signal`, `truncated_signal`, `signal_refused`.
    """
    for name in dict.fromkeys(s.file for s in header.signals):
        if not _is_file(path.parent / name):
            raise BadRecording(record_id, "missing_signal", f"its signal file {name} is not there.")
    simple = all(s.format == "16" and s.samples_per_frame == 1 and s.skew == 0 for s in header.signals)
    if not simple:
        return _read_with_package(path, header, record_id)
    blocks = []
    groups: dict[str, list[Signal]] = {}
    for signal in header.signals:
        groups.setdefault(signal.file, []).append(signal)
    if [s.file for s in header.signals] != [name for name, group in groups.items() for _ in group]:
        raise BadRecording(record_id, "header_refused", "the signals of one file are not listed together.")
    for name, group in groups.items():
        blocks.append(_read_format_16(path.parent / name, group, header.n_samples, record_id))
    length = min(len(block) for block in blocks)
    if any(len(block) != length for block in blocks):
        raise BadRecording(record_id, "truncated_signal", "its signal files have different lengths.")
    digital = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    return digital, digital == INVALID_16, RAIL_16


def _read_format_16(path: Path, group: list[Signal], n_samples: int | None, record_id: str) -> np.ndarray:
    """int16 [T, len(group)] from one file of interleaved little-endian 16-bit samples."""
    data = _read_bytes(path, record_id, "missing_signal")
    offset = group[0].byte_offset
    if path.suffix.lower() == ".mat":
        _check_mat(data, offset, len(group), path.name, record_id)
    there = max(len(data) - offset, 0) // (2 * len(group))
    wanted = there if n_samples is None else n_samples
    if there < wanted or wanted == 0:
        raise BadRecording(
            record_id,
            "truncated_signal",
            f"{path.name} holds {there} samples per lead, the header promises {wanted}.",
        )
    # Another size means another number of samples or of leads: reading on would cut or interleave. Only a
    # checksum that is not zero can tell that the samples are right all the same.
    expected = offset + 2 * len(group) * wanted
    vouched = any(s.checksum for s in group if canonical_index(s.lead) is not None)
    if len(data) != expected and not vouched:
        raise BadRecording(
            record_id,
            "signal_refused",
            f"{path.name} has {len(data)} bytes, its header describes {expected} ({len(group)} leads x {wanted} "
            "samples of 16 bits), and no checksum tells which is right; correct the header.",
        )
    return np.frombuffer(data, "<i2", wanted * len(group), offset).reshape(wanted, len(group))


def _check_mat(data: bytes, offset: int, n_signals: int, name: str, record_id: str) -> None:
    """A Challenge .mat is a MATLAB 4 file: 20 bytes, the name "val", then the columns of [leads, T].

    Any other .mat read at the header's byte offset would be noise with a plausible look.
    """
    words = np.frombuffer(data, "<i4", 5) if len(data) >= 20 else np.zeros(5, int)
    if words[0] != _MAT4_INT16 or words[1] != n_signals or offset != 20 + words[4]:
        raise BadRecording(
            record_id,
            "signal_refused",
            f"{name} is not the MATLAB 4 matrix of {n_signals} x T 16-bit integers that its header "
            f"describes.",
        )


def _read_with_package(path: Path, header: Header, record_id: str) -> tuple[np.ndarray, np.ndarray, int]:
    import wfdb

    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), physical=False, smooth_frames=True)
        digital = record.d_signal.astype(np.int64)
        invalid = np.isnan(record.dac())
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not is_absent(error):
            raise cannot_read(error.filename or path, error) from error
        # wfdb raises whatever its parsing meets: ValueError, IndexError, HeaderSyntaxError, ...
        raise BadRecording(
            record_id, "signal_refused", f"the wfdb package cannot read it: {type(error).__name__}: {error}"
        ) from error
    if header.n_samples is not None and len(digital) != header.n_samples:
        raise BadRecording(
            record_id,
            "truncated_signal",
            f"the signal has {len(digital)} samples, the header promises {header.n_samples}.",
        )
    bits = max((_BITS[s.format] for s in header.signals if s.format in _BITS), default=64)
    return digital, invalid, 2 ** (bits - 1) - 1


def _check_sums(
    header: Header, digital: np.ndarray, columns: list[int], record_id: str, problems: list[Problem]
) -> None:
    """Compares WFDB's 16-bit checksum of each lead.

    All checksums zero while the samples' are not means the writer did not compute them (a known shortcut):
    the record is kept and reported. Any other difference means the samples are not those that were written:
    refused.
    """
    given = [header.signals[c].checksum for c in columns]
    sums = digital.sum(axis=0, dtype=np.int64)[columns].tolist()
    wrong = [
        c
        for c, want, have in zip(columns, given, sums, strict=True)
        if want is not None and (want - have) % 65536
    ]
    if not wrong:
        return
    if not any(given):
        problems.append(Problem(record_id, "no_checksum", "kept", "the header's checksums are all zero."))
        return
    leads = ", ".join(header.signals[c].lead for c in wrong)
    raise BadRecording(
        record_id, "bad_checksum", f"the samples of {leads} do not match the header's checksum."
    )
