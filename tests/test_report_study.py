"""`ecg-jax report` of whole studies: what is listed, where numbers come from, what is said to be missing or made up."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ecg_jax import report
from ecg_jax.cli import main
from ecg_jax.run_setup import flatten
from ecg_jax.studies import comparison
from ecg_jax.studies.report import board_tables, design, run_tables, study_figures
from ecg_jax.studies.report import boards as boards_module
from ecg_jax.studies.report.cells import Table
from ecg_jax.studies.report.kinds import is_study
from ecg_jax.studies.report.places import Placed, mean_places
from ecg_jax.studies.report.study import gather
from report_fixtures import write_result
from study_fixtures import BATCH, STEPS, write_figure_folder, write_run, write_sweep_json
from test_report import Outline

SYNTHETIC = {"store": {"path": "stores/made_up", "corpus": "synthetic", "fingerprint": "9" * 64}}
SMALL = {"n": 40, "K": 2}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two objectives, two backbones and two rungs, one group with three seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("study") / "mine"
    folder.mkdir()
    linear = {"probe": SMALL}
    further = {
        "probes/frozen": SMALL | {"mode": "frozen"},
        "probes/rhythm": SMALL | {"task": "synthetic_rhythm", "group": "other", "changes": SYNTHETIC},
    }
    scratch = {"probes/scratch": SMALL | {"mode": "supervised", "quality": 0.9}}
    entries = {}
    for seed in range(3):
        name = f"cpc-s4-seed{seed}"
        probes = linear | further | (scratch if seed == 0 else {})
        entries[name] = write_run(folder, name, seed=seed, group="cpc-s4", probes=probes)
    for name, fields in {
        "jepa-s4": {"objective": "jepa", "probes": linear | further},
        "cpc-net1d": {"backbone": "net1d", "probes": linear},
        "cpc-s4-large": {"recordings": 1000, "synthetic": True, "probes": linear},
        "fails": {"objective": "jepa", "backbone": "net1d", "state": "failed", "probes": {}},
        "waits": {"objective": "jepa", "recordings": 1000, "state": "not begun"},
    }.items():
        entries[name] = write_run(folder, name, **fields)
    write_figure_folder(folder / "studies" / "scaling")
    # Made before its runs ended, of one of them and of one that has not ended; the folder was moved since.
    old = {"date": "2026-03-01T12:30:00+00:00", "runs": ("was/cpc-s4-large/run", "was/waits/run")}
    write_figure_folder(folder / "studies" / "cka", "cka", **old)
    return write_sweep_json(folder, entries)


@pytest.fixture(scope="module")
def study(sweep):
    return gather([sweep])


@pytest.fixture(scope="module")
def boards(study):
    return {board.name: board for board in boards_module.make_boards(study)}


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    """The report: its folder and its text."""
    folder = tmp_path_factory.mktemp("page")
    assert main(["report", str(sweep), f"--output={folder / 'study.html'}", "--recordings=none"]) == 0
    return folder, (folder / "study.html").read_text(encoding="utf-8")


def table(page, name: str) -> list[dict[str, str]]:
    path = page[0] / "study_tables" / f"{name}.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def top(page) -> str:
    """What stands above the table of contents, without tags."""
    return re.sub(r"<[^>]+>", "", page[1].split("<nav")[0])


class TestPage:
    def test_is_well_formed_and_stands_alone(self, page):
        outline = Outline(page[1])
        assert not outline.errors
        assert len(outline.ids) == len(set(outline.ids))
        assert not re.search(r"https?://|<script|<link|@import", page[1])
        inside = {link[1:] for link in outline.links if link.startswith("#")}
        assert inside <= set(outline.ids)
        beside = [link for link in outline.links if not link.startswith("#")]
        assert len(beside) > 40
        assert all((page[0] / link).is_file() for link in beside)

    def test_has_its_sections_in_order(self, page):
        assert re.findall(r"<h2>(.*?)</h2>", page[1]) == [
            "Contents", "What was run", "What it was made with", "Loss curves", "Results", "Objectives, mode by mode",
            "Scaling", "Similarity (CKA)", "Class by class", "Layers", "Tasks and leakage", "What was left out",
            "Recordings",
        ]  # fmt: skip

    def test_every_figure_says_what_it_shows_and_what_not(self, page):
        found = re.findall(r'<figure id="(\w+)">(.*?)</figure>', page[1], re.DOTALL)
        assert {name for name, _ in found} >= {
            "figure_training_loss", "figure_validation_loss", "figure_ranks_ptbxl_super_linear", "scaling_curve",
            "cka_curve",
        }  # fmt: skip
        for name, html in found:
            assert "<b>Shows.</b> " in html, name
            assert "<b>Does not show.</b> " in html, name
            assert all((page[0] / "study_tables" / f"{name}{s}").is_file() for s in (".png", ".svg", ".csv"))

    def test_replaces_its_own_figures_and_nothing_else(self, sweep, tmp_path):
        output = tmp_path / "r.html"
        report.report([sweep / "studies"], output, "first")
        (tmp_path / "r_tables" / "mine.png").write_bytes(b"kept")
        assert (tmp_path / "r_tables" / "cka_curve.svg").is_file()
        report.report([sweep / "studies" / "scaling"], output, "second")
        names = {path.name for path in (tmp_path / "r_tables").iterdir()}
        assert "cka_curve.svg" not in names
        assert names >= {"scaling_curve.svg", "mine.png"}


class TestTraces:
    def test_every_run_is_listed_with_its_folder(self, page, sweep):
        lines = {line["folder"]: line for line in table(page, "runs")}
        names = json.loads((sweep / "sweep.json").read_text())["runs"]
        assert set(lines) == {f"mine/{name}/run" for name in names}
        one = lines["mine/cpc-s4-seed1/run"]
        assert one["training recordings"] == "250"
        assert lines["mine/cpc-s4-large/run"]["training recordings"] == "1000 synthetic"
        assert one["windows"] == str(STEPS * BATCH)
        assert one["git revision"] == "a" * 12
        config = json.loads((sweep / "cpc-s4-seed1/run/config.json").read_text())
        assert one["selection"] == config["selection_fingerprint"][:12]

    def test_numbers_of_single_probes_are_those_of_the_folder_beside_them(self, page, sweep):
        seen = 0
        for name in ("ptbxl_super_linear", "ptbxl_super_frozen", "synthetic_rhythm_linear"):
            for line in table(page, f"single_{name}"):
                results = json.loads((sweep.parent / line["folder"] / "results.json").read_text())
                triple = [results[k] for k in ("macro_auroc", "ci_low", "ci_high")]
                said = [float(number) for number in re.findall(r"[\d.]+", line["macro AUROC ↑"])]
                assert said == pytest.approx(triple, abs=5e-4)
                assert results["seed"] == int(line["seed"])
                seen += 1
        # Seven linear probes with the encoder from scratch, four frozen ones with it again, four of rhythms.
        assert seen == 7 + 5 + 4

    def test_a_row_of_the_ranks_names_the_folders_it_comes_from(self, page):
        lines = {(line["group"], line["mode"]): line for line in table(page, "ranks_ptbxl_super_linear")}
        assert lines["cpc-net1d", "linear"]["folder"] == "mine/cpc-net1d/probe"
        assert lines["cpc-s4", "linear"]["folder"].split("; ") == [
            f"mine/cpc-s4-seed{seed}/probe" for seed in range(3)
        ]
        assert lines["supervised from scratch of s4", "from scratch"]["folder"] == (
            "mine/cpc-s4-seed0/probes/scratch"
        )

    def test_loss_curves_come_with_every_logged_point(self, page, sweep):
        lines = [line for line in table(page, "figure_validation_loss") if line["run"] == "jepa-s4"]
        log = [json.loads(line) for line in (sweep / "jepa-s4/run/log.jsonl").read_text().splitlines()]
        assert [(int(line["step"]), float(line["validation_loss"])) for line in lines] == [
            (entry["step"], entry["val_loss"]) for entry in log if "val_loss" in entry
        ]

    def test_configs_can_be_put_together_again(self, study):
        tables = [each for _, found in run_tables.config_tables(study) for each in found]
        shared = {
            row[0].text: row[1].text for each in tables if each.name == "config_shared" for row in each.rows
        }
        assert shared["steps"] == str(STEPS)
        for run in (run for run in study.runs if run.name in ("cpc-s4-large", "jepa-s4")):
            fields = dict(shared)
            for each in tables:
                if each.name == f"config_{run.objective}":
                    fields |= {row[0].text: row[1].text for row in each.rows}
                if each.name == f"config_{run.objective}_differing":
                    (row,) = (row for row in each.rows if row[0].text == f"mine/{run.name}/run")
                    fields |= {
                        k: c.text for k, c in zip(each.head[1:], row[1:], strict=True) if c.text != "–"
                    }
            expected = {
                name: value if isinstance(value, str) and value else json.dumps(value)
                for name, value in flatten(run.config).items()
                if name not in ("seed", "store", "store_fingerprint", "selection_fingerprint")
            }
            assert fields == expected


class TestBoxes:
    def test_says_what_is_missing(self, page):
        text = top(page)
        assert "2 of 8 runs are not finished: fails, waits." in text
        assert "No encoder trained from scratch (mode=supervised) on synthetic_rhythm:" in text
        assert "Without figures of ecg-jax efficiency" in text
        assert "single seed" not in text

    def test_unfinished_runs_are_listed_with_the_reason(self, page):
        lines = {line["folder"]: line for line in table(page, "unfinished")}
        assert lines["mine/fails/run"]["state"] == "failed (at step 20 of 40)"
        assert lines["mine/fails/run"]["error"] == "the disk was full"
        assert lines["mine/waits/run"]["state"] == "not begun"

    def test_says_what_is_synthetic_wherever_its_numbers_stand(self, page):
        text = top(page)
        assert "SYNTHETIC recordings: 1 of 8 runs were pretrained on them." in text
        assert "SYNTHETIC recordings: synthetic_rhythm is tested on them." in text
        for name in ("ranks", "single", "classes"):
            caption = re.search(
                rf'id="table-{name}_synthetic_rhythm_linear"[^>]*aria-label="([^"]*)"', page[1]
            )[1]
            assert "SYNTHETIC recordings, no ECGs" in caption
        assert ">1000 recordings (synthetic)<" in page[1]

    def test_figures_older_than_runs_are_said_to_be(self, page):
        scaling, cka = (page[1].split(f'<section id="figures-{kind}"')[1] for kind in ("scaling", "cka"))
        cka, scaling = (part.split("</section>")[0] for part in (cka, scaling))
        assert "Older than 1 run that they were made of" in cka
        assert "1 of the 2 runs were pretrained on SYNTHETIC recordings" in cka
        assert "Older than" not in scaling
        assert "SYNTHETIC" not in scaling

    def test_probes_that_were_declared_and_not_made_are_lacking(self, tmp_path):
        entries = {
            name: write_run(
                tmp_path, name, probes={"probe": SMALL, "probes/there": SMALL | {"mode": "frozen"}}
            )
            for name in ("a", "b")
        }
        entries["a"] |= {"probe": {}, "probes": {"there": {}, "left": {}}}
        entries["b"] |= {"probe": {}, "probes": {"there": {}}}
        for name in entries:
            made = json.dumps({"stores": {"ptbxl": ["."]}})
            (tmp_path / name / "probes" / "there" / "finished.json").write_text(made)
        found = gather([write_sweep_json(tmp_path, entries)])
        assert {name: state.state for name, state in found.states.items()} == {
            "a": "lacks the probe left", "b": "finished"
        }  # fmt: skip
        assert [run.name for run in found.finished] == ["b"]

    def test_leads_that_encoders_do_not_see_are_said(self, tmp_path):
        limb = SMALL | {"changes": {"preprocessing": {"kept_leads": ["I", "II"]}}}
        entries = {
            name: write_run(tmp_path, name, probes={"probe": p}) for name, p in (("a", SMALL), ("b", limb))
        }
        (board,) = boards_module.make_boards(found := gather([write_sweep_json(tmp_path, entries)]))
        said = "Fed with some leads: b of the leads I, II alone. Simple ECG features are of all twelve."
        assert said in board_tables.groups_table(board, found).caption

    def test_the_sweep_says_its_note(self, page):
        assert "<code>configs/sweeps/mine.py</code>. A note." in page[1]


class TestCost:
    def test_sums(self, page, study):
        *parts, all_runs = table(page, "cost")
        assert all_runs["objective"] == "all"
        # 36 seconds on 2 devices each; one run has not begun.
        assert all_runs["device-hours"] == f"{7 * 36 * 2 / 3600:.3f} (7 of 8 runs)"
        assert int(all_runs["windows"]) == 6 * STEPS * BATCH + STEPS // 2 * BATCH
        assert int(all_runs["windows"]) == sum(
            int(line["windows"]) for line in parts if line["windows"] != "–"
        )
        assert sum(int(line["runs"]) for line in parts) == 8
        flops = sum(run.train_flops for run in study.runs if run.train_flops)
        assert float(all_runs["training FLOPs"].split(" T")[0]) == pytest.approx(flops / 1e12, rel=5e-3)


class TestGroups:
    def test_means_and_intervals_are_those_of_the_sweep_itself(self, sweep, study, boards):
        """`studies.comparison` computes the same figures for results.json of a sweep, in another way."""
        members = [m for m in study.members if m.result.mode == "linear" and m.result.task == "ptbxl_super"]
        runs = []
        for member in members:
            results = member.result.results | {"preprocessing": {}, "encoder_parameters": 1}
            runs.append(
                comparison.FinishedRun(
                    member.run.name, member.group, results, member.result.predictions, [], [], None
                )
            )
        theirs = {entry["group"]: entry for entry in comparison.compare(runs)["groups"]}
        board = boards["ptbxl_super_linear"]
        ours = {row.model: entry for row, entry in board.scores.entries.items()}
        for group in ("cpc-s4", "jepa-s4"):
            entry = ours[group]
            assert [entry.point, entry.low, entry.high] == pytest.approx(
                [theirs[group][k] for k in ("macro_auroc", "ci_low", "ci_high")], abs=1e-6
            )
            gain = board.gains[f"{group}, linear"]
            assert list(gain) == pytest.approx(
                [theirs[group]["difference_to_random_init"][k] for k in ("macro_auroc", "ci_low", "ci_high")],
                abs=1e-6,
            )

    def test_differences_of_the_same_seeds_are_those_of_the_sweep_itself(self, tmp_path):
        """Paired seed by seed, whatever the order of the runs; `studies.comparison` pairs them in another way."""
        entries = {}
        for seed in (2, 0, 1):
            for objective in ("cpc", "jepa"):
                # The seeds differ far more than the objectives.
                probe = SMALL | {"quality": 1.0 + 0.3 * seed - 0.05 * (objective == "jepa")}
                name = f"{objective}-{seed}"
                entries[name] = write_run(
                    tmp_path, name, objective=objective, seed=seed, group=objective, probes={"probe": probe}
                )
        study = gather([write_sweep_json(tmp_path, entries)])
        (board,) = boards_module.make_boards(study)
        runs = [
            comparison.FinishedRun(
                member.run.name, member.group, member.result.results | {"preprocessing": {}, "encoder_parameters": 1},
                member.result.predictions, [], [], None,
            )
            for member in sorted(study.members, key=lambda member: member.result.results["seed"])
        ]  # fmt: skip
        _, theirs = comparison.compare(runs)["groups"]
        ours = board.resampled["jepa, linear"] - board.resampled["cpc, linear"]
        said = theirs["difference_to_first"]
        assert np.quantile(ours, [0.025, 0.975]) == pytest.approx([said["ci_low"], said["ci_high"]], abs=1e-6)

    def test_seeds_widen_an_interval(self, boards):
        board = boards["ptbxl_super_linear"]
        (entry,) = (e for row, e in board.scores.entries.items() if row.model == "cpc-s4")
        points = [m.result.results["macro_auroc"] for m in board.members[entry.row]]
        assert entry.point == pytest.approx(np.mean(points))
        patients_only = np.ptp(np.quantile(entry.scored.macros("exclude")[1], [0.025, 0.975]))
        assert entry.high - entry.low > patients_only

    def test_compact_table_has_a_place_for_every_group(self, boards, study):
        board = boards["ptbxl_super_linear"]
        found = board_tables.compact_table(board, study)
        assert list(found.head) == ["objective", "s4, 250", "net1d, 250", "s4, 1000"]
        cells = {(row[0].text, head): cell.text for row in found.rows for head, cell in
                 zip(found.head[1:], row[1:], strict=True)}  # fmt: skip
        (group,) = (e for row, e in board.scores.entries.items() if row.model == "cpc-s4")
        assert cells["cpc", "s4, 250"] == f"{group.point:.3f}"
        assert cells["jepa", "net1d, 250"] == "–"

    def test_groups_of_one_place_have_no_compact_table(self, tmp_path):
        entries = {name: write_run(tmp_path, name, probes={"probe": SMALL}) for name in ("narrow", "wide")}
        found = gather([write_sweep_json(tmp_path, entries)])
        (board,) = boards_module.make_boards(found)
        assert board_tables.compact_table(board, found) is None
        assert {"narrow", "wide"} < {row.model for row in board.scores.entries}

    def test_encoders_of_one_backbone_share_their_random_initialisation(self, boards):
        rows = [row for row in boards["ptbxl_super_linear"].scores.entries if row.baseline]
        names = [row.model for row in rows if row.model.startswith("random")]
        assert names == ["random initialisation of s4", "random initialisation of net1d"]

    def test_a_panel_of_modes_has_the_baselines_of_its_own_encoders(self, boards, study):
        board = boards["ptbxl_super_linear"]
        points = {row.model: entry.point for row, entry in board.scores.entries.items()}
        runs = {run.backbone: run for run in study.runs if run.name in ("cpc-net1d", "jepa-s4")}
        for backbone, run in runs.items():
            lines = study_figures._references([board], backbone, design.rung_of(run))
            assert lines["random initialisation"] == points[f"random initialisation of {backbone}"]
            # Of net1d nothing was trained from scratch.
            scratch = f"supervised from scratch of {backbone}"
            assert ("supervised from scratch" in lines) == (scratch in points) == (backbone == "s4")

    def test_groups_do_not_depend_on_the_order_of_runs(self, study, boards):
        turned = replace(study, members=study.members[::-1])
        again = {board.name: board for board in boards_module.make_boards(turned)}
        for name, board in boards.items():
            for row in (row for row in board.members if not row.baseline):
                values = [of[name].resampled[row.label] for of in (again, boards)]
                assert np.allclose(*values, rtol=0, atol=1e-12), row

    def test_probes_on_other_records_have_tables_of_their_own(self, tmp_path):
        other = {"store": {"path": "stores/other", "corpus": "ptbxl", "fingerprint": "6" * 64}}
        probes = {"probe": SMALL, "probes/there": SMALL | {"changes": other}}
        found = gather([write_sweep_json(tmp_path, {"a": write_run(tmp_path, "a", probes=probes)})])
        assert [board.task for board in boards_module.make_boards(found)] == [
            "ptbxl_super_ptbxl", "ptbxl_super_other"
        ]  # fmt: skip

    def test_two_probes_of_a_run_in_one_table_are_told_apart(self, tmp_path):
        probes = {"probe": SMALL, "probes/ridge": SMALL | {"model": "x", "quality": 0.3}}
        found = gather([write_sweep_json(tmp_path, {"a": write_run(tmp_path, "a", probes=probes)})])
        assert [member.row for member in found.members] == ["a [probe]", "a [ridge]"]
        assert [member.group for member in found.members] == ["a", "a"]


class TestProbesOfAllTasks:
    """A main probe of one task, and a further one of all tasks that makes it again."""

    def study(self, folder, **again):
        entries = {}
        for objective in ("cpc", "jepa"):
            probes = {
                "probe": SMALL,
                "probes/all/ptbxl_super": SMALL | {"model": f"{objective} probe"} | again,
            }
            probes |= {
                f"probes/all/{task}": SMALL | {"task": task} for task in ("ptbxl_form", "ptbxl_rhythm")
            }
            entries[objective] = write_run(folder, objective, objective=objective, probes=probes)
        return gather([write_sweep_json(folder, entries)])

    def test_what_was_made_twice_counts_once(self, tmp_path):
        found = self.study(tmp_path)
        assert [(m.row, m.probe) for m in found.members if m.result.task == "ptbxl_super"] == [
            ("cpc", "probe"), ("jepa", "probe")
        ]  # fmt: skip
        boards = boards_module.make_boards(found)
        assert all(len(board.scores.entries) == 5 for board in boards)
        assert all(board_tables.compact_table(board, found) is not None for board in boards)
        (places,) = board_tables.places_parts(boards)
        assert {row[0].text for row in places.rows} >= {"cpc, linear", "jepa, linear"}
        assert places.head[1] == "mean place, linear (3 tasks)"

    def test_a_task_with_several_probes_of_a_run_is_left_out_of_mean_places(self, tmp_path):
        boards = boards_module.make_boards(self.study(tmp_path, quality=0.2))
        (places,) = board_tables.places_parts(boards)
        assert places.head[1] == "mean place, linear (2 tasks)"
        assert (
            "Left out, as runs have several probes of one mode there: ptbxl_super_linear." in places.caption
        )
        assert {row[0].text for row in places.rows} >= {"cpc, linear", "jepa, linear"}

    def test_baselines_alone_have_no_places(self, tmp_path):
        entries = {
            "a": write_run(tmp_path, "a", probes={"probe": SMALL}),
            "b": write_run(tmp_path, "b", probes={"probes/form": SMALL | {"task": "ptbxl_form"}}),
        }
        boards = boards_module.make_boards(gather([write_sweep_json(tmp_path, entries)]))
        (sentence,) = board_tables.places_parts(boards)
        assert "No mean places" in sentence


class TestMeanPlaces:
    def task(self, resampled: dict[str, np.ndarray], lower_is_better: bool = False) -> Placed:
        points = {k: float(np.mean(v)) for k, v in resampled.items()}
        return Placed(points, resampled, lower_is_better, frozenset(resampled))

    def test_who_is_best_on_every_resample_is_first_for_certain(self):
        generator = np.random.default_rng(0)
        tasks = [
            self.task(
                {
                    "a": 0.9 + 0.01 * generator.random(200),
                    "b": generator.normal(0.7, 0.01, 200),
                    "c": generator.normal(0.7, 0.01, 200),
                }
            )
            for _ in range(2)
        ]
        places = mean_places(tasks, 0.95)
        assert tuple(places["a"]) == (1.0, 1.0, 1.0)
        assert (places["b"].low, places["b"].high) == (2.0, 3.0)
        assert sum(value.point for value in places.values()) == pytest.approx(6)

    def test_errors_are_better_when_lower_and_absent_rows_take_no_place(self):
        flat = np.ones(10)
        first = self.task({"a": 0.2 * flat, "b": 0.3 * flat, "only here": 0.1 * flat}, lower_is_better=True)
        second = self.task({"b": 0.8 * flat, "a": 0.8 * flat})
        places = mean_places([first, second], 0.95)
        assert {name: value.point for name, value in places.items()} == {"a": 1.25, "b": 1.75}

    def test_what_is_drawn_together_is_counted_together(self):
        generator = np.random.default_rng(0)
        a, b = generator.normal(0.7, 0.01, (2, 400))
        same = [self.task({"a": a, "b": b})] * 2
        # Of two tasks with the same patients the same row is first on a resample; of others it need not be.
        apart = [same[0], self.task({"a": a[::-1], "b": b[::-1]})]
        halves = [
            np.mean([np.greater(task.resampled["a"], task.resampled["b"]) for task in tasks], axis=0)
            for tasks in (same, apart)
        ]
        assert not (halves[0] == 0.5).any()
        assert (halves[1] == 0.5).mean() > 0.3
        assert (mean_places(same, 0.5)["a"].low, mean_places(same, 0.5)["a"].high) == (1.0, 2.0)

    def test_tasks_of_made_up_recordings_are_not_averaged_with_others(self, boards):
        assert board_tables.places_parts(list(boards.values())) == []


class TestFolders:
    def test_kinds(self, sweep, tmp_path):
        probe = write_result(tmp_path / "probes" / "a", **SMALL)
        assert not is_study(probe)
        assert not is_study(probe.parent)
        for folder in (sweep, sweep.parent, sweep / "jepa-s4" / "run", sweep / "studies"):
            assert is_study(folder), folder

    def test_one_run_and_a_probe_inside_it(self, tmp_path):
        write_run(tmp_path, "a", probes={"run/probe": SMALL})
        found = gather([tmp_path / "a" / "run"])
        assert [run.name for run in found.runs] == ["run"]
        assert [member.result.task for member in found.members] == ["ptbxl_super"]

    def test_a_study_without_probes_says_so(self, tmp_path):
        write_run(tmp_path, "a", probes={})
        report.report([tmp_path / "a" / "run"], tmp_path / "r.html", "runs")
        text = (tmp_path / "r.html").read_text()
        assert "No probe is among the folders" in text
        assert not Outline(text).errors

    def test_probes_alone_keep_their_refusals_beside_figures(self, sweep, tmp_path, capsys):
        probe = write_result(tmp_path / "cpc", **SMALL)
        argv = ["report", str(probe), str(sweep / "studies" / "scaling"), f"--output={tmp_path / 'r.html'}"]
        assert main(argv) == 2
        assert "has no encoder trained from scratch" in capsys.readouterr().err
        assert not (tmp_path / "r.html").exists()

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("a/run/config.json", "{"), ("a/probe/results.json", "{"), ("a/status.json", "[]"), ("sweep.json", "{}"),
            ("studies/scaling/figures.json", "{}"),
        ],
    )  # fmt: skip
    def test_damaged_files_are_named(self, tmp_path, capsys, path, text):
        entries = {"a": write_run(tmp_path, "a", probes={"probe": SMALL})}
        write_figure_folder(write_sweep_json(tmp_path, entries) / "studies" / "scaling")
        (tmp_path / path).write_text(text)
        out = tmp_path / "out"
        out.mkdir()
        assert main(["report", str(tmp_path), f"--output={out / 'r.html'}"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert str(tmp_path / path) in message
        assert not list(out.iterdir())

    def test_a_folder_given_twice(self, sweep, tmp_path, capsys):
        assert main(["report", str(sweep), str(sweep), f"--output={tmp_path / 'r.html'}"]) == 2
        assert "given twice" in capsys.readouterr().err


def test_paths_in_sentences_are_written_from_the_folder_given(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = f"of {folder}/store, {folder}2/store and /other{folder}/store"
    assert design.shorten(text, [folder]) == f"of mine/store, {folder}2/store and /other{folder}/store"
    relative = "runs/mine/store, mine/store and other/runs/mine/store"
    assert design.shorten(relative, [Path("runs/mine")]) == "mine/store, mine/store and other/runs/mine/store"


def test_numbers_of_a_figure_folder_keep_four_digits():
    found = run_tables.figure_rows(
        "t", "T", ["name", "n", "b"], [["cpc", "250", "-0.18943"], ["x", "", "2e-7"]]
    )
    assert isinstance(found, Table)
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["cpc", "250", "−0.1894"], ["x", "–", "2e−07"]
    ]  # fmt: skip
    assert found.text_columns == 1
