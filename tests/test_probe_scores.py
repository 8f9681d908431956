"""What a probe says about its scores: each number again from its definition, and which resamples it rests on."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from ecg_jax.errors import UserError
from ecg_jax.evaluation.challenge_score import binarise, challenge_score, tune_thresholds
from ecg_jax.evaluation.examples import Fitted
from ecg_jax.evaluation.probe_scores import Baselines, Scores, Settings, check_scorable, majority_guess
from ecg_jax.evaluation.tasks import get_task

SETTINGS = Settings(
    unit="patient", resamples=50, level=0.9, interval="percentile", undefined="exclude", seed=3
)


def _examples(task, classes, seed=0, n=60):
    """Random targets of three parts; half the test records share a patient with another one."""
    rng = np.random.default_rng(seed)
    task = get_task(task)

    def part(patients):
        size = (len(patients), len(classes))
        targets = rng.normal(size=size) if task.kind == "regression" else rng.integers(0, 2, size) * 1.0
        targets[0] = np.nan
        ids = np.array(patients, dtype=object)
        return SimpleNamespace(targets=targets, rows=np.arange(len(patients)), column=lambda name: ids)

    return SimpleNamespace(
        train=part([None] * n),
        val=part([None] * n),
        test=part([f"p{i // 2}" for i in range(n)]),
        task=task,
        classes=list(classes),
        descriptions={name: f"about {name}" for name in classes},
        scale=(np.full(len(classes), 50.0), np.full(len(classes), 10.0)),
    )


def _scores(examples, settings=SETTINGS, seeds=2, mode="linear"):
    rng = np.random.default_rng(1)
    shape = examples.test.targets.shape
    noisy = [
        1 / (1 + np.exp(-(np.nan_to_num(examples.test.targets) - 0.5 + rng.normal(size=shape))))
        for _ in range(seeds + 2)
    ]
    val = rng.uniform(size=examples.val.targets.shape)
    baselines = Baselines(np.stack(noisy[2:]), "linear", noisy[1], majority_guess(examples))
    fitted = Fitted(val, noisy[0], {})
    return Scores(examples, fitted, mode, baselines, settings), fitted, baselines


def test_every_number_of_a_classification_follows_from_the_predictions():
    examples = _examples("ptbxl_super", ["A", "B", "C"])
    scores, fitted, baselines = _scores(examples)
    report, known = scores.report(), slice(1, None)
    truth, guess = examples.test.targets[known], fitted.test[known]
    auroc = [roc_auc_score(truth[:, k], guess[:, k]) for k in range(3)]
    assert report["macro_auroc"] == pytest.approx(np.mean(auroc), abs=1e-12)
    assert report["ci_low"] < report["macro_auroc"] < report["ci_high"]
    for k, name in enumerate(examples.classes):
        entry = report["per_class"][name]
        assert entry["auroc"] == pytest.approx(auroc[k], abs=1e-12)
        precision = average_precision_score(truth[:, k], guess[:, k])
        assert entry["average_precision"] == pytest.approx(precision, abs=1e-12)
        assert entry["brier"] == pytest.approx(np.mean((truth[:, k] - guess[:, k]) ** 2), abs=1e-12)
        assert (entry["n_pos"], entry["n_neg"]) == (truth[:, k].sum(), (1 - truth[:, k]).sum())
        assert entry["description"] == f"about {name}"
    twins = [
        np.mean([roc_auc_score(truth[:, k], p[known][:, k]) for k in range(3)]) for p in baselines.random_init
    ]
    random = report["baselines"]["random_init"]
    assert random["macro_auroc"] == pytest.approx(np.mean(twins), abs=1e-12)
    assert [(s["seed"], s["macro_auroc"]) for s in random["seeds"]] == [
        (3, pytest.approx(twins[0])),
        (4, pytest.approx(twins[1])),
    ]
    difference = report["difference_to_random_init"]
    assert difference["macro_auroc"] == pytest.approx(np.mean(auroc) - np.mean(twins), abs=1e-12)
    assert 0 < difference["p_value"] <= 1
    assert report["baselines"]["majority"]["macro_auroc"] == 0.5
    assert set(report["metrics"]) == {"macro_auroc", "macro_auprc", "brier", "ece", "micro_auroc", "fmax"}
    assert report["bootstrap"]["unit"] == "patient"
    assert report["n_patients"] == 30


def test_bca_intervals_are_others_around_the_same_points():
    examples = _examples("ptbxl_super", ["A", "B"])
    percentile = _scores(examples)[0].report()
    bca = _scores(examples, Settings("patient", 50, 0.9, "bca", "exclude", 3))[0].report()
    assert bca["macro_auroc"] == percentile["macro_auroc"]
    assert bca["bootstrap"]["interval"] == "bca"
    assert (bca["ci_low"], bca["ci_high"]) != (percentile["ci_low"], percentile["ci_high"])


def test_undefined_classes_are_listed_and_legacy_counts_them_half():
    examples = _examples("ptbxl_super", ["A", "B"])
    examples.test.targets[1:, 1] = 0.0
    report = _scores(examples)[0].report()
    assert report["classes_undefined_in_test"] == ["B"]
    assert report["macro_auroc"] == report["per_class"]["A"]["auroc"]
    assert report["bootstrap"]["unit"] == "patient"
    legacy = _scores(examples, Settings("record", 50, 0.9, "percentile", "half", 3))[0].report()
    assert legacy["macro_auroc"] == pytest.approx((report["macro_auroc"] + 0.5) / 2)
    assert legacy["bootstrap"]["unit"] == "record"
    examples.test.targets[1:, 0] = 1.0
    with pytest.raises(UserError, match="No class of task ptbxl_super has both"):
        check_scorable(examples)


def test_challenge_scores_take_their_thresholds_from_the_validation_records():
    codes = ["426783006", "164889003", "270492004", "000"]
    examples = _examples("georgia", codes)
    scores, fitted, _ = _scores(examples)
    report = scores.report()
    for year in (2020, 2021):
        cuts = tune_thresholds(year, codes, examples.val.targets, fitted.val)
        expected = challenge_score(
            year, codes, examples.test.targets, binarise(year, codes, fitted.test, cuts)
        )
        assert report["metrics"][f"challenge_{year}"]["point"] == pytest.approx(expected, abs=1e-12)
    examples = _examples("georgia", ["000", "001"])
    assert not any("challenge" in name for name in _scores(examples)[0].report()["metrics"])


def test_every_number_of_a_regression_follows_from_the_predictions():
    examples = _examples("mimic_labs", ["sodium", "ferritin"])
    examples.test.targets[:, 1] = np.nan
    scores, fitted, _ = _scores(examples)
    report, truth = scores.report(), examples.test.targets[1:, 0]
    error = np.mean(np.abs(truth - fitted.test[1:, 0]))
    assert report["mae"] == pytest.approx(error, abs=1e-12)
    entry = report["per_class"]["sodium"]
    assert entry["r2"] == pytest.approx(r2_score(truth, fitted.test[1:, 0]), abs=1e-12)
    assert (entry["mean"], entry["sd"], entry["n"]) == (50.0, 10.0, 59)
    assert report["classes_undefined_in_test"] == ["ferritin"]
    median = np.nanmedian(examples.train.targets[:, 0])
    assert report["baselines"]["majority"]["mae"] == pytest.approx(np.mean(np.abs(truth - median)), abs=1e-12)
    examples.test.targets[:] = np.nan
    with pytest.raises(UserError, match="No number of task mimic_labs is known for the 60 test records"):
        check_scorable(examples)


def test_what_is_trained_end_to_end_is_not_compared_with_a_linear_probe():
    examples = _examples("ptbxl_super", ["A", "B"])
    scores = _scores(examples, mode="finetune")[0]
    assert scores.report()["difference_to_random_init"] is None
    assert list(scores.picture()["models"]) == ["pretrained", "random initialisation, linear"]
    assert next(iter(_scores(examples, mode="supervised")[0].picture()["macro"])) == "from scratch"


def test_nothing_to_choose_by_is_told_before_anything_is_fitted():
    examples = _examples("ptbxl_super", ["A"])
    examples.val.targets[1:] = 0.0
    with pytest.raises(UserError, match="among the 60 validation records"):
        check_scorable(examples)
