"""Error against cost: fronts against their definition, and points and words against runs written by hand."""

import json

import numpy as np
import pytest

from ecg_jax import cli, efficiency
from ecg_jax.errors import UserError
from ecg_jax.studies.error_cost import COSTS, error_cost_figures, on_front
from ecg_jax.studies.figure_folder import read_figures, write_figures
from ecg_jax.studies.flops import encoder_cost, training_flops
from ecg_jax.studies.roofline import Roofline
from ecg_jax.studies.study_runs import find_runs
from study_folder import write_sweep


def test_front_of_known_points():
    costs = [1, 2, 3, 2, 1]
    errors = np.array([[0.3], [0.2], [0.25], [0.4], [0.3]])
    assert on_front(costs, errors, less=True)[:, 0].tolist() == [True, True, False, False, True]
    # More of it is better: the third is the fastest, the second has the smallest error.
    assert on_front(costs, errors, less=False)[:, 0].tolist() == [False, True, True, False, False]


def test_front_agrees_with_its_definition():
    rng = np.random.default_rng(0)
    costs, errors = rng.integers(1, 5, 12), rng.integers(1, 6, (12, 40)).astype(float)
    front = on_front(costs, errors, less=True)
    for r in range(errors.shape[1]):
        pairs = list(zip(costs, errors[:, r], strict=True))
        expected = [
            not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in pairs)
            for mine in pairs
        ]
        assert front[:, r].tolist() == expected


def test_an_undefined_error_is_on_no_front_and_beats_nobody():
    assert on_front([1, 2], np.array([[np.nan], [0.5]]), less=True)[:, 0].tolist() == [False, True]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """S4 with CPC at two sizes, the larger with two seeds; the Transformer with JEPA is dearer and worse."""
    folder = tmp_path_factory.mktemp("study")
    runs = [
        ("cpc", "s4", 64, 0, 0.30, 60.0),
        ("cpc", "s4", 256, 0, 0.14, 90.0),
        ("cpc", "s4", 256, 1, 0.16, 110.0),
    ]
    runs.append(("jepa", "transformer", 256, 0, 0.35, 900.0))
    entries = [
        {"name": f"{objective}-{backbone}-{n}-{seed}", "recordings": n, "loss": 1.0, "objective": objective,
         "backbone": backbone, "seed": seed, "seconds": seconds, "errors": {"ptbxl_super": error}}
        for objective, backbone, n, seed, error, seconds in runs
    ]  # fmt: skip
    write_sweep(folder / "sweep", entries)
    figures, used = error_cost_figures([str(folder / "sweep")])
    write_figures(folder / "out", "efficiency", figures, {"runs": used})
    return folder


def test_points_are_means_over_seeds_with_the_costs_of_their_runs(study):
    (figure,) = read_figures(study / "out").figures
    assert figure.name == "error_cost_ptbxl_super_linear_macro_auroc"
    rows = [dict(zip(figure.columns, row, strict=True)) for row in figure.rows]
    points = {(row["objective"], int(row["recordings"])): row for row in rows}
    assert len(points) == len(rows) == 3
    small, large, other = points["cpc", 64], points["cpc", 256], points["jepa", 256]
    by_name = {run.name: run for run in find_runs([study / "sweep"])}
    first, second = (by_name[f"cpc-s4-256-{seed}"] for seed in (0, 1))
    assert large["runs"] == "cpc-s4-256-0 cpc-s4-256-1"
    assert float(large["error"]) == pytest.approx((first.probes[0].error + second.probes[0].error) / 2)
    assert float(large["error_low"]) < float(large["error"]) < float(large["error_high"])
    # Two seeds that differ know little of a third: wider than over patients alone.
    width = {key: float(row["error_high"]) - float(row["error_low"]) for key, row in points.items()}
    assert width["cpc", 256] > 1.3 * width["cpc", 64]
    assert float(large["windows_per_s"]) == pytest.approx(512 * (1 / 90 + 1 / 110) / 2)
    assert float(large["device_hours"]) == pytest.approx(100 * 2 / 3600)
    assert float(small["train_flops"]) == 128 * training_flops(_config(first))
    assert float(small["flops_per_window"]) == encoder_cost(_config(first)).forward
    assert float(other["parameters"]) > float(small["parameters"]) > 0
    # The dear and bad one is on no front; the small one only where it is the cheapest.
    assert [other[f"front_{name}"] for name in COSTS] == ["False"] * 5
    assert float(other["front_share_device_hours"]) == 0
    on = {name for name in COSTS if small[f"front_{name}"] == "True"}
    assert on == {"train_flops", "device_hours"}
    assert all(large[f"front_{name}"] == "True" for name in COSTS)


def _config(run):
    from ml_collections import ConfigDict

    return ConfigDict(run.config)


def test_a_killed_attempt_or_another_runs_parameters_make_nothing_cheap(tmp_path):
    runs = [("cpc", 0, 60.0, ""), ("jepa", 0, 60.0, ""), ("data2vec", 0, 60.0, "base/run")]
    entries = [
        {"name": f"{objective}-{seed}", "recordings": 256, "loss": 1.0, "objective": objective, "seed": seed,
         "seconds": seconds, "init__checkpoint": begun, "errors": {"ptbxl_super": 0.2}}
        for objective, seed, seconds, begun in runs
    ]  # fmt: skip
    sweep = write_sweep(tmp_path / "s", entries)
    path = sweep / "jepa-0" / "run" / "made_with.json"
    (start,) = json.loads(path.read_text())["starts"]
    path.write_text(json.dumps({"starts": [start | {"seconds": None}, start | {"seconds": 1.0}]}))
    ((figure,), _) = error_cost_figures([str(sweep)])
    rows = [dict(zip(figure.columns, row, strict=True)) for row in figure.rows]
    cpc, jepa, begun = ({name: row[name] for name in COSTS} for row in rows)
    assert None not in cpc.values()
    assert [name for name in COSTS if jepa[name] is None] == ["windows_per_s", "device_hours"]
    assert [name for name in COSTS if begun[name] is None] == ["train_flops", "device_hours"]
    assert rows[1]["front_device_hours"] is rows[2]["front_train_flops"] is None
    assert "1 of 3 runs had an attempt that was killed, whose time is not known" in figure.shows
    assert "1 of 3 runs begin with another run's parameters" in figure.shows


def test_seeds_whose_sizes_differ_by_a_few_are_one_point(tmp_path):
    entries = [
        {"name": f"cpc-{seed}", "recordings": n, "loss": 1.0, "seed": seed, "errors": {"ptbxl_super": error}}
        for seed, (n, error) in enumerate([(256, 0.14), (258, 0.16), (600, 0.12)])
    ]
    ((figure,), _) = error_cost_figures([str(write_sweep(tmp_path / "s", entries))])
    rows = [dict(zip(figure.columns, row, strict=True)) for row in figure.rows]
    assert [(row["recordings"], row["seeds"]) for row in rows] == [(257, 2), (600, 1)]
    assert rows[0]["error_high"] - rows[0]["error_low"] > rows[1]["error_high"] - rows[1]["error_low"]
    words = [text.get_text() for text in figure.picture.axes[-1].get_legend().get_texts()]
    assert [word for word in words if "recordings" in word] == ["257 recordings", "600 recordings"]


def test_means_are_of_the_tasks_that_all_families_have_and_of_the_same_records(tmp_path):
    """One family has an easy task more, which makes nothing of it better; then it was tested on another store."""
    tasks = {"ptbxl_super": 0.3, "ptbxl_sub": 0.4}
    entries = [
        {"name": f"{objective}-0", "recordings": 256, "loss": 1.0, "objective": objective, "errors": tasks | easy}
        for objective, easy in (("cpc", {}), ("jepa", {"ptbxl_form": 0.02}))
    ]  # fmt: skip
    sweep = write_sweep(tmp_path / "s", entries)
    figures = {figure.title: figure for figure in error_cost_figures([str(sweep)])[0]}
    mean = figures["Error against cost: the mean over ptbxl_super, ptbxl_sub, linear"]
    cpc, jepa = (dict(zip(mean.columns, row, strict=True)) for row in mean.rows)
    assert cpc["error"] == pytest.approx(jepa["error"])
    assert mean.shows.startswith("The mean over ptbxl_super, ptbxl_sub. 1 - macro AUROC with")
    assert [row[1] for row in figures["Error against cost: ptbxl_form, linear"].rows] == ["jepa"]
    for path in sweep.glob("jepa-0/**/results.json"):
        results = json.loads(path.read_text())
        path.write_text(json.dumps(results | {"store": results["store"] | {"fingerprint": "8" * 64}}))
    with pytest.raises(UserError, match="differ in store"):
        error_cost_figures([str(sweep)])


def test_words_name_the_front_and_its_limits(study):
    (figure,) = read_figures(study / "out").figures
    assert "3 points; each is the mean over 1 to 2 seeds" in figure.shows
    assert "S4 cpc (256 recordings, in " in figure.shows
    assert "single seed" in figure.does_not_show
    assert figure.picture.read_bytes().startswith(b"\x89PNG")
    assert len(read_figures(study / "out").about["runs"]) == 4


def test_runs_without_probes_are_refused(tmp_path):
    write_sweep(tmp_path / "sweep", [{"name": "a-0", "recordings": 64, "loss": 1.0}])
    with pytest.raises(UserError, match="no finished pretraining run there has a probe"):
        error_cost_figures([str(tmp_path / "sweep")])


def test_command_adds_the_figure_to_its_own(study, tmp_path, monkeypatch):
    roofline = Roofline(1e9, {"float32": 1e9, "bfloat16": 1e9}, {"float32": 8, "bfloat16": 8}, 8)
    monkeypatch.setattr(efficiency, "measure_roofline", lambda **_: roofline)
    monkeypatch.setattr(
        efficiency,
        "measure",
        lambda configs, *_, **__: [cell._asdict() | {"failed": "out of memory"} for cell in configs],
    )
    arguments = [f"--output={tmp_path}", "--backbones=s4", "--objectives=cpc", f"--results={study / 'sweep'}"]
    assert cli.main(["efficiency", *arguments]) == 0
    written = read_figures(tmp_path)
    names = [figure.name for figure in written.figures]
    assert names == ["operations", "published", "error_cost_ptbxl_super_linear_macro_auroc"]
    assert written.about["command"] == ["ecg-jax", "efficiency", *arguments]
    assert written.about["runs"][0] == str(study / "sweep" / "cpc-s4-64-0" / "run")
    assert [row[4] for row in written.figures[0].rows] == ["out of memory"] * 2  # a row for each precision
