"""PTB Diagnostic ECG Database: 549 recordings of 290 patients at 1000 Hz, with the reason for admission.

Bousseljot et al., Biomed Tech 40:S317 (1995); PhysioNet ptbdb, https://doi.org/10.13026/C28C71, ODC-By 1.0.
Published files: one folder patientNNN per patient with WFDB records of 15 leads; everything clinical stands in the
header's comments. Verified on one published record.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ecg_jax.data.corpora.entries import refuse_rate
from ecg_jax.data.corpora.listing import HASHED_FOLDS, Entry, Listing, find_files
from ecg_jax.data.readers.wfdb import load_header, read_wfdb
from ecg_jax.data.recording import Recording
from ecg_jax.errors import UserError

RATE_HZ = 1000
EXPECTS = "the PTB Diagnostic ECG Database: patient001/ to patient294/ with .hea, .dat and .xyz files"

_PATIENT = re.compile(r"patient\d+", re.IGNORECASE)
_DIAGNOSIS = "reason for admission"
_NONE = ("", "n/a", "unknown")


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists every .hea below `source`; the record id is its path without the suffix, the patient its folder.

    Label set `diagnosis`: the header's "Reason for admission", see `normalise`. Classes are those that occur.

    Raises:
      UserError: `rate` is given, or there is no .hea file in a folder patientNNN.
    """
    refuse_rate(rate, "PTB", RATE_HZ)
    entries = []
    for path in find_files(source, (".hea",)):
        file = PurePosixPath(path.relative_to(source).as_posix())
        patient = next((part for part in file.parts[:-1] if _PATIENT.fullmatch(part)), None)
        if patient is not None:
            entries.append(Entry(file.with_suffix("").as_posix(), str(file), patient_id=patient.lower()))
    if not entries:
        raise UserError(f"No folder patientNNN with .hea files found in {source} (expected {EXPECTS}).")
    entries.sort(key=lambda entry: entry.record_id)
    return Listing(entries, [], ("diagnosis",), None, {}, HASHED_FOLDS)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record; a header without diagnosis ("n/a", as 27 of them) gives an empty label list.

    Raises:
      BadRecording: it cannot be used.
    """
    path = source / entry.file
    recording = read_wfdb(path, entry.record_id, assume_gain=assume_gain)
    recording.patient_id = entry.patient_id
    texts = [
        text
        for key, _, text in (
            c.partition(":") for c in load_header(path, entry.record_id, repair=False).comments
        )
        if key.strip().lower() == _DIAGNOSIS
    ]
    diagnosis = normalise(texts[0]) if texts else None
    recording.labels = {"diagnosis": [] if diagnosis is None else [diagnosis]}
    if diagnosis is None:
        found = repr(texts[0].strip()) if texts else "no such line"
        recording.report("no_diagnosis", "kept", f"reason for admission: {found}.")
    return recording


def normalise(text: str) -> str | None:
    """A reason for admission as class name: lower case, single blanks, without remarks in parentheses.

    "Heart failure (NYHA 3)" and "heart failure (NYHA 4)" are both "heart failure"; None for "n/a".
    """
    plain = re.sub(r"\([^)]*\)", " ", text)
    plain = " ".join(plain.lower().split())
    return None if plain in _NONE else plain
