import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.objectives.cpc import cpc_loss, draw_negatives


@pytest.mark.parametrize("case", ["default", "normalized", "cross_sequence"])
def test_loss_parity(case):
    golden = group(load_golden("cpc_loss_small"), f"{case}/")
    records = golden.get("in/negative_batch_idx")

    @jax.jit
    def objective(encoded, predicted):
        loss, accuracy = cpc_loss(
            encoded,
            predicted,
            golden["in/negative_idx"].astype(np.int32),
            steps_ahead=int(golden["meta/steps_predicted"]),
            temperature=float(golden["meta/temperature"]),
            normalise=bool(golden["meta/normalize"]),
            negative_records=None if records is None else jnp.asarray(records, jnp.int32),
        )
        return loss.mean(), accuracy.mean()

    (loss, accuracy), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        golden["in/input_encoded"], golden["in/input_predicted"]
    )
    assert_close(loss, golden["out/loss"], 1e-6, "loss")
    assert_close(accuracy, golden["out/acc"], 1e-6, "accuracy")
    assert_close(grads[0], golden["grad/input_encoded"], 1e-5, "grad encoded")
    assert_close(grads[1], golden["grad/input_predicted"], 1e-5, "grad predicted")


def test_negatives_are_uniform_and_never_the_positive():
    L, k, M = 12, 3, 64
    idx = np.asarray(draw_negatives(jax.random.key(0), jnp.arange(200), tokens=L, steps_ahead=k, negatives=M))
    assert idx.shape == (200, L - k, M)
    assert idx.min() == 0
    assert idx.max() == L - 1
    for position in range(L - k):
        counts = np.bincount(idx[:, position].ravel(), minlength=L)
        assert counts[position + k] == 0
        others = np.delete(counts, position + k)
        expected = 200 * M / (L - 1)
        assert np.abs(others - expected).max() < 6 * expected**0.5


def test_negatives_belong_to_the_record():
    def draw(records):
        return draw_negatives(jax.random.key(0), jnp.array(records), tokens=30, steps_ahead=5, negatives=8)

    np.testing.assert_array_equal(draw([4, 2])[1], draw([2])[0])
    assert not np.array_equal(draw([4])[0], draw([2])[0])


def test_chance_level():
    """Equal scores: every position costs ln(M + 1), and ties count as hits (spec §5.3, §11.3)."""
    idx = draw_negatives(jax.random.key(0), jnp.arange(2), tokens=300, steps_ahead=14, negatives=128)
    tokens = jnp.zeros((2, 300, 4))
    loss, accuracy = cpc_loss(tokens, tokens, idx, steps_ahead=14, temperature=1.0, normalise=False)
    np.testing.assert_allclose(loss, 286 * np.log(129), rtol=1e-5)
    np.testing.assert_array_equal(accuracy, 1.0)


@pytest.mark.parametrize("mode", ["own", "cross"])
def test_memory_does_not_grow_with_width_times_negatives(mode):
    """No array of B x T x negatives x D (or anything near it) in the compiled loss and its gradient."""
    B, L, D, k, M = 4, 64, 96, 4, 48
    idx = jnp.zeros((B, L - k, M), jnp.int32)
    records = idx if mode == "cross" else None

    def objective(s, p):
        return cpc_loss(s, p, idx, steps_ahead=k, temperature=1.0, normalise=False, negative_records=records)[
            0
        ].sum()

    shape = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(shape, shape).compile()
    vectors = 4 * B * (L - k) * M * D  # bytes that gathered vectors would take
    assert compiled.memory_analysis().temp_size_in_bytes < vectors / 4
