"""The README's evaluation, small: every task of a store by two modes, robustness of one, and the report of all."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ecg_jax
from ecg_jax import cli
from ecg_jax.config_flags import load_config
from ecg_jax.prepare import prepare
from ecg_jax.pretrain import pretrain
from ecg_jax.probe_output import is_whole

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
TASKS = ("ptbxl_super", "ptbxl_rhythm")
SMALL = [
    "--config.bootstrap.resamples=50",
    "--config.linear.l2_grid=(1.0, 0.01)",
    "--config.baseline_seeds=2",
    "--config.min_count=12",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A store with the labels of two tasks, a run of one step, and folders for results."""
    root = tmp_path_factory.mktemp("lab")
    source = root / "source"
    source.mkdir()
    (source / "records100").symlink_to(SAMPLE / "records100")
    shutil.copy(SAMPLE / "ptbxl_database.csv", source)
    # Only superclasses and rhythms: no statement is a form, and a subclass has no more than its superclass.
    with open(SAMPLE / "scp_statements.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [{**row, "form": ""} for row in reader]
    with open(source / "scp_statements.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    prepare("ptbxl", source, root / "store", rate=100, workers=1, progress=False)
    config = load_config("configs/cpc.py")
    config.store = str(root / "store")
    config.model.width, config.model.layers = 16, 1
    config.steps, config.batch_size, config.data.max_val_crops = 1, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    pretrain(config, root / "run")
    return root


def _probe(lab, mode, workdir, *more):
    arguments = [f"--config=configs/probe.py:mode={mode},task=all", f"--checkpoint={lab / 'run'}"]
    return cli.main(
        ["probe", *arguments, f"--store={lab / 'store'}", f"--workdir={lab / workdir}", *SMALL, *more]
    )


@pytest.fixture(scope="module")
def probed(lab):
    assert _probe(lab, "linear", "linear") == 0
    assert _probe(lab, "supervised", "supervised", "--config.supervised.epochs=1") == 0
    return lab


def test_every_task_that_the_store_can_serve_is_probed(probed, capsys):
    for mode in ("linear", "supervised"):
        results = {
            path.parent.name: json.loads(path.read_text()) for path in (probed / mode).glob("*/results.json")
        }
        assert set(TASKS) <= set(results)
        assert "ptbxl_form" not in results, "it has no class"
        for task, each in results.items():
            assert (each["task"], each["mode"], each["metric"]) == (task, mode, "macro_auroc")
            assert set(each["baselines"]) == {"random_init", "ecg_features", "majority"}
            assert len(each["baselines"]["random_init"]["seeds"]) == 2
            assert each["leakage"]["identical_train_test"] == 0
            with np.load(probed / mode / task / "predictions.npz") as file:
                assert file["probabilities"].shape == file["targets"].shape
                assert file["probabilities_random_init_seeds"].shape == (2, *file["targets"].shape)
    # What does not depend on the mode is the same in both.
    linear, supervised = (
        json.loads((probed / m / TASKS[0] / "results.json").read_text()) for m in ("linear", "supervised")
    )
    assert linear["baselines"] == supervised["baselines"]
    assert linear["difference_to_random_init"] is not None
    assert supervised["difference_to_random_init"] is None
    assert linear["split"] == supervised["split"]
    assert supervised["leakage"]["pretraining"] is None
    assert linear["leakage"]["pretraining"]["identical_test"] == 0, (
        "the highest fold is held out of pretraining"
    )


def test_again_computes_nothing(probed, capsys):
    before = {path: path.stat().st_mtime_ns for path in (probed / "linear").glob("*/*")}
    assert _probe(probed, "linear", "linear") == 0
    assert {path: path.stat().st_mtime_ns for path in (probed / "linear").glob("*/*")} == before
    assert _probe(probed, "linear", "linear", "--config.seed=1") == 2
    assert "holds results of another probe (other config)" in capsys.readouterr().err


def test_a_task_that_was_interrupted_or_damaged_is_probed_again_and_the_others_are_kept(probed):
    kept, lost = (probed / "linear" / task / "results.json" for task in TASKS)
    before, whole = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    predictions = lost.with_name("predictions.npz")
    for damage in (
        lost.unlink,
        lambda: lost.write_text("{"),
        lambda: predictions.write_bytes(predictions.read_bytes()[:1000]),
        lost.with_name("linear_probe.npz").unlink,
    ):
        damage()
        assert _probe(probed, "linear", "linear") == 0
        assert kept.stat().st_mtime_ns == before
        again = json.loads(lost.read_text())
        assert {**again, "date": ""} == {**whole, "date": ""}
        assert is_whole(lost.parent, "linear")


def test_the_report_is_one_page_of_all(probed, capsys):
    assert cli.main(["robustness", str(probed / "linear" / TASKS[0]), "--config.conditions.snr_db=(6,)"]) == 0
    output = probed / "report.html"
    arguments = ["report", str(probed / "linear"), str(probed / "supervised"), f"--output={output}"]
    assert cli.main(arguments) == 0
    page = output.read_text()
    for text in (*TASKS, "supervised", "random", "majority", "powerline", "data:image/svg+xml"):
        assert text in page
    folder = probed / "report_tables"
    with open(folder / "index.csv", newline="") as file:
        kinds = {row["name"]: row["kind"] for row in csv.DictReader(file)}
    assert set(kinds.values()) == {"table", "figure"}
    suffixes = {"table": (".csv", ".tex"), "figure": (".csv", ".png", ".svg")}
    expected = {f"{name}{suffix}" for name, kind in kinds.items() for suffix in suffixes[kind]}
    assert {path.name for path in folder.iterdir()} == expected | {"index.csv"}


def test_no_report_without_a_supervised_network(probed, tmp_path, capsys):
    assert cli.main(["report", str(probed / "linear"), f"--output={tmp_path / 'report.html'}"]) == 2
    assert "mode=supervised" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
