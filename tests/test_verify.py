"""`ecg-jax verify`: whatever is wrong with a store is found, counted and named."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ecg_jax import cli
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.verify import NOT_COVERED, SHOWN, verify
from sparse_store import write_sparse_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_synthetic_store(tmp_path_factory.mktemp("verify") / "made", 96, seconds=3.0)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(capsys, *arguments):
    """(exit code, what was printed, what was said about the failure) of the command."""
    code = cli.main(["verify", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def flip(path, byte, bit=1):
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ bit
        file.seek(byte)
        file.write(bytes([value]))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sound_store_passes(made, capsys, workers):
    code, out, err = run(capsys, made, f"--workers={workers}")
    assert code == 0
    assert "Signals and tables are as they were written: 96 records of 1 store, 0.00 GB" in out
    assert err.startswith("verify: 1.7 MB\nverify: 1.7 MB in ")


def test_a_flipped_byte_is_named(copy, capsys):
    store = Store(copy)
    row, byte = 70, 1234
    chunk, within = divmod(int(store.column("offset")[row]), store.chunk_samples)
    path = store.chunk_files.path(chunk)
    flip(path, within * 24 + byte)
    code, out, err = run(capsys, copy)
    assert code == 2
    assert out == f"{copy}: record synthetic0000070 (row 70) in {path}: its checksum differs.\n"
    assert "ecg-jax verify: error: 1 damaged record in 96 records of 1 store" in err.splitlines()[-1]


def test_every_single_flipped_byte_of_a_record_is_found(copy):
    """A checksum that left out a part of the samples would pass the other tests."""
    store, row = Store(copy), 5
    first = int(store.column("offset")[row]) * 24
    for byte in np.linspace(0, store.column("length")[row] * 24 - 1, 9).astype(int).tolist():
        flip(store.chunk_files.path(0), first + byte)
        assert [damage.record for damage in verify(copy)] == [True]
        flip(store.chunk_files.path(0), first + byte)
    assert list(verify(copy)) == []


def test_bytes_behind_the_last_record_of_a_chunk_belong_to_no_record(tmp_path):
    path = write_synthetic_store(tmp_path / "s", 33, seconds=2.9)
    store = Store(path)
    assert store.chunk_files.chunk_bytes > 32 * store.column("length")[0] * 24
    flip(store.chunk_files.path(0), store.chunk_files.chunk_bytes - 1)
    assert list(verify(path)) == []


def test_no_more_than_some_are_printed_and_all_are_counted(copy, capsys):
    path = copy / "signal/c/1/0"
    path.write_bytes(bytes(path.stat().st_size))
    code, out, err = run(capsys, copy)
    assert code == 2
    assert out.count("its checksum differs") == SHOWN
    assert f"32 damaged records in 96 records of 1 store, 0.00 GB ({32 - SHOWN} of them not printed)" in err


def test_a_truncated_chunk(copy, capsys):
    path = copy / "signal/c/2/0"
    full = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(full - 1)
    code, out, err = run(capsys, copy)
    assert code == 2
    assert out.splitlines() == [
        f"{path}: its file {path} has {full - 1} bytes instead of {full}; copy or prepare it again",
        f"{copy}: record synthetic0000095 (row 95) in {path}: the file ends too early.",
    ]
    assert "1 damaged file, 1 damaged record in" in err


def test_a_missing_chunk(copy, capsys):
    path = copy / "signal/c/0/0"
    path.unlink()
    code, out, err = run(capsys, copy)
    assert code == 2
    assert f"{path}: its file {path} is missing" in out
    assert f"record synthetic0000000 (row 0) in {path}: cannot be opened: No such file" in out
    assert "1 damaged file, 32 damaged records in" in err


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_table(copy, capsys, damage):
    path = copy / "records.parquet"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 8 : len(data) // 4] = bytes(len(data) // 4 - len(data) // 8)
        path.write_bytes(data)
    code, out, err = run(capsys, copy)
    assert code == 2
    assert f"Cannot read {path}: the file is missing or damaged" in out
    assert "1 unreadable store in" in err


def change(store, name, edit):
    """Rewrites one column of a store's table."""
    table = pyarrow.parquet.read_table(store / "records.parquet")
    values = table[name].to_pylist()
    edit(values)
    index = table.schema.get_field_index(name)
    table = table.set_column(
        index, table.schema.field(index), pa.array(values, table.schema.field(index).type)
    )
    pyarrow.parquet.write_table(table, store / "records.parquet")


def set_item(index, value):
    return lambda values: values.__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("record_id", set_item(3, "other"), "record ids or checksums are not those"),
        ("checksum", set_item(3, "0" * 32), "record ids or checksums are not those"),
        (
            "length",
            set_item(3, 721),
            "row 4: the record leaves its chunk, is empty or lies on the one before",
        ),
        ("length", set_item(31, 721), "row 31: the record leaves its chunk"),
        ("length", set_item(3, 0), "row 3: the record leaves its chunk, is empty"),
        ("length", set_item(3, 2**40), "row 3: the record leaves its chunk"),
        ("labels_rhythm", set_item(3, []), "labels_rhythm has "),
    ],
)
def test_a_table_that_was_changed(copy, capsys, name, edit, said):
    change(copy, name, edit)
    code, out, _ = run(capsys, copy)
    assert code == 2
    assert said in out


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("fold", "folds"),
        ("patient_id", "patients"),
        ("age", "ages"),
        ("sex", "sexes"),
        ("labels_rhythm", "which record has which label"),
    ],
)
def test_other_folds_patients_and_labels_are_another_table(copy, capsys, name, word):
    change(copy, name, lambda values: values.append(values.pop(0)))
    (damage,) = verify(copy)
    assert "not the table that the store was finished with" in damage.what
    # A store from before there was such a number: what cannot be seen is said.
    path = copy / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["ecg_jax"]["table_digest"]
    path.write_text(json.dumps(metadata))
    code, out, _ = run(capsys, copy)
    assert code == 0
    assert word in NOT_COVERED
    assert f"Not covered in {copy}: {NOT_COVERED}." in out


def test_a_table_without_a_column(copy, capsys):
    table = pyarrow.parquet.read_table(copy / "records.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["labels_rhythm"]), copy / "records.parquet")
    code, out, _ = run(capsys, copy)
    assert code == 2
    assert "has no column labels_rhythm" in out


def test_metadata_that_no_zarr_reader_would_read_alike(copy, capsys):
    path = copy / "signal" / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["codecs"][0]["configuration"]["endian"] = "big"
    path.write_text(json.dumps(metadata))
    code, out, err = run(capsys, copy)
    assert code == 2
    assert f"{path}: codecs is " in out
    assert "1 damaged file in" in err


def test_the_other_stores_are_verified_when_one_cannot_be_opened(made, copy, tmp_path, capsys):
    flip(copy / "signal/c/0/0", 7)
    code, out, err = run(capsys, tmp_path / "nowhere", copy, made)
    assert code == 2
    assert "no store at" in out
    assert "record synthetic0000000 (row 0)" in out
    assert "1 unreadable store, 1 damaged record in 192 records of 2 stores" in err


def test_workers_must_be_some(made, capsys):
    assert run(capsys, made, "--workers=0")[0] == 2


def test_records_of_several_row_groups(copy):
    table = pyarrow.parquet.read_table(copy / "records.parquet")
    pyarrow.parquet.write_table(table, copy / "records.parquet", row_group_size=20)
    (rewritten,) = verify(copy, workers=2)
    assert "not the table" in rewritten.what
    for chunk in range(3):
        flip(copy / f"signal/c/{chunk}/0", 0)
    _, *damages = verify(copy)
    assert [damage.where.split(" (row ")[1].split(")")[0] for damage in damages] == ["0", "32", "64"]


def test_a_sparse_store_passes(tmp_path):
    assert list(verify(write_sparse_store(tmp_path / "s", 500, seconds=2.5))) == []
