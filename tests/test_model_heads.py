"""The heads of the pretraining objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_mlp_head, convert_s4_head
from ecg_jax.models.convolution import kernel_from_basis
from ecg_jax.models.encoder import constants
from ecg_jax.models.heads import MLPHead, S4Head


def golden_head():
    golden = load_golden("s4_head")
    converted = convert_s4_head(group(golden, "sd/head_ssl."))
    length = golden["in/x"].shape[1]
    head = S4Head(
        width=golden["in/x"].shape[2], out=golden["in/cotangent"].shape[2], l_max=length,
        state=2 * golden["sd/head_ssl.s4.s4_layers.0.kernel.kernel.w"].shape[1], dropout=0.0,
    )  # fmt: skip
    fixed = constants({"ssm": converted["ssm"]}, length=length, l_max=length)
    return golden, head, converted["params"], fixed


def test_s4_head_parity():
    golden, head, params, fixed = golden_head()

    @jax.jit
    def pulled_back(params, x):
        y, pull = jax.vjp(
            lambda params, x: head.apply({"params": params, **fixed}, x, train=False), params, x
        )
        return y, *pull(jnp.asarray(golden["in/cotangent"], jnp.float32))

    y, grads, grad_x = pulled_back(params, golden["in/x"])
    K = kernel_from_basis(params["layer"]["C"], fixed["basis"]["layer"]["phi"])
    assert_close(K, golden["out/K"], 5e-6, "kernel")
    assert_close(y, golden["out/y"], 5e-6, "output")
    assert_close(grad_x, golden["grad/x"], 1e-5, "gradient of x")
    expected = convert_s4_head(group(golden, "sd/head_ssl.") | group(golden, "grad/head_ssl."))["params"]
    ours = dict(jax.tree.flatten_with_path(grads)[0])
    for path, value in jax.tree.flatten_with_path(expected)[0]:
        assert_close(ours[path], value, 1e-5, f"gradient of {jax.tree_util.keystr(path)}")
    small = head.apply({"params": params, **fixed}, golden["small/in/x"], train=False)
    assert_close(small, golden["small/out/y"], 5e-6, "tiny input")


def test_mlp_head_parity():
    golden = group(load_golden("heads"), "mlp_hidden/")
    params = convert_mlp_head(group(golden, "sd/head_ssl."))["params"]
    head = MLPHead(width=params["hidden"]["kernel"].shape[1], out=params["output"]["kernel"].shape[1])
    y, pull = jax.vjp(lambda params, x: head.apply({"params": params}, x), params, golden["in/x"])
    grads, grad_x = pull(jnp.asarray(golden["in/cotangent"], jnp.float32))
    assert_close(y, golden["out/y"], 5e-6, "output")
    assert_close(grad_x, golden["grad/x"], 1e-5, "gradient of x")
    expected = convert_mlp_head(group(golden, "grad/head_ssl."))["params"]
    for layer in ("hidden", "output"):
        for name in ("kernel", "bias"):
            assert_close(grads[layer][name], expected[layer][name], 1e-5, f"gradient of {layer} {name}")


@pytest.mark.parametrize(
    ("head", "count"),
    [(S4Head(width=512, out=512, l_max=300), 855_040), (MLPHead(width=512, out=384), 459_648)],
)
def test_parameter_counts_are_the_papers(head, count):
    x = jnp.zeros((1, 300, 512))
    arguments = {"train": False} if isinstance(head, S4Head) else {}
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), x, **arguments))
    assert count_parameters(shapes["params"]) == count


def test_s4_head_drops_every_token_by_itself():
    head = S4Head(width=8, out=8, l_max=16, state=4, dropout=0.5)
    x = jnp.ones((2, 16, 8))
    variables = head.init(jax.random.key(0), x, train=False)

    def run(records):
        return head.apply(variables, x, jnp.array(records), train=True, rngs={"dropout": jax.random.key(1)})

    np.testing.assert_array_equal(run([3, 7]), run([7, 3])[::-1])
    assert not np.array_equal(run([3, 7])[0], run([3, 7])[1])
