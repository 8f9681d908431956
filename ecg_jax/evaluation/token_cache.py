"""Tokens of a frozen encoder for the non-overlapping crops of some records, kept on disk and memory-mapped.

    FOLDER/tokens-<key>.npy     float16 or float32 [n_crops, L, D]

The key is a hash of encoder, contract, store, crops and type. A file is there in full or not at all; the folder may
be deleted when nothing uses it.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecg_jax.errors import UserError

TYPES = ("float16", "float32")


def cached_tokens(
    folder: Path,
    encode: Callable[[int, int], np.ndarray],
    *,
    key: str,
    starts: np.ndarray,
    shape: tuple[int, int],
    dtype: str,
    batch_size: int,
) -> np.ndarray:
    """The tokens of all crops, computed unless they are there.

    Args:
        folder: of the files, made if needed.
        encode: (first, last) -> float32 [last - first, L, D], tokens of crops first .. last - 1.
        key: of encoder, contract and store.
        starts: int64 [n], first sample of each crop.
        shape: (L, D).
        dtype: one of `TYPES`, to keep them in.
        batch_size: crops of each call.

    Returns:
        [n, L, D], memory-mapped.

    Raises:
        UserError: a token is not finite (or too large for float16), or the file cannot be written or read.
    """
    digest = hashlib.sha256(key.encode() + str(shape).encode() + np.asarray(starts, np.int64).tobytes())
    path = folder / f"tokens-{digest.hexdigest()[:32]}-{dtype}.npy"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, encode, (len(starts), *shape), dtype, batch_size)
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(
            f"cannot keep tokens in {path}: {error.strerror or error}; name another folder or lower "
            "token_cache_bytes."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it.") from error
    if tokens.shape != (len(starts), *shape):
        raise UserError(f"{path} is damaged: its tokens have shape {tokens.shape}; remove it.")
    return tokens


def _write(path: Path, encode, shape: tuple[int, int, int], dtype: str, batch_size: int) -> None:
    # Written, not mapped: a disk that is full then says so instead of ending the process.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    try:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, shape[0], batch_size):
                with np.errstate(over="ignore"):
                    tokens = encode(first, min(first + batch_size, shape[0])).astype(dtype)
                if not np.isfinite(tokens).all():
                    raise UserError(
                        f"The encoder gave tokens that are not finite or too large for {dtype}; use an earlier "
                        "step, before it diverged, or token_dtype=float32."
                    )
                file.write(tokens.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
