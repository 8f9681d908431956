"""What several test files share.

Eight virtual CPU devices are set up before JAX starts, so that every test sees the mesh that multi-device
code meets; a test that means one device says so with `Mesh(jax.devices()[:1], ...)`.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiled programs are kept between test runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "ecg_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# What commands keep, features and signatures of stores, goes with the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ecg_jax_tests_")

import numpy as np
import pytest

from ecg_jax import cpu

cpu.tune()  # as the commands do

# A fuller set of reference tensors with the same names can be tested by naming its folder here.
GOLDEN = Path(os.environ.get("ECG_JAX_GOLDEN", Path(__file__).parent / "golden"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def load_golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file of reference tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def group(arrays: dict, prefix: str) -> dict:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """The measure of the reference tensors: max |a - b| / max |b|."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)
    assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"


@pytest.fixture(scope="session")
def synthetic_store(tmp_path_factory):
    """A small store of synthetic recordings of several lengths, with patients, folds and labels."""
    from ecg_jax.data.synthetic import write_synthetic_store

    path = tmp_path_factory.mktemp("stores") / "synthetic"
    write_synthetic_store(path, n_records=96, seconds=6.0, seed=0)
    return path
