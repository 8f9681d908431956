"""What corpora share: a recording with all its table says, and refusing a rate that cannot be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ecg_jax.data.corpora.listing import N_FOLDS, Entry
from ecg_jax.data.recording import CANONICAL_LEADS, Recording
from ecg_jax.data.stratify import age_sex_labels, stratified_folds
from ecg_jax.errors import UserError

# Recordings that a table does not know have neither labels nor a patient, so they may be trained on only:
# a fold below all others is never the validation or test fold.
UNLABELLED_FOLD = -1


def recording_from(
    entry: Entry, signal: np.ndarray, rate: float, leads: tuple[str, ...] = CANONICAL_LEADS
) -> Recording:
    """The recording of an entry: [T, C] millivolts at `rate` samples per second, with all its table says."""
    recording = Recording(record_id=entry.record_id, signal=signal, rate=float(rate), leads=leads)
    return complete(recording, entry)


def complete(recording: Recording, entry: Entry) -> Recording:
    """The same recording with patient, fold, labels, values, age, sex and problems of its entry, whatever its file
    says of them.
    """
    recording.patient_id, recording.fold = entry.patient_id, entry.fold
    recording.labels = {} if entry.labels is None else dict(entry.labels)
    recording.values = {} if entry.values is None else dict(entry.values)
    recording.age, recording.sex = entry.age, entry.sex
    recording.problems.extend(entry.problems)
    return recording


def with_stratified_folds(
    entries: Sequence[Entry],
    label_set: str,
    *,
    n_folds: int = N_FOLDS,
    first: int = 1,
    age_bins: Sequence[float] | None = None,
) -> list[Entry]:
    """The same entries with folds of whole patients in which every label is as frequent as in the whole (spec §7.4).

    Entries that have a fold keep it; the others must have a patient and labels.

    Args:
      entries: of a corpus that comes without folds.
      label_set: what to stratify by.
      n_folds: how many folds.
      first: number of the lowest.
      age_bins: stratify by sex and age too, with these limits between the age bins, years; None does not.
    """
    free = [i for i, entry in enumerate(entries) if entry.fold is None]
    labels = [list(entries[i].labels[label_set]) for i in free]
    if age_bins is not None:
        ages, sexes = [entries[i].age for i in free], [entries[i].sex for i in free]
        more = age_sex_labels(ages, sexes, age_bins)
        labels = [own + other for own, other in zip(labels, more, strict=True)]
    folds = stratified_folds(labels, n_folds, groups=[entries[i].patient_id for i in free])
    found = list(entries)
    for i, fold in zip(free, folds.tolist(), strict=True):
        found[i] = dataclasses.replace(entries[i], fold=fold + first)
    return found


def refuse_rate(rate: int | None, corpus: str, hz: int | None = None) -> None:
    """Refuses --source-rate for a corpus that comes at one rate, or (`hz` None) whose headers tell it.

    Raises:
      UserError: `rate` is given.
    """
    if rate is not None:
        why = f"{corpus} headers give theirs" if hz is None else f"{corpus} comes at {hz} Hz only"
        raise UserError(f"--source-rate is for corpora that come at several rates; {why}.")
