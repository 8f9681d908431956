import json

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation import metrics
from ecg_jax.studies.scaling_points import error_curves, families, usable
from ecg_jax.studies.study_runs import find_runs
from study_folder import config_of, write_probe, write_sweep


def entries(sizes=(100, 200), objectives=("cpc",), errors=(("ptbxl_super", 0.2),), **more):
    return [
        {"name": f"{objective}-{n}", "recordings": n, "loss": 2 * n**-0.1, "objective": objective,
         "errors": dict(errors), **more}
        for objective in objectives for n in sizes
    ]  # fmt: skip


def read(folder):
    return families(usable(find_runs([folder]))[0])


def curves_of(folder, **options):
    """(curves, notes)."""
    notes = []
    settings = {"tasks": (), "modes": (), "resamples": 100} | options
    return error_curves(read(folder), **settings, note=notes.append), notes


def further(sweep, name, place, task="ptbxl_super", error=0.2, **more):
    """Another probe of a run, of its last step."""
    run = sweep / name / "run"
    step = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    write_probe(sweep / name / place, run, config_of(), step, error, task=task, **more)


def change(path, edit):
    """Edits a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def told(notes, *words):
    return [note for note in notes if all(word in note for word in words)]


def test_what_was_probed_twice_counts_once(tmp_path):
    sweep = write_sweep(tmp_path / "s", entries())
    for task in ("ptbxl_super", "ptbxl_sub"):
        further(sweep, "cpc-200", f"probes/all/{task}", task)
    curves, notes = curves_of(sweep)
    assert {curve.task: [run.name for run in curve.runs] for curve in curves} == {
        "ptbxl_super": ["cpc-100", "cpc-200"], "ptbxl_sub": ["cpc-200"], "mean": ["cpc-200"],
    }  # fmt: skip
    (super_, _, mean) = curves
    assert mean.tasks == ("ptbxl_super", "ptbxl_sub")
    assert [source.endswith("/probe") for source in super_.sources] == [True, True], "the main one"
    assert told(notes, "probes/all/ptbxl_super is left out", "the same probe as", "cpc-200/probe")
    assert told(notes, "cpc-100 is left out of the mean over tasks", "no ptbxl_sub")


def test_several_ways_to_probe_part_curves_for_all_runs_alike(tmp_path):
    sweep = write_sweep(tmp_path / "s", entries(errors=[("ptbxl_super", 0.2), ("ptbxl_sub", 0.3)]))
    further(sweep, "cpc-200", "probes/layers", linear__layers="all")
    curves, notes = curves_of(sweep)
    found = {curve.task: len(curve.runs) for curve in curves}
    assert found == {"ptbxl_super (probe)": 2, "ptbxl_sub": 2, "ptbxl_super (layers)": 1, "mean": 2}
    assert curves[-1].tasks == ("ptbxl_super (probe)", "ptbxl_sub"), "each task once"
    assert told(notes, "takes each task once, without ptbxl_super (layers)")


@pytest.mark.parametrize("objectives", [("cpc",), ("cpc", "jepa")])
def test_probes_that_were_not_made_alike_are_refused(tmp_path, objectives):
    """Within a curve and between curves, which stand in one picture."""
    sizes = (100, 200) if len(objectives) == 1 else (100,)
    sweep = write_sweep(tmp_path / "s", entries(sizes, objectives, [(("ptbxl_super", "finetune"), 0.2)]))
    results = sweep / ("cpc-200" if len(objectives) == 1 else "jepa-100") / "probe/results.json"
    before = results.read_text()

    def refused(edit):
        results.write_text(before)
        change(results, edit)
        with pytest.raises(UserError) as error:
            curves_of(sweep)
        would = "points of one curve" if len(objectives) == 1 else "be compared"
        assert would in str(error.value)
        return str(error.value)

    assert "finetune.epochs (100 and 20)" in refused(lambda r: r["config"]["finetune"].update(epochs=20))
    assert "differ in store;" in refused(lambda r: r["store"].update(fingerprint="8" * 64))
    results.write_text(before)

    # What a probe of this mode does not read, its seed, and a field from before it was declared are no difference.
    def same(r):
        r["config"]["frozen"]["epochs"] = 3
        r["config"]["seed"] = 7
        del r["config"]["finetune"]["layer_decay"]

    change(results, same)
    assert len(curves_of(sweep)[0]) == len(objectives)


def test_means_are_over_the_tasks_that_all_have(tmp_path):
    both = [("ptbxl_super", 0.3), ("ptbxl_sub", 0.3)]
    runs = entries(errors=both) + entries(objectives=["jepa"], errors=[*both, ("ptbxl_form", 0.02)])
    sweep = write_sweep(tmp_path / "s", runs)
    curves, notes = curves_of(sweep)
    cpc, jepa = (curve for curve in curves if curve.task == "mean")
    assert cpc.tasks == jepa.tasks == ("ptbxl_super", "ptbxl_sub")
    assert jepa.values == pytest.approx(cpc.values), "and not lower for an easy task that the other has not"
    assert told(notes, "the mean over tasks, linear, macro_auroc, is without ptbxl_form")

    for results in (tmp_path / "s").glob("*/probe*/**/results.json"):
        if json.loads(results.read_text())["task"] != "ptbxl_sub":
            change(results, lambda content: content["store"].update(corpus="ptbxl"))
    curves, notes = curves_of(sweep)
    assert {curve.task: curve.synthetic for curve in curves} == {
        "ptbxl_super": False, "ptbxl_sub": True, "ptbxl_form": False,
    }  # fmt: skip
    assert "mean" not in {curve.task for curve in curves}
    assert told(notes, "without the synthetic ones of ptbxl_sub")
    assert told(notes, "there is no mean over tasks, linear, macro_auroc: fewer than two are left")


def test_a_patient_of_two_tasks_is_one_person(tmp_path):
    runs = entries(errors=[("ptbxl_super", 0.2), ("ptbxl_sub", 0.2)])
    sweep = write_sweep(tmp_path / "s", runs)
    # The second task is of the same recordings but for those of five patients.
    kept = np.delete(np.arange(400), np.arange(10))
    for name in ("cpc-100", "cpc-200"):
        path = sweep / name / "probes/ptbxl_sub-linear/predictions.npz"
        arrays = {key: value[kept] if len(value) == 400 else value for key, value in np.load(path).items()}
        np.savez(path, **arrays)
        value = float(metrics.auroc(arrays["targets"], arrays["probabilities"]).mean())
        change(
            path.with_name("results.json"), lambda r, value=value: r.update(n_records=390, macro_auroc=value)
        )
    super_, sub, mean = (curve.resampled[0] for curve in curves_of(sweep, resamples=400)[0])
    assert np.corrcoef(super_, sub)[0, 1] > 0.95
    # As by patients that are drawn for both tasks at a time.
    generator = np.random.default_rng(3)
    counts = np.stack(
        [np.bincount(generator.integers(0, 200, 200), minlength=200) for _ in range(400)], axis=1
    )
    drawn = []
    for place in ("probe", "probes/ptbxl_sub-linear"):
        with np.load(sweep / "cpc-100" / place / "predictions.npz") as arrays:
            times = counts[[int(patient[1:]) for patient in arrays["patient_id"]]]
            aurocs = metrics.resampled_auroc(arrays["targets"], arrays["probabilities"], times)
            drawn.append(1 - aurocs.mean(axis=1))
    assert mean.std() == pytest.approx(np.mean(drawn, axis=0).std(), rel=0.15)


def test_stores_are_drawn_apart(tmp_path):
    """Draws of one store say nothing of those of another, also where both have as many patients."""
    sweep = write_sweep(tmp_path / "s", entries())
    for name in ("cpc-100", "cpc-200"):
        further(sweep, name, "probes/other", "ptbxl_sub", store="8" * 64)
    first, second, _ = (curve.resampled[0] for curve in curves_of(sweep, resamples=400)[0])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_an_ablation_at_sizes_of_its_own_is_no_one_curve(tmp_path):
    runs = entries((100, 300, 900), model__width=16) + [
        entry | {"name": f"wide-{entry['recordings']}"}
        for entry in entries((170, 500, 1500), model__width=32)
    ]
    assert [(family.label, len(family.runs)) for family in read(write_sweep(tmp_path / "s", runs))] == [
        ("cpc s4, width=16", 3), ("cpc s4, width=32", 3),
    ]  # fmt: skip
    # Once is enough to move on with the size: it is named.
    runs = entries((100, 300), model__width=16) + entries((500, 1500), model__width=32)
    (family,) = read(write_sweep(tmp_path / "t", runs))
    assert family.moving == ("model.width",)


def test_a_run_from_before_a_field_had_its_default(tmp_path):
    sweep = write_sweep(tmp_path / "s", entries((100, 200, 400)))
    for name in ("cpc-100", "cpc-400"):
        change(sweep / name / "run/config.json", lambda config: config["data"].pop("leads"))
    (family,) = read(sweep)
    assert (len(family.runs), family.moving) == (3, ())
    change(sweep / "cpc-100/run/config.json", lambda config: config["data"].update(leads="I"))
    with pytest.raises(UserError, match=r"data\.leads \(I and \)"):
        read(sweep)


def test_runs_that_begin_with_other_checkpoints_are_of_other_curves(tmp_path):
    runs = [
        entry | {"name": f"{base}-{seed}-{entry['recordings']}", "seed": seed,
                 "init__checkpoint": f"runs/{base}-{seed}"}
        for base in "ab" for seed in (0, 1) for entry in entries()
    ]  # fmt: skip
    sweep = write_sweep(tmp_path / "s", runs)
    for entry in runs:
        name = entry["name"]
        origin = {
            "run": f"/runs/{name[:3]}", "step": 50, "store": f"/stores/{name[0]}", "store_fingerprint": name[0] * 64,
            "selection_fingerprint": name[0] * 8, "window_samples": 600, "data": {}, "origin": None,
        }  # fmt: skip
        change(sweep / name / "run/config.json", lambda config, origin=origin: config.update(origin=origin))
    assert [(family.label, len(family.runs)) for family in read(sweep)] == [
        ("cpc s4, checkpoint=a at step 50", 4), ("cpc s4, checkpoint=b at step 50", 4),
    ]  # fmt: skip


def test_what_is_not_known_of_a_run_is_told(tmp_path):
    sweep = write_sweep(tmp_path / "s", entries())
    change(sweep / "cpc-100/run/made_with.json", lambda content: content["starts"][0].update(seconds=None))
    assert told(curves_of(sweep)[1], "cpc-100", "device-hours are not known", "1 of 1 attempts were killed")
