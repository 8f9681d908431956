"""CKA between all layers at once and pair by pair.

    pytest tests/benchmarks/test_cka_benchmark.py --benchmark-only -s

Features of LAYERS layers of width 512 on one mini-batch of recordings: by default 18 layers (three models of six) and
512 recordings. The ways take turns within one run: all pairs in one program; the same program for one pair after the
other, compiled once; and the textbook's n x n kernels in NumPy, float64. Their values must agree. Processor seconds are
disturbed less by other programs. `ECG_JAX_BENCHMARK_LAYERS` and `ECG_JAX_BENCHMARK_RECORDINGS` change the size,
`ECG_JAX_BENCHMARK_ROUNDS` the number of turns (3).
"""

import itertools
import os
import time

import numpy as np

from ecg_jax.studies.cka import GROUPS, HsicSums, groups_of

LAYERS = int(os.environ.get("ECG_JAX_BENCHMARK_LAYERS", "18"))
RECORDINGS = int(os.environ.get("ECG_JAX_BENCHMARK_RECORDINGS", "512"))
ROUNDS = int(os.environ.get("ECG_JAX_BENCHMARK_ROUNDS", "3"))
WIDTH = 512


def features(seed=0):
    rng = np.random.default_rng(seed)
    origin = rng.normal(size=(RECORDINGS, 64))
    return [
        (origin @ rng.normal(size=(64, WIDTH)) + 4 * rng.normal(size=(RECORDINGS, WIDTH))).astype(np.float32)
        for _ in range(LAYERS)
    ]


def together(layers, groups=0):
    sums = HsicSums(groups)
    sums.add(layers, groups_of(RECORDINGS) if groups else None)
    return sums.result()


def all_at_once(layers):
    return together(layers).debiased


def with_intervals(layers):
    """The same with every group of the jackknife left out in turn: 21 times the sums."""
    return together(layers, GROUPS).debiased


def pair_by_pair(layers):
    found = np.eye(LAYERS)
    for i, j in itertools.combinations(range(LAYERS), 2):
        found[i, j] = found[j, i] = together([layers[i], layers[j]]).debiased[0, 1]
    return found


def _textbook(x, y):
    n = len(x)
    k, h = (z.astype(np.float64) @ z.astype(np.float64).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(h, 0)
    rows = k.sum(axis=0), h.sum(axis=0)
    terms = (k * h).sum() + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return (terms - 2 / (n - 2) * rows[0] @ rows[1]) / (n * (n - 3))


def textbook(layers):
    own = [_textbook(x, x) for x in layers]
    found = np.eye(LAYERS)
    for i, j in itertools.combinations(range(LAYERS), 2):
        found[i, j] = found[j, i] = _textbook(layers[i], layers[j]) / np.sqrt(own[i] * own[j])
    return found


def test_all_layers_at_once(benchmark):
    layers, ways = features(), (all_at_once, with_intervals, pair_by_pair, textbook)
    processor, passed = {way: [] for way in ways}, {way: [] for way in ways}
    expected = [way(layers) for way in ways]  # compiles

    def turn():
        for way in ways:
            start, cpu = time.perf_counter(), time.process_time()
            way(layers)
            passed[way].append(time.perf_counter() - start)
            processor[way].append(time.process_time() - cpu)

    benchmark.pedantic(turn, rounds=ROUNDS)
    for found in expected:
        np.testing.assert_allclose(found, expected[-1], atol=1e-4)
    first = np.median(processor[all_at_once])
    print(f"\n{LAYERS} layers of width {WIDTH}, {RECORDINGS} recordings, {ROUNDS} turns")
    for way in ways:
        own = np.median(processor[way])
        print(
            f"{way.__name__:<16}{own:8.3f} processor s, {own / first:6.1f} x{np.median(passed[way]):9.3f} s"
        )
        benchmark.extra_info[way.__name__] = round(own / first, 1)
