"""The list of recordings for the shards of a store: the first of them makes it, the others read what it left.

    STORE/.partial/listing.arrow     entries of a corpus of millions (`EntryTable`) and what else is listed
    STORE/.partial/listing.lock      held by the shard that lists; the others wait for it

Looking through eleven million files takes minutes to an hour on a network drive, and 64 hosts that do it at once keep
its metadata server from everything else. Shards believe the list for `KEPT_S`; then the next one lists anew. A list
whose digest is not the one of `plan.json` is not kept. Whether SOURCE still is what was listed is seen whenever it is
listed: by that shard, by every call without --shard, and so by the one that finishes the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

import ecg_jax
from ecg_jax.data.attempt import NO_LOCKS, planned_digest
from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import EntryTable, Listing
from ecg_jax.data.progress import count_text, duration_text
from ecg_jax.data.recording import Problem
from ecg_jax.data.store import PARTIAL
from ecg_jax.data.unit_files import disk_errors, new_file, temporary_path
from ecg_jax.errors import UserError

# Long enough for an array to start, and short enough for files that come later to be noticed before all is converted.
KEPT_S = 6 * 3600

_METADATA = b"ecg_jax"
# SHA-256 of what is before it, at the end of the file.
_DIGEST_BYTES = 32


def list_records(
    source: Path, store: Path, settings: dict, shard: bool, dry_run: bool, progress: bool
) -> tuple[Listing, str]:
    """The recordings of a corpus, from SOURCE; for a shard from what another one has listed, if one has.

    A corpus of which all entries are Python objects is small, and listed by each shard.

    Args:
      source: SOURCE.
      store: folder of the store.
      settings: of the store: `corpus`, `source`, `source_rate`.
      shard: whether the call is for a shard.
      dry_run: write nothing.
      progress: tell what goes on.

    Returns:
      the listing and its digest.

    Raises:
      UserError: what the corpus says of SOURCE, or a full disk.
    """
    if not shard or (store / "zarr.json").exists():
        return _list_anew(source, settings, progress)
    found = _read(store, settings, progress)
    if found is not None or dry_run:
        return found or _list_anew(source, settings, progress)
    partial = store / PARTIAL
    with contextlib.ExitStack() as stack:
        with disk_errors(store):
            partial.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(partial / "listing.lock", "a"))
            _wait(lock, settings, progress)
        found = _read(store, settings, progress)
        if found is not None:
            return found
        try:
            listing, digest = _list_anew(source, settings, progress)
        except UserError:
            # Another SOURCE or corpus may be meant.
            with contextlib.suppress(OSError):
                os.unlink(lock.name)
                partial.rmdir()
                store.rmdir()
            raise
        if isinstance(listing.entries, EntryTable) and planned_digest(store) in (None, digest):
            with disk_errors(store):
                _write(store, settings, listing, digest)
    return listing, digest


def _list_anew(source: Path, settings: dict, progress: bool) -> tuple[Listing, str]:
    started = time.monotonic()
    _tell(settings, f"listing {source}", progress)
    listing = CORPORA[settings["corpus"]].list_records(source, settings["source_rate"])
    digest = listing.digest()
    taken = duration_text(time.monotonic() - started)
    _tell(settings, f"{count_text(len(listing.entries))} recordings listed in {taken}", progress)
    return listing, digest


def _read(store: Path, settings: dict, progress: bool) -> tuple[Listing, str] | None:
    """What a shard has listed; None where none has lately, for another corpus, or where the file is damaged."""
    import pyarrow as pa

    path = store / PARTIAL / "listing.arrow"
    data = b""
    with disk_errors(store), contextlib.suppress(FileNotFoundError):
        age = time.time() - path.stat().st_mtime
        if age <= KEPT_S:
            data = path.read_bytes()
    if not data:
        return None
    # Arrow does not check what it reads.
    if hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        return None
    table = pa.ipc.open_stream(data).read_all()
    rest = json.loads(table.schema.metadata[_METADATA])
    if rest["settings"] != _made_from(settings):
        return None
    if planned_digest(store) not in (None, rest["digest"]):
        return None
    entries = EntryTable(table.replace_schema_metadata(None), **rest["table"])
    rest["listing"]["problems"] = [Problem(**problem) for problem in rest["listing"]["problems"]]
    rest["listing"]["label_sets"] = tuple(rest["listing"]["label_sets"])
    _tell(
        settings,
        f"{count_text(len(entries))} recordings, as another shard listed them {duration_text(max(age, 0))} ago",
        progress,
    )
    return Listing(entries, **rest["listing"]), rest["digest"]


def _made_from(settings: dict) -> list:
    """What a listing depends on."""
    return [ecg_jax.__version__, *(settings[key] for key in ("corpus", "source", "source_rate"))]


def _write(store: Path, settings: dict, listing: Listing, digest: str) -> None:
    import pyarrow as pa

    entries = listing.entries
    rest = {
        "settings": _made_from(settings),
        "digest": digest,
        "table": {
            "suffix": entries.suffix,
            "label_names": {name: list(texts) for name, texts in entries.label_names.items()},
            "value_names": {name: list(texts) for name, texts in entries.value_names.items()},
        },
        "listing": {
            **{
                field.name: getattr(listing, field.name)
                for field in dataclasses.fields(listing)
                if field.name != "entries"
            },
            "problems": [vars(problem) for problem in listing.problems],
        },
    }
    # One batch: dictionaries that change from chunk to chunk would be written again and again.
    table = entries.table.combine_chunks().replace_schema_metadata({_METADATA: json.dumps(rest).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as arrow:
        arrow.write_table(table)
    data = sink.getvalue()
    with new_file(temporary_path(store / PARTIAL, "listing.arrow")) as file:
        file.write(data)
        file.write(hashlib.sha256(data).digest())
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, store / PARTIAL / "listing.arrow")


def _wait(lock: IO, settings: dict, progress: bool) -> None:
    """Returns at once to the first process, to others when that one has listed. Where nothing can be locked, every one
    lists.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _tell(settings, "waiting for another shard, which lists SOURCE", progress)
        # Shared: what the first one did not leave, the others need not do one after the other.
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _tell(settings: dict, text: str, progress: bool) -> None:
    if progress:
        print(f"prepare {settings['corpus']}: {text}", file=sys.stderr, flush=True)
