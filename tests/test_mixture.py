"""Several stores read like one, and the share of each in the order."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.data.mixture import StoreSet, as_set, joint_fingerprint, parse_weights, store_paths
from ecg_jax.data.order import mixed_by_position
from ecg_jax.data.pipeline import val_batches
from ecg_jax.data.selection import select_records
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from store_files import write_store
from test_pipeline import assert_equal_batches, take
from test_selection import FakeStore, people, select

WINDOW = 600
FROZEN_MIXED = [4, 19, 21, 25, 11, 2, 22, 20]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, synthetic_store):
    """Of 12 records and of more, of other lengths."""
    folder = tmp_path_factory.mktemp("stores")
    small = write_synthetic_store(folder / "small", n_records=12, seconds=4.0, seed=5)
    return StoreSet([Store(small), Store(synthetic_store)])


def test_set_reads_like_its_stores(stores):
    first, second = stores.stores
    assert len(stores) == len(first) + len(second)
    assert stores.column("record_id").tolist() == [
        *first.column("record_id").tolist(), *second.column("record_id").tolist(),
    ]  # fmt: skip
    assert stores.arrow_column("fold").to_pylist() == stores.column("fold").tolist()
    starts, lengths = stores.column("offset"), stores.column("length")
    rows = np.array([len(first), 3, len(stores) - 1, 0, len(first) - 1])
    crops = stores.read_crops(starts[rows], WINDOW)
    for row, crop in zip(rows, crops, strict=True):
        store, local = (first, row) if row < len(first) else (second, row - len(first))
        np.testing.assert_array_equal(crop, store.read(int(local))[:WINDOW])
    out = np.empty_like(crops)
    assert stores.read_crops(starts[rows] + 5, WINDOW, out) is out
    np.testing.assert_array_equal(out[1], first.read(3)[5 : 5 + WINDOW])
    assert lengths[rows[0]] == second.column("length")[0]
    assert [part.tolist() for part in stores.split(np.array([0, 11, 12, 15]))] == [[0, 11], [0, 3]]
    with pytest.raises(ValueError, match="outside"):
        stores.read_crops(np.array([-1]), WINDOW)


def test_fingerprint_of_one_and_of_several(stores):
    prints = [store.fingerprint for store in stores.stores]
    assert as_set(stores.stores[0]).fingerprint == prints[0]
    assert as_set(stores) is stores
    assert stores.fingerprint == joint_fingerprint(prints)
    assert joint_fingerprint(prints) not in (joint_fingerprint(prints[::-1]), *prints)


def test_stores_that_do_not_fit_are_refused(tmp_path, stores):
    with pytest.raises(UserError, match="hold the same recordings"):
        StoreSet([stores.stores[0], Store(stores.stores[0].path)])
    slow = write_store(tmp_path / "slow", [("a", "p", 1, np.ones((900, 12), np.int16))], rate=100.0)
    with pytest.raises(UserError, match="240 and 100 samples per second"):
        StoreSet([stores.stores[0], slow])


@pytest.mark.parametrize("start_step", [0, 7])
def test_a_set_of_one_is_the_store(stores, start_step):
    store = stores.stores[1]
    rows = select_records(store, window_samples=WINDOW, val_folds=1).train
    alone = take(6, store, rows, seed=3, start_step=start_step)
    assert_equal_batches(alone, take(6, StoreSet([store]), rows, seed=3, start_step=start_step))


@pytest.mark.parametrize(
    ("text", "shares"),
    [("1,3", (1, 3)), ("2,6", (1, 3)), ("0.25,0.75", (1, 3)), ("1,1", (1, 1)), ("0.333,0.667", (333, 667)),
     ("1e-2,1", (1, 100)), ("5", (1,)), ("", None)],
)  # fmt: skip
def test_weights_are_the_smallest_whole_shares(text, shares):
    assert parse_weights(text) == shares


def test_stores_may_stand_apart():
    assert store_paths("a, b c ,d") == ["a", "b c", "d"]


@pytest.mark.parametrize("text", ["1,0", "-1,2", "a,b", "1,,2", ",", "nan,1", "inf,1"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="must be positive numbers separated by commas"):
        parse_weights(text)


def test_weights_too_fine_are_refused():
    with pytest.raises(UserError, match="finer than 10000 parts"):
        parse_weights("1,0.00001")


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_shares_are_exact_and_each_store_has_its_own_epochs(seed, parts, cycle):
    shares, sizes = zip(*parts, strict=True)
    P, firsts = sum(shares), np.cumsum([0, *sizes])
    chosen = mixed_by_position(seed, np.arange(cycle * P, (cycle + 1) * P), shares, sizes)
    owner = np.searchsorted(firsts, chosen, side="right") - 1
    assert np.bincount(owner, minlength=len(sizes)).tolist() == list(shares)
    # n cycles give every store a whole number of its epochs.
    n = int(np.lcm.reduce([size // np.gcd(size, share) for share, size in parts]))
    if n * P < 20_000:
        chosen = mixed_by_position(seed, np.arange(n * P), shares, sizes)
        seen = np.bincount(chosen, minlength=sum(sizes))
        for (share, size), first in zip(parts, firsts, strict=False):
            assert (seen[first : first + size] == n * share // size).all()


def test_an_epoch_of_a_store_visits_each_of_its_records_once():
    shares, sizes, P = (1, 3), (5, 21), 4
    chosen = mixed_by_position(9, np.arange(0, 35 * P), shares, sizes)
    small, large = chosen[chosen < 5], chosen[chosen >= 5] - 5
    # Slots of a cycle come in any order, so that an epoch of a store may end up to a cycle early or late.
    assert sorted(large[: 7 * 3]) == list(range(21)), "7 cycles of 3 slots"
    assert sorted(large[21:42]) == list(range(21))
    assert [sorted(small[i : i + 5]) for i in range(0, 35, 5)] == [list(range(5))] * 7
    assert large[:21].tolist() != large[21:42].tolist()


def test_mixed_order_is_frozen():
    """A change here changes what runs on several stores see."""
    assert mixed_by_position(7, np.arange(8), (1, 3), (5, 21)).tolist() == FROZEN_MIXED


def test_mixed_order_is_independent_of_company():
    shares, sizes = (2, 5, 1), (100, 11_000_000, 3)
    position = np.array([10**12, 5, 77, 10**9])
    together = mixed_by_position(1, position, shares, sizes)
    alone = [mixed_by_position(1, position[i : i + 1], shares, sizes)[0] for i in range(4)]
    assert together.tolist() == alone


@pytest.mark.parametrize("shares", [None, (1, 3)])
@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(stores, shares, processes):
    rows = select_records(stores, window_samples=WINDOW, val_folds=1).train
    whole = take(9, stores, rows, seed=3, shares=shares)
    parts = [
        take(9, stores, rows, seed=3, shares=shares, process=p, processes=processes) for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            order = np.argsort(np.concatenate([part[step]["record_index"] for part in parts]))
            np.testing.assert_array_equal(joined[order], batch[name])


@pytest.mark.parametrize("shares", [None, (3, 1)])
def test_resuming_at_any_step_gives_the_same_batches(stores, shares):
    rows = select_records(stores, window_samples=WINDOW, val_folds=1).train
    whole = take(20, stores, rows, seed=2, shares=shares)
    for step in (1, 6, 19):
        assert_equal_batches(
            take(20 - step, stores, rows, seed=2, start_step=step, shares=shares), whole[step:]
        )


def test_batches_hold_crops_of_their_rows_in_the_shares_asked_for(stores):
    rows = select_records(stores, window_samples=WINDOW, val_folds=1).train
    batches = take(6, stores, rows, seed=0, shares=(3, 1))
    seen = np.concatenate([batch["row"] for batch in batches])
    first = stores.stores[0]
    assert (seen < len(first)).sum() == 36, "three of four of 48"
    assert set(seen) <= set(rows)
    for batch in batches[:2]:
        for crop, row in zip(batch["signal"], batch["row"], strict=True):
            store, local = (first, row) if row < len(first) else (stores.stores[1], row - len(first))
            windows = np.lib.stride_tricks.sliding_window_view(store.read(int(local))[:, 1], WINDOW)
            assert (windows == crop[:, 1]).all(axis=1).any()


def test_a_plain_mixture_visits_every_record_once_in_an_epoch(stores):
    rows = select_records(stores, window_samples=WINDOW, val_folds=1).train
    seen = np.concatenate([batch["row"] for batch in take(-(-len(rows) // 8), stores, rows, seed=1)])
    np.testing.assert_array_equal(np.sort(seen[: len(rows)]), rows)


def test_a_share_of_nothing_is_refused(stores):
    rows = np.arange(3)
    with pytest.raises(ValueError, match="every store needs rows for its share"):
        take(1, stores, rows, seed=0, shares=(1, 1))


def test_validation_covers_all_stores(stores):
    rows = select_records(stores, window_samples=WINDOW, val_folds=3).val
    assert len({row < len(stores.stores[0]) for row in rows}) == 2
    batches = list(val_batches(stores, rows, batch_size=8, window_samples=WINDOW, max_crops=10**6))
    crops = sum(batch["weight"].sum() for batch in batches)
    assert crops == (stores.column("length")[rows] // WINDOW).sum()


def test_nobody_is_trained_on_who_is_held_out_in_another_store_of_the_corpus():
    ids = [None, *people(39)]
    folds = [[-1, *((i // 4 + shift) % 5 for i in range(39))] for shift in (0, 1)]
    stores = [
        FakeStore("one", name, patient_id=ids, fold=fold) for name, fold in zip("ab", folds, strict=True)
    ]
    stores.append(FakeStore("two", "c", patient_id=ids, fold=folds[0]))
    selection = select(StoreSet(stores), val_folds=1)
    patients = np.array([f"{store.corpus} {name}" for store in stores for name in ids])
    assert not set(patients[selection.train]) & set(patients[selection.val])
    assert {0, 40, 80} <= set(selection.train), "unknown patients are not one"
    alone = [select(store, val_folds=1) for store in stores]
    assert len(selection.val) == sum(len(each.val) for each in alone)
    left = sum(len(each.train) for each in alone) - len(selection.train)
    assert left == selection.held_elsewhere > 0
    assert f"{left} of patients who are held out in another store left out" in selection.describe()
    np.testing.assert_array_equal(selection.rows_of(2)[0], alone[2].train, "the only one of its corpus")


def test_a_signal_that_two_stores_have_is_used_once():
    names = [hashlib.md5(name.encode()).hexdigest() for name in "abcdef"]
    first = FakeStore(
        corpus="one", fingerprint="a", patient_id=list("pqrs"), fold=[1, 1, 1, 2], checksum=names[:4]
    )
    second = FakeStore(
        corpus="two", fingerprint="b", patient_id=list("tuvwx"), fold=[1, 2, 1, 2, 2],
        checksum=[names[4], names[0], names[3], names[5], names[5]],
        duplicate_of=pa.array([None, None, None, None, "two3"]),
    )  # fmt: skip
    selection = select(StoreSet([first, second]), val_folds=1)
    assert selection.train.tolist() == [0, 1, 2, 4]
    assert selection.val.tolist() == [3, 7]
    assert selection.duplicates == 3
