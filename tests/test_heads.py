"""The convex probe: gradient, agreement with scikit-learn, standardisation, choice of l2; golden heads."""

import numpy as np
import pytest

from conftest import load_golden
from ecg_jax.evaluation import fit_together, heads, metrics

GOLDEN = load_golden("heads")
LINEAR_HEADS = {  # group -> names of its projection after the mean over time
    "mean_linear": ("head.weight", "head.bias"),
    "mlp_pooled": ("head.proj.3.weight", "head.proj.3.bias"),
}


@pytest.mark.parametrize("group", sorted(LINEAR_HEADS))
def test_golden_linear_head_on_pooled_features(group):
    """A linear head is applied to features averaged over time, which is what this package caches."""
    weight, bias = (GOLDEN[f"{group}/sd/{name}"].astype(np.float64) for name in LINEAR_HEADS[group])
    features = GOLDEN[f"{group}/in/x"].astype(np.float64).mean(axis=1)
    head = heads.LinearHead(weight.T, bias)
    expected = GOLDEN[f"{group}/out/y"]
    np.testing.assert_allclose(head.logits(features), expected, atol=1e-9 * np.abs(expected).max())


def _data(n=400, width=12, n_classes=3, seed=0):
    """Correlated features with offsets, as an encoder gives them, and classes from common to rare."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) * np.logspace(0, -3, width)[:, None]
    features = (generator.normal(size=(n, width)) @ mixing + 5 * generator.normal(size=width)).astype(
        np.float32
    )
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = standard @ generator.normal(size=(width, n_classes)) + np.linspace(0, -3, n_classes)
    return features, (generator.random((n, n_classes)) < 1 / (1 + np.exp(-logits))).astype(float)


def test_gradient_equals_finite_differences():
    features, targets = _data(n=60, width=5)
    targets[::7, 1] = np.nan
    weights = np.random.default_rng(0).random(60) + 0.5
    problem = heads.LogisticProblem(features, targets, weights)
    generator = np.random.default_rng(1)
    weight, bias = generator.normal(size=(5, 3)), generator.normal(size=3)
    _, weight_gradient, bias_gradient = problem.objective(weight, bias, l2=0.3)

    def value(weight, bias):
        return problem.objective(weight, bias, l2=0.3)[0]

    step = 1e-6
    for d, k in np.ndindex(5, 3):
        moved = np.zeros((5, 3))
        moved[d, k] = step
        slope = (value(weight + moved, bias) - value(weight - moved, bias)) / (2 * step)
        assert abs(slope - weight_gradient[d, k]) < 1e-8
    for k in range(3):
        moved = step * (np.arange(3) == k)
        slope = (value(weight, bias + moved) - value(weight, bias - moved)) / (2 * step)
        assert abs(slope - bias_gradient[k]) < 1e-8


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_equals_sklearn_at_the_same_penalty(l2):
    from sklearn.linear_model import LogisticRegression

    features, targets = _data()
    problem = heads.LogisticProblem(features, targets)
    solution = problem.solve(l2, tolerance=1e-9)
    assert solution.converged
    standard = (features.astype(np.float64) - problem.mean) / problem.scale
    for k in range(3):
        reference = LogisticRegression(
            C=1 / (l2 * len(features)), tol=1e-12, max_iter=1000, solver="newton-cholesky"
        )
        reference.fit(standard, targets[:, k])
        np.testing.assert_allclose(
            solution.head.logits(features)[:, k], reference.decision_function(standard), atol=1e-6
        )


def test_sample_weights_equal_repeated_rows():
    features, targets = _data(n=120)
    repeats = np.random.default_rng(0).integers(1, 4, 120)
    weighted = heads.LogisticProblem(features, targets, repeats).solve(0.01, tolerance=1e-9)
    repeated = heads.LogisticProblem(features.repeat(repeats, axis=0), targets.repeat(repeats, axis=0)).solve(
        0.01, tolerance=1e-9
    )
    np.testing.assert_allclose(weighted.head.logits(features), repeated.head.logits(features), atol=1e-5)


def test_unknown_targets_leave_the_record_out_of_that_class_only():
    features, targets = _data(n=200)
    problem = heads.LogisticProblem(features, targets)
    masked = targets.copy()
    masked[150:, 1] = np.nan
    whole = problem.solve(0.1, tolerance=1e-9).head.logits(features)
    part = heads.LogisticProblem(features, masked).solve(0.1, tolerance=1e-9).head.logits(features)
    np.testing.assert_allclose(part[:, [0, 2]], whole[:, [0, 2]], atol=1e-6)
    assert np.abs(part[:, 1] - whole[:, 1]).max() > 1e-3


def test_scale_and_offset_of_features_do_not_matter():
    features, targets = _data()
    generator = np.random.default_rng(0)
    moved = features.astype(np.float64) * np.exp(generator.normal(0, 3, 12)) + 100 * generator.normal(size=12)
    one = heads.LogisticProblem(features, targets).solve(1e-3, tolerance=1e-9)
    other = heads.LogisticProblem(moved, targets).solve(1e-3, tolerance=1e-9)
    np.testing.assert_allclose(one.head.logits(features), other.head.logits(moved), atol=1e-5)


def test_dead_features_get_no_weight():
    features, targets = _data()
    # A constant, and one whose only variation is float32 rounding around a large value.
    noise = np.float32(1000) + np.float32(6e-5) * (np.arange(400) % 2)
    dead = np.column_stack([np.full(400, 3.7, np.float32), noise.astype(np.float32)])
    with_dead = heads.LogisticProblem(np.hstack([features, dead]), targets).solve(1e-4, tolerance=1e-8)
    without = heads.LogisticProblem(features, targets).solve(1e-4, tolerance=1e-8)
    assert (with_dead.head.weight[-2:] == 0).all()
    np.testing.assert_allclose(
        with_dead.head.logits(np.hstack([features, dead])), without.head.logits(features), atol=1e-6
    )


def test_blocks_do_not_change_the_solution(monkeypatch):
    features, targets = _data(n=500)
    whole = heads.LogisticProblem(features, targets).solve(1e-3, tolerance=1e-9)
    monkeypatch.setattr(heads, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(heads, "_FLOAT64_BYTES", 0)  # float32 features converted block by block
    blocked = heads.LogisticProblem(features, targets).solve(1e-3, tolerance=1e-9)
    np.testing.assert_allclose(blocked.head.logits(features), whole.head.logits(features), atol=1e-6)


def test_more_features_than_crops_converge_and_separate():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(80, 200)).astype(np.float32)
    targets = np.zeros((80, 2))
    targets[:40, 0], targets[:2, 1] = 1, 1
    solution = heads.LogisticProblem(features, targets).solve(1e-5)
    assert solution.converged
    assert solution.gradient_norm <= 1e-6
    assert ((solution.head.logits(features) > 0) == (targets == 1)).all()


def test_too_few_steps_are_reported():
    features, targets = _data()
    solution = heads.LogisticProblem(features, targets).solve(1e-4, tolerance=1e-9, max_steps=2)
    assert not solution.converged
    assert solution.n_steps <= 2
    assert solution.gradient_norm > 1e-9


def test_classes_that_cannot_be_trained_are_named():
    features, targets = _data()
    targets[:, 1], targets[:, 2] = 0, np.where(targets[:, 2] == 1, 1, np.nan)
    assert metrics.has_both_kinds(targets).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"classes \[1, 2\]"):
        heads.LogisticProblem(features, targets)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features, targets = _data()
    features[3, 2] = bad
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        heads.LogisticProblem(features, targets)


def test_l2_is_chosen_on_the_aggregated_validation_score():
    """Of few noisy training crops the weakest penalty overfits; the chosen one is best on validation."""
    from scipy.special import expit

    from ecg_jax.evaluation.features import mean_per_record

    generator = np.random.default_rng(0)
    direction = generator.normal(size=(60, 2))
    features = generator.normal(size=(500, 60)).astype(np.float32)
    targets = (features @ direction / 4 + generator.normal(size=(500, 2)) > 0).astype(float)
    record = np.arange(400) // 4
    problem = heads.LogisticProblem(features[:100], targets[:100])
    record_targets = targets[100:][::4]
    grid = (1e-5, 1.0, 1e-1, 100.0)

    def score(head):
        averaged = mean_per_record(expit(head.logits(features[100:])), record, 100)
        return metrics.macro_auroc(record_targets, averaged)

    chosen = heads.select(problem.path(grid), score)
    assert [c.l2 for c in chosen.candidates] == sorted(grid, reverse=True)
    for candidate in chosen.candidates:
        # Warm starts end at the same solution, up to a pair or two of near ties.
        assert abs(score(problem.solve(candidate.l2).head) - candidate.validation_score) < 1e-3
    best = max(chosen.candidates, key=lambda c: c.validation_score)
    assert chosen.l2 == best.l2
    assert chosen.converged
    assert chosen.at_edge == {100.0: "strongest", 1e-5: "weakest"}.get(chosen.l2)


def test_one_l2_has_no_edge_and_an_empty_grid_is_refused():
    features, targets = _data()
    problem = heads.LogisticProblem(features, targets)
    chosen = heads.select(problem.path((0.1,)), lambda head: 0.7)
    assert (chosen.l2, chosen.at_edge) == (0.1, None)
    # Of equal ones the strongest; of errors the lowest.
    assert heads.select(problem.path((0.1, 1.0)), lambda head: 0.7).at_edge == "strongest"
    assert heads.select(problem.path((0.1, 1.0)), lambda head: -abs(head.weight).sum(), True).l2 == 0.1
    with pytest.raises(ValueError, match="empty"):
        list(problem.path(()))
    with pytest.raises(ValueError, match="no validation score"):
        heads.select(problem.path((0.1,)), lambda head: float("nan"))


def test_crop_weights_sum_to_one_per_record():
    record = np.array([2, 0, 2, 2, 1, 0])
    np.testing.assert_allclose(np.bincount(record, heads.crop_weights(record)), 1.0)


# All of one shape, [400, 12] x 3 classes x 3 penalties, so that the program is compiled once.
GRID = (1e-4, 1.0, 1e-2)


def _together(features, targets, weights=None, tolerance=1e-9, **kwargs):
    return fit_together.fit_together(features, targets, weights, GRID, tolerance, **kwargs)


def test_solving_all_problems_together_equals_sklearn_and_one_by_one():
    from sklearn.linear_model import LogisticRegression

    features, targets = _data()
    got = _together(features, targets)
    assert got.l2.tolist() == sorted(GRID, reverse=True)
    assert got.weight.shape == (3, 12, 3)
    assert got.converged.all()
    problem = heads.LogisticProblem(features, targets)
    standard = (features.astype(np.float64) - problem.mean) / problem.scale
    for g, k in np.ndindex(3, 3):
        reference = LogisticRegression(
            C=1 / (got.l2[g] * len(features)), tol=1e-12, max_iter=1000, solver="newton-cholesky"
        )
        reference.fit(standard, targets[:, k])
        logits = features @ got.weight[g, :, k] + got.bias[g, k]
        np.testing.assert_allclose(logits, reference.decision_function(standard), atol=1e-6)
    alone = list(problem.path(GRID, tolerance=1e-9))
    together = fit_together.path_together(features, targets, None, GRID, tolerance=1e-9)
    for one, other in zip(alone, together, strict=True):
        assert one.l2 == other.l2
        assert other.converged
        assert abs(one.objective - other.objective) < 1e-9
        np.testing.assert_allclose(one.head.logits(features), other.head.logits(features), atol=1e-5)


def test_chunks_of_classes_do_not_change_the_solution(monkeypatch):
    features, targets = _data(n_classes=4)
    monkeypatch.setattr(fit_together, "_BYTES_AT_ONCE", 3 * 8 * 416)  # three at once, then one and two again
    got = _together(features, targets)
    alone = heads.LogisticProblem(features, targets).solve(1e-2, tolerance=1e-9)
    np.testing.assert_allclose(features @ got.weight[1] + got.bias[1], alone.head.logits(features), atol=1e-5)


def test_the_gradient_that_is_reported_is_the_true_one():
    features, targets = _data()
    problem = heads.LogisticProblem(features, targets)
    for tolerance in (1e-3, 1e-6):
        for solution in fit_together.path_together(features, targets, None, GRID, tolerance):
            weight = solution.head.weight * problem.scale[:, None]
            bias = solution.head.bias + problem.mean @ solution.head.weight
            _, weight_gradient, bias_gradient = problem.objective(weight, bias, solution.l2)
            true = max(np.abs(weight_gradient).max(), np.abs(bias_gradient).max())
            assert true <= tolerance
            assert abs(true - solution.gradient_norm) < 1e-9
    hurried = fit_together.path_together(features, targets, None, GRID, 1e-9, max_steps=2)[-1]
    assert not hurried.converged
    assert hurried.n_steps == 2


def test_tasks_and_subsets_of_rows_side_by_side():
    """Columns with weights of their own are what each gives alone on its rows, under one standardisation."""
    features, targets = _data()
    generator = np.random.default_rng(0)
    weights = generator.random((400, 3)) + 0.5
    # The last one has fewer rows than there are features.
    rare = np.concatenate([np.flatnonzero(targets[:, 2] == y)[:5] for y in (0, 1)])
    weights[:200, 0], weights[100:, 1], weights[~np.isin(np.arange(400), rare), 2] = 0, 0, 0
    targets[300:, 0] = np.nan
    standard = heads.standardise(features, np.ones(400))
    got = _together(features, targets, weights)
    assert got.converged.all()
    for k in range(3):
        rows = (weights[:, k] > 0) & ~np.isnan(targets[:, k])
        problem = heads.LogisticProblem(features[rows], targets[rows, k : k + 1], weights[rows, k], standard)
        for g, solution in enumerate(problem.path(GRID, tolerance=1e-9)):
            logits = features @ got.weight[g, :, k] + got.bias[g, k]
            np.testing.assert_allclose(logits, solution.head.logits(features)[:, 0], rtol=1e-4, atol=1e-4)
    # NaN for rows of other tasks does the same as a weight of zero.
    masked = np.where(weights > 0, targets, np.nan)
    again = _together(features, masked, weights + (weights == 0))
    np.testing.assert_allclose(again.weight, got.weight, atol=1e-6)


def test_all_penalties_in_one_run_of_the_program():
    features, targets = _data()
    one, other = _together(features, targets), _together(features, targets, penalties_at_once=3)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-7)
    np.testing.assert_array_equal(one.l2, other.l2)
    assert other.n_steps.shape == (3, 3)


def test_dead_features_get_no_weight_together():
    features, targets = _data()
    features[:, 7] = 3.7
    assert (_together(features, targets).weight[:, 7] == 0).all()


def test_problems_that_cannot_be_solved_together_are_refused():
    features, targets = _data()
    with pytest.raises(ValueError, match="above 0"):
        fit_together.fit_together(features, targets, None, (0.0,))
    with pytest.raises(ValueError, match="empty"):
        fit_together.fit_together(features, targets, None, ())
    with pytest.raises(ValueError, match=r"need targets \[400, K\]"):
        fit_together.fit_together(features, targets[:, 0], None, (1.0,))
    weights = np.where(targets == 1, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"classes \[0, 1, 2\]"):
        fit_together.fit_together(features, targets, weights, (1.0,))
    features[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fit_together.fit_together(features, targets, None, (1.0,))


def test_the_faster_solver_depends_on_size_and_memory():
    assert fit_together.faster_solver(100, 16, 5, 10) == "lbfgs"
    assert fit_together.faster_solver(80_000, 512, 71, 10) == "vmap"
    assert fit_together.faster_solver(10_000_000, 512, 71, 10) == "lbfgs"


def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for n in [*range(1, 300), 8000, 87_123]:
        assert n <= fit_together._round_up(n) <= n + n // 8
    assert len({fit_together._round_up(n) for n in range(8192, 16384)}) == 9


def test_targets_by_record_are_those_repeated_for_every_crop():
    features, targets = _data()
    targets = targets.astype(np.float32)
    targets[:40, 1] = np.nan
    record = np.random.default_rng(0).permutation(np.repeat(np.arange(len(targets)), 2))
    features, weights = np.concatenate([features, features + 0.1])[: len(record)], heads.crop_weights(record)
    repeated = heads.LogisticProblem(features, targets[record], weights).solve(0.1, tolerance=1e-8)
    indexed = heads.LogisticProblem(features, targets, weights, record=record).solve(0.1, tolerance=1e-8)
    np.testing.assert_allclose(indexed.head.weight, repeated.head.weight, atol=1e-12)
    (together,) = fit_together.path_together(features, targets, weights, (0.1,), 1e-8, record=record)
    assert together.converged
    np.testing.assert_allclose(together.head.weight, repeated.head.weight, atol=1e-6)
    with pytest.raises(ValueError, match=r"need targets \[records, K\]"):
        heads.LogisticProblem(features, targets[:-1], weights, record=record)


def test_a_problem_that_stalls_in_float32_leaves_steps_for_float64(monkeypatch):
    """As if float32 never came near enough to hand over: it takes half of the steps, float64 the rest."""
    features, targets = _data()
    features, targets = features[:333], targets[:333]  # a shape of its own: nothing compiled before is used
    monkeypatch.setattr(fit_together, "_HANDOVER", 0.0)
    fits = fit_together.fit_together(features, targets, None, (0.1,), 1e-9, max_steps=200)
    assert fits.converged.all()
    assert 100 < fits.n_steps.max() <= 200
    few = fit_together.fit_together(features, targets, None, (0.1,), 1e-9, max_steps=4)
    assert not few.converged.any()
    assert (few.n_steps == 4).all()
