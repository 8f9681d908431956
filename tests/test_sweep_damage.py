"""What a sweep says of files of a finished run that were cut, edited or made unreadable: it names the run, its file and
the field, and makes the tables of the other runs.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ecg_jax import cli, sweep_results
from ecg_jax.errors import UserError
from ecg_jax.evaluation.metrics import macro_auroc
from ecg_jax.probe_provenance import made_with
from ecg_jax.sweep_declaration import declare
from ecg_jax.sweep_file import load_sweep
from ecg_jax.sweep_folder import VERSIONS, is_finished, spent, state_of
from ecg_jax.sweep_results import write_tables
from ecg_jax.sweep_table import collect
from study_folder import write_run
from tiny_sweep import write_sweep

RUN = 'run("{}", seed={}, probe="configs/probe.py:mode=linear", probes={{"more": "configs/probe.py:mode=linear"}})'
PROBED, STATUS, LOG = "probe/results.json", "status.json", "run/log.jsonl"
NAN = float("nan")


def write_probe(folder: Path, seed: int) -> None:
    """A finished probe with the arrays and fields that tables are made of."""
    folder.mkdir()
    n, random = 60, np.random.default_rng(0)
    targets = (random.random((n, 2)) < 0.4).astype(np.float32)
    arrays = {
        "probabilities": 0.5 * targets + random.random((n, 2)) + 0.01 * seed,
        "probabilities_random_init_seeds": random.random((2, n, 2)),
        "probabilities_ecg_features": random.random((n, 2)),
        "probabilities_majority": np.zeros((n, 2)),
    }
    points = {name: macro_auroc(targets, scores) for name, scores in arrays.items() if scores.ndim == 2}
    twins = [macro_auroc(targets, scores) for scores in arrays["probabilities_random_init_seeds"]]
    interval = lambda point: {"macro_auroc": point, "ci_low": point - 0.1, "ci_high": point + 0.1}  # noqa: E731
    ids = {"record_id": [f"r{i}" for i in range(n)], "patient_id": [f"p{i // 2}" for i in range(n)]}
    np.savez(folder / "predictions.npz", targets=targets, classes=np.array(["a", "b"]), **arrays, **ids)
    results = {
        "task": "ptbxl_super", "seed": seed, "n_records": n, "n_patients": n // 2, "encoder_parameters": 1000,
        **interval(points["probabilities"]),
        "baselines": {
            "random_init": interval(np.mean(twins)),
            **{name: interval(points[f"probabilities_{name}"]) for name in ("ecg_features", "majority")},
        },
        "difference_to_random_init": interval(points["probabilities"] - np.mean(twins)),
        "bootstrap": {"resamples": 100, "level": 0.95, "undefined": "exclude"},
        "store": {"path": "s", "corpus": "ptbxl", "fingerprint": "f", "table": "t"},
        "pretraining_config": {"seed": seed, "model": {"width": 16}}, "preprocessing": {},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep file, and its folder as two finished runs, "a" and "b", leave it."""
    folder = tmp_path_factory.mktemp("damage")
    path, output = (
        write_sweep(folder, *(RUN.format(name, seed) for seed, name in enumerate("ab"))),
        folder / "out",
    )
    declare(load_sweep(str(path)), output)
    for seed, name in enumerate("ab"):
        write_run(output / name / "run", 64, 1.0, seed=seed)
        write_probe(output / name / "probe", seed)
        more = output / name / "probes" / "more"
        more.mkdir(parents=True)
        shutil.copy(output / name / PROBED, more)
        (more / "finished.json").write_text('{"stores": {"s": ["."]}}')
        status = {
            "state": "finished", "error": "", "attempts": 1, "host": "h", "process": 1, "began": "b", "ended": "e",
            "parameters": 1, "recordings": 64, "device": "1 x cpu", "versions": made_with(VERSIONS)["versions"],
        }  # fmt: skip
        (output / name / STATUS).write_text(json.dumps(status))
        (output / name / "times.jsonl").write_text(
            '{"pretrain": 2.0}\n{"probe": 1.0}\n{"probes/more": 1.0}\n'
        )
    return path, output


@pytest.fixture
def copied(finished, tmp_path):
    """The sweep file, and a folder of it that may be damaged."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "out"))


def edit(path: Path, **fields) -> None:
    """Changes fields of a JSON file, or of the last line of a .jsonl file; "__" stands for the point."""
    *before, last = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    whole = json.loads(last)
    for name, value in fields.items():
        *parents, field = name.split("__")
        inner = whole
        for parent in parents:
            inner = inner[parent]
        inner[field] = value
    path.write_text("\n".join([*before, json.dumps(whole)]) + "\n")


def edit_arrays(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: change(arrays[name]) for name, change in changes.items()})


def collected(path, output, capsys):
    """Exit code, stdout and stderr of --collect."""
    code = cli.main(["sweep", str(path), f"--output={output}", "--collect"])
    return code, *capsys.readouterr()


def test_nothing_is_damaged_in_a_whole_folder(copied, capsys):
    path, output = copied
    code, out, err = collected(path, output, capsys)
    assert (code, err) == (0, "")
    assert "damaged:" not in out
    assert all(is_finished(output, run) for run in load_sweep(str(path)).runs)
    assert spent(output / "a") == {"pretrain": 2.0, "probe": 2.0}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            PROBED,
            {"macro_auroc": 0.99},
            r"field macro_auroc is 0\.9900, but the predictions beside it score 0\.\d{4}",
        ),
        (
            PROBED,
            {"baselines__random_init__macro_auroc": 0.1},
            r"baselines\.random_init\.macro_auroc is 0\.1000, but",
        ),
        (
            PROBED,
            {"baselines__ecg_features__macro_auroc": 0.1},
            r"ecg_features\.macro_auroc is 0\.1000, but the",
        ),
        (
            PROBED,
            {"baselines__majority__macro_auroc": 0.6},
            r"baselines\.majority\.macro_auroc is 0\.6000, but the",
        ),
        (
            PROBED,
            {"difference_to_random_init__macro_auroc": 0.4},
            r"difference_to_random_init\.macro_auroc is 0\.4000",
        ),
        (PROBED, {"macro_auroc": NAN}, "results.json: the field macro_auroc is nan, and must be a number"),
        (PROBED, {"macro_auroc": None}, "results.json: the field macro_auroc is null, and must be a number"),
        (PROBED, {"ci_low": "x"}, "results.json: the field ci_low is 'x', and must be a number"),
        (PROBED, {"n_records": 10**30}, "results.json: the field n_records is 10"),
        (
            PROBED,
            {"bootstrap__resamples": 0},
            "the field bootstrap.resamples is 0, and must be a whole number",
        ),
        (PROBED, {"pretraining_config": 5}, "the field pretraining_config is 5, and must be an object"),
        (STATUS, {"attempts": "x"}, "status.json: the field attempts is 'x', and must be a whole number"),
        (STATUS, {"recordings": True}, "status.json: the field recordings is true, and must be"),
        (STATUS, {"versions": {"jax": 1}}, "status.json: it lacks the field versions.ecg-jax"),
        (
            LOG,
            {"val_loss": "x"},
            r"log.jsonl is damaged: at step \d+ the field val_loss is 'x'",
        ),
        (LOG, {"step": 10**20}, "log.jsonl is damaged: at step 10"),
        ("run/config.json", {"store_fingerprint": [1]}, "config.json: the field store_fingerprint is"),
        ("run/selection.json", {"train": "x"}, "selection.json: the field train is 'x'"),
        (
            "times.jsonl",
            {"foo": 1},
            r"times.jsonl is damaged \(line 3: 'foo' is no part of a run\); remove that line",
        ),
        (
            "times.jsonl",
            {"pretrain": "x"},
            r"times.jsonl is damaged \(line 3: the field pretrain is 'x', and must",
        ),
    ],
)
def test_field_that_it_cannot_be_is_named(copied, capsys, file, fields, message):
    """Of the other run there are the tables; of the damaged one no score stands in any."""
    path, output = copied
    edit(output / "a" / file, **fields)
    code, out, err = collected(path, output, capsys)
    assert code == 2
    assert err == "ecg-jax sweep: error: 1 run damaged, see above: a\n"
    assert re.search(rf"\na: .*/a/.*{message}", out)
    rows = {row["name"]: row for row in collect(load_sweep(str(path)), output).to_pylist()}
    assert rows["b"]["state"] == "finished"
    table = (output / "results_table.csv").read_text()
    assert '"a","a","damaged"' in table
    if file == PROBED:
        assert ",0.99," not in table + (output / "results.csv").read_text()
        runs = json.loads((output / "results.json").read_text())["runs"]
        assert [run["name"] for run in runs] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": lambda a: a * NAN}, "the array probabilities holds values that it cannot hold"),
        ({"probabilities": lambda a: a[:50]}, r"the array probabilities is \[50, 2\], not \[n=60, K=2\]"),
        ({"targets": lambda a: a + 1}, "the array targets holds values that it cannot hold"),
        ({"probabilities_random_init_seeds": lambda a: a[0]}, r"is \[60, 2\], not \[S, n=60, K=2\]"),
        ({"patient_id": lambda a: a[1:]}, r"the array patient_id is \[59\], not \[n=60\]"),
    ],
)
def test_array_that_it_cannot_be_is_named(copied, capsys, changes, message):
    path, output = copied
    edit_arrays(output / "a" / "probe" / "predictions.npz", **changes)
    code, out, _ = collected(path, output, capsys)
    assert code == 2
    assert re.search(rf"\na: .*/a/probe is damaged \(predictions.npz: .*{message}", out)


@pytest.mark.parametrize("stores", [{"s": [5]}, {"s": "x"}, {"s": 3}, [], None])
def test_damaged_list_of_further_probes_is_made_again(copied, capsys, stores):
    path, output = copied
    edit(output / "a" / "probes" / "more" / "finished.json", stores=stores)
    args = ["sweep", str(path), f"--output={output}"]
    for what in ("--list", "--collect"):
        assert cli.main([*args, what]) == 0
        assert re.search(
            r"^a +a +begun at step \d+, lacks the probe more ", capsys.readouterr().out, re.MULTILINE
        )


def test_loss_that_is_not_finite_is_left_out_of_the_tables(copied, capsys):
    """Validation may be too hard for numbers, and nothing is damaged then; JSON has no word for it."""
    path, output = copied
    edit(output / "a" / LOG, val_loss=NAN)
    assert collected(path, output, capsys)[0] == 0
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert runs[0]["val_loss"] is None
    row = collect(load_sweep(str(path)), output).to_pylist()[0]
    assert np.isnan(row["val_loss"])
    assert row["best_val_loss"] == pytest.approx(1.25)


def test_tables_are_written_together_or_not_at_all(copied, monkeypatch):
    """Of one state of the folder, whatever fails while they are made."""
    path, output = copied
    sweep = load_sweep(str(path))
    write_tables(sweep, output)
    files = sorted(output.glob("results*"))
    before = {file: file.read_bytes() for file in files}
    assert len(before) == 6
    shutil.rmtree(output / "b")

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_results.plots, "seeds_forest", no_space)
    with pytest.raises(UserError, match=r"cannot draw results.png in .*: No space left"):
        write_tables(sweep, output)
    assert {file: file.read_bytes() for file in sorted(output.glob("results*"))} == before


@pytest.mark.parametrize("place", ["a", "a/run", "a/run/log.jsonl"])
def test_folder_that_cannot_be_read_is_named(copied, capsys, monkeypatch, place):
    """As that of another user."""
    path, output = copied
    hidden = output / place

    def refusing(name):
        method = getattr(Path, name)

        def call(self, *args, **kwargs):
            if self.is_relative_to(hidden) and self != output / "a":
                raise PermissionError(13, "Permission denied", str(self))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, call)

    for name in ("open", "exists", "iterdir", "read_text"):
        refusing(name)
    runs = load_sweep(str(path)).runs
    state = state_of(output, runs[0])
    assert state.kind == "damaged"
    assert re.fullmatch(f"cannot read {re.escape(str(hidden))}.*: Permission denied", state.error)
    code, out, err = collected(path, output, capsys)
    assert code == 2
    assert err == "ecg-jax sweep: error: 1 run damaged, see above: a\n"
    assert f"a: {state.error}" in out
    assert re.search(r"^b +b +finished ", out, re.MULTILINE)
