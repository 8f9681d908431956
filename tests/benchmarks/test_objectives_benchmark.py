"""Windows per second of a training step of every objective, relative to CPC, beside the ratio of their FLOPs.

    pytest tests/benchmarks/test_objectives_benchmark.py --benchmark-only -s

The objectives take turns, so that whatever slows the machine down slows all of them down, and ratios are taken within
each turn. On a CPU that others use too, the processor time of a step says more than the time that passes; there it
is what "time over FLOPs" compares. The S4 convolutions are not counted as FLOPs (see `ecg_jax.studies.flops`).

`ECG_JAX_BENCHMARK_BATCH` changes the batch (16) and `ECG_JAX_BENCHMARK_ROUNDS` the number of turns (7).
"""

import functools
import os
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override, shipped_configs
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.models.encoder import tokens_of
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.run_setup import (
    OBJECTIVES,
    build_objective,
    build_optimiser,
    build_teacher,
    initial_state,
    open_store,
)
from ecg_jax.studies.flops import training_flops
from ecg_jax.training import parallel
from ecg_jax.training.train_state import train_step

BATCH = int(os.environ.get("ECG_JAX_BENCHMARK_BATCH", "16"))
ROUNDS = int(os.environ.get("ECG_JAX_BENCHMARK_ROUNDS", "7"))
BASE = "cpc"


def configs() -> dict:
    """A config of every objective, from the files that ship."""
    files = sorted((shipped_configs() / "configs").glob("*.py"))
    specs = [f"configs/{path.name}" for path in files if path.stem not in ("__init__", "common")]
    found = {}
    for spec in [*specs, "configs/hubert.py:variant=offline"]:
        config = load_config(spec)
        if "objective" in config:
            found.setdefault(config.objective.name, config)
    assert set(found) == set(OBJECTIVES), "an objective without a config, or the other way round"
    return {BASE: found.pop(BASE), **found}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "store"
    write_synthetic_store(path, 256, distinct=32)
    return path


def training_step(config, store_path, mesh):
    """A function without arguments that makes one optimiser update and waits for it."""
    config.store = str(store_path)
    store, contract = open_store(config)
    teacher, (_, tx) = build_teacher(config, steps=1000), build_optimiser(config, steps=1000)
    step_fn = parallel.map_train_step(
        functools.partial(
            train_step,
            model=build_objective(config, parallel.AXIS),
            tx=tx,
            normalisation=config.data.normalisation,
            kept_leads=ALL_LEADS,
            teacher=teacher,
        ),
        mesh,
    )
    starts = store.column("offset")[:BATCH]
    batch = {
        "signal": store.read_crops(starts, contract.window_samples),
        "record_index": np.arange(BATCH, dtype=np.int32),
    }
    if config.objective.name == "hubert":
        shape = (BATCH, tokens_of(contract.window_samples))
        batch["labels"] = np.random.default_rng(0).integers(0, config.objective.codes, shape, np.int32)
    states = [parallel.replicate(initial_state(config, tx, contract, teacher), mesh)]
    placed = parallel.shard_batch(batch, mesh)

    def run():
        states[0], metrics = step_fn(states[0], placed)
        return jax.block_until_ready(metrics)

    return run


@pytest.mark.parametrize("width", [64, 512])
def test_training_steps_of_all_objectives(benchmark, store, width):
    mesh = Mesh(np.asarray(jax.devices()[:1]), (parallel.AXIS,))
    chosen = configs()
    for config in chosen.values():
        override(config, "model.width", str(width))
        override(config, "batch_size", str(BATCH))
    device = jax.devices()[0].device_kind
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}  # seconds of all threads

    with jax.default_matmul_precision("highest"):
        work = {name: training_step(config, store, mesh) for name, config in chosen.items()}
        for run in work.values():
            for _ in range(2):  # compiles; and the first step of HuBERT++ chooses its prototypes
                run()
        turn = 0

        def one_round():
            nonlocal turn
            names = list(work)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin, used = time.perf_counter(), time.process_time()
                work[name]()
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
                processor.setdefault(name, []).append(time.process_time() - used)
            turn += 1

        benchmark.pedantic(one_round, rounds=ROUNDS)

    told = processor if jax.default_backend() == "cpu" else seconds

    def ratio_to_base(times, name):
        return float(np.median(np.divide(times[name], times[BASE])))

    lines = [
        f"width {width}, batch {BATCH}, {device}",
        "| objective | windows/s | ms a step | processor ms | time / CPC | processor / CPC | FLOPs / CPC "
        "| time over FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, config in chosen.items():
        median = float(np.median(seconds[name]))
        flops = training_flops(config) / training_flops(chosen[BASE])
        figures = {
            "windows_per_s": BATCH / median,
            "ms": 1e3 * median,
            "processor_ms": 1e3 * float(np.median(processor[name])),
            "time_ratio": ratio_to_base(seconds, name),
            "processor_ratio": ratio_to_base(processor, name),
            "flop_ratio": flops,
            "time_over_flops": ratio_to_base(told, name) / flops,
        }
        benchmark.extra_info[name] = figures
        digits = (".3g", ".0f", ".0f", ".2f", ".2f", ".2f", ".2f")
        cells = [format(value, form) for value, form in zip(figures.values(), digits, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    benchmark.extra_info["device"] = device
    print("\n" + "\n".join(lines))
    assert all(len(times) == ROUNDS for times in seconds.values())
