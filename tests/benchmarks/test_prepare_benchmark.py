"""Recordings per second of `ecg-jax prepare`, with its parts.

    pytest tests/benchmarks/test_prepare_benchmark.py --benchmark-only

Made 10 s recordings at 500 Hz as WFDB .dat, page cache warm.
"""

import itertools
import os

import pytest

from ecg_files import write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.prepare import prepare

N_RECORDS = 600
CPUS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    made = [synthetic_recording(0, i)[0].signal for i in range(20)]
    for i in range(N_RECORDS):
        write_record(folder, f"r{i:04d}", made[i % 20] + i * 1e-3)
    return folder


def note(benchmark, n):
    benchmark.extra_info["recordings_per_second"] = round(n / benchmark.stats["median"])


def test_read(benchmark, source):
    paths = sorted(source.glob("*.hea"))[:100]
    benchmark.pedantic(lambda: [read_wfdb(path, "r") for path in paths], rounds=5, warmup_rounds=1)
    note(benchmark, len(paths))


def test_apply(benchmark, source):
    recordings = [read_wfdb(path, "r") for path in sorted(source.glob("*.hea"))[:100]]
    preprocessing = Preprocessing()
    benchmark.pedantic(lambda: [preprocessing.apply(r) for r in recordings], rounds=5, warmup_rounds=1)
    note(benchmark, len(recordings))


@pytest.mark.parametrize("workers", sorted({1, CPUS}))
def test_prepare(benchmark, source, tmp_path, workers):
    number = itertools.count()
    benchmark.pedantic(
        lambda: prepare("wfdb", source, tmp_path / str(next(number)), workers=workers, progress=False),
        rounds=3,
    )
    note(benchmark, N_RECORDS)
