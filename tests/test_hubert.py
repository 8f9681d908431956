"""HuBERT++ and HuBERT: parity of losses and whole steps, prototypes, collapse that shows."""

import ast
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.objectives import hubert
from ecg_jax.objectives.clustering import (
    cosines,
    sinkhorn_targets,
    temperature_at,
    unit_rows,
    update_prototypes,
)
from ecg_jax.objectives.contract import Inputs
from ecg_jax.objectives.hubert import Hubert, HubertPP, divergence, hubert_loss, hubertpp_loss
from ecg_jax.objectives.masking import Masking
from golden_steps import FixedMask, assert_after, assert_gradients, run_reference_steps, unpacked
from tiny_runs import OWN, run_mapped

REFERENCE_NAMES = {
    "masked_loss": "loss_masked0", "visible_loss": "loss_nonmasked0",
    "entropy_loss": "loss_entropy_regularization0",
}  # fmt: skip


def global_mean(term):
    values, weights = term
    return (values * weights).sum() / jnp.where(weights.sum() > 0, weights.sum(), 1.0)


@pytest.mark.parametrize("stage", ["t0", "t150", "end", "alpha1", "empty"])
def test_loss_parity(stage):
    golden = load_golden("hubertpp")
    expected = group(golden, f"loss/out/{stage}/")
    masked = golden["loss/in/mask"] & (stage != "empty")
    temperature = expected["student_temperature"].astype(np.float32)
    codes = golden["meta/kmeans_ks"]

    def objective(logits):
        losses = {}
        for j, part in enumerate(jnp.split(logits, np.cumsum(codes)[:-1], axis=-1)):
            terms = hubertpp_loss(
                part, golden[f"loss/in/targets{j}"], masked, ~masked, temperature=temperature,
                alpha=1.0 if stage == "alpha1" else 0.75, entropy_weight=1e-3,
            )  # fmt: skip
            losses |= {f"{REFERENCE_NAMES[name]}_{j}": global_mean(term) for name, term in terms.items()}
        return sum(losses.values()), losses

    (total, losses), grad = jax.value_and_grad(objective, has_aux=True)(golden["loss/in/logits"])
    assert {name for name in expected if name.startswith("loss_")} == set(losses)
    for name, loss in losses.items():
        assert_close(loss, expected[name], 5e-6, name)
    assert_close(total, expected["total"], 5e-6, "total")
    assert_close(grad, expected["grad"], 5e-6, "gradient")


def test_divergence_parity():
    golden = load_golden("hubertpp")
    codes = golden["meta/kmeans_ks"]
    parts = np.split(golden["loss/in/logits"], np.cumsum(codes)[:-1], axis=-1)
    for stage in ("t0", "end"):
        expected = group(golden, f"loss/out/{stage}/")
        for j, part in enumerate(parts):
            log_p = jax.nn.log_softmax(part / expected["student_temperature"].astype(np.float32))
            kl = divergence(golden[f"loss/in/targets{j}"], log_p).mean()
            assert_close(kl, expected[f"metric_kl_student_teacher0_{j}"], 5e-6, f"kl {stage}")
    certain = jnp.array([[[0.0, 1.0, 0.0]]])
    np.testing.assert_allclose(divergence(certain, jnp.log(jnp.full((1, 1, 3), 1 / 3))), np.log(3), rtol=1e-6)


def test_two_steps_of_the_reference(monkeypatch):
    golden = load_golden("ssl_steps_hubertpp")
    tokens = golden["in/x"].shape[-1] // 2
    prototypes = {
        int(name.removeprefix("in/prototypes")): jnp.asarray(value)
        for name, value in golden.items() if name.startswith("in/prototypes")
    }  # fmt: skip
    codes = tuple(len(prototypes[j]) for j in sorted(prototypes))
    assert len(set(codes)) == len(codes)
    # The first step chooses the prototypes; here it chooses those of the file.
    stored = {len(value): value for value in prototypes.values()}

    def chosen(*_, codes, instead_of, when, **__):
        return jnp.where(when, stored[codes], instead_of)

    monkeypatch.setattr(hubert, "kmeans_plus_plus", chosen)

    def objective(encoder, width, step):
        hidden = unpacked(golden["in/mask"][step], tokens)
        return HubertPP(encoder=encoder, width=width, mask=FixedMask(hidden, hidden), codes=codes)

    start = {f"prototypes{j}": jnp.zeros_like(value) for j, value in prototypes.items()}
    results, gradients, state = run_reference_steps(golden, objective, objective_state=start)
    for step, (metrics, teacher) in enumerate(results):
        expected = group(golden, f"out/step{step}/")
        assert_close(metrics["loss"], expected["total"], 1e-5, f"loss {step}")
        for ours, theirs in REFERENCE_NAMES.items():
            for j in prototypes:
                assert_close(metrics[f"{ours}{j}"], expected[f"{theirs}_{j}_tsenc"], 1e-5, f"{ours} {step}")
        features = unit_rows(teacher["tokens"])
        temperature = temperature_at(step, start=0.15, end=0.07, steps=200)
        for j in prototypes:
            similarity = cosines(features, prototypes[j])
            targets = sinkhorn_targets(similarity, temperature=temperature, rounds=3, axis_name=None)
            stored = expected[f"soft_targets{j}_token0_100_200"]
            assert_close(targets[:, [0, 100, 200]], stored, 3e-5, f"targets {step}")
            prototypes[j] = update_prototypes(prototypes[j], targets, features, momentum=0.99, axis_name=None)
    assert_gradients(golden, gradients)
    assert_after(golden, state)
    for j in prototypes:
        after = golden[f"out/prototypes_after{j}"]
        assert_close(state.objective_state[f"prototypes{j}"], after, 1e-4, "prototypes")


def test_a_run_of_hubertpp():
    run = run_mapped("hubertpp", "described", 1)
    terms = {f"{name}{j}" for name in REFERENCE_NAMES for j in range(2)}
    metrics = {"accuracy", "kl", "perplexity", "dead_codes", "masked_share", "loss", "grad_norm"}
    assert terms | metrics == set(run.log[0])
    sizes = ast.literal_eval(OWN["hubertpp"]["objective.codes"])
    for entry in run.log:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in terms), rel=1e-5)
        assert 0 < entry["accuracy"] < 1
        assert 1.5 < entry["perplexity"] <= sum(sizes) / 2
    for j, codes in enumerate(sizes):
        prototypes = run.last.objective_state[f"prototypes{j}"]
        assert prototypes.shape == (codes, 16)
        np.testing.assert_allclose(jnp.linalg.norm(prototypes, axis=-1), 1, rtol=1e-5)


class PairsOfSamples(nn.Module):
    """An encoder that compiles in no time: a linear map of two samples for each token. Where a token is hidden the
    mask token is added, so that tokens differ there too.
    """

    @nn.compact
    def __call__(self, x, record_index, *, train, hidden, mask_token):
        encoded = nn.Dense(16)(x.reshape(x.shape[0], x.shape[1] // 2, -1))
        return jnp.tanh(encoded + hidden[..., None] * mask_token), {}


def small(name="hubertpp", probability=0.2, **fields):
    objective, codes = {"hubertpp": (HubertPP, (4, 7)), "hubert": (Hubert, 5)}[name]
    mask = Masking(probability=probability, span=4)
    return objective(encoder=PairsOfSamples(), width=16, mask=mask, **{"codes": codes} | fields)


def drawn_inputs(step=0, tokens=None, labels=None):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64, 12)), jnp.float32)
    features = jnp.asarray(rng.normal(size=(4, 32, 16)), jnp.float32) if tokens is None else tokens
    return Inputs(
        x=x, record_index=jnp.arange(4), step=jnp.int32(step), teacher={"tokens": features}, labels=labels
    )


RNGS = {name: jax.random.key(i) for i, name in enumerate(("params", "objective", "dropout"))}
COLLECTIONS = ["objective_state"]


@functools.cache
def initialised(**fields):
    """A small objective, its variables, and jitted (variables, inputs) -> ((losses, metrics), gradient, updates)."""
    model = small(**fields)
    variables = jax.jit(functools.partial(model.init, train=False))(RNGS, drawn_inputs())

    @jax.jit
    def apply(variables, inputs):
        def objective(params):
            (losses, metrics), updates = model.apply(
                variables | {"params": params}, inputs, train=True, rngs=RNGS, mutable=COLLECTIONS
            )
            losses, metrics = ({k: global_mean(t) for k, t in terms.items()} for terms in (losses, metrics))
            return sum(losses.values()), (losses, metrics, updates)

        gradient, (losses, metrics, updates) = jax.grad(objective, has_aux=True)(variables["params"])
        return (losses, metrics), gradient, updates

    return model, variables, apply


def test_prototypes_are_tokens_of_the_first_batch_and_of_no_other():
    """With momentum 1 they stay as they were chosen."""
    _, variables, apply = initialised(prototype_momentum=1.0)
    inputs = drawn_inputs()
    chosen = apply(variables, inputs)[2]["objective_state"]
    tokens = np.asarray(unit_rows(inputs.teacher["tokens"])).reshape(-1, 16)
    for j, codes in enumerate((4, 7)):
        prototypes = np.asarray(chosen[f"prototypes{j}"])
        nearest = (prototypes @ tokens.T).argmax(-1)
        np.testing.assert_allclose(prototypes, tokens[nearest], atol=1e-6)
        assert len(set(nearest.tolist())) == codes
        assert not np.allclose(prototypes, variables["objective_state"][f"prototypes{j}"], atol=0.1)
    other = drawn_inputs(step=1, tokens=inputs.teacher["tokens"][:, ::-1] + 0.5)
    later = apply(variables | {"objective_state": chosen}, other)[2]["objective_state"]
    for name, before in chosen.items():
        np.testing.assert_allclose(later[name], before, atol=1e-6)


def test_targets_come_from_the_prototypes_before_the_update():
    """With momentum 0 the prototypes jump, and the divergence is that of the targets of those before."""
    _, variables, apply = initialised(prototype_momentum=0.0, temperature_steps=0)
    inputs = drawn_inputs(step=1)
    features = unit_rows(inputs.teacher["tokens"])
    head = {name: jax.tree.map(jnp.zeros_like, leaf) for name, leaf in variables["params"]["head"].items()}
    flat = variables | {"params": variables["params"] | {"head": head}}
    (_, metrics), _, updates = apply(flat, inputs)
    expected = 0
    for j, codes in enumerate((4, 7)):
        similarity = cosines(features, variables["objective_state"][f"prototypes{j}"])
        targets = sinkhorn_targets(similarity, temperature=0.07, rounds=3, axis_name=None)
        expected += divergence(targets, jnp.full(targets.shape, -np.log(codes))).mean() / 2
        moved = unit_rows(jnp.einsum("blk,bld->kd", targets, features))
        np.testing.assert_allclose(updates["objective_state"][f"prototypes{j}"], moved, atol=1e-5)
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-5)


def test_temperatures_follow_the_step():
    """At later steps the targets are sharper."""
    _, variables, apply = initialised(prototype_momentum=1.0, temperature_steps=10)
    head = {name: jax.tree.map(jnp.zeros_like, leaf) for name, leaf in variables["params"]["head"].items()}
    flat = variables | {"params": variables["params"] | {"head": head}}
    kl = [float(apply(flat, drawn_inputs(step=step))[0][1]["kl"]) for step in (1, 5, 10, 20)]
    assert kl[0] < kl[1] < kl[2] == kl[3]


def test_constant_features_show_as_dead_prototypes():
    """All tokens have the same nearest prototype, though Sinkhorn's targets stay balanced."""
    _, variables, apply = initialised()
    noise = 1e-3 * jax.random.normal(jax.random.key(0), (4, 32, 16))
    constant = jnp.sin(jnp.arange(16.0)) + noise
    (_, metrics), gradient, _ = apply(variables, drawn_inputs(step=1, tokens=constant))
    assert metrics["perplexity"] == pytest.approx(1.0)
    assert metrics["dead_codes"] == pytest.approx((4 - 1 + 7 - 1) / (4 + 7))
    same = jnp.broadcast_to(constant[0, 0], constant.shape)
    (losses, metrics), gradient, _ = apply(variables, drawn_inputs(step=0, tokens=same))
    assert metrics["perplexity"] == pytest.approx(1.0)
    assert all(np.isfinite(loss) for loss in losses.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    (_, metrics), _, _ = apply(variables, drawn_inputs(step=1))
    assert metrics["dead_codes"] == 0
    assert metrics["perplexity"] > 4


def test_no_masked_token():
    """The masked losses are 0; with nothing else to learn from, so is the gradient."""
    _, variables, apply = initialised(probability=0.0)
    (losses, _), gradient, _ = apply(variables, drawn_inputs(step=1))
    assert losses["masked_loss0"] == losses["masked_loss1"] == 0
    assert losses["visible_loss0"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    _, variables, apply = initialised(probability=0.0, alpha=1.0)
    (losses, _), gradient, _ = apply(variables, drawn_inputs(step=1))
    assert losses == {"masked_loss0": 0, "masked_loss1": 0}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_evaluation_leaves_the_prototypes_alone():
    model, variables, _ = initialised()
    evaluate = functools.partial(model.apply, train=False, mutable=["objective_state"])
    (losses, _), updates = jax.jit(evaluate)(variables, drawn_inputs(), rngs={"objective": jax.random.key(0)})
    for name, before in variables["objective_state"].items():
        np.testing.assert_array_equal(before, updates["objective_state"][name])
    assert all(np.isfinite(values).all() for values, _ in losses.values())


def test_more_codes_than_tokens_are_refused():
    model = small(codes=(4, 129))
    variables = jax.eval_shape(functools.partial(model.init, train=False), RNGS, drawn_inputs())
    step = functools.partial(model.apply, train=True, mutable=COLLECTIONS)
    with pytest.raises(ValueError, match="codes=129"):
        jax.eval_shape(step, variables, drawn_inputs(), rngs=RNGS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("hubertpp", {"codes": ()}),
        ("hubertpp", {"codes": (8, 1)}),
        ("hubertpp", {"alpha": 1.5}),
        ("hubertpp", {"student_temperature": 0.0}),
        ("hubertpp", {"teacher_temperature_start": -1.0}),
        ("hubertpp", {"temperature_steps": -1}),
        ("hubertpp", {"sinkhorn_rounds": 0}),
        ("hubertpp", {"prototype_momentum": 2.0}),
        ("hubert", {"codes": 1}),
        ("hubert", {"alpha": -0.1}),
        ("hubert", {"temperature": 0.0}),
    ],
)
def test_bad_values_are_refused(name, fields):
    (field,) = fields
    with pytest.raises(ValueError, match=f"{field}="):
        small(name=name, **fields)


def test_offline_loss():
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32), rng.integers(-1, 5, (2, 9))
    labels[0, 0], labels[1, 8] = -1, 4
    loss = hubert_loss(logits, jnp.asarray(labels))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.maximum(labels, 0)[..., None], -1)[..., 0]) * (labels >= 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    grad = jax.grad(lambda logits: hubert_loss(logits, jnp.asarray(labels)).sum())(logits)
    assert (grad[labels < 0] == 0).all()
    assert (np.abs(grad[labels >= 0]).max(-1) > 0).all()


def offline_apply(labels, variables=None, **fields):
    _, initial, apply = initialised(name="hubert", **fields)
    return apply(variables or initial, drawn_inputs(labels=labels))


@pytest.mark.parametrize(("term", "probability"), [("masked_loss", 1.0), ("visible_loss", 0.0)])
def test_tokens_without_label_count_nowhere(term, probability):
    """The means are over the labelled tokens, here all of them masked or all of them visible."""
    fields = {"probability": probability, "alpha": 0.25}
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 32)), jnp.int32)
    (everywhere, _), _, _ = offline_apply(labels, **fields)
    (half, _), _, _ = offline_apply(labels.at[2:].set(-1), **fields)
    (other, _), _, _ = offline_apply(labels.at[:2].set(-1), **fields)
    np.testing.assert_allclose((half[term] + other[term]) / 2, everywhere[term], rtol=1e-5)
    assert half[term] != other[term]
    (none, metrics), gradient, _ = offline_apply(jnp.full((4, 32), -1), **fields)
    assert none == {"masked_loss": 0, "visible_loss": 0}
    assert metrics["accuracy"] == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_alpha_divides_between_masked_and_visible():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 32)), jnp.int32)
    (only, _), _, _ = offline_apply(labels)
    (both, _), _, _ = offline_apply(labels, alpha=0.25)
    assert set(only) == {"masked_loss"}
    np.testing.assert_allclose(both["masked_loss"], 0.25 * only["masked_loss"], rtol=1e-5)
    assert both["visible_loss"] > 0
    (spared, _), _, _ = offline_apply(labels, alpha=0.25, probability=0.0)
    assert spared["masked_loss"] == 0
    assert spared["visible_loss"] > 0


def test_predictions_of_one_code_show():
    """Embeddings that all point away from the tokens but one: perplexity 1, chance accuracy."""
    _, variables, _ = initialised(name="hubert")
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 32)), jnp.int32)
    direction = jnp.sin(jnp.arange(16.0))
    head = {"kernel": jnp.zeros((16, 16)), "bias": direction}
    embeddings = jnp.tile(-direction, (5, 1)).at[3].set(direction)
    planted = variables | {"params": variables["params"] | {"head": head, "code_embeddings": embeddings}}
    (losses, metrics), _, _ = offline_apply(labels, planted)
    assert metrics["perplexity"] == pytest.approx(1.0)
    assert 0 < metrics["accuracy"] < 0.5
    # Cosines of 1 and -1 at temperature 0.1.
    wrong = 1 - metrics["accuracy"]
    np.testing.assert_allclose(losses["masked_loss"], wrong * 20, rtol=1e-3)
    (_, metrics), _, _ = offline_apply(labels)
    assert metrics["perplexity"] > 1.5


def test_offline_needs_labels_but_not_to_initialise():
    model, variables, _ = initialised(name="hubert")
    for train in (True, False):
        with pytest.raises(ValueError, match="offline labels"):
            jax.eval_shape(
                functools.partial(model.apply, train=train, mutable=COLLECTIONS),
                variables, drawn_inputs(), rngs=RNGS,
            )  # fmt: skip
