"""Pictures of `ecg-jax report`: what is drawn, of whom, and which recordings are shown."""

import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ecg_jax.data.store import Store
from ecg_jax.evaluation import report_plots
from ecg_jax.evaluation.calibration import reliability
from ecg_jax.evaluation.drawing import looks_of, to_svg
from ecg_jax.evaluation.label_efficiency_plot import error_curves, error_figure
from ecg_jax.studies.report import figures, recordings, rows
from ecg_jax.studies.report.load import load
from report_fixtures import write_label_efficiency, write_result, write_robustness


def words(svg: bytes) -> list[str]:
    """Texts of a picture, which must be SVG that stands alone."""
    assert b"<!--" not in svg
    root = ElementTree.fromstring(svg)
    linked = [element.get("{http://www.w3.org/1999/xlink}href") or "#" for element in root.iter()]
    assert all(link.startswith(("#", "data:")) for link in linked)
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("}text")]


def task_of(*folders, name="ptbxl_super"):
    return rows.score_tasks(load(folders))[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint in two modes and a supervised encoder on one task."""
    folder = tmp_path_factory.mktemp("probes")
    return [
        write_result(folder / "a", n=80, K=3, quality=1.5),
        write_result(folder / "b", n=80, K=3, mode="finetune", quality=0.8),
        write_result(folder / "s", n=80, K=3, mode="supervised", model="scratch", quality=0.5),
    ]


@pytest.fixture(scope="module")
def task(folders):
    return task_of(*folders)


class TestLooks:
    def test_no_two_models_look_alike(self):
        looks = looks_of([str(i) for i in range(40)])
        assert len(set(looks.values())) == 40
        assert len({colour for colour, _ in list(looks.values())[:8]}) == 8

    def test_a_probe_looks_alike_in_all_tasks(self, folders):
        looks = figures.looks_of(rows.score_tasks(load(folders)))
        assert set(looks) == {"cpc, linear", "cpc, finetune", "scratch, from scratch", "cpc"}


class TestForest:
    def test_names_classes_models_and_counts(self, task):
        picture = figures.forest(task, figures.looks_of({"t": task}))
        text = words(picture.data)
        n = task.first.results["per_class"]["NORM"]["n_pos"]
        assert f"NORM  (n={n})" in text
        assert {
            "cpc, linear",
            "cpc, finetune",
            "scratch, from scratch",
            "random initialisation, linear",
        } <= set(text)
        assert "AUROC of 3 classes of ptbxl_super" in picture.alt

    def test_undefined_classes_are_said(self):
        values = np.array([[0.8, 0.7, 0.9], [np.nan] * 3])
        looks = looks_of(["m"])
        figure = report_plots.class_forest(
            ["A", "B"], [20, 0], {"m": values}, looks, None, "AUROC", 0.5, 0.95
        )
        assert "undefined in the test records" in words(to_svg(figure))

    def test_digits_of_texts_are_kept(self):
        values = np.array([[0.8, 0.7, 0.9]])
        looks = looks_of(["m 0.12345"])
        figure = report_plots.class_forest(
            ["A 0.98765"], [20], {"m 0.12345": values}, looks, None, "AUROC", 0.5, 0.95
        )
        assert {"m 0.12345", "A 0.98765  (n=20)"} <= set(words(to_svg(figure)))

    def test_many_models_are_cut_and_said(self, tmp_path):
        many = [write_result(tmp_path / f"m{i}", n=40, K=2, model=f"m{i}", quality=i / 4) for i in range(8)]
        task = task_of(*many, write_result(tmp_path / "s", n=40, K=2, mode="supervised", model="scratch"))
        picture = figures.forest(task, figures.looks_of({"t": task}))
        assert "The 6 best of 9 are drawn." in picture.caption
        drawn = {text for text in words(picture.data) if text.endswith(", linear") and text.startswith("m")}
        best = [entry.row.label for entry in task.ranked if entry.result is not None][:6]
        assert drawn == {label for label in best if label.startswith("m")}


class TestModes:
    def test_a_panel_for_each_task_and_baselines_across(self, task):
        (picture,) = figures.modes({"ptbxl_super": task}, figures.looks_of({"t": task}))
        text = words(picture.data)
        assert {"ptbxl_super", "linear", "finetune", "cpc", "supervised from scratch"} <= set(text)
        assert "frozen" not in text

    def test_many_tasks_take_several_pictures(self, task):
        scores = {f"task{i}": task for i in range(7)}
        assert len(figures.modes(scores, figures.looks_of({"t": task}))) == 2


class TestCalibration:
    def test_shows_the_worst_calibrated_classes_of_the_best_model(self, task):
        picture = figures.calibration(task, figures.looks_of({"t": task}))
        per_class = task.best_probe.result.results["per_class"]
        worst = sorted(per_class, key=lambda name: per_class[name]["ece"], reverse=True)[:2]
        assert [text for text in words(picture.data) if "ECE" in text] == [
            f"{name} (ECE {per_class[name]['ece']:.3f})" for name in worst
        ]

    def test_perfect_predictions_lie_on_the_diagonal(self):
        generator = np.random.default_rng(0)
        said = generator.random((20000, 1))
        targets = (generator.random((20000, 1)) < said).astype(float)
        predicted, observed, n = (part[0] for part in reliability(targets, said))
        assert np.abs(predicted - observed).max() < 0.05
        figure = report_plots.calibration([("all", {"m": (predicted, observed, n)})], looks_of(["m"]))
        assert "share of positives" in words(to_svg(figure))


class TestCurves:
    def test_label_efficiency(self, tmp_path):
        write_label_efficiency(tmp_path / "a")
        collection = load([tmp_path / "a", write_result(tmp_path / "b", n=40, K=2)])
        text = words(figures.label_efficiency("ptbxl_super", collection.efficiency, {}).data)
        assert {"16", "512", "cpc", "random_init", "majority guess"} <= set(text)

    def test_undefined_scores_leave_a_gap(self):
        model = {"mean": [None, 0.7], "low": [None, 0.6], "high": [None, 0.8], "fit": None}
        study = {"metric": "macro_auroc", "sizes": [8, 16], "models": {"m": model}}
        svg = to_svg(error_figure([(study, {"m": "m"})], looks_of(["m"])))
        assert {"8", "16", "m"} <= set(words(svg))

    def test_a_model_has_the_colour_of_the_page(self, tmp_path):
        write_label_efficiency(tmp_path / "a")
        curves = load([tmp_path / "a", write_result(tmp_path / "b", n=40, K=2)]).efficiency
        svg = figures.label_efficiency("ptbxl_super", curves, {"cpc": ("#CC79A7", "^")}).data.lower()
        assert b"#cc79a7" in svg
        assert b"#0072b2" in svg  # the other one takes the first colour that is left

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_the_suffix_says_how_a_picture_is_written(self, tmp_path, suffix):
        write_label_efficiency(tmp_path)
        path = tmp_path / f"curves{suffix}"
        error_curves(json.loads((tmp_path / "label_efficiency.json").read_text()), path)
        assert path.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])

    def test_robustness(self, tmp_path):
        for name in ("a", "b"):
            write_robustness(write_result(tmp_path / name, n=40, K=2, model=name))
        curves = load([tmp_path / "a", tmp_path / "b"]).robustness
        assert [curve.model for curve in curves] == ["a, linear", "b, linear"]
        text = words(figures.robustness("ptbxl_super", curves, {}).data)
        assert {
            "Leads of the device",
            "powerline",
            "limb swap",
            "RA-LA",
            "1.25*",
            "a, linear",
            "b, linear",
        } <= set(text)

    def test_robustness_lies_in_the_folder_of_its_probe(self, tmp_path):
        write_robustness(
            write_result(tmp_path / "all" / "ptbxl_super", n=40, K=2) / "robustness", model="other"
        )
        curves = load([tmp_path / "all"]).robustness
        assert [curve.model for curve in curves] == ["cpc, linear"]
        assert len(load([tmp_path / "all" / "ptbxl_super"]).robustness) == 1

    def test_robustness_in_a_folder_of_its_own_is_named_by_its_probe(self, tmp_path):
        write_robustness(tmp_path / "r", model="jepa")
        curves = load([tmp_path / "r", write_result(tmp_path / "p", n=40, K=2)]).robustness
        assert curves[0].model == "jepa, linear"


class TestRegression:
    def test_predicted_against_true(self, tmp_path):
        folder = write_result(tmp_path, "mimic_age", n=60, K=2, kind="regression")
        task = task_of(folder, name="mimic_age")
        picture = figures.regression(task)
        known = task.first.results["per_class"]["MI"]["n"]
        assert f"MI (n={known})" in words(picture.data)
        assert words(figures.forest(task, figures.looks_of({"t": task})).data).count("chance") == 0


class TestExamples:
    def test_choice(self):
        targets = np.array([[1, 0], [1, 0], [0, 1], [0, np.nan]])
        probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.8, 0.6], [0.2, 0.5]])
        assert recordings.choose_examples(targets, probabilities) == {
            "Most confident and right": (0, 0),
            "Most confident and wrong": (2, 0),
            "Least sure": (1, 0),
        }

    def test_nothing_is_wrong(self):
        found = recordings.choose_examples(np.array([[1.0], [0.0]]), np.array([[0.9], [0.2]]))
        assert "Most confident and wrong" not in found

    def test_recordings_of_the_best_probe(self, tmp_path, synthetic_store):
        from PIL import Image

        store = Store(synthetic_store)
        task = task_of(write_result(tmp_path / "a", n=60, K=3, store=store))
        found, sentence = recordings.examples(task, "open")
        assert "cpc, linear" in sentence
        assert [example.heading for example in found] == [
            "Most confident and right", "Most confident and wrong", "Least sure"
        ]  # fmt: skip
        assert len({example.record_id for example in found}) == 3
        best = found[0]
        row = store.column("record_id").tolist().index(best.record_id)
        targets = task.first.predictions["targets"][row]
        assert {name: target for name, target, _ in best.predicted}["NORM"] == targets[0]
        assert [p for *_, p in best.predicted] == sorted((p for *_, p in best.predicted), reverse=True)
        with Image.open(io.BytesIO(best.picture.data)) as image:
            assert image.width > 700
            assert len(image.getcolors()) > 4

    def test_a_store_that_is_gone(self, task):
        assert recordings.examples(task, "open") == (
            [],
            "No recordings are shown: the store stores/ptbxl cannot be opened here.",
        )

    def test_a_store_that_has_changed(self, tmp_path, synthetic_store):
        folder = write_result(
            tmp_path / "a",
            n=60,
            K=2,
            store=Store(synthetic_store),
            changes={"store": {"path": str(synthetic_store), "corpus": "synthetic", "fingerprint": "0" * 64}},
        )
        found, sentence = recordings.examples(task_of(folder), "open")
        assert not found
        assert "has changed since the probe" in sentence

    @pytest.mark.parametrize("corpus", ["mimic", "echonext"])
    def test_recordings_that_must_not_be_passed_on_are_left_out_unless_asked_for(
        self, tmp_path, synthetic_store, corpus
    ):
        store = Store(synthetic_store)
        described = {"path": str(synthetic_store), "corpus": corpus, "fingerprint": store.fingerprint}
        changes = {"test_store": described}  # trained on an open corpus
        task = task_of(write_result(tmp_path, n=60, K=2, store=store, changes=changes))
        found, sentence = recordings.examples(task, "open")
        assert not found
        assert f"those of {corpus} are lent under an agreement" in sentence
        assert len(recordings.examples(task, "all")[0]) == 3
        assert not recordings.examples(task, "none")[0]
