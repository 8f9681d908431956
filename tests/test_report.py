"""`ecg-jax report`: the page, what it refuses, and that a failure leaves nothing behind."""

import csv
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from ecg_jax import report
from ecg_jax.cli import main
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.studies.report.load import load
from report_fixtures import (
    CLEAN,
    LEAKING,
    write_label_efficiency,
    write_result,
    write_robustness,
    write_study,
)

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Outline(HTMLParser):
    """What a browser would complain about, and the parts that people meet."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.errors, self.ids, self.images, self.links = [], [], [], [], []
        self.tags, self.tables = [], []
        self.feed(text)
        self.close()
        if self.open:
            self.errors.append(f"never closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "table":
            self.tables.append(set())
        elif tag in ("caption", "thead", "th") and "table" in self.open:
            self.tables[-1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes something else at {self.getpos()}")


@pytest.fixture(scope="module")
def study(tmp_path_factory, synthetic_store):
    """Workdirs of a study with a task of real recordings, a leaking task and a regression; not to be changed."""
    tasks = {
        "ptbxl_super": {"store": Store(synthetic_store), "n": 90},
        "ptbxl_form": {"K": 3, "leakage": LEAKING, "n": 60},
        "mimic_age": {"kind": "regression", "K": 2, "group": "patient characteristics", "n": 60},
    }
    folder = tmp_path_factory.mktemp("study")
    workdirs = write_study(folder, tasks)
    write_robustness(workdirs[0] / "ptbxl_super")
    write_label_efficiency(folder / "labels")
    return [*workdirs, folder / "labels"]


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    """The report of the study: its folder and its text."""
    folder = tmp_path_factory.mktemp("page")
    arguments = [*map(str, study), f"--output={folder / 'report.html'}", "--title=CPC <& JEPA>"]
    assert main(["report", *arguments]) == 0
    return folder, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path):
    """Workdirs of one probe and one supervised encoder on one task, to be damaged."""
    return [
        write_result(tmp_path / "cpc", n=40, K=2),
        write_result(tmp_path / "scratch", n=40, K=2, model="supervised s4", mode="supervised"),
    ]


def edit(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_arrays(folder, **changes):
    path = folder / "predictions.npz"
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def refusal(workdirs, tmp_path, capsys) -> str:
    """What the command says on stderr when it refuses; it must leave nothing new."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    before = sorted(out.rglob("*"))
    assert main(["report", *map(str, workdirs), f"--output={out / 'report.html'}"]) == 2
    assert sorted(out.rglob("*")) == before
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


class TestPage:
    def test_is_well_formed(self, page):
        outline = Outline(page[1])
        assert not outline.errors
        assert len(outline.ids) == len(set(outline.ids))
        assert set(outline.tags) >= {"h1", "h2", "h3", "nav", "table", "details", "figure", "main"}

    def test_needs_nothing_from_elsewhere(self, page):
        outline = Outline(page[1])
        assert not re.search(r"https?://|//cdn|<script|<link|@import|url\(", page[1])
        assert all(image["src"].startswith("data:image/") for image in outline.images)
        inside = [link[1:] for link in outline.links if link.startswith("#")]
        assert inside
        assert set(inside) <= set(outline.ids)
        beside = [unquote(link) for link in outline.links if not link.startswith("#")]
        assert beside
        assert all((page[0] / link).is_file() for link in beside)

    def test_every_table_has_a_head_and_a_caption_and_every_image_a_text(self, page):
        outline = Outline(page[1])
        assert len(outline.tables) > 15
        assert all(parts == {"caption", "thead", "th"} for parts in outline.tables)
        assert len(outline.images) > 8
        assert all(len(image["alt"]) > 20 for image in outline.images)

    def test_every_table_and_picture_scrolls_in_a_box_of_its_own(self, page):
        assert page[1].count("<table>") == len(re.findall(r'<div class="scroll"[^>]*>\s*<table>', page[1]))
        assert page[1].count("<img") == len(re.findall(r'<div class="scroll"[^>]*><img', page[1]))

    def test_escapes_the_title(self, page):
        assert "<h1>CPC &lt;&amp; JEPA&gt;</h1>" in page[1]
        assert "<title>CPC &lt;&amp; JEPA&gt;</title>" in page[1]

    def test_says_which_command_made_it(self, page, study):
        said = re.sub(r"</?span>", "", page[1].split("<nav")[0])
        words = [
            *map(str, study),
            f"--output={page[0] / 'report.html'}",
            "&#x27;--title=CPC &lt;&amp; JEPA&gt;&#x27;",
        ]
        assert f"<code>ecg-jax report {' '.join(words)} --recordings=open</code>" in said

    def test_says_in_red_what_leaks(self, page):
        top = page[1].split("<nav")[0]
        assert '<div class="verdict bad"' in top
        assert "LEAKAGE FOUND in ptbxl_form" in top
        assert "No leakage found: ptbxl_super, mimic_age" in top
        assert re.search(r'<th scope="col" class="n bad">ptbxl_form ↑ \(not clean\)</th>', page[1])

    def test_has_every_section(self, page):
        headings = re.findall(r"<h2>(.*?)</h2>", page[1])
        assert headings == [
            "Contents", "What was compared", "Results", "Tasks and leakage", "What was left out",
            "Rankings, task by task", "Class by class", "Checkpoints, mode by mode", "Calibration", "Regressions",
            "Layers", "Label efficiency", "Robustness", "Recordings",
        ]  # fmt: skip

    def test_shows_recordings_where_the_store_is_and_says_where_it_is_not(self, page):
        assert page[1].count('src="data:image/png') == 3
        assert "Most confident and right: synthetic" in page[1]
        assert "the store stores/ptbxl cannot be opened here" in page[1]

    def test_shows_no_recordings_where_none_are_asked_for(self, study, tmp_path):
        assert main(["report", *map(str, study), f"--output={tmp_path / 'r.html'}", "--recordings=none"]) == 0
        text = (tmp_path / "r.html").read_text()
        assert "data:image/png" not in text
        assert text.count("the report was made with <code>--recordings=none</code>") == 2

    def test_is_small(self, page):
        assert len(page[1]) < 3e6

    def test_comes_with_its_tables(self, page):
        folder = page[0] / "report_tables"
        names = {path.stem for path in folder.glob("*.csv")}
        assert names >= {
            "main",
            "mean_ranks",
            "mean_places",
            "tasks",
            "leakage",
            "exclusions",
            "scores_ptbxl_super",
            "index",
        }
        of_figures = {name for name in names if name.startswith("figure_")}
        assert {path.stem for path in folder.glob("*.tex")} == names - {"index"} - of_figures
        assert not [path for path in page[0].rglob("*") if path.name.startswith(".")]

    def test_every_figure_says_what_it_shows_and_what_not_and_lies_beside_as_picture_and_data(self, page):
        found = re.findall(r'<figure id="(figure_\w+)">(.*?)</figure>', page[1], re.DOTALL)
        names = [name for name, _ in found if not name.startswith("figure_recording")]
        assert {re.sub(r"_(ptbxl|mimic).*|_1", "", name) for name in names} == {
            "figure_classes", "figure_modes", "figure_calibration", "figure_regression", "figure_robustness",
            "figure_label_efficiency",
        }  # fmt: skip
        folder = page[0] / "report_tables"
        for name, html in found:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / f"{name}.svg").read_bytes().startswith(b"<?xml")
            assert len((folder / f"{name}.csv").read_text().splitlines()) > 2
            assert html.count('href="report_tables/') == 3
            if name in names:
                assert "<b>Shows.</b> " in html
                assert "<b>Does not show.</b> " in html

    def test_data_of_a_recording_are_its_millivolts(self, page, synthetic_store):
        store = Store(synthetic_store)
        ids = store.column("record_id").astype(str).tolist()
        found = re.findall(r'<figure id="(figure_recording_\w+)">.*?ECG of record (\w+):', page[1], re.DOTALL)
        assert found
        for name, record in found:
            lines = list(csv.DictReader((page[0] / "report_tables" / f"{name}.csv").read_text().splitlines()))
            assert list(lines[0]) == ["time_s", *(f"{lead}_mv" for lead in store.leads)]
            values = np.array([[float(cell) for cell in line.values()] for line in lines])
            signal = store.read(ids.index(record))[: round(10 * store.rate_hz)]
            np.testing.assert_allclose(values[:, 0], np.arange(len(signal)) / store.rate_hz, atol=1e-4)
            np.testing.assert_allclose(values[:, 1:], signal / 1000, atol=1e-4)

    def test_data_of_a_figure_are_the_numbers_of_the_results(self, page, study):
        path = page[0] / "report_tables" / "figure_classes_ptbxl_super.csv"
        lines = list(csv.DictReader(path.read_text().splitlines()))
        results = json.loads((study[0] / "ptbxl_super" / "results.json").read_text())
        (line,) = (line for line in lines if line["model"] == "cpc, linear" and line["class"] == "MI")
        own = results["per_class"]["MI"]
        assert [float(line[name]) for name in ("auroc", "low", "high")] == pytest.approx(
            [own[name] for name in ("auroc", "ci_low", "ci_high")]
        )
        assert int(line["n"]) == own["n_pos"]


class TestOddStudies:
    def test_undefined_classes_unknown_patients_bca_intervals_and_one_class(self, tmp_path):
        workdirs = []
        for name, mode in (("cpc", "linear"), ("scratch", "supervised")):
            common = {"model": name, "mode": mode, "patients_known": False, "interval": "bca"}
            write_result(tmp_path / name / "rare", "ptbxl_sub", n=16, K=8, **common)
            write_result(tmp_path / name / "one", "mimic_sex", n=30, K=1, kind="binary", **common)
            workdirs.append(tmp_path / name)
        undefined = load(workdirs).of_task("ptbxl_sub")[0].results["classes_undefined_in_test"]
        assert undefined
        report.report(workdirs, tmp_path / "report.html", "odd")
        text = (tmp_path / "report.html").read_text()
        assert not Outline(text).errors
        lines = (tmp_path / "report_tables" / "exclusions.csv").read_text().splitlines()
        why = "no positive or no negative test record"
        assert [line for line in lines if why in line] == [
            f"ptbxl_sub,class undefined in test,{name},{why}" for name in undefined
        ]
        assert "Intervals: bca" in text
        assert "resampled records, as no patient is known" in text
        assert "resampled patients" not in text


class TestRefusals:
    def test_no_folder(self, tmp_path, capsys):
        assert "There is no folder" in refusal([tmp_path / "none"], tmp_path, capsys)

    def test_no_results(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        said = refusal([tmp_path / "empty"], tmp_path, capsys)
        assert "holds no results.json" in said
        assert "or of a sweep, a pretraining run, or figures" in said

    def test_twice_the_same(self, small, tmp_path, capsys):
        assert "given twice" in refusal([*small, small[0]], tmp_path, capsys)

    def test_interrupted(self, small, tmp_path, capsys):
        (small[0] / "results.json").unlink()
        assert "is incomplete: it has no results.json" in refusal(small, tmp_path, capsys)

    def test_interrupted_task_of_several(self, small, tmp_path, capsys):
        (small[0] / "ptbxl_all" / "fit").mkdir(parents=True)
        assert "ptbxl_all is incomplete" in refusal(small, tmp_path, capsys)

    def test_no_predictions(self, small, tmp_path, capsys):
        (small[0] / "predictions.npz").unlink()
        assert "it has no predictions.npz" in refusal(small, tmp_path, capsys)

    @pytest.mark.parametrize("text", ["{", "[]", "\xff"])
    def test_damaged_json(self, small, tmp_path, capsys, text):
        (small[0] / "results.json").write_bytes(text.encode("latin-1"))
        assert f"{small[0] / 'results.json'} is damaged" in refusal(small, tmp_path, capsys)

    def test_damaged_predictions(self, small, tmp_path, capsys):
        path = small[0] / "predictions.npz"
        path.write_bytes(path.read_bytes()[:-200])
        assert f"{path} is damaged" in refusal(small, tmp_path, capsys)

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"task": 3}, "task"),
            ({"mode": "zero-shot"}, "mode"),
            ({"metric": "mae"}, "kind and metric"),
            ({"macro_auroc": None}, "macro_auroc"),
            ({"bootstrap": {"unit": "patient"}}, "bootstrap.resamples"),
            ({"store": {"path": "a", "corpus": "b"}}, "store.fingerprint"),
            ({"leakage": LEAKING | {"clean": "no"}}, "leakage.clean"),
            ({"layers": {"chosen": "last"}}, "layers.validation"),
            ({"split": {"rule": "fold 10"}}, "split.fingerprint"),
            ({"test_store": "stores/b"}, "test_store"),
            ({"leakage": CLEAN | {"examined": {"identical": True}}}, "leakage.examined"),
            (
                {"baselines": {"random_init": {"macro_auroc": 0.5, "ci_low": 0, "ci_high": 1}}},
                "random_init.mode",
            ),
        ],
    )
    def test_fields(self, small, tmp_path, capsys, changes, field):
        edit(small[0], **changes)
        message = refusal(small, tmp_path, capsys)
        assert field in message
        assert str(small[0] / "results.json") in message

    def test_missing_field(self, small, tmp_path, capsys):
        path = small[0] / "results.json"
        content = json.loads(path.read_text())
        del content["per_class"]["MI"]["n_pos"]
        path.write_text(json.dumps(content))
        assert f"{path} lacks the field per_class.MI.n_pos" in refusal(small, tmp_path, capsys)

    def test_arrays_of_another_size(self, small, tmp_path, capsys):
        edit_arrays(small[0], row=np.arange(39))
        assert "its array row is [39], not [40]" in refusal(small, tmp_path, capsys)

    def test_missing_array(self, small, tmp_path, capsys):
        edit_arrays(small[0], row=None)
        assert "lacks the array row" in refusal(small, tmp_path, capsys)

    def test_predictions_that_are_not_finite(self, small, tmp_path, capsys):
        edit_arrays(small[0], probabilities=np.full((40, 2), np.nan))
        assert "array probabilities holds values that are not finite" in refusal(small, tmp_path, capsys)

    def test_predictions_of_another_probe(self, small, tmp_path, capsys):
        other = write_result(tmp_path / "other", n=40, K=2, model="jepa")
        (small[0] / "predictions.npz").write_bytes((other / "predictions.npz").read_bytes())
        assert "but the predictions beside it score" in refusal(small, tmp_path, capsys)

    def test_other_test_records(self, small, tmp_path, capsys):
        edit_arrays(small[0], record_id=np.array([f"x{i}" for i in range(40)]))
        message = refusal(small, tmp_path, capsys)
        assert str(small[0]) in message
        assert "differ in record_id" in message

    def test_other_training_records(self, small, tmp_path, capsys):
        edit_arrays(small[0], probabilities_majority=np.full((40, 2), 0.3))
        assert "differ in probabilities_majority" in refusal(small, tmp_path, capsys)

    def test_other_resamples(self, small, tmp_path, capsys):
        settings = json.loads((small[0] / "results.json").read_text())["bootstrap"]
        edit(small[0], bootstrap=settings | {"level": 0.9})
        assert "differ in bootstrap" in refusal(small, tmp_path, capsys)

    def test_other_training_records_of_the_same_prevalence(self, small, tmp_path, capsys):
        split = json.loads((small[0] / "results.json").read_text())["split"]
        edit(small[0], split=split | {"fingerprint": "8" * 64})
        assert "differ in split.fingerprint" in refusal(small, tmp_path, capsys)

    def test_another_test_store(self, small, tmp_path, capsys):
        edit(small[0], test_store={"path": "stores/other", "corpus": "ptbxl", "fingerprint": "6" * 64})
        assert "differ in test_store" in refusal(small, tmp_path, capsys)

    def test_other_ecg_features(self, small, tmp_path, capsys):
        edit_arrays(small[0], probabilities_ecg_features=np.full((40, 2), 0.3))
        assert "differ in probabilities_ecg_features" in refusal(small, tmp_path, capsys)

    def test_intervals_of_another_kind_in_another_task(self, small, tmp_path, capsys):
        other = write_result(tmp_path / "form", "ptbxl_form", n=40, K=2, interval="bca")
        message = refusal([*small, other], tmp_path, capsys)
        assert f"{small[0]} and {other} differ in bootstrap.interval" in message

    def test_no_supervised_encoder(self, small, tmp_path, capsys):
        message = refusal(small[:1], tmp_path, capsys)
        assert "Task ptbxl_super has no encoder trained from scratch" in message
        assert "--config=configs/probe.py:mode=supervised,task=ptbxl_super" in message

    @pytest.mark.parametrize("name", ["random_init", "ecg_features", "majority"])
    def test_no_baseline(self, small, tmp_path, capsys, name):
        baselines = json.loads((small[0] / "results.json").read_text())["baselines"]
        edit(small[0], baselines=baselines | {name: None})
        message = refusal(small, tmp_path, capsys)
        assert f"has no baseline {name} for task ptbxl_super" in message
        assert "ecg-jax probe --config=configs/probe.py:mode=linear,task=ptbxl_super" in message

    def test_same_model_in_folders_of_the_same_name(self, small, tmp_path, capsys):
        again = write_result(tmp_path / "elsewhere" / "cpc", n=40, K=2)
        message = refusal([*small, again], tmp_path, capsys)
        assert f"{small[0]} and {again} both hold task ptbxl_super of the model cpc" in message

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda c: c["families"][1]["conditions"][0].pop("point"), "families[1].conditions[0].point"),
            (lambda c: c.update(metric="accuracy"), "the field metric is 'accuracy'"),
            (lambda c: c["families"].clear(), "the field families is empty"),
            (lambda c: c["families"][2]["conditions"].clear(), "the field families[2].conditions is empty"),
            (lambda c: c.pop("bootstrap"), "lacks the field bootstrap"),
        ],
    )
    def test_damaged_robustness(self, small, tmp_path, capsys, damage, said):
        path = write_robustness(small[0]) / "robustness.json"
        content = json.loads(path.read_text())
        damage(content)
        path.write_text(json.dumps(content))
        message = refusal(small, tmp_path, capsys)
        assert str(path) in message
        assert said in message

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda c: c["models"]["cpc"]["scores"].pop(), "models.cpc.scores"),
            (lambda c: c["models"]["cpc"]["low"].pop(), "models.cpc.low"),
            (lambda c: c["models"]["cpc"]["scores"][0].clear(), "models.cpc.scores must hold"),
            (lambda c: c["models"]["cpc"].update(mean=["a"] * 6), "models.cpc of size"),
            (lambda c: c.update(metric="accuracy"), "the field metric is 'accuracy'"),
            (lambda c: c.update(sizes=[]), "the field sizes is empty"),
            (lambda c: c.update(sizes=[0] * 6), "sizes must hold"),
            (lambda c: c["saving"].update(cpc=3), "saving.cpc"),
            (lambda c: c["saving"]["cpc"]["random_init"]["by_size"][0].pop("low"), "by_size[0].low"),
        ],
    )
    def test_damaged_label_efficiency(self, small, tmp_path, capsys, damage, said):
        path = write_label_efficiency(small[0]) / "label_efficiency.json"
        content = json.loads(path.read_text())
        damage(content)
        path.write_text(json.dumps(content))
        message = refusal(small, tmp_path, capsys)
        assert str(path) in message
        assert said in message


class TestNames:
    def test_folders_tell_models_of_one_name_apart(self, small, tmp_path):
        again = write_result(tmp_path / "cpc_longer", n=40, K=2)
        models = [result.model for result in load([*small, again]).results]
        assert models == ["cpc (cpc)", "supervised s4", "cpc (cpc_longer)"]


class TestOutput:
    @pytest.mark.parametrize("name", ["report.pdf", "none/report.html", "folder.html"])
    def test_refuses_what_it_cannot_write(self, small, tmp_path, name):
        (tmp_path / "folder.html").mkdir()
        with pytest.raises(UserError, match="--output="):
            report.report(small, tmp_path / name, "title")

    def test_keeps_what_is_no_report(self, small, tmp_path):
        (tmp_path / "thesis.html").write_text("<p>years of work</p>")
        with pytest.raises(UserError, match="no report"):
            report.report(small, tmp_path / "thesis.html", "title")
        assert (tmp_path / "thesis.html").read_text() == "<p>years of work</p>"

    def test_keeps_a_folder_of_something_else(self, small, tmp_path):
        (tmp_path / "report_tables").mkdir()
        (tmp_path / "report_tables" / "main.csv").write_text("mine")
        with pytest.raises(UserError, match="not of a report"):
            report.report(small, tmp_path / "report.html", "title")
        assert not (tmp_path / "report.html").exists()

    def test_replaces_a_report_and_its_stale_tables_only(self, small, tmp_path):
        output, tables = tmp_path / "report.html", tmp_path / "report_tables"
        report.report(small, output, "first")
        assert "<h1>first</h1>" in output.read_text()
        with open(tables / "index.csv", "a") as file:
            file.write("scores_gone,of a task that is gone\n")
        (tables / "scores_gone.csv").write_text("stale")
        (tables / "mine.csv").write_text("kept")
        report.report(small, output, "second")
        assert "<h1>second</h1>" in output.read_text()
        assert not (tables / "scores_gone.csv").exists()
        assert (tables / "mine.csv").read_text() == "kept"

    def test_writes_and_links_to_the_files_asked_for_only(self, small, tmp_path, capsys):
        output, tables = tmp_path / "report.html", tmp_path / "report_tables"
        arguments = ["report", *map(str, small), f"--output={output}"]
        assert main(arguments) == 0
        assert {path.suffix for path in tables.iterdir()} == {".csv", ".tex", ".png", ".svg"}
        assert main([*arguments, "--files=csv"]) == 0
        assert {path.suffix for path in tables.iterdir()} == {".csv"}, "also none of the report before"
        page = output.read_text()
        links = set(re.findall(r'href="report_tables/([^"]+)"', page))
        assert links == {path.name for path in tables.iterdir()} - {"index.csv"}
        assert "--files=csv" in page
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--files=csv,pdf"])
        assert stopped.value.code == 2
        assert "'pdf' is none of csv, tex, png, svg" in capsys.readouterr().err

    def test_leaves_nothing_new_when_writing_fails(self, small, tmp_path, monkeypatch):
        out = tmp_path / "out"
        out.mkdir()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report.os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            report.report(small, out / "report.html", "title")
        assert list(out.iterdir()) == []

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["report", "--help"])
        assert stopped.value.code == 0
        assert "mode=supervised" in capsys.readouterr().out
