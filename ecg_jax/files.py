"""Files that are there in full or not at all."""

import os
from pathlib import Path

from ecg_jax.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames it.

    Raises:
        UserError: the disk is full, or the folder is missing or not writable; a file that was there before is
            untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
