"""Files that are there in full or not at all."""

import os
from pathlib import Path

from ecg_jax.errors import UserError


def replace_file(path: Path, data: bytes, temporary: Path) -> None:
    """Writes a file under a temporary name, through to the disk, then renames it.

    Raises:
        OSError: it could not be written; what was there before is untouched and the temporary file is gone.
    """
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is there in full or not at all.

    Raises:
        UserError: the disk is full, or the folder is missing or not writable.
    """
    try:
        replace_file(path, data, path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
