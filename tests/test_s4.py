import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.interop.torch_checkpoint import convert_s4_layer
from ecg_jax.models import hippo
from ecg_jax.models.convolution import kernel_from_basis
from ecg_jax.models.s4 import S4Layer, _discretised_A, as_complex, kernel_bases, kernel_dplr

jitted_dplr = jax.jit(kernel_dplr, static_argnames=("l_max", "length"))


def layer_runs():
    """(file, layer group, run group) of every stored run of a narrow layer."""
    return [
        (name, run.split("_L")[0], run)
        for name in ("s4_layer_causal_h32", "s4_layer_bidirectional_h32")
        for run in sorted({key.split("/")[0] for key in load_golden(name) if "_L" in key.split("/")[0]})
    ]


def build_layer(sd, u, l_max, conv="fft"):
    """An S4Layer with the reference's parameters, and its variables with the basis for inputs like u [H, B, L]."""
    variables = convert_s4_layer(sd)
    channels, H, half, _ = variables["params"]["C"].shape
    layer = S4Layer(width=H, state=2 * half, l_max=l_max, bidirectional=channels == 2, dropout=0.0, conv=conv)
    basis = kernel_bases(variables["ssm"], length=u.shape[-1], l_max=l_max)
    return layer, variables, basis


def exact_or_reference(golden, run, name):
    """The mathematically right array: the reference's own unless it is known to be off (odd internal length)."""
    exact = f"{run}/exact/{name}"
    return golden[exact] if exact in golden else golden[f"{run}/out/{name}"]


@pytest.mark.parametrize(("name", "layer_group", "run"), layer_runs())
@pytest.mark.parametrize("form", ["fft", "toeplitz", "chunked:32", "chunked:64", "dplr"])
def test_layer_parity(name, layer_group, run, form):
    golden = load_golden(name)
    sd = group(golden, f"{layer_group}/sd/")
    l_max = int(layer_group.removeprefix("lmax"))
    check_layer(golden, run, sd, l_max, form, gradients=f"{run}/out/internal_length" not in golden)
    if f"{run}/out/internal_length" in golden:
        # The reference lengthened its kernel in place: its gradients are those of the lengthened C.
        sd["kernel.kernel.C"] = golden[f"{run}/out/C_after_doubling"].astype(np.float32)
        check_layer(golden, run, sd, int(golden[f"{run}/out/internal_length"]), form, gradients=True)


def check_layer(golden, run, sd, l_max, form, gradients):
    u, cotangent = (jnp.swapaxes(golden[f"{run}/in/{name}"], 0, 1) for name in ("u", "cotangent"))
    layer, variables, basis = build_layer(sd, u, l_max, conv="auto" if form == "dplr" else form)
    collections = {"ssm": variables["ssm"]} | ({} if form == "dplr" else {"basis": basis})

    if form != "dplr":
        K = kernel_from_basis(variables["params"]["C"], basis["phi"])
    else:
        matrices = [as_complex(variables["ssm"][key]) for key in ("Lambda", "P", "B")]
        C = as_complex(variables["params"]["C"])
        K = jitted_dplr(C, *matrices, variables["ssm"]["log_dt"], l_max=l_max, length=u.shape[-1])
    assert_close(K, exact_or_reference(golden, run, "K"), 2e-5, "K")

    @jax.jit
    def objective(params, u):
        y = layer.apply({"params": params, **collections}, u, train=False)
        return (y * cotangent).sum(), y

    (_, y), (grads, grad_u) = jax.value_and_grad(objective, (0, 1), has_aux=True)(variables["params"], u)
    assert_close(jnp.swapaxes(y, 0, 1), exact_or_reference(golden, run, "y"), 1e-5, "y")
    if gradients and golden[f"{run}/meta/reference_is_exact"]:
        grad = group(golden, f"{run}/grad/")
        assert_close(jnp.swapaxes(grad_u, 0, 1), grad["u"], 5e-5, "grad u")
        assert_close(grads["C"], grad["kernel.kernel.C"], 5e-5, "grad C")
        assert_close(grads["D"], grad["D"][0], 5e-5, "grad D")
        assert_close(grads["output"]["kernel"].T, grad["output_linear.0.weight"], 5e-5, "grad W")
        assert_close(grads["output"]["bias"], grad["output_linear.0.bias"].ravel(), 5e-5, "grad b")


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_length_correction(direction):
    """The layer's own initialiser corrects C as the reference does."""
    golden = load_golden(f"s4_layer_{direction}_h32")
    groups = {key.split("/")[0] for key in golden if key.endswith("C_before_length_correction")}
    for name in sorted(groups):
        sd = group(golden, f"{name}/sd/")
        ssm = {key: np.asarray(value, float) for key, value in convert_s4_layer(sd)["ssm"].items()}
        Lambda, P, B = (as_complex(ssm[key]) for key in ("Lambda", "P", "B"))
        Ab, _ = hippo.discretise(*map(np.asarray, (Lambda, P, B)), np.exp(ssm["log_dt"]))
        C = np.asarray(as_complex(golden[f"{name}/init/C_before_length_correction"]), complex)
        power = np.linalg.matrix_power(Ab, int(name.removeprefix("lmax")))
        full = np.concatenate([C, C.conj()], axis=-1)
        corrected = (full - np.einsum("hnm,chn->chm", power, full))[..., : C.shape[-1]]
        assert_close(as_complex(sd["kernel.kernel.C"]), corrected, 1e-4, name)


def random_system(rng, *, H=3, state=8, channels=2):
    Lambda, P, B = (np.tile(v, (H, 1)) for v in hippo.dplr_hippo(state))
    C = rng.normal(size=(channels, H, state // 2)) + 1j * rng.normal(size=(channels, H, state // 2))
    return C, Lambda, P, B, rng.uniform(np.log(1e-3), np.log(1e-1), H)


def recurrent_kernel(C, Lambda, P, B, log_dt, *, l_max, length):
    """K_t = C Ab^t Bb by stepping the state, from the length-corrected C."""
    Ab, x = hippo.discretise(Lambda, P, B, np.exp(log_dt))
    eye = np.eye(Ab.shape[-1])
    full = np.concatenate([C, C.conj()], axis=-1)
    inverse = np.linalg.inv(eye - np.linalg.matrix_power(Ab, l_max))
    C = np.einsum("hnm,chn->chm", inverse, full)
    K = []
    for _ in range(length):
        K.append(np.einsum("chn,hn->ch", C, x).real)
        x = np.einsum("hnm,hm->hn", Ab, x)
    return np.stack(K, axis=-1)


@pytest.mark.parametrize("length", [1, 2, 75, 150, 299, 300, 301, 600, 1201])
def test_kernels_equal_recurrence_in_float64(length):
    system = random_system(np.random.default_rng(length))
    expected = recurrent_kernel(*system, l_max=300, length=length)
    phi = hippo.kernel_basis(*system[1:], l_max=300, length=length)
    coefficients = np.concatenate([system[0].real, system[0].imag], axis=-1)
    assert_close(np.einsum("chn,hnl->chl", coefficients, phi), expected, 1e-10, "basis")
    with jax.enable_x64(True):
        K = jitted_dplr(*map(jnp.asarray, system), l_max=300, length=length)
        assert K.dtype == jnp.float64
        assert_close(K, expected, 1e-10, "Cauchy")


@pytest.mark.parametrize("l_max", [75, 301])
def test_odd_correction_length_is_exact(l_max):
    system = random_system(np.random.default_rng(0))
    expected = recurrent_kernel(*system, l_max=l_max, length=l_max)
    with jax.enable_x64(True):
        K = jitted_dplr(*map(jnp.asarray, system), l_max=l_max, length=l_max)
        assert_close(K, expected, 1e-10)


def test_trainable_state_matrices_receive_gradients_and_fixed_ones_are_no_parameters():
    u = jax.random.normal(jax.random.key(0), (4, 2, 40))
    fixed = S4Layer(width=4, l_max=40, dropout=0.0).init(jax.random.key(1), u, train=False)
    assert set(fixed["params"]) == {"C", "D", "output"}
    assert set(fixed["ssm"]) == {"Lambda", "P", "B", "log_dt"}

    layer = S4Layer(width=4, l_max=40, dropout=0.0, trainable_ssm=True)
    variables = layer.init(jax.random.key(1), u, train=False)
    assert set(variables) == {"params"}
    energy = jax.jit(lambda p: jnp.square(layer.apply({"params": p}, u, train=False)).sum())
    grads = jax.grad(energy)(variables["params"])
    for name in ("Lambda", "P", "B", "log_dt"):
        assert np.isfinite(grads[name]).all(), name
        assert np.abs(grads[name]).max() > 0, name


def test_trainable_gradients_match_finite_differences():
    with jax.enable_x64(True):
        C, Lambda, P, B, log_dt = map(jnp.asarray, random_system(np.random.default_rng(1), H=2, channels=1))
        weights = jax.random.normal(jax.random.key(0), (1, 2, 50))

        @jax.jit
        def objective(log_dt, imag):
            K = kernel_dplr(C, Lambda + 1j * imag, P, B, log_dt, l_max=32, length=50)
            return (weights * K).sum()

        imag = jnp.zeros_like(Lambda.real)
        by_ad = jax.grad(objective, (0, 1))(log_dt, imag)
        step = 1e-6
        for argument, gradient in enumerate(by_ad):
            moved = [
                [at + (i == argument) * s * step for i, at in enumerate((log_dt, imag))] for s in (1, -1)
            ]
            numeric = (objective(*moved[0]) - objective(*moved[1])) / (2 * step)
            np.testing.assert_allclose(gradient.sum(), numeric, rtol=1e-6)


def test_discretisation_equals_the_linear_solve():
    rng = np.random.default_rng(0)
    _, Lambda, P, B, log_dt = random_system(rng, H=64)
    expected, _ = hippo.discretise(Lambda, P, B, np.exp(log_dt))
    assert_close(_discretised_A(*map(jnp.asarray, (Lambda, P, np.exp(log_dt)))), expected, 1e-6)
    with jax.enable_x64(True):
        assert_close(_discretised_A(*map(jnp.asarray, (Lambda, P, np.exp(log_dt)))), expected, 1e-12)


def test_initialisation_calls_no_linear_solver():
    """Batched LAPACK calls of several layers in one program deadlocked on two threads."""
    layer = S4Layer(width=8, l_max=20)
    compiled = jax.jit(lambda key: layer.init(key, jnp.zeros((8, 1, 20)), train=False)).lower(
        jax.random.key(0)
    )
    assert "lapack" not in compiled.compile().as_text().lower()


def test_basis_shorter_than_input_is_refused():
    u = jnp.zeros((4, 1, 20))
    layer = S4Layer(width=4, l_max=20)
    variables = layer.init(jax.random.key(0), u, train=False)
    basis = kernel_bases(variables["ssm"], length=10, l_max=20)
    with pytest.raises(ValueError, match="made for 10 tokens, the input has 20"):
        layer.apply({**variables, "basis": basis}, u, train=False)
