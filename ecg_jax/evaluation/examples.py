"""From a task and a store to what a probe trains, validates and tests on, and what it left out and why."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ecg_jax.data.corpora.challenge import dataset_of
from ecg_jax.data.corpora.entries import UNLABELLED_FOLD
from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.icd import is_cardiac
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.fitted import Fitted
from ecg_jax.evaluation.metrics import has_both_kinds
from ecg_jax.evaluation.splits import (
    Seen,
    Split,
    held_out_pair,
    in_words,
    make_folds,
    rule,
    split_largest_folds,
)
from ecg_jax.evaluation.targets import (
    LabelLists,
    is_labelled,
    known_value_sets,
    standardised,
    target_matrix,
)
from ecg_jax.evaluation.tasks import Task, TaskUnavailable, check_store

__all__ = (
    "Examples",
    "Fitted",
    "Part",
    "Split",
    "TaskUnavailable",
    "choose_examples",
    "is_labelled",
    "known_value_sets",
    "split_largest_folds",
    "standardised",
    "target_matrix",
)

#: Of the thousands of diagnoses that are too rare, those nearest to the limit are named.
NAMED_OF_MANY = 10


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
    """Class -> why it is not probed; of diagnoses those nearest to the limit by name, the others as a number."""
    split: dict
    """How records were assigned, in words and numbers."""
    excluded: dict
    """Store -> reason -> number of records."""
    scale: tuple[np.ndarray, np.ndarray] | None
    """Of a regression (mean [K], standard deviation [K]) of the training targets; targets are in these units."""
    unnamed: dict[str, int] = field(default_factory=dict)
    """Entries of `classes_dropped` that stand for many classes -> how many."""

    @property
    def n_dropped(self) -> int:
        """How many classes of the task are not probed."""
        return len(self.classes_dropped) - len(self.unnamed) + sum(self.unnamed.values())

    def split_table(self) -> list[tuple[str, str]]:
        """(record id, "train", "validation" or "test") of every record used, to publish the split."""
        parts = {"train": self.train, "validation": self.val, "test": self.test}
        return [
            (record, name) for name, part in parts.items() for record in part.column("record_id").tolist()
        ]


class _Candidates:
    """The records of one store that a task may use, before any of them is put into a part.

    Attributes:
        task, store: what they are of.
        eligible: bool [n], in the task's dataset and protocol, long enough for the task, and labelled.
        usable: bool [n], eligible and at least a window long.
        left_out: reason -> number of records that are not usable.
    """

    def __init__(self, task: Task, store: Store, window: int):
        self.task, self.store, self.name = task, store, f"the store {store.path}"
        known = known_value_sets(store)
        _check_known(task, store, known)
        check_store(task, store.corpus, list(store.classes), known, self.name)
        self._labels = LabelLists.of_store(store, task.label_set) if task.source == "labels" else None
        self._values = store.value_matrix(task.label_set) if task.source == "values" else None
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
        self._in_dataset = left.copy()
        if self._values is not None:
            leave_out("without_known_value", np.isnan(self._values).all(axis=1))
        elif task.unlabelled == "exclude":
            leave_out("without_label_of_the_set", ~self._labels.labelled)
        else:
            # A recording that the corpus' table of labels does not know is not a negative.
            leave_out("without_labels", ~self._labels.known | (store.column("fold") == UNLABELLED_FOLD))
        self.eligible = left.copy()
        leave_out("shorter_than_window", lengths < window)
        self.usable = left

    def folds(self) -> np.ndarray:
        """[n] fold of each record by the task's rule; -1 for a record that takes no part in a stratified split."""
        task = self.task
        if task.split == "corpus_folds":
            return self.store.column("fold")
        if task.stratify_by is None:
            return make_folds(task, self.store, np.flatnonzero(self.eligible), self._labels)
        # The same records whatever the labels of this task, so that its folds are those of the other.
        by = LabelLists.of_store(self.store, task.stratify_by)
        return make_folds(task, self.store, np.flatnonzero(self._in_dataset & by.labelled), by)

    def names(self) -> list[str]:
        """Names of the task's classes or numbers in this store."""
        task, store = self.task, self.store
        if self._values is not None:
            return list(store.values[task.label_set])
        if task.subset is None:
            return list(store.classes[task.label_set])
        return [c for c in store.classes[task.label_set] if is_cardiac(c) == (task.subset == "cardiac")]

    def descriptions(self, classes: Sequence[str]) -> dict[str, str]:
        """Class -> text of the corpus."""
        label_set = self.task.label_set
        if self._values is not None:
            return {name: self.store.values[label_set][name] for name in classes}
        return {name: self.store.class_info[label_set][name]["description"] for name in classes}

    def counts(self, rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """int64 [K]: positive (of a regression: known) records among these rows."""
        if self._labels is not None:
            return self._labels.counts(rows, classes)
        targets = self.targets(rows, classes)
        known = ~np.isnan(targets) if self.task.kind == "regression" else targets == 1
        return known.sum(axis=0)

    def trainable(self, rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """bool [K]: whether these rows have positives and negatives (of a regression: known values)."""
        if self._labels is not None:
            n_pos = self._labels.counts(rows, classes)
            return (n_pos > 0) & (n_pos < len(rows))
        targets = self.targets(rows, classes)
        return (~np.isnan(targets)).any(axis=0) if self.task.kind == "regression" else has_both_kinds(targets)

    def targets(self, rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """float32 [len(rows), K], NaN where unknown: numbers that are, and classes that this store does not have."""
        own = set(self.names())
        if self._labels is not None:
            targets = self._labels.matrix(rows, classes)
            targets[:, [name not in own for name in classes]] = np.nan
            return targets
        targets = np.full((len(rows), len(classes)), np.nan, dtype=np.float32)
        order = list(self.store.values[self.task.label_set])
        there = [k for k, name in enumerate(classes) if name in own]
        targets[:, there] = self._values[np.ix_(rows, [order.index(classes[k]) for k in there])]
        return targets


def _check_known(task: Task, store: Store, known: Sequence[str]) -> None:
    """Raises TaskUnavailable where the store was prepared without the table that a value set of the task comes from."""
    if task.corpus != store.corpus:
        return  # `check_store` says so
    for name in (task.label_set if task.source == "values" else None, task.protocol):
        if name in store.values and name not in known:
            numbers = "; ".join(f"{number}: {text}" for number, text in store.values[name].items())
            raise TaskUnavailable(
                f"Task {task.name} needs the value set {name!r}, of which no number is known in the store "
                f"{store.path}; prepare it with the table that has them ({numbers})."
            )


def _tested_elsewhere(
    candidates: _Candidates, test: _Candidates, trained_on: np.ndarray
) -> tuple[np.ndarray, str]:
    """Which records of another store are tested on, and why those.

    Raises:
        TaskUnavailable: it has none to test on.
        UserError: it shares records with those trained on.
    """
    store, test_store = candidates.store, test.store
    folds, test_folds = store.column("fold"), test_store.column("fold")
    if candidates.task.split == "corpus_folds" and set(folds.tolist()) == set(test_folds.tolist()):
        fold = held_out_pair(test_folds, test.name, candidates.task.held_out)[1]
        rows = np.flatnonzero(test.usable & (test_folds == fold))
        how = f"test fold {fold} of the test store (same folds as the store)"
    else:
        rows = np.flatnonzero(test.usable)
        how = "all records of the test store (its folds are not the store's)"
    if not len(rows):
        raise TaskUnavailable(
            f"The test store {test_store.path} has no usable record for task {candidates.task.name}, which takes "
            f"{how}; left out: {in_words(test.left_out) or 'none'}."
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


def _choose_classes(
    candidates: _Candidates, train_rows: np.ndarray, min_count: int
) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """(classes to probe, class -> why it is dropped, entries of those that stand for many -> how many).

    Raises:
        TaskUnavailable: none is left.
    """
    task, store, names = candidates.task, candidates.store, candidates.names()
    if task.subset and min_count == task.min_count:
        # As in the study, whose limit is on the count over all of MIMIC-IV-ECG.
        info = store.class_info[task.label_set]
        counts = np.array([info[name]["count"] for name in names], dtype=np.int64)
    else:
        counts = candidates.counts(np.flatnonzero(candidates.usable), names)
    trainable = candidates.trainable(train_rows, names)
    if task.kind == "regression":
        what, untrainable = "known", "no training record has a known value"
    else:
        what, untrainable = "positive", "only positives or only negatives among the training records"
    rare = {
        name: f"{n} {what} records, fewer than min_count={min_count}"
        for name, n in zip(names, counts, strict=True)
        if n < min_count
    }
    flat = {
        name: untrainable
        for name, possible in zip(names, trainable, strict=True)
        if not possible and name not in rare
    }
    classes = [name for name in names if name not in rare and name not in flat]
    if not classes:
        raise TaskUnavailable(
            f"None of the {len(names)} classes of task {task.name} can be probed on {store.path}: each has "
            f"fewer than min_count={min_count} {what} records or only one kind of training record; lower "
            "--config.min_count or use more data."
        )
    if not task.subset:
        return classes, rare | flat, {}
    # Tens of thousands of diagnoses are rare; a results file shall not name them all.
    count = dict(zip(names, counts.tolist(), strict=True))
    dropped, unnamed = {}, {}
    for some, reason in ((rare, f"fewer than {min_count} positive records each"), (flat, untrainable)):
        nearest = sorted(some, key=lambda name: (-count[name], name))[:NAMED_OF_MANY]
        dropped |= {name: some[name] for name in nearest}
        more = len(some) - len(nearest)
        if more:
            entry = f"{more} {'rarer' if some is rare else 'further'} classes"
            dropped[entry], unnamed[entry] = reason, more
    return classes, dropped, unnamed


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
            it. A class that it does not have is unknown for its records.
        window: samples of a crop; shorter records are left out.
        min_count: classes with fewer positive usable records in `store` are left out; 0 takes the task's own number
            (for diagnoses of MIMIC counted over the whole store), 1 keeps every class that can be trained.

    Raises:
        TaskUnavailable: the store lacks the task's labels or folds, or no class or a part without records is left.
        UserError: a store is of another corpus or damaged, or the test store shares record ids with the training and
            validation records.
    """
    candidates = _Candidates(task, store, window)
    excluded = {str(store.path): candidates.left_out}
    split = split_largest_folds(
        candidates.folds(),
        candidates.usable,
        candidates.name,
        held_out=task.held_out,
        left_out=candidates.left_out,
    )
    test, test_rows, how = candidates, split.test, f"test fold {split.test_fold} of the store"
    if test_store is not None:
        test = _Candidates(task, test_store, window)
        excluded[str(test_store.path)] = test.left_out
        test_rows, how = _tested_elsewhere(candidates, test, np.concatenate([split.train, split.val]))
    seen = Seen(store, test.store, test_rows)
    val_rows, val_signals, val_patients = seen.drop(split.val)
    train_rows, train_signals, train_patients = seen.drop(split.train)
    candidates.left_out["same_signal_as_a_later_part"] = val_signals + train_signals
    candidates.left_out["patient_of_a_later_part"] = val_patients + train_patients
    if not len(train_rows) or not len(val_rows):
        raise TaskUnavailable(
            f"Every training or validation record of {store.path} has the signal or the patient of a test record."
        )
    classes, dropped, unnamed = _choose_classes(candidates, train_rows, min_count or task.min_count)
    parts = [
        candidates.targets(train_rows, classes),
        candidates.targets(val_rows, classes),
        test.targets(test_rows, classes),
    ]
    test_names = set(test.names())
    scale = None
    if task.kind == "regression":
        parts, scale = standardised(parts)
    return Examples(
        train=Part(store, train_rows, parts[0]),
        val=Part(store, val_rows, parts[1]),
        test=Part(test.store, test_rows, parts[2]),
        task=task,
        classes=classes,
        descriptions=candidates.descriptions(classes),
        classes_dropped=dropped,
        split={
            "rule": rule(task, store, np.flatnonzero(candidates.usable), split),
            "val_fold": split.val_fold,
            "test_fold": split.test_fold,
            "tested_on": how,
            "classes_unknown_in_test_store": [name for name in classes if name not in test_names],
            "n_train": len(train_rows),
            "n_val": len(val_rows),
            "n_test": len(test_rows),
            "fingerprint": _fingerprint(store, train_rows, val_rows, test.store, test_rows),
        },
        excluded=excluded,
        scale=scale,
        unnamed=unnamed,
    )


def _fingerprint(store: Store, train_rows, val_rows, test_store: Store, test_rows) -> str:
    """SHA-256 of who is trained, validated and tested on."""
    digest = hashlib.sha256()
    for of, rows in ((store, train_rows), (store, val_rows), (test_store, test_rows)):
        digest.update("\0".join(of.column("record_id")[rows]).encode() + b"\1")
    return digest.hexdigest()
