import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_net1d
from ecg_jax.models.net1d import Net1D, grouped_convolution

TINY = {"width": 16, "filters": (8, 16), "blocks": (1, 1), "kernel": 4, "group_width": 4}


def random_variables(model, x):
    """Variables with the shapes of `model.init` and other values, drawn without compiling anything."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False)))


def test_parity():
    golden = load_golden("net1d_narrow")
    sd = group(golden, "sd/predictor.")
    filters, blocks = (tuple(golden[f"meta/{name}"].tolist()) for name in ("filter_list", "m_blocks_list"))
    kernel, group_width = sd["stage_list.0.block_list.0.conv2.conv.weight"].shape[:0:-1]
    model = Net1D(filters[-1], filters, blocks, kernel, group_width)
    variables = convert_net1d(sd)

    @jax.jit
    def objective(params, x):
        (y, out), captured = model.apply(
            {"params": params}, x, train=False, capture_intermediates=lambda m, _: m.name == "input"
        )
        return (y * golden["in/cotangent"]).sum(), (y, out, captured["intermediates"]["input"]["__call__"][0])

    (_, (y, out, first)), (grads, grad_x) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        variables["params"], golden["in/x"]
    )
    assert_close(y, golden["out/y"], 5e-6, "y")
    assert_close(grad_x, golden["grad/x"], 1e-5, "grad x")
    assert_close(jnp.swapaxes(first, 1, 2)[..., ::10], golden["out/first_conv"], 5e-6, "first convolution")
    last_of_stage = np.cumsum(blocks) - 1
    for s, i in enumerate(last_of_stage):
        actual = jnp.swapaxes(out[f"block{i}"], 1, 2)[..., ::10]
        assert_close(actual, golden[f"out/stage{s}"], 5e-6, f"stage {s}")

    second_stage = f"block{blocks[0]}"
    ours = {
        "first_conv.conv.weight": grads["input"]["kernel"].transpose(2, 1, 0),
        "first_conv.conv.bias": grads["input"]["bias"],
        "stage_list.0.block_list.0.conv2.conv.weight": grads["block0"]["conv2"]["kernel"].transpose(2, 1, 0),
        "stage_list.0.block_list.0.conv2.conv.bias": grads["block0"]["conv2"]["bias"],
        "stage_list.1.block_list.0.se_fc1.weight": grads[second_stage]["gate1"]["kernel"].T,
        "stage_list.1.block_list.0.se_fc1.bias": grads[second_stage]["gate1"]["bias"],
    }
    for torch, expected in group(golden, "grad/predictor.").items():
        assert_close(ours[torch], expected, 1e-5, f"grad {torch}")


def xla_convolution(x, kernel, left):
    """XLA's grouped convolution, which `grouped_convolution` stands in for."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        [(left, kernel.shape[0] - 1 - left)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1] // kernel.shape[1],
    )


@settings(max_examples=8, deadline=None)
@given(
    length=st.integers(1, 40),
    taps=st.integers(1, 7),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 4),
    data=st.data(),
)
def test_grouped_convolution_is_a_grouped_convolution(length, taps, groups, per_group, data):
    left = data.draw(st.integers(0, taps - 1))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, length, groups * per_group)).astype(np.float32)
    kernel = rng.normal(size=(taps, per_group, groups * per_group)).astype(np.float32)
    actual = jax.jit(grouped_convolution, static_argnames="left")(x, kernel, left=left)
    assert_close(actual, xla_convolution(x, kernel, left), 2e-6)


def test_gradients_of_the_grouped_convolution():
    keys = jax.random.split(jax.random.key(0), 3)
    x, ct = (jax.random.normal(key, (2, 37, 32)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (16, 8, 32))

    @jax.jit
    def gradients(x, kernel):
        def both(form):
            return jax.grad(lambda x, kernel: (form(x, kernel) * ct).sum(), (0, 1))(x, kernel)

        return both(lambda x, k: grouped_convolution(x, k, left=7)), both(
            lambda x, k: xla_convolution(x, k, 7)
        )

    (grad_x, grad_kernel), (expected_x, expected_kernel) = gradients(x, kernel)
    assert_close(grad_x, expected_x, 5e-6, "x")
    assert_close(grad_kernel, expected_kernel, 5e-6, "kernel")


@pytest.mark.parametrize(("bidirectional", "total"), [(True, 9_678_464), (False, 7_104_960)])
def test_parameter_counts(bidirectional, total):
    """Spec §4.2; the causal form lacks what squeeze-excite has."""
    model = Net1D(bidirectional=bidirectional)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 300, 512)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total
    assert ("gate1" in shapes["params"]["block0"]) == bidirectional


def test_initial_weights_fill_the_interval_of_their_inputs():
    model = Net1D(64, (64,), (1,), 16, 16)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5, 32)), train=False))()["params"]
    inputs = {"input": 16 * 32}
    block = {"conv1": 64, "conv2": 16 * 16, "conv3": 64, "gate1": 64, "gate2": 32}
    for name, fan_in in {**inputs, **block}.items():
        leaves = params[name] if name in inputs else params["block0"][name]
        for leaf in ("kernel", "bias"):
            largest = np.abs(leaves[leaf]).max()
            assert 0.85 * fan_in**-0.5 < largest <= fan_in**-0.5, f"{name} {leaf}"


def test_the_causal_form_sees_no_later_token_and_the_released_one_does():
    def change(bidirectional):
        model = Net1D(**TINY, bidirectional=bidirectional)
        x = jax.random.normal(jax.random.key(0), (1, 24, 12))
        variables = random_variables(model, x)
        run = jax.jit(lambda x: model.apply(variables, x, train=False)[0])
        return np.abs(np.asarray(run(x) - run(x.at[:, 9].multiply(-1.0)))).max(axis=(0, 2))

    causal = change(False)
    assert causal[:9].max() == 0.0
    # The first convolution and two blocks, of 4 taps each, see 9 tokens back.
    assert causal[9:15].min() > 1e-3
    assert causal[19:].max() == 0.0
    released = change(True)
    assert released.min() > 1e-7, "the average over the window reaches every token"
    assert released[8:].max() > 1e-2


def test_intermediates_add_up():
    model = Net1D(**TINY)
    x = jax.random.normal(jax.random.key(0), (2, 24, 12))
    y, out = jax.jit(lambda v, x: model.apply(v, x, train=False))(random_variables(model, x), x)
    assert set(out) == {f"{kind}{i}" for kind in ("layer", "block") for i in range(2)}
    # 8 channels grow to 16: 4 zero channels on either side.
    grown = jnp.pad(out["block0"], ((0, 0), (0, 0), (4, 4)))
    np.testing.assert_allclose(out["block1"], grown + out["layer1"], atol=1e-6)
    np.testing.assert_array_equal(y, out["block1"])


def recomputed_loss(variables, x, mode):
    y, out = Net1D(**TINY, remat=mode).apply(variables, x, train=True)
    return jnp.square(y).sum() + jnp.square(out["layer0"]).sum()


@pytest.mark.parametrize("mode", ["block", "dots"])
def test_rematerialisation_changes_no_value_and_no_gradient(mode):
    x = jax.random.normal(jax.random.key(0), (2, 12, 12))
    variables = random_variables(Net1D(**TINY), x)
    plain, recomputed = jax.jit(
        lambda v: [jax.value_and_grad(recomputed_loss)(v, x, m) for m in ("none", mode)]
    )(variables)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), recomputed, plain)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    x = jnp.zeros((2, 12, 12))
    variables = random_variables(Net1D(**TINY), x)

    def kept(mode):
        _, pull = jax.eval_shape(lambda v: jax.vjp(lambda v: recomputed_loss(v, x, mode), v), variables)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("block") < kept("dots") < kept("none")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bfloat16_stays_close_to_float32(bidirectional):
    x = jax.random.normal(jax.random.key(0), (2, 50, 12))
    full, half = (Net1D(**TINY, bidirectional=bidirectional, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    variables = random_variables(half, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y, out = jax.jit(lambda v, x: half.apply(v, x, train=False))(variables, x)
    expected, _ = jax.jit(lambda v, x: full.apply(v, x, train=False))(variables, x)
    assert y.dtype == jnp.bfloat16
    assert out["block1"].dtype == jnp.float32
    distance = np.abs(y.astype(jnp.float32) - expected).max() / np.abs(expected).max()
    assert 1e-5 < distance < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 32}, r"model\.filters=\(8, 16\) must end with model\.width=32"),
        ({"filters": (20, 16)}, r"model\.filters=\(20, 16\) must not fall"),
        ({"filters": (6, 16)}, r"model\.filters=\(6, 16\) must be multiples of model\.group_width=4"),
        ({"blocks": (1, 2, 3)}, r"model\.blocks=\(1, 2, 3\) must have one number"),
        ({"remat": "all"}, r"model\.remat='all' is unknown; known: none, block, dots"),
    ],
)
def test_bad_fields(fields, message):
    model = Net1D(**{**TINY, **fields})
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 12)), train=False))
