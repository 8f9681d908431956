import numpy as np
import pytest

from conftest import assert_close, load_golden
from ecg_jax.models import hippo


@pytest.mark.parametrize("N", [8, 64])
def test_dplr_matches_reference(N):
    golden = load_golden("hippo_init")
    order = np.argsort(-golden[f"N{N}/w"].imag)
    Lambda, P, B = hippo.dplr_hippo(N)
    assert_close(Lambda, golden[f"N{N}/w"][order], 1e-11, "Lambda")
    assert_close(np.abs(B), golden[f"N{N}/abs_B"][order], 1e-11, "|B|")
    assert_close(np.abs(P), golden[f"N{N}/abs_P"][order], 1e-11, "|P|")
    assert_close(B * P.conj(), golden[f"N{N}/B_conjP"][order], 1e-11, "B conj(P)")


def test_dplr_reconstructs_hippo_legs():
    A, B = hippo.hippo_legs(8)
    Lambda, P, B_hat = hippo.dplr_hippo(8)
    # The eigenvalues of the conjugate-completed DPLR matrix are those of the real HiPPO matrix: -1, ..., -8.
    Lambda2, P2 = np.r_[Lambda, Lambda.conj()], np.r_[P, P.conj()]
    eigenvalues = np.linalg.eigvals(np.diag(Lambda2) - np.outer(P2, P2.conj()))
    np.testing.assert_allclose(np.sort(eigenvalues.real), np.sort(np.diag(A)), rtol=1e-6)
    np.testing.assert_allclose(eigenvalues.imag, 0, atol=1e-6)
    np.testing.assert_allclose(2 * np.sum(np.abs(B_hat) ** 2), B @ B)  # V is unitary


def test_published_kernel_values():
    """Spec §11.3: dt = 0.01, C = conj(B), L = 300."""
    Lambda, P, B = (v[None] for v in hippo.dplr_hippo(8))
    log_dt = np.log([0.01])
    Ab, _ = hippo.discretise(Lambda, P, B, np.exp(log_dt))
    C = np.concatenate([B.conj(), B], axis=-1)[0]
    Ct = (C - np.linalg.matrix_power(Ab[0], 300).T @ C)[:4]
    phi = hippo.kernel_basis(Lambda, P, B, log_dt, l_max=300, length=300)[0]
    K = Ct.real @ phi[:4] + Ct.imag @ phi[4:]
    expected = [0.546664735, 0.3795682687, 0.2483551555, -0.0809652873, 0.0104541977, 0.0016391369]
    np.testing.assert_allclose(K[[0, 1, 2, 10, 100, 299]], expected, atol=1e-9)
    np.testing.assert_allclose(K.sum(), 1.0216217182, atol=1e-9)


@pytest.mark.parametrize("N", [1, 7])
def test_odd_state_size_is_refused(N):
    with pytest.raises(ValueError, match="must be even"):
        hippo.dplr_hippo(N)
