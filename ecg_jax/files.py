"""Files that are there in full or not at all, and line-by-line logs."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from ecg_jax.errors import UserError


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/ecg_jax, by default ~/.cache/ecg_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ecg_jax"


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


def lock(file: IO, refusal: str) -> None:
    """Locks an open file for this process until it is closed.

    Raises:
        UserError: `refusal`; another process holds it. Or the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(refusal) from error
    except OSError as error:
        raise UserError(f"cannot lock {file.name}: {error.strerror}; use another file system") from error


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object in each line; a last line that a kill cut short is left out.

    Raises:
        UserError: the file cannot be read, or another line is no JSON object.
    """
    try:
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(whole, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path} line {number} is no JSON object; is it another program's file?")
        entries.append(entry)
    return entries
