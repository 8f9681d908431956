"""Settings of the process that commands make before JAX starts: two for speed where a CPU computes, measured in
`tests/benchmarks/README.md`, which change results by rounding at most; and where compiled programs are kept.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from ecg_jax.files import cache_folder

_FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
#: Versions of jaxlib that were seen to know the flag: XLA ends a process that gives it an unknown one.
_FUSION_FLAG_KNOWN = ("0.10.2", "0.12.0.1")

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

#: The folder that `keep_compiled_programs` chose, None where the user chose or none is known.
own_cache: Path | None = None


def tune() -> None:
    """Where JAX can only use the CPU, keeps freed memory in the process, and XLA's sums out of its YNN library.

    Call it before JAX is imported.

    - A training step allocates gigabytes of activations anew. glibc maps every large block freshly and returns it
      when it is freed, so that each step pays for the page faults again. Kept, the process stays as large as it was
      at its largest.
    - Of what XLA hands to YNN by default only the matrix products gain; a sum over the first axis, as in a
      channel-first LayerNorm, takes four times as long. Left alone if XLA_FLAGS names the flag already.
    """
    accelerators = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    if os.environ.get("JAX_PLATFORMS", "" if accelerators else "cpu") != "cpu":
        return
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    from jaxlib.version import __version__ as jaxlib

    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib in _FUSION_FLAG_KNOWN and _FUSION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSION_FLAG}=LIBRARY_FUSION_TYPE_DOT".strip()


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs below $XDG_CACHE_HOME (~/.cache) for the next run, unless
    JAX_COMPILATION_CACHE_DIR names another folder or nobody's home is known. Call it before JAX is imported.

    Each kind of processor has a folder of its own: home directories are shared, and a program compiled for one may
    stop on another.
    """
    global own_cache
    folder = cache_folder()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not folder.is_absolute():
        return
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    kind = hashlib.sha256("".join([platform.machine(), *features[:1]]).encode()).hexdigest()[:12]
    own_cache = folder / kind
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(own_cache)
