"""Any folder of WFDB records: every .hea below it, whatever the signal format.

Of no dataset in particular, so licence and paper are those of the folder. The format: WFDB Applications Guide,
https://physionet.org/physiotools/wag/header-5.htm and signal-5.htm.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ecg_jax.data.corpora.entries import refuse_rate
from ecg_jax.data.corpora.listing import HASHED_FOLDS, Entry, Listing, find_files
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Recording
from ecg_jax.errors import UserError

EXPECTS = "any folder of WFDB records (.hea with .dat or .mat), at any depth"

# Folders of one patient's records: patient001 in the PTB Diagnostic ECG Database, p10000032 in MIMIC-IV-ECG.
_PATIENT = re.compile(r"patient\d+|p\d{8}", re.IGNORECASE)


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists every .hea below `source`; the record id is its path without the suffix, so ids cannot repeat.

    A folder named `patient<number>` or `p<eight digits>` gives the patient id.

    Raises:
      UserError: `rate` is given, there is no .hea, or the folder is PTB-XL (whose records come at two rates).
    """
    if (source / "ptbxl_database.csv").exists():
        raise UserError(
            f"{source} is PTB-XL, which holds each recording at two rates and has its own folds and labels; use "
            f"`ecg-jax prepare ptbxl {source} STORE`."
        )
    refuse_rate(rate, "WFDB")
    entries = []
    for path in find_files(source, (".hea",)):
        file = PurePosixPath(path.relative_to(source).as_posix())
        patient = next((part for part in file.parts[:-1] if _PATIENT.fullmatch(part)), None)
        entries.append(Entry(file.with_suffix("").as_posix(), str(file), patient_id=patient))
    if not entries:
        raise UserError(f"No WFDB records found in {source} (expected {EXPECTS}).")
    entries.sort(key=lambda entry: entry.record_id)
    return Listing(entries, [], ("dx",), None, {}, HASHED_FOLDS)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record; a header that breaks the WFDB format refuses it.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, assume_gain=assume_gain)
    recording.patient_id = entry.patient_id
    return recording
