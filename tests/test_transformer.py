from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_transformer
from ecg_jax.models.transformer import Attention, Transformer, attention_implementation, rotate

TINY = {"width": 32, "layers": 1, "heads": 4, "ff_width": 64}


def random_variables(model, x, *args):
    """Variables with the shapes of `model.init` and other values, drawn without compiling anything."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: model.init(jax.random.key(0), x, *args, train=False)))


def golden_model(golden, bidirectional):
    """The model and variables of a file of reference tensors, sizes read from its arrays."""
    sd = group(golden, "sd/predictor.")
    ff_width, width = sd["layers.0.ff.linear1.weight"].shape
    variables = convert_transformer(sd)
    layers = sum(name.startswith("layer") for name in variables["params"])
    heads = int(golden["meta/heads"])
    return Transformer(width, layers, heads, ff_width, bidirectional=bidirectional), variables


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("transformer_narrow", ""),
        ("transformer_narrow", "causal/"),
        ("transformer_input_projection", ""),
    ],
)
def test_parity(name, variant):
    golden = load_golden(name)
    model, variables = golden_model(golden, bidirectional=not variant)
    x, cotangent = golden["in/x"], golden["in/cotangent"]

    @jax.jit
    def objective(params, x):
        (y, out), captured = model.apply(
            {"params": params}, x, train=False, capture_intermediates=lambda m, _: m.name == "attention"
        )
        return (y * cotangent).sum(), (y, out, captured["intermediates"])

    (_, (y, out, captured)), (grads, grad_x) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        variables["params"], x
    )
    assert_close(y, golden[f"{variant}out/y"], 1e-5, "y")
    assert_close(grad_x, golden[f"{variant}grad/x"], 3e-5, "grad x")
    attention = captured["layer0"]["attention"]["__call__"][0]
    assert_close(attention[:, ::10], golden[f"{variant}out/attn0"], 1e-5, "attention")
    for i in range(model.layers):
        assert_close(out[f"block{i}"][:, ::10], golden[f"{variant}out/block{i}"], 1e-5, f"block {i}")
    ours = {
        **{
            f"layers.{i}.{torch}": (f"layer{i}", *path)
            for i in range(model.layers)
            for torch, path in {
                "attn.q_proj.bias": ("attention", "query", "bias"),
                "ff.linear1.bias": ("hidden", "bias"),
                "norm2.weight": ("norm2", "scale"),
                "norm2.bias": ("norm2", "bias"),
            }.items()
        },
        "final_norm.weight": ("norm", "scale"),
        "final_norm.bias": ("norm", "bias"),
    }
    for torch, expected in group(golden, f"{variant}grad/predictor.").items():
        grad = grads
        for key in ours[torch]:
            grad = grad[key]
        assert_close(grad, expected, 3e-5, f"grad {torch}")


def test_small_amplitudes_show_the_epsilon_of_the_norms():
    golden = load_golden("transformer_narrow")
    model, variables = golden_model(golden, bidirectional=True)
    y, _ = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, golden["small/in/x"])
    assert_close(y, golden["small/out/y"], 1e-5, "small")


@pytest.mark.parametrize(("layers", "total"), [(4, 12_610_560), (6, 18_915_328), (12, 37_829_632)])
def test_parameter_counts(layers, total):
    """Spec §4.1."""
    model = Transformer(layers=layers)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 300, 512)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


def test_initial_weights_are_xavier_uniform_and_biases_zero():
    model = Transformer(**TINY)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5, 32)), train=False))()["params"]
    for layer, (fan_in, fan_out) in {"hidden": (32, 64), "output": (64, 32)}.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        largest = np.abs(params["layer0"][layer]["kernel"]).max()
        assert 0.97 * bound < largest <= bound
        assert not params["layer0"][layer]["bias"].any()


def test_a_causal_model_sees_no_later_token_and_a_bidirectional_one_does():
    def change(bidirectional):
        model = Transformer(**TINY, bidirectional=bidirectional)
        x = jax.random.normal(jax.random.key(0), (1, 24, 32))
        variables = random_variables(model, x)
        run = jax.jit(lambda x: model.apply(variables, x, train=False)[0])
        return np.abs(np.asarray(run(x) - run(x.at[:, 9].multiply(-1.0)))).max(axis=(0, 2))

    causal = change(False)
    assert causal[:9].max() == 0.0
    assert causal[9:].min() > 1e-5
    assert change(True)[:9].min() > 1e-5


def test_rotated_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 16))

    def products(x, y):
        """[L, L] products of one query and one key placed at every token."""
        at_all = [rotate(jnp.broadcast_to(v, (1, 40, 1, 16)))[0, :, 0] for v in (x, y)]
        return np.asarray(at_all[0] @ at_all[1].T, np.float64)

    table = products(q, k)
    for distance in (-30, -7, 0, 3, 25):
        along = np.diagonal(table, distance)
        np.testing.assert_allclose(along, along[0], atol=2e-5)
    assert np.ptp(table[0]) > 0.1
    np.testing.assert_allclose(table[0, 0], q @ k, rtol=1e-5)
    # The slowest pair turns by 10000^(-14/16) a token, and it is made of components 7 and 15.
    slow = rotate(jnp.zeros((1, 40, 1, 16)).at[..., 7].set(1.0))[0, -1, 0]
    angle = 39 * 10_000 ** (-14 / 16)
    np.testing.assert_allclose(slow[jnp.array([7, 15])], [np.cos(angle), np.sin(angle)], rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.3, 0.0), (0.0, 0.3)])
def test_dropout_belongs_to_the_record(bidirectional, dropout, attention_dropout):
    model = Transformer(
        **TINY, bidirectional=bidirectional, dropout=dropout, attention_dropout=attention_dropout
    )
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 12, 32)), (4, 12, 32))
    variables = random_variables(model, x)

    @jax.jit
    def run(record_index, key):
        return model.apply(variables, x, record_index, train=True, rngs={"dropout": key})[0]

    order = jnp.array([2, 7, 0, 3])
    plain, other = run(jnp.arange(4), jax.random.key(2)), run(order, jax.random.key(2))
    for row, record in ((0, 2), (2, 0), (3, 3)):
        np.testing.assert_allclose(other[row], plain[record], atol=1e-5)
    assert np.abs(plain[0] - plain[1]).max() > 0.05, "two records with one input drop differently"
    assert np.abs(run(order, jax.random.key(3)) - other).max() > 0.05


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_form_with_dropped_weights_is_the_same_attention(bidirectional):
    """At a rate that drops next to nothing, the explicit softmax equals `jax.nn.dot_product_attention`."""
    attention = Attention(heads=4, bidirectional=bidirectional, dropout=1e-7)
    x = jax.random.normal(jax.random.key(0), (2, 12, 32))
    variables = random_variables(attention, x, None)

    @jax.jit
    def both():
        explicit = attention.apply(variables, x, None, train=True, rngs={"dropout": jax.random.key(1)})
        return explicit, attention.apply(variables, x, None, train=False)

    assert_close(*both(), 1e-5)


def recomputed_loss(variables, x, mode):
    """A loss with every dropout on; the generator is one that compiles fast."""
    model = Transformer(**TINY, attention_dropout=0.1, remat=mode)
    y, out = model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(2, impl="rbg")})
    return jnp.square(y).sum() + jnp.square(out["layer0"]).sum()


@pytest.mark.parametrize("mode", ["block", "dots"])
def test_rematerialisation_changes_no_value_and_no_gradient(mode):
    x = jax.random.normal(jax.random.key(0), (2, 12, 32))
    variables = random_variables(Transformer(**TINY), x)
    plain, recomputed = jax.jit(
        lambda v: [jax.value_and_grad(recomputed_loss)(v, x, m) for m in ("none", mode)]
    )(variables)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), recomputed, plain)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    x = jnp.zeros((2, 12, 32))
    variables = random_variables(Transformer(**TINY), x)

    def kept(mode):
        _, pull = jax.eval_shape(lambda v: jax.vjp(lambda v: recomputed_loss(v, x, mode), v), variables)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("block") < kept("dots") < kept("none")


def test_bfloat16_stays_close_to_float32():
    x = jax.random.normal(jax.random.key(0), (2, 50, 32))
    variables = random_variables(Transformer(**TINY), x)
    model = Transformer(**TINY, dtype=jnp.bfloat16)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, random_variables(model, x))
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype("float32")}
    half, out = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    full, _ = jax.jit(lambda v, x: Transformer(**TINY).apply(v, x, train=False))(variables, x)
    assert half.dtype == jnp.bfloat16
    assert out["block0"].dtype == jnp.float32
    distance = np.abs(half.astype(jnp.float32) - full).max() / np.abs(full).max()
    assert 1e-5 < distance < 0.02


def test_gradients_inside_a_mapped_step():
    """The step runs under `shard_map`, which checks what varies over the devices."""
    model = Transformer(**TINY)
    x = jax.random.normal(jax.random.key(0), (8, 12, 32))
    variables = random_variables(model, x)

    def loss(variables, x, axis):
        y, _ = model.apply(variables, x, train=False)
        mean = jnp.abs(y).mean()
        return jax.lax.pmean(mean, axis) if axis else mean

    P = PartitionSpec
    mapped = jax.shard_map(
        lambda v, x: jax.grad(loss)(v, x, "data"),
        mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    expected = jax.jit(lambda v, x: jax.grad(loss)(v, x, None))(variables, x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-3), jax.jit(mapped)(variables, x), expected)


def test_fused_attention_is_for_half_precision_on_new_nvidia_gpus():
    def device(kind, capability=None):
        return SimpleNamespace(device_kind=kind, compute_capability=capability)

    h200, v100 = device("NVIDIA H200", "9.0"), device("NVIDIA V100", "7.0")
    assert attention_implementation(h200, jnp.dtype("bfloat16"), 64) == "cudnn"
    assert attention_implementation(h200, jnp.dtype("float16"), 64) == "cudnn"
    assert attention_implementation(h200, jnp.dtype("float32"), 64) == "xla"
    assert attention_implementation(h200, jnp.dtype("bfloat16"), 4) == "xla"
    assert attention_implementation(v100, jnp.dtype("float16"), 64) == "xla"
    assert (
        attention_implementation(device("AMD Instinct MI300X", "gfx942"), jnp.dtype("bfloat16"), 64) == "xla"
    )
    assert attention_implementation(device("TPU v5e"), jnp.dtype("bfloat16"), 64) == "xla"
    assert attention_implementation(jax.devices()[0], jnp.dtype("bfloat16"), 64) == "xla"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, r"model\.heads=5 must divide model\.width=32"),
        ({"heads": 32}, r"model\.heads=32 .* even"),
        ({"remat": "all"}, r"model\.remat='all' is unknown; known: none, block, dots"),
    ],
)
def test_bad_fields(fields, message):
    model = Transformer(**{**TINY, **fields})
    with pytest.raises(ValueError, match=f"^{message}"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 32)), train=False))
