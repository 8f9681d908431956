"""EchoNext 1.1: 100 000 recordings of 10 s at 250 Hz, each with the findings of an echocardiogram.

Poterucha et al., Nature 2025, https://doi.org/10.1038/s41586-025-09227-0; PhysioNet echonext 1.1.0 (restricted
access, under a data use agreement). Published files: echonext_metadata_100k.csv (its README capitalises the name;
both are read) and one EchoNext_SPLIT_waveforms.npy [N, 1, 2500, 12] per split, in the order of that split's rows in
the table. Files and columns as that README and public code have them; not verified on the published files.

Two things the files do not say are concluded from their limb leads and reported once per file. The lead order:
canonical, which is refused where the limb leads do not follow from each other. The unit: samples are
median-filtered, clipped and z-scored with statistics that are not published. Where one standard deviation was
divided out of all leads, the identities of Einthoven and Goldberger (II = I + III, aVR = -(I + II) / 2, ...) still
hold; where each lead was divided by its own, they hold with other coefficients. The coefficients are estimated by
least squares over 256 rows of the first file, and millivolts are z-score x the mean of PTB-XL's standard
deviations of the twelve leads in the first case, x that of the lead in the second. Amplitudes are those of an
average ECG, not measurements.

A flag is 0 both where the finding is absent and where it was not measured, as published.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.entries import recording_from, refuse_rate
from ecg_jax.data.corpora.listing import Entry, Listing, drop_repeated, hash_fold
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

# PTB-XL's standard deviations in millivolts: the constants of the code of arXiv 2605.12241
# (github.com/AI4HealthUOL/ecg-pretraining-strategies), which lists them in the order I, II, V1-V6, III, aVR, aVL,
# aVF, put into canonical order.
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

# Lead -> the two limb leads it follows from, with their coefficients.
_IDENTITIES = {
    "II": {"I": 1.0, "III": 1.0},
    "aVR": {"I": -0.5, "II": -0.5},
    "aVL": {"I": 0.5, "III": -0.5},
    "aVF": {"II": 0.5, "III": 0.5},
}
_ROWS_LOOKED_AT = 256
# Half of how far the coefficients are from the identities, on average, after division by PTBXL_SD_MV.
_MAX_DEVIATION = 0.06
# Limb leads explain each other almost wholly, other leads taken for them less than a quarter; of limb leads in
# another order the coefficients are 0.6 and more from the identities, of scaled ones less than 0.2.
_MIN_EXPLAINED, _MAX_SCALED_DEVIATION = 0.5, 0.4

_TABLES = ("echonext_metadata_100k.csv", "EchoNext_metadata_100k.csv")
_PUBLISHER = "PhysioNet's echonext 1.1.0"
_SPLITS = ("train", "val", "test")
_NO_SPLIT = "no_split"
_FOLDS = {"val": 8, "test": 9}
_TRAIN_FOLDS = 8

_scales: dict[tuple, _Scale] = {}
_FOLD_SOURCE = (
    "column split: val is fold 8, test fold 9, train is put into folds 0 to 7 by SHA-256 of patient_key; no_split "
    "(earlier recordings of validation and test patients) is left out"
)


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists the rows of splits train, val and test, in order of the table; the record id is ecg_key.

    Label sets: `echo`, the eleven findings; `shd`, the composite. Folds: 8 is val, 9 test, 0 to 7 train.

    Raises:
      UserError: `rate` is given, the table or an array is missing or not EchoNext's, an array has another
        number of rows than its split, or its limb leads do not follow from each other.
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
            _check_waveforms(source / _waveforms(split), split, counts[split])
    for split in _SPLITS:
        if counts[split]:
            problems += _assumptions(_waveforms(split), _scale(source))
    entries, repeated = drop_repeated(entries)
    descriptions = {"echo": ECHO, "shd": SHD}
    classes = {name: list(texts) for name, texts in descriptions.items()}
    return Listing(entries, problems + repeated, ("echo", "shd"), classes, descriptions, _FOLD_SOURCE)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one row of an array in the millivolts of an average ECG, see above; `assume_gain` is not used.

    Raises:
      UserError: the array cannot be read.
    """
    file, row = split_row_name(entry.file)
    scale = _scale(source)  # before the row, as only one file stays open
    scores = np.asarray(npy_array(source / file)[row, 0], float)
    return recording_from(entry, scores * scale.millivolts, RATE_HZ)


def _waveforms(split: str) -> str:
    return f"EchoNext_{split}_waveforms.npy"


def _check_waveforms(path: Path, split: str, n_rows: int) -> None:
    """Refuses an array that is not the one of a split.

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


def limb_leads(scores: np.ndarray) -> tuple[float, float]:
    """How II, aVR, aVL and aVF follow from I, II and III, by least squares (with intercept).

    Args:
      scores: [n, 6] finite samples of the limb leads in canonical order, in any unit, n at least 1.

    Returns:
      (deviation, explained): the mean of |coefficient / that of the identity - 1| over the eight coefficients, 0
      where the leads have one unit; and the mean over the four leads of the share of variance explained.

    Raises:
      ValueError: a lead is constant, or two leads that others follow from are proportional.
    """
    # Clipped samples break the identities; a lead's extremes are all of them, and few where nothing was clipped.
    scores = scores[((scores > scores.min(axis=0)) & (scores < scores.max(axis=0))).all(axis=1)]
    if not len(scores):
        raise ValueError("a limb lead is constant")
    column = {lead: scores[:, i] - scores[:, i].mean() for i, lead in enumerate(CANONICAL_LEADS[:6])}
    deviations, explained = [], []
    for lead, parts in _IDENTITIES.items():
        x, y = np.stack([column[part] for part in parts], axis=1), column[lead]
        coefficients, _, rank, _ = np.linalg.lstsq(x, y, rcond=1e-6)
        if rank < 2 or not (y @ y) > 0:
            raise ValueError(f"{lead} cannot be compared with {' and '.join(parts)}")
        deviations += np.abs(coefficients / list(parts.values()) - 1).tolist()
        residual = y - x @ coefficients
        explained.append(1 - (residual @ residual) / (y @ y))
    return float(np.mean(deviations)), float(np.mean(explained))


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Millivolts of a z-score, [12] in canonical order, and what they rest on."""

    millivolts: np.ndarray
    common: bool
    deviation: float
    explained: float


def _holds_waveforms(array: np.ndarray) -> bool:
    return len(array) > 0 and array.shape[1:] == (1, N_SAMPLES, 12)


def _scale(source: Path) -> _Scale:
    """The scale of all arrays, told by the first of train, val and test that has rows.

    The rows looked at are spread over the whole array, so every process comes to the same result.

    Raises:
      UserError: the limb leads are not what the canonical order makes them.
    """
    paths = [source / _waveforms(split) for split in _SPLITS]
    keys = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    if tuple(keys) in _scales:
        return _scales[tuple(keys)]
    # A file the table has no rows for may be another array; without any file the error names the first.
    there = [path for path in paths if path.is_file() and _holds_waveforms(npy_array(path))]
    path = [*there, paths[0]][0]
    array = npy_array(path)
    rows = np.unique(np.linspace(0, len(array) - 1, _ROWS_LOOKED_AT).astype(int))
    # Every fourth sample and six leads, one row at a time: copying the rows whole takes ten times the memory.
    samples = np.concatenate([np.asarray(array[row, 0, ::4, :6], float) for row in rows])
    samples = samples[np.isfinite(samples).all(axis=1)]
    try:
        deviation, explained = limb_leads(samples if len(samples) else np.zeros((1, 6)))
    except ValueError as error:
        raise UserError(
            f"{path}: the unit of its z-scores cannot be told, for {error}; download it again."
        ) from error
    if explained < _MIN_EXPLAINED or deviation > _MAX_SCALED_DEVIATION:
        raise UserError(
            f"{path}: its leads are not in the order I, II, III, aVR, aVL, aVF, V1-V6, in which the limb leads follow "
            f"from each other: over {len(rows)} rows {explained:.0%} of their variance do, with coefficients "
            f"{deviation:.0%} from those of the identities; take it as {_PUBLISHER} has it."
        )
    sd = np.array([PTBXL_SD_MV[lead] for lead in CANONICAL_LEADS])
    common = deviation <= _MAX_DEVIATION
    _scales[tuple(keys)] = _Scale(np.full(12, sd.mean()) if common else sd, common, deviation, explained)
    return _scales[tuple(keys)]


def _assumptions(name: str, scale: _Scale) -> list[Problem]:
    """What is assumed about one array."""
    apart = f"the coefficients of its limb leads are {scale.deviation:.1%} from those of millivolts"
    if scale.common:
        action = "PTB-XL's mean standard deviation"
        detail = (
            f"its samples are z-scores by one standard deviation ({apart}); millivolts are z-score x "
            f"{scale.millivolts[0]:.4f}, the mean of the standard deviations of PTB-XL's leads."
        )
    else:
        action = "PTB-XL's standard deviations"
        detail = (
            f"its samples are z-scores by one standard deviation per lead ({apart}); millivolts are z-score x "
            "standard deviation of the lead in PTB-XL."
        )
    order = (
        "it has no lead names; its last axis is taken as I, II, III, aVR, aVL, aVF, V1-V6, which explains "
        f"{scale.explained:.1%} of the variance of its limb leads."
    )
    return [
        Problem(name, "standardised_unit", action, detail),
        Problem(name, "lead_order_assumed", "canonical order", order),
    ]


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
        fold=_FOLDS[split] if split in _FOLDS else hash_fold(patient, _TRAIN_FOLDS, 0),
        labels={
            name: [column for column in columns if cell(column, flag.__getitem__, "0 or 1")]
            for name, columns in (("echo", ECHO), ("shd", SHD))
        },
        age=cell("age_at_ecg", age_or_none, "a number or nothing"),
        sex=cell("sex", sex_or_none, "male, female or nothing"),
    )
