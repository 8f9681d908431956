"""EchoNext 1.1: 100 000 recordings of 10 s at 250 Hz, each with the findings of an echocardiogram.

Poterucha et al., Nature 2025, https://doi.org/10.1038/s41586-025-09227-0; PhysioNet echonext 1.1.0 (restricted
access). Published files: echonext_metadata_100k.csv (its README capitalises the name; both are read) and one
EchoNext_SPLIT_waveforms.npy [N, 1, 2500, 12] per split, in the order of that split's rows in the table. Files
and columns as that README and public code have them; not checked on the published files.

Two things the files do not say are assumed and reported once per file. The lead order: canonical (public checks
of the limb-lead identities agree). The unit: samples are median-filtered, clipped and z-scored with statistics
that are not published, so they are multiplied by PTB-XL's standard deviation of each lead; amplitudes are those
of an average ECG, not measurements.

A flag is 0 both where the finding is absent and where it was not measured, as published.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import recording_from, refuse_rate
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated
from ecg_jax.data.readers.arrays import npy_array, row_name, split_row_name
from ecg_jax.data.readers.rows import age_or_none, convert_cell, not_empty, read_rows, sex_or_none
from ecg_jax.data.recording import CANONICAL_LEADS, Problem, Recording
from ecg_jax.errors import UserError

RATE_HZ = 250
N_SAMPLES = 2500
EXPECTS = (
    "the EchoNext folder: echonext_metadata_100k.csv and EchoNext_{train,val,test}_waveforms.npy (no_split is "
    "not used)"
)
ECHO = {
    "lvef_lte_45_flag": "left ventricular ejection fraction of 45 % or less",
    "lvwt_gte_13_flag": "left ventricular wall of 13 mm or more",
    "aortic_stenosis_moderate_or_greater_flag": "moderate or severe aortic stenosis",
    "aortic_regurgitation_moderate_or_greater_flag": "moderate or severe aortic regurgitation",
    "mitral_regurgitation_moderate_or_greater_flag": "moderate or severe mitral regurgitation",
    "tricuspid_regurgitation_moderate_or_greater_flag": "moderate or severe tricuspid regurgitation",
    "pulmonary_regurgitation_moderate_or_greater_flag": "moderate or severe pulmonary regurgitation",
    "rv_systolic_dysfunction_moderate_or_greater_flag": "moderate or severe right ventricular dysfunction",
    "pericardial_effusion_moderate_large_flag": "moderate or large pericardial effusion",
    "pasp_gte_45_flag": "pulmonary artery systolic pressure of 45 mmHg or more",
    "tr_max_gte_32_flag": "tricuspid regurgitation jet of 3.2 m/s or more",
}
SHD = {"shd_moderate_or_greater_flag": "moderate or severe structural heart disease, any of the findings"}

# PTB-XL's standard deviations in millivolts: the constants of the reference (spec 1.4), which lists them in
# the order I, II, V1-V6, III, aVR, aVL, aVF, put into canonical order.
PTBXL_SD_MV = {
    "I": 0.16401004,
    "II": 0.1647168,
    "III": 0.17128962,
    "aVR": 0.14030828,
    "aVL": 0.14606956,
    "aVF": 0.14656108,
    "V1": 0.23374124,
    "V2": 0.33767231,
    "V3": 0.33362807,
    "V4": 0.30583013,
    "V5": 0.2731171,
    "V6": 0.27554379,
}

_TABLES = ("echonext_metadata_100k.csv", "EchoNext_metadata_100k.csv")
_PUBLISHER = "PhysioNet's echonext 1.1.0"
_SPLITS = ("train", "val", "test")
_NO_SPLIT = "no_split"
_FOLDS = {"val": 8, "test": 9}
_TRAIN_FOLDS = 8
_FOLD_SOURCE = (
    "column split: val is fold 8, test fold 9, train is put into folds 0 to 7 by SHA-256 of patient_key; no_split "
    "(earlier recordings of validation and test patients) is left out"
)


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of splits train, val and test, in order of the table; the record id is ecg_key.

    Label sets: `echo`, the eleven findings; `shd`, the composite. Folds follow spec §7.4.

    Raises:
      UserError: `rate` is given, the table or an array is missing or not EchoNext's, or an array has another
        number of rows than its split.
    """
    refuse_rate(rate, "EchoNext", RATE_HZ)
    table = next((source / name for name in _TABLES if (source / name).is_file()), None)
    if table is None:
        raise UserError(f"{source} is not the EchoNext folder: {_TABLES[0]} is missing (expected {EXPECTS}).")
    counts = dict.fromkeys((*_SPLITS, _NO_SPLIT), 0)
    entries = []
    columns = ("ecg_key", "patient_key", "split", "age_at_ecg", "sex", *ECHO, *SHD)
    for row in read_rows(table, columns, _PUBLISHER):
        key = row["ecg_key"]
        split = convert_cell(
            table, key, row, "split", lambda text: text if text in counts else counts[text], "a split"
        )
        if split != _NO_SPLIT:
            entries.append(_entry(row, table, split, counts[split]))
        counts[split] += 1
    problems = []
    for split in _SPLITS:
        if counts[split]:
            problems += _check_waveforms(source / _waveforms(split), split, counts[split])
    entries, repeated = drop_repeated(entries)
    descriptions = {"echo": ECHO, "shd": SHD}
    classes = {name: list(texts) for name, texts in descriptions.items()}
    return Listing(entries, problems + repeated, ("echo", "shd"), classes, descriptions, _FOLD_SOURCE)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one row of an array as if PTB-XL's statistics had standardised it; `assume_gain` is not used.

    Raises:
      UserError: the array cannot be read.
    """
    file, row = split_row_name(entry.file)
    scores = np.asarray(npy_array(source / file)[row, 0], float)
    sd = np.array([PTBXL_SD_MV[lead] for lead in CANONICAL_LEADS])
    return recording_from(entry, scores * sd, RATE_HZ)


def _waveforms(split: str) -> str:
    return f"EchoNext_{split}_waveforms.npy"


def _check_waveforms(path: Path, split: str, n_rows: int) -> list[Problem]:
    """What is assumed about one array.

    Raises:
      UserError: it is missing or not [n_rows, 1, 2500, 12].
    """
    if not path.is_file():
        raise UserError(f"{path} is missing (expected {EXPECTS}).")
    shape = npy_array(path).shape
    if shape != (n_rows, 1, N_SAMPLES, 12):
        raise UserError(
            f"{path} holds an array {shape}, but the table has {n_rows} rows of split {split}, which make "
            f"{(n_rows, 1, N_SAMPLES, 12)}; take both files as {_PUBLISHER} has them."
        )
    return [
        Problem(
            path.name,
            "standardised_unit",
            "PTB-XL's standard deviations",
            "its samples are z-scores; millivolts are z-score x standard deviation of the lead in PTB-XL.",
        ),
        Problem(
            path.name,
            "lead_order_assumed",
            "canonical order",
            "it has no lead names; its last axis is taken as I, II, III, aVR, aVL, aVF, V1-V6.",
        ),
    ]


def _train_fold(patient: str) -> int:
    """Fold 0-7 from the patient, the same everywhere."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % _TRAIN_FOLDS


def _entry(row: dict[str, str], table: Path, split: str, index: int) -> Entry:
    record_id = row["ecg_key"]

    def cell(column: str, convert, expected: str):
        return convert_cell(table, record_id, row, column, convert, expected)

    flag = {"0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True}
    patient = cell("patient_key", not_empty, "the patient")
    cell("ecg_key", not_empty, "the recording")
    return Entry(
        record_id=record_id,
        file=row_name(_waveforms(split), index),
        patient_id=patient,
        fold=_FOLDS[split] if split in _FOLDS else _train_fold(patient),
        labels={
            name: [column for column in columns if cell(column, flag.__getitem__, "0 or 1")]
            for name, columns in (("echo", ECHO), ("shd", SHD))
        },
        age=cell("age_at_ecg", age_or_none, "a number or nothing"),
        sex=cell("sex", sex_or_none, "male, female or nothing"),
    )
