"""Numbers to predict from a recording of MIMIC-IV-ECG, from the tables beside it.

All tables are credentialed PhysioNet downloads (PhysioNet Credentialed Health Data License) except
machine_measurements.csv, which comes with the recordings (Open Database License), and every one is optional:
what it gives is unknown without it. What a table says of a recording in two rows that contradict each other is
unknown, too, and reported. Which column means what was read from the published preprocessing code of
MIMIC-IV-ECG-ICD (github.com/AI4HealthUOL/ECG-MIMIC), of MDS-ED (github.com/AI4HealthUOL/MDS-ED) and of the
benchmark of arXiv 2509.25095 (github.com/AI4HealthUOL/ECG-FM-Benchmarking), and from code that reads the
published files; not verified on the published files. Of mds_ed.csv, the names of the 15 `deterioration_`
columns and the pattern `vitals_..._mean`, `labvalues_..._mean` are confirmed by several readers of version
1.0.0; that `biometrics_height` and `_weight` are in cm and kg and temperatures in degrees Celsius only by the
code that writes it.

Two things differ from the benchmark. It trims each variable to its 1-99 % quantiles before it looks for the
nearest measurement; here nothing is trimmed, which is left to the task, on training records. And it adds
bedside measurements of intensive care (chartevents.csv, 330 million rows) to biometrics, vital signs and five
laboratory values.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.mimic_tables import find_rows, find_table, nearest, read_columns, take
from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

MACHINE = "machine_measurements.csv"
MDS = "mds_ed.csv"

MISSING = -999.0
"""How mds_ed.csv writes an outcome that could not be observed."""

# The cart writes 29999 where it found no wave. Limits of the benchmark.
MAX_MS, MAX_DEGREES = 5000.0, 360.0

HOUR, DAY = 3600, 86400

ECG = {
    "RR": "RR interval, ms",
    "QRS": "QRS duration, ms",
    "QT": "QT interval, ms",
    "QTc": "QT interval corrected after Bazett, QT / sqrt(RR in s), ms",
    "P_axis": "P axis, degrees",
    "QRS_axis": "QRS axis, degrees",
    "T_axis": "T axis, degrees",
}

BIOMETRICS = {"height": "height, inches", "weight": "weight, pounds", "bmi": "body mass index, kg/m2"}
_OMR = {"Height (Inches)": "height", "Weight (Lbs)": "weight", "BMI (kg/m2)": "bmi"}

VITALS = {
    "dbp": "diastolic blood pressure, mmHg",
    "heartrate": "heart rate, 1/min",
    "o2sat": "oxygen saturation, %",
    "resprate": "respiratory rate, 1/min",
    "sbp": "systolic blood pressure, mmHg",
    "temperature": "temperature, degrees Fahrenheit",
}

# Label of d_labitems.csv -> (item id most measurements of that label in blood have, unit).
LABS = {
    "PT": (51274, "s"),
    "Albumin": (50862, "g/dL"),
    "Anion Gap": (50868, "mEq/L"),
    "Bicarbonate": (50882, "mEq/L"),
    "Bilirubin, Total": (50885, "mg/dL"),
    "Calcium, Total": (50893, "mg/dL"),
    "Creatinine": (50912, "mg/dL"),
    "Ferritin": (50924, "ng/mL"),
    "Urea Nitrogen": (51006, "mg/dL"),
    "Hematocrit": (51221, "%"),
    "Hemoglobin": (51222, "g/dL"),
    "Lymphocytes": (51244, "%"),
    "MCHC": (51249, "g/dL"),
    "RDW": (51277, "%"),
    "Red Blood Cells": (51279, "10^6/uL"),
    "RDW-SD": (52172, "fL"),
    "Creatine Kinase (CK)": (50910, "IU/L"),
    "NTproBNP": (50963, "pg/mL"),
}
# The 44 laboratory values of MDS-ED do not include these.
_NOT_IN_MDS = ("Anion Gap", "Ferritin", "MCHC", "RDW-SD", "NTproBNP")

# What mds_ed.csv says of the 90 minutes after arrival and after, by set.
OUTCOMES = {
    "deterioration": {
        "severe_hypoxemia": "oxygen saturation of 85 % or less within 24 h",
        "ecmo": "extracorporeal membrane oxygenation within 24 h",
        "vasopressors": "vasopressors after the first 90 minutes",
        "inotropes": "inotropes after the first 90 minutes",
        "mechanical_ventilation": "mechanical ventilation within 24 h",
        "cardiac_arrest": "cardiac arrest within 24 h",
    },
    "mortality": {
        **{f"mortality_{days}d": f"death within {days} days" for days in (1, 7, 28, 90, 180, 365)},
        "mortality_stay": "death within the stay",
    },
    "icu": {"icu_24h": "intensive care within 24 h", "icu_stay": "intensive care within the stay"},
}


@dataclasses.dataclass(frozen=True)
class Values:
    """One value set of all recordings: K names, in the order of the columns, and their numbers.

    Attributes:
      names: name -> description with unit and source.
      matrix: float64 [n, K], NaN where unknown.
    """

    names: dict[str, str]
    matrix: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Who was recorded when, int64 [n] each: study id, patient, and seconds since 1970."""

    study: np.ndarray
    patient: np.ndarray
    time: np.ndarray


def read_values(source: Path, recordings: Recordings) -> tuple[dict[str, Values], list[Problem]]:
    """The value sets "ecg", "biometrics", "labs", "vitals", "deterioration", "mortality" and "icu".

    Biometrics are the nearest of omr.csv within 30 days of the recording, vital signs the nearest of
    vitalsign.csv (MIMIC-IV-ED) and laboratory values the nearest of labevents.csv, by the time they were
    stored, within one hour. A set whose table is not there is taken from mds_ed.csv instead (mean over the
    first 90 minutes in the emergency department; 13 of the 18 laboratory values); the descriptions say which
    it was.

    Args:
      source: folder with the tables, each as .csv or .csv.gz.
      recordings: n recordings.

    Returns:
      (value sets, problems): one problem for every recording of which a table has rows that contradict each
      other; what that table says of it is unknown.

    Raises:
      UserError: a table cannot be read or is not the one PhysioNet has.
    """
    mds, problems = _read_mds(source, recordings)
    nearby = {
        "biometrics": _biometrics(source, recordings),
        "labs": _labs(source, recordings),
        "vitals": _vitals(source, recordings),
    }
    machine, more_problems = _machine_measurements(source, recordings)
    found = {"ecg": machine}
    found |= {name: mds[name] if values is None else values for name, values in nearby.items()}
    found |= {name: mds[name] for name in OUTCOMES}
    return found, problems + more_problems


def ecg_features(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Intervals and axes from the machine's measurements.

    Args:
      columns: "rr_interval", "qrs_onset", "qrs_end", "t_end" (ms), "p_axis", "qrs_axis", "t_axis" (degrees),
        float64 [n]. Points of time outside 0-5000 ms, intervals that are not positive, and axes beyond +-360
        degrees are unknown.

    Returns:
      float64 [n, 7] in the order of `ECG`.
    """

    def point(name: str) -> np.ndarray:
        x = columns[name]
        return np.where((x >= 0) & (x <= MAX_MS), x, np.nan)

    def positive(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x, np.nan)

    rr = positive(point("rr_interval"))
    qrs = positive(point("qrs_end") - point("qrs_onset"))
    qt = positive(point("t_end") - point("qrs_onset"))
    axes = [columns[name] for name in ("p_axis", "qrs_axis", "t_axis")]
    axes = [np.where(np.abs(axis) <= MAX_DEGREES, axis, np.nan) for axis in axes]
    return np.stack([rr, qrs, qt, qt / np.sqrt(rr / 1000), *axes], axis=1)


def _machine_measurements(source: Path, recordings: Recordings) -> tuple[Values, list[Problem]]:
    path = find_table(source, MACHINE)
    if path is None:
        return _unknown(ECG, recordings, f"{MACHINE} was not there"), []
    names = ("rr_interval", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis")
    columns = read_columns(path, {"study_id": "int", **dict.fromkeys(names, "float")})
    rows, problems = find_rows(recordings.study, columns, "study_id", path)
    return Values(ECG, ecg_features({name: take(columns[name], rows) for name in names})), problems


def _biometrics(source: Path, recordings: Recordings) -> Values | None:
    import pyarrow as pa
    from pyarrow import compute as pc

    path = find_table(source, "omr.csv")
    if path is None:
        return None
    wanted, patients = pa.array(list(_OMR)), pa.array(np.unique(recordings.patient))

    def keep(part: dict):
        # Other results are no numbers, e.g. a blood pressure of 120/80; of these a few are mistyped.
        number = pc.match_substring_regex(part["result_value"], r"^\d+(\.\d+)?$")
        ours = pc.and_(pc.is_in(part["result_name"], wanted), pc.is_in(part["subject_id"], patients))
        return pc.and_(ours, pc.fill_null(number, False))

    columns = read_columns(
        path,
        {"subject_id": "int", "chartdate": "time", "result_name": "text", "result_value": "text"},
        keep,
    )
    values = np.array(columns["result_value"], np.float64)
    item = np.array([list(_OMR).index(name) for name in columns["result_name"]], np.int64)
    # A date stands for its day: 30 whole days are less than 31.
    matrix = _nearest_of_each(recordings, columns, "chartdate", values, item, range(3), 31 * DAY - 1)
    text = "nearest of omr.csv within 30 days"
    return Values({name: f"{d}; {text}" for name, d in BIOMETRICS.items()}, matrix)


def _vitals(source: Path, recordings: Recordings) -> Values | None:
    path = find_table(source, "vitalsign.csv")
    if path is None:
        return None
    columns = read_columns(path, {"subject_id": "int", "charttime": "time", **dict.fromkeys(VITALS, "float")})
    found = []
    for name in VITALS:
        known = ~np.isnan(columns[name])
        some = {key: columns[key][known] for key in ("subject_id", "charttime")}
        all_one = np.zeros(known.sum(), np.int64)
        found.append(
            _nearest_of_each(recordings, some, "charttime", columns[name][known], all_one, [0], HOUR)
        )
    text = "nearest of vitalsign.csv within 1 h"
    return Values({name: f"{d}; {text}" for name, d in VITALS.items()}, np.concatenate(found, axis=1))


def _labs(source: Path, recordings: Recordings) -> Values | None:
    import pyarrow as pa
    from pyarrow import compute as pc

    path = find_table(source, "labevents.csv")
    if path is None:
        return None
    items = [item for item, _ in LABS.values()]
    wanted, patients = pa.array(items), pa.array(np.unique(recordings.patient))

    def keep(part: dict):
        known = pc.and_(pc.is_valid(part["valuenum"]), pc.is_valid(part["storetime"]))
        ours = pc.and_(pc.is_in(part["itemid"], wanted), pc.is_in(part["subject_id"], patients))
        return pc.and_(known, ours)

    columns = read_columns(
        path, {"subject_id": "int", "itemid": "int", "storetime": "time", "valuenum": "float"}, keep
    )
    matrix = _nearest_of_each(
        recordings, columns, "storetime", columns["valuenum"], columns["itemid"], items, HOUR
    )
    text = "nearest of labevents.csv within 1 h"
    return Values({name: f"{name}, {unit}; {text}" for name, (_, unit) in LABS.items()}, matrix)


def _nearest_of_each(recordings, columns, when, values, item, items, within) -> np.ndarray:
    """float64 [n, K]: for each of K items, the nearest measurement of each recording."""
    found = []
    for wanted in items:
        rows = item == wanted
        measured = columns["subject_id"][rows], columns[when][rows], values[rows]
        found.append(nearest(recordings.patient, recordings.time, *measured, within))
    return np.stack(found, axis=1)


def _read_mds(source: Path, recordings: Recordings) -> tuple[dict[str, Values], list[Problem]]:
    """All sets mds_ed.csv can give, unknown without it, and the recordings it contradicts itself about."""
    path = find_table(source, MDS)
    labs = {name: f"{name}, {unit}" for name, (_, unit) in LABS.items()}
    sets = {"biometrics": BIOMETRICS, "labs": labs, "vitals": VITALS, **OUTCOMES}
    if path is None:
        why = "its table was not there"
        return {name: _unknown(names, recordings, why) for name, names in sets.items()}, []
    column = {("biometrics", name): f"biometrics_{name}" for name in BIOMETRICS}
    column |= {("vitals", name): f"vitals_{name}_mean" for name in VITALS}
    for name in LABS:
        if name not in _NOT_IN_MDS:
            column["labs", name] = f"labvalues_{name.lower().replace(' ', '_')}_mean"
    for kind, names in OUTCOMES.items():
        column |= {(kind, name): f"deterioration_{name}" for name in names}
    # Ids as "float": pandas writes whole numbers as 40689238.0 where a column once had a gap.
    table = read_columns(path, {"general_study_id": "float", **dict.fromkeys(column.values(), "float")})
    rows, problems = find_rows(recordings.study, _with_whole_ids(table, path), "general_study_id", path)
    found = {}
    for kind, names in sets.items():
        matrix = np.full((len(rows), len(names)), np.nan)
        for k, name in enumerate(names):
            if (kind, name) in column:
                matrix[:, k] = take(table[column[kind, name]], rows)
        matrix[matrix == MISSING] = np.nan
        text = MDS if kind in OUTCOMES else f"mean of the first 90 minutes, {MDS}"
        found[kind] = Values({name: f"{d}; {text}" for name, d in names.items()}, matrix)
    # Here in inches, pounds and degrees Fahrenheit, as in omr.csv and vitalsign.csv.
    found["biometrics"].matrix[:, list(BIOMETRICS).index("height")] /= 2.54
    found["biometrics"].matrix[:, list(BIOMETRICS).index("weight")] /= 0.45359237
    temperature = found["vitals"].matrix[:, list(VITALS).index("temperature")]
    temperature[:] = temperature * 9 / 5 + 32
    for name in _NOT_IN_MDS:
        found["labs"].names[name] = f"{labs[name]}; unknown: {MDS} does not have it"
    return found, problems


def _with_whole_ids(table: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The rows of mds_ed.csv that are about a recording, with its id as int64; a stay without one has none.

    Raises:
      UserError: an id is no whole number.
    """
    ids = table["general_study_id"]
    known = ~np.isnan(ids)
    # From 2^53 on, float64 does not tell whole numbers apart.
    wrong = known & ((np.trunc(ids) != ids) | (np.abs(ids) >= 2.0**53))
    if wrong.any():
        raise UserError(
            f"{path}: general_study_id {ids[wrong][0]} is no whole number; take the file as PhysioNet has it."
        )
    return {name: column[known] for name, column in table.items()} | {
        "general_study_id": ids[known].astype(np.int64)
    }


def _unknown(names: dict[str, str], recordings: Recordings, why: str) -> Values:
    matrix = np.full((len(recordings.study), len(names)), np.nan)
    return Values({name: f"{text}; unknown: {why}" for name, text in names.items()}, matrix)
