"""Files that are there in full or not at all, and line-by-line logs."""

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

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


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def lock(file: IO, refusal: str, *, wait_s: float = 0.0) -> None:
    """Locks an open file for this process until it is closed.

    Args:
        file: with `wait_s` opened as "a+", since it then holds the name of its holder.
        refusal: what is said when another process holds it.
        wait_s: seconds to wait for a holder on another host, which is named on stderr. File systems keep the locks of
            a host that vanished for minutes; those of a process of this host end with it, and are not waited for.

    Raises:
        UserError: `refusal`; another process holds it. Or the file system has no locks.
    """
    until = time.monotonic() + wait_s
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if not wait_s:
                raise UserError(refusal) from error
            holder, _, kernel = os.pread(file.fileno(), 4096, 0).decode(errors="replace").partition("\n")
            holder = holder or "an unknown process"
            if kernel.strip() == _kernel() or time.monotonic() > until:
                raise UserError(f"{refusal} (held by {holder})") from error
            if not told:
                print(
                    f"waiting up to {wait_s:g} s for {file.name}, held by {holder}",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(1.0)
        except OSError as error:
            raise UserError(f"cannot lock {file.name}: {error.strerror}; use another file system") from error
    if wait_s:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n{_kernel()}\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {file.name}: {error.strerror}") from error


def _kernel() -> str:
    """What tells hosts apart whose pods or containers have one name, and processes alike that have one kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


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
