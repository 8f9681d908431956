"""What every way of probing returns."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fitted:
    """What one probe predicts for the validation and test records."""

    val: np.ndarray
    """float64 [n_val, K]: probabilities, of a regression z-scores; averaged over the crops of a record."""
    test: np.ndarray
    """float64 [n_test, K]."""
    report: dict
    """JSON-able: what was chosen, and how."""
