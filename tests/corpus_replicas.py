"""Small folders in the published layout of each labelled corpus, filled with synthetic signals.

Every function writes `n` recordings of one corpus with its quirks (modifiers, padding, an unlisted recording,
...) below a folder, in the files, columns and units of the publication, and returns record id -> signal [T, 12]
in millivolts, canonical leads, as it should come out of `prepare` at the source's rate. Labels follow what the
synthetic signals show, so that a probe can learn them. Patients have two recordings each unless it says otherwise.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecg_files import write_record
from ecg_jax.data.corpora.echonext import ECHO, PTBXL_SD_MV, SHD
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.synthetic import Truth, synthetic_recording

SEED = 11


def synthetic(index: int, seconds: float, rate: float) -> tuple[np.ndarray, Truth]:
    """Signal [T, 12] in millivolts and what it shows."""
    recording, truth = synthetic_recording(SEED, index, seconds, rate)
    return recording.signal, truth


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A .csv with the keys of the first row as first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict]:
    """The rows of a .csv, for tests that damage a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_xlsx(path: Path, rows: Sequence[dict]) -> None:
    """An .xlsx with one sheet and the keys of the first row as first line."""
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(list(rows[0]))
    for row in rows:
        sheet.append(list(row.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def write_sph(
    folder: Path, n: int, seconds: float = 10.0, published: bool = True, unlisted: bool = True
) -> dict[str, np.ndarray]:
    """SPH: metadata.csv, code.csv, records/*.h5 (`published`), or the .h5 beside the table with ".h5" in ECG_ID.

    `unlisted` leaves the last recording out of metadata.csv.
    """
    import h5py

    codes = {"sinus": "1", "irregular": "50+310", "brady": "22", "tachy": "21"}
    more = {"st_normal": "", "st_elevation": ";145+313", "st_depression": ";146"}
    signals, rows = {}, []
    records = folder / "records" if published else folder
    records.mkdir(parents=True)
    for i in range(n):
        name = f"A{i + 1:05d}"
        signal, truth = synthetic(i, seconds, 500)
        stored = signal.T.astype(np.float16)
        with h5py.File(records / f"{name}.h5", "w") as file:
            file.create_dataset("ecg", data=stored, compression="gzip")
        signals[name] = stored.T.astype(float)
        statement = codes[truth.rhythm] + more[truth.st]
        rows.append(
            {
                "ECG_ID": name if published else f"{name}.h5",
                "AHA_Code": "1;1" if statement == "1" else statement,
                "Patient_ID": f"S{i // 2 + 1:05d}",
                "Age": 40 + i % 40,
                "Sex": "MF"[i // 2 % 2],
                "N": len(signal),
                "Date": "2020-03-04",
            }
        )
    write_csv(folder / "metadata.csv", rows[:-1] if unlisted else rows)
    if published:
        write_csv(
            folder / "code.csv",
            [
                {"Category": category, "Code": code, "Description": text}
                for category, code, text in (
                    ("A", 1, "Normal ECG"),
                    ("C", 21, "Sinus tachycardia"),
                    ("C", 22, "Sinus bradycardia"),
                    ("F", 50, "Atrial fibrillation"),
                    ("L", 145, "ST deviation"),
                    ("L", 146, "ST deviation with T-wave change"),
                    ("Modifier", 310, "Frequent"),
                    ("Modifier", 313, "Acute"),
                )
            ],
        )
    return signals


def write_code15(
    folder: Path,
    n: int,
    parts: int = 2,
    units_per_mv: float = 1.0,
    unlisted: bool = True,
    extra_row: bool = True,
) -> dict[str, np.ndarray]:
    """CODE-15 %: exams.csv and exams_part{i}.hdf5 with `tracings` [N, 4096, 12] at 400 Hz and `exam_id` [N].

    The rows of a part are in another order than those of exams.csv; even exams last 7 s, odd ones 10 s, with
    zeros on both sides. `units_per_mv` is 1 (millivolts) or 10 (1e-4 V). `unlisted` leaves the last exam out of
    exams.csv; `extra_row` ends every part with a row of zeros and exam_id 0.
    """
    import h5py

    signals, rows = {}, []
    members: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(parts)]
    for i in range(n):
        exam, length = 1000 + 7 * i, (2800, 4000)[i % 2]
        signal, truth = synthetic(i, length / 400, 400)
        before = (4096 - length) // 2
        stored = np.zeros((4096, 12), np.float32)
        stored[before : before + length] = signal * units_per_mv
        signals[str(exam)] = signal.astype(np.float32).astype(float)
        members[i % parts].insert(0, (exam, stored))
        rows.append(
            {
                "exam_id": exam,
                "age": 30 + i % 50,
                "is_male": bool(i // 2 % 2),
                "nn_predicted_age": 44.2,
                "1dAVb": truth.axis == "axis_left",
                "RBBB": truth.axis == "axis_right",
                "LBBB": truth.st == "st_elevation",
                "SB": truth.rhythm == "brady",
                "ST": truth.rhythm == "tachy",
                "AF": truth.rhythm == "irregular",
                "patient_id": 500_000 + i // 2,
                "death": "",
                "timey": "",
                "normal_ecg": truth.rhythm == "sinus"
                and truth.st == "st_normal"
                and truth.axis == "axis_normal",
                "trace_file": f"exams_part{i % parts}.hdf5",
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "exams.csv", rows[:-1] if unlisted else rows)
    for part, exams in enumerate(members):
        extra = [(0, np.zeros((4096, 12), np.float32))] if extra_row else []
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            file["tracings"] = np.stack([stored for _, stored in exams + extra])
            file["exam_id"] = np.array([exam for exam, _ in exams + extra], np.int64)
    return signals


def write_chapman(
    folder: Path, n: int, seconds: float = 10.0, xlsx: bool = True, denoised: bool = False
) -> dict[str, np.ndarray]:
    """Chapman on figshare: Diagnostics.xlsx (or .csv) and ECGData/*.csv with lead names, microvolts at 500 Hz.

    `denoised` writes ECGDataDenoised instead, whose files have no lead names. Every patient has one recording.
    """
    rhythms = {"sinus": "SR", "irregular": "AFIB", "brady": "SB", "tachy": "ST"}
    beats = {"st_normal": "", "st_elevation": "STE", "st_depression": "STDD"}
    axes = {"axis_normal": "", "axis_left": "ALS", "axis_right": "ARS"}
    signals, rows = {}, []
    files = folder / ("ECGDataDenoised" if denoised else "ECGData")
    files.mkdir(parents=True)
    for i in range(n):
        name = f"MUSE_20180113_{171327 + i}_27000"
        signal, truth = synthetic(i, seconds, 500)
        stored = np.round(signal * 1000, 2)
        header = "" if denoised else ",".join(CANONICAL_LEADS)
        np.savetxt(files / f"{name}.csv", stored, "%.2f", ",", header=header, comments="")
        if denoised:
            text = (files / f"{name}.csv").read_text()
            (files / f"{name}.csv").write_text(text.lstrip("\n"))
        signals[name] = stored / 1000
        beat = " ".join(code for code in (beats[truth.st], axes[truth.axis]) if code)
        rows.append(
            {
                "FileName": name,
                "Rhythm": rhythms[truth.rhythm],
                "Beat": beat or "NONE",
                "PatientAge": 50 + i % 30,
                "Gender": ("MALE", "FEMALE")[i % 2],
                "VentricularRate": round(truth.heart_rate),
            }
        )
    (write_xlsx if xlsx else write_csv)(folder / f"Diagnostics.{'xlsx' if xlsx else 'csv'}", rows)
    return signals


def write_ptb(folder: Path, n: int, seconds: float = 10.0) -> dict[str, np.ndarray]:
    """PTB: patientNNN/s0NNNlre.hea with 12 leads in lower case and vx, vy, vz, 1000 Hz, 2000 integers per mV.

    The last recording has no diagnosis ("n/a").
    """
    reasons = {
        "sinus": "Healthy control",
        "irregular": "Heart failure (NYHA 3)",
        "brady": "Heart failure (NYHA 4)",
        "tachy": "Myocardial infarction",
    }
    signals = {}
    for i in range(n):
        patient, name = f"patient{i // 2 + 1:03d}", f"s{i + 1:04d}lre"
        signal, truth = synthetic(i, seconds, 1000)
        reason = "n/a" if i == n - 1 else reasons[truth.rhythm]
        comments = (
            f" age: {40 + i // 2}",
            f" sex: {('female', 'male')[i // 2 % 2]}",
            " Diagnose:",
            f" Reason for admission: {reason}",
            " Smoker: no",
        )
        digital = np.rint(np.concatenate([signal, signal[:, :3]], axis=1) * 2000).astype("<i2")
        leads = [*(lead.lower() for lead in CANONICAL_LEADS), "vx", "vy", "vz"]
        write_record(folder / patient, name, digital, leads, 1000, gain="2000", comments=comments)
        signals[f"{patient}/{name}"] = digital[:, :12] / 2000
    return signals


def write_echonext(
    folder: Path, n: int, no_split: int = 2, standard_deviation: float | None = None
) -> dict[str, np.ndarray]:
    """EchoNext: echonext_metadata_100k.csv and EchoNext_{split}_waveforms.npy [N, 1, 2500, 12], z-scores at 250 Hz.

    Of five patients the first is in val, the second in test, the others in train; `no_split` further recordings
    of the first patients are in no_split. The rows of the splits are mixed in the table. `standard_deviation`, in
    millivolts, is divided out of all leads; None takes PTB-XL's of each lead.
    """
    sd = np.array([PTBXL_SD_MV[lead] for lead in CANONICAL_LEADS])
    if standard_deviation is not None:
        sd = np.full(12, standard_deviation)
    signals, rows = {}, []
    arrays: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": [], "no_split": []}
    for i in range(n + no_split):
        patient = i // 2 if i < n else i - n
        split = ("val", "test", "train", "train", "train")[patient % 5] if i < n else "no_split"
        signal, truth = synthetic(i, 10.0, 250)
        scores = (signal / sd).astype(np.float32)
        arrays[split].append(scores[None])
        key = f"ecg{i:06d}"
        if split != "no_split":
            signals[key] = scores.astype(float) * sd
        flags = dict.fromkeys(ECHO, 0)
        flags["lvef_lte_45_flag"] = int(truth.st != "st_normal")
        flags["lvwt_gte_13_flag"] = int(truth.axis == "axis_left")
        flags["pasp_gte_45_flag"] = int(truth.axis == "axis_right")
        flags["tr_max_gte_32_flag"] = int(truth.rhythm == "irregular")
        rows.append(
            {
                "ecg_key": key,
                "patient_key": f"pt{patient:05d}",
                "split": split,
                "sex": ("male", "female")[patient % 2],
                "age_at_ecg": 40 + patient,
                "lvef_value": 55.0,
                **flags,
                **dict.fromkeys(SHD, int(any(flags.values()))),
            }
        )
    write_csv(folder / "echonext_metadata_100k.csv", rows)
    for split, scores in arrays.items():
        shape = (len(scores), 1, 2500, 12)
        np.save(folder / f"EchoNext_{split}_waveforms.npy", np.array(scores, np.float32).reshape(shape))
    return signals


def write_zzu(folder: Path, n: int, seconds: float = 6.0) -> dict[str, np.ndarray]:
    """ZZU pECG: AttributesDictionary.csv, ECGCode.csv and Child_ecg/P00/P00001/P00001_E01 in WFDB format, 500 Hz.

    Every fifth recording has nine leads and is not in the answer. Gains differ between leads.
    """
    rhythms = {"sinus": "'A1'", "irregular": "'F50+Frequent'", "brady": "'C22'", "tachy": "'C21'"}
    more = {
        "st_normal": "",
        "st_elevation": ";'L145+Modifier362'",
        "st_depression": ";'Left ventricular high voltage'",
    }
    signals, rows = {}, []
    nine = [i for i, lead in enumerate(CANONICAL_LEADS) if lead not in ("V2", "V4", "V6")]
    for i in range(n):
        patient = f"P{i // 2 + 1:05d}"
        name = f"{patient}_E{i % 2 + 1:02d}"
        signal, truth = synthetic(i, seconds, 500)
        columns = nine if i % 5 == 4 else list(range(12))
        # Each lead fills the number format, as wfdb writes physical signals.
        low, high = signal[:, columns].min(axis=0), signal[:, columns].max(axis=0)
        per_mv = np.round(64_000 / (high - low), 4)
        baseline = np.rint(-32_000 - low * per_mv).astype(int)
        digital = np.rint(signal[:, columns] * per_mv + baseline).astype("<i2")
        path = f"{patient[:3]}/{patient}/{name}"
        write_record(
            folder / "Child_ecg" / patient[:3] / patient,
            name,
            digital,
            [CANONICAL_LEADS[c].upper() for c in columns],
            gain=[f"{gain}({zero})/mV" for gain, zero in zip(per_mv, baseline, strict=True)],
        )
        if len(columns) == 12:
            signals[name] = (digital - baseline) / per_mv
        rows.append(
            {
                "Filename": path,
                "ECG_ID": name,
                "Patient_ID": patient,
                "Age": f"{572 + 100 * i}d",
                "Gender": ("'Female'", "'Male'")[i // 2 % 2],
                "Acquisition_date": "2018-11-22 10:46:08",
                "Sampling_point": len(signal),
                "Lead": len(columns),
                "AHA_code": rhythms[truth.rhythm] + more[truth.st],
                "CHN_code": "'C13'",
                "ICD-10 code": "'Q21.0'",
            }
        )
    write_csv(folder / "AttributesDictionary.csv", rows)
    write_csv(
        folder / "ECGCode.csv",
        [
            {"Description": text, "AHA(Category&Code)": aha, "CHN(Category&Code)": "N/A"}
            for text, aha in (
                ("Normal ECG", "A1"),
                ("Sinus tachycardia", "C21"),
                ("Sinus bradycardia", "C22"),
                ("Atrial fibrillation", "F50"),
                ("ST deviation", "L145"),
                ("Left ventricular high voltage", "N/A"),
            )
        ],
    )
    return signals
