import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.training import optim

FACTORS = {"head": 1.0, "backbone": 0.1, "stem": 0.01, "ssm": 0.01}


def params_tree(p0, p1, p2):
    """The three learning-rate groups of the reference as our parameter names."""
    return {"head": {"kernel": p0}, "encoder": {"backbone": {"D": p1}, "stem": {"conv0": {"kernel": p2}}}}


@pytest.mark.parametrize("case", ["released", "large", "tiny_gradients"])
def test_adamw_parity(case):
    golden = group(load_golden("adamw"), f"{case}/")
    rates = golden["meta/lr"]
    tx = optim.build_optimiser(
        optax.constant_schedule(float(rates[0])),
        factors={"head": 1.0, "backbone": rates[1] / rates[0], "stem": rates[2] / rates[0], "ssm": 0.0},
        weight_decay=float(golden["meta/weight_decay"]),
        b1=0.9,
        b2=0.999,
        eps=float(golden["meta/eps"]),
        clip_norm=0.0,
    )
    params = params_tree(*(jnp.asarray(golden[f"in/p{i}"]) for i in range(3)))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(len(golden["in/grads_p0"])):
        grads = params_tree(*(golden[f"in/grads_p{i}"][step] for i in range(3)))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        leaves = (params["head"]["kernel"], params["encoder"]["backbone"]["D"])
        for i, leaf in enumerate((*leaves, params["encoder"]["stem"]["conv0"]["kernel"])):
            assert_close(leaf, golden[f"out/p{i}"][step], 2e-6, f"p{i} after step {step}")


def test_state_matrices_have_their_own_group_without_decay():
    layer = {name: jnp.ones(3) for name in ("C", "D", "Lambda", "P", "B", "log_dt")}
    params = {"encoder": {"backbone": {"layer0": layer}}, "head": {"kernel": jnp.ones(2)}}
    groups = optim.groups_of(params)["encoder"]["backbone"]["layer0"]
    assert groups == {"C": "backbone", "D": "backbone"} | dict.fromkeys(("Lambda", "P", "B", "log_dt"), "ssm")

    tx = optim.build_optimiser(
        optax.constant_schedule(0.1),
        factors=FACTORS,
        weight_decay=0.5,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip_norm=0.0,
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = updates["encoder"]["backbone"]["layer0"]
    assert float(jnp.abs(moved["log_dt"]).max()) == 0.0
    np.testing.assert_allclose(moved["C"], -0.1 * 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 0.5, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    tx = optim.build_optimiser(
        optax.constant_schedule(1.0),
        factors=FACTORS,
        weight_decay=0.0,
        b1=0.0,
        b2=0.0,
        eps=1.0,
        clip_norm=1e-3,
    )
    params = {"head": {"kernel": jnp.zeros(4)}}
    updates, _ = tx.update({"head": {"kernel": jnp.full(4, 1e3)}}, tx.init(params), params)
    # With b1 = b2 = 0 and eps = 1, a clipped gradient g (norm 1e-3) moves the parameters by g / (|g| + 1).
    np.testing.assert_allclose(updates["head"]["kernel"], -5e-4 / (1 + 5e-4), rtol=1e-4)


def test_schedules():
    cosine = optim.learning_rate(base=1.0, schedule="cosine", warmup_steps=10, steps=110)
    np.testing.assert_allclose([cosine(s) for s in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    constant = optim.learning_rate(base=2.0, schedule="constant", warmup_steps=0, steps=5)
    assert constant(0) == constant(4) == 2.0
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'linear'"):
        optim.learning_rate(base=1.0, schedule="linear", warmup_steps=0, steps=1)
