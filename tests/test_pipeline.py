import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.pipeline import (
    shuffled_by_position,
    train_batches,
    uniform_by_position,
    val_batches,
)
from ecg_jax.data.selection import select_records
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets, TargetsWriter, label_range

WINDOW = 600
FROZEN_ORDER = [1, 0, 3, 7, 2, 5, 6, 4]
FROZEN_UNIFORM = [0.3340669750011167, 0.17447351166314107]


@pytest.fixture(scope="module")
def store(synthetic_store):
    return Store(synthetic_store)


@pytest.fixture(scope="module")
def rows(store):
    return select_records(store, window_samples=WINDOW, val_folds=1, max_records=10**9).train


def take(n, store, rows, **kwargs):
    batches = train_batches(store, rows, batch_size=8, window_samples=WINDOW, **kwargs)
    try:
        return list(itertools.islice(batches, n))
    finally:
        batches.close()


def assert_equal_batches(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_batch_holds_crops_of_its_rows(store, rows):
    for batch in take(3, store, rows, seed=0):
        assert batch["signal"].shape == (8, WINDOW, 12)
        assert batch["signal"].dtype == np.int16
        np.testing.assert_array_equal(batch["record_index"], np.arange(8))
        for crop, row in zip(batch["signal"], batch["row"], strict=True):
            record = store.read(int(row))
            windows = np.lib.stride_tricks.sliding_window_view(record[:, 0], WINDOW)
            at = np.flatnonzero((windows == crop[:, 0]).all(axis=1))
            assert any(np.array_equal(record[i : i + WINDOW], crop) for i in at)


def test_an_epoch_visits_every_row_once_and_epochs_differ(store, rows):
    n = len(rows)
    seen = np.concatenate([batch["row"] for batch in take(2 * n // 8 + 1, store, rows, seed=1)])
    first, second = seen[:n], seen[n : 2 * n]
    np.testing.assert_array_equal(np.sort(first), rows)
    np.testing.assert_array_equal(np.sort(second), rows)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("threads", [0, 4])
def test_resuming_at_any_step_gives_the_same_batches(store, rows, threads):
    whole = take(30, store, rows, seed=2, threads=threads)
    for step in (1, 10, 11, 29):  # 10 and 11 lie around the end of an epoch
        assert_equal_batches(
            take(30 - step, store, rows, seed=2, start_step=step, threads=threads), whole[step:]
        )


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(store, rows, processes):
    whole = take(12, store, rows, seed=3)
    parts = [take(12, store, rows, seed=3, process=p, processes=processes) for p in range(processes)]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            order = np.argsort(np.concatenate([part[step]["record_index"] for part in parts]))
            np.testing.assert_array_equal(joined[order], batch[name])


def test_seed_changes_order_and_crops(store, rows):
    a, b = take(1, store, rows, seed=0)[0], take(1, store, rows, seed=1)[0]
    assert not np.array_equal(a["row"], b["row"])


def test_batch_that_does_not_divide_is_refused(store, rows):
    with pytest.raises(ValueError, match="batch size 8 is not a multiple of 3 processes"):
        take(1, store, rows, seed=0, processes=3)


def test_uniform_by_position():
    position = np.arange(200_000)
    u = uniform_by_position(0, position)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi-square with 49 degrees of freedom
    for other in (u[1:], uniform_by_position(1, position)[:-1]):
        assert abs(np.corrcoef(u[:-1], other)[0, 1]) < 0.01
    # A pure function of (seed, position): the same value in any company.
    assert uniform_by_position(0, [123_456])[0] == u[123_456]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed, n, epoch):
    order = shuffled_by_position(seed, np.arange(epoch * n, (epoch + 1) * n), n)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_shuffle_is_uniform_and_independent_of_company():
    n = 12
    orders = np.array([shuffled_by_position(seed, np.arange(3 * n), n) for seed in range(2000)])
    for position in range(3 * n):
        counts = np.bincount(orders[:, position], minlength=n)
        assert ((counts - 2000 / n) ** 2 / (2000 / n)).sum() < 45, (
            position
        )  # chi-square, 11 degrees of freedom
    first, second = orders[:, :n], orders[:, n : 2 * n]
    assert abs((first == second).mean() - 1 / n) < 0.01, "epochs are independent"
    neighbours = np.bincount((first[:, 1:] - first[:, :-1]).ravel() + n, minlength=2 * n)
    assert neighbours[n] == 0
    assert abs(neighbours[n + 1] / neighbours[n - 1] - 1) < 0.1
    large = shuffled_by_position(0, [5, 11_000_000, 10**12], 11_000_000)
    np.testing.assert_array_equal(large[[1]], shuffled_by_position(0, [11_000_000], 11_000_000))
    assert large.max() < 11_000_000


def test_order_of_the_data_is_frozen():
    """A change here changes what every run sees; a resumed run would no longer continue itself."""
    np.testing.assert_array_equal(shuffled_by_position(7, np.arange(8), 8), FROZEN_ORDER)
    np.testing.assert_allclose(uniform_by_position(7, np.arange(2)), FROZEN_UNIFORM, rtol=1e-15)


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_covers_every_crop_once(store, processes):
    rows = select_records(store, window_samples=WINDOW, val_folds=3, max_records=10**9).val
    parts = [
        list(val_batches(store, rows, batch_size=16, window_samples=WINDOW, max_crops=10**6,
                         process=p, processes=processes))
        for p in range(processes)
    ]  # fmt: skip
    assert len({len(part) for part in parts}) == 1
    batches = list(itertools.chain(*parts))
    assert {batch["signal"].shape for batch in batches} == {(16 // processes, WINDOW, 12)}
    starts, _ = non_overlapping_crops(store.column("length")[rows], store.column("offset")[rows], WINDOW)
    real = np.concatenate([batch["record_index"][batch["weight"] > 0] for batch in batches])
    np.testing.assert_array_equal(np.sort(real), np.arange(len(starts)))
    for batch in batches:
        for crop, number, weight in zip(batch["signal"], batch["record_index"], batch["weight"], strict=True):
            if weight:
                np.testing.assert_array_equal(crop, store.read_crops(starts[[number]], WINDOW)[0])


def test_validation_is_cut_evenly(store):
    rows = select_records(store, window_samples=WINDOW, val_folds=3, max_records=10**9).val
    batches = list(val_batches(store, rows, batch_size=4, window_samples=WINDOW, max_crops=6))
    assert sum(batch["weight"].sum() for batch in batches) == 6
    assert len(batches) == 2


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A store whose signal tells record and position of each sample, and targets that tell the same."""
    from test_targets import numbered, write_store

    lengths = (901, 650, 1201, 777, 777, 1001, 602)
    path = write_store(
        tmp_path_factory.mktemp("labelled") / "store", [numbered(i, n) for i, n in enumerate(lengths)]
    )
    store = Store(path)
    offset, length = store.column("offset"), store.column("length")
    with TargetsWriter(store, "positions") as writer:
        for row, (first, last) in enumerate(zip(*label_range(offset, length), strict=True)):
            writer.labels[first:last] = 2000 * row + 2 * np.arange(last - first)
        writer.finish(np.zeros((16000, 1), np.float32), {})
    return store, Targets(store, "positions")


@pytest.mark.parametrize("window", [WINDOW, 601])
def test_labels_belong_to_the_crops(labelled, window):
    store, targets = labelled
    rows = np.flatnonzero(store.column("length") > 601)
    train = train_batches(store, rows, batch_size=8, window_samples=window, seed=0, targets=targets)
    batches = list(itertools.islice(train, 20))
    train.close()
    val = val_batches(store, rows, batch_size=3, window_samples=window, max_crops=99, targets=targets)
    for batch in [*batches, *val]:
        labels, signal = batch["labels"], batch["signal"][:, ::2, 0].astype(int)
        assert labels.dtype == np.int32
        assert labels.shape == (len(signal), -(-window // 2))
        # The sample after the last whole pair of a record has no label; an even window never holds it.
        missing = labels == -1
        assert not missing[:, :-1].any()
        assert window % 2 or not missing.any()
        assert np.abs(labels - signal)[~missing].max() <= 1
    assert len({int(start) % 2 for batch in batches for start in batch["signal"][:, 0, 0]}) == 2


def test_labels_cost_nothing_else(labelled):
    store, targets = labelled
    rows = np.arange(4)
    plain, with_labels = take(5, store, rows, seed=1), take(5, store, rows, seed=1, targets=targets)
    assert all(batch.pop("labels").shape == (8, WINDOW // 2) for batch in with_labels)
    assert_equal_batches(with_labels, plain)
    assert all("labels" not in batch for batch in plain)


@pytest.mark.parametrize("processes", [2, 4])
def test_labels_do_not_depend_on_the_number_of_processes(labelled, processes):
    store, targets = labelled
    rows = np.arange(4)
    [whole] = take(1, store, rows, seed=1, start_step=3, targets=targets)
    parts = [
        take(1, store, rows, seed=1, start_step=3, targets=targets, process=p, processes=processes)[0]
        for p in range(processes)
    ]
    for p, part in enumerate(parts):
        np.testing.assert_array_equal(part["labels"], whole["labels"][p::processes])
