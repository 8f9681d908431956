"""Folders laid out like HEEDB: version 2, and institutions I0001 and I0006 of versions 3 to 5; synthetic signals."""

import dataclasses
from pathlib import Path

import numpy as np

from corpus_replicas import synthetic, write_csv
from ecg_files import write_record
from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import Listing

RHYTHM_CODES = {"sinus": 22, "irregular": 161, "brady": 19, "tachy": 21}
MEANINGS = {
    22: "Normal sinus rhythm",
    161: "Atrial fibrillation",
    19: "Sinus bradycardia",
    21: "Sinus tachycardia",
}
MORE_CODES = {"st_normal": 1684, "st_elevation": 831, "st_depression": 1145}

PARTITIONS = ("S0001/1987/04", "S0003/1990/11", "S0001/1987/07")
YEARS = ("2010", "2018")


@dataclasses.dataclass
class Study:
    """One recording: what its files and its rows say.

    Attributes:
      folder: below WFDB.
      signal: float [T, 12] millivolts, as stored.
      codes: None leaves its row of diagnoses out.
      listed: it has a row in the table of recordings.
    """

    name: str
    folder: str
    rate: int
    signal: np.ndarray
    patient: int | None
    codes: list[int] | None
    sex: str = "Male"
    race: str = "White"
    age: float | None = 50.0
    listed: bool = True


def studies(n: int, emory: bool = False, seconds: float = 4.0) -> list[Study]:
    """n recordings of patients with two each, in all partitions, at 250 and 500 Hz."""
    found = []
    for i in range(n):
        rate = (250, 500)[i % 2]
        signal, truth = synthetic(i, seconds, rate)
        folder = YEARS[i % 2] if emory else PARTITIONS[i % 3]
        patient = 110_000_000 + i // 2
        name = (
            f"MUSE_20191206_{100000 + i}_71000" if emory else f"de_{patient}_19900713{i:06d}_19900713{i:06d}"
        )
        codes = sorted({RHYTHM_CODES[truth.rhythm], MORE_CODES[truth.st]})
        found.append(
            Study(
                name,
                folder,
                rate,
                np.rint(signal * 1000) / 1000,
                patient,
                codes,
                sex=("Male", "Female")[i // 2 % 2],
                race=("White", "Black or African American", "")[i // 2 % 3],
                age=20.0 + i,
            )
        )
    return found


def write_signals(wfdb: Path, some: list[Study], mat: bool) -> None:
    """The WFDB files."""
    for study in some:
        write_record(wfdb / study.folder, study.name, study.signal, rate=study.rate, mat=mat)


def write_version_2(folder: Path, some: list[Study], duplicated: list[str], rows: list[dict] = ()) -> None:
    """ECG/WFDB and Metadata; `rows` are added to demographics_ECG.csv."""
    write_signals(folder / "ECG" / "WFDB", some, mat=True)
    table = [
        {
            "FileName": f"WFDB/{s.folder}/{s.name}.hea",
            "BDSPPatientID": s.patient,
            "PatientRace": s.race,
            "SexDSC": s.sex,
            "Age": "" if s.age is None else s.age,
            "LanguageDSC": "English, US",
        }
        for s in some
        if s.listed
    ]
    write_csv(folder / "Metadata" / "demographics_ECG.csv", [*table, *rows])
    (folder / "Metadata" / "duplicated.csv").write_text("\n".join(["file_name", *duplicated]) + "\n")
    lines = ["file_source|diagnostic_codes|acquisition"]
    lines += [f"{s.name}|{','.join(map(str, s.codes))}|1" for s in some if s.codes is not None]
    (folder / "Metadata" / "ECG_Interpretations.psv").write_text("\n".join(lines) + "\n")


def write_institution(folder: Path, some: list[Study], emory: bool = False, rows: list[dict] = ()) -> None:
    """I0001 or I0006 of version 5, below `folder`; `rows` are added to metadata.csv."""
    base = folder / ("I0006" if emory else "I0001")
    write_signals(base / "WFDB", some, mat=not emory)
    # What stands before a path differs from table to table, and between institutions.
    before = ("WFDB/", "WFDB/") if emory else ("/", "./")
    gaps = any(s.patient is None for s in some)

    def patient(s: Study) -> str:
        return "" if s.patient is None else f"{s.patient}.0" if gaps else str(s.patient)

    table = [
        {
            "BDSPPatientID": patient(s),
            "FileName": f"{before[0]}{s.folder}/{s.name}",
            "FileID": s.name,
            "PatientRace": s.race,
            "Sex" if emory else "SexDSC": s.sex,
            "AgeAtAcquisition": "" if s.age is None else s.age * 365.25,
        }
        for s in some
        if s.listed
    ]
    write_csv(base / "metadata" / "metadata.csv", [*table, *rows])
    codes = [
        {"FileName": f"{before[1]}{s.folder}/{s.name}", "codes": ", ".join(map(str, s.codes))}
        for s in some
        if s.codes is not None
    ]
    write_csv(base / "12SL_diagnoses" / "diagnoses_v24.csv", codes)
    write_csv(
        base / "12SL_diagnoses" / "diagnoses_dictionary.csv",
        [{"codes": code, "acronym": "", "diagnoses": text} for code, text in MEANINGS.items()],
    )


def write(folder: Path, version: int | str, some: list[Study], **more) -> str:
    """A replica of version 2 or 5, or of Emory, and the corpus that reads it."""
    if version == 2:
        write_version_2(folder, some, **{"duplicated": [], **more})
    else:
        write_institution(folder, some, emory=version == "emory", **more)
    return "heedb_emory" if version == "emory" else "heedb"


def listing(corpus: str, folder: Path) -> Listing:
    """What a corpus lists."""
    return CORPORA[corpus].list_records(folder, None)
