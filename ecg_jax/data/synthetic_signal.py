"""How a synthetic recording looks: the ECG of a `Case`, at the rate and in the format of a store.

A beat is a sum of Gaussians (after McSharry et al., IEEE TBME 50:289, 2003, without its limit cycle), each a vector in
the frontal plane, which makes I and II, and one in the horizontal plane, which makes V1-V6. Noise arises at the nine
electrodes. III and the augmented leads are computed last, from I and II in even microvolts, so the identities of
Einthoven and Goldberger hold exactly in the stored integers.
"""

from __future__ import annotations

import math

import numpy as np

from ecg_jax.data.synthetic_cases import SIGNAL, Case, generator

# Directions of V1-V6 in the horizontal plane, degrees from the left arm towards the front, and their gain.
_CHEST_DEG = np.deg2rad([115.0, 94.0, 58.0, 25.0, 0.0, -25.0])
_CHEST_GAIN = np.array([0.8, 1.2, 1.3, 1.3, 1.1, 0.9])
_CHEST = np.stack([np.cos(_CHEST_DEG), np.sin(_CHEST_DEG)], axis=1) * _CHEST_GAIN[:, None]
_SIXTY = math.radians(60.0)

# QRS of each conduction, for a duration of 1: (centre from the R peak, width, mV, degrees from the QRS axis, left,
# front). Left and front are the shares of the amplitude in the horizontal plane.
_NORMAL_QRS = (
    (-0.30, 0.095, -0.12, 25.0, 1.0, -1.0),
    (0.0, 0.115, 1.1, 0.0, 1.0, -0.5),
    (0.32, 0.105, -0.25, -20.0, 1.0, 0.9),
)
_QRS = {
    "normal_conduction": _NORMAL_QRS,
    "first_degree_av_block": _NORMAL_QRS,
    # Activation goes from right to left, slowly: no Q in the left leads, a broad notched R, a broad S or QS in V1.
    "left_bundle_branch_block": (
        (-0.2, 0.1, 0.8, 0.0, 1.0, -0.9),
        (0.2, 0.1, 0.9, 0.0, 1.0, -0.75),
    ),
    # The right ventricle comes last: a broad S in I and V6, rSR' in V1.
    "right_bundle_branch_block": (
        (-0.20, 0.06, -0.10, 25.0, 1.0, -1.0),
        (0.0, 0.075, 1.1, 0.0, 1.0, -0.3),
        (0.24, 0.07, -0.15, -20.0, 1.0, 0.8),
        (0.52, 0.12, -0.22, 0.0, 2.5, -3.6),
    ),
}
# A ventricular beat, for 1 s: wide, and T the other way.
_VENTRICULAR = (
    (-0.035, 0.028, 1.3, 75.0, -0.6, 1.1),
    (0.030, 0.028, 0.8, 95.0, -0.5, 0.9),
    (0.270, 0.055, -0.5, 85.0, -0.6, 1.0),
)
# A wave begins and ends this many standard deviations from its centre: where `evaluation.delineation`, which was
# calibrated on annotated ECG, sees its ends. Among waves that are all slow it sees more of them.
_EDGE = {
    "normal_conduction": 2.2,
    "first_degree_av_block": 2.2,
    "left_bundle_branch_block": 3.0,
    "right_bundle_branch_block": 2.2,
}
_P_EDGE, _P_WIDTH = 1.7, 0.021
#: RA, LA, LL, V1-V6 -> I, II, V1-V6: potential differences, the chest against the mean of the limbs (Wilson).
_ELECTRODES = np.zeros((9, 8))
_ELECTRODES[:2, 0] = -1.0, 1.0
_ELECTRODES[[0, 2], 1] = -1.0, 1.0
_ELECTRODES[:3, 2:] = -1.0 / 3.0
_ELECTRODES[3:, 2:] = np.eye(6)


def draw_signal(seed: int, index: int, case: Case, rate: float) -> np.ndarray:
    """The ECG of a recording, a function of the arguments only.

    Args:
      seed, index: of the recording, for the random numbers of its noise.
      case: what it shows.
      rate: samples per second.

    Returns:
      int16 [T, 12] microvolts, T = round(seconds * rate).
    """
    rng = generator(seed, SIGNAL, index)
    n = round(case.seconds * rate)
    independent = _heart(case, n, rate) + (_noise(rng, case, n, rate) @ _ELECTRODES)
    if case.atrial_hz:
        independent += _atrial_waves(rng, case, n, rate)
    return twelve_leads(independent)


def twelve_leads(independent: np.ndarray) -> np.ndarray:
    """int16 [T, 12] microvolts from mV [T, 8] of I, II, V1-V6; of I and II only even microvolts, whose halves exist."""
    out = np.empty((len(independent), 12), np.int16)
    one, two = (2 * np.rint(500.0 * independent[:, :2]).astype(np.int16)).T
    out[:, 0], out[:, 1] = one, two
    out[:, 2] = two - one
    out[:, 3] = -((one + two) // 2)
    out[:, 4] = one - two // 2
    out[:, 5] = two - one // 2
    out[:, 6:] = np.rint(1000.0 * independent[:, 2:])
    return out


def _weights(frontal_mv: np.ndarray, deg: np.ndarray, left: np.ndarray, front: np.ndarray, case: Case):
    """[K, 8] millivolts in I, II, V1-V6 of K waves: frontal vectors, and horizontal ones as in `_QRS`."""
    x, y = frontal_mv * np.cos(np.deg2rad(deg)), frontal_mv * np.sin(np.deg2rad(deg))
    limb = np.stack([x, x * math.cos(_SIXTY) + y * math.sin(_SIXTY)], axis=1)
    chest = (frontal_mv[:, None] * np.stack([left, front], axis=1)) @ _CHEST.T
    return case.patient.voltage * np.hstack([limb, chest * case.patient.chest_gain])


def _heart(case: Case, n: int, rate: float) -> np.ndarray:
    """float64 [n, 8] millivolts of I, II, V1-V6: P, QRS, ST and T of every beat."""
    patient, beats = case.patient, case.beats
    qrs = np.array(_QRS[patient.conduction])
    begins, ends = (qrs[:, 0] + side * _EDGE[patient.conduction] * qrs[:, 1] for side in (-1, 1))
    stretch = patient.qrs_s / (ends.max() - begins.min())
    onset, offset = stretch * begins.min(), stretch * ends.max()
    # The axis is that of the area of QRS, so waves beside it must not turn it.
    area = (qrs[:, 1] * qrs[:, 2] * np.exp(1j * np.deg2rad(qrs[:, 3]))).sum()
    axis = patient.axis_deg - np.rad2deg(np.angle(area))

    usual = ~case.premature if case.rhythm == "ventricular_premature" else np.ones(len(beats), bool)
    before = np.diff(beats, prepend=2 * beats[0] - beats[1]) if len(beats) > 1 else np.ones(len(beats))
    # QT shortens with the square root of the interval (Bazett), QTc 400 ms, longer where QRS is.
    scale = np.sqrt(np.clip(before, 0.35, 1.4))
    t_width = 0.045 * scale
    t_centre = onset + 0.40 * scale + max(patient.qrs_s - 0.1, 0.0) - 2.0 * t_width
    secondary = case.st_t is None
    t_mv = -0.8 * case.t_mv if patient.conduction == "left_bundle_branch_block" else case.t_mv
    t_deg = patient.axis_deg if secondary else patient.t_deg
    right = patient.conduction == "right_bundle_branch_block"

    # Waves in order: QRS, ST, T, P, P of premature atrial beats, the three of ventricular beats.
    k = len(qrs)
    frontal = np.array([*qrs[:, 2], case.st_mv, t_mv, patient.p_mv, 0.7 * patient.p_mv, *_column(2)])
    deg = np.array([*(axis + qrs[:, 3]), 50.0, t_deg, 55.0, 120.0, *(patient.axis_deg + _column(3))])
    left = np.array([*qrs[:, 4], 0.8, 1.0, 1.0, 0.3, *_column(4)])
    front = np.array([*qrs[:, 5], 0.6, -0.5 if right else 0.6, 0.35, 0.8, *_column(5)])
    weights = _weights(frontal, deg, left, front, case)

    # One row for each wave of each beat: which wave, where, how wide.
    p_beats = usual if case.atrial_hz == 0.0 else np.zeros(len(beats), bool)
    ectopic = case.premature if case.rhythm == "atrial_premature" else np.zeros(len(beats), bool)
    waves = [(i, beats[usual] + stretch * qrs[i, 0], stretch * qrs[i, 1]) for i in range(k)]
    if case.st_mv:
        waves.append((k, beats[usual] + offset + 0.06, 0.045))
    waves.append((k + 1, (beats + t_centre)[usual], t_width[usual]))
    p_centre = onset - patient.pr_s + _P_EDGE * _P_WIDTH
    waves.append((k + 2, beats[p_beats & ~ectopic] + p_centre, _P_WIDTH))
    waves.append((k + 3, beats[p_beats & ectopic] + p_centre, _P_WIDTH))
    if not usual.all():
        waves += [(k + 4 + i, beats[~usual] + wave[0], wave[1]) for i, wave in enumerate(_VENTRICULAR)]
    return _gaussians(waves, len(weights), n, rate) @ weights


def _column(i: int) -> np.ndarray:
    return np.array([wave[i] for wave in _VENTRICULAR])


def _gaussians(waves: list[tuple], n_waves: int, n: int, rate: float) -> np.ndarray:
    """float64 [n, n_waves], for each kind of wave the sum of its bells of height 1.

    Args:
      waves: (kind, centres in s, width in s or widths of each), a kind at most once.
      n_waves: number of kinds.
      n: samples.
      rate: samples per second.
    """
    kinds = np.concatenate([np.full(len(centres), kind) for kind, centres, _ in waves])
    centres = np.concatenate([centres for _, centres, _ in waves]) * rate
    widths = np.concatenate([np.broadcast_to(width, centres.shape) for _, centres, width in waves]) * rate
    # At 4.5 standard deviations a wave of 1 mV is below a twentieth of a microvolt.
    half = math.ceil(4.5 * widths.max())
    at = np.rint(centres).astype(np.int64)[:, None] + np.arange(-half, half + 1)
    bells = np.exp(-0.5 * np.square((at - centres[:, None]) / widths[:, None]))
    # Room for what lies before and after the recording, cut off below.
    at = np.clip(at, -1, n) + 1
    total = np.bincount((kinds[:, None] * (n + 2) + at).ravel(), bells.ravel(), n_waves * (n + 2))
    return total.reshape(n_waves, n + 2)[:, 1:-1].T


def _atrial_waves(rng: np.random.Generator, case: Case, n: int, rate: float) -> np.ndarray:
    """float64 [n, 8] millivolts: flutter waves, or fibrillatory ones whose frequency and height drift."""
    time = np.arange(n) / rate
    if case.rhythm == "atrial_flutter":
        # A beat follows its flutter wave at a fixed distance, so the saw is tied to the beats.
        phase = (time - case.beats[0]) * case.atrial_hz + rng.random()
        saw = sum(np.sin(2 * np.pi * j * phase) / j for j in (1, 2, 3, 4))
        amplitude, deg, left, front = rng.uniform(0.1, 0.18), -80.0, 0.1, 0.7
    else:
        slow = [rng.uniform(0.1, 0.6), rng.random(), rng.uniform(0.2, 0.8), rng.random()]
        phase = case.atrial_hz * time + 0.6 * np.sin(2 * np.pi * (slow[0] * time + slow[1])) + rng.random()
        height = 1.0 + 0.4 * np.sin(2 * np.pi * (slow[2] * time + slow[3]))
        saw = height * (np.sin(2 * np.pi * phase) + 0.4 * np.sin(4 * np.pi * phase + 1.0))
        amplitude, deg, left, front = rng.uniform(0.05, 0.1), 70.0, 0.2, 1.0
    weights = _weights(np.array([amplitude]), np.array([deg]), np.array([left]), np.array([front]), case)
    return saw[:, None] * weights


def _noise(rng: np.random.Generator, case: Case, n: int, rate: float) -> np.ndarray:
    """float64 [n, 9] millivolts at the electrodes: always a little white noise, and that of the label."""
    # Bytes are ten times as fast as normal numbers, and at some microvolts nobody sees the difference.
    white = np.frombuffer(rng.bytes(9 * n), np.int8).reshape(n, 9) * (0.005 / 74.0)
    if case.noise == "clean":
        return white * (case.noise_mv / 0.005)
    time = np.arange(n) / rate
    if case.noise == "baseline_wander":
        turn = 2 * np.pi * rng.uniform(0.08, 0.45, 3) * time[:, None]
        wave = np.hstack([np.sin(turn), np.cos(turn)]) @ rng.standard_normal((6, 9))
    elif case.noise == "mains":
        turn = 2 * np.pi * rng.choice([50.0, 60.0]) * time
        wave = np.stack([np.sin(turn), np.cos(turn)], axis=1) @ rng.standard_normal((2, 9))
    elif case.noise == "muscle":
        # The difference of white noise: little below 20 Hz, where the ECG is, and more towards 100 Hz.
        wave = np.diff(rng.standard_normal((n + 1, 9), np.float32), axis=0) * rng.uniform(0.4, 1.0, 9)
    else:
        wave = np.zeros((n, 9))
        for electrode in rng.choice(9, rng.integers(1, 4), replace=False):
            for _ in range(rng.integers(2, 6)):
                since = np.maximum(time - rng.uniform(0, 0.9 * case.seconds), 0.0)
                step = (1.0 - np.exp(-since / 0.03)) * np.exp(-since / rng.uniform(0.3, 1.2))
                wave[:, electrode] += rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.0) * step
    return white + wave * (case.noise_mv / np.sqrt(np.square(wave).mean()))
