"""Tasks: targets, splits and their refusals."""

from pathlib import Path

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'ptbxl_supper'.*ptbxl_super"):
        tasks.get_task("ptbxl_supper")
    assert all(tasks.get_task(name).name == name for name in tasks.TASKS)


def test_store_must_fit_the_task():
    task = tasks.get_task("ptbxl_form")
    tasks.check_store(task, "ptbxl", ["form", "all"], "a.zarr")
    with pytest.raises(UserError, match=r"corpus 'ptbxl', but a.zarr was prepared from 'wfdb'"):
        tasks.check_store(task, "wfdb", ["form"], "a.zarr")
    with pytest.raises(UserError, match=r"label set 'form', but a.zarr has only all"):
        tasks.check_store(task, "ptbxl", ["all"], "a.zarr")
    with pytest.raises(UserError, match="only none"):
        tasks.check_store(task, "ptbxl", [], "a.zarr")


def test_targets_and_labelled_records():
    labels = [["MI", "CD"], [], None, ["NORM", "OTHER"]]
    assert tasks.target_matrix(labels, ["NORM", "MI", "CD"]).tolist() == [
        [0, 1, 1],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]
    assert tasks.is_labelled(labels).tolist() == [True, False, False, True]


def test_rare_classes_are_named_with_their_count():
    targets = np.array([[1, 0, 1], [1, 0, np.nan], [0, 0, 1]])
    dropped = tasks.rare_classes(targets, ["a", "b", "c"], min_count=2)
    assert dropped == {"b": "0 positive records, fewer than min_count=2"}


def test_split_by_the_largest_folds():
    folds = [3, 1, 2, 3, -1, 2, None, 3]
    usable = np.array([True] * 7 + [False])
    split = tasks.split_largest_folds(folds, usable, "store")
    assert (split.val_fold, split.test_fold) == (2, 3)
    assert split.train.tolist() == [1, 4, 6]
    assert split.val.tolist() == [2, 5]
    assert split.test.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("folds", "unusable", "message"),
    [
        ([-1, -1, 1], [], "has 1 fold"),
        ([None, None], [], "has 0 fold"),
        ([1, 2], [], "no usable train record"),
        ([0, 1, 2], [1], r"no usable validation record \(in fold 1\)"),
        ([0, 1, 2], [2], r"no usable test record \(in fold 2\)"),
    ],
)
def test_empty_parts_are_refused(folds, unusable, message):
    usable = ~np.isin(np.arange(len(folds)), unusable)
    with pytest.raises(UserError, match=message):
        tasks.split_largest_folds(folds, usable, "store")


class _FakeStore:
    """The columns of a store that a probe asks for, one record per fold entry."""

    def __init__(self, folds, labels, signals=None, prefix="r", corpus="ptbxl", patients=None, path="fake"):
        n = len(folds)
        ids = [f"{prefix}{i}" for i in range(n)]
        values = {
            "record_id": ids,
            "patient_id": patients or ids,
            "fold": folds,
            "checksum": signals or ids,
            "labels_super": labels,
            "length": [2400] * n,
            "offset": [2400 * i for i in range(n)],
        }
        self.columns = {}
        for name, column in values.items():
            self.columns[name] = np.empty(n, dtype=object if isinstance(column[0], str | list) else np.int64)
            self.columns[name][:] = column
        self.corpus, self.classes, self.path = corpus, {"super": ["A", "B", "C"]}, Path(path)

    def __len__(self):
        return len(self.columns["fold"])

    def column(self, name):
        return self.columns[name]


FOLDS = [1, 1, 1, 2, 2, 3, 3]
LABELS = [["A"], ["B"], ["A"], ["A"], ["B"], ["A"], ["B"]]
TASK = tasks.get_task("ptbxl_super")


def test_examples_follow_folds_and_drop_classes_by_name():
    examples = tasks.choose_examples(TASK, _FakeStore(FOLDS, LABELS), None, window=600, min_count=1)
    assert examples.train.rows.tolist() == [0, 1, 2]
    assert examples.val.rows.tolist() == [3, 4]
    assert examples.test.rows.tolist() == [5, 6]
    assert examples.classes == ["A", "B"]
    assert list(examples.classes_dropped) == ["C"]
    assert examples.test.targets.tolist() == [[1, 0], [0, 1]]
    starts, record = examples.test.crops(600)
    assert starts.tolist() == [*range(12000, 14400, 600), *range(14400, 16800, 600)]
    assert record.tolist() == [0] * 4 + [1] * 4


def test_a_class_without_training_contrast_is_dropped_with_its_reason():
    labels = [["A"], ["A", "B"], ["A"], ["A"], ["B"], ["B"], ["B"]]
    examples = tasks.choose_examples(TASK, _FakeStore(FOLDS, labels), None, 600, min_count=1)
    assert examples.classes == ["B"]
    assert examples.classes_dropped["A"] == "only positives or only negatives among the training records"


def test_repeated_signals_leave_the_earlier_part_and_the_test_records_stay():
    # Records 0 and 5 are one signal, and so are 1 and 3; 2 is alone.
    signals = ["x", "y", "z", "y", "v", "x", "w"]
    labels = [["A"], ["B"], ["A", "B"], ["A"], ["B"], ["A"], ["B"]]
    with pytest.raises(UserError, match="None of the 3 classes"):
        # Only record 2 is left to train on, which has no contrast.
        tasks.choose_examples(TASK, _FakeStore(FOLDS, labels, signals), None, 600, min_count=1)
    folds, labels, signals = [*FOLDS, 1], [*labels, ["C"]], [*signals, "u"]
    examples = tasks.choose_examples(TASK, _FakeStore(folds, labels, signals), None, 600, min_count=1)
    assert examples.train.rows.tolist() == [2, 7]
    assert examples.val.rows.tolist() == [3, 4]
    assert examples.test.rows.tolist() == [5, 6]
    assert examples.excluded["fake"]["same_signal_as_a_later_part"] == 2


def test_signals_of_the_test_store_are_not_trained_on():
    store = _FakeStore(FOLDS, LABELS)
    other = _FakeStore([1, 1], [["A"], ["B"]], signals=["r0", "new"], prefix="t", path="other")
    examples = tasks.choose_examples(TASK, store, other, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2]
    assert examples.test.rows.tolist() == [0, 1]
    assert "all records" in examples.split["tested_on"]


def test_test_store_with_shared_records_is_refused_and_shared_patients_are_counted():
    store = _FakeStore(FOLDS, LABELS)
    with pytest.raises(UserError, match=r"2 records of the test store other .*such as r0"):
        tasks.choose_examples(TASK, store, _FakeStore([1, 1], LABELS[:2], path="other"), 600, 1)
    other = _FakeStore([1, 1], LABELS[:2], prefix="t", patients=["r0", "t9"], path="other")
    examples = tasks.choose_examples(TASK, store, other, 600, min_count=1)
    assert examples.split["patients_in_train_or_val_and_test"] == 1


def test_unlabelled_and_short_records_are_counted():
    labels = [[], *LABELS[1:]]
    store = _FakeStore([*FOLDS, 1, 1], [*labels, ["A"], ["B"]])
    store.columns["length"][7] = 599
    examples = tasks.choose_examples(TASK, store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2, 8]
    assert examples.excluded["fake"] == {
        "shorter_than_window": 1,
        "without_label_of_the_set": 1,
        "same_signal_as_a_later_part": 0,
    }
