"""A small folder laid out like MIMIC-IV-ECG, with its tables and their oddities; signals are synthetic."""

import csv
import dataclasses
import gzip
from pathlib import Path

from ecg_files import ecg, write_record
from ecg_jax.data.corpora.mimic import FILE_LEADS
from ecg_jax.data.corpora.mimic_targets import BIOMETRICS, LABS, OUTCOMES, VITALS
from ecg_jax.data.recording import CANONICAL_LEADS

ORDER = [CANONICAL_LEADS.index(lead) for lead in FILE_LEADS]


@dataclasses.dataclass
class Study:
    """One recording: its row of record_list.csv and what the other tables say; None leaves its row out."""

    study: int
    patient: int
    time: str
    machine: dict | None = None
    icd: dict | None = None
    mds: dict | None = None

    @property
    def path(self) -> str:
        return f"files/p{self.patient // 10000}/p{self.patient}/s{self.study}/{self.study}"


MACHINE = {
    "rr_interval": 1000, "p_onset": 40, "p_end": 150, "qrs_onset": 200, "qrs_end": 290, "t_end": 600,
    "p_axis": 50, "qrs_axis": -30, "t_axis": 45,
}  # fmt: skip


def icd(codes: list[str], **changes) -> dict:
    """A row of records_w_diag_icd10.csv of a recording taken first in an emergency stay, in fold 0."""
    row = {
        "ed_stay_id": 33333333.0, "ed_hadm_id": "", "hosp_hadm_id": "", "ed_diag_ed": str(codes),
        "ed_diag_hosp": "[]", "hosp_diag_hosp": "[]", "all_diag_hosp": "[]", "all_diag_all": str(codes),
        "gender": "F", "age": 52.0,
        "anchor_year": 2180, "anchor_age": 52, "dod": "", "ecg_no_within_stay": 0, "ecg_taken_in_ed": True,
        "ecg_taken_in_hosp": False, "ecg_taken_in_ed_or_hosp": True, "fold": 3, "strat_fold": 0,
    }  # fmt: skip
    return {**row, **changes}


def mds_columns() -> list[str]:
    """The columns of mds_ed.csv that are used, and some of the others."""
    columns = ["general_study_id", "general_strat_fold", "demographics_age", "diagnoses_i10"]
    columns += [f"biometrics_{name}" for name in BIOMETRICS]
    columns += [f"vitals_{name}_{statistic}" for name in VITALS for statistic in ("mean", "first")]
    for name in LABS:
        if name not in ("Anion Gap", "Ferritin", "MCHC", "RDW-SD", "NTproBNP"):
            columns.append(f"labvalues_{name.lower().replace(' ', '_')}_mean")
    return columns + [f"deterioration_{name}" for names in OUTCOMES.values() for name in names]


def mds(**values) -> dict:
    """A row of mds_ed.csv: outcomes 0 and nothing measured unless said."""
    row = dict.fromkeys(mds_columns(), "")
    row.update({name: 0.0 for name in row if name.startswith("deterioration_")})
    unknown = set(values) - set(row)
    assert not unknown, unknown
    return {**row, **values}


STUDIES = [
    Study(40689238, 10000032, "2180-07-23 08:44:00", MACHINE,
          icd(["I4819", "W19XXXA"], all_diag_hosp="['I4819']"),
          mds(deterioration_icu_24h=-999.0, deterioration_icu_stay=1.0, biometrics_height=180.0,
              biometrics_weight=80.0, biometrics_bmi=24.7, vitals_temperature_mean=37.0,
              vitals_heartrate_mean=81.5,
              labvalues_creatinine_mean=1.1, **{"labvalues_bilirubin,_total_mean": 0.4})),
    # The second of the stay: trained on, as the fold is none that is held out.
    Study(44458630, 10000032, "2180-07-23 09:54:00",
          {**MACHINE, "p_onset": 29999, "p_end": 29999, "p_axis": 29999},
          icd(["I4819", "T500X5A", "E785"], ecg_no_within_stay=1)),
    # No diagnosis; no P wave, and no QT either.
    Study(49036311, 10000032, "2180-08-06 09:07:00", {**MACHINE, "t_end": 29999, "rr_interval": 0},
          icd([], gender="missing_gender", age="")),
    # Validation fold: the first of the stay, and the second, which is left out.
    Study(45090959, 10000117, "2181-03-04 17:14:00", MACHINE,
          icd(["I10"], gender="M", age=91.0, strat_fold=18),
          mds(deterioration_mortality_365d=1.0, deterioration_ecmo=-999.0)),
    Study(48446569, 10000117, "2183-09-18 13:52:00", {**MACHINE, "qrs_axis": -400},
          icd(["I10"], gender="M", age=93.0, strat_fold=18, ecg_no_within_stay=1)),
    # Test fold, taken on a ward; all sentinels.
    Study(41420867, 10000285, "2160-11-22 13:04:00", dict.fromkeys(MACHINE, 29999),
          icd(["J189", "J18"], strat_fold=19, ecg_taken_in_ed=False, ecg_taken_in_hosp=True)),
    Study(42745010, 10000285, "2160-12-01 13:04:00", MACHINE, icd(["J189"], strat_fold=19)),
    # A recording the table of diagnoses does not have, of a patient it has; and one of an unknown patient.
    Study(42745011, 10000285, "2161-12-01 13:04:00", None, None),
    Study(43000000, 10000400, "2150-01-01 00:00:00", None, None),
]  # fmt: skip


def write_table(path: Path, rows: list[dict]) -> Path:
    """Writes rows as CSV, gzipped if the name says so, quoted as pandas does."""
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_mimic(
    folder: Path, studies=STUDIES, with_icd: bool = True, with_mds: bool = True, with_machine: bool = True
) -> Path:
    """Writes recordings and tables; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [
        {"subject_id": s.patient, "study_id": s.study, "file_name": s.study, "ecg_time": s.time}
        for s in studies
    ]
    write_table(
        folder / "record_list.csv", [{**k, "path": s.path} for k, s in zip(keys, studies, strict=True)]
    )
    for i, study in enumerate(studies):
        write_record(
            (folder / study.path).parent,
            str(study.study),
            ecg(index=i)[:, ORDER],
            leads=FILE_LEADS,
            gain="200.0(0)/mV",
            per_mv=200.0,
            record_line=f"{study.study} 12 500 5000 08:44:00 23/07/2180",
            comments=[f" <subject_id>: {study.patient}"],
        )
    if with_machine:
        reports = {
            "cart_id": 6848296,
            "report_0": "Sinus rhythm",
            "report_1": 'Possible "old" infarct, lateral',
        }
        rows = [{**k, **reports, **s.machine} for k, s in zip(keys, studies, strict=True) if s.machine]
        write_table(folder / "machine_measurements.csv", rows)
    if with_icd:
        # Sorted otherwise than record_list.csv, with the number pandas puts before each row.
        rows = [{"": n, **k, **s.icd} for n, (k, s) in enumerate(zip(keys, studies, strict=True)) if s.icd]
        write_table(folder / "records_w_diag_icd10.csv", rows[::-1])
    if with_mds:
        rows = [{**s.mds, "general_study_id": s.study} for s in studies if s.mds]
        write_table(folder / "mds_ed.csv", rows)
    return folder
