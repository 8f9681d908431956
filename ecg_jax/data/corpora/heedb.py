"""HEEDB, the Harvard-Emory ECG Database: 10.6 million recordings of 10 s at 250 or 500 Hz from Massachusetts General
Hospital (institution I0001), in partitions of a site and a year. Emory's part is corpus `heedb_emory`.

Koscova et al., medRxiv 2024.09.27.24314503; Brain Data Science Platform, https://doi.org/10.60508/rv6h-7d10,
credentialed access under its data use agreement. Two layouts are read:

- version 2: `ECG/WFDB/S0001/1987/MONTH/NAME.hea` with .mat, and in `Metadata/` demographics_ECG.csv (FileName such as
  WFDB/S0001/1987/MONTH/NAME.hea, BDSPPatientID, PatientRace, SexDSC, Age in years), ECG_Interpretations.psv
  (file_source, the NAME, and diagnostic_codes, separated by "|") and duplicated.csv (file_name);
- versions 3 to 5: `ECG/I0001/WFDB/S0001/1987/MONTH/NAME.hea` with .mat, metadata/metadata.csv (FileName such as
  /S0001/1987/MONTH/NAME, BDSPPatientID, PatientRace, SexDSC, AgeAtAcquisition in days) and in 12SL_diagnoses/
  diagnoses_v24.csv (FileName, codes) and diagnoses_dictionary.csv (codes, diagnoses). No list of duplicates is known
  of these versions; metadata.csv has 163 135 recordings less than version 2 states.

Folders, names of files and columns are those that public descriptions and several public programs agree on; nothing
was verified on published files, and of the headers (leads, gains, checksums) nothing is known but that they are WFDB's
beside a MATLAB 4 file, as in the Challenges, whose dialects are accepted. Not used: ICD codes, the statements of
diagnoses_acquisition.csv (software and physician), ethnicity, education, dates of death.
"""

from __future__ import annotations

import re
from pathlib import Path

from ecg_jax.data.corpora.entries import complete, refuse_rate
from ecg_jax.data.corpora.heedb_files import find_partitions
from ecg_jax.data.corpora.heedb_listing import list_institution
from ecg_jax.data.corpora.heedb_tables import Layout, sex_column
from ecg_jax.data.corpora.listing import Entry, Listing
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Recording
from ecg_jax.errors import UserError

EXPECTS = (
    "the HEEDB folder: version 2 with ECG/WFDB/S0001/1987/... and Metadata/ (demographics_ECG.csv, "
    "ECG_Interpretations.psv, duplicated.csv), or version 3 to 5 with I0001/WFDB/S0001/1987/..., I0001/metadata/ and "
    "I0001/12SL_diagnoses/; any of its partitions"
)

_YEARS = {
    "S0001": (1987, 1988, 1994, 2006, 2007, 2011, 2013, *range(2015, 2022)),
    "S0002": (1993, 1997, 1998, 2000, 2003, 2004, 2008, 2009, 2013, 2015, 2016, 2018, 2020, 2022),
    "S0003": (1990, 1994, 2009, 2010, 2013),
    "S0004": (2019,),
}
#: The partitions the paper was trained on (spec §6).
PARTITIONS = tuple(f"{site}-{year}" for site, years in _YEARS.items() for year in years)

INSTITUTION = "I0001"
_PARTITION_FOLDER, _EXAMPLE = r"S\d{4}/\d{4}", "S0001/1987"
_PARTITION = re.compile(r"(?:^|/)WFDB/(S\d{4})/(\d{4})/")


def partition_of(source_file: str) -> str | None:
    """ "S0001-1987" from "ECG/WFDB/S0001/1987/04/NAME.hea", whatever is before WFDB; None for another path."""
    match = _PARTITION.search(source_file)
    return None if match is None else f"{match[1]}-{match[2]}"


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists every .hea of the partitions that are in SOURCE, in order of partition, folder and name.

    The record id is the file's name. Label set `statement`: the codes of the GE 12SL program, in numeric order, of
    all rows of a recording; without a row there they are unknown (null), which is not "none". Recordings of
    duplicated.csv are left out. A recording without a row in the table of demographics, with rows that contradict
    each other or without a patient there, is kept in fold -1, which is trained on only.

    Folds: 20, of whole patients of the partitions in SOURCE, stratified by codes, sex, race and age as in spec §1.5;
    the paper made them for each partition by itself, so that a patient may be in several folds.

    What is missing on either side (rows without file, files without row) is one problem for each partition.

    Raises:
      UserError: `rate` is given, a table is missing, another one or without a row of any recording here, or no record
        is there.
    """
    refuse_rate(rate, "HEEDB")
    layout = _find_layout(source)
    return list_institution(source, layout, _name_of, PARTITIONS, EXPECTS)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record and adds what the tables say.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, repair=True, assume_gain=assume_gain)
    return complete(recording, entry)


def institution_layout(source: Path, institution: str, partition: str, example: str) -> Layout | None:
    """The layout of versions 3 to 5, where SOURCE is the folder of an institution, ECG or what holds ECG.

    Args:
      source: SOURCE.
      institution: "I0001" or "I0006".
      partition, example: form of the folder of a partition, and one.
    """
    for below in (f"ECG/{institution}", institution, ""):
        folder = source / below
        people = folder / "metadata" / "metadata.csv"
        # SOURCE may be the folder of an institution itself; whose, its partitions tell.
        if people.is_file() and (below or find_partitions(folder / "WFDB", partition)):
            return Layout(
                wfdb=f"{below}/WFDB" if below else "WFDB",
                partition=partition,
                example=example,
                people=people,
                sex=sex_column(people),
                age="AgeAtAcquisition",
                ages_per_year=365.25,
                diagnoses=folder / "12SL_diagnoses" / "diagnoses_v24.csv",
                diagnosis_key="FileName",
                diagnosis_codes="codes",
                delimiter=",",
                by_name=False,
                duplicates=None,
                dictionary=folder / "12SL_diagnoses" / "diagnoses_dictionary.csv",
            )
    return None


def _find_layout(source: Path) -> Layout:
    """The layout of SOURCE.

    Raises:
      UserError: it is none of the two, or both, or lacks a table.
    """
    people = source / "Metadata" / "demographics_ECG.csv"
    newer = institution_layout(source, INSTITUTION, _PARTITION_FOLDER, _EXAMPLE)
    if not people.is_file():
        if newer is None:
            raise UserError(
                f"{source} is not the HEEDB folder: neither Metadata/demographics_ECG.csv (version 2) nor "
                f"{INSTITUTION}/metadata/metadata.csv (versions 3 to 5) is there (expected {EXPECTS})."
            )
        return newer
    if newer is not None:
        raise UserError(
            f"{source} holds two versions of HEEDB, {people} and {newer.people}; give the folder of one of them."
        )
    duplicates = source / "Metadata" / "duplicated.csv"
    if not duplicates.is_file():
        # Without it recordings would be in the store twice, and in more than one fold.
        raise UserError(f"{duplicates} is missing; take it from version 2 of HEEDB (expected {EXPECTS}).")
    return Layout(
        wfdb="ECG/WFDB" if (source / "ECG" / "WFDB").is_dir() else "WFDB",
        partition=_PARTITION_FOLDER,
        example=_EXAMPLE,
        people=people,
        sex="SexDSC",
        age="Age",
        ages_per_year=1.0,
        diagnoses=source / "Metadata" / "ECG_Interpretations.psv",
        diagnosis_key="file_source",
        diagnosis_codes="diagnostic_codes",
        delimiter="|",
        by_name=True,
        duplicates=duplicates,
        dictionary=None,
    )


def _name_of(folder: str) -> str:
    return folder.replace("/", "-")
