"""A small synthetic 12-lead ECG with known labels, for tests. It obeys the limb-lead identities.

A beat is a sum of Gaussians P, Q, R, S, T (McSharry et al., IEEE TBME 50:289, 2003, without the limit
cycle), each a vector in the body: its frontal part makes the limb leads through Einthoven's triangle, its
horizontal part V1-V6. Not a substitute for real ECG: rhythms and shapes are caricatures that a probe must
find easy. Tests rely on its numbers; `synthetic_cases` and `synthetic_signal` are what `ecg-jax synthesize` draws.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ecg_jax.data.corpora.listing import hash_fold
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS, LIMB, Recording

RHYTHMS = ("sinus", "irregular", "brady", "tachy")
ST = ("st_normal", "st_elevation", "st_depression")
AXES = ("axis_normal", "axis_left", "axis_right")

# Wave: (centre in s from the R peak at 1 Hz, width in s, amplitude in mV, angle from the QRS axis in
# degrees).
_WAVES = {
    "P": (-0.16, 0.022, 0.12, 0.0),
    "Q": (-0.028, 0.009, -0.12, 25.0),
    "R": (0.0, 0.011, 1.1, 0.0),
    "S": (0.030, 0.010, -0.25, -20.0),
    "T": (0.26, 0.045, 0.3, 8.0),
}
# Directions of V1-V6 in the horizontal plane, degrees from the left arm, and their gain.
_PRECORDIAL_ANGLE = np.deg2rad([115.0, 94.0, 58.0, 25.0, 0.0, -25.0])
_PRECORDIAL_GAIN = np.array([0.8, 1.2, 1.3, 1.3, 1.1, 0.9])


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a synthetic recording shows: heart rate (per minute), QRS axis (degrees), ST level (mV)."""

    rhythm: str
    st: str
    axis: str
    heart_rate: float
    axis_deg: float
    st_mv: float


def synthetic_recording(
    seed: int, index: int = 0, seconds: float = 10.0, rate: float = 500.0, noise_mv: float = 0.01
) -> tuple[Recording, Truth]:
    """One synthetic recording, a function of its arguments only.

    Args:
      seed: of the whole set.
      index: of the recording in the set; the patient is index // 2, so that patients have two recordings
        each.
      seconds: length.
      rate: samples per second.
      noise_mv: standard deviation of the white noise of each electrode.

    Returns:
      The recording, leads canonical, label sets `synthetic` (rhythm, ST, axis), `rhythm`; and the truth.
    """
    rng = np.random.default_rng((seed, index))
    rhythm = RHYTHMS[rng.integers(len(RHYTHMS))]
    st, axis = ST[rng.integers(len(ST))], AXES[rng.integers(len(AXES))]
    low, high = {"sinus": (62, 98), "irregular": (70, 130), "brady": (38, 55), "tachy": (110, 160)}[rhythm]
    heart_rate = rng.uniform(low, high)
    low, high = {"axis_normal": (0, 80), "axis_left": (-70, -35), "axis_right": (105, 150)}[axis]
    axis_deg = rng.uniform(low, high)
    st_mv = {"st_normal": 0.0, "st_elevation": 1.0, "st_depression": -1.0}[st] * rng.uniform(0.15, 0.3)
    truth = Truth(rhythm, st, axis, heart_rate, axis_deg, st_mv)

    n_samples = round(seconds * rate)
    time = np.arange(n_samples) / rate
    spread = 0.22 if rhythm == "irregular" else 0.03
    period = 60.0 / heart_rate
    n_beats = int(seconds / period * 1.5) + 4
    beats = np.cumsum(period * (1 + spread * rng.uniform(-1, 1, n_beats))) - period * rng.uniform(0.5, 1.5)
    scale = rng.uniform(0.8, 1.3)

    frontal = np.zeros((n_samples, 2))  # millivolts along I and towards aVF
    horizontal = np.zeros((n_samples, 2))  # towards the left arm and towards the front
    for beat in beats[beats < seconds + 1]:
        first, last = np.searchsorted(time, (beat - 0.35, beat + 0.7))
        local = time[first:last] - beat
        for wave, (centre, width, amplitude, turn) in _WAVES.items():
            if wave == "P" and rhythm == "irregular":
                continue
            # QT shortens with the square root of the period (Bazett).
            centre = centre * np.sqrt(period) if wave == "T" else centre
            bump = scale * amplitude * np.exp(-0.5 * ((local - centre) / width) ** 2)
            angle = np.deg2rad(axis_deg + turn)
            frontal[first:last] += bump[:, None] * (np.cos(angle), np.sin(angle))
            front = {"P": 0.3, "Q": 1.0, "R": -0.5, "S": 0.9, "T": 0.7}[wave]
            horizontal[first:last] += bump[:, None] * (1.0, front)
        plateau = (
            st_mv
            / (1 + np.exp(-(local - 0.05) / 0.008))
            / (1 + np.exp((local - 0.2 * np.sqrt(period)) / 0.02))
        )
        frontal[first:last] += plateau[:, None] * (np.cos(np.deg2rad(axis_deg)), np.sin(np.deg2rad(axis_deg)))
        horizontal[first:last] += plateau[:, None] * (0.8, 0.6)

    # I lies at 0 degrees, II at 60 degrees; lead = projection of the frontal vector.
    sixty = np.deg2rad(60.0)
    one_two = frontal @ np.array([[1.0, np.cos(sixty)], [0.0, np.sin(sixty)]])
    one_two += noise_mv * rng.standard_normal((n_samples, 2))
    wander = 0.05 * np.sin(2 * np.pi * (rng.uniform(0.15, 0.4) * time + rng.uniform()))
    one_two += wander[:, None] * rng.uniform(0.3, 1.0, 2)
    directions = np.stack([np.cos(_PRECORDIAL_ANGLE), np.sin(_PRECORDIAL_ANGLE)]) * _PRECORDIAL_GAIN
    chest = horizontal @ directions + noise_mv * rng.standard_normal((n_samples, 6)) + 0.7 * wander[:, None]
    recording = Recording(
        record_id=f"synthetic{index:07d}",
        signal=np.concatenate([one_two @ LIMB.T, chest], axis=1),
        rate=rate,
        leads=CANONICAL_LEADS,
        patient_id=f"p{index // 2:07d}",
        labels={"synthetic": sorted([rhythm, st, axis]), "rhythm": [rhythm]},
        age=float(rng.integers(20, 90)),
        sex="FM"[rng.integers(2)],
    )
    return recording, truth


def write_synthetic_store(
    path: str | Path, n_records: int, seed: int = 0, seconds: float = 10.0, distinct: int | None = None
) -> Path:
    """Writes a complete store of synthetic recordings; folds 1-10 come from the patient id.

    Args:
      path: folder to write; must not exist or be empty.
      n_records: number of records.
      seed: of the set.
      seconds: length of each.
      distinct: generate only so many signals and repeat them shifted by the record's number in microvolts
        (fast, for load studies; labels repeat too); None generates each.

    Returns:
      The path as `Path`.
    """
    from ecg_jax.data.writer import PARTIAL, UnitWriter, finalise, unit_size

    path = Path(path)
    (path / PARTIAL).mkdir(parents=True)
    preprocessing = Preprocessing()
    per_unit = unit_size(n_records)
    made: dict[int, tuple] = {}
    starts = range(0, n_records, per_unit)
    for unit, start in enumerate(starts):
        with UnitWriter(path, unit, "synthetic") as writer:
            for index in range(start, min(start + per_unit, n_records)):
                source = index if distinct is None else index % distinct
                if source not in made:
                    recording, _ = synthetic_recording(seed, source, seconds, preprocessing.rate_hz)
                    made[source] = recording, preprocessing.apply(recording)
                recording, processed = made[source]
                if distinct is None:
                    made.clear()
                else:
                    recording = dataclasses.replace(
                        recording, record_id=f"synthetic{index:07d}", patient_id=f"p{index // 2:07d}"
                    )
                    processed = dataclasses.replace(
                        processed, signal=processed.signal + np.int16(index % 1000)
                    )
                recording.fold = hash_fold(recording.patient_id)
                writer.append(recording, processed, "")
            writer.finish()
    finalise(
        path,
        n_units=len(starts),
        preprocessing=preprocessing,
        attributes={
            "corpus": "synthetic",
            "source": "",
            "synthetic": True,
            "fold_source": "SHA-256 of the patient id into 10 folds",
        },
        label_sets=("synthetic", "rhythm"),
        classes={"synthetic": sorted(RHYTHMS + ST + AXES), "rhythm": list(RHYTHMS)},
        descriptions={},
        first_problems=[],
        drop_duplicates=False,
        strict=False,
    )
    return path
