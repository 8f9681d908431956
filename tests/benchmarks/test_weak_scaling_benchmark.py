"""What more devices and processes cost on the same cores: windows per second of `ecg-jax pretrain`.

    pytest tests/benchmarks/test_weak_scaling_benchmark.py --benchmark-only -s

Virtual devices share the cores, so nothing gets faster: n devices with n times the batch should take n times as long.
What they take beyond that is the overhead of the parallel map (copies of the state, sums of gradients and of BatchNorm
statistics, dispatch), an upper bound of it, for every device's own thread pool contends for the same cores too.
Each figure is the median `windows_per_s` that a run logs, divided by that of one device in one process with the same
global batch, from runs that take turns.

`ECG_JAX_BENCHMARK_WIDTH`, `_BATCH` and `_TURNS` change the width (256), the windows of a device (8) and the turns (2).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.training.metric_writers import read_log

WIDTH = int(os.environ.get("ECG_JAX_BENCHMARK_WIDTH", "256"))
BATCH = int(os.environ.get("ECG_JAX_BENCHMARK_BATCH", "8"))
TURNS = int(os.environ.get("ECG_JAX_BENCHMARK_TURNS", "2"))
STEPS, WINDOW_STEPS = 20, 5
#: (devices in all, processes)
CELLS = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
LOCAL = Path(__file__).parents[2] / "launch" / "local.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "store"
    return write_synthetic_store(path, 1024, distinct=32)


def windows_per_s(workdir: Path, store: Path, devices: int, processes: int, batch: int) -> float:
    fields = {
        "store": store,
        "model.width": WIDTH,
        "batch_size": batch,
        "steps": STEPS,
        "log_every": WINDOW_STEPS,
        "checkpoint_every": 10_000,
        "monitor.task": "",
        "monitor.probe_every": 0,
        "data.max_val_crops": batch,
        "tensorboard": False,
    }
    entry = [sys.executable, "-c", "from ecg_jax.cli import entry_point; entry_point()"]
    command = [*entry, "pretrain", "--config=configs/cpc.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    if processes > 1:
        command = [sys.executable, str(LOCAL), "-n", str(processes), "--", *command]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices // processes), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    # The first interval holds the compilation's aftermath, the last one the final save.
    rates = [entry["windows_per_s"] for entry in read_log(workdir) if "windows_per_s" in entry]
    return float(np.median(rates[1:-1]))


def test_weak_scaling(benchmark, store, tmp_path):
    ratios: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS[1:]}
    rates: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS}

    def run():
        for turn in range(TURNS):
            alone = {}
            for devices, processes in CELLS:
                batch = BATCH * devices
                folder = tmp_path / f"{turn}-{devices}-{processes}"
                if batch not in alone:
                    alone[batch] = windows_per_s(folder / "alone", store, 1, 1, batch)
                rate = alone[batch]
                if (devices, processes) != (1, 1):
                    rate = windows_per_s(folder / "run", store, devices, processes, batch)
                    ratios[devices, processes].append(rate / alone[batch])
                rates[devices, processes].append(rate)

    benchmark.pedantic(run, rounds=1)
    for (devices, processes), values in rates.items():
        relative = np.median(ratios[devices, processes]) if (devices, processes) in ratios else 1.0
        line = f"{np.median(values):.1f} windows/s, {relative:.3f} of one device at the same global batch"
        benchmark.extra_info[f"{devices} devices, {processes} processes"] = line
        print(f"\n{devices} devices, {processes} processes: {line}", end="")
