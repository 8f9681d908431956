"""`ecg-jax cka` from checkpoints and a store to figures, against features that are computed here."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError
from ecg_jax.studies import cka_models
from ecg_jax.studies.cka_models import choose_rows, default_folds, features_of, open_models
from ecg_jax.studies.figure_folder import read_figures, write_figures
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.pretrained import pooled_fn, random_twin, restore_encoder
from store_files import write_store
from test_cka import textbook_cka, textbook_hsic
from tiny_runs import drawn_state, tiny_config

RATE = 240.0
#: Rows of the Transformer and of its random twin, in the study of `done`.
OTHERS = [3, 4, 5, 6, 10, 11, 12, 13]


def write_run(workdir, backbone, window_s, **contract):
    """A run whose parameters were drawn instead of trained; nothing is compiled."""
    config = tiny_config("cpc", backbone=backbone, data__window_s=window_s)
    contract = Preprocessing(window_s=window_s, normalisation=config.data.normalisation, **contract)
    meta = {
        "config": config.to_dict(),
        "preprocessing": contract.to_dict(),
        "store_fingerprint": None,
        "selection_fingerprint": None,
        "origin": None,
    }
    checkpoints = Checkpoints(workdir, keep_latest=1, keep_best=0, meta=meta)
    checkpoints.save(jax.tree.map(jnp.asarray, drawn_state(config, None)), val_loss=None)
    checkpoints.close()
    return workdir


def signals(n, samples=120, seed=0):
    rng = np.random.default_rng(seed)
    # Some are larger than others, as recordings are.
    scale = rng.uniform(10, 60, size=(n, 1, 1))
    return (scale * rng.normal(size=(n, samples, 12)).cumsum(axis=1)).clip(-9000, 9000).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Without labels: 24 patients of two recordings and 8 recordings of unknown patients in fold 9; four in fold 8."""
    crops = signals(60)
    records = [
        (f"r{i:02d}", f"p{i // 2}" if i < 48 else None, 9 if i < 56 else 8, x) for i, x in enumerate(crops)
    ]
    return write_store(tmp_path_factory.mktemp("stores") / "plain", records)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "cpc" / "run", "s4", 80 / RATE),
        write_run(folder / "other", "transformer", 60 / RATE),
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory, runs, store):
    output = tmp_path_factory.mktemp("cka") / "out"
    line = f"cka --checkpoints={runs[0]},{runs[1]} --store={store.path} --random --seed=1 --output={output}"
    assert cli.main([*line.split(), "--batch-size=16"]) == 0
    return output, json.loads((output / "cka.json").read_text())


def test_values_are_those_of_the_models_features(done, runs, store):
    results = done[1]
    names = [model["name"] for model in results["models"]]
    assert names == ["cpc", "other", "random s4", "random transformer"]
    assert results["recordings"]["folds"] == [9]
    assert results["recordings"]["n"] == 32
    rows, _ = choose_rows(store, 80, [9], None, 1)
    encoder, layers = restore_encoder(runs[1]), []
    for each, own in ((encoder, results["models"][1]), (random_twin(encoder, 1), results["models"][3])):
        features = pooled_fn(each, own["layers"])(np.stack([store.read(row)[:60] for row in rows]))
        layers += [features[layer] for layer in own["layers"]]
    found = np.array(results["cka"])[np.ix_(OTHERS, OTHERS)]
    np.testing.assert_allclose(found, textbook_cka(layers), atol=1e-4)
    low, high = np.array(results["low"]), np.array(results["high"])
    assert ((low <= results["cka"]) & (results["cka"] <= high)).all()
    assert (results["estimator"]["minibatches"], results["interval"]["groups"]) == (1, 20)


def test_figures_and_words(done, runs):
    output, results = done
    folder = read_figures(output)
    assert folder.kind == "cka"
    figures = {figure.name: figure for figure in folder.figures}
    assert list(figures) == ["within_models", "final_layers", "between_models", "estimators", "layers"]
    assert folder.about["runs"] == list(map(str, runs))
    assert folder.about["command"][:2] == ["ecg-jax", "cka"]
    # The last S4 layer is the final output; the Transformer normalises it once more.
    words = [model["layers_in_words"] for model in results["models"][:2]]
    assert words == [
        ["stem", "S4 layer 1", "final"],
        ["stem", "Transformer layer 1", "Transformer layer 2", "final"],
    ]
    within, final, between = (figures[name] for name in ("within_models", "final_layers", "between_models"))
    assert len(within.rows) == 2 * (3 * 3 + 4 * 4)
    assert len(between.rows) == 3 * 3 + 4 * 4 + 4 * 3 * 4
    row = dict(zip(final.columns, final.rows[1], strict=True))
    assert [row[c] for c in ("model_a", "layer_a", "model_b", "layer_b")] == [
        "cpc",
        "final",
        "other",
        "final",
    ]
    assert float(row["cka"]) == results["cka"][2][6]
    assert float(row["biased_cka"]) == results["biased"][2][6]
    assert "The models have different windows: each saw the same recordings" in final.shows
    assert "32 recordings (fold 9 of made: one recording of each patient where known" in final.shows
    assert "synthetic" not in final.shows
    for figure in folder.figures:
        assert "  " not in figure.shows
        assert "nan" not in figure.shows
        assert figure.shows.endswith(".")
        assert figure.does_not_show.endswith(".")
    with open(output / "layers.csv", newline="") as file:
        dimensions = [float(line["effective_dimensions"]) for line in csv.DictReader(file)]
    assert dimensions == results["effective_dimensions"]
    assert all(1 <= number <= 16.5 for number in dimensions)


def simple_layers(encoder):
    """In place of the encoder: a stem of every second sample, a final output of their squares."""

    def outputs(variables, signal):
        x = signal[:, ::2].astype(jnp.float32) / 1000
        return {"stem": x[:, :, :3], "block0": x[:, :, 3:8], "block1": x, "tokens": x**2}

    return outputs


def test_mini_batches_and_chosen_layers(runs, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cka_models, "layer_outputs", simple_layers)
    monkeypatch.chdir(runs[0].parent)
    line = f"cka --checkpoints=run --store={store.path} --output={tmp_path / 'out'} --folds=all"
    assert cli.main([*line.split(), "--minibatch=10", "--layers=tokens,stem", "--names=mine"]) == 0
    assert "mine" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "cka.json").read_text())
    assert results["models"][0]["layers"] == ["stem", "tokens"]
    assert results["recordings"]["n"] == 36
    assert results["estimator"]["minibatches"] == 3
    rows, _ = choose_rows(store, 80, None, None, 0)
    x = np.stack([store.read(row)[:80:2] for row in rows]) / 1000
    layers = x[:, :, :3].mean(axis=1), (x**2).mean(axis=1)
    pieces = np.array_split(np.arange(36), 3)
    h = np.mean([[[textbook_hsic(x[p], y[p]) for x in layers] for y in layers] for p in pieces], axis=0)
    assert results["cka"][0][1] == pytest.approx(h[0, 1] / np.sqrt(h[0, 0] * h[1, 1]), abs=1e-4)
    folder = read_figures(tmp_path / "out")
    assert [figure.name for figure in folder.figures] == ["within_models", "estimators", "layers"]
    assert folder.about["runs"] == ["run"]


def test_one_recording_of_each_patient_in_a_stable_order(store):
    rows, how = choose_rows(store, 80, [9], None, 3)
    patients = store.column("patient_id")[rows]
    assert len(rows) == 32
    assert len({name for name in patients if name}) == 24
    fewer, _ = choose_rows(store, 80, [9], 10, 3)
    assert (fewer == rows[:10]).all()
    assert (choose_rows(store, 80, [9], None, 4)[0] != rows).any()
    assert default_folds(store) == [9]
    assert how == "fold 9 of made: one recording of each patient where known, else every recording, seed 3"


def test_tokens_are_of_one_time_in_all_models(store, runs, monkeypatch):
    monkeypatch.setattr(cka_models, "layer_outputs", simple_layers)
    models = open_models([str(run) for run in runs], store)
    rows, seen = np.arange(6), []
    (found,) = features_of(
        models, store, rows, [rows], tokens=True, seed=5, batch_size=4, advance=seen.append
    )
    time = np.random.default_rng(5).integers(0, 30, 6)  # of the 30 tokens of the shorter window
    expected = np.stack([store.read(row)[2 * t] for row, t in zip(rows, time, strict=True)]) / 1000
    stem, _, final, other_stem, *_ = found
    np.testing.assert_allclose(stem, expected[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(stem, other_stem)
    np.testing.assert_allclose(final, expected**2, rtol=1e-5)
    assert len(found) == 7
    assert seen == [4, 2, 4, 2]


def refused(arguments, match):
    from ecg_jax.cka import main

    with pytest.raises(UserError, match=match):
        main(arguments)


def test_bad_arguments(runs, store, tmp_path):
    def given(**changes):
        options = {"checkpoints": runs[0], "store": store.path, "output": tmp_path / "out", **changes}
        return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    refused(given(checkpoints=tmp_path / "gone"), "gone")
    refused(given(checkpoints=f"{runs[0]},{runs[0]}"), "twice")
    refused(given(checkpoints=","), "--checkpoints names nothing")
    refused(given(store=tmp_path / "gone"), "gone")
    refused(given(records=4), r"--records=4 must be at least 5: unbiased HSIC needs 4 recordings")
    refused(given(minibatch=3), "--minibatch=3 must be at least 5")
    refused(given(folds=8), "has 4 usable recordings .* in fold 8")
    refused(given(folds="3,9"), "has no fold 3; its folds are 8, 9")
    refused(given(folds="nine"), "--folds=nine must be numbers")
    refused(given(layers="block7"), "has no layer block7; it has stem, block0, block1, tokens")
    refused(given(names="a,b"), "2 names for 1 checkpoints")
    for option in ("layers", "names", "folds"):
        refused(given(**{option: ""}), f"--{option} names nothing")
    refused(given(batch_size=0), "--batch-size=0")
    refused(given(batch_size=10**20), "--batch-size=1000.* at most 65536")
    refused(given(seed=-1), "--seed=-1")
    refused(given(output=runs[0]), "holds something else than figures")
    (tmp_path / "file").write_text("")
    refused(given(output=tmp_path / "file" / "out"), "cannot write into --output")
    assert not (tmp_path / "out").exists()
    write_figures(tmp_path / "other", "scaling", [], {})
    refused(given(output=tmp_path / "other"), "holds the figures of another study")
    assert json.loads((tmp_path / "other" / "figures.json").read_text())["kind"] == "scaling"


def test_stores_and_checkpoints_that_do_not_fit(runs, store, tmp_path):
    records = [(f"r{i}", None, None, x) for i, x in enumerate(signals(6))]
    no_folds = write_store(tmp_path / "no_folds", records)
    with pytest.raises(UserError, match="has no folds; --folds=all"):
        default_folds(no_folds)
    rows, how = choose_rows(no_folds, 80, None, None, 0)
    assert (len(rows), how) == (6, "all folds of made: all recordings, for no patient is known, seed 0")
    with pytest.raises(UserError, match="has 0 usable recordings"):
        choose_rows(no_folds, 121, None, None, 0)
    slow = write_store(tmp_path / "slow", records, rate=120.0)
    with pytest.raises(UserError, match=r"rate_hz is 240.0 in checkpoint .* but 120.0 in store"):
        open_models([str(runs[0])], slow)
    leads = tuple(reversed(store.leads))
    turned = write_run(tmp_path / "turned", "s4", 80 / RATE, leads=leads)
    with pytest.raises(UserError, match="leads is"):
        open_models([str(runs[0]), str(turned)], store)


def test_names_tell_runs_apart(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cka_models, "random_twin", lambda encoder, seed: encoder)
    one, two = (write_run(tmp_path / name / "twin", "s4", 80 / RATE) for name in ("a", "b"))
    models = open_models([str(one), str(two)], store, random_seed=0)
    assert [(model.name, model.random) for model in models] == [
        ("a/twin", False),
        ("b/twin", False),
        ("random", True),
    ]
    with pytest.raises(UserError, match="two models are called x"):
        open_models([str(one), str(two)], store, names=["x", "x"])
    with pytest.raises(UserError, match="random is the name of a random twin"):
        open_models([str(one)], store, names=["random"], random_seed=0)


def test_a_diverged_checkpoint_is_named(runs, store, monkeypatch):
    monkeypatch.setattr(
        cka_models, "layer_outputs", lambda encoder: lambda *given: {"stem": jnp.full((16, 40, 2), jnp.nan)}
    )
    models, rows = open_models([str(runs[0])], store, layers=["stem"]), np.arange(4)
    every = features_of(
        models, store, rows, [rows], tokens=False, seed=0, batch_size=16, advance=lambda n: None
    )
    with pytest.raises(UserError, match="layer stem is not finite for 4 of 4 recordings"):
        next(every)


def test_synthetic_recordings_are_called_so(synthetic_store, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(cka_models, "layer_outputs", simple_layers)
    from ecg_jax.cka import cka
    from ecg_jax.studies.cka_figures import draw_all

    study = cka([str(runs[0])], synthetic_store, tmp_path / "out", folds="all", records=6, layers=["stem"])
    assert "6 synthetic recordings" in draw_all(study)[0].shows
    assert json.loads((tmp_path / "out" / "cka.json").read_text())["synthetic"]
