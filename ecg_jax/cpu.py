"""Settings of the process that commands make before JAX starts: two for speed on a CPU, measured in
`tests/benchmarks/README.md`, which change nothing that is computed and which a GPU or TPU run does not feel; and where
compiled programs are kept.
"""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

_FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
#: Versions (major, minor) of jaxlib that were seen to know the flag: XLA ends a process that gives it an unknown one.
_FUSION_FLAG_KNOWN = ((0, 10), (0, 12))

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def tune() -> None:
    """Keeps freed memory in the process, and XLA's reductions out of its YNN library. Call it before JAX is imported.

    - A training step allocates gigabytes of activations anew. glibc maps every large block freshly and returns it
      when it is freed, so that each step pays for the page faults again.
    - Of what XLA hands to YNN by default only the matrix products gain; a sum over the first axis, as in a
      channel-first LayerNorm, takes four times as long. Left alone if XLA_FLAGS names the flag already.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    from jaxlib.version import __version_info__ as jaxlib

    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib[:2] in _FUSION_FLAG_KNOWN and _FUSION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSION_FLAG}=LIBRARY_FUSION_TYPE_DOT".strip()


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs below $XDG_CACHE_HOME (~/.cache) for the next run, unless
    JAX_COMPILATION_CACHE_DIR names another folder. Call it before JAX is imported.

    Each kind of processor has a folder of its own: home directories are shared, and a program compiled for one may
    stop on another.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cpu = Path("/proc/cpuinfo")
    features = (
        [line for line in cpu.read_text().splitlines() if line.startswith("flags")] if cpu.exists() else []
    )
    kind = hashlib.sha256("".join([platform.machine(), *features[:1]]).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "ecg_jax" / kind)
