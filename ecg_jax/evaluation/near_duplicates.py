"""The same recording in two places: found again under another gain, filter, rate, shift or crop.

Three steps. (1) Every QRS complex gives a descriptor (`signatures`). Matrix products of descriptors give candidates
with the shift between them. (2) The beats of both must fall on each other. (3) The two are laid over each other, and
two correlations are taken per lead, of which the median over leads decides: of the signals, and of what is left when
the average beat is taken away.

The second correlation is what tells a copy from another recording of the same patient: regular rhythms correlate
up to 0.99 ten seconds later, but muscle noise, breathing and irregularity do not repeat. Measured on 918 real
recordings (PTB-XL, Challenge 2020 and 2021, CPSC2018, LUDB, PTB): of 136 pairs of disjoint 10 s pieces of one
recording, laid over each other at the best of all shifts, none exceeds 0.69; the 100 Hz and 500 Hz variants of
PTB-XL records, made by another resampler, reach 0.856 or more.

Of copies made of 193 of them, found: all with other gain, offset or mains hum, filtered to 0.5-40 Hz, resampled to
100 Hz and back, or delayed by 0.5 s; 99 % of pieces of 5.2 s; 96 % after a causal 1-30 Hz filter or with 20 uV of white
noise in every lead; 90 % clipped at 0.8 mV; but 74 % with 30 uV of noise, 31 % with 50 uV, 19 % where one lacks V2.
Not found at all: leads permuted or turned round, another speed, and pieces that share less than 5 s.

Time grows with the product of the numbers of recordings, memory with their sum, so that only sets of up to
`MAX_RECORDINGS` are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation.delineation import band_pass
from ecg_jax.evaluation.signatures import Signatures

#: Recordings on either side of a comparison; of more only identical signals are looked for, and verdicts say so.
#: Signatures of so many take 0.6 GB.
MAX_RECORDINGS = 200_000
#: The eight leads that are independent.
COMPARED_LEADS = (0, 1, 6, 7, 8, 9, 10, 11)
COMPARED_BAND_HZ = (3.0, 30.0)
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
#: Shifts tried for a pair, and samples by which they must differ.
MAX_SHIFTS, SHIFTS_APART = 3, 8

#: Descriptors multiplied at a time, and agreeing ones kept of each of them from one product.
_BLOCK, _HITS = 4096, 128
#: Agreeing descriptors gathered before they are cut down to the best.
_GATHERED = 1_000_000


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


def too_many(*numbers: int) -> str | None:
    """Why sets of so many recordings are not looked through for near-identical ones; None if they are."""
    most = max(numbers)
    return f"{most} recordings are more than {MAX_RECORDINGS}" if most > MAX_RECORDINGS else None


def candidates(a: Signatures, b: Signatures, same: bool) -> Iterator[tuple[int, int, int]]:
    """Pairs of rows whose descriptors agree.

    Args:
      a, b: signatures; of the same recordings if `same`, then every pair comes once and none with itself.
      same: whether a and b are the same.

    Yields:
      (row of a, row of b, samples by which b begins after a), up to `MAX_SHIFTS` shifts for a pair, best first, and up
      to `MAX_PARTNERS` rows of b for a row of a.
    """
    from tqdm import tqdm

    # A recording's descriptors are in one block, so that its partners are counted once.
    starts = _block_starts(a.row)
    n_products = sum(len(range(begin if same else 0, len(b.row), _BLOCK)) for begin, _ in starts)
    with tqdm(
        total=n_products, desc=f"{a.store.path.name} in {b.store.path.name}", unit="block", delay=5.0, leave=False,
        disable=None,
    ) as bar:  # fmt: skip
        for begin, end in starts:
            block = a.descriptor[begin:end].astype(np.float32)
            hits = _Hits()
            for at in range(begin if same else 0, len(b.row), _BLOCK):
                i, j, cosine = _agreeing(
                    block, b.descriptor[at : at + _BLOCK], a.row[begin:end], b.row[at:], same
                )
                hits.add(a.row[begin + i], b.row[at + j], a.position[begin + i] - b.position[at + j], cosine)
                bar.update()
            yield from hits.pairs()


def _block_starts(row: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of blocks of about `_BLOCK` descriptors that part no recording."""
    bounds, begin = [], 0
    while begin < len(row):
        # At least one recording, however many beats it has.
        last = row[min(begin + _BLOCK, len(row)) - 1]
        end = len(row) if begin + _BLOCK >= len(row) else int(np.searchsorted(row, last))
        end = end if end > begin else int(np.searchsorted(row, last, side="right"))
        bounds.append((begin, end))
        begin = end
    return bounds


def _agreeing(block: np.ndarray, wide: np.ndarray, row_a: np.ndarray, row_b: np.ndarray, same: bool):
    """(i, j, cosine) of descriptors of a block [n, D] and another [m, D] that agree, up to `_HITS` for each i.

    Of the same recordings only those in later ones.
    """
    cosine = block @ wide.astype(np.float32).T
    if same and row_b[0] <= row_a[-1]:
        cosine[row_a[:, None] >= row_b[None, : len(wide)]] = -1.0
    flat = np.flatnonzero(cosine >= MIN_COSINE)
    i, j = np.divmod(flat, cosine.shape[1])
    many = np.flatnonzero(np.bincount(i, minlength=len(block)) > _HITS)
    if len(many):
        few = ~np.isin(i, many)
        best = np.argpartition(cosine[many], -_HITS, axis=1)[:, -_HITS:]
        i = np.concatenate([i[few], np.repeat(many, _HITS)])
        j = np.concatenate([j[few], best.reshape(-1)])
    return i, j, cosine[i, j]


class _Hits:
    """Agreeing descriptors of some recordings, cut down to the best now and then."""

    def __init__(self):
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._n = 0

    def add(self, *hits: np.ndarray) -> None:
        """Row of a, row of b, shift, cosine, [n] each."""
        self._parts.append(hits)
        self._n += len(hits[0])
        if self._n > _GATHERED:
            self._parts = [best_shifts(*self._joined())]
            self._n = len(self._parts[0][0])

    def _joined(self) -> list[np.ndarray]:
        return [np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(row of a, row of b, shift), by rows, the best shift of a pair first."""
        if self._n:
            row_a, row_b, shift, _ = best_shifts(*self._joined())
            yield from zip(row_a.tolist(), row_b.tolist(), shift.tolist(), strict=True)


def best_shifts(
    row_a: np.ndarray, row_b: np.ndarray, shift: np.ndarray, cosine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of agreeing descriptors [n] those to be looked at.

    Returns:
      (row of a, row of b, shift, cosine), sorted by rows, then by falling cosine: of every row of a the
      `MAX_PARTNERS` rows of b of highest cosine, of each pair the `MAX_SHIFTS` best shifts that are more than
      `SHIFTS_APART` samples apart.
    """
    order = np.lexsort((-cosine, row_b, row_a))
    row_a, row_b, shift, cosine = (array[order] for array in (row_a, row_b, shift, cosine))
    first = _starts(row_a, row_b)
    pair = np.cumsum(first) - 1  # of each hit
    at = np.flatnonzero(first)  # of each pair, its best hit
    ranked = np.lexsort((-cosine[at], row_a[at]))
    begins = np.flatnonzero(_starts(row_a[at]))  # of each row of a, its first pair
    rank = np.empty(len(at), np.int64)
    rank[ranked] = np.arange(len(at)) - np.repeat(begins, np.diff([*begins, len(at)]))
    left = (rank < MAX_PARTNERS)[pair]
    chosen = np.zeros(len(row_a), bool)
    for _ in range(MAX_SHIFTS):
        # The first that is left of every pair, which takes those beside it with it.
        candidate = np.flatnonzero(left)
        if not len(candidate):
            break
        of_pair, place = np.unique(pair[candidate], return_index=True)
        best = candidate[place]
        chosen[best] = True
        taken = np.full(len(at), np.iinfo(np.int64).max // 2)
        taken[of_pair] = shift[best]
        left &= np.abs(shift - taken[pair]) > SHIFTS_APART
    return row_a[chosen], row_b[chosen], shift[chosen], cosine[chosen]


def _starts(*keys: np.ndarray) -> np.ndarray:
    """bool [n], where in sorted keys [n] another begins."""
    starts = np.ones(len(keys[0]), bool)
    starts[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return starts


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


def near_identical(a: Signatures, b: Signatures) -> list[Match]:
    """Recordings of one store found again in another, or in the same one, other than bit for bit.

    Args:
      a, b: of the recordings to compare, of stores of one rate. The same rows of one store twice: every pair comes
        once.

    Returns:
      Matches in order of rows; pairs of equal checksums are left out.

    Raises:
      UserError: the stores differ in rate, or one is damaged.
    """
    rate_hz = a.store.rate_hz
    if rate_hz != b.store.rate_hz:
        raise UserError(
            f"The store {a.store.path} has {rate_hz:g} samples per second and {b.store.path} has "
            f"{b.store.rate_hz:g}; recordings can only be compared at one rate, so prepare both at the same."
        )
    one_store = a.store.path.resolve() == b.store.path.resolve()
    same = one_store and np.array_equal(a.rows, b.rows)
    sums, lengths = ([side.store.column(name) for side in (a, b)] for name in ("checksum", "length"))
    banded: dict[tuple[int, int], np.ndarray] = {}

    def signal(which: int, row: int) -> np.ndarray:
        which = 0 if one_store else which
        if (which, row) not in banded:
            if len(banded) > 64:
                banded.pop(next(iter(banded)))
            raw = (a, b)[which].store.read(row)[:, COMPARED_LEADS].astype(np.float32) / 1000.0
            banded[which, row] = band_pass(raw, rate_hz, *COMPARED_BAND_HZ)
        return banded[which, row]

    found: dict[tuple[int, int], Match] = {}
    for p, q, shift in candidates(a, b, same):
        if (p, q) in found or sums[0][p] == sums[1][q]:
            continue
        peaks, both = a.beats_of(p), (int(lengths[0][p]), int(lengths[1][q]))
        if not beats_agree(peaks, b.beats_of(q), shift, both, rate_hz):
            continue
        compared = compare(signal(0, p), signal(1, q), shift, peaks, rate_hz)
        if compared is not None and is_match(*compared[2:]):
            s, overlap, correlation, residual = compared
            found[p, q] = Match(p, q, s / rate_hz, overlap / rate_hz, correlation, residual)
    return [found[key] for key in sorted(found)]
