"""Tables of `ecg-jax report`: figures, marks, ranks and their CSV and LaTeX."""

import csv
import io
import json
import re

import numpy as np
import pytest

from ecg_jax.evaluation.ranking import rank_models
from ecg_jax.studies.report import rows, tables, task_tables
from ecg_jax.studies.report.cells import Cell, Table, interval, number, p_value
from ecg_jax.studies.report.export import escape, to_csv, to_latex
from ecg_jax.studies.report.html import build
from ecg_jax.studies.report.load import load
from ecg_jax.studies.report.page import Beside, table_html
from report_fixtures import CLEAN, LEAKING, RESAMPLES, write_label_efficiency, write_result, write_study


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A study of two classifications and a regression, and its rows."""
    tasks = {
        "ptbxl_super": {"n": 100},
        "ptbxl_form": {"K": 3, "n": 80, "leakage": LEAKING},
        "mimic_age": {"kind": "regression", "K": 2, "group": "patient characteristics", "n": 80},
    }
    collection = load(write_study(tmp_path_factory.mktemp("study"), tasks))
    rows.check_baselines(collection)
    return collection, rows.score_tasks(collection)


def column(table: Table, name: str) -> list[Cell]:
    k = list(table.head).index(name)
    return [row[k] for row in table.rows]


class TestCells:
    def test_numbers(self):
        assert number(0.93449) == "0.934"
        assert number(-0.0101, sign=True) == "\N{MINUS SIGN}0.010"
        assert number(0.01, sign=True) == "+0.010"
        assert number(None) == number(float("nan")) == "\N{EN DASH}"

    def test_an_undefined_point_has_no_interval(self):
        assert interval(None, None, None).plain == "\N{EN DASH}"
        assert interval(0.5, None, None).plain == "0.500 [\N{EN DASH}, \N{EN DASH}]"

    def test_p_values_are_no_smaller_than_resamples_allow(self):
        assert p_value(2 / 101, 100) == "≤ 0.02"
        assert p_value(0.0312, 1000) == "0.031"
        assert p_value(None, 1000) == "\N{EN DASH}"


class TestRows:
    def test_baselines_are_rows_of_every_task(self, loaded):
        labels = {row.label for row in rows.all_rows(loaded[1])}
        assert labels == {
            "cpc, linear", "cpc, finetune", "jepa, linear", "jepa, finetune", "supervised s4, from scratch",
            "random initialisation, linear", "simple ECG features, linear", "majority guess",
        }  # fmt: skip
        assert all(set(task.entries) == set(rows.all_rows(loaded[1])) for task in loaded[1].values())

    def test_encoders_of_other_architectures_have_their_own_random_initialisation(self, tmp_path):
        folders = [
            write_result(tmp_path / "a", model="cpc", n=40, K=2),
            write_result(tmp_path / "b", model="jepa", n=40, K=2),
            write_result(tmp_path / "c", model="hubert", n=40, K=2, encoder="transformer"),
            write_result(tmp_path / "s", model="scratch", n=40, K=2, mode="supervised"),
        ]
        scores = rows.score_tasks(load(folders))
        names = [row.model for row in rows.all_rows(scores) if row.baseline == rows.RANDOM_INIT]
        assert names == ["random initialisation of cpc, jepa", "random initialisation of hubert"]

    def test_linear_and_frozen_probes_of_a_checkpoint_have_random_initialisations_of_their_own(
        self, tmp_path
    ):
        tasks = ("ptbxl_super", "ptbxl_form")
        for mode in ("linear", "frozen", "finetune"):
            for task in tasks:
                write_result(tmp_path / mode / task, task, n=40, K=2, mode=mode)
        collection = load([tmp_path / mode for mode in ("linear", "frozen", "finetune")])
        scores = rows.score_tasks(collection)
        for task in tasks:
            entries = scores[task].entries
            twins = {
                entry.row.label: entry for entry in entries.values() if entry.row.baseline == rows.RANDOM_INIT
            }
            assert set(twins) == {"random initialisation, linear", "random initialisation, frozen"}
            for result in collection.of_task(task):
                mode = {"finetune": "linear"}.get(result.mode, result.mode)
                expected = result.results["baselines"]["random_init"]["macro_auroc"]
                assert twins[f"random initialisation, {mode}"].point == expected
            linear, frozen = (twins[f"random initialisation, {mode}"].point for mode in ("linear", "frozen"))
            assert linear != frozen

    def test_frozen_probes_alone_have_a_frozen_random_initialisation(self, tmp_path):
        scores = rows.score_tasks(load([write_result(tmp_path, n=40, K=2, mode="frozen")]))
        labels = [row.label for row in rows.all_rows(scores) if row.baseline == rows.RANDOM_INIT]
        assert labels == ["random initialisation, frozen"]

    def test_twins_of_one_model_that_differ_between_modes_are_all_rows(self, tmp_path):
        folders = [
            write_result(tmp_path / "a", n=40, K=2),
            write_result(tmp_path / "b", n=40, K=2, mode="finetune", encoder="of another config"),
        ]
        names = [row.model for row in rows.all_rows(rows.score_tasks(load(folders)))]
        assert [name for name in names if name.startswith(rows.RANDOM_INIT)] == [
            "random initialisation of cpc", "random initialisation of cpc beside finetune"
        ]  # fmt: skip

    def test_random_initialisation_is_the_mean_over_its_seeds(self, loaded):
        task = loaded[1]["ptbxl_super"]
        entry = next(e for e in task.entries.values() if e.row.baseline == rows.RANDOM_INIT)
        assert entry.seeds == 3
        assert entry.scored.macros("exclude")[0] == pytest.approx(entry.point, abs=1e-12)

    def test_ranks_are_those_of_the_ranking(self, loaded):
        task = loaded[1]["mimic_age"]
        expected = rank_models({e.row.label: e.scored for e in task.entries.values()})
        assert [rank.model for rank in task.ranks] == [rank.model for rank in expected]
        assert [rank.rank for rank in task.ranks] == [rank.rank for rank in expected]
        points = [entry.point for entry in task.ranked if entry.rank.rank == 1]
        assert points[0] == min(entry.point for entry in task.entries.values())

    def test_holm_counts_the_comparisons_of_all_tasks(self, loaded):
        corrected = [r for task in loaded[1].values() for r in task.ranks if r.to_best is not None]
        assert len(corrected) == 3 * 7
        smallest = min(r.to_best.p_value for r in corrected)
        assert min(r.p_holm for r in corrected) == pytest.approx(min(1.0, 21 * smallest))


class TestMainTable:
    def test_cells_are_those_of_the_results(self, loaded):
        table = tables.main_table(*loaded)
        result = loaded[0].of_task("ptbxl_super")[0].results
        cell = column(table, "ptbxl_super ↑")[0]
        assert cell.text == f"{result['macro_auroc']:.3f}"
        assert cell.interval == f"[{result['ci_low']:.3f}, {result['ci_high']:.3f}]"

    def test_says_what_was_resampled(self, loaded, tmp_path):
        assert (
            "from resampled patients, and records whose patient is not known."
            in tables.main_table(*loaded).caption
        )
        folders = [
            write_result(tmp_path / "a", n=40, K=2),
            write_result(tmp_path / "b", "ptbxl_form", n=40, K=2, patients_known=False),
        ]
        collection = load(folders)
        caption = tables.main_table(collection, rows.score_tasks(collection)).caption
        assert (
            "whose patient is not known (ptbxl_super); resampled records, as no patient is known (ptbxl_form)"
            in caption
        )

    def test_groups_span_their_tasks(self, loaded):
        table = tables.main_table(*loaded)
        assert list(table.head) == [
            "model", "mode", "ptbxl_super ↑", "ptbxl_form ↑ (not clean)", "mimic_age ↓"
        ]  # fmt: skip
        assert list(table.spans) == [("", 2), ("adult ECG", 2), ("patient characteristics", 1)]
        assert list(table.bad_columns) == [3]

    def test_one_best_in_each_task_and_ties_are_of_rank_1(self, loaded):
        table = tables.main_table(*loaded)
        order = rows.all_rows(loaded[1])
        for k, task in enumerate(loaded[0].tasks):
            marks = {row.label: cells[k + 2].mark for row, cells in zip(order, table.rows, strict=True)}
            ranks = loaded[1][task].ranks
            assert [label for label, mark in marks.items() if mark == "best"] == [ranks[0].model]
            tied = {rank.model for rank in ranks if rank.rank == 1} - {ranks[0].model}
            assert {label for label, mark in marks.items() if mark == "tied"} == tied

    def test_baselines_come_last_under_a_line(self, loaded):
        table = tables.main_table(*loaded)
        assert [row[0].text for row in table.rows[table.sections[0] :]] == [
            "supervised s4", "random initialisation", "simple ECG features", "majority guess"
        ]  # fmt: skip

    def test_mean_ranks_leave_out_rows_that_lack_tasks(self, tmp_path):
        folders = write_study(tmp_path, {"ptbxl_super": {"n": 40, "K": 2}, "ptbxl_form": {"n": 40, "K": 2}})
        (folders[0] / "ptbxl_form" / "results.json").unlink()
        (folders[0] / "ptbxl_form" / "predictions.npz").unlink()
        (folders[0] / "ptbxl_form").rmdir()
        collection = load(folders)
        scores = rows.score_tasks(collection)
        table = tables.mean_rank_table(collection, scores)
        means = {f"{row[0].text}, {row[1].text}": row[2] for row in table.rows}
        assert means["cpc, linear"].text == "\N{EN DASH}"
        best = min(float(cell.text) for cell in means.values() if cell.text != "\N{EN DASH}")
        assert {cell.text for cell in means.values() if cell.mark == "best"} == {f"{best:.2f}"}
        assert column(tables.main_table(collection, scores), "ptbxl_form ↑")[0].mark == "mute"


class TestLeakage:
    def verdict(self, tmp_path, leakage, mode="linear"):
        return tables.leakage(
            load([write_result(tmp_path, n=40, K=2, leakage=leakage, mode=mode)]).results[0]
        )

    def test_states(self, tmp_path):
        unexamined = CLEAN | {
            "pretraining": None,
            "pretraining_problem": "There is no store at x.",
            "examined": CLEAN["examined"] | {"pretraining": False},
        }
        none = {"examined": CLEAN["examined"] | {"pretraining": None}, "pretraining_problem": None}
        assert self.verdict(tmp_path / "a", CLEAN)[0] == "clean"
        assert self.verdict(tmp_path / "b", LEAKING)[0] == "not clean"
        assert self.verdict(tmp_path / "c", None)[0] == "not audited"
        state, sentence = self.verdict(tmp_path / "d", unexamined)
        assert state == "partly examined"
        assert "There is no store at x." in sentence
        # A supervised encoder was never pretrained, so that there is nothing more to examine.
        assert self.verdict(tmp_path / "e", unexamined | none, "supervised")[0] == "clean"
        near = CLEAN | {"examined": CLEAN["examined"] | {"near_identical": False}}
        assert self.verdict(tmp_path / "f", near)[0] == "partly examined"
        # Results from before "examined" say it by what is null.
        before = {key: value for key, value in CLEAN.items() if key != "examined"}
        assert self.verdict(tmp_path / "g", before)[0] == "clean"
        near = before | {"near_identical_train_test": None}
        assert self.verdict(tmp_path / "h", near)[0] == "partly examined"

    def test_the_worst_verdict_is_the_task_s(self, tmp_path):
        folders = [
            write_result(tmp_path / "a", n=40, K=2, leakage=LEAKING),
            write_result(tmp_path / "b", n=40, K=2, mode="supervised", model="scratch"),
        ]
        scores = rows.score_tasks(load(folders))
        table = tables.leakage_table(scores)
        assert [cell.text for cell in column(table, "verdict")] == ["NOT CLEAN", "clean"]
        assert [cell.mark for cell in column(tables.task_table(scores), "leakage")] == ["bad"]


class TestTaskTables:
    def test_numbers_of_a_task(self, loaded):
        table = tables.task_table(loaded[1])
        first = dict(zip(table.head, [cell.text for cell in table.rows[0]], strict=True))
        per_class = loaded[0].of_task("ptbxl_super")[0].results["per_class"]
        n = [entry["n_pos"] for entry in per_class.values()]
        assert first["task"] == "ptbxl_super"
        assert first["test records"] == "100"
        assert first["n per class"] == f"{min(n)} to {max(n)}"

    def test_everything_left_out_has_a_line(self, loaded):
        lines = {tuple(cell.text for cell in row) for row in tables.exclusions(loaded[1]).rows}
        assert (
            "ptbxl_super",
            "class dropped",
            "TRIGU",
            "3 positive records, fewer than min_count=10",
        ) in lines
        assert ("ptbxl_super", "records excluded", "stores/ptbxl", "2 shorter than window") in lines

    def test_ranking_has_differences_to_the_best(self, loaded):
        task = loaded[1]["ptbxl_super"]
        table = task_tables.score_table(task)
        cells = column(table, "difference to the best")
        assert cells[0].text == "best"
        assert all(cell.text.startswith("\N{MINUS SIGN}") for cell in cells[1:])
        assert cells[-1].text == number(task.ranked[-1].point - task.ranked[0].point, sign=True)
        assert {cell.text for cell in column(table, "p")[1:]} >= {f"≤ {2 / (RESAMPLES + 1):.2g}"}

    def test_p_values_of_percentiles_beside_bca_intervals_are_said(self, tmp_path):
        folders = [
            write_result(tmp_path / name, model=name, n=40, K=2, interval="bca") for name in ("a", "b")
        ]
        table = task_tables.score_table(rows.score_tasks(load(folders))["ptbxl_super"])
        assert {"p (percentile)", "p (percentile, Holm)"} <= set(table.head)
        assert "bca interval of the paired difference" in table.caption

    def test_challenge_scores_are_columns(self, tmp_path):
        folder = write_result(tmp_path, n=40, K=2)
        path = folder / "results.json"
        results = json.loads(path.read_text())
        for year, point in (("2020", 0.41), ("2021", 0.52)):
            results["metrics"][f"challenge_{year}"] = {"point": point, "low": 0.3, "high": 0.6}
        path.write_text(json.dumps(results))
        table = task_tables.score_table(rows.score_tasks(load([folder]))["ptbxl_super"])
        said = {row[0].text: dict(zip(table.head, row, strict=True)) for row in table.rows}
        assert said["cpc"]["Challenge 2020 ↑"].plain == "0.410 [0.300, 0.600]"
        assert said["cpc"]["Challenge 2021 ↑"].plain == "0.520 [0.300, 0.600]"
        # It takes thresholds tuned on validation predictions, which baselines come without.
        assert said["majority guess"]["Challenge 2021 ↑"].plain == "\N{EN DASH}"

    def test_baselines_have_every_metric_too(self, loaded):
        table = task_tables.score_table(loaded[1]["ptbxl_super"])
        majority = next(row for row in table.rows if row[0].text == "majority guess")
        prevalence, said = np.linspace(0.45, 0.08, 4), dict(zip(table.head, majority, strict=True))
        targets = loaded[0].of_task("ptbxl_super")[0].predictions["targets"]
        expected = np.nanmean((targets - prevalence) ** 2, axis=0).mean()
        assert said["Brier ↓"].text == f"{expected:.3f}"

    def test_classes_have_every_row_but_the_majority_guess(self, loaded):
        table = task_tables.class_table(loaded[1]["ptbxl_super"])
        assert len(table.head) == 4 + 7
        result = loaded[0].of_task("ptbxl_super")[1].results
        assert [cell.text for cell in column(table, "cpc, finetune")] == [
            f"{entry['auroc']:.3f}" for entry in result["per_class"].values()
        ]

    def test_layers_of_errors_are_darker_the_lower(self, loaded):
        table = task_tables.layer_tables(loaded[0])[0]
        of_task = {row[0].text: row[1:] for row in table.rows}
        for task, sign in (("ptbxl_super", 1), ("mimic_age", -1)):
            values = [sign * float(cell.text) for cell in of_task[task]]
            shades = [cell.shade for cell in of_task[task]]
            assert np.argmax(values) == np.argmax(shades)
            assert (min(shades), max(shades)) == (0, 1)
            assert [cell.mark for cell in of_task[task]].index("best") == np.argmax(shades)

    def test_models_whose_names_differ_in_signs_have_layer_tables_of_their_own(self, tmp_path):
        folders = [
            write_result(tmp_path / str(i), model=m, n=40, K=2) for i, m in enumerate(("cpc (a)", "cpc_(a)"))
        ]
        names = [table.name for table in task_tables.layer_tables(load(folders))]
        assert len(set(names)) == 2

    def test_label_efficiency_of_several_files_has_a_row_for_every_model(self, tmp_path):
        folders = [tmp_path / part / "labels" for part in "abc"]
        for folder in folders:
            write_label_efficiency(folder)
        curves = load([write_result(tmp_path / "p", n=40, K=2), *folders]).efficiency
        table = task_tables.efficiency_table("ptbxl_super", curves)
        names = [row[0].text for row in table.rows]
        assert len(set(names)) == 9
        assert f"random_init ({folders[1]})" in names
        assert "95 % intervals from resampled patients and draws of subsets" in table.caption
        for curve in curves:
            for model in curve.content["models"].values():
                model["scores"] = [seeds[:1] for seeds in model["scores"]]
        assert "resampled patients;" in task_tables.efficiency_table("ptbxl_super", curves).caption

    def test_label_savings(self, tmp_path):
        write_label_efficiency(write_result(tmp_path, n=40, K=2))
        curves = load([tmp_path]).efficiency
        table = task_tables.saving_table("ptbxl_super", curves)
        assert [cell.plain for cell in table.rows[0]] == [
            "cpc",
            "random_init",
            "512",
            "0.20 [0.10, 0.40]",
        ]
        assert table.rows[1][3].plain == "0.70 [0.30, > 2.00]"
        assert table.rows[2][3].text == "no fit"


class TestExport:
    table = Table(
        "odd_names",
        "100 % of_it",
        ["model_1", "score ↑"],
        [
            [Cell("a & b"), Cell("0.9", "[0.8, 1.0]", "best")],
            [Cell("{c}\\^~#$"), Cell("−0.1", "[−0.2, 0.0]", "tied")],
        ],
        spans=[("", 1), ("group_1", 1)],
        sections=[1],
    )

    def test_latex_is_escaped_and_marked(self):
        text = to_latex(self.table)
        assert r"\caption{100 \% of\_it}" in text
        assert r"a \& b & \textbf{0.9} {\small [0.8, 1.0]} \\" in text
        assert r"\{c\}\textbackslash{}\textasciicircum{}\textasciitilde{}\#\$ & \underline{$-$0.1}" in text
        assert r"\multicolumn{1}{c}{group\_1}" in text
        assert r"\cmidrule(lr){2-2}" in text
        assert text.count(r"\midrule") == 2
        assert [text.count(f"\\{rule}") for rule in ("toprule", "bottomrule")] == [1, 1]

    def test_latex_of_every_table_has_as_many_cells_as_columns(self, loaded, tmp_path):
        import datetime

        page = build(
            "title",
            *loaded,
            datetime.datetime.now(datetime.UTC),
            ["ecg-jax", "report", "a"],
            "open",
            Beside("x"),
        )
        for table in page.tables:
            text = to_latex(table)
            columns = len(re.search(r"\\begin\{tabular\}\{(.*)\}", text)[1])
            lines = [line for line in text.splitlines() if line.endswith(r" \\")]
            assert len(lines) == len(table.rows) + 1 + bool(table.spans)
            for line in lines[bool(table.spans) :]:
                assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
            assert text.isascii(), re.findall(r"[^\x00-\x7f]", text)
            assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")

    def test_csv_can_be_read_back(self):
        lines = list(csv.reader(io.StringIO(to_csv(self.table))))
        assert lines == [
            ["model_1", "score ↑"], ["a & b", "0.9 [0.8, 1.0]"], ["{c}\\^~#$", "-0.1 [-0.2, 0.0]"]
        ]  # fmt: skip

    def test_html_is_escaped_and_marked(self):
        text = table_html(self.table)
        assert '<th scope="row">a &amp; b</th>' in text
        assert '<td class="best n"><b>0.9</b><span class="i">[0.8, 1.0]</span></td>' in text
        assert "<u>−0.1</u>" in text
        assert '<tr class="section">' in text

    def test_long_tables_are_folded(self):
        long = Table("long", "What it is. How it was made.", ["a"], [[Cell(str(i))] for i in range(30)])
        assert table_html(long).startswith("<details><summary>What it is (30 rows)</summary>")

    def test_escape_is_the_identity_on_plain_text(self):
        assert escape("plain text, 1.0 [a]") == "plain text, 1.0 [a]"
