"""Ranks with ties, Holm's correction, mean ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecg_jax.evaluation import bootstrap, ranking, scoring
from ecg_jax.evaluation.bootstrap import Scored


def _scored(values, metric="auroc"):
    """A model whose resamples are the given values and whose point is their mean."""
    values = np.asarray(values, dtype=float)
    return Scored(metric, np.array([values.mean()]), values[:, None])


NOISE = np.random.default_rng(0).normal(0, 0.01, (6, 999))


def test_groups_of_models_that_do_not_differ():
    """Two at the top within their noise, two clearly below and within theirs, one below all."""
    scores = {
        "d": _scored(0.70 + NOISE[3]),
        "a": _scored(0.900 + NOISE[0]),
        "e": _scored(0.50 + NOISE[4]),
        "b": _scored(0.905 + NOISE[1]),
        "c": _scored(0.705 + NOISE[2]),
    }
    ranks = {r.model: r for r in ranking.rank_models(scores)}
    assert {model: r.rank for model, r in ranks.items()} == {"a": 1, "b": 1, "c": 3, "d": 3, "e": 5}
    assert {model: r.leader for model, r in ranks.items()} == {
        "a": "b",
        "b": "b",
        "c": "c",
        "d": "c",
        "e": "e",
    }
    assert ranks["b"].to_best is None
    assert ranks["a"].to_best.p_value > 0.05
    for model in "cde":
        assert ranks[model].to_best.p_value == 2 / 1000  # never 0, whatever the number of resamples
        assert ranks[model].to_best.difference.high < 0
    assert ranks["a"].value.low < ranks["a"].value.point < ranks["a"].value.high


def test_a_difference_is_paired():
    """The same noise in both models, much larger than what parts them: they are not tied."""
    common = np.random.default_rng(1).normal(0, 0.05, 999)
    scores = {"worse": _scored(0.80 + common), "better": _scored(0.81 + common + 0.1 * NOISE[0])}
    assert [(r.model, r.rank) for r in ranking.rank_models(scores)] == [("better", 1), ("worse", 2)]


def test_lower_is_better_where_it_is():
    low, high = 0.2 + NOISE[0], 0.5 + NOISE[1]
    for metric in scoring.METRICS:
        best = ranking.rank_models({"high": _scored(high, metric), "low": _scored(low, metric)})[0].model
        assert best == ("low" if metric in ("brier", "ece", "mae") else "high")


def test_bca_and_half_reach_the_comparison():
    generator = np.random.default_rng(3)
    targets = np.column_stack([generator.random(120) < 0.4, generator.random(120) < 0.02])
    codes = np.arange(120) // 2
    counts, left_out = bootstrap.draw(codes, 300, seed=0), bootstrap.leave_one_out(codes)
    scores = {
        name: scoring.score(
            "auroc", targets, targets * d + generator.normal(size=targets.shape), counts, left_out
        )
        for name, d in (("weak", 0.5), ("strong", 3.0))
    }
    for undefined in ("exclude", "half"):
        for kind in ("percentile", "bca"):
            ranks = ranking.rank_models(scores, undefined, 0.9, kind)
            assert ranks[0].model == "strong"
            assert ranks[1].value == scores["weak"].macro(undefined, 0.9, kind)
            expected = bootstrap.compare(scores["weak"], scores["strong"], undefined, 0.9, kind)
            assert ranks[1].to_best == expected


def test_undefined_and_unpaired_models_are_refused():
    with pytest.raises(ValueError, match="no models"):
        ranking.rank_models({})
    with pytest.raises(ValueError, match="score of b is undefined"):
        ranking.rank_models({"a": _scored(NOISE[0]), "b": _scored([np.nan] * 999)})
    with pytest.raises(ValueError, match="same metric"):
        ranking.rank_models({"a": _scored(NOISE[0]), "b": _scored(NOISE[1, :10])})
    with pytest.raises(ValueError, match="same metric"):
        ranking.rank_models({"a": _scored(NOISE[0]), "b": _scored(NOISE[1], "fmax")})


def test_holm_by_hand():
    """Holm's procedure for four tests: 4 x 0.005, 3 x 0.01, then 2 x 0.03, and 0.04 may not be below its elder."""
    np.testing.assert_allclose(ranking.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(ranking.holm([0.5, 0.02, np.nan]), [0.5, 0.04, np.nan])
    assert ranking.holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    """One after the other, smallest first, p_(i) against alpha / (M - i + 1), until the first that is not below."""
    rejected = set()
    for i, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - i) > alpha:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(ranking.holm(p_values) <= alpha).tolist()) == rejected


def _table():
    one = ranking.rank_models(
        {"a": _scored(0.9 + NOISE[0]), "b": _scored(0.7 + NOISE[1]), "c": _scored(0.895 + NOISE[2])}
    )
    two = ranking.rank_models({"a": _scored(0.5 + NOISE[3]), "b": _scored(0.7 + NOISE[4])})
    three = ranking.rank_models({"a": _scored(0.4 + NOISE[3]), "b": _scored(0.3 + NOISE[4])})
    return {"one": one, "two": two, "three": three}


def test_correction_is_over_the_whole_table():
    table = _table()
    corrected = ranking.correct(table)
    # Four comparisons, three of them at the least p there is with 999 resamples.
    by_model = {r.model: r for r in corrected["one"]}
    assert by_model["a"].p_holm is None
    assert by_model["b"].p_holm == pytest.approx(4 * 2 / 1000)
    assert by_model["c"].p_holm == pytest.approx(by_model["c"].to_best.p_value)
    assert corrected["two"][1].p_holm == pytest.approx(4 * 2 / 1000)
    assert all(r.p_holm is None for ranks in table.values() for r in ranks)  # the given one is untouched


def test_mean_ranks_by_group():
    table = _table()
    groups = {"one": "adult", "two": "adult", "three": "other"}
    assert ranking.mean_ranks(table, groups) == {"adult": {"a": 1.5, "b": 2.0}, "other": {"a": 1.0, "b": 2.0}}
    # c was not scored on every task of a group, except where there is but one.
    assert ranking.mean_ranks({"one": table["one"]}, groups)["adult"] == {"a": 1.0, "c": 1.0, "b": 3.0}
    with pytest.raises(ValueError, match="three"):
        ranking.mean_ranks(table, {"one": "adult", "two": "adult"})
