"""Restoring an encoder from a run: complete, or refused in one sentence."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.run_setup import build_objective
from ecg_jax.training.checkpoint import resolve_checkpoint
from ecg_jax.training.checkpoint_tree import describe_mismatch, flat_shapes
from ecg_jax.training.pretrained import encode_fn, random_twin, restore_encoder


def tiny_config(store, **changes):
    config = load_config("configs/cpc.py")
    fields = {
        "store": store, "model.width": 16, "model.state": 4, "model.layers": 2, "batch_size": 8, "steps": 4,
        "checkpoint_every": 2, "data.max_val_crops": 8, "data.window_s": 1.0,
    }  # fmt: skip
    for name, value in (fields | changes).items():
        override(config, name, str(value))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, synthetic_store):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(synthetic_store)
    state = pretrain(config, workdir)
    return workdir, config, jax.device_get((state.params, state.batch_stats, state.ssm))


def test_encoder_is_restored_exactly(run):
    workdir, config, (params, batch_stats, ssm) = run
    encoder = restore_encoder(workdir)
    assert encoder.step == 4
    assert encoder.preprocessing.window_samples == 240
    assert encoder.config["model"] == config.model.to_dict()
    assert encoder.n_parameters == sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]))
    for ours, theirs in (
        (encoder.variables["params"], params["encoder"]),
        (encoder.variables["batch_stats"], batch_stats["encoder"]),
        (encoder.variables["ssm"], ssm["encoder"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_embedding_equals_the_objectives_encoder(run):
    workdir, config, (params, batch_stats, ssm) = run
    signal = np.random.default_rng(0).integers(-1500, 1500, (3, 240, 12)).astype(np.int16)
    embedding = encode_fn(restore_encoder(workdir))(signal)
    model = build_objective(config, None).encoder
    variables = {"params": params["encoder"], "batch_stats": batch_stats["encoder"], "ssm": ssm["encoder"]}
    tokens, _ = model.apply(variables, signal.astype(np.float32) / 1000, train=False)
    np.testing.assert_allclose(embedding, tokens.mean(1), rtol=1e-4, atol=1e-5)


def test_random_twin_shares_all_but_the_weights(run):
    encoder = restore_encoder(run[0])
    twin, same, other = random_twin(encoder, 1), random_twin(encoder, 1), random_twin(encoder, 2)
    shapes = [flat_shapes(v.variables) for v in (encoder, twin)]
    assert shapes[0] == shapes[1]
    assert twin.preprocessing == encoder.preprocessing
    jax.tree.map(np.testing.assert_array_equal, twin.variables, same.variables)
    kernel = lambda e: e.variables["params"]["stem"]["conv0"]["kernel"]  # noqa: E731
    assert not np.array_equal(kernel(twin), kernel(other))
    assert not np.array_equal(kernel(twin), kernel(encoder))


def test_trained_state_matrices_are_restored(tmp_path, synthetic_store):
    pretrain(tiny_config(synthetic_store, **{"model.trainable_ssm": True}), tmp_path / "run")
    encoder = restore_encoder(tmp_path / "run")
    assert "ssm" not in encoder.variables
    assert "log_dt" in encoder.variables["params"]["backbone"]["layer0"]
    assert np.isfinite(encode_fn(encoder)(np.zeros((1, 240, 12), np.int16))).all()


def test_resolve_checkpoint(run):
    workdir = run[0]
    assert resolve_checkpoint(workdir) == (workdir, 4)
    assert resolve_checkpoint(f"{workdir}/2") == (workdir, 2)
    assert resolve_checkpoint(f"{workdir}/checkpoints/2") == (workdir, 2)
    assert restore_encoder(f"{workdir}/2").step == 2
    for wrong in (lambda: restore_encoder(f"{workdir}/3"), lambda: restore_encoder(workdir, 3)):
        with pytest.raises(UserError, match=r"has no checkpoint at step 3; it has \[2, 4\]"):
            wrong()
    with pytest.raises(UserError, match="there is no run at"):
        restore_encoder(f"{workdir}/nothing")


def test_run_without_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no finished checkpoint yet"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "signal",
    [np.zeros((2, 240, 12), np.float32), np.zeros((2, 12, 240), np.int16), np.zeros((240, 12), np.int16)],
)
def test_encode_refuses_what_is_not_a_crop_in_microvolts(run, signal):
    with pytest.raises(ValueError, match=r"int16 microvolts of shape \[B, 240, 12\] expected"):
        encode_fn(restore_encoder(run[0]))(signal)


def change_config(run, tmp_path, change):
    """A copy of a run whose checkpoint claims another config than it was written under."""
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    path = copy / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta["config"]["model"])
    path.write_text(json.dumps(meta))
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "width",
            32,
            r"shaped differently params/encoder/backbone/layer0/C \(stored \(1, 16, 2, 2\), expected \(1, 32, 2, 2\)\)",
        ),
        ("layers", 3, "missing .*backbone/layer2/"),
        ("layers", 1, "extra .*backbone/layer1/"),
        ("trainable_ssm", True, "missing params/encoder/backbone/layer0/B.*extra ssm/encoder"),
    ],
)
def test_missing_extra_and_misshaped_parameters_are_refused(run, tmp_path, field, value, message):
    copy = change_config(run, tmp_path, lambda model: model.update({field: value}))
    with pytest.raises(UserError, match=message):
        restore_encoder(copy)


def test_truncated_checkpoint_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    files = [path for path in (copy / "checkpoints" / "4" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged .*choose another step"):
        restore_encoder(copy)
    assert restore_encoder(copy, 2).step == 2


def test_describe_mismatch_shortens_long_lists():
    stored = {f"p{i}": (1,) for i in range(30)}
    assert describe_mismatch(stored, stored) is None
    assert describe_mismatch({}, stored).endswith("and 22 more")
