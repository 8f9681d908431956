"""From tasks and stores to targets and splits, and what is left out."""

from pathlib import Path

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation.examples import (
    choose_examples,
    is_labelled,
    rare_classes,
    split_largest_folds,
    standardised,
    target_matrix,
)
from ecg_jax.evaluation.tasks import get_task


def test_targets_and_labelled_records():
    labels = [["MI", "CD"], [], None, ["NORM", "OTHER"]]
    assert target_matrix(labels, ["NORM", "MI", "CD"]).tolist() == [
        [0, 1, 1],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]
    assert is_labelled(labels).tolist() == [True, False, False, True]


def test_rare_classes_are_named_with_their_count():
    targets = np.array([[1, 0, 1], [1, 0, np.nan], [0, 0, 1]])
    dropped = rare_classes(targets, ["a", "b", "c"], 2, "multilabel")
    assert dropped == {"b": "0 positive records, fewer than min_count=2"}


def test_split_by_the_largest_folds():
    folds = [3, 1, 2, 3, -1, 2, None, 3]
    usable = np.array([True] * 7 + [False])
    split = split_largest_folds(folds, usable, "store")
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
        split_largest_folds(folds, usable, "store")


class _FakeStore:
    """The columns of a store that a probe asks for, one record per fold entry."""

    def __init__(
        self,
        folds,
        labels,
        signals=None,
        prefix="r",
        corpus="ptbxl",
        patients=None,
        path="fake",
        numbers=None,
    ):
        n = len(folds)
        ids = [f"{prefix}{i}" for i in range(n)]
        values = {
            "record_id": ids,
            "patient_id": patients or ids,
            "fold": folds,
            "checksum": signals or ids,
            "labels_super": labels,
            "labels_dx": labels,
            "length": [2400] * n,
            "offset": [2400 * i for i in range(n)],
        }
        self.columns = {}
        for name, column in values.items():
            self.columns[name] = np.empty(n, dtype=object if isinstance(column[0], str | list) else np.int64)
            self.columns[name][:] = column
        self.corpus, self.path, self.rate_hz, self.fold_source = corpus, Path(path), 240.0, "made up"
        names = ["A", "B", "C"]
        self.classes = {"super": names, "dx": names}
        counts = {name: sum(name in each for each in labels) for name in names}
        info = {name: {"count": n, "description": f"class {name}"} for name, n in counts.items()}
        self.class_info = {"super": info, "dx": info}
        self.values = {name: dict.fromkeys(columns, "unit") for name, columns in (numbers or {}).items()}
        self._numbers = numbers

    def __len__(self):
        return len(self.columns["fold"])

    def column(self, name):
        return self.columns[name]

    def value_matrix(self, name):
        return np.array(list(self._numbers[name].values()), dtype=np.float64).T


FOLDS = [1, 1, 1, 2, 2, 3, 3]
LABELS = [["A"], ["B"], ["A"], ["A"], ["B"], ["A"], ["B"]]
TASK = get_task("ptbxl_super")


def test_examples_follow_folds_and_drop_classes_by_name():
    examples = choose_examples(TASK, _FakeStore(FOLDS, LABELS), None, window=600, min_count=1)
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
    examples = choose_examples(TASK, _FakeStore(FOLDS, labels), None, 600, min_count=1)
    assert examples.classes == ["B"]
    assert examples.classes_dropped["A"] == "only positives or only negatives among the training records"


def test_repeated_signals_leave_the_earlier_part_and_the_test_records_stay():
    # Records 0 and 5 are one signal, and so are 1 and 3; 2 is alone.
    signals = ["x", "y", "z", "y", "v", "x", "w"]
    labels = [["A"], ["B"], ["A", "B"], ["A"], ["B"], ["A"], ["B"]]
    with pytest.raises(UserError, match="None of the 3 classes"):
        # Only record 2 is left to train on, which has no contrast.
        choose_examples(TASK, _FakeStore(FOLDS, labels, signals), None, 600, min_count=1)
    folds, labels, signals = [*FOLDS, 1], [*labels, ["C"]], [*signals, "u"]
    examples = choose_examples(TASK, _FakeStore(folds, labels, signals), None, 600, min_count=1)
    assert examples.train.rows.tolist() == [2, 7]
    assert examples.val.rows.tolist() == [3, 4]
    assert examples.test.rows.tolist() == [5, 6]
    assert examples.excluded["fake"]["same_signal_as_a_later_part"] == 2


def test_signals_of_the_test_store_are_not_trained_on():
    store = _FakeStore(FOLDS, LABELS)
    other = _FakeStore([1, 1], [["A"], ["B"]], signals=["r0", "new"], prefix="t", path="other")
    examples = choose_examples(TASK, store, other, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2]
    assert examples.test.rows.tolist() == [0, 1]
    assert "all records" in examples.split["tested_on"]


def test_test_store_with_shared_records_is_refused_and_shared_patients_are_counted():
    store = _FakeStore(FOLDS, LABELS)
    with pytest.raises(UserError, match=r"2 records of the test store other .*such as r0"):
        choose_examples(TASK, store, _FakeStore([1, 1], LABELS[:2], path="other"), 600, 1)


def test_other_records_of_a_test_patient_are_not_trained_on():
    patients = ["p0", "p1", "p2", "p3", "p4", "p0", "p3"]
    labels = [["A"], ["B"], ["A", "B"], ["A"], ["B"], ["A"], ["B"]]
    examples = choose_examples(TASK, _FakeStore(FOLDS, labels, patients=patients), None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2]
    assert examples.val.rows.tolist() == [4]
    assert examples.test.rows.tolist() == [5, 6]
    assert examples.excluded["fake"]["patient_of_a_later_part"] == 2
    other = _FakeStore([1, 1], LABELS[:2], prefix="t", patients=["p1", "t9"], path="other")
    examples = choose_examples(TASK, _FakeStore(FOLDS, labels, patients=patients), other, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 2]  # p3 validates, p1 is tested on


def test_unknown_patients_are_nobody_in_particular():
    examples = choose_examples(TASK, _FakeStore(FOLDS, LABELS, patients=[""] * 7), None, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 1, 2]


def test_unlabelled_and_short_records_are_counted():
    labels = [[], *LABELS[1:]]
    store = _FakeStore([*FOLDS, 1, 1], [*labels, ["A"], ["B"]])
    store.columns["length"][7] = 599
    examples = choose_examples(TASK, store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2, 8]
    assert examples.excluded["fake"] == {
        "shorter_than_window": 1,
        "without_label_of_the_set": 1,
        "same_signal_as_a_later_part": 0,
        "patient_of_a_later_part": 0,
    }


NUMBERS = {
    "age": {"age": [20.0, 40.0, 60.0, 30.0, np.nan, 50.0, 1000.0]},
    "protocol": {"ed": [1, 1, 1, 1, 1, 1, 1]},
    "labs": {"sodium": [140.0] * 7, "ferritin": [np.nan] * 7},
}


def _regression(label_set="age", **changes):
    numbers = {**NUMBERS, **changes}
    return get_task({"age": "mimic_age", "labs": "mimic_labs"}[label_set]), _FakeStore(
        FOLDS, LABELS, corpus="mimic", numbers=numbers
    )


def test_regression_targets_are_z_scores_of_the_training_records_trimmed_at_their_quantiles():
    task, store = _regression()
    examples = choose_examples(task, store, None, 600, min_count=1)
    (mean,), (sd,) = examples.scale
    assert (mean, sd) == (40.0, pytest.approx(np.std([20, 40, 60])))
    np.testing.assert_allclose(examples.train.targets[:, 0], (np.array([20, 40, 60]) - 40) / sd, rtol=1e-6)
    assert examples.val.rows.tolist() == [3], "a record without the number takes no part"
    np.testing.assert_allclose(examples.val.targets, [[-10 / sd]], rtol=1e-6)
    np.testing.assert_allclose(examples.test.targets, [[10 / sd], [np.nan]], rtol=1e-6)  # 1000 years are no age
    assert examples.descriptions == {"age": "unit"}


def test_numbers_that_are_never_known_are_dropped_and_listed():
    task, store = _regression("labs")
    examples = choose_examples(task, store, None, 600, min_count=5)
    assert examples.classes == ["sodium"]
    assert examples.classes_dropped == {"ferritin": "0 known records, fewer than min_count=5"}
    with pytest.raises(UserError, match="None of the 2 classes of task mimic_labs"):
        choose_examples(task, store, None, 600, min_count=8)


def test_records_outside_the_protocol_are_left_out():
    task, store = _regression(protocol={"ed": [1, 1, 0, 1, 1, 1, 1]})
    examples = choose_examples(task, store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 1]
    assert examples.excluded["fake"]["outside_the_evaluation_protocol"] == 1


def test_a_dataset_of_the_challenge_is_split_by_labels_and_keeps_to_its_own_records():
    n = 60
    labels = [["A"] if i % 3 else ["A", "B"] for i in range(n)]
    labels[:20] = [["B"]] * 20
    store = _FakeStore([1] * n, labels, corpus="challenge")
    names = [f"A{i:04d}" if i < 30 else f"E{i:05d}" for i in range(n)]
    store.columns["record_id"][:] = names
    store.columns["length"][29] = 2399
    examples = choose_examples(get_task("cpsc2018"), store, None, 600, min_count=2)
    used = np.concatenate([part.rows for part in (examples.train, examples.val, examples.test)])
    assert sorted(used) == list(range(29))
    assert examples.excluded["fake"] == {
        "of_another_dataset": 30,
        "shorter_than_the_task_takes": 1,
        "without_label_of_the_set": 0,
        "shorter_than_window": 0,
        "same_signal_as_a_later_part": 0,
        "patient_of_a_later_part": 0,
    }
    for part in (examples.val, examples.test):
        assert 2 <= len(part.rows) <= 4
        assert part.targets.sum(axis=0).min() >= 1, "every class is in every fold"
    again = choose_examples(get_task("cpsc2018"), store, None, 600, min_count=2)
    assert again.split["fingerprint"] == examples.split["fingerprint"]


def test_diagnoses_are_divided_by_the_chapter_of_the_heart():
    labels = [["I10", "I48"], ["E11"], ["I10"], ["I10", "E11"], [], ["I10"], ["E11"]]
    store = _FakeStore(FOLDS, labels, corpus="mimic", numbers=NUMBERS)
    names = ["E11", "I10", "I48"]
    store.classes = {"icd10": names}
    store.class_info = {
        "icd10": {n: {"count": sum(n in x for x in labels), "description": ""} for n in names}
    }
    store.columns["labels_icd10"] = store.columns["labels_super"]
    cardiac = choose_examples(get_task("mimic_cardiac"), store, None, 600, min_count=2)
    assert (cardiac.classes, list(cardiac.classes_dropped)) == (["I10"], ["I48"])
    other = choose_examples(get_task("mimic_non_cardiac"), store, None, 600, min_count=2)
    assert (other.classes, other.classes_dropped) == (["E11"], {})


def test_numbers_beyond_the_quantiles_of_the_training_records_are_unknown_everywhere():
    train = np.append(np.arange(1.0, 301.0), np.nan)[:, None]
    (first, second), (mean, sd) = standardised([train, np.array([[0.0], [150.0], [400.0]])])
    known = ~np.isnan(first[:, 0])
    assert (np.flatnonzero(~known) == [0, 1, 298, 299, 300]).all()
    assert mean == np.arange(3.0, 299.0).mean()
    np.testing.assert_allclose(second, [[np.nan], [(150 - mean[0]) / sd[0]], [np.nan]], rtol=1e-6)


def test_recordings_without_labels_are_no_negatives():
    labels = [["A"], [], ["B"], [], ["A"], ["A"], []]
    store = _FakeStore([-1, 1, 0, 0, 2, 3, 3], labels, corpus="echonext")
    store.classes, store.class_info = {"echo": ["A", "B"]}, {"echo": store.class_info["super"]}
    store.columns["labels_echo"] = store.columns["labels_super"]
    labels[1] = ["A"]
    examples = choose_examples(get_task("echonext"), store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2, 3]
    assert examples.test.rows.tolist() == [5, 6], "no label is a negative of every class"
    assert examples.excluded["fake"]["without_labels"] == 1
