"""Finding the files of an institution of HEEDB: its partitions, their folders and names, as columns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.recording import Problem, cannot_read
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Threads that list folders: on a network drive each waits for its answers.
_LISTING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Files:
    """The records in SOURCE, n of them, in order of partition, folder and name.

    Attributes:
      names: large text [n], without suffix.
      folder: int32 [n], index into `folders`, e.g. "S0001/1987/04/".
      partition: int16 [n], index into `partitions`, e.g. "S0001/1987".
    """

    names: pa.Array
    folder: np.ndarray
    folders: list[str]
    partition: np.ndarray
    partitions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def range_of(self, partition: int) -> tuple[int, int]:
        """Where a partition, by its index, begins and ends."""
        start, stop = np.searchsorted(self.partition, [partition, partition + 1]).tolist()
        return start, stop

    def keys(self, start: int, stop: int) -> pa.Array:
        """Large text: folder and name of some records."""
        import pyarrow as pa
        import pyarrow.compute as pc

        folders = pa.array(self.folders, pa.large_string()).take(pa.array(self.folder[start:stop]))
        names = self.names.slice(start, stop - start)
        return pc.binary_join_element_wise(folders, names, pa.scalar("", pa.large_string()))

    def partition_of(self, keys: pa.Array) -> np.ndarray:
        """int16 [m]: the partition each key of a table lies in, -1 for one that is not here."""
        import pyarrow as pa
        import pyarrow.compute as pc

        prefix = pc.utf8_slice_codeunits(keys, 0, len(self.partitions[0]))
        place = pc.index_in(prefix, value_set=pa.array(self.partitions, keys.type))
        return pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int16)

    def where(self, kept: np.ndarray) -> Files:
        """Some of them."""
        import pyarrow as pa

        names = self.names.filter(pa.array(kept))
        return dataclasses.replace(
            self, names=names, folder=self.folder[kept], partition=self.partition[kept]
        )


def find_partitions(wfdb: Path, pattern: str) -> list[str]:
    """The folders of partitions below `wfdb`, e.g. "S0001/1987", sorted; `pattern` is `Layout.partition`."""
    found = [""]
    for part in pattern.split("/"):
        found = [
            f"{folder}{name}/"
            for folder in found
            for name in _subfolders(wfdb / folder)
            if re.fullmatch(part, name)
        ]
    return sorted(folder.rstrip("/") for folder in found)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as content:
            return [entry.name for entry in content if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(folder, error) from error


def find_files(wfdb: Path, partitions: list[str]) -> Files:
    """Every .hea in these partitions, at any depth."""
    import pyarrow as pa

    folders: list[str] = []
    names, counts, of_partition = [], [], []
    # Folders of a partition are read one after another, partitions side by side.
    with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = pool.map(lambda partition: _walk(wfdb, partition), partitions)
        for number, parts in enumerate(found):
            for folder, some in parts:
                folders.append(folder)
                names.append(some)
                counts.append(len(some))
                of_partition.append(number)
    folder = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    partition = np.repeat(np.array(of_partition, np.int16), counts)
    joined = pa.concat_arrays(names) if names else pa.array([], pa.large_string())
    return Files(joined, folder, folders, partition, partitions)


def _walk(wfdb: Path, partition: str) -> list[tuple[str, pa.Array]]:
    """(folder, names of its records) of every folder with records, in order."""
    import pyarrow as pa

    found, todo, seen = [], [f"{partition}/"], set()
    while todo:
        folder = todo.pop()
        # Data often lies behind symbolic links; a folder reached twice (a link to its parent) is read once.
        real = os.path.realpath(wfdb / folder)
        if real in seen:
            continue
        seen.add(real)
        names, below = [], []
        try:
            with os.scandir(wfdb / folder) as content:
                for entry in content:
                    if entry.name.startswith("."):
                        continue
                    if entry.name.endswith(".hea"):
                        names.append(entry.name[:-4])
                    elif not entry.name.endswith((".mat", ".dat")) and entry.is_dir():
                        below.append(f"{folder}{entry.name}/")
        except OSError as error:
            raise cannot_read(wfdb / folder, error) from error
        todo += sorted(below, reverse=True)
        if names:
            try:
                folder.encode()
                found.append((folder, pa.array(sorted(names), pa.large_string())))
            except UnicodeEncodeError:
                raise UserError(f"A file name in {wfdb / folder} is not UTF-8; rename it.") from None
    return found


def per_partition(
    files: Files, marked: np.ndarray, name_of: Callable[[str], str], kind: str, action: str, text: str
) -> list[Problem]:
    """One problem for each partition with marked records; `text` has their number as {n}."""
    counts = np.bincount(files.partition[marked], minlength=len(files.partitions))
    return [
        Problem(name_of(files.partitions[p]), kind, action, text.format(n=counts[p]))
        for p in np.flatnonzero(counts)
    ]
