"""In which order a sweep does things: runs that wait for those they begin with, waves of jobs, studies at the end.

Nothing is trained here.
"""

import fcntl
import json
import re
import shutil

import pytest

from ecg_jax import cli, sweep_launch, sweep_run, sweep_studies
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_folder import RunStatus, is_finished, state_of
from tiny_sweep import FAILS, status, trained, write_studies, write_sweep

CHAIN = ('run("a")', 'run("b", init="a")', 'run("c", init="b")', 'run("d")')


def test_run_waits_for_the_one_that_it_begins_with(tmp_path, synthetic_store, capsys, monkeypatch):
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    assert cli.main([*args, "--only=c,d"]) == 2
    err = capsys.readouterr().err
    assert "c waits for b, which is not pretrained" in err
    assert err.splitlines()[-1].endswith(
        "error: c cannot begin before runs that --only leaves out; name those too"
    )
    assert status(output, "d")["state"] == "finished"
    assert cli.main([*args, "--list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(
        r"a +a +not begun +.*\nb +b +waiting for a .*\nc +c +waiting for b .*\nd +d +finished", listed
    )
    with (output / "sweep.json").open() as file:
        assert json.load(file)["runs"]["b"]["init"] == "a"
    # What a run waits for fails: it is not begun, and nothing else is.
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "pretrain", lambda config, workdir: 1 / 0)
        assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "ecg-jax sweep: error: 1 run failed, see above: a"
    assert [state_of(output, run).kind for run in load_sweep(str(path)).runs] == [
        "failed",
        "waiting",
        "waiting",
        "finished",
    ]
    begun = []

    def records(config, workdir):
        begun.append((workdir.parent.name, config.init.checkpoint))
        return trained(config, workdir)

    monkeypatch.setattr(sweep_run, "pretrain", records)
    assert cli.main(args) == 0
    assert begun == [("a", ""), ("b", f"{output}/a/run"), ("c", f"{output}/b/run")]


def test_run_waits_for_one_whose_pretraining_was_removed(tmp_path, synthetic_store, monkeypatch):
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    assert cli.main([*args, "--only=a"]) == 0
    a, b = load_sweep(str(path)).runs[:2]
    assert (is_finished(output, a), state_of(output, b).kind) == (True, "not begun")
    shutil.rmtree(output / "a" / "run")
    assert not is_finished(output, a)
    assert str(state_of(output, b)) == "waiting for a"
    assert cli.main(args) == 0
    assert is_finished(output, b)


def test_run_whose_first_one_another_process_works_on_is_left_for_later(
    tmp_path, synthetic_store, capsys, monkeypatch
):
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--only=b"]
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    (output / "a").mkdir(parents=True)
    assert cli.main([*args[:-1], "--only=d"]) == 2  # the folder of something else
    shutil.rmtree(output)
    assert cli.main([*args[:-1], "--only=d"]) == 0
    (output / "a").mkdir()
    RunStatus(output / "a")
    with (output / "a" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(args) == 75
        assert "run the same command again" in capsys.readouterr().err


def test_jobs_run_in_waves(tmp_path, synthetic_store, monkeypatch):
    """Each process writes down when it begins and ends; none begins before the one that it waits for has ended."""
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    (tmp_path / "done").mkdir()
    finished = RunStatus(tmp_path / "done")
    finished.note(parameters=3)
    finished.end("finished")
    order = tmp_path / "order"
    command = f"""for word; do [[ $word != --only=* ]] || name=${{word#--only=}}; done
    echo begin $name >> {order}
    for i in {{1..1000}}; do [[ $name = a ]] && ! grep -q "begin d" {order} && sleep 0.1; done
    echo end $name >> {order}; mkdir {output}/$name/run; echo '{{"step": 4}}' > {output}/$name/run/log.jsonl
    cp {tmp_path}/done/status.json {output}/$name"""
    monkeypatch.setattr(sweep_launch, "COMMAND", ("bash", "-c", command, "bash"))
    assert cli.main(["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--jobs=3"]) == 0
    lines = order.read_text().split("\n")
    for first, then in (("a", "b"), ("b", "c")):
        assert lines.index(f"end {first}") < lines.index(f"begin {then}")
    assert lines.index("begin d") < lines.index("end a")


@pytest.mark.parametrize("queue", ["nothing", "the first"])
def test_slurm_arrays_wait_for_each_other(tmp_path, synthetic_store, capsys, monkeypatch, queue):
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("sbatch", f'echo "$*" >> {folder}/calls; echo 100$(wc -l < {folder}/calls)'),
        ("squeue", "echo 0"),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--launcher=slurm"]
    if queue == "the first":
        assert cli.main([*args, "--only=a"]) == 0
    capsys.readouterr()
    assert cli.main([*args, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    calls = [line.replace(str(output), "OUT") for line in (folder / "calls").read_text().splitlines()]
    if queue == "nothing":
        assert calls == [
            "--parsable OUT/sweep.sbatch",
            "--parsable --dependency=afterok:1001_0 --kill-on-invalid-dep=yes OUT/sweep.2.sbatch",
            "--parsable --dependency=afterok:1002_0 --kill-on-invalid-dep=yes OUT/sweep.3.sbatch",
            "--parsable --dependency=afterany:1001:1002:1003 OUT/collect.sbatch",
        ]
        assert "submitted 4 runs as the arrays 1001, 1002, 1003, and job 1004" in said
        assert "--dependency=afterok:ARRAY1_0 " in printed
        assert "    a\n    d\n" in (output / "sweep.sbatch").read_text()
    else:  # its task stands in for what it began
        assert calls[2:4] == [
            "--parsable OUT/sweep.sbatch",
            "--parsable --dependency=afterok:1001_0 --kill-on-invalid-dep=yes OUT/sweep.2.sbatch",
        ]
        assert "1 run already in the queue, of the array 1001: a" in said
        assert "--dependency=afterok:1001_0 " in printed


def test_dry_run_tells_the_order(tmp_path, synthetic_store, capsys):
    path, output = write_sweep(tmp_path, *CHAIN), tmp_path / "out"
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}", "--dry-run"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"--only=a\n.*--only=d\n\n# when a are finished\n.*--only=b\n\n# when b are", out)
    assert cli.main([*args, "--only=c"]) == 0
    assert (
        "c waits for b, which is waiting for a and not among these\nnothing to run" in capsys.readouterr().out
    )
    assert not output.exists()


def test_studies_follow_when_every_run_is_finished(tmp_path, synthetic_store, capsys, monkeypatch):
    """A failing run holds them up; then they run in processes of their own where this one left the devices alone."""
    path, output = write_sweep(tmp_path, FAILS.replace("60.0", "LENGTH"), 'run("a")'), tmp_path / "out"
    text = path.read_text()
    path.write_text(text.replace("LENGTH", "60.0"))
    write_studies(path, [("one", ["tasks", "--output={output}/studies/one/x"]), ("two", ["tasks"])])
    args = ["sweep", str(path), f"--output={output}", f"--store={synthetic_store}"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "pretrain", lambda config, workdir: 1 / 0)
        assert cli.main(args) == 2
    printed = capsys.readouterr()
    assert "studies wait until every run is finished: one, two" in printed.out
    assert not (output / "studies").exists()
    monkeypatch.setattr(sweep_run, "pretrain", trained)
    assert cli.main([*args, "--no-studies"]) == 0
    script = f"""case $2 in --output=*) mkdir -p {output}/studies/one && touch {output}/studies/one/x;;
    *) echo 'ecg-jax tasks: error: no luck' >&2; exit 2;; esac"""
    monkeypatch.setattr(sweep_studies, "COMMAND", ("bash", "-c", script, "bash"))
    assert cli.main([*args, "--collect"]) == 2
    printed = capsys.readouterr()
    assert "study two failed: no luck (exit code 2)" in printed.err
    made_of = json.loads((output / "studies" / "one" / "made_of.json").read_text())
    assert made_of["files"] == ["x"]
    assert made_of["command"] == ["tasks", "--output=OUTPUT/studies/one/x"]
    assert cli.main([*args, "--collect"]) == 2
    assert "study one: is made already" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sweep_studies, "_code", lambda: "of a later version")
        assert cli.main([*args, "--list"]) == 0
        assert "study one: out of date" in capsys.readouterr().out
    (output / "studies" / "one" / "x").unlink()
    assert cli.main([*args, "--list"]) == 0
    assert "study one: out of date\nstudy two: failed: no luck" in capsys.readouterr().out


def test_report_follows_what_it_gathers(tmp_path, synthetic_store):
    path, output = write_sweep(tmp_path, 'run("a")'), tmp_path / "out"
    output.mkdir()
    states = {}
    for first in ("--one", "--two"):
        write_studies(path, [("first", ["tasks", first]), ("page", ["report", "x"]), ("other", ["cka"])])
        loaded = load_sweep(str(path))
        made, earlier = [], []
        for each in loaded.studies(output):
            made.append(sweep_studies._made_of(loaded, each, output, earlier))
            earlier.append(made[-1])
        states[first] = [each["runs"] for each in made]
    assert [one == two for one, two in zip(*states.values(), strict=True)] == [True, False, True]
