import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close
from ecg_jax.models import convolution, hippo
from ecg_jax.models.convolution import candidates, choose, convolve, convolve_with, parse

LENGTHS = [1, 75, 299, 300, 301, 600, 1200, 2400, 5000]
ALGORITHMS = ["fft", "toeplitz", "chunked:16", "chunked:64", "chunked:100"]


def system(rng, H, state, channels, length, l_max=300):
    """Pairs C, the basis in float64, and complex matrices (Ab, Bb, C) for a recurrence, length correction undone."""
    Lambda, P, B = (np.tile(v, (H, 1)) for v in hippo.dplr_hippo(state))
    log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), H)
    C = rng.normal(size=(channels, H, state // 2, 2))
    matrices = (Lambda, P, B, log_dt)
    powers = [hippo.transition(*matrices)]
    while len(powers) < convolution.n_powers(length):
        powers.append(powers[-1] @ powers[-1])
    phi = hippo.kernel_basis(*matrices, l_max=l_max, length=length)
    Ab, Bb = hippo.discretise(Lambda, P, B, np.exp(log_dt))
    full = np.concatenate([C[..., 0] + 1j * C[..., 1], C[..., 0] - 1j * C[..., 1]], axis=-1)
    inverse = np.linalg.inv(np.eye(state) - np.linalg.matrix_power(Ab, l_max))
    return C, {"phi": phi, "powers": np.stack(powers)}, (Ab, Bb, np.einsum("hnm,chn->chm", inverse, full))


def recurrence(u, Ab, Bb, C):
    """x_t = Ab x_{t-1} + Bb u_t, y_t = Re C x_t, sample by sample; the anti-causal kernel backwards from t + 1 on."""

    def scan(u, C):
        x, y = np.zeros((*u.shape[:2], Ab.shape[-1]), complex), []
        for t in range(u.shape[-1]):
            x = np.einsum("hnm,hbm->hbn", Ab, x) + Bb[:, None] * u[..., t, None]
            y.append(np.einsum("hn,hbn->hb", C, x).real)
        return np.stack(y, axis=-1)

    y = scan(u, C[0])
    if len(C) == 2:
        backwards = scan(u[..., ::-1], C[1])[..., ::-1]
        y[..., :-1] += backwards[..., 1:]
    return y


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("L", LENGTHS)
def test_all_algorithms_equal_the_recurrence_in_float64(L, channels):
    rng = np.random.default_rng(L)
    C, basis, matrices = system(rng, H=2, state=8, channels=channels, length=L)
    u, cotangent = rng.normal(size=(2, 2, 2, L))
    expected = recurrence(u, *matrices)
    # y is linear in u: its gradient is the same convolution run backwards in time.
    flipped = cotangent[..., ::-1]
    expected_du = recurrence(flipped, *(matrices[0], matrices[1], matrices[2][:1]))[..., ::-1]
    if channels == 2:
        forwards = recurrence(cotangent, matrices[0], matrices[1], matrices[2][1:])
        expected_du = expected_du + np.pad(forwards, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    # ... and linear in C: the gradient with respect to one coefficient is the cotangent's product with its response.
    unit = np.zeros_like(C)
    unit[0, 0, 1, 1] = 1.0
    with jax.enable_x64(True):
        reference = None
        for algorithm in ALGORITHMS:
            if algorithm == "toeplitz" and L > 1200:
                continue

            def total(u, C, basis, algorithm=algorithm):
                y = convolve(u, C, basis, algorithm=algorithm)
                return (y * cotangent).sum(), y

            grad = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
            (_, y), (du, dC) = grad(jnp.asarray(u), jnp.asarray(C), jax.tree.map(jnp.asarray, basis))
            assert y.dtype == jnp.float64
            assert_close(y, expected, 1e-10, f"{algorithm} value")
            assert_close(du, expected_du, 1e-10, f"{algorithm} gradient of u")
            if reference is None:
                response = convolve(*map(jnp.asarray, (u, unit)), basis, algorithm="fft")
                np.testing.assert_allclose(dC[0, 0, 1, 1], (response * cotangent).sum(), rtol=1e-9)
                reference = dC
            assert_close(dC, reference, 1e-10, f"{algorithm} gradient of C")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("L", [1, 2, 7, 64, 75])
@pytest.mark.parametrize("algorithm", ["fft", "toeplitz"])
def test_convolution_with_a_kernel_equals_the_direct_sum(algorithm, L, channels):
    rng = np.random.default_rng(L)
    u, K = rng.normal(size=(3, 2, L)), rng.normal(size=(channels, 3, L))
    expected = np.zeros_like(u)
    for t in range(L):
        for j in range(t + 1):
            expected[..., t] += K[0, :, None, j] * u[..., t - j]
        for j in range(L - 1 - t) if channels == 2 else ():
            expected[..., t] += K[1, :, None, j] * u[..., t + 1 + j]
    y = convolve_with(jnp.asarray(u, jnp.float32), jnp.asarray(K, jnp.float32), algorithm=algorithm)
    assert_close(y, expected, 2e-6)


@pytest.mark.parametrize("algorithm", ["toeplitz", "chunked:32"])
def test_bfloat16_products_have_float32_results(algorithm):
    rng = np.random.default_rng(0)
    C, basis, matrices = system(rng, H=16, state=8, channels=2, length=300)
    C, basis = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (C, basis))
    u = rng.normal(size=(16, 4, 300))
    y = convolve(jnp.asarray(u, jnp.bfloat16), C, basis, algorithm=algorithm)
    assert y.dtype == jnp.float32
    error = y - recurrence(u, *matrices)
    assert jnp.sqrt(jnp.mean(error**2) / jnp.mean(y**2)) < 5e-3  # rounding of u and K to 8 bits


@pytest.mark.parametrize("bad", ["", "FFT", "chunked:", "chunked:0", "chunked:-4", "fft:32", "chunked:1e3"])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match=r"^model\.conv='.*' is unknown; known: auto, fft"):
        parse(bad)


def ask(conv="auto", **changes):
    asked = {"length": 300, "width": 512, "state": 8, "channels": 1, "dtype": jnp.float32, "fixed": True}
    return choose(conv, **asked | {"device_kind": "made up"} | changes)


def row(**changes):
    made = {
        "device_kind": "made up",
        "dtype": "float32",
        "channels": 1,
        "state": 8,
        "width": 512,
        "length": 300,
    }
    return made | {"relative": {"fft": 1.0, "chunked:32": 2.0, "toeplitz": 1.5}} | changes


def test_choice_follows_the_nearest_measurement(monkeypatch):
    rows = [
        row(),
        row(length=75, relative={"fft": 1.0, "toeplitz": 3.0, "chunked:32": 2.0}),
        row(length=1200, relative={"fft": 1.0, "chunked:128": 1.3}),
        row(dtype="bfloat16", relative={"fft": 1.0, "chunked:64": 4.0}),
        row(state=64, relative={"fft": 1.0, "toeplitz": 0.5}),
    ]
    monkeypatch.setattr(convolution, "_table", lambda: rows)
    assert ask() == ("chunked:32", "2.0 times as fast as fft on made up at 300 tokens, width 512")
    assert ask(length=60)[0] == "toeplitz"
    assert ask(length=2000)[0] == "chunked:128"
    assert ask(dtype=jnp.bfloat16)[0] == "chunked:64"
    assert ask(state=64)[0] == "fft"
    assert ask(fixed=False)[0] == "toeplitz"  # the chunked form needs fixed state matrices
    assert ask(fixed=False, length=440)[0] == "toeplitz"
    assert (
        ask(fixed=False, length=460)[0] == "fft"
    )  # a quadratic form is not carried far beyond its measurement
    assert ask("fft") == ("fft", "as model.conv says")
    assert ask("chunked")[0] == "chunked:64"
    assert ask("chunked:16", state=64)[0] == "fft"


def test_choice_without_measurement_says_so(monkeypatch):
    monkeypatch.setattr(convolution, "_table", lambda: [])
    assert ask() == ("chunked:64", "nothing was measured for made up in float32")
    assert ask(length=50)[0] == "toeplitz"
    assert ask(length=5000, state=64)[0] == "fft"


def test_shipped_table_has_rows_that_choose_can_read():
    rows = json.loads(convolution.TABLE.read_text())["rows"]
    assert {row["device_kind"] for row in rows} >= {"cpu"}
    for row in rows:
        assert set(row["relative"]) <= set(candidates(row["length"], row["state"])), row
        assert row["relative"]["fft"] == 1.0
        name, _ = choose(
            "auto",
            length=row["length"],
            width=row["width"],
            state=row["state"],
            channels=row["channels"],
            dtype=jnp.dtype(row["dtype"]),
            fixed=True,
            device_kind=row["device_kind"],
        )
        assert row["relative"][name] == max(row["relative"].values())
