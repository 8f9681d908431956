"""Writing and reading checkpoints, and restoring an encoder from a run: complete, or refused in one sentence."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.run_setup import build_objective
from ecg_jax.training import agreement, parallel
from ecg_jax.training import checkpoint as checkpoint_module
from ecg_jax.training.checkpoint import Checkpoints, finished_steps, resolve_checkpoint
from ecg_jax.training.checkpoint_tree import describe_mismatch, flat_shapes
from ecg_jax.training.pretrained import encode_fn, random_twin, restore_encoder

# Orbax's threads may outlive the event loop of a read that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


def test_resolve_checkpoint(run, tmp_path):
    workdir = run[0]
    assert resolve_checkpoint(workdir) == (workdir, 4)
    assert resolve_checkpoint(f"{workdir}/2") == (workdir, 2)
    assert resolve_checkpoint(f"{workdir}/checkpoints/2") == (workdir, 2)
    assert restore_encoder(f"{workdir}/2").step == 2
    for wrong in (lambda: restore_encoder(f"{workdir}/3"), lambda: restore_encoder(workdir, 3)):
        with pytest.raises(UserError, match=r"has no checkpoint at step 3; it has \[2, 4\]"):
            wrong()
    (tmp_path / "of_sweep/run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"that of the sweep.s run is .*of_sweep/run"):
        resolve_checkpoint(tmp_path / "of_sweep")
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


META = {"store_fingerprint": "abc", "config": {"store": "a"}, "preprocessing": {}}


@dataclasses.dataclass
class State:
    """As small as a state can be."""

    step: Any
    params: Any
    opt_state: Any
    batch_stats: Any
    ssm: Any
    objective_state: Any
    teacher: Any
    rng: Any

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


def state_at(step):
    weights = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    tree = {
        "step": jnp.asarray(step), "params": {"kernel": jnp.asarray(weights)}, "opt_state": (jnp.zeros(3),),
        "batch_stats": {}, "ssm": {}, "objective_state": {"count": jnp.asarray(step * 2)}, "teacher": {},
        "rng": jax.random.key(step),
    }  # fmt: skip
    return State(**parallel.replicate(tree, parallel.make_mesh()))


def opened(workdir, **changes):
    return Checkpoints(workdir, keep_latest=2, keep_best=1, meta=META | changes)


def restored(workdir):
    checkpoints = opened(workdir)
    state = checkpoints.restore_latest(state_at(0), state_at(0).step.sharding)
    checkpoints.close()
    return state


def assert_same_state(state, expected):
    jax.tree.map(np.testing.assert_array_equal, vars(state) | {"rng": 0}, vars(expected) | {"rng": 0})
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(expected.rng))
    assert all(leaf.sharding == expected.step.sharding for leaf in jax.tree.leaves(vars(state)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints at steps 2 and 3."""
    workdir = tmp_path_factory.mktemp("written")
    checkpoints = opened(workdir)
    assert checkpoints.last_save_seconds is None
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), val_loss=1 / step)
    told = checkpoints.read()
    assert told["save_seconds"] == checkpoints.last_save_seconds > 0
    assert 0.01 < told["peak_memory_gib"] < 100
    assert checkpoints.read() == {}
    checkpoints.finish()
    checkpoints.close()
    assert finished_steps(workdir) == [2, 3]
    return workdir


def test_a_state_is_restored_onto_the_mesh(written):
    assert_same_state(restored(written), state_at(3))


def test_checkpoints_of_earlier_versions_are_restored(tmp_path):
    """They hold arrays of devices with their shardings, and fewer fields in `meta`."""
    state = state_at(5)
    flat = checkpoint_module.checksums(checkpoint_module.to_host(vars(state)))
    with ocp.CheckpointManager(
        (tmp_path / "checkpoints").absolute(),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
    ) as manager:
        manager.save(
            5,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(vars(state)), meta=ocp.args.JsonSave(META | {"checksums": flat})
            ),
        )
    assert list((tmp_path / "checkpoints" / "5" / "state").glob("_sharding"))
    assert_same_state(restored(tmp_path), state)


def damages(folder):
    """What may be missing or empty of a checkpoint, by name."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            yield f"no {name}", lambda copy, name=name: shutil.rmtree(copy / name)
        else:
            yield f"no {name}", lambda copy, name=name: (copy / name).unlink()
            yield f"empty {name}", lambda copy, name=name: (copy / name).write_bytes(b"")
    yield "no file", lambda copy: [path.unlink() for path in copy.rglob("*") if path.is_file()]


def test_whatever_is_missing_a_sound_state_is_restored(tmp_path, written, capsys):
    """Either the newest checkpoint can do without it, or it is set aside and the one before is restored."""
    aside = set()
    for number, (name, damage) in enumerate(damages(written / "checkpoints" / "3")):
        workdir = tmp_path / str(number)
        shutil.copytree(written, workdir)
        damage(workdir / "checkpoints" / "3")
        state = restored(workdir)
        assert_same_state(state, state_at(int(state.step)))
        warned = "warning: checkpoint 3 is damaged" in capsys.readouterr().err
        assert warned == (workdir / "damaged_checkpoints" / "3").is_dir() == (int(state.step) == 2), name
        if warned:
            aside.add(name)
            assert finished_steps(workdir) == [2]
            checkpoints = opened(workdir)
            checkpoints.save(state_at(3), val_loss=0.1)
            checkpoints.close()
            assert finished_steps(workdir) == [2, 3]
    assert {
        "no meta",
        "no state",
        "empty meta/metadata",
        "empty metrics/metrics",
        "no _CHECKPOINT_METADATA",
    } <= aside
    assert "no file" in aside


def test_what_a_killed_save_left_is_removed(tmp_path, written):
    workdir = tmp_path / "run"
    shutil.copytree(written, workdir)
    folder = workdir / "checkpoints"
    (folder / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert finished_steps(workdir) == [2, 3]
    checkpoints = opened(workdir)
    assert int(checkpoints.restore_latest(state_at(0), state_at(0).step.sharding).step) == 3
    checkpoints.save(state_at(4), val_loss=None)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"3", "4"}


def test_what_one_process_alone_cannot_read_is_not_damaged(tmp_path, written, monkeypatch):
    """A host that does not see the folder must not have a sound checkpoint set aside."""
    workdir = tmp_path / "run"
    shutil.copytree(written, workdir)
    sentence = refused(workdir, monkeypatch, [("read", ""), ("damaged", "no such file")])
    assert (
        f"process 2 cannot read checkpoint {workdir}/checkpoints/3 (no such file), and process 0 can"
        in sentence
    )


def refused(workdir, monkeypatch, outcomes=(), wait_s=0.0):
    """The sentence that a checkpoint is refused with, when other processes tell `outcomes`; nothing is moved."""
    monkeypatch.setattr(checkpoint_module, "RETRY_S", wait_s)
    monkeypatch.setattr(checkpoint_module, "answers", lambda topic, answer: [answer, *outcomes])
    with pytest.raises(UserError) as refusal:
        restored(workdir)
    assert finished_steps(workdir) == [2, 3]
    assert not (workdir / "damaged_checkpoints").exists()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(5, "Input/output error"), "Input/output error"), (MemoryError(), "MemoryError")],
    ids=["disk", "memory"],
)
def test_what_cannot_be_read_now_is_not_damaged(written, monkeypatch, error, reason):
    """On one process alone, and on process 0 of several that can."""

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint_module, "read_arrays", fail)
    sentence = f"process 0 cannot read checkpoint {written}/checkpoints/3 ({reason})"
    assert refused(written, monkeypatch).startswith(f"{sentence}; nothing was moved")
    assert f"{sentence}, and process 1 can" in refused(written, monkeypatch, [("read", "")])


def test_a_disk_that_does_not_answer_is_no_damage_whatever_the_format_says(written, monkeypatch):
    def fail(*_):
        raise ValueError("some status of a storage format")

    def open_or_fail(path, *mode, **more):
        if "state" in path.parts:
            raise OSError(116, "Stale file handle")
        return real(path, *mode, **more)

    real = Path.open
    monkeypatch.setattr(checkpoint_module, "read_arrays", fail)
    monkeypatch.setattr(Path, "open", open_or_fail)
    assert "(Stale file handle); nothing was moved" in refused(written, monkeypatch)


def test_metrics_that_cannot_be_read_now_are_not_damaged(written, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "metrics cannot be read: Input/output error" in refused(written, monkeypatch)


def test_what_is_seen_late_is_read_again(written, monkeypatch):
    """By this process, whose first reading fails, and by another, which sees the files a moment later."""
    real, failures = checkpoint_module.read_arrays, [OSError("some files are missing")]

    def read(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    others = [("read", ""), ("damaged", "no such file")]
    monkeypatch.setattr(checkpoint_module, "read_arrays", read)
    monkeypatch.setattr(checkpoint_module, "answers", lambda topic, answer: [answer, others.pop()])
    assert_same_state(restored(written), state_at(3))
    assert not failures
    assert not others


def test_processes_wait_longer_for_a_write_than_it_may_take():
    assert agreement.WAIT_S > checkpoint_module.WRITE_TIMEOUT_S


def test_what_one_process_refuses_all_refuse(written, monkeypatch):
    answers = lambda topic, answer: [answer, ("refused", "another store here")]  # noqa: E731
    monkeypatch.setattr(checkpoint_module, "answers", answers)
    with pytest.raises(UserError, match="another store here"):
        restored(written)


def test_a_checkpoint_of_another_store_is_refused(written):
    checkpoints = opened(written, store_fingerprint="another")
    with pytest.raises(UserError, match="was trained on another store"):
        checkpoints.restore_latest(state_at(0), state_at(0).step.sharding)
    assert finished_steps(written) == [2, 3]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*checkpoints: File exists"):
        opened(tmp_path)
