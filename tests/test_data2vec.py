import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, load_golden
from ecg_jax.objectives.contract import last_layers, mean_over_tokens, smooth_l1
from ecg_jax.objectives.data2vec import Data2Vec, data2vec_loss, data2vec_targets
from golden_steps import FixedMask, assert_after, assert_gradients, run_reference_steps, unpacked


def golden_targets(golden):
    return data2vec_targets([np.swapaxes(golden[f"in/teacher_layer{i}"], 1, 2) for i in (2, 3)])


@pytest.mark.parametrize(
    ("name", "beta", "scale"),
    [("loss", 1.0, None), ("loss_beta025_scale1", 0.25, 1.0), ("loss_mse_beta0", 0.0, None)],
)
def test_loss_parity(name, beta, scale):
    golden = load_golden("data2vec_loss")
    targets = golden_targets(golden)
    assert_close(targets, golden["out/targets"], 2e-6, "targets")

    @jax.jit
    def objective(predicted):
        values, weights = mean_over_tokens(
            data2vec_loss(predicted, targets, beta=beta, scale=scale), golden["in/mask"]
        )
        return (values * weights).sum() / weights.sum()

    loss, grad = jax.value_and_grad(objective)(golden["in/input_predicted"])
    assert_close(loss, golden[f"out/{name}"], 2e-6, name)
    if name == "loss":
        assert_close(grad, golden["grad/input_predicted"], 5e-6, "gradient")


def test_nothing_masked_costs_nothing():
    golden = load_golden("data2vec_loss")
    targets, nothing = golden_targets(golden), np.zeros(golden["in/mask"].shape, bool)

    def total(predicted):
        values, weights = mean_over_tokens(data2vec_loss(predicted, targets, beta=1.0), nothing)
        return (values * weights).sum()

    loss, grad = jax.value_and_grad(total)(golden["in/input_predicted"])
    assert loss == golden["out/loss_empty_mask"] == 0
    np.testing.assert_array_equal(grad, 0)


def test_smooth_l1_is_continuous_where_its_pieces_meet():
    for beta in (0.25, 1.0, 3.0):
        below, above = smooth_l1(jnp.array([beta * (1 - 1e-4), beta * (1 + 1e-4)]), jnp.zeros(2), beta)
        np.testing.assert_allclose(below, above, rtol=1e-3)
        np.testing.assert_allclose(below, beta / 2, rtol=1e-3)


def test_targets_are_the_deepest_layers():
    layers = {f"layer{i}": jnp.full((1, 1, 1), i) for i in range(12)} | {"block11": jnp.zeros((1, 1, 1))}
    assert [int(layer[0, 0, 0]) for layer in last_layers(layers, "layer", 3)] == [9, 10, 11]
    with pytest.raises(ValueError, match="top_k=13 must lie between 1 and 12"):
        last_layers(layers, "layer", 13)


def test_two_steps_of_the_reference():
    golden = load_golden("ssl_steps_data2vec")
    tokens = golden["in/x"].shape[-1] // 2

    def objective(encoder, width, step):
        mask = unpacked(golden["in/mask"][step], tokens)
        return Data2Vec(encoder=encoder, width=width, mask=FixedMask(mask, mask), top_k=2, head_dropout=0.0)

    results, gradients, state = run_reference_steps(golden, objective)
    for step, (metrics, features) in enumerate(results):
        assert_close(metrics["loss"], golden[f"out/step{step}/total"], 1e-5, f"loss {step}")
        targets = data2vec_targets([features["layer2"], features["layer3"]])[:, [0, 100, 200]]
        assert_close(targets, golden[f"out/step{step}/targets_token0_100_200"], 3e-5, f"targets {step}")
    assert_gradients(golden, gradients)
    assert_after(golden, state)
