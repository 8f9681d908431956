"""`ecg-jax probe` end to end on real recordings with a tiny encoder, and everything it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ecg_jax
from ecg_jax import cli
from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from ecg_jax.probe import probe, summary

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"


def _subset(folder: Path, keep, fold=None) -> Path:
    """The PTB-XL sample with only the rows for which keep(row) holds, in one fold if given."""
    folder.mkdir()
    shutil.copy(SAMPLE / "scp_statements.csv", folder)
    (folder / "records100").symlink_to(SAMPLE / "records100")
    with open(SAMPLE / "ptbxl_database.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if keep(row)]
    with open(folder / "ptbxl_database.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows({**row, "strat_fold": fold or row["strat_fold"]} for row in rows)
    return folder


def _patient(row) -> int:
    return int(float(row["patient_id"]))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """whole: the sample; even and odd: its patients in two halves; odd_one_fold: odd without its folds."""
    root = tmp_path_factory.mktemp("stores")
    sources = {
        "whole": SAMPLE,
        "even": _subset(root / "even_source", lambda row: _patient(row) % 2 == 0),
        "odd": _subset(root / "odd_source", lambda row: _patient(row) % 2 == 1),
        "odd_one_fold": _subset(root / "one_source", lambda row: _patient(row) % 2 == 1, fold="1"),
        "even_one_fold": _subset(root / "even_one_source", lambda row: _patient(row) % 2 == 0, fold="1"),
    }
    for name, source in sources.items():
        prepare("ptbxl", source, root / name, rate=100, workers=1, progress=False)
    return {name: root / name for name in sources}


@pytest.fixture(scope="module")
def run(tmp_path_factory, stores):
    """A pretraining run of one step."""
    from ecg_jax.pretrain import pretrain

    config = load_config("configs/cpc.py")
    config.store = str(stores["whole"])
    config.model.width, config.model.layers = 16, 1
    config.steps, config.batch_size, config.data.max_val_crops = 1, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(config, workdir)
    return workdir


def _config(arg="mode=linear,task=ptbxl_super", **changes):
    config = load_config(f"configs/probe.py:{arg}")
    changes = {
        "bootstrap__resamples": "60",
        "linear__l2_grid": "(1.0, 0.01)",
        "baseline_seeds": "2",
        **changes,
    }
    for name, value in changes.items():
        override(config, name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def results(tmp_path_factory, run, stores):
    workdir = tmp_path_factory.mktemp("probes") / "super"
    return probe(_config(), workdir, str(run), stores["whole"]), workdir


def test_results_are_complete_and_agree_with_the_predictions(results):
    from sklearn.metrics import roc_auc_score

    returned, workdir = results
    stored = json.loads((workdir / "results.json").read_text())
    assert stored == returned
    predictions = np.load(workdir / "predictions.npz")
    classes = predictions["classes"].tolist()
    assert list(stored["per_class"]) == classes == ["CD", "HYP", "MI", "NORM", "STTC"]
    aurocs = []
    for k, name in enumerate(classes):
        entry = stored["per_class"][name]
        truth, guess = predictions["targets"][:, k], predictions["probabilities"][:, k]
        aurocs.append(roc_auc_score(truth, guess))
        assert abs(entry["auroc"] - aurocs[-1]) < 1e-12
        assert (entry["n_pos"], entry["n_neg"]) == ((truth == 1).sum(), (truth == 0).sum())
        assert entry["ci_low"] <= entry["auroc"] <= entry["ci_high"]
        twins = [roc_auc_score(truth, p[:, k]) for p in predictions["probabilities_random_init_seeds"]]
        assert abs(entry["random_init_auroc"] - np.mean(twins)) < 1e-12
    assert abs(stored["macro_auroc"] - np.mean(aurocs)) < 1e-12
    assert stored["ci_low"] < stored["macro_auroc"] < stored["ci_high"]
    assert stored["n_records"] == len(predictions["record_id"])
    assert stored["n_patients"] == len(set(predictions["patient_id"]))
    assert stored["bootstrap"]["unit"] == "patient"
    assert stored["checkpoint"]["step"] == 1
    assert stored["fit"]["converged"]
    assert stored["fit"]["l2"] in (1.0, 0.01)
    assert (workdir / "per_class_auroc.png").read_bytes().startswith(b"\x89PNG")


def test_split_follows_the_official_folds(results, stores):
    with open(SAMPLE / "ptbxl_database.csv", newline="", encoding="utf-8") as file:
        folds = {row["ecg_id"]: row["strat_fold"] for row in csv.DictReader(file)}
    returned, workdir = results
    tested = np.load(workdir / "predictions.npz")["record_id"]
    assert {folds[record] for record in tested} == {"10"}
    with open(workdir / "split.csv", newline="") as file:
        parts = {}
        for row in csv.DictReader(file):
            parts.setdefault(row["part"], []).append(row["record_id"])
    assert parts["test"] == tested.tolist()
    assert {folds[record] for record in parts["validation"]} == {"9"}
    assert len(parts["train"]) == returned["split"]["n_train"]
    split, excluded = returned["split"], returned["records_excluded"][str(stores["whole"])]
    assert split["n_train"] + split["n_val"] + split["n_test"] + sum(excluded.values()) == len(folds)
    assert returned["leakage"]["patients_train_test"] == 0


def test_baselines(results):
    returned, _ = results
    assert returned["baselines"]["majority"] == {"macro_auroc": 0.5, "ci_low": 0.5, "ci_high": 0.5}
    difference = returned["difference_to_random_init"]
    expected = returned["macro_auroc"] - returned["baselines"]["random_init"]["macro_auroc"]
    assert abs(difference["macro_auroc"] - expected) < 1e-12
    assert difference["ci_low"] <= difference["macro_auroc"] <= difference["ci_high"]
    assert returned["macro_auroc"] != returned["baselines"]["random_init"]["macro_auroc"]
    assert "random initialisation" in summary(returned)


def test_the_same_probe_again_gives_the_same_and_another_is_refused(results, run, stores):
    returned, workdir = results
    again = probe(_config(), workdir, str(run / "1"), stores["whole"])
    assert {**again, "date": ""} == {**returned, "date": ""}
    with pytest.raises(UserError, match=r"another probe \(other config\)"):
        probe(_config(seed="1"), workdir, str(run), stores["whole"])
    with pytest.raises(UserError, match=r"another probe \(other store\)"):
        probe(_config(), workdir, str(run), stores["even"])
    assert json.loads((workdir / "results.json").read_text()) == again


def test_rare_classes_are_dropped_and_listed(run, stores, tmp_path):
    config = _config("task=ptbxl_diag", min_count="8")
    returned = probe(config, tmp_path / "w", str(run), stores["whole"])
    assert "NORM" in returned["per_class"]
    assert len(returned["per_class"]) + len(returned["classes_dropped"]) == 44
    assert all("fewer than min_count=8" in why for why in returned["classes_dropped"].values())


def test_another_test_store_with_the_same_folds_gives_its_test_fold(run, stores, tmp_path):
    returned = probe(_config(), tmp_path / "w", str(run), stores["even"], stores["odd"])
    assert "test fold 10" in returned["split"]["tested_on"]
    assert returned["test_store"]["fingerprint"] != returned["store"]["fingerprint"]
    with open(SAMPLE / "ptbxl_database.csv", newline="", encoding="utf-8") as file:
        rows = {row["ecg_id"]: row for row in csv.DictReader(file)}
    for record in np.load(tmp_path / "w" / "predictions.npz")["record_id"]:
        assert _patient(rows[record]) % 2 == 1
        assert rows[record]["strat_fold"] == "10"


def test_another_test_store_with_other_folds_is_tested_whole(run, stores, tmp_path):
    returned = probe(_config(), tmp_path / "w", str(run), stores["even"], stores["odd_one_fold"])
    assert "all records" in returned["split"]["tested_on"]
    excluded = returned["records_excluded"][str(stores["odd_one_fold"])]
    with open(stores["odd_one_fold"].parent / "one_source" / "ptbxl_database.csv", encoding="utf-8") as file:
        n_rows = len(list(csv.DictReader(file)))
    assert returned["n_records"] == n_rows - sum(excluded.values())


def test_a_test_store_that_was_trained_on_is_refused(run, stores, tmp_path):
    with pytest.raises(UserError, match=r"records of the test store .* are trained or validated on"):
        probe(_config(), tmp_path / "w", str(run), stores["even"], stores["even_one_fold"])
    assert not (tmp_path / "w").exists()


def test_other_preprocessing_is_refused(run, tmp_path):
    source = _subset(tmp_path / "source", lambda row: int(row["ecg_id"]) < 40)
    prepare("ptbxl", source, tmp_path / "clipped", rate=100, workers=1, clip_mv=1.0, progress=False)
    with pytest.raises(UserError, match="clip_mv"):
        probe(_config(), tmp_path / "w", str(run), tmp_path / "clipped")


def test_other_corpus_is_refused(run, synthetic_store, tmp_path):
    with pytest.raises(UserError, match="corpus 'ptbxl'"):
        probe(_config(), tmp_path / "w", str(run), synthetic_store)


@pytest.mark.parametrize(
    ("arg", "changes", "message"),
    [
        ("", {"mode": "lineal"}, r'mode=lineal must be "linear" or'),
        ("", {"linear__layers": "block7"}, "no layer 'block7'"),
        ("", {"linear__solver": "adam"}, "linear.solver"),
        ("mode=frozen", {"frozen__learning_rates": "()"}, "frozen.learning_rates"),
        ("mode=finetune", {"finetune__epochs": "0"}, "finetune.epochs"),
        ("mode=finetune", {"finetune__head": "mlp"}, "finetune.head"),
        ("mode=supervised", {"supervised__architecture": "other"}, "supervised.architecture"),
        ("", {"bootstrap__interval": "normal"}, "bootstrap.interval"),
        ("", {"baseline_seeds": "0"}, "baseline_seeds"),
        ("", {"min_count": "9999"}, "None of the 5 classes"),
        ("", {"linear__l2_grid": "(1.0, -1.0)"}, "l2_grid"),
        ("", {"linear__l2_grid": "()"}, "l2_grid"),
        ("", {"linear__tolerance": "0"}, "tolerance"),
        ("", {"batch_size": "0"}, "batch_size"),
        ("", {"bootstrap__resamples": "9"}, "resamples=9 must be at least 10"),
        ("", {"bootstrap__resamples": "1000000000000"}, "resamples=1000000000000 must be at most"),
        ("", {"baseline_seeds": "100000000"}, "baseline_seeds=100000000 must be at most 100"),
        ("", {"seed": "99999999999999999999"}, "seed"),
        ("", {"bootstrap__level": "95"}, "level"),
        ("", {"bootstrap__undefined": "zero"}, "undefined"),
        ("", {"seed": "-1"}, "seed"),
    ],
)
def test_bad_config_is_refused(run, stores, tmp_path, arg, changes, message):
    with pytest.raises(UserError, match=message):
        probe(_config(arg, **changes), tmp_path / "w", str(run), stores["whole"])
    assert not (tmp_path / "w").exists()


def test_command_line(run, stores, tmp_path, capsys):
    arguments = [
        "--config=configs/probe.py:task=ptbxl_super",
        f"--checkpoint={run}/1",
        f"--store={stores['whole']}",
        "--config.bootstrap.resamples=20",
        "--config.linear.l2_grid=(0.1,)",
    ]
    assert cli.main(["probe", *arguments, f"--workdir={tmp_path / 'w'}"]) == 0
    assert "majority guess                    0.500   0.500 to 0.500" in capsys.readouterr().out
    assert json.loads((tmp_path / "w" / "results.json").read_text())["config"]["linear"]["l2_grid"] == [0.1]
    (tmp_path / "file").touch()
    for wrong, message in (
        (f"--workdir={tmp_path / 'file'}", "cannot write into --workdir"),
        ("--config.min_cuont=3", "min_cuont"),
        ("--config=configs/probe.py:task=ptbxl_supper", "ptbxl_super"),
        (f"--checkpoint={run}/7", "no checkpoint at step 7"),
        (f"--store={tmp_path / 'nowhere'}", "no store"),
        ("--workdir=", "--workdir is empty"),
        (f"--workdir={run}", "is a pretraining run; choose another folder"),
        (f"--workdir={stores['whole']}", "is a store; choose another folder"),
    ):
        assert cli.main(["probe", *arguments, f"--workdir={tmp_path / 'v'}", wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "v").exists()


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["probe", "--help"])
    assert exit_.value.code == 0
    assert "confidence intervals by" in capsys.readouterr().out
