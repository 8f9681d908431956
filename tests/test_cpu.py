import os
import subprocess
import sys

import pytest

from ecg_jax import cpu

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.fixture
def environment(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu, "own_cache", None)
    return monkeypatch


def test_compiled_programs_are_kept_below_the_users_cache(environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cpu.own_cache)
    assert cpu.own_cache.parent == tmp_path / "ecg_jax"


def test_a_folder_that_the_user_names_stays(environment, tmp_path):
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    cpu.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert cpu.own_cache is None


def test_without_a_home_nothing_is_kept(environment):
    environment.setattr(os.path, "expanduser", lambda path: path)
    cpu.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert cpu.own_cache is None


def test_flag_is_for_cpus_and_versions_that_know_it(environment):
    environment.setattr(cpu, "_FUSION_FLAG_KNOWN", ())
    environment.setenv("JAX_PLATFORMS", "cpu")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ
    from jaxlib.version import __version__

    environment.setattr(cpu, "_FUSION_FLAG_KNOWN", (__version__,))
    environment.setenv("JAX_PLATFORMS", "cuda")
    cpu.tune()
    assert "XLA_FLAGS" not in os.environ
    environment.setenv("JAX_PLATFORMS", "cpu")
    environment.setenv("XLA_FLAGS", "--xla_dump_to=x")
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {FLAG}=LIBRARY_FUSION_TYPE_DOT"
    environment.setenv("XLA_FLAGS", f"{FLAG}=")
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == f"{FLAG}="


def test_jax_starts_after_it():
    """An unknown flag would end the process."""
    code = "from ecg_jax import cpu; cpu.tune(); import jax; print(jax.jit(lambda x: x + 1)(1))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
