"""Batches of random crops through Grain: our store against ArrayRecord, the format Grain is usually fed with.

    pytest tests/benchmarks/test_pipeline_benchmark.py --benchmark-only

Same 10 s recordings, same 2.5 s crops, same batch size, page cache warm, no worker processes.
"""

import itertools

import grain
import numpy as np
import pytest

from ecg_jax.data.pipeline import train_batches, uniform_by_position
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store

N_RECORDS, WINDOW, BATCH, BATCHES = 4096, 600, 256, 40
SHAPE = (2400, 12)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "store"
    return Store(write_synthetic_store(path, N_RECORDS, distinct=64))


@pytest.fixture(scope="module")
def array_record(tmp_path_factory, store):
    """The same recordings in one uncompressed ArrayRecord file, in order."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path_factory.mktemp("benchmark") / "records.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for index in range(N_RECORDS):
        writer.write(store.read(index).tobytes())
    writer.close()
    return path


def consume(batches):
    total = 0
    for batch in itertools.islice(batches, BATCHES):
        total += len(batch["signal"])
    batches.close()
    return total


def grain_over_array_record(path):
    class RandomCrop(grain.transforms.RandomMap):
        def random_map(self, record, rng):
            signal = np.frombuffer(record, np.int16).reshape(SHAPE)
            start = rng.integers(SHAPE[0] - WINDOW + 1)
            return {"signal": signal[start : start + WINDOW]}

    source = grain.sources.ArrayRecordDataSource([str(path)])
    dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().random_map(RandomCrop()).batch(BATCH)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


@pytest.mark.parametrize("reader", ["store", "array_record"])
def test_crops_through_grain(benchmark, store, array_record, reader):
    rows = np.arange(N_RECORDS)

    def batches():
        if reader == "array_record":
            return grain_over_array_record(array_record)
        return train_batches(
            store, rows, batch_size=BATCH, window_samples=WINDOW, seed=0, threads=2, prefetch=4
        )

    total = benchmark.pedantic(lambda: consume(batches()), rounds=5, warmup_rounds=1)
    assert total == BATCH * BATCHES
    benchmark.extra_info["crops_per_s"] = total / benchmark.stats["median"]


def test_crop_offsets(benchmark):
    """What a pure function of the position costs instead of a generator, per batch."""
    position = np.arange(BATCH)
    assert benchmark(uniform_by_position, 0, position).shape == (BATCH,)
