"""Label efficiency: the fit of known curves, label saving, subsets, and the command end to end on a synthetic store."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax import label_efficiency as command
from ecg_jax.config_flags import load_config, override
from ecg_jax.errors import UserError
from ecg_jax.evaluation import label_efficiency as study
from ecg_jax.evaluation import metrics
from ecg_jax.evaluation.label_efficiency import Curve, FittedCurve, PowerLaw
from ecg_jax.evaluation.label_efficiency_table import saving_in_words, summary
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
    scores = truth[:, None] + generator.normal(0, 0.003, (8, 5))
    resampled = scores + generator.normal(0, 0.004, (100, 1, 1)) + generator.normal(0, 0.001, (100, 8, 5))
    curve = Curve(np.tile(SIZES[:, None], 5), scores, resampled)
    report = study.fit_curve(curve, "macro_auroc", seed=0).report(0.95)
    for name in ("C", "a", "L0"):
        assert report[f"{name}_low"] <= getattr(law, name) <= report[f"{name}_high"]
        assert report[f"{name}_low"] < report[name] < report[f"{name}_high"]
    assert report["a_high"] - report["a_low"] < 0.7


def test_intervals_of_five_seeds_cover_the_mean_of_all():
    """Without noise of patients: 95 % of the intervals, where bootstrapped seeds would cover 83 %."""
    generator = np.random.default_rng(0)
    scores = 0.8 + 0.01 * generator.normal(size=(1000, 5))  # 1000 studies as "sizes"
    curve = Curve(np.ones((1000, 5)), scores, np.broadcast_to(scores, (400, 1000, 5)))
    covered = np.mean([end.low <= 0.8 <= end.high for end in curve.intervals(0, 0.95)])
    assert 0.925 < covered < 0.97
    single = Curve(np.ones((4, 1)), scores[:4, :1], np.broadcast_to(scores[:4, :1], (50, 4, 1)))
    assert all(end.low == end.high == end.point for end in single.intervals(0, 0.95))


def test_replicates_of_models_on_the_same_seeds_deviate_together():
    generator = np.random.default_rng(0)
    law, subsets = PowerLaw(1.0, 0.5, 0.02), np.exp(0.1 * generator.normal(size=(8, 5)))
    first, second = (
        study.Curve(np.tile(SIZES[:, None], 5), 1 - e, np.broadcast_to(1 - e, (200, 8, 5)))
        for e in (law.error(SIZES)[:, None] * subsets, 0.8 * law.error(SIZES)[:, None] * subsets)
    )
    ours, theirs = (curve.replicates("macro_auroc", 0) for curve in (first, second))
    np.testing.assert_allclose(theirs / ours, 0.8, rtol=1e-9)
    spread = np.log(ours).std(axis=0)
    expected = np.log(subsets).std(axis=1, ddof=1) / np.sqrt(5)
    assert (spread > expected).all()  # Student's t is wider than normal
    assert (spread < 2.5 * expected).all()


def test_what_has_no_curve():
    flat = np.full((8, 1), 0.5)
    assert study.fit_curve(Curve(SIZES[:, None], flat, np.tile(flat, (3, 1, 1))), "macro_auroc", 0) is None
    few = Curve(SIZES[:3, None], 0.5 + 0.1 * np.arange(3)[:, None], np.full((3, 3, 1), 0.5))
    assert study.fit_curve(few, "macro_auroc", 0) is None
    with pytest.raises(ValueError, match="needs 4 sizes, not 3"):
        study.fit_power_law(SIZES[:3], [0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="above 0"):
        study.fit_power_law(SIZES, np.zeros(8))


def test_label_saving_of_a_model_that_needs_a_quarter():
    better, other = PowerLaw(1.0, 0.5, 0.02), PowerLaw(2.0, 0.5, 0.02)  # C 2 n^-0.5 = (n / 4)^-0.5
    fits = [FittedCurve(law, [law] * 30 + [None] * 10) for law in (better, other)]
    entries = study.label_saving(*fits, SIZES, 0.95)
    assert [entry["size"] for entry in entries] == SIZES.tolist()
    for entry in entries[:2]:  # a quarter of these is less than the smallest size
        assert np.isnan([entry[k] for k in ("factor", "labels", "low", "high")]).all()
        assert [entry[f"{k}_open"] for k in ("factor", "low", "high")] == ["<", "<", "<"]
        assert "extrapolates: fewer than the 100 records" in entry["undefined"]
        assert entry["least"] == 100 / entry["size"]
    for entry in entries[2:]:
        np.testing.assert_allclose([entry[k] for k in ("factor", "low", "high")], 0.25, rtol=1e-6)
        assert [entry[f"{k}_open"] for k in ("factor", "low", "high")] == [None] * 3
        assert entry["undefined"] is None
    # Errors below the floor of the better model are never reached.
    high_floor = FittedCurve(dataclasses.replace(better, L0=0.3), fits[0].replicates)
    last = study.label_saving(high_floor, fits[1], SIZES, 0.95)[-1]
    assert "more than the 12800 records" in last["undefined"]
    assert (last["factor_open"], last["low_open"], last["most"]) == (">", None, 1.0)
    # Mostly undefined resamples give no interval, and a model saves nothing against itself.
    (first, *_, last) = study.label_saving(fits[1], FittedCurve(other, [None] * 40), SIZES, 0.95)
    for entry in (first, last):
        assert abs(entry["factor"] - 1) < 1e-9
        assert np.isnan(entry["low"])
        assert entry["low_open"] is entry["high_open"] is None


def test_an_interval_that_leaves_the_measured_sizes_is_open_and_otherwise_the_quantiles_of_all_replicates():
    """Factors whose 95 % interval is 0.087 to 1.18 whatever the size: cut off, not drawn together, at 1 and 1/4."""
    generator = np.random.default_rng(0)
    # Of curves without a floor the factor is (C of the better / C of the other)^(1 / a).
    factors = 0.32 * np.exp(2 / 3 * generator.normal(size=400))
    other = PowerLaw(2.0, 0.5, 1e-12)
    drawn = [PowerLaw(2.0 * factor**0.5, 0.5, 1e-12) for factor in factors]
    better = FittedCurve(PowerLaw(2.0 * 0.32**0.5, 0.5, 1e-12), drawn)
    by_size = {
        entry["size"]: entry
        for entry in study.label_saving(better, FittedCurve(other, [other] * 400), SIZES, 0.95)
    }
    low, high = np.quantile(factors, [0.025, 0.975])
    assert low < 0.1
    assert high > 1.05
    for entry in by_size.values():
        # What is not measured is not said, and what is said does not depend on the size.
        closed_low, closed_high = low > entry["least"], high < entry["most"]
        assert entry["low_open"] == (None if closed_low else "<")
        assert entry["high_open"] == (None if closed_high else ">")
        np.testing.assert_allclose(entry["low"], low if closed_low else np.nan, rtol=1e-6)
        np.testing.assert_allclose(entry["high"], high if closed_high else np.nan, rtol=1e-6)
    assert by_size[12800]["high_open"] == ">"
    assert by_size[12800]["factor"] == pytest.approx(0.32)
    assert by_size[400]["low_open"] == "<"
    assert by_size[1600]["low_open"] is by_size[1600]["high_open"] is None


def test_open_and_undefined_ends_are_said():
    entry = {
        "size": 400, "factor": 0.5, "low": None, "high": None, "least": 0.25, "most": 4.0,
        "factor_open": None, "low_open": "<", "high_open": ">",
    }  # fmt: skip
    line = saving_in_words("cpc", "random_init", {"by_size": [entry]})
    assert line == "cpc needs 0.5 (< 0.25 to > 4) of the 400 training records that random_init needs"
    beyond = entry | {"factor": None, "factor_open": ">", "low_open": None, "low": 1.5}
    assert "needs > 4 (1.5 to > 4)" in saving_in_words("a", "b", {"by_size": [beyond]})
    nothing = entry | {"low_open": None, "high_open": None}
    assert "(undefined to undefined)" in saving_in_words("a", "b", {"by_size": [nothing]})
    fit = {"C": 1.0, "a": 0.5, "L0": 0.1} | dict.fromkeys(("a_low", "a_high", "L0_low", "L0_high"))
    results = {
        "task": "t", "metric": "mae", "config": {"seeds": 1}, "sizes": [1], "validation": "all",
        "models": {"cpc": {"mean": [None], "fit": fit}}, "saving": {},
    }  # fmt: skip
    assert "a undefined to undefined" in summary(results)


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
        examples.train.targets[0, 1] = 0.7
    else:
        examples.train.targets[chosen, 1] = 0
    fitted = study.fit_subset(features, examples, chosen, l2_grid=(0.1,))
    assert fitted.report["constant"] == ["class1"]
    assert (fitted.test[:, 1] == (0.7 if kind == "regression" else 0)).all()
    # Labels outside the subset do not matter to anything.
    targets = examples.train.targets.copy()
    targets[np.setdiff1d(np.arange(120), chosen)] = 1 - targets[np.setdiff1d(np.arange(120), chosen)]
    changed = dataclasses.replace(examples, train=dataclasses.replace(examples.train, targets=targets))
    again = study.fit_subset(features, changed, chosen, l2_grid=(0.1,))
    np.testing.assert_array_equal(again.test, fitted.test)
    if kind == "multilabel":
        assert metrics.auroc(examples.test.targets, fitted.test)[1] == 0.5
        examples.train.targets[chosen] = 0
        nothing = study.fit_subset(features, examples, chosen, l2_grid=(0.1,))
        assert nothing.report == {"constant": examples.classes, "l2": None, "layers": None}
        assert (nothing.test == 0).all()
        examples.train.targets[chosen] = np.nan
        assert (study.fit_subset(features, examples, chosen, l2_grid=(0.1,)).test == 0.5).all()


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
        "near_duplicates": "False",
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
    assert list(stored["models"]) == [run.name, "random_init", "ecg_features", "majority"]
    verdict = stored["leakage"][run.name]
    assert "test recordings" in verdict["verdict"]
    assert verdict["pretraining"]["fingerprint"] == stored["store"]["fingerprint"]
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
    assert len(set(stored["models"]["ecg_features"]["scores"][-1])) == 1
    assert set(np.ravel(stored["models"]["majority"]["scores"])) == {0.5}
    pairs = {frozenset((better, other)) for better, of in stored["saving"].items() for other in of}
    assert len(pairs) == 3
    for others in stored["saving"].values():
        for entry in others.values():
            assert [each["size"] for each in entry["by_size"]] == stored["sizes"]
    rows = list(csv.DictReader((root / "work" / "label_efficiency.csv").open()))
    assert len(rows) == 4 * 4 * 2
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
    assert len(fits) == 7 + 8 + 7
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
    # Corrected labels in the same store: neither the results nor the fits are those of the old ones.
    stored = json.loads((work / "label_efficiency.json").read_text())
    stored["store"]["table"] = "0" * 64
    (work / "label_efficiency.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"another study \(other store\)"):
        label_efficiency(_config(root / "features"), work, [str(run)], synthetic_store)
    (work / "label_efficiency.json").unlink()
    choose = command.choose_examples

    def corrected(*args):
        examples = choose(*args)
        examples.train.targets[0, 0] = 1 - examples.train.targets[0, 0]
        return examples

    def fitted_anew(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "choose_examples", corrected)
        patched.setattr(study, "fit_subset", fitted_anew)
        with pytest.raises(KeyboardInterrupt):
            label_efficiency(_config(root / "features"), work, [str(run)], synthetic_store)
    shutil.copy(root / "work" / "label_efficiency.json", work)
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
            "near_duplicates": False, "linear.l2_grid": config.linear.l2_grid, "linear.tolerance": 1e-4,
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
