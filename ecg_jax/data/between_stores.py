"""What the stores of one selection have in common: people who are in several, and signals that are in several.

Each store has its own folds, so that a patient may be held out in one store and not in another.
"""

import binascii

import numpy as np

from ecg_jax.data.mixture import StoreSet
from ecg_jax.data.record_table import first_with_same_checksum


def of_held_out_patients(stores: StoreSet, held_out: np.ndarray) -> np.ndarray:
    """Which records are of patients of whom others are held out, among the stores of a corpus that has several.

    Ids mean the same people within one corpus only.

    Args:
        stores: any.
        held_out: bool [n], by joint row.

    Returns:
        bool [n]; False for what is held out itself, for unknown patients, and in stores that are alone of their corpus.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found = np.zeros(len(stores), bool)
    by_corpus: dict[str, list[int]] = {}
    for number, store in enumerate(stores.stores):
        by_corpus.setdefault(store.corpus, []).append(number)
    for numbers in by_corpus.values():
        if len(numbers) == 1:
            continue
        places = [slice(*stores.bounds[number : number + 2]) for number in numbers]
        columns = [stores.stores[number].arrow_column("patient_id") for number in numbers]
        parts = [
            column.filter(pa.array(held_out[place])) for column, place in zip(columns, places, strict=True)
        ]
        people = pa.chunked_array([chunk for part in parts for chunk in part.chunks], columns[0].type)
        for column, place in zip(columns, places, strict=True):
            among = pc.is_in(column, value_set=people.unique(), skip_nulls=True)
            found[place] = among.to_numpy() & ~held_out[place]
    return found


def repeated_signals(stores: StoreSet, rows: np.ndarray) -> np.ndarray:
    """Those of the rows whose signal an earlier one of them has.

    Args:
        stores: any.
        rows: ascending joint rows.

    Returns:
        int64, ascending.
    """
    parts = zip(stores.stores, stores.split(rows), strict=True)
    first = first_with_same_checksum(np.concatenate([_checksums(*part) for part in parts]))
    return rows[first != np.arange(len(rows))]


def _checksums(store, rows: np.ndarray) -> np.ndarray:
    """uint64 [n, 2] of the rows of a store."""
    import pyarrow as pa

    digits = store.arrow_column("checksum").take(pa.array(rows)).cast(pa.binary(32))
    parts = [
        binascii.unhexlify(chunk.buffers()[1][32 * chunk.offset : 32 * (chunk.offset + len(chunk))])
        for chunk in digits.chunks
        if len(chunk)
    ]
    return np.frombuffer(b"".join(parts), ">u8").reshape(-1, 2)
