"""Whole optimisation steps of the reference (`ssl_steps_*.npz`), for the tests of the objectives with a teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conftest import assert_close, group
from ecg_jax.interop.torch_checkpoint import convert_masked, convert_teacher
from ecg_jax.models.encoder import build_encoder
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives.contract import Inputs
from ecg_jax.objectives.masking import Mask
from ecg_jax.objectives.teacher import Teacher
from ecg_jax.training import optim
from ecg_jax.training.train_state import assemble_state, train_step

#: The teacher of the released code: another random encoder in training mode that does not follow the student.
FROZEN = Teacher(
    mode="frozen_random", momentum=1.0, momentum_end=1.0, train_mode=True, batch_stats="own", steps=1
)


@dataclasses.dataclass(frozen=True)
class FixedMask:
    """A `Masking` that always draws the same masks: bool [B, L] and float [B, L]."""

    hidden: np.ndarray
    targets: np.ndarray

    def draw(self, key, record_index, *, samples, leads):
        return Mask(
            hidden=jnp.asarray(self.hidden), targets=jnp.asarray(self.targets, jnp.float32), signal=None
        )


def unpacked(bits, tokens):
    return np.unpackbits(bits, axis=-1)[..., :tokens].astype(bool)


def reference_optimiser():
    """AdamW with the released learning rates of head, backbone and stem."""
    return optim.build_optimiser(
        optax.constant_schedule(3e-3), factors={"head": 1.0, "backbone": 0.1, "stem": 0.01, "ssm": 0.0},
        weight_decay=1e-3, b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0,
    )  # fmt: skip


def run_reference_steps(golden, make_objective, *, objective_state=None):
    """Two training steps from the state stored in `golden`.

    Args:
        golden: arrays of an `ssl_steps_*` file.
        make_objective: (encoder, width, step) -> the objective with the random choices of that step.
        objective_state: the collection at the beginning; None for none.

    Returns:
        A list of (metrics, teacher features) of each step, the gradients of the first one as a tree, and the last
        state.
    """
    sd = group(golden, "sd/")
    variables = jax.tree.map(jnp.asarray, convert_masked(sd))
    if objective_state is not None:
        variables["objective_state"] = jax.tree.map(jnp.asarray, objective_state)
    width, tokens = variables["params"]["mask_token"].shape[0], golden["in/x"].shape[-1] // 2
    half = variables["params"]["encoder"]["backbone"]["layer0"]["C"].shape[2]
    encoder = build_encoder(
        backbone="s4", width=width, state=2 * half, layers=4,
        l_max=tokens, bidirectional=True, trainable_ssm=False, dropout=0.0,
    )  # fmt: skip
    tx = reference_optimiser()
    teacher = jax.tree.map(jnp.asarray, convert_teacher(sd))
    state = assemble_state(
        variables, tx.init(variables["params"]), teacher, rng=jax.random.key(0), tokens=tokens, l_max=tokens
    )
    results, gradients = [], None
    for step in range(2):
        x = jnp.asarray(np.swapaxes(golden["in/x"][step], 1, 2))
        model = make_objective(encoder, width, step)
        features, _ = FROZEN.features(
            encoder,
            state.teacher_variables(),
            x,
            jnp.arange(len(x)),
            dropout_key=jax.random.key(0),
        )
        if step == 0:
            gradients = jax.jit(functools.partial(_gradients, model))(state, x, features)
        batch = {"signal": 1e3 * x, "record_index": jnp.arange(len(x))}
        step_fn = functools.partial(
            train_step,
            model=model,
            tx=tx,
            normalisation="none",
            kept_leads=ALL_LEADS,
            teacher=FROZEN,
            axis_name=None,
        )
        state, metrics = jax.jit(step_fn)(state, batch)
        results.append((metrics, features))
    return results, gradients, state


def _gradients(model, state, x, features):
    inputs = Inputs(x=x, record_index=jnp.arange(len(x)), step=state.step, teacher=features)

    def loss(params):
        (losses, _), _ = model.apply(
            {**state.variables(), "params": params},
            inputs,
            train=True,
            rngs={"objective": jax.random.key(0), "dropout": jax.random.key(0)},
            mutable=["batch_stats", "objective_state"],
        )
        return sum((v * w).sum() / jnp.maximum(w.sum(), 1e-30) for v, w in losses.values())

    return jax.grad(loss)(state.params)


def assert_gradients(golden, gradients, tolerance=5e-5):
    """Gradients of every parameter in `grad_step0/`, each array on its own."""
    zeros = {name: np.zeros_like(value) for name, value in group(golden, "sd/").items()}
    expected = convert_masked(
        group(golden, "sd/")
        | {n: zeros[n] for n in zeros if n.startswith("ts_encoder.")}
        | group(golden, "grad_step0/")
    )["params"]
    _assert_trees(gradients, expected, tolerance, "gradient of ")


def assert_after(golden, state, tolerance=1e-4):
    """Parameters and running statistics of student and teacher after both steps."""
    sd = group(golden, "sd/") | group(golden, "after/")
    after = convert_masked(sd)
    for collection in ("params", "batch_stats"):
        _assert_trees(getattr(state, collection), after[collection], tolerance, f"{collection} of ")
        _assert_trees(
            state.teacher[collection],
            convert_teacher(sd)[collection],
            tolerance,
            f"teacher's {collection} of ",
        )


def _assert_trees(actual, expected, tolerance, what):
    actual = dict(jax.tree.flatten_with_path(actual)[0])
    expected = jax.tree.flatten_with_path(expected)[0]
    assert len(actual) == len(expected)
    for path, value in expected:
        assert_close(actual[path], value, tolerance, what + jax.tree_util.keystr(path))
