"""What eleven million records cost: opening, selecting, first batch, resuming, reading, memory.

    pytest tests/benchmarks/test_scale_benchmark.py --benchmark-only -s

The store is that of `tests/sparse_store.py`: a real table of 11 million records over chunk files that are holes, 634 GB
that take no disk. So these numbers are of everything but the disk: what a disk adds is the same for any store that does
not fit into memory. `ECG_JAX_BENCHMARK_RECORDS` makes it smaller.

Opening is measured in a process of its own, with the peak of its memory. Reading compares the large store with a small
one in turns: the same number of crops, and where pages are in memory the same number of pages.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

from ecg_jax.data import chunk_files
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.store import Store
from sparse_store import write_sparse_store

RECORDS = int(os.environ.get("ECG_JAX_BENCHMARK_RECORDS", "11000000"))
SMALL, WINDOW, BATCH, BATCHES, TURNS = 4096, 600, 256, 16, 15

# Peak memory is what the process has reached so far; getrusage would give that of the process that started it.
PROGRAM = """
import json, pathlib, sys, time
marks, started, processor = {}, time.perf_counter(), time.process_time()
def mark(name):
    global started, processor
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    marks[name] = {
        "seconds": time.perf_counter() - started,
        "processor_s": time.process_time() - processor,
        "peak_GiB": int(status["VmHWM"].split()[0]) / 2**20,
    }
    started, processor = time.perf_counter(), time.process_time()

from ecg_jax.data.store import Store
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.selection import select_records
import grain, pyarrow.parquet
mark("import")
store = Store(sys.argv[1])
mark("open")
for ladder, rung in (("nested", "11m"), ("nested", "753k"), ("paper", "753k")):
    chosen = select_records(store, window_samples=600, val_folds=1, ladder=ladder, rung=rung)
    mark(f"select {rung}, {ladder}")
    if ladder == "nested" and rung == "11m":
        everything = chosen
fingerprint = everything.fingerprint
mark("fingerprint of the selection")
for step in (0, 1_000_000):
    batches = train_batches(store, everything.train, batch_size=256, window_samples=600, seed=0, start_step=step)
    next(batches)
    mark(f"first batch, from step {step}")
    batches.close()
print(json.dumps(marks))
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    large = write_sparse_store(folder / "large", RECORDS)
    # Of which a turn reads one record in 16, so that crops seldom share a page, as in the large one.
    medium = write_sparse_store(folder / "medium", 16 * SMALL)
    return Store(large), Store(write_sparse_store(folder / "small", SMALL)), Store(medium)


def test_opening(benchmark, stores):
    """Seconds of each step and peak memory after it, in a fresh process; medians."""
    large = stores[0]
    runs = []

    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(large.path)], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=3)
    print(
        f"\n{RECORDS} records, {len(large.chunk_files.occupied)} chunk files, load {os.getloadavg()[0]:.0f}"
    )
    for name in runs[0]:
        found = {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]}
        print(
            f"{name:<32}{found['seconds']:6.2f} s   processor {found['processor_s']:5.2f} s   "
            f"peak {found['peak_GiB']:.2f} GiB"
        )
        benchmark.extra_info[name] = found


def forget(store):
    """Takes the pages of a store out of the page cache."""
    for chunk in store.chunk_files.occupied:
        fd = os.open(store.chunk_files.path(chunk), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def in_turns(programs, prepare):
    """Median seconds of each program: wall, and processor with the kernel's part, which others disturb less."""
    found = {name: [] for name in programs}
    for _ in range(TURNS):
        for name, program in programs.items():
            prepare[name]()
            wall, processor = time.perf_counter(), time.process_time()
            program()
            found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: np.median(np.array(times), axis=0) for name, times in found.items()}


def test_reading(benchmark, stores, monkeypatch):
    """Random crops a second, a plain loop and through Grain."""
    large, small, medium = stores
    rng = np.random.default_rng(0)
    out = np.empty((BATCH, WINDOW, 12), np.int16)
    choices = 2400 - WINDOW + 1

    def loop(store, rows):
        offsets = store.column("offset")[rows]

        def run():
            for first in range(0, len(rows), BATCH):
                starts = offsets[first : first + BATCH] + rng.integers(choices, size=BATCH)
                store.read_crops(starts, WINDOW, out)

        return run

    def anew(store):
        """New rows in every turn, whose pages nobody has read."""
        offsets = store.column("offset")

        def run():
            for _ in range(BATCHES):
                rows = rng.integers(len(offsets), size=BATCH)
                store.read_crops(offsets[rows] + rng.integers(choices, size=BATCH), WINDOW, out)

        return run

    def grain(store, rows):
        def run():
            batches = train_batches(store, rows, batch_size=BATCH, window_samples=WINDOW, seed=0)
            started = time.perf_counter(), time.process_time()
            for _ in range(BATCHES):
                next(batches)
            grain_seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            batches.close()

        return run

    spread = np.sort(rng.choice(len(large), SMALL, replace=False))
    grain_seconds = []
    few = Store(large.path)

    def with_few_descriptors(program):
        def run():
            monkeypatch.setattr(chunk_files, "MAX_OPEN_CHUNKS", 512)
            program()

        return run

    def nothing():
        monkeypatch.undo()

    programs = {
        "small, in memory": loop(small, np.arange(SMALL)),
        "large, in memory": loop(large, spread),
        "large, in memory, 512 descriptors": with_few_descriptors(loop(few, spread)),
        "medium, pages forgotten": anew(medium),
        "large, pages never read": anew(large),
    }
    prepare = {name: nothing for name in programs}
    prepare["medium, pages forgotten"] = lambda: (monkeypatch.undo(), forget(medium))
    for store, rows in ((small, range(SMALL)), (large, spread.tolist())):
        for row in rows:
            store.read(row)
    with_few_descriptors(programs["large, in memory, 512 descriptors"])()
    result = benchmark.pedantic(lambda: in_turns(programs, prepare), rounds=1)
    print(
        f"\nload {os.getloadavg()[0]:.0f}; crops a second of wall and processor, share of the small store's"
    )
    crops = BATCH * BATCHES
    compared = {"large, pages never read": "medium, pages forgotten"}
    for name, (wall, processor) in result.items():
        base = result[compared[name]] if name in compared else result["small, in memory"]
        shares = f"{base[0] / wall:5.2f} {base[1] / processor:5.2f}"
        print(f"{name:<36}{crops / wall:10.0f} {crops / processor:10.0f}   {shares}")
        benchmark.extra_info[name] = {"crops_per_s": crops / wall, "share": base[1] / processor}

    turns = {"small": grain(small, np.arange(SMALL)), "large": grain(large, spread)}
    rates = {name: [] for name in turns}
    for _ in range(TURNS):
        for name, run in turns.items():
            run()
            rates[name].append(crops / np.array(grain_seconds[-1]))
    for name, found in rates.items():
        wall, processor = np.median(found, axis=0)
        print(f"{'through Grain, ' + name:<36}{wall:10.0f} {processor:10.0f}")
        benchmark.extra_info[f"grain, {name}"] = {"crops_per_s": wall, "per_processor_s": processor}
