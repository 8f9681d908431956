import json
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ecg_jax import run_starts
from ecg_jax.errors import UserError
from ecg_jax.studies.flops import training_flops
from ecg_jax.studies.study_runs import find_runs
from study_folder import config_of, write_probe, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(
        tmp_path_factory.mktemp("study") / "ladder",
        [
            {"name": "cpc-100-0", "recordings": 100, "loss": 0.5,
             "errors": {"ptbxl_super": 0.2, ("ptbxl_sub", "finetune"): 0.3}},
            {"name": "jepa-200-1", "recordings": 200, "loss": 0.4, "objective": "jepa", "seed": 1,
             "corpus": "ptbxl", "errors": {"ptbxl_super": 0.1}},
        ],
    )  # fmt: skip


def test_a_sweep_is_read_with_its_probes(sweep):
    first, second = find_runs([sweep])
    assert [first.name, second.name] == ["cpc-100-0", "jepa-200-1"]
    assert (first.objective, first.backbone, first.seed, first.group) == ("cpc", "s4", 0, "cpc-100")
    assert (second.objective, second.seed) == ("jepa", 1)
    assert (first.recordings, first.rung, first.state, first.finished) == (100, "100", "finished", True)
    assert (first.steps, first.step, first.windows) == (25, 25, 200), "2 epochs of 100 in batches of 8"
    assert first.train_flops == training_flops(ConfigDict(first.config)) * 200
    assert first.device_hours == pytest.approx(2 * 60 / 3600)
    assert (first.val_loss, first.best_val_loss) == pytest.approx((0.5, 0.5))
    assert (first.revision, first.dirty, first.parameters) == ("a" * 40, False, 1234)
    assert (first.synthetic, second.synthetic) == (True, False)
    assert first.fingerprints["store"] == second.fingerprints["store"] == "5" * 64
    assert first.fingerprints["selection"] != second.fingerprints["selection"]
    assert [(p.name, p.task, p.mode) for p in first.probes] == [
        ("probe", "ptbxl_super", "linear"),
        ("ptbxl_sub-finetune", "ptbxl_sub", "finetune"),
    ]
    results = json.loads((sweep / "cpc-100-0/probe/results.json").read_text())
    assert first.probes[0].error == pytest.approx(1 - results["macro_auroc"])
    assert first.probes[0].predictions()["probabilities"].shape == (400, 2)


def test_runs_and_probes_are_found_wherever_they_lie(sweep, tmp_path):
    def found(*folders):
        return [
            (run.name, run.folder and run.folder.resolve(), len(run.probes)) for run in find_runs(folders)
        ]

    run = (sweep / "cpc-100-0/run").resolve()
    assert found(run) == [("cpc-100-0", run, 2)], "the sweep's own folder of it"
    assert found(sweep / "cpc-100-0") == [("cpc-100-0", run, 2)]
    assert found(sweep / "cpc-100-0/probe") == [("cpc-100-0", run, 1)], "its run is where it was"
    assert find_runs([run])[0].group == "cpc-100", "as the sweep has it"
    assert found(sweep.parent)[0] == ("ladder/cpc-100-0", run, 2)
    assert found(sweep, run, sweep / "cpc-100-0/probe") == found(sweep), "given twice, there once"

    # Runs and probes side by side, as the commands leave them.
    config = write_run(tmp_path / "runs/a", 100, 0.5)
    write_probe(tmp_path / "runs/a-probe/ptbxl_super", tmp_path / "runs/a", config, 25, 0.2)
    write_probe(tmp_path / "runs/a-probe/ptbxl_sub", tmp_path / "runs/a", config, 25, 0.2, task="ptbxl_sub")
    (run,) = find_runs([tmp_path / "runs"])
    assert (run.name, [(p.name, p.task) for p in run.probes]) == (
        "a", [("a-probe", "ptbxl_sub"), ("a-probe", "ptbxl_super")],
    )  # fmt: skip
    # In its workdir too, also where that was moved.
    write_probe(tmp_path / "runs/a/probe", tmp_path / "gone", config, 25, 0.2)
    (run,) = find_runs([tmp_path / "runs/a"])
    assert (run.name, [probe.folder.parent.name for probe in run.probes]) == ("a", ["a"])
    other = write_sweep(tmp_path / "again", [{"name": "cpc-100-0", "recordings": 100, "loss": 0.5}])
    assert [name for name, _, _ in found(sweep / "cpc-100-0/run", other / "cpc-100-0")] == [
        "ladder/cpc-100-0", "again/cpc-100-0",
    ]  # fmt: skip
    assert [name for name, _, _ in found(sweep, other)] == [
        "ladder/cpc-100-0",
        "jepa-200-1",
        "again/cpc-100-0",
    ]


def test_a_sweeps_further_probes_are_found_in_stores_and_tasks(tmp_path):
    sweep = write_sweep(
        tmp_path / "s", [{"name": "a-0", "recordings": 100, "loss": 0.5, "errors": {"ptbxl_super": 0.1}}]
    )
    run = sweep / "a-0/run"
    for store in ("ptbxl", "chapman"):
        place = sweep / "a-0/probes/all" / store / "ptbxl_sub"
        write_probe(place, run, config_of(), 25, 0.3, task="ptbxl_sub")
    # The first store lay in the probe's own folder while it was the only one.
    write_probe(sweep / "a-0/probes/frozen", run, config_of(), 25, 0.3, mode="frozen")
    write_probe(sweep / "a-0/probes/frozen/ningbo", run, config_of(), 25, 0.3, mode="frozen", store="8" * 64)
    (found,) = find_runs([sweep])
    assert [(p.name, p.task) for p in found.probes] == [
        ("probe", "ptbxl_super"), ("all/chapman", "ptbxl_sub"), ("all/ptbxl", "ptbxl_sub"),
        ("frozen", "ptbxl_super"), ("frozen/ningbo", "ptbxl_super"),
    ]  # fmt: skip
    assert not found.remarks
    # What the sweep does not count among its results is not of it, and that is said.
    (sweep / "a-0/probes/frozen/finished.json").write_text('{"stores": {"ningbo": ["ningbo"]}}')
    (found,) = find_runs([sweep])
    assert [p.name for p in found.probes if p.mode == "frozen"] == ["frozen/ningbo"]
    (remark,) = found.remarks
    assert f"the probe {sweep / 'a-0/probes/frozen'} is left out" in remark


def test_runs_that_are_not_finished_say_how_far_they_are(tmp_path):
    sweep = write_sweep(
        tmp_path / "s", [{"name": name, "recordings": 100, "loss": 0.5} for name in ("a", "b", "c")]
    )
    log = (sweep / "a/run/log.jsonl").read_text().splitlines(keepends=True)
    (sweep / "a/run/log.jsonl").write_text("".join(log[:2]))
    (sweep / "b/run/log.jsonl").unlink()
    for path in (sweep / "c/run").iterdir():
        path.unlink()
    a, b, c = find_runs([sweep])
    assert (a.state, a.step, a.windows) == ("at step 12 of 25", 12, 96)
    assert b.state == "before its first logged step"
    assert (c.state, c.objective, c.recordings) == ("not begun", "cpc", None)
    assert not any(run.finished for run in (a, b, c))


def test_a_probe_whose_run_is_gone_is_known_by_what_it_says(tmp_path):
    write_probe(tmp_path / "p", tmp_path / "gone", config_of("jepa", seed=3), 25, 0.25)
    (run,) = find_runs([tmp_path / "p"])
    assert (run.folder, run.objective, run.seed, run.recordings, run.finished) == (
        None,
        "jepa",
        3,
        None,
        False,
    )
    assert str(tmp_path / "gone") in run.state
    assert run.probes[0].error == pytest.approx(0.25, abs=0.05)


def test_damaged_files_are_named(tmp_path):
    def broken(name, text, entry="a"):
        sweep = write_sweep(
            tmp_path / f"{len(list(tmp_path.iterdir()))}",
            [{"name": entry, "recordings": 100, "loss": 0.5, "errors": {"ptbxl_super": 0.1}}],
        )
        (sweep / name).write_text(text)
        with pytest.raises(UserError) as error:
            [probe.predictions() for run in find_runs([sweep]) for probe in run.probes]
        assert name in str(error.value)
        return str(error.value)

    broken("sweep.json", "{")
    broken("a/run/config.json", "{}")
    broken("a/run/selection.json", "{}")
    broken("a/run/log.jsonl", "x\n")
    broken("a/probe/predictions.npz", "")
    assert "metric" in broken("a/probe/results.json", '{"task": "ptbxl_super"}')


def test_a_run_is_finished_when_its_log_or_a_checkpoint_says_so(tmp_path):
    names = ("pruned", "logless", "halfway")
    sweep = write_sweep(tmp_path / "s", [{"name": name, "recordings": 100, "loss": 0.5} for name in names])

    def keep(name, step):
        for part in ("metrics", "meta", "state"):
            (sweep / name / "run/checkpoints" / str(step) / part).mkdir(parents=True)
        (sweep / name / "run/checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")

    keep("pruned", 12)  # the best, and not the last
    keep("logless", 25)
    keep("halfway", 12)
    (sweep / "logless/run/log.jsonl").unlink()
    (sweep / "halfway/run/log.jsonl").unlink()
    assert {run.name: run.state for run in find_runs([sweep])} == {
        "pruned": "finished", "logless": "finished", "halfway": "at step 12 of 25",
    }  # fmt: skip


def test_cost_is_summed_over_attempts_and_unknown_where_one_was_not_measured(tmp_path):
    sweep = write_sweep(tmp_path / "s", [{"name": "a", "recordings": 100, "loss": 0.5}])
    (sweep / "a/times.jsonl").write_text('{"pretrain": 5.0}\n')
    path = sweep / "a/run/made_with.json"
    (start,) = json.loads(path.read_text())["starts"]

    def read(*changes):
        path.write_text(json.dumps({"starts": [start | change for change in changes]}))
        (run,) = find_runs([sweep])
        return run

    run = read({"seconds": 3600.0, "devices": 4}, {"step": 12, "seconds": 1800.0, "devices": 1})
    assert run.device_hours == pytest.approx(4 + 0.5)
    assert (run.seconds, run.windows_per_s, run.remarks) == (5400, pytest.approx(200 / 5400), ())
    run = read({"seconds": None}, {"step": 12, "seconds": 1.0})
    assert (run.device_hours, run.windows_per_s, run.seconds, run.unmeasured) == (None, None, 1.0, 1)
    assert "1 of 2 attempts were killed" in run.remarks[0]
    run = read({"step": 12, "seconds": 1.0})
    assert (run.device_hours, run.windows_per_s) == (None, None)
    assert "before step 12" in run.remarks[0]
    for broken in ('{"starts": []', '{"starts": [{}]}'):
        path.write_text(broken)
        with pytest.raises(run_starts.Damaged, match="made_with"):
            run_starts.read_starts(path.parent)
    (run,) = find_runs([sweep])
    assert (run.device_hours, run.seconds, run.finished) == (None, None, True), "it is a run all the same"
    assert str(path) in run.remarks[0]


def test_operations_are_unknown_for_want_of_a_field_and_not_by_an_error(tmp_path, monkeypatch):
    sweep = write_sweep(tmp_path / "s", [{"name": "a", "recordings": 100, "loss": 0.5}])
    path = sweep / "a/run/config.json"
    config = json.loads(path.read_text())
    del config["model"]["layers"]
    path.write_text(json.dumps(config))
    (run,) = find_runs([sweep])
    assert run.train_flops is None
    assert "lacks the field layers" in run.remarks[0]
    monkeypatch.setattr("ecg_jax.studies.flops.stem", lambda *sizes: None + 1)
    with pytest.raises(TypeError):
        find_runs([sweep])


def test_folders_without_anything_are_refused(tmp_path):
    for folder, words in ((tmp_path, "holds no sweep"), (tmp_path / "none", "there is no folder")):
        with pytest.raises(UserError, match=words):
            find_runs([folder])
    with pytest.raises(UserError, match="no folder is given"):
        find_runs([])


def test_every_start_of_a_run_is_noted(tmp_path):
    with run_starts.noted_start(tmp_path, 0, np.int64(7), time.monotonic() - 5):
        assert run_starts.read_starts(tmp_path)[0]["seconds"] is None, "as a killed one leaves it"
    with pytest.raises(RuntimeError), run_starts.noted_start(tmp_path, 3, 7, time.monotonic()):
        raise RuntimeError
    first, second = run_starts.read_starts(tmp_path)
    assert first["seconds"] >= 5
    assert second["seconds"] >= 0
    assert (first["step"], second["step"], first["parameters"]) == (0, 3, 7)
    assert (first["devices"], first["processes"]) == (len(jax.devices()), 1)
    assert "jax" in first["versions"]


def test_a_damaged_record_of_starts_is_set_aside(tmp_path, capsys):
    (tmp_path / "made_with.json").write_text('{"starts": [{}]}')
    with run_starts.noted_start(tmp_path, 3, 7, time.monotonic()):
        pass
    (start,) = run_starts.read_starts(tmp_path)
    assert start["step"] == 3
    (aside,) = tmp_path.glob("made_with.json.damaged-*")
    assert aside.read_text() == '{"starts": [{}]}'
    assert aside.name in capsys.readouterr().err


def test_seconds_that_cannot_be_noted_are_told(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with run_starts.noted_start(workdir, 0, 7, time.monotonic()):
        (workdir / "made_with.json").unlink()
        workdir.rmdir()
    assert "seconds that this start took are not noted" in capsys.readouterr().err


def test_the_revision_is_that_of_a_checkout_and_no_other(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(("git", *who, "-C", str(tmp_path), *arguments), capture_output=True, check=True)
        return done.stdout.decode().strip()

    assert run_starts.git_state(tmp_path) is None
    git("init", "-q")
    assert run_starts.git_state(tmp_path) is None, "nothing is committed"
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    revision = git("rev-parse", "HEAD")
    assert run_starts.git_state(tmp_path) == {"revision": revision, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert run_starts.git_state(tmp_path) == {"revision": revision, "dirty": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert run_starts.git_state(Path(inside)) is None
