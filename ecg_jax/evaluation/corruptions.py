"""What goes wrong with an ECG outside the laboratory: leads that are not there, swapped electrodes, noise, other
devices. Used to ask how much of a probe's score survives.

Every function takes one whole recording in millivolts, float64 [T, 12] with leads in canonical order, and
returns another one; a lead that is zero throughout is a missing one, as in a store, and stays missing. The
result depends on the arguments alone. `to_microvolts` brings it back to what a store holds.

Noise arises at the electrodes and reaches the twelve leads through the same algebra as the heart's potentials:
I = LA - RA, II = LL - RA, V_i - (RA + LA + LL)/3. So the leads of a noisy recording still obey Einthoven's and
Goldberger's identities, which independent noise in every lead would break.
"""

import hashlib

import numpy as np

from ecg_jax.data.preprocessing import INT16_MAX, MICROVOLTS_PER_MV, resample
from ecg_jax.data.recording import CANONICAL_LEADS, LIMB, to_canonical

#: Number of leads -> the leads a device records. The limb leads that two others determine are derived from
#: them, as `ecg-jax prepare` does with such a file: 2 leads carry as much as 6, and 8 as much as 12.
LEAD_SETS = {
    1: ("I",),
    2: ("I", "II"),
    3: ("I", "II", "V2"),
    6: CANONICAL_LEADS[:6],
    8: ("I", "II", *CANONICAL_LEADS[6:]),
    12: CANONICAL_LEADS,
}

#: Columns of `FROM_ELECTRODES`.
ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")
#: float64 [12, 9]: potentials at the electrodes -> the twelve leads.
FROM_ELECTRODES = np.zeros((12, 9))
FROM_ELECTRODES[:6, :3] = LIMB @ np.array([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
FROM_ELECTRODES[6:, :3] = -1 / 3  # Wilson's central terminal
FROM_ELECTRODES[6:, 3:] = np.eye(6)


def _swaps() -> dict[str, np.ndarray]:
    def rows(*leads: str) -> np.ndarray:
        matrix = np.zeros((len(leads), 12))
        for row, lead in zip(matrix, leads, strict=True):
            row[CANONICAL_LEADS.index(lead.removeprefix("-"))] = -1 if lead.startswith("-") else 1
        return matrix

    chest = rows(*CANONICAL_LEADS[6:])
    third = rows("III")[0]
    return {
        "RA/LA": np.vstack([rows("-I", "III", "II", "aVL", "aVR", "aVF"), chest]),
        "RA/LL": np.vstack([rows("-III", "-II", "-I", "aVF", "aVL", "aVR"), chest]),
        "LA/LL": np.vstack([rows("II", "I", "-III", "aVR", "aVF", "aVL"), chest]),
        # Both legs have almost the same potential, so RA sees that of LL: II is flat, and the central terminal
        # moves by (LL - RA)/3 = II/3.
        "RA/RL": np.vstack([np.outer([-1, 0, 1, 0.5, -1, 0.5], third), chest - rows("II") / 3]),
        "V1/V2": rows(*CANONICAL_LEADS[:6], "V2", "V1", *CANONICAL_LEADS[8:]),
    }


#: Swapped cables -> float64 [12, 12]: the leads of the right ECG -> those that are recorded.
SWAPS = _swaps()

#: Kind of noise -> (lowest, highest frequency in Hz) of what it adds at an electrode.
NOISES = {
    "baseline_wander": (0.05, 0.5),
    "powerline_50hz": (50.0, 50.0),
    "powerline_60hz": (60.0, 60.0),
    "muscle": (20.0, 110.0),
}
# Above this share of the rate a recorder's own anti-aliasing filter begins.
HIGHEST_FREQUENCY = 0.46


def to_microvolts(signal: np.ndarray, clip_mv: float | None = None) -> np.ndarray:
    """A recording as a store holds it: float [T, 12] millivolts -> int16 [T, 12] microvolts.

    Args:
        signal: [T, 12].
        clip_mv: of the preprocessing contract.
    """
    limit = INT16_MAX / MICROVOLTS_PER_MV if clip_mv is None else clip_mv
    return np.rint(np.clip(signal, -limit, limit) * MICROVOLTS_PER_MV).astype(np.int16)


def keep_leads(signal: np.ndarray, leads: tuple[str, ...]) -> np.ndarray:
    """What `ecg-jax prepare` makes of the recording when its file holds only some leads.

    Args:
        signal: [T, 12].
        leads: those in the file; other limb leads are derived where two are left, else zeros.
    """
    kept = [CANONICAL_LEADS.index(lead) for lead in leads]
    return to_canonical(signal[:, kept], leads).signal


def swap(signal: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The recording with cables swapped.

    Args:
        signal: [T, 12].
        matrix: one of `SWAPS`. A lead that needs one which is missing is missing then.
    """
    present = signal.any(axis=0)
    out = signal @ matrix.T
    out[:, ((matrix != 0) & ~present).any(axis=1)] = 0.0
    return out


def electrode_noise(kind: str, n_samples: int, rate_hz: float, rng: np.random.Generator) -> np.ndarray:
    """Noise at the nine electrodes, each by itself, zero mean, of no particular amplitude.

    Args:
        kind: "baseline_wander", eight sines between 0.05 and 0.5 Hz (breathing, motion), of one frequency but own
            amplitude and phase at every electrode; "powerline_50hz" or "powerline_60hz", one sine whose amplitude
            changes slowly; "muscle", noise between 20 and 110 Hz (or 0.46 `rate_hz`) in bursts, the logarithm of its
            amplitude being slow noise below 1 Hz.
        n_samples: T.
        rate_hz: samples per second.
        rng: source of randomness.

    Returns:
        float64 [T, 9], columns as in `ELECTRODES`.

    Raises:
        ValueError: unknown kind, or the rate cannot carry its frequencies (see `frequencies_fit`).
    """
    if kind not in NOISES:
        raise ValueError(f"unknown noise {kind!r}; known: {', '.join(NOISES)}")
    if not frequencies_fit(kind, rate_hz):
        raise ValueError(f"{rate_hz:g} samples per second cannot carry {kind}")
    low, high = NOISES[kind]
    time = np.arange(n_samples)[:, None] / rate_hz
    n = len(ELECTRODES)
    if kind == "baseline_wander":
        angle = 2 * np.pi * rng.uniform(low, high, 8) * time
        noise = np.hstack([np.sin(angle), np.cos(angle)]) @ rng.standard_normal((16, n))
    elif kind == "muscle":
        noise = _band_noise(n_samples, rate_hz, low, min(high, HIGHEST_FREQUENCY * rate_hz), rng)
        slow = _band_noise(n_samples, rate_hz, 0.0, 1.0, rng)
        noise *= np.exp(slow / np.sqrt((slow**2).mean(axis=0)))
    else:
        depth, drift = rng.uniform(0.2, 0.8, n), rng.uniform(0.05, 0.3, n)
        phase, drift_phase = rng.uniform(0, 2 * np.pi, (2, n))
        amplitude = rng.uniform(0.3, 1.0, n) * (1 + depth * np.sin(2 * np.pi * drift * time + drift_phase))
        noise = amplitude * np.sin(2 * np.pi * low * time + phase)
    return noise - noise.mean(axis=0)


def frequencies_fit(kind: str, rate_hz: float) -> bool:
    """Whether a recording at this rate holds the noise; of the band of muscle noise the lowest 20 Hz are enough."""
    low, high = NOISES[kind]
    return HIGHEST_FREQUENCY * rate_hz >= min(high, low + 20)


def _band_noise(n_samples: int, rate_hz: float, low: float, high: float, rng) -> np.ndarray:
    """Gaussian noise with nothing outside a band: float64 [T, 9]."""
    frequency = np.fft.rfftfreq(n_samples, 1 / rate_hz)
    spectrum = np.fft.rfft(rng.standard_normal((n_samples, len(ELECTRODES))), axis=0)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, n_samples, axis=0)


def add_noise(
    signal: np.ndarray, rate_hz: float, kind: str, snr_db: float, seed: int, record_id: str
) -> np.ndarray:
    """The recording with noise at a signal-to-noise ratio.

    SNR = 10 log10(P_signal / P_noise), both the variance over the whole recording averaged over the leads that
    are there. One factor scales the noise of all electrodes, so some leads get more of it than others, as on
    a patient. Seed, kind and record id fix the noise up to that factor: the same at every SNR and for every
    model.

    Args:
        signal: [T, 12].
        rate_hz: samples per second.
        kind: as in `electrode_noise`.
        snr_db: in decibels.
        seed: of the whole suite.
        record_id: of the recording.

    Raises:
        ValueError: as in `electrode_noise`, or no lead has any signal.
    """
    present = signal.any(axis=0)
    power = signal[:, present].var(axis=0).mean() if present.any() else 0.0
    if not power > 0:
        raise ValueError(f"recording {record_id} has no signal, so no noise has an SNR")
    key = hashlib.sha256(f"{seed} {kind} {record_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:16], "little"))
    noise = electrode_noise(kind, len(signal), rate_hz, rng) @ FROM_ELECTRODES.T
    noise[:, ~present] = 0.0
    noise *= np.sqrt(power / noise[:, present].var(axis=0).mean() / 10 ** (snr_db / 10))
    return signal + noise


def from_device(signal: np.ndarray, rate_hz: float, device_hz: float) -> np.ndarray:
    """The recording as a device of a lower rate would have given it: down and up again by the contract's resampler.

    Where the lower rate drops a last part of a sample, the last value is held, so that T stays.

    Args:
        signal: [T, 12].
        rate_hz: samples per second of the recording.
        device_hz: samples per second of the device, below `rate_hz`.

    Raises:
        ValueError: the device is not slower.
    """
    if not device_hz < rate_hz:
        raise ValueError(
            f"a recording at {rate_hz:g} Hz has nothing more to give a device of {device_hz:g} Hz"
        )
    out = resample(resample(signal, rate_hz, device_hz), device_hz, rate_hz)[: len(signal)]
    return np.pad(out, ((0, len(signal) - len(out)), (0, 0)), mode="edge")


def shorten(signal: np.ndarray, rate_hz: float, seconds: float) -> np.ndarray:
    """The first seconds of the recording: [T, 12] -> [min(T, round(seconds * rate_hz)), 12]."""
    return signal[: round(seconds * rate_hz)]
