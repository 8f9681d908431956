"""What the corpora with one table of recordings share: a recording from its row and its signal."""

from __future__ import annotations

import numpy as np

from ecg_jax.data.corpora.listing import Entry
from ecg_jax.data.recording import CANONICAL_LEADS, Recording
from ecg_jax.errors import UserError

# Recordings that a table does not know have neither labels nor a patient, so they may be trained on only:
# a fold below all others is never the validation or test fold (spec 1.5 puts them into fold -1 too).
UNLABELLED_FOLD = -1


def recording_from(
    entry: Entry, signal: np.ndarray, rate: float, leads: tuple[str, ...] = CANONICAL_LEADS
) -> Recording:
    """The recording of an entry: [T, C] millivolts at `rate` samples per second, with all its table says."""
    return Recording(
        record_id=entry.record_id,
        signal=signal,
        rate=float(rate),
        leads=leads,
        patient_id=entry.patient_id,
        fold=entry.fold,
        labels={} if entry.labels is None else dict(entry.labels),
        values={} if entry.values is None else dict(entry.values),
        age=entry.age,
        sex=entry.sex,
        problems=list(entry.problems),
    )


def refuse_rate(rate: int | None, corpus: str, hz: int) -> None:
    """Refuses --source-rate for a corpus that comes at one rate.

    Raises:
      UserError: `rate` is given.
    """
    if rate is not None:
        raise UserError(
            f"--source-rate is for corpora that come at several rates; {corpus} comes at {hz} Hz only."
        )
