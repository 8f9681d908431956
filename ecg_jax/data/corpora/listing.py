"""What a corpus hands to `prepare`: its sorted recordings and what is known before reading them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

N_FOLDS = 10


@dataclasses.dataclass(frozen=True)
class Entry:
    """One recording to be read.

    Attributes:
      record_id: unique in the corpus.
      file: path relative to SOURCE.
      patient_id, fold, labels, age, sex, values: what the corpus' tables say; None where only the file itself can
        tell.
      problems: found in the tables, reported once the recording is read.
    """

    record_id: str
    file: str
    patient_id: str | None = None
    fold: int | None = None
    labels: dict[str, list[str]] | None = None
    age: float | None = None
    sex: str | None = None
    problems: tuple[Problem, ...] = ()
    # Not in the repr, so that the digest of a corpus without values is what it was before there were any.
    values: dict[str, dict[str, float]] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Listing:
    """All recordings of a corpus below SOURCE.

    Attributes:
      entries: in the order of the store.
      problems: recordings refused before reading, e.g. repeated ids.
      label_sets: names of the label sets a recording may have.
      classes: label set -> class names in order; None if only reading tells.
      descriptions: label set -> class -> text.
      fold_source: one phrase on where folds come from.
      values: value set -> name -> description with its unit; the numbers a record may have (`Entry.values`).
    """

    entries: list[Entry]
    problems: list[Problem]
    label_sets: tuple[str, ...]
    classes: dict[str, list[str]] | None
    descriptions: dict[str, dict[str, str]]
    fold_source: str
    values: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of all entries: tells whether SOURCE still is what it was."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr(entry).encode())
            if entry.values is not None:
                digest.update(repr(entry.values).encode())
        return digest.hexdigest()


def hash_fold(identity: str, n_folds: int = N_FOLDS, first: int = 1) -> int:
    """Fold `first` to `first + n_folds - 1` (1 to 10 unless said) from a patient or record id: the same everywhere
    and whatever the other records are.
    """
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % n_folds + first


HASHED_FOLDS = "SHA-256 of the patient id, or of the record id where no patient is known, into 10 folds"


def find_files(source: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """All files below `source` with one of the suffixes, in sorted order, hidden ones left out.

    Raises:
      UserError: a folder cannot be read, or a file name is not UTF-8.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"Cannot read the folder {error.filename}: {error.strerror}.") from error

    seen = set()
    for folder, subfolders, names in os.walk(source, onerror=fail, followlinks=True):
        # Data often lies behind symbolic links; a folder reached twice (a link to its parent) is read once.
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                path = Path(folder, name)
                try:
                    str(path).encode()
                except UnicodeEncodeError:
                    # It could not be written into the table of records.
                    raise UserError(f"The file name {os.fsencode(path)!r} is not UTF-8; rename it.") from None
                yield path


def drop_repeated(entries: Iterable[Entry]) -> tuple[list[Entry], list[Problem]]:
    """Keeps the first entry of each id; the later ones become problems."""
    kept: dict[str, Entry] = {}
    problems = []
    for entry in entries:
        if entry.record_id in kept:
            first = kept[entry.record_id].file
            detail = f"{entry.file} has the record id of {first}, which is kept."
            problems.append(Problem(entry.record_id, "duplicate_id", "refused", detail))
        else:
            kept[entry.record_id] = entry
    return list(kept.values()), problems
