"""The tables of an institution of HEEDB: who was recorded, diagnoses, duplicates, as columns joined to its files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.corpora.heedb_files import Files
from ecg_jax.data.readers.columns import header_of, read_batches
from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_PUBLISHER = "BDSP"
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


def _keys(names: pa.Array) -> pa.Array:
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
    """Who was recorded in each file, and what is wrong with the table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = layout.people
    columns = {"FileName": "text", "BDSPPatientID": "text", "PatientRace": "text", layout.sex: "text"}
    sexes, races = _Codes(), _Codes()
    keys: list[pa.Array] = []
    parts: list[tuple[np.ndarray, ...]] = []
    absent: dict[str, int] = {}
    for batch in read_batches(path, {**columns, layout.age: "float"}, _PUBLISHER):
        key = _keys(batch.column("FileName"))
        place = files.partition_of(key)
        wanted = pa.array(place >= 0)
        prefix = pc.utf8_slice_codeunits(key.filter(pc.invert(wanted)), 0, len(files.partitions[0]))
        for count in prefix.value_counts().to_pylist():
            partition = count["values"] or ""
            partition = partition if re.fullmatch(layout.partition, partition) else ""
            absent[partition] = absent.get(partition, 0) + count["counts"]
        batch = batch.filter(wanted)
        keys.append(key.filter(wanted))
        parts.append(
            (
                place[place >= 0],
                _patients(path, batch.column("BDSPPatientID")),
                sexes(batch.column(layout.sex)),
                races(batch.column("PatientRace")),
                batch.column(layout.age).to_numpy(zero_copy_only=False) / layout.ages_per_year,
            )
        )
    problems = [
        Problem(
            name_of(partition) if partition else path.name,
            "missing_part",
            "left out",
            f"{n} rows of {path.name} are of this partition, which is not in SOURCE."
            if partition
            else f"{n} rows have a FileName that is no path of a record, e.g. {layout.example}/NAME.",
        )
        for partition, n in sorted(absent.items())
    ]
    place, patient, sex, race, age = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Not a number of years: unknown (spec §1.5).
    age[~(age >= 0)] = np.nan
    rows, first = _join(files, keys, place)
    used = np.zeros(len(first), bool)
    used[rows[rows >= 0]] = True
    # A second row of a recording is not used either, and is no lost file.
    lost = np.bincount(place[~used & (first == np.arange(len(first)))], minlength=len(files.partitions))
    problems += [
        Problem(
            name_of(files.partitions[p]),
            "missing_part",
            "left out",
            f"{lost[p]} recordings of {path.name} have no .hea file in this partition.",
        )
        for p in np.flatnonzero(lost)
    ]
    doubtful = np.isin(rows, _contradictory(first, (patient, sex, race, age)))
    problems += [
        Problem(
            files.names[row].as_py(),
            "contradictory_rows",
            "unknown",
            f"{path.name} has rows for it that contradict each other, so what it says of the recording is taken as "
            "unknown.",
        )
        for row in np.flatnonzero(doubtful).tolist()
    ]
    rows[doubtful] = -1

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


def _join(files: Files, keys: list[pa.Array], place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Files and the rows of a table, one partition after another: an index of eleven million names takes gigabytes.

    Args:
      files: n of them.
      keys: folder and name of each row, in parts; emptied, for their memory is needed.
      place: int16 [m], the partition of each row.

    Returns:
      int64 [n], the first row of each file, -1 where there is none; int64 [m], the first row with the same key.
    """
    import pyarrow as pa

    rows, first = np.full(len(files), -1), np.full(len(place), -1)
    listed = pa.concat_arrays(keys)
    keys.clear()
    order = np.argsort(place, kind="stable")
    limits = np.searchsorted(place[order], np.arange(len(files.partitions) + 1))
    for p, (start, stop) in enumerate(itertools.pairwise(limits.tolist())):
        own = order[start:stop]
        some = listed.take(pa.array(own))
        first[own] = own[rows_in(some, some)]
        begin, end = files.range_of(p)
        found = rows_in(files.keys(begin, end), some)
        rows[begin:end] = np.where(found >= 0, own[found] if len(own) else -1, -1)
    return rows, first


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
            f"{path}: a BDSPPatientID is no whole number: {error}; take the file as {_PUBLISHER} has it."
        ) from error
    return pc.fill_null(numbers, -1).to_numpy(zero_copy_only=False)


def _contradictory(first: np.ndarray, columns) -> np.ndarray:
    """The first rows of recordings that have several rows which differ."""
    again = np.flatnonzero(first != np.arange(len(first)))
    differ = np.zeros(len(again), bool)
    for column in columns:
        a, b = column[again], column[first[again]]
        differ |= (a != b) & ~((a != a) & (b != b))
    return np.unique(first[again[differ]])


def read_diagnoses(layout: Layout, files: Files):
    """(starts [n + 1], codes, classes, problems): indices into `classes`, those of record i from starts[i] on."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = layout.diagnoses
    if not path.is_file():
        detail = f"{path.name} is not there, so no recording has labels."
        problem = Problem(path.name, "missing_part", "left out", detail)
        return np.zeros(len(files) + 1, np.int64), np.empty(0, np.int16), [], [problem]
    keys, lists, places = [], [], []
    for key, codes in _diagnosis_batches(layout):
        if not layout.by_name:
            place = files.partition_of(key)
            key, codes = key.filter(pa.array(place >= 0)), codes.filter(pa.array(place >= 0))
            places.append(place[place >= 0])
        keys.append(key)
        lists.append(codes)
    if layout.by_name:
        rows = rows_in(files.names, pa.chunked_array(keys, pa.large_string()))
    else:
        rows, _ = _join(files, keys, np.concatenate(places))
    chosen = pa.chunked_array(lists).combine_chunks()
    chosen = chosen.take(pa.array(rows, mask=rows < 0))
    lengths = pc.fill_null(pc.list_value_length(chosen), 0).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    encoded = chosen.flatten().dictionary_encode()
    numbers = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(numbers)
    place = np.empty(len(order), np.int16 if len(order) < 2**15 else np.int32)
    place[order] = np.arange(len(order))
    classes = [str(code) for code in numbers[order].tolist()]
    return starts, place[encoded.indices.to_numpy(zero_copy_only=False)], classes, []


def _diagnosis_batches(layout: Layout) -> Iterator[tuple[pa.Array, pa.Array]]:
    """(keys, list<uint32> of each row's codes, each once) in parts.

    Raises:
      UserError: a code is no whole number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {layout.diagnosis_key: "text", layout.diagnosis_codes: "text"}
    for batch in read_batches(layout.diagnoses, columns, _PUBLISHER, layout.delimiter):
        key = batch.column(layout.diagnosis_key)
        cells = pc.split_pattern(batch.column(layout.diagnosis_codes).fill_null(""), ",")
        row = pc.list_parent_indices(cells).to_numpy(zero_copy_only=False)
        texts = pc.utf8_trim_whitespace(cells.flatten())
        there = pc.not_equal(texts, "")
        try:
            codes = texts.filter(there).cast(pa.uint32()).to_numpy(zero_copy_only=False).astype(np.int64)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{layout.diagnoses}: {layout.diagnosis_codes} must be whole numbers separated by commas: {error}; "
                "correct that row."
            ) from error
        # A code that a row repeats counts once.
        pairs = np.sort((row[there.to_numpy(zero_copy_only=False)].astype(np.int64) << 32) + codes)
        pairs = pairs[np.diff(pairs, prepend=-1) != 0]
        starts = np.searchsorted(pairs, np.arange(len(key) + 1, dtype=np.int64) << 32)
        lists = pa.ListArray.from_arrays(
            pa.array(starts, pa.int32()), pa.array((pairs & 0xFFFFFFFF).astype(np.uint32))
        )
        yield stems(key) if layout.by_name else _keys(key), lists


def read_meanings(layout: Layout, classes: list[str]) -> dict[str, str]:
    """Code -> its meaning, as far as the dictionary of the version has it."""
    if layout.dictionary is None or not layout.dictionary.is_file():
        return {}
    found = {}
    for batch in read_batches(layout.dictionary, {"codes": "text", "diagnoses": "text"}, _PUBLISHER):
        for row in batch.to_pylist():
            found[(row["codes"] or "").strip()] = row["diagnoses"] or ""
    return {code: found[code] for code in classes if code in found}


def sex_column(path: Path) -> str:
    """What the table of recordings calls the column of the sex: SexDSC (I0001) or Sex (I0006)."""
    header = header_of(path, _PUBLISHER)
    return "SexDSC" if "SexDSC" in header else "Sex"


def read_duplicates(path: Path) -> pa.ChunkedArray:
    """Names of the recordings that the list of duplicates has, large text."""
    import pyarrow as pa

    batches = read_batches(path, {"file_name": "text"}, _PUBLISHER)
    return pa.chunked_array([stems(batch.column("file_name")) for batch in batches], pa.large_string())
