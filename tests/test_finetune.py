"""Fine-tuning: parts of the model learn at their own rates, interrupted fits go on, devices do not matter."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu.parameter_overview import count_parameters
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from conftest import assert_close
from ecg_jax.data.pipeline import shuffled_by_position, uniform_by_position
from ecg_jax.errors import UserError
from ecg_jax.evaluation import finetune, head_training
from ecg_jax.evaluation.finetune import fit_finetune, learning_rate_factors
from ecg_jax.evaluation.fit_folder import FitFolder
from ecg_jax.evaluation.metrics import macro_auroc
from ecg_jax.evaluation.tasks import TaskUnavailable
from ecg_jax.training.optim import build_optimiser
from ecg_jax.training.parallel import AXIS
from tiny_probes import one_device, tiny_encoder, tiny_examples, with_parts

ALIKE = {"head": 1.0, "backbone": 1.0, "stem": 1.0}


def fit(examples, encoder=None, **settings):
    defaults = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "factors": ALIKE, "mesh": one_device()}
    return fit_finetune(encoder or tiny_encoder(), examples, **defaults | settings)


def test_rhythm_is_learnt(synthetic_store):
    examples = tiny_examples(synthetic_store)
    fitted = fit(examples, epochs=24, learning_rate=2e-2, seed=1)
    curve, report = fitted.report["curve"], fitted.report
    assert macro_auroc(examples.test.targets, fitted.test) > 0.75
    assert curve[-1]["loss"] < 0.75 * curve[0]["loss"]
    assert report["validation"] == max(epoch["validation"] for epoch in curve)
    assert report["validation"] == curve[report["best_epoch"] - 1]["validation"]
    # The network that predicts is the one of the best epoch, in evaluation mode with its own statistics.
    assert macro_auroc(examples.val.targets, fitted.val) == report["validation"]
    assert report["parameters"] == count_parameters(tiny_encoder().variables["params"]) + 17 * 4
    assert (report["head"], report["attention_heads"]) == ("linear", None)
    json.dumps(report, allow_nan=False)


def test_an_attention_head_can_be_fine_tuned(synthetic_store):
    fitted = fit(tiny_examples(synthetic_store), epochs=1, head="attention", attention_heads=4)
    assert (fitted.report["head"], fitted.report["attention_heads"]) == ("attention", 4)
    n_head = 16 + 3 * 16 * 16 + 16 * 4
    assert fitted.report["parameters"] == count_parameters(tiny_encoder().variables["params"]) + n_head


def test_a_killed_fit_goes_on_to_the_same_bits(synthetic_store, tmp_path, monkeypatch):
    examples, settings = tiny_examples(synthetic_store), {"epochs": 4}
    whole = fit(examples, **settings)
    saved = []

    def save_and_die(keeper, state, save=FitFolder.save):
        save(keeper, state)
        saved.append(len(json.loads(state["curve"])))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FitFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            fit(examples, **settings, folder=tmp_path)
        resumed = fit(examples, **settings, folder=tmp_path)
    assert saved == [1, 2, 3, 4]  # no epoch twice
    np.testing.assert_array_equal(resumed.test, whole.test)
    np.testing.assert_array_equal(resumed.val, whole.val)
    assert resumed.report == whole.report

    monkeypatch.setattr(finetune, "_Run", None)  # a finished fit trains nothing
    again = fit(examples, **settings, folder=tmp_path)
    np.testing.assert_array_equal(again.test, whole.test)
    assert again.report == json.loads(json.dumps(whole.report))
    with pytest.raises(UserError, match=r"holds another fit \(other learning_rate, seed\)"):
        fit(examples, **settings, folder=tmp_path, seed=5, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"holds another fit \(other encoder\)"):
        fit(examples, tiny_encoder(seed=1), **settings, folder=tmp_path)
    (tmp_path / "fitted.npz").write_bytes(b"PK\x03\x04half")
    with pytest.raises(UserError, match=r"fitted\.npz cannot be read .*; remove it to fit again"):
        fit(examples, **settings, folder=tmp_path)


def test_the_best_epoch_predicts_though_killed_after_it(synthetic_store, tmp_path, monkeypatch):
    examples = tiny_examples(synthetic_store)
    first = fit(examples, epochs=1)
    save, scores = FitFolder.save, iter([0.9, 0.4, 0.9, 0.6])  # of equal ones the earlier

    def save_and_die(keeper, state):
        save(keeper, state)
        if len(json.loads(state["curve"])) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(head_training, "score", lambda *_: next(scores))
    monkeypatch.setattr(FitFolder, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(examples, epochs=4, folder=tmp_path)
    resumed = fit(examples, epochs=4, folder=tmp_path)
    assert resumed.report["best_epoch"] == 1
    np.testing.assert_array_equal(resumed.test, first.test)


def test_devices_do_not_matter(synthetic_store):
    """Loss before any update exactly but for rounding; then Adam makes rounding a little larger."""
    eight = Mesh(np.asarray(jax.devices()[:8]), (AXIS,))
    examples = tiny_examples(synthetic_store, sizes=(16, 24, 24))  # one step in each epoch
    settings = {"epochs": 2, "learning_rate": 1e-3}
    one, many = fit(examples, **settings), fit(examples, **settings, mesh=eight)
    losses = [[epoch["loss"] for epoch in fitted.report["curve"]] for fitted in (one, many)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-6)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=2e-4)
    np.testing.assert_allclose(one.val, many.val, atol=2e-3)


def test_each_part_moves_at_its_own_rate(synthetic_store, monkeypatch):
    """A factor of zero leaves a part where it was, statistics of BatchNorm aside."""
    states = []
    keep = FitFolder.save
    monkeypatch.setattr(FitFolder, "save", lambda self, state: (states.append(state), keep(self, state)))
    encoder = tiny_encoder()
    fit(
        tiny_examples(synthetic_store),
        encoder,
        epochs=1,
        factors={"head": 1.0, "backbone": 0.1, "stem": 0.0},
        weight_decay=0.0,
    )
    after, before = states[0]["state"]["params"]["encoder"], encoder.variables["params"]
    for ours, first in zip(jax.tree.leaves(after["stem"]), jax.tree.leaves(before["stem"]), strict=True):
        np.testing.assert_array_equal(ours, first)
    # Adam moves a leaf by about the learning rate in each of three steps.
    moved = np.abs(after["backbone"]["layer0"]["C"] - before["backbone"]["layer0"]["C"])
    assert 0.5 * 1e-3 < moved.max() < 3.1 * 1e-3
    stats = states[0]["state"]["moving"]["batch_stats"]["encoder"]["stem"]["norm0"]["mean"]
    assert np.abs(stats - encoder.variables["batch_stats"]["stem"]["norm0"]["mean"]).max() > 0


def test_the_encoder_outlives_the_fit(synthetic_store):
    """A training step donates its state; the arrays that were handed over are not part of it."""
    encoder = dataclasses.replace(tiny_encoder(), variables=jax.device_put(tiny_encoder().variables))
    examples = tiny_examples(synthetic_store)
    first, second = (fit(examples, encoder, epochs=1) for _ in range(2))
    np.testing.assert_array_equal(first.test, second.test)
    for ours, before in zip(
        *map(jax.tree.leaves, (encoder.variables, tiny_encoder().variables)), strict=True
    ):
        np.testing.assert_array_equal(ours, before)


def test_an_epoch_has_one_uniform_crop_of_each_record(synthetic_store):
    """In the order of the pretraining pipeline, the last incomplete batch left out."""
    part = tiny_examples(synthetic_store, sizes=(50, 4, 4)).train
    starts, window = [], 1437  # 1440 samples: four possible crops
    for epoch in range(3):
        read = head_training.crop_reader(part, window=window, seed=3, epoch=epoch, batch_size=16)
        seen = []
        for step in range(3):
            batch = read(step)
            position = epoch * 50 + step * 16 + np.arange(16)
            chosen = shuffled_by_position(3, position, 50)
            np.testing.assert_array_equal(batch["targets"], part.targets[chosen])
            signals = [part.store.read(part.rows[i]) for i in chosen]
            for signal, crop, u in zip(
                signals, batch["signal"], uniform_by_position(3, position), strict=True
            ):
                starts.append(int(4 * u))
                np.testing.assert_array_equal(crop, signal[starts[-1] : starts[-1] + window])
            seen += chosen.tolist()
        assert len(set(seen)) == 48
    assert set(starts) == {0, 1, 2, 3}  # the last one too


def test_learning_rate_factors():
    leaf = jnp.zeros(2)
    backbone = {name: {"kernel": leaf} for name in ("input", "layer0", "norm0", "layer1", "norm1", "norm")}
    params = {"encoder": {"stem": {"conv0": {"kernel": leaf}}, "backbone": backbone}, "head": {"c": leaf}}
    got = learning_rate_factors(params, finetune.FACTORS, 1.0)
    assert set(jax.tree.leaves(got["encoder"]["backbone"])) == {0.1}
    assert got["encoder"]["stem"]["conv0"]["kernel"] == 0.01
    assert got["head"]["c"] == 1.0
    got = learning_rate_factors(params, ALIKE, 0.5)
    assert {name: tree["kernel"] for name, tree in got["encoder"]["backbone"].items()} == {
        "input": 0.125, "layer0": 0.25, "norm0": 0.25, "layer1": 0.5, "norm1": 0.5, "norm": 1.0,
    }  # fmt: skip
    assert got["encoder"]["stem"]["conv0"]["kernel"] == 0.125
    assert got["head"]["c"] == 1.0
    with pytest.raises(ValueError, match="factors has no value for stem"):
        learning_rate_factors(params, {"head": 1.0, "backbone": 1.0}, 1.0)


def test_adamw_is_that_of_pretraining():
    """Which is held to the reference's steps by `test_optim`."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": {"stem": {"a": rng.normal(size=4)}, "backbone": {"layer0": {"B": rng.normal(size=3)}}},
        "head": {"w": rng.normal(size=(2, 2))},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    factors = finetune.FACTORS | {"ssm": 0.1}
    tx = build_optimiser(
        lambda step: 3e-3, factors=factors, weight_decay=0.1, b1=0.9, b2=0.999, eps=1e-8, clip_norm=0
    )
    theirs, ours, state, moments = params, params, tx.init(params), head_training.ADAM.init(params)
    rates = jax.tree.map(lambda f: 3e-3 * f, learning_rate_factors(params, finetune.FACTORS, 1.0))
    decays = {"encoder": {"stem": {"a": True}, "backbone": {"layer0": {"B": False}}}, "head": {"w": True}}

    @jax.jit
    def step(theirs, state, ours, moments, grads):
        updates, state = tx.update(grads, state, theirs)
        settings = {"learning_rates": rates, "weight_decay": 0.1, "decays": decays}
        moved = head_training.adamw(ours, grads, moments, **settings)
        return optax.apply_updates(theirs, updates), state, *moved

    for _ in range(3):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        theirs, state, ours, moments = step(theirs, state, ours, moments, grads)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b, 1e-6)


def mapped_loss(n_devices, regression):
    """(outputs, targets) -> (loss, gradient with respect to the outputs)."""
    mesh = Mesh(np.asarray(jax.devices()[:n_devices]), (AXIS,))

    def step(outputs, targets):
        def loss_fn(o):
            return head_training.masked_loss(o, targets, regression=regression, axis_name=AXIS)

        return jax.value_and_grad(loss_fn)(outputs)

    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(AXIS), out_specs=(P(), P(AXIS)), check_vma=True))


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("regression", [False, True])
def test_the_loss_is_the_mean_over_labels_of_their_known_records(regression, n_devices):
    """Spec §7.2, against a loop."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(16, 5)).astype(np.float32)
    targets = rng.integers(0, 2, size=(16, 5)).astype(np.float32)
    # Labels known everywhere, mostly, rarely, once and never.
    targets[rng.random(targets.shape) < [0, 0.3, 0.8, 1, 1]] = np.nan
    targets[:2, 1:] = np.nan  # of the first of eight devices little is known
    targets[9, 3] = 1.0
    per_label, slope = [], np.zeros(targets.shape)
    for k in range(5):
        terms = []
        for i in range(16):
            o, t = float(outputs[i, k]), float(targets[i, k])
            if not np.isnan(t):
                terms.append(abs(o - t) if regression else np.logaddexp(0, o) - t * o)
                slope[i, k] = np.sign(o - t) if regression else 1 / (1 + np.exp(-o)) - t
        if terms:
            per_label.append(sum(terms) / len(terms))
            slope[:, k] /= len(terms)
    assert len(per_label) == 4
    loss, grad = mapped_loss(n_devices, regression)(outputs, targets)
    assert float(loss) == pytest.approx(np.mean(per_label), rel=1e-6)
    assert (np.asarray(grad)[np.isnan(targets)] == 0).all()
    # `map_training` takes the mean over devices of the gradients of what they share.
    assert_close(np.asarray(grad) / np.abs(grad).sum(), slope / np.abs(slope).sum(), 1e-5)


def test_the_loss_where_all_or_nothing_is_known():
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(16, 3)).astype(np.float32)
    targets = rng.integers(0, 2, size=(16, 3)).astype(np.float32)
    loss = mapped_loss(8, False)
    expected = np.logaddexp(0, outputs) - targets * outputs
    assert float(loss(outputs, targets)[0]) == pytest.approx(expected.mean(), rel=1e-6)
    nothing, grad = loss(outputs, np.full_like(targets, np.nan))
    assert nothing == 0
    assert (np.asarray(grad) == 0).all()


def test_regression_with_unknown_targets(synthetic_store):
    examples = tiny_examples(synthetic_store)
    store = examples.train.store
    labels = store.column("labels_synthetic")
    # Leads I and aVF tell the axis apart; the second target is known for every third record only.
    value = np.array([-1.0 if "axis_left" in n else 1.0 if "axis_right" in n else 0.0 for n in labels])
    targets = np.stack([value, -value], axis=1)
    targets[np.arange(len(store)) % 3 > 0, 1] = np.nan
    examples = tiny_examples(synthetic_store, targets=targets, task="mimic_biometrics")
    fitted = fit(examples, epochs=16, learning_rate=2e-2)
    assert fitted.report["metric"] == "mae"
    curve = [epoch["validation"] for epoch in fitted.report["curve"]]
    assert fitted.report["validation"] == min(curve)
    error = np.nanmean(np.abs(fitted.test - examples.test.targets), axis=0)
    median = np.nanmedian(examples.train.targets, axis=0)
    assert (error < 0.6 * np.nanmean(np.abs(median - examples.test.targets), axis=0)).all()


def test_what_cannot_be_trained_is_refused(synthetic_store):
    examples = tiny_examples(synthetic_store)
    eight = Mesh(np.asarray(jax.devices()[:8]), (AXIS,))
    with pytest.raises(
        UserError,
        match=r"--config\.finetune\.batch_size=12 cannot be shared evenly by 8 devices; use a multiple of 8",
    ):
        fit(examples, batch_size=12, mesh=eight)
    with pytest.raises(
        TaskUnavailable, match=r"48 training records, fewer than --config\.finetune\.batch_size=64"
    ):
        fit(examples, batch_size=64)
    with pytest.raises(TaskUnavailable, match="5 training records, fewer than the 8 devices"):
        fit(tiny_examples(synthetic_store, sizes=(5, 24, 24)), batch_size=0, mesh=eight)
    with pytest.raises(UserError, match=r"--config\.finetune\.epochs=0 must be at least 1"):
        fit(examples, epochs=0)
    constant = with_parts(
        examples, val=type(examples.val)(examples.val.store, examples.val.rows, np.ones((24, 4)))
    )
    with pytest.raises(
        TaskUnavailable, match="no class with both positives and negatives among the 24 validation"
    ):
        fit(constant)
    with pytest.raises(ValueError, match="head='mlp' is unknown"):
        fit(examples, head="mlp")
    with pytest.raises(UserError, match=r"finetune\.attention_heads=3 does not divide the width 16"):
        fit(examples, head="attention", attention_heads=3)
    with pytest.raises(
        UserError, match=r"loss of epoch 1 is not finite; lower --config\.finetune\.learning_rate=1e\+30"
    ):
        fit(examples, learning_rate=1e30)
