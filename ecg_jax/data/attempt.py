"""The folder of a store while `prepare` works in it: whose it is, and that only one process writes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from ecg_jax.data.store import PARTIAL, read_attributes
from ecg_jax.data.writer import write_in_store
from ecg_jax.errors import UserError


def refuse_another_job(store: Path, settings: dict) -> None:
    """Refuses a folder that is, complete or not, of another job, or not of `prepare` at all.

    Raises:
      UserError: names what differs.
    """
    plan = store / PARTIAL / "plan.json"
    if (store / "zarr.json").exists():
        check_same_job(store, read_attributes(store), settings)
    elif plan.exists():
        check_same_job(store, _read_plan(store, plan), settings)
    else:
        _refuse_foreign_files(store)


def check_same_job(store: Path, found: dict, settings: dict) -> None:
    """Refuses to touch a store that was made from something else.

    Raises:
      UserError: names what differs.
    """
    for key, wanted in settings.items():
        if key not in found or found[key] != wanted:
            what = "the list of recordings" if key == "source_digest" else key.replace("_", " ")
            values = "" if key == "source_digest" else f" ({found.get(key)!r} there, {wanted!r} now)"
            raise UserError(
                f"{store} holds a store of another job: {what} differs{values}; give another STORE or remove "
                "it first."
            )


def _refuse_foreign_files(store: Path) -> None:
    # problems.jsonl alone is what an attempt leaves that could not read any recording.
    others = {path.name for path in store.iterdir()} - {"problems.jsonl"} if store.is_dir() else set()
    if others and PARTIAL not in others:
        raise UserError(f"STORE {store} is not empty and not a store; choose another folder.")


@contextlib.contextmanager
def partial_folder(store: Path, settings: dict) -> Iterator[None]:
    """The folder of unfinished work, locked against a second writer and marked with what it is for.

    Args:
      store: folder of the store.
      settings: what makes a store this store.

    Raises:
      UserError: another process works there, or it holds work on another job or something else.
    """
    _refuse_foreign_files(store)
    partial = store / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another `ecg-jax prepare` is writing {store} now.") from None
        for leftover in partial.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        plan = partial / "plan.json"
        if plan.exists():
            check_same_job(store, _read_plan(store, plan), settings)
        else:
            write_in_store(store, plan, json.dumps(settings, indent=1).encode())
        yield


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
