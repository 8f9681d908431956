"""The probe during pretraining: whom it looks at, what it scores, and that it is the same after a resume."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.selection import select_records
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import online_probe
from ecg_jax.evaluation.examples import target_matrix
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.pretrain import pretrain
from ecg_jax.run_setup import build_objective, build_optimiser, initial_state
from ecg_jax.training import parallel
from ecg_jax.training.metric_writers import read_log
from test_pretrain import TINY, trajectory

WINDOW = 240


def as_ptbxl(source, path):
    """A copy of a store that says it is PTB-XL, so that the task ptbxl_rhythm fits it."""
    shutil.copytree(source, path)
    metadata = path / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["ecg_jax"]["corpus"] = "ptbxl"
    metadata.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def labelled_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    write_synthetic_store(folder / "synthetic", n_records=240, seconds=3.0, seed=5)
    return as_ptbxl(folder / "synthetic", folder / "ptbxl")


def train_rows(store):
    return select_records(store, window_samples=WINDOW, val_folds=1, max_records=10**9).train


def choose(store, rows=None, **changes):
    settings = {"task": "auto", "every": 10, "max_records": 10**9} | changes
    return online_probe.choose_slice(store, train_rows(store) if rows is None else rows, **settings)


def test_halves_share_no_patient_and_leave_the_test_fold_alone(labelled_store):
    store = Store(labelled_store)
    found, line = choose(store)
    assert found.task == "ptbxl_rhythm"
    patients, folds = store.column("patient_id"), store.column("fold")
    halves = found.rows[: found.n_fit], found.rows[found.n_fit :]
    fit, scored = (set(patients[rows]) for rows in halves)
    assert not fit & scored
    assert abs(len(halves[0]) - len(halves[1])) <= 2
    assert len(set(found.rows)) == len(found.rows) == len(train_rows(store))
    everything = np.arange(len(store))  # as with data.val_folds=0
    assert folds.max() not in folds[choose(store, everything)[0].rows]
    targets = target_matrix(store.column("labels_rhythm"), store.classes["rhythm"])
    np.testing.assert_array_equal(found.targets, targets[found.rows])
    assert line == (
        f"online probe on ptbxl_rhythm every 10 steps: 4 classes, {len(halves[0])} recordings to fit, "
        f"{len(halves[1])} to score"
    )


def test_only_rows_that_are_trained_on_are_looked_at(labelled_store):
    """Duplicates and records shorter than a window are not among them."""
    store = Store(labelled_store)
    rows = train_rows(store)[1::2]
    assert set(choose(store, rows)[0].rows) == set(rows)


def test_at_most_so_many_records_and_always_the_same(labelled_store):
    store = Store(labelled_store)
    few, more = (choose(store, max_records=n)[0] for n in (60, 90))
    assert len(few.rows) == 60
    assert set(few.rows) < set(more.rows)
    np.testing.assert_array_equal(few.rows, choose(store, max_records=60)[0].rows)


def test_store_without_labels_says_why_there_is_no_probe(synthetic_store, labelled_store):
    assert choose(Store(synthetic_store)) == (
        None,
        "no online probe: the store, of corpus 'synthetic', has labels of no task to watch",
    )
    store = Store(labelled_store)
    for off in ({"task": ""}, {"every": 0}):
        assert choose(store, **off) == (None, "no online probe: switched off by config.monitor")
    found, line = choose(store, max_records=2)
    assert found is None
    assert "no class of ptbxl_rhythm has positives and negatives in both halves of the 2 labelled" in line


def test_task_that_is_asked_for_must_fit(labelled_store):
    store = Store(labelled_store)
    with pytest.raises(UserError, match=r"There is no task 'rhytm'; known: .*ptbxl_rhythm"):
        choose(store, task="rhytm")
    with pytest.raises(UserError, match=r"which the online probe does not take; use one of ptbxl_super"):
        choose(store, task="ningbo")
    with pytest.raises(UserError, match=r"needs the label set 'form', but the store .* has only"):
        choose(store, task="ptbxl_form")


def tiny(**changes):
    config = load_config("configs/cpc.py")
    fields = TINY | {"data.window_s": "1.0", "objective.steps_ahead": "14"} | changes
    for name, value in fields.items():
        override(config, name.replace("__", "."), str(value))
    return config


@functools.cache
def untrained(devices):
    """(state, mesh, what an `OnlineProbe` needs of a run) of a random encoder."""
    config = tiny()
    preprocessing = Preprocessing(window_s=config.data.window_s)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (parallel.AXIS,))
    _, tx = build_optimiser(config, 4)
    state = parallel.replicate(initial_state(config, tx, preprocessing, None), mesh)
    model = build_objective(config, parallel.AXIS)
    bound = {"model": model, "normalisation": "none", "kept_leads": ALL_LEADS}
    return state, mesh, bound | {"batch_size": 32, "window_samples": WINDOW}


def embedded(store, found, devices=8):
    state, mesh, settings = untrained(devices)
    probe = online_probe.OnlineProbe(found, store, mesh, **settings)
    return probe, jax.device_get(probe.embed(state))


def test_embeddings_are_those_of_the_first_crops_on_any_number_of_devices(labelled_store):
    store = Store(labelled_store)
    found, _ = choose(store, max_records=50)
    features = {n: np.concatenate(embedded(store, found, n)[1])[:50] for n in (1, 8)}
    np.testing.assert_allclose(features[8], features[1], rtol=1e-4, atol=1e-6)
    state, _, settings = untrained(1)
    crops = np.stack([store.read(row)[:WINDOW] for row in found.rows[[0, 33, 49]].tolist()])
    batch = {"signal": crops, "record_index": np.arange(3)}
    alone = online_probe.embed_step(
        state, batch, model=settings["model"], normalisation="none", kept_leads=ALL_LEADS, axis_name=None
    )
    np.testing.assert_allclose(features[8][[0, 33, 49]], alone, rtol=1e-4, atol=1e-6)


def test_decodable_labels_score_high_and_shuffled_ones_do_not(labelled_store):
    """The label is the sign of an offset, which a random encoder keeps."""

    class Offset(Store):
        def read_crops(self, starts, n_samples):
            rows = np.searchsorted(self.column("offset"), starts, side="right") - 1
            return super().read_crops(starts, n_samples) + np.where(sign[rows], 300, -300)[
                :, None, None
            ].astype(np.int16)

    store, rng = Offset(labelled_store), np.random.default_rng(0)
    sign = rng.random(len(store)) < 0.4
    found, _ = choose(store)
    found = dataclasses.replace(found, targets=sign[found.rows, None].astype(np.float32))
    probe, features = embedded(store, found)
    assert probe.score(features)["probe_auroc"] > 0.95
    _, mesh, settings = untrained(8)
    shuffled = []
    for _ in range(10):
        targets = rng.permutation(found.targets)
        probe = online_probe.OnlineProbe(dataclasses.replace(found, targets=targets), store, mesh, **settings)
        shuffled.append(probe.score(features)["probe_auroc"])
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.08)


def test_features_that_are_not_finite_have_no_score(labelled_store):
    store = Store(labelled_store)
    probe, features = embedded(store, choose(store, max_records=40)[0])
    assert 0 <= probe.score(features)["probe_auroc"] <= 1
    spoilt = features[0].copy()
    spoilt[3, 0] = np.nan
    assert probe.score([spoilt, *features[1:]]) == {}
    assert probe.score([np.ones_like(part) for part in features]) == {"probe_auroc": 0.5}


def test_ridge_scores_are_those_of_the_primal_solution():
    rng = np.random.default_rng(1)
    fitted, scored = rng.normal(size=(30, 7)) * 5 + 2, rng.normal(size=(11, 7)) * 5 + 2
    fitted[:, 3], scored[:, 3] = 4.0, 4.0  # a dead feature
    targets = (rng.random((30, 2)) < 0.4).astype(np.float32)
    with np.errstate(invalid="ignore"):
        X, x = (np.nan_to_num((f - fitted.mean(0)) / fitted.std(0)) for f in (fitted, scored))
    weight = np.linalg.solve(X.T @ X + 0.1 * 7 * np.eye(7), X.T @ (targets - targets.mean(0)))
    np.testing.assert_allclose(
        online_probe.ridge_scores(fitted, targets, scored, 0.1), x @ weight, atol=1e-10
    )


def test_resumed_run_scores_the_same_and_training_does_not_notice(tmp_path, labelled_store, capsys):
    common = {
        "store": labelled_store, "log_every": 4, "checkpoint_every": 3, "monitor__probe_every": 2, "tensorboard": False,
    }  # fmt: skip
    pretrain(tiny(**common, steps=6), tmp_path / "whole")
    pretrain(tiny(**common, steps=3), tmp_path / "parts")
    pretrain(tiny(**common, steps=6), tmp_path / "parts")
    assert trajectory(tmp_path / "whole") == trajectory(tmp_path / "parts")
    log = read_log(tmp_path / "whole")
    assert [entry["step"] for entry in log] == [2, 3, 4, 6]
    assert [entry["step"] for entry in log if "probe_auroc" in entry] == [2, 4, 6]
    assert "online probe on ptbxl_rhythm every 2 steps" in capsys.readouterr().out
    pretrain(tiny(**common | {"monitor__probe_every": 0}, steps=6), tmp_path / "without")
    losses = [{e["step"]: e["loss"] for e in read_log(tmp_path / name)} for name in ("whole", "without")]
    assert all(losses[0][step] == loss for step, loss in losses[1].items())
