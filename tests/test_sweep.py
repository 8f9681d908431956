"""Sweeps: a small one through the command line, and its refusals."""

import csv
import errno
import fcntl
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pyarrow import parquet

from ecg_jax import cli, sweep, sweep_folder, sweep_locks, sweep_run, sweep_table
from ecg_jax.data.selection import read_selection
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.studies import comparison
from ecg_jax.sweep_declaration import declare
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_folder import RunStatus, state_of
from ecg_jax.sweep_locks import Busy, held_for_tables, held_long
from ecg_jax.sweep_results import write_tables
from ecg_jax.sweep_stores import StoreChoice, check_stores
from ecg_jax.sweep_table import collect
from ecg_jax.training.metric_writers import read_log, read_warnings
from tiny_sweep import FAILS, status, trained, write_sweep

TINY = """
NOTE = "A check on {recordings} recordings and no ranking."
SMALL = {
    "model.width": 16, "model.state": 8, "model.layers": 1, "batch_size": 16, "steps": 4, "log_every": 2,
    "checkpoint_every": 2, "data.max_val_crops": 16,
}
PROBE = "PROBE_FILE:mode=linear,task=ptbxl_super"

def run(group, seed, config, targets=None, **fields):
    overrides = {"seed": seed, **SMALL, **fields}
    return {"name": f"{group}-{seed}", "group": group, "config": config, "overrides": overrides, "probe": PROBE,
            "targets": targets}

def sweep():
    for seed in (0, 1):
        yield run("cpc", seed, "configs/cpc.py")
"""
OFFLINE = """    yield run("offline", 0, "configs/hubert.py:variant=offline", {"features": "spectrum", "codes": 8},
              **{"objective.codes": 8})
"""
NAMES = ["cpc-0", "cpc-1", "offline-0"]
#: What the shipped probe spends its time on is the solves of the heads.
QUICK_PROBE = """
from ecg_jax.config_flags import load_config

def get_config(arg=""):
    config = load_config(f"configs/probe.py:{arg}")
    config.linear.l2_grid, config.linear.tolerance, config.linear.max_steps = (1.0, 0.1), 1e-3, 50
    config.baseline_seeds, config.bootstrap.resamples = 2, 200
    return config
"""


def write(path, text):
    """Writes a sweep file, and the probe of its runs beside it."""
    probe = path.with_name("quick_probe.py")
    probe.write_text(QUICK_PROBE)
    path.write_text(text.replace("PROBE_FILE", str(probe)))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A sweep file, its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("sweep")
    path, output = folder / "tiny.py", folder / "out"
    write(path, TINY + OFFLINE)
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
        selection = read_selection(folder / "run" / "selection.json")
        assert (row["train_recordings"], row["store_recordings"]) == (len(selection.train), 304)
        assert (row["train_recordings"] < 304, row["synthetic"]) == (True, False)
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
    """A causal and a bidirectional encoder have different random twins."""
    _, output = tiny
    results = json.loads((output / "results.json").read_text())
    assert [(b["baseline"], b["groups"]) for b in results["baselines"]] == [
        (comparison.RANDOM_INIT, ["cpc"]),
        (comparison.RANDOM_INIT, ["offline"]),
        (comparison.MAJORITY, ["cpc", "offline"]),
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
    assert results["baselines"][1]["each_seed"] == pytest.approx(twins(["offline"]))
    markdown = (output / "results.md").read_text()
    assert "random initialisation (offline)" in markdown
    n = len(read_selection(output / "cpc-0" / "run" / "selection.json").train)
    assert f"A check on {n} recordings and no ranking. Pretrained on {n} recordings of the sample" in markdown
    assert "A single seed, so the interval is over patients only: offline." in markdown


def test_moved_sweep_still_says_what_it_was_made_of(tiny, tmp_path, monkeypatch):
    path, output = tiny
    shutil.copytree(output, tmp_path / "moved")
    before = (tmp_path / "moved" / "results.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", str(path), "--output=./moved/", "--collect"]) == 0
    assert (tmp_path / "moved" / "results.md").read_text() == before


def test_again_does_nothing(tiny, capsys):
    path, output = tiny
    before, results = _snapshot(output), (output / "results.json").read_bytes()
    assert cli.main(["sweep", str(path), f"--output={output}"]) == 0
    assert "3 of 3 runs are finished already" in capsys.readouterr().out
    assert _snapshot(output) == before
    assert (output / "results.json").read_bytes() == results


def test_interrupted_sweep_goes_on_exactly(tiny, tmp_path, monkeypatch):
    """A run is cut off in the middle of pretraining, then before its probe; one that is finished stays as it is."""
    path, whole = tiny
    output = tmp_path / "out"
    shutil.copytree(whole / "cpc-0", output / "cpc-0")
    shutil.copy(whole / "sweep.json", output)
    args = ["sweep", str(path), f"--output={output}", f"--store={whole / 'store'}", "--only=cpc"]
    first, log = output / "cpc-0" / "probe" / "results.json", output / "cpc-1" / "run" / "log.jsonl"
    before = first.read_bytes()

    def cut_short(config, workdir):
        config.steps = 2
        pretrain(config, workdir)
        raise KeyboardInterrupt

    def no_probe(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "pretrain", cut_short)
        assert cli.main(args) == 130
    assert [entry["step"] for entry in read_log(output / "cpc-1" / "run")] == [2]
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "probe", no_probe)
        assert cli.main(args) == 130
    trained = log.read_bytes()
    assert json.loads((output / "results.json").read_text())["missing"] == NAMES[1:]

    assert cli.main(args) == 0
    assert (first.read_bytes(), log.read_bytes()) == (before, trained)
    ours, theirs = (json.loads((folder / "results.json").read_text())["runs"] for folder in (output, whole))
    assert [run["name"] for run in ours] == NAMES[:2]
    for one, other in zip(ours, theirs, strict=False):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_failing_run_does_not_stop_the_others(tmp_path, synthetic_store, capsys, monkeypatch):
    path = write_sweep(tmp_path, 'run("not-asked")', FAILS, 'run("broken", model__width=32)', 'run("whole")')
    output = tmp_path / "out"

    def fails_for_broken(config, workdir):
        if config.model.width == 32:
            raise RuntimeError("out of something\nsecond line")
        return pretrain(config, workdir) if config.data.window_s == 60.0 else trained(config, workdir)

    monkeypatch.setattr(sweep_run, "pretrain", fails_for_broken)
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    assert cli.main([*args, "--only=fails,broken,whole"]) == 2
    err = capsys.readouterr().err
    assert "fails failed: The store" in err
    assert "broken failed: RuntimeError: out of something (all of it in" in err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 2 runs failed, see above: fails, broken"
    assert "second line" in (output / "broken" / "error.txt").read_text()
    assert cli.main([*args, "--collect"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fails +fails +failed ", printed)
    assert "last errors:\nfails: The store" in printed
    assert "broken: RuntimeError: out of something (all of it in" in printed
    rows = {row["name"]: row for row in collect(load_sweep(str(path)), output).to_pylist()}
    assert [row["state"] for row in rows.values()] == ["not begun", "failed", "failed", "finished"]
    assert rows["broken"]["error"].startswith("RuntimeError: out of something (all of it in")
    assert rows["not-asked"]["loss"] is rows["not-asked"]["step"] is None
    assert rows["whole"]["error"] is None
    assert (rows["broken"]["config.model.width"], rows["whole"]["config.model.width"]) == (32, 16)


def test_folder_of_another_sweep_is_refused(tiny, tmp_path, synthetic_store, capsys):
    path, output = tiny
    changed = tmp_path / "changed.py"
    for text, message in (
        ((TINY + OFFLINE).replace('"steps": 4', '"steps": 5'), "its run cpc-0 differs in config.steps"),
        (TINY, f"it has the runs offline-0, which {changed} has not"),
    ):
        write(changed, text)
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
        (("PROBE_FILE:", "configs/cpc.py:#"), "'#mode' is unknown"),
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
    write(path, text)
    assert cli.main(["sweep", str(path), "--list"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_unknown_names_are_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    write(path, TINY)
    assert cli.main(["sweep", str(path), "--list", "--only=cpk-0"]) == 2
    assert "did you mean 'cpc-0'" in capsys.readouterr().err
    assert cli.main(["sweep", str(path), "--list", "--only=,"]) == 2
    assert "--only names no run" in capsys.readouterr().err
    assert cli.main(["sweep", "nothing.py", "--list"]) == 2
    assert "there is no file nothing.py" in capsys.readouterr().err
    assert cli.main(["sweep", str(path)]) == 2
    assert "--output=DIR" in capsys.readouterr().err


def copied(tiny, tmp_path):
    """A copy of the finished sweep without its store, which is named instead; arguments of the command."""
    path, whole = tiny
    output = tmp_path / "out"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("store"))
    return output, ["sweep", str(path), f"--output={output}", f"--store={whole / 'store'}"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("probe/results.json", b"{", "cpc-0/probe is damaged"),
        ("probe/results.json", b"[]", "cpc-0/probe is damaged"),
        ("probe/predictions.npz", b"PK", "cpc-0/probe is damaged"),
        ("probe/predictions.npz", b"", "cpc-0/probe is damaged"),
        ("run/config.json", b"", "cpc-0/run is damaged"),
        ("status.json", b"[]", "cpc-0/status.json is damaged"),
        ("status.json", b'{"state": "finished"}', "cpc-0/status.json is damaged"),
    ],
)
def test_damage_is_named_and_the_others_go_on(tiny, tmp_path, capsys, monkeypatch, file, content, message):
    output, args = copied(tiny, tmp_path)
    (output / "cpc-0" / file).write_bytes(content)
    (output / "cpc-1" / "probe" / "results.json").unlink()
    worked_on = []
    monkeypatch.setattr(sweep, "pretrain_and_probe", lambda run, *rest: worked_on.append(run.name))
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert worked_on == ["cpc-1"]
    assert message in err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 1 run damaged, see above: cpc-0"
    table = collect(load_sweep(args[1]), output).to_pylist()
    assert [row["state"] for row in table] == ["damaged", "begun", "finished"]
    assert message in table[0]["error"]


def test_damaged_status_of_a_run_that_only_pretrains(tmp_path, synthetic_store, capsys, monkeypatch):
    """Its status alone says whether it is finished; whoever takes it up refuses, and the other one runs."""
    path, output = write_sweep(tmp_path, 'run("a")', 'run("b", seed=1)'), tmp_path / "out"
    (output / "a").mkdir(parents=True)
    (output / "a" / "status.json").write_text('{"state": "fini')
    declare(load_sweep(str(path)), tmp_path / "declared")
    shutil.copy(tmp_path / "declared" / "sweep.json", output)
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "a failed: " in err
    assert "a/status.json is damaged; remove it" in err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 1 run failed, see above: a"
    assert status(output, "b")["state"] == "finished"
    assert cli.main([*args, "--list"]) == 0
    assert re.search(r"a +a +damaged ", capsys.readouterr().out)


def test_tables_that_cannot_be_made_do_not_stop_the_runs(tmp_path, synthetic_store, capsys, monkeypatch):
    path, output = write_sweep(tmp_path, 'run("a")', 'run("b", seed=1)'), tmp_path / "out"
    calls = []

    def fails_at_first(*args, wait=True):
        calls.append(wait)
        if not wait:
            raise OSError("no space left")
        return write_tables(*args, wait=wait)

    monkeypatch.setattr(sweep, "write_tables", fails_at_first)
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    assert cli.main(["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]) == 0
    assert calls == [False, False, True]
    assert "no tables now: OSError: no space left" in capsys.readouterr().err
    # Whoever writes them now covers what is finished by then; only the last word waits for it.
    with held_for_tables(output, wait=True), pytest.raises(Busy, match="another process writes the tables"):
        write_tables(load_sweep(str(path)), output, wait=False)


def test_run_that_another_process_works_on_is_left_to_it(tiny, tmp_path, capsys):
    output, args = copied(tiny, tmp_path)
    (output / "cpc-1" / "probe" / "results.json").unlink()
    with (output / "cpc-1" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(args) == 75
        err = capsys.readouterr().err
        assert "the run cpc-1 is being worked on by process" in err
        assert "other processes are working on cpc-1\nrun the same command again" in err
        assert cli.main([*args, "--list", "--only=cpc-1"]) == 0
        assert "running at step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("becomes", "code", "attempts"), [("died", 0, 2), ("failed", 2, 1), ("finished", 0, 1)]
)
def test_run_that_another_process_let_go_of(
    tmp_path, synthetic_store, capsys, monkeypatch, becomes, code, attempts
):
    """Its holder ends while this process works on another run: what it left is taken up, unless it failed."""
    path, output = write_sweep(tmp_path, 'run("held")', 'run("b", seed=1)'), tmp_path / "out"
    loaded = load_sweep(str(path))
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    declare(loaded, output)
    (output / "held").mkdir()
    theirs = RunStatus(output / "held")
    lock = (output / "held" / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def ends_the_other(config, workdir):
        if config.seed == 1:
            if becomes == "finished":
                trained(config, output / "held" / "run")
            if becomes != "died":
                theirs.end(becomes, "out of luck" if becomes == "failed" else "")
            lock.close()
        return trained(config, workdir)

    monkeypatch.setattr(sweep_run, "pretrain", ends_the_other)
    assert cli.main(args) == code
    assert "the run held is being worked on by process" in capsys.readouterr().err
    assert status(output, "held")["attempts"] == attempts
    assert status(output, "held")["state"] == ("finished" if becomes == "died" else becomes)


def test_state_is_that_of_one_moment(tmp_path, monkeypatch):
    """A run that ends between the look at its status and the one at its lock has not died."""
    run = load_sweep(str(write_sweep(tmp_path, 'run("a")'))).runs[0]
    (tmp_path / "a").mkdir()
    theirs = RunStatus(tmp_path / "a")

    def ends(path):
        theirs.end("failed", "out of luck")
        return False

    monkeypatch.setattr(sweep_folder, "is_held", ends)
    assert state_of(tmp_path, run)[::2] == ("failed", "out of luck")


def test_file_system_without_locks_is_one_sentence(tmp_path, capsys, monkeypatch):
    path = write_sweep(tmp_path, 'run("a")')
    (tmp_path / "out" / "a").mkdir(parents=True)
    RunStatus(tmp_path / "out" / "a")
    (tmp_path / "out" / "a" / ".lock").touch()

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sweep_locks.fcntl, "flock", no_locks)
    assert cli.main(["sweep", str(path), f"--output={tmp_path / 'out'}", "--list"]) == 2
    assert capsys.readouterr().err.endswith(".lock: No locks available; use another file system\n")


def test_sweep_begun_in_several_threads_at_once(tmp_path):
    """Locks of one process's open files exclude each other as those of several processes do."""
    path = write_sweep(tmp_path, 'run("a")')
    loaded, barrier = load_sweep(str(path)), threading.Barrier(3)

    def begin(_):
        refused = []
        for number in range(30):
            barrier.wait()
            try:
                declare(loaded, tmp_path / str(number))
            except UserError as error:
                refused.append(str(error))
        return refused

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(begin, range(3))) == [[], [], []]


def test_sample_that_another_process_prepares_is_not_refused(tmp_path):
    run = load_sweep("configs/sweeps/objectives_quick.py").runs[0]
    (tmp_path / "store").mkdir()  # without zarr.json, which comes last
    check_stores(StoreChoice(None, None), [run], tmp_path)


def test_targets_are_made_once_for_all_sweeps_on_a_store(tiny, tmp_path, monkeypatch, capsys):
    """The lock is the store's: the second sweep waits and finds them made."""
    path, whole = tiny
    run = load_sweep(str(path)).runs[2]
    folder = tmp_path / "store"
    shutil.copytree(whole / "store", folder)
    made = folder / "targets" / "spectrum8"
    (folder / "targets" / "away").mkdir()
    made = made.rename(folder / "targets" / "away" / "spectrum8")

    def never(*args, **kwargs):
        raise AssertionError("made twice")

    monkeypatch.setattr(sweep_run, "cluster", never)
    with ThreadPoolExecutor(1) as pool:
        with held_long(folder / "targets" / ".spectrum8.lock"):
            second = pool.submit(sweep_run._make_targets, run, Store(folder))
            until = time.monotonic() + 60
            while "waiting for it" not in capsys.readouterr().err:
                assert time.monotonic() < until
                assert not second.done(), second.result()
            made.rename(folder / "targets" / "spectrum8")
        second.result()


def test_run_whose_folder_cannot_be_made_fails_alone(tiny, tmp_path, capsys):
    output, args = copied(tiny, tmp_path)
    shutil.rmtree(output / "cpc-0")
    (output / "cpc-0").write_text("a file")
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "cpc-0 failed: " in err
    assert json.loads((output / "results.json").read_text())["missing"] == ["cpc-0"]


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
