"""Lead algebra and plausibility of amplitudes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_files import ecg
from ecg_jax.data.recording import (
    CANONICAL_LEADS,
    KINDS,
    BadRecording,
    Problem,
    canonical_index,
    check_amplitude,
    limb_residual,
    robust_range,
    to_canonical,
)

SIGNAL = ecg(2.0, 240.0)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(12)),
    spelling=st.lists(st.sampled_from([str, str.lower, str.upper]), min_size=12, max_size=12),
    extra=st.lists(st.sampled_from(["vx", "vy", "vz", "MLII", "resp"]), max_size=3),
)
def test_any_order_and_spelling_gives_the_canonical_signal(order, spelling, extra):
    leads = [spelling[i](CANONICAL_LEADS[i]) for i in order] + extra
    noise = np.random.default_rng(0).standard_normal((len(SIGNAL), len(extra)))
    result = to_canonical(np.concatenate([SIGNAL[:, order], noise], axis=1), leads)
    np.testing.assert_array_equal(result.signal, SIGNAL)
    assert not result.missing.any()
    assert not result.derived.any()
    assert not result.flat.any()


@pytest.mark.parametrize("pair", list(itertools.combinations(range(6), 2)))
def test_any_two_limb_leads_give_all_six(pair):
    keep = [*pair, *range(6, 12)]
    result = to_canonical(SIGNAL[:, keep], [CANONICAL_LEADS[i] for i in keep])
    np.testing.assert_allclose(result.signal, SIGNAL, atol=1e-12)
    assert not result.missing.any()
    assert list(np.flatnonzero(result.derived)) == [i for i in range(6) if i not in pair]


def test_derivation_follows_einthoven_and_goldberger():
    one, two = SIGNAL[:, 0], SIGNAL[:, 1]
    result = to_canonical(SIGNAL[:, :2], ["I", "II"]).signal
    expected = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    np.testing.assert_allclose(result[:, 2:6], expected, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(kept=st.sets(st.integers(0, 11), min_size=1))
def test_a_lead_is_copied_derived_or_missing_and_never_invented(kept):
    kept = sorted(kept)
    result = to_canonical(SIGNAL[:, kept], [CANONICAL_LEADS[i] for i in kept])
    limb = sum(i < 6 for i in kept)
    for i in range(12):
        if i in kept:
            np.testing.assert_array_equal(result.signal[:, i], SIGNAL[:, i])
        assert result.derived[i] == (i not in kept and i < 6 and limb >= 2)
        assert result.missing[i] == (i not in kept and not result.derived[i])
        if result.missing[i]:
            assert not result.signal[:, i].any()


def test_flat_limb_lead_is_derived_and_flat_chest_lead_is_missing():
    signal = SIGNAL.copy()
    signal[:, 2] = 0.25
    signal[:, 7] = -1.0
    signal[:, 8] = np.nan
    result = to_canonical(signal, CANONICAL_LEADS)
    assert list(np.flatnonzero(result.flat)) == [2, 7, 8]
    assert list(np.flatnonzero(result.missing)) == [7, 8]
    np.testing.assert_allclose(result.signal[:, 2], SIGNAL[:, 2], atol=1e-12)
    assert not result.signal[:, 7:9].any()


def test_first_of_two_leads_with_one_name_is_used():
    result = to_canonical(np.stack([SIGNAL[:, 0], 2 * SIGNAL[:, 0]], axis=1), ["I", "i"])
    np.testing.assert_array_equal(result.signal[:, 0], SIGNAL[:, 0])


def test_names_must_match_columns():
    with pytest.raises(ValueError, match="lead names"):
        to_canonical(SIGNAL, ["I", "II"])


@pytest.mark.parametrize(("name", "index"), [("aVR", 3), (" AVR ", 3), ("v6", 11), ("vx", None), ("", None)])
def test_canonical_index(name, index):
    assert canonical_index(name) == index


def test_limb_residual_finds_the_broken_samples():
    signal = SIGNAL.copy()
    signal[100:110, 5] += 2.56
    residual = limb_residual(signal)
    assert residual[100:110].min() == pytest.approx(2.56)
    assert residual[:100].max() < 1e-12


def test_robust_range_ignores_single_spikes():
    signal = SIGNAL.copy()
    signal[7] = 1000.0
    assert (robust_range(signal) < 10).all()
    assert (robust_range(signal) >= 0.9 * robust_range(SIGNAL)).all()


@pytest.mark.parametrize("factor", [1e-3, 1 / 2000, 0.01, 20.0, 1000.0])
def test_amplitudes_no_ecg_has_are_refused(factor):
    with pytest.raises(BadRecording, match="gain or unit") as error:
        check_amplitude("x", SIGNAL * factor, np.zeros(12, bool))
    assert error.value.problem.kind == "implausible_amplitude"


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_plausible_amplitudes_pass(factor):
    check_amplitude("x", SIGNAL * factor, np.zeros(12, bool))


def test_nothing_but_missing_leads_is_refused():
    with pytest.raises(BadRecording) as error:
        check_amplitude("x", 0 * SIGNAL, np.ones(12, bool))
    assert error.value.problem.kind == "no_signal"


def test_kinds_of_problems_are_a_closed_list():
    for kind in KINDS:
        Problem("x", kind, "kept", "d")
    with pytest.raises(ValueError, match="unknown kind"):
        Problem("x", "surprise", "kept", "d")
