import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_encoder, convert_stem
from ecg_jax.models.encoder import build_encoder, constants, tokens_of
from ecg_jax.models.inputs import ALL_LEADS, NORMALISATIONS, to_model_input
from ecg_jax.models.layers import Dropout, gelu
from ecg_jax.models.s4 import S4Backbone
from ecg_jax.models.stem import Stem


def as_btc(x):
    """The reference's (batch, lead, time) to ours."""
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def test_stem_parity():
    golden = load_golden("stem_d64")
    variables = convert_stem(group(golden, "before/"))
    stem = Stem(width=golden["before/layers.0.0.weight"].shape[0])
    channels = golden["meta/channels"]
    x, cotangent = as_btc(golden["in/x"]), golden["in/cotangent"]
    out = stem.apply(variables, x, train=False)
    assert_close(out[..., channels], golden["out/eval"], 1e-5, "eval")

    @jax.jit
    def objective(params, x):
        y, updates = stem.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return (y[..., channels] * cotangent).sum(), (y, updates)

    (_, (y, updates)), (grads, grad_x) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        variables["params"], x
    )
    assert_close(y[..., channels], golden["out/train"], 1e-5, "train")
    assert_close(jnp.swapaxes(grad_x, 1, 2), golden["grad_train/x"], 1e-5, "grad x")
    for i in range(4):
        after, grad = group(golden, f"after/layers.{i}.1."), group(golden, f"grad_train/layers.{i}.")
        stats = updates["batch_stats"][f"norm{i}"]
        assert_close(stats["mean"], after["running_mean"], 1e-5, f"running mean {i}")
        assert_close(stats["var"], after["running_var"], 1e-5, f"running variance {i}")
        assert_close(grads[f"conv{i}"]["kernel"].transpose(2, 1, 0), grad["0.weight"], 1e-5, f"grad conv {i}")
        assert_close(grads[f"norm{i}"]["scale"], grad["1.weight"], 1e-5, f"grad scale {i}")
        assert_close(grads[f"norm{i}"]["bias"], grad["1.bias"], 1e-5, f"grad bias {i}")

    with_nan = as_btc(golden["nan/x"])
    assert np.isnan(with_nan).any()
    out = stem.apply(variables, jnp.nan_to_num(with_nan), train=False)
    assert_close(out, golden["nan/out_eval"], 1e-5, "nan")


@pytest.mark.parametrize("direction", ["cpc", "bidirectional"])
def test_encoder_parity(direction):
    golden = load_golden(f"encoder_{direction}_narrow")
    sd = group(golden, "sd/")
    variables = convert_encoder(sd)
    width = variables["params"]["stem"]["conv0"]["kernel"].shape[-1]
    channels, _, half, _ = variables["params"]["backbone"]["layer0"]["C"].shape
    l_max = 2 * (sd["ts_encoder.predictor.predictor.s4_layers.0.kernel.kernel.omega"].shape[0] - 1)
    layers = sum(name.startswith("layer") for name in variables["params"]["backbone"])
    encoder = build_encoder(
        backbone="s4", width=width, state=2 * half, layers=layers, l_max=l_max, bidirectional=channels == 2,
        trainable_ssm=False, dropout=0.2,
    )  # fmt: skip
    x = as_btc(golden["in/x"])
    fixed = constants(variables, length=tokens_of(x.shape[1]), l_max=l_max)
    tokens, out = jax.jit(lambda v, x: encoder.apply(v, x, train=False))({**variables, **fixed}, x)
    assert_close(out["stem"], golden["out/stem"], 1e-5, "stem")
    for i in range(layers):
        assert_close(jnp.swapaxes(out[f"layer{i}"], 1, 2), golden[f"out/s4_layer{i}"], 1e-5, f"layer {i}")
        assert_close(out[f"block{i}"], golden[f"out/block{i}"], 1e-5, f"block {i}")
    assert_close(tokens, golden["out/predictor"], 1e-5, "tokens")
    assert_close(tokens.mean(1), golden["out/pooled_mean"], 1e-5, "pooled")

    # Tiny amplitudes show the epsilon of the norms; fewer tokens than l_max truncate the kernel.
    backbone = S4Backbone(
        width=width,
        state=2 * half,
        layers=layers,
        l_max=l_max,
        bidirectional=channels == 2,
        trainable_ssm=False,
    )
    collections = {"params": variables["params"]["backbone"]} | {
        name: tree["backbone"] for name, tree in fixed.items()
    }
    small, _ = jax.jit(lambda v, x: backbone.apply(v, x, train=False))(collections, golden["small/in/tokens"])
    assert_close(small, golden["small/out/predictor"], 1e-5, "small")


@pytest.mark.parametrize(("bidirectional", "total"), [(False, 2_932_736), (True, 2_949_120)])
def test_parameter_counts(bidirectional, total):
    """Spec §2 and §3.3."""

    def init(trainable_ssm):
        encoder = build_encoder(
            backbone="s4", width=512, state=8, layers=4, l_max=300, bidirectional=bidirectional,
            trainable_ssm=trainable_ssm, dropout=0.2,
        )  # fmt: skip
        return jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((2, 600, 12)), train=False))

    params = init(trainable_ssm=False)["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(params["stem"]) == 808_960
    assert count(params) == total
    # Lambda, P, B and dt; the reference counts Q = conj(P) as well.
    assert count(init(trainable_ssm=True)["params"]) - total == 4 * 512 * (3 * 8 + 1)


def test_causal_encoder_sees_no_future_and_bidirectional_does():
    def changed(bidirectional):
        encoder = build_encoder(
            backbone="s4", width=16, state=8, layers=2, l_max=32, bidirectional=bidirectional,
            trainable_ssm=False, dropout=0.0,
        )  # fmt: skip
        x = jax.random.normal(jax.random.key(0), (1, 64, 12))
        variables = encoder.init(jax.random.key(1), x, train=False)
        run = jax.jit(lambda x: encoder.apply(variables, x, train=False)[0])
        later = x.at[:, 40:].add(1.0)
        return np.abs(np.asarray(run(x) - run(later))).max(axis=(0, 2))

    causal = changed(False)
    assert causal[:20].max() < 1e-5, "token i reads samples up to 2i + 1"
    assert causal[20:].min() > 1e-4
    assert changed(True)[:20].max() > 1e-4


@pytest.mark.parametrize("conv", ["fft", "toeplitz", "chunked:8"])
def test_nothing_is_transposed_between_layers(conv):
    """Channels stay first from stem to last layer: in forward and backward pass no array of a batch of tokens changes
    its layout but the output and its cotangent.
    """
    B, T, D = 4, 48, 32
    encoder = build_encoder(
        backbone="s4", width=D, state=4, layers=3, l_max=24, bidirectional=False, trainable_ssm=False,
        dropout=0.2, conv=conv,
    )  # fmt: skip
    x = jnp.zeros((B, T, 12))
    variables = encoder.init(jax.random.key(0), x, train=False)
    variables |= constants(variables, length=T // 2, l_max=24)

    def loss(params, x, cotangent):
        rngs = {"dropout": jax.random.key(1)}
        (tokens, _), changed = encoder.apply(
            {**variables, "params": params}, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return (tokens * cotangent).sum(), changed

    arguments = variables["params"], x, jnp.ones((B, T // 2, D))
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile().as_text()
    found = [
        (shape, name)
        for shape, name in re.findall(r'= f32\[([\d,]+)\]\S* transpose\([^\n]*op_name="([^"]*)"', program)
        if math.prod(map(int, shape.split(","))) >= B * T // 2 * D
    ]
    inner = [name for _, name in found if not name.endswith(("backbone/transpose", "stem/transpose"))]
    assert not inner
    forward = {shape for shape, name in found if name.endswith("jvp(Encoder)/backbone/transpose")}
    assert forward == {f"{B},{T // 2},{D}"}  # the tokens that leave the encoder, none that enter the backbone


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-6, 6, 241)
    expected = jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(x), expected, rtol=1e-5, atol=1e-6)
    slopes = [jax.vmap(jax.grad(f))(x) for f in (gelu, lambda v: jax.nn.gelu(v, approximate=False))]
    np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)
    assert np.abs(gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4


def test_normalisation_presets():
    signal = jax.random.randint(jax.random.key(0), (2, 5, 12), -2000, 2000, jnp.int16)
    millivolts = np.asarray(signal, np.float32) / 1000
    np.testing.assert_allclose(to_model_input(signal, "none", ALL_LEADS), millivolts, rtol=1e-6)
    mean, std = NORMALISATIONS["ptbxl_canonical"]
    x = to_model_input(signal, "ptbxl_canonical", ALL_LEADS)
    np.testing.assert_allclose(x, (millivolts - mean) / std, rtol=1e-4, atol=1e-5)
    # V2 and V3 vary most; the released order puts their statistics on aVR and aVL.
    assert set(np.argsort(std)[-2:]) == {7, 8}
    assert set(np.argsort(NORMALISATIONS["ptbxl_misordered"][1])[-2:]) == {3, 4}


@pytest.mark.parametrize("tied", [True, False])
def test_dropout_belongs_to_the_record(tied):
    x = jnp.ones((6, 10, 32))
    rngs = {"dropout": jax.random.key(0)}
    order = jnp.array([3, 0, 5, 1, 2, 4])
    layer = Dropout(0.25, tied=tied)
    plain = layer.apply({}, x, None, train=True, rngs=rngs)
    shuffled = layer.apply({}, x, order, train=True, rngs=rngs)
    np.testing.assert_array_equal(shuffled, plain[order])
    assert not np.array_equal(plain[0], plain[1])
    assert (np.ptp(plain, axis=1) == 0).all() == tied
    kept = np.asarray(plain) > 0
    np.testing.assert_allclose(np.asarray(plain)[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.12
    np.testing.assert_array_equal(layer.apply({}, x, None, train=False), x)
