"""Where waves begin and end: R peaks of a recording, and P, QRS and T of its median beat.

A plain signal-processing delineator for baselines and for aligning recordings, not a diagnostic device. All
leads vote together: every quantity that decides is a root mean square over leads, so that no single lead has
to be clean. Letters: T samples, C leads, W samples of a beat.
"""

from __future__ import annotations

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
    maxima, _ = sp.find_peaks(energy)
    if not len(maxima) or not energy.max() > 0:
        return np.zeros(0, np.int64)
    block = max(round(1.5 * rate_hz), 1)
    typical = np.median(
        [energy[i : i + block].max() for i in range(0, max(len(energy) - block // 2, 1), block)]
    )
    around = ndimage.maximum_filter1d(energy, 2 * block)
    height = np.minimum(around, 2.0 * typical)
    chosen = _spaced(maxima[energy[maxima] > 0.40 * height[maxima]], energy, REFRACTORY_S * rate_hz)
    if len(chosen) < 2:
        return chosen
    usual = np.median(np.diff(chosen))
    found = [chosen]
    for left, right in itertools.pairwise(chosen):
        if right - left > 1.66 * usual:
            inside = maxima[(maxima > left + 0.4 * usual) & (maxima < right - 0.4 * usual)]
            found.append(inside[energy[inside] > 0.25 * height[inside]])
    return _spaced(np.sort(np.concatenate(found)), energy, REFRACTORY_S * rate_hz)


def _spaced(positions: np.ndarray, energy: np.ndarray, distance: float) -> np.ndarray:
    """The highest of positions that are too close to each other, greedily from the highest down."""
    kept = []
    for at in positions[np.argsort(-energy[positions], kind="stable")]:
        if all(abs(at - other) >= distance for other in kept):
            kept.append(at)
    return np.sort(np.array(kept, np.int64))
