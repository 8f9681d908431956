"""Listing an institution of HEEDB: its files, who was recorded, diagnoses, duplicates and folds, as columns.

Eleven million rows never become Python objects: names are Arrow text, everything else numbers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.corpora.entries import UNLABELLED_FOLD
from ecg_jax.data.corpora.listing import EntryTable, Listing
from ecg_jax.data.readers.columns import header_of, read_batches
from ecg_jax.data.recording import Problem, cannot_read
from ecg_jax.data.stratify import batched_folds
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

N_FOLDS = 20
# Limits of age groups, years (spec §1.5).
AGE_BINS = (18, 30, 40, 50, 60, 70, 80, 90, 100)
LABEL_SET = "statement"

_PUBLISHER = "BDSP"
# Names a FileName may begin with that say nothing: "./S0001/...", "/S0001/...", "WFDB/2010/...".
_LEADING = r"^\.?/?(WFDB/)?"
# Threads that list folders: on a network drive each waits for its answers.
_LISTING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one institution's files lie, and what its tables are called and hold.

    Attributes:
      wfdb: folder of the records below SOURCE, e.g. "ECG/WFDB".
      partition: below `wfdb`, of what form the folder of a partition is, e.g. `S\\d{4}/\\d{4}`.
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
class _Files:
    """The records in SOURCE, n of them, in order of partition, folder and name.

    Attributes:
      names: large text [n], without suffix.
      folder: int32 [n], index into `folders`, e.g. "S0001/1987/04/".
      partition: int16 [n], index into `partitions`, e.g. "S0001/1987".
    """

    names: pa.Array
    folder: np.ndarray
    folders: list[str]
    partition: np.ndarray
    partitions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def keys(self) -> pa.Array:
        """Large text [n]: folder and name."""
        import pyarrow as pa
        import pyarrow.compute as pc

        folders = pa.array(self.folders, pa.large_string()).take(pa.array(self.folder))
        return pc.binary_join_element_wise(folders, self.names, pa.scalar("", pa.large_string()))

    def where(self, kept: np.ndarray) -> _Files:
        """Some of them."""
        import pyarrow as pa

        names = self.names.filter(pa.array(kept))
        return dataclasses.replace(
            self, names=names, folder=self.folder[kept], partition=self.partition[kept]
        )


@dataclasses.dataclass(frozen=True)
class _People:
    """What the table says of n recordings; -1 or NaN where it says nothing, `row` -1 where it has no row."""

    row: np.ndarray
    patient: np.ndarray
    sex: np.ndarray
    sexes: list[str]
    race: np.ndarray
    age: np.ndarray


def list_institution(source: Path, layout: Layout, name_of, known: tuple[str, ...], expects: str) -> Listing:
    """All records of the partitions that are in SOURCE, with what the tables say of them.

    Args:
      source: SOURCE.
      layout: of the institution.
      name_of: folder of a partition ("S0001/1987") -> its name ("S0001-1987").
      known: the partitions the paper was trained on; others are kept and reported.
      expects: what SOURCE must hold, for messages.

    Raises:
      UserError: no partition or no record is there, or a table cannot be read or is another one.
    """
    partitions = find_partitions(source / layout.wfdb, layout.partition)
    if not partitions:
        raise UserError(
            f"{source / layout.wfdb} has no folder like {_example(layout.partition)} (expected {expects})."
        )
    files = _find_files(source / layout.wfdb, partitions)
    if not len(files):
        raise UserError(f"No .hea file found in {source / layout.wfdb} (expected {expects}).")
    problems = [
        Problem(
            name_of(p), "extra_partition", "kept", "the published study was not trained on this partition."
        )
        for p in partitions
        if name_of(p) not in known
    ]
    people, more = _read_people(layout, files, name_of)
    problems += more
    files, people, more = _without_duplicates(layout, files, people, name_of)
    problems += more
    problems += _count_unknown(layout, files, people, name_of)
    starts, codes, classes, more = _read_diagnoses(layout, files)
    fold = _folds(people, starts, codes)
    return Listing(
        _table(layout, files, people, fold, starts, codes, classes),
        problems + more,
        (LABEL_SET,),
        {LABEL_SET: classes},
        {LABEL_SET: _descriptions(layout, classes)},
        f"{N_FOLDS} folds of whole patients, stratified by diagnostic codes, sex, race and age, in batches of patients",
    )


def _example(partition: str) -> str:
    return "S0001/1987" if "S" in partition else "2010"


def find_partitions(wfdb: Path, pattern: str) -> list[str]:
    """The folders of partitions below `wfdb`, e.g. "S0001/1987", sorted; `pattern` is `Layout.partition`."""
    found = [""]
    for part in pattern.split("/"):
        found = [
            f"{folder}{name}/"
            for folder in found
            for name in _subfolders(wfdb / folder)
            if re.fullmatch(part, name)
        ]
    return sorted(folder.rstrip("/") for folder in found)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as content:
            return [entry.name for entry in content if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(folder, error) from error


def _find_files(wfdb: Path, partitions: list[str]) -> _Files:
    """Every .hea in these partitions, at any depth."""
    import pyarrow as pa

    folders: list[str] = []
    names, counts, of_partition = [], [], []
    # Folders of a partition are read one after another, partitions side by side.
    with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = pool.map(lambda partition: _walk(wfdb, partition), partitions)
        for number, parts in enumerate(found):
            for folder, some in parts:
                folders.append(folder)
                names.append(some)
                counts.append(len(some))
                of_partition.append(number)
    folder = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    partition = np.repeat(np.array(of_partition, np.int16), counts)
    joined = pa.concat_arrays(names) if names else pa.array([], pa.large_string())
    return _Files(joined, folder, folders, partition, partitions)


def _walk(wfdb: Path, partition: str) -> list[tuple[str, pa.Array]]:
    """(folder, names of its records) of every folder with records, in order."""
    import pyarrow as pa

    found, todo = [], [f"{partition}/"]
    while todo:
        folder = todo.pop()
        names, below = [], []
        try:
            with os.scandir(wfdb / folder) as content:
                for entry in content:
                    if entry.name.endswith(".hea"):
                        names.append(entry.name[:-4])
                    elif "." not in entry.name and entry.is_dir():
                        below.append(f"{folder}{entry.name}/")
        except OSError as error:
            raise cannot_read(wfdb / folder, error) from error
        todo += sorted(below, reverse=True)
        if names:
            try:
                found.append((folder, pa.array(sorted(names), pa.large_string())))
            except UnicodeEncodeError:
                raise UserError(f"A file name in {wfdb / folder} is not UTF-8; rename it.") from None
    return found


def _keys(names: pa.Array) -> pa.Array:
    """Folder and name from a FileName, e.g. "S0001/1987/04/de_1" from "/S0001/1987/04/de_1.hea"."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pc.replace_substring_regex(names, pattern=_LEADING, replacement="")
    return pc.replace_substring_regex(names, pattern=r"\.hea$", replacement="").cast(pa.large_string())


def _stems(names: pa.Array) -> pa.Array:
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


def _read_people(layout: Layout, files: _Files, name_of) -> tuple[_People, list[Problem]]:
    """Who was recorded in each file, and what is wrong with the table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = layout.people
    columns = {"FileName": "text", "BDSPPatientID": "text", "PatientRace": "text", layout.sex: "text"}
    here = pa.array(files.partitions)
    width = len(files.partitions[0])
    sexes, races = _Codes(), _Codes()
    keys: list[pa.Array] = []
    parts: list[tuple[np.ndarray, ...]] = []
    absent: dict[str, int] = {}
    for batch in read_batches(path, {**columns, layout.age: "float"}, _PUBLISHER):
        key = _keys(batch.column("FileName"))
        prefix = pc.utf8_slice_codeunits(key, 0, width)
        wanted = pc.fill_null(pc.is_in(prefix.cast(pa.string()), here), False)
        for count in prefix.filter(pc.invert(wanted)).value_counts().to_pylist():
            partition = count["values"] or ""
            partition = partition if re.fullmatch(layout.partition, partition) else ""
            absent[partition] = absent.get(partition, 0) + count["counts"]
        batch = batch.filter(wanted)
        keys.append(key.filter(wanted))
        parts.append(
            (
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
            else f"{n} rows have a FileName that is no path of a record, e.g. {_example(layout.partition)}/NAME.",
        )
        for partition, n in sorted(absent.items())
    ]
    listed = pa.chunked_array(keys, pa.large_string())
    patient, sex, race, age = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Not a number of years: unknown (spec §1.5).
    age[~(age >= 0)] = np.nan
    more, doubtful = _contradictions(path, listed, (patient, sex, race, age))
    rows = _rows_in(files.keys(), listed)
    problems += more + _without_file(path, files, listed, rows, name_of)
    rows[np.isin(rows, doubtful)] = -1

    def of_files(column: np.ndarray, unknown) -> np.ndarray:
        found = np.full(len(files), unknown, column.dtype)
        found[rows >= 0] = column[rows[rows >= 0]]
        return found

    people = _People(
        rows.astype(np.int32),
        of_files(patient, -1),
        of_files(sex, -1),
        sexes.texts,
        of_files(race, -1),
        of_files(age, np.nan),
    )
    return people, problems


def _rows_in(keys: pa.Array, table: pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: the first row of a table with each key, -1 where it has none."""
    import pyarrow.compute as pc

    return (
        pc.fill_null(pc.index_in(keys, value_set=table), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    )


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


def _contradictions(path: Path, keys: pa.ChunkedArray, columns) -> tuple[list[Problem], np.ndarray]:
    """Problems and first rows of recordings that have several rows which differ."""
    if not len(keys):
        return [], np.empty(0, np.int64)
    first = _rows_in(keys, keys)
    again = np.flatnonzero(first != np.arange(len(first)))
    differ = np.zeros(len(again), bool)
    for column in columns:
        a, b = column[again], column[first[again]]
        differ |= (a != b) & ~((a != a) & (b != b))
    doubtful = np.unique(first[again[differ]])
    problems = [
        Problem(
            _name(keys[row].as_py()),
            "contradictory_rows",
            "unknown",
            f"{path.name} has rows for it that contradict each other, so what it says of the recording is taken as "
            "unknown.",
        )
        for row in doubtful.tolist()
    ]
    return problems, doubtful


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _without_file(path: Path, files: _Files, keys, rows: np.ndarray, name_of) -> list[Problem]:
    """How many rows of each partition that is in SOURCE have no file there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    used = np.zeros(len(keys), bool)
    used[rows[rows >= 0]] = True
    lost = keys.filter(pa.array(~used))
    # A second row of a recording is not used either, and is no lost file.
    lost = lost.filter(pc.invert(pc.is_in(lost, value_set=keys.filter(pa.array(used)))))
    counts = pc.utf8_slice_codeunits(lost, 0, len(files.partitions[0])).value_counts().to_pylist()
    return [
        Problem(
            name_of(count["values"]),
            "missing_part",
            "left out",
            f"{count['counts']} recordings of {path.name} have no .hea file in this partition.",
        )
        for count in sorted(counts, key=lambda count: count["values"])
    ]


def _per_partition(
    files: _Files, marked: np.ndarray, name_of, kind: str, action: str, text: str
) -> list[Problem]:
    """One problem for each partition with marked records; `text` has their number as {n}."""
    counts = np.bincount(files.partition[marked], minlength=len(files.partitions))
    return [
        Problem(name_of(files.partitions[p]), kind, action, text.format(n=counts[p]))
        for p in np.flatnonzero(counts)
    ]


def _without_duplicates(layout: Layout, files: _Files, people: _People, name_of):
    """Files and people without the recordings of the list of duplicates, and without repeated names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    problems = []
    kept = np.ones(len(files), bool)
    if layout.duplicates is not None:
        path = layout.duplicates
        listed = [
            _stems(part.column("file_name")) for part in read_batches(path, {"file_name": "text"}, _PUBLISHER)
        ]
        value_set = pa.chunked_array(listed, pa.large_string())
        listed_here = pc.is_in(files.names, value_set=value_set).to_numpy(zero_copy_only=False)
        kept &= ~listed_here
        text = f"{{n}} recordings are in {path.name}."
        problems += _per_partition(files, listed_here, name_of, "listed_duplicate", "left out", text)
    again = _rows_in(files.names, files.names)
    repeated = (again != np.arange(len(again))) & kept
    # Only a name whose first recording is kept is taken.
    repeated &= kept[again]
    for row in np.flatnonzero(repeated).tolist():
        folders = [files.folders[files.folder[r]] for r in (row, again[row])]
        detail = f"{folders[0]} has the record id of a recording in {folders[1]}, which is kept."
        problems.append(Problem(files.names[row].as_py(), "duplicate_id", "refused", detail))
    kept &= ~repeated
    if kept.all():
        return files, people, problems
    people = dataclasses.replace(
        people, **{name: getattr(people, name)[kept] for name in ("row", "patient", "sex", "race", "age")}
    )
    return files.where(kept), people, problems


def _count_unknown(layout: Layout, files: _Files, people: _People, name_of) -> list[Problem]:
    """How many records of each partition have no row or no patient: they may be trained on only."""
    table = layout.people.name
    without_row = people.row < 0
    text = f"{table} has no row that says who {{n}} recordings are of."
    problems = _per_partition(files, without_row, name_of, "no_table_row", "kept", text)
    without_patient = ~without_row & (people.patient < 0)
    text = f"{{n}} recordings have no BDSPPatientID in {table}."
    return problems + _per_partition(files, without_patient, name_of, "no_patient", "kept", text)


def _read_diagnoses(layout: Layout, files: _Files):
    """(starts [n + 1], codes, classes, problems): indices into `classes`, those of record i from starts[i] on."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = layout.diagnoses
    if not path.is_file():
        detail = f"{path.name} is not there, so no recording has labels."
        problem = Problem(path.name, "missing_part", "left out", detail)
        return np.zeros(len(files) + 1, np.int64), np.empty(0, np.int16), [], [problem]
    keys, lists = [], []
    for key, codes in _diagnosis_batches(layout):
        keys.append(key)
        lists.append(codes)
    names = files.names if layout.by_name else files.keys()
    rows = _rows_in(names, pa.chunked_array(keys, pa.large_string()))
    del keys, names
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
        pairs = np.unique((row[there.to_numpy(zero_copy_only=False)].astype(np.int64) << 32) + codes)
        starts = np.searchsorted(pairs, np.arange(len(key) + 1, dtype=np.int64) << 32)
        lists = pa.ListArray.from_arrays(
            pa.array(starts, pa.int32()), pa.array((pairs & 0xFFFFFFFF).astype(np.uint32))
        )
        yield _stems(key) if layout.by_name else _keys(key), lists


def _descriptions(layout: Layout, classes: list[str]) -> dict[str, str]:
    """Code -> its meaning, as far as the dictionary of the version has it."""
    if layout.dictionary is None or not layout.dictionary.is_file():
        return {}
    found = {}
    for batch in read_batches(layout.dictionary, {"codes": "text", "diagnoses": "text"}, _PUBLISHER):
        for row in batch.to_pylist():
            found[(row["codes"] or "").strip()] = row["diagnoses"] or ""
    return {code: found[code] for code in classes if code in found}


def _folds(people: _People, starts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int16 [n]; records whose patient is not known may be trained on only."""
    known = people.patient >= 0
    fold = np.full(len(known), UNLABELLED_FOLD, np.int16)
    lengths = np.diff(starts)
    starts_of_known = np.concatenate([[0], np.cumsum(lengths[known])])
    codes_of_known = codes if known.all() else codes[np.repeat(known, lengths)]
    age = people.age[known]
    age_bin = np.where(np.isnan(age), len(AGE_BINS) + 1, np.searchsorted(AGE_BINS, age, side="right")).astype(
        np.int8
    )
    # Unknown sex and race are labels too.
    labels = [(starts_of_known, codes_of_known), people.sex[known] + 1, people.race[known] + 1, age_bin]
    fold[known] = batched_folds(people.patient[known], labels, N_FOLDS)
    return fold


def _table(layout: Layout, files: _Files, people: _People, fold, starts, codes, classes) -> EntryTable:
    import pyarrow as pa

    female, male = ("f", "female"), ("m", "male")
    texts = [text.strip().lower() for text in people.sexes]
    places = [0 if text in female else 1 if text in male else -1 for text in texts]
    sex = np.array([*places, -1], np.int8)[people.sex]
    folders = [f"{layout.wfdb}/{folder}" for folder in files.folders]
    table = pa.table(
        {
            "record_id": files.names,
            "folder": pa.DictionaryArray.from_arrays(pa.array(files.folder), folders),
            "patient_id": pa.array(people.patient, mask=people.patient < 0),
            "fold": pa.array(fold),
            "age": pa.array(people.age, mask=np.isnan(people.age)),
            "sex": pa.DictionaryArray.from_arrays(pa.array(sex, mask=sex < 0), ["F", "M"]),
            f"labels_{LABEL_SET}": pa.LargeListArray.from_arrays(pa.array(starts), pa.array(codes)),
        }
    )
    return EntryTable(table, ".hea", {LABEL_SET: classes})


def sex_column(path: Path) -> str:
    """What the table of recordings calls the column of the sex: SexDSC (I0001) or Sex (I0006)."""
    header = header_of(path, _PUBLISHER)
    return "SexDSC" if "SexDSC" in header else "Sex"
