"""bfloat16: near float32 on real ECG, and narrow where it should be.

Parameters, norms, softmax, S4 kernels and states, and the loss are float32; products with tokens are bfloat16.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.config_flags import override
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.store import Store
from ecg_jax.prepare import prepare
from ecg_jax.quickstart import SAMPLE
from ecg_jax.run_setup import build_optimiser, build_teacher
from tiny_runs import SPECS, TOKENS, batches, bound_step, first_state, tiny_config

BATCH, WIDTH = 16, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("precision") / "store"
    prepare("ptbxl", SAMPLE, path)
    return Store(path)


def config_of(name, precision, **changes):
    config = tiny_config(name, **changes)
    override(config, "precision", precision)
    return config


def losses_of(name, precision, store, steps, **changes):
    """Losses of a run with AdamW on real crops."""
    config = config_of(name, precision, **changes)
    teacher = build_teacher(config, steps)
    _, tx = build_optimiser(config, steps)
    state = first_state(config, teacher, tx)
    step_fn = jax.jit(bound_step(config, teacher, axis_name=None, tx=tx))
    reader = train_batches(store, np.arange(len(store)), batch_size=BATCH, window_samples=2 * TOKENS, seed=0)
    losses = []
    for _ in range(steps):
        batch = next(reader)
        state, metrics = step_fn(state, {key: batch[key] for key in ("signal", "record_index")})
        losses.append(metrics["loss"])
    reader.close()
    return np.array(jax.device_get(losses))


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("cpc", "s4"), ("data2vec", "s4"), ("cpc", "transformer"), ("cpc", "net1d")],
)
def test_losses_stay_near_float32_for_hundreds_of_steps(name, backbone, store):
    """Over 200 steps of AdamW the mean loss of every 50 differs by less than 2 %."""
    wide, narrow = (
        losses_of(name, precision, store, 200, backbone=backbone, optimiser__learning_rate=1e-3)
        for precision in ("float32", "bfloat16")
    )
    assert not np.array_equal(wide, narrow)
    wide, narrow = (losses.reshape(4, 50).mean(axis=1) for losses in (wide, narrow))
    np.testing.assert_allclose(narrow, wide, rtol=0.02)


def dots(jaxpr):
    """All matrix products of a program, those of programs within it included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


@pytest.mark.parametrize(
    ("name", "backbone", "conv"),
    [
        *((name, "s4", "chunked:32") for name in SPECS),
        ("cpc", "s4", "toeplitz"),
        *(("jepa", backbone, "toeplitz") for backbone in ("s4", "transformer", "net1d")),
    ],
)
def test_no_product_with_tokens_is_wide_by_accident(name, backbone, conv):
    """In encoder and head every product whose operand has about as many numbers as a batch of tokens takes bfloat16
    operands, in the backward pass too. Attention weights are float32, like every softmax, and so are S4 kernels.
    """
    kernels = ("chn,hnl->chl", "chn,hnt->cht")  # K from C and its basis
    projections = [f"attention/{part}" for part in ("query", "key", "value", "output")]
    config = config_of(name, "bfloat16", backbone=backbone, model__conv=conv)
    teacher = build_teacher(config, 3)
    state, (batch,) = first_state(config, teacher), batches(1)
    program = jax.make_jaxpr(bound_step(config, teacher, axis_name=None))(state, batch)
    found = list(dots(program.jaxpr))
    assert len(found) > 20
    inside = [
        equation
        for equation in found
        if any(part in str(equation.source_info.name_stack) for part in ("encoder", "Encoder", "head"))
    ]
    assert len(inside) > 20
    projected = 0
    for equation in inside:
        stack = str(equation.source_info.name_stack)
        projection = any(part in stack for part in projections)
        if any(part in stack for part in kernels) or ("attention" in stack and not projection):
            continue
        projected += projection
        for operand in equation.invars[:2]:
            if math.prod(operand.aval.shape) >= BATCH * TOKENS * WIDTH / 2 and "attention" not in stack:
                assert operand.aval.dtype == jnp.bfloat16, f"{stack}: {[v.aval for v in equation.invars]}"

    assert bool(projected) == (backbone == "transformer")


def test_parameters_statistics_and_optimiser_stay_float32():
    config = config_of("jepa", "bfloat16")
    teacher = build_teacher(config, 3)
    state, (batch,) = first_state(config, teacher), batches(1)
    after, metrics = jax.eval_shape(bound_step(config, teacher, axis_name=None), state, batch)
    for tree in (after.params, after.batch_stats, after.opt_state, after.teacher, metrics):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert kinds <= {jnp.dtype("float32")}
