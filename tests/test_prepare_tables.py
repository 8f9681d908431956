"""The table of records that `ecg-jax prepare` writes in lots."""

import numpy as np
import pytest

from ecg_jax.data import record_table


def test_two_row_groups_are_those_of_one_table():
    """What `finalise` writes in lots is what writing the whole table at once gives."""
    import io

    import pyarrow as pa
    import pyarrow.parquet

    n = record_table.ROW_GROUP + 1000
    ids = np.arange(n)
    table = pa.table({"record_id": pa.array(ids).cast(pa.string()), "fold": pa.array(ids % 10, pa.int32())})
    whole, lots = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table.combine_chunks(), whole, compression="zstd")
    parts = (table.slice(0, record_table.ROW_GROUP), table.slice(record_table.ROW_GROUP))
    record_table.write_parquet(lots, table.schema, (part.combine_chunks() for part in parts))
    assert lots.getvalue() == whole.getvalue()


@pytest.mark.parametrize("group", [1, 7, 50])
@pytest.mark.parametrize("drop", [False, True])
def test_final_tables_do_not_depend_on_the_row_group(monkeypatch, group, drop):
    import pyarrow as pa

    rng = np.random.default_rng(0)
    n = 40
    records = pa.table(
        {
            "record_id": [f"r{i}" for i in range(n)],
            "offset": pa.array(np.zeros(n, np.int64)),
            "duplicate_of": pa.nulls(n, pa.string()),
        }
    )
    records = pa.concat_tables([records.slice(0, 13), records.slice(13)])
    keys = rng.integers(0, 12, (n, 1)).astype(np.uint64).repeat(2, axis=1)
    first = record_table.first_with_same_checksum(keys)
    expected_first = [next(j for j in range(n) if keys[j, 0] == keys[i, 0]) for i in range(n)]
    assert first.tolist() == expected_first
    rows = [i for i in range(n) if not drop or expected_first[i] == i]
    monkeypatch.setattr(record_table, "ROW_GROUP", group)
    tables = list(record_table.final_tables(records, np.arange(n) * 10, first, drop))
    assert [len(table) for table in tables[:-1]] == [group] * (len(tables) - 1)
    found = pa.concat_tables(tables).to_pydict()
    assert found["record_id"] == [f"r{i}" for i in rows]
    assert found["offset"] == [10 * i for i in rows]
    assert found["duplicate_of"] == [
        None if expected_first[i] == i else f"r{expected_first[i]}" for i in rows
    ]
