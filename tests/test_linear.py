"""The linear probe of a task: choice of penalty, aggregation, regression, saving; ridge against scikit-learn."""

import dataclasses
import json

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation import linear, metrics
from ecg_jax.evaluation.examples import Examples, Part
from ecg_jax.evaluation.linear import LayerFeatures, LinearProbe, fit_linear
from ecg_jax.evaluation.ridge import RidgeProblem
from ecg_jax.evaluation.tasks import Task

GRID = (1.0, 0.1, 0.01)
N = {"train": 120, "val": 60, "test": 50}
CROPS = 3


@dataclasses.dataclass(frozen=True)
class FakeStore:
    path: str = "store"


def _task(kind="multilabel"):
    return Task(name="made_up", corpus="none", label_set="set", group="none", kind=kind)


def made_up(kind="multilabel", seed=0, width=10, n_classes=3, informative="deep"):
    """Examples and features of two layers: `informative` says which of them the targets are made of."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=(width, n_classes))
    parts, arrays, first = {}, {"shallow": [], "deep": []}, 0
    for name, n in N.items():
        own = generator.normal(size=(n, width))
        signal = own @ direction + generator.normal(size=(n, n_classes))
        targets = (signal > 1).astype(float) if kind != "regression" else (signal - 0.3) / 3
        parts[name] = Part(FakeStore(), np.arange(first, first + n), targets)
        for layer, each in arrays.items():
            base = own if layer == informative else generator.normal(size=(n, width))
            crops = np.repeat(base, CROPS, axis=0) + 0.5 * generator.normal(size=(n * CROPS, width))
            each.append(5 * crops + generator.normal())
        first += n
    whole = {layer: np.concatenate(each).astype(np.float32) for layer, each in arrays.items()}

    def of(part, layer):
        crops = (part.rows[:, None] * CROPS + np.arange(CROPS)).ravel()
        return whole[layer][crops], np.repeat(np.arange(len(part.rows)), CROPS)

    scale = (np.full(n_classes, 0.3), np.full(n_classes, 3.0)) if kind == "regression" else None
    classes = [f"class{k}" for k in range(n_classes)]
    examples = Examples(
        **parts,
        task=_task(kind),
        classes=classes,
        descriptions=dict.fromkeys(classes, ""),
        classes_dropped={},
        split={},
        excluded={},
        scale=scale,
    )
    return LayerFeatures(("shallow", "deep"), of), examples


def test_last_layer_l2_and_predictions_averaged_over_crops():
    from scipy.special import expit

    features, examples = made_up()
    fitted = fit_linear(features, examples, l2_grid=GRID)
    report = json.loads(json.dumps(fitted.report, allow_nan=False))
    assert report["layers"] is None
    assert report["metric"] == "macro_auroc"
    assert [entry["l2"] for entry in report["grid"]] == sorted(GRID, reverse=True)
    best = max(report["grid"], key=lambda entry: entry["validation_score"])
    assert (report["l2"], report["validation_score"]) == (best["l2"], best["validation_score"])
    assert report["converged"]
    assert report["validation_score"] == metrics.macro_auroc(examples.val.targets, fitted.val)
    assert metrics.macro_auroc(examples.test.targets, fitted.test) > 0.8
    crops, _ = features.of(examples.test, "deep")
    logits = crops.astype(np.float64) @ fitted.probe.weights["deep"] + fitted.probe.bias
    expected = expit(logits).reshape(N["test"], CROPS, 3).mean(axis=1)
    np.testing.assert_allclose(fitted.test, expected, atol=1e-9)


def test_the_informative_layer_is_chosen_on_validation():
    features, examples = made_up(informative="shallow")
    fitted = fit_linear(features, examples, l2_grid=GRID, layers="all")
    about = fitted.report["layers"]
    assert about["chosen"] == "shallow"
    assert set(about["validation"]) == {"shallow", "deep"}
    assert about["validation"]["shallow"] > 0.8 > about["validation"]["deep"]
    named = fit_linear(features, examples, l2_grid=GRID, layers="shallow")
    np.testing.assert_array_equal(named.test, fitted.test)
    assert named.report["layers"] == {
        "chosen": "shallow",
        "validation": {"shallow": about["validation"]["shallow"]},
    }
    # Test targets must not matter to any choice.
    shuffled = dataclasses.replace(
        examples, test=dataclasses.replace(examples.test, targets=1 - examples.test.targets)
    )
    np.testing.assert_array_equal(
        fit_linear(features, shuffled, l2_grid=GRID, layers="all").test, fitted.test
    )


def test_both_solvers_find_the_same_head():
    features, examples = made_up()
    one, other = (
        fit_linear(features, examples, l2_grid=GRID, tolerance=1e-8, solver=solver)
        for solver in ("lbfgs", "vmap")
    )
    assert (one.report["solver"], other.report["solver"]) == ("lbfgs", "vmap")
    assert one.report["l2"] == other.report["l2"]
    np.testing.assert_allclose(one.test, other.test, atol=1e-6)


def test_regression_with_unknown_values_predicts_z_scores():
    features, examples = made_up("regression")
    examples.train.targets[::4, 0] = np.nan
    examples.val.targets[:, 2] = np.nan
    fitted = fit_linear(features, examples, l2_grid=(1e-4, 1e-2, 1e3), layers="all")
    assert fitted.report["metric"] == "mae"
    assert fitted.report["solver"] == "closed form"
    assert fitted.report["layers"]["chosen"] == "deep"
    assert fitted.report["l2"] < 1e3
    known = np.nanmean(metrics.mean_absolute_error(examples.val.targets, fitted.val)[0])
    assert fitted.report["validation_score"] == known
    assert min(entry["validation_score"] for entry in fitted.report["grid"]) == known
    error = metrics.mean_absolute_error(examples.test.targets, fitted.test)[0]
    nothing = metrics.mean_absolute_error(examples.test.targets, np.zeros_like(fitted.test))[0]
    assert (error < 0.75 * nothing).all()


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
@pytest.mark.parametrize("layers", ["last", "mixture"])
def test_a_saved_probe_predicts_the_same(tmp_path, kind, layers):
    features, examples = made_up(kind)
    fitted = fit_linear(features, examples, l2_grid=(0.1,), layers=layers)
    fitted.probe.save(tmp_path / "probe.npz")
    probe = LinearProbe.load(tmp_path / "probe.npz")
    assert probe.classes == ("class0", "class1", "class2")
    assert (probe.kind, probe.scale is None) == (kind, kind != "regression")
    crops = {name: features.of(examples.test, name)[0] for name in probe.weights}
    predicted = probe.predict(crops).reshape(N["test"], CROPS, 3).mean(axis=1)
    np.testing.assert_allclose(predicted, fitted.test, atol=1e-12)
    assert list(probe.weights) == (["deep"] if layers == "last" else ["shallow", "deep"])


def test_a_file_that_is_no_probe(tmp_path):
    with pytest.raises(UserError, match="There is no linear probe"):
        LinearProbe.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(UserError, match="is not a linear probe"):
            LinearProbe.load(tmp_path / name)


def test_a_full_memory_is_no_damaged_file(tmp_path, monkeypatch):
    features, examples = made_up()
    fit_linear(features, examples, l2_grid=(0.1,)).probe.save(tmp_path / "probe.npz")

    def full(path):
        raise MemoryError

    monkeypatch.setattr(np, "load", full)
    with pytest.raises(MemoryError):
        LinearProbe.load(tmp_path / "probe.npz")


def test_what_cannot_be_chosen_is_said():
    features, examples = made_up()
    examples.val.targets[:] = 0
    with pytest.raises(UserError, match="no class has both positives and negatives among the 60 validation"):
        fit_linear(features, examples, l2_grid=GRID)
    features, examples = made_up("regression")
    examples.val.targets[:] = np.nan
    with pytest.raises(UserError, match="no target is known"):
        fit_linear(features, examples, l2_grid=GRID)
    features, examples = made_up()
    with pytest.raises(ValueError, match="layers='top'"):
        fit_linear(features, examples, l2_grid=GRID, layers="top")
    with pytest.raises(ValueError, match="solver='sgd'"):
        fit_linear(features, examples, l2_grid=GRID, solver="sgd")


def test_cached_features_of_two_stores(tmp_path, monkeypatch):
    """Layers to compute by what is asked for; the test part may be of another store."""
    asked = []

    class Encoder:
        run = "runs/one"

    shapes = {"stem": (5, 4), "block0": (5, 8), "layer0": (5, 8), "tokens": (5, 8)}
    monkeypatch.setattr(linear, "layer_shapes", lambda encoder: shapes)
    monkeypatch.setattr(linear, "layer_names", lambda encoder: ("stem", "block0", "tokens"))

    class Pooled:
        def __init__(self, store):
            self.store = store

        def of(self, rows, layer):
            return self.store.path, layer

    class Cache:
        def pooled(self, encoder, store, names, batch_size, label, rows):
            asked.append((store.path, names, len(rows)))
            return Pooled(store)

    _, examples = made_up()
    examples = dataclasses.replace(
        examples, test=dataclasses.replace(examples.test, store=FakeStore("other"))
    )
    for layers, names in {
        "last": ("tokens",),
        "all": ("stem", "block0", "tokens"),
        "mixture": ("block0", "tokens"),
        "layer0": ("layer0",),
    }.items():
        features = linear.cached_features(Cache(), Encoder(), examples, layers)
        assert features.layers == names
        assert asked[-2:] == [("store", names, N["train"] + N["val"]), ("other", names, N["test"])]
        assert features.of(examples.val, names[0]) == ("store", names[0])
        assert features.of(examples.test, names[0]) == ("other", names[0])
    assert len(asked) == 8
    with pytest.raises(UserError, match="no layer 'block9' in the encoder of runs/one"):
        linear.cached_features(Cache(), Encoder(), examples, "block9")


def test_ridge_equals_sklearn_with_weights_and_unknown_values():
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(0)
    features = (generator.normal(size=(200, 8)) @ generator.normal(size=(8, 8)) + 100).astype(np.float32)
    targets = features @ generator.normal(size=(8, 3)) + generator.normal(size=(200, 3)) + 50
    targets[::3, 1] = np.nan
    weights = generator.random(200) + 0.5
    problem = RidgeProblem(features, targets, weights)
    standard = (features - problem.mean) / problem.scale
    solutions = {solution.l2: solution for solution in problem.path((0.01, 1.0))}
    assert list(solutions) == [1.0, 0.01]
    for l2, solution in solutions.items():
        assert solution.converged
        for k in range(3):
            known = ~np.isnan(targets[:, k])
            reference = Ridge(alpha=l2 * weights[known].sum(), solver="cholesky")
            reference.fit(standard[known], targets[known, k], weights[known])
            np.testing.assert_allclose(
                solution.head.logits(features)[:, k], reference.predict(standard), rtol=1e-8
            )


def test_ridge_refuses_what_it_cannot_fit():
    features, targets = np.zeros((4, 2)), np.full((4, 1), np.nan)
    targets[0] = 1
    with pytest.raises(ValueError, match=r"targets \[0\] are known for fewer than two"):
        RidgeProblem(features, targets)
    with pytest.raises(ValueError, match=r"need targets \[4, K\]"):
        RidgeProblem(features, np.zeros(4))
    constant = RidgeProblem(np.ones((4, 2)), np.arange(4.0)[:, None]).solve(0.1)
    np.testing.assert_allclose(constant.head.logits(np.ones((1, 2))), [[1.5]])
    with pytest.raises(ValueError, match="above 0"):
        RidgeProblem(np.ones((4, 2)), np.arange(4.0)[:, None]).solve(0.0)
