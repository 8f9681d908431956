"""ZZU pECG: 14 190 recordings of 11 643 children, 5-120 s at 500 Hz, with AHA and Chinese statements.

Tan et al., Sci Data 12 (2025), https://doi.org/10.1038/s41597-025-05225-z; figshare 27078763, open access under the
licence there. Published files: AttributesDictionary.csv, ECGCode.csv, DiseaseCode.csv, and WFDB records
Child_ecg/P00/P00001/P00001_E01 of 12 or 9 leads (without V2, V4, V6). Columns and cells as public code reads them;
not verified on the published files.
"""

from __future__ import annotations

import re
from pathlib import Path

from ecg_jax.data.corpora.entries import complete, refuse_rate, with_stratified_folds
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows, sex_or_none
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Problem, Recording
from ecg_jax.data.stratify import PAEDIATRIC_BINS
from ecg_jax.errors import UserError

RATE_HZ = 500
EXPECTS = "the ZZU pECG folder: AttributesDictionary.csv, ECGCode.csv and Child_ecg/ with WFDB records"

_FOLD_SOURCE = "10 folds of whole patients, stratified by statements, sex and age"
_PUBLISHER = "figshare 27078763"
_FOLDER = "Child_ecg"
_AHA_COLUMN = "AHA(Category&Code)"
_NO_CODE = ("", "N/A")
_DAYS_PER_YEAR = 365.25
# "L145+Modifier362": the modifier begins with a letter; codes joined by "+" inside parentheses do not.
_MODIFIER = re.compile(r"\+(?=[A-Za-z]).*")


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of AttributesDictionary.csv in order of ECG_ID.

    Column AHA_code is a list separated by ";", each item in single quotes: an AHA code, with a modifier behind "+",
    or a description where the AHA has no code. Label sets: `aha`, the AHA codes without modifiers; `finding`, all
    items by their description in ECGCode.csv. Classes are those of ECGCode.csv that occur, in alphabetical order. An
    item that ECGCode.csv does not know is reported and ignored. Records of 9 leads are refused: the tasks are
    defined on 12. Ages are given in days. Folds: 1 to 10, stratified by findings,
    sex and age.

    Raises:
      UserError: `rate` is given, a table or Child_ecg is missing, or a table is not ZZU's.
    """
    refuse_rate(rate, "ZZU pECG", RATE_HZ)
    table, codes = source / "AttributesDictionary.csv", source / "ECGCode.csv"
    for path in (table, codes):
        if not path.is_file():
            raise UserError(
                f"{source} is not the ZZU pECG folder: {path.name} is missing (expected {EXPECTS})."
            )
    if not (source / _FOLDER).is_dir():
        raise UserError(f"{source} has no folder {_FOLDER} (expected {EXPECTS}).")
    described, descriptions = _read_codes(codes)
    entries, refused = [], []
    columns = ("Filename", "ECG_ID", "Patient_ID", "Age", "Gender", "Lead", "AHA_code")
    for row in read_rows(table, columns, _PUBLISHER):
        n_leads = convert_cell(table, row["ECG_ID"], row, "Lead", {"9": 9, "12": 12}.__getitem__, "9 or 12")
        if n_leads < 12:
            refused.append(
                Problem(row["ECG_ID"], "too_few_leads", "refused", f"it has {n_leads} of 12 leads.")
            )
        else:
            entries.append(_entry(row, table, described, descriptions))
    entries.sort(key=lambda entry: entry.record_id)
    entries, repeated = drop_repeated(entries)
    entries = with_stratified_folds(entries, "finding", age_bins=PAEDIATRIC_BINS)
    sets = ("aha", "finding")
    classes = {name: sorted({label for entry in entries for label in entry.labels[name]}) for name in sets}
    texts = {"aha": {code: described[code] for code in classes["aha"]}, "finding": {}}
    return Listing(entries, refused + repeated, sets, classes, texts, _FOLD_SOURCE)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one WFDB record and adds what the table says.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, assume_gain=assume_gain)
    return complete(recording, entry)


def _read_codes(path: Path) -> tuple[dict[str, str], set[str]]:
    """AHA code -> description, and all descriptions."""
    described, descriptions = {}, set()
    for row in read_rows(path, ("Description", _AHA_COLUMN), _PUBLISHER):
        if row["Description"]:
            descriptions.add(row["Description"])
            if row[_AHA_COLUMN] not in _NO_CODE:
                described.setdefault(row[_AHA_COLUMN], row["Description"])
    return described, descriptions


def _unquoted(text: str) -> str:
    return text.strip().strip("'").strip()


def _age_in_years(text: str) -> float | None:
    """Years from days, e.g. "572d".

    Raises:
      ValueError: something else.
    """
    days = _unquoted(text)
    if days and not days.endswith("d"):
        raise ValueError
    age = age_or_none(days.removesuffix("d"))
    return None if age is None else age / _DAYS_PER_YEAR


def _entry(row: dict[str, str], table: Path, described: dict[str, str], descriptions: set[str]) -> Entry:
    record_id = row["ECG_ID"]

    def cell(column: str, convert, expected: str):
        return convert_cell(table, record_id, row, column, convert, expected)

    cell("ECG_ID", not_empty, "the name of a recording")
    aha, findings, unknown = set(), set(), []
    for item in map(_unquoted, row["AHA_code"].split(";")):
        code = _MODIFIER.sub("", item)
        if item in descriptions:
            findings.add(item)
        elif code in described:
            aha.add(code)
            findings.add(described[code])
        elif item not in ("", "Null"):
            unknown.append(item)
    problems = ()
    if unknown:
        detail = f"ECGCode.csv does not know {', '.join(unknown)}."
        problems = (Problem(record_id, "unknown_label", "ignored", detail),)
    file = cell("Filename", not_empty, "the path of a record").strip("/").removesuffix(".hea")
    return Entry(
        record_id=record_id,
        file=f"{_FOLDER}/{file}.hea",
        patient_id=cell("Patient_ID", not_empty, "the patient"),
        labels={"aha": sorted(aha), "finding": sorted(findings)},
        age=cell("Age", _age_in_years, "an age in days, e.g. 572d, or nothing"),
        sex=cell("Gender", lambda text: sex_or_none(_unquoted(text)), "'Male', 'Female' or nothing"),
        problems=problems,
    )
