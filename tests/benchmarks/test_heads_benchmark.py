"""Linear heads of all classes and penalties: fitted together, and one by one.

    pytest tests/benchmarks/test_heads_benchmark.py --benchmark-only -s

Features of width 512, classes from common to rare, 8 penalties, each to a gradient of 1e-6. The ways take turns, on the
same standardised features (standardising is timed by itself). What goes one by one is timed on three of the classes and
scaled up. By default 2000 crops and 12 classes, which takes a minute or two; the published size takes half an hour:

    ECG_JAX_BENCHMARK_CROPS=8000 ECG_JAX_BENCHMARK_CLASSES=71

`ECG_JAX_BENCHMARK_ROUNDS` changes the number of turns (1). On a CPU that is not idle, run it on one core and look at
the processor time:

    OPENBLAS_NUM_THREADS=1 taskset -c 0 pytest ...
"""

import os
import time

import numpy as np

from ecg_jax.evaluation import heads
from ecg_jax.evaluation.fit_together import fit_together

CROPS = int(os.environ.get("ECG_JAX_BENCHMARK_CROPS", "2000"))
CLASSES = int(os.environ.get("ECG_JAX_BENCHMARK_CLASSES", "12"))
ROUNDS = int(os.environ.get("ECG_JAX_BENCHMARK_ROUNDS", "1"))
WIDTH = 512
GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
TOLERANCE = 1e-6


def data(seed=0):
    """Correlated features with offsets, and classes of 40 % down to 1 % that they partly explain."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(WIDTH, WIDTH)) * np.logspace(0, -2, WIDTH)[:, None]
    features = (generator.normal(size=(CROPS, WIDTH)) @ mixing + generator.normal(size=WIDTH)).astype(
        np.float32
    )
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = standard @ generator.normal(size=(WIDTH, CLASSES)) * 1.5 / WIDTH**0.5
    logits = logits + 0.7 * generator.logistic(size=logits.shape)
    prevalence = np.logspace(np.log10(0.4), np.log10(0.01), CLASSES)
    targets = logits > [np.quantile(column, 1 - p) for column, p in zip(logits.T, prevalence, strict=True)]
    return features, targets.astype(float)


def together(features, targets, standard):
    fits = fit_together(features, targets, None, GRID, TOLERANCE, standard=standard)
    assert fits.converged.all()
    return fits


def together_all_penalties(features, targets, standard):
    """All penalties in one run of the program, as on a GPU."""
    fits = fit_together(
        features, targets, None, GRID, TOLERANCE, standard=standard, penalties_at_once=len(GRID)
    )
    assert fits.converged.all()
    return fits


def all_classes_each_penalty(features, targets, standard):
    """The solver of `heads`: all classes at once, one penalty after the other, each from the last."""
    solutions = list(heads.LogisticProblem(features, targets, None, standard).path(GRID, TOLERANCE))
    assert all(solution.converged for solution in solutions)


def one_by_one_same_program(features, targets, standard):
    """The same program for one class and one penalty at a time."""
    for k in range(targets.shape[1]):
        for l2 in GRID:
            fit_together(features, targets[:, k : k + 1], None, (l2,), TOLERANCE, standard=standard)


def one_by_one_lbfgs(features, targets, standard):
    for k in range(targets.shape[1]):
        problem = heads.LogisticProblem(features, targets[:, k : k + 1], None, standard)
        for l2 in GRID:
            problem.solve(l2, tolerance=TOLERANCE)


def one_by_one_sklearn(features, targets, standard):
    """With the solver that scikit-learn recommends for many more rows than features."""
    from sklearn.linear_model import LogisticRegression

    x = (features.astype(np.float64) - standard.mean) / standard.scale
    for k in range(targets.shape[1]):
        for l2 in GRID:
            model = LogisticRegression(
                C=1 / (l2 * len(x)), tol=TOLERANCE, max_iter=100, solver="newton-cholesky"
            )
            model.fit(x, targets[:, k])


ALL, THREE = slice(None), (np.array([0.07, 0.5, 0.92]) * CLASSES).astype(int)
#: Way -> (function, which classes it is timed on).
WAYS = {
    "together, one program (vmap)": (together, ALL),
    "the same, all penalties in one run": (together_all_penalties, ALL),
    "all classes, penalties in turn (lbfgs)": (all_classes_each_penalty, ALL),
    "one by one, the same program": (one_by_one_same_program, THREE),
    "one by one, lbfgs": (one_by_one_lbfgs, THREE),
    "one by one, scikit-learn": (one_by_one_sklearn, THREE),
}


def test_heads_together_against_one_by_one(benchmark):
    features, targets = data()
    start = time.perf_counter()
    standard = heads.standardise(features, np.ones(CROPS))
    standardising = time.perf_counter() - start
    start = time.perf_counter()
    fits = together(features, targets, standard)
    first = time.perf_counter() - start
    print(
        f"\n{CROPS} crops x {WIDTH}, {CLASSES} classes, {len(GRID)} penalties; steps {fits.n_steps.max(axis=1)}"
    )
    print(
        f"standardising {standardising:.2f} s; first call of the program, with compiling, {first:.1f} s",
        flush=True,
    )
    together_all_penalties(features, targets, standard)  # compile
    fit_together(features, targets[:, :1], None, GRID[:1], TOLERANCE, standard=standard)  # compile
    seconds = {way: [] for way in WAYS}

    def turn():
        for way, (solve, classes) in WAYS.items():
            some = targets[:, classes]
            start, start_processor = time.perf_counter(), time.process_time()
            solve(features, some, standard)
            spent = np.array([time.perf_counter() - start, time.process_time() - start_processor])
            seconds[way].append(spent * CLASSES / some.shape[1])

    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    medians = {way: np.median(times, axis=0) for way, times in seconds.items()}
    fastest = medians["together, one program (vmap)"]
    for way, (wall, processor) in medians.items():
        print(
            f"{way:<40}{wall:8.1f} s {wall / fastest[0]:6.1f} x   processor {processor:8.1f} s "
            f"{processor / fastest[1]:6.1f} x"
        )
