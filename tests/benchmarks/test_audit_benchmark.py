"""What the leakage audit and the simple ECG features cost, in seconds per 1,000 recordings of 10 s.

    pytest tests/benchmarks/test_audit_benchmark.py --benchmark-only -s

Signatures are computed once per store and kept; comparing then is matrix products and grows with test recordings
times all others. The made recordings are the 304 real ones that ship, played at other and varying speeds and with
other gains and noise: no copies, but as alike as real ones. `pairs_kept_per_million` says how many pairs pass the
descriptors and are laid over each other.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ecg_jax.data.store import Store
from ecg_jax.evaluation import kept_rows, near_duplicates
from ecg_jax.evaluation.ecg_features import ecg_features, store_features
from ecg_jax.evaluation.leakage import verdict
from ecg_jax.evaluation.signatures import signatures
from ecg_jax.prepare import prepare
from store_files import write_store
from test_corpora import SAMPLE

N_RECORDS, N_TEST = 4000, 400


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    prepare("ptbxl", SAMPLE, folder / "sample", workers=1, progress=False)
    sample, rng = Store(folder / "sample"), np.random.default_rng(0)
    signals = [sample.read(i) / 1000.0 for i in range(len(sample))]

    def made():
        for i in range(N_RECORDS):
            base = signals[i % len(signals)]
            speed = rng.uniform(0.85, 1.15)
            at = np.clip(
                np.cumsum(speed * (1 + 0.1 * rng.standard_normal(2400).cumsum() / 50)), 0, len(base) - 1
            )
            piece = base[at.astype(int) % len(base)] * rng.uniform(0.7, 1.3, 12)
            yield f"r{i}", f"p{i}", 1 + i % 10, piece + 0.01 * rng.standard_normal(piece.shape)

    return write_store(folder / "store", made())


def per_thousand(benchmark, n):
    benchmark.extra_info["seconds_per_1000_records"] = round(1000 * benchmark.stats["median"] / n, 3)


def test_signatures(benchmark, store):
    rows = np.arange(1000)
    benchmark.pedantic(signatures, (store, rows), rounds=3)
    per_thousand(benchmark, len(rows))


def test_features(benchmark, store):
    rows = np.arange(300)
    benchmark.pedantic(store_features, (store, rows), rounds=3)
    per_thousand(benchmark, len(rows))


def test_features_in_processes_against_threads(benchmark, store, monkeypatch):
    """`threads_to_processes` above 1: what `kept_rows.PROCESSES_FROM` and its processes are for."""
    rows = np.arange(2500)
    monkeypatch.setattr(kept_rows, "PROCESSES_FROM", 2)
    benchmark.pedantic(store_features, (store, rows), rounds=1)
    begin = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda row: ecg_features(store.read(row), store.rate_hz), rows.tolist()))
    threads = time.perf_counter() - begin
    benchmark.extra_info["threads_to_processes"] = round(threads / benchmark.stats["median"], 2)


def test_verdict_with_kept_signatures(benchmark, store, tmp_path):
    test, train = np.arange(N_TEST), np.arange(N_TEST, N_RECORDS)
    signatures(store, cache=tmp_path)
    result = benchmark.pedantic(verdict, (store, test, train, None, True), {"cache": tmp_path}, rounds=3)
    per_thousand(benchmark, N_RECORDS)
    whole = signatures(store, cache=tmp_path)
    pairs = {(a, b) for a, b, _ in near_duplicates.candidates(whole.of(test), whole.of(train), False)}
    benchmark.extra_info["pairs_kept_per_million"] = round(1e6 * len(pairs) / (len(test) * len(train)), 1)
    benchmark.extra_info["near_identical"] = result["near_identical_train_test"]
