"""The training step: parity with two steps of the reference, and the same numbers on any number of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_cpc
from ecg_jax.models.encoder import build_encoder
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.models.s4 import kernel_bases
from ecg_jax.objectives import cpc
from ecg_jax.training import optim, parallel
from ecg_jax.training.train_state import (
    assemble_state,
    create_train_state,
    eval_step,
    mean_of_sums,
    train_step,
    with_bases,
)

PLAIN = {"normalisation": "none", "kept_leads": ALL_LEADS}


def adamw(base):
    return optim.build_optimiser(
        optax.constant_schedule(base),
        factors={"head": 1.0, "backbone": 0.1, "stem": 0.01, "ssm": 0.0},
        weight_decay=1e-3, b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0,
    )  # fmt: skip


def test_two_steps_of_the_reference(monkeypatch):
    golden = load_golden("ssl_steps_cpc")
    variables = convert_cpc(group(golden, "sd/"))
    variables = jax.tree.map(jnp.asarray, variables)
    width = variables["params"]["head"]["kernel"].shape[0]
    half = variables["params"]["encoder"]["backbone"]["layer0"]["C"].shape[2]
    x, negatives = golden["in/x"], golden["in/negative_idx"].astype(np.int32)
    tokens = x.shape[-1] // 2
    encoder = build_encoder(
        backbone="s4", width=width, state=2 * half, layers=4, l_max=tokens, bidirectional=False,
        trainable_ssm=False, dropout=0.0,
    )  # fmt: skip
    model = cpc.CPC(
        encoder=encoder, width=width, steps_ahead=tokens - negatives.shape[2], negatives=negatives.shape[3]
    )
    tx = adamw(3e-3)
    state = assemble_state(
        variables, tx.init(variables["params"]), {}, rng=jax.random.key(0), tokens=tokens, l_max=tokens
    )
    step_fn = jax.jit(functools.partial(train_step, model=model, tx=tx, **PLAIN, axis_name=None))
    for step in range(2):
        monkeypatch.setattr(cpc, "draw_negatives", lambda *_, step=step, **__: negatives[step])
        step_fn.clear_cache()
        batch = {"signal": 1e3 * np.swapaxes(x[step], 1, 2), "record_index": np.arange(x.shape[1])}
        state, metrics = step_fn(state, batch)
        assert_close(metrics["loss"], golden[f"out/step{step}/total"], 2e-6, f"loss {step}")
        assert_close(
            metrics["accuracy"], golden[f"out/step{step}/metric_acc_tsenc"], 1e-6, f"accuracy {step}"
        )
    sd_after = group(golden, "sd/") | group(golden, "after/")
    after = convert_cpc(sd_after)
    for collection in ("params", "batch_stats"):
        flat = jax.tree.flatten_with_path(after[collection])[0]
        ours = dict(jax.tree.flatten_with_path(getattr(state, collection))[0])
        assert len(flat) == len(ours)
        for path, expected in flat:
            assert_close(ours[path], expected, 1e-4, f"{collection}{jax.tree_util.keystr(path)}")


def tiny_cpc(axis_name, trainable_ssm=False, dtype=jnp.float32):
    encoder = build_encoder(
        backbone="s4", width=16, state=4, layers=2, l_max=32, bidirectional=False,
        trainable_ssm=trainable_ssm, dropout=0.2, axis_name=axis_name, dtype=dtype,
    )  # fmt: skip
    return cpc.CPC(encoder=encoder, width=16, steps_ahead=4, negatives=8, dtype=dtype)


def tiny_state(tx, trainable_ssm=False):
    return create_train_state(
        tiny_cpc(None, trainable_ssm), tx, seed=0, window_samples=64, leads=12, tokens=32, l_max=32
    )


def batches(n, size=16):
    rng = np.random.default_rng(0)
    for _ in range(n):
        walk = rng.normal(scale=30, size=(size, 64, 12)).cumsum(axis=1)
        yield {"signal": walk.astype(np.int16), "record_index": np.arange(size, dtype=np.int32)}


def run_mapped(devices, tx, n=3, trainable_ssm=False, accumulate=1):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (parallel.AXIS,))
    model = tiny_cpc(parallel.AXIS, trainable_ssm)
    step = functools.partial(train_step, model=model, tx=tx, **PLAIN, accumulate=accumulate)
    step_fn = parallel.map_train_step(step, mesh)
    state, log = parallel.replicate(tiny_state(tx, trainable_ssm), mesh), []
    for batch in batches(n):
        state, metrics = step_fn(state, parallel.shard_batch(batch, mesh))
        log.append(jax.device_get(metrics))
    return state, log


def assert_same_run(run, reference):
    """Metrics of every step, final parameters and statistics are equal up to the order of float32 sums."""
    (state, log), (reference_state, reference_log) = run, reference
    for entry, expected in zip(log, reference_log, strict=True):
        assert entry.keys() == expected.keys()
        for name in entry:
            np.testing.assert_allclose(entry[name], expected[name], rtol=3e-5, err_msg=name)
    for collection in ("params", "batch_stats"):
        ours = jax.tree.leaves_with_path(getattr(state, collection))
        theirs = jax.tree.leaves(getattr(reference_state, collection))
        for (path, leaf), expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(
                leaf, expected, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path)
            )


# SGD: Adam turns gradients that are zero up to rounding into full-size steps, so that two correct runs would
# differ.
SGD = optax.sgd(1e-4)


@pytest.fixture(scope="module")
def one_device():
    return run_mapped(1, SGD)


def test_eight_devices_equal_one(one_device):
    assert_same_run(run_mapped(8, SGD), one_device)


def test_parts_of_a_batch_do_not_depend_on_the_devices(one_device):
    parts = run_mapped(1, SGD, accumulate=2)
    assert_same_run(run_mapped(8, SGD, accumulate=2), parts)
    assert parts[1][0]["loss"] != one_device[1][0]["loss"]  # batch statistics are those of a part


def test_accumulated_gradients_are_the_mean_over_parts():
    """Plain SGD of rate 1 shows the gradient: the update of two parts is the mean of the updates of each, the second
    made with the running statistics that the first leaves.
    """
    step = functools.partial(train_step, model=tiny_cpc(None), tx=optax.sgd(1.0), **PLAIN, axis_name=None)
    start, (batch,) = tiny_state(optax.sgd(1.0)), batches(1)
    together, metrics = jax.jit(functools.partial(step, accumulate=2))(start, batch)
    one_part, state, losses, moves = jax.jit(step), start, [], []
    for part in range(2):
        after, alone = one_part(state, {name: rows[part::2] for name, rows in batch.items()})
        losses.append(alone["loss"])
        moves.append(jax.tree.map(jnp.subtract, after.params, start.params))
        state = start.replace(batch_stats=after.batch_stats)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *moves)
    moved = jax.tree.map(jnp.subtract, together.params, start.params)
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(mean), strict=True):
        assert_close(leaf, expected, 2e-4, jax.tree_util.keystr(path))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    for leaf, expected in zip(
        jax.tree.leaves(together.batch_stats), jax.tree.leaves(state.batch_stats), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    assert int(together.step) == 1


def test_step_is_compiled_once():
    mesh = parallel.make_mesh()
    step = functools.partial(train_step, model=tiny_cpc(parallel.AXIS), tx=SGD, **PLAIN)
    step_fn = parallel.map_train_step(step, mesh)
    state = parallel.replicate(tiny_state(SGD), mesh)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    counts = []
    for batch in batches(3):
        state, _ = step_fn(state, parallel.shard_batch(batch, mesh))
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


def test_pmap_equals_shard_map(one_device):
    step = functools.partial(train_step, model=tiny_cpc(parallel.AXIS), tx=SGD, **PLAIN)
    step_fn = jax.pmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, 0))
    state, log = tiny_state(SGD), []
    for batch in batches(3):
        per_device = {name: rows.reshape(8, -1, *rows.shape[1:]) for name, rows in batch.items()}
        state, metrics = step_fn(state, per_device)
        log.append({name: np.asarray(value)[0] for name, value in metrics.items()})
    assert_same_run((state, log), one_device)


def test_one_device_without_a_map_equals(one_device):
    step = functools.partial(train_step, model=tiny_cpc(None), tx=SGD, **PLAIN, axis_name=None)
    step_fn, state, log = jax.jit(step), tiny_state(SGD), []
    for batch in batches(3):
        state, metrics = step_fn(state, batch)
        log.append(jax.device_get(metrics))
    assert_same_run((state, log), one_device)


def test_order_of_records_on_devices_does_not_matter(one_device):
    """Two processes hold other rows side by side; negatives and dropout follow the record."""
    mesh = parallel.make_mesh()
    step = functools.partial(train_step, model=tiny_cpc(parallel.AXIS), tx=SGD, **PLAIN)
    step_fn = parallel.map_train_step(step, mesh)
    state, log = parallel.replicate(tiny_state(SGD), mesh), []
    for batch in batches(3):
        order = np.r_[0:16:2, 1:16:2]
        shuffled = {name: rows[order] for name, rows in batch.items()}
        state, metrics = step_fn(state, parallel.shard_batch(shuffled, mesh))
        log.append(jax.device_get(metrics))
    assert_same_run((state, log), one_device)


def test_compiled_step_only_all_reduces():
    mesh = parallel.make_mesh()
    step = functools.partial(train_step, model=tiny_cpc(parallel.AXIS), tx=SGD, **PLAIN)
    state = parallel.replicate(tiny_state(SGD), mesh)
    batch = parallel.shard_batch(next(batches(1)), mesh)
    hlo = parallel.map_train_step(step, mesh).lower(state, batch).compile().as_text()
    collectives = set(re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)", hlo))
    assert collectives == {"all-reduce"}


def test_missing_reduction_is_caught_at_trace_time():
    """A BatchNorm without axis name would train silently wrong under pmap; the map refuses it."""
    mesh = parallel.make_mesh()
    step = functools.partial(train_step, model=tiny_cpc(None), tx=SGD, **PLAIN)
    state = parallel.replicate(tiny_state(SGD), mesh)
    with pytest.raises(ValueError, match="replication"):
        parallel.map_train_step(step, mesh)(state, parallel.shard_batch(next(batches(1)), mesh))


def test_fixed_state_matrices_do_not_move_and_trainable_ones_do():
    tx = adamw(1e-2)
    fixed, _ = run_mapped(1, tx, n=2)
    for before, after in zip(jax.tree.leaves(tiny_state(tx).ssm), jax.tree.leaves(fixed.ssm), strict=True):
        np.testing.assert_array_equal(before, after)
    tx = optim.build_optimiser(
        optax.constant_schedule(1e-2), factors={"head": 1.0, "backbone": 1.0, "stem": 1.0, "ssm": 0.1},
        weight_decay=1e-3, b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0,
    )  # fmt: skip
    before = tiny_state(tx, trainable_ssm=True).params["encoder"]["backbone"]["layer0"]
    trained, log = run_mapped(8, tx, n=2, trainable_ssm=True)
    after = trained.params["encoder"]["backbone"]["layer0"]
    for name in ("Lambda", "P", "B", "log_dt"):
        assert not np.array_equal(before[name], after[name]), name
    assert all(np.isfinite(entry["loss"]) for entry in log)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters():
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        step = functools.partial(
            train_step, model=tiny_cpc(None, dtype=dtype), tx=SGD, **PLAIN, axis_name=None
        )
        step_fn, state = jax.jit(step), tiny_state(SGD)
        losses[dtype] = []
        for batch in batches(5):
            state, metrics = step_fn(state, batch)
            losses[dtype].append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=0.02)
    assert losses[jnp.bfloat16] != losses[jnp.float32]


def test_eval_step_weights_out_the_filling_rows():
    mesh = parallel.make_mesh()
    bound = {"model": tiny_cpc(parallel.AXIS), **PLAIN}
    eval_fn = parallel.map_eval_step(functools.partial(eval_step, **bound), mesh)
    state = parallel.replicate(tiny_state(SGD), mesh)
    batch = next(batches(1)) | {"weight": np.r_[np.ones(11), np.zeros(5)].astype(np.float32)}
    spoiled = batch | {"signal": batch["signal"].copy()}
    spoiled["signal"][11:] = 30_000
    results = [
        mean_of_sums([jax.device_get(eval_fn(state, parallel.shard_batch(b, mesh)))])
        for b in (batch, spoiled)
    ]
    assert results[0] == results[1]
    assert np.isfinite(results[0]["loss"])
    assert mean_of_sums([]) == {}


def test_bases_belong_to_the_state_matrices_of_the_state():
    """A restored state may have other step sizes than a freshly drawn one."""
    state = tiny_state(SGD)
    layer = state.ssm["encoder"]["backbone"]["layer0"]
    slower = layer | {"log_dt": layer["log_dt"] - 1.0}
    backbone = state.ssm["encoder"]["backbone"] | {"layer0": slower}
    restored = state.replace(ssm={"encoder": {"backbone": backbone}})
    bases = with_bases(restored, tokens=32, l_max=32).basis["encoder"]["backbone"]
    expected = kernel_bases({"layer0": slower}, length=32, l_max=32)["layer0"]["phi"]
    np.testing.assert_array_equal(bases["layer0"]["phi"], expected)
    assert not np.allclose(expected, state.basis["encoder"]["backbone"]["layer0"]["phi"], rtol=0.1)
    np.testing.assert_array_equal(bases["layer1"]["phi"], state.basis["encoder"]["backbone"]["layer1"]["phi"])
