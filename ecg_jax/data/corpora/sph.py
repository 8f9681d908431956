"""SPH, Shandong Provincial Hospital: 25 770 recordings of 10-60 s at 500 Hz with AHA statements.

Liu et al., Sci Data 9:272 (2022), https://doi.org/10.1038/s41597-022-01403-5; figshare collection 5779802, open
access under the licence there. Published files: metadata.csv, code.csv and records/ECG_ID.h5, each with the dataset
`ecg`, float16 [12, T] in millivolts, leads in canonical order. Verified on six published recordings, which lay beside
metadata.csv and had ".h5" in ECG_ID: both forms are read.
"""

from __future__ import annotations

from pathlib import Path

from ecg_jax.data.corpora.entries import UNLABELLED_FOLD, recording_from, refuse_rate, with_stratified_folds
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated
from ecg_jax.data.readers.arrays import read_hdf5
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows, sex_or_none
from ecg_jax.data.recording import BadRecording, Problem, Recording
from ecg_jax.data.stratify import ADULT_BINS
from ecg_jax.errors import UserError

RATE_HZ = 500
EXPECTS = "the SPH folder: metadata.csv, code.csv and records/ with one .h5 per recording"

_FOLD_SOURCE = "10 folds of whole patients, stratified by statements, sex and age"
_PUBLISHER = "figshare collection 5779802"
_MODIFIER = "Modifier"  # category in code.csv of codes that qualify a statement and are none themselves


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of metadata.csv in order of ECG_ID, then files without a row.

    Label set `aha`: AHA_Code is a list of statements separated by ";", each a primary code with modifiers behind
    "+" (`60+310;147`); the primary codes are the classes, in numeric order, those that occur. Descriptions
    come from code.csv, if it is there; a code it does not know is reported and ignored. Folds:
    1 to 10, stratified by statements, sex and age.

    Raises:
      UserError: `rate` is given, metadata.csv is missing or not SPH's, or there is no .h5 file.
    """
    refuse_rate(rate, "SPH", RATE_HZ)
    table = source / "metadata.csv"
    if not table.is_file():
        raise UserError(f"{source} is not the SPH folder: metadata.csv is missing (expected {EXPECTS}).")
    folder = "records/" if (source / "records").is_dir() else ""
    files = {path.stem for path in (source / folder).glob("*.h5") if not path.name.startswith(".")}
    if not files:
        raise UserError(f"No .h5 file found in {source / folder} (expected {EXPECTS}).")
    known = _read_codes(source / "code.csv")
    entries = []
    for row in read_rows(table, ("ECG_ID", "AHA_Code", "Patient_ID", "Age", "Sex"), _PUBLISHER):
        entries.append(_entry(row, table, folder, known))
    rows = {entry.record_id for entry in entries}
    entries.sort(key=lambda entry: entry.record_id)
    for name in sorted(files - rows):
        problem = Problem(name, "no_table_row", "kept", "metadata.csv has no row for it.")
        entries.append(Entry(name, f"{folder}{name}.h5", fold=UNLABELLED_FOLD, problems=(problem,)))
    entries, problems = drop_repeated(entries)
    entries = with_stratified_folds(entries, "aha", age_bins=ADULT_BINS)
    occurring = {code for entry in entries if entry.labels for code in entry.labels["aha"]}
    classes = sorted(occurring, key=int)
    descriptions = {code: known[code] for code in classes} if known is not None else {}
    return Listing(entries, problems, ("aha",), {"aha": classes}, {"aha": descriptions}, _FOLD_SOURCE)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one .h5 file; its unit is millivolts, so `assume_gain` is not used.

    Raises:
      BadRecording: it is missing, damaged, or not [12, T].
    """
    values = read_hdf5(source / entry.file, "ecg", entry.record_id)
    if values.ndim != 2 or values.shape[0] != 12 or not values.shape[1]:
        detail = f"{Path(entry.file).name} holds an array {values.shape}, not [12, T]."
        raise BadRecording(entry.record_id, "array_refused", detail)
    return recording_from(entry, values.T.astype(float), RATE_HZ)


def _read_codes(path: Path) -> dict[str, str] | None:
    """Primary code -> description; None without the file."""
    if not path.is_file():
        return None
    rows = read_rows(path, ("Code", "Description"), _PUBLISHER)
    return {
        row["Code"]: row["Description"]
        for row in rows
        if "Category" not in row or row["Category"] != _MODIFIER
    }


def _primary_codes(text: str) -> list[str]:
    """The primary code of each statement, each once.

    Raises:
      ValueError: no statement, or a primary code that is no number.
    """
    codes = [statement.split("+")[0].strip() for statement in text.split(";") if statement.strip()]
    return [str(int(code)) for code in dict.fromkeys(codes) or [""]]


def _entry(row: dict[str, str], table: Path, folder: str, known: dict[str, str] | None) -> Entry:
    record_id = row["ECG_ID"].removesuffix(".h5")

    def cell(column: str, convert, expected: str):
        return convert_cell(table, record_id, row, column, convert, expected)

    cell("ECG_ID", not_empty, "the name of a recording")
    codes = cell("AHA_Code", _primary_codes, "AHA codes, e.g. 60+310;147")
    unknown = [] if known is None else [code for code in codes if code not in known]
    problems = ()
    if unknown:
        detail = f"code.csv has no primary statement {', '.join(unknown)}."
        problems = (Problem(record_id, "unknown_label", "ignored", detail),)
    return Entry(
        record_id=record_id,
        file=f"{folder}{record_id}.h5",
        patient_id=cell("Patient_ID", not_empty, "the patient"),
        labels={"aha": sorted((code for code in codes if code not in unknown), key=int)},
        age=cell("Age", age_or_none, "a number or nothing"),
        sex=cell("Sex", sex_or_none, "M, F or nothing"),
        problems=problems,
    )
