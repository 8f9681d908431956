"""Tasks: targets, splits and their refusals."""

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
