"""Damaged files of runs and probes are told in one sentence, and no other number stands for one that is lost."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ecg_jax import run_starts, scaling
from ecg_jax.cli import main
from ecg_jax.errors import UserError
from ecg_jax.studies.scaling_points import error_curves, families, loss_curves, usable
from ecg_jax.studies.study_runs import find_runs
from ecg_jax.training.checkpoint import finished_steps
from study_folder import config_of, write_probe, write_sweep


@pytest.fixture
def sweep(tmp_path):
    errors = {"ptbxl_super": 0.2}
    runs = [{"name": f"cpc-{n}", "recordings": n, "loss": 2 * n**-0.1, "errors": errors} for n in (100, 200)]
    return write_sweep(tmp_path / "s", runs)


def change(path: Path, field: str, value) -> None:
    """Sets "a.b.c" of a JSON file."""
    content = inner = json.loads(path.read_text())
    *outer, last = field.split(".")
    for name in outer:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[last] = value
    path.write_text(json.dumps(content))


def change_log(run: Path, entries) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read_log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def keep(run: Path, step: int) -> None:
    folder = run / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")


def refused(folder: Path) -> str:
    """The sentence of whichever reads it: find_runs, or the curves."""
    with pytest.raises(UserError) as error:
        curves_of(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def curves_of(folder: Path, notes: list[str] | None = None):
    said = [] if notes is None else notes
    grouped = families(usable(find_runs([folder]))[0])
    return [
        *loss_curves(grouped, "loss", said.append),
        *loss_curves(grouped, "best_loss", said.append),
        *error_curves(grouped, tasks=(), modes=(), resamples=100, note=said.append),
    ]


@pytest.mark.parametrize("lost", ["null", "line", "log"])
def test_the_loss_of_an_earlier_step_does_not_stand_for_the_last(sweep, lost):
    run = sweep / "cpc-100/run"
    before = read_log_lines(run)
    if lost == "null":
        before[-1]["val_loss"] = None
        change_log(run, before)
    else:
        keep(run, 25)
        change_log(run, before[:-1] if lost == "line" else [])
    first, second = find_runs([sweep])
    lowest = None if lost == "log" else before[1]["val_loss"]
    assert (first.finished, first.step, first.val_loss, first.best_val_loss) == (True, 25, None, lowest)
    assert first.remarks == (
        "its validation loss is not known: log.jsonl has none at step 25, where the run ends",
    )
    assert (second.val_loss, second.remarks) == (pytest.approx(2 * 200**-0.1), ())
    notes = []
    loss, best, error = curves_of(sweep, notes)
    assert [run.name for run in loss.runs] == [run.name for run in best.runs] == ["cpc-200"]
    assert len(error.runs) == 2
    left_out = "cpc-100 is left out of the losses: its validation loss at its end is not known"
    assert {left_out, f"cpc-100: {first.remarks[0]}"} <= set(notes)


def test_losses_that_are_there_are_kept(sweep):
    a, b = sweep / "cpc-100/run", sweep / "cpc-200/run"
    # One that is still trained: logged after its last validation, which was at a checkpoint.
    lines = read_log_lines(a)
    change_log(a, [lines[0], {"step": 20, "loss": 1.0}])
    keep(a, lines[0]["step"])
    # A finished one whose log has a null and a NaN before its end.
    lines_b = read_log_lines(b)
    change_log(b, [lines_b[0] | {"val_loss": math.nan}, lines_b[1] | {"val_loss": None}, lines_b[2]])
    first, second = find_runs([sweep])
    assert (first.state, first.val_loss, first.remarks) == ("at step 20 of 25", lines[0]["val_loss"], ())
    assert (second.val_loss, second.best_val_loss) == (lines_b[2]["val_loss"],) * 2


def test_a_study_of_runs_without_their_last_loss_is_written(sweep, tmp_path, capsys):
    for name in ("cpc-100", "cpc-200"):
        lines = read_log_lines(sweep / name / "run")
        change_log(sweep / name / "run", [*lines[:-1], lines[-1] | {"val_loss": None}])
    written = scaling.scaling([sweep], tmp_path / "out", resamples=100, hold_out=False)
    assert {fit["quantity"] for fit in written["fits"]} == {"error"}
    assert capsys.readouterr().out.count("is left out of the losses") == 2


START = {
    "seconds": [-1, math.nan, math.inf, True, "60"], "devices": [0, -1, 1.5, "two", True, None],
    "versions": [None, [], {"jax": 1}], "step": [-1, None, "0"], "device_kind": [1, ""], "git": ["a", {}],
    "parameters": ["many"], "processes": [0],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in START for value in START[field]])
def test_starts_that_cannot_be_are_no_cost(sweep, field, value):
    run = sweep / "cpc-100/run"
    change(run / "made_with.json", f"starts.0.{field}", value)
    with pytest.raises(run_starts.Damaged, match=f"made_with.json.*starts\\[0\\].{field}"):
        run_starts.read_starts(run)
    found = find_runs([sweep])[0]
    assert (found.device_hours, found.seconds, found.devices) == (None, None, None)
    assert found.remarks[0].startswith("what it cost is not known")


@pytest.mark.parametrize("starts", [{}, [3], "x", None])
def test_starts_are_a_list_of_objects(sweep, starts):
    change(sweep / "cpc-100/run/made_with.json", "starts", starts)
    with pytest.raises(run_starts.Damaged, match="made_with"):
        run_starts.read_starts(sweep / "cpc-100/run")


@pytest.mark.parametrize("seconds", [0, 1e-300])
def test_no_time_is_no_place_on_an_axis(sweep, tmp_path, seconds):
    change(sweep / "cpc-100/run/made_with.json", "starts.0.seconds", seconds)
    (first, _) = find_runs([sweep])
    assert first.device_hours is None
    assert f"says that it took {seconds:g} seconds" in first.remarks[0]
    out = tmp_path / "out"
    axes = ["--x=device_hours", "--resamples=100", "--no-hold-out"]
    assert main(["scaling", f"--runs={sweep}", f"--output={out}", *axes]) == 0
    fits = json.loads((out / "scaling.json").read_text())["fits"]
    verdicts = {fit["verdict"] for fit in fits if fit["axis"] == "device_hours"}
    assert verdicts == {"no fit: device-hours of pretraining of cpc-100 are not known"}


CONFIG = {
    "seed": ["x", None, -1, 2**63], "batch_size": [0, -8, "8", True, 1.5], "epochs": ["two", 0, math.nan, math.inf],
    "steps": [-1, "25"], "objective.name": [5, ""], "model.backbone": [[]], "model": ["s4"], "objective": [None],
    "model.width": [-4, "16", True], "model.layers": [0], "model.filters": [[], [0], 3], "objective.steps_ahead": ["x"],
    "objective.codes": [[1], "x"], "data": [3], "data.window_s": [0, "2.5", 1e300], "data.rate_hz": [math.nan],
    "store": [4], "store_fingerprint": [4], "origin": [{}, "x", {"store": None}], "init.checkpoint": [1],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in CONFIG for value in CONFIG[field]])
def test_a_config_that_cannot_be_is_refused(sweep, field, value):
    path = sweep / "cpc-100/run/config.json"
    change(path, field, value)
    assert refused(sweep).startswith(f"{path} is damaged: ")
    assert field in refused(sweep)


def test_an_objective_or_a_backbone_of_ones_own_is_no_damage(sweep):
    for field in ("objective.name", "model.backbone"):
        change(sweep / "cpc-100/run/config.json", field, "own")
    notes = []
    curves_of(sweep, notes)
    assert any(note.startswith("cpc-100: its operations are not known") for note in notes)


def test_what_a_sweep_or_a_probe_says_of_a_config_is_checked_too(sweep, tmp_path):
    for path in (sweep / "cpc-100/run").iterdir():
        path.unlink()
    change(sweep / "sweep.json", "runs.cpc-100.config.batch_size", 0)
    assert "sweep.json is damaged: the field runs.cpc-100.config.batch_size is 0" in refused(sweep)
    change(sweep / "sweep.json", "runs.cpc-100.group", 1)
    assert "the field runs.cpc-100.group is 1" in refused(sweep)
    write_probe(tmp_path / "p", tmp_path / "gone", config_of() | {"seed": "x"}, 25, 0.2)
    assert "results.json is damaged: the field pretraining_config.seed is 'x'" in refused(tmp_path / "p")


@pytest.mark.parametrize("device", ["cpu", "x x cpu", 3])
def test_a_status_that_cannot_be_is_refused(sweep, device):
    (sweep / "cpc-100/run/made_with.json").unlink()
    (sweep / "cpc-100/times.jsonl").write_text('{"pretrain": 5.0}\n')
    status = {
        "state": "finished", "error": "", "attempts": 1, "host": "h", "process": 7, "began": "2026", "ended": "2026",
        "parameters": 3, "recordings": 100, "device": "2 x cpu", "versions": {},
    }  # fmt: skip
    path = sweep / "cpc-100/status.json"
    path.write_text(json.dumps(status))
    assert find_runs([sweep])[0].device_hours == pytest.approx(10 / 3600)
    change(path, "device", device)
    assert str(path) in refused(sweep)
    assert "the field device is" in refused(sweep)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "low"),
        ("val_loss", True),
        ("val_loss", [1]),
        ("step", -3),
        ("step", True),
        ("rankme", 10**400),
    ],
)
def test_a_log_that_holds_no_numbers_is_refused(sweep, name, value):
    run = sweep / "cpc-100/run"
    lines = read_log_lines(run)
    change_log(run, [lines[0] | {name: value}, *lines[1:]])
    assert str(run / "log.jsonl") in refused(sweep)
    assert f"the field {name} is" in refused(sweep)


PROBE = {
    "task": [5, ""], "metric": ["task", None, []], "mode": ["foo", 1], "config": [{}, [], {"seed": "x"}],
    "checkpoint": [[], {}, {"run": 3, "step": 25}, {"run": "r", "step": "25"}], "store": [None, {"corpus": "a"}],
    "test_store": [5, {}], "bootstrap": [{}, {"undefined": "zero"}], "macro_auroc": ["0.8", 1.5, -1, math.nan, True],
    "n_records": [0, 399, "400"], "pretraining_config": [[]], "versions": [3],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in PROBE for value in PROBE[field]])
def test_results_that_cannot_be_are_refused(sweep, field, value):
    folder = sweep / "cpc-100/probe"
    change(folder / "results.json", field, value)
    assert str(folder) in refused(sweep)
    assert field in refused(sweep) or "results.json has" in refused(sweep)


def test_a_score_that_is_not_that_of_the_predictions_is_refused(sweep):
    change(sweep / "cpc-100/probe/results.json", "macro_auroc", 0.9)
    said = refused(sweep)
    assert "the field macro_auroc is 0.9000, but the predictions beside it score 0.7" in said


def edited(name, edit):
    def write(path):
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {name: edit(arrays[name])})

    return write


def without(name):
    def write(path):
        np.savez(path, **{other: array for other, array in np.load(path).items() if other != name})

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edited("probabilities", lambda array: np.where(array > 1, np.nan, array)), "values that are not finite"),
        (edited("probabilities", lambda array: array[:-1]), r"array probabilities is \[399, 2\]"),
        (edited("probabilities", lambda array: array[:, :1]), r"array probabilities is \[400, 1\]"),
        (edited("probabilities", lambda array: array.astype(str)), "array probabilities holds no numbers"),
        (edited("probabilities", lambda array: array.astype(object)), "holds no arrays of numbers and text"),
        (edited("targets", lambda array: array + 2), "no labels of macro_auroc"),
        (edited("targets", lambda array: array[:, 0]), r"array targets is \[400\]"),
        (edited("classes", lambda array: array[:1]), r"array targets is \[400, 2\]"),
        (edited("record_id", lambda array: np.arange(len(array))), "array record_id holds no text"),
        (edited("patient_id", lambda array: array[:7]), r"array patient_id is \[7\]"),
        (without("targets"), "it lacks the array targets"),
        (lambda path: path.write_text("text"), "holds no arrays of numbers and text"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "holds no arrays of numbers and text"),
        (lambda path: np.save(path.open("wb"), np.ones(3)), "holds no arrays of numbers and text"),
        (lambda path: path.unlink(), "No such file"),
    ],
)  # fmt: skip
def test_predictions_that_cannot_be_are_refused(sweep, damage, words):
    path = sweep / "cpc-100/probe/predictions.npz"
    damage(path)
    (probe,) = find_runs([sweep])[0].probes
    with pytest.raises(UserError, match=words) as error:
        [probe.predictions(*names) for names in (("record_id", "patient_id", "targets", "classes"), ())]
    assert str(path) in str(error.value)
    assert "allow_pickle" not in str(error.value)


def test_labels_that_are_missing_are_no_damage(sweep):
    edited("targets", lambda array: np.where(np.arange(len(array))[:, None] == 3, np.nan, array))(
        sweep / "cpc-100/probe/predictions.npz"
    )
    (probe,) = find_runs([sweep])[0].probes
    assert np.isnan(probe.predictions("targets")["targets"]).sum() == 2


@pytest.mark.parametrize("method", ["is_file", "is_dir", "exists", "iterdir"])
def test_a_folder_that_cannot_be_read_is_named(sweep, monkeypatch, method):
    keep(sweep / "cpc-100/run", 25)
    real = getattr(Path, method)

    def denied(path, *arguments, **options):
        if (sweep / "cpc-100/run") in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, method, denied)
    with pytest.raises(UserError, match=f"annot read .*{sweep / 'cpc-100/run'}.*: Permission denied"):
        find_runs([sweep])
    if method in ("iterdir", "exists"):
        with pytest.raises(UserError, match=r"cannot read .*checkpoints.*: Permission denied"):
            finished_steps(sweep / "cpc-100/run")
