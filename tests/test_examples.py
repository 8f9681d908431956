"""From tasks and stores to targets and splits, and what is left out."""

import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ecg_jax.data.folds import highest_folds
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import BYTES_PER_SAMPLE, FORMAT_VERSION, Store
from ecg_jax.data.writer import array_metadata, record_schema
from ecg_jax.errors import UserError
from ecg_jax.evaluation.examples import (
    choose_examples,
    is_labelled,
    known_value_sets,
    split_largest_folds,
    standardised,
    target_matrix,
)
from ecg_jax.evaluation.online_probe import choose_slice
from ecg_jax.evaluation.targets import LabelLists
from ecg_jax.evaluation.tasks import TaskUnavailable, get_task


def test_targets_and_labelled_records():
    labels = [["MI", "CD"], [], None, ["NORM", "OTHER"]]
    assert target_matrix(labels, ["NORM", "MI", "CD"]).tolist() == [
        [0, 1, 1],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]
    assert is_labelled(labels).tolist() == [True, False, False, True]


def test_labels_of_chosen_records_are_counted_once_and_made_targets():
    column = pa.array([["b"], None, ["a", "b", "a"], [], ["c"]], pa.list_(pa.string()))
    lists = LabelLists.from_arrow(column)
    assert lists.known.tolist() == [True, False, True, True, True]
    assert lists.labelled.tolist() == [True, False, True, False, True]
    rows = np.array([2, 1, 0])
    assert lists.of(rows) == [["a", "b", "a"], [], ["b"]]
    assert lists.counts(rows, ["a", "c", "b", "x"]).tolist() == [1, 0, 2, 0]
    assert lists.matrix(rows, ["c", "b"]).tolist() == [[0, 1], [0, 0], [0, 1]]
    assert lists.counts(rows[:0], ["a"]).tolist() == [0]
    assert lists.counts(rows, []).tolist() == []


@pytest.mark.parametrize(
    ("folds", "n", "highest"),
    [([3, -1, None, 1, 2, 3], 2, [2, 3]), ([-1, 5], 2, [5]), ([-1, None], 1, []), ([4, 5], 0, [])],
)
def test_highest_folds_are_of_numbered_folds_only(folds, n, highest):
    assert highest_folds(folds, n).tolist() == highest


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


@pytest.fixture
def make(tmp_path):
    """Writes a store of the columns that count here; its signals are zeros that take no space."""

    def write(
        folds,
        labels,
        *,
        label_set="super",
        corpus="ptbxl",
        name=None,
        prefix="r",
        ids=None,
        patients=None,
        signals=None,
        lengths=None,
        age=None,
        sex=None,
        classes=("A", "B", "C"),
        more_labels=None,
        numbers=None,
    ):
        n, numbers = len(folds), numbers or {}
        name = name or f"store{len(list(tmp_path.iterdir()))}"
        sets = {label_set: labels, **(more_labels or {})}
        ids = [f"{prefix}{i}" for i in range(n)] if ids is None else ids
        lengths = [2400] * n if lengths is None else lengths
        table = {
            "record_id": ids,
            "patient_id": ids if patients is None else patients,
            "corpus": [corpus] * n,
            "fold": folds,
            "offset": [2400 * i for i in range(n)],
            "length": lengths,
            "checksum": ids if signals is None else signals,
            "age": [None] * n if age is None else age,
            "sex": [None] * n if sex is None else sex,
            **{f"labels_{key}": lists for key, lists in sets.items()},
            **{
                f"values_{key}": [
                    [None if np.isnan(x) else x for x in row] for row in zip(*columns.values(), strict=True)
                ]
                for key, columns in numbers.items()
            },
        }
        path = tmp_path / name
        chunk = path / "signal" / "c" / "0" / "0"
        chunk.parent.mkdir(parents=True)
        chunk.touch()
        os.truncate(chunk, 2400 * n * BYTES_PER_SAMPLE)
        (path / "signal" / "zarr.json").write_text(json.dumps(array_metadata(2400 * n, 2400 * n)))
        schema = record_schema(list(sets), numbers)
        empty = {field: [None] * n for field in schema.names if field not in table}
        pyarrow.parquet.write_table(pa.table({**table, **empty}, schema=schema), path / "records.parquet")
        counts = {
            key: {c: sum(c in (each or ()) for each in lists) for c in classes} for key, lists in sets.items()
        }
        attributes = {
            "format_version": FORMAT_VERSION,
            "corpus": corpus,
            "source": "",
            "leads": list(CANONICAL_LEADS),
            "rate_hz": 240.0,
            "n_records": n,
            "fingerprint": name,
            "fold_source": "made up",
            "preprocessing": Preprocessing().to_dict(),
            "classes": {key: list(classes) for key in sets},
            "class_info": {
                key: {c: {"count": count, "description": f"class {c}"} for c, count in found.items()}
                for key, found in counts.items()
            },
            "values": {key: dict.fromkeys(columns, "unit") for key, columns in numbers.items()},
        }
        (path / "zarr.json").write_text(json.dumps({"attributes": {"ecg_jax": attributes}}))
        return Store(path)

    return write


FOLDS = [1, 1, 1, 2, 2, 3, 3]
LABELS = [["A"], ["B"], ["A"], ["A"], ["B"], ["A"], ["B"]]
TASK = get_task("ptbxl_super")


def left_out(examples) -> dict[str, int]:
    """The reasons with a number above zero, of the store trained on."""
    return {reason: n for reason, n in examples.excluded[str(examples.train.store.path)].items() if n}


def rows_of(examples) -> list[list[int]]:
    return [part.rows.tolist() for part in (examples.train, examples.val, examples.test)]


def test_examples_follow_folds_and_drop_classes_by_name(make):
    examples = choose_examples(TASK, make(FOLDS, LABELS), None, window=600, min_count=1)
    assert rows_of(examples) == [[0, 1, 2], [3, 4], [5, 6]]
    assert examples.classes == ["A", "B"]
    assert examples.classes_dropped == {"C": "0 positive records, fewer than min_count=1"}
    assert examples.n_dropped == 1
    assert examples.test.targets.tolist() == [[1, 0], [0, 1]]
    starts, record = examples.test.crops(600)
    assert starts.tolist() == [*range(12000, 14400, 600), *range(14400, 16800, 600)]
    assert record.tolist() == [0] * 4 + [1] * 4
    assert examples.split_table() == [
        *((f"r{i}", "train") for i in range(3)), *((f"r{i}", "validation") for i in (3, 4)),
        *((f"r{i}", "test") for i in (5, 6)),
    ]  # fmt: skip


def test_a_class_without_training_contrast_is_dropped_with_its_reason(make):
    labels = [["A"], ["A", "B"], ["A"], ["A"], ["B"], ["B"], ["B"]]
    examples = choose_examples(TASK, make(FOLDS, labels), None, 600, min_count=1)
    assert examples.classes == ["B"]
    assert examples.classes_dropped["A"] == "only positives or only negatives among the training records"


def test_repeated_signals_leave_the_earlier_part_and_the_test_records_stay(make):
    # Records 0 and 5 are one signal, and so are 1 and 3; 2 is alone.
    signals = ["x", "y", "z", "y", "v", "x", "w"]
    labels = [["A"], ["B"], ["A", "B"], ["A"], ["B"], ["A"], ["B"]]
    with pytest.raises(TaskUnavailable, match="None of the 3 classes"):
        # Only record 2 is left to train on, which has no contrast.
        choose_examples(TASK, make(FOLDS, labels, signals=signals), None, 600, min_count=1)
    store = make([*FOLDS, 1], [*labels, ["C"]], signals=[*signals, "u"])
    examples = choose_examples(TASK, store, None, 600, min_count=1)
    assert rows_of(examples) == [[2, 7], [3, 4], [5, 6]]
    assert left_out(examples) == {"same_signal_as_a_later_part": 2}


def test_signals_of_the_test_store_are_not_trained_on(make):
    other = make([1, 1], [["A"], ["B"]], signals=["r0", "new"], prefix="t")
    examples = choose_examples(TASK, make(FOLDS, LABELS), other, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2]
    assert examples.test.rows.tolist() == [0, 1]
    assert "all records" in examples.split["tested_on"]


def test_of_a_test_store_with_the_same_folds_its_test_fold_is_taken(make):
    other = make([3, 1, 2, 3], [["A"], ["B"], ["B"], ["B"]], prefix="t")
    examples = choose_examples(TASK, make(FOLDS, LABELS), other, 600, min_count=1)
    assert examples.test.rows.tolist() == [0, 3]
    other = make([3, 1, 2], [[], ["B"], ["B"]], prefix="t")
    with pytest.raises(TaskUnavailable, match=r"takes test fold 3 .*: 1 without label of the set"):
        choose_examples(TASK, make(FOLDS, LABELS), other, 600, min_count=1)


def test_test_store_with_shared_records_is_refused(make):
    with pytest.raises(UserError, match=r"2 records of the test store .*such as r0") as refused:
        choose_examples(TASK, make(FOLDS, LABELS), make([1, 1], LABELS[:2]), 600, 1)
    assert not isinstance(refused.value, TaskUnavailable), "it concerns every task"


def test_a_class_that_the_test_store_does_not_have_is_unknown_there(make):
    store = make(FOLDS, LABELS)
    other = make([1, 1], [["A"], ["C"]], prefix="t", classes=["A", "C"])
    examples = choose_examples(TASK, store, other, 600, min_count=1)
    assert examples.classes == ["A", "B"]
    np.testing.assert_array_equal(examples.test.targets, [[1, np.nan], [0, np.nan]])
    assert examples.split["classes_unknown_in_test_store"] == ["B"]


def test_a_number_that_the_test_store_does_not_have_is_unknown_there(make):
    store, other = (
        make(HELD_OUT, LABELS, corpus="mimic", prefix=prefix, numbers=NUMBERS | {"labs": labs})
        for prefix, labs in (
            ("r", {"sodium": [140.0] * 7, "ferritin": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}),
            ("t", {"ferritin": [2.0] * 7}),
        )
    )
    examples = choose_examples(get_task("mimic_labs"), store, other, 600, min_count=1)
    assert examples.classes == ["sodium", "ferritin"]
    np.testing.assert_allclose(examples.test.targets, [[np.nan, 0.0]] * 2, atol=1e-6)  # training mean is 2
    assert examples.split["classes_unknown_in_test_store"] == ["sodium"]


def test_other_records_of_a_test_patient_are_not_trained_on(make):
    patients = ["p0", "p1", "p2", "p3", "p4", "p0", "p3"]
    labels = [["A"], ["B"], ["A", "B"], ["A"], ["B"], ["A"], ["B"]]
    store = make(FOLDS, labels, patients=patients)
    examples = choose_examples(TASK, store, None, 600, min_count=1)
    assert rows_of(examples) == [[1, 2], [4], [5, 6]]
    assert left_out(examples) == {"patient_of_a_later_part": 2}
    other = make([1, 1], LABELS[:2], prefix="t", patients=["p1", "t9"])
    examples = choose_examples(TASK, store, other, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 2]  # p3 validates, p1 is tested on


@pytest.mark.parametrize("unknown", ["", None])
def test_unknown_patients_are_nobody_in_particular(make, unknown):
    examples = choose_examples(TASK, make(FOLDS, LABELS, patients=[unknown] * 7), None, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 1, 2]
    assert "the patient known for no record" in examples.split["rule"]


def test_unlabelled_and_short_records_are_counted(make):
    labels = [[], *LABELS[1:], ["A"], ["B"], None]
    store = make([*FOLDS, 1, 1, 1], labels, lengths=[2400] * 7 + [599, 2400, 2400])
    examples = choose_examples(TASK, store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2, 8]
    assert examples.excluded[str(store.path)] == {
        "shorter_than_window": 1,
        "without_label_of_the_set": 2,
        "same_signal_as_a_later_part": 0,
        "patient_of_a_later_part": 0,
    }


def test_a_store_of_another_corpus_or_a_damaged_one_is_refused_for_every_task(make):
    store = make(FOLDS, LABELS, corpus="wfdb")
    with pytest.raises(UserError, match="needs a store of corpus 'ptbxl'") as refused:
        choose_examples(TASK, store, None, 600)
    assert not isinstance(refused.value, TaskUnavailable)
    store = make(FOLDS, LABELS)
    (store.path / "records.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="missing or damaged") as refused:
        choose_examples(TASK, store, None, 600)
    assert not isinstance(refused.value, TaskUnavailable)


def test_the_online_probe_takes_unknown_labels_for_no_negatives(make):
    labels = [["A"], ["B"], None, [], ["A"], ["A", "B"], [], ["B"], ["A"]] * 3
    folds = [0, 1, 2, 3, -1, 4, 5, 9, 9] * 3
    store = make(folds, labels, corpus="echonext", label_set="echo", classes=["A", "B"])
    chosen, _ = choose_slice(store, np.arange(27), task="echonext", every=1, max_records=100)
    assert sorted(chosen.rows) == [i for i in range(27) if i % 9 in (0, 1, 3, 5, 6)], (
        "nor is the test fold touched"
    )


def test_the_refusal_quotes_why_records_were_left_out(make):
    store = make(FOLDS, [*LABELS[:5], [], None], lengths=[599] + [2400] * 6)
    with pytest.raises(
        TaskUnavailable,
        match=r"no usable test record \(in fold 3\), only 4 usable ones of 7 in all; left out: "
        r"2 without label of the set, 1 shorter than window;",
    ):
        choose_examples(TASK, store, None, 600, min_count=1)


HELD_OUT = [1, 1, 1, 18, 18, 19, 19]
NUMBERS = {
    "age": {"age": [20.0, 40.0, 60.0, 30.0, np.nan, 50.0, 1000.0]},
    "protocol": {"ed": [1, 1, 1, 1, 1, 1, 1]},
    "labs": {"sodium": [140.0] * 7, "ferritin": [np.nan] * 7},
    "icu": {"icu_24h": [np.nan] * 7, "icu_stay": [np.nan] * 7},
}


def _mimic(make, **changes):
    return make(HELD_OUT, LABELS, corpus="mimic", numbers={**NUMBERS, **changes})


def test_regression_targets_are_z_scores_of_the_training_records_trimmed_at_their_quantiles(make):
    examples = choose_examples(get_task("mimic_age"), _mimic(make), None, 600, min_count=1)
    (mean,), (sd,) = examples.scale
    assert (mean, sd) == (40.0, pytest.approx(np.std([20, 40, 60])))
    np.testing.assert_allclose(examples.train.targets[:, 0], (np.array([20, 40, 60]) - 40) / sd, rtol=1e-6)
    assert examples.val.rows.tolist() == [3], "a record without the number takes no part"
    np.testing.assert_allclose(examples.val.targets, [[-10 / sd]], rtol=1e-6)
    np.testing.assert_allclose(
        examples.test.targets, [[10 / sd], [np.nan]], rtol=1e-6
    )  # 1000 years are no age
    assert examples.descriptions == {"age": "unit"}


def test_numbers_that_are_never_known_are_dropped_and_listed(make):
    task, store = get_task("mimic_labs"), _mimic(make)
    examples = choose_examples(task, store, None, 600, min_count=5)
    assert examples.classes == ["sodium"]
    assert examples.classes_dropped == {"ferritin": "0 known records, fewer than min_count=5"}
    with pytest.raises(TaskUnavailable, match="None of the 2 classes of task mimic_labs"):
        choose_examples(task, store, None, 600, min_count=8)


def test_value_sets_without_any_number_are_not_there(make):
    store = _mimic(make)
    assert known_value_sets(store) == ["age", "protocol", "labs"]
    with pytest.raises(
        TaskUnavailable, match=r"'icu', of which no number is known .*icu_24h: unit; icu_stay"
    ):
        choose_examples(get_task("mimic_icu"), store, None, 600)
    with pytest.raises(TaskUnavailable, match=r"'vitals', but the store .* has only age, protocol, labs"):
        choose_examples(get_task("mimic_vitals"), store, None, 600)
    without = _mimic(make, protocol={"ed": [np.nan] * 7})
    with pytest.raises(TaskUnavailable, match="'protocol', of which no number is known"):
        choose_examples(get_task("mimic_age"), without, None, 600)


def test_records_outside_the_protocol_are_left_out(make):
    store = _mimic(make, protocol={"ed": [1, 1, 0, 1, 1, 1, 1]})
    examples = choose_examples(get_task("mimic_age"), store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [0, 1]
    assert left_out(examples)["outside_the_evaluation_protocol"] == 1


@pytest.mark.parametrize(
    ("folds", "message"), [([*range(1, 8)], "no record in fold 8 and 9 .its folds are 1 to 7"),
                           ([0, 1, 2, 3, 8, 8, 8], "no record in fold 9 .*tests on fold 9"),
                           ([-1] * 7, "folds are none")]
)  # fmt: skip
def test_the_published_test_fold_is_not_replaced_by_another(make, folds, message):
    store = make(folds, LABELS, corpus="echonext", label_set="echo")
    with pytest.raises(TaskUnavailable, match=message):
        choose_examples(get_task("echonext"), store, None, 600, min_count=1)


def _challenge_names(n):
    return [f"A{i:04d}" if i < 30 else f"E{i:05d}" for i in range(n)]


def test_a_dataset_of_the_challenge_is_split_by_labels_and_keeps_to_its_own_records(make):
    n = 60
    labels = [["A"] if i % 3 else ["A", "B"] for i in range(n)]
    labels[:20] = [["B"]] * 20
    lengths = [2400] * n
    lengths[29] = 2399
    common = {"corpus": "challenge", "label_set": "dx", "ids": _challenge_names(n), "lengths": lengths}
    store = make([1] * n, labels, patients=[None] * n, **common)
    examples = choose_examples(get_task("cpsc2018"), store, None, 600, min_count=2)
    used = np.concatenate([part.rows for part in (examples.train, examples.val, examples.test)])
    assert sorted(used) == list(range(29))
    assert left_out(examples) == {"of_another_dataset": 30, "shorter_than_the_task_takes": 1}
    for part in (examples.val, examples.test):
        assert 2 <= len(part.rows) <= 4
        assert part.targets.sum(axis=0).min() >= 1, "every class is in every fold"
    assert examples.split["rule"].startswith(
        "10 folds by recording, for no patient is known, stratified by the task's labels (seed 0): test = the highest"
    )
    again = choose_examples(get_task("cpsc2018"), store, None, 600, min_count=2)
    assert again.split["fingerprint"] == examples.split["fingerprint"]
    patients = [f"p{i // 2}" for i in range(n)]
    known = choose_examples(
        get_task("cpsc2018"), make([1] * n, labels, patients=patients, **common), None, 600, min_count=2
    )
    assert known.split["rule"].startswith("10 folds of whole patients, stratified by the task's labels")
    patients[:5] = [None] * 5
    some = make([1] * n, labels, patients=patients, **common)
    rule = choose_examples(get_task("cpsc2018"), some, None, 600, min_count=2).split["rule"]
    assert "of whole patients for the 24 of 29 records whose patient is known, else by recording" in rule


def test_rhythms_of_chapman_are_tested_on_the_records_of_all_its_labels(make):
    n = 80
    rhythm = [["A"] if i % 4 else ["B"] for i in range(n)]
    everything = [names + (["C"] if i % 7 else []) for i, names in enumerate(rhythm)]
    store = make([1] * n, rhythm, corpus="chapman", label_set="rhythm", more_labels={"all": everything})
    both = [
        choose_examples(get_task(name), store, None, 600, min_count=1)
        for name in ("chapman", "chapman_rhythm")
    ]
    assert rows_of(both[0]) == rows_of(both[1])
    assert [examples.classes for examples in both] == [["A", "B", "C"], ["A", "B"]]
    assert "the labels of set all" in both[1].split["rule"]


def test_age_and_sex_are_stratified_too_where_the_study_does(make):
    n = 200
    rng = np.random.default_rng(0)
    old, male = rng.permutation(n) < 40, rng.permutation(n) < 60
    store = make(
        [1] * n,
        [["A"] if i % 2 else ["B"] for i in range(n)],
        corpus="sph",
        label_set="aha",
        age=np.where(old, 85.0, 50.0).tolist(),
        sex=np.where(male, "M", "F").tolist(),
    )
    examples = choose_examples(get_task("sph"), store, None, 600, min_count=1)
    for part in (examples.val, examples.test):
        assert abs(old[part.rows].sum() - 4) <= 1
        assert abs(male[part.rows].sum() - 6) <= 1
    assert "stratified by the task's labels, age and sex" in examples.split["rule"]


def _diagnoses(make, labels, classes):
    return make(HELD_OUT, labels, corpus="mimic", label_set="icd10", numbers=NUMBERS, classes=classes)


def test_diagnoses_are_divided_by_the_chapter_of_the_heart(make):
    labels = [["I10", "I48"], ["E11"], ["I10"], ["I10", "E11"], [], ["I10"], ["E11"]]
    store = _diagnoses(make, labels, ["E11", "I10", "I48"])
    cardiac = choose_examples(get_task("mimic_cardiac"), store, None, 600, min_count=2)
    assert (cardiac.classes, list(cardiac.classes_dropped)) == (["I10"], ["I48"])
    other = choose_examples(get_task("mimic_non_cardiac"), store, None, 600, min_count=2)
    assert (other.classes, other.classes_dropped) == (["E11"], {})


def test_diagnoses_are_counted_over_the_whole_store_for_the_limit_of_the_study_only(make):
    """I10 has two records, one of them usable."""
    labels = [["I10", "I20"], ["I10"], ["I20"], ["I20"], [], ["I20"], ["I20"]]
    classes = ["I10", "I20"]
    numbers = NUMBERS | {"protocol": {"ed": [1, 0, 1, 1, 1, 1, 1]}}
    store = make(HELD_OUT, labels, corpus="mimic", label_set="icd10", numbers=numbers, classes=classes)
    task = get_task("mimic_cardiac")
    dropped = choose_examples(task, make([*HELD_OUT, 1], [*labels, ["I48"]], corpus="mimic", label_set="icd10",
                                         numbers={"protocol": {"ed": [1, 0, 1, 1, 1, 1, 1, 1]}},
                                         classes=classes), None, 600, min_count=2).classes_dropped  # fmt: skip
    assert dropped == {"I10": "1 positive records, fewer than min_count=2"}
    own = dataclasses.replace(task, min_count=2)
    with pytest.raises(TaskUnavailable):
        choose_examples(own, store, None, 600, min_count=3)
    assert choose_examples(own, store, None, 600).classes_dropped == {
        "I20": "only positives or only negatives among the training records"
    }


def test_of_many_rare_diagnoses_those_nearest_to_the_limit_are_named(make):
    rare = [f"I{i:02d}" for i in range(40, 60)]
    labels = [["I10", *rare], rare[5:], ["I10"], ["I10"], [], ["I10"], [*rare[15:]]]
    examples = choose_examples(
        get_task("mimic_cardiac"), _diagnoses(make, labels, ["I10", *rare]), None, 600, min_count=4
    )
    assert examples.classes == ["I10"]
    assert examples.n_dropped == 20
    named = {code: "3 positive records, fewer than min_count=4" for code in rare[15:]}
    named |= {code: "2 positive records, fewer than min_count=4" for code in rare[5:10]}
    assert examples.classes_dropped == {**named, "10 rarer classes": "fewer than 4 positive records each"}


def test_numbers_beyond_the_quantiles_of_the_training_records_are_unknown_everywhere():
    train = np.append(np.arange(1.0, 301.0), np.nan)[:, None]
    (first, second), (mean, sd) = standardised([train, np.array([[0.0], [150.0], [400.0]])])
    known = ~np.isnan(first[:, 0])
    assert (np.flatnonzero(~known) == [0, 1, 298, 299, 300]).all()
    assert mean == np.arange(3.0, 299.0).mean()
    np.testing.assert_allclose(second, [[np.nan], [(150 - mean[0]) / sd[0]], [np.nan]], rtol=1e-6)


def test_recordings_without_labels_are_no_negatives(make):
    labels = [["A"], ["A"], ["B"], None, [], ["A"], [], []]
    store = make([-1, 1, 0, 0, 0, 8, 9, 9], labels, corpus="echonext", label_set="echo")
    examples = choose_examples(get_task("echonext"), store, None, 600, min_count=1)
    assert examples.train.rows.tolist() == [1, 2, 4], (
        "an empty list is a negative of every class, null is unknown"
    )
    assert examples.train.targets.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert examples.test.rows.tolist() == [6, 7]
    assert left_out(examples) == {"without_labels": 2}
