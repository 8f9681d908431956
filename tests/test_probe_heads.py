"""The heads that probes put on tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters

from conftest import assert_close, group, load_golden
from ecg_jax.models.probe_heads import AttentionPool, MeanLinear

GOLDEN = load_golden("heads")


def mean_linear(arrays):
    return {"linear": {"kernel": arrays["head.weight"].T, "bias": arrays["head.bias"]}}


def attention_pool(arrays):
    names = [f"{name}_proj" for name in "qkvc"]
    projections = {name: arrays[f"head.head.{name}.weight"].T for name in names}
    return {"query": arrays["head.head.query"].reshape(-1), **projections}


def pulled_back(head, golden, params):
    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda params, x: head.apply({"params": params}, x), params, x)
        return y, *pull(jnp.asarray(golden["in/cotangent"]))

    return run(params, golden["in/x"])


@pytest.mark.parametrize("name", ["mean_linear", "attention_pool"])
def test_outputs_and_gradients_equal_the_reference(name):
    golden = group(GOLDEN, f"{name}/")
    convert, out = globals()[name], golden["out/y"].shape[1]
    head = MeanLinear(out) if name == "mean_linear" else AttentionPool(out, int(golden["meta/heads"]))
    y, grads, grad_x = pulled_back(head, golden, convert(group(golden, "sd/")))
    assert_close(y, golden["out/y"], 5e-6, "output")
    assert_close(grad_x, golden["grad/x"], 1e-5, "gradient of x")
    expected = convert(group(golden, "grad/"))
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    ours = dict(jax.tree.flatten_with_path(grads)[0])
    for path, value in jax.tree.flatten_with_path(expected)[0]:
        assert_close(ours[path], value, 1e-5, f"gradient of {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize(("head", "n"), [(MeanLinear(71), 36_423), (AttentionPool(71), 823_296)])
def test_sizes_are_the_published_ones(head, n):
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 2, 512)))["params"]
    assert count_parameters(params) == n


def test_initial_values_are_spread_as_the_reference_draws_them():
    params = AttentionPool(3).init(jax.random.key(0), jnp.zeros((1, 1, 512)))["params"]
    assert np.std(params["query"]) == pytest.approx(512**-0.5, rel=0.1)
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        assert np.abs(params[name]).max() == pytest.approx(512**-0.5, rel=0.02)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="16 attention heads do not divide tokens of width 24"):
        jax.eval_shape(AttentionPool(3).init, jax.random.key(0), jnp.zeros((1, 2, 24)))
