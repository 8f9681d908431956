"""The pretraining ladder: the paper's five sizes, and which partitions of its corpora each is made of (spec §6).

A partition is a site and a year of HEEDB ("S0001-1987"), a year of HEEDB-Emory ("emory-2010"), or all of CODE-15 %
("code15"). The two ladders: `paper` takes the partitions of a rung, so that sizes differ in site and year too; `nested`
takes random patients of everything there is, each rung inside the next, so that rungs differ in size alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.corpora import heedb, heedb_emory
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    from ecg_jax.data.mixture import StoreSet
    from ecg_jax.data.store import Store

#: What `config.data.ladder` may be.
LADDERS = ("nested", "paper")

#: Rung -> how many recordings a nested selection of it holds at most; the paper's rungs have about as many.
SIZES = {"18k": 18_000, "45k": 45_000, "106k": 106_000, "753k": 753_000, "11m": 11_000_000}

#: The rung that takes everything: on the paper's ladder all its partitions, on the nested one all there is.
EVERYTHING = "11m"

#: Rung -> its partitions. The paper's table calls that of 45k S0001-1990, which none of its configs knows; S0003-1990
#: is the partition of that year.
PARTITIONS = {
    "18k": ("S0001-1987",),
    "45k": ("S0003-1990",),
    "106k": ("S0001-2019",),
    "753k": ("S0001-2007",),
    EVERYTHING: (*heedb.PARTITIONS, *heedb_emory.PARTITIONS, "code15"),
}


def nested_size(rung: str) -> int | None:
    """How many recordings a nested selection of a rung holds at most; None for everything."""
    return None if rung == EVERYTHING else SIZES[rung]


def partitions(store: Store) -> tuple[list[str | None], np.ndarray]:
    """Which partition each record of a store belongs to.

    Returns:
        (partitions, None for none of the ladder's; int32 [n], index into them for each record).

    Raises:
        UserError: the store has no column `source_file`.
    """
    import pyarrow.compute as pc

    corpora = {"heedb": heedb, "heedb_emory": heedb_emory}
    if store.corpus not in corpora:
        return ["code15" if store.corpus == "code15" else None], np.zeros(len(store), np.int32)
    partition_of = corpora[store.corpus].partition_of
    # Millions of files lie in thousands of folders: asking for each folder once takes no time.
    folders = pc.replace_substring_regex(store.arrow_column("source_file"), r"[^/]*$", "")
    codes, names = dictionary_codes(folders)
    return [partition_of(f"{folder}record.hea") for folder in names], codes


def in_rung(stores: StoreSet, rung: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which records of stores are of a rung of the paper.

    Returns:
        (bool [n] by joint row; partitions of the rung that no store has).

    Raises:
        UserError: partitions are missing, of the rung that takes everything all of them.
    """
    wanted = PARTITIONS[rung]
    parts, found = [], set()
    for store in stores.stores:
        names, codes = partitions(store)
        there = np.bincount(codes, minlength=len(names)) > 0
        found |= {name for name, some in zip(names, there, strict=True) if some}
        parts.append(np.array([name in wanted for name in names], bool)[codes])
    missing = tuple(name for name in wanted if name not in found)
    if len(missing) == len(wanted) or (missing and rung != EVERYTHING):
        raise UserError(
            f"config.data.ladder=paper: rung {rung} is made of {', '.join(wanted[:3])}"
            f"{' and more' if len(wanted) > 3 else ''}, and {stores} has "
            f"{'none of it' if len(missing) == len(wanted) else 'no ' + ', '.join(missing)}; prepare those partitions "
            "of HEEDB, or take config.data.ladder=nested"
        )
    return np.concatenate(parts), missing


def dictionary_codes(column) -> tuple[np.ndarray, list[str]]:
    """A `pyarrow.ChunkedArray` of text without nulls as (int32 [n] codes, the different texts in order of code)."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    if not chunks:
        return np.zeros(0, np.int32), []
    return np.concatenate([chunk.indices.to_numpy() for chunk in chunks]), chunks[0].dictionary.to_pylist()
