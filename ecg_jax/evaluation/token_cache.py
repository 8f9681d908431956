"""Tokens of a frozen encoder for the crops that one fit needs, kept on disk while it lasts and memory-mapped.

    FOLDER/000000.npy     float16 or float32 [crops of the part, L, D]

The folder belongs to one fit (`FitFolder.scratch`), which is locked and deletes it when it is finished: never more is
on disk than the fits that go on may take. The next fit encodes again, about what one epoch without kept tokens costs.
Parts are there in full or not at all, so a fit that was killed goes on with the part it was at.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.files import replace_file

TYPES = ("float16", "float32")
#: Bytes of a part, about.
PART_BYTES = 1 << 27


class KeptTokens:
    """Tokens [n, L, D] in parts, memory-mapped."""

    def __init__(self, parts: list[np.ndarray], part_crops: int):
        """Takes parts of `part_crops` crops each, the last of which may have fewer."""
        self._parts, self._part_crops = parts, part_crops

    def __len__(self) -> int:
        """n."""
        return sum(len(part) for part in self._parts)

    def take(self, crops: np.ndarray) -> np.ndarray:
        """Tokens [b, L, D] of crops int [b], in any order."""
        out = np.empty((len(crops), *self._parts[0].shape[1:]), self._parts[0].dtype)
        part = crops // self._part_crops
        for number in np.unique(part):
            here = part == number
            out[here] = self._parts[number][crops[here] - number * self._part_crops]
        return out


def kept_tokens(
    folder: Path,
    encode: Callable[[int, int], np.ndarray],
    *,
    n_crops: int,
    shape: tuple[int, int],
    dtype: str,
    batch_size: int,
) -> KeptTokens:
    """The tokens of crops 0 .. n-1; parts that are not there are computed.

    Args:
        folder: of the parts, made if needed; it must hold nothing but parts of these tokens.
        encode: (first, last) -> float32 [last - first, L, D], tokens of crops first .. last - 1.
        n_crops: n.
        shape: (L, D).
        dtype: one of `TYPES`, to keep them in.
        batch_size: crops of each call.

    Raises:
        UserError: a token is not finite or too large for float16, or a part cannot be written or read.
    """
    crop_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    part_crops = max(1, PART_BYTES // (crop_bytes * batch_size)) * batch_size
    parts = []
    for number, first in enumerate(range(0, n_crops, part_crops)):
        path, last = folder / f"{number:06d}.npy", min(first + part_crops, n_crops)
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _write(path, _encoded(encode, first, last, dtype, batch_size))
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(
                f"cannot keep tokens in {path}: {error.strerror or error}; free some space, or choose another "
                "--workdir or a lower --config.frozen.token_cache_gb."
            ) from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it.") from error
        if part.shape != (last - first, *shape) or part.dtype != dtype:
            raise UserError(f"{path} is damaged: it has {part.dtype} {part.shape}; remove it.")
        parts.append(part)
    return KeptTokens(parts, part_crops)


def _encoded(encode, first: int, last: int, dtype: str, batch_size: int) -> np.ndarray:
    batches = []
    for begin in range(first, last, batch_size):
        tokens = encode(begin, min(begin + batch_size, last))
        if not np.isfinite(tokens).all():
            raise UserError(
                "The encoder gave tokens that are not finite; use an earlier step, before it diverged."
            )
        with np.errstate(over="ignore"):
            kept = tokens.astype(dtype)
        if not np.isfinite(kept).all():
            raise UserError(
                f"The encoder gave tokens up to {np.abs(tokens).max():.3g}, too large for {dtype}; use "
                "--config.frozen.token_dtype=float32, in another --workdir."
            )
        batches.append(kept)
    return np.concatenate(batches)


def _write(path: Path, tokens: np.ndarray) -> None:
    # Written, not mapped: a disk that is full then says so instead of ending the process.
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    replace_file(path, buffer.getbuffer(), path.with_name(f".{path.name}.tmp"))
