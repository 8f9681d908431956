"""`ecg-jax verify STORE...`: the signal of every record against the checksum it was written with."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ecg_jax.data.progress import Progress
from ecg_jax.data.record_table import Fingerprint, count_codes
from ecg_jax.data.store import BYTES_PER_SAMPLE, Store
from ecg_jax.data.writer import array_metadata
from ecg_jax.errors import UserError

DESCRIPTION = """\
Reads the signal of every record of stores and compares it with the checksum it was written with, chunk file by chunk
file in the order of the disk. Run it after a store was copied, or when a disk is suspected.

The table of records is compared, by its SHA-256, with the one the store was finished with, and with itself: record ids,
labels, and that no record leaves its chunk or lies on another. Of the Zarr array it is checked that its metadata
describe what the chunk files are.

Stores that were written earlier lack that SHA-256. Of their tables folds, patients, ages, sexes and values, and which
record has which label, are not covered, and the last line says so.

  ecg-jax verify stores/ptbxl
  ecg-jax verify stores/* --workers=8

The exit code is 0 when nothing is wrong and 2 otherwise. At most 20 damages are printed, all are counted. A damaged
chunk file can be copied again from where the store came from; `ecg-jax prepare` writes a whole store anew.
"""
SHOWN = 20
NOT_COVERED = "folds, patients, ages, sexes, values, and which record has which label"


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a store.

    Attributes:
      where: a record and its row with its chunk file, or a file.
      what: a sentence about it.
      record: it is a record that is damaged.
    """

    where: str
    what: str
    record: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Neighbouring records of one chunk, at most those of one row group of the table.

    Attributes:
      chunk: its number.
      first: row of the first record.
      positions, sizes: int64 [n], first byte in the chunk file and bytes of each record.
      checksums, ids: `pyarrow.ChunkedArray`s of n texts.
    """

    chunk: int
    first: int
    positions: np.ndarray
    sizes: np.ndarray
    checksums: object
    ids: object


class Bytes:
    """Bytes read by all threads together, told to a `Progress`."""

    def __init__(self, progress: Progress):
        self._progress, self._lock = progress, threading.Lock()

    def add(self, n: int) -> None:
        """Counts n bytes; any thread may."""
        with self._lock:
            self._progress.update(self._progress.fresh + n)


def verify(
    path: str | os.PathLike, workers: int | None = None, read: Bytes | None = None
) -> Iterator[Damage]:
    """Finds signals and tables that are not as they were written, records out of place, labels that occur more or less
    often, and wrong array metadata; of a store without `table_digest` some columns are not covered (`NOT_COVERED`).

    Args:
      path: its folder.
      workers: threads that read and hash; None takes the CPUs this process may use.
      read: is told the bytes read; None tells nobody.

    Yields:
      Each damage, in order of the store.

    Raises:
      UserError: the store cannot be opened at all: none there, or its metadata or table are missing or damaged.
    """
    store = Store(path, check_files=False)
    yield from _metadata_damage(store)
    yield from _table_damage(store)
    for chunk in sorted(store.chunk_files.occupied):
        if problem := store.chunk_files.problem(chunk):
            yield Damage(str(store.chunk_files.path(chunk)), problem)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for piece in _pieces(store):
                waiting.append(pool.submit(_piece_damage, store, piece, read, stop))
                # Pieces of 11 million records are not all held at once.
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _metadata_damage(store: Store) -> Iterator[Damage]:
    """Whether any Zarr reader would see what this package reads."""
    path = store.path / "signal" / "zarr.json"
    found = json.loads(path.read_bytes())
    for key, wanted in array_metadata(store.n_chunks * store.chunk_samples, store.chunk_samples).items():
        if key != "attributes" and (key not in found or found[key] != wanted):
            yield Damage(str(path), f"{key} is {found.get(key)!r} instead of {wanted!r}.")


def _table_damage(store: Store) -> Iterator[Damage]:
    """What the table says against what the store was finished with, and against itself."""
    path = store.path / "records.parquet"
    counts = {name: collections.Counter() for name in store.classes}
    fingerprint = Fingerprint(store.preprocessing)
    needed = {"offset", "length", "record_id", "checksum", *(f"labels_{name}" for name in counts)}
    places = []

    end = 0
    for first, table in store.row_groups():
        if missing := needed.difference(table.column_names):
            raise UserError(f"The store {store.path} is damaged: {path} has no column {min(missing)}.")
        offset, length = (table[name].to_numpy().astype(np.int64) for name in ("offset", "length"))
        last = offset + length - 1
        before = np.concatenate([[end], (last + 1)[:-1]])[: len(last)]
        chunks = [samples // store.chunk_samples for samples in (offset, last)]
        wrong = (length <= 0) | (chunks[0] != chunks[1]) | (offset < before)
        places.extend((first + np.flatnonzero(wrong)[:SHOWN]).tolist())
        end = int(last[-1]) + 1 if len(last) else end
        for name in counts:
            counts[name] += count_codes(table[f"labels_{name}"])
        fingerprint.update(table)
    for row in places:
        yield Damage(
            f"{path}, row {row}", "the record leaves its chunk, is empty or lies on the one before it."
        )
    if keeps_table_digest(store) and store.table_digest() != store.attributes["table_digest"]:
        yield Damage(
            str(path),
            "it is not the table that the store was finished with: damaged, or rewritten since.",
        )
    if fingerprint.hexdigest() != store.fingerprint:
        yield Damage(str(path), "record ids or checksums are not those the store was finished with.")
    for name, counter in counts.items():
        wrong = [code for code, info in store.class_info[name].items() if info["count"] != counter[code]]
        if wrong:
            yield Damage(
                str(path),
                f"labels_{name} has {counter[wrong[0]]} records of {wrong[0]} instead of "
                f"{store.class_info[name][wrong[0]]['count']}"
                + (f", and other numbers of {len(wrong) - 1} more classes." if len(wrong) > 1 else "."),
            )


def keeps_table_digest(store: Store) -> bool:
    """Whether a store says which table it was finished with; those written earlier do not."""
    return "table_digest" in store.attributes


def _pieces(store: Store) -> Iterator[Piece]:
    for first, table in store.row_groups("offset", "length", "checksum", "record_id"):
        offset, length = (table[name].to_numpy() for name in ("offset", "length"))
        chunk, within = np.divmod(offset, store.chunk_samples)
        cuts = np.flatnonzero(np.diff(chunk)) + 1
        # A damaged table must not ask for more than a chunk holds.
        sizes = np.clip(length, 0, store.chunk_samples) * BYTES_PER_SAMPLE
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(offset)], strict=True):
            yield Piece(
                int(chunk[begin]),
                first + begin,
                within[begin:end] * BYTES_PER_SAMPLE,
                sizes[begin:end],
                table["checksum"].slice(begin, end - begin),
                table["record_id"].slice(begin, end - begin),
            )


def _piece_damage(store: Store, piece: Piece, read: Bytes | None, stop: threading.Event) -> list[Damage]:
    """Reads and hashes some records; both let other threads run."""
    path, damage = store.chunk_files.path(piece.chunk), []

    def damaged(i: int, what: str) -> None:
        where = f"{store.path}: record {piece.ids[i].as_py()} (row {piece.first + i}) in {path}"
        damage.append(Damage(where, what, record=True))

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        for i in range(len(piece.sizes)):
            damaged(i, f"cannot be opened: {error.strerror}.")
        return damage
    try:
        buffer = memoryview(bytearray(int(piece.sizes.max())))
        rows = zip(piece.positions.tolist(), piece.sizes.tolist(), piece.checksums.to_pylist(), strict=True)
        for i, (position, size, wanted) in enumerate(rows):
            if stop.is_set():
                break
            target = buffer[:size]
            try:
                if not _fill(fd, position, target):
                    damaged(i, "the file ends too early.")
                elif hashlib.blake2b(target, digest_size=16).hexdigest() != wanted:
                    damaged(i, "its checksum differs.")
            except OSError as error:
                damaged(i, f"cannot be read: {error.strerror}.")
            if read is not None:
                read.add(len(target))
    finally:
        os.close(fd)
    return damage


def _fill(fd: int, position: int, target: memoryview) -> bool:
    """Reads until `target` is full; False when the file ends before."""
    done = 0
    while done < len(target):
        n = os.preadv(fd, (target[done:],), position + done)
        if n == 0:
            return False
        done += n
    return True


def _size(path: Path) -> tuple[int, int]:
    """(records, bytes of their signals) of a store."""
    store = Store(path, check_files=False)
    samples = sum(int(table["length"].to_numpy().sum()) for _, table in store.row_groups("length"))
    return len(store), samples * BYTES_PER_SAMPLE


def verify_all(paths: list[Path], workers: int | None = None, progress: bool = True) -> str:
    """Verifies stores one after the other and prints what is wrong with them.

    Args:
      paths: of the stores.
      workers: threads; None takes the CPUs this process may use.
      progress: tell how far it is.

    Returns:
      A line about what was verified.

    Raises:
      UserError: anything is damaged; each damage was printed before, `SHOWN` at most.
    """
    from tqdm import tqdm

    started = time.monotonic()
    sizes, shown, kinds = {}, 0, collections.Counter()

    def tell(line: str, kind: str) -> None:
        nonlocal shown
        kinds[kind] += 1
        if shown < SHOWN:
            shown += 1
            # Above the bar, if there is one.
            tqdm.write(line, file=sys.stdout)

    for path in paths:
        try:
            sizes[path] = _size(path)
        except UserError as error:
            tell(str(error), "unreadable store")
    n_records, n_bytes = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    with Progress("verify", n_bytes, of_bytes=True, show=progress) as bar:
        for path in sizes:
            try:
                for damage in verify(path, workers, Bytes(bar)):
                    tell(str(damage), "damaged record" if damage.record else "damaged file")
            except UserError as error:
                tell(str(error), "unreadable store")
    seconds = time.monotonic() - started
    read = f"{_many(n_records, 'record')} of {_many(len(sizes), 'store')}, {n_bytes / 1e9:.2f} GB"
    if kinds:
        hidden = kinds.total() - shown
        raise UserError(
            f"{', '.join(_many(n, kind) for kind, n in kinds.items())} in {read}"
            + (f" ({hidden} of them not printed)" if hidden else "")
            + "; copy those files again, or prepare the store anew."
        )
    written = f"are as they were written: {read}, in {seconds:.1f} s."
    old = [str(path) for path in sizes if not keeps_table_digest(Store(path, check_files=False))]
    if old:
        return f"Signals and record ids {written} Not covered in {', '.join(old)}: {NOT_COVERED}."
    return f"Signals and tables {written}"


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def parser() -> argparse.ArgumentParser:
    """The command line of `ecg-jax verify`."""
    result = argparse.ArgumentParser(
        prog="ecg-jax verify",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("stores", nargs="+", metavar="STORE", type=Path, help="stores of `ecg-jax prepare`")
    result.add_argument("--workers", type=int, metavar="N", help="threads (default: number of CPUs)")
    return result


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}.")
    print(verify_all(arguments.stores, arguments.workers))
    return 0
