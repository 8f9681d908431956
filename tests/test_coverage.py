"""Intervals against known truth: how often they cover it, simulated.

Scores are binormal: N(δ, 1) where the label is 1, N(0, 1) where it is 0, so that AUROC is Φ(δ/√2). Every patient has
two recordings with one label, and most of the noise is the patient's. Many simulated studies are scored in one call,
as the classes of one targets array.
"""

import numpy as np
import pytest

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Interval, Scored

N_PATIENTS, PER_PATIENT = 100, 2
STUDIES, BATCH, RESAMPLES = 2000, 100, 400
DELTAS = (1.0, 0.7)
PATIENT = np.repeat(np.arange(N_PATIENTS), PER_PATIENT)


def _auroc(delta: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(delta / np.sqrt(2)))


def _studies(generator, n: int):
    """Labels [records, n] and the scores of two models that share most of their noise."""
    label = np.repeat(generator.integers(0, 2, (N_PATIENTS, n)), PER_PATIENT, axis=0)
    shared = generator.normal(size=(N_PATIENTS, n))
    models = []
    for delta in DELTAS:
        patient = 0.8 * shared + 0.6 * generator.normal(size=shared.shape)
        record = generator.normal(size=label.shape)
        models.append(delta * label + np.sqrt(0.8) * patient[PATIENT] + np.sqrt(0.2) * record)
    return label, *models


def _covers(intervals: list[Interval], truth: float) -> list[bool]:
    return [found.low <= truth <= found.high for found in intervals]


@pytest.fixture(scope="module")
def covered():
    """What was covered, by (quantity, kind of interval): STUDIES booleans each, fewer where records are drawn."""
    generator, left_out = np.random.default_rng(0), bootstrap.leave_one_out(PATIENT)
    truths = [_auroc(delta) for delta in DELTAS]
    found: dict[tuple[str, str], list[bool]] = {}
    for batch in range(STUDIES // BATCH):
        label, *scores = _studies(generator, BATCH)
        counts = bootstrap.draw(PATIENT, RESAMPLES, seed=batch)
        first, second = (bootstrap.bootstrap_auroc(label, s, counts, left_out) for s in scores)
        for kind in ("percentile", "bca"):
            intervals = first.class_intervals(kind=kind)
            found.setdefault(("auroc", kind), []).extend(_covers(intervals, truths[0]))
            difference = Scored("auroc", *(a - b for a, b in zip(first[1:], second[1:], strict=True)))
            differences = difference.class_intervals(kind=kind)
            found.setdefault(("difference", kind), []).extend(_covers(differences, truths[0] - truths[1]))
        if batch < 5:
            records = bootstrap.draw(np.arange(len(PATIENT)), RESAMPLES, seed=batch)
            intervals = bootstrap.bootstrap_auroc(label, scores[0], records).class_intervals()
            found.setdefault(("auroc", "by record"), []).extend(_covers(intervals, truths[0]))
    return found


@pytest.mark.parametrize("quantity", ["auroc", "difference"])
@pytest.mark.parametrize("kind", ["percentile", "bca"])
def test_95_percent_intervals_cover_93_to_97_percent(covered, quantity, kind):
    """The standard error of a share of 2000 studies is 0.5 %."""
    assert len(covered[quantity, kind]) == STUDIES
    assert 0.93 <= np.mean(covered[quantity, kind]) <= 0.97


def test_resampling_records_of_patients_covers_less(covered):
    share = np.mean(covered["auroc", "by record"])
    assert share < 0.90
    assert share < np.mean(covered["auroc", "percentile"]) - 0.05


def test_counting_absent_classes_half_misses_the_truth():
    """Rare classes (2 positives each, absent from one resample in seven): the reference's rule against ours.

    Its resampled macro AUROC lies below the estimate by about 0.13 (AUROC - 0.5), and its interval misses the truth.
    """
    generator, truth = np.random.default_rng(1), _auroc(2.0)
    label = np.zeros((100, 20), dtype=int)
    label[:40] = np.tile(np.eye(20, dtype=int), (2, 1))  # every class in patients of its own
    shifts: dict[str, list[float]] = {"exclude": [], "half": []}
    covers: dict[str, list[bool]] = {"exclude": [], "half": []}
    for study in range(100):
        scores = 2.0 * label + generator.normal(size=label.shape)
        counts = bootstrap.draw(np.arange(100), 200, seed=study)
        scored = bootstrap.bootstrap_auroc(label, scores, counts)
        for rule in shifts:
            point, resampled, _ = scored.macros(rule)
            shifts[rule].append(resampled.mean() - point)
            covers[rule] += _covers([scored.macro(rule)], truth)
    assert abs(np.mean(shifts["exclude"])) < 0.005
    assert -0.07 < np.mean(shifts["half"]) < -0.04
    assert np.mean(covers["exclude"]) > 0.85
    assert np.mean(covers["half"]) < 0.75
