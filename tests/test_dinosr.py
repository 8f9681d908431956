"""DinoSR: parity of loss and whole steps, its codebooks, and a collapse that shows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.objectives.clustering import nearest_code, update_codebook
from ecg_jax.objectives.contract import Inputs, mean_over_tokens
from ecg_jax.objectives.dinosr import DinoSR, dinosr_features, dinosr_loss
from ecg_jax.objectives.masking import Masking
from golden_steps import FixedMask, assert_after, assert_gradients, run_reference_steps, unpacked
from tiny_runs import OWN, TOKENS, run_mapped


def global_mean(term):
    values, weights = term
    return (values * weights).sum() / jnp.where(weights.sum() > 0, weights.sum(), 1.0)


@pytest.mark.parametrize("temperature", ["1.0", "0.5"])
@pytest.mark.parametrize("hooks", ["one_hook", "two_hooks"])
def test_loss_parity(hooks, temperature):
    """The reference gives each hook a slice as wide as all codebooks together and uses its first block; `DinoSR` puts
    the blocks side by side, with idle logits, if any, behind them. The loss is the same.
    """
    golden = group(load_golden("dinosr"), "loss/")
    codes = golden["meta/kmeans_ks"]
    labels = golden[f"in/labels_{hooks}"].astype(np.int32)
    labels = labels if hooks == "two_hooks" else labels[None]

    def objective(logits):
        slices = logits.reshape(*logits.shape[:2], len(labels), codes.sum())[..., : codes[0]]
        loss = dinosr_loss(jnp.moveaxis(slices, 2, 0), labels, temperature=float(temperature))
        return global_mean(mean_over_tokens(loss, golden["in/mask"]))

    loss, grad = jax.value_and_grad(objective)(golden[f"in/logits_{hooks}"])
    expected = group(golden, f"out/{hooks}_T{temperature}/")
    assert_close(loss, expected["loss"], 2e-6, "loss")
    assert_close(grad, expected["grad"], 2e-6, "grad")


def test_two_steps_of_the_reference():
    golden = load_golden("ssl_steps_dinosr")
    tokens = golden["in/x"].shape[-1] // 2

    def codebooks(prefix):
        stored = group(golden, f"{prefix}/ts_encoder.ema.clustering.0.")
        names = {"codebook": "codebook", "code_sum": "code_sum", "code_count": "code_cnt"}
        return {ours: jnp.asarray(stored[theirs])[None] for ours, theirs in names.items()}

    start, codes = codebooks("sd"), len(golden["sd/ts_encoder.ema.clustering.0.code_cnt"])
    outputs = len(golden["sd/ts_encoder.head_ssl.s4.decoder.bias"])

    def objective(encoder, width, step):
        hidden = unpacked(golden["in/mask"][step], tokens)
        return DinoSR(
            encoder=encoder, width=width, mask=FixedMask(hidden, hidden), top_k=1, codes=codes,
            idle_logits=outputs - codes, head_dropout=0.0,
        )  # fmt: skip

    results, gradients, state = run_reference_steps(golden, objective, objective_state=start)
    codebook, code_sum, code_count = (start[name][0] for name in ("codebook", "code_sum", "code_count"))
    for step, (metrics, teacher) in enumerate(results):
        expected = group(golden, f"out/step{step}/")
        assert_close(metrics["loss"], expected["total"], 1e-5, f"loss {step}")
        (features,) = dinosr_features([teacher["tokens"]])
        labels = nearest_code(features, codebook)
        np.testing.assert_array_equal(labels, expected["assignments"])
        codebook, code_sum, code_count = update_codebook(
            code_sum, code_count, features, labels, momentum=0.9, axis_name=None
        )
    assert_gradients(golden, gradients)
    assert_after(golden, state)
    for name, expected in codebooks("after").items():
        assert_close(state.objective_state[name], expected, 1e-4, name)


def test_chance_level():
    """Equal logits cost ln K whatever the labels (spec §11.3)."""
    loss = dinosr_loss(jnp.zeros((2, 3, 5, 256)), jnp.ones((2, 3, 5), jnp.int32), temperature=0.3)
    np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)


def test_features_are_standard_token_by_token():
    layers = [jnp.asarray(np.random.default_rng(i).normal(3, 5, (2, 7, 64))) for i in range(2)]
    features = dinosr_features(layers)
    assert features.shape == (2, 2, 7, 64)
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(-1), 1, rtol=1e-4)


CODES = 6


class PairsOfSamples(nn.Module):
    """An encoder that compiles in no time: a linear map of two samples for each token. Where a token is hidden the
    mask token is added, so that tokens differ there too.
    """

    l_max: int = 32
    conv: str = "fft"

    @nn.compact
    def __call__(self, x, record_index, *, train, hidden, mask_token):
        encoded = nn.Dense(16)(x.reshape(x.shape[0], x.shape[1] // 2, -1))
        return jnp.tanh(encoded + hidden[..., None] * mask_token), {}


def small(encoder=None, probability=0.2, **fields):
    mask = Masking(probability=probability, span=4)
    encoder = encoder or PairsOfSamples()
    return DinoSR(encoder=encoder, width=16, mask=mask, head_state=8, **{"codes": CODES} | fields)


def test_a_run_moves_its_codebooks():
    run = run_mapped("dinosr", "described", 1)
    codes, tokens = int(OWN["dinosr"]["objective.codes"]), 16 * TOKENS
    start, end = run.start.objective_state, run.last.objective_state
    assert {name: leaf.shape for name, leaf in start.items()} == {
        "codebook": (2, codes, 16), "code_sum": (2, codes, 16), "code_count": (2, codes),
    }  # fmt: skip
    np.testing.assert_allclose(start["codebook"].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(start["codebook"].std(-1), 1, rtol=1e-3)
    for name, leaf in end.items():
        assert not np.allclose(leaf, start[name]), name
    # Every token of the global batch counts in each codebook.
    m = 0.9
    np.testing.assert_allclose(end["code_count"].sum(-1), m**3 * codes + (1 - m**3) * tokens, rtol=1e-5)
    assert all(0 < entry["accuracy"] < 1 and 1.5 < entry["perplexity"] <= codes for entry in run.log)
    assert all(0.2 < entry["masked_share"] < 0.9 for entry in run.log)


@functools.cache
def initialised(**fields):
    """A small objective, its variables, and jitted (params, inputs) -> (loss, gradient)."""
    model = small(**fields)
    rngs = {name: jax.random.key(i) for i, name in enumerate(("params", "objective"))}
    variables = jax.jit(functools.partial(model.init, train=False))(rngs, drawn_inputs())

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params, inputs):
        losses, _ = model.apply(variables | {"params": params}, inputs, train=False, rngs=rngs)
        return global_mean(losses["code_loss"])

    return model, variables, loss_and_gradient


def drawn_inputs(**changes):
    rng = np.random.default_rng(0)
    layers = {f"block{i}": jnp.asarray(rng.normal(size=(4, 32, 16)), jnp.float32) for i in range(3)}
    layers |= {f"layer{i}": 7 * layers[f"block{i}"] for i in range(3)} | changes
    return Inputs(
        x=jnp.asarray(rng.normal(size=(4, 64, 12)), jnp.float32), record_index=jnp.arange(4),
        step=jnp.int32(0), teacher=layers | {"tokens": layers["block2"], "stem": layers["block0"]},
    )  # fmt: skip


def test_each_layer_has_a_codebook_and_a_block_of_logits():
    _, variables, loss_and_gradient = initialised(idle_logits=5)

    def decoder_gradient(inputs):
        return np.asarray(loss_and_gradient(variables["params"], inputs)[1]["head"]["decoder"]["kernel"])

    inputs = drawn_inputs()
    before = decoder_gradient(inputs)
    assert before.shape == (16, 2 * CODES + 5)
    assert (before[:, 2 * CODES :] == 0).all()
    assert (np.abs(before[:, : 2 * CODES]).max(axis=0) > 0).all()
    blocks = {"block0": [], "block1": slice(0, CODES), "block2": slice(CODES, 2 * CODES)}
    for name, own in blocks.items():
        moved = drawn_inputs(**{name: -inputs.teacher[name]})
        changed = np.abs(decoder_gradient(moved) - before).max(axis=0) > 1e-6
        expected = np.zeros(2 * CODES + 5, bool)
        expected[own] = True
        np.testing.assert_array_equal(changed, expected, err_msg=name)


def test_labels_come_from_the_codebook_before_the_update():
    """A codeword on all tokens jumps away in the update, and still is their label in that step."""
    model, variables, _ = initialised()
    row = jnp.sin(jnp.arange(16.0))
    inputs = drawn_inputs(**{f"block{i}": jnp.tile(row, (4, 32, 1)) for i in range(3)})
    hit = np.array([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])  # in each codebook
    features = dinosr_features([row])[0]
    planted = variables["objective_state"] | {
        "codebook": jnp.where(hit[..., None], features, -features),
        "code_sum": jnp.where(hit[..., None], -100 * features, -features),
    }
    decoder = {"kernel": jnp.zeros((16, 2 * CODES)), "bias": 50.0 * hit.reshape(-1)}
    params = variables["params"] | {"head": variables["params"]["head"] | {"decoder": decoder}}
    rngs = {name: jax.random.key(i) for i, name in enumerate(("objective", "dropout"))}
    step = functools.partial(model.apply, train=True, mutable=["objective_state"])
    (losses, metrics), updates = jax.jit(step)(
        variables | {"params": params, "objective_state": planted}, inputs, rngs=rngs
    )
    assert global_mean(losses["code_loss"]) < 1e-6
    assert global_mean(metrics["accuracy"]) == 1
    after = updates["objective_state"]
    np.testing.assert_allclose(after["code_count"], 0.9 + 0.1 * 128 * hit, rtol=1e-6)
    moved_to = (0.9 * -100 + 0.1 * 128) / (0.9 + 0.1 * 128)
    np.testing.assert_allclose(
        after["codebook"], np.where(hit[..., None], moved_to * features, -features), rtol=1e-5
    )


def test_a_dead_codebook_shows():
    """Codewords out of reach of every token: at once perplexity 1, and all but one of each codebook dead."""
    _, variables, _ = initialised()
    far = jnp.full_like(variables["objective_state"]["codebook"], 1e3).at[:, 0].set(0.0)
    planted = variables | {
        "objective_state": variables["objective_state"] | {"codebook": far, "code_sum": far}
    }
    rngs = {name: jax.random.key(i) for i, name in enumerate(("objective", "dropout"))}
    step = functools.partial(small().apply, train=True, mutable=["objective_state"])
    (_, metrics), _ = jax.jit(step)(planted, drawn_inputs(), rngs=rngs)
    assert global_mean(metrics["perplexity"]) == pytest.approx(1.0)
    assert global_mean(metrics["dead_codes"]) == pytest.approx((CODES - 1) / CODES)
    healthy = run_mapped("dinosr", "described", 1).log[-1]
    assert healthy["dead_codes"] < 0.5
    assert healthy["perplexity"] > 2


def test_no_masked_token_costs_nothing():
    _, variables, loss_and_gradient = initialised(probability=0.0)
    loss, gradient = loss_and_gradient(variables["params"], drawn_inputs())
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_evaluation_leaves_the_codebooks_alone():
    model, variables, _ = initialised()
    evaluate = functools.partial(model.apply, train=False, mutable=["objective_state"])
    _, updates = jax.jit(evaluate)(variables, drawn_inputs(), rngs={"objective": jax.random.key(0)})
    for name, before in variables["objective_state"].items():
        np.testing.assert_array_equal(before, updates["objective_state"][name])


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 0}, {"codes": 1}, {"codebook_momentum": 1.0}, {"temperature": 0.0}, {"idle_logits": -1}],
)
def test_bad_values_are_refused(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}="):
        small(**fields)


def test_more_layers_than_the_teacher_has_are_refused():
    with pytest.raises(ValueError, match="top_k=4"):
        initialised(top_k=4)
