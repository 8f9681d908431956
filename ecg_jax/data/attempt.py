"""The folder of a store while `prepare` works in it: whose it is, and who works there.

    STORE/.partial/plan.json         what the store is made from; whoever comes first writes it, all others compare
    STORE/.partial/lock              shared by the shards that run, alone for a call that finishes the store
    STORE/.partial/listing.*         what a shard has listed for the others, see `data.kept_listing`
    STORE/.partial/shard-i-of-n/     what shard i of n is writing now, with a lock of its own

The locks keep people from doing work twice. Nothing that ends up in a store depends on them, for there are
network drives on which they do not reach other hosts: units are renamed into place, whoever writes one
writes the same bytes, and before a store is finished the folders of its shards are taken away, so that one
nobody knows of can put nothing into it any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ecg_jax.data.corpora.listing import Listing
from ecg_jax.data.progress import count_text
from ecg_jax.data.shard import WHOLE, Shard
from ecg_jax.data.store import PARTIAL, read_attributes
from ecg_jax.data.unit_files import new_file, temporary_path
from ecg_jax.errors import UserError

# A file nobody has written to for so long is a leftover, even of another host: a unit takes minutes.
LEFTOVER_S = 3600

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def outline(listing: Listing, units: list[range]) -> dict:
    """What tells how two lists of recordings differ: how many there are, and the first one of every unit."""
    return {
        "recordings": len(listing.entries),
        "refused": len(listing.problems),
        "first_of_units": [next(iter(listing.entries[u.start : u.start + 1])).record_id for u in units],
    }


def refuse_another_job(store: Path, settings: dict, listed: dict | None = None) -> None:
    """Refuses a folder that is, complete or not, of another job, or not of `prepare` at all.

    Args:
      store: the folder.
      settings: what makes a store this store.
      listed: `outline` of its recordings, where they are listed already.

    Raises:
      UserError: names what differs.
    """
    plan = store / PARTIAL / "plan.json"
    if (store / "zarr.json").exists():
        check_same_job(store, read_attributes(store), settings)
    elif plan.exists():
        check_same_job(store, _read_plan(store, plan), settings, listed)
    else:
        _refuse_foreign_files(store)


def planned_digest(store: Path) -> str | None:
    """Digest of the recordings that the store was begun with; None where none has been begun.

    Raises:
      UserError: the plan is damaged.
    """
    plan = store / PARTIAL / "plan.json"
    return _read_plan(store, plan)["source_digest"] if plan.exists() else None


def check_same_job(store: Path, found: dict, settings: dict, listed: dict | None = None) -> None:
    """Refuses to touch a store that was made from something else.

    Args:
      store: its folder.
      found: what it was made from.
      settings: what it would be made from now.
      listed: `outline` of the recordings there are now, to tell how they differ.

    Raises:
      UserError: names what differs.
    """
    for key, wanted in settings.items():
        if key not in found or found[key] != wanted:
            what = "the list of recordings" if key == "source_digest" else key.replace("_", " ")
            values = f" ({found.get(key)!r} there, {wanted!r} now)"
            if key == "source_digest":
                values = _difference(found["listing"], listed) if listed and "listing" in found else ""
            raise UserError(
                f"{store} holds a store of another job: {what} differs{values}; give another STORE or remove "
                "it first."
            )


def _difference(found: dict, now: dict) -> str:
    """In words, where the recordings listed when a store was begun and those listed now part."""
    if found["recordings"] != now["recordings"]:
        counts = f"{count_text(found['recordings'])} there, {count_text(now['recordings'])} now"
    else:
        counts = f"{count_text(now['recordings'])} both times"
    pairs = list(zip(found["first_of_units"], now["first_of_units"], strict=False))
    unit = next((unit for unit, (old, new) in enumerate(pairs) if old != new), len(pairs))
    if unit == 0:
        return f" ({counts}; the first is {pairs[0][0]} there and {pairs[0][1]} now)"
    if unit < len(pairs) or found["recordings"] != now["recordings"]:
        return (
            f" ({counts}; they part somewhere after {pairs[unit - 1][0]}; does every host see all of SOURCE?)"
        )
    return f" ({counts}; so labels, folds or patients in the tables of SOURCE may have changed)"


def _refuse_foreign_files(store: Path) -> None:
    # problems.jsonl alone is what an attempt leaves that could not read any recording.
    others = {path.name for path in store.iterdir()} - {"problems.jsonl"} if store.is_dir() else set()
    if others and PARTIAL not in others:
        raise UserError(f"STORE {store} is not empty and not a store; choose another folder.")


@contextlib.contextmanager
def whole_store(store: Path, settings: dict, listed: dict) -> Iterator[bool]:
    """The folder of unfinished work for a call that finishes the store: no other one, and no shard, works there.

    Args:
      store: folder of the store.
      settings: what makes a store this store.
      listed: `outline` of its recordings.

    Yields:
      whether the store still is to be made: False when another process has just finished it.

    Raises:
      UserError: another process works there, or it holds work on another job or something else.
    """
    entered = False
    try:
        with _partial_folder(store, settings, listed, None) as unfinished:
            entered = True
            yield unfinished
    finally:
        if entered and ((store / "zarr.json").exists() or not (store / PARTIAL / "plan.json").exists()):
            # `finalise` has emptied it, but a network drive keeps files that are still open, as the lock was.
            shutil.rmtree(store / PARTIAL, ignore_errors=True)


@contextlib.contextmanager
def one_shard(store: Path, settings: dict, listed: dict, shard: Shard) -> Iterator[Path | None]:
    """The folder of one shard; other shards may work in theirs.

    Yields:
      the folder for what it writes; None when another process has just finished the store.

    Raises:
      UserError: the same shard or one of another number of shards works, or a call that finishes the store, or it
        holds work on another job.
    """
    with _partial_folder(store, settings, listed, shard) as unfinished:
        if not unfinished:
            yield None
            return
        for other in _running(store):
            if other.count != shard.count:
                raise UserError(
                    f"Shard {other} of {store} is running ({_holder(store, other)}), and shards of two numbers do "
                    f"the same units twice; use --shard=i/{other.count}, or wait until it ends."
                )
        with shard_folder(store, shard) as folder:
            yield folder


@contextlib.contextmanager
def shard_folder(store: Path, shard: Shard) -> Iterator[Path]:
    """The folder with what a shard is writing, locked against a second process of the same shard.

    Raises:
      UserError: there is one.
    """
    folder = store / PARTIAL / shard.folder
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "a+") as lock:
        held = _lock(lock, fcntl.LOCK_EX)
        if held is False:
            raise UserError(
                f"Shard {shard} of {store} is running already ({_holder(store, shard)}); wait until it ends."
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _remove_leftovers(folder, lock, bool(held))
        yield folder


def last_count(store: Path) -> int:
    """How many shards there were when one was last started; 1 if a call without --shard was the last, or none."""
    started = {}
    for shard in _shards_seen(store):
        # Another process may just have finished the store.
        with contextlib.suppress(FileNotFoundError):
            started[shard] = (store / PARTIAL / shard.folder / "lock").stat().st_mtime
    return max(started, key=started.__getitem__).count if started else WHOLE.count


@contextlib.contextmanager
def _partial_folder(store: Path, settings: dict, listed: dict, shard: Shard | None) -> Iterator[bool]:
    _refuse_foreign_files(store)
    partial = store / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "a+") as lock:
        held = _lock(lock, fcntl.LOCK_SH if shard else fcntl.LOCK_EX)
        if held is False:
            running = [other for other in _running(store) if other != WHOLE]
            if running:
                named = ", ".join(f"shard {other} ({_holder(store, other)})" for other in running[:4])
                raise UserError(
                    f"{store} is being written by {named}{' and others' if len(running) > 4 else ''}; wait until "
                    "all shards have ended."
                )
            raise UserError(f"Another `ecg-jax prepare` is writing {store} now; wait until it ends.")
        if (store / "zarr.json").exists():
            check_same_job(store, read_attributes(store), settings)
            yield False
            return
        if shard is None:
            _remove_leftovers(partial, lock, bool(held))
        plan = partial / "plan.json"
        if not plan.exists():
            _write_once(plan, json.dumps({**settings, "listing": listed}, indent=1).encode())
        check_same_job(store, _read_plan(store, plan), settings, listed)
        yield True


def _write_once(plan: Path, data: bytes) -> None:
    """Writes a file unless another process has just written it."""
    with new_file(temporary_path(plan.parent, plan.name)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, plan)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), open(plan, "xb") as direct:
                direct.write(data)


def _read_plan(store: Path, plan: Path) -> dict:
    try:
        found = json.loads(plan.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{plan} is damaged, so nobody knows which job {store} was begun for; remove {store} and run the same "
            "command again."
        )
    return found


def _lock(file: IO, how: int, attempts: int = 10) -> bool | None:
    """Locks an open file until it is closed: True; False where another process holds it, None where nothing can be
    locked, which it tells.
    """
    for attempt in range(attempts):
        # `_running` holds the lock of a shard for an instant, which is no reason to refuse it.
        if attempt:
            time.sleep(0.05)
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{file.name} cannot be locked ({error.strerror}): start no shard twice, for nothing would notice "
                "that its work is done twice.",
                file=sys.stderr,
            )
            return None
    return False


def _remove_leftovers(folder: Path, lock: IO, held: bool) -> None:
    """Removes what killed processes were writing.

    Args:
      folder: where they were.
      lock: an open file there.
      held: whether its lock says that no process of this host writes there. For other hosts only the age of a file
        can tell.
    """
    os.utime(lock.fileno())  # the drive's clock, and not this host's
    now = os.fstat(lock.fileno()).st_mtime
    for leftover in folder.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if (held and f".{socket.gethostname()}." in leftover.name) or (
                leftover.stat().st_mtime < now - LEFTOVER_S
            ):
                leftover.unlink()


def _shards_seen(store: Path) -> list[Shard]:
    """Those that have a folder, in order."""
    try:
        names = os.listdir(store / PARTIAL)
    except FileNotFoundError:
        return []
    return sorted(shard for name in names if (shard := Shard.from_folder(name)) is not None)


def _running(store: Path) -> list[Shard]:
    """The shards whose lock another process holds, as far as locks tell."""
    running = []
    for shard in _shards_seen(store):
        with contextlib.suppress(FileNotFoundError), open(store / PARTIAL / shard.folder / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                running.append(shard)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
    return running


def _holder(store: Path, shard: Shard) -> str:
    """Who took the lock of a shard."""
    with contextlib.suppress(OSError):
        return (store / PARTIAL / shard.folder / "lock").read_text() or "just started"
    return "just ended"
