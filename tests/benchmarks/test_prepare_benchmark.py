"""Recordings per second of `ecg-jax prepare`, with its parts; what shards and many records cost.

    pytest tests/benchmarks/test_prepare_benchmark.py --benchmark-only

Made 10 s recordings at 500 Hz as WFDB .dat, page cache warm.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ecg_files import write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.store import PARTIAL, checksum
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.data.unit_files import chunk_path, sidecar_path
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


def test_shards_against_one_call(benchmark, source, tmp_path):
    """What four shards, one after the other, and a merge take over one call: listing the source again, mostly."""
    number = itertools.count()

    def call(**options):
        prepare("wfdb", source, workers=1, progress=False, **options)

    def in_shards():
        store = tmp_path / str(next(number))
        for index in range(4):
            call(store=store, shard=f"{index}/4")
        call(store=store, merge=True)

    benchmark.pedantic(in_shards, rounds=3)
    started = time.perf_counter()
    for _ in range(3):
        call(store=tmp_path / str(next(number)))
    one_call = (time.perf_counter() - started) / 3
    benchmark.extra_info["times_one_call"] = round(benchmark.stats["mean"] / one_call, 2)


def write_units(store: Path, n_units: int, per_unit: int = 4096) -> None:
    """Finished units of records of two samples, with the columns and one problem each that those of HEEDB have."""
    (store / PARTIAL).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for unit in range(n_units):
        signals = rng.integers(-3000, 3000, (per_unit, 2, 12)).astype("<i2")
        rows = [
            {
                "record_id": f"S0001_{unit * per_unit + i:08d}",
                "patient_id": f"p{(unit * per_unit + i) // 4:08d}",
                "corpus": "made",
                "fold": i % 10 + 1,
                "offset": 2 * i,
                "length": 2,
                "checksum": checksum(signals[i]),
                "source_file": f"WFDB/S0001/1987/{unit:04d}/de_{i:012d}.hea",
                "source_rate": 500.0,
                "age": float(i % 90),
                "sex": "FM"[i % 2],
                "missing_leads": 0,
                "saturated": 0,
                "flags": ["short"],
                "labels_dx": ["426783006", str(164889003 + i % 20)],
            }
            for i in range(per_unit)
        ]
        problems = [
            {"record": row["record_id"], "kind": "short", "action": "kept", "detail": "2 samples."}
            for row in rows
        ]
        chunk_path(store, unit).parent.mkdir(parents=True)
        chunk_path(store, unit).write_bytes(signals.tobytes())
        sidecar = {"samples": 2 * per_unit, "rows": rows, "problems": problems}
        sidecar_path(store, unit).write_text(json.dumps(sidecar))


FINALISE = """
import resource, sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.writer import finalise
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
finalise(
    Path(sys.argv[1]), n_units=int(sys.argv[2]), preprocessing=Preprocessing(), attributes={"corpus": "made"},
    label_sets=("dx",), classes=None, descriptions={}, first_problems=[], drop_duplicates=False, strict=False,
)
print((peak() - before) / 1024)
"""


def test_memory_of_finalise(benchmark, tmp_path):
    """Peak memory over the number of records, the mapped file of their rows included, and time per million."""
    peaks = {}

    def finalise(n_units):
        store = tmp_path / str(n_units)
        command = [sys.executable, "-c", FINALISE, str(store), str(n_units)]
        peaks[n_units] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    for n_units in (16, 64):
        write_units(tmp_path / str(n_units), n_units)
    finalise(16)
    benchmark.pedantic(finalise, args=(64,), rounds=1)
    benchmark.extra_info["seconds_per_million"] = round(benchmark.stats["mean"] / (64 * 4096) * 1e6, 1)
    benchmark.extra_info["peak_mb"] = {units * 4096: round(peak) for units, peak in peaks.items()}
    benchmark.extra_info["peak_mb_per_million"] = round((peaks[64] - peaks[16]) / (48 * 4096) * 1e6)
