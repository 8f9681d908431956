"""The pretraining ladder: the paper's five sizes, and which partitions of its corpora each is made of (spec §6).

A partition is a site and a year of HEEDB ("S0001-1987"), a year of HEEDB-Emory ("emory-2010"), or all of CODE-15 %
("code15"). The two ladders: `paper` takes the partitions of a rung, so that sizes differ in site and year too; `nested`
takes random patients of everything there is, each rung inside the next, so that rungs differ in size alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ecg_jax.data.store import Store

#: What `config.data.ladder` may be.
LADDERS = ("nested", "paper")

#: Rung -> how many recordings a nested selection of it holds at most; the paper's rungs have about as many. The last
#: one takes everything on either ladder.
SIZES = {"18k": 18_000, "45k": 45_000, "106k": 106_000, "753k": 753_000, "11m": 11_000_000}

#: The rung that takes everything.
EVERYTHING = "11m"

_YEARS = {
    "S0001": (1987, 1988, 1994, 2006, 2007, 2011, 2013, 2015, 2016, 2017, 2018, 2019, 2020, 2021),
    "S0002": (1993, 1997, 1998, 2000, 2003, 2004, 2008, 2009, 2013, 2015, 2016, 2018, 2020, 2022),
    "S0003": (1990, 1994, 2009, 2010, 2013),
    "S0004": (2019,),
    "emory": tuple(range(2010, 2019)),
}

#: Rung -> its partitions. The paper's table calls that of 45k S0001-1990, which none of its configs knows; S0003-1990
#: is the partition of that year.
PARTITIONS = {
    "18k": ("S0001-1987",),
    "45k": ("S0003-1990",),
    "106k": ("S0001-2019",),
    "753k": ("S0001-2007",),
    EVERYTHING: (*(f"{site}-{year}" for site, years in _YEARS.items() for year in years), "code15"),
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

    if store.corpus == "heedb":
        from ecg_jax.data.corpora.heedb import partition_of
    elif store.corpus == "heedb_emory":
        from ecg_jax.data.corpora.heedb_emory import partition_of
    else:
        return ["code15" if store.corpus == "code15" else None], np.zeros(len(store), np.int32)
    # Millions of files lie in thousands of folders: asking for each folder once takes no time.
    folders = pc.replace_substring_regex(store.arrow_column("source_file"), r"[^/]*$", "")
    codes, names = dictionary_codes(folders)
    return [partition_of(f"{folder}record.hea") for folder in names], codes


def dictionary_codes(column) -> tuple[np.ndarray, list[str]]:
    """A `pyarrow.ChunkedArray` of text without nulls as (int32 [n] codes, the different texts in order of code)."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    if not chunks:
        return np.zeros(0, np.int32), []
    return np.concatenate([chunk.indices.to_numpy() for chunk in chunks]), chunks[0].dictionary.to_pylist()
