"""Stratified folds and nested subsets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.data.stratify import (
    PAEDIATRIC_BINS,
    age_sex_labels,
    batched_folds,
    nested_subsets,
    stratified_folds,
)

NAMES = "abcdef"
RECORDS = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=4), st.integers(0, 12)), max_size=40)


def counts(labels, folds, n_folds, name) -> np.ndarray:
    """Records with a label in each fold."""
    has = np.array([name in names for names in labels], bool)
    return np.bincount(folds[has], minlength=n_folds)


def realistic(n: int = 2000, seed: int = 0):
    """Records with rare and frequent labels that go together, of patients with one to eight records."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n), rng.integers(1, 9, n))[:n]
    frequency = np.geomspace(0.5, 0.01, 12)
    severity = rng.random(patient.max() + 1)[patient]  # sick patients have many labels
    has = rng.random((n, 12)) < frequency * 2 * severity[:, None]
    return [[f"l{k:02d}" for k in np.flatnonzero(row)] for row in has], patient.tolist()


@given(RECORDS, st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_a_partition_that_never_splits_a_group(records, n_folds, grouped, seed):
    labels, groups = [names for names, _ in records], [group for _, group in records]
    folds = stratified_folds(labels, n_folds, groups=groups if grouped else None, seed=seed)
    assert folds.dtype == np.int64
    assert folds.shape == (len(records),)
    assert ((folds >= 0) & (folds < n_folds)).all()
    if grouped:
        assert all(len(set(folds[np.array(groups) == group])) == 1 for group in set(groups))
        if len(set(groups)) >= 2 and n_folds == 2:
            assert len(set(folds)) == 2
    again = stratified_folds(labels, n_folds, groups=groups if grouped else None, seed=seed)
    np.testing.assert_array_equal(folds, again)


@given(RECORDS, st.integers(2, 5), st.randoms(use_true_random=False))
def test_with_groups_the_order_of_the_records_does_not_matter(records, n_folds, random):
    shuffled = list(records)
    random.shuffle(shuffled)
    found = []
    for some in (records, shuffled):
        folds = stratified_folds([names for names, _ in some], n_folds, groups=[group for _, group in some])
        found.append({group: fold for (_, group), fold in zip(some, folds.tolist(), strict=True)})
    assert found[0] == found[1]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 30)), max_size=60), st.integers(2, 6))
def test_a_label_with_enough_groups_is_in_every_fold(records, n_folds):
    # One label a group: with several, a group may have been needed for another of its labels.
    labels, groups = [[f"{name}"] for name, _ in records], [f"{name}{group}" for name, group in records]
    folds = stratified_folds(labels, n_folds, groups=groups)
    for name in NAMES:
        if len({group for group in groups if group[0] == name}) >= n_folds:
            assert (counts(labels, folds, n_folds, name) > 0).all()


@given(st.lists(st.sampled_from([*NAMES, ""]), max_size=60), st.integers(1, 7))
def test_single_labels_are_distributed_as_evenly_as_can_be(names, n_folds):
    labels = [[name] if name else [] for name in names]
    folds = stratified_folds(labels, n_folds)
    for name in set(names) - {""}:
        found = counts(labels, folds, n_folds, name)
        assert found.max() - found.min() <= 1
    sizes = np.bincount(folds, minlength=n_folds)
    assert sizes.max() - sizes.min() <= 1


def test_shares_of_labels_and_records():
    labels, patients = realistic()
    folds = stratified_folds(labels, 10, groups=patients)
    np.testing.assert_allclose(np.bincount(folds, minlength=10), 0.1 * len(labels), rtol=0.16)
    random = np.random.default_rng(0).permutation(max(patients) + 1)[patients] % 10
    for k in range(12):
        found = counts(labels, folds, 10, f"l{k:02d}")
        # Rare labels come first and are met to a record or two; frequent ones get what is left to choose.
        np.testing.assert_allclose(found, 0.1 * found.sum(), rtol=0.16, atol=1.5)

    def worst(of):
        return max(np.ptp(counts(labels, of, 10, f"l{k:02d}")) for k in range(12))

    assert worst(folds) < worst(random) / 3


def test_known_case_by_hand():
    # b (2 records) is rarer than a (4): its two records part; then a fills up each fold to two.
    labels = [["a"], ["a", "b"], ["a"], ["a", "b"], []]
    folds = stratified_folds(labels, 2, seed=3)
    assert folds[1] != folds[3]
    assert folds[0] != folds[2]
    assert set(np.bincount(folds)) == {2, 3}


def test_another_seed_gives_other_folds():
    labels, patients = realistic(300)
    first, second = (stratified_folds(labels, 5, groups=patients, seed=seed) for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_folds": 0}, "n_folds"),
        ({"n_folds": 2, "groups": [1]}, "2 records but 1 groups"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        stratified_folds([["a"], ["b"]], **arguments)


@settings(max_examples=50)
@given(
    RECORDS.filter(len),
    st.lists(st.floats(1e-9, 1) | st.sampled_from([2.0**-k for k in range(8)]), min_size=1, max_size=5),
    st.integers(0, 2),
)
def test_subsets_are_nested_and_hold_whole_groups(records, fractions, seed):
    labels, groups = [names for names, _ in records], [group for _, group in records]
    subsets = nested_subsets(labels, groups, fractions, seed)
    assert len(subsets) == len(fractions)
    for i in np.argsort(fractions)[:-1]:
        for j in np.flatnonzero(np.array(fractions) >= fractions[i]):
            assert set(subsets[i]) <= set(subsets[j])
    for subset, fraction in zip(subsets, fractions, strict=True):
        assert len(subset) > 0
        assert (np.diff(subset) > 0).all()
        inside = {groups[i] for i in subset}
        assert [i for i in range(len(records)) if groups[i] in inside] == subset.tolist()
        if fraction == 1:
            assert len(subset) == len(records)
        # The same subset comes whatever else is asked for.
        np.testing.assert_array_equal(nested_subsets(labels, groups, [fraction], seed)[0], subset)


def test_nested_subsets_are_stratified():
    labels, patients = realistic(4000)
    fractions = [2.0**-k for k in range(8)] + [0.1, 0.3]
    for subset, fraction in zip(nested_subsets(labels, patients, fractions), fractions, strict=True):
        np.testing.assert_allclose(len(subset), fraction * 4000, rtol=0.02, atol=8)
        for k in range(12):
            total = sum(f"l{k:02d}" in names for names in labels)
            found = sum(f"l{k:02d}" in labels[i] for i in subset)
            np.testing.assert_allclose(found, fraction * total, rtol=0.1, atol=8)


def test_nested_subsets_without_groups_and_wrong_fractions():
    labels = [["a"]] * 6 + [["b"]] * 2
    assert len(nested_subsets(labels, None, [0.5])[0]) == 4
    with pytest.raises(ValueError, match="fractions"):
        nested_subsets(labels, None, [0.5, 0.0])
    with pytest.raises(ValueError, match="no records"):
        nested_subsets([], None, [0.5])


def as_arrays(labels: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of labels as (starts, codes) for `batched_folds`."""
    names = sorted({name for some in labels for name in some})
    starts = np.concatenate([[0], np.cumsum([len(set(some)) for some in labels])]).astype(np.int64)
    return starts, np.array([names.index(name) for some in labels for name in sorted(set(some))], np.int16)


@given(RECORDS, st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.randoms(use_true_random=False))
def test_batches_are_a_partition_that_never_splits_a_group(records, n_folds, batch_size, seed, random):
    found = []
    for _ in range(2):
        groups = np.array([group for _, group in records], np.int64)
        labels = [as_arrays([names for names, _ in records]), groups % 3 - 1]
        folds = batched_folds(groups, labels, n_folds, batch_size=batch_size, seed=seed)
        assert folds.shape == groups.shape
        assert ((folds >= 0) & (folds < n_folds)).all()
        assert len(set(zip(groups, folds, strict=True))) == len(set(groups))
        found.append(dict(zip(groups.tolist(), folds.tolist(), strict=True)))
        # The order of the records is of no account, as long as the labels have the same codes.
        random.shuffle(records)
    assert found[0] == found[1]


@pytest.mark.parametrize("batch_size", [20, 10_000])
def test_batches_make_up_for_each_other(batch_size):
    labels, patients = realistic(4000)
    column = np.array(patients) % 2
    found = batched_folds(np.array(patients), [as_arrays(labels), column], 10, batch_size=batch_size)
    with_column = [[*some, f"c{c}"] for some, c in zip(labels, column.tolist(), strict=True)]
    np.testing.assert_allclose(np.bincount(found), 400, rtol=0.16)
    random = np.random.default_rng(0).permutation(max(patients) + 1)[patients] % 10

    def unevenness(of):
        each = [counts(with_column, of, 10, name) for name in {name for some in with_column for name in some}]
        return np.mean([np.ptp(share) / share.mean() for share in each])

    # Batches of 20 patients, each with a record or two too many somewhere, would be no better than chance.
    assert unevenness(found) < unevenness(random) / 2.5


def test_batches_without_labels_and_with_wrong_arguments():
    assert sorted(np.bincount(batched_folds(np.arange(9), [], 3, batch_size=2))) == [3, 3, 3]
    assert batched_folds(np.zeros(0, np.int64), [np.zeros(0, np.int8)], 3).shape == (0,)
    with pytest.raises(ValueError, match="batch_size"):
        batched_folds(np.arange(2), [], 2, batch_size=0)
    with pytest.raises(ValueError, match="2 records but labels of 3"):
        batched_folds(np.arange(2), [np.zeros(3, np.int8)], 2)


def test_age_and_sex_as_labels():
    found = age_sex_labels([19.9, 20, 59, 80, None, np.nan], ["M", "F", None, "M", "F", "F"])
    assert found == [
        ["age <20", "sex M"],
        ["age 20-40", "sex F"],
        ["age 40-60", "sex unknown"],
        ["age >=80", "sex M"],
        ["age unknown", "sex F"],
        ["age unknown", "sex F"],
    ]
    assert age_sex_labels([0.5, 1, 17, 18], ["F"] * 4, PAEDIATRIC_BINS)[2][0] == "age 12-18"
    assert [names[0] for names in age_sex_labels([0.5, 18], ["F"] * 2, (1, 18))] == ["age <1", "age >=18"]
    with pytest.raises(ValueError, match="ascend"):
        age_sex_labels([1], ["F"], (5, 5))
