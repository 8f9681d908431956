"""The formulas of FLOPs against published figures and against the matrix products that a step really makes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.config_flags import load_config, override, with_argument
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.models.encoder import BACKBONES, tokens_of
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.run_setup import OBJECTIVES, build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.studies import flops, published_costs
from ecg_jax.studies.efficiency_programs import encoder_parameters
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
    s4, transformer, net1d = (load_config(f"configs/jepa.py:backbone={name}").model for name in BACKBONES)
    assert flops.encoder(300, 12, s4) == 1_741_209_600
    assert (
        flops.encoder(300, 12, transformer) == 482_918_400 + 12_430_540_800
    )  # 12.43 and 12.91 G, spec §4.1, §8
    assert flops.encoder(300, 12, net1d) == 482_918_400 + 4_256_776_192  # 4.26 and 4.74 G, spec §4.2, §8
    assert flops.stem(L=300, C=12, D=512) == 482_918_400
    assert flops.linear_head(L=300, D=512) == 157_286_400
    assert flops.s4_head(L=300, D=512, out=512) == 471_859_200
    assert flops.tokens_of_window(2.5, 240.0) == tokens_of(600) == 300


def test_every_published_figure_is_reproduced():
    """Of arXiv 2605.12241, to its digits; the parameters are counted in the models themselves (spec §2-§4)."""
    parameters = {name: encoder_parameters(published_costs.shipped_config(name)) for name in BACKBONES}
    assert parameters == {"s4": 2_932_736, "transformer": 808_960 + 18_915_328, "net1d": 808_960 + 9_678_464}
    rows = {(row.backbone, row.quantity): row for row in published_costs.compare(parameters)}
    assert len(rows) == 9
    assert all(row.reproduced for row in rows.values())
    assert rows["s4", "forward"].ratio == pytest.approx(1, abs=1e-3)
    assert rows["transformer", "forward"].ratio == pytest.approx(27.4 / 12.9134592)
    assert rows["net1d", "backward"].digits == "73.8"
    # Unused norms of the reference's Net1D, spec §4.2, and a stem with one 1x1 convolution and its norm.
    assert published_costs.counted_parameters("net1d", parameters["net1d"]) == (
        9_678_464 + 36_864 + (12 * 3 * 512 + 1024) + (512 * 512 + 1024)
    )


def test_grouped_weights_counted_as_dense_by_hand():
    """Two blocks of 8 channels in groups of 2, kernel 3, 5 tokens: 2 * 5 * 3 * (8 * 8 - 8 * 2) each."""
    model = load_config("configs/jepa.py:backbone=net1d").model
    small = model.copy_and_resolve_references().unlock()
    small.update({"filters": (8,), "blocks": (2,), "kernel": 3, "group_width": 2})
    assert published_costs.as_if_dense(5, small) == 2 * (2 * 5 * 3 * (64 - 16))


@pytest.mark.parametrize(
    ("tokens", "products", "forward"),
    [(300, 3, "12.9"), (600, 3, "28.0"), (600, 0, "27.1"), (600, 1, "27.4")],
)
def test_other_readings_give_other_figures(tokens, products, forward):
    """The published 27.4 of the Transformer is neither our stem nor none: it tells the readings apart."""
    model = load_config("configs/jepa.py:backbone=transformer").model
    total = flops.first_convolution(tokens, 12, 512) + products * flops.product(tokens, 512, 512)
    assert f"{(total + flops.backbone(tokens, model)) / 1e9:.1f}" == forward


def test_a_transformer_layer_by_hand():
    """L = 3, D = 4, F = 5: four projections of 2 * 3 * 16, two products of 2 * 3 * 3 * 4, two linears of
    2 * 3 * 4 * 5.
    """
    assert flops.transformer(L=3, D=4, layers=2, ff_width=5) == 2 * (4 * 96 + 2 * 72 + 2 * 120)


def test_net1d_by_hand():
    """L = 3, D = 4, one block 2 -> 2 and one 2 -> 6, kernel 5, groups of 2."""
    fields = {"L": 3, "D": 4, "filters": (2, 6), "blocks": (1, 1), "kernel": 5, "group_width": 2}
    first = 2 * 3 * (5 * 4) * 2
    convolutions = 2 * 3 * (2 * 2 + 2 * 5 * 2 + 2 * 2) + 2 * 3 * (2 * 6 + 2 * 5 * 6 + 6 * 6)
    squeeze_excite = 2 * 2 * (2 * 1) + 2 * 2 * (6 * 3)
    assert flops.net1d(**fields, squeeze_excite=False) == first + convolutions
    assert flops.net1d(**fields, squeeze_excite=True) == first + convolutions + squeeze_excite


def test_unknown_backbone_has_no_formula():
    config = load_config("configs/jepa.py").copy_and_resolve_references()
    config.unlock().model.backbone = "mamba"
    with pytest.raises(ValueError, match="'mamba'; known: s4, transformer, net1d"):
        flops.training_flops(config)


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


SMALL = {
    "s4": {"model.layers": 3},
    "transformer": {"model.layers": 3, "model.heads": 2, "model.ff_width": 24},
    "net1d": {"model.filters": (8, 16), "model.blocks": (1, 2), "model.kernel": 4, "model.group_width": 4},
}


@pytest.mark.parametrize(
    ("name", "backbone"),
    [(name, "s4") for name in OBJECTIVES]
    + [(name, backbone) for name in ("cpc", "jepa") for backbone in ("transformer", "net1d")],
)
def test_formulas_agree_with_the_program(name, backbone):
    """A step on one window more makes just the products that the formulas count: nothing is computed that no
    loss uses. (What does not depend on the batch, the generation of S4 kernels, drops out of the difference.)
    """
    spec, overrides = CONFIGS[name]
    config = load_config(with_argument(spec, backbone=backbone))
    # The other algorithms of the S4 convolution make products of their own.
    small = {"model.width": 16, "model.conv": "fft", "model.l_max": 60, "data.window_s": 0.5}
    for field, value in (small | SMALL[backbone] | overrides).items():
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
        kept_leads=ALL_LEADS,
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

    expected = flops.training_flops(config)
    if (
        backbone == "net1d"
    ):  # whose grouped convolutions are matrix products of twice their size (models/net1d.py)
        passes = 3 + ("teacher" in config.objective)
        expected += passes * (8 + 16 + 16) * flops.product(tokens_of(samples), 4 * 4, 1)
    assert count(9) - count(8) == expected
