"""Listing an institution of HEEDB: its files with what the tables say of them, without duplicates, and with folds.

Eleven million rows never become Python objects: names are Arrow text, everything else numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import UNLABELLED_FOLD
from ecg_jax.data.corpora.heedb_diagnoses import Diagnoses, read_diagnoses, read_meanings
from ecg_jax.data.corpora.heedb_files import Files, find_files, find_partitions, per_partition
from ecg_jax.data.corpora.heedb_tables import (
    Layout,
    People,
    any_listed,
    read_duplicates,
    read_people,
    rows_in,
)
from ecg_jax.data.corpora.listing import EntryTable, Listing
from ecg_jax.data.recording import Problem
from ecg_jax.data.stratify import batched_folds
from ecg_jax.errors import UserError

N_FOLDS = 20
# Limits of age groups, years (spec §1.5).
AGE_BINS = (18, 30, 40, 50, 60, 70, 80, 90, 100)
LABEL_SET = "statement"


def list_institution(
    source: Path, layout: Layout, name_of: Callable[[str], str], known: tuple[str, ...], expects: str
) -> Listing:
    """All records of the partitions that are in SOURCE, with what the tables say of them.

    Args:
      source: SOURCE.
      layout: of the institution.
      name_of: folder of a partition ("S0001/1987") -> its name ("S0001-1987").
      known: the partitions the paper was trained on; others are kept and reported.
      expects: what SOURCE must hold, for messages.

    Raises:
      UserError: no partition or no record is there, or a table cannot be read or is another one.
    """
    partitions = find_partitions(source / layout.wfdb, layout.partition)
    if not partitions:
        raise UserError(f"{source / layout.wfdb} has no folder like {layout.example} (expected {expects}).")
    files = find_files(source / layout.wfdb, partitions)
    if not len(files):
        raise UserError(f"No .hea file found in {source / layout.wfdb} (expected {expects}).")
    problems = [
        Problem(
            name_of(p), "extra_partition", "kept", "the published study was not trained on this partition."
        )
        for p in partitions
        if name_of(p) not in known
    ]
    people, more = read_people(layout, files, name_of)
    _give_back()
    problems += more
    kept, more = _without_duplicates(layout, files, name_of)
    problems += more
    # Of all files, so that rows of a recording that is left out do not count as rows of no recording.
    diagnoses, more = read_diagnoses(layout, files, kept, name_of)
    problems += more
    _give_back()
    if not kept.all():
        columns = ("row", "patient", "sex", "race", "age")
        people = dataclasses.replace(people, **{name: getattr(people, name)[kept] for name in columns})
        files = files.where(kept)
    problems += _count_unknown(layout, files, people, name_of)
    fold = _folds(people, diagnoses)
    return Listing(
        _table(layout, files, people, fold, diagnoses),
        problems,
        (LABEL_SET,),
        {LABEL_SET: diagnoses.classes},
        {LABEL_SET: read_meanings(layout, diagnoses.classes)},
        f"{N_FOLDS} folds of whole patients, stratified by diagnostic codes, sex, race and age, in batches of patients",
    )


def _give_back() -> None:
    """Returns what Arrow keeps of freed memory, which the next step, NumPy's, could not use."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _without_duplicates(
    layout: Layout, files: Files, name_of: Callable[[str], str]
) -> tuple[np.ndarray, list[Problem]]:
    """bool [n]: the files that are neither in the list of duplicates nor have the name of one before them.

    Raises:
      UserError: the list cannot be read, or names nothing that the version has.
    """
    problems = []
    kept = np.ones(len(files), bool)
    if layout.duplicates is not None:
        path = layout.duplicates
        listed = read_duplicates(path)
        place = rows_in(files.names, listed)
        listed_here = place >= 0
        kept &= ~listed_here
        elsewhere = len(listed) - len(np.unique(place[listed_here]))
        if elsewhere:
            if not listed_here.any() and not any_listed(layout, listed):
                raise UserError(
                    f"{path} names recordings such as {listed[0]}, but none that is in SOURCE or in "
                    f"{layout.people.name}, so recordings would be in the store twice; take the file as it was "
                    "published, or leave only its first line to keep them all."
                )
            detail = f"{elsewhere} recordings of {path.name} are not in SOURCE."
            problems.append(Problem(path.name, "missing_part", "left out", detail))
        text = f"{{n}} recordings are in {path.name}."
        problems += per_partition(files, listed_here, name_of, "listed_duplicate", "left out", text)
    again = rows_in(files.names, files.names)
    repeated = (again != np.arange(len(again))) & kept
    # Only a name whose first recording is kept is taken.
    repeated &= kept[again]
    for row in np.flatnonzero(repeated).tolist():
        folders = [files.folders[files.folder[r]] for r in (row, again[row])]
        detail = f"{folders[0]} has the record id of a recording in {folders[1]}, which is kept."
        problems.append(Problem(files.names[row].as_py(), "duplicate_id", "refused", detail))
    return kept & ~repeated, problems


def _count_unknown(
    layout: Layout, files: Files, people: People, name_of: Callable[[str], str]
) -> list[Problem]:
    """How many records of each partition have no row or no patient: they may be trained on only."""
    table = layout.people.name
    without_row = people.row < 0
    text = f"{table} has no row that says who {{n}} recordings are of."
    problems = per_partition(files, without_row, name_of, "no_table_row", "kept", text)
    without_patient = ~without_row & (people.patient < 0)
    text = f"{{n}} recordings have no BDSPPatientID in {table}."
    return problems + per_partition(files, without_patient, name_of, "no_patient", "kept", text)


def _folds(people: People, diagnoses: Diagnoses) -> np.ndarray:
    """int16 [n]; records whose patient is not known may be trained on only."""
    known = people.patient >= 0
    fold = np.full(len(known), UNLABELLED_FOLD, np.int16)
    lengths, codes = np.diff(diagnoses.starts), diagnoses.codes
    starts_of_known = np.concatenate([[0], np.cumsum(lengths[known])])
    codes_of_known = codes if known.all() else codes[np.repeat(known, lengths)]
    age = people.age[known]
    age_bin = np.where(np.isnan(age), len(AGE_BINS) + 1, np.searchsorted(AGE_BINS, age, side="right")).astype(
        np.int8
    )
    # Unknown sex and race are labels too.
    labels = [(starts_of_known, codes_of_known), people.sex[known] + 1, people.race[known] + 1, age_bin]
    fold[known] = batched_folds(people.patient[known], labels, N_FOLDS)
    return fold


def _table(
    layout: Layout, files: Files, people: People, fold: np.ndarray, diagnoses: Diagnoses
) -> EntryTable:
    import pyarrow as pa

    female, male = ("f", "female"), ("m", "male")
    texts = [text.strip().lower() for text in people.sexes]
    places = [0 if text in female else 1 if text in male else -1 for text in texts]
    sex = np.array([*places, -1], np.int8)[people.sex]
    folders = [f"{layout.wfdb}/{folder}" for folder in files.folders]
    table = pa.table(
        {
            "record_id": files.names,
            "folder": pa.DictionaryArray.from_arrays(pa.array(files.folder), folders),
            "patient_id": pa.array(people.patient, mask=people.patient < 0),
            "fold": pa.array(fold),
            "age": pa.array(people.age, mask=np.isnan(people.age)),
            "sex": pa.DictionaryArray.from_arrays(pa.array(sex, mask=sex < 0), ["F", "M"]),
            f"labels_{LABEL_SET}": pa.LargeListArray.from_arrays(
                pa.array(diagnoses.starts), pa.array(diagnoses.codes), mask=pa.array(~diagnoses.known)
            ),
        }
    )
    return EntryTable(table, ".hea", {LABEL_SET: diagnoses.classes})
