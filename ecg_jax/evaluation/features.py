"""Features of a frozen encoder, computed once and kept.

A record is scored on consecutive non-overlapping crops from its first sample on; the incomplete tail is
dropped (spec: 10 s at a 2.5 s window give 4 crops). A record shorter than one window has no crop and cannot
be scored.
"""

from collections.abc import Callable

import numpy as np


def encode_padded(encode: Callable, crops: np.ndarray, batch_size: int):
    """Encode up to `batch_size` crops as a batch of exactly that size, so that the encoder compiles once.

    Args:
        encode: int16 [B, T, C] microvolts -> float32 [B, D], or a dict of such; rows must not influence each other.
        crops: int16 [b, T, C] with 1 <= b <= batch_size.

    Returns:
        float32 [b, D], or a dict of such.
    """
    missing = batch_size - len(crops)
    if missing:
        crops = np.concatenate([crops, np.zeros((missing, *crops.shape[1:]), crops.dtype)])
    encoded = encode(crops)
    if isinstance(encoded, dict):
        return {
            name: np.asarray(of, dtype=np.float32)[: batch_size - missing] for name, of in encoded.items()
        }
    return np.asarray(encoded, dtype=np.float32)[: batch_size - missing]


def mean_per_record(values, record, n_records: int) -> np.ndarray:
    """Arithmetic mean over the crops of each record.

    Args:
        values: [n_crops, K], such as crop probabilities or features.
        record: int [n_crops], the record of each crop, 0 to n_records - 1, in any order.
        n_records: n.

    Returns:
        float64 [n, K].

    Raises:
        ValueError: a record has no crop.
    """
    values, record = np.asarray(values), np.asarray(record)
    n_crops = np.bincount(record, minlength=n_records)
    if len(n_crops) != n_records or (n_crops == 0).any():
        raise ValueError(f"{int((n_crops == 0).sum())} of {n_records} records have no crop to average over")
    order = np.argsort(record, kind="stable")
    sums = np.add.reduceat(values[order].astype(np.float64), np.cumsum(n_crops) - n_crops, axis=0)
    return sums / n_crops[:, None]
