"""The table of entries that holds millions of recordings."""

import pickle

import pyarrow as pa
import pytest

from ecg_jax.data.corpora.listing import Entry, EntryTable, Listing


def columns(n=50):
    return pa.table(
        {
            "record_id": pa.array([f"r{i}" for i in range(n)], pa.large_string()),
            "folder": pa.array([f"f{i // 7}/" for i in range(n)]).dictionary_encode(),
            "patient_id": pa.array([None if i % 9 == 0 else i // 2 for i in range(n)], pa.int64()),
            "fold": pa.array([i % 3 - 1 for i in range(n)], pa.int16()),
            "age": pa.array([None if i % 5 == 0 else i / 2 for i in range(n)], pa.float64()),
            "sex": pa.array([("F", "M", None)[i % 3] for i in range(n)]),
            "labels_a": pa.array(
                [None if i == 7 else [] if i % 4 == 0 else [i % 2, 2] for i in range(n)], pa.list_(pa.int16())
            ),
            "values_v": pa.array([[1.5, float("nan")] if i % 2 else [None, None] for i in range(n)]),
        }
    )


def entry_table(table):
    return EntryTable(table, ".hea", {"a": ["x", "y", "z"]}, {"v": ["one", "two"]})


def test_an_entry_table_is_a_sequence_of_entries():
    entries = entry_table(columns())
    expected = [
        Entry(
            record_id=f"r{i}",
            file=f"f{i // 7}/r{i}.hea",
            patient_id=None if i % 9 == 0 else str(i // 2),
            fold=i % 3 - 1,
            labels={"a": None if i == 7 else [] if i % 4 == 0 else ["xy"[i % 2], "z"]},
            age=None if i % 5 == 0 else i / 2,
            sex=("F", "M", None)[i % 3],
            values={"v": {"one": 1.5}} if i % 2 else {},
        )
        for i in range(50)
    ]
    assert len(entries) == 50
    assert list(entries) == expected
    assert [entries[i] for i in (0, 3, 49, -1)] == [expected[i] for i in (0, 3, 49, -1)]
    assert list(entries[2:5]) == expected[2:5]
    assert list(entries[40:90]) == expected[40:]
    assert list(entries[5:2]) == []
    assert list(entries[10:40][5:9]) == expected[15:19]
    with pytest.raises(IndexError):
        entries[50]
    with pytest.raises(ValueError, match="step"):
        entries[::2]


def test_a_slice_of_an_entry_table_takes_only_its_rows_along():
    entries = entry_table(columns(20_000))
    whole, part = len(pickle.dumps(entries)), pickle.dumps(entries[5:25])
    assert len(part) < whole / 20
    assert list(pickle.loads(part)) == list(entries[5:25])


def test_an_entry_table_may_have_few_columns():
    table = pa.table({"record_id": ["a", "b"], "file": ["x/1", "y/2"]})
    assert list(EntryTable(table, ".dat")) == [
        Entry("a", "x/1.dat", labels={}),
        Entry("b", "y/2.dat", labels={}),
    ]


def test_digest_of_a_table_tells_contents_and_not_chunks():
    table = columns()
    digest = Listing(entry_table(table), [], ("a",), None, {}, "").digest()
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 30), table.slice(33)])
    assert entry_table(pieces).digest() == digest
    assert entry_table(table.slice(0, 49)).digest() != digest
    for name in table.column_names:
        cells = table.column(name).to_pylist()
        cells[7], cells[10] = cells[10], cells[7]
        place = table.column_names.index(name)
        changed = table.set_column(place, name, pa.array(cells, table.schema.field(name).type))
        same = cells[7] == cells[10]
        assert (entry_table(changed).digest() == digest) == same, name
    # Where text ends is told too.
    swapped = [EntryTable(pa.table({"record_id": names})).digest() for names in (["ab", "c"], ["a", "bc"])]
    assert swapped[0] != swapped[1]
