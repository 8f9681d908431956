"""Labels and numbers of a store as targets, made for the records that are asked for only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError

#: Values of a regression outside these quantiles of the training records are left out (spec §7.5).
TRIMMED_QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class LabelLists:
    """The label lists of n records as numbers: of MIMIC-IV-ECG's diagnoses 4 bytes each instead of a Python string."""

    names: list[str]
    """The labels that occur."""
    starts: np.ndarray
    """int64 [n + 1], where a record's labels lie in `codes`."""
    codes: np.ndarray
    """int32, indices into `names`."""
    known: np.ndarray
    """bool [n]: whether the record's labels are known. A null is an unknown list, an empty list says "none"."""

    @classmethod
    def from_arrow(cls, column) -> LabelLists:
        """From a `pyarrow` array of lists of strings."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        encoded = pc.list_flatten(column).dictionary_encode()
        return cls(
            names=encoded.dictionary.to_pylist(),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            codes=encoded.indices.to_numpy(zero_copy_only=False),
            known=column.is_valid().to_numpy(zero_copy_only=False),
        )

    @classmethod
    def of_store(cls, store: Store, label_set: str) -> LabelLists:
        """Those of column `labels_<label_set>`."""
        with _open_records(store) as file:
            return cls.from_arrow(file.read([f"labels_{label_set}"]).column(0).combine_chunks())

    def __len__(self) -> int:
        return len(self.known)

    @property
    def labelled(self) -> np.ndarray:
        """bool [n]: records with at least one label."""
        return np.diff(self.starts) > 0

    def of(self, rows: np.ndarray) -> list[list[str]]:
        """The names of some records' labels, [] where unknown."""
        return [[self.names[c] for c in self.codes[self.starts[i] : self.starts[i + 1]]] for i in rows]

    def _hits(self, rows: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(index into rows, index into classes) of every label of these records that is a class, repeated or not."""
        column = np.full(len(self.names), -1)
        index = {name: c for c, name in enumerate(self.names)}
        for k, name in enumerate(classes):
            if name in index:
                column[index[name]] = k
        lengths = np.diff(self.starts)[rows]
        before = np.cumsum(lengths) - lengths
        entries = np.repeat(self.starts[rows] - before, lengths) + np.arange(lengths.sum())
        hit = column[self.codes[entries]]
        return np.repeat(np.arange(len(rows)), lengths)[hit >= 0], hit[hit >= 0]

    def counts(self, rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """int64 [K]: how many of these records have each class."""
        record, hit = self._hits(rows, classes)
        pairs = np.unique(record * len(classes) + hit)  # a list may name a label twice
        return np.bincount(pairs % max(len(classes), 1), minlength=len(classes))

    def matrix(self, rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """float32 [len(rows), K] of 0 and 1; unknown lists and labels outside `classes` are 0."""
        targets = np.zeros((len(rows), len(classes)), dtype=np.float32)
        targets[self._hits(rows, classes)] = 1.0
        return targets


def _open_records(store: Store):
    """records.parquet as a `pyarrow.parquet.ParquetFile`: columns of it are read without the others.

    Raises:
        UserError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    path = store.path / "records.parquet"
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path}: the file is missing or damaged; prepare the store anew."
        ) from error


def known_value_sets(store: Store) -> list[str]:
    """The value sets of which at least one number is known, in order of `store.values`.

    A corpus declares all it may have; those whose table was not there are unknown throughout. The null counts in the
    footer of records.parquet tell, so no column is read.
    """
    with _open_records(store) as file:
        known = set()
        for group in range(file.metadata.num_row_groups):
            row_group = file.metadata.row_group(group)
            for column in map(row_group.column, range(row_group.num_columns)):
                # `num_values` are those that are not null.
                if column.statistics is None or column.statistics.num_values:
                    known.add(column.path_in_schema.split(".")[0])
    return [name for name in store.values if f"values_{name}" in known]


def _as_lists(labels: Sequence[Sequence[str] | None]) -> LabelLists:
    import pyarrow as pa

    plain = [None if names is None else list(names) for names in labels]
    return LabelLists.from_arrow(pa.array(plain, pa.list_(pa.string())))


def target_matrix(labels: Sequence[Sequence[str] | None], classes: Sequence[str]) -> np.ndarray:
    """Binary targets from lists of labels.

    Args:
        labels: n lists of class names; None counts as an empty list. Names outside `classes` are ignored.
        classes: K names.

    Returns:
        float32 [n, K] of 0 and 1.
    """
    return _as_lists(labels).matrix(np.arange(len(labels)), classes)


def is_labelled(labels: Sequence[Sequence[str] | None]) -> np.ndarray:
    """bool [n]: records with at least one label of the set."""
    return _as_lists(labels).labelled


def standardised(parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Targets of a regression as z-scores of the training targets (spec §7.5).

    Args:
        parts: [n, K] of training, validation and test records, NaN unknown.

    Returns:
        (the parts in standard deviations from the mean of the training targets, NaN where unknown or outside the 1 to
        99 % quantiles of the training targets; (mean, standard deviation), float64 [K], of what is left of those).
    """
    train = np.asarray(parts[0], dtype=np.float64)
    # Of fewer than a hundred values none is trimmed.
    low = np.nanquantile(train, TRIMMED_QUANTILES[0], axis=0, method="lower")
    high = np.nanquantile(train, TRIMMED_QUANTILES[1], axis=0, method="higher")
    trimmed = [np.where((part >= low) & (part <= high), part, np.nan) for part in parts]
    mean, sd = np.nanmean(trimmed[0], axis=0), np.nanstd(trimmed[0], axis=0)
    sd = np.where(sd > 0, sd, 1.0)
    return [((part - mean) / sd).astype(np.float32) for part in trimmed], (mean, sd)
