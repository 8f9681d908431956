"""Which folds of a store are held out."""

from collections.abc import Sequence

import numpy as np


def highest_folds(folds: Sequence[int | None], n: int) -> np.ndarray:
    """The `n` highest fold numbers that occur, of which the last is what probes test on.

    Args:
        folds: fold of each record. Negative ones (recordings that a corpus' table does not know) and None are no folds:
            such records may be trained on only.
        n: how many, at least 0.

    Returns:
        ascending; fewer than n where fewer occur.
    """
    folds = np.asarray(folds)
    if folds.dtype == object:
        folds = np.array([-1 if fold is None else fold for fold in folds], dtype=np.int64)
    numbers = np.unique(folds[folds >= 0])
    return numbers[max(len(numbers) - n, 0) :]
