"""From a task and a store to what a probe trains, validates and tests on, and what it left out and why."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.data.corpora.challenge import dataset_of
from ecg_jax.data.corpora.entries import UNLABELLED_FOLD
from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.store import Store
from ecg_jax.data.stratify import stratified_folds
from ecg_jax.errors import UserError
from ecg_jax.evaluation.metrics import has_both_kinds
from ecg_jax.evaluation.tasks import Task, check_store

N_STRATIFIED_FOLDS = 10
_STRATIFICATION_SEED = 0

#: Values of a regression outside these quantiles of the training records are left out (spec §7.5).
TRIMMED_QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class Part:
    """Records of one store that are trained, validated or tested on."""

    store: Store
    rows: np.ndarray
    """int [n], rows of the store."""
    targets: np.ndarray
    """float [n, K]: 0 or 1, of a regression z-scores; NaN where unknown."""

    def column(self, name: str) -> np.ndarray:
        """A column of these records."""
        return self.store.column(name)[self.rows]

    def crops(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, record) of their crops, see `non_overlapping_crops`."""
        return non_overlapping_crops(self.column("length"), self.column("offset"), window)


@dataclass(frozen=True)
class Examples:
    """What a probe trains and tests on, and what it left out and why."""

    train: Part
    val: Part
    test: Part
    task: Task
    classes: list[str]
    descriptions: dict[str, str]
    """Class -> text of the corpus' table, "" where it has none; of a number its unit."""
    classes_dropped: dict[str, str]
    """Class -> why it is not probed."""
    split: dict
    """How records were assigned, in words and numbers."""
    excluded: dict
    """Store -> reason -> number of records."""
    scale: tuple[np.ndarray, np.ndarray] | None
    """Of a regression (mean [K], standard deviation [K]) of the training targets; targets are in these units."""


@dataclass(frozen=True)
class Fitted:
    """What one probe predicts for the validation and test records."""

    val: np.ndarray
    """float64 [n_val, K]: probabilities, of a regression z-scores; averaged over the crops of a record."""
    test: np.ndarray
    """float64 [n_test, K]."""
    report: dict
    """JSON-able: what was chosen, and how."""


def target_matrix(labels: Sequence[Sequence[str] | None], classes: Sequence[str]) -> np.ndarray:
    """Binary targets from lists of labels.

    Args:
        labels: n lists of class names; None counts as an empty list. Names outside `classes` are ignored.
        classes: K names.

    Returns:
        float32 [n, K] of 0 and 1.
    """
    column = {name: k for k, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), dtype=np.float32)
    for i, names in enumerate(labels):
        for name in names if names is not None else ():
            if name in column:
                targets[i, column[name]] = 1.0
    return targets


def is_labelled(labels: Sequence[Sequence[str] | None]) -> np.ndarray:
    """bool [n]: records with at least one label of the set."""
    return np.array([names is not None and len(names) > 0 for names in labels], dtype=bool)


def rare_classes(targets: np.ndarray, classes: Sequence[str], min_count: int, kind: str) -> dict[str, str]:
    """Classes of [n, K] targets with fewer than `min_count` positive (of a regression: known) records: name -> why it
    is dropped.
    """
    if kind == "regression":
        count, what = (~np.isnan(targets)).sum(axis=0), "known"
    else:
        count, what = np.nansum(targets, axis=0).astype(int), "positive"
    return {
        name: f"{n} {what} records, fewer than min_count={min_count}"
        for name, n in zip(classes, count, strict=True)
        if n < min_count
    }


@dataclass(frozen=True)
class Split:
    """Rows of a store to train, validate and test on, in increasing order."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    val_fold: int
    test_fold: int


def split_largest_folds(folds: Sequence[int | None], usable: np.ndarray, store: str) -> Split:
    """Test = highest-numbered fold, validation = the one below, train = the rest, negative and unknown folds too.

    Args:
        folds: [n] fold numbers, None for unknown.
        usable: bool [n], records that may be used; the fold numbers are taken from all records.
        store: how to call the store in the message.

    Returns:
        The rows of usable records.

    Raises:
        UserError: fewer than two folds from zero on, or no usable record in one of the parts.
    """
    folds = np.array([-1 if fold is None else fold for fold in folds], dtype=np.int64)
    numbered = np.unique(folds[folds >= 0])
    if len(numbered) < 2:
        raise UserError(
            f"{store} has {len(numbered)} fold(s), a probe needs two and more records besides to train on, "
            "validate and test; prepare it from a source with folds."
        )
    val_fold, test_fold = int(numbered[-2]), int(numbered[-1])
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
            raise UserError(
                f"{store} has no usable {name} record ({where}): none is labelled for the task and at least "
                "one window long."
            )
    train, val, test = (np.flatnonzero(part) for part, _ in parts.values())
    return Split(train, val, test, val_fold, test_fold)


class _Candidates:
    """The records of one store that a task may use, before any of them is put into a part.

    Attributes:
        store, task: what they are of.
        eligible: bool [n], in the task's dataset and protocol, long enough for the task, and labelled.
        usable: bool [n], eligible and at least a window long.
        left_out: reason -> number of records that are not usable.
        labels: object [n] of lists of class names; None for a task on values.
    """

    def __init__(self, task: Task, store: Store, window: int):
        check_store(task, store.corpus, list(store.classes), list(store.values), f"the store {store.path}")
        self.task, self.store = task, store
        self.labels = store.column(f"labels_{task.label_set}") if task.source == "labels" else None
        left = np.ones(len(store), dtype=bool)
        self.left_out: dict[str, int] = {}

        def leave_out(reason: str, rows: np.ndarray) -> None:
            self.left_out[reason] = int((left & rows).sum())
            left[rows] = False

        lengths = store.column("length")
        if task.dataset:
            names = store.column("record_id")
            leave_out("of_another_dataset", np.array([dataset_of(n) != task.dataset for n in names], bool))
        if task.protocol:
            leave_out("outside_the_evaluation_protocol", store.value_matrix(task.protocol)[:, 0] != 1)
        if task.min_seconds:
            leave_out("shorter_than_the_task_takes", lengths < task.min_seconds * store.rate_hz)
        if self.labels is None:
            leave_out("without_known_value", np.isnan(store.value_matrix(task.label_set)).all(axis=1))
        elif task.unlabelled == "exclude":
            leave_out("without_label_of_the_set", ~is_labelled(self.labels))
        else:
            # A recording that the corpus' table of labels does not know is not a negative.
            leave_out("without_labels", store.column("fold") == UNLABELLED_FOLD)
        self.eligible = left.copy()
        leave_out("shorter_than_window", lengths < window)
        self.usable = left

    def names(self, min_count: int) -> tuple[list[str], dict[str, str]]:
        """Names of classes or numbers, and those that can be dropped before a matrix is made, with the reason."""
        task, store = self.task, self.store
        if self.labels is None:
            return list(store.values[task.label_set]), {}
        kept, dropped = [], {}
        for name in store.classes[task.label_set]:
            if task.subset and (name[:1] == "I") != (task.subset == "cardiac"):
                continue
            # Over the whole store, so never fewer than among the usable records. ICD-10 has ten thousands of codes.
            count = store.class_info[task.label_set][name]["count"]
            if count < min_count:
                dropped[name] = f"{count} positive records, fewer than min_count={min_count}"
            else:
                kept.append(name)
        return kept, dropped

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """float32 [n, K] for all records, NaN where unknown."""
        if self.labels is not None:
            return target_matrix(self.labels, names)
        chosen = [list(self.store.values[self.task.label_set]).index(name) for name in names]
        return self.store.value_matrix(self.task.label_set)[:, chosen].astype(np.float32)

    def folds(self) -> np.ndarray:
        """[n] fold of each record by the task's rule; -1 for a record that takes no part in a stratified split."""
        if self.task.split == "corpus_folds":
            return self.store.column("fold")
        rows = np.flatnonzero(self.eligible)
        folds = np.full(len(self.store), -1, dtype=np.int64)
        if len(rows):
            patients, records = (self.store.column(name)[rows] for name in ("patient_id", "record_id"))
            groups = [f"patient {p}" if p else f"record {r}" for p, r in zip(patients, records, strict=True)]
            labels = [list(names) if names is not None else [] for names in self.labels[rows]]
            folds[rows] = 1 + stratified_folds(
                labels, N_STRATIFIED_FOLDS, groups=groups, seed=_STRATIFICATION_SEED
            )
        return folds


_RULES = {
    "corpus_folds": "the store's folds ({}): test = the highest, validation = the one below, train = the rest",
    "stratified": f"{N_STRATIFIED_FOLDS} folds of whole patients, stratified by the task's labels (seed "
    f"{_STRATIFICATION_SEED}): test = the highest, validation = the one below, train = the rest",
}


def _tested_elsewhere(
    candidates: _Candidates, test: _Candidates, trained_on: np.ndarray
) -> tuple[np.ndarray, str]:
    """Which records of another store are tested on, and why those.

    Raises:
        UserError: it shares records with those trained on, or has none to test on.
    """
    store, test_store = candidates.store, test.store
    folds, test_folds = set(store.column("fold").tolist()), set(test_store.column("fold").tolist())
    if candidates.task.split == "corpus_folds" and folds == test_folds:
        split = split_largest_folds(test.folds(), test.usable, f"the test store {test_store.path}")
        rows = split.test
        how = f"test fold {split.test_fold} of the test store (same folds as the store)"
    else:
        rows = np.flatnonzero(test.usable)
        how = "all records of the test store (its folds are not the store's)"
    if not len(rows):
        raise UserError(
            f"The test store {test_store.path} has no usable record for task {candidates.task.name}."
        )
    shared = sorted(
        set(store.column("record_id")[trained_on]).intersection(test_store.column("record_id")[rows])
    )
    if shared:
        raise UserError(
            f"{len(shared)} records of the test store {test_store.path} are trained or validated on in "
            f"{store.path} (such as {shared[0]}); prepare a test store without them."
        )
    return rows, how


class _Seen:
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


def choose_examples(
    task: Task, store: Store, test_store: Store | None, window: int, min_count: int = 0
) -> Examples:
    """Splits a store by the task's rule and makes the targets.

    A test record is never trained on, nor another record of its patient: training and validation records whose signal
    or patient occurs in a later part are left out of the earlier one and counted. The test records stay as published.

    Args:
        task: the task.
        store: trained and validated on, and tested on unless test_store is given.
        test_store: of the same corpus, tested on instead: its test fold if it has the folds of `store`, else all of
            it.
        window: samples of a crop; shorter records are left out.
        min_count: classes with fewer positive records in `store` are left out; 0 takes the task's own number.

    Raises:
        UserError: no class or a part without records is left, or the test store shares record ids with the
            training and validation records.
    """
    min_count = min_count or task.min_count
    candidates = _Candidates(task, store, window)
    excluded = {str(store.path): candidates.left_out}
    folds = candidates.folds()
    split = split_largest_folds(folds, candidates.usable, f"the store {store.path}")
    test, test_rows, how = candidates, split.test, f"test fold {split.test_fold} of the store"
    if test_store is not None:
        test = _Candidates(task, test_store, window)
        excluded[str(test_store.path)] = test.left_out
        test_rows, how = _tested_elsewhere(candidates, test, np.concatenate([split.train, split.val]))
    seen = _Seen(store, test.store, test_rows)
    val_rows, val_signals, val_patients = seen.drop(split.val)
    train_rows, train_signals, train_patients = seen.drop(split.train)
    candidates.left_out["same_signal_as_a_later_part"] = val_signals + train_signals
    candidates.left_out["patient_of_a_later_part"] = val_patients + train_patients
    if not len(train_rows) or not len(val_rows):
        raise UserError(
            f"Every training or validation record of {store.path} has the signal or the patient of a test record."
        )

    names, dropped = candidates.names(min_count)
    targets = candidates.targets(names)
    # Diagnoses are counted over all of MIMIC-IV-ECG, as in the study, and not again among the usable records.
    if task.subset is None:
        dropped |= rare_classes(targets[candidates.usable], names, min_count, task.kind)
    if task.kind == "regression":
        trainable = (~np.isnan(targets[train_rows])).any(axis=0)
        untrainable = "no training record has a known value"
    else:
        trainable = has_both_kinds(targets[train_rows])
        untrainable = "only positives or only negatives among the training records"
    for name, possible in zip(names, trainable, strict=True):
        if not possible and name not in dropped:
            dropped[name] = untrainable
    kept = [k for k, name in enumerate(names) if name not in dropped]
    classes = [names[k] for k in kept]
    if not classes:
        raise UserError(
            f"None of the {len(dropped)} classes of task {task.name} can be probed on {store.path}: each has "
            f"fewer than min_count={min_count} positive records or only one kind of training record; lower "
            "--config.min_count or use more data."
        )
    test_targets = targets[:, kept] if test is candidates else test.targets(classes)
    parts = [targets[train_rows][:, kept], targets[val_rows][:, kept], test_targets[test_rows]]
    scale = None
    if task.kind == "regression":
        parts, scale = standardised(parts)
    return Examples(
        train=Part(store, train_rows, parts[0]),
        val=Part(store, val_rows, parts[1]),
        test=Part(test.store, test_rows, parts[2]),
        task=task,
        classes=classes,
        descriptions=_descriptions(task, store, classes),
        classes_dropped=dropped,
        split={
            "rule": _RULES[task.split].format(store.fold_source),
            "val_fold": split.val_fold,
            "test_fold": split.test_fold,
            "tested_on": how,
            "n_train": len(train_rows),
            "n_val": len(val_rows),
            "n_test": len(test_rows),
            "fingerprint": _fingerprint(store, train_rows, val_rows, test.store, test_rows),
        },
        excluded=excluded,
        scale=scale,
    )


def standardised(parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Targets of a regression as z-scores of the training targets (spec §7.5).

    Args:
        parts: [n, K] of training, validation and test records, NaN unknown.

    Returns:
        (the parts in standard deviations from the mean of the training targets, NaN where unknown or outside the 1 to
        99 % quantiles of the training targets; (mean, standard deviation), float64 [K], of what is left of those).
    """
    train = np.asarray(parts[0], dtype=np.float64)
    # Of fewer than a hundred values none is trimmed.
    low = np.nanquantile(train, TRIMMED_QUANTILES[0], axis=0, method="lower")
    high = np.nanquantile(train, TRIMMED_QUANTILES[1], axis=0, method="higher")
    trimmed = [np.where((part >= low) & (part <= high), part, np.nan) for part in parts]
    mean, sd = np.nanmean(trimmed[0], axis=0), np.nanstd(trimmed[0], axis=0)
    sd = np.where(sd > 0, sd, 1.0)
    return [((part - mean) / sd).astype(np.float32) for part in trimmed], (mean, sd)


def _descriptions(task: Task, store: Store, classes: Sequence[str]) -> dict[str, str]:
    if task.source == "values":
        return {name: store.values[task.label_set][name] for name in classes}
    return {name: store.class_info[task.label_set][name]["description"] for name in classes}


def _fingerprint(store: Store, train_rows, val_rows, test_store: Store, test_rows) -> str:
    """SHA-256 of who is trained, validated and tested on."""
    digest = hashlib.sha256()
    for of, rows in ((store, train_rows), (store, val_rows), (test_store, test_rows)):
        digest.update("\0".join(of.column("record_id")[rows]).encode() + b"\1")
    return digest.hexdigest()
