"""What a probe predicts: which labels of which corpus, who is trained and tested on, by which score.

A task is data. `TASKS` holds those that a store can be probed on; the functions below turn a task and the
columns of a store (plain arrays) into targets and splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.errors import UserError


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
    """"largest_folds": test = largest fold, validation = second largest, train = the rest."""
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
    """Test = largest fold, validation = second largest, train = the rest, negative and unknown folds too.

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


def repeated_in(rows: np.ndarray, others: np.ndarray, originals: Sequence[str]) -> np.ndarray:
    """Rows whose signal occurs again among other rows.

    Args:
        rows, others: int row numbers.
        originals: [n], for each record the id of the first record with the same signal (its own if it is the
            first).

    Returns:
        bool [len(rows)].
    """
    seen = {originals[i] for i in others}
    return np.array([originals[i] in seen for i in rows], dtype=bool)
