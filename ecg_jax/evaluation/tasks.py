"""What a probe predicts: which labels of which corpus, who is trained and tested on, by which score.

A task is data. `TASKS` holds those that a store can be probed on; the functions below turn a task and the
columns of a store (plain arrays) into targets and splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.metrics import has_both_kinds


@dataclass(frozen=True)
class Task:
    """One downstream task."""

    name: str
    corpus: str
    """Corpus of the stores it can be run on."""
    label_set: str
    """Key of `store.classes`; a record's labels are in column `labels_<label_set>`."""
    kind: str
    """"multilabel": one binary target per class."""
    metric: str
    """"macro_auroc"."""
    split: str
    """"largest_folds": test = highest-numbered fold, validation = the one below, train = the rest."""
    group: str
    """Category it is reported under."""
    unlabelled: str
    """What a record without any label of the set is: "exclude"d, or a "negative" of every class."""


def _ptbxl(label_set: str) -> Task:
    # PTB-XL's benchmark (Strodthoff et al. 2021) leaves out records without any statement of the label set.
    name = f"ptbxl_{label_set}"
    return Task(
        name, "ptbxl", label_set, "multilabel", "macro_auroc", "largest_folds", "adult ECG", "exclude"
    )


TASKS = {
    **{f"ptbxl_{s}": _ptbxl(s) for s in ("super", "sub", "diag", "form", "rhythm", "all")},
    "challenge_dx": Task(
        "challenge_dx",
        "challenge",
        "dx",
        "multilabel",
        "macro_auroc",
        "largest_folds",
        "adult ECG",
        "exclude",
    ),
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def check_store(task: Task, corpus: str, label_sets: Sequence[str], store: str) -> None:
    """Checks that a store can serve a task.

    Args:
        task: the task.
        corpus: the store's corpus.
        label_sets: names of the store's label sets.
        store: how to call the store in the message.

    Raises:
        UserError: it is of another corpus, or lacks the label set.
    """
    if corpus != task.corpus:
        raise UserError(
            f"Task {task.name} needs a store of corpus {task.corpus!r}, but {store} was prepared from "
            f"{corpus!r}; choose another task or store."
        )
    if task.label_set not in label_sets:
        raise UserError(
            f"Task {task.name} needs the label set {task.label_set!r}, but {store} has only "
            f"{', '.join(label_sets) or 'none'}; prepare the store from a source with its label files."
        )


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


def rare_classes(targets: np.ndarray, classes: Sequence[str], min_count: int) -> dict[str, str]:
    """Classes with fewer than `min_count` positive records in [n, K] targets: name -> why it is dropped."""
    n_pos = np.nansum(targets, axis=0).astype(int)
    return {
        name: f"{n} positive records, fewer than min_count={min_count}"
        for name, n in zip(classes, n_pos, strict=True)
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


@dataclass(frozen=True)
class Part:
    """Records of one store that are trained, validated or tested on."""

    store: Store
    rows: np.ndarray
    """int [n], rows of the store."""
    targets: np.ndarray
    """float [n, K]."""

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
    classes: list[str]
    classes_dropped: dict[str, str]
    """Class -> why it is not probed."""
    split: dict
    """How records were assigned, in words and numbers."""
    excluded: dict
    """Store -> reason -> number of records."""


def _usable(store: Store, task: Task, window: int) -> tuple[np.ndarray, dict[str, int]]:
    """bool [n] of records that can be probed, and how many cannot for which reason."""
    long_enough = store.column("length") >= window
    labelled = np.ones(len(store), dtype=bool)
    if task.unlabelled == "exclude":
        labelled = is_labelled(store.column(f"labels_{task.label_set}"))
    return long_enough & labelled, {
        "shorter_than_window": int((~long_enough).sum()),
        "without_label_of_the_set": int((long_enough & ~labelled).sum()),
    }


def _test_rows(store: Store, test_store: Store, usable: np.ndarray) -> tuple[np.ndarray, str]:
    """Which records of another store are tested on, and why those."""
    folds = set(store.column("fold").tolist())
    if test_store.corpus == store.corpus and folds == set(test_store.column("fold").tolist()):
        split = split_largest_folds(test_store.column("fold"), usable, f"the test store {test_store.path}")
        return (
            split.test,
            f"test fold {split.test_fold} of the test store (same corpus and folds as the store)",
        )
    return np.flatnonzero(
        usable
    ), "all records of the test store (its corpus or folds differ from the store's)"


def choose_examples(
    task: Task, store: Store, test_store: Store | None, window: int, min_count: int
) -> Examples:
    """Splits a store by the task's rule and makes the targets.

    A test record is never trained on: training and validation records whose signal occurs again in a later
    part (the same recording under two ids) are left out of the earlier one, so the test records stay as
    published.

    Args:
        task: the task.
        store: trained and validated on, and tested on unless test_store is given.
        test_store: tested on instead: its test fold if it has the corpus and folds of `store`, else all of
            it.
        window: samples of a crop; shorter records are left out.
        min_count: classes with fewer positive records in `store` are left out.

    Raises:
        UserError: no class or a part without records is left, or the test store shares record ids with the
            training and validation records.
    """
    for each in filter(None, (store, test_store)):
        check_store(task, each.corpus, list(each.classes), f"the store {each.path}")
    column, names = f"labels_{task.label_set}", store.classes[task.label_set]
    usable, left_out = _usable(store, task, window)
    excluded = {str(store.path): left_out}
    split = split_largest_folds(store.column("fold"), usable, f"the store {store.path}")
    if test_store is None:
        tested, test_rows = store, split.test
        how = f"test fold {split.test_fold} of the store"
    else:
        tested = test_store
        test_usable, excluded[str(test_store.path)] = _usable(test_store, task, window)
        test_rows, how = _test_rows(store, test_store, test_usable)
        trained_on = set(store.column("record_id")[np.concatenate([split.train, split.val])])
        shared = sorted(trained_on.intersection(test_store.column("record_id")[test_rows]))
        if shared and store.corpus == test_store.corpus:
            raise UserError(
                f"{len(shared)} records of the test store {test_store.path} are trained or validated on in "
                f"{store.path} (such as {shared[0]}); prepare a test store without them."
            )
        if not len(test_rows):
            raise UserError(f"The test store {test_store.path} has no usable record for task {task.name}.")

    signals = store.column("checksum")
    seen = set(tested.column("checksum")[test_rows])
    val_rows = np.array([i for i in split.val if signals[i] not in seen], dtype=np.int64)
    seen.update(signals[val_rows])
    train_rows = np.array([i for i in split.train if signals[i] not in seen], dtype=np.int64)
    repeated = len(split.val) + len(split.train) - len(val_rows) - len(train_rows)
    excluded[str(store.path)]["same_signal_as_a_later_part"] = repeated
    if not len(train_rows) or not len(val_rows):
        raise UserError(
            f"Every training or validation record of {store.path} has the signal of a test record."
        )

    targets = target_matrix(store.column(column), names)
    dropped = rare_classes(targets[usable], names, min_count)
    for name, trainable in zip(names, has_both_kinds(targets[train_rows]), strict=True):
        if not trainable and name not in dropped:
            dropped[name] = "only positives or only negatives among the training records"
    kept = [k for k, name in enumerate(names) if name not in dropped]
    classes = [names[k] for k in kept]
    if not classes:
        raise UserError(
            f"None of the {len(names)} classes of task {task.name} can be probed on {store.path}: each has "
            f"fewer than min_count={min_count} positive records or only one kind of training record; lower "
            "--config.min_count or use more data."
        )
    if tested is not store:
        test_targets = target_matrix(tested.column(column)[test_rows], classes)
    else:
        test_targets = targets[test_rows][:, kept]
    return Examples(
        train=Part(store, train_rows, targets[train_rows][:, kept]),
        val=Part(store, val_rows, targets[val_rows][:, kept]),
        test=Part(tested, test_rows, test_targets),
        classes=classes,
        classes_dropped=dropped,
        split={
            "rule": "test = highest-numbered fold, validation = the one below, train = the rest",
            "val_fold": split.val_fold,
            "tested_on": how,
            "n_train": len(train_rows),
            "n_val": len(val_rows),
            "n_test": len(test_rows),
            "patients_in_train_or_val_and_test": _shared_patients(
                store, train_rows, val_rows, tested, test_rows
            ),
        },
        excluded=excluded,
    )


def _shared_patients(store: Store, train_rows, val_rows, tested: Store, test_rows) -> int | None:
    """How many known patients are on both sides; None across corpora, where ids mean different people."""
    if store.corpus != tested.corpus:
        return None
    ours = set(store.column("patient_id")[np.concatenate([train_rows, val_rows])])
    return len(ours.intersection(tested.column("patient_id")[test_rows]) - {None, ""})
