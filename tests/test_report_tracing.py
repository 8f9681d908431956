"""Whether what the page of a study shows lies beside it, and whether the page says what is old, cut or warned of."""

import csv
import json
import re

import numpy as np
import pytest

from ecg_jax.cli import main
from ecg_jax.studies.cka import Cka
from ecg_jax.studies.cka_figures import _noise
from ecg_jax.studies.figure_folder import Figure, write_figures
from ecg_jax.studies.report import boards
from ecg_jax.studies.report.run_tables import scaled
from ecg_jax.studies.report.study import gather
from study_fixtures import write_figure_folder, write_run, write_sweep_json
from test_report import Outline

SMALL = {"probe": {"n": 40, "K": 2}}


def page_of(folders, tmp_path) -> str:
    output = tmp_path / "page.html"
    assert main(["report", *map(str, folders), f"--output={output}", "--recordings=none"]) == 0
    return output.read_text(encoding="utf-8")


def test_folders_of_one_kind_keep_their_files_apart(tmp_path):
    """As a study beside the sweep that has one of its own."""
    folders = [write_figure_folder(tmp_path / name) for name in ("first", "second", "third")]
    for k, folder in enumerate(folders):
        (folder / "curve.csv").write_text(f"objective,n,error\ncpc,250,0.{k}\n")
    page = page_of(folders, tmp_path)
    outline = Outline(page)
    assert not outline.errors
    assert len(outline.ids) == len(set(outline.ids))
    links = [link for link in outline.links if not link.startswith("#")]
    assert len(links) == len(set(links))
    assert all((tmp_path / link).is_file() for link in links)
    for k, name in enumerate(("scaling_curve", "scaling_curve_2", "scaling_curve_3")):
        assert (tmp_path / "page_tables" / f"{name}.csv").read_text().endswith(f"0.{k}\n")


def test_long_table_is_cut_on_the_page_alone(tmp_path):
    rows = [("cpc", k) for k in range(321)]
    figure = Figure("points", "Points", "What.", "What not.", ("objective", "n"), rows)
    write_figures(tmp_path / "study", "scaling", [figure], {})
    page = page_of([tmp_path / "study"], tmp_path)
    assert "The first 200 of 321 rows; its files have all." in page
    assert page.count('<th scope="row"') == 200
    path = tmp_path / "page_tables" / "scaling_points.csv"
    assert len(path.read_text().splitlines()) == 1 + 321
    assert (tmp_path / "page_tables" / "scaling_points.tex").read_text().count(r"\\") == 1 + 321


@pytest.fixture
def sweep(tmp_path):
    """Two finished runs, of which results.csv has one; the other warned of a collapse."""
    folder = tmp_path / "mine"
    folder.mkdir()
    entries = {name: write_run(folder, name, probes=SMALL, seed=k) for k, name in enumerate(("old", "new"))}
    warning = {"step": 4, "warning": "the features of all recordings are alike"}
    log = folder / "new/run/log.jsonl"
    log.write_text(json.dumps(warning) + "\n" + log.read_text())
    write_sweep_json(folder, entries)
    (folder / "results.csv").write_text(
        "level,name,seconds\ngroup,old,\nrun,old,36.000000000000014\nrun,new,1\n"
    )
    return folder


def test_run_that_the_table_of_the_sweep_lacks_is_named(sweep, tmp_path):
    assert gather([sweep]).sweeps[0].missing(gather([sweep]).finished) == []
    assert "results.csv of mine lacks" not in page_of([sweep], tmp_path)
    text = (sweep / "results.csv").read_text()
    (sweep / "results.csv").write_text(text.replace("run,new,1\n", ""))
    page = page_of([sweep], tmp_path)
    assert "results.csv of mine lacks 1 finished run, as new: run its <code>ecg-jax sweep</code>" in page
    with open(tmp_path / "page_tables" / "sweep_1_results.csv", newline="") as file:
        assert list(csv.reader(file))[2] == ["run", "old", "36"]


def test_collapse_is_warned_of_at_the_top(sweep, tmp_path):
    top = re.sub(r"<[^>]+>", "", page_of([sweep], tmp_path).split("<nav")[0])
    assert "1 run warned of a collapse while training: new." in top


def test_random_initialisations_are_told_apart_by_what_differs(tmp_path):
    """False is no word for all, and no leads named is."""
    entries = {}
    for name, leads, bidirectional in (("whole", "", False), ("two", "I,II", False), ("both", "", True)):
        probe = SMALL["probe"] | {"encoder": name}
        entry = write_run(tmp_path, name, probes={"probe": probe})
        path = tmp_path / name / "run/config.json"
        for config, at in ((json.loads(path.read_text()), path), (entry["config"], None)):
            config["data"]["leads"], config["model"]["bidirectional"] = leads, bidirectional
            if at:
                at.write_text(json.dumps(config))
        entries[name] = entry
    (board,) = boards.make_boards(gather([write_sweep_json(tmp_path, entries)]))
    names = {row.model for row in board.scores.entries if row.baseline == "random initialisation"}
    assert names == {
        "random initialisation of s4 (bidirectional=False, leads=all)",
        "random initialisation of s4 (bidirectional=False, leads=I,II)",
        "random initialisation of s4 (bidirectional=True, leads=all)",
    }


def test_units_are_chosen_after_rounding():
    assert [scaled(value) for value in (999.4e9, 999.6e9, 1e12, 12.0, None)] == [
        "999 G", "1 T", "1 T", "12", "\N{EN DASH}"
    ]  # fmt: skip


def test_widths_of_intervals_are_those_of_the_cells_shown():
    class Study:
        level, groups = 0.95, 20
        cka = Cka(*[np.full((3, 3), 0.5)] * 2, np.zeros((3, 3)), np.zeros((3, 3)), *[np.ones(3)] * 2, 9, 1)

    high = Study.cka.high
    high[0, 1] = high[1, 0] = 0.2
    high[0, 2] = high[2, 0] = 1.0
    assert "0.10 wide to each side in the median cell and 0.10 in the widest" in _noise(
        Study, [(0, 1), (1, 0)]
    )
    assert "0.50 in the widest" in _noise(Study)
    assert _noise(Study, [(1, 1)]) == "No pair of layers has an interval."
