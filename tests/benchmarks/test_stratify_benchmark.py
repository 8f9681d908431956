"""Stratified folds against random folds: seconds, and how unevenly labels are distributed.

    pytest tests/benchmarks/test_stratify_benchmark.py --benchmark-only

45,000 records with 80 labels of 12,000 patients, 10 folds. `imbalance` is the largest |records of a label in
a fold - its share| / its share, over folds, averaged over the labels.

Batches: 20,000 and 200,000 patients of six records each, 900 codes, sex, race and age, 20 folds, as HEEDB has them
(1.8 million patients). `us_per_patient` says whether time grows with the number of patients only.
"""

import numpy as np
import pytest

from ecg_jax.data.stratify import batched_folds, nested_subsets, stratified_folds

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


@pytest.mark.parametrize("n_patients", [20_000, 200_000])
def test_batched_folds(benchmark, n_patients):
    rng = np.random.default_rng(0)
    n, n_codes = 6 * n_patients, 900
    patient = rng.integers(0, n_patients, n)
    share = np.geomspace(1, 1e-4, n_codes)
    starts = np.concatenate([[0], np.cumsum(rng.integers(1, 9, n))])
    codes = rng.choice(n_codes, size=starts[-1], p=share / share.sum()).astype(np.int16)
    labels = [(starts, codes), patient % 3, patient % 7, rng.integers(0, 10, n)]
    folds = benchmark.pedantic(batched_folds, (patient, labels, 20), rounds=1)
    benchmark.extra_info["us_per_patient"] = round(benchmark.stats["mean"] / n_patients * 1e6, 1)

    def unevenness(of) -> float:
        found = np.bincount(
            of[np.repeat(np.arange(n), np.diff(starts))] * n_codes + codes, minlength=20 * n_codes
        )
        found = found.reshape(20, n_codes)
        expected = found.sum(0) / 20
        frequent = expected > 20
        return float((np.abs(found - expected)[:, frequent] / expected[frequent]).max(0).mean())

    random = rng.integers(0, 20, n_patients)[patient]
    benchmark.extra_info["imbalance"] = round(unevenness(folds.astype(np.int64)), 4)
    benchmark.extra_info["imbalance_random"] = round(unevenness(random), 4)
    # Codes drawn independently are the hardest case: a patient serves one of its thirty.
    assert unevenness(folds.astype(np.int64)) < unevenness(random)
