"""`ecg-jax efficiency`: what it writes, what it refuses, and the arithmetic behind its figures."""

import contextlib
import json
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ecg_jax import cli, efficiency
from ecg_jax.config_flags import load_config
from ecg_jax.models.convolution import candidates
from ecg_jax.studies import cost_scaling, efficiency_report, tune_conv
from ecg_jax.studies import efficiency as cells
from ecg_jax.studies.cost_scaling import fit_exponent
from ecg_jax.studies.efficiency import Cell, measure
from ecg_jax.studies.efficiency_programs import random_batch
from ecg_jax.studies.figure_folder import Figure, read_figures, write_figures
from ecg_jax.studies.programs import (
    DoesNotFit,
    Program,
    compile_program,
    memory_errors,
    without_compilation_cache,
)
from ecg_jax.studies.roofline import Roofline, measure_roofline
from ecg_jax.studies.timing import time_in_turns

#: A model that compiles in a second or two.
TINY = [
    "--config.model.width=16",
    "--config.model.layers=1",
    "--config.model.conv=fft",
    "--config.monitor.task=",
]
ONE = ["--backbones=s4", "--objectives=cpc"]
PNG = b"\x89PNG"


def run(*argv):
    return cli.main(["efficiency", *map(str, argv)])


def test_roofline_is_positive_and_takes_the_larger_of_both_times():
    roofline = measure_roofline(budget_s=0.02, repeats=2)
    assert roofline.copy_bytes_per_s > 0
    assert roofline.copy_bytes >= 2**27
    assert set(roofline.flops_per_s) == {"float32", "bfloat16"} == set(roofline.matrix_rows)
    assert min(roofline.flops_per_s.values()) > 0
    known = Roofline(100.0, {"float32": 1000.0, "bfloat16": 4000.0}, {}, 0)
    assert known.seconds(flops=5000, moved_bytes=200, precision="float32") == 5.0
    assert known.seconds(flops=5000, moved_bytes=200, precision="bfloat16") == 2.0
    assert known.bound(flops=5000, moved_bytes=200, precision="float32") == "compute"
    assert known.bound(flops=5000, moved_bytes=200, precision="bfloat16") == "copy"


def test_programs_take_turns_and_each_turn_begins_with_another():
    order = []
    work = {name: lambda name=name: order.append(name) or np.zeros(1) for name in "abc"}
    timings = time_in_turns(work, repeats=3, least_s=0.0)
    assert order == list("aabbcc") + list("abc") + list("bca") + list("cab")
    assert all(0 < t.best <= t.low <= t.median <= t.high for t in timings.values())
    assert time_in_turns({}, repeats=3) == {}


def test_compiled_program_knows_its_traffic_and_memory():
    a, b = np.ones((64, 32), np.float32), np.ones((32, 16), np.float32)
    compiled, program = compile_program(jax.jit(lambda a, b: a @ b), a, b, precision="float32")
    assert program.flops == 2 * 64 * 32 * 16
    assert program.least_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert program.peak_bytes >= program.least_bytes
    np.testing.assert_array_equal(program.run(), compiled(a, b))
    _, in_place = compile_program(jax.jit(lambda a: a + 1, donate_argnums=0), a, precision="float32")
    assert in_place.least_bytes == 2 * a.nbytes  # read and written
    assert in_place.peak_bytes - in_place.memory["temporary"] == a.nbytes


def test_program_that_plans_for_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr("ecg_jax.studies.programs.device_memory_bytes", lambda: 1000.0)
    with pytest.raises(DoesNotFit, match="of memory"):
        compile_program(jax.jit(lambda a: a + 1), np.ones(1000, np.float32), precision="float32")


@pytest.fixture
def cached(monkeypatch):
    """Lets whole runs of the command read the tests' own cache of compiled programs: that takes half as long."""
    monkeypatch.setattr(efficiency, "without_compilation_cache", contextlib.nullcontext)


@pytest.fixture
def compilation_cache_folder(tmp_path):
    """JAX keeps every program in this folder for as long as the test takes."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compile_times_are_not_those_of_reading_a_cache(compilation_cache_folder, monkeypatch):
    def compile_anew():
        jax.jit(lambda a: a * 3 + 1).lower(np.ones(5, np.float32)).compile()

    monkeypatch.setattr(tune_conv, "tune", lambda *_, **__: compile_anew())
    assert run("--tune-conv", "--output=none") == 0
    assert not list(compilation_cache_folder.iterdir())
    compile_anew()
    assert list(compilation_cache_folder.iterdir()), "the setting is as it was"
    with pytest.raises(ZeroDivisionError), without_compilation_cache():
        raise ZeroDivisionError
    assert jax.config.jax_enable_compilation_cache


def test_quick_keeps_what_it_compiled(compilation_cache_folder, monkeypatch):
    """It tells nothing of compile times, and is spared them the second time."""
    compiled = jax.jit(lambda a: a * 5 + 2).lower(np.ones(5, np.float32))
    monkeypatch.setattr(tune_conv, "tune", lambda *_, **__: compiled.compile())
    assert run("--tune-conv", "--output=none", "--quick") == 0
    assert list(compilation_cache_folder.iterdir())


def test_batch_too_large_for_the_host_does_not_fit():
    config = load_config("configs/cpc.py")
    config.batch_size = 4
    signal = random_batch(config)["signal"]
    assert (signal.dtype, signal.shape) == (np.int16, (4, 600, 12))
    assert 100 < signal[:, -1].std() < 3000
    config.batch_size = 10**12
    with pytest.raises(DoesNotFit, match="the host is out of memory"), memory_errors():
        random_batch(config)


def test_only_rows_that_do_not_run_fail(monkeypatch):
    """A program may fail when it is run first, and later when the arrays of all rows are in memory."""
    runs = []

    def program(name, most):
        def run():
            runs.append(name)
            if runs.count(name) > most:
                raise MemoryError
            return np.zeros(1)

        return Program(
            run, 1.0, None, None, dict.fromkeys(("arguments", "outputs", "aliased", "temporary"), 1)
        )

    most = {"s4": 1, "net1d": 0, "transformer": 10**6}
    state = types.SimpleNamespace(params={"encoder": np.zeros(3), "head": np.zeros(2)})
    monkeypatch.setattr(
        cells, "build", lambda config: types.SimpleNamespace(state=state, encoder_variables=dict)
    )
    monkeypatch.setattr(cells, "step_program", lambda model: program("step", 10**6))
    monkeypatch.setattr(cells, "step_forward_flops", lambda model: None)
    monkeypatch.setattr(
        cells,
        "encoder_program",
        lambda config, _, *, gradient: program(
            (config.model.backbone, gradient), most[config.model.backbone]
        ),
    )
    configs = {
        Cell(backbone, "cpc", "float32", 1): load_config(f"configs/cpc.py:backbone={backbone}")
        for backbone in most
    }
    roofline = Roofline(1.0, {"float32": 1.0}, {}, 0)
    rows = measure(configs, roofline, repeats=1)
    assert [row["backbone"] for row in rows] == list(most)
    assert [row.get("failed") for row in rows] == [
        "out of memory beside the other rows",
        "out of memory",
        None,
    ]
    assert (rows[2]["parameters"], rows[2]["encoder_parameters"]) == (5, 3)
    assert set(rows[2]["programs"]) == set(cells.PROGRAMS)
    assert runs.count(("net1d", False)) == 1


def test_fitted_exponent_recovers_a_known_law():
    x = np.array([2.5, 5.0, 10.0, 20.0])
    exact = fit_exponent(x, 3.0 * x**1.7)
    assert exact.exponent == pytest.approx(1.7)
    assert exact.last == pytest.approx(1.7)
    assert exact.standard_error == pytest.approx(0.0, abs=1e-12)
    # y = x + x^2 / 10 bends from 1 towards 2.
    bending = fit_exponent(x, x + x**2 / 10)
    assert 1.0 < bending.exponent < bending.last < 2.0
    assert bending.standard_error > 0.01
    assert fit_exponent([1, 2], [1, 4]) == (pytest.approx(2.0), None, pytest.approx(2.0))


def test_standard_error_of_the_exponent_covers_noise():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 16, 5)
    fits = [fit_exponent(x, x * np.exp(rng.normal(scale=0.1, size=5))) for _ in range(500)]
    exponents = [fit.exponent for fit in fits]
    mean_error = np.sqrt(np.mean([fit.standard_error**2 for fit in fits]))
    assert np.std(exponents) == pytest.approx(mean_error, rel=0.1)


def test_points_that_failed_are_left_out_of_fits():
    rows = [
        {"backbone": "s4", "axis": "window", "x": x, "seconds": x, "temporary_bytes": x} for x in (4, 1, 2)
    ]
    rows.append({"backbone": "s4", "axis": "window", "x": 8, "failed": "out of memory"})
    rows.append({"backbone": "net1d", "axis": "window", "x": 1, "seconds": 1, "temporary_bytes": 1})
    fits = cost_scaling.fit_all(rows)
    assert [(f["backbone"], f["cost"]) for f in fits] == [("s4", "time"), ("s4", "memory")]
    assert fits[0]["exponent"] == pytest.approx(1.0)


def test_s4_row_shows_the_published_figure():
    row = {"backbone": "s4", "objective": "cpc", "precision": "float32", "batch": 64, "parameters": 3_194_880}
    programs = dict.fromkeys(cells.PROGRAMS, Program(None, 1.0, None, None, {}))
    row |= cells._passes(load_config("configs/cpc.py"), programs, {"step_forward_compiler_flops": None})
    (line,) = efficiency_report.cost_cells([row])
    shown = dict(zip(efficiency_report.COST_HEAD, line, strict=True))
    assert (shown["encoder forward GFLOP"], shown["encoder backward GFLOP"]) == ("1.741", "3.471")
    # Two thirds of the head and of the scores are their backward pass, all but the data's gradient of the stem's.
    assert (shown["step forward GFLOP"], shown["step backward GFLOP"]) == ("1.986", "3.962")
    assert shown["compiled step backward"] == "-"


def test_quick_run_writes_table_json_and_pictures(tmp_path, capsys, cached):
    folder = tmp_path / "new" / "efficiency"
    arguments = [*ONE, "--quick", "--batch=3", "--window=0.5", *TINY]
    assert run(f"--output={folder}", *arguments) == 0
    files = {path.name for path in folder.iterdir()}
    pictures = {
        f"{name}.{suffix}" for name in ("efficiency", "published") for suffix in ("png", "svg", "csv")
    }
    tables = {f"{name}.csv" for name in ("operations", "memory", "speed")}
    assert files == pictures | tables | {"efficiency.json", "efficiency.md", "figures.json"}
    figures = read_figures(folder)
    assert (figures.kind, figures.about["study"]) == ("efficiency", "table")
    assert figures.about["command"] == ["ecg-jax", "efficiency", f"--output={folder}", *arguments]
    assert all("--quick" in f.does_not_show for f in figures.figures if f.name != "published")
    told = json.loads((folder / "efficiency.json").read_text())
    (row,) = told["rows"]
    assert told["processors"] >= 1
    assert [row[name] for name in ("backbone", "objective", "precision", "batch")] == [
        "s4",
        "cpc",
        "float32",
        3,
    ]
    config = efficiency.run_config(
        "s4", "cpc", precision="float32", batch=3, window_s=0.5, quick=True,
        overrides=[tuple(word.removeprefix("--config.").split("=")) for word in TINY],
    )  # fmt: skip
    assert config.model.l_max == 60
    step, both = row["programs"]["step"], row["programs"]["forward_backward"]
    assert step["flops_per_window"] == efficiency.flops.training_flops(config)
    assert both["flops_per_window"] == efficiency.flops.encoder_cost(config).total
    # Parameters and both moments are read and written, so are 3 windows of int16.
    assert step["least_bytes"] >= 2 * 3 * 4 * row["parameters"] + 3 * 120 * 12 * 2
    assert row["parameters"] > row["encoder_parameters"] > 0
    assert row["device_peak_bytes"] is None  # a CPU does not say
    for program in row["programs"].values():
        assert program["windows_per_s_low"] <= program["windows_per_s"] <= program["windows_per_s_high"]
        rate = told["roofline"]["flops_per_s"]["float32"]
        least = program["flops_per_window"] * program["windows_per_s"] / rate
        assert program["fraction_of_roofline"] >= least * 0.999
        assert program["compile_s"] > 0
    assert (folder / "efficiency.png").read_bytes().startswith(PNG)
    table = (folder / "efficiency.md").read_text()
    assert table.count("| s4 | cpc | float32 | 3 |") == 3
    passes, compiled = row["flops_per_window"], row["compiler_flops_per_window"]
    assert passes["step_forward"] + passes["step_backward"] == step["flops_per_window"]
    assert passes["encoder_forward"] + passes["encoder_backward"] == both["flops_per_window"]
    both_passes = compiled["step_forward"] + compiled["step_backward"]
    assert both_passes == pytest.approx(step["compiler_flops_per_window"])
    # The forward pass of the step has the encoder's and the head; the gradient costs nearly as much again.
    assert compiled["encoder_forward"] < compiled["step_forward"] < 0.7 * both_passes
    assert jax.__version__ in table
    out = capsys.readouterr().out
    assert "copies" in out.splitlines()[0]
    assert "written:" in out


def test_scaling_writes_exponents_and_picture(tmp_path, capsys, monkeypatch, cached):
    monkeypatch.setattr(efficiency, "WINDOWS_S", (0.25, 0.5))
    arguments = [*ONE, "--quick", "--batch=2", "--window=0.25", *TINY]
    assert run("--scaling", f"--output={tmp_path}", *arguments) == 0
    told = json.loads((tmp_path / "scaling.json").read_text())
    places = [(row["axis"], row["x"], row["batch"]) for row in told["rows"]]
    assert places == [("window", 0.25, 1), ("window", 0.5, 1), ("batch", 1, 1), ("batch", 2, 2)]
    assert {(fit["axis"], fit["cost"]) for fit in told["fits"]} == {
        (axis, cost) for axis in ("window", "batch") for cost in ("time", "memory")
    }
    assert (told["batches"], told["objective"], told["precisions"]) == ([1, 2], "cpc", ["float32"])
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)
    assert "exponent" in capsys.readouterr().out


def test_tuning_adds_rows_of_this_device(tmp_path, cached):
    path = tmp_path / "table.json"
    elsewhere = {
        "device_kind": "Abacus",
        "dtype": "float32",
        "channels": 1,
        "width": 8,
        "state": 8,
        "length": 75,
    }
    elsewhere |= {"algorithm": "fft", "relative": {"fft": 1.0}}
    stale = elsewhere | {"device_kind": jax.devices()[0].device_kind, "algorithm": "nonsense"}
    path.write_text(json.dumps({"rows": [elsewhere, stale]}))
    assert run("--tune-conv", "--quick", f"--output={path}", "--repeats=1") == 0
    rows = json.loads(path.read_text())["rows"]
    assert elsewhere in rows
    assert stale not in rows
    mine = [row for row in rows if row["device_kind"] == jax.devices()[0].device_kind]
    assert [(row["channels"], row["length"]) for row in mine] == [(1, 75), (2, 75)]
    for row in mine:
        assert list(row["relative"]) == candidates(75, tune_conv.STATE)
        assert row["relative"]["fft"] == 1.0
        assert row["relative"][row["algorithm"]] == max(row["relative"].values())


def test_tuning_leaves_out_cases_that_do_not_fit(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise DoesNotFit("needs more")

    monkeypatch.setattr(tune_conv, "compile_program", refuse)
    path = tmp_path / "table.json"
    assert run("--tune-conv", "--quick", f"--output={path}") == 0
    assert json.loads(path.read_text())["rows"] == []
    assert capsys.readouterr().out.count("left out, needs more") == 2


def test_tuning_cases_cover_backbones_and_heads():
    cases = tune_conv.all_cases()
    assert len(cases) == len(set(cases)) == 7 * 2 * 2 * 2 + 2 * 2 * 2
    assert {case.length for case in cases if case.state == 64} == {300}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbones=s5"], "--backbones=s5: 's5' is unknown; known: s4, transformer, net1d"),
        (["--backbones="], "--backbones is empty"),
        (["--objectives=cpc,mae"], "'mae' is unknown"),
        (["--precisions=float16"], "did you mean 'bfloat16'?"),
        (["--batch=0"], "--batch=0 must be"),
        (["--batch=64,-1"], "--batch=64,-1 must be"),
        (["--batch=many"], "--batch=many must be"),
        (["--batch="], "--batch= must be"),
        (["--batch=3", "--config.accumulate=2"], "windows does not divide into the 2 parts of config.accumulate"),
        (["--config.accumulate=0"], "config.accumulate=0 must be positive"),
        (["--window=1e308"], "--window=1e+308 is too long"),
        (["--window=5000"], "--window=5000 is too long: at 240 Hz it has more than 1000000 samples"),
        (["--window=0"], "--window=0 must be"),
        (["--window=nan"], "--window=nan must be"),
        (["--window=0.001"], "must have between 4 and"),
        (["--repeats=0"], "--repeats=0 must be"),
        (["--config.model.wdith=3"], "did you mean 'width'?"),
        (["--config.model.width"], "needs a value"),
        (["--config.model.width", "--quick"], "--config.model.width needs a value"),
        (["--config.model.width", "wide"], "'wide' is not a value of type int"),
        (["--config.batch_size=3"], "use --batch"),
        (["--backbones=net1d", "--config.model.state=4"], "no field 'state'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [[], ["--scaling"]])
def test_refusals(tmp_path, capsys, monkeypatch, arguments, said, kind):
    monkeypatch.setattr(efficiency, "measure_roofline", lambda **_: pytest.fail("measured something"))
    monkeypatch.setattr(cost_scaling, "measure_scaling", lambda *_, **__: pytest.fail("measured something"))
    assert run(f"--output={tmp_path / 'out'}", *ONE, *kind, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tune-conv", "--backbones=s4"], "--backbones says nothing with --tune-conv"),
        (["--tune-conv", "--results=runs"], "--results says nothing with --tune-conv"),
        (["--results="], "--results names no folder"),
        (["--results=,"], "--results names no folder"),
        (["--scaling", "--results=runs"], "--results says nothing with --scaling"),
        (["--tune-conv", "--batch=8"], "--batch says nothing with"),
        (["--tune-conv", "--window=2.5"], "--window says nothing with"),
        (["--tune-conv", "--config.model.width=8"], "--config.model.width says nothing with"),
        (["--scaling", "--objectives=jepa,cpc"], "--objectives has several values, --scaling takes one"),
        (["--scaling", "--precisions=float32,bfloat16"], "--precisions has several values"),
        (["--scaling", "--batch=8,16"], "--batch has several values"),
    ],
)
def test_options_that_a_kind_of_measurement_does_not_take(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(cost_scaling, "measure_scaling", lambda *_, **__: pytest.fail("measured something"))
    monkeypatch.setattr(tune_conv, "time_case", lambda *_, **__: pytest.fail("measured something"))
    assert run(f"--output={tmp_path / 'out'}", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"), [("none", "there is no folder"), ("empty", "holds no sweep, no pretraining run")]
)
def test_results_that_are_none_are_refused_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, given, said
):
    monkeypatch.setattr(efficiency, "measure_roofline", lambda **_: pytest.fail("measured something"))
    (tmp_path / "empty").mkdir()
    assert run(f"--output={tmp_path / 'out'}", *ONE, f"--results={tmp_path / given}") == 2
    assert said in capsys.readouterr().err


def test_figures_of_another_study_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(efficiency, "measure_roofline", lambda **_: pytest.fail("measured something"))
    figure = Figure("scaling", "t", "s", "d", ("a",), [(1,)])
    write_figures(tmp_path, "efficiency", [figure], {"study": efficiency.SCALING})
    assert run(f"--output={tmp_path}", *ONE) == 2
    assert "holds the figures of another study" in capsys.readouterr().err
    assert read_figures(tmp_path).about["study"] == efficiency.SCALING


def test_precisions_are_both_unless_it_is_quick(tmp_path):
    def precisions(*more):
        return efficiency.parse_arguments(["--output=x", *more])[0].precisions

    assert precisions() == ("float32", "bfloat16")
    assert precisions("--quick") == precisions("--scaling") == ("float32",)
    assert precisions("--quick", "--precisions=bfloat16,float32") == ("bfloat16", "float32")


@pytest.mark.parametrize("kind", [[*ONE], [*ONE, "--scaling"], ["--tune-conv"]])
def test_output_that_cannot_be_written(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(efficiency, "measure_roofline", lambda **_: pytest.fail("measured something"))
    monkeypatch.setattr(tune_conv, "time_case", lambda *_, **__: pytest.fail("measured something"))
    (tmp_path / "file").write_text("[]")
    output = tmp_path / "file" if kind != ["--tune-conv"] else tmp_path / "none" / "table.json"
    assert run(f"--output={output}", *kind) == 2
    assert str(output) in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "[]"


def test_tuning_refuses_a_file_that_is_no_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune_conv, "time_case", lambda *_, **__: pytest.fail("measured something"))
    path = tmp_path / "other.json"
    path.write_text("[1, 2]")
    assert run("--tune-conv", f"--output={path}") == 2
    assert "no table of convolutions" in capsys.readouterr().err
    assert path.read_text() == "[1, 2]"
