"""Where crops start."""

import numpy as np


def non_overlapping_crops(lengths, offsets, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the crops of some records start.

    Args:
        lengths: int [n], samples of each record.
        offsets: int [n], first sample of each record in the store (zeros for starts within the record).
        window: samples of a crop.

    Returns:
        (starts, record): int64 [n_crops] each; starts are offsets + 0, window, 2 window, ...; record is the
        index into `lengths`. Records shorter than a window do not occur.

    Raises:
        ValueError: window below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window} samples, it must be at least 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    n_crops = lengths // window
    record = np.repeat(np.arange(len(lengths)), n_crops)
    within = np.arange(n_crops.sum()) - np.repeat(np.cumsum(n_crops) - n_crops, n_crops)
    return np.asarray(offsets, dtype=np.int64)[record] + within * window, record
