"""Windows per second of a CPC training step, and where its time goes.

    pytest tests/benchmarks/test_training_benchmark.py --benchmark-only

`ECG_JAX_BENCHMARK_WIDTH` and `ECG_JAX_BENCHMARK_BATCH` change the model's width (512) and the batch (64).
"""

import functools
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.models.inputs import ALL_LEADS, to_model_input
from ecg_jax.objectives.contract import Inputs
from ecg_jax.run_setup import build_objective, build_optimiser, initial_state, open_store
from ecg_jax.training import parallel
from ecg_jax.training.train_state import train_step

WIDTH = int(os.environ.get("ECG_JAX_BENCHMARK_WIDTH", "512"))
BATCH = int(os.environ.get("ECG_JAX_BENCHMARK_BATCH", "64"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Config, store, placed state, and one batch on one device."""
    path = tmp_path_factory.mktemp("benchmark") / "store"
    write_synthetic_store(path, 1024, distinct=32)
    config = load_config("configs/cpc.py")
    for name, value in {"store": path, "model.width": WIDTH, "batch_size": BATCH}.items():
        override(config, name, str(value))
    store, contract = open_store(config)
    mesh = Mesh(np.asarray(jax.devices()[:1]), (parallel.AXIS,))
    _, tx = build_optimiser(config, steps=1)
    state = parallel.replicate(initial_state(config, tx, contract, teacher=None), mesh)
    batches = train_batches(
        store, np.arange(len(store)), batch_size=BATCH, window_samples=contract.window_samples, seed=0
    )
    batch = parallel.shard_batch(device_part(next(batches)), mesh)
    batches.close()
    return config, store, contract, mesh, tx, state, batch


def device_part(batch):
    return {name: batch[name] for name in ("signal", "record_index")}


def step_of(config, tx, mesh):
    bound = {
        "model": build_objective(config, parallel.AXIS),
        "normalisation": "none",
        "kept_leads": ALL_LEADS,
    }
    return parallel.map_train_step(functools.partial(train_step, tx=tx, **bound), mesh)


def forward(model, normalisation, state, batch, params):
    (losses, _), _ = model.apply(
        {**state.variables(), "params": params},
        Inputs(
            x=to_model_input(batch["signal"], normalisation, ALL_LEADS),
            record_index=batch["record_index"],
            step=state.step,
        ),
        train=True,
        rngs={"objective": state.rng, "dropout": state.rng},
        mutable=["batch_stats"],
    )
    return losses["contrastive_loss"][0].mean()


@pytest.mark.parametrize("part", ["data", "forward", "forward_backward", "step"])
def test_parts_of_a_step(benchmark, setup, part):
    config, store, contract, mesh, tx, state, batch = setup
    if part == "data":
        batches = train_batches(
            store, np.arange(len(store)), batch_size=BATCH, window_samples=contract.window_samples, seed=0
        )

        def run():
            return parallel.shard_batch(device_part(next(batches)), mesh)
    elif part == "step":
        step_fn = step_of(config, tx, mesh)
        states = [jax.tree.map(lambda leaf: leaf.copy(), state)]  # the step donates its state

        def run():
            states[0], metrics = step_fn(states[0], batch)
            return metrics
    else:
        loss = functools.partial(forward, build_objective(config, None), "none", state, batch)
        compute = jax.jit(loss if part == "forward" else jax.value_and_grad(loss))

        def run():
            return compute(state.params)

    benchmark.pedantic(lambda: jax.block_until_ready(run()), rounds=5, warmup_rounds=1)
    if part == "data":
        batches.close()
    benchmark.extra_info["windows_per_s"] = BATCH / benchmark.stats["median"]
    benchmark.extra_info["device"] = jax.devices()[0].device_kind


def test_training_loop_waits_little_for_data(benchmark, setup):
    """The loop as `pretrain` runs it: the next batch is read while the device computes."""
    config, store, contract, mesh, tx, state, _ = setup
    step_fn = step_of(config, tx, mesh)
    batches = train_batches(
        store, np.arange(len(store)), batch_size=BATCH, window_samples=contract.window_samples, seed=0
    )
    states = [jax.tree.map(lambda leaf: leaf.copy(), state)]
    waited = []

    def run():
        import time

        for _ in range(3):
            begin = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - begin)
            states[0], metrics = step_fn(states[0], parallel.shard_batch(device_part(batch), mesh))
        jax.block_until_ready(metrics)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    per_step = benchmark.stats["median"] / 3
    benchmark.extra_info["windows_per_s"] = BATCH / per_step
    benchmark.extra_info["data_wait"] = float(np.median(waited)) / per_step
