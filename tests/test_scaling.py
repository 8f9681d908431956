import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ecg_jax import scaling
from ecg_jax.cli import main
from ecg_jax.errors import UserError
from ecg_jax.evaluation import metrics
from ecg_jax.studies.figure_folder import read_figures, write_figures
from ecg_jax.studies.power_law import fit_many
from ecg_jax.studies.scaling_correlations import PAIRS, correlations
from ecg_jax.studies.scaling_fits import WITHOUT, Fitted, fit_curve
from ecg_jax.studies.scaling_overviews import training_figure
from ecg_jax.studies.scaling_points import error_curves, families, loss_curves, populations, usable
from ecg_jax.studies.scaling_words import in_short
from ecg_jax.studies.study_runs import find_runs
from study_folder import write_run, write_sweep

SIZES = (250, 600, 1500, 4000)
EXPONENTS = {"cpc": 0.189, "jepa": 0.062}


def entries(sizes=SIZES, seeds=(0, 1), objectives=("cpc", "jepa"), noise=0.005, **more):
    """Runs whose losses are 2 N^-b with noise, and whose time goes as N^0.8."""
    generator = np.random.default_rng(0)
    for objective in objectives:
        for n in sizes:
            for seed in seeds:
                yield {
                    "name": f"{objective}-{n}-{seed}", "recordings": n, "objective": objective, "seed": seed,
                    "loss": 2 * n ** -EXPONENTS[objective] * np.exp(noise * generator.normal()),
                    "seconds": 5 * n**0.8, "errors": {}, **more,
                }  # fmt: skip


def with_errors(found, **laws):
    """The same with errors a N^-b + c by task, laws as (a, b, c)."""
    for entry in found:
        n = entry["recordings"]
        yield entry | {"errors": {task: a * n**-b + c for task, (a, b, c) in laws.items()}}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study through the command: (sweep, output, what it printed)."""
    folder = tmp_path_factory.mktemp("scaling")
    runs = [*with_errors(entries(), ptbxl_super=(1.2, 0.3, 0.0), ptbxl_sub=(1.0, 0.25, 0.0))]
    sweep = write_sweep(folder / "ladder", runs)
    log = sweep / "jepa-250-0/run/log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    return sweep, folder / "out"


DRAWN = ("training", "loss_recordings", "correlation_linear_mean_macro_auroc")


@pytest.fixture(scope="module")
def result(study):
    """scaling.json; of the pictures only some, as saving them takes longest."""
    sweep, output = study

    def write(folder, kind, figures, *others):
        chosen = [figure if figure.name in DRAWN else replace(figure, picture=None) for figure in figures]
        return write_figures(folder, kind, chosen, *others)

    command = [
        "scaling",
        f"--runs={sweep}",
        f"--output={output}",
        "--resamples=200",
        "--x=flops,device_hours",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "write_figures", write)
        assert main(command) == 0
    return json.loads((output / "scaling.json").read_text())


def fit_of(result, curve, quantity="loss", task="", axis="recordings"):
    (found,) = [
        fit for fit in result["fits"]
        if (fit["curve"], fit["quantity"], fit["task"], fit["axis"]) == (curve, quantity, task, axis)
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("objective", EXPONENTS)
def test_exponents_that_went_in_come_out(result, objective):
    fit = fit_of(result, f"{objective} s4")
    b = fit["fits"]["power law"]["b"]
    assert b["point"] == pytest.approx(EXPONENTS[objective], abs=0.006)
    assert b["low"] <= EXPONENTS[objective] <= b["high"]
    assert fit["drawn_form"] == "power law"
    assert fit["model_comparison"]["best"] == "power law"
    assert fit["published_exponent"] == EXPONENTS[objective]
    held = fit["largest_held_out"]["power law"]
    assert held["size"] == pytest.approx(4000)
    assert held["inside"]
    assert abs(held["error"]) < 0.02


def test_errors_are_fitted_with_their_patients(result):
    fit = fit_of(result, "cpc s4", "error", "ptbxl_super")
    without = fit["fits"]["power law"]
    assert without["intervals_over"] == ["runs", "recordings"]
    assert without["b"]["low"] <= 0.3 <= without["b"]["high"]
    assert fit["published_exponent"] is None, "the paper gives exponents of losses"
    mean = fit_of(result, "cpc s4", "error", "mean")
    parts = [fit_of(result, "cpc s4", "error", task) for task in mean["tasks"]]
    assert len(parts) == 2
    for i, point in enumerate(mean["points"]):
        assert point["value"] == pytest.approx(np.mean([part["points"][i]["value"] for part in parts]))


def test_every_point_leads_to_its_files(result):
    for fit in result["fits"]:
        for point in fit["points"]:
            for folder, single in (
                (Path(each), "," not in point["folder"]) for each in point["folder"].split(",")
            ):
                assert folder.is_dir()
                if fit["quantity"] == "error" and single:
                    assert (
                        1 - json.loads((folder / "results.json").read_text())["macro_auroc"] == point["value"]
                    )
                if fit["quantity"] == "loss":
                    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
                    assert last["val_loss"] == point["value"]


def test_compute_is_an_axis_of_its_own_only_where_it_is(result):
    b = fit_of(result, "cpc s4")["fits"]["power law"]["b"]["point"]
    flops = fit_of(result, "cpc s4", axis="flops")
    assert flops["fits"]["power law"]["b"]["point"] == b
    assert "cannot be told apart" in flops["verdict"]
    for point in flops["points"]:
        band = flops["fits"]["power law"]["band"]
        drawn = np.interp(np.log(point["x"]), np.log(band["x"]), band["curve"])
        assert drawn == pytest.approx(point["value"], rel=0.03), "the curve lies where the points are"
    hours = fit_of(result, "cpc s4", axis="device_hours")
    assert hours["fits"]["power law"]["b"]["point"] == pytest.approx(b / 0.8, rel=0.02), "hours go as N^0.8"
    assert "cannot" not in hours["verdict"]


def test_unfinished_runs_are_left_out_aloud(study, result, capsys):
    assert any(line.startswith("jepa-250-0 is left out: at step ") for line in result["left_out"])
    names = {point["run"] for fit in result["fits"] for point in fit["points"]}
    assert "jepa-250-0" not in names
    assert len(names) == 15


def test_console_says_what_numbers_are_made_up(result):
    notes = [line for line in scaling.summary(result).splitlines() if line.startswith("  note: ")]
    assert any("SYNTHETIC test recordings" in line for line in notes)
    assert any("recordings are SYNTHETIC" in line for line in notes)
    plain = scaling.summary(result | {"remarks": []})
    assert "note:" not in plain
    assert "cpc s4, validation loss: b = " in plain


def test_each_curve_that_is_not_drawn_has_its_own_reason(study):
    """Three sizes determine no offset, of curves that are drawn without one too: that alone is no reason."""
    curves = loss_curves(families(usable(find_runs([study[0]]))[0]), "loss", print)
    fits = [fit_curve(curve, "recordings", hold_out=False, resamples=100) for curve in curves]
    law = fits[0].forms[WITHOUT].law
    lost = [law._replace(identifiable=False, reason=why) for why in ("too few", "too few", "too wild")]
    undrawn = [
        replace(fit, forms={form: each._replace(law=reason) for form, each in fit.forms.items()})
        for fit, reason in zip([fits[0], fits[0], fits[0]], lost, strict=True)
    ]
    label = fits[0].curve.family.label
    assert [text for text in in_short([*fits, *undrawn]) if text.startswith("No curve")] == [
        f"No curve is determined for {label}, {label} (power law: too few)",
        f"No curve is determined for {label} (power law: too wild)",
    ]
    forms = {WITHOUT: lost[2], "power law with offset": lost[0]}
    forms = {form: fits[0].forms[WITHOUT]._replace(law=each) for form, each in forms.items()}
    with_offset = replace(fits[0], curve=replace(fits[0].curve, quantity="error"), forms=forms)
    assert with_offset.verdict == "power law with offset: too few; without offset: too wild"


def test_one_value_of_the_loss_says_nothing_of_its_fall(tmp_path):
    for recordings, loss in ((100, 2.0), (200, 1.5)):
        write_run(tmp_path / str(recordings), recordings, loss)
    logs = sorted(tmp_path.glob("*/log.jsonl"))

    def shows():
        return training_figure(families(usable(find_runs([tmp_path]))[0])).shows

    entries = [json.loads(line) for line in logs[0].read_text().splitlines()]
    logs[0].write_text(
        "".join(json.dumps(entry | {"val_loss": 3.0 - entry["val_loss"]}) + "\n" for entry in entries)
    )
    assert "more than once: 2, and in 1 of them the last value is the lowest" in shows()
    for log in logs:
        log.write_text(log.read_text().splitlines(keepends=True)[-1])
    assert "measured once a run, at the end" in shows()


def test_figures_say_what_they_show_and_what_not(study, result):
    folder = read_figures(study[1])
    assert folder.kind == "scaling"
    assert folder.about["command"][:2] == ["ecg-jax", "scaling"]
    assert len(folder.about["runs"]) == 15
    by_name = {figure.name: figure for figure in folder.figures}
    assert {
        "training", "loss_recordings", "error_linear_mean_macro_auroc_recordings",
        "error_linear_ptbxl_sub_macro_auroc_recordings", "loss_flops", "loss_device_hours", "exponents_over_recordings",
        "correlation_linear_mean_macro_auroc", "fits", "models", "largest_size_predicted", "correlations", "points",
        "runs",
    } <= set(by_name)  # fmt: skip
    assert {figure.name for figure in folder.figures if figure.picture} == set(DRAWN)
    assert "more than once: 15, and in 15 of them the last value is the lowest" in by_name["training"].shows
    loss = by_name["loss_recordings"]
    for words in ("15 runs", "0.189 for cpc", "not ours"):
        assert words in loss.shows
    for words in ("not comparable", "SYNTHETIC", "number of updates grows with the number of recordings"):
        assert words in loss.does_not_show
    assert "SYNTHETIC test recordings" not in loss.does_not_show
    of_errors = by_name["error_linear_ptbxl_sub_macro_auroc_recordings"]
    assert "SYNTHETIC test recordings" in of_errors.does_not_show
    fit = fit_of(result, "cpc s4")["fits"]["power law"]["b"]
    assert f"b = {fit['point']:.3g}" in loss.shows
    runs = [row for row in loss.rows if row[0] == "run"]
    assert len(runs) == 15
    assert all(figure.shows and figure.does_not_show and figure.rows for figure in folder.figures)
    mean = by_name["error_linear_mean_macro_auroc_recordings"]
    assert "the mean over ptbxl_super, ptbxl_sub." in mean.shows
    # 4 sizes do not show how far they lie off every curve; test recordings of the probes are made up too.
    for words in ("84 % with 3", "SYNTHETIC test recordings"):
        assert words in mean.does_not_show
    assert "take that for exact" in by_name["loss_device_hours"].does_not_show
    correlation = by_name["correlation_linear_mean_macro_auroc"]
    assert "near 0 by construction: no interval" in correlation.shows
    assert "SYNTHETIC test recordings" in correlation.does_not_show


def figures_of(folder, monkeypatch, **options):
    """The figures of a study that is not written."""
    found = []
    monkeypatch.setattr(scaling, "write_figures", lambda folder, kind, figures, *_: found.extend(figures))
    scaling.scaling([folder], folder.parent / "out", resamples=100, hold_out=False, axes=(), **options)
    return {figure.name: figure for figure in found}


def test_means_of_different_metrics_are_apart(tmp_path, monkeypatch):
    errors = dict.fromkeys(("class_1", "class_2", "number_1", "number_2"), (1.2, 0.3, 0.0))
    sweep = write_sweep(tmp_path / "s", list(with_errors(entries(SIZES[:2], [0], ["cpc"]), **errors)))
    for path in sweep.rglob("results.json"):
        results = json.loads(path.read_text())
        if results["task"].startswith("number"):
            arrays = np.load(path.with_name("predictions.npz"))
            mae = float(np.abs(arrays["targets"] - arrays["probabilities"]).mean())
            path.write_text(json.dumps(results | {"metric": "mae", "mae": mae}))
    figures = figures_of(sweep, monkeypatch)
    for metric, task in (("mae", "number"), ("macro_auroc", "class")):
        assert f"the mean over {task}_1, {task}_2." in figures[f"error_linear_mean_{metric}_recordings"].shows
        assert f"correlation_linear_mean_{metric}" in figures
    exponents = figures["exponents_over_recordings"]
    assert [row[1:5] for row in exponents.rows] == [
        ["loss", "", "", ""], ["error", "mean", "linear", "macro_auroc"], ["error", "mean", "linear", "mae"]
    ]  # fmt: skip
    assert "of 3 curves" in exponents.shows, "what is drawn is counted"


def test_every_kind_of_value_has_a_panel(tmp_path, monkeypatch):
    modes = ("linear", "finetune", "frozen")
    errors = {(f"task_{i}", mode): 0.2 for mode in modes for i in range(2)}
    runs = [entry | {"errors": errors} for entry in entries(SIZES[:2], [0], ["cpc"])]
    exponents = figures_of(write_sweep(tmp_path / "s", runs), monkeypatch)["exponents_over_recordings"]
    assert [row[1:4] for row in exponents.rows] == [
        ["loss", "", ""], ["error", "mean", "linear"], ["error", "mean", "finetune"], ["error", "mean", "frozen"],
    ]  # fmt: skip
    assert len([axes for axes in exponents.picture.axes if axes.axison]) == 4


SHORT = np.array([96.0, 384.0, 1536.0])


def noise_alone(generator, n_curves):
    """Fits of losses and errors whose residuals have nothing to do with each other, over three sizes."""
    fits = []
    for number in range(n_curves):
        for quantity, a, b in (("loss", 3, 0.1), ("error", 1.3, 0.2)):
            values = a * SHORT**-b * np.exp(0.01 * generator.normal(size=3))
            law = fit_many(SHORT, values[None], offset=False)
            form = SimpleNamespace(
                law=SimpleNamespace(identifiable=True, predict=lambda n, law=law: law.predict(n)[0])
            )
            runs = [
                SimpleNamespace(name=f"{number}-{n}", recordings=n, probes=[], synthetic=False,
                                fingerprints={"validation": "v", "store": "s"})
                for n in SHORT
            ]  # fmt: skip
            curve = SimpleNamespace(
                family=SimpleNamespace(label=f"cpc {number}"), synthetic=False, quantity=quantity, task="t",
                mode="linear", metric="macro_auroc", tasks=("t",), runs=runs, sources=(), values=values,
                rungs=np.arange(3),
                resampled=values[:, None] * np.exp(0.02 * generator.normal(size=100)),
            )  # fmt: skip
            fits.append(Fitted(curve, "recordings", SHORT, SHORT, {WITHOUT: form}, {}, None, ""))
    return fits


def test_correlations_of_residuals_hold_none_as_often_as_they_say():
    generator, excluded, points = np.random.default_rng(8), 0, []
    for _ in range(100):
        (found,) = correlations(noise_alone(generator, 5))
        within = found.against[PAIRS[2]][0]
        assert (within.name, within.n_units) == ("within curves", 15)
        excluded += not within.pearson.low <= 0 <= within.pearson.high
        points.append(found.against[PAIRS[1]][1].pearson.point)
    # More than 12 of 100 at 95 % happen less than twice in a thousand times; not counting parameters makes it 22.
    assert excluded <= 12
    # What a curve took off does not correlate with what it left, which is no finding and has no interval.
    assert np.std(points) < 0.1
    loss_and_residual = found.against[PAIRS[1]]
    assert [each.name for each in loss_and_residual][:2] == ["all runs", "within curves"]
    assert all(each.pearson is None or np.isnan(each.pearson.low) for each in loss_and_residual)
    assert "whatever the truth" in loss_and_residual[1].remark
    # Of one curve through three sizes all residuals are multiples of one vector.
    assert found.against[PAIRS[2]][1].pearson is None


def read(folder, **more):
    chosen, left_out = usable(find_runs([folder]))
    assert not left_out
    return families(chosen)


def test_three_sizes_do_not_carry_three_parameters(tmp_path):
    runs = with_errors(entries(SIZES[:3], objectives=["cpc"]), ptbxl_super=(1.2, 0.3, 0.05))
    found = read(write_sweep(tmp_path / "s", list(runs)))
    (curve,) = error_curves(found, tasks=(), modes=(), resamples=100, note=pytest.fail)
    fit = fit_curve(curve, "recordings", hold_out=True, resamples=100)
    assert fit.drawn == "power law"
    assert "not identifiable" in fit.verdict
    assert not fit.forms["power law with offset"].law.identifiable
    assert fit.held_out["power law with offset"].predicted is None


def test_a_probe_of_the_largest_size_alone_is_no_curve_and_no_obstacle(tmp_path):
    runs = list(with_errors(entries(SIZES[:3], objectives=["cpc"]), ptbxl_super=(1.2, 0.3, 0.0)))
    for run in runs:
        if run["recordings"] == SIZES[2]:
            run["errors"]["ptbxl_sub"] = 0.2
    found = read(write_sweep(tmp_path / "s", runs))
    curves = error_curves(found, tasks=(), modes=(), resamples=100, note=lambda line: None)
    curves += loss_curves(found, "loss", lambda line: None)
    fits = [fit_curve(curve, "recordings", hold_out=True, resamples=100) for curve in curves]
    undrawn = {fit.curve.task for fit in fits if fit.curve.task and fit.drawn is None}
    assert undrawn == {"ptbxl_sub", "mean"}  # a mean over two tasks is of the largest size too
    assert {found.task for found in correlations(fits)} == {"ptbxl_super", "ptbxl_sub", "mean"}


def test_patients_are_drawn_once_for_all_runs(tmp_path):
    runs = with_errors(entries(SIZES[:2], objectives=["cpc"], noise=0), ptbxl_super=(1.2, 0.3, 0.0))
    found = read(write_sweep(tmp_path / "s", list(runs)))
    (curve,) = error_curves(found, tasks=(), modes=(), resamples=150, note=pytest.fail)
    assert curve.resampled.shape == (4, 150)
    # What the runs share in their test patients makes their resampled errors go together.
    assert np.corrcoef(curve.resampled)[0, 1:].min() > 0.9
    # The spread is that of an AUROC over so many patients, here by drawing pairs of records anew.
    arrays = curve.runs[0].probes[0].predictions()
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(150):
        patients = generator.integers(0, 200, 200)
        rows = np.concatenate([2 * patients, 2 * patients + 1])
        drawn.append(1 - metrics.auroc(arrays["targets"][rows], arrays["probabilities"][rows]).mean())
    assert curve.resampled[0].std() == pytest.approx(np.std(drawn), rel=0.35)


def test_what_differs_at_one_size_parts_curves(tmp_path):
    small = list(entries(SIZES[:2], [0], ["cpc"]))
    wide = [entry | {"name": f"wide-{entry['name']}", "model__width": 32} for entry in small]
    # Every run of a size has its own number of steps: that goes with the size.
    found = read(write_sweep(tmp_path / "s", small + wide))
    assert [(family.label, len(family.runs)) for family in found] == [
        ("cpc s4, width=16", 2), ("cpc s4, width=32", 2),
    ]  # fmt: skip
    warm = [entry | {"optimiser__learning_rate": 1 / entry["recordings"]} for entry in small]
    (family,) = read(write_sweep(tmp_path / "t", warm))
    assert family.moving == ("optimiser.learning_rate",)


def test_other_populations_are_told(tmp_path):
    runs = list(entries(SIZES[:2], [0], ["cpc"]))
    runs[1] |= {"store": "6" * 64, "corpus": "ptbxl"}
    (family,) = read(write_sweep(tmp_path / "s", runs))
    assert family.moving == ("store_fingerprint",)
    said = " ".join(populations(family.runs))
    for words in ("held-out recordings", "stores are not the same", "SYNTHETIC"):
        assert words in said


def refused(folder, **options):
    with pytest.raises(UserError) as error:
        scaling.scaling([folder], folder.parent / "out", resamples=100, **options)
    assert not (folder.parent / "out").exists(), "nothing is written"
    return str(error.value)


def test_runs_that_make_no_curve_are_refused(tmp_path):
    one = write_sweep(tmp_path / "a/s", list(entries([250], [0], ["cpc"])))
    assert "at least two" in refused(one)

    runs = list(entries(SIZES[:2], [0], ["cpc"]))
    windows = write_sweep(tmp_path / "b/s", [runs[0], runs[1] | {"data__window_s": 5.0}])
    assert "cpc-250-0 and cpc-600-0" in refused(windows)
    assert "data.window_s (2.5 and 5.0)" in refused(windows)

    twice = write_sweep(tmp_path / "c/s", [*runs, runs[0] | {"name": "again"}])
    assert "same settings, size and seed" in refused(twice)

    tested = write_sweep(tmp_path / "d/s", list(with_errors(runs, ptbxl_super=(1.2, 0.3, 0.0))))
    path = tested / "cpc-600-0/probe/predictions.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"record_id": arrays["record_id"][::-1]})
    assert "differ in test records" in refused(tested)
    assert "no run has a finished probe of --tasks=ptbxl_all" in refused(tested, tasks=["ptbxl_all"])

    unfinished = write_sweep(tmp_path / "e/s", runs)
    for run in runs:
        (unfinished / run["name"] / "run/log.jsonl").unlink()
    assert "no run is finished" in refused(unfinished)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--x=recordings,parameters"], "--x=parameters is not among"),
        (["--modes=zero-shot"], "--modes=zero-shot is not among"),
        (["--resamples=10"], "too few for an interval; give 100"),
        (["--resamples=1000001"], "give 100 to 1000000"),
        (["--tasks=,"], "--tasks=, names nothing"),
        (["--modes="], "--modes= names nothing"),
        (["--x=,"], "--x=, names nothing"),
        ([], "there is no folder"),
    ],
)
def test_bad_options_are_told(options, words, tmp_path, capsys):
    arguments = ["scaling", "--runs", str(tmp_path / "none"), f"--output={tmp_path / 'out'}", *options]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_output_with_other_things_is_left_alone(tmp_path):
    sweep = write_sweep(tmp_path / "s", list(entries(SIZES[:2], [0], ["cpc"])))
    with pytest.raises(UserError, match="holds something else"):
        scaling.scaling([sweep], sweep)
    # What efficiency --scaling writes has the same names.
    other = tmp_path / "efficiency"
    write_figures(other, "efficiency", [], {"study": "scaling"}, {"scaling.json": b"{}"})
    with pytest.raises(UserError, match="figures of another study"):
        scaling.scaling([sweep], other)
    assert (other / "scaling.json").read_bytes() == b"{}"


def test_losses_without_logarithm_are_left_out(tmp_path):
    runs = list(entries(SIZES[:2], [0], ["cpc"]))
    runs[0]["loss"] = -1.0
    notes = []
    (curve,) = loss_curves(read(write_sweep(tmp_path / "s", runs)), "loss", notes.append)
    assert len(curve.runs) == 1
    assert notes == ["cpc-250-0 is left out of the losses: its validation loss is -1.0"]
