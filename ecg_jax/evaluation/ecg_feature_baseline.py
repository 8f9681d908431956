"""Simple ECG features as the input of a linear probe: what rates, intervals and amplitudes say without any encoder.

    FOLDER/ecg_features/<key>/000000.npz    of the records asked for so far, see `kept_rows`

The key is a hash of the store's fingerprint and of the version and names of the features.
"""

import hashlib
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.evaluation.ecg_features import FEATURE_NAMES, FeatureTable, store_features
from ecg_jax.evaluation.examples import Examples, Part
from ecg_jax.evaluation.linear import LayerFeatures

#: Raise when `ecg_features` gives other numbers for the same recording.
VERSION = 2

LAYER = "ecg_features"


def kept_in(folder: Path, store: Store) -> Path:
    """Where the features of a store are."""
    key = hashlib.sha256(f"{VERSION} {FEATURE_NAMES} {store.fingerprint}".encode()).hexdigest()[:32]
    return folder / LAYER / key


def ecg_feature_layers(examples: Examples, folder: Path) -> LayerFeatures:
    """The features of a task's records as the only "layer" of an encoder, for `linear.fit_linear`.

    Undefined features are filled in with the median of the training records, and whether they were undefined is a
    feature of its own. Where no feature varies among the training records there is one column of zeros, on which a
    probe predicts the training mean.

    Args:
        examples: of the task.
        folder: where features of stores are kept; only records of the task are computed.

    Raises:
        UserError: they cannot be kept.
    """
    parts = (examples.train, examples.val, examples.test)
    tables = [store_features(part.store, part.rows, kept_in(folder, part.store)) for part in parts]
    fitted = FeatureTable.fit(tables[0])
    if fitted.names:
        filled = [fitted.transform(table) for table in tables]
    else:
        filled = [np.zeros((len(table), 1)) for table in tables]

    def of(part: Part, layer: str) -> tuple[np.ndarray, np.ndarray]:
        number = next(i for i, each in enumerate(parts) if each is part)
        return filled[number], np.arange(len(part.rows))

    return LayerFeatures((LAYER,), of)
