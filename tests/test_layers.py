"""A learned mixture of layers: its gradient, the weights it finds, and that it is a head on the raw layers."""

import numpy as np
import pytest

from ecg_jax.evaluation import layers as layers_module
from ecg_jax.evaluation.heads import LogisticProblem
from ecg_jax.evaluation.layers import Mixture, _softmax
from ecg_jax.evaluation.linear import fit_linear
from test_linear import made_up


def _data(regression, n=300, width=6, seed=0):
    generator = np.random.default_rng(seed)
    layers = {name: (generator.normal(size=(n, width)) * 3 + 1).astype(np.float32) for name in "abc"}
    hidden = (0.7 * layers["a"] + 0.3 * layers["b"]) @ generator.normal(size=(width, 2)) / 3
    hidden = hidden - hidden.mean(axis=0) + generator.normal(size=(n, 2))
    targets = hidden if regression else (hidden > 0).astype(float)
    targets[::5, 1] = np.nan
    return layers, targets, generator.random(n) + 0.5


@pytest.mark.parametrize("regression", [False, True])
def test_the_gradient_is_that_of_the_best_head_for_each_mixture(regression):
    layers, targets, weights = _data(regression)
    mixture, l2, s = Mixture(layers, targets, weights, regression), 0.05, np.array([0.5, 0.2, 0.3])

    def best(s):
        return mixture._gradient(s, mixture._solve(s, l2, None, 1e-10, 1000).head, l2)

    _, gradient = best(s)
    step = 1e-4
    for i in range(3):
        moved = step * (np.arange(3) == i)
        slope = (best(s + moved)[0] - best(s - moved)[0]) / (2 * step)
        assert abs(slope - gradient[i]) < 1e-4 * max(1.0, abs(gradient[i]))
    # The penalty is that of the solver: its own objective at its solution.
    if not regression:
        assert abs(best(s)[0] - mixture._solve(s, l2, None, 1e-10, 1000).objective) < 1e-6


@pytest.mark.parametrize("regression", [False, True])
def test_the_mixture_finds_the_layers_that_matter(regression):
    layers, targets, weights = _data(regression, n=1500)
    strong, weak = Mixture(layers, targets, weights, regression).path((1.0, 1e-3))
    assert (strong.solution.l2, weak.solution.l2) == (1.0, 1e-3)
    assert abs(sum(weak.mixture.values()) - 1) < 1e-12
    assert weak.mixture["a"] > weak.mixture["b"] > weak.mixture["c"]
    assert abs(weak.mixture["a"] - 0.7) < 0.1
    assert weak.mixture["c"] < 0.1


def test_weights_on_the_raw_layers_are_the_same_function():
    layers, targets, weights = _data(False)
    mixture = Mixture(layers, targets, weights, False)
    (fit,) = mixture.path((0.1,))
    s = np.array([fit.mixture[name] for name in mixture.names])
    expected = fit.solution.head.logits(mixture._mixed(s))
    got = sum(layers[name].astype(np.float64) @ fit.weights[name] for name in layers) + fit.bias
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_mixture_of_one_layer_is_that_layer():
    layers, targets, weights = _data(False)
    (fit,) = Mixture({"a": layers["a"]}, targets, weights, False).path((0.1,), tolerance=1e-9)
    alone = LogisticProblem(layers["a"], targets, weights).solve(0.1, tolerance=1e-9)
    assert fit.mixture == {"a": 1.0}
    got = layers["a"].astype(np.float64) @ fit.weights["a"] + fit.bias
    np.testing.assert_allclose(got, alone.head.logits(layers["a"]), atol=1e-4)


def test_layers_of_other_widths_are_refused():
    layers, targets, weights = _data(False)
    layers["b"] = layers["b"][:, :3]
    with pytest.raises(ValueError, match="one width"):
        Mixture(layers, targets, weights, False)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_probe_of_a_mixture_reports_its_weights(kind):
    features, examples = made_up(kind, informative="shallow")
    fitted = fit_linear(features, examples, l2_grid=(1.0, 0.01), layers="mixture")
    about = fitted.report["layers"]
    assert about["chosen"] == "mixture"
    assert about["weights"]["shallow"] > 0.7
    assert about["validation"] == {"mixture": fitted.report["validation_score"]}
    assert about["converged"]
    assert fitted.report["converged"]


def test_weights_that_ran_out_of_steps_are_said(monkeypatch):
    features, examples = made_up(informative="shallow")
    monkeypatch.setattr(layers_module, "_EVALUATIONS", 1)
    report = fit_linear(features, examples, l2_grid=(0.01,), layers="mixture").report
    assert report["grid"][0]["converged"]  # the head did
    assert not report["layers"]["converged"]
    assert not report["converged"]


def test_softmax_of_large_numbers():
    np.testing.assert_allclose(_softmax(np.array([1000.0, 1000.0])), [0.5, 0.5])
