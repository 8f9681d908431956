"""How much of a fitted probe's score survives corrupted recordings: curves over leads, noise, rate, duration.

Nothing is fitted anew. The test records are corrupted, encoded and predicted again, condition by condition, and
every condition is scored on the same resamples of patients as the clean records, so that the difference to them
has an interval of its own (paired bootstrap).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.preprocessing import MICROVOLTS_PER_MV
from ecg_jax.data.store import Store
from ecg_jax.evaluation import bootstrap, corruptions, scoring
from ecg_jax.evaluation.features import encode_padded, mean_per_record

#: Of what the conditions do to a recording: to be raised with every change of `corruptions` or `build_conditions` that
#: changes a result, so that finished conditions of before are not mixed with new ones.
VERSION = 1

# Recordings that one thread corrupts at a time.
_GROUP = 32


@dataclass(frozen=True)
class Condition:
    """One way to corrupt every test record."""

    family: str
    """What it is a level of, a key of `UNITS`."""
    label: str
    """Unique within its family."""
    value: float | None
    """Position along the curve in the family's unit; None where levels have no order."""
    corrupt: Callable[[np.ndarray, str], np.ndarray]
    """(float64 [T, 12] mV, record id) -> float64 [T', 12] mV."""
    note: str = ""
    """What a reader must know of it."""
    padded: bool = False
    """Whether it leaves less than a window, filled up with zeros."""


class Unavailable(NamedTuple):
    """A condition that was asked for and means nothing for these recordings."""

    family: str
    label: str
    reason: str


#: Family -> unit of its values, None where its conditions are not ordered.
UNITS = {
    "leads": "leads",
    "swapped_leads": None,
    **dict.fromkeys(corruptions.NOISES, "dB SNR"),
    "sampling_rate": "Hz",
    "duration": "s",
}


def build_conditions(
    *,
    leads: Sequence[int],
    swaps: Sequence[str],
    noises: Sequence[str],
    snr_db: Sequence[float],
    rates_hz: Sequence[float],
    durations_s: Sequence[float],
    rate_hz: float,
    source_hz: float,
    window_s: float,
    longest_s: float,
    seed: int,
) -> tuple[list[Condition], list[Unavailable]]:
    """All conditions of a suite, easiest first within a family.

    Args:
        leads: keys of `corruptions.LEAD_SETS`.
        swaps: keys of `corruptions.SWAPS`.
        noises: keys of `corruptions.NOISES`.
        snr_db: levels of each noise, in decibels.
        rates_hz: of other devices.
        durations_s: of recordings cut to their first seconds.
        rate_hz: of the recordings and the contract.
        source_hz: the highest rate that a test record was made at, before it was brought under the contract.
        window_s: of the contract.
        longest_s: duration of the longest test record.
        seed: of the noise.

    Raises:
        ValueError: an unknown key, or a level twice.
    """
    for given, known, what in (
        (leads, corruptions.LEAD_SETS, "number of leads"),
        (swaps, corruptions.SWAPS, "swap"),
        (noises, corruptions.NOISES, "noise"),
    ):
        if unknown := [each for each in given if each not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; known: {', '.join(map(str, known))}")
    for levels in (leads, swaps, noises, snr_db, rates_hz, durations_s):
        if len(set(levels)) < len(levels):
            raise ValueError(f"a level occurs twice in {tuple(levels)}")
    conditions, unavailable = [], []
    for n in sorted(leads, reverse=True):
        names = corruptions.LEAD_SETS[n]
        note = ", ".join(names) + (" as recorded" if n == 12 else "")
        conditions.append(
            Condition(
                "leads",
                f"{n} leads" if n > 1 else "1 lead",
                n,
                lambda x, _, names=names: corruptions.keep_leads(x, names),
                f"{note}; other limb leads derived" if n in (2, 3, 8) else note,
            )
        )
    for name in swaps:
        matrix = corruptions.SWAPS[name]
        conditions.append(
            Condition("swapped_leads", name, None, lambda x, _, matrix=matrix: corruptions.swap(x, matrix))
        )
    for kind, snr in itertools.product(noises, sorted(snr_db, reverse=True)):
        if not corruptions.frequencies_fit(kind, rate_hz):
            reason = f"recordings at {rate_hz:g} Hz cannot carry its frequencies"
            unavailable.append(Unavailable(kind, f"{snr:g} dB", reason))
            continue

        def noisy(x, record_id, kind=kind, snr=snr):
            return corruptions.add_noise(x, rate_hz, kind, snr, seed, record_id)

        note = ""
        if corruptions.NOISES[kind][1] > source_hz / 2:
            note = f"reaches above half of {source_hz:g} Hz, the rate that the recordings were made at"
        conditions.append(Condition(kind, f"{snr:g} dB", snr, noisy, note))
    for device in sorted(rates_hz, reverse=True):
        if device >= min(rate_hz, source_hz):
            which = "made" if source_hz <= rate_hz else "kept"
            reason = (
                f"the recordings were {which} at {min(rate_hz, source_hz):g} Hz, so nothing would be lost"
            )
            unavailable.append(Unavailable("sampling_rate", f"{device:g} Hz", reason))
            continue

        def resampled(x, _, device=device):
            return corruptions.from_device(x, rate_hz, device)

        conditions.append(Condition("sampling_rate", f"{device:g} Hz", device, resampled))
    for seconds in sorted(durations_s, reverse=True):
        if seconds >= longest_s:
            reason = f"no test record lasts longer than {longest_s:.4g} s"
            unavailable.append(Unavailable("duration", f"{seconds:g} s", reason))
            continue
        padded = seconds < window_s
        note = f"shorter than the window of {window_s:g} s, which `ecg-jax embed` refuses; zeros fill it here"

        def shortened(x, _, seconds=seconds):
            return corruptions.shorten(x, rate_hz, seconds)

        conditions.append(
            Condition("duration", f"{seconds:g} s", seconds, shortened, note if padded else "", padded)
        )
    return conditions, unavailable


CLEAN = Condition("clean", "clean", None, lambda x, _: x)


@dataclass(frozen=True)
class Records:
    """The test records of a probe."""

    store: Store
    rows: np.ndarray
    """int [n], rows of the store."""
    record_ids: Sequence[str]
    """n of them."""


def predict(
    encode: Callable[[np.ndarray], np.ndarray],
    head: Callable[[np.ndarray], np.ndarray],
    records: Records,
    condition: Condition,
    *,
    window: int,
    batch_size: int,
    threads: int = 2,
    progress: str | None = None,
) -> np.ndarray:
    """Predictions of corrupted records, averaged over the non-overlapping crops of each.

    Other threads read and corrupt records while the device computes. A record that the condition leaves
    shorter than a window is filled with zeros to one.

    Args:
        encode: int16 [B, T, 12] microvolts -> float32 [B, D].
        head: float32 [n, D] -> [n, K], the fitted probe.
        records: n test records.
        condition: what is done to them.
        window: samples of a crop, T.
        batch_size: B; the last batch is padded to it, so the encoder compiles once for all conditions.
        threads: that read and corrupt.
        progress: label of a progress bar, None for none.

    Returns:
        float64 [n, K].

    Raises:
        ValueError: no record, or predictions that are not finite.
    """
    from tqdm import tqdm

    n = len(records.rows)
    if not n:
        raise ValueError("there is no record to predict")
    clip_mv = records.store.preprocessing.clip_mv

    def cut(group: range) -> tuple[np.ndarray, np.ndarray]:
        signals = []
        for i in group:
            clean = records.store.read(int(records.rows[i])) / MICROVOLTS_PER_MV
            signal = corruptions.to_microvolts(condition.corrupt(clean, records.record_ids[i]), clip_mv)
            signals.append(np.pad(signal, ((0, max(0, window - len(signal))), (0, 0))))
        starts, record = non_overlapping_crops([len(s) for s in signals], [0] * len(signals), window)
        pairs = zip(starts, record, strict=True)
        return np.stack([signals[r][s : s + window] for s, r in pairs]), record + group.start

    groups = (range(first, min(first + _GROUP, n)) for first in range(0, n, _GROUP))
    predictions, owners, waiting = [], [], []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=n, desc=progress, unit="record", disable=progress is None, leave=False) as bar,
    ):
        # A few groups ahead, however many records there are.
        ahead = deque(pool.submit(cut, group) for group in itertools.islice(groups, 2 * threads))
        while ahead:
            crops, record = ahead.popleft().result()
            ahead.extend(pool.submit(cut, group) for group in itertools.islice(groups, 1))
            owners.append(record)
            waiting.append(crops)
            pending = np.concatenate(waiting)
            whole = len(pending) if not ahead else len(pending) // batch_size * batch_size
            for first in range(0, whole, batch_size):
                batch = pending[first : min(first + batch_size, whole)]
                predictions.append(np.asarray(head(encode_padded(encode, batch, batch_size)), np.float64))
            waiting = [pending[whole:]]
            bar.update(len(np.unique(record)))
    result = mean_per_record(np.concatenate(predictions), np.concatenate(owners), n)
    if not np.isfinite(result).all():
        bad = int((~np.isfinite(result)).any(axis=1).sum())
        raise ValueError(f"the predictions of {bad} of {n} records are not finite ({condition.label})")
    return result


#: Metric of a task -> name of it in `scoring.METRICS`; the mean over classes or targets is what counts.
METRICS = {"macro_auroc": "auroc", "mae": "mae"}


@dataclass(frozen=True)
class Scorer:
    """Scores predictions of the same records on the same resamples."""

    metric: str
    """A key of `METRICS`."""
    targets: np.ndarray
    """[n, K]: 0, 1, NaN; for "mae" z-scores, NaN unknown."""
    counts: np.ndarray
    """[n, R] from `bootstrap.draw`."""
    undefined: str = "exclude"
    """As in `metrics.macro`."""
    level: float = 0.95
    """Of confidence."""
    kind: str = "percentile"
    """Of interval, as in `bootstrap.intervals`."""
    left_out: np.ndarray | None = None
    """[n, U] from `bootstrap.leave_one_out`, for intervals of kind "bca"."""

    def score(self, predictions: np.ndarray) -> bootstrap.Scored:
        """Predictions [n, K] on the full sample and on every resample."""
        return scoring.score(METRICS[self.metric], self.targets, predictions, self.counts, self.left_out)

    def interval(self, scored: bootstrap.Scored) -> bootstrap.Interval:
        """The score with its interval."""
        return scored.macro(self.undefined, self.level, self.kind)

    def difference(self, scored: bootstrap.Scored, clean: bootstrap.Scored) -> bootstrap.Interval:
        """The score minus the clean one, on the same resamples."""
        return bootstrap.macro_difference(scored, clean, self.undefined, self.level, self.kind)


def evaluate(
    predict_condition: Callable[[Condition], np.ndarray],
    scorer: Scorer,
    clean: np.ndarray,
    conditions: Sequence[Condition],
) -> Iterator[tuple[Condition, dict]]:
    """Predicts and scores conditions one by one.

    Args:
        predict_condition: condition -> [n, K], such as `predict` with everything else bound.
        scorer: of these records.
        clean: [n, K], predictions of the clean records.
        conditions: in this order.

    Yields:
        (condition, {"label", "value", "note", "padded", "point", "low", "high", "difference": {"point", "low",
        "high"}}).
    """
    reference = scorer.score(clean)
    for condition in conditions:
        scored = scorer.score(predict_condition(condition))
        yield (
            condition,
            {
                "label": condition.label,
                "value": condition.value,
                "note": condition.note,
                "padded": condition.padded,
                **scorer.interval(scored)._asdict(),
                "difference": scorer.difference(scored, reference)._asdict(),
            },
        )
