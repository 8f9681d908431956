"""How often intervals of scaling fits hold the truth, over simulated studies: results/2026-11-22-scaling-coverage.md.

    pytest tests/benchmarks/test_scaling_coverage.py --benchmark-only -s
    pytest tests/benchmarks/test_scaling_coverage.py --benchmark-only -s -k "offset-4x3 or constant"

Prints the rows of that file's tables. Every row has its own seed of the generator, so that it can be run alone.
"""

import collections
import zlib

import numpy as np
import pytest

from ecg_jax.studies.scaling_bootstrap import bootstrap_fit, compare_models, predict_largest

RUNGS = np.array([18e3, 45e3, 106e3, 753e3, 11e6])
DRAWS, NOISE = 500, 0.01
#: Row -> (exponent, offset, rungs, seeds, studies, noise that all runs of a rung share, whether patients are drawn).
ROWS = {
    "plain-5x3": (0.189, 0, 5, 3, 300, 0, False),
    "plain-5x3-b0.062": (0.062, 0, 5, 3, 300, 0, False),
    "plain-4x3": (0.189, 0, 4, 3, 300, 0, False),
    "plain-3x3": (0.189, 0, 3, 3, 300, 0, False),
    "plain-5x1": (0.189, 0, 5, 1, 800, 0, False),
    "plain-3x1": (0.189, 0, 3, 1, 300, 0, False),
    "plain-5x3-rungs-off": (0.189, 0, 5, 3, 1000, NOISE, False),
    "plain-3x3-rungs-off": (0.189, 0, 3, 3, 1000, NOISE, False),
    "offset-5x3": (0.3, 0.05, 5, 3, 300, 0, False),
    "offset-5x3-patients": (0.3, 0.05, 5, 3, 300, 0, True),
    "offset-5x1-patients": (0.3, 0.05, 5, 1, 300, 0, True),
    "offset-5x3-rungs-off": (0.3, 0.05, 5, 3, 300, NOISE, False),
    "offset-4x3": (0.3, 0.05, 4, 3, 200, 0, False),
    "offset-5x3-b0.189": (0.189, 0.05, 5, 3, 200, 0, False),
    "offset-5x3-b0.062": (0.062, 0.05, 5, 3, 200, 0, False),
}
#: Truth -> exponent and offset; no exponent is a constant.
TRUTHS = {"constant": (None, 0), "N^-0.062": (0.062, 0), "N^-0.3 + c": (0.3, 0.05)}
COMPARED = [
    *(("constant", 5, 3, 60, sd) for sd in (0, NOISE)), ("constant", 5, 1, 60, 0), ("constant", 3, 3, 60, 0),
    *(("N^-0.062", 5, 3, 60, sd) for sd in (0, NOISE)), ("N^-0.062", 5, 1, 60, 0), ("N^-0.062", 4, 1, 60, 0),
    ("N^-0.3 + c", 5, 3, 30, 0),
]  # fmt: skip


def scale_of(exponent: float, offset: float) -> float:
    """a of a curve: 3 without offset, else E(18 k) = 0.12."""
    return (0.12 - offset) * 18e3**exponent if offset else 3.0


def noisy(generator, truth, seeds: int, rung_sd: float):
    shared = np.repeat(rung_sd * generator.normal(size=len(truth) // seeds), seeds)
    return truth * np.exp(shared + NOISE * generator.normal(size=len(truth)))


def coverage(row: str) -> dict[str, float]:
    """Shares of the studies of a row."""
    b, c, rungs, seeds, studies, rung_sd, patients = ROWS[row]
    a, n = scale_of(b, c), np.repeat(RUNGS[:rungs], seeds)
    generator = np.random.default_rng(zlib.crc32(row.encode()))
    last = RUNGS[rungs - 1]
    sizes = np.array([last, 10 * last])
    hits, widths = collections.defaultdict(list), []
    for study in range(studies):
        values, resampled = noisy(generator, a * n**-b + c, seeds, rung_sd), None
        if patients:  # other test recordings move these errors as their resamples do
            common, own = (
                0.02 * generator.normal(size=1 + DRAWS),
                0.003 * generator.normal(size=(len(n), 1 + DRAWS)),
            )
            moved = np.exp(common + own)
            values, resampled = values * moved[:, 0], (values * moved[:, 0])[:, None] * moved[:, 1:]
        settings = {"offset": c > 0, "n_resamples": DRAWS, "seed": study}
        fit = bootstrap_fit(n, values, resampled, sizes=sizes, **settings)
        found = {"a": (fit.a, a), "b": (fit.b, b)} | ({"c": (fit.c, c)} if c else {})
        for name, (ends, truth) in found.items():
            hits[name].append(ends.low <= truth <= ends.high)
        for i, name in enumerate(("curve", "beyond")):
            hits[name].append(fit.low[i] <= a * sizes[i] ** -b + c <= fit.high[i])
        held = predict_largest(n, values, resampled, **settings)
        hits["predicted"].append(held.predicted is not None)
        if held.predicted is not None:
            hits["held out"].append(held.inside)
        hits["identifiable"].append(fit.law.identifiable)
        widths.append(fit.b.high - fit.b.low)
    return {name: float(np.mean(each)) for name, each in hits.items()} | {
        "width of b": float(np.median(widths))
    }


@pytest.mark.parametrize("row", ROWS)
def test_coverage(benchmark, row):
    found = benchmark.pedantic(coverage, (row,), rounds=1)
    benchmark.extra_info.update({name: round(value, 3) for name, value in found.items()})
    print(
        f"\n| {row} | {ROWS[row][4]} | " + " | ".join(f"{name} {value:.3f}" for name, value in found.items())
    )


def chosen(truth: str, rungs: int, seeds: int, studies: int, rung_sd: float) -> collections.Counter:
    (b, c), n = TRUTHS[truth], np.repeat(RUNGS[:rungs], seeds)
    generator = np.random.default_rng([rungs, seeds, int(rung_sd > 0)])
    values = np.full(len(n), 0.3) if b is None else scale_of(b, c) * n**-b + c
    models = (compare_models(n, noisy(generator, values, seeds, rung_sd)) for _ in range(studies))
    return collections.Counter(found.best or "none" for found in models)


@pytest.mark.parametrize(
    "row", COMPARED, ids=lambda row: f"{row[0]}-{row[1]}x{row[2]}{'-off' * bool(row[4])}"
)
def test_models_chosen(benchmark, row):
    found = benchmark.pedantic(chosen, row, rounds=1)
    benchmark.extra_info.update(found)
    print(f"\n| {' | '.join(map(str, row))} | {dict(found)}")
