"""Label efficiency: the fit of known curves, label saving, subsets, and the command end to end on a synthetic store."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.evaluation import label_efficiency as study
from ecg_jax.evaluation import metrics
from ecg_jax.evaluation.label_efficiency import Curve, FittedCurve, PowerLaw
from ecg_jax.label_efficiency import label_efficiency
from test_linear import FakeStore, made_up

SIZES = np.array([100, 200, 400, 800, 1600, 3200, 6400, 12800])


@pytest.mark.parametrize(
    "law", [PowerLaw(2.0, 0.5, 0.05), PowerLaw(0.5, 0.2, 1e-9), PowerLaw(30.0, 1.2, 0.1)]
)
def test_a_curve_without_noise_is_found_again(law):
    found = study.fit_power_law(SIZES, law.error(SIZES))
    np.testing.assert_allclose(found.error(SIZES), law.error(SIZES), rtol=1e-4)
    np.testing.assert_allclose([found.C, found.a], [law.C, law.a], rtol=0.02)
    assert abs(found.L0 - law.L0) < 2e-3
    between = [150.0, 5000.0]
    np.testing.assert_allclose(found.error(between), law.error(between), rtol=1e-3)
    assert abs(found.records(float(law.error(1000))) - 1000) < 20
    assert found.records(found.L0 / 2) == float("inf")


def test_a_curve_of_noisy_scores_covers_the_truth_with_its_interval():
    law, generator = PowerLaw(1.0, 0.4, 0.05), np.random.default_rng(0)
    truth = 1 - law.error(SIZES)
    seeds = study.draw_seeds(100, 5, seed=0)
    assert seeds.shape == (100, 5)
    assert set(seeds.ravel()) == set(range(5))
    scores = truth[:, None] + generator.normal(0, 0.003, (8, 5))
    resampled = scores + generator.normal(0, 0.004, (100, 1, 1)) + generator.normal(0, 0.001, (100, 8, 5))
    fitted = study.fit_curve(Curve(np.tile(SIZES[:, None], 5), scores, resampled), "macro_auroc", seeds)
    report = fitted.report(0.95)
    for name in ("C", "a", "L0"):
        assert report[f"{name}_low"] <= getattr(law, name) <= report[f"{name}_high"]
        assert report[f"{name}_low"] < report[name] < report[f"{name}_high"]
    assert report["a_high"] - report["a_low"] < 0.5


def test_what_has_no_curve():
    seeds = study.draw_seeds(3, 1, seed=0)
    flat = np.full((8, 1), 0.5)
    assert (
        study.fit_curve(Curve(SIZES[:, None], flat, np.tile(flat, (3, 1, 1))), "macro_auroc", seeds) is None
    )
    few = Curve(SIZES[:3, None], 0.5 + 0.1 * np.arange(3)[:, None], np.full((3, 3, 1), 0.5))
    assert study.fit_curve(few, "macro_auroc", seeds) is None
    with pytest.raises(ValueError, match="needs 4 sizes, not 3"):
        study.fit_power_law(SIZES[:3], [0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="above 0"):
        study.fit_power_law(SIZES, np.zeros(8))


def test_replicates_average_the_drawn_seeds_of_their_own_resample():
    resampled = np.arange(2 * 3 * 2, dtype=float).reshape(2, 3, 2)
    curve = Curve(np.ones((3, 2)), np.ones((3, 2)), resampled)
    means = curve.means(np.array([[0, 0], [0, 1]]))
    np.testing.assert_array_equal(means[0], resampled[0, :, 0])
    np.testing.assert_array_equal(means[1], resampled[1].mean(axis=1))


def test_label_saving_of_a_model_that_needs_a_quarter():
    better, other = PowerLaw(1.0, 0.5, 0.02), PowerLaw(2.0, 0.5, 0.02)  # C 2 n^-0.5 = (n / 4)^-0.5
    fits = [FittedCurve(law, [law] * 30 + [None] * 10) for law in (better, other)]
    entries = study.label_saving(*fits, SIZES, 0.95)
    assert [entry["size"] for entry in entries] == SIZES.tolist()
    for entry in entries[:2]:  # a quarter of these is less than the smallest size
        assert np.isnan(entry["factor"])
        assert "extrapolates: fewer than the 100 records" in entry["undefined"]
        assert np.isnan(entry["low"])
    for entry in entries[2:]:
        np.testing.assert_allclose([entry[k] for k in ("factor", "low", "high")], 0.25, rtol=1e-6)
        assert entry["undefined"] is None
    # Errors below the floor of the better model are never reached.
    high_floor = FittedCurve(dataclasses.replace(better, L0=0.3), fits[0].replicates)
    assert (
        "more than the 12800 records" in study.label_saving(high_floor, fits[1], SIZES, 0.95)[-1]["undefined"]
    )
    # Mostly undefined replicates give no interval, and a model saves nothing against itself.
    (first, *_) = study.label_saving(fits[1], FittedCurve(other, [None] * 40), SIZES, 0.95)
    assert abs(first["factor"] - 1) < 1e-9
    assert np.isnan(first["low"])


def test_regression_errors_are_the_errors_themselves():
    np.testing.assert_allclose(study.errors_of([0.9, 0.8], "macro_auroc"), [0.1, 0.2])
    np.testing.assert_allclose(study.errors_of([0.9, 0.8], "mae"), [0.9, 0.8])
    assert study.errors_of([1.0], "macro_auroc") == 1e-6


@dataclasses.dataclass(frozen=True)
class StoreWithPatients(FakeStore):
    def column(self, name):
        assert name == "patient_id"
        # Three records a patient, and some whose patient is unknown.
        return np.array([f"p{i // 3}" if i < 90 else None for i in range(230)], object)


def test_subsets_are_nested_and_of_whole_patients():
    _, examples = made_up()
    examples = dataclasses.replace(
        examples, train=dataclasses.replace(examples.train, store=StoreWithPatients())
    )
    fractions = (1 / 8, 1 / 2, 1.0)
    small, half, whole = study.patient_subsets(examples, fractions, seed=0)
    assert set(small) < set(half) < set(whole) == set(range(120))
    assert abs(len(half) - 60) <= 3
    assert abs(len(small) - 15) <= 4
    for subset in (small, half):
        patients = set(subset[subset < 90] // 3)
        assert all({3 * p, 3 * p + 1, 3 * p + 2} <= set(subset) for p in patients)
    other = study.patient_subsets(examples, fractions, seed=1)
    assert set(other[1]) != set(half)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_subset_uses_its_own_labels_only_and_guesses_what_it_cannot_learn(kind):
    features, examples = made_up(kind)
    chosen = np.arange(0, 120, 3)
    if kind == "regression":
        examples.train.targets[chosen, 1] = np.nan
    else:
        examples.train.targets[chosen, 1] = 0
    fitted = study.fit_subset(features, examples, chosen, l2_grid=(0.1,))
    assert fitted.report["constant"] == ["class1"]
    assert (fitted.test[:, 1] == fitted.test[0, 1]).all()
    # Labels outside the subset do not matter to the classes that are learned.
    targets = examples.train.targets.copy()
    targets[np.setdiff1d(np.arange(120), chosen)] = 1 - targets[np.setdiff1d(np.arange(120), chosen)]
    changed = dataclasses.replace(examples, train=dataclasses.replace(examples.train, targets=targets))
    again = study.fit_subset(features, changed, chosen, l2_grid=(0.1,))
    np.testing.assert_array_equal(again.test[:, [0, 2]], fitted.test[:, [0, 2]])
    if kind == "multilabel":
        assert metrics.auroc(examples.test.targets, fitted.test)[1] == 0.5
        examples.train.targets[chosen] = 0
        nothing = study.fit_subset(features, examples, chosen, l2_grid=(0.1,))
        assert nothing.report == {"constant": examples.classes, "l2": None, "layers": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory, synthetic_store):
    """A pretraining run of one step."""
    from ecg_jax.pretrain import pretrain

    config = load_config("configs/cpc.py")
    config.store = str(synthetic_store)
    config.model.width, config.model.layers = 16, 1
    config.steps, config.batch_size, config.data.max_val_crops = 1, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(config, workdir)
    return workdir


def _config(features, **changes):
    config = load_config("configs/label_efficiency.py:task=synthetic_rhythm")
    changes = {
        "features": str(features),
        "fractions": "(0.125, 0.25, 0.5, 1.0)",
        "seeds": "2",
        "min_count": "3",
        "baseline_seeds": "2",
        "linear__l2_grid": "(1.0, 0.1)",
        "linear__tolerance": "1e-4",
        "bootstrap__resamples": "20",
        **changes,
    }
    for name, value in changes.items():
        override(config, name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory, run, synthetic_store):
    root = tmp_path_factory.mktemp("study")
    results = label_efficiency(_config(root / "features"), root / "work", [str(run)], synthetic_store)
    return results, root


def test_results_of_a_study(done, run):
    results, root = done
    stored = json.loads((root / "work" / "label_efficiency.json").read_text())
    assert stored == results
    assert (stored["task"], stored["metric"]) == ("synthetic_rhythm", "macro_auroc")
    assert list(stored["models"]) == [run.name, "random_init", "majority"]
    assert stored["sizes"] == sorted(stored["sizes"])
    assert stored["sizes"][-1] == stored["split"]["n_train"]
    for name, model in stored["models"].items():
        assert np.shape(model["scores"]) == (4, 2)
        np.testing.assert_allclose(model["mean"], np.mean(model["scores"], axis=1))
        assert all(low <= high for low, high in zip(model["low"], model["high"], strict=True))
        assert (model["fit"] is None) == (name == "majority")
    # With all records the draws of the subsets agree, those of a random initialisation do not.
    assert len(set(stored["models"][run.name]["scores"][-1])) == 1
    assert len(set(stored["models"]["random_init"]["scores"][-1])) == 2
    assert set(np.ravel(stored["models"]["majority"]["scores"])) == {0.5}
    ((better, others),) = stored["saving"].items()
    ((other, entry),) = others.items()
    assert {better, other} == {run.name, "random_init"}
    assert [each["size"] for each in entry["by_size"]] == stored["sizes"]
    rows = list(csv.DictReader((root / "work" / "label_efficiency.csv").open()))
    assert len(rows) == 3 * 4 * 2
    assert {row["model"] for row in rows} == set(stored["models"])
    first = next(row for row in rows if row["model"] == run.name)
    assert float(first["macro_auroc"]) == stored["models"][run.name]["scores"][0][0]
    assert (root / "work" / "label_efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_finished_fits_and_studies_are_not_repeated(done, run, synthetic_store, tmp_path, monkeypatch):
    results, root = done
    work = tmp_path / "work"
    shutil.copytree(root / "work", work)
    for path in work.glob("label_efficiency.*"):
        path.unlink()
    fits = sorted((work / "fits").glob("*.npz"))
    # Of each model 2 x 3 subsets and all records, of each of the two random encoders in its turn.
    assert len(fits) == 7 + 8
    fits[0].write_bytes(b"damaged")
    calls, original = [], study.fit_subset

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(study, "fit_subset", counting)
    again = label_efficiency(_config(root / "features"), work, [str(run)], synthetic_store)
    assert len(calls) == 1
    assert again["models"] == results["models"]
    assert label_efficiency(_config(root / "features"), work, [str(run)], synthetic_store) == again
    assert len(calls) == 1
    with pytest.raises(UserError, match=r"another study \(other config\)"):
        label_efficiency(_config(root / "features", seed="3"), work, [str(run)], synthetic_store)


def test_the_command_and_its_errors(done, run, synthetic_store, tmp_path, capsys):
    _, root = done
    base = [
        "label-efficiency",
        "--config=configs/label_efficiency.py:task=synthetic_rhythm",
        f"--checkpoint={run}",
    ]
    config = _config(root / "features")
    flags = [
        f"--config.{name}={value}"
        for name, value in {
            "features": config.features, "fractions": config.fractions, "seeds": 2, "min_count": 3,
            "baseline_seeds": 2, "linear.l2_grid": config.linear.l2_grid, "linear.tolerance": 1e-4,
            "bootstrap.resamples": 20,
        }.items()
    ]  # fmt: skip
    where = [f"--store={synthetic_store}", f"--workdir={root / 'work'}"]
    assert cli.main([*base, *flags, *where]) == 0
    out = capsys.readouterr().out
    assert "random_init" in out
    assert "error = " in out
    for wrong, sentence in {
        "--config.fractions=(0.5,2.0)": "--config.fractions=(0.5, 2.0) must be",
        "--config.seeds=0": "--config.seeds=0 must be at least 1",
        "--config.linear.l2_grid=(0.0,)": "--config.linear.l2_grid=(0.0,) must be",
        "--config.linear.solver=sgd": "--config.linear.solver=sgd must be",
        "--config.bootstrap.level=1.5": "--config.bootstrap.level=1.5",
        "--config.linear.layers=top": "There is no layer 'top'",
        f"--checkpoint={run}": "is given twice",
        "--checkpoint=/nowhere": "/nowhere",
        "--config.task=ptbxl_super": "ptbxl_super",
    }.items():
        assert cli.main([*base, *flags, wrong, where[0], f"--workdir={tmp_path / 'new'}"]) == 2, wrong
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new" / "label_efficiency.json").exists()
