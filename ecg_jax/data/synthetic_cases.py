"""What a synthetic recording of `ecg-jax synthesize` shows: its labels and the numbers behind them.

Everything is a function of (seed, patient, index). What belongs to the body is drawn once for each patient
(conduction, QRS axis, PR and QRS duration, voltage), what belongs to the day once for each recording (rhythm and
beats, ST/T, noise). `synthetic_signal` draws the ECG.

Two combinations do not occur, since their labels could not be seen: an AV block of first degree needs P waves and
room for them, so it goes with sinus rhythms up to 100 per minute; and the ST segment and T wave of a bundle branch
block are secondary to it, so such a recording has no label and no numbers for them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

# Label set -> class -> (share of recordings, description); of rhythms the share among patients without AV block.
CLASSES = {
    "rhythm": {
        "sinus": (0.22, "sinus rhythm, 60 to 100 per minute"),
        "bradycardia": (0.13, "sinus bradycardia, 38 to 56 per minute"),
        "tachycardia": (0.13, "sinus tachycardia, 105 to 150 per minute"),
        "atrial_fibrillation": (0.13, "irregular, no P waves, fibrillatory waves of 4 to 9 Hz"),
        "atrial_flutter": (0.13, "flutter waves of 240 to 330 per minute, conducted 2:1 to 4:1"),
        "ventricular_premature": (0.13, "sinus rhythm with wide premature beats and compensatory pauses"),
        "atrial_premature": (0.13, "sinus rhythm with premature P waves and narrow beats"),
    },
    "conduction": {
        "normal_conduction": (0.55, "PR 130 to 185 ms where there are P waves, QRS 80 to 104 ms"),
        "first_degree_av_block": (0.15, "PR 215 to 275 ms"),
        "left_bundle_branch_block": (0.15, "QRS 128 to 160 ms, broad and notched to the left and back"),
        "right_bundle_branch_block": (0.15, "QRS 128 to 160 ms, late vector to the right and front"),
    },
    "axis": {
        "normal_axis": (0.5, "QRS axis -15 to 75 degrees"),
        "left_axis": (0.25, "QRS axis -75 to -42 degrees"),
        "right_axis": (0.25, "QRS axis 105 to 150 degrees"),
    },
    "st_t": {
        "normal_st_t": (0.4, "ST level 0, T upright"),
        "st_elevation": (0.2, "ST level 0.15 to 0.35 mV towards left, foot and front"),
        "st_depression": (0.2, "ST level -0.35 to -0.15 mV towards left, foot and front"),
        "t_inversion": (0.2, "T wave inverted"),
    },
    "noise": {
        "clean": (0.4, "nothing but 3 to 8 microvolts of white noise"),
        "baseline_wander": (0.15, "0.1 to 0.4 mV below 0.5 Hz"),
        "muscle": (0.15, "0.03 to 0.1 mV of broad-band noise"),
        "mains": (0.15, "0.03 to 0.1 mV of 50 or 60 Hz"),
        "electrode_motion": (0.15, "0.1 to 0.3 mV of sudden shifts at one to three electrodes that fade"),
    },
}

VALUES = {
    "heart_rate": "per minute, from the median interval between QRS complexes",
    "pr_ms": "ms from the onset of P to the onset of QRS; unknown without P waves",
    "qrs_ms": "ms, of the usual beat",
    "axis_deg": "degrees in the frontal plane, lead I at 0 and aVF at +90, of the area of the usual QRS",
    "st_mv": "mV of the ST vector, positive towards left, foot and front; unknown in a bundle branch block",
    "t_mv": "mV of the T wave along its axis; unknown in a bundle branch block",
    "premature_beats": "number of premature beats",
    "noise_mv": "mV, root mean square over the electrodes of the noise the label names",
}

_NOISE_MV = {
    "clean": (0.003, 0.008),
    "baseline_wander": (0.1, 0.4),
    "muscle": (0.03, 0.1),
    "mains": (0.03, 0.1),
    "electrode_motion": (0.1, 0.3),
}
_AXIS_DEG = {"normal_axis": (-15, 75), "left_axis": (-75, -42), "right_axis": (105, 150)}
_RATE = {
    "sinus": (60, 100),
    "bradycardia": (38, 56),
    "tachycardia": (105, 150),
    "atrial_fibrillation": (70, 130),
    "ventricular_premature": (60, 95),
    "atrial_premature": (60, 95),
}
#: Where an AV block of first degree leaves room for the P wave.
_WITH_LONG_PR = ("sinus", "bradycardia", "ventricular_premature")
BUNDLE_BRANCH_BLOCKS = ("left_bundle_branch_block", "right_bundle_branch_block")

# What generators are for, so that none repeats another's numbers.
_PATIENT, _RECORDING, _PERMUTATION = 1, 2, 3
SIGNAL = 4


@dataclasses.dataclass(frozen=True)
class Patient:
    """What all recordings of a patient share.

    Attributes:
      conduction, axis: classes of `CLASSES`.
      axis_deg: QRS axis.
      pr_s, qrs_s: seconds.
      voltage: factor of all waves.
      p_mv, t_mv, t_deg: amplitude of P, amplitude and frontal axis of T.
      chest_gain: [6], of V1-V6, where they lie and what is between them and the heart.
      age, sex: years; "F" or "M". They show nowhere in the signal.
    """

    conduction: str
    axis: str
    axis_deg: float
    pr_s: float
    qrs_s: float
    voltage: float
    p_mv: float
    t_mv: float
    t_deg: float
    chest_gain: np.ndarray
    age: float
    sex: str


@dataclasses.dataclass(frozen=True)
class Case:
    """What one recording shows.

    Attributes:
      patient: whose it is.
      rhythm, noise: classes of `CLASSES`.
      st_t: class of `CLASSES`, None in a bundle branch block.
      st_mv, t_mv: ST level, T amplitude.
      noise_mv: root mean square at the electrodes.
      beats: seconds of the R peaks, ascending, from before the recording to after it.
      premature: bool, of `beats`.
      atrial_hz: frequency of fibrillatory or flutter waves, 0 for rhythms without.
      seconds: length.
    """

    patient: Patient
    rhythm: str
    noise: str
    st_t: str | None
    st_mv: float
    t_mv: float
    noise_mv: float
    beats: np.ndarray
    premature: np.ndarray
    atrial_hz: float
    seconds: float

    @property
    def inside(self) -> np.ndarray:
        """bool, which of `beats` have their R peak in the recording."""
        return (self.beats >= 0) & (self.beats < self.seconds)

    def labels(self) -> dict[str, list[str]]:
        """Label set -> classes, as a store has them."""
        return {
            "rhythm": [self.rhythm],
            "conduction": [self.patient.conduction],
            "axis": [self.patient.axis],
            "st_t": [] if self.st_t is None else [self.st_t],
            "noise": [self.noise],
        }

    def values(self) -> dict[str, float]:
        """The numbers of `VALUES`, NaN where unknown."""
        beats = self.beats[self.inside]
        interval = np.median(np.diff(beats)) if len(beats) > 1 else math.nan
        secondary = self.st_t is None
        return {
            "heart_rate": 60.0 / float(interval),
            "pr_ms": math.nan if self.atrial_hz else 1000.0 * self.patient.pr_s,
            "qrs_ms": 1000.0 * self.patient.qrs_s,
            "axis_deg": self.patient.axis_deg,
            "st_mv": math.nan if secondary else self.st_mv,
            "t_mv": math.nan if secondary else self.t_mv,
            "premature_beats": float((self.premature & self.inside).sum()),
            "noise_mv": self.noise_mv,
        }


def generator(seed: int, what: int, number: int) -> np.random.Generator:
    """The random numbers of one patient or recording, for one purpose."""
    return np.random.default_rng((seed, what, number))


def patient_of(index: int, n_records: int, n_patients: int) -> int:
    """Whose the recording is: neighbours share a patient, and patients have equally many but for one."""
    return index * n_patients // n_records


def first_of(patient: int, n_records: int, n_patients: int) -> int:
    """The first recording of a patient; the first of the next one is where they end."""
    return -(-patient * n_records // n_patients)


def shuffled_source(index: int, n_records: int, order: np.ndarray) -> int:
    """The recording whose labels `index` gets when labels change patients.

    Args:
      index: of the recording.
      n_records: of the set.
      order: [P], from `patient_order`.

    Returns:
      The recording that has the same place among those of the patient whose labels this patient gets.
    """
    n_patients = len(order)
    patient = patient_of(index, n_records, n_patients)
    place = index - first_of(patient, n_records, n_patients)
    other = int(order[patient])
    first, end = (first_of(p, n_records, n_patients) for p in (other, other + 1))
    return first + place % (end - first)


def patient_order(seed: int, n_patients: int) -> np.ndarray:
    """int64 [P], a random permutation of the patients."""
    return generator(seed, _PERMUTATION, 0).permutation(n_patients)


def _choose(rng: np.random.Generator, label_set: str, among: tuple[str, ...] | None = None) -> str:
    names = tuple(CLASSES[label_set]) if among is None else among
    shares = np.cumsum([CLASSES[label_set][name][0] for name in names])
    return names[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]


def draw_patient(seed: int, number: int) -> Patient:
    """A patient, a function of the arguments only."""
    rng = generator(seed, _PATIENT, number)
    conduction, axis = _choose(rng, "conduction"), _choose(rng, "axis")
    long_pr, wide = conduction == "first_degree_av_block", conduction in BUNDLE_BRANCH_BLOCKS
    axis_deg = rng.uniform(*_AXIS_DEG[axis])
    return Patient(
        conduction=conduction,
        axis=axis,
        axis_deg=axis_deg,
        pr_s=rng.uniform(0.215, 0.275) if long_pr else rng.uniform(0.13, 0.185),
        qrs_s=rng.uniform(0.128, 0.16) if wide else rng.uniform(0.08, 0.104),
        voltage=rng.uniform(0.8, 1.3),
        p_mv=rng.uniform(0.1, 0.17),
        t_mv=rng.uniform(0.22, 0.4),
        # T follows QRS half of the way (the angle between them is below 60 degrees in most people).
        t_deg=0.5 * axis_deg + rng.uniform(5.0, 35.0),
        chest_gain=rng.uniform(0.85, 1.15, 6),
        age=float(rng.integers(20, 90)),
        sex="FM"[rng.integers(2)],
    )


def draw_case(seed: int, index: int, patient: Patient, seconds: float) -> Case:
    """What a recording shows, a function of the arguments only."""
    rng = generator(seed, _RECORDING, index)
    long_pr = patient.conduction == "first_degree_av_block"
    rhythm = _choose(rng, "rhythm", _WITH_LONG_PR if long_pr else None)
    noise, st_t = _choose(rng, "noise"), _choose(rng, "st_t")
    level = rng.uniform(0.15, 0.35)
    st_mv = {"st_elevation": level, "st_depression": -level}.get(st_t, 0.0)
    secondary = patient.conduction in BUNDLE_BRANCH_BLOCKS
    beats, premature, atrial_hz = _beats(rng, rhythm, seconds)
    return Case(
        patient=patient,
        rhythm=rhythm,
        noise=noise,
        st_t=None if secondary else st_t,
        st_mv=0.0 if secondary else st_mv,
        t_mv=patient.t_mv * (-1.0 if st_t == "t_inversion" and not secondary else 1.0),
        noise_mv=rng.uniform(*_NOISE_MV[noise]),
        beats=beats,
        premature=premature,
        atrial_hz=atrial_hz,
        seconds=seconds,
    )


def _beats(rng: np.random.Generator, rhythm: str, seconds: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(R peaks in seconds, which are premature, frequency of atrial waves or 0)."""
    if rhythm == "atrial_flutter":
        atrial_hz = rng.uniform(4.0, 5.5)
        period = rng.choice([2, 3, 4]) / atrial_hz
    else:
        atrial_hz = rng.uniform(4.0, 9.0) if rhythm == "atrial_fibrillation" else 0.0
        period = 60.0 / rng.uniform(*_RATE[rhythm])
    n = math.ceil((seconds + 5.0) / period * 1.3) + 4
    if rhythm == "atrial_fibrillation":
        # Neither the AV node nor the ear finds an order: independent intervals, skewed, not below refractoriness.
        intervals = np.maximum(period * rng.gamma(16.0, 1.0 / 16.0, n), 0.33)
    elif rhythm == "atrial_flutter":
        intervals = np.full(n, period)
    else:
        breath = np.sin(2 * np.pi * (rng.random() + 0.25 * period * np.arange(n)))
        intervals = period * (1.0 + 0.02 * breath + 0.008 * rng.standard_normal(n))
    beats = np.cumsum(intervals) - 2.5 - period * rng.random()
    premature = np.zeros(n, bool)
    if rhythm.endswith("_premature"):
        # Room for the early beat, and to see the beat before it.
        possible = np.flatnonzero((beats > 0.9 * period) & (beats < seconds - 0.2))
        if not len(possible):
            possible = np.flatnonzero(beats >= 0)[:1]
        chosen = possible[rng.random(len(possible)) < 0.2]
        if not len(chosen):
            chosen = possible[[rng.integers(len(possible))]]
        # Not two in a row.
        chosen = chosen[np.diff(chosen, prepend=-9) > 1]
        premature[chosen] = True
        early = period * rng.uniform(0.32, 0.42)
        # The sinus node goes on after a ventricular beat; an atrial one resets it, so all that follows comes earlier.
        shift = premature if rhythm == "ventricular_premature" else np.cumsum(premature)
        beats = beats - early * shift
    kept = beats < seconds + 1.5
    return beats[kept], premature[kept], atrial_hz
