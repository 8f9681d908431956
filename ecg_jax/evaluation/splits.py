"""Which records are trained, validated and tested on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.data.stratify import age_sex_labels, stratified_folds
from ecg_jax.evaluation.targets import LabelLists
from ecg_jax.evaluation.tasks import Task, TaskUnavailable

N_STRATIFIED_FOLDS = 10
_STRATIFICATION_SEED = 0


@dataclass(frozen=True)
class Split:
    """Rows of a store to train, validate and test on, in increasing order."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    val_fold: int
    test_fold: int


def in_words(left_out: Mapping[str, int]) -> str:
    """The reasons with a number above zero, such as "3 outside the evaluation protocol, 1 shorter than window"."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in left_out.items() if n)


def held_out_pair(
    folds: Sequence[int | None], store: str, held_out: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The folds to validate and to test on: the two highest, or those a corpus was published with.

    Args:
        folds: [n] fold numbers, negative or None for none.
        store: how to call the store in the message.
        held_out: (validation fold, test fold) where the corpus names them.

    Raises:
        TaskUnavailable: fewer than two folds, or one of those named is not there.
    """
    if held_out is not None:
        there = highest_folds(folds, len(folds)).tolist()
        missing = [fold for fold in held_out if fold not in there]
        if missing:
            shown = f"{there[0]} to {there[-1]}" if there else "none"
            raise TaskUnavailable(
                f"{store} has no record in fold {' and '.join(map(str, missing))} (its folds are {shown}), but the "
                f"task validates on fold {held_out[0]} and tests on fold {held_out[1]} as published; prepare it from "
                "a source that has these parts and the table that assigns them."
            )
        return held_out
    numbered = highest_folds(folds, 2)
    if len(numbered) < 2:
        raise TaskUnavailable(
            f"{store} has {len(numbered)} fold(s), a probe needs two and more records besides to train on, "
            "validate and test; prepare it from a source with folds."
        )
    return int(numbered[0]), int(numbered[1])


def split_largest_folds(
    folds: Sequence[int | None],
    usable: np.ndarray,
    store: str,
    *,
    held_out: tuple[int, int] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Split:
    """Test = highest-numbered fold, validation = the one below, train = the rest, negative and unknown folds too.

    Args:
        folds: [n] fold numbers, None for unknown.
        usable: bool [n], records that may be used; the fold numbers are taken from all records.
        store: how to call the store in the message.
        held_out: (validation fold, test fold) instead of the two highest.
        left_out: reason -> number of records that are not usable, for the message.

    Returns:
        The rows of usable records.

    Raises:
        TaskUnavailable: fewer than two folds from zero on, or no usable record in one of the parts.
    """
    val_fold, test_fold = held_out_pair(folds, store, held_out)
    folds = np.array([-1 if fold is None else fold for fold in folds], dtype=np.int64)
    parts = {
        "train": (
            usable & (folds != val_fold) & (folds != test_fold),
            f"outside folds {val_fold}, {test_fold}",
        ),
        "validation": (usable & (folds == val_fold), f"in fold {val_fold}"),
        "test": (usable & (folds == test_fold), f"in fold {test_fold}"),
    }
    for name, (part, where) in parts.items():
        if not part.any():
            reasons = in_words(left_out or {})
            raise TaskUnavailable(
                f"{store} has no usable {name} record ({where}), only {int(usable.sum())} usable ones of "
                f"{len(usable)} in all"
                + (f"; left out: {reasons}" if reasons else "")
                + "; use more data, or prepare it with the tables that these come from."
            )
    train, val, test = (np.flatnonzero(part) for part, _ in parts.values())
    return Split(train, val, test, val_fold, test_fold)


def make_folds(task: Task, store: Store, rows: np.ndarray, labels: LabelLists) -> np.ndarray:
    """Folds 1 to 10 of these rows, stratified and by patient as the task says; int64 [n_store], -1 for other rows.

    Args:
        task: its `age_bins` say whether age and sex are stratified too.
        store: of the rows.
        rows: the records that take part.
        labels: of all records of the store, to stratify by.
    """
    folds = np.full(len(store), -1, dtype=np.int64)
    if len(rows):
        patients, records = (store.column(name)[rows] for name in ("patient_id", "record_id"))
        groups = [f"patient {p}" if p else f"record {r}" for p, r in zip(patients, records, strict=True)]
        names = labels.of(rows)
        if task.age_bins:
            age, sex = (store.column(name)[rows] for name in ("age", "sex"))
            names = [a + b for a, b in zip(names, age_sex_labels(age, sex, task.age_bins), strict=True)]
        folds[rows] = 1 + stratified_folds(
            names, N_STRATIFIED_FOLDS, groups=groups, seed=_STRATIFICATION_SEED
        )
    return folds


def rule(task: Task, store: Store, rows: np.ndarray, split: Split) -> str:
    """How records were assigned, in one sentence that claims no whole patients where patients are unknown.

    Args:
        task: the task.
        store: it was split.
        rows: the records the split is about.
        split: the result.
    """
    known = sum(bool(patient) for patient in store.column("patient_id")[rows])
    if task.split == "stratified":
        if known == len(rows):
            whole = "of whole patients"
        elif known:
            number = f"{known} of {len(rows)} records"
            whole = f"of whole patients for the {number} whose patient is known, else by recording"
        else:
            whole = "by recording, for no patient is known"
        by = "the task's labels" if task.stratify_by is None else f"the labels of set {task.stratify_by}"
        by += ", age and sex" if task.age_bins else ""
        start = f"{N_STRATIFIED_FOLDS} folds {whole}, stratified by {by} (seed {_STRATIFICATION_SEED})"
    else:
        start = f"the store's folds ({store.fold_source})"
        if known < len(rows):
            number = f"for {known} of {len(rows)} records only" if known else "for no record"
            start += f", the patient known {number}"
    which = "the highest" if task.held_out is None else f"fold {split.test_fold}"
    below = "the one below" if task.held_out is None else f"fold {split.val_fold}"
    return f"{start}: test = {which}, validation = {below}, train = the rest"


class Seen:
    """Signals and patients of the parts already settled: the test records, then the validation records."""

    def __init__(self, store: Store, test_store: Store, test_rows: np.ndarray):
        self._signals, self._patients = store.column("checksum"), store.column("patient_id")
        self._seen_signals = set(test_store.column("checksum")[test_rows])
        self._seen_patients = set(test_store.column("patient_id")[test_rows]) - {None, ""}

    def drop(self, rows: np.ndarray) -> tuple[np.ndarray, int, int]:
        """(rows with neither a seen signal nor a seen patient, dropped for the signal, for the patient)."""
        signal = np.array([self._signals[i] in self._seen_signals for i in rows], dtype=bool)
        patient = ~signal & np.array([self._patients[i] in self._seen_patients for i in rows], dtype=bool)
        kept = rows[~(signal | patient)]
        self._seen_signals.update(self._signals[kept])
        self._seen_patients.update({*self._patients[kept]} - {None, ""})
        return kept, int(signal.sum()), int(patient.sum())
