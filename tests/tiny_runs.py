"""Tiny runs of every objective, shared by the tests that look at them. A run is made once for each process."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override
from ecg_jax.run_setup import CONFIGS, build_objective, build_teacher, initial_state
from ecg_jax.training import parallel
from ecg_jax.training.train_state import TrainState, train_step

SPECS = CONFIGS
MASKED = [name for name in SPECS if name != "cpc"]
WITH_TEACHER = ["jepa", "data2vec", "dinosr", "hubertpp"]

TOKENS = 40
TINY = {
    "model.width": "16",
    "model.state": "4",
    "model.layers": "2",
    "model.l_max": str(TOKENS),
    "data.window_s": str(2 * TOKENS / 240),
    "batch_size": "16",
    "steps": "6",
    "log_every": "1",
    "checkpoint_every": "3",
    "data.max_val_crops": "16",
}
MOMENTUM = {"objective.teacher.momentum": "0.9", "objective.teacher.momentum_end": "0.9"}
OWN = {
    "cpc": {"objective.steps_ahead": "4", "objective.negatives": "8"},
    "dinosr": {"objective.codes": "12", "objective.head_state": "8", **MOMENTUM},
    "jepa": {"objective.head_state": "8", **MOMENTUM},
    "data2vec": {"objective.head_state": "8", **MOMENTUM},
    "hubertpp": {"objective.codes": "(8,12)", "objective.temperature_steps": "4", **MOMENTUM},
    "hubert": {"objective.codes": "10", "data.targets": "spectrum10"},
}


def overrides(name, **changes):
    return TINY | OWN[name] | {field.replace("__", "."): str(value) for field, value in changes.items()}


def tiny_config(name, recipe="described", **changes):
    spec = SPECS[name]
    config = load_config(f"{spec}{',' if ':' in spec else ':'}recipe={recipe}")
    for field, value in overrides(name, **changes).items():
        override(config, field, value)
    return config


def batches(n, size=16):
    rng = np.random.default_rng(0)
    for _ in range(n):
        walk = rng.normal(scale=30, size=(size, 2 * TOKENS, 12)).cumsum(axis=1)
        yield {
            "signal": walk.astype(np.int16),
            "record_index": np.arange(size, dtype=np.int32),
            "labels": rng.integers(-1, 10, size=(size, TOKENS)).astype(np.int32),
        }


# SGD: Adam turns gradients that are zero up to rounding into full-size steps, so that two correct runs would
# differ.
SGD = optax.sgd(1e-2)


def first_state(config, teacher):
    class Contract:
        window_samples, leads = 2 * TOKENS, range(12)

    return initial_state(config, SGD, Contract, teacher)


def bound_step(config, teacher, axis_name=parallel.AXIS):
    return functools.partial(
        train_step,
        model=build_objective(config, axis_name),
        tx=SGD,
        normalisation=config.data.normalisation,
        teacher=teacher,
        axis_name=axis_name,
    )


def plain(state):
    """On the host, without the key."""
    return jax.device_get(state.replace(rng=jnp.zeros(8)))


@dataclasses.dataclass
class Run:
    """Three steps: the states before, after the first and after the last, metrics of each, and the compiled
    program.
    """

    start: TrainState
    first: TrainState
    last: TrainState
    log: list[dict]
    hlo: str


@functools.cache
def run_mapped(name, recipe, devices):
    config = small_blocks(name, recipe)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (parallel.AXIS,))
    teacher = build_teacher(config, 3)
    state = parallel.replicate(first_state(config, teacher), mesh)
    states, log, sharded = [plain(state)], [], [parallel.shard_batch(batch, mesh) for batch in batches(3)]
    step_fn = parallel.map_train_step(bound_step(config, teacher), mesh).lower(state, sharded[0]).compile()
    for batch in sharded:
        state, metrics = step_fn(state, batch)
        states.append(plain(state))
        log.append(jax.device_get(metrics))
    return Run(states[0], states[1], states[-1], log, step_fn.as_text())


def small_blocks(name, recipe):
    """The released JEPA wants 64 tokens for a block, more than a tiny window has."""
    changes = {"objective__mask__min_keep": 4} if recipe == "released" and name != "cpc" else {}
    return tiny_config(name, recipe, **changes)
