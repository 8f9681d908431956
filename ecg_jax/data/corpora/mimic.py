"""MIMIC-IV-ECG: 800,000 recordings of 10 s at 500 Hz, diagnoses of MIMIC-IV-ECG-ICD, and numbers to predict.

Recordings: Gow et al., https://doi.org/10.13026/4nqg-sb35, Open Database License. Diagnoses and folds
(records_w_diag_icd10.csv): Strodthoff, Lopez Alcaraz, Haverkamp, arXiv 2312.11050, https://doi.org/10.13026/hdyc-1h77.
Outcomes (mds_ed.csv): Lopez Alcaraz, Strodthoff, arXiv 2407.17856, https://doi.org/10.13026/p90d-vd84. These two, and
the tables of MIMIC-IV and MIMIC-IV-ED, are under the PhysioNet Credentialed Health Data License. Files and columns as
published and as public code reads them; not verified on the published files.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import complete, refuse_rate
from ecg_jax.data.corpora.listing import HASHED_FOLDS, Entry, EntryTable, Listing, hash_fold
from ecg_jax.data.corpora.mimic_tables import find_rows, find_table, read_columns, take
from ecg_jax.data.corpora.mimic_targets import Recordings, Values, read_values
from ecg_jax.data.icd import chapter, propagate
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import CANONICAL_LEADS, Problem, Recording
from ecg_jax.errors import UserError

EXPECTS = (
    "the MIMIC-IV-ECG folder: record_list.csv and files/; beside them, as far as you have them, "
    "machine_measurements.csv, records_w_diag_icd10.csv (MIMIC-IV-ECG-ICD), mds_ed.csv (MDS-ED), omr.csv and "
    "labevents.csv (MIMIC-IV), vitalsign.csv (MIMIC-IV-ED), each .csv or .csv.gz"
)

RECORDS, ICD = "record_list.csv", "records_w_diag_icd10.csv"

N_FOLDS = 20
# Validation and test folds.
HELD_OUT = (18, 19)

# The order of every file: aVF before aVL.
FILE_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")

_CODE = re.compile(r"'([^']*)'|None|nan")


@dataclasses.dataclass(frozen=True)
class Diagnoses:
    """What records_w_diag_icd10.csv says of n recordings.

    Attributes:
      codes: n lists of labels (codes with their ancestors), shared between recordings of one stay.
      fold: n folds, 0 to 19.
      age: float64 [n] years at the recording, NaN where unknown; over 89 not exact.
      male: float64 [n], 1, 0 or NaN.
      in_protocol: float64 [n], 1 or 0, see `list_records`.
      problems: recordings of which it has rows that contradict each other, treated as if it had none.
    """

    codes: list[list[str]]
    fold: list[int]
    age: np.ndarray
    male: np.ndarray
    in_protocol: np.ndarray
    problems: list[Problem]


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of record_list.csv in its order; the record id is the study id.

    Labels: "icd10", the codes of column `all_diag_all`, in full, however rare. They are the discharge
    diagnoses of the hospital (of the stay during which the ECG was taken, or that followed the emergency
    department) or, if there are none, those of the emergency department; cut to 5 characters, without
    trailing X, with all ancestors, as github.com/AI4HealthUOL/ECG-MIMIC does. The published label set has the
    codes of at least 2000 recordings, counted over all recordings of the table and not over those of the protocol
    alone.

    Folds: `strat_fold`, 0 to 19, of which 18 is for validation and 19 for test. A patient it does not list
    gets a fold from the SHA-256 of the patient id; so does everybody, in 10 folds, if there is no table.

    Values: "sex", "age", "protocol" from the same table, the others from `mimic_targets.read_values`.
    "protocol" is 1 for the recordings the published evaluation is about (`mimic_ed_all_edfirst_all_2000_5A`):
    taken in the emergency department, with at least one diagnosis, and in folds 18 and 19 only the first of
    the stay (`ecg_no_within_stay` 0); 0 for all others.

    Args:
      source: the MIMIC-IV-ECG folder.
      rate: None; there is only one.

    Raises:
      UserError: record_list.csv is missing, or a table is not PhysioNet's.
    """
    refuse_rate(rate, "MIMIC-IV-ECG", 500)
    path = find_table(source, RECORDS)
    if path is None:
        raise UserError(
            f"{source} is not the MIMIC-IV-ECG folder: {RECORDS} is missing (expected {EXPECTS})."
        )
    columns = {"subject_id": "int", "study_id": "int", "ecg_time": "time", "path": "text"}
    table = read_columns(path, columns)
    if None in table["path"]:
        raise UserError(f"{path}: study {table['study_id'][list(table['path']).index(None)]} has no path.")
    recordings = Recordings(table["study_id"], table["subject_id"], table["ecg_time"])
    diagnoses = _diagnoses(source, recordings)
    values, doubtful = _values(source, recordings, diagnoses)
    codes = [] if diagnoses is None else sorted({code for some in diagnoses.codes for code in some})
    entries = _table(table, diagnoses, values, codes)
    entries, problems = _without_repeated(entries, table["study_id"])
    return Listing(
        entries,
        problems + ([] if diagnoses is None else diagnoses.problems) + doubtful,
        ("icd10",),
        None,
        {"icd10": {code: _chapter_name(code) for code in codes}},
        HASHED_FOLDS if diagnoses is None else f"strat_fold of {ICD}, patients it does not list by SHA-256",
        {name: dict(found.names) for name, found in values.items()},
    )


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record and adds what the tables say.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, assume_gain=assume_gain)
    if recording.leads == FILE_LEADS:
        # The corpus' own order: put right here, or each of 800,000 recordings would be reported as reordered.
        recording.signal = recording.signal[:, [FILE_LEADS.index(lead) for lead in CANONICAL_LEADS]]
        recording.leads = CANONICAL_LEADS
    return complete(recording, entry)


def _diagnoses(source: Path, recordings: Recordings) -> Diagnoses | None:
    path = find_table(source, ICD)
    if path is None:
        return None
    numbers = dict.fromkeys(("age", "ecg_no_within_stay"), "float")
    ids = dict.fromkeys(("study_id", "subject_id", "strat_fold"), "int")
    table = read_columns(
        path, {**ids, **numbers, "ecg_taken_in_ed": "bool", "gender": "text", "all_diag_all": "text"}
    )
    rows, problems = find_rows(recordings.study, table, "study_id", path)
    fold = _folds(path, table["subject_id"], table["strat_fold"])
    folds = [fold[p] if p in fold else hash_fold(str(p), N_FOLDS, 0) for p in recordings.patient.tolist()]
    parsed: dict[str, list[str]] = {}
    codes = []
    for row in rows.tolist():
        text = table["all_diag_all"][row] if row >= 0 else "[]"
        if text not in parsed:
            parsed[text] = _parse_codes(text, path, table["study_id"][row])
        codes.append(parsed[text])
    taken_in_ed = take(table["ecg_taken_in_ed"].astype(np.float64), rows) == 1
    first = take(table["ecg_no_within_stay"], rows) == 0
    labelled = np.array([len(c) > 0 for c in codes], bool)
    in_protocol = taken_in_ed & labelled & (first | ~np.isin(folds, HELD_OUT))
    # Anything but M and F is unknown: the table has nothing there, or "missing_gender".
    male = np.where(table["gender"] == "M", 1.0, np.where(table["gender"] == "F", 0.0, np.nan))
    age, male = take(table["age"], rows), take(male, rows)
    return Diagnoses(codes, folds, age, male, in_protocol.astype(np.float64), problems)


def _folds(path: Path, patients: np.ndarray, strat_fold: np.ndarray) -> dict[int, int]:
    """The fold of each patient.

    Raises:
      UserError: a fold that does not exist, or a patient in two folds, who would leak.
    """
    wrong = (strat_fold < 0) | (strat_fold >= N_FOLDS)
    if wrong.any():
        raise UserError(
            f"{path}: strat_fold {strat_fold[wrong][0]} is not from 0 to {N_FOLDS - 1}; correct that row."
        )
    pairs = np.unique(np.stack([patients, strat_fold], axis=1), axis=0)
    repeated = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
    if len(repeated):
        raise UserError(
            f"{path}: patient {pairs[repeated[0], 0]} has two folds in strat_fold; correct those rows, or "
            "the test records would not be of new patients."
        )
    return dict(pairs.tolist())


def _parse_codes(text: str | None, path: Path, study: int) -> list[str]:
    """Labels from a Python list of codes, such as "['I10', 'E785']".

    Raises:
      UserError: it is none.
    """
    inside = (text or "").strip()
    cells = [cell.strip() for cell in inside[1:-1].split(",")] if inside[1:-1].strip() else []
    matches = [_CODE.fullmatch(cell) for cell in cells]
    if inside[:1] != "[" or inside[-1:] != "]" or None in matches:
        raise UserError(
            f"{path}: study {study} has {text!r} in column all_diag_all, which must be a list of codes, e.g. "
            "['I10', 'E785']; correct that row."
        )
    return sorted({label for match in matches if match[1] for label in _labels(match[1])})


@functools.cache
def _labels(code: str) -> tuple[str, ...]:
    return tuple(propagate([code]))


def _chapter_name(code: str) -> str:
    found = chapter(code)
    return "" if found is None else f"{found.numeral}: {found.name}"


def _values(source: Path, recordings: Recordings, diagnoses: Diagnoses | None):
    """All value sets, and the problems of `mimic_targets.read_values`."""
    if diagnoses is None:
        columns = dict.fromkeys(("sex", "age", "protocol"), np.full(len(recordings.study), np.nan))
    else:
        columns = {"sex": diagnoses.male, "age": diagnoses.age, "protocol": diagnoses.in_protocol}
    names = {
        "sex": {"male": "1 male, 0 female"},
        "age": {"age": "age at the recording, years; over 89 not exact"},
        "protocol": {
            "ed": "1 if the published evaluation is about the recording: see ecg_jax.data.corpora.mimic"
        },
    }
    own = {name: Values(names[name], column[:, None]) for name, column in columns.items()}
    others, problems = read_values(source, recordings)
    return {**own, **others}, problems


def _table(
    table: dict[str, np.ndarray], diagnoses: Diagnoses | None, values: dict[str, Values], codes: list[str]
) -> EntryTable:
    import pyarrow as pa

    columns = {
        "record_id": pa.array(table["study_id"]).cast(pa.string()),
        "file": pa.array(table["path"], pa.string()),
        "patient_id": pa.array(table["subject_id"]),
    }
    labels = {}
    if diagnoses is not None:
        columns["fold"] = pa.array(diagnoses.fold, pa.int16())
        columns["age"] = pa.array(diagnoses.age, mask=np.isnan(diagnoses.age))
        male = np.where(np.isnan(diagnoses.male), 2, diagnoses.male).astype(np.int8)
        columns["sex"] = pa.DictionaryArray.from_arrays(pa.array(male, mask=male == 2), ["F", "M"])
        columns["labels_icd10"] = _lists(diagnoses.codes, codes)
        labels["icd10"] = codes
    for name, found in values.items():
        flat = pa.array(found.matrix.ravel())
        columns[f"values_{name}"] = pa.FixedSizeListArray.from_arrays(flat, found.matrix.shape[1])
    return EntryTable(pa.table(columns), ".hea", labels, {name: list(v.names) for name, v in values.items()})


def _lists(codes: list[list[str]], classes: list[str]):
    """Arrow's list<int32> of n lists of codes, as indices into `classes`; one object is converted once."""
    import pyarrow as pa

    index = {code: k for k, code in enumerate(classes)}
    converted: dict[int, np.ndarray] = {}
    for some in codes:
        if id(some) not in converted:
            converted[id(some)] = np.array([index[code] for code in some], np.int32)
    arrays = [converted[id(some)] for some in codes]
    starts = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def _without_repeated(entries: EntryTable, study: np.ndarray) -> tuple[EntryTable, list[Problem]]:
    """Keeps the first entry of each study; the later ones become problems."""
    import pyarrow as pa

    _, place, first = np.unique(study, return_index=True, return_inverse=True)
    again = np.flatnonzero(place[first] != np.arange(len(study)))
    if not len(again):
        return entries, []
    problems = []
    for row in again.tolist():
        entry, kept = entries[row], entries[int(place[first[row]])]
        detail = f"{entry.file} has the record id of {kept.file}, which is kept."
        problems.append(Problem(entry.record_id, "duplicate_id", "refused", detail))
    mask = np.ones(len(study), bool)
    mask[again] = False
    return dataclasses.replace(entries, table=entries.table.filter(pa.array(mask))), problems
