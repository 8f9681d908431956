"""PTB-XL: two tables and WFDB records at 100 and 500 Hz, with official folds and patients.

Wagner et al., Sci Data 7:154 (2020), https://doi.org/10.1038/s41597-020-0495-6; PhysioNet ptb-xl,
https://doi.org/10.13026/kfzx-aw45 for 1.0.3, CC BY 4.0. Verified on published files.
"""

from __future__ import annotations

import ast
from pathlib import Path

from ecg_jax.data.corpora.entries import complete
from ecg_jax.data.corpora.listing import N_FOLDS, Entry, Listing, drop_repeated
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Problem, Recording
from ecg_jax.errors import UserError

RATES = (500, 100)
LABEL_SETS = ("all", "diag", "sub", "super", "form", "rhythm")

EXPECTS = "the PTB-XL folder: ptbxl_database.csv, scp_statements.csv, records500/ and/or records100/"

#: Superclasses and subclasses by their names in Wagner et al. 2020, whose tables give none.
_NAMES = {
    "super": {
        "NORM": "normal ECG",
        "MI": "myocardial infarction",
        "STTC": "ST/T change",
        "CD": "conduction disturbance",
        "HYP": "hypertrophy",
    },
    "sub": {
        "NORM": "normal ECG",
        "AMI": "anterior myocardial infarction",
        "IMI": "inferior myocardial infarction",
        "LMI": "lateral myocardial infarction",
        "PMI": "posterior myocardial infarction",
        "STTC": "non-diagnostic T abnormalities, digitalis effect, long QT, ...",
        "NST_": "non-specific ST changes",
        "ISC_": "ischaemic in unspecified leads",
        "ISCA": "ischaemic in anterior leads",
        "ISCI": "ischaemic in inferior leads",
        "LAFB/LPFB": "left anterior or posterior fascicular block",
        "IRBBB": "incomplete right bundle branch block",
        "ILBBB": "incomplete left bundle branch block",
        "CLBBB": "complete left bundle branch block",
        "CRBBB": "complete right bundle branch block",
        "_AVB": "AV block",
        "IVCD": "non-specific intraventricular conduction disturbance",
        "WPW": "Wolff-Parkinson-White syndrome",
        "LVH": "left ventricular hypertrophy",
        "RVH": "right ventricular hypertrophy",
        "LAO/LAE": "left atrial overload or enlargement",
        "RAO/RAE": "right atrial overload or enlargement",
        "SEHYP": "septal hypertrophy",
    },
}

_PUBLISHER = "PhysioNet"

# PTB-XL writes 300 for everybody over 89.
_HIDDEN_AGE, _AGE_SHOWN = 300.0, 90.0


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of ptbxl_database.csv in order of ecg_id.

    Labels follow the benchmark of Strodthoff et al. (IEEE JBHI 2021): every code of `scp_codes` counts at any
    likelihood. `all` are the codes; `diag`, `form`, `rhythm` those that scp_statements.csv marks so; `sub`
    and `super` the diagnostic subclasses and superclasses of the diagnostic ones. Classes of each set are
    those of scp_statements.csv in alphabetical order (71, 44, 23, 5, 19, 12), whether or not they occur.

    Args:
      source: the PTB-XL folder.
      rate: 500 or 100; None takes 500 if records500 is there, else 100.

    Raises:
      UserError: a table or the folder of that rate is missing, or a table is not PTB-XL's.
    """
    if rate is None:
        rate = 500 if (source / "records500").is_dir() else 100
    if rate not in RATES:
        raise UserError(f"PTB-XL comes at 500 and 100 Hz, not at {rate} Hz (--source-rate).")
    database, statements = source / "ptbxl_database.csv", source / "scp_statements.csv"
    for path in (database, statements):
        if not path.is_file():
            raise UserError(f"{source} is not a PTB-XL folder: {path.name} is missing (expected {EXPECTS}).")
    if not (source / f"records{rate}").is_dir():
        raise UserError(f"{source} has no folder records{rate} for --source-rate={rate}.")
    sets, descriptions = read_statements(statements)
    classes = {name: sorted(set(mapping.values())) for name, mapping in sets.items()}
    column = "filename_hr" if rate == 500 else "filename_lr"
    columns = ("ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold", column)
    entries = [_entry(row, column, sets, database) for row in read_rows(database, columns, _PUBLISHER)]
    entries.sort(key=lambda entry: int(entry.record_id))
    entries, problems = drop_repeated(entries)
    return Listing(entries, problems, LABEL_SETS, classes, descriptions, "strat_fold of ptbxl_database.csv")


def read_statements(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Reads scp_statements.csv.

    Returns:
      (label set -> scp code -> class, label set -> class -> description).

    Raises:
      UserError: it cannot be read or is not PTB-XL's.
    """
    sets: dict[str, dict[str, str]] = {name: {} for name in LABEL_SETS}
    descriptions: dict[str, dict[str, str]] = {name: {} for name in LABEL_SETS} | _NAMES
    marks = (("diag", "diagnostic"), ("form", "form"), ("rhythm", "rhythm"))
    columns = ("", "description", "diagnostic_subclass", "diagnostic_class", *(column for _, column in marks))
    for row in read_rows(path, columns, _PUBLISHER):
        code, text = row[""], row["description"]
        sets["all"][code] = code
        for name, column in marks:
            if (
                row[column]
                and convert_cell(path, f"code {code}", row, column, float, "1.0 or nothing") == 1.0
            ):
                sets[name][code] = code
        if code in sets["diag"]:
            sets["sub"][code] = row["diagnostic_subclass"]
            sets["super"][code] = row["diagnostic_class"]
        for name in ("all", "diag", "form", "rhythm"):
            if code in sets[name]:
                descriptions[name][code] = text
    return sets, descriptions


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record and adds what the tables say.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, assume_gain=assume_gain)
    return complete(recording, entry)


def _scp_codes(text: str) -> list[str]:
    try:
        codes = ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError from error  # it is no literal, or nested too deeply
    if not isinstance(codes, dict) or not all(isinstance(code, str) for code in codes):
        raise ValueError
    return list(codes)


def _fold(text: str) -> int:
    fold = int(text)
    if not 1 <= fold <= N_FOLDS:
        raise ValueError
    return fold


def _entry(row: dict[str, str], column: str, sets: dict[str, dict[str, str]], path: Path) -> Entry:
    record_id = str(convert_cell(path, "", row, "ecg_id", int, "a whole number"))

    def cell(name: str, convert, expected: str):
        return convert_cell(path, f"ecg_id {record_id}", row, name, convert, expected)

    codes = cell("scp_codes", _scp_codes, "a dict of codes, e.g. {'NORM': 100.0}")
    unknown = sorted(code for code in codes if code not in sets["all"])
    problems = []
    if unknown:
        detail = f"scp_statements.csv does not know {', '.join(unknown)}."
        problems.append(Problem(record_id, "unknown_label", "ignored", detail))
    labels = {
        name: sorted({mapping[code] for code in codes if code in mapping}) for name, mapping in sets.items()
    }
    age = cell("age", age_or_none, "a number or nothing")
    patient_id = None
    if row["patient_id"]:
        patient_id = str(cell("patient_id", lambda text: int(float(text)), "a number or nothing"))
    return Entry(
        record_id=record_id,
        file=cell(column, not_empty, "the name of a file") + ".hea",
        patient_id=patient_id,
        fold=cell("strat_fold", _fold, f"a fold from 1 to {N_FOLDS}"),
        labels=labels,
        age=_AGE_SHOWN if age == _HIDDEN_AGE else age,
        sex=cell("sex", {"0": "M", "1": "F"}.__getitem__, "0 or 1 or nothing") if row["sex"] else None,
        problems=tuple(problems),
    )
