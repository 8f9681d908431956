"""`ecg-jax report` refuses files that are damaged or edited, and reports parts of a sweep as they are."""

import json
import os
import shutil

import numpy as np
import pytest

from ecg_jax import report
from ecg_jax.errors import UserError
from ecg_jax.studies.report.read import read_efficiency, read_result
from ecg_jax.studies.report.study import gather
from report_fixtures import write_label_efficiency, write_result
from study_fixtures import write_figure_folder, write_run, write_sweep_json

SMALL = {"n": 40, "K": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sweep of two runs, and a probe with one trained from scratch; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "sweep").mkdir()
    probes = {"probe": SMALL, "probes/frozen": SMALL | {"mode": "frozen"}}
    entries = {name: write_run(folder / "sweep", name, probes=probes) for name in ("cpc-a", "cpc-b")}
    write_sweep_json(folder / "sweep", entries)
    write_result(folder / "probe", **SMALL)
    write_result(folder / "scratch", mode="supervised", **SMALL)
    write_figure_folder(folder / "figures")
    return folder


@pytest.fixture
def own(made, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(made, tmp_path / "own")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folders, output, *said):
    with pytest.raises(UserError) as error:
        report.report(folders, output / "r.html", "title", recordings="none")
    assert all(word in str(error.value) for word in said), error.value
    assert not list(output.glob("r*"))


@pytest.mark.parametrize("given", ["cpc-a", "cpc-a/run"])
def test_a_run_of_a_sweep_is_reported_alone(made, tmp_path, given):
    report.report([made / "sweep" / given], tmp_path / "r.html", "title", recordings="none", files=["csv"])
    (run,) = gather([made / "sweep" / given]).finished
    assert run.folder == made / "sweep/cpc-a/run"


def test_a_run_says_what_its_sweep_declares_of_it(own):
    shutil.rmtree(own / "sweep/cpc-a/probes/frozen")
    study = gather([own / "sweep/cpc-a"])
    assert [state.state for state in study.states.values()] == ["lacks the probe frozen"]
    # A folder that the sweep does not know has nothing to lack.
    edit(own / "sweep/sweep.json", lambda content: content["runs"].pop("cpc-a"))
    study = gather([own / "sweep/cpc-a"])
    assert [state.state for state in study.states.values()] == ["finished"]


def test_a_copied_probe_stands_beside_the_run_where_it_was_made(own, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(own / "sweep/cpc-a/probe", copied)
    made_of = {"run": str(own / "sweep/cpc-a/run"), "step": 40}
    edit(copied / "results.json", lambda results: results.update(checkpoint=made_of))
    study = gather([copied, own / "sweep/cpc-b/run"])
    assert {run.folder for run in study.finished} == {own / f"sweep/cpc-{each}/run" for each in "ab"}


def test_deeper_folders_are_said_not_to_be_looked_at(made, tmp_path):
    (tmp_path / "deep/a").mkdir(parents=True)
    refused([tmp_path / "deep"], tmp_path, "deeper ones are not looked at")


def _class(**fields):
    return lambda results: results["per_class"]["MI"].update(fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(ci_low=2), "the fields ci_low and ci_high are 2 and"),
        (lambda r: r.update(ci_low=float("nan")), "the field ci_low is nan"),
        (lambda r: r.update(ci_high=float("inf")), "the field ci_high is inf"),
        (lambda r: r.update(ci_low=None), "which is no interval"),
        (lambda r: r.update(macro_auroc=0.5), "the field macro_auroc is 0.5000, but the predictions"),
        (_class(auroc=0.123), "the field per_class.MI.auroc is 0.1230, but the predictions beside it score"),
        (_class(auroc=None), "the field per_class.MI.auroc is null, but the predictions"),
        (_class(ci_high=0.0), "the fields per_class.MI.ci_low and per_class.MI.ci_high"),
        (lambda r: r["metrics"]["fmax"].update(low=2), "the fields metrics.fmax.low and metrics.fmax.high"),
        (lambda r: r["baselines"]["majority"].update(ci_low=2), "the fields baselines.majority.ci_low"),
    ],
)
@pytest.mark.parametrize("place", ["probe", "sweep/cpc-a/probe"])
def test_edited_scores_are_refused(own, tmp_path, change, said, place):
    edit(own / place / "results.json", change)
    folders = [own / "probe", own / "scratch"] if place == "probe" else [own / "sweep"]
    refused(folders, tmp_path, str(own / place / "results.json"), said)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("targets", lambda array: array.astype(str)),
        ("probabilities", lambda array: array.astype(str)),
        ("probabilities_random_init_seeds", lambda array: array > 0.5),
        ("record_id", lambda array: np.arange(len(array))),
        ("row", lambda array: array.astype(float)),
    ],
)
def test_arrays_of_another_kind_are_refused(own, name, change):
    path = own / "probe/predictions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: change(arrays[name])})
    with pytest.raises(UserError, match=rf"predictions\.npz: the array {name} is of "):
        read_result(own / "probe")


@pytest.mark.parametrize("field", ["low", "mean", "scores"])
def test_label_efficiency_holds_numbers_and_intervals(own, field):
    path = write_label_efficiency(own / "probe") / "label_efficiency.json"
    read_efficiency(path)
    name = json.loads(path.read_text())["models"].popitem()[0]
    for value, said in ((float("nan"), "is nan"), ("a", "is 'a'"), (9, "no interval")):
        wrong = [value] if field == "scores" else value
        edit(path, lambda content, wrong=wrong: content["models"][name][field].__setitem__(0, wrong))
        if value != 9 or field == "low":
            with pytest.raises(UserError, match=f"models.{name} of size .*{said}"):
                read_efficiency(path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("results.csv", "a,b\n1\n", "results.csv is missing or damaged"),
        ("results.csv", "", "results.csv is missing or damaged"),
        ("results.csv", "a,b\n1,\0\n", "results.csv is missing or damaged"),
        ("results.json", "[]", "results.json"),
        ("results.json", '{"note": 3}', "the field note is 3"),
        ("sweep.json", '{"sweep": "x.py"}', "sweep.json"),
    ],
)
def test_damaged_files_of_a_sweep_are_named(own, tmp_path, file, content, said):
    (own / "sweep" / file).write_text(content)
    refused([own / "sweep"], tmp_path, str(own / "sweep"), said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(sweep=3), "the field sweep is 3"),
        (lambda content: content["runs"]["cpc-a"].pop("probe"), "lacks the field runs.cpc-a.probe"),
        (lambda content: content["runs"]["cpc-a"].update(probe=3), "the field runs.cpc-a.probe is 3"),
        (lambda content: content["runs"]["cpc-a"].update(probes=[]), "the field runs.cpc-a.probes is []"),
    ],
)
def test_damaged_fields_of_a_sweep_are_named(own, tmp_path, change, said):
    edit(own / "sweep/sweep.json", change)
    refused([own / "sweep"], tmp_path, "sweep.json", said)


def test_a_folder_whose_name_is_not_utf8_is_refused(made, tmp_path):
    shutil.copytree(made / "figures", tmp_path / "own" / os.fsdecode(b"at\xe9"))
    refused([tmp_path / "own"], tmp_path, r"not UTF-8, at the end of", r"at\udce9")


class TestOutput:
    @pytest.mark.parametrize("length", [250, 254, 256, 5000])
    def test_names_that_are_too_long_leave_nothing(self, made, tmp_path, length):
        output = tmp_path / f"{'x' * (length - 5)}.html"
        if length == 250:
            report.report([made / "figures"], output, "title")
            assert len(list(tmp_path.iterdir())) == 2
            return
        with pytest.raises(UserError, match=r"--output=.* too long; choose another name"):
            report.report([made / "figures"], output, "title")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["main,mine\n1,2\n", "", "\0"])
    def test_a_folder_with_an_index_of_something_else_is_kept(self, made, tmp_path, content):
        tables = tmp_path / "r_tables"
        tables.mkdir()
        (tables / "index.csv").write_text(content)
        (tables / "main.csv").write_text("mine")
        with pytest.raises(
            UserError, match="r_tables, where the tables go, is there already and not of a report"
        ):
            report.report([made / "figures"], tmp_path / "r.html", "title")
        assert (tables / "index.csv").read_text() == content

    def test_a_folder_of_an_older_report_is_replaced(self, made, tmp_path):
        tables = tmp_path / "r_tables"
        tables.mkdir()
        (tables / "index.csv").write_text("table,caption\nscores,Scores\n")
        (tables / "scores.csv").write_text("of an older report")
        report.report([made / "figures"], tmp_path / "r.html", "title")
        assert not (tables / "scores.csv").exists()
