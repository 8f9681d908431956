"""The supervised baselines: resampling inside the program, the reference's S4 at 100 Hz, training from scratch."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters

from ecg_jax.data.preprocessing import resample
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.errors import UserError
from ecg_jax.evaluation import supervised
from ecg_jax.models.probe_heads import HeadedEncoder, MeanLinear
from ecg_jax.models.supervised import SupervisedS4, resampling_matrix
from tiny_probes import MODEL, one_device, tiny_encoder, tiny_examples


def test_size_is_the_published_one():
    network = HeadedEncoder(SupervisedS4(rate_hz=240.0), MeanLinear(71))
    init = functools.partial(network.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 600, 12)))
    assert count_parameters(variables["params"]) == 2_183_239
    tokens, _ = jax.eval_shape(
        lambda v, x: network.encoder.apply(v, x, train=False),
        {name: tree["encoder"] for name, tree in variables.items()},
        jnp.zeros((1, 600, 12)),
    )
    assert tokens.shape == (1, 250, 512)


@pytest.fixture(scope="module")
def real_ecg():
    """[T, 12] mV at 240 Hz, 10 s; in the first two seconds V1 jumps by 9 mV."""
    path = Path(__file__).parent / "data" / "challenge_2021" / "JS45544.hea"
    return resample(np.asarray(read_wfdb(path, "JS45544").signal, np.float64), 500.0, 240.0)


@pytest.mark.parametrize(("start", "inside", "ends"), [(600, 2e-3, 2e-2), (1200, 2e-3, 2e-2)])
def test_resampling_of_a_crop_equals_that_of_the_recording(real_ecg, start, inside, ends):
    """Against soxr's on the whole recording, in mV; only near its ends does a crop lack what lies beyond."""
    expected = resample(real_ecg, 240.0, 100.0)[start * 100 // 240 :][:250]
    error = np.abs(resampling_matrix(600, 240.0, 100.0) @ real_ecg[start : start + 600] - expected)
    assert error[25:-25].max() < inside
    assert error.max() < ends


def test_resampling_keeps_what_lies_below_40_hz(real_ecg):
    """Where two filters cannot differ they must not: not even around a jump of 9 mV."""
    from scipy.signal import filtfilt, firwin

    slow = filtfilt(firwin(201, 40.0, fs=240.0), 1.0, real_ecg, axis=0)
    expected = resample(slow, 240.0, 100.0)[:250]
    error = np.abs(resampling_matrix(600, 240.0, 100.0) @ slow[:600] - expected)
    assert error[25:-25].max() < 1e-4


def test_resampling_of_sines():
    matrix, time = resampling_matrix(600, 240.0, 100.0), np.arange(600) / 240
    inner = slice(60, -60)
    for hertz in (1.0, 10.0, 30.0, 44.0):
        expected = np.sin(2 * np.pi * hertz * np.arange(250) / 100 + 0.3)
        assert np.abs(matrix @ np.sin(2 * np.pi * hertz * time + 0.3) - expected)[inner].max() < 5e-4
    for hertz in (51.0, 60.0, 90.0, 110.0):  # would alias
        assert np.abs(matrix @ np.sin(2 * np.pi * hertz * time + 0.3))[inner].max() < 5e-4
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=0, atol=1e-12)


def test_resampling_of_other_rates():
    assert resampling_matrix(1250, 500.0, 100.0).shape == (250, 1250)
    time = np.arange(250) / 100
    up = resampling_matrix(250, 100.0, 240.0) @ np.sin(2 * np.pi * 5 * time)
    np.testing.assert_allclose(
        up[150:-150], np.sin(2 * np.pi * 5 * np.arange(600) / 240)[150:-150], atol=5e-4
    )
    with pytest.raises(ValueError, match="too short to be resampled from 240 to 100 Hz, which takes 122"):
        resampling_matrix(120, 240.0, 100.0)


def fit(path, monkeypatch=None, **settings):
    if monkeypatch:
        small = functools.partial(SupervisedS4, width=16, layers=1, conv="fft")
        monkeypatch.setattr(supervised, "SupervisedS4", small)
    defaults = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "mesh": one_device()}
    contract = tiny_encoder().preprocessing
    return supervised.fit_supervised(MODEL, contract, tiny_examples(path), **defaults | settings)


def test_the_same_architecture_from_scratch(synthetic_store, tmp_path):
    fitted = fit(synthetic_store, folder=tmp_path)
    assert (fitted.report["architecture"], fitted.report["head"]) == ("same", "linear")
    assert fitted.report["parameters"] == count_parameters(tiny_encoder().variables["params"]) + 17 * 4
    assert fitted.report["factors"] == {"head": 1.0, "backbone": 1.0, "stem": 1.0}
    assert fitted.report["curve"][1]["loss"] < fitted.report["curve"][0]["loss"]
    assert fitted.test.shape == (24, 4)
    other = fit(synthetic_store, seed=1)
    assert np.abs(other.test - fitted.test).max() > 1e-3
    with pytest.raises(UserError, match="holds another fit"):
        fit(synthetic_store, folder=tmp_path, seed=1)


def test_s4_at_100_hz_from_scratch(synthetic_store, monkeypatch):
    fitted = fit(synthetic_store, monkeypatch, architecture="s4_100hz", epochs=3)
    # Of the network that was fitted, not of a pretrained one.
    init = functools.partial(SupervisedS4(rate_hz=240.0, width=16, layers=1).init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 240, 12)))
    assert fitted.report["parameters"] == count_parameters(variables["params"]) + 17 * 4
    losses = [epoch["loss"] for epoch in fitted.report["curve"]]
    assert losses[2] < losses[0]
    assert np.isfinite(fitted.test).all()


def test_unknown_architectures_are_refused(synthetic_store):
    with pytest.raises(ValueError, match='unknown; known: "same", "s4_100hz"'):
        fit(synthetic_store, architecture="s4_50hz")
