"""The formulas of FLOPs against published figures and against the matrix products that a step really makes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.models.encoder import tokens_of
from ecg_jax.run_setup import OBJECTIVES, build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.studies import flops
from ecg_jax.training.train_state import train_step

CONFIGS = {
    "cpc": ("configs/cpc.py", {}),
    "jepa": ("configs/jepa.py", {}),
    "data2vec": ("configs/data2vec.py", {}),
    "dinosr": ("configs/dinosr.py", {"objective.idle_logits": 5}),
    "hubertpp": ("configs/hubert.py", {}),
    "hubert": ("configs/hubert.py:variant=offline", {}),
}


def test_every_objective_is_counted():
    assert set(OBJECTIVES) <= set(CONFIGS)


def test_published_figures():
    """arXiv 2509.25095 gives 1.741 GFLOPs for ECG-CPC at 2.5 s (spec §3, §8)."""
    assert flops.encoder(L=300, C=12, D=512, layers=4) == 1_741_209_600
    assert flops.stem(L=300, C=12, D=512) == 482_918_400
    assert flops.linear_head(L=300, D=512) == 157_286_400
    assert flops.s4_head(L=300, D=512, out=512) == 471_859_200
    assert flops.tokens_of_window(2.5, 240.0) == tokens_of(600) == 300


def test_backward_pass_leaves_out_the_gradient_of_the_data():
    parts = flops.training_parts(load_config("configs/cpc.py"))
    backward = parts["stem"].backward + parts["backbone"].backward
    assert backward == 2 * 1_741_209_600 - 2 * 300 * 3 * 12 * 512  # 3.47 G, spec §3


def test_teacher_costs_a_forward_pass():
    assert flops.training_parts(load_config("configs/jepa.py"))["teacher"] == (1_741_209_600, 0)


def counted_flops(jaxpr) -> int:
    """2 for each multiply-add of the convolutions and matrix products of a program, inner programs included. Of a
    conditional the cheaper branch counts: the dearer ones are what only the first step does.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(out) * math.prod(kernel) // kernel[features]
        if equation.primitive.name == "cond":
            total += min(counted_flops(branch.jaxpr) for branch in equation.params["branches"])
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += counted_flops(inner)
    return total


@pytest.mark.parametrize("name", OBJECTIVES)
def test_formulas_agree_with_the_program(name):
    """A step on one window more makes just the products that the formulas count: nothing is computed that no
    loss uses. (What does not depend on the batch, the generation of S4 kernels, drops out of the difference.)
    """
    spec, overrides = CONFIGS[name]
    config = load_config(spec)
    small = {"model.width": 16, "model.layers": 3, "model.l_max": 60, "data.window_s": 0.5}
    for field, value in (small | overrides).items():
        override(config, field, str(value))
    samples = round(config.data.window_s * config.data.rate_hz)
    contract = Preprocessing(window_s=config.data.window_s)
    teacher, (_, tx) = build_teacher(config, steps=2), build_optimiser(config, steps=2)
    state = initial_state(config, tx, contract, teacher)
    step = functools.partial(
        train_step,
        model=build_objective(config, None),
        tx=tx,
        normalisation=config.data.normalisation,
        teacher=teacher,
        axis_name=None,
    )

    def count(windows: int) -> int:
        batch = {
            "signal": jnp.zeros((windows, samples, 12), jnp.int16),
            "record_index": jnp.arange(windows),
            "labels": jnp.asarray(np.zeros((windows, tokens_of(samples)), np.int32)),
        }
        return counted_flops(jax.make_jaxpr(step)(state, batch).jaxpr)

    assert count(9) - count(8) == flops.training_flops(config)
