"""Simple ECG features as the input of a linear probe: what rates, intervals and amplitudes say without any encoder.

    FOLDER/ecg_features/<key>/000000.npy    float32 [PART_RECORDS, F], NaN where a feature is undefined

The key is a hash of the store's fingerprint and of the version and names of the features. Only parts that hold a record
of the task are computed.
"""

import hashlib
import io
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.ecg_features import FEATURE_NAMES, FeatureTable, store_features
from ecg_jax.evaluation.examples import Examples, Part
from ecg_jax.evaluation.linear import LayerFeatures
from ecg_jax.files import write_atomic

#: Raise when `ecg_features` gives other numbers for the same recording.
VERSION = 1
PART_RECORDS = 1024

LAYER = "ecg_features"


def _table(store: Store, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Features of some records, from the folder or computed into it: float32 [n, F]."""
    key = hashlib.sha256(f"{VERSION} {FEATURE_NAMES} {store.fingerprint}".encode()).hexdigest()[:32]
    entry = folder / LAYER / key
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot keep features in {entry}: {error.strerror}; name another folder as --config.features."
        ) from error
    out = np.empty((len(rows), len(FEATURE_NAMES)), dtype=np.float32)
    for part in np.unique(rows // PART_RECORDS):
        wanted = rows // PART_RECORDS == part
        out[wanted] = _part(store, int(part), entry)[rows[wanted] % PART_RECORDS]
    return out


def _part(store: Store, part: int, entry: Path) -> np.ndarray:
    """Features of the records of one part, read or computed and kept."""
    first = part * PART_RECORDS
    rows = np.arange(first, min(first + PART_RECORDS, len(store)))
    path, shape = entry / f"{part:06d}.npy", (len(rows), len(FEATURE_NAMES))
    if path.exists():
        try:
            found = np.load(path)
        except (OSError, ValueError, EOFError):
            found = None  # damaged: computed again
        if found is not None and found.shape == shape and found.dtype == np.float32:
            return found
    features, buffer = store_features(store, rows).astype(np.float32), io.BytesIO()
    np.save(buffer, features)
    write_atomic(path, buffer.getvalue())
    return features


def ecg_feature_layers(examples: Examples, folder: Path) -> LayerFeatures:
    """The features of a task's records as the only "layer" of an encoder, for `linear.fit_linear`.

    Undefined features are filled in with the median of the training records, and whether they were undefined is a
    feature of its own.

    Args:
        examples: of the task.
        folder: where features of stores are kept.

    Raises:
        UserError: they cannot be kept.
    """
    parts = (examples.train, examples.val, examples.test)
    tables = [_table(part.store, part.rows, folder) for part in parts]
    fitted = FeatureTable.fit(tables[0])
    filled = [fitted.transform(table) for table in tables]

    def of(part: Part, layer: str) -> tuple[np.ndarray, np.ndarray]:
        number = next(i for i, each in enumerate(parts) if each is part)
        return filled[number], np.arange(len(part.rows))

    return LayerFeatures((LAYER,), of)
