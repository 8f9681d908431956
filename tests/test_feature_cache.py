"""Features kept on disk: right values in the right order, computed once, resumed, mended, shared by processes."""

import dataclasses
import errno
import json
import multiprocessing

import jax
import numpy as np
import pytest

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import feature_cache
from ecg_jax.evaluation.feature_cache import FeatureCache
from ecg_jax.training import pretrained
from ecg_jax.training.pretrained import RestoredEncoder

WINDOW_S = 0.5
MODEL = {"backbone": "s4", "width": 8, "l_max": 60, "layers": 2, "state": 4, "dropout": 0.0}
LAYERS = ("stem", "block0", "tokens")


@pytest.fixture(scope="module")
def store(synthetic_store):
    return Store(synthetic_store)


@pytest.fixture(scope="module")
def encoder(store, tmp_path_factory):
    contract = dataclasses.replace(store.preprocessing, window_s=WINDOW_S, normalisation="none")
    bare = RestoredEncoder(tmp_path_factory.mktemp("run"), 1, {"model": MODEL}, contract, {}, 0)
    return dataclasses.replace(pretrained.random_twin(bare, seed=0), step=1)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_cache, "PART_CROPS", 100)


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of crops handed to an encoder since, and the layers it was asked for."""
    calls = []
    original = pretrained.pooled_fn

    def counting(encoder, layers):
        pooled = original(encoder, layers)

        def count(signal):
            calls.append((len(signal), tuple(layers)))
            return pooled(signal)

        return count

    monkeypatch.setattr(feature_cache, "pooled_fn", counting)
    return calls


def _direct(encoder, store, rows, layer="tokens"):
    """Features of some rows without a cache, crop by crop of each record in turn."""
    outputs = jax.jit(lambda v, x: pretrained.layer_outputs(encoder)(v, x)[layer].mean(axis=1))
    window = encoder.preprocessing.window_samples
    crops, record = [], []
    for i, row in enumerate(rows):
        signal = store.read(int(row))
        for k in range(len(signal) // window):
            crops.append(signal[k * window : (k + 1) * window])
            record.append(i)
    with jax.default_matmul_precision("highest"):
        return np.asarray(outputs(encoder.variables, np.stack(crops))), np.array(record)


def test_layers_are_named_from_the_input_on(encoder):
    assert pretrained.layer_names(encoder) == ("stem", "block0", "block1", "tokens")
    assert set(pretrained.layer_shapes(encoder)) == {*pretrained.layer_names(encoder), "layer0", "layer1"}
    assert pretrained.layer_shapes(encoder)["block0"] == (60, 8)
    with pytest.raises(ValueError, match="no layer block7; it has stem"):
        pretrained.pooled_fn(encoder, ("block7",))


def test_features_of_any_rows_equal_those_computed_directly(tmp_path, encoder, store, small_parts):
    pooled = FeatureCache(tmp_path).pooled(encoder, store, LAYERS, batch_size=32)
    rows = np.random.default_rng(0).permutation(len(store))[:20]
    for layer in LAYERS:
        features, record = pooled.of(rows, layer)
        expected, expected_record = _direct(encoder, store, rows, layer)
        np.testing.assert_array_equal(record, expected_record)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
        assert features.dtype == np.float32
    again, _ = pooled.of([rows[3], rows[3], rows[0]])
    n = len(again) // 3
    np.testing.assert_array_equal(again[:n], again[n : 2 * n])
    with pytest.raises(ValueError, match="layer 'block1'"):
        pooled.of(rows, "block1")
    with pytest.raises(ValueError, match="rows must lie"):
        pooled.of([len(store)])


def test_rows_are_those_of_the_parts_of_a_task(tmp_path, encoder, store):
    from ecg_jax.data.crops import non_overlapping_crops

    rows = np.array([5, 2, 90])
    _, record = FeatureCache(tmp_path).pooled(encoder, store).of(rows)
    lengths, offsets = store.column("length")[rows], store.column("offset")[rows]
    np.testing.assert_array_equal(
        record, non_overlapping_crops(lengths, offsets, encoder.preprocessing.window_samples)[1]
    )


def test_nothing_is_computed_twice_and_a_new_layer_alone(tmp_path, encoder, store, encoded, small_parts):
    cache = FeatureCache(tmp_path)
    n_crops = int((store.column("length") // encoder.preprocessing.window_samples).sum())
    first = cache.pooled(encoder, store, LAYERS, batch_size=50)
    assert {layers for _, layers in encoded} == {LAYERS}
    assert n_crops <= sum(n for n, _ in encoded) < n_crops + 50 * -(-n_crops // 100)
    encoded.clear()
    second = cache.pooled(encoder, store, LAYERS, batch_size=50)
    assert not encoded
    np.testing.assert_array_equal(first.of([0, 1], "stem")[0], second.of([0, 1], "stem")[0])
    cache.pooled(encoder, store, (*LAYERS, "block1"), batch_size=50)
    assert {layers for _, layers in encoded} == {("block1",)}


def test_only_parts_that_hold_needed_records_are_computed(tmp_path, encoder, store, encoded, small_parts):
    n_crops = store.column("length") // encoder.preprocessing.window_samples
    ends = np.cumsum(n_crops)
    rows = np.array([len(store) - 1, 0])
    needed = {0, *range((ends[-1] - n_crops[-1]) // 100, (ends[-1] - 1) // 100 + 1)}
    assert len(needed) < ends[-1] // 100 - 1
    pooled = FeatureCache(tmp_path).pooled(encoder, store, batch_size=100, rows=rows)
    assert len(encoded) == len(needed) == len(list(tmp_path.glob("*/tokens/*.npy")))
    np.testing.assert_array_equal(pooled.parts, sorted(needed))
    expected, _ = _direct(encoder, store, rows)
    np.testing.assert_allclose(pooled.of(rows)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="asked for other rows"):
        pooled.of([len(store) // 2])
    # The others are computed when they are needed, those that are there are not computed again.
    encoded.clear()
    FeatureCache(tmp_path).pooled(encoder, store, batch_size=100)
    assert len(encoded) == -(-ends[-1] // 100) - len(needed)


def test_a_part_is_read_for_its_checksum_once(tmp_path, encoder, store, monkeypatch, small_parts):
    cache, digested, original = FeatureCache(tmp_path), [], feature_cache._digest
    cache.pooled(encoder, store, batch_size=100)
    monkeypatch.setattr(feature_cache, "_digest", lambda array: digested.append(1) or original(array))
    cache.pooled(encoder, store, batch_size=100)
    assert not digested
    feature_cache._verified.clear()  # another process
    cache.pooled(encoder, store, batch_size=100)
    assert len(digested) == len(list(tmp_path.glob("*/tokens/*.npy")))


def test_other_weights_contract_or_store_are_another_entry(tmp_path, encoder, store):
    key = feature_cache.entry_key(encoder, store)
    assert feature_cache.entry_key(dataclasses.replace(encoder, run="elsewhere", step=7), store) == key
    twin = pretrained.random_twin(encoder, seed=1)
    other_contract = dataclasses.replace(encoder.preprocessing, normalisation="zscore")
    others = [twin, dataclasses.replace(encoder, preprocessing=other_contract)]
    keys = [feature_cache.entry_key(other, store) for other in others]

    class OtherStore:
        fingerprint = "0" * 64

    keys.append(feature_cache.entry_key(encoder, OtherStore()))
    assert len({key, *keys}) == 4
    cache = FeatureCache(tmp_path)
    ours, theirs = (cache.pooled(each, store).of([0])[0] for each in (encoder, twin))
    assert np.abs(ours - theirs).max() > 1e-3
    steps = [json.loads(path.read_text())["step"] for path in tmp_path.glob("*/entry.json")]
    assert sorted(steps, key=str) == [1, None]


def _damage(path, how):
    data = path.read_bytes()
    if how == "short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif how == "another shape":
        feature_cache._write(path, np.zeros((3, 8), np.float32))


@pytest.mark.parametrize("how", ["short", "empty", "one bit", "another shape"])
def test_a_damaged_part_is_computed_again(tmp_path, encoder, store, encoded, small_parts, how):
    cache = FeatureCache(tmp_path)
    expected = cache.pooled(encoder, store, batch_size=100).of(np.arange(len(store)))[0]
    encoded.clear()
    parts = sorted(tmp_path.glob("*/tokens/*.npy"))
    assert len(parts) > 3
    _damage(parts[1], how)
    got = cache.pooled(encoder, store, batch_size=100).of(np.arange(len(store)))[0]
    assert [n for n, _ in encoded] == [100]
    np.testing.assert_array_equal(got, expected)


def test_an_interrupted_run_goes_on(tmp_path, encoder, store, monkeypatch, small_parts):
    cache, original, calls = FeatureCache(tmp_path), pretrained.pooled_fn, []

    def interrupted(encoder, layers):
        pooled = original(encoder, layers)

        def encode(signal):
            calls.append(len(signal))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return pooled(signal)

        return encode

    monkeypatch.setattr(feature_cache, "pooled_fn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.pooled(encoder, store, batch_size=100)
    assert len(list(tmp_path.glob("*/tokens/*.npy"))) == 2
    cache.pooled(encoder, store, batch_size=100)
    n_parts = len(list(tmp_path.glob("*/tokens/*.npy")))
    assert len(calls) == 3 + n_parts - 2
    assert not list(tmp_path.glob("*/*/.*"))


def test_a_part_that_another_process_has_locked_is_waited_for(tmp_path, encoder, store, small_parts):
    """The other process holds part 0 for a while, then writes it; it must not be computed here as well."""
    cache = FeatureCache(tmp_path / "a")
    key = feature_cache.entry_key(encoder, store)
    cache.pooled(encoder, store, batch_size=100)
    part = tmp_path / "a" / key / "tokens" / "000000.npy"
    moved = tmp_path / "kept.npy"
    part.rename(moved)
    # Values that nobody here would compute, so that the test knows whose part it reads.
    shape = np.load(moved, mmap_mode="r").shape
    feature_cache._write(moved, np.full(shape, 7.0, np.float32))
    context = multiprocessing.get_context("spawn")
    holds = context.Event()
    process = context.Process(target=_hold_part, args=(str(part), str(moved), holds))
    process.start()
    try:
        assert holds.wait(60)
        features, _ = cache.pooled(encoder, store, batch_size=100).of(np.arange(len(store)))
    finally:
        process.join(60)
    assert (features[:100] == 7.0).all()
    assert (features[100:] != 7.0).any()


def _hold_part(part, moved, holds):
    import fcntl
    import os
    import time
    from pathlib import Path

    with open(Path(part).parent.parent / "lock", "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
        holds.set()
        time.sleep(0.5)
        os.rename(moved, part)


def test_a_full_disk_is_one_sentence_and_leaves_no_rubbish(tmp_path, encoder, store, monkeypatch):
    def full(path, data, temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache, "replace_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        FeatureCache(tmp_path).pooled(encoder, store, batch_size=100)
    assert not list(tmp_path.glob("*/*/*.npy"))


def test_a_folder_that_cannot_be_made(tmp_path, encoder, store):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write features into"):
        FeatureCache(tmp_path / "file" / "cache").pooled(encoder, store)


def test_an_encoder_that_diverged_is_refused_and_nothing_kept(tmp_path, encoder, store):
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32("nan"), encoder.variables["params"])
    diverged = dataclasses.replace(encoder, variables={**encoder.variables, "params": broken})
    with pytest.raises(UserError, match=r"pretrained: the encoder gave values that are not finite"):
        FeatureCache(tmp_path).pooled(diverged, store, batch_size=100, label="pretrained")
    assert not list(tmp_path.glob("*/*/*.npy"))


def test_records_shorter_than_a_window(tmp_path, encoder, store):
    longer = dataclasses.replace(encoder.preprocessing, window_s=1000.0)
    with pytest.raises(UserError, match="No record of the store"):
        FeatureCache(tmp_path).pooled(dataclasses.replace(encoder, preprocessing=longer), store)
