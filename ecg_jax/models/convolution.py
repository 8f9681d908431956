"""The convolution of an S4 layer by several exact algorithms, and the choice between them.

Everything here is channel first: u [H, B, L], one state space model for each of the H channels. With the real
basis of `hippo.kernel_basis` and its transition matrix A [N, N] (`hippo.transition`), a kernel is

    K[t] = c A^t b,    Phi[t] = A^t b,    c = [Re C, Im C],

and causally y_t = sum_j K[0]_j u_{t-j}; bidirectionally plus sum_j K[1]_j u_{t+1+j}, so that the anti-causal part
starts at the next token (spec §3.2).

- "fft": zero-padded transforms, any kernel, any length.
- "toeplitz": one matrix [L, L] for each channel, any kernel; quadratic, for short windows on matrix units.
- "chunked:Q": chunks of at most Q tokens. Inside a chunk a Toeplitz matrix [Q, Q]; from chunk to chunk the N states
  of each channel; everything is a matrix product, linear in L (the block form of Dao & Gu, arXiv 2405.21060, for a
  state matrix that does not depend on the input). It needs A to be fixed.

`choose` looks up which one was fastest on the device at hand, in a table that
`ecg-jax efficiency --tune-conv` measures.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import scipy.fft

#: Above so many states a chunk's state is about as large as the chunk, and the chunked form saves nothing.
MOST_CHUNKED_STATES = 16

#: Tokens in a chunk where nothing else is asked for.
CHUNK = 64

TABLE = Path(__file__).with_name("conv_table.json")


def fft_convolve(u: jax.Array, K: jax.Array) -> jax.Array:
    """Linear convolution over time by a zero-padded FFT, in float32 at least: there is no FFT of shorter floats.

    Args:
        u: [H, B, L].
        K: [c, H, L], c = 1 causal, c = 2 bidirectional.

    Returns:
        y [H, B, L].
    """
    L = u.shape[-1]
    n = scipy.fft.next_fast_len(2 * L, real=True)
    u = u.astype(K.dtype)
    kernel = jnp.pad(K[0], ((0, 0), (0, n - L)))
    if K.shape[0] == 2:
        # Lag -(1 + j) of a circular convolution of length n is index n - 1 - j.
        kernel += jnp.pad(K[1, :, ::-1], ((0, 0), (n - L, 0)))
    return jnp.fft.irfft(jnp.fft.rfft(u, n=n) * jnp.fft.rfft(kernel, n=n)[:, None], n=n)[..., :L]


def toeplitz_matrix(K: jax.Array, size: int) -> jax.Array:
    """T [H, Q, Q] with u @ T the convolution of Q tokens: T[s, t] = K[0][t - s], and K[1][s - t - 1] above t.

    Repeating the kernel in rows that are one sample too short shifts each row by one: no gather is needed.

    Args:
        K: [c, H, at least Q].
        size: Q.
    """
    H, Q = K.shape[1], size
    before = jnp.zeros((H, Q - 1), K.dtype) if K.shape[0] == 1 else K[1, :, : Q - 1][:, ::-1]
    lags = jnp.concatenate([before, K[0, :, :Q], jnp.zeros((H, 1), K.dtype)], axis=-1)  # lag -(Q-1) first
    rows = jnp.broadcast_to(lags[:, None], (H, Q, 2 * Q)).reshape(H, -1)[:, : Q * (2 * Q - 1)]
    return rows.reshape(H, Q, 2 * Q - 1)[..., Q - 1 :]


def toeplitz_convolve(u: jax.Array, K: jax.Array) -> jax.Array:
    """The convolution as one matrix product for each channel, in the type of u; shapes as `fft_convolve`."""
    return _product(u, toeplitz_matrix(K, u.shape[-1]))


def _product(tokens: jax.Array, matrix: jax.Array) -> jax.Array:
    """Tokens times a matrix, computed in the type of the tokens, returned in that of the matrix.

    The result is rounded to the type of the tokens first: otherwise the gradient would come back in the wide type,
    and the products of the backward pass would be wide ones.
    """
    return jnp.matmul(tokens, matrix.astype(tokens.dtype)).astype(matrix.dtype)


def chunked_convolve(u: jax.Array, C: jax.Array, basis: dict[str, jax.Array], *, chunk: int) -> jax.Array:
    """The convolution in chunks, for state matrices that are fixed.

    Products with tokens are taken in the type of u; states pass from chunk to chunk in that of C.

    Args:
        u: [H, B, L].
        C: real pairs [c, H, N/2, 2], length-corrected.
        basis: `phi` Phi [H, N, at least min(chunk, L)] and `powers` [P, H, N, N], A^(2^p), see `s4.kernel_bases`.
        chunk: most tokens in a chunk; the window is cut evenly.

    Returns:
        y [H, B, L] in the type of C.
    """
    H, B, L = u.shape
    N = basis["phi"].shape[1]
    count = -(-L // chunk)
    Q = -(-L // count)
    phi = basis["phi"][..., :Q]
    c = jnp.concatenate([C[..., 0], C[..., 1]], axis=-1)
    highest = {"precision": jax.lax.Precision.HIGHEST}
    K = jnp.einsum("chn,hnt->cht", c, phi, **highest)
    tokens = jnp.pad(u, ((0, 0), (0, 0), (0, count * Q - L))).reshape(H, B * count, Q)
    y = _product(tokens, toeplitz_matrix(K, Q))
    if count > 1:
        outputs = _outputs(c, basis["powers"], Q + 1)  # c A^t, [c, H, N, Q + 1]
        step = _power(basis["powers"], Q)
        leave = jnp.flip(
            phi, -1
        )  # sum_s A^(Q-1-s) b u_s: a chunk's own part of the state after its last token
        states = _entering(_product(tokens, leave.swapaxes(1, 2)).reshape(H, B, count, N), step)
        y += _product(states.reshape(H, B * count, N).astype(u.dtype), outputs[0, ..., 1:])
        if c.shape[0] == 2:
            # The same backwards in time: a chunk leaves sum_s A^s b u_s, and t tokens before its end reads c A^t.
            states = _product(tokens, phi.swapaxes(1, 2)).reshape(H, B, count, N)
            states = jnp.flip(_entering(jnp.flip(states, 2), step), 2)
            y += _product(states.reshape(H, B * count, N).astype(u.dtype), jnp.flip(outputs[1, ..., :Q], -1))
    return y.reshape(H, B, count * Q)[..., :L]


def _outputs(c: jax.Array, powers: jax.Array, length: int) -> jax.Array:
    """c A^t for t = 0 .. length - 1, [c, H, N, length], by doubling."""
    rows = c[..., None]
    p = 0
    while rows.shape[-1] < length:
        more = jnp.einsum("chnt,hnm->chmt", rows, powers[p], precision=jax.lax.Precision.HIGHEST)
        rows = jnp.concatenate([rows, more], axis=-1)
        p += 1
    return rows[..., :length]


def _power(powers: jax.Array, exponent: int) -> jax.Array:
    """A^exponent [H, N, N], exponent at least 1, as the product of the powers of two in it."""
    factors = [powers[p] for p in range(exponent.bit_length()) if exponent >> p & 1]
    return functools.reduce(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST), factors)


def _entering(left: jax.Array, step: jax.Array) -> jax.Array:
    """States X_i = sum_{j < i} (A^Q)^(i-1-j) S_j with which each chunk begins, in log2(chunks) products (the scan of
    Hillis & Steele, CACM 29(12), 1986).

    Args:
        left: S [H, B, chunks, N], what each chunk alone leaves behind.
        step: A^Q [H, N, N].
    """
    H, B, count, N = left.shape

    def later(x, chunks):
        return jnp.pad(x, ((0, 0), (0, 0), (chunks, 0), (0, 0)))[:, :, :count]

    states, reach = later(left, 1), 1
    highest = {"precision": jax.lax.Precision.HIGHEST}
    while reach < count - 1:
        moved = later(states, reach).reshape(H, B * count, N)
        states += jnp.matmul(moved, step.swapaxes(1, 2), **highest).reshape(states.shape)
        step, reach = jnp.matmul(step, step, **highest), 2 * reach
    return states


def n_powers(length: int) -> int:
    """How many powers A^(2^p) the chunked form of any chunk size needs for a window of `length` tokens."""
    return max(length.bit_length(), 1)


def parse(conv: str) -> tuple[str, int]:
    """Name and chunk of "auto", "fft", "toeplitz", "chunked" or "chunked:Q".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(auto|fft|toeplitz)|(chunked)(?::([1-9]\d{0,5}))?", conv)
    if not match:
        raise ValueError(
            f"model.conv={conv!r} is unknown; known: auto, fft, toeplitz, chunked, and chunked:Q for chunks of Q tokens"
        )
    return match[1] or match[2], int(match[3] or CHUNK)


def candidates(length: int, state: int) -> list[str]:
    """Algorithms worth timing for windows of `length` tokens and N = `state`."""
    names = ["fft"]
    if length <= 600:
        names.append("toeplitz")
    if state <= MOST_CHUNKED_STATES:
        names += [f"chunked:{chunk}" for chunk in (16, 32, 64, 128) if chunk < length]
    return names


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())["rows"]


def choose(
    conv: str,
    *,
    length: int,
    width: int,
    state: int,
    channels: int,
    dtype: Any,
    fixed: bool,
    device_kind: str | None = None,
) -> tuple[str, str]:
    """Which algorithm a layer uses, and why.

    Args:
        conv: "auto", or the name of an algorithm. Where "chunked" cannot be used it means "auto".
        length, width, state, channels: L, H, N, and 1 for causal or 2 for bidirectional.
        dtype: compute dtype.
        fixed: whether the state matrices are, as the chunked form needs.
        device_kind: as JAX names it; None: of the first device.

    Returns:
        A name that is not "auto", and a sentence's end that says where the choice comes from.

    Raises:
        ValueError: unknown name.
    """
    name, chunk = parse(conv)
    chunked = fixed and state <= MOST_CHUNKED_STATES
    if name == "chunked" and chunked:
        return f"chunked:{chunk}", "as model.conv says"
    if name in ("fft", "toeplitz"):
        return name, "as model.conv says"
    unfit = ""
    if name == "chunked":  # a head, or the pass that initialises a model and knows no basis yet
        unfit = f"chunks need fixed state matrices and at most {MOST_CHUNKED_STATES} states; "
    kind = device_kind or jax.devices()[0].device_kind
    rows = [
        row
        for row in _table()
        if row["device_kind"] == kind
        and row["dtype"] == jnp.dtype(dtype).name
        and row["channels"] == channels
        and (row["state"] <= MOST_CHUNKED_STATES) == (state <= MOST_CHUNKED_STATES)
    ]
    if not rows:
        quadratic = length <= (CHUNK if chunked else 4 * CHUNK)
        rest = f"chunked:{CHUNK}" if chunked else "fft"
        reason = f"nothing was measured for {kind} in {jnp.dtype(dtype).name}"
        return "toeplitz" if quadratic else rest, unfit + reason

    def distance(row):
        sizes = ((row["length"], length), (row["width"], width), (row["state"], state))
        return sum(abs(math.log(measured / asked)) for measured, asked in sizes)

    row = min(rows, key=distance)
    speeds = {name: speed for name, speed in row["relative"].items() if chunked or "chunked" not in name}
    # A quadratic form that wins at the nearest length measured may lose at a much greater one.
    if length > 1.5 * row["length"]:
        speeds.pop("toeplitz", None)
    best = max(speeds, key=speeds.get)
    at = f"{row['length']} tokens, width {row['width']}"
    return best, f"{unfit}{speeds[best]:.1f} times as fast as fft on {kind} at {at}"


def convolve(u: jax.Array, C: jax.Array, basis: dict[str, jax.Array], *, algorithm: str) -> jax.Array:
    """The convolution for fixed state matrices by the algorithm of that name.

    Args:
        u: [H, B, L].
        C: real pairs [c, H, N/2, 2], length-corrected.
        basis: `phi` [H, N, at least L] and, for the chunked form, `powers`; see `s4.kernel_bases`.
        algorithm: "fft", "toeplitz" or "chunked:Q".

    Returns:
        y [H, B, L] in the type of C.
    """
    name, chunk = parse(algorithm)
    if name == "chunked":
        return chunked_convolve(u, C, basis, chunk=chunk)
    return convolve_with(u, kernel_from_basis(C, basis["phi"][..., : u.shape[-1]]), algorithm=algorithm)


def convolve_with(u: jax.Array, K: jax.Array, *, algorithm: str) -> jax.Array:
    """The convolution of u [H, B, L] with kernels K [c, H, L] by "fft" or "toeplitz", in the type of K."""
    return {"fft": fft_convolve, "toeplitz": toeplitz_convolve}[algorithm](u, K)


def kernel_from_basis(C: jax.Array, basis: jax.Array) -> jax.Array:
    """S4 kernels for fixed A, B, P, dt: K[c, h] = sum_n [Re C, Im C][c, h, n] Phi[h, n].

    Args:
        C: real pairs [c, H, N/2, 2], length-corrected.
        basis: Phi [H, N, L] of `hippo.kernel_basis`.

    Returns:
        K [c, H, L].
    """
    coefficients = jnp.concatenate([C[..., 0], C[..., 1]], axis=-1)
    return jnp.einsum("chn,hnl->chl", coefficients, basis, precision=jax.lax.Precision.HIGHEST)
