"""S4: kernel, convolution, layer and backbone (spec §3; Gu, Goel & Ré, arXiv 2111.00396).

Complex parameters are stored as real pairs in a trailing axis of length 2. The state matrices live in the
`ssm` collection, which no optimiser touches, unless `trainable_ssm=True` makes them parameters. While they
are fixed a kernel is linear in C, so the `basis` collection, derived once on the host by `kernel_bases`,
replaces the Cauchy sums of every step.

Layers are channel first, u [H, B, L]: the convolution is then a product or a transform of contiguous rows, and the
linear maps are products from the left, so nothing is transposed between layers.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models import convolution, hippo
from ecg_jax.models.layers import ChannelDense, Dropout, gelu, layer_norm, remat, uniform_bias

DT_MIN, DT_MAX = 1e-3, 1e-1


def as_complex(pairs: jax.Array) -> jax.Array:
    """Real pairs [..., 2] to complex [...]."""
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])


def as_pairs(z) -> jax.Array:
    """Complex [...] to real pairs [..., 2]."""
    return jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1)


def _discretised_A(Lambda: jax.Array, P: jax.Array, dt: jax.Array) -> jax.Array:
    """Ab [H, N, N] of the conjugate-completed states, see `hippo.discretise`.

    Ab = (I - g A)^-1 (I + g A) = 2 (I - g A)^-1 - I with g = dt / 2, and I - g A is diagonal plus rank one, so
    that Sherman-Morrison inverts it (arXiv 2111.00396, appendix C.2). No linear solver is called: several
    batched ones inside one program can block each other for ever on a CPU with few threads.
    """
    Lambda, P = (jnp.concatenate([v, v.conj()], axis=-1) for v in (Lambda, P))
    eye, g = jnp.eye(Lambda.shape[-1]), 0.5 * dt[:, None]
    D = 1.0 / (1.0 - g * Lambda)
    scale = g / (1.0 + g * jnp.sum(P.conj() * D * P, axis=-1, keepdims=True))
    inverse = D[:, :, None] * eye - (scale * D * P)[:, :, None] * (D * P.conj())[:, None, :]
    return 2.0 * inverse - eye


def _apply_transposed(M: jax.Array, C: jax.Array) -> jax.Array:
    """M^T C over conjugate-completed states: M [H, N, N], C complex [c, H, N/2] -> [c, H, N/2]."""
    full = jnp.concatenate([C, C.conj()], axis=-1)
    product = jnp.einsum("hnm,chn->chm", M, full, precision=jax.lax.Precision.HIGHEST)
    return product[..., : C.shape[-1]]


def _power(M: jax.Array, exponent: int) -> jax.Array:
    """Matrix power by repeated squaring at full precision."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(M, exponent)


def kernel_dplr(
    C: jax.Array, Lambda: jax.Array, P: jax.Array, B: jax.Array, log_dt: jax.Array, *, l_max: int, length: int
) -> jax.Array:
    """S4 kernels by the truncated generating function at the roots of unity (arXiv 2111.00396, algorithm 1;
    spec §3.2).

    Differentiable in every argument. The generating function of length l_max is evaluated through Cauchy sums
    and the Woodbury identity with Q = conj(P); at the Nyquist node its limit is used. Longer windows double
    the internal length, exactly.

    Args:
        C: complex [c, H, N/2], length-corrected for `l_max`.
        Lambda, P, B: complex [H, N/2].
        log_dt: [H].
        l_max: the length for which C was corrected.
        length: number of kernel samples wanted, any.

    Returns:
        K real [c, H, length].
    """
    dt = jnp.exp(log_dt)
    L = l_max
    while length > L:
        # (I - Ab^2L)^T C = (I + Ab^L)^T (I - Ab^L)^T C
        C = C + _apply_transposed(_power(_discretised_A(Lambda, P, dt), L), C)
        L *= 2
    k = np.arange((L + 1) // 2)  # the Nyquist node of an even L is added below
    omega = np.exp(-2j * np.pi * k / L)
    complex_dtype = C.dtype
    z = jnp.asarray(2.0 * (1.0 - omega) / (1.0 + omega), complex_dtype)
    scale = jnp.asarray(2.0 / (1.0 + omega), complex_dtype)

    dtL = dt[:, None] * Lambda
    pole, conj_pole = (1.0 / (z - p[..., None]) for p in (dtL, dtL.conj()))  # [H, N/2, K]

    def cauchy(v):  # R_v(z) = dt sum_n [v_n / (z - dt Lambda_n) + conj(v_n) / (z - conj(dt Lambda_n))]
        highest = jax.lax.Precision.HIGHEST
        total = jnp.einsum("...hn,hnk->...hk", v, pole, precision=highest)
        total += jnp.einsum("...hn,hnk->...hk", v.conj(), conj_pole, precision=highest)
        return dt[:, None] * total

    Q = P.conj()
    spectrum = scale * (cauchy(B * C) - cauchy(B * Q) * cauchy(P * C) / (1.0 + cauchy(P * Q)))
    if L % 2 == 0:
        nyquist = (dt[:, None] * B * C).real.sum(-1, keepdims=True)
        spectrum = jnp.concatenate([spectrum, nyquist.astype(complex_dtype)], axis=-1)
    return jnp.fft.irfft(spectrum, n=L)[..., :length]


def kernel_bases(ssm: Mapping[str, Any], *, length: int, l_max: int) -> dict[str, Any]:
    """The `basis` collection that belongs to an `ssm` collection.

    Args:
        ssm: nested dict; a dict with the key "log_dt" holds one layer's `Lambda, P, B` [H, N/2, 2] and
            `log_dt` [H].
        length: tokens of the windows that will be fed.
        l_max: the length for which C was corrected when the model was built.

    Returns:
        The same nesting with {"phi": float32 [H, N, length]} for each layer, and unless N exceeds
        `convolution.MOST_CHUNKED_STATES` `powers` float32 [P, H, N, N], A^(2^p) for the chunked convolution.
    """
    if "log_dt" not in ssm:
        return {name: kernel_bases(child, length=length, l_max=l_max) for name, child in ssm.items()}
    pairs = {name: np.asarray(ssm[name], np.float64) for name in ("Lambda", "P", "B", "log_dt")}
    Lambda, P, B = (pairs[name][..., 0] + 1j * pairs[name][..., 1] for name in ("Lambda", "P", "B"))
    phi = hippo.kernel_basis(Lambda, P, B, pairs["log_dt"], l_max=l_max, length=length)
    basis = {"phi": phi.astype(np.float32)}
    if phi.shape[1] <= convolution.MOST_CHUNKED_STATES:
        powers = [hippo.transition(Lambda, P, B, pairs["log_dt"])]
        for _ in range(1, convolution.n_powers(length)):
            powers.append(powers[-1] @ powers[-1])
        basis["powers"] = np.stack(powers).astype(np.float32)
    return basis


class S4Layer(nn.Module):
    """One S4 layer: convolution, skip, exact GELU, dropout, GLU (spec §3.2).

    Trainable: C [c, H, N/2, 2], D [H] and the output linear; A, B, P, dt are fixed (collection `ssm`) unless
    `trainable_ssm`.

    Attributes:
        width: H, one state space model per channel.
        state: N, states per channel (even).
        l_max: tokens for which C is length-corrected; other window lengths are exact as well.
        bidirectional: adds a second, anti-causal kernel.
        trainable_ssm: makes Lambda, P, B and log_dt parameters.
        dropout, tie_dropout: after the GELU; tied means one mask for all tokens.
        conv: algorithm of the convolution, see `convolution.choose`.
        dtype: compute dtype of products with tokens; kernel, states and the convolution's result are float32.
    """

    width: int
    state: int = 8
    l_max: int = 300
    bidirectional: bool = False
    trainable_ssm: bool = False
    dropout: float = 0.2
    tie_dropout: bool = True
    conv: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, u: jax.Array, record_index: jax.Array | None = None, *, train: bool) -> jax.Array:
        """Maps tokens u [H, B, L] to [H, B, L]."""
        H, L = self.width, u.shape[-1]
        matrices = dict(zip(("Lambda", "P", "B"), hippo.dplr_hippo(self.state), strict=True))

        def state_matrix(name, init_fn):
            if self.trainable_ssm:
                return self.param(name, lambda key: init_fn(key))
            return self.variable("ssm", name, lambda: init_fn(self.make_rng("params"))).value

        def per_channel(value):
            pairs = np.stack([value.real, value.imag], axis=-1).astype(np.float32)
            return lambda key: jnp.tile(pairs, (H, 1, 1))

        def log_uniform(key):
            return jax.random.uniform(key, (H,), minval=np.log(DT_MIN), maxval=np.log(DT_MAX))

        log_dt = state_matrix("log_dt", log_uniform)
        Lambda, P, B = (
            as_complex(state_matrix(name, per_channel(value))) for name, value in matrices.items()
        )

        def length_corrected(key):
            real_imag = jax.random.normal(key, (1 + self.bidirectional, H, self.state // 2, 2)) * 0.5**0.5
            C = as_complex(real_imag)
            Ab = _discretised_A(Lambda, P, jnp.exp(log_dt))
            return as_pairs(C - _apply_transposed(_power(Ab, self.l_max), C))

        C = self.param("C", length_corrected)
        D = self.param("D", nn.initializers.normal(1.0), (H,))

        basis = {
            name: self.get_variable("basis", name)
            for name in ("phi", "powers")
            if self.has_variable("basis", name)
        }
        algorithm, _ = convolution.choose(
            self.conv,
            length=L,
            width=H,
            state=self.state,
            channels=1 + self.bidirectional,
            dtype=self.dtype,
            fixed="powers" in basis,
        )
        u = u.astype(self.dtype)
        if basis:
            if basis["phi"].shape[-1] < L:
                raise ValueError(
                    f"the kernel basis was made for {basis['phi'].shape[-1]} tokens, the input has {L}"
                )
            y = convolution.convolve(u, C, basis, algorithm=algorithm)
        else:
            K = kernel_dplr(as_complex(C), Lambda, P, B, log_dt, l_max=self.l_max, length=L)
            y = convolution.convolve_with(u, K, algorithm=algorithm)
        y = gelu((y + D[:, None, None] * u).astype(self.dtype))
        y = Dropout(self.dropout, tied=self.tie_dropout, channel_first=True)(y, record_index, train=train)
        y = ChannelDense(2 * H, bias_init=uniform_bias(H), dtype=self.dtype, name="output")(y)
        value, gate = jnp.split(y, 2, axis=0)
        return value * nn.sigmoid(gate)


class S4Backbone(nn.Module):
    """A stack of post-norm S4 blocks: x <- LayerNorm(x + Dropout(S4(x))) (spec §3.1).

    At the defaults 2 123 776 trainable parameters causal, 2 140 160 bidirectional.

    Attributes: as `S4Layer`; `layers`, the number of blocks; `remat`, see `layers.remat`.
    """

    width: int = 512
    state: int = 8
    layers: int = 4
    l_max: int = 300
    bidirectional: bool = False
    trainable_ssm: bool = False
    dropout: float = 0.2
    conv: str = "auto"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, record_index: jax.Array | None = None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps tokens x [B, L, D] to tokens [B, L, D] and a dict of intermediates.

        The intermediates are `layer{i}`, the output of S4 layer i before residual and norm, and `block{i}`,
        after both.
        """
        x, out = jnp.transpose(x, (2, 0, 1)), {}  # [D, B, L]
        for i in range(self.layers):

            def block(module, x, i=i):
                return module.block(i, x, record_index, train)

            x, z = remat(block, self.remat)(self, x)
            out[f"layer{i}"], out[f"block{i}"] = (jnp.transpose(v, (1, 2, 0)) for v in (z, x))
        return jnp.transpose(x, (1, 2, 0)), out

    def block(
        self, i: int, x: jax.Array, record_index: jax.Array | None, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Block i: x [D, B, L] to its output and that of its S4 layer, both [D, B, L]."""
        z = S4Layer(
            width=self.width,
            state=self.state,
            l_max=self.l_max,
            bidirectional=self.bidirectional,
            trainable_ssm=self.trainable_ssm,
            dropout=self.dropout,
            conv=self.conv,
            dtype=self.dtype,
            name=f"layer{i}",
        )(x, record_index, train=train)
        dropped = Dropout(self.dropout, channel_first=True)(z, record_index, train=train)
        norm = layer_norm(f"norm{i}", channel_first=True)
        return norm(x.astype(jnp.float32) + dropped.astype(jnp.float32)).astype(self.dtype), z
