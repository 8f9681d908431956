"""The bootstrap of all metrics at PTB-XL's size: 1000 resamples x 71 classes x 2000 recordings of 1900 patients.

    pytest tests/benchmarks/test_metrics_benchmark.py --benchmark-only -s

AUROC and average precision are compared with scikit-learn called for every resample and class, on the same resamples;
of those calls a few resamples are timed and the time scaled, and their values must be equal. Both take turns.
Processor seconds are disturbed less by other programs.
"""

import time

import numpy as np
import pytest

from ecg_jax.evaluation import bootstrap, challenge_score, metrics, scoring

N_RECORDS, N_CLASSES, RESAMPLES, TIMED = 2000, 71, 1000, 5


@pytest.fixture(scope="module")
def sample():
    generator = np.random.default_rng(0)
    prevalence = np.geomspace(0.002, 0.45, N_CLASSES)
    targets = (generator.random((N_RECORDS, N_CLASSES)) < prevalence).astype(float)
    targets[0], targets[1] = 1, 0
    scores = 1 / (1 + np.exp(-(np.log(prevalence) + 2 * targets + generator.normal(size=targets.shape))))
    codes = np.arange(N_RECORDS) % 1900
    return targets, scores, bootstrap.draw(codes, RESAMPLES, seed=0), bootstrap.leave_one_out(codes)


def _against_sklearn(benchmark, name, of_sample, resampled, sample):
    """Median of our whole bootstrap against scikit-learn's time for TIMED resamples, scaled."""
    targets, scores, counts, _ = sample
    rows = [np.repeat(np.arange(N_RECORDS), counts[:, r]) for r in range(TIMED)]
    theirs = np.full((TIMED, N_CLASSES), np.nan)
    processor = {"ours": [], "theirs": []}
    seconds = []

    def loop():
        start, cpu = time.perf_counter(), time.process_time()
        for r in range(TIMED):
            for k in range(N_CLASSES):
                y = targets[rows[r], k]
                if 0 < y.sum() < len(y):
                    theirs[r, k] = of_sample(y, scores[rows[r], k])
        seconds.append((time.perf_counter() - start) * RESAMPLES / TIMED)
        processor["theirs"].append((time.process_time() - cpu) * RESAMPLES / TIMED)

    def run():
        cpu = time.process_time()
        found = resampled(targets, scores, counts)
        processor["ours"].append(time.process_time() - cpu)
        return found

    found = benchmark.pedantic(run, setup=loop, rounds=5, warmup_rounds=1)
    np.testing.assert_allclose(found[:TIMED], theirs, atol=1e-12)
    ours, loops = benchmark.stats["median"], float(np.median(seconds))
    own, other = (float(np.median(processor[name])) for name in ("ours", "theirs"))
    benchmark.extra_info["times_faster"] = round(loops / ours)
    print(f"\n{name}: {ours:.2f} s, scikit-learn in a loop {loops:.0f} s (scaled): {loops / ours:.0f} times")
    print(f"processor seconds {own:.2f} against {other:.0f}: {other / own:.0f} times")


def test_auroc_against_sklearn(benchmark, sample):
    from sklearn.metrics import roc_auc_score

    _against_sklearn(benchmark, "AUROC", roc_auc_score, metrics.resampled_auroc, sample)


def test_average_precision_against_sklearn(benchmark, sample):
    from sklearn.metrics import average_precision_score

    _against_sklearn(
        benchmark, "average precision", average_precision_score, metrics.resampled_average_precision, sample
    )


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_percentile_and_bca(benchmark, sample, metric):
    """Score, resamples, leave-one-out samples and both kinds of interval of every class, for one metric."""
    targets, scores, counts, left_out = sample

    def run():
        scored = scoring.score(metric, targets, scores, counts, left_out)
        return [scored.class_intervals(kind=kind) for kind in ("percentile", "bca")]

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    print(f"\n{metric} with both intervals: {benchmark.stats['median']:.2f} s")


def test_draw(benchmark):
    benchmark.pedantic(lambda: bootstrap.draw(np.arange(N_RECORDS), RESAMPLES, seed=0), rounds=5)
    print(f"\ndrawing: {benchmark.stats['median']:.3f} s")


def test_challenge_score(benchmark):
    """Thresholds on 2000 recordings and 1000 resamples of the score, 2021."""
    generator = np.random.default_rng(0)
    codes = [code for classes in challenge_score._table(2021).codes for code in classes]
    targets = (generator.random((N_RECORDS, len(codes))) < 0.08).astype(float)
    probabilities = 1 / (1 + np.exp(2.5 - 2 * targets - generator.normal(size=targets.shape)))
    counts = bootstrap.draw(np.arange(N_RECORDS), RESAMPLES, seed=0)

    def run():
        thresholds = challenge_score.tune_thresholds(2021, codes, targets, probabilities)
        outputs = challenge_score.binarise(2021, codes, probabilities, thresholds)
        return challenge_score.bootstrap_challenge_score(2021, codes, targets, outputs, counts)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    print(f"\nChallenge score, tuned and resampled: {benchmark.stats['median']:.2f} s")
