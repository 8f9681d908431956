"""What a corpus hands to `prepare`: its sorted recordings and what is known before reading them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

N_FOLDS = 10

# Entries made, or rows hashed, at a time.
_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class Entry:
    """One recording to be read.

    Attributes:
      record_id: unique in the corpus.
      file: path relative to SOURCE.
      patient_id, fold, labels, age, sex, values: what the corpus' tables say; None where only the file itself can
        tell. The labels of a set are None where they are unknown, which is not "none of them".
      problems: found in the tables, reported once the recording is read.
    """

    record_id: str
    file: str
    patient_id: str | None = None
    fold: int | None = None
    labels: dict[str, list[str] | None] | None = None
    age: float | None = None
    sex: str | None = None
    problems: tuple[Problem, ...] = ()
    # Not in the repr, so that the digest of a corpus without values is what it was before there were any.
    values: dict[str, dict[str, float]] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class EntryTable(Sequence[Entry]):
    """Millions of entries as columns: an `Entry` is made when it is asked for, and a slice is a table again.

    The eleven million recordings of HEEDB take about a gigabyte as columns, and thirty as objects. A slice copies
    nothing, and pickled it takes its own rows with it only.

    Attributes:
      table: n rows. `record_id`; `folder` and `file`, both optional: a recording's file is folder + file + suffix, with
        the record id in place of `file` where there is no such column; `patient_id` (text or integers), `fold`, `age`,
        `sex`, all optional, null where unknown; `labels_NAME`: list of indices into `label_names[NAME]`, a null list
        where they are unknown; `values_NAME`: list of numbers in the order of `value_names[NAME]`,
        null or NaN where unknown.
      suffix: ends the name of every file.
      label_names: label set -> classes.
      value_names: value set -> names of the numbers.
    """

    table: pa.Table
    suffix: str = ""
    label_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    value_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index):
        """The entry at an index; for a slice of step 1 an `EntryTable`."""
        if not isinstance(index, slice):
            row = range(len(self))[index]
            return self[row : row + 1]._made()[0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"an EntryTable takes slices of step 1, not {step}")
        return dataclasses.replace(self, table=self.table.slice(start, max(stop - start, 0)))

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]._made()

    def __reduce__(self):
        """Pickled as Arrow's stream, which holds the rows of a slice and not the buffers behind them."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            # One batch: dictionaries that change from chunk to chunk would be written again and again.
            writer.write_table(self.table.combine_chunks())
        data = sink.getvalue().to_pybytes()
        return _read_table, (data, self.suffix, self.label_names, self.value_names)

    def _made(self) -> list[Entry]:
        """All entries as objects."""
        n, names = len(self), set(self.table.column_names)
        cells = {name: self.table.column(name).to_pylist() for name in names}
        nothing = [None] * n
        stems = cells["file"] if "file" in names else cells["record_id"]
        folders = cells["folder"] if "folder" in names else [""] * n
        patients = cells["patient_id"] if "patient_id" in names else nothing
        fold, age, sex = (cells[name] if name in names else nothing for name in ("fold", "age", "sex"))
        made = []
        for i in range(n):
            labels, values = {}, {}
            for name, classes in self.label_names.items():
                codes = cells[f"labels_{name}"][i]
                labels[name] = None if codes is None else [classes[code] for code in codes]
            for name, numbers in self.value_names.items():
                row = zip(numbers, cells[f"values_{name}"][i] or (), strict=False)
                known = {key: x for key, x in row if x is not None and x == x}
                if known:
                    values[name] = known
            made.append(
                Entry(
                    record_id=cells["record_id"][i],
                    file=f"{folders[i]}{stems[i]}{self.suffix}",
                    patient_id=None if patients[i] is None else str(patients[i]),
                    fold=fold[i],
                    labels=labels,
                    age=age[i],
                    sex=sex[i],
                    values=values if self.value_names else None,
                )
            )
        return made

    def digest(self) -> str:
        """SHA-256 of all columns, the same for any cut of them into chunks."""
        digest = hashlib.sha256(repr((self.suffix, sorted(self.table.column_names))).encode())
        for names in (self.label_names, self.value_names):
            digest.update(repr([(name, list(texts)) for name, texts in names.items()]).encode())
        for name in sorted(self.table.column_names):
            column = self.table.column(name)
            for start in range(0, len(column), _BLOCK):
                for part in _plain(column.slice(start, _BLOCK).combine_chunks()):
                    digest.update(part)
        return digest.hexdigest()


def _read_table(data: bytes, *rest) -> EntryTable:
    """The table `EntryTable.__reduce__` wrote."""
    import pyarrow as pa

    return EntryTable(pa.ipc.open_stream(data).read_all(), *rest)


def _plain(array: pa.Array) -> Iterator[bytes]:
    """The content of an array as bytes that do not depend on how Arrow holds it: validity, lengths, values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _plain(array.cast(kind.value_type))
        return
    yield array.is_valid().to_numpy(zero_copy_only=False).tobytes()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        yield from _plain(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        yield "".join(array.fill_null("").to_pylist()).encode()
    else:
        yield array.fill_null(0).to_numpy(zero_copy_only=False).tobytes()


@dataclasses.dataclass(frozen=True)
class Listing:
    """All recordings of a corpus below SOURCE.

    Attributes:
      entries: in the order of the store; a list, or an `EntryTable` where there are millions.
      problems: recordings refused before reading, e.g. repeated ids.
      label_sets: names of the label sets a recording may have.
      classes: label set -> class names in order; None if only reading tells.
      descriptions: label set -> class -> text.
      fold_source: one phrase on where folds come from.
      values: value set -> name -> description with its unit; the numbers a record may have (`Entry.values`).
    """

    entries: Sequence[Entry]
    problems: list[Problem]
    label_sets: tuple[str, ...]
    classes: dict[str, list[str]] | None
    descriptions: dict[str, dict[str, str]]
    fold_source: str
    values: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of all entries: tells whether SOURCE still is what it was."""
        if isinstance(self.entries, EntryTable):
            return self.entries.digest()
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
