"""Chapman-Shaoxing as on figshare: 10 646 patients, one recording each, 10 s at 500 Hz, rhythm and beat labels.

Zheng et al., Sci Data 7:48 (2020), https://doi.org/10.1038/s41597-020-0386-x; figshare collection 4560497, open access
under the licence there. Published files: Diagnostics.xlsx, ECGData/ and ECGDataDenoised/ with FileName.csv: 5000
lines of twelve columns in microvolts. Files as published and as public code reads them, not verified on the
published files: the raw ones begin with a line of lead names, the denoised ones do not, and are then taken to be in
canonical order (reported). The same recordings in WFDB format (PhysioNet ecg-arrhythmia) are read by corpus
`challenge`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import recording_from, refuse_rate, with_stratified_folds
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows, sex_or_none
from ecg_jax.data.recording import (
    CANONICAL_LEADS,
    BadRecording,
    Recording,
    cannot_read,
    canonical_index,
    is_absent,
)
from ecg_jax.errors import UserError

RATE_HZ = 500
MILLIVOLTS_PER_UNIT = 1e-3
EXPECTS = (
    "the ChapmanECG folder of figshare: Diagnostics.xlsx (or .csv) and ECGData/, or else ECGDataDenoised/"
)
RHYTHMS = {
    "AF": "atrial flutter",
    "AFIB": "atrial fibrillation",
    "AT": "atrial tachycardia",
    "AVNRT": "atrioventricular node reentrant tachycardia",
    "AVRT": "atrioventricular reentrant tachycardia",
    "SA": "sinus irregularity",
    "SAAWR": "sinus atrium to atrial wandering rhythm",
    "SB": "sinus bradycardia",
    "SR": "sinus rhythm",
    "ST": "sinus tachycardia",
    "SVT": "supraventricular tachycardia",
}

_PUBLISHER = "figshare collection 4560497"


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of Diagnostics.xlsx (or .csv, if only that is there) in order of FileName.

    Label sets: `rhythm`, the one code of column Rhythm; `beat`, the codes of column Beat, separated by blanks,
    none where it says NONE; `all`, both. Classes are the codes that occur, in alphabetical order. Each patient
    has one recording, so its name is the patient id. Of ECGData and ECGDataDenoised the first is taken where
    both are there: raw signals are what every other corpus has. Folds: 1 to 10, stratified by `all`.

    Raises:
      UserError: `rate` is given, the table or both folders are missing, or the table is not Chapman's.
    """
    refuse_rate(rate, "Chapman", RATE_HZ)
    tables = [source / name for name in ("Diagnostics.xlsx", "Diagnostics.csv")]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        raise UserError(f"{source} has no Diagnostics.xlsx or Diagnostics.csv (expected {EXPECTS}).")
    folder = next((name for name in ("ECGData", "ECGDataDenoised") if (source / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{source} has no folder ECGData or ECGDataDenoised (expected {EXPECTS}).")
    columns = ("FileName", "Rhythm", "Beat", "PatientAge", "Gender")
    entries = [_entry(row, table, folder) for row in read_rows(table, columns, _PUBLISHER)]
    entries.sort(key=lambda entry: entry.record_id)
    entries, problems = drop_repeated(entries)
    entries = with_stratified_folds(entries, "all")
    sets = ("rhythm", "beat", "all")
    classes = {name: sorted({code for entry in entries for code in entry.labels[name]}) for name in sets}
    descriptions = {
        name: {code: RHYTHMS[code] for code in classes[name] if code in RHYTHMS} for name in ("rhythm", "all")
    }
    return Listing(
        entries,
        problems,
        sets,
        classes,
        descriptions,
        "10 stratified folds of recordings, each of another patient",
    )


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one .csv file; its unit is microvolts, so `assume_gain` is not used.

    Raises:
      BadRecording: it is missing or not a table of twelve columns of numbers.
      UserError: it is there and cannot be read.
    """
    path = source / entry.file

    def refuse(kind: str, detail: str) -> BadRecording:
        return BadRecording(entry.record_id, kind, detail)

    try:
        with open(path, encoding="utf-8-sig") as file:
            line = file.readline()
            if not line:
                raise refuse("table_refused", f"{path.name} is empty.")
            first = [cell.strip() for cell in line.split(",")]
            named = all(canonical_index(cell) is not None for cell in first)
            if not named:
                file.seek(0)
            values = np.loadtxt(file, delimiter=",", ndmin=2)
    except OSError as error:
        if is_absent(error):
            raise refuse("missing_signal", f"its signal file {path.name} is not there.") from error
        raise cannot_read(path, error) from error
    except ValueError as error:
        raise refuse("table_refused", f"{path.name} is no table of numbers: {error}.") from error
    if values.shape[1] != 12 or (named and len(first) != 12) or not len(values):
        raise refuse("table_refused", f"{path.name} holds {values.shape} numbers, not [T, 12].")
    leads = tuple(first) if named else CANONICAL_LEADS
    recording = recording_from(entry, values * MILLIVOLTS_PER_UNIT, RATE_HZ, leads)
    if not named:
        detail = (
            f"{path.name} has no line of lead names, so its columns are taken as I, II, III, aVR, ... V6."
        )
        recording.report("lead_order_assumed", "canonical order", detail)
    return recording


def _entry(row: dict[str, str], table: Path, folder: str) -> Entry:
    record_id = row["FileName"].removesuffix(".csv")

    def cell(column: str, convert, expected: str):
        return convert_cell(table, record_id, row, column, convert, expected)

    cell("FileName", not_empty, "the name of a recording")
    rhythm = [cell("Rhythm", not_empty, "a rhythm, e.g. SR")]
    codes = {code for code in re.split(r"[\s,]+", row["Beat"]) if code}
    beat = sorted(codes - {"NONE"})
    return Entry(
        record_id=record_id,
        file=f"{folder}/{record_id}.csv",
        patient_id=record_id,
        labels={"rhythm": rhythm, "beat": beat, "all": sorted({*rhythm, *beat})},
        age=cell("PatientAge", age_or_none, "a number or nothing"),
        sex=cell("Gender", sex_or_none, "MALE, FEMALE or nothing"),
    )
