"""Stratified folds against random folds: seconds, and how unevenly labels are distributed.

    pytest tests/benchmarks/test_stratify_benchmark.py --benchmark-only

45,000 records with 80 labels of 12,000 patients, 10 folds. `imbalance` is the largest |records of a label in
a fold - its share| / its share, over folds, averaged over the labels.
"""

import numpy as np
import pytest

from ecg_jax.data.stratify import nested_subsets, stratified_folds

N, K, N_FOLDS = 45_000, 80, 10


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    patient = np.sort(rng.integers(0, 12_000, N))
    # Labels from half of all records to about 40, more of them with some patients than with others.
    has = rng.random((N, K)) < np.geomspace(0.5, 0.001, K) * 2 * rng.random(12_000)[patient][:, None]
    labels = [[f"l{k:02d}" for k in np.flatnonzero(row)] for row in has]
    return labels, patient.tolist(), has


def imbalance(has, folds, n_folds=N_FOLDS) -> float:
    found = np.stack([has[folds == fold].sum(0) for fold in range(n_folds)])  # [F, K]
    share = has.sum(0) / n_folds
    return float((np.abs(found - share) / share).max(0).mean())


def test_folds(benchmark, data):
    labels, patients, has = data
    folds = benchmark.pedantic(
        stratified_folds, (labels, N_FOLDS), {"groups": patients}, rounds=3, warmup_rounds=1
    )
    random = np.random.default_rng(1).integers(0, N_FOLDS, 12_000)[patients]
    benchmark.extra_info["imbalance"] = round(imbalance(has, folds), 4)
    benchmark.extra_info["imbalance_random"] = round(imbalance(has, random), 4)
    assert imbalance(has, folds) < imbalance(has, random) / 3


def test_nested_subsets(benchmark, data):
    labels, patients, _ = data
    fractions = [2.0**-k for k in range(8)]
    subsets = benchmark.pedantic(nested_subsets, (labels, patients, fractions), rounds=1)
    assert [round(len(s) / N * 128) for s in subsets[:-1]] == [128, 64, 32, 16, 8, 4, 2]
