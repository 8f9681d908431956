"""Challenge scores: equal to the definition in loops, golden values 1 and 0, thresholds by coordinate ascent."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ecg_jax
from ecg_jax.evaluation import bootstrap, challenge_score

TABLES = Path(ecg_jax.__file__).parent / "assets" / "challenge"
SINUS_RHYTHM = "426783006"
YEARS = (2020, 2021)


def _scored_rows(year):
    with open(TABLES / str(year) / "dx_mapping_scored.csv", newline="") as file:
        return list(csv.DictReader(file))


def _codes(year):
    column = "SNOMED CT Code" if year == 2020 else "SNOMEDCTCode"
    return [row[column] for row in _scored_rows(year)]


def _same_diagnosis(year):
    """Code -> the code that stands for it, from the organisers' notes in dx_mapping_scored.csv."""
    pairs = {tuple(re.findall(r"\d{6,}", row["Notes"])) for row in _scored_rows(year) if row["Notes"]}
    return {code: pair[0] for pair in pairs for code in pair}


def _rewards(year):
    """(row code, column code) -> reward, every code of a joined header cell for itself."""
    with open(TABLES / str(year) / "weights.csv", newline="") as file:
        header, *rows = csv.reader(file)
    return {
        (a, b): float(cell)
        for row in rows
        for name, cell in zip(header[1:], row[1:], strict=True)
        for a in row[0].split("|")
        for b in name.split("|")
    }


def _by_definition(year, codes, targets, outputs):
    """Sets of diagnoses, one recording and one pair of diagnoses after the other; unknown targets left out."""
    stands_for, reward, scored = _same_diagnosis(year), _rewards(year), set(_codes(year))

    def diagnoses(row):
        return {stands_for.get(c, c) for c, v in zip(codes, row, strict=True) if v == 1 and c in scored}

    def earned(said_by):
        total = 0.0
        for i in range(len(targets)):
            true = diagnoses(targets[i])
            unknown = diagnoses(np.isnan(targets[i])) - true
            said = said_by(i) - unknown
            for j in true:
                for k in said:
                    total += reward[j, k] / max(len(true | said), 1)
        return total

    observed = earned(lambda i: diagnoses(outputs[i]))
    correct = earned(lambda i: diagnoses(targets[i]))
    inactive = earned(lambda i: {SINUS_RHYTHM})
    if abs(correct - inactive) < 1e-9:
        return np.nan
    return (observed - inactive) / (correct - inactive)


SAMPLES = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.sampled_from(YEARS), st.integers(1, 25), st.floats(0.02, 0.5), st.sampled_from([0.0, 0.1]))
def test_equals_the_definition(generator, year, n, share, unknown):
    """Any of the scored codes in any order beside codes that are not scored."""
    codes = [*_codes(year), "164951009", "195042002"]
    codes = generator.permutation(codes)[: generator.integers(4, len(codes) + 1)].tolist()
    targets = (generator.random((n, len(codes))) < share).astype(float)
    targets[generator.random(targets.shape) < unknown] = np.nan
    outputs = generator.random((n, len(codes))) < share
    got = challenge_score.challenge_score(year, codes, targets, outputs)
    np.testing.assert_allclose(got, _by_definition(year, codes, targets, outputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("year", YEARS)
def test_perfect_is_one_and_sinus_rhythm_throughout_is_zero(year):
    codes, generator = _codes(year), np.random.default_rng(year)
    targets = (generator.random((300, len(codes))) < 0.1).astype(float)
    assert challenge_score.challenge_score(year, codes, targets, targets) == pytest.approx(1, abs=1e-15)
    inactive = np.zeros_like(targets)
    inactive[:, codes.index(SINUS_RHYTHM)] = 1
    assert challenge_score.challenge_score(year, codes, targets, inactive) == 0
    silent = challenge_score.challenge_score(year, codes, targets, np.zeros_like(targets))
    assert silent < 0  # saying nothing earns less than saying sinus rhythm


def test_a_hand_computed_score():
    """One recording of AF that was called AF and flutter, one of sinus rhythm called sinus rhythm (2020).

    Observed: (1 + 0.5) / 2 + 1; correct: 1 + 1; inactive: AF said to be sinus rhythm alone, 0.25 / 2, and 1.
    """
    codes = ["164889003", "164890007", SINUS_RHYTHM]
    got = challenge_score.challenge_score(2020, codes, [[1, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 0, 1]])
    assert got == pytest.approx((1.75 - 1.125) / (2 - 1.125), abs=1e-15)


@pytest.mark.parametrize(("year", "n_classes", "n_codes"), [(2020, 24, 27), (2021, 26, 30)])
def test_tables(year, n_classes, n_codes):
    codes = _codes(year)
    alignment = challenge_score.align(year, codes)
    assert len(codes) == n_codes
    assert len(alignment.classes) == n_classes
    assert alignment.absent == alignment.unscored == []
    assert (alignment.membership.sum(axis=0) == 1).all()
    weights = challenge_score._table(year).weights
    np.testing.assert_array_equal(weights, weights.T)
    np.testing.assert_array_equal(np.diag(weights), 1)
    assert weights.min() == 0.15


def test_align_says_what_is_absent_and_unscored():
    alignment = challenge_score.align(2021, ["733534002", "6374002", "164951009"])
    assert alignment.unscored == ["164951009"]
    assert "733534002|164909002" not in alignment.absent
    assert len(alignment.absent) == 24
    # Complete left bundle branch block is scored in 2021 only.
    assert challenge_score.align(2020, ["733534002", "164889003"]).unscored == ["733534002"]


def test_equivalent_codes_are_one_class():
    """Either code of a pair, or both, says the same."""
    codes = ["713427006", "59118001", "164889003"]
    targets = np.array([[0, 1, 0], [0, 0, 1]])
    scores = {
        challenge_score.challenge_score(2020, codes, targets, [[*said, 0], [0, 0, 1]])
        for said in ([1, 0], [0, 1], [1, 1])
    }
    assert scores == {1.0}


def test_only_sinus_rhythm_is_undefined():
    assert np.isnan(challenge_score.challenge_score(2020, [SINUS_RHYTHM, "164889003"], [[1, 0]], [[1, 0]]))


def test_resampled_equals_repeated_records():
    generator, codes = np.random.default_rng(4), _codes(2021)
    targets = (generator.random((40, len(codes))) < 0.15).astype(float)
    outputs = generator.random(targets.shape) < 0.15
    counts = bootstrap.draw(np.arange(40) // 2, 30, seed=0)
    left_out = bootstrap.leave_one_out(np.arange(40) // 2)
    scored = challenge_score.bootstrap_challenge_score(2021, codes, targets, outputs, counts, left_out)
    assert scored.metric == "challenge_2021"
    for r in (0, 7, 29):
        rows = np.repeat(np.arange(40), counts[:, r])
        expected = challenge_score.challenge_score(2021, codes, targets[rows], outputs[rows])
        np.testing.assert_allclose(scored.resampled[r, 0], expected, atol=1e-12)
    assert scored.left_out.shape == (20, 1)
    for kind in ("percentile", "bca"):
        found = scored.macro("half", 0.95, kind)
        assert found.low < found.point < found.high


def _validation(n=400, year=2020, seed=0):
    """Recordings of one to three diagnoses, and probabilities that know something about them."""
    generator, codes = np.random.default_rng(seed), _codes(year)
    common = np.linspace(0.02, 0.25, len(codes))
    targets = (generator.random((n, len(codes))) < common).astype(float)
    logits = np.log(common / (1 - common)) + 2.5 * (targets - common) + generator.normal(0, 1, targets.shape)
    return codes, targets, 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("year", YEARS)
def test_tuned_thresholds_beat_common_ones_and_are_deterministic(year):
    codes, targets, probabilities = _validation(year=year)
    thresholds = challenge_score.tune_thresholds(year, codes, targets, probabilities)
    np.testing.assert_array_equal(
        thresholds, challenge_score.tune_thresholds(year, codes, targets, probabilities)
    )
    # Permuting the recordings changes nothing, permuting the columns carries the thresholds along.
    order = np.random.default_rng(1).permutation(len(targets))
    permuted = challenge_score.tune_thresholds(year, codes, targets[order], probabilities[order])
    np.testing.assert_array_equal(thresholds, permuted)

    def score(t):
        outputs = challenge_score.binarise(year, codes, probabilities, t)
        return challenge_score.challenge_score(year, codes, targets, outputs)

    best_common = max(score(np.full(len(codes), t)) for t in np.linspace(0.02, 0.98, 49))
    assert score(thresholds) > best_common
    assert score(thresholds) > score(np.full(len(codes), 0.5))


def test_no_single_threshold_improves_on_the_tuned_ones():
    """The end of the ascent is a maximum along every class, against brute force over all cuts."""
    codes, targets, probabilities = _validation(n=60)
    targets[np.random.default_rng(2).random(targets.shape) < 0.05] = np.nan
    thresholds = challenge_score.tune_thresholds(2020, codes, targets, probabilities)

    def score(t):
        outputs = challenge_score.binarise(2020, codes, probabilities, t)
        return challenge_score.challenge_score(2020, codes, targets, outputs)

    best, stands_for = score(thresholds), _same_diagnosis(2020)
    for name in ("164889003", SINUS_RHYTHM, "713427006", "111975006"):
        columns = [k for k, code in enumerate(codes) if stands_for.get(code, code) == name]
        merged = probabilities[:, columns].mean(axis=1)
        for cut in [np.inf, *merged.tolist()]:
            other = thresholds.copy()
            other[columns] = cut
            assert score(other) <= best + 1e-9


def test_thresholds_of_pairs_agree_and_unscored_columns_stay_silent():
    codes, targets, probabilities = _validation(n=100)
    codes, extra = [*codes, "164951009"], np.ones((100, 1))
    targets, probabilities = np.hstack([targets, extra]), np.hstack([probabilities, extra])
    thresholds = challenge_score.tune_thresholds(2020, codes, targets, probabilities)
    outputs = challenge_score.binarise(2020, codes, probabilities, thresholds)
    one, other = codes.index("284470004"), codes.index("63593006")
    assert thresholds[one] == thresholds[other]
    np.testing.assert_array_equal(outputs[:, one], outputs[:, other])
    assert np.isinf(thresholds[-1])
    assert not outputs[:, -1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2019, ["164889003"], [[1]], [[1]]), "year"),
        ((2020, ["NORM"], [[1]], [[1]]), "SNOMED"),
        ((2020, ["164889003"] * 2, [[1, 1]], [[1, 1]]), "twice"),
        ((2020, ["164889003"], [[1]], [[0.4]]), "outputs"),
        ((2020, ["164889003"], [[0.5]], [[1]]), "targets"),
        ((2020, ["164889003"], [[1, 0]], [[1, 0]]), "targets"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        challenge_score.challenge_score(*arguments)


def test_thresholds_need_probabilities():
    with pytest.raises(ValueError, match="NaN"):
        challenge_score.tune_thresholds(2020, ["164889003"], [[1]], [[np.nan]])
    with pytest.raises(ValueError, match="differ"):
        challenge_score.tune_thresholds(2020, ["164889003"], [[1]], [[0.1], [0.2]])
    with pytest.raises(ValueError, match="thresholds"):
        challenge_score.binarise(2020, ["164889003"], [[0.1]], [0.5, 0.5])
