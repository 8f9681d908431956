"""The same recording in two places: found again under another gain, filter, rate, shift or crop.

Three steps. (1) Every QRS complex gives a descriptor, the 3.5 s around it in four leads, band-passed to 2-15 Hz
and scaled to length one in every lead, so that gain and offset drop out and a shift by any time moves whole
descriptors. Matrix products of descriptors give candidates with the shift between them. (2) The beats of both must
fall on each other. (3) The two are laid over each other, and two correlations are taken per lead, of which the
median over leads decides: of the signals, and of what is left when the average beat is taken away.

The second correlation is what tells a copy from another recording of the same patient: regular rhythms correlate
up to 0.99 ten seconds later, but muscle noise, breathing and irregularity do not repeat. Measured on 918 real
recordings (PTB-XL, Challenge 2020 and 2021, CPSC2018, LUDB, PTB): of 136 pairs of disjoint 10 s pieces of one
recording, laid over each other at the best of all shifts, none exceeds 0.69; the 100 Hz and 500 Hz variants of
PTB-XL records, made by another resampler, reach 0.856 or more.

Of copies made of 193 of them, found: all with other gain, offset or mains hum, filtered to 0.5-40 Hz, resampled to
100 Hz and back, or delayed by 0.5 s; 99 % of pieces of 5.2 s; 96 % after a causal 1-30 Hz filter or with 20 uV of white
noise in every lead; 90 % clipped at 0.8 mV; but 74 % with 30 uV of noise, 31 % with 50 uV, 19 % where one lacks V2.
Not found at all: leads permuted or turned round, another speed, and pieces that share less than 5 s.

Signatures take about 3 kB a recording, in memory and on disk.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.delineation import band_pass, r_peaks
from ecg_jax.files import write_atomic

#: Seconds of a descriptor, and how much of it lies before the R peak.
DESCRIPTOR_S, LEAD_IN_S = 3.5, 0.25
#: Leads of a descriptor: I, II, V2, V5. Of a comparison: the eight that are independent.
DESCRIPTOR_LEADS, COMPARED_LEADS = (0, 1, 7, 10), (0, 1, 6, 7, 8, 9, 10, 11)
DESCRIPTOR_BAND_HZ, COMPARED_BAND_HZ = (2.0, 15.0), (3.0, 30.0)
#: Numbers of a descriptor after a random projection, which keeps cosines near 0.95 to 0.03.
DIMENSIONS = 96
#: Cosine of two descriptors that makes the recordings candidates.
MIN_COSINE = 0.90
#: Share of beats of each that must fall on a beat of the other, within so many seconds.
MIN_BEATS_AGREE, BEAT_TOLERANCE_S = 0.7, 0.025
MIN_OVERLAP_S = 5.0
#: Correlation of the signals, and of what the average beat leaves.
MIN_CORRELATION, MIN_RESIDUAL_CORRELATION = 0.90, 0.80
#: With fewer beats in common there is no average beat to take away; then the signals alone must agree to this.
MIN_BEATS, MIN_CORRELATION_FEW_BEATS = 4, 0.98
#: Partners looked at per recording, the most alike first: about one in 700 other recordings of a large store is
#: alike enough to be looked at, but test signals of a simulator match tens of thousands.
MAX_PARTNERS = 128
#: Part of the cache's file name: raise it when descriptors change.
VERSION = 1

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Beats of the recordings of a store, P in all, and descriptors of the A of them that have room for one.

    Attributes:
      beat_row: int64 [P], row of the store, increasing.
      beat: int64 [P], sample of the R peak within the recording.
      row, position: int64 [A], the same of those with a descriptor.
      descriptor: float16 [A, DIMENSIONS], of length one.
      without: int64 [n], rows without a descriptor: shorter than one, or without a QRS complex; they are
        compared by checksum only.
    """

    beat_row: np.ndarray
    beat: np.ndarray
    row: np.ndarray
    position: np.ndarray
    descriptor: np.ndarray
    without: np.ndarray

    def of(self, rows: np.ndarray) -> Signatures:
        """Those of some rows."""
        keep, beats = np.isin(self.row, rows), np.isin(self.beat_row, rows)
        return Signatures(
            self.beat_row[beats],
            self.beat[beats],
            self.row[keep],
            self.position[keep],
            self.descriptor[keep],
            self.without[np.isin(self.without, rows)],
        )

    def beats_of(self, row: int) -> np.ndarray:
        """int64 [n], R peaks of one recording."""
        first, last = np.searchsorted(self.beat_row, (row, row + 1))
        return self.beat[first:last]


@dataclasses.dataclass(frozen=True)
class Match:
    """Two recordings that are one.

    Attributes:
      row_a, row_b: rows of their stores.
      shift_s: seconds of a that come before b begins (negative: b begins before a).
      overlap_s: seconds they share.
      correlation: of the signals, median over leads.
      residual_correlation: of what the average beat leaves, median over leads; NaN with fewer than `MIN_BEATS`
        beats in common.
    """

    row_a: int
    row_b: int
    shift_s: float
    overlap_s: float
    correlation: float
    residual_correlation: float


def signatures(store: Store, rows: np.ndarray | None = None, cache: Path | None = None) -> Signatures:
    """Descriptors of recordings of a store.

    Args:
      store: open store.
      rows: int [n], whose; None takes all.
      cache: folder that keeps those of whole stores under their fingerprints; made if needed. None keeps
        nothing and computes only `rows`.

    Raises:
      UserError: the store is damaged, or the cache cannot be written.
    """
    every = np.arange(len(store))
    rows = every if rows is None else np.unique(np.asarray(rows, np.int64))
    if cache is None:
        return _compute(store, rows)
    path = Path(cache) / f"signatures-v{VERSION}-{store.fingerprint}.npz"
    if not path.is_file():
        computed = _compute(store, every)
        _save(path, computed)
    else:
        computed = _load(path)
    return computed if len(rows) == len(store) else computed.of(rows)


def _save(path: Path, computed: Signatures) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **vars(computed))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    write_atomic(path, buffer.getvalue())


def _load(path: Path) -> Signatures:
    try:
        with np.load(path) as file:
            return Signatures(**{field.name: file[field.name] for field in dataclasses.fields(Signatures)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of signatures; remove it, it will be made anew") from error


def _projection(inputs: int) -> np.ndarray:
    """float32 [inputs, DIMENSIONS], random directions, the same in every version of NumPy."""
    return np.random.RandomState(0).standard_normal((inputs, DIMENSIONS)).astype(np.float32)


def _compute(store: Store, rows: np.ndarray) -> Signatures:
    step = max(round(store.rate_hz / 40.0), 1)
    width = int(DESCRIPTOR_S * store.rate_hz / step)
    projection = _projection(width * len(DESCRIPTOR_LEADS))

    def describe(row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        signal = store.read(row).astype(np.float32) / 1000.0
        return describe_signal(signal, store.rate_hz, step, width, projection)

    found = []
    with ThreadPoolExecutor() as pool:
        for begin in range(
            0, len(rows), _BLOCK
        ):  # millions of waiting tasks would need more memory than results
            found += pool.map(describe, rows[begin : begin + _BLOCK].tolist())
    beats, positions, descriptors = zip(*found, strict=True) if found else ((), (), ())
    counts = np.array([len(each) for each in positions], np.int64)
    none = np.zeros(0, np.int64)
    return Signatures(
        beat_row=np.repeat(rows, np.array([len(each) for each in beats], np.int64)),
        beat=np.concatenate([none, *beats]),
        row=np.repeat(rows, counts),
        position=np.concatenate([none, *positions]),
        descriptor=np.concatenate([np.zeros((0, DIMENSIONS), np.float16), *descriptors]),
        without=rows[counts == 0],
    )


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


def candidates(a: Signatures, b: Signatures, same: bool) -> Iterator[tuple[int, int, int]]:
    """Pairs of rows whose descriptors agree.

    Args:
      a, b: signatures; of one store if `same`, then every pair comes once and none with itself.
      same: whether rows of a and b mean the same recordings.

    Yields:
      (row of a, row of b, samples by which b begins after a), up to three shifts for a pair, best first.
    """
    wide = b.descriptor.astype(np.float32)
    for begin in range(0, len(a.row), _BLOCK):
        block = a.descriptor[begin : begin + _BLOCK].astype(np.float32)
        hits = []
        for at in range(0, len(wide), _BLOCK):
            cosine = block @ wide[at : at + _BLOCK].T
            flat = np.flatnonzero(cosine >= MIN_COSINE)
            i, j = np.divmod(flat, cosine.shape[1])
            hits.append((i + begin, j + at, cosine.reshape(-1)[flat]))
        i, j, cosine = (np.concatenate(parts) for parts in zip(*hits, strict=True)) if hits else ([], [], [])
        if not len(i):
            continue
        keep = a.row[i] < b.row[j] if same else np.ones(len(i), bool)
        yield from _best_shifts(
            a.row[i[keep]], b.row[j[keep]], a.position[i[keep]] - b.position[j[keep]], cosine[keep]
        )


def _best_shifts(row_a, row_b, shift, cosine) -> Iterator[tuple[int, int, int]]:
    partners: dict[int, set[int]] = {}
    shifts: dict[tuple[int, int], list[int]] = {}
    order = np.argsort(-cosine, kind="stable")
    for p, q, s in zip(row_a[order].tolist(), row_b[order].tolist(), shift[order].tolist(), strict=True):
        known = partners.setdefault(p, set())
        if q not in known and len(known) >= MAX_PARTNERS:
            continue
        known.add(q)
        tried = shifts.setdefault((p, q), [])
        if len(tried) < 3 and all(abs(s - other) > 8 for other in tried):
            tried.append(s)
    for p, q in sorted(shifts):
        for each in shifts[p, q]:
            yield p, q, each


def beats_agree(a: np.ndarray, b: np.ndarray, shift: int, lengths: tuple[int, int], rate_hz: float) -> bool:
    """Whether R peaks of two recordings fall on each other where they overlap.

    Args:
      a, b: int [n], [m], samples of R peaks.
      shift: samples by which b begins after a.
      lengths: samples of both.
      rate_hz: samples per second.
    """
    first, last = max(0, shift), min(lengths[0], lengths[1] + shift)
    if last - first < MIN_OVERLAP_S * rate_hz:
        return False
    b = b + shift
    edge = 0.3 * rate_hz  # a detector may miss a complex that is cut
    a = a[(a >= first + edge) & (a < last - edge)]
    b = b[(b >= first + edge) & (b < last - edge)]
    if not len(a) or not len(b):
        return True
    near = np.abs(a[:, None] - b[None]) <= BEAT_TOLERANCE_S * rate_hz
    return min(near.any(axis=1).mean(), near.any(axis=0).mean()) >= MIN_BEATS_AGREE


def compare(a: np.ndarray, b: np.ndarray, shift: int, peaks: np.ndarray, rate_hz: float) -> tuple | None:
    """Lays two band-passed recordings over each other.

    Args:
      a, b: float [T, 8], [S, 8]: the compared leads, passed to `COMPARED_BAND_HZ`.
      shift: samples by which b begins after a, known to a few.
      peaks: int [n] R peaks of a.
      rate_hz: samples per second.

    Returns:
      (shift, samples of overlap, correlation, residual correlation); the last is NaN with too few beats, or where
      the first correlation says enough. None if they share less than `MIN_OVERLAP_S` or no lead.
    """
    shift = _best_shift(a, b, shift, rate_hz)
    first, last = max(0, shift), min(len(a), len(b) + shift)
    if last - first < MIN_OVERLAP_S * rate_hz:
        return None
    x, y, peaks = a[first:last], b[first - shift : last - shift], peaks - first
    correlation = _correlation(x, y)
    if correlation is None:
        return None
    if correlation < MIN_CORRELATION:
        return shift, last - first, correlation, np.nan
    interval = np.median(np.diff(peaks)) if len(peaks) > 1 else rate_hz
    before, after = int(0.35 * interval), int(0.65 * interval)
    peaks = peaks[(peaks >= before) & (peaks + after <= last - first)]
    residual = np.nan
    if len(peaks) >= MIN_BEATS:
        beats = peaks[:, None] + np.arange(-before, after)
        left = [(z[beats] - np.median(z[beats], axis=0)).reshape(-1, z.shape[1]) for z in (x, y)]
        value = _correlation(*left)
        residual = np.nan if value is None else value
    return shift, last - first, correlation, residual


def _best_shift(a: np.ndarray, b: np.ndarray, shift: int, rate_hz: float) -> int:
    """The shift within 17 ms at which the signals correlate most; every fourth sample decides."""
    reach = max(round(0.017 * rate_hz), 1)
    first, last = max(0, shift + reach), min(len(a), len(b) + shift - reach)
    at = np.arange(first, last, 4)
    if len(at) < 2:
        return shift
    offsets = np.arange(-reach, reach + 1)
    x = a[at] - a[at].mean(axis=0)
    y = b[at - shift - offsets[:, None]]
    y = y - y.mean(axis=1, keepdims=True)
    xx, yy = np.square(x).sum(axis=0), np.square(y).sum(axis=1)
    alive = (xx > 1e-6) & (yy > 1e-6).all(axis=0)
    if not alive.any():
        return shift
    correlation = np.einsum("tc,stc->sc", x, y)[:, alive] / np.sqrt(xx * yy)[:, alive]
    return shift + int(offsets[np.argmax(np.median(correlation, axis=1))])


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Median over leads, of those that vary in both; None if none does."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    xx, yy, xy = (np.einsum("tc,tc->c", p, q) for p, q in ((x, x), (y, y), (x, y)))
    alive = (xx > 1e-6) & (yy > 1e-6)
    return float(np.median(xy[alive] / np.sqrt(xx[alive] * yy[alive]))) if alive.any() else None


def is_match(correlation: float, residual: float) -> bool:
    """Whether two correlations of `compare` mean one recording."""
    if np.isnan(residual):
        return correlation >= MIN_CORRELATION_FEW_BEATS
    return correlation >= MIN_CORRELATION and residual >= MIN_RESIDUAL_CORRELATION


def near_identical(
    a: Store, rows_a: np.ndarray, b: Store, rows_b: np.ndarray, cache: Path | None = None
) -> list[Match]:
    """Recordings of one store found again in another, or in the same one, other than bit for bit.

    Args:
      a, b: stores of one rate and lead order.
      rows_a, rows_b: int [n], [m], which recordings to compare. The same rows of one store twice: every pair
        comes once.
      cache: see `signatures`.

    Returns:
      Matches in order of rows; pairs of equal checksums are left out.

    Raises:
      UserError: the stores differ in rate, one is damaged, or the cache cannot be written.
    """
    if a.rate_hz != b.rate_hz:
        raise UserError(
            f"The store {a.path} has {a.rate_hz:g} samples per second and {b.path} has {b.rate_hz:g}; recordings can "
            "only be compared at one rate, so prepare both at the same."
        )
    same = a.path.resolve() == b.path.resolve() and np.array_equal(rows_a, rows_b)
    of_a = signatures(a, rows_a, cache)
    of_b = of_a if same else signatures(b, rows_b, cache)
    sums = a.column("checksum"), b.column("checksum")
    lengths = a.column("length"), b.column("length")
    banded: dict[tuple[int, int], np.ndarray] = {}

    def signal(which: int, store: Store, row: int) -> np.ndarray:
        if (which, row) not in banded:
            if len(banded) > 64:
                banded.pop(next(iter(banded)))
            raw = store.read(row)[:, COMPARED_LEADS].astype(np.float32) / 1000.0
            banded[which, row] = band_pass(raw, store.rate_hz, *COMPARED_BAND_HZ)
        return banded[which, row]

    found: dict[tuple[int, int], Match] = {}
    for p, q, shift in candidates(of_a, of_b, same):
        if (p, q) in found or sums[0][p] == sums[1][q]:
            continue
        peaks, both = of_a.beats_of(p), (int(lengths[0][p]), int(lengths[1][q]))
        if not beats_agree(peaks, of_b.beats_of(q), shift, both, a.rate_hz):
            continue
        compared = compare(signal(0, a, p), signal(0 if same else 1, b, q), shift, peaks, a.rate_hz)
        if compared is not None and is_match(*compared[2:]):
            s, overlap, correlation, residual = compared
            found[p, q] = Match(p, q, s / a.rate_hz, overlap / a.rate_hz, correlation, residual)
    return [found[key] for key in sorted(found)]
