"""What a recording is recognised by: where its beats are, and a short description of what surrounds each.

Every QRS complex gives a descriptor, the 3.5 s around it in four leads, band-passed to 2-15 Hz and scaled to length
one in every lead, so that gain and offset drop out and a shift by any time moves whole descriptors.

Signatures take about 3 kB a recording, in memory and on disk.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.evaluation.delineation import band_pass, r_peaks
from ecg_jax.evaluation.kept_rows import measured

#: Seconds of a descriptor, and how much of it lies before the R peak.
DESCRIPTOR_S, LEAD_IN_S = 3.5, 0.25
#: I, II, V2, V5.
DESCRIPTOR_LEADS = (0, 1, 7, 10)
DESCRIPTOR_BAND_HZ = (2.0, 15.0)
#: Numbers of a descriptor after a random projection, which keeps cosines near 0.95 to 0.03.
DIMENSIONS = 96
#: Part of the cache's folder name: raise it when descriptors change.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Beats of n recordings of a store, P in all, and descriptors of the A of them that have room for one.

    Attributes:
      store: whose recordings.
      rows: int64 [n], which of them, increasing.
      beat_row: int64 [P], row of the store, increasing.
      beat: int64 [P], sample of the R peak within the recording.
      row, position: int64 [A], the same of those with a descriptor.
      descriptor: float16 [A, DIMENSIONS], of length one.
    """

    store: Store
    rows: np.ndarray
    beat_row: np.ndarray
    beat: np.ndarray
    row: np.ndarray
    position: np.ndarray
    descriptor: np.ndarray

    @property
    def without(self) -> np.ndarray:
        """int64 [m], rows without a descriptor: shorter than one, or without a QRS complex; they are compared by
        checksum only.
        """
        return np.setdiff1d(self.rows, self.row)

    def of(self, rows: np.ndarray) -> Signatures:
        """Those of some of the rows."""
        if np.array_equal(self.rows, rows):
            return self
        keep, beats = np.isin(self.row, rows), np.isin(self.beat_row, rows)
        return Signatures(
            self.store,
            np.intersect1d(self.rows, rows),
            self.beat_row[beats],
            self.beat[beats],
            self.row[keep],
            self.position[keep],
            self.descriptor[keep],
        )

    def beats_of(self, row: int) -> np.ndarray:
        """int64 [n], R peaks of one recording."""
        first, last = np.searchsorted(self.beat_row, (row, row + 1))
        return self.beat[first:last]


def signatures(store: Store, rows: np.ndarray | None = None, cache: Path | None = None) -> Signatures:
    """Beats and descriptors of recordings of a store.

    Args:
      store: open store.
      rows: int [n], whose; None takes all.
      cache: folder that keeps those of each store under its fingerprint; made if needed. None keeps nothing.

    Raises:
      UserError: the store is damaged, or the cache cannot be written.
    """
    rows = np.arange(len(store)) if rows is None else np.unique(np.asarray(rows, np.int64))
    if not len(rows):
        none = np.zeros(0, np.int64)
        return Signatures(store, none, none, none, none, none, np.zeros((0, DIMENSIONS), np.float16))
    folder = None if cache is None else Path(cache) / f"signatures-v{VERSION}-{store.fingerprint}"
    beats, positions, descriptors = measured(store, rows, _describe, folder, "signatures")
    return Signatures(
        store=store,
        rows=rows,
        beat_row=np.repeat(rows, beats.counts),
        beat=beats.values,
        row=np.repeat(rows, positions.counts),
        position=positions.values,
        descriptor=descriptors.values,
    )


@functools.cache
def _projection(inputs: int) -> np.ndarray:
    """float32 [inputs, DIMENSIONS], random directions, the same in every version of NumPy."""
    return np.random.RandomState(0).standard_normal((inputs, DIMENSIONS)).astype(np.float32)


def _describe(signal: np.ndarray, rate_hz: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`describe_signal` of int16 microvolts."""
    step = max(round(rate_hz / 40.0), 1)
    width = int(DESCRIPTOR_S * rate_hz / step)
    projection = _projection(width * len(DESCRIPTOR_LEADS))
    return describe_signal(signal.astype(np.float32) / 1000.0, rate_hz, step, width, projection)


def describe_signal(
    signal: np.ndarray, rate_hz: float, step: int, width: int, projection: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descriptors of one recording.

    Args:
      signal: float32 [T, 12] millivolts, canonical leads.
      rate_hz: samples per second.
      step: every step-th sample is used.
      width: samples of a descriptor in each lead, at that step.
      projection: float32 [4 * width, DIMENSIONS].

    Returns:
      (int64 [m] samples of all R peaks, int64 [n] of those with a descriptor, float16 [n, DIMENSIONS]).
    """
    beats = r_peaks(signal, rate_hz)
    first = beats - round(LEAD_IN_S * rate_hz)
    inside = (first >= 0) & (first + step * width <= len(signal))
    peaks, first = beats[inside], first[inside]
    if not len(peaks):
        return beats, peaks, np.zeros((0, DIMENSIONS), np.float16)
    band = band_pass(signal[:, DESCRIPTOR_LEADS], rate_hz, *DESCRIPTOR_BAND_HZ)
    pieces = band[first[:, None] + step * np.arange(width)]
    pieces = pieces - pieces.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(pieces, axis=1, keepdims=True)
    pieces = np.where(norm > 1e-3, pieces / np.maximum(norm, 1e-3), 0.0)
    flat = pieces.reshape(len(pieces), -1).astype(np.float32) @ projection
    length = np.linalg.norm(flat, axis=1)
    alive = length > 1.0
    flat = flat[alive] / length[alive, None]
    return beats, peaks[alive], flat.astype(np.float16)
