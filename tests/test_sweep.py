"""Sweeps: a small one through the command line, its refusals, and intervals over patients and seeds."""

import csv
import fcntl
import json
import re
import shutil

import numpy as np
import pytest
from pyarrow import parquet

from ecg_jax import cli, sweep_run, sweep_table
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.pretrain import pretrain
from ecg_jax.studies import comparison, comparison_tables
from ecg_jax.studies.comparison import FinishedRun, hierarchical_interval, seed_deviations
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_table import collect
from ecg_jax.training.metric_writers import read_log, read_warnings

TINY = """
NOTE = "A check on {recordings} recordings and no ranking."
SMALL = {
    "model.width": 16, "model.layers": 1, "batch_size": 16, "steps": 4, "log_every": 2, "checkpoint_every": 2,
    "data.max_val_crops": 16,
}
PROBE = "configs/probe.py:mode=linear,task=ptbxl_super"

def run(group, seed, config, targets=None, **fields):
    overrides = {"seed": seed, **SMALL, **fields}
    return {"name": f"{group}-{seed}", "group": group, "config": config, "overrides": overrides, "probe": PROBE,
            "targets": targets}

def sweep():
    for seed in (0, 1):
        yield run("cpc", seed, "configs/cpc.py")
    for seed in (0, 1):
        yield run("data2vec", seed, "configs/data2vec.py", **{"objective.top_k": 1})
"""
OFFLINE = """    yield run("offline", 0, "configs/hubert.py:variant=offline", {"features": "spectrum", "codes": 8},
              **{"objective.codes": 8})
"""
NAMES = ["cpc-0", "cpc-1", "data2vec-0", "data2vec-1", "offline-0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A sweep file, its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("sweep")
    path, output = folder / "tiny.py", folder / "out"
    path.write_text(TINY + OFFLINE)
    assert cli.main(["sweep", str(path), f"--output={output}"]) == 0
    return path, output


def _snapshot(output):
    """Contents of what finished runs leave."""
    return {
        path: path.read_bytes()
        for name in NAMES
        for path in (output / name / "run" / "log.jsonl", output / name / "probe" / "results.json")
    }


def test_every_run_is_pretrained_and_probed(tiny, capsys):
    path, output = tiny
    for name in NAMES:
        assert (output / name / "run" / "checkpoints" / "4").is_dir()
        assert (output / name / "probe" / "results.json").exists()
    assert (output / "results.png").stat().st_size > 10_000
    assert cli.main(["sweep", str(path), f"--output={output}", "--list", "--only=cpc,offline-0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cpc-0", "cpc-1", "offline-0"]
    assert all(re.search(r"finished +configs/\w+\.py\S* seed=[01] model.width=16 ", line) for line in lines)


def test_table_holds_what_the_probes_wrote(tiny):
    _, output = tiny
    results = json.loads((output / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == NAMES
    assert results["missing"] == []
    with (output / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file) if row["kind"] == "run"}
    markdown = (output / "results.md").read_text()
    for run in results["runs"]:
        probed = json.loads((output / run["name"] / "probe" / "results.json").read_text())
        for name in ("macro_auroc", "ci_low", "ci_high"):
            assert run[name] == probed[name] == float(rows[run["name"]][name])
            assert run["random_init"][name] == probed["baselines"]["random_init"][name]
        last = read_log(output / run["name"] / "run")[-1]
        assert (run["step"], run["loss"], run["val_loss"]) == (4, last["loss"], last["val_loss"])
        assert run["rankme"] == last["rankme"]
        assert run["seconds"] > 0
        assert len(run["warnings"]) == len(read_warnings(output / run["name"] / "run"))
        assert probed["seed"] == run["seed"] == probed["pretraining_config"]["seed"]
        interval = "{macro_auroc:.3f} ({ci_low:.3f} to {ci_high:.3f})".format(**probed)
        assert f"| {run['name']} " in markdown
        assert interval in markdown
    for group in results["groups"]:
        seeds = [run["macro_auroc"] for run in results["runs"] if run["group"] == group["group"]]
        assert group["each_seed"] == seeds
        assert group["macro_auroc"] == pytest.approx(np.mean(seeds), abs=1e-12)
        assert group["ci_low"] < group["macro_auroc"] < group["ci_high"]
        loss = [run["loss"] for run in results["runs"] if run["group"] == group["group"]]
        assert group["loss"] == pytest.approx(np.mean(loss))


def test_collected_table_holds_settings_and_results(tiny):
    path, output = tiny
    loaded = load_sweep(str(path))
    table = collect(loaded, output)
    assert parquet.read_table(output / "results_table.parquet").equals(table)
    rows = {row["name"]: row for row in table.to_pylist()}
    assert list(rows) == NAMES
    for run in loaded.runs:
        row, folder = rows[run.name], output / run.name
        probed = json.loads((folder / "probe" / "results.json").read_text())
        assert (row["state"], row["error"], row["step"], row["seed"]) == (
            "finished",
            None,
            4,
            run.config.seed,
        )
        for name in (
            "macro_auroc",
            "ci_low",
            "ci_high",
            "task",
            "n_records",
            "n_patients",
            "encoder_parameters",
        ):
            assert row[name] == probed[name]
        for name in ("random_init", "ecg_features", "majority"):
            assert row[name] == probed["baselines"][name]["macro_auroc"]
            assert row[f"{name}_ci_low"] == probed["baselines"][name]["ci_low"]
        assert row["difference_to_random_init"] == probed["difference_to_random_init"]["macro_auroc"]
        log = read_log(folder / "run")
        for name in ("loss", "val_loss"):
            values = [entry[name] for entry in log if name in entry]
            assert (row[name], row[f"best_{name}"]) == (values[-1], min(values))
        assert row["config.objective.name"] == run.config.objective.name
        assert row["parameters"] > row["encoder_parameters"]
        assert row["recordings"] == 304
        assert row["store_fingerprint"] == row["probe_store_fingerprint"] == probed["store"]["fingerprint"]
        assert row["version_jax"] == probed["versions"]["jax"]
        assert (row["attempts"], row["windows_per_s"] > 0, row["seconds"] > 0) == (1, True, True)
    # Fields have their own types, and only those that differ have a column; of other objectives they are null.
    types = {field.name: str(field.type) for field in table.schema}
    assert types["config.objective.codes"] == "int64"
    assert types["config.model.bidirectional"] == "bool"
    assert rows["cpc-0"]["config.objective.codes"] is None
    assert rows["offline-0"]["config.objective.codes"] == 8
    assert "config.model.width" not in types
    with (output / "results_table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["macro_auroc"]) for row in written] == [row["macro_auroc"] for row in rows.values()]
    documented = sweep_table.__doc__
    for name in types:
        known = name.startswith(("config.", "version_")) or name.removesuffix("_ci_low").removesuffix(
            "_ci_high"
        )
        assert known is True or known in documented


def test_baselines_stand_in_the_table(tiny):
    """A causal and a bidirectional encoder have different random twins, two bidirectional ones the same."""
    _, output = tiny
    results = json.loads((output / "results.json").read_text())
    assert [(b["baseline"], b["groups"]) for b in results["baselines"]] == [
        (comparison.RANDOM_INIT, ["cpc"]),
        (comparison.RANDOM_INIT, ["data2vec", "offline"]),
        (comparison.MAJORITY, ["cpc", "data2vec", "offline"]),
    ]
    assert results["baselines"][-1]["macro_auroc"] == 0.5

    def twins(groups):
        """Every random encoder of the groups' runs, by its seed."""
        names = [run["name"] for run in results["runs"] if run["group"] in groups]
        probes = [json.loads((output / name / "probe" / "results.json").read_text()) for name in names]
        found = [twin for probed in probes for twin in probed["baselines"]["random_init"]["seeds"]]
        by_seed = {twin["seed"]: twin["macro_auroc"] for twin in found}
        assert all(by_seed[twin["seed"]] == pytest.approx(twin["macro_auroc"]) for twin in found)
        return list(by_seed.values())

    assert results["baselines"][0]["each_seed"] == pytest.approx(twins(["cpc"]))
    assert results["baselines"][1]["each_seed"] == pytest.approx(twins(["data2vec", "offline"]))
    markdown = (output / "results.md").read_text()
    assert "random initialisation (data2vec, offline)" in markdown
    assert "A check on 304 recordings and no ranking." in markdown
    assert "A single seed, so the interval is over patients only: offline." in markdown


def test_again_does_nothing(tiny, capsys):
    path, output = tiny
    before, results = _snapshot(output), (output / "results.json").read_bytes()
    assert cli.main(["sweep", str(path), f"--output={output}"]) == 0
    assert "5 of 5 runs are finished already" in capsys.readouterr().out
    assert _snapshot(output) == before
    assert (output / "results.json").read_bytes() == results


def test_interrupted_sweep_goes_on_exactly(tiny, tmp_path, monkeypatch):
    """The first run is cut off in the middle of pretraining, the second one before its probe."""
    path, whole = tiny
    args = ["sweep", str(path), f"--output={tmp_path / 'out'}", f"--store={whole / 'store'}", "--only=cpc"]
    probe = sweep_run.probe

    def cut_short(config, workdir):
        config.steps = 2
        pretrain(config, workdir)
        raise KeyboardInterrupt

    def no_probe(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "pretrain", cut_short)
    assert cli.main(args) == 130
    monkeypatch.setattr(sweep_run, "pretrain", pretrain)
    monkeypatch.setattr(
        sweep_run, "probe", lambda *args: probe(*args) if "cpc-0" in str(args[1]) else no_probe()
    )
    assert cli.main(args) == 130
    first = tmp_path / "out" / "cpc-0" / "probe" / "results.json"
    log = tmp_path / "out" / "cpc-1" / "run" / "log.jsonl"
    before = first.read_bytes(), log.read_bytes()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["missing"] == NAMES[1:]

    monkeypatch.setattr(sweep_run, "probe", probe)
    assert cli.main(args) == 0
    assert (first.read_bytes(), log.read_bytes()) == before
    ours, theirs = (json.loads((f / "results.json").read_text())["runs"] for f in (tmp_path / "out", whole))
    assert [run["name"] for run in ours] == NAMES[:2]
    for one, other in zip(ours, theirs, strict=False):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_failing_run_does_not_stop_the_others(tiny, tmp_path, capsys, monkeypatch):
    _, whole = tiny
    path, output = tmp_path / "some_fail.py", tmp_path / "out"
    path.write_text(
        TINY
        + '    yield run("long", 0, "configs/cpc.py", **{"data.window_s": 60.0})\n'
        + '    yield run("broken", 0, "configs/cpc.py", **{"model.width": 32})\n'
    )

    def fails_for_broken(config, workdir):
        if config.model.width == 32:
            raise RuntimeError("out of something\nsecond line")
        return pretrain(config, workdir)

    monkeypatch.setattr(sweep_run, "pretrain", fails_for_broken)
    args = [
        "sweep",
        str(path),
        f"--output={output}",
        f"--store={whole / 'store'}",
        "--only=long,broken,cpc-1",
    ]
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "long-0 failed: The store" in err
    assert "broken-0 failed: RuntimeError: out of something (all of it in" in err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 2 runs failed, see above: long-0, broken-0"
    assert "second line" in (output / "broken-0" / "error.txt").read_text()
    results = json.loads((output / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["cpc-1"]
    assert cli.main([*args[:2], f"--output={output}", "--collect"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"long-0 +long +failed ", printed)
    assert "last errors:\nlong-0: The store" in printed
    assert "broken-0: RuntimeError: out of something (all of it in" in printed
    rows = {row["name"]: row for row in collect(load_sweep(str(path)), output).to_pylist()}
    assert [rows[name]["state"] for name in ("cpc-0", "cpc-1", "long-0", "broken-0")] == [
        "not begun",
        "finished",
        "failed",
        "failed",
    ]
    assert rows["broken-0"]["error"].startswith("RuntimeError: out of something (all of it in")
    assert rows["cpc-0"]["macro_auroc"] is rows["cpc-0"]["step"] is None
    assert rows["cpc-1"]["macro_auroc"] == results["runs"][0]["macro_auroc"]
    assert (rows["broken-0"]["config.model.width"], rows["cpc-0"]["config.model.width"]) == (32, 16)


def test_folder_of_another_sweep_is_refused(tiny, tmp_path, synthetic_store, capsys):
    path, output = tiny
    changed = tmp_path / "changed.py"
    for text, message in (
        ((TINY + OFFLINE).replace('"steps": 4', '"steps": 5'), "its run cpc-0 differs in config.steps"),
        (TINY, f"it has the runs offline-0, which {changed} has not"),
    ):
        changed.write_text(text)
        assert cli.main(["sweep", str(changed), f"--output={output}"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]) == 2
    assert "its run cpc-0 used" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert cli.main(["sweep", str(path), f"--output={tmp_path / 'full'}"]) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def sweep():", "def sweeps():"), "defines no sweep()"),
        (("def sweep():", "def sweep(:"), "line 14 is not valid Python"),
        (("for seed in (0, 1):", "for seed in 3:"), "line 15: TypeError: 'int' object is not iterable"),
        (("    yield run", "    return run"), "sweep() must yield dicts"),
        (('yield run("cpc"', 'yield "cpc"; run("cpc"'), "entry 1 is a str"),
        (('"probe": PROBE', '"targets": None'), "entry 1 lacks probe"),
        (('"group": group, ', '"group": group, "extra": 1, '), "entry 1 has the unknown extra"),
        (('{"name": f"{group}-{seed}"', '{"name": group'), "run 'cpc' is there twice"),
        (('{"name": f"{group}-{seed}"', '{"name": f"../{group}-{seed}"'), "cannot name a folder"),
        (('"model.width"', '"model.widht"'), "run 'cpc-0': --config.model.widht: model has no field 'widht'"),
        (('"model.width": 16', '"model.width": -1'), "run 'cpc-0': config.model.width=-1 must be positive"),
        (("configs/cpc.py", "configs/cpx.py"), "run 'cpc-0': --config=configs/cpx.py: there is no file"),
        (("configs/cpc.py", "configs/probe.py"), "is no config for `ecg-jax pretrain`"),
        (("configs/probe.py:", "configs/cpc.py:#"), "'#mode' is unknown"),
        (("task=ptbxl_super", "task=ptbxl_supper"), "did you mean 'ptbxl_super'"),
        (("mode=linear", "mode=finetune"), "takes mode=linear or mode=frozen"),
        (('"seed": seed, ', ""), "'cpc-0' and 'cpc-1' of group 'cpc' have the same seed"),
        (('"configs/cpc.py")', '"configs/cpc.py", batch_size=16 + 8 * seed)'), "differ in batch_size"),
        (('"configs/cpc.py")', '"configs/cpc.py", {"codes": 8})'), "must be None or a dict"),
        (
            ('"configs/cpc.py")', '"configs/cpc.py", {"features": "spectrum", "codes": 8})'),
            "only the objective hubert reads targets",
        ),
        (('"objective.codes": 8', '"objective.codes": 9'), "targets have 8 codes and objective.codes is 9"),
        (('"configs/cpc.py")', '"configs/cpc.py", store="here")'), "give it as --store"),
    ],
)
def test_bad_sweep_file_is_refused(tmp_path, capsys, change, message):
    path = tmp_path / "mine.py"
    text = (TINY + OFFLINE).replace(*change)
    path.write_text(text)
    assert cli.main(["sweep", str(path), "--list"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_unknown_names_are_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(TINY)
    assert cli.main(["sweep", str(path), "--list", "--only=data2vek"]) == 2
    assert "did you mean 'data2vec" in capsys.readouterr().err
    assert cli.main(["sweep", str(path), "--list", "--only=,"]) == 2
    assert "--only names no run" in capsys.readouterr().err
    assert cli.main(["sweep", "nothing.py", "--list"]) == 2
    assert "there is no file nothing.py" in capsys.readouterr().err
    assert cli.main(["sweep", str(path)]) == 2
    assert "--output=DIR" in capsys.readouterr().err


def test_table_names_damage(tiny, tmp_path):
    path, output = tiny
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    (copy / "cpc-0" / "probe" / "results.json").write_text("{")
    (copy / "cpc-1" / "status.json").write_text("[]")
    (copy / "data2vec-0" / "run" / "config.json").write_text("")
    table = collect(load_sweep(str(path)), copy).to_pylist()
    assert [row["state"] for row in table] == ["damaged"] * 3 + ["finished"] * 2
    for row, file in zip(
        table, ("cpc-0/probe is damaged", "status.json is damaged", "run is damaged"), strict=False
    ):
        assert file in row["error"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda probe: (probe / "results.json").write_text("{"),
        lambda probe: (probe / "results.json").write_text("[]"),
        lambda probe: (probe / "predictions.npz").write_bytes(b"PK"),
        lambda probe: (probe / "predictions.npz").write_bytes(b""),
    ],
)
def test_damaged_probe_is_named(tiny, tmp_path, capsys, damage):
    path, output = tiny
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    damage(copy / "cpc-0" / "probe")
    assert cli.main(["sweep", str(path), f"--output={copy}"]) == 2
    err = capsys.readouterr().err
    assert "cpc-0/probe is damaged" in err
    assert err.count("\n") == 1


def test_run_that_another_process_works_on_is_refused_by_name(tiny, tmp_path, capsys):
    path, whole = tiny
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "cpc-1" / "probe" / "results.json").unlink()
    with (output / "cpc-1" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["sweep", str(path), f"--output={output}"]) == 2
        err = capsys.readouterr().err
        assert "the run cpc-1 is being worked on by process" in err
        assert err.splitlines()[-1].endswith("other processes are working on cpc-1; wait for them")
        assert cli.main(["sweep", str(path), f"--output={output}", "--list", "--only=cpc-1"]) == 0
        assert "running at step 4" in capsys.readouterr().out


def test_run_whose_folder_cannot_be_made_fails_alone(tiny, tmp_path, capsys):
    path, output = tiny
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "cpc-0")
    (copy / "cpc-0").write_text("a file")
    assert cli.main(["sweep", str(path), f"--output={copy}"]) == 2
    err = capsys.readouterr().err
    assert "cpc-0 failed: " in err
    assert json.loads((copy / "results.json").read_text())["missing"] == ["cpc-0"]


def test_folder_with_other_files_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "my_store_notes.txt").write_text("mine")
    assert cli.main(["sweep", str(tiny[0]), f"--output={tmp_path}"]) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["my_store_notes.txt"]


def test_shipped_sweep_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_sweep("configs/sweeps/objectives_quick.py")
    objectives = {run.config.objective.name for run in loaded.runs}
    assert objectives == {"cpc", "jepa", "data2vec", "dinosr", "hubertpp", "hubert"}
    assert len(loaded.runs) == 18
    assert "no ranking of objectives" in loaded.note
    for run in loaded.runs:
        if "teacher" in run.config.objective:
            assert 1 / (1 - run.config.objective.teacher.momentum) < run.config.steps


# Intervals on planted scores.

N_PATIENTS, PER_PATIENT = 40, 2


def planted(group: str, noises: list[float], twin_noise: float | None = 3.0) -> list[FinishedRun]:
    """Runs of one group, a seed for each noise; a twin noise of None makes the twin the run itself."""
    n = N_PATIENTS * PER_PATIENT
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (n, 2)).astype(float)
    error, twin_error = rng.normal(size=(2, n, 2))
    runs = []
    for seed, noise in enumerate(noises):
        scores = targets + noise * error
        twin = scores if twin_noise is None else targets + twin_noise * twin_error
        values = {"macro_auroc": metrics.macro_auroc(targets, scores), "ci_low": 0.0, "ci_high": 1.0}
        results = {
            **values,
            "seed": seed,
            "task": "planted",
            "n_patients": N_PATIENTS,
            "pretraining_config": {"seed": seed, "model": {"width": 1}},
            "preprocessing": {},
            "baselines": {"random_init": values, "majority": values},
            "difference_to_random_init": values,
            "bootstrap": {"resamples": 400, "level": 0.95, "undefined": "exclude", "unit": "patient"},
        }
        predictions = {
            "record_id": np.arange(n).astype(str),
            "patient_id": np.repeat(np.arange(N_PATIENTS), PER_PATIENT).astype(str),
            "targets": targets,
            "probabilities": scores,
            "probabilities_random_init_seeds": twin[None],
            "classes": np.array(["a", "b"]),
        }
        runs.append(FinishedRun(f"{group}-{seed}", group, results, predictions, [], [], None))
    return runs


def width(entry):
    return entry["ci_high"] - entry["ci_low"]


def test_interval_holds_its_point_and_widens_when_seeds_disagree():
    agree = comparison.compare(planted("agree", [1.0, 1.0, 1.0]))["groups"][0]
    disagree = comparison.compare(planted("disagree", [0.2, 1.0, 4.0]))["groups"][0]
    for group in (agree, disagree):
        assert group["ci_low"] < group["macro_auroc"] < group["ci_high"]
    assert width(disagree) > 1.5 * width(agree)


def test_seeds_that_agree_leave_the_interval_over_patients():
    """Three times the same scores are known no better and no worse than once."""
    runs = planted("group", [1.0, 1.0, 1.0])
    group = comparison.compare(runs)["groups"][0]
    codes, _ = bootstrap.units(runs[0].predictions["patient_id"].tolist(), N_PATIENTS * PER_PATIENT)
    counts = bootstrap.draw(codes, 400, seed=0)
    model = bootstrap.bootstrap_auroc(
        runs[0].predictions["targets"], runs[0].predictions["probabilities"], counts
    )
    expected = model.macro()
    assert (group["macro_auroc"], group["ci_low"], group["ci_high"]) == pytest.approx(tuple(expected))


def test_difference_is_paired():
    """A run that is its own twin differs by exactly nothing, however uncertain both are."""
    group = comparison.compare(planted("group", [0.5, 1.0, 4.0], twin_noise=None))["groups"][0]
    assert group["difference_to_random_init"] == {"macro_auroc": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    better = comparison.compare(planted("group", [0.2, 0.3, 0.2], twin_noise=9.0))["groups"][0]
    assert better["difference_to_random_init"]["ci_low"] > 0


def test_interval_carries_patients_and_seeds():
    """Without patients, Student's t; with a wide spread of patients and a narrow one of seeds, that of the patients."""
    rng = np.random.default_rng(1)
    points, R = np.array([0.70, 0.74, 0.78]), 40_000
    value = hierarchical_interval(points, np.tile(points[:, None], R), seed_deviations(points, R, rng))
    error = points.std(ddof=1) / 3**0.5
    assert value.point == pytest.approx(points.mean())
    assert (value.high - value.low) / 2 == pytest.approx(4.303 * error, rel=0.05)  # t of 2 degrees at 97.5 %
    close = np.array([0.7399, 0.74, 0.7401])
    resampled = close[:, None] + 0.03 * rng.normal(size=R)
    value = hierarchical_interval(close, resampled, seed_deviations(close, R, rng))
    assert (value.high - value.low) / 2 == pytest.approx(1.96 * 0.03, rel=0.05)
    assert (seed_deviations([0.7], 5, rng) == 0).all()


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("patients", [0.0, 1.0])
def test_interval_over_few_seeds_covers_what_it_says(seeds, patients):
    """Normal seeds of spread 1 and a patient error of known size, 2000 times: without patients 95 % of the intervals
    hold 0, with them no fewer (two seeds and patients together are covered more often).
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        shift = patients * rng.normal()
        points = rng.normal(size=seeds) + shift
        resampled = points[:, None] + patients * rng.normal(size=400)
        value = hierarchical_interval(points, resampled, seed_deviations(points, 400, rng))
        held += value.low <= 0 <= value.high
    assert 0.935 < held / 2000 < (0.995 if patients else 0.965)


def test_runs_tested_on_other_records_are_refused():
    first, second = planted("group", [1.0, 1.0])
    other = second.predictions | {"record_id": second.predictions["record_id"][::-1]}
    with pytest.raises(UserError, match="group-0 and group-1 were probed on other test records"):
        comparison.compare([first, second._replace(predictions=other)])
    apart = second.predictions | {"record_id": np.char.add(second.predictions["record_id"], "b")}
    with pytest.raises(UserError, match="were probed on other test records"):
        comparison.compare([first, second._replace(predictions=apart)])


def shorter(run, kept):
    """The run as if it had been tested on some of its records, in another order, at another window."""
    rows = np.flatnonzero(kept)[::-1]
    tested = {name: values[rows] for name, values in run.predictions.items() if len(values) == len(kept)}
    tested["probabilities_random_init_seeds"] = run.predictions["probabilities_random_init_seeds"][:, rows]
    config = run.results["pretraining_config"] | {"data": {"window_s": 10.0}}
    return run._replace(
        group="long",
        name=f"long-{run.seed}",
        predictions=run.predictions | tested,
        results=run.results | {"pretraining_config": config},
    )


def test_runs_of_other_windows_are_compared_on_common_records():
    """Whatever a run says of records that others cannot be tested on must not count."""
    runs = planted("short", [1.0, 2.0])
    runs = [
        run._replace(
            results=run.results
            | {"pretraining_config": run.results["pretraining_config"] | {"data": {"window_s": 2.5}}}
        )
        for run in runs
    ]
    kept = np.arange(N_PATIENTS * PER_PATIENT) >= 10 * PER_PATIENT
    both = [*runs, *(shorter(run, kept) for run in runs)]
    found = comparison.compare(both)
    assert (found["n_records"], found["n_records_of_any"], found["n_patients"]) == (60, 80, 30)
    short, long = found["groups"]
    same = ("macro_auroc", "ci_low", "ci_high", "each_seed", "difference_to_random_init")
    assert {name: short[name] for name in same} == {name: long[name] for name in same}
    spoilt = [
        run._replace(
            predictions=run.predictions
            | {"probabilities": np.where(kept[:, None], run.predictions["probabilities"], 99.0)}
        )
        for run in runs
    ]
    assert comparison.compare([*spoilt, *both[2:]])["groups"] == found["groups"]
    assert [group["settings"] for group in found["groups"]] == [
        {"data.window_s": 2.5},
        {"data.window_s": 10.0},
    ]
    results = {"sweep": "s", "note": "", "missing": [], **found}
    markdown = comparison_tables.to_markdown(results)
    assert re.search(r"\| group +\| window_s \| seeds \|", markdown)
    assert "tested on up to 80 records" in markdown


def test_many_differing_settings_stand_below_the_table():
    runs = planted("group", [1.0]) + [
        run._replace(
            group="other",
            name="other-0",
            results=run.results
            | {"pretraining_config": {"seed": 0, "model": {"width": 2}, **dict.fromkeys("abcd", 1)}},
        )
        for run in planted("group", [1.0])
    ]
    first = runs[0].results["pretraining_config"]
    runs[0] = runs[0]._replace(
        results=runs[0].results | {"pretraining_config": first | dict.fromkeys("abcd", 0)}
    )
    results = {"sweep": "s", "note": "", "missing": [], **comparison.compare(runs)}
    assert "Groups differ in model.width, a, b, c, d; results_table.csv has" in comparison_tables.to_markdown(
        results
    )
    assert re.search(r"\| group +\| seeds \|", comparison_tables.to_markdown(results))
