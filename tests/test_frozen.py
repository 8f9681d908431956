"""The frozen mode: many heads on one encoder's tokens, kept tokens, and what interrupts a fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.errors import UserError
from ecg_jax.evaluation import frozen, head_training
from ecg_jax.evaluation.examples import Fitted
from ecg_jax.evaluation.fit_folder import FitFolder
from ecg_jax.evaluation.frozen import fit_frozen
from ecg_jax.evaluation.metrics import macro_auroc
from ecg_jax.evaluation.tasks import TaskUnavailable
from ecg_jax.evaluation.token_cache import kept_tokens
from ecg_jax.training.parallel import AXIS
from tiny_probes import one_device, tiny_encoder, tiny_examples, with_parts

GB = 1 << 30


def fit(examples, encoder=None, **settings):
    defaults = {
        "epochs": 3, "batch_size": 16, "learning_rates": (1e-2, 5e-2), "seeds": (0, 1), "weight_decay": 1e-3,
        "token_cache_bytes": 0, "attention_heads": 4, "mesh": one_device(),
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
    fitted = fit(examples, epochs=10, token_cache_bytes=kept, folder=tmp_path)
    report = fitted.report
    assert macro_auroc(examples.test.targets, fitted.test) > 0.9
    assert report["tokens_kept"] == (["train", "val"] if kept else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "fitted.npz", "lock"]
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
    # The predictions are the first seed's; the scores of all are told.
    scores = [chosen["test"] for chosen in report["chosen"]]
    assert report["seeds"] == {"test": scores, "mean": np.mean(scores), "sd": np.std(scores, ddof=1)}
    assert report["parameters"] == 16 + 3 * 16 * 16 + 2 * 16  # of one head
    json.dumps(report, allow_nan=False)


def test_heads_together_equal_heads_one_by_one(synthetic_store):
    examples = axis_examples(synthetic_store)
    for head in fit(examples).report["grid"][:2]:
        report = fit(examples, seeds=(0,), learning_rates=(head["learning_rate"],)).report
        alone = report["grid"][0]
        assert report["seeds"]["sd"] is None
        np.testing.assert_allclose(alone["losses"], head["losses"], rtol=1e-4)
        np.testing.assert_allclose(alone["validations"], head["validations"], atol=5e-3)


def test_kept_tokens_are_those_of_the_crops(synthetic_store, tmp_path):
    """With room for the validation records only, kept in float32, nothing changes but the time."""
    examples = axis_examples(synthetic_store)
    _, record = examples.val.crops(240)
    room = len(record) * 120 * 16 * 4
    plain = fit(examples)
    kept = fit(examples, token_cache_bytes=room, token_dtype="float32", folder=tmp_path)
    assert kept.report["tokens_kept"] == ["val"]
    assert kept.report["crops"] == plain.report["crops"] == "drawn at random"
    np.testing.assert_allclose(kept.val, plain.val, atol=1e-6)


def test_kept_training_crops_are_drawn_evenly(synthetic_store, tmp_path, monkeypatch):
    """Every crop of a 6 s record turns up, and only tokens that the encoder gives for such crops."""
    examples, runs = axis_examples(synthetic_store), []
    init = frozen._Tokens.__init__
    monkeypatch.setattr(frozen._Tokens, "__init__", lambda self, *a: (runs.append(self), init(self, *a))[1])
    fit(examples, token_cache_bytes=GB, epochs=1, folder=tmp_path)
    (_, record) = examples.train.crops(240)
    kept = runs[0].kept["train"].take(np.arange(len(record)))
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


def test_a_record_of_unknown_targets_does_not_matter(synthetic_store):
    examples = axis_examples(synthetic_store)
    targets = examples.train.targets.copy()
    targets[[3, 17, 30]] = np.nan
    train = dataclasses.replace(examples.train, targets=targets)
    examples = with_parts(examples, train=train)
    rows = train.rows.copy()
    rows[[3, 17, 30]] = rows[[5, 6, 7]]  # other signals there
    other = with_parts(examples, train=dataclasses.replace(train, rows=rows))
    one, two = fit(examples), fit(other)
    np.testing.assert_array_equal(one.test, two.test)
    rows[0] = rows[8]  # where the target is known a signal does matter
    known = fit(with_parts(examples, train=dataclasses.replace(train, rows=rows)))
    assert np.abs(known.test - one.test).max() > 0


def test_a_killed_fit_goes_on_to_the_same_bits(synthetic_store, tmp_path, monkeypatch):
    """With the tokens that it kept, which are gone when it is finished."""
    examples, folder, kept = axis_examples(synthetic_store), tmp_path / "fit", {"token_cache_bytes": GB}
    whole = fit(examples, **kept, folder=tmp_path / "whole")
    saved = []

    def save_and_die(keeper, state, save=FitFolder.save):
        save(keeper, state)
        saved.append(len(state["scores"]))
        if len(saved) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FitFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            fit(examples, **kept, folder=folder)
        parts = sorted((folder / "scratch").glob("*/*.npy"))
        assert [path.parent.name for path in parts] == ["train", "val"]
        patch.setattr(frozen, "encode_padded", None)  # no token twice
        resumed = fit(examples, **kept, folder=folder)
    assert saved == [1, 2, 3]
    assert not (folder / "scratch").exists()
    np.testing.assert_array_equal(resumed.test, whole.test)
    np.testing.assert_array_equal(resumed.val, whole.val)
    assert resumed.report == whole.report
    monkeypatch.setattr(frozen, "_Heads", None)  # a finished fit trains nothing
    np.testing.assert_array_equal(fit(examples, **kept, folder=folder).test, whole.test)
    with pytest.raises(
        UserError, match=r"holds another fit \(other learning_rates\); choose another --workdir"
    ):
        fit(examples, **kept, folder=folder, learning_rates=(1e-3,))


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
        fit(examples, epochs=3, folder=tmp_path / "fit")
    resumed = fit(examples, epochs=3, folder=tmp_path / "fit")
    assert [head["best_epoch"] for head in resumed.report["grid"]] == [2, 1, 2, 2]
    assert resumed.report["chosen"][0]["learning_rate"] == 5e-2
    # It predicts as a fit of one epoch does with the same head.
    monkeypatch.undo()
    monkeypatch.setattr(frozen._Heads, "_chosen", lambda self, number: 2 * number + 1)
    np.testing.assert_array_equal(resumed.test, fit(examples, epochs=1).test)


def test_devices_do_not_matter(synthetic_store):
    examples = axis_examples(synthetic_store)
    eight = Mesh(np.asarray(jax.devices()[:8]), (AXIS,))
    one, many = (fit(examples, mesh=mesh) for mesh in (one_device(), eight))
    for a, b in zip(one.report["grid"], many.report["grid"], strict=True):
        np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    np.testing.assert_allclose(one.test, many.test, atol=1e-3)


def test_a_head_that_diverges_is_left_out_and_named(synthetic_store):
    examples = axis_examples(synthetic_store)
    report = fit(examples, learning_rates=(1e-2, 1e30)).report
    assert [head["diverged_in_epoch"] for head in report["grid"]] == [None, 1, None, 1]
    assert [chosen["learning_rate"] for chosen in report["chosen"]] == [1e-2, 1e-2]
    assert report["chosen"][0]["learning_rate_at_edge"] == "lowest"
    json.dumps(report, allow_nan=False)
    with pytest.raises(
        UserError,
        match=r"every head of seed 0 was not finite.*lower --config.frozen.learning_rates=\[1e\+30\]",
    ):
        fit(examples, learning_rates=(1e30,))


def test_tokens_are_kept_part_by_part(tmp_path, monkeypatch):
    settings = {"n_crops": 11, "shape": (2, 3), "dtype": "float16", "batch_size": 2}
    monkeypatch.setattr("ecg_jax.evaluation.token_cache.PART_BYTES", 4 * 2 * 3 * 2)
    asked = []

    def tokens(first, last):
        asked.append((first, last))
        return np.arange(first, last)[:, None, None] + np.zeros((1, 2, 3), np.float32)

    def stops(first, last):
        if first >= 6:
            raise KeyboardInterrupt
        return tokens(first, last)

    with pytest.raises(KeyboardInterrupt):
        kept_tokens(tmp_path, stops, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.npy"]
    asked.clear()
    kept = kept_tokens(tmp_path, tokens, **settings)
    assert asked == [(4, 6), (6, 8), (8, 10), (10, 11)]
    assert len(kept) == 11
    some = np.array([10, 0, 4, 4, 3, 8])
    np.testing.assert_array_equal(kept.take(some), tokens(0, 11)[some])
    assert kept.take(some).dtype == np.float16
    for damage in (lambda data: data[:-4], lambda data: b"", lambda data: b"no array"):
        file = tmp_path / "000001.npy"
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with pytest.raises(UserError, match=r"000001\.npy is damaged .*; remove it"):
            kept_tokens(tmp_path, tokens, **settings)
        file.write_bytes(whole)
    with pytest.raises(UserError, match=r"000000\.npy is damaged: it has float16 \(4, 2, 3\); remove it"):
        kept_tokens(tmp_path, tokens, **settings | {"shape": (3, 2)})


def test_tokens_that_cannot_be_kept_are_told(tmp_path):
    settings = {"n_crops": 2, "shape": (1, 1), "dtype": "float16", "batch_size": 2}
    with pytest.raises(
        UserError, match=r"up to 1e\+05, too large for float16; use --config\.frozen\.token_dtype=float32"
    ):
        kept_tokens(tmp_path, lambda *_: np.full((2, 1, 1), 1e5, np.float32), **settings)
    with pytest.raises(UserError, match="not finite; use an earlier step"):
        kept_tokens(tmp_path, lambda *_: np.full((2, 1, 1), np.inf, np.float32), **settings)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"free some space, .* lower --config\.frozen\.token_cache_gb"):
        kept_tokens(tmp_path / "file", lambda *_: np.zeros((2, 1, 1), np.float32), **settings)


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    with FitFolder(tmp_path, {"seed": 1}) as keeper:
        keeper.save({"a": np.zeros(2)})
        with pytest.raises(
            UserError, match=r"another process is fitting in .*; wait until it is done, or choose"
        ):
            FitFolder(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match=r"holds another fit \(other seed\)"):
        FitFolder(tmp_path, {"seed": 2})
    with FitFolder(tmp_path, {"seed": 1}) as keeper:  # the refused one holds nothing
        assert keeper.restore({"a": np.ones(2)})["a"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["state.msgpack", "fitted.npz"])
def test_damaged_files_of_a_fit_are_named(tmp_path, name, monkeypatch):
    """However they are damaged; and a full memory is not taken for damage."""
    rng, tree = np.random.default_rng(0), {"a": np.arange(30.0), "b": {"c": np.ones((3, 4), np.float32)}}

    def read(keeper):
        return keeper.restore(tree) if name == "state.msgpack" else keeper.finished()

    with FitFolder(tmp_path, {}) as keeper:
        keeper.finish(Fitted(np.ones((5, 2)), np.ones((4, 2)), {"x": 1}))
        keeper.save(tree)
        whole, refusals = (tmp_path / name).read_bytes(), []
        for k in range(300):
            data = bytearray(whole[: rng.integers(len(whole))] if k % 2 else whole)
            if k % 2 == 0:
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(data)
            try:
                read(keeper)
            except UserError as error:
                refusals.append(str(error))
        assert len(refusals) >= 150
        assert all(f"{name} cannot be read" in refusal for refusal in refusals)
        (tmp_path / name).write_bytes(whole)

        def full(*_, **__):
            raise MemoryError

        monkeypatch.setattr(np, "load", full)
        monkeypatch.setattr("flax.serialization.from_bytes", full)
        with pytest.raises(MemoryError):
            read(keeper)


def test_what_cannot_be_trained_is_refused(synthetic_store):
    examples = axis_examples(synthetic_store)
    with pytest.raises(ValueError, match="at least one entry"):
        fit(examples, seeds=())
    with pytest.raises(ValueError, match="token_dtype='bfloat16' is unknown"):
        fit(examples, token_dtype="bfloat16")
    with pytest.raises(TaskUnavailable, match=r"fewer than --config\.frozen\.batch_size=64"):
        fit(examples, batch_size=64)
    with pytest.raises(
        UserError,
        match=r"frozen\.attention_heads=12 does not divide the width 16 .*; use one of 1, 2, 4, 8, 16\.",
    ):
        fit(examples, attention_heads=12)
