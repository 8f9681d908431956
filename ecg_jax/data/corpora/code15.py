"""CODE-15 %: 345 779 exams of 7 or 10 s at 400 Hz from Minas Gerais, with six diagnoses.

Ribeiro et al., Nat Commun 11:1760 (2020), https://doi.org/10.1038/s41467-020-15432-4; Zenodo,
https://doi.org/10.5281/zenodo.4916206, open access under the licence there. Published files: exams.csv and
exams_part0.hdf5 to exams_part17.hdf5, each with `tracings`, float32 [N, 4096, 12], and `exam_id`, [N]. Leads DI,
DII, DIII, AVR, AVL, AVF, V1-V6, zeros before and behind shorter exams, and in every part one more row, all zeros
with exam_id 0. Columns and arrays as published and as public code reads them; not verified on the published files.

The unit is not stated with the arrays; the authors' other files are in 1e-4 V. It is told by amplitude: the
median over some exams of the median lead's robust range is 1.2 for PTB-XL in millivolts (0.7-2.7 for any
four of its recordings) and ten times that in 1e-4 V. All parts have one unit: where amplitudes say different ones, or
nothing, `assume_gain` (units per millivolt: 1 or 10) must tell it, which overrules amplitudes in any case.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import UNLABELLED_FOLD, recording_from, refuse_rate, with_stratified_folds
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated, find_files
from ecg_jax.data.readers.arrays import hdf5_datasets, row_name, split_row_name
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows
from ecg_jax.data.recording import BadRecording, Problem, Recording, robust_range
from ecg_jax.data.stratify import ADULT_BINS
from ecg_jax.errors import UserError

RATE_HZ = 400
# As many as the paper has (spec §1.5): the highest fold is one in a hundred exams.
N_FOLDS = 100
EXPECTS = "the CODE-15 folder: exams.csv and exams_part0.hdf5 to exams_part17.hdf5, or some of them"
DIAGNOSES = {
    "1dAVb": "first degree atrioventricular block",
    "RBBB": "right bundle branch block",
    "LBBB": "left bundle branch block",
    "SB": "sinus bradycardia",
    "ST": "sinus tachycardia",
    "AF": "atrial fibrillation",
}

_FOLD_SOURCE = f"{N_FOLDS} folds of whole patients, stratified by diagnoses, sex and age"
_PUBLISHER = "Zenodo 4916206"
_PART = re.compile(r"exams_part(\d+)\.hdf5", re.IGNORECASE)
_NO_EXAM = 0  # exam_id of the row of zeros in every part
_EXAMS_LOOKED_AT = 64
# Limits of the statistic above: millivolts below the middle one, 1e-4 V above it, neither outside.
_LOWEST_MV, _HIGHEST_MV, _HIGHEST_TENTH_MV = 0.4, 4.0, 40.0
_UNITS = {1.0: "millivolts", 0.1: "1e-4 V"}

# Part -> millivolts per unit or None, and the statistic: by SOURCE, once in each process.
_looked_at: dict[Path, dict[Path, tuple[float | None, float]]] = {}


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of all parts in their order, with the rows of exams.csv.

    Label set `code15`: the six diagnoses; an exam with none of them has an empty list. A row of a part that
    exams.csv does not know, or contradicts itself about, is kept without labels and patient, in fold -1.
    The others get folds 0 to 99, stratified by diagnoses, sex and age over the exams of all parts in SOURCE.

    Raises:
      UserError: `rate` is given, exams.csv or every part is missing, or one is not CODE-15's.
    """
    refuse_rate(rate, "CODE-15", RATE_HZ)
    table = source / "exams.csv"
    if not table.is_file():
        raise UserError(f"{source} is not the CODE-15 folder: exams.csv is missing (expected {EXPECTS}).")
    parts = _parts(source)
    if not parts:
        raise UserError(f"No exams_part*.hdf5 found in {source} (expected {EXPECTS}).")
    exams, part_of, contradictory = _read_exams(table)
    entries, problems = [], []
    for path in parts:
        entries += _part_entries(source, path, exams, contradictory)
    _looked_at[source] = {path: _look(path) for path in parts}
    problems += _unit_problems(source)
    listed = {entry.record_id for entry in entries}
    there = {path.name for path in parts}
    absent: dict[str, int] = {}
    for record_id in exams:
        if record_id in listed:
            continue
        part = part_of[record_id]
        if part in there:
            detail = f"{part} has no row for it."
            problems.append(Problem(record_id, "missing_signal", "refused", detail))
        else:
            absent[part] = absent.get(part, 0) + 1
    for part, n in sorted(absent.items()):
        detail = f"{n} exams of exams.csv lie in {part}, which is not in SOURCE."
        problems.append(Problem(part, "missing_part", "left out", detail))
    entries, repeated = drop_repeated(entries)
    entries = with_stratified_folds(entries, "code15", n_folds=N_FOLDS, first=0, age_bins=ADULT_BINS)
    classes, descriptions = {"code15": list(DIAGNOSES)}, {"code15": DIAGNOSES}
    return Listing(entries, problems + repeated, ("code15",), classes, descriptions, _FOLD_SOURCE)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one row of a part, without its zero padding, in millivolts.

    Raises:
      BadRecording: `no_signal` for a row of zeros.
      UserError: the part cannot be read, or `assume_gain` is not given and the unit cannot be told or differs between
        parts.
    """
    file, row = split_row_name(entry.file)
    path = source / file
    (tracings,) = hdf5_datasets(path, ("tracings",))
    signal = np.asarray(tracings[row], float)
    filled = np.flatnonzero((signal != 0).any(axis=1))
    if not len(filled):
        raise BadRecording(entry.record_id, "no_signal", f"row {row} of {path.name} is all zeros.")
    signal = signal[filled[0] : filled[-1] + 1]
    if assume_gain is None:
        return recording_from(entry, signal * _unit(source), RATE_HZ)
    recording = recording_from(entry, signal / assume_gain, RATE_HZ)
    recording.report("gain_assumed", "--assume-gain used", f"{assume_gain:g} units per millivolt.")
    return recording


def _read_exams(table: Path) -> tuple[dict[str, Entry], dict[str, str], set[str]]:
    """Exam -> its entry, as far as the table knows it, exam -> the part it lies in, and the exams that have rows
    which contradict each other, of which nothing is known.
    """
    exams: dict[str, Entry] = {}
    part_of: dict[str, str] = {}
    contradictory: set[str] = set()
    columns = ("exam_id", "age", "is_male", *DIAGNOSES, "patient_id", "trace_file")
    flag = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    for row in read_rows(table, columns, _PUBLISHER):
        record_id = row["exam_id"]

        def cell(column: str, convert, expected: str, row=row, record_id=record_id):
            return convert_cell(table, record_id, row, column, convert, expected)

        record_id = str(cell("exam_id", int, "a whole number"))
        found = [name for name in DIAGNOSES if cell(name, lambda text: flag[text.lower()], "True or False")]
        male = cell("is_male", lambda text: flag[text.lower()], "True or False")
        entry = Entry(
            record_id=record_id,
            file="",
            patient_id=cell("patient_id", not_empty, "the patient"),
            labels={"code15": found},
            age=cell("age", age_or_none, "a number or nothing"),
            sex="M" if male else "F",
        )
        part = cell("trace_file", not_empty, "the name of a part")
        if record_id in exams and (exams[record_id], part_of[record_id]) != (entry, part):
            contradictory.add(record_id)
        exams[record_id], part_of[record_id] = entry, part
    for record_id in contradictory:
        del exams[record_id]
    return exams, part_of, contradictory


def _part_entries(source: Path, path: Path, exams: dict[str, Entry], contradictory: set[str]) -> list[Entry]:
    """The entries of one part, in order of its rows.

    Raises:
      UserError: the part is not CODE-15's.
    """
    tracings, exam_ids = hdf5_datasets(path, ("tracings", "exam_id"))
    if tracings.ndim != 3 or tracings.shape[2] != 12 or tracings.dtype.kind not in "iuf":
        raise UserError(
            f"{path} holds {tracings.dtype} {tracings.shape} in tracings, not numbers [N, 4096, 12]; download "
            "it again."
        )
    if exam_ids.shape != tracings.shape[:1]:
        raise UserError(
            f"{path} has {tracings.shape[0]} tracings and exam_id {exam_ids.shape}, which must be as many; "
            "download it again."
        )
    file = path.relative_to(source).as_posix()
    entries = []
    for row, exam in enumerate(exam_ids[()].tolist()):
        if exam == _NO_EXAM:
            continue
        record_id, name = str(exam), row_name(file, row)
        if record_id in exams:
            known = exams[record_id]
            entry = Entry(record_id, name, known.patient_id, None, known.labels, known.age, known.sex)
        else:
            why = "rows for it that contradict each other" if record_id in contradictory else "no row for it"
            problem = Problem(record_id, "no_table_row", "kept", f"exams.csv has {why}.")
            entry = Entry(record_id, name, fold=UNLABELLED_FOLD, problems=(problem,))
        entries.append(entry)
    return entries


def _parts(source: Path) -> list[Path]:
    """The parts in SOURCE, by number."""
    numbers = {
        int(match[1]): path
        for path in find_files(source, (".hdf5",))
        if (match := _PART.fullmatch(path.name)) is not None
    }
    return [numbers[number] for number in sorted(numbers)]


def _unit_problems(source: Path) -> list[Problem]:
    """One line for each part on the unit found; none if it cannot be told, which `read` refuses."""
    scales = _scales(source)
    if len(scales) != 1:
        return []
    unit = _UNITS[scales.pop()]
    return [
        Problem(
            path.name,
            "unit_detected",
            unit,
            f"the median lead spans {statistic:.2f}; all parts are read as {unit} (--assume-gain overrules that).",
        )
        for path, (_, statistic) in _looked_at[source].items()
    ]


def _scales(source: Path) -> set[float]:
    """What the parts' amplitudes say a unit is in millivolts: one number, or none, or two that contradict."""
    return {scale for scale, _ in _looked_at[source].values() if scale is not None}


def _unit(source: Path) -> float:
    """Millivolts per unit of all parts.

    Raises:
      UserError: it cannot be told, or parts differ.
    """
    if source not in _looked_at:  # a process that has not listed SOURCE
        _looked_at[source] = {path: _look(path) for path in _parts(source)}
    scales = _scales(source)
    if len(scales) == 1:
        return scales.pop()
    spans = ", ".join(
        f"{path.name} {statistic:.3g}" + ("" if scale is None else f" ({_UNITS[scale]})")
        for path, (scale, statistic) in _looked_at[source].items()
    )
    what = "differs between its parts" if scales else "cannot be told, for no ECG has such leads"
    raise UserError(
        f"The unit of CODE-15 in {source} {what}. The median lead spans in {spans}. Say how many units are a "
        "millivolt, in all parts, with --assume-gain: 1 or 10; or take the parts again as published."
    )


def _look(path: Path) -> tuple[float | None, float]:
    """Millivolts per unit that the amplitudes of a part speak for, None if for none, and the statistic they have.

    The exams looked at are spread over the whole part, so every process comes to the same result.
    """
    tracings, exam_ids = hdf5_datasets(path, ("tracings", "exam_id"))
    rows = np.flatnonzero(exam_ids[()] != _NO_EXAM)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _EXAMS_LOOKED_AT).astype(int))] if len(rows) else []
    ranges = []
    for row in chosen:
        signal = np.asarray(tracings[row], float)
        signal = signal[(signal != 0).any(axis=1)]
        if len(signal) > 1 and np.isfinite(signal).all():
            ranges.append(np.median(robust_range(signal)))
    statistic = float(np.median(ranges)) if ranges else 0.0
    scale = None
    if _LOWEST_MV <= statistic < _HIGHEST_MV:
        scale = 1.0
    elif _HIGHEST_MV <= statistic < _HIGHEST_TENTH_MV:
        scale = 0.1
    return scale, statistic
