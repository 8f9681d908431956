"""Figures as files: what is written is read back, and a damaged folder is named."""

import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import new_figure
from ecg_jax.studies.figure_folder import INDEX, Figure, read_figures, write_figures


def _figures():
    picture = new_figure(3, 2)
    picture.subplots().plot([1, 2], [3, 4])
    drawn = Figure("curve", "A curve", "It rises.", "Not why.", ("n", "loss"), [(1, 3.5), (2, None)], picture)
    table = Figure("numbers", "Numbers", "Two.", "Not three.", ("name", "value"), [("a", float("nan"))])
    return [drawn, table]


def test_written_figures_are_read_back(tmp_path):
    written = write_figures(tmp_path / "out", "scaling", _figures(), {"runs": ["a"]})
    assert [path.name for path in written] == ["curve.png", "curve.svg", "curve.csv", "numbers.csv", INDEX]
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
