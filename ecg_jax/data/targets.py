"""Offline targets: one label for every token of a store, made once by `ecg-jax cluster`, read by the pipeline.

    STORE/targets/NAME/labels.npy      int16 [N], -1 where there is no label
    STORE/targets/NAME/centroids.npy   float32 [K, F], what the labels number
    STORE/targets/NAME/meta.json       what the labels were made from, counts and fingerprints

A token is two samples. Labels lie on the store's own sample axis: label j belongs to the samples 2j and 2j+1 of
`signal`, so token i of a crop that begins at sample s has label s//2 + i. Records may begin at odd samples;
a pair of samples that two records share belongs to the second one, whose first token it is. The record
[o, e) therefore owns exactly the labels o//2 .. e//2 - 1, and a token that reaches beyond them has none.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.files import lock

FOLDER = "targets"
TOKEN_SAMPLES = 2
NO_LABEL = -1
MAX_CODES = 2**15  # labels are int16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BLOCK = 2**24  # labels handled at once where all of them are gone through, 32 MB


def label_range(offsets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which labels records own: int64 [n] first ones and [n] one past the last ones.

    Args:
        offsets, lengths: int64 [n], samples.
    """
    return offsets // TOKEN_SAMPLES, (offsets + lengths) // TOKEN_SAMPLES


class Windows(NamedTuple):
    """Windows of records and which labels are taken from each; int64 [n] each.

    Every label that a record owns is taken from exactly one window, so none is written twice.
    """

    starts: np.ndarray
    """First sample in the store."""
    first: np.ndarray
    """First label taken."""
    last: np.ndarray
    """One past the last label taken."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How records are cut into windows whose tokens are described together.

    Attributes:
        window: T, samples of a window.
        stride: samples between consecutive windows of a record; the last one ends with the record.
        skipped: tokens of a window before the first that is described.
        tokens: M, tokens that are described, consecutive.
    """

    window: int
    stride: int
    skipped: int
    tokens: int

    def count(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [n] windows of records of these lengths; 0 for one shorter than a window."""
        return np.where(lengths >= self.window, 1 - (self.window - lengths) // self.stride, 0)

    def start(self, offsets: np.ndarray, lengths: np.ndarray, number: np.ndarray) -> np.ndarray:
        """First sample in the store of window `number` of a record; all int64 [n]."""
        return offsets + np.minimum(number * self.stride, lengths - self.window)

    def first_token(self, starts: np.ndarray) -> np.ndarray:
        """Label of the first token that is described in windows with these starts; int64 [n]."""
        return starts // TOKEN_SAMPLES + self.skipped

    def windows(self, offsets: np.ndarray, lengths: np.ndarray) -> Windows:
        """All windows of records, in order; where two overlap, the earlier one labels what they share.

        Args:
            offsets, lengths: int64 [n], samples.
        """
        n_windows = self.count(lengths)
        record = np.repeat(np.arange(len(lengths)), n_windows)
        number = np.arange(len(record)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        starts = self.start(offsets[record], lengths[record], number)
        owned_first, owned_last = label_range(offsets[record], lengths[record])
        described = self.first_token(starts) + self.tokens
        first = np.where(number == 0, owned_first, np.roll(described, 1))
        last = np.where(number == n_windows[record] - 1, owned_last, described)
        return Windows(starts, first, last)


def check_name(name: str) -> None:
    """Refuses names that would not make a plain folder.

    Raises:
        UserError: says what a name may hold.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a set of targets: a name has up to 64 letters, digits, dots, dashes and "
            "underscores, and begins with a letter or digit."
        )


def _fingerprint(meta: dict) -> str:
    """SHA-256 over what a run sees of a set of targets: store, number of codes, labels."""
    parts = (meta["store_fingerprint"], str(meta["codes"]), meta["labels_sha256"])
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class TargetsWriter:
    """Writes one set of targets under a hidden name and renames it when it is complete.

    `with TargetsWriter(store, name) as writer:` fill `writer.labels` (int16 [N], all -1 at first, a memory map),
    then `writer.finish(...)`. Leaving without `finish` removes everything; what a killed process leaves is removed
    by the next writer of the same name.
    """

    def __init__(self, store: Store, name: str):
        """Writes nothing yet.

        Raises:
            UserError: the name cannot be one, or the set exists.
        """
        check_name(name)
        self._store = store
        self.path = store.path / FOLDER / name
        self._temporary = store.path / FOLDER / f".{name}.partial"
        self._check_new()

    def __enter__(self) -> "TargetsWriter":
        """Creates the files.

        Raises:
            UserError: another process writes the set or has written it, or the disk is full or not writable.
        """
        with _write_errors(self._temporary):
            self._temporary.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._temporary / "lock", "w")
        try:
            lock(self._lock, f"Another `ecg-jax cluster` is writing {self.path} now.")
        except UserError:
            self._lock.close()
            raise
        try:
            self._check_new()
            with _write_errors(self._temporary):
                self._create_labels()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        # The folder is gone when `finish` has renamed it.
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._lock.close()

    def _check_new(self) -> None:
        if os.path.lexists(self.path):
            raise UserError(f"{self.path} exists; choose another --name or remove that folder first.")

    def _create_labels(self) -> None:
        offsets, lengths = self._store.column("offset"), self._store.column("length")
        n = int(label_range(offsets, lengths)[1].max())
        file = self._temporary / "labels.npy"
        file.unlink(missing_ok=True)
        self.labels = np.lib.format.open_memmap(file, "w+", np.dtype("<i2"), (n,))
        # A memory map of a sparse file on a full disk ends the process without a word.
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        for first in range(0, n, _BLOCK):
            self.labels[first : first + _BLOCK] = NO_LABEL

    def finish(self, centroids: np.ndarray, meta: dict) -> dict:
        """Puts the set in place.

        Args:
            centroids: float32 [K, F].
            meta: JSON-able, what the labels were made from.

        Returns:
            meta with what is added here: codes, the counts of each code, fingerprints.

        Raises:
            UserError: the disk is full or not writable.
        """
        counts, digest = np.zeros(len(centroids) + 1, np.int64), hashlib.sha256()
        for first in range(0, len(self.labels), _BLOCK):
            block = np.asarray(self.labels[first : first + _BLOCK])
            counts += np.bincount(block.astype(np.int64) + 1, minlength=len(counts))
            digest.update(block)
        meta = meta | {
            "codes": len(centroids),
            "token_samples": TOKEN_SAMPLES,
            "tokens": len(self.labels),
            "tokens_without_label": int(counts[0]),
            "counts": counts[1:].tolist(),
            "store_fingerprint": self._store.fingerprint,
            "labels_sha256": digest.hexdigest(),
            "centroids_sha256": _digest(centroids),
        }
        meta["fingerprint"] = _fingerprint(meta)
        with _write_errors(self._temporary):
            self.labels.flush()
            with open(self._temporary / "centroids.npy", "wb") as file:
                np.save(file, centroids.astype("<f4"))
                file.flush()
                os.fsync(file.fileno())
            with open(self._temporary / "meta.json", "w") as file:
                file.write(json.dumps(meta, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._temporary.rename(self.path)
            # Last, so that nobody could take the folder for an abandoned one before it was renamed.
            (self.path / "lock").unlink()
        return meta


def _digest(centroids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(centroids, "<f4").data).hexdigest()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}; free some space or make the store's folder writable, and "
            "run the same command again."
        ) from error


class Targets:
    """A complete set of targets, opened for reading. Safe to share between threads.

    Attributes:
        path: its folder.
        codes: K; labels are 0 .. K-1.
        fingerprint: SHA-256 over store, K and labels: two sets with the same fingerprint train the same.
        meta: all of meta.json.
        centroids: float32 [K, F].
    """

    def __init__(self, store: Store, name: str):
        """Opens STORE/targets/NAME.

        Raises:
            UserError: there is no such set, it belongs to another content of the store, or a file of it is missing
                or damaged.
        """
        check_name(name)
        self.path = store.path / FOLDER / name
        if not self.path.is_dir():
            found = ", ".join(names(store)) or "none yet"
            raise UserError(
                f"The store {store.path} has no targets {name!r} (there are: {found}); make them with `ecg-jax "
                f"cluster --store={store.path} --name={name}`."
            )
        offsets, lengths = store.column("offset"), store.column("length")
        _, last = label_range(offsets, lengths)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            self.codes: int = self.meta["codes"]
            self.fingerprint: str = self.meta["fingerprint"]
            if self.fingerprint != _fingerprint(self.meta) or self.meta["token_samples"] != TOKEN_SAMPLES:
                raise ValueError("meta.json contradicts itself")
            other_store = self.meta["store_fingerprint"] != store.fingerprint
            labels = np.lib.format.open_memmap(self.path / "labels.npy", "r")
            self.centroids = np.array(np.lib.format.open_memmap(self.path / "centroids.npy", "r"))
            if labels.dtype != np.int16 or labels.shape != (self.meta["tokens"],):
                raise ValueError("labels.npy is not what meta.json says")
            if len(self.centroids) != self.codes or _digest(self.centroids) != self.meta["centroids_sha256"]:
                raise ValueError("centroids.npy is not what meta.json says")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"The targets {self.path} are damaged ({reason}); remove that folder and run `ecg-jax cluster` again."
            ) from error
        if other_store or len(labels) != last.max():
            raise UserError(
                f"The targets {self.path} were made from another content of the store than {store.path} has now; "
                "make them anew under another name."
            )
        self._labels = np.asarray(labels)  # still the memory map, without the cost of its class
        self._offsets, self._ends, self._last = offsets, offsets + lengths, last

    def verify(self) -> None:
        """Reads all labels and compares them with the fingerprint; a few seconds for every 10 GB.

        Raises:
            UserError: the labels are not those that were written.
        """
        digest = hashlib.sha256()
        for first in range(0, len(self._labels), _BLOCK):
            digest.update(np.ascontiguousarray(self._labels[first : first + _BLOCK]))
        if digest.hexdigest() != self.meta["labels_sha256"]:
            raise UserError(
                f"The targets {self.path} are damaged (labels.npy is not what was written); remove that folder and run "
                "`ecg-jax cluster` again."
            )

    def __repr__(self) -> str:
        return f"Targets({str(self.path)!r}, {self.codes} codes)"

    def read(self, starts: np.ndarray, tokens: int) -> np.ndarray:
        """Labels of the tokens of crops.

        Args:
            starts: int64 [B], first sample of each crop in the whole `signal` array, as `Store.read_crops`.
            tokens: L, tokens of each crop.

        Returns:
            int16 [B, L]; -1 where the crop's record has no label.

        Raises:
            ValueError: a crop begins outside every record.
            UserError: the file holds labels that no code has.
        """
        starts = np.asarray(starts, np.int64)
        row = np.searchsorted(self._offsets, starts, side="right") - 1
        if (row < 0).any() or (starts >= self._ends[row]).any():
            raise ValueError("a crop begins outside every record of the store")
        index = starts[:, None] // TOKEN_SAMPLES + np.arange(tokens)
        labels = self._labels[np.minimum(index, len(self._labels) - 1)]
        labels[index >= self._last[row, None]] = NO_LABEL
        if labels.size and (labels.max() >= self.codes or labels.min() < NO_LABEL):
            raise UserError(
                f"The targets {self.path} are damaged (labels.npy holds a label that is none of the {self.codes} codes)"
                "; remove that folder and run `ecg-jax cluster` again."
            )
        return labels


def names(store: Store) -> list[str]:
    """Names of the complete sets of targets of a store, in alphabetical order."""
    folder = store.path / FOLDER
    return (
        sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))
        if folder.is_dir()
        else []
    )
