"""Where waves begin and end: R peaks of a recording, and P, QRS and T of its median beat.

A plain signal-processing delineator for baselines and for aligning recordings, not a diagnostic device. All
leads vote together: every quantity that decides is a root mean square over leads, so that no single lead has
to be clean. Letters: T samples, C leads, W samples of a beat.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

#: QRS energy lies here (Thakor et al., IEEE TBME 31:702, 1984: about 5-25 Hz), P, T and wander below.
QRS_BAND_HZ = (8.0, 30.0)
#: Two ventricular depolarisations closer than this do not occur at rates below 240 per minute.
REFRACTORY_S = 0.25
#: A beat reaches from this much before the R peak to this much after it.
BEFORE_S, AFTER_S = 0.40, 0.60


def band_pass(signal: np.ndarray, rate_hz: float, low_hz: float, high_hz: float) -> np.ndarray:
    """A band of a signal, without phase shift.

    Ends are mirrored first, so that a level at one end and another at the other do not ring; the edges of the
    band are raised cosines, a fifth of each frequency wide.

    Args:
      signal: float [T, C].
      rate_hz: samples per second.
      low_hz, high_hz: edges of the band; low_hz 0 keeps the mean.

    Returns:
      float [T, C].
    """
    from scipy import fft

    n = len(signal)
    pad = min(n - 1, round(rate_hz))
    padded = np.concatenate([signal[pad:0:-1], signal, signal[-2 : -pad - 2 : -1]])
    size = fft.next_fast_len(len(padded), real=True)
    frequency = fft.rfftfreq(size, 1.0 / rate_hz)

    def step(edge):
        return 0.5 - 0.5 * np.cos(np.pi * np.clip((frequency / edge - 0.9) / 0.2, 0.0, 1.0))

    gain = 1.0 - step(high_hz)
    if low_hz > 0:
        gain *= step(low_hz)
    spectrum = fft.rfft(padded, size, axis=0)
    spectrum *= gain[:, None]
    return fft.irfft(spectrum, size, axis=0)[pad : pad + n]


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` samples along the first axis, shorter at the ends."""
    half = width // 2
    total = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    count = (last - first).reshape(-1, *[1] * (values.ndim - 1))
    return (total[last] - total[first]) / count


def r_peaks(signal: np.ndarray, rate_hz: float) -> np.ndarray:
    """QRS complexes: maxima of the band-passed energy of all leads above an adaptive threshold.

    The threshold is a share of what the signal reaches within three seconds around, but of no more than twice
    the typical (median) height, so that one artefact does not hide its neighbours; gaps of more than 1.66
    typical intervals are searched again at a lower one (Pan and Tompkins, IEEE TBME 32:230, 1985).

    Args:
      signal: float [T, C] millivolts; leads of zeros do not vote.
      rate_hz: samples per second.

    Returns:
      int64 [n] samples, increasing, at the centre of the complexes; none where the signal is too short or flat.
    """
    from scipy import ndimage
    from scipy import signal as sp

    if len(signal) < 0.5 * rate_hz:
        return np.zeros(0, np.int64)
    band = band_pass(signal, rate_hz, *QRS_BAND_HZ)
    energy = np.sqrt(moving_mean(np.square(band).mean(axis=1), max(round(0.09 * rate_hz), 1)))
    maxima, _ = sp.find_peaks(
        energy, distance=max(REFRACTORY_S * rate_hz, 1.0)
    )  # the higher of close ones stays
    if not len(maxima) or not energy.max() > 0:
        return np.zeros(0, np.int64)
    block = max(round(1.5 * rate_hz), 1)
    typical = np.median(
        [energy[i : i + block].max() for i in range(0, max(len(energy) - block // 2, 1), block)]
    )
    around = ndimage.maximum_filter1d(energy, 2 * block)
    height = np.minimum(around, 2.0 * typical)
    chosen = maxima[energy[maxima] > 0.40 * height[maxima]]
    if len(chosen) < 2:
        return chosen
    usual = np.median(np.diff(chosen))
    found = [chosen]
    for left, right in itertools.pairwise(chosen):
        if right - left > 1.66 * usual:
            inside = maxima[(maxima > left + 0.4 * usual) & (maxima < right - 0.4 * usual)]
            found.append(inside[energy[inside] > 0.25 * height[inside]])
    return np.sort(np.concatenate(found))


@dataclasses.dataclass(frozen=True)
class Waves:
    """Where the waves of a beat begin and end, in seconds from the R peak; NaN where there is none.

    Attributes:
      p_on, p_peak, p_off: P wave.
      qrs_on, qrs_off: QRS complex, as the typical lead shows it (the earliest and latest leads show it 20 ms longer).
      t_peak, t_off: T wave.
    """

    p_on: float
    p_peak: float
    p_off: float
    qrs_on: float
    qrs_off: float
    t_peak: float
    t_off: float


NO_WAVES = Waves(*[float("nan")] * 7)


def median_beat(
    signal: np.ndarray, peaks: np.ndarray, rate_hz: float
) -> tuple[np.ndarray, int, float, np.ndarray]:
    """The median of the beats that look like the usual one.

    Args:
      signal: float [T, C] millivolts, without baseline wander.
      peaks: int [n] R peaks.
      rate_hz: samples per second.

    Returns:
      (float [W, C], sample of the R peak in it, share of the beats that were used, noise of the median float [W] in
      millivolts, zero if there is but one beat). W is 0 where no beat lies within the signal.
    """
    interval = np.median(np.diff(peaks)) / rate_hz if len(peaks) > 1 else 1.0
    before = round(min(BEFORE_S, 0.45 * interval) * rate_hz)
    after = round(min(AFTER_S, 0.75 * interval) * rate_hz)
    peaks = peaks[(peaks >= before) & (peaks + after <= len(signal))]
    if not len(peaks):
        return np.zeros((0, signal.shape[1])), 0, np.nan, np.zeros(0)
    beats = signal[peaks[:, None] + np.arange(-before, after)]
    beats = beats - np.median(beats, axis=1, keepdims=True)
    middle = np.median(beats, axis=0)
    norms = np.linalg.norm(beats, axis=(1, 2)) * np.linalg.norm(middle)
    alike = (beats * middle).sum(axis=(1, 2)) >= 0.8 * norms
    if alike.sum() >= 2:
        beats = beats[alike]
        middle = np.median(beats, axis=0)
    noise = np.sqrt(np.square(beats - middle).mean(axis=(0, 2)) / len(beats))
    return middle, before, float(alike.mean()), noise


def _walk(values: np.ndarray, start: int, stop: int, below: float) -> int:
    """The first sample from `start` towards `stop` where values fall below, or the lowest one if none does."""
    step = 1 if stop > start else -1
    path = np.arange(start, stop, step)
    low = np.flatnonzero(values[path] < below)
    return int(path[low[0]]) if len(low) else int(path[np.argmin(values[path])])


def delineate(beat: np.ndarray, r: int, rate_hz: float, noise: np.ndarray) -> Waves:
    """P, QRS and T of a median beat, all leads together.

    QRS: where the spatial velocity (root mean square over leads of the slope) falls below a share of its maximum
    on either side. T end: where the steepest tangent behind the T peak meets the level after it (Lepeschkin and
    Surawicz, Circulation 6:378, 1952). P: where the wave falls below a quarter of its height.

    Args:
      beat: float [W, C] millivolts; leads of zeros do not vote.
      r: sample of the R peak.
      rate_hz: samples per second.
      noise: float [W] millivolts, of the beat; a wave has to stand out of it.

    Returns:
      `Waves`; `NO_WAVES` for a beat that is too short or flat.
    """
    beat = beat[:, np.ptp(beat, axis=0) > 0]
    if len(beat) < 0.3 * rate_hz or not beat.shape[1]:
        return NO_WAVES

    def samples(seconds: float) -> int:
        return round(seconds * rate_hz)

    last = len(beat) - 1
    velocity = moving_mean(np.sqrt(np.square(np.gradient(beat, axis=0)).mean(axis=1)), samples(0.0125))
    inner = slice(max(r - samples(0.06), 0), min(r + samples(0.08), last))
    fastest = velocity[inner].max()
    quick = np.flatnonzero(velocity[inner] > 0.3 * fastest) + inner.start
    on = _walk(velocity, int(quick[0]), max(int(quick[0]) - samples(0.08), 0), QRS_ON_SHARE * fastest)
    off = _walk(velocity, int(quick[-1]), min(int(quick[-1]) + samples(0.08), last), QRS_OFF_SHARE * fastest)
    level = np.median(beat[max(on - samples(0.024), 0) : on + 1], axis=0)
    t_peak, t_off = _t_wave(beat - level, off + samples(0.06), rate_hz, noise)
    p_on, p_peak, p_off = _p_wave(beat, on, rate_hz, noise)
    return Waves(*((at - r) / rate_hz for at in (p_on, p_peak, p_off, on, off, t_peak, t_off)))


#: Shares of the greatest velocity at which QRS begins and ends: unbiased against the median lead of LUDB.
QRS_ON_SHARE, QRS_OFF_SHARE = 0.06, 0.10


def _t_wave(beat: np.ndarray, first: int, rate_hz: float, noise: np.ndarray) -> tuple[float, float]:
    """(peak, end) in samples, or NaN."""
    height = moving_mean(np.sqrt(np.square(beat).mean(axis=1)), max(round(0.02 * rate_hz), 1))
    if first + round(0.08 * rate_hz) > len(height) - 2:
        return np.nan, np.nan
    peak = first + int(np.argmax(height[first:]))
    floor = height[peak:].min()
    if height[peak] - floor < max(3.0 * np.median(noise[first:]), 0.02) or peak >= len(height) - 3:
        return float(peak) if peak < len(height) - 3 else np.nan, np.nan
    slope = np.gradient(height)
    low = peak + int(np.argmin(height[peak:]))
    steepest = peak + int(np.argmin(slope[peak : low + 1]))
    if slope[steepest] >= 0:
        return float(peak), np.nan
    end = steepest + (floor - height[steepest]) / slope[steepest]
    return float(peak), float(min(end, len(height) - 1))


#: A P wave is this many times as high as the noise of the median beat where it is.
P_OVER_NOISE = 4.0


def _p_wave(beat: np.ndarray, on: int, rate_hz: float, noise: np.ndarray) -> tuple[float, float, float]:
    """(begin, peak, end) in samples, or NaN."""
    first, last = max(on - round(0.28 * rate_hz), 0), on - round(0.02 * rate_hz)
    if last - first < 0.1 * rate_hz:
        return np.nan, np.nan, np.nan
    piece = beat[first:last]
    ramp = np.linspace(0.0, 1.0, len(piece))[:, None]
    edge = max(round(0.012 * rate_hz), 1)
    begin, end = piece[:edge].mean(axis=0), piece[-edge:].mean(axis=0)
    height = np.sqrt(np.square(piece - begin - ramp * (end - begin)).mean(axis=1))
    height = moving_mean(height, max(round(0.02 * rate_hz), 1))
    peak = int(np.argmax(height))
    if (
        height[peak] < max(P_OVER_NOISE * np.median(noise[first:last]), 0.015)
        or not edge < peak < len(height) - edge
    ):
        return np.nan, np.nan, np.nan
    begin = _walk(height, peak, -1, 0.25 * height[peak])
    end = _walk(height, peak, len(height), 0.25 * height[peak])
    return float(first + begin), float(first + peak), float(first + end)
