"""PTB-XL: two tables and WFDB records at 100 and 500 Hz, with official folds and patients.

Wagner et al., Sci Data 7:154 (2020), https://doi.org/10.13026/kfzx-aw45 for 1.0.3.
"""

from __future__ import annotations

import ast
import csv
from pathlib import Path

from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Problem, Recording
from ecg_jax.errors import UserError

RATES = (500, 100)
LABEL_SETS = ("all", "diag", "sub", "super", "form", "rhythm")

EXPECTS = "the PTB-XL folder: ptbxl_database.csv, scp_statements.csv, records500/ and/or records100/"

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
    try:
        with open(database, newline="", encoding="utf-8") as file:
            entries = [_entry(row, column, sets) for row in csv.DictReader(file)]
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"{database} is not PTB-XL's table: {type(error).__name__}: {error}.") from error
    entries.sort(key=lambda entry: int(entry.record_id))
    entries, problems = drop_repeated(entries)
    return Listing(entries, problems, LABEL_SETS, classes, descriptions, "strat_fold of ptbxl_database.csv")


def read_statements(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Reads scp_statements.csv.

    Returns:
      (label set -> scp code -> class, label set -> class -> description).
    """
    sets: dict[str, dict[str, str]] = {name: {} for name in LABEL_SETS}
    descriptions: dict[str, dict[str, str]] = {name: {} for name in LABEL_SETS}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                code, text = row[""], row["description"]
                sets["all"][code] = code
                for name, column in (("diag", "diagnostic"), ("form", "form"), ("rhythm", "rhythm")):
                    if row[column] and float(row[column]) == 1.0:
                        sets[name][code] = code
                if code in sets["diag"]:
                    sets["sub"][code] = row["diagnostic_subclass"]
                    sets["super"][code] = row["diagnostic_class"]
                for name in ("all", "diag", "form", "rhythm"):
                    if code in sets[name]:
                        descriptions[name][code] = text
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not PTB-XL's table: {type(error).__name__}: {error}.") from error
    return sets, descriptions


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record and adds what the tables say.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, assume_gain=assume_gain)
    recording.patient_id, recording.fold = entry.patient_id, entry.fold
    recording.labels, recording.age, recording.sex = entry.labels, entry.age, entry.sex
    recording.problems.extend(entry.problems)
    return recording


def _entry(row: dict[str, str], column: str, sets: dict[str, dict[str, str]]) -> Entry:
    record_id = str(int(row["ecg_id"]))
    codes = list(ast.literal_eval(row["scp_codes"]))
    unknown = sorted(code for code in codes if code not in sets["all"])
    problems = []
    if unknown:
        detail = f"scp_statements.csv does not know {', '.join(unknown)}."
        problems.append(Problem(record_id, "unknown_label", "ignored", detail))
    labels = {
        name: sorted({mapping[code] for code in codes if code in mapping}) for name, mapping in sets.items()
    }
    age = float(row["age"]) if row["age"] else None
    return Entry(
        record_id=record_id,
        file=row[column] + ".hea",
        patient_id=str(int(float(row["patient_id"]))) if row["patient_id"] else None,
        fold=int(row["strat_fold"]),
        labels=labels,
        age=_AGE_SHOWN if age == _HIDDEN_AGE else age,
        sex={"0": "M", "1": "F"}[row["sex"]] if row["sex"] else None,
        problems=tuple(problems),
    )
