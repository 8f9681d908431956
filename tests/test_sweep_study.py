"""Sweeps that make their stores, probe further, begin runs with others of their own, and end in studies."""

import functools
import json
import re
import shutil

import pytest

from ecg_jax import cli, probe, sweep_probes, sweep_run, sweep_stores
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.studies.flops import training_flops
from ecg_jax.sweep_declaration import check_folder
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_folder import is_finished, is_made, read_made, state_of
from ecg_jax.sweep_stores import StoreChoice, check_stores
from ecg_jax.sweep_table import collect
from tiny_sweep import status, trained, write_studies, write_sweep

#: A probe of few numbers, beside a sweep file.
QUICK_PROBE = """
from ecg_jax.config_flags import load_config

def get_config(arg=""):
    config = load_config(f"configs/probe.py:{arg}")
    config.linear.l2_grid, config.linear.tolerance, config.linear.max_steps = (1.0,), 1e-3, 20
    config.baseline_seeds, config.bootstrap.resamples = 1, 50
    return config
"""
BASE = """run("base", probe=f"{PROBE}:task=synthetic_rhythm", store=synthetic_store(64))"""
CHILD = """run("child", init="base", probe=f"{PROBE}:task=synthetic_rhythm", store=synthetic_store(64),
    probes={"axis": {"probe": f"{PROBE}:mode=frozen,task=synthetic_axis", "overrides": {"frozen.epochs": 1}},
            "noise": f"{PROBE}:task=synthetic_noise"})"""
STUDIES = [("listed", ["tasks"]), ("wrong", ["tasks", "/nowhere"])]


def sweep_file(folder, *runs, studies=()):
    """A sweep file with a quick probe beside it."""
    (folder / "quick_probe.py").write_text(QUICK_PROBE)
    path = write_sweep(folder, *runs)
    text = path.read_text().replace(
        "def run(name", f"PROBE = {str(folder / 'quick_probe.py')!r}\ndef run(name"
    )
    path.write_text(text)
    write_studies(path, studies)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished sweep: its file, its folder, and the exit code of the command."""
    folder = tmp_path_factory.mktemp("study")
    path, output = sweep_file(folder, BASE, CHILD, studies=STUDIES), folder / "out"
    return path, output, cli.main(["sweep", str(path), f"--output={output}"])


def copied(study, tmp_path):
    """A copy of the finished sweep beside the store that it was made with, and arguments of the command."""
    path, whole, _ = study
    output = tmp_path / "out"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("stores"))
    (output / "stores").symlink_to(whole / "stores")
    return output, ["sweep", str(path), f"--output={output}"]


def test_stores_runs_probes_and_studies_are_made(study):
    _, output, code = study
    assert code == 2  # of the study that fails alone
    store = Store(output / "stores" / "synthetic-64-0")
    assert len(store) == 64
    assert store.synthetic
    child = json.loads((output / "child" / "run" / "config.json").read_text())
    assert child["init"]["checkpoint"] == str(output / "base" / "run")
    assert (child["origin"]["run"], child["origin"]["step"]) == (str((output / "base" / "run").resolve()), 4)
    further = {
        name: json.loads((output / "child" / "probes" / name / "results.json").read_text())
        for name in ("axis", "noise")
    }
    assert {name: (each["task"], each["mode"]) for name, each in further.items()} == {
        "axis": ("synthetic_axis", "frozen"),
        "noise": ("synthetic_noise", "linear"),
    }
    assert further["axis"]["config"]["frozen"]["epochs"] == 1
    assert further["axis"]["checkpoint"]["run"] == str((output / "child" / "run").resolve())
    assert not (output / "base" / "probes").exists()
    made_of = json.loads((output / "studies" / "listed" / "made_of.json").read_text())
    assert made_of["command"] == ["tasks"]
    assert (
        "There is no store at /nowhere"
        in json.loads((output / "studies" / "wrong" / "failed.json").read_text())["error"]
    )


def test_tables_say_what_it_cost_and_what_it_began_with(study):
    path, output, _ = study
    loaded = load_sweep(str(path))
    rows = {row["name"]: row for row in collect(loaded, output).to_pylist()}
    assert [(row["state"], row["init"]) for row in rows.values()] == [
        ("finished", None),
        ("finished", "base"),
    ]
    for run in loaded.runs:
        row = rows[run.name]
        assert row["train_windows"] == 4 * 8
        assert row["train_flops"] == 4 * 8 * training_flops(run.config)
        times = [json.loads(line) for line in (output / run.name / "times.jsonl").read_text().splitlines()]
        assert len(times) == 2 + len(run.further)
        assert row["seconds"] + row["probe_seconds"] == pytest.approx(
            sum(sum(each.values()) for each in times)
        )
        assert (row["synthetic"], row["store_recordings"]) == (True, 64)
        (start,) = json.loads((output / run.name / "run/made_with.json").read_text())["starts"]
        assert row["device_hours"] == pytest.approx(start["seconds"] * 8 / 3600)  # the devices of the tests
        assert start["seconds"] <= row["seconds"], "a start is a part of its attempt"
    results = json.loads((output / "results.json").read_text())
    base, child = results["groups"]
    assert base["difference_to_first"] is None
    assert child["difference_to_first"]["macro_auroc"] == pytest.approx(
        child["macro_auroc"] - base["macro_auroc"]
    )
    assert child["settings"] == {"init": "base"}
    assert base["parameters"] == rows["base"]["encoder_parameters"]
    markdown = (output / "results.md").read_text()
    assert re.search(r"\| group +\| init +\| seeds +\| macro AUROC +\| minus base +\|", markdown)
    assert "nothing about ECG" in markdown


def test_device_hours_are_those_of_every_attempt(study, tmp_path):
    """As the report has them, and not seconds times the devices of the last one."""
    output, _ = copied(study, tmp_path)
    path = output / "base" / "run" / "made_with.json"
    (start,) = json.loads(path.read_text())["starts"]

    def hours(text):
        path.write_text(text)
        row = collect(load_sweep(str(study[0])), output).to_pylist()[0]
        assert (row["name"], row["state"]) == ("base", "finished")
        return row["device_hours"]

    def made(*changes):
        return json.dumps({"starts": [start | change for change in changes]})

    assert hours(made({"seconds": 3600.0, "devices": 4}, {"step": 2, "seconds": 1800.0, "devices": 1})) == 4.5
    assert hours(made({"seconds": None}, {"step": 2, "seconds": 1800.0})) is None, "one was killed"
    assert hours("{") is None, "a damaged note costs the run nothing else"


def test_again_makes_only_what_is_missing(study, tmp_path, capsys, monkeypatch):
    """Also from a folder that was moved."""
    output, args = copied(study, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("made twice")

    monkeypatch.setattr(sweep_run, "pretrain", never)
    monkeypatch.setattr(sweep_run, "probe", never)
    monkeypatch.setattr(sweep_probes, "probe_one", never)
    assert cli.main(args) == 2
    printed = capsys.readouterr()
    assert "2 of 2 runs are finished already" in printed.out
    assert "study listed: is made already" in printed.out
    assert printed.err.splitlines()[-1] == "ecg-jax sweep: error: studies failed, see above: wrong"
    assert cli.main([*args, "--no-studies"]) == 0
    # What its recordings are is known without its stores, wherever those lay.
    (output / "results.md").unlink()
    stores = (output / "stores").readlink()
    (output / "stores").unlink()
    assert cli.main([*args, "--collect", "--no-studies"]) == 0
    assert "nothing about ECG" in (output / "results.md").read_text()
    (output / "stores").symlink_to(stores)
    # Another result of a run makes its studies out of date.
    times = output / "base" / "times.jsonl"
    times.write_text(times.read_text() + '{"pretrain": 1.0}\n')
    capsys.readouterr()
    assert cli.main([*args, "--no-studies"]) == 0
    assert cli.main([*args, "--list"]) == 0
    out = capsys.readouterr().out
    assert "study listed: out of date\nstudy wrong: failed: There is no store at /nowhere" in out
    assert re.search(r"child +child +finished .*\(init: base; probes: axis, noise\)", out)


def test_probe_that_fails_is_named_and_made_by_the_same_command(study, tmp_path, capsys, monkeypatch):
    output, args = copied(study, tmp_path)
    args.append("--no-studies")
    shutil.rmtree(output / "child" / "probes")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_probes, "probe_one", fails_on("frozen", sweep_probes.probe_one))
        assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 1 run failed, see above: child"
    assert "the probe axis failed: RuntimeError: out of memory" in status(output, "child")["error"]
    assert "in fails" in (output / "child" / "error.txt").read_text()
    assert is_made(output / "child" / "probes" / "noise")
    assert cli.main([*args, "--list"]) == 0
    assert "failed at step 4, lacks the probe axis" in capsys.readouterr().out
    # What the tables compare is there, and stands in them.
    results = json.loads((output / "results.json").read_text())
    assert (results["missing"], results["lacking"]) == ([], {"child": ["axis"]})
    assert "other probes still to be made: child (axis)" in (output / "results.md").read_text()
    assert cli.main([*args, "--collect"]) == 0
    whole = study[1] / "child" / "probes" / "axis" / "results.json"
    monkeypatch.setattr(sweep_probes, "probe_one", copies(whole))
    assert cli.main(args) == 0
    assert status(output, "child")["state"] == "finished"
    assert not (output / "child" / "error.txt").exists()


def test_run_that_is_not_there_lacks_no_probe(study, tmp_path):
    """It is missing; that it is still to be probed goes without saying."""
    output, args = copied(study, tmp_path)
    shutil.rmtree(output / "child")
    assert cli.main([*args, "--collect", "--no-studies"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert (results["missing"], results["lacking"]) == (["child"], {})


def fails_on(mode, probe):
    def fails(config, *rest):
        if config.mode == mode:
            raise RuntimeError("out of memory")
        return copies_beside(config, *rest)

    return fails


def copies_beside(config, workdir, *rest):
    """A result that says no more than its task and mode."""
    workdir.mkdir(parents=True)
    results = {
        "task": config.task,
        "mode": config.mode,
        "metric": "m",
        "m": None,
        "ci_low": None,
        "ci_high": None,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return results


def copies(file):
    def copy(config, workdir, *rest):
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, workdir)
        return json.loads(file.read_text())

    return copy


def test_changed_further_probe_is_refused_and_a_new_one_is_made(study, tmp_path, capsys, monkeypatch):
    output, _ = copied(study, tmp_path)
    changed = CHILD.replace('"frozen.epochs": 1', '"frozen.epochs": 2')
    args = ["sweep", str(same_probe(study, tmp_path, BASE, changed)), f"--output={output}", "--no-studies"]
    assert cli.main(args) == 2
    assert "its run child differs in probes.axis.config.frozen.epochs" in capsys.readouterr().err
    added = CHILD.replace('"noise":', '"more": f"{PROBE}:task=synthetic_axis", "noise":')
    args[1] = str(same_probe(study, tmp_path, BASE, added))
    monkeypatch.setattr(sweep_probes, "probe_one", copies_beside)
    assert cli.main([*args, "--list"]) == 0
    assert "begun at step 4, lacks the probe more" in capsys.readouterr().out
    assert cli.main(args) == 0
    assert (output / "child" / "probes" / "more" / "results.json").exists()
    # Left out for a call, it comes back as it was: its results are those of no other probe.
    args[1] = str(same_probe(study, tmp_path, BASE, CHILD))
    assert cli.main(args) == 0
    other = added.replace("PROBE}:task=synthetic_axis", "PROBE}:task=synthetic_noise")
    args[1] = str(same_probe(study, tmp_path, BASE, other))
    for _ in range(2):
        assert cli.main(args) == 2
        err = capsys.readouterr().err
        assert "its run child differs in probes.more.config.task; " in err
        assert "give the probe another name" in err
    args[1] = str(same_probe(study, tmp_path, BASE, added))
    assert cli.main([*args, "--list"]) == 0
    assert re.search(r"child +child +finished", capsys.readouterr().out)


def same_probe(study, folder, *runs):
    """A sweep file with other runs, whose probes are those of the finished sweep."""
    path = sweep_file(folder, *runs)
    path.write_text(
        path.read_text().replace(str(folder / "quick_probe.py"), str(study[0].with_name("quick_probe.py")))
    )
    return path


def test_folder_of_an_older_version_goes_on(study, tmp_path):
    """Its declaration knows neither the keys of today nor fields that configs have gained since."""
    output, _ = copied(study, tmp_path)
    path = output / "sweep.json"
    declared = json.loads(path.read_text())
    for run in declared["runs"].values():
        for key in ("probe_store", "init", "probes"):
            del run[key]
        del run["config"]["stop_on_collapse"], run["probe"]["near_duplicates"]
    del declared["runs"]["child"]  # which begins with another
    path.write_text(json.dumps(declared))
    loaded = load_sweep(str(study[0]))
    check_folder(loaded, output)
    declared["runs"]["base"]["config"]["epochs"] = 3.0
    path.write_text(json.dumps(declared))
    with pytest.raises(UserError, match=r"its run base differs in config\.epochs"):
        check_folder(loaded, output)
    # A field that was not there had its default, and no other value.
    del declared["runs"]["base"]["config"]["steps"]
    path.write_text(json.dumps(declared))
    with pytest.raises(UserError, match=r"config\.steps"):
        check_folder(loaded, output)


# Stores.


def test_synthetic_store_cut_short_is_made_by_the_next(tmp_path, monkeypatch):
    path, output = (
        write_sweep(tmp_path, 'run("a", store=synthetic_store(8, seed=3, shuffle_labels=False))'),
        tmp_path / "out",
    )
    args = ["sweep", str(path), f"--output={output}"]
    made = []

    def killed(folder, **arguments):
        made.append((folder, arguments))
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "pretrain", trained)
    with monkeypatch.context() as patch:
        patch.setattr(sweep_stores, "synthesize", killed)
        assert cli.main(args) == 130
    assert made == [
        (
            output / "stores" / "synthetic-8-3",
            {"records": 8, "seed": 3, "shuffle_labels": False, "progress": True},
        )
    ]
    monkeypatch.setattr(sweep_stores, "synthesize", functools.partial(sweep_stores.synthesize, workers=1))
    assert cli.main(args) == 0
    assert len(Store(output / "stores" / "synthetic-8-3")) == 8
    assert status(output, "a")["recordings"] == 8


def test_further_probes_take_every_store_that_they_fit(study, tmp_path, synthetic_store, capsys, monkeypatch):
    """The first store is that of the tables; one that comes later is added, and nothing is made twice."""
    whole = study[1] / "stores" / "synthetic-64-0"
    runs = """run("a", probe=f"{PROBE}:task=synthetic_rhythm",
        probes={"further": f"{PROBE}:task=synthetic_axis", "all": f"{PROBE}:task=all"})"""
    path, output = sweep_file(tmp_path, runs), tmp_path / "out"
    made = []

    def one(config, workdir, checkpoint, store):
        made.append((config.task, str(workdir.relative_to(output / "a"))))
        return copies_beside(config, workdir)

    def every(config, workdir, checkpoint, store):
        names = ["x", "y"]
        for name in names:
            one(config, workdir / name, checkpoint, store)
        return dict.fromkeys(names)

    monkeypatch.setattr(sweep_run, "pretrain", trained)
    main = {
        "macro_auroc": 0.5,
        "ci_low": 0.5,
        "ci_high": 0.5,
        "baselines": {"random_init": {"macro_auroc": 0.5}},
    }

    def compared(config, workdir, checkpoint, store):
        made.append(store)
        workdir.mkdir()
        (workdir / "results.json").write_text('{"store": null}')
        return main

    monkeypatch.setattr(sweep_run, "probe", compared)
    monkeypatch.setattr(sweep_probes, "probe_one", one)
    monkeypatch.setattr(sweep_probes, "probe_all", every)
    monkeypatch.setattr(sweep_stores, "check_probed", lambda *args: None)  # of results that say nothing
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--no-tables"]
    assert cli.main([*args, f"--probe-store={whole}"]) == 0
    assert made == [
        str(whole),
        ("synthetic_axis", "probes/further"),
        ("all", "probes/all/x"),
        ("all", "probes/all/y"),
    ]
    other = tmp_path / "other"
    other.symlink_to(whole)
    made.clear()
    assert cli.main([*args, f"--probe-store={whole},{other}"]) == 0
    assert made == [
        ("synthetic_axis", "probes/further/other"),
        ("all", "probes/all/other/x"),
        ("all", "probes/all/other/y"),
    ]
    assert json.loads((output / "a/probes/all/finished.json").read_text())["stores"] == {
        "synthetic-64-0": ["x", "y"],
        "other": ["other/x", "other/y"],
    }
    (output / "a/probes/all/other/y/results.json").unlink()
    run = load_sweep(str(path)).runs[0]
    assert not is_finished(output, run)
    assert state_of(output, run).more == ", lacks the probe all"
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "other").symlink_to(whole)
    assert cli.main([*args, f"--probe-store={other},{twin / 'other'}"]) == 2
    assert "have folders of one name" in capsys.readouterr().err


def test_further_probe_keeps_what_it_has_of_each_store(study, tmp_path, synthetic_store, capsys, monkeypatch):
    """A store on which it fails, or is killed, keeps no other from being probed, and nothing is made twice."""
    whole = study[1] / "stores" / "synthetic-64-0"
    stores = {name: tmp_path / name for name in ("one", "two", "three")}
    for link in stores.values():
        link.symlink_to(whole)
    runs = 'run("a", probes={"x": f"{PROBE}:task=synthetic_axis"})'
    path, output = sweep_file(tmp_path, runs), tmp_path / "out"
    folder, run, made = output / "a" / "probes" / "x", load_sweep(str(path)).runs[0], []

    def fails_at(*names):
        def one(config, workdir, checkpoint, store):
            made.append(workdir.relative_to(folder).as_posix())
            if made[-1] in names:
                raise RuntimeError("out of memory")
            return copies_beside(config, workdir)

        return one

    def killed(config, workdir, checkpoint, store):
        if store == str(stores["three"]):
            raise KeyboardInterrupt
        return copies_beside(config, workdir)

    monkeypatch.setattr(sweep_run, "pretrain", trained)
    monkeypatch.setattr(sweep_stores, "check_probed", lambda *args: None)
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--no-tables"]
    offered = "--probe-store=" + ",".join(map(str, stores.values()))
    monkeypatch.setattr(sweep_probes, "probe_one", fails_at("one"))
    assert cli.main([*args, offered]) == 2
    assert made == ["one", "two", "three"]
    assert "the probe x on one failed: RuntimeError: out of memory" in capsys.readouterr().err
    assert read_made(folder) == {"two": ["two"], "three": ["three"]}
    assert state_of(output, run).more == ", lacks the probe x"
    shutil.rmtree(folder)
    monkeypatch.setattr(sweep_probes, "probe_one", killed)
    assert cli.main([*args, offered]) == 130
    assert read_made(folder) == {"one": ["one"], "two": ["two"]}
    assert not is_finished(output, run)
    # Without the third it is finished, with it lacks that alone.
    made.clear()
    monkeypatch.setattr(sweep_probes, "probe_one", fails_at())
    assert cli.main([*args, f"--probe-store={stores['one']},{stores['two']}"]) == 0
    assert (made, is_finished(output, run)) == ([], True)
    assert cli.main([*args, offered]) == 0
    assert made == ["three"]


def test_task_of_the_main_probe_is_taken_over(study, tmp_path, monkeypatch):
    """As one of all tasks, where it is the same probe of the same store; then it is there for `probe_all`."""
    _, output, _ = study
    text = BASE[:-1] + (
        ', probes={"same": f"{PROBE}:task=all", "other": {"probe": f"{PROBE}:task=all",'
        ' "overrides": {"linear.max_steps": 30}}})'
    )
    run = load_sweep(str(same_probe(study, tmp_path, text))).runs[0]
    store = str(output / "stores" / "synthetic-64-0")
    made = []

    def probe_all(config, workdir, checkpoint, store):
        made.extend(path.name for path in workdir.glob("*"))
        config.task = "synthetic_rhythm"
        return {config.task: probe.probe(config, workdir / config.task, checkpoint, store)}

    def fits(*args):
        raise AssertionError("made twice")

    monkeypatch.setattr(sweep_probes, "probe_all", probe_all)
    monkeypatch.setattr(probe, "fit", fits)
    same, other = run.further
    assert sweep_probes._probe_store(run, same, store, tmp_path / "same", ".", output) == ["synthetic_rhythm"]
    assert made == ["synthetic_rhythm"]
    for name in ("results.json", "predictions.npz"):
        copied_file = tmp_path / "same" / "synthetic_rhythm" / name
        assert copied_file.read_bytes() == (output / "base" / "probe" / name).read_bytes()
    with pytest.raises(AssertionError, match="made twice"):
        sweep_probes._probe_store(run, other, store, tmp_path / "other", ".", output)
    assert made == ["synthetic_rhythm"]


def test_probe_that_no_store_fits_is_refused_before_anything_runs(tmp_path, synthetic_store):
    runs = 'run("a", probes={"x": "configs/probe.py:task=ptbxl_super"})'
    run = load_sweep(str(write_sweep(tmp_path, runs))).runs[0]
    with pytest.raises(UserError, match=r"needs a store of corpus .ptbxl."):
        check_stores(StoreChoice(str(synthetic_store), None), [run], tmp_path)
