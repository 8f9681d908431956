"""Patient bootstrap: golden resamples, brute force, clusters, coverage."""

import time

import numpy as np
import pytest

from conftest import load_golden
from ecg_jax.evaluation import bootstrap, metrics

GOLDEN = load_golden("metrics")


@pytest.fixture(scope="module")
def golden():
    targets, counts = GOLDEN["in/targets_per_record"], bootstrap.counts_of(GOLDEN["bootstrap/in/ids"])
    first = bootstrap.bootstrap_auroc(targets, GOLDEN["out/prob_aggregated"], counts)
    second = bootstrap.bootstrap_auroc(targets, GOLDEN["bootstrap/in/prob_second_model"], counts)
    return targets, counts, first, second


@pytest.mark.parametrize(("undefined", "key"), [("half", "macro_half"), ("exclude", "macro_skip")])
def test_golden_resamples_and_intervals(golden, undefined, key):
    _, _, first, _ = golden
    scores = metrics.macro(first.resampled, undefined)
    np.testing.assert_allclose(scores, GOLDEN[f"bootstrap/out/{key}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        first.macro(undefined), GOLDEN[f"bootstrap/out/{key}_point_low_high"], atol=1e-6
    )


def test_golden_micro_and_difference(golden):
    targets, counts, first, second = golden
    micro = bootstrap.bootstrap_micro_auroc(targets, GOLDEN["out/prob_aggregated"], counts)
    np.testing.assert_allclose(micro, GOLDEN["bootstrap/out/micro_point_low_high"], atol=1e-6)
    difference = bootstrap.macro_difference(first, second, "half")
    expected = GOLDEN["bootstrap/out/macro_half_difference_point_low_high"]
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_equals_sklearn_per_resample():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(3)
    targets = generator.integers(0, 2, (60, 2))
    scores = generator.integers(0, 20, (60, 2)) / 20 + 0.2 * targets
    codes, _ = bootstrap.units(generator.integers(0, 25, 60), 60)
    counts = bootstrap.draw(codes, 40, seed=1)
    got = bootstrap.bootstrap_auroc(targets, scores, counts).resampled
    for r in range(40):
        rows = np.repeat(np.arange(60), counts[:, r])
        expected = [roc_auc_score(targets[rows, k], scores[rows, k]) for k in range(2)]
        np.testing.assert_allclose(got[r], expected, atol=1e-12)


def test_records_of_a_patient_are_drawn_together():
    codes, name = bootstrap.units(["a", "b", "a", "c", "b"], 5)
    counts = bootstrap.draw(codes, 500, seed=0)
    assert name == "patient"
    assert (counts[0] == counts[2]).all()
    assert (counts[1] == counts[4]).all()
    # As many patients as there are, in every resample.
    assert (counts[[0, 1, 3]].sum(axis=0) == 3).all()
    assert len(np.unique(counts[0])) == 4  # 0, 1, 2 and 3 times all occur


def test_unknown_patients_are_units_of_their_own():
    assert bootstrap.units(None, 3)[1] == "record"
    assert bootstrap.units([None, None], 2)[1] == "record"
    codes, name = bootstrap.units(["a", None, "a", None, float("nan"), ""], 6)
    assert name == "patient where known, else record"
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 5
    with pytest.raises(ValueError, match="patient ids"):
        bootstrap.units(["a"], 2)


def test_same_seed_same_resamples():
    codes = np.arange(50)
    assert (bootstrap.draw(codes, 20, seed=5) == bootstrap.draw(codes, 20, seed=5)).all()
    assert (bootstrap.draw(codes, 20, seed=5) != bootstrap.draw(codes, 20, seed=6)).any()
    # More resamples continue the same sequence.
    assert (bootstrap.draw(codes, 30, seed=5)[:, :20] == bootstrap.draw(codes, 20, seed=5)).all()


def test_interval_contains_the_point_and_half_drags_it_down():
    generator = np.random.default_rng(0)
    targets = np.column_stack([generator.random(200) < 0.4, generator.random(200) < 0.01])
    targets[0, 1] = True
    scores = targets + generator.normal(0, 1, targets.shape)
    result = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(200), 1000, seed=0))
    assert result.macro().low < result.macro().point < result.macro().high
    # The rare class is missing from many resamples, and counting those 0.5 widens the interval downwards.
    assert np.isnan(result.resampled[:, 1]).sum() > 20
    assert result.macro("half").low < result.macro().low - 0.02


def test_permuting_records_with_their_counts_changes_nothing():
    generator = np.random.default_rng(2)
    targets, scores = generator.integers(0, 2, (50, 3)), generator.random((50, 3))
    counts = bootstrap.draw(np.arange(50) // 2, 200, seed=0)
    order = generator.permutation(50)
    one = bootstrap.bootstrap_auroc(targets, scores, counts)
    other = bootstrap.bootstrap_auroc(targets[order], scores[order], counts[order])
    np.testing.assert_allclose(one.macro(), other.macro(), atol=1e-12)
    np.testing.assert_allclose(one.class_intervals(), other.class_intervals(), atol=1e-12)


def test_coverage_needs_patients():
    """Three near-copies of each score: patient intervals cover the truth, record intervals do not."""
    generator = np.random.default_rng(7)
    truth = 0.7602  # Φ(1/√2)
    covered = {"patient": 0, "record": 0}
    for trial in range(120):
        label = np.repeat(generator.integers(0, 2, 60), 3)
        score = np.repeat(generator.normal(0, 1, 60), 3) + label + generator.normal(0, 0.05, 180)
        patients = np.repeat(np.arange(60), 3)
        for name, codes in (("patient", patients), ("record", np.arange(180))):
            counts = bootstrap.draw(codes, 200, seed=trial)
            found = bootstrap.bootstrap_auroc(label[:, None], score[:, None], counts).macro()
            covered[name] += found.low <= truth <= found.high
    assert covered["patient"] >= 0.87 * 120
    assert covered["record"] <= 0.80 * 120


def test_difference_refuses_unpaired_models():
    targets, scores = np.arange(20)[:, None] % 2, np.arange(20.0)[:, None]
    one = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(20), 30, seed=0))
    other = bootstrap.bootstrap_auroc(targets, scores, bootstrap.draw(np.arange(20), 40, seed=0))
    with pytest.raises(ValueError, match="same targets"):
        bootstrap.macro_difference(one, other)
    assert bootstrap.macro_difference(one, one) == (0.0, 0.0, 0.0)


def test_undefined_interval_is_nan():
    result = bootstrap.bootstrap_auroc(np.zeros((5, 1)), np.arange(5.0)[:, None], np.ones((5, 3)))
    assert np.isnan(result.macro()).all()


def test_a_thousand_resamples_of_ptbxl_size_take_seconds():
    generator = np.random.default_rng(0)
    targets = generator.random((2000, 71)) < 0.1
    start = time.perf_counter()
    bootstrap.bootstrap_auroc(
        targets, generator.random((2000, 71)), bootstrap.draw(np.arange(2000), 1000, seed=0)
    )
    assert time.perf_counter() - start < 20  # about 1.5 s on one core
