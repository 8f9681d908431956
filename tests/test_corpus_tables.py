"""Tables and arrays beside the recordings of a corpus: read, or refused with a sentence."""

import zipfile

import h5py
import numpy as np
import pytest

import corpus_replicas as replicas
from ecg_jax.data.readers.arrays import npy_array, read_hdf5, row_name, split_row_name
from ecg_jax.data.readers.rows import read_rows
from ecg_jax.data.recording import BadRecording
from ecg_jax.errors import UserError


def test_rows_of_a_spreadsheet(tmp_path):
    rows = [
        {"a": "x", "b": 3, "c": 2.0, "d": 0.5, "e": None},
        {"a": "y", "b": None, "c": None, "d": None, "e": None},
    ]
    replicas.write_xlsx(tmp_path / "t.xlsx", rows)
    assert list(read_rows(tmp_path / "t.xlsx", ("a", "e"), "someone")) == [
        {"a": "x", "b": "3", "c": "2", "d": "0.5", "e": ""},
        {"a": "y", "b": "", "c": "", "d": "", "e": ""},
    ]
    with pytest.raises(UserError, match=r"t\.xlsx has no column f \(found: a, b, c, d, e\)"):
        list(read_rows(tmp_path / "t.xlsx", ("f",), "someone"))


def test_spreadsheet_that_states_a_wrong_size(tmp_path):
    replicas.write_xlsx(tmp_path / "t.xlsx", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}])
    with zipfile.ZipFile(tmp_path / "t.xlsx") as old, zipfile.ZipFile(tmp_path / "u.xlsx", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "xl/worksheets/sheet1.xml":
                assert b'ref="A1:B3"' in data
                data = data.replace(b'ref="A1:B3"', b'ref="A1:A1"')
            new.writestr(name, data)
    assert [row["b"] for row in read_rows(tmp_path / "u.xlsx", ("a", "b"), "someone")] == ["2", "4"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"", r"has no column a \(found: no columns\)"),
        ("t.csv", b"a,b\n", "has no rows"),
        ("t.csv", b"a,b\n1\n", "line 2 has 1 cells, its first line 2"),
        ("t.csv", b"a,b\n1,2,3\n", "line 2 has 3 cells"),
        ("t.csv", b"a,b\n\xff,1\n", "is no table"),
        ("t.xlsx", b"a,b\n1,2\n", r"is no \.xlsx table"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        list(read_rows(tmp_path / name, ("a",), "someone"))


def test_tables_saved_by_excel_begin_with_a_mark(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n 1 ,2\r\n,\r\n")
    assert list(read_rows(tmp_path / "t.csv", ("a",), "someone")) == [{"a": "1", "b": "2"}]


def test_rows_of_arrays_have_names(tmp_path):
    assert row_name("a/b#c.hdf5", 17) == "a/b#c.hdf5#17"
    assert split_row_name("a/b#c.hdf5#17") == ("a/b#c.hdf5", 17)


def test_an_array_that_is_replaced_is_read_anew(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3)))
    assert npy_array(path).sum() == 0
    assert npy_array(path) is npy_array(path)
    np.save(tmp_path / "b.npy", np.ones((2, 4)))
    (tmp_path / "b.npy").replace(path)
    assert npy_array(path).sum() == 8


def test_arrays_that_are_no_numbers(tmp_path):
    np.save(tmp_path / "a.npy", np.array(["x"]))
    with pytest.raises(UserError, match="not numbers"):
        npy_array(tmp_path / "a.npy")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ecg"] = np.array([b"x"])
    with pytest.raises(BadRecording, match="not numbers"):
        read_hdf5(tmp_path / "a.h5", "ecg", "r")


def test_files_that_cannot_be_opened_end_the_command(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(args[0]))

    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(UserError, match=r"Cannot read .*a\.h5: Permission denied") as refusal:
        read_hdf5(tmp_path / "a.h5", "ecg", "r")
    assert not isinstance(refusal.value, BadRecording)
