"""Stores of chosen signals, for tests."""

from pathlib import Path

import numpy as np

from ecg_jax.data.preprocessing import Preprocessing, Processed
from ecg_jax.data.recording import CANONICAL_LEADS, Recording
from ecg_jax.data.store import Store
from ecg_jax.data.writer import PARTIAL, UnitWriter, finalise


def write_store(path: Path, records, corpus: str = "made", rate: float = 240.0) -> Store:
    """Writes a store.

    Args:
      path: folder to write.
      records: (record id, patient id or None, fold, signal [T, 12] int16 microvolts or float millivolts) each.
      corpus: its name.
      rate: samples per second.
    """
    (path / PARTIAL).mkdir(parents=True)
    with UnitWriter(path, 0, corpus) as writer:
        for record_id, patient_id, fold, signal in records:
            signal = np.asarray(signal)
            if signal.dtype != np.int16:
                signal = np.clip(np.rint(1000.0 * signal), -32767, 32767).astype(np.int16)
            recording = Recording(
                record_id, signal / 1000.0, rate, CANONICAL_LEADS, patient_id=patient_id, fold=fold
            )
            absent = ~signal.any(axis=0)
            processed = Processed(
                signal=signal,
                missing=absent,
                derived=np.zeros(12, bool),
                flat=absent,
                saturated=0,
                problems=[],
            )
            writer.append(recording, processed, "")
        writer.finish()
    finalise(
        path,
        n_units=1,
        preprocessing=Preprocessing(rate_hz=rate),
        attributes={"corpus": corpus, "source": "", "fold_source": "the test"},
        label_sets=(),
        classes={},
        descriptions={},
        first_problems=[],
        drop_duplicates=False,
        strict=False,
    )
    return Store(path)
