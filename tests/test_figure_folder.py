"""Figures as files: what is written is read back, and a damaged folder is named."""

import csv
import json

import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import new_figure
from ecg_jax.studies import figure_folder
from ecg_jax.studies.figure_folder import (
    INDEX,
    Figure,
    check_folder,
    open_folder,
    read_figures,
    write_figures,
)


def _figures():
    picture = new_figure(3, 2)
    picture.subplots().plot([1, 2], [3, 4])
    drawn = Figure("curve", "A curve", "It rises.", "Not why.", ("n", "loss"), [(1, 3.5), (2, None)], picture)
    table = Figure("numbers", "Numbers", "Two.", "Not three.", ("name", "value"), [("a", float("nan"))])
    return [drawn, table]


def test_written_figures_are_read_back(tmp_path):
    written = write_figures(tmp_path / "out", "scaling", _figures(), {"runs": ["a"]})
    assert [path.name for path in written] == ["curve.csv", "curve.png", "curve.svg", "numbers.csv", INDEX]
    folder = read_figures(tmp_path / "out")
    assert (folder.kind, folder.about) == ("scaling", {"runs": ["a"]})
    curve, numbers = folder.figures
    assert (curve.shows, curve.does_not_show) == ("It rises.", "Not why.")
    assert (curve.columns, curve.rows) == (["n", "loss"], [["1", "3.5"], ["2", ""]])
    assert curve.picture.read_bytes()[:4] == b"\x89PNG"
    assert numbers.picture is None
    assert numbers.rows == [["a", ""]]


@pytest.mark.parametrize("name", ["curve.png", "curve.svg", "numbers.csv", INDEX])
def test_a_missing_file_is_named(tmp_path, name):
    write_figures(tmp_path, "cka", _figures(), {})
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"is missing or damaged; run the command"):
        read_figures(tmp_path)


def test_names_and_rows_are_checked(tmp_path):
    with pytest.raises(ValueError, match="there twice"):
        write_figures(tmp_path, "cka", [_figures()[0]] * 2, {})
    with pytest.raises(ValueError, match="a row of 1 cells, 2 columns"):
        write_figures(tmp_path, "cka", [Figure("x", "", "", "", ("a", "b"), [(1,)])], {})
    assert not list(tmp_path.iterdir())


def test_a_study_that_is_cut_short_leaves_no_index_of_the_one_before(tmp_path, monkeypatch):
    write_figures(tmp_path, "cka", _figures(), {}, {"cka.json": b"1"})
    write_atomic = figure_folder.write_atomic

    def full_at(name):
        def write(path, data):
            if path.name == name:
                raise UserError("the disk is full")
            assert not (tmp_path / INDEX).exists()
            write_atomic(path, data)

        monkeypatch.setattr(figure_folder, "write_atomic", write)

    full_at("numbers.csv")
    with pytest.raises(UserError, match="disk is full"):
        write_figures(tmp_path, "cka", _figures(), {}, {"cka.json": b"2"})
    assert (tmp_path / "cka.json").read_bytes() == b"2"
    with pytest.raises(UserError, match=r"figures\.json is missing"):
        read_figures(tmp_path)
    check_folder(tmp_path, "cka")  # and the same command may go on in it
    full_at("none")
    write_figures(tmp_path, "cka", _figures()[1:], {}, {"cka.json": b"3"})
    assert len(read_figures(tmp_path).figures) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_figure_that_cannot_be_drawn_leaves_the_study_before(tmp_path):
    write_figures(tmp_path, "cka", _figures()[1:], {}, {"cka.json": b"1"})
    with pytest.raises(ValueError, match="there twice"):
        write_figures(tmp_path, "cka", [_figures()[0]] * 2, {}, {"cka.json": b"2"})
    assert (tmp_path / "cka.json").read_bytes() == b"1"
    assert [figure.name for figure in read_figures(tmp_path).figures] == ["numbers"]


def test_figures_of_the_study_before_are_removed_and_nothing_else(tmp_path):
    write_figures(tmp_path, "cka", _figures(), {})
    (tmp_path / "mine.csv").write_text("1")
    write_figures(tmp_path, "cka", _figures()[1:], {})
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.csv", "mine.csv", INDEX}


def test_a_folder_of_something_else_is_refused(tmp_path):
    new = tmp_path / "new"
    check_folder(new, "cka")
    assert not new.exists()
    assert open_folder(new, "cka") == new
    assert not list(new.iterdir())
    write_figures(new, "efficiency", _figures()[1:], {"study": "table"})
    check_folder(new, "efficiency", "table")
    for kind, study in (("efficiency", "scaling"), ("efficiency", None), ("scaling", None)):
        with pytest.raises(UserError, match="holds the figures of another study"):
            open_folder(new, kind, study)
    (new / INDEX).write_text("[]")
    with pytest.raises(UserError, match=r"figures\.json is damaged; remove"):
        check_folder(new, "efficiency", "table")
    with pytest.raises(UserError, match="is a file"):
        check_folder(new / INDEX, "cka")
    # What a sweep notes of a study is no reason to refuse; files that may be the user's own are.
    (new / INDEX).rename(new / "failed.json")
    with pytest.raises(UserError, match=r"holds something else than figures, .* \(numbers\.csv\)"):
        check_folder(new, "cka")
    (new / "numbers.csv").unlink()
    check_folder(new, "cka")
    (new / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"holds something else than figures, .* \(checkpoints\)"):
        check_folder(new, "cka")


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_is_too_long_is_refused(tmp_path, length):
    with pytest.raises(UserError, match=r"cannot write into --output=.* name too long; name another"):
        open_folder(tmp_path / ("x" * length), "cka")


def _change(**fields):
    return lambda index: index | fields


def _change_first(**fields):
    return lambda index: index | {"figures": [index["figures"][0] | fields, *index["figures"][1:]]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: [index],
        lambda index: index | {"figures": index["figures"] * 2},
        lambda index: {name: value for name, value in index.items() if name != "about"},
        *(_change(figures=value) for value in ([], {}, [3], None)),
        *(_change(kind=value) for value in (5, "", "../x", "a b")),
        *(_change_first(name=value) for value in (5, "../x", "A")),
        *(
            _change_first(**{name: value})
            for name in ("title", "shows", "does_not_show")
            for value in (None, 5)
        ),
        *(_change_first(picture=value) for value in (None, 1, "yes")),
        *(_change(about=value) for value in ([], None)),
        *(_change(about={"date": value}) for value in (3, None, "", "yesterday", "2026-03-01T00:00:00")),
        *(_change(about={"runs": value}) for value in ("a", [3], {})),
        *(_change(about={"command": value}) for value in (3, [3])),
        *(_change(about={name: 3}) for name in ("versions", "device", "study")),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage):
    about = {
        "date": "2026-03-01T00:00:00+00:00",
        "runs": ["a"],
        "command": ["ecg-jax"],
        "versions": {"jax": "1"},
    }
    write_figures(tmp_path, "cka", _figures(), about | {"device": None})
    assert read_figures(tmp_path).kind == "cka"
    path = tmp_path / INDEX
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=r"figures\.json"):
        read_figures(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("numbers.csv", each)
            for each in (b"", b"\n", b"a,b\n1\n", b"a,b\n1,2,3\n", b"a,b\n1,\0\n", b"\xff,b\n")
        ),
        *(("curve.png", each) for each in (b"", b"png", b"<svg", None)),
        *(("curve.svg", each) for each in (b"", b"<?xml version='1.0'?>", b"\x89PNG\r\n\x1a\n", None)),
        ("curve.csv", None),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    write_figures(tmp_path, "cka", _figures(), {})
    (tmp_path / name).unlink()
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is missing or damaged; run the command"):
        read_figures(tmp_path)


def test_long_cells_are_read(tmp_path):
    runs, limit = " ".join(f"run-{i}" for i in range(30_000)), csv.field_size_limit()
    assert len(runs) > limit
    write_figures(tmp_path, "efficiency", [Figure("x", "", "", "", ("runs",), [(runs,)])], {})
    assert read_figures(tmp_path).figures[0].rows == [[runs]]
    assert csv.field_size_limit() == limit
