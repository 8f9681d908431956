"""Crops per second of the store, a memory-mapped .npy and ArrayRecord on the same data, plain loop.

    pytest tests/benchmarks/test_store_benchmark.py --benchmark-only

Random 2.5 s crops (600 samples x 12 leads of int16), batches of 256, one process and thread, page cache warm.
Each reader fills the same kind of batch. The rate through Grain is measured where Grain is.
"""

import numpy as np
import pytest

from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store

N_RECORDS, LENGTH, CROP, BATCH, BATCHES = 4000, 2400, 600, 256, 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "store"
    return Store(write_synthetic_store(path, N_RECORDS, distinct=64))


@pytest.fixture(scope="module")
def signals(store):
    return np.stack([store.read(i) for i in range(N_RECORDS)])


@pytest.fixture(scope="module")
def crops():
    """(record, first sample) of every crop: [BATCHES, BATCH] each."""
    rng = np.random.default_rng(0)
    shape = (BATCHES, BATCH)
    return rng.integers(0, N_RECORDS, shape), rng.integers(0, LENGTH - CROP + 1, shape)


def measure(benchmark, read_batch, signals, crops):
    """Times all batches, checks one, and notes the rate."""
    rows, starts = crops
    batch = read_batch(rows[3], starts[3])
    for i in (0, 100, 255):
        expected = signals[rows[3, i], starts[3, i] : starts[3, i] + CROP]
        np.testing.assert_array_equal(batch[i], expected)

    def run():
        for r, s in zip(rows, starts, strict=True):
            read_batch(r, s)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["crops_per_second"] = round(BATCHES * BATCH / benchmark.stats["median"])


def test_store(benchmark, store, signals, crops):
    offsets = store.column("offset")
    out = np.empty((BATCH, CROP, 12), np.int16)
    measure(benchmark, lambda r, s: store.read_crops(offsets[r] + s, CROP, out), signals, crops)


def test_memmap(benchmark, signals, crops, tmp_path):
    np.save(tmp_path / "signals.npy", signals)
    mapped = np.load(tmp_path / "signals.npy", mmap_mode="r")
    out = np.empty((BATCH, CROP, 12), np.int16)

    def read_batch(rows, starts):
        for i, (r, s) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            out[i] = mapped[r, s : s + CROP]
        return out

    measure(benchmark, read_batch, signals, crops)


def test_array_record(benchmark, signals, crops, tmp_path):
    """Uncompressed and group_size:1, the fastest way to write ArrayRecord for random access."""
    array_record = pytest.importorskip("array_record.python.array_record_module")
    path = str(tmp_path / "signals.array_record")
    writer = array_record.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for signal in signals:
        writer.write(signal.tobytes())
    writer.close()
    reader = array_record.ArrayRecordReader(path)
    out = np.empty((BATCH, CROP, 12), np.int16)

    def read_batch(rows, starts):
        for i, (record, s) in enumerate(zip(reader.read(rows.tolist()), starts.tolist(), strict=True)):
            out[i] = np.frombuffer(record, np.int16).reshape(LENGTH, 12)[s : s + CROP]
        return out

    measure(benchmark, read_batch, signals, crops)
    reader.close()
