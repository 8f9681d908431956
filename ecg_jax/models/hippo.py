"""HiPPO-LegS state matrices and the S4 kernel basis, in numpy float64.

Everything here runs once, on the host, when a model is built or restored: JAX on accelerators has neither
complex128 nor a reliable complex eigen-decomposition, and float32 loses two digits.

Symbols follow Gu, Goel & Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv
2111.00396):

    Lambda [N/2]  eigenvalues of the normal part of A, one of each conjugate pair
    P, B   [N/2]  low-rank term and input vector in the eigenbasis
    C      [N/2]  output vector; "length-corrected" means (I - Ab^l_max)^T C
    dt            step size (one per channel);  Ab, Bb  the bilinear discretisation of A, B
"""

import numpy as np


def hippo_legs(N: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS matrix A [N, N] and input vector B [N] (arXiv 2111.00396, equation 2).

    A[n, k] = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) on the diagonal, 0 above it; B[n] = sqrt(2n+1).
    """
    q = np.sqrt(2.0 * np.arange(N) + 1.0)
    A = -np.tril(np.outer(q, q), -1) - np.diag(np.arange(N) + 1.0)
    return A, q


def dplr_hippo(N: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS in diagonal-plus-low-rank form.

    A + P P^T is normal (-1/2 I plus a skew-symmetric matrix), so it has a unitary eigenbasis V, and A = V
    (diag(Lambda) - P P*) V* (arXiv 2111.00396, section 3.2 and appendix C).

    Args:
        N: state size, even.

    Returns:
        Lambda, P, B: complex128 [N/2] each, the member with positive imaginary part of every conjugate pair,
            by descending
        imaginary part. Eigenvectors have an arbitrary phase: only |P|, |B| and B conj(P) are determined.

    Raises:
        ValueError: N is odd or smaller than 2.
    """
    if N < 2 or N % 2:
        raise ValueError(f"the state size must be even and at least 2, got {N}")
    A, B = hippo_legs(N)
    P = np.sqrt(np.arange(N) + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(N)
    imag, V = np.linalg.eigh(-1j * skew)  # -i * skew is Hermitian: real eigenvalues, unitary V
    keep = np.argsort(-imag)[: N // 2]
    Vh = V[:, keep].conj().T
    return -0.5 + 1j * imag[keep], Vh @ P, Vh @ B


def discretise(
    Lambda: np.ndarray, P: np.ndarray, B: np.ndarray, dt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear discretisation of the conjugate-completed DPLR system (arXiv 2111.00396, equation 3).

    Args:
        Lambda, P, B: complex [H, N/2].
        dt: step sizes [H].

    Returns:
        Ab complex128 [H, N, N] = (I - dt/2 A)^-1 (I + dt/2 A) and Bb complex128 [H, N] = dt (I - dt/2 A)^-1
        B, where states N/2..N-1 are the conjugates of states 0..N/2-1.
    """
    Lambda, P, B = (np.concatenate([v, v.conj()], axis=-1) for v in (Lambda, P, B))
    N = Lambda.shape[-1]
    A = Lambda[:, :, None] * np.eye(N) - P[:, :, None] * P[:, None, :].conj()
    half = 0.5 * dt[:, None, None] * A
    eye = np.eye(N)
    Ab = np.linalg.solve(eye - half, eye + half)
    Bb = np.linalg.solve(eye - half, (dt[:, None] * B)[..., None])[..., 0]
    return Ab, Bb


def kernel_basis(
    Lambda: np.ndarray, P: np.ndarray, B: np.ndarray, log_dt: np.ndarray, *, l_max: int, length: int
) -> np.ndarray:
    """Real basis Phi in which the S4 kernel is linear in the length-corrected C, for any window length.

    With A, B, P, dt fixed, K[t] = C Ab^t Bb is linear in C. For C stored length-corrected for `l_max`, Ct =
    (I - Ab^l_max)^T C,

        K[t] = Ct^T (I - Ab^l_max)^-1 Ab^t Bb = sum_n Re(Ct_n) Phi[n, t] + Im(Ct_n) Phi[N/2 + n, t]

    because the states come in conjugate pairs. Exact for every `length`, shorter, equal to or longer than
    `l_max`, odd or even.

    Args:
        Lambda, P, B: complex [H, N/2].
        log_dt: natural logarithm of the step size [H].
        l_max: the length for which C was corrected.
        length: number of kernel samples L.

    Returns:
        Phi float64 [H, N, L].
    """
    Ab, v = discretise(
        *(np.asarray(a, np.complex128) for a in (Lambda, P, B)), np.exp(np.asarray(log_dt, float))
    )
    half = v.shape[-1] // 2
    eye = np.eye(2 * half)
    v = np.linalg.solve(eye - np.linalg.matrix_power(Ab, l_max), v[..., None])  # [H, N, 1]
    # Doubling: the next t samples are Ab^t times the first t, so log2(length) matmuls make them all.
    power = Ab
    while v.shape[-1] < length:
        v = np.concatenate([v, power @ v], axis=-1)
        power = power @ power
    v = v[:, :half, :length]
    return np.concatenate([2 * v.real, -2 * v.imag], axis=1)


def transition(Lambda: np.ndarray, P: np.ndarray, B: np.ndarray, log_dt: np.ndarray) -> np.ndarray:
    """The transition matrix A of the real basis of `kernel_basis`: Phi[t + 1] = A Phi[t].

    A state x and its conjugate become the real pair (2 Re x, -2 Im x), so Ab = [[M, W], [conj W, conj M]] becomes
    [[Re(M + W), Im(M - W)], [-Im(M + W), Re(M - W)]].

    Args:
        Lambda, P, B, log_dt: as in `kernel_basis`.

    Returns:
        A float64 [H, N, N].
    """
    Ab, _ = discretise(
        *(np.asarray(a, np.complex128) for a in (Lambda, P, B)), np.exp(np.asarray(log_dt, float))
    )
    half = Ab.shape[-1] // 2
    plus, minus = Ab[:, :half, :half] + Ab[:, :half, half:], Ab[:, :half, :half] - Ab[:, :half, half:]
    return np.block([[plus.real, minus.imag], [-plus.imag, minus.real]])
