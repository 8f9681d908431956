"""The diagnostic codes of an institution of HEEDB, as columns joined to its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ecg_jax.data.corpora.heedb_files import Files, per_partition
from ecg_jax.data.corpora.heedb_tables import PUBLISHER, Layout, TableRows, first_rows, keys_of, stems
from ecg_jax.data.readers.columns import read_batches
from ecg_jax.data.recording import Problem
from ecg_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Diagnoses:
    """The codes of n recordings: indices into `classes`, those of record i are `codes[starts[i]:starts[i + 1]]`;
    `known` is False where the table has no row.
    """

    starts: np.ndarray
    codes: np.ndarray
    known: np.ndarray
    classes: list[str]


def read_diagnoses(
    layout: Layout, files: Files, kept: np.ndarray, name_of: Callable[[str], str]
) -> tuple[Diagnoses, list[Problem]]:
    """The codes of some files, those `kept`, bool [n], and what is wrong with the table.

    A recording with several rows has the codes of all of them: what a table with a row for each code or each reading
    says.

    Raises:
      UserError: the table cannot be read, is another one, or none of its rows is of a file here.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    path = layout.diagnoses
    if not path.is_file():
        n = int(kept.sum())
        problem = Problem(
            path.name, "missing_part", "left out", f"{path.name} is not there: no labels are known."
        )
        return Diagnoses(np.zeros(n + 1, np.int64), np.empty(0, np.int16), np.zeros(n, bool), []), [problem]
    or_else = ", or remove it to do without labels"
    table, parts = TableRows(path, files, "" if layout.by_name else layout.partition, or_else), []
    for key, codes in _diagnosis_batches(layout):
        parts.append(codes.filter(table.add(key)))
    rows, lists, differ = _united(table.join(), len(files), pa.chunked_array(parts).combine_chunks())
    text = (
        f"{path.name} has several rows for {{n}} recordings that differ; they have the codes of all of them."
    )
    problems = table.problems(name_of)
    problems += per_partition(files, differ & kept, name_of, "contradictory_rows", "united", text)
    text = f"{path.name} has no row for {{n}} recordings, so their labels are unknown."
    problems += per_partition(files, (rows < 0) & kept, name_of, "no_diagnosis", "kept", text)
    rows = rows[kept]
    chosen = lists.take(pa.array(rows, mask=rows < 0))
    lengths = pc.fill_null(pc.list_value_length(chosen), 0).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    encoded = chosen.flatten().dictionary_encode()
    numbers = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(numbers)
    place = np.empty(len(order), np.int16 if len(order) < 2**15 else np.int32)
    place[order] = np.arange(len(order))
    classes = [str(code) for code in numbers[order].tolist()]
    codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
    return Diagnoses(starts, codes, rows >= 0, classes), problems


def _united(of: np.ndarray, n: int, lists: pa.ListArray) -> tuple[np.ndarray, pa.ListArray, np.ndarray]:
    """The rows of n files where several rows of a file become one, appended to the table.

    Args:
      of: int64 [m], the file of each row, -1 for none.
      lists: list<uint32> [m].

    Returns:
      int64 [n], the row of each file, -1 for none; the lists; bool [n], files whose rows were not all the same.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows, differ = first_rows(of, n), np.zeros(n, bool)
    several = np.zeros(n, bool)
    several[of[(of >= 0) & (rows[of] != np.arange(len(of)))]] = True
    if several.any():
        own = np.flatnonzero((of >= 0) & several[of])
        some, files = lists.take(pa.array(own)), np.flatnonzero(several)
        number = np.searchsorted(files, of[own])[pc.list_parent_indices(some).to_numpy()]
        united = _lists(number, some.flatten().to_numpy().astype(np.int64), len(files))
        length = pc.list_value_length(united).to_numpy()
        of_rows = pc.list_value_length(some).to_numpy()
        differ[of[own[of_rows != length[np.searchsorted(files, of[own])]]]] = True
        rows[files] = len(lists) + np.arange(len(files))
        lists = pa.concat_arrays([lists, united])
    return rows, lists, differ


def _lists(row: np.ndarray, codes: np.ndarray, n: int) -> pa.ListArray:
    """list<uint32> [n] from pairs of a row and a code, int64 both: each code of a row once, in order."""
    import pyarrow as pa

    pairs = np.sort((row << 32) + codes)
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    starts = np.searchsorted(pairs, np.arange(n + 1, dtype=np.int64) << 32)
    return pa.ListArray.from_arrays(
        pa.array(starts, pa.int32()), pa.array((pairs & 0xFFFFFFFF).astype(np.uint32))
    )


def _diagnosis_batches(layout: Layout) -> Iterator[tuple[pa.Array, pa.Array]]:
    """(keys, list<uint32> of each row's codes, each once) in parts.

    Raises:
      UserError: a code is no whole number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {layout.diagnosis_key: "text", layout.diagnosis_codes: "text"}
    for batch in read_batches(layout.diagnoses, columns, PUBLISHER, layout.delimiter):
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
        lists = _lists(row[there.to_numpy(zero_copy_only=False)].astype(np.int64), codes, len(key))
        yield stems(key) if layout.by_name else keys_of(key), lists


def read_meanings(layout: Layout, classes: list[str]) -> dict[str, str]:
    """Code -> its meaning, as far as the dictionary of the version has it."""
    if layout.dictionary is None or not layout.dictionary.is_file():
        return {}
    found = {}
    for batch in read_batches(layout.dictionary, {"codes": "text", "diagnoses": "text"}, PUBLISHER):
        for row in batch.to_pylist():
            found[(row["codes"] or "").strip()] = row["diagnoses"] or ""
    return {code: found[code] for code in classes if code in found}
