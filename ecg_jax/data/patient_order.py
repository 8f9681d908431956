"""Patients in an order given by a hash of their ids: the nested sets of the pretraining ladder."""

import hashlib

import numpy as np

from ecg_jax.data.ladder import dictionary_codes
from ecg_jax.data.mixture import StoreSet
from ecg_jax.data.store import Store


def first_patients(stores: StoreSet, rows: np.ndarray, size: int, whole_patients: bool) -> np.ndarray:
    """The rows of the patients that come first in the order of their hashes, at most `size`.

    Ids mean the same people within one corpus only. Equal ids of two corpora share a place in the order and nothing
    else. A record of an unknown patient is a patient of its own.

    Args:
        stores: one or several.
        rows: ascending joint rows to choose from.
        size: at least 1.
        whole_patients: leave out the patient that does not fit whole, unless it is the very first; False takes as many
            of its records as fit.

    Returns:
        int64, ascending joint rows.
    """
    by_corpus: dict[str, list[np.ndarray]] = {}
    owners = []
    for store, local, first in zip(stores.stores, stores.split(rows), stores.bounds[:-1], strict=True):
        by_corpus.setdefault(store.corpus, []).append(local + first)
        owners.append((store.corpus, _owners(store, local)))
    groups = []
    for corpus, parts in by_corpus.items():
        codes, names = _codes([column for name, column in owners if name == corpus])
        groups.append((np.concatenate(parts), codes, _hashes(names)))
    hashes = np.concatenate([each for _, _, each in groups])
    counts = np.concatenate([np.bincount(codes, minlength=len(each)) for _, codes, each in groups])
    order = np.argsort(hashes, kind="stable")
    ends = np.cumsum(counts[order])
    fitting = int(np.searchsorted(ends, size, side="right"))
    chosen = np.zeros(len(hashes), bool)
    chosen[order[:fitting]] = True
    taken = int(ends[fitting - 1]) if fitting else 0
    partly = order[fitting] if taken < size and (not whole_patients or not fitting) else None

    found, place = [], 0
    for their_rows, codes, each in groups:
        found.append(their_rows[chosen[place + codes]])
        if partly is not None and place <= partly < place + len(each):
            found.append(their_rows[codes == partly - place][: size - taken])
        place += len(each)
    return np.sort(np.concatenate(found))


def _owners(store: Store, rows: np.ndarray):
    """Patient of each row, or its own record where that is unknown, as a `pyarrow.ChunkedArray`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    chosen = np.zeros(len(store), bool)
    chosen[rows] = True
    patients = store.arrow_column("patient_id").filter(pa.array(chosen))
    if not patients.null_count:
        return patients
    return pc.coalesce(patients, store.arrow_column("record_id").filter(pa.array(chosen)))


def _codes(columns: list) -> tuple[np.ndarray, list[str]]:
    import pyarrow as pa

    return dictionary_codes(
        pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
    )


def _hashes(names: list[str]) -> np.ndarray:
    """uint64 [n], 64-bit BLAKE2b of each text, first byte most significant."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
