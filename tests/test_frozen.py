"""The frozen mode: many heads on one encoder's tokens, kept tokens, and what interrupts a fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.errors import UserError
from ecg_jax.evaluation import frozen, head_training
from ecg_jax.evaluation.fit_folder import FitFolder
from ecg_jax.evaluation.frozen import fit_frozen
from ecg_jax.evaluation.metrics import macro_auroc
from ecg_jax.evaluation.token_cache import cached_tokens
from ecg_jax.training.parallel import AXIS
from tiny_probes import one_device, tiny_encoder, tiny_examples, with_parts

GB = 1 << 30


def fit(examples, cache, encoder=None, **settings):
    defaults = {
        "epochs": 3, "batch_size": 16, "learning_rates": (1e-2, 5e-2), "seeds": (0, 1), "weight_decay": 1e-3,
        "token_cache_bytes": 0, "cache_folder": cache, "attention_heads": 4, "mesh": one_device(),
    }  # fmt: skip
    return fit_frozen(encoder or tiny_encoder(), examples, **defaults | settings)


def axis_examples(path):
    """The QRS axis, which a random encoder shows."""
    store = tiny_examples(path).train.store
    labels = store.column("labels_synthetic")
    targets = np.array([["axis_left" in n, "axis_right" in n] for n in labels], np.float32)
    return tiny_examples(path, targets=targets)


@pytest.mark.parametrize("kept", [0, GB])
def test_what_the_tokens_show_is_learnt(synthetic_store, tmp_path, kept):
    examples = axis_examples(synthetic_store)
    fitted = fit(examples, tmp_path, epochs=10, token_cache_bytes=kept)
    report = fitted.report
    assert macro_auroc(examples.test.targets, fitted.test) > 0.9
    assert report["tokens_kept"] == (["train", "val"] if kept else [])
    assert len(list(tmp_path.glob("tokens-*-float16.npy"))) == (2 if kept else 0)
    assert [(head["seed"], head["learning_rate"]) for head in report["grid"]] == [
        (0, 1e-2), (0, 5e-2), (1, 1e-2), (1, 5e-2),
    ]  # fmt: skip
    for number, chosen in enumerate(report["chosen"]):
        heads = report["grid"][2 * number : 2 * number + 2]
        best = max(heads, key=lambda head: head["validation"])
        assert chosen["seed"] == best["seed"]
        assert chosen["validation"] == best["validation"] == max(best["validations"])
        assert best["validations"][best["best_epoch"] - 1] == best["validation"]
    assert macro_auroc(examples.val.targets, fitted.val) == report["chosen"][0]["validation"]
    assert macro_auroc(examples.test.targets, fitted.test) == report["chosen"][0]["test"]
    json.dumps(report, allow_nan=False)


def test_heads_together_equal_heads_one_by_one(synthetic_store, tmp_path):
    examples = axis_examples(synthetic_store)
    for head in fit(examples, tmp_path).report["grid"][:2]:
        alone = fit(examples, tmp_path, seeds=(0,), learning_rates=(head["learning_rate"],)).report["grid"][0]
        np.testing.assert_allclose(alone["losses"], head["losses"], rtol=1e-4)
        np.testing.assert_allclose(alone["validations"], head["validations"], atol=5e-3)


def test_kept_tokens_are_those_of_the_crops(synthetic_store, tmp_path):
    """With room for the validation records only, kept in float32, nothing changes but the time."""
    examples = axis_examples(synthetic_store)
    _, record = examples.val.crops(240)
    room = len(record) * 120 * 16 * 4
    plain = fit(examples, tmp_path)
    kept = fit(examples, tmp_path, token_cache_bytes=room, token_dtype="float32")
    assert kept.report["tokens_kept"] == ["val"]
    assert kept.report["crops"] == plain.report["crops"] == "drawn at random"
    np.testing.assert_allclose(kept.val, plain.val, atol=1e-6)
    (file,) = tmp_path.glob("tokens-*.npy")
    written = file.stat().st_mtime_ns
    # Another fit finds them, another encoder does not.
    fit(examples, tmp_path, token_cache_bytes=room, token_dtype="float32", epochs=1)
    assert file.stat().st_mtime_ns == written
    fit(examples, tmp_path, tiny_encoder(seed=1), token_cache_bytes=room, token_dtype="float32", epochs=1)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 2


def test_kept_training_crops_are_drawn_evenly(synthetic_store, tmp_path, monkeypatch):
    """Every crop of a 6 s record turns up, and only tokens that the encoder gives for such crops."""
    examples, runs = axis_examples(synthetic_store), []
    init = frozen._Tokens.__init__
    monkeypatch.setattr(frozen._Tokens, "__init__", lambda self, *a: (runs.append(self), init(self, *a))[1])
    fit(examples, tmp_path, token_cache_bytes=GB, epochs=1)
    kept, (_, record) = runs[0].kept["train"], examples.train.crops(240)
    seen = np.zeros(len(record), int)
    for epoch in range(40):
        read = runs[0].training_reader(epoch)
        in_epoch = []
        for step in range(3):
            batch = read(step)
            crop = [int(np.flatnonzero((kept == t).all(axis=(1, 2)))[0]) for t in batch["tokens"]]
            np.testing.assert_array_equal(batch["targets"], examples.train.targets[record[crop]])
            in_epoch += record[crop].tolist()
            np.add.at(seen, crop, 1)
        assert sorted(in_epoch) == list(range(48))  # each record once
    runs[0].kept.clear()  # as if there were no room: uniform crops, other ones in each epoch
    for epoch in (0, 1):
        settings = {"window": 240, "seed": 0, "epoch": epoch, "batch_size": 16}
        expected = head_training.crop_reader(examples.train, **settings)(2)["signal"]
        np.testing.assert_array_equal(runs[0].training_reader(epoch)(2)["signal"], expected)
    counts = np.bincount(np.arange(len(seen)) % 6, weights=seen)
    assert seen.max() < 25
    np.testing.assert_allclose(counts, 48 * 40 / 6, rtol=0.2)


def test_a_record_of_unknown_targets_does_not_matter(synthetic_store, tmp_path):
    examples = axis_examples(synthetic_store)
    targets = examples.train.targets.copy()
    targets[[3, 17, 30]] = np.nan
    train = dataclasses.replace(examples.train, targets=targets)
    examples = with_parts(examples, train=train)
    rows = train.rows.copy()
    rows[[3, 17, 30]] = rows[[5, 6, 7]]  # other signals there
    other = with_parts(examples, train=dataclasses.replace(train, rows=rows))
    one, two = fit(examples, tmp_path), fit(other, tmp_path)
    np.testing.assert_array_equal(one.test, two.test)
    rows[0] = rows[8]  # where the target is known a signal does matter
    known = fit(with_parts(examples, train=dataclasses.replace(train, rows=rows)), tmp_path)
    assert np.abs(known.test - one.test).max() > 0


def test_a_killed_fit_goes_on_to_the_same_bits(synthetic_store, tmp_path, monkeypatch):
    examples, folder = axis_examples(synthetic_store), tmp_path / "fit"
    whole = fit(examples, tmp_path)
    saved = []

    def save_and_die(keeper, state, save=FitFolder.save):
        save(keeper, state)
        saved.append(len(state["scores"]))
        if len(saved) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FitFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            fit(examples, tmp_path, folder=folder)
        resumed = fit(examples, tmp_path, folder=folder)
    assert saved == [1, 2, 3]
    np.testing.assert_array_equal(resumed.test, whole.test)
    np.testing.assert_array_equal(resumed.val, whole.val)
    assert resumed.report == whole.report
    monkeypatch.setattr(frozen, "_Heads", None)  # a finished fit trains nothing
    np.testing.assert_array_equal(fit(examples, tmp_path, folder=folder).test, whole.test)
    with pytest.raises(UserError, match=r"holds another fit \(other learning_rates\)"):
        fit(examples, tmp_path, folder=folder, learning_rates=(1e-3,))


def test_the_best_epoch_predicts_though_killed_after_it(synthetic_store, tmp_path, monkeypatch):
    """Each head has its own best epoch."""
    examples = axis_examples(synthetic_store)
    save, heads = FitFolder.save, np.array([[0.5, 0.9, 0.1, 0.1], [0.6, 0.3, 0.2, 0.2], [0.6, 0.1, 0.1, 0.1]])
    scores = iter([*heads.ravel(), *np.zeros(2)])

    def save_and_die(keeper, state):
        save(keeper, state)
        if len(state["scores"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(head_training, "score", lambda *_: next(scores))
    monkeypatch.setattr(FitFolder, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(examples, tmp_path, epochs=3, folder=tmp_path / "fit")
    resumed = fit(examples, tmp_path, epochs=3, folder=tmp_path / "fit")
    assert [head["best_epoch"] for head in resumed.report["grid"]] == [2, 1, 2, 2]
    assert resumed.report["chosen"][0]["learning_rate"] == 5e-2
    # It predicts as a fit of one epoch does with the same head.
    monkeypatch.undo()
    monkeypatch.setattr(frozen._Heads, "_chosen", lambda self, number: 2 * number + 1)
    np.testing.assert_array_equal(resumed.test, fit(examples, tmp_path, epochs=1).test)


def test_devices_do_not_matter(synthetic_store, tmp_path):
    examples = axis_examples(synthetic_store)
    eight = Mesh(np.asarray(jax.devices()[:8]), (AXIS,))
    one, many = (fit(examples, tmp_path, mesh=mesh) for mesh in (one_device(), eight))
    for a, b in zip(one.report["grid"], many.report["grid"], strict=True):
        np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    np.testing.assert_allclose(one.test, many.test, atol=1e-3)


def test_a_head_that_diverges_is_left_out_and_named(synthetic_store, tmp_path):
    examples = axis_examples(synthetic_store)
    report = fit(examples, tmp_path, learning_rates=(1e-2, 1e30)).report
    assert [head["diverged_in_epoch"] for head in report["grid"]] == [None, 1, None, 1]
    assert [chosen["learning_rate"] for chosen in report["chosen"]] == [1e-2, 1e-2]
    assert report["chosen"][0]["learning_rate_at_edge"] == "lowest"
    json.dumps(report, allow_nan=False)
    with pytest.raises(
        UserError, match=r"every head of seed 0 was not finite.*lower learning_rates=\[1e\+30\]"
    ):
        fit(examples, tmp_path, learning_rates=(1e30,))


def test_tokens_are_kept_in_full_or_not_at_all(tmp_path):
    settings = {"key": "k", "starts": np.arange(5), "shape": (2, 3), "dtype": "float16", "batch_size": 2}

    def tokens(first, last):
        return np.arange(first, last)[:, None, None] + np.zeros((1, 2, 3), np.float32)

    def stops(first, last):
        if first >= 2:
            raise KeyboardInterrupt
        return tokens(first, last)

    with pytest.raises(KeyboardInterrupt):
        cached_tokens(tmp_path, stops, **settings)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not finite or too large for float16"):
        cached_tokens(tmp_path, lambda *some: 1e5 * tokens(*some), **settings)
    assert list(tmp_path.iterdir()) == []
    kept = cached_tokens(tmp_path, tokens, **settings)
    np.testing.assert_array_equal(kept, tokens(0, 5))
    assert kept.dtype == np.float16
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="is damaged"):
        cached_tokens(tmp_path, tokens, **settings)


def test_what_cannot_be_trained_is_refused(synthetic_store, tmp_path):
    examples = axis_examples(synthetic_store)
    with pytest.raises(ValueError, match="at least one entry"):
        fit(examples, tmp_path, seeds=())
    with pytest.raises(ValueError, match="token_dtype='bfloat16' is unknown"):
        fit(examples, tmp_path, token_dtype="bfloat16")
    with pytest.raises(UserError, match="fewer than batch_size=64"):
        fit(examples, tmp_path, batch_size=64)
