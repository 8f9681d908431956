"""Tiny runs of every objective, shared by the tests that look at them. A run is made once for each process."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override, with_argument
from ecg_jax.models import hippo, s4
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives.contract import Inputs
from ecg_jax.run_setup import CONFIGS, build_objective, build_teacher, initial_state
from ecg_jax.training import parallel
from ecg_jax.training.train_state import TrainState, assemble_state, train_step

SPECS = CONFIGS
MASKED = [name for name in SPECS if name != "cpc"]
WITH_TEACHER = ["jepa", "data2vec", "dinosr", "hubertpp"]

TOKENS = 40
TINY = {
    "model.width": "16",
    "model.l_max": str(TOKENS),
    "data.window_s": str(2 * TOKENS / 240),
    "batch_size": "16",
    "steps": "6",
    "log_every": "1",
    "checkpoint_every": "3",
    "data.max_val_crops": "16",
}
#: Of each backbone. Net1D has one block that is narrower than its tokens.
BACKBONES = {
    "s4": {"model.state": "4", "model.layers": "2"},
    "transformer": {"model.layers": "2", "model.heads": "2", "model.ff_width": "32"},
    "net1d": {
        "model.filters": "(8,16,16)",
        "model.blocks": "(1,1,1)",
        "model.kernel": "4",
        "model.group_width": "4",
    },
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


def overrides(name, backbone="s4", **changes):
    changed = {field.replace("__", "."): str(value) for field, value in changes.items()}
    return TINY | BACKBONES[backbone] | OWN[name] | changed


def spec_of(name, recipe="described", backbone="s4"):
    """The shipped config of an objective with its arguments."""
    return with_argument(SPECS[name], recipe=recipe, backbone=backbone)


def tiny_config(name, recipe="described", backbone="s4", **changes):
    config = load_config(spec_of(name, recipe, backbone))
    for field, value in overrides(name, backbone, **changes).items():
        override(config, field, value)
    return config


def batches(n, size=16):
    # With seed 0 a unit of the stem comes so close to zero in CPC's second step that the order of a sum decides on
    # which side of its ReLU it lies; one device and eight then rightly go different ways.
    rng = np.random.default_rng(1)
    for _ in range(n):
        walk = rng.normal(scale=30, size=(size, 2 * TOKENS, 12)).cumsum(axis=1)
        yield {
            "signal": walk.astype(np.int16),
            "record_index": np.arange(size, dtype=np.int32),
            "labels": rng.integers(-1, 10, size=(size, TOKENS)).astype(np.int32),
        }


# SGD: Adam turns gradients that are zero up to rounding into full-size steps, so that two correct runs would
# differ. Without momentum its trace is the gradient of the last step, which tests read.
SGD = optax.sgd(1e-2, momentum=0.0)


def first_state(config, teacher, tx=SGD):
    class Contract:
        window_samples, leads = 2 * TOKENS, range(12)

    return initial_state(config, tx, Contract, teacher)


def drawn_state(config, teacher):
    """A state with the shapes of `first_state` and other values, drawn without compiling anything."""
    model, rng = build_objective(config, None), np.random.default_rng(1)
    x = jnp.zeros((2, 2 * TOKENS, 12))

    def features():
        return model.encoder.init_with_output(jax.random.key(0), x, train=False)[0]

    def init():
        tokens, out = features()
        inputs = Inputs(
            x=x, record_index=jnp.arange(2), step=jnp.zeros((), jnp.int32), teacher={"tokens": tokens, **out}
        )
        keys = {name: jax.random.key(0) for name in ("params", "objective")}
        return model.init(keys, inputs, train=False)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("Lambda", "P", "B"):  # one state matrix for every channel
            value = dict(zip(("Lambda", "P", "B"), hippo.dplr_hippo(2 * leaf.shape[1]), strict=True))[name]
            return np.tile(np.stack([value.real, value.imag], -1), (leaf.shape[0], 1, 1)).astype(np.float32)
        if name == "log_dt":
            return rng.uniform(np.log(s4.DT_MIN), np.log(s4.DT_MAX), leaf.shape).astype(np.float32)
        if name in ("scale", "var", "code_count"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 4.0
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    variables = jax.tree.map_with_path(draw, jax.eval_shape(init))
    student = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
    return assemble_state(
        variables,
        SGD.init(variables["params"]),
        teacher.initial(student, student) if teacher else {},
        rng=jax.random.key(0),
        tokens=TOKENS,
        l_max=config.model.l_max,
    )


def bound_step(config, teacher, axis_name=parallel.AXIS, tx=SGD):
    return functools.partial(
        train_step,
        model=build_objective(config, axis_name),
        tx=tx,
        normalisation=config.data.normalisation,
        kept_leads=ALL_LEADS,
        teacher=teacher,
        accumulate=config.accumulate,
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
    teacher = build_teacher(config, 3)
    return run_steps(config, teacher, first_state(config, teacher), devices)


def run_steps(config, teacher, state, devices, steps=3):
    """The mapped step on the first `devices` devices."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (parallel.AXIS,))
    state = parallel.replicate(state, mesh)
    states, log = [plain(state)], []
    sharded = [parallel.shard_batch(batch, mesh) for batch in batches(steps)]
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
