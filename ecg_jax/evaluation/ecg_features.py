"""Simple ECG measurements, a baseline that any learned representation has to beat.

Rates, intervals, amplitudes, ST levels, axes and voltages as an ECG machine prints them, from one median beat per
recording. It is a baseline for tables of results, not a diagnostic device: nobody has validated it for that.

Measured against the annotations of 120 recordings of LUDB (Kalyakulina et al., IEEE Access 8:186181, 2020; all leads
and beats, medians): of 1,120 R peaks 2 missed and 2 false; error of QRS 0 ms (median), 13 ms (90 % of |errors| below),
of PR -5 and 14 ms, of QT -11 and 26 ms; a P wave found in 104 of 106 recordings with one and in 5 of 14 without.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.evaluation.delineation import NO_WAVES, Waves, band_pass, delineate, median_beat, r_peaks
from ecg_jax.evaluation.kept_rows import measured

#: The band of a diagnostic ECG without wander and mains hum, in which amplitudes are measured.
BAND_HZ = (0.5, 40.0)

_RHYTHM = (
    "heart_rate",  # per minute, from the median interval
    "rr_sd_ms",
    "rr_rmssd_ms",  # root mean square of successive differences
    "rr_irregularity",  # median |successive difference| / median interval: near 0 in sinus rhythm, high in AF
    "rr_longest_ratio",  # longest / median interval: pauses
    "rr_shortest_ratio",  # shortest / median interval: premature beats
    "usual_beats",  # share of beats that look like the median beat
)
_INTERVALS = ("p_found", "p_ms", "pr_ms", "qrs_ms", "qt_ms", "qtc_ms")
_AMPLITUDES = ("p_mv", "q_mv", "r_mv", "s_mv", "t_mv", "st60_mv")
_AXES = tuple(f"{wave}_axis_{form}" for wave in ("p", "qrs", "t") for form in ("deg", "cos", "sin"))
_REST = ("sokolow_lyon_mv", "cornell_mv", "wander_mv", "noise_mv")

FEATURE_NAMES: tuple[str, ...] = (
    *_RHYTHM,
    *_INTERVALS,
    *(f"{name}_{lead}" for name in _AMPLITUDES for lead in CANONICAL_LEADS),
    *_AXES,
    *(f"log_power_{lead}" for lead in CANONICAL_LEADS),
    *_REST,
)


def ecg_features(signal: np.ndarray, rate_hz: float) -> np.ndarray:
    """Measurements of one recording.

    Times in ms; amplitudes in mV against the level just before QRS; ST level 60 ms after QRS (J+60); QTc after
    Fridericia (Acta Med Scand 53:469, 1920); axes in degrees in the frontal plane from the area of the wave in I and
    aVF, lead I at 0 and aVF at +90, and as cosine and sine because angles wrap; log_power is the natural logarithm of
    the variance in mV^2; Sokolow-Lyon S(V1) + max(R(V5), R(V6)) (Am Heart J 37:161, 1949) and Cornell R(aVL) +
    S(V3) (Casale et al., JACC 6:572, 1985) in mV; wander below 0.5 Hz and noise above 40 Hz as root mean
    squares, the median over leads.

    Args:
      signal: [T, 12] canonical leads: int16 microvolts (as a store has them) or float millivolts. A missing lead is
        all zeros.
      rate_hz: samples per second, at least 100.

    Returns:
      float64 [F], in order of `FEATURE_NAMES`; NaN where something is not defined: intervals and `p_found`
      without beats, times and amplitudes of P without P wave, everything of a missing lead.

    Raises:
      ValueError: another shape or type, NaN or infinite samples, or a rate below 100 Hz.
    """
    signal = np.asarray(signal)
    if signal.ndim != 2 or signal.shape[1] != len(CANONICAL_LEADS):
        raise ValueError(f"signal has shape {signal.shape}, it must be [T, 12]")
    if signal.dtype == np.int16:
        signal = signal.astype(np.float32) / 1000.0
    elif not np.issubdtype(signal.dtype, np.floating):
        raise ValueError(f"signal is {signal.dtype}; int16 microvolts or float millivolts are expected")
    if not np.isfinite(signal).all():
        raise ValueError("signal has NaN or infinite samples")
    if rate_hz < 100:
        raise ValueError(f"{rate_hz:g} samples per second are too few for the waves of an ECG")

    found = dict.fromkeys(FEATURE_NAMES, np.nan)
    present = np.ptp(signal, axis=0) > 0 if len(signal) else np.zeros(12, bool)
    if not present.any() or len(signal) < rate_hz:
        return np.array(list(found.values()))
    clean = band_pass(signal, rate_hz, *BAND_HZ)
    peaks = r_peaks(signal, rate_hz)
    found |= _rhythm(peaks, rate_hz)
    found |= _noise(signal[:, present], clean[:, present], rate_hz)
    power = np.log(np.maximum(np.square(clean).mean(axis=0), 1e-12))
    _fill(found, "log_power", power, present)

    beat, r, found["usual_beats"], noise = median_beat(clean, peaks, rate_hz)
    if len(beat):
        waves = delineate(beat, r, rate_hz, noise)
        interval = np.median(np.diff(peaks)) / rate_hz if len(peaks) > 1 else np.nan
        found |= _intervals(waves, interval)
        if waves is not NO_WAVES:
            _waves(found, beat, r, rate_hz, waves, present)
    return np.array(list(found.values()), np.float64)


def _fill(found: dict, name: str, values: np.ndarray, present: np.ndarray) -> None:
    """One value per lead, NaN for those that are missing."""
    for lead, value, there in zip(CANONICAL_LEADS, values, present, strict=True):
        found[f"{name}_{lead}"] = value if there else np.nan


def _rhythm(peaks: np.ndarray, rate_hz: float) -> dict[str, float]:
    intervals = np.diff(peaks) / rate_hz
    if not len(intervals):
        return {}
    usual = np.median(intervals)
    found = {
        "heart_rate": 60.0 / usual,
        "rr_longest_ratio": intervals.max() / usual,
        "rr_shortest_ratio": intervals.min() / usual,
    }
    if len(intervals) > 1:
        steps = np.diff(intervals)
        found["rr_sd_ms"] = 1000.0 * intervals.std(ddof=1)
        found["rr_rmssd_ms"] = 1000.0 * np.sqrt(np.square(steps).mean())
        found["rr_irregularity"] = np.median(np.abs(steps)) / usual
    return found


def _noise(signal: np.ndarray, clean: np.ndarray, rate_hz: float) -> dict[str, float]:
    """Of the leads that are there: what lies below and above the band in which waves are measured."""
    slow = band_pass(signal, rate_hz, 0.0, BAND_HZ[0])
    fast = signal - clean - slow
    return {
        "wander_mv": float(np.median(slow.std(axis=0))),
        "noise_mv": float(np.median(fast.std(axis=0))),
    }


def _intervals(waves: Waves, interval: float) -> dict[str, float]:
    qt = waves.t_off - waves.qrs_on
    return {
        # Without a beat in which waves can be told, whether there is a P wave is unknown.
        "p_found": np.nan if waves is NO_WAVES else float(not np.isnan(waves.p_peak)),
        "p_ms": 1000.0 * (waves.p_off - waves.p_on),
        "pr_ms": 1000.0 * (waves.qrs_on - waves.p_on),
        "qrs_ms": 1000.0 * (waves.qrs_off - waves.qrs_on),
        "qt_ms": 1000.0 * qt,
        "qtc_ms": 1000.0 * qt / np.cbrt(interval),
    }


def _waves(found: dict, beat: np.ndarray, r: int, rate_hz: float, waves: Waves, present: np.ndarray) -> None:
    """Amplitudes, ST levels, axes and voltages of a median beat."""

    def at(seconds: float) -> int:
        return int(np.clip(round(r + seconds * rate_hz), 0, len(beat) - 1))

    def extreme(piece: np.ndarray) -> np.ndarray:
        """The value furthest from zero, with its sign."""
        return np.take_along_axis(piece, np.abs(piece).argmax(axis=0)[None], axis=0)[0]

    on, off = at(waves.qrs_on), at(waves.qrs_off)
    level = np.median(beat[max(on - round(0.024 * rate_hz), 0) : on + 1], axis=0)
    beat = beat - level
    qrs = beat[on : off + 1]
    top = qrs.argmax(axis=0)
    before = np.arange(len(qrs))[:, None] <= top
    values = {
        "r_mv": np.maximum(qrs.max(axis=0), 0.0),
        "q_mv": np.minimum(np.where(before, qrs, 0.0).min(axis=0), 0.0),
        "s_mv": np.minimum(np.where(before, 0.0, qrs).min(axis=0), 0.0),
        "st60_mv": beat[at(waves.qrs_off + 0.060)],
    }
    # A complex without any R is a QS; its depth counts as S, as the voltage criteria read it.
    negative = values["r_mv"] < 0.02
    values["s_mv"] = np.where(negative, np.minimum(qrs.min(axis=0), 0.0), values["s_mv"])
    pieces = {"qrs": qrs}
    if not np.isnan(waves.t_peak):
        width = waves.t_off - waves.t_peak if not np.isnan(waves.t_off) else 0.06
        pieces["t"] = beat[at(waves.t_peak - width) : at(waves.t_peak + width) + 1]
        values["t_mv"] = extreme(beat[at(waves.t_peak - 0.04) : at(waves.t_peak + 0.04) + 1])
    if not np.isnan(waves.p_peak):
        pieces["p"] = beat[at(waves.p_on) : at(waves.p_off) + 1]
        values["p_mv"] = extreme(pieces["p"])
    for name, value in values.items():
        _fill(found, name, value, present)
    if present[0] and present[5]:
        for name, piece in pieces.items():
            area = piece.sum(axis=0)
            angle = frontal_axis(area[0], area[5])
            found[f"{name}_axis_deg"] = float(np.rad2deg(angle))
            found[f"{name}_axis_cos"], found[f"{name}_axis_sin"] = float(np.cos(angle)), float(np.sin(angle))
    lead = {name: i for i, name in enumerate(CANONICAL_LEADS)}
    if present[[lead["V1"], lead["V5"], lead["V6"]]].all():
        tallest = values["r_mv"][[lead["V5"], lead["V6"]]].max()
        found["sokolow_lyon_mv"] = float(tallest - values["s_mv"][lead["V1"]])
    if present[[lead["aVL"], lead["V3"]]].all():
        found["cornell_mv"] = float(values["r_mv"][lead["aVL"]] - values["s_mv"][lead["V3"]])


def frontal_axis(one: float, avf: float) -> float:
    """Angle in radians of a vector in the frontal plane from its projections on I (0 degrees) and aVF (+90).

    aVF as it is recorded is sqrt(3)/2 of the projection (Goldberger, Am Heart J 24:378, 1942).
    """
    return float(np.arctan2(avf * 2.0 / np.sqrt(3.0), one))


def _row(signal: np.ndarray, rate_hz: float) -> tuple[np.ndarray]:
    return (ecg_features(signal, rate_hz)[None],)


def store_features(store: Store, rows: np.ndarray, folder: Path | None = None) -> np.ndarray:
    """`ecg_features` of some recordings of a store, in processes if there are many.

    Args:
      store: open store.
      rows: int [n].
      folder: keeps what is computed, of this store and version only; None keeps nothing.

    Returns:
      float64 [n, F].

    Raises:
      UserError: the store is damaged, or the folder cannot be written to.
    """
    wanted, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    if not len(wanted):
        return np.zeros((0, len(FEATURE_NAMES)))
    (features,) = measured(store, wanted, _row, folder, "ECG features")
    return features.values[place]


@dataclasses.dataclass(frozen=True)
class FeatureTable:
    """What makes features fit for a linear model: no NaN, one scale, no outliers.

    Fitted on training recordings only. A missing value becomes the training median, and a column says that it was
    missing (one column for all features that are missing in the same training recordings).

    Attributes:
      kept: int [k], columns with at least two different training values; k may be 0.
      median, mean, scale: float64 [k], of the training values.
      marked: int [m], columns whose absence has a column of its own.
      names: k + m names of the result's columns.
    """

    kept: np.ndarray
    median: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    marked: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def fit(cls, train: np.ndarray, names: tuple[str, ...] = FEATURE_NAMES) -> FeatureTable:
        """Learns medians and scales.

        Args:
          train: float64 [n, F], NaN where unknown.
          names: F names.

        Raises:
          ValueError: other shapes.
        """
        train = _checked(train, len(names))
        missing = np.isnan(train)
        filled = np.where(missing, np.inf, train)
        lowest, highest = filled.min(axis=0), np.where(missing, -np.inf, train).max(axis=0)
        kept = np.flatnonzero(lowest < highest)
        median = np.nanmedian(train[:, kept], axis=0)
        values = np.where(missing[:, kept], median, train[:, kept])
        some = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0))
        _, first = np.unique(missing[:, some], axis=1, return_index=True)
        marked = some[np.sort(first)]
        marks = tuple(f"{names[i]}_missing" for i in marked)
        # A feature that is one number but for rounding must not be blown up.
        largest = np.abs(values).max(axis=0, initial=0.0)
        deviation = np.maximum(values.std(axis=0), 1e-9 * np.maximum(largest, 1e-9))
        return cls(
            kept, median, values.mean(axis=0), deviation, marked, tuple(names[i] for i in kept) + marks
        )

    def transform(self, features: np.ndarray) -> np.ndarray:
        """float64 [n, k + m]: z-scores within +-5, then 0 and 1 for missing, of features [n, F].

        Raises:
          ValueError: another number of columns.
        """
        features = _checked(features, None)
        if features.shape[1] <= max((*self.kept, *self.marked), default=-1):
            raise ValueError(f"{features.shape[1]} columns are fewer than those the table was fitted on")
        values = features[:, self.kept]
        scores = (np.where(np.isnan(values), self.median, values) - self.mean) / self.scale
        return np.hstack([np.clip(scores, -5.0, 5.0), np.isnan(features[:, self.marked]).astype(np.float64)])


def _checked(features: np.ndarray, columns: int | None) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or (columns is not None and features.shape[1] != columns):
        raise ValueError(f"features have shape {features.shape}, expected [n, {columns or 'F'}]")
    if np.isinf(features).any():
        raise ValueError("features have infinite values")
    return features
