import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, load_golden
from ecg_jax.objectives.contract import mean_over_tokens
from ecg_jax.objectives.jepa import JEPA, jepa_loss, jepa_targets
from golden_steps import FixedMask, assert_after, assert_gradients, run_reference_steps, unpacked


def global_mean(term):
    values, weights = term
    return (values * weights).sum() / weights.sum()


def block_counts(starts, size, tokens):
    """How many blocks of `size` tokens starting at `starts` [B, blocks] cover each token."""
    t = np.arange(tokens)
    inside = (t >= starts[..., None]) & (t < starts[..., None] + size)
    return inside.sum(axis=1).astype(np.float32)


@pytest.mark.parametrize(("case", "norms"), [("released", 2), ("single", 1), ("none", 0)])
def test_loss_parity(case, norms):
    golden = load_golden("jepa_loss")
    counts = block_counts(
        golden["in/block_start"], int(golden["in/block_size"]), golden["in/teacher"].shape[1]
    )
    targets = jepa_targets(golden["in/teacher"], norms)

    @jax.jit
    def objective(predicted):
        return global_mean(mean_over_tokens(jepa_loss(predicted, targets, beta=1.0), counts))

    loss, grad = jax.value_and_grad(objective)(golden["in/input_predicted"])
    assert_close(loss, golden[f"out/loss_{case}"], 2e-6, "loss")
    if norms:
        assert_close(targets, golden[f"out/targets_{case}"], 2e-6, "targets")
    if case == "released":
        assert_close(grad, golden["grad/input_predicted"], 5e-6, "gradient")
        squared = global_mean(
            mean_over_tokens(jepa_loss(golden["in/input_predicted"], targets, beta=0.0), counts)
        )
        assert_close(squared, golden["out/loss_mse"], 2e-6, "squared error")


def test_two_steps_of_the_reference():
    golden = load_golden("ssl_steps_jepa")
    tokens = golden["in/x"].shape[-1] // 2

    def objective(encoder, width, step):
        context = unpacked(golden["in/masks_enc"][step], tokens)[:, 0]
        targets = unpacked(golden["in/masks_pred"][step], tokens).sum(axis=1)
        return JEPA(
            encoder=encoder, width=width, mask=FixedMask(~context, targets), target_norms=2, head_dropout=0.0
        )

    results, gradients, state = run_reference_steps(golden, objective)
    for step, (metrics, features) in enumerate(results):
        assert_close(metrics["loss"], golden[f"out/step{step}/total"], 1e-5, f"loss {step}")
        targets = jepa_targets(features["tokens"], 2)[:, [0, 100, 200]]
        assert_close(targets, golden[f"out/step{step}/targets_token0_100_200"], 3e-5, f"targets {step}")
    assert_gradients(golden, gradients)
    assert_after(golden, state)


def test_overlapping_blocks_count_repeatedly():
    """A token in two blocks has twice the weight of one in a single block."""
    loss = jnp.array([[1.0, 4.0, 7.0]])
    value = global_mean(mean_over_tokens(loss, jnp.array([[1.0, 2.0, 0.0]])))
    np.testing.assert_allclose(value, (1 + 2 * 4) / 3, rtol=1e-6)
