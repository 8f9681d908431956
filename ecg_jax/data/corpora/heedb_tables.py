"""The tables of an institution of HEEDB: who was recorded, duplicates, and joining rows to files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.corpora.heedb_files import Files, per_partition
from ecg_jax.data.readers.columns import header_of, read_batches
from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PUBLISHER = "BDSP"
# Names a FileName may begin with that say nothing: "./S0001/...", "/S0001/...", "WFDB/2010/...".
_LEADING = r"^\.?/?(WFDB/)?"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one institution's files lie, and what its tables are called and hold.

    Attributes:
      wfdb: folder of the records below SOURCE, e.g. "ECG/WFDB".
      partition: below `wfdb`, of what form the folder of a partition is, e.g. `S\\d{4}/\\d{4}`.
      example: such a folder, for messages.
      people: table of the recordings: FileName, BDSPPatientID, PatientRace, sex and age.
      sex, age: names of two of its columns.
      ages_per_year: what its ages are in: 1 (years) or 365.25 (days).
      diagnoses: table of diagnostic codes; it may be absent.
      diagnosis_key, diagnosis_codes, delimiter: its two columns, and what stands between them.
      by_name: its rows name a recording without its folder.
      duplicates: table of recordings to leave out, column file_name; None for a version that has none.
      dictionary: table of the codes' meanings, columns codes and diagnoses; None for a version that has none.
    """

    wfdb: str
    partition: str
    example: str
    people: Path
    sex: str
    age: str
    ages_per_year: float
    diagnoses: Path
    diagnosis_key: str
    diagnosis_codes: str
    delimiter: str
    by_name: bool
    duplicates: Path | None
    dictionary: Path | None


@dataclasses.dataclass(frozen=True)
class People:
    """What the table says of n recordings; -1 or NaN where it says nothing, `row` -1 where it has no row."""

    row: np.ndarray
    patient: np.ndarray
    sex: np.ndarray
    sexes: list[str]
    race: np.ndarray
    age: np.ndarray


def keys_of(names: pa.Array) -> pa.Array:
    """Folder and name from a FileName, e.g. "S0001/1987/04/de_1" from "/S0001/1987/04/de_1.hea"."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pc.replace_substring_regex(names, pattern=_LEADING, replacement="")
    return pc.replace_substring_regex(names, pattern=r"\.hea$", replacement="").cast(pa.large_string())


def stems(names: pa.Array) -> pa.Array:
    """The name alone, without folders and suffix."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pc.replace_substring_regex(names, pattern=r"^.*/", replacement="")
    return pc.replace_substring_regex(names, pattern=r"\.(hea|mat|dat)$", replacement="").cast(
        pa.large_string()
    )


class _Codes:
    """Numbers for the few texts of a column, in order of appearance; -1 for an empty cell."""

    def __init__(self):
        self.texts: list[str] = []

    def __call__(self, column: pa.Array) -> np.ndarray:
        """int16 [m]."""
        import pyarrow.compute as pc

        encoded = column.dictionary_encode()
        places = []
        for text in encoded.dictionary.to_pylist():
            if text not in self.texts:
                self.texts.append(text)
            places.append(self.texts.index(text))
        places.append(-1)
        indices = pc.fill_null(encoded.indices, len(places) - 1).to_numpy(zero_copy_only=False)
        return np.array(places, np.int16)[indices]


def read_people(layout: Layout, files: Files, name_of: Callable[[str], str]) -> tuple[People, list[Problem]]:
    """Who was recorded in each file, and what is wrong with the table.

    Raises:
      UserError: it cannot be read, is another one, or none of its rows is of a file here.
    """
    path = layout.people
    columns = {"FileName": "text", "BDSPPatientID": "text", "PatientRace": "text", layout.sex: "text"}
    sexes, races = _Codes(), _Codes()
    table = TableRows(path, files, layout.partition)
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in read_batches(path, {**columns, layout.age: "float"}, PUBLISHER):
        batch = batch.filter(table.add(keys_of(batch.column("FileName"))))
        parts.append(
            (
                _patients(path, batch.column("BDSPPatientID")),
                sexes(batch.column(layout.sex)),
                races(batch.column("PatientRace")),
                batch.column(layout.age).to_numpy(zero_copy_only=False) / layout.ages_per_year,
            )
        )
    patient, sex, race, age = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Not a number of years: unknown (spec §1.5).
    age[~(age >= 0)] = np.nan
    of = table.join()
    rows = first_rows(of, len(files))
    # Several rows of a recording that differ: none of them counts.
    again = np.flatnonzero((of >= 0) & (rows[of] != np.arange(len(of))))
    differ = np.zeros(len(again), bool)
    for column in (patient, sex, race, age):
        a, b = column[again], column[rows[of[again]]]
        differ |= (a != b) & ~((a != a) & (b != b))
    doubtful = np.zeros(len(files), bool)
    doubtful[of[again[differ]]] = True
    rows[doubtful] = -1
    text = f"{path.name} has rows for {{n}} recordings that contradict each other; what it says of them is not used."
    problems = table.problems(name_of)
    problems += per_partition(files, doubtful, name_of, "contradictory_rows", "unknown", text)

    def of_files(column: np.ndarray, unknown) -> np.ndarray:
        found = np.full(len(files), unknown, column.dtype)
        found[rows >= 0] = column[rows[rows >= 0]]
        return found

    people = People(
        rows.astype(np.int32),
        of_files(patient, -1),
        of_files(sex, -1),
        sexes.texts,
        of_files(race, -1),
        of_files(age, np.nan),
    )
    return people, problems


def rows_in(keys: pa.Array, table: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: the first row of a table with each key, -1 where it has none."""
    import pyarrow.compute as pc

    found = pc.fill_null(pc.index_in(keys, value_set=table), -1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


def first_rows(of: np.ndarray, n: int) -> np.ndarray:
    """int64 [n]: the first of the rows that are of each of n files, -1 for none; `of` is the file of each row or -1."""
    rows = np.full(n, -1)
    there = np.flatnonzero(of >= 0)[::-1]
    # Of several rows the one assigned last stays.
    rows[of[there]] = there
    return rows


class TableRows:
    """Which file each row of a table is of, and how many rows are of none; the table is read in parts.

    Args:
      path: the table.
      files: those in SOURCE.
      partition: `Layout.partition`; "" for a table that names a recording without its folder.
      or_else: what else a user may do about a table that does not fit.
    """

    def __init__(self, path: Path, files: Files, partition: str, or_else: str = ""):
        self._path, self._files, self._partition, self._or_else = path, files, partition, or_else
        self._example: str | None = None
        self._keys: list[pa.Array] = []
        self._places: list[np.ndarray] = []
        self._absent: Counter[str] = Counter()
        self._lost = np.zeros(len(files.partitions), np.int64)

    def add(self, keys: pa.Array) -> pa.Array:
        """Takes the names in the next part; returns which rows, bool [m], may be of a file here. The others count as
        rows of no file.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._example is None and len(keys):
            self._example = keys[0].as_py()
        if not self._partition:
            self._keys.append(keys)
            return pa.array(np.ones(len(keys), bool))
        place = self._files.partition_of(keys)
        here = pa.array(place >= 0)
        prefix = pc.utf8_slice_codeunits(keys.filter(pc.invert(here)), 0, len(self._files.partitions[0]))
        for count in prefix.value_counts().to_pylist():
            partition = count["values"] or ""
            self._absent[partition if re.fullmatch(self._partition, partition) else ""] += count["counts"]
        self._keys.append(keys.filter(here))
        self._places.append(place[place >= 0])
        return here

    def join(self) -> np.ndarray:
        """int64 [m]: the file of each row that may have one, -1 for none.

        Raises:
          UserError: no row is of a file here.
        """
        of = self._join_by_partition() if self._partition else self._join_by_name()
        if not (of >= 0).any():
            rows = (
                "it has no rows" if self._example is None else f"its rows are of {self._example} and others"
            )
            raise UserError(
                f"{self._path} fits no recording in SOURCE: {rows}, the files are {self._files.keys(0, 1)[0]} and "
                f"others; take the file as {PUBLISHER} has it{self._or_else}."
            )
        return of

    def _join_by_name(self) -> np.ndarray:
        import pyarrow as pa

        of = rows_in(pa.chunked_array(self._keys, pa.large_string()), self._files.names)
        self._absent[""] += int((of < 0).sum())
        return of

    def _join_by_partition(self) -> np.ndarray:
        import pyarrow as pa

        keys, place = pa.concat_arrays(self._keys), np.concatenate(self._places)
        # Its memory is needed.
        self._keys.clear()
        of = np.full(len(keys), -1)
        order = np.argsort(place, kind="stable")
        limits = np.searchsorted(place[order], np.arange(len(self._files.partitions) + 1))
        # One partition after another: an index of eleven million names takes gigabytes.
        for p, (start, stop) in enumerate(itertools.pairwise(limits.tolist())):
            begin, end = self._files.range_of(p)
            own = order[start:stop]
            found = rows_in(keys.take(pa.array(own)), self._files.keys(begin, end))
            of[own] = np.where(found >= 0, begin + found, -1)
        self._lost = np.bincount(place[of < 0], minlength=len(self._files.partitions))
        return of

    def problems(self, name_of: Callable[[str], str]) -> list[Problem]:
        """The rows of no file, one problem for each partition, after `join`."""
        table = self._path.name
        told = [
            (name_of(partition), f"{n} rows of {table} are of this partition, which is not in SOURCE.")
            if partition
            else (table, f"{n} rows of {table} are of no recording in SOURCE.")
            for partition, n in sorted(self._absent.items())
            if n
        ]
        for p in np.flatnonzero(self._lost):
            detail = f"{self._lost[p]} rows of {table} have no .hea file in this partition."
            told.append((name_of(self._files.partitions[p]), detail))
        return [Problem(record, "missing_part", "left out", detail) for record, detail in told]


def _patients(path: Path, column: pa.Array) -> np.ndarray:
    """int64 [m] patients, -1 for none; pandas writes 179020000.0 where a column has gaps.

    Raises:
      UserError: a patient that is no whole number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), pattern=r"\.0$", replacement="")
    text = pc.if_else(pc.is_in(text, pa.array(["", "nan"])), pa.scalar(None, pa.string()), text)
    try:
        numbers = text.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: a BDSPPatientID is no whole number: {error}; take the file as {PUBLISHER} has it."
        ) from error
    return pc.fill_null(numbers, -1).to_numpy(zero_copy_only=False)


def sex_column(path: Path) -> str:
    """What the table of recordings calls the column of the sex: SexDSC (I0001) or Sex (I0006)."""
    header = header_of(path, PUBLISHER)
    return "SexDSC" if "SexDSC" in header else "Sex"


def read_duplicates(path: Path) -> pa.Array:
    """Names of the recordings that the list of duplicates has, each once, large text."""
    import pyarrow as pa

    batches = read_batches(path, {"file_name": "text"}, PUBLISHER)
    names = pa.chunked_array([stems(batch.column("file_name")) for batch in batches], pa.large_string())
    return names.unique().drop_null()


def any_listed(layout: Layout, names: pa.Array) -> bool:
    """Whether the table of recordings, which may be of more partitions than are in SOURCE, has any of these names."""
    import pyarrow.compute as pc

    batches = read_batches(layout.people, {"FileName": "text"}, PUBLISHER)
    return any(
        pc.any(pc.is_in(stems(batch.column("FileName")), value_set=names)).as_py() for batch in batches
    )
