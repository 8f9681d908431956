"""The preprocessing contract: NaN rule, resampling, rounding, saturation, comparison."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_files import ecg
from ecg_jax.data.preprocessing import Preprocessing, fill_nan, longest_still_run, resample
from ecg_jax.data.recording import CANONICAL_LEADS, BadRecording, Recording
from ecg_jax.errors import UserError

RATES = [100, 128, 250, 256, 257, 360, 400, 500, 512, 977, 1000]


def recording(signal, rate=500.0, leads=CANONICAL_LEADS, **more):
    return Recording("r", signal, rate, tuple(leads), **more)


def kinds(processed):
    return {problem.kind for problem in processed.problems}


def test_plain_recording_has_no_problems_and_rounds_to_microvolts():
    signal = ecg(10.0, 240.0)
    processed = Preprocessing().apply(recording(signal, 240.0))
    assert processed.signal.dtype == np.int16
    assert processed.signal.shape == (2400, 12)
    np.testing.assert_array_equal(processed.signal, np.rint(signal * 1000))
    assert processed.problems == []
    assert processed.flags == []
    assert (processed.saturated, processed.missing_mask) == (0, 0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frequency", [0.5, 1.0, 10.0, 40.0])
def test_sines_keep_gain_and_phase(rate, frequency):
    """In-band sines come out as the same function of time, to a microvolt per millivolt."""
    n = 10 * rate + 3
    phase = np.linspace(0, 2, 3)
    signal = np.sin(2 * np.pi * frequency * np.arange(n)[:, None] / rate + phase)
    out = resample(signal, rate, 240.0)
    assert len(out) == math.floor(n * 240 / rate)
    expected = np.sin(2 * np.pi * frequency * np.arange(len(out))[:, None] / 240 + phase)
    error = np.abs(out - expected)
    assert error[240:-240].max() < 1e-3
    # Beyond the ends the signal is unknown; the reflection must not ring.
    if frequency <= 10:
        assert error.max() < 0.15  # the last outputs lie behind the last input sample


@pytest.mark.parametrize("rate", [500, 1000, 400])
@pytest.mark.parametrize("frequency", [125.0, 140.0, 180.0])
def test_frequencies_above_120_hz_do_not_alias(rate, frequency):
    signal = np.sin(2 * np.pi * frequency * np.arange(10 * rate) / rate)[:, None]
    out = resample(signal, rate, 240.0)
    assert np.abs(out[240:-240]).max() < 1e-3


def test_constant_offset_does_not_ring_at_the_ends():
    out = resample(np.full((5000, 2), 1.5), 500, 240.0)
    np.testing.assert_allclose(out, 1.5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), rate=st.sampled_from([100, 250, 256.41, 257, 360, 500, 999.5, 1000]))
def test_any_length_resamples_to_floor(n, rate):
    out = resample(np.random.default_rng(n).standard_normal((n, 2)), rate, 240.0)
    assert len(out) == math.floor(n * 240 / rate + 1e-9)
    assert np.isfinite(out).all()


def test_resampling_is_deterministic_and_per_lead():
    signal = ecg()
    out = resample(signal, 500, 240)
    np.testing.assert_array_equal(out, resample(signal.copy(), 500, 240))
    np.testing.assert_array_equal(out[:, 3:4], resample(signal[:, 3:4], 500, 240))


def test_nan_rule():
    x = np.array([np.nan, np.nan, 2.0, np.nan, np.nan, 5.0, 7.0, np.nan])[:, None]
    filled, count = fill_nan(np.concatenate([x, np.arange(8.0)[:, None], np.full((8, 1), np.nan)], axis=1))
    np.testing.assert_allclose(filled[:, 0], [0, 0, 2, 3, 4, 5, 7, 7])
    np.testing.assert_array_equal(filled[:, 1], np.arange(8))
    assert np.isnan(filled[:, 2]).all()
    assert count == 5


def test_nan_samples_are_interpolated_and_reported():
    signal = ecg(10.0, 240.0)
    broken = signal.copy()
    broken[500:505, 6] = np.nan
    processed = Preprocessing().apply(recording(broken, 240.0))
    expected = np.linspace(signal[499, 6], signal[505, 6], 7)[1:-1]
    np.testing.assert_allclose(processed.signal[500:505, 6], expected * 1000, atol=0.5)
    np.testing.assert_array_equal(np.delete(processed.signal, 6, 1), np.rint(np.delete(signal, 6, 1) * 1000))
    assert kinds(processed) == {"nan_samples"}
    assert "5 samples" in processed.problems[0].detail


def test_lead_of_nan_only_is_missing_or_derived():
    signal = ecg(10.0, 240.0)
    broken = signal.copy()
    broken[:, 4] = np.nan
    broken[:, 9] = np.nan
    processed = Preprocessing().apply(recording(broken, 240.0))
    assert processed.missing_mask == 1 << 9
    np.testing.assert_allclose(processed.signal[:, 4], signal[:, 4] * 1000, atol=0.51)
    assert kinds(processed) == {"flat_leads", "derived_leads", "missing_leads"}


def test_saturation_is_clipped_and_counted():
    signal = ecg(10.0, 240.0)
    signal[1000:1007, 8] = 40.0
    signal[1100:1103, 9] = -50.0
    processed = Preprocessing().apply(recording(signal, 240.0, rail_samples=4))
    assert processed.saturated == 14
    assert (processed.signal[1000:1007, 8] == 32767).all()
    assert (processed.signal[1100:1103, 9] == -32767).all()
    assert {"saturated", "beyond_int16"} <= kinds(processed)


def test_clip_limits_and_counts_without_complaint():
    signal = ecg(10.0, 240.0)
    signal[50, 8] = 5.0
    processed = Preprocessing(clip_mv=3.0).apply(recording(signal, 240.0))
    assert np.abs(processed.signal).max() == 3000
    assert processed.saturated == 1
    assert processed.problems == []


def test_mimic_order_in_any_unit_gives_the_canonical_signal():
    """aVF before aVL, and the leads reversed: order by name, never by position."""
    signal = ecg()
    expected = Preprocessing().apply(recording(signal)).signal
    order = [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]
    for swapped in (order, order[::-1]):
        processed = Preprocessing().apply(
            recording(signal[:, swapped], leads=[CANONICAL_LEADS[i] for i in swapped])
        )
        np.testing.assert_array_equal(processed.signal, expected)
        assert kinds(processed) == {"reordered_leads"}


def test_names_are_reported_once_each():
    signal = ecg(10.0, 240.0)
    leads = [name.lower() for name in CANONICAL_LEADS] + ["vx", "vy", "vz"]
    processed = Preprocessing().apply(
        recording(np.concatenate([signal, signal[:, :3]], axis=1), 240.0, leads)
    )
    assert kinds(processed) == {"lead_spelling", "extra_leads"}
    assert (
        Preprocessing().apply(recording(signal, 240.0, [n.upper() for n in CANONICAL_LEADS])).problems == []
    )
    processed = Preprocessing().apply(
        recording(np.concatenate([signal, 2 * signal[:, 6:7]], axis=1), 240.0, (*CANONICAL_LEADS, "V1"))
    )
    assert kinds(processed) == {"repeated_leads"}
    np.testing.assert_array_equal(processed.signal, np.rint(signal * 1000))


def test_short_recordings_are_kept_and_flagged():
    processed = Preprocessing().apply(recording(ecg(2.0)))
    assert kinds(processed) == {"short"}
    assert len(processed.signal) == 480
    assert Preprocessing().apply(recording(ecg(2.5))).problems == []


def test_limb_leads_that_disagree_locally_are_kept_and_reported():
    """PTB-XL 162 at 500 Hz: aVR and aVF are 2.56 mV off for nine samples."""
    signal = ecg()
    signal[791:800, [3, 5]] += 2.56
    processed = Preprocessing().apply(recording(signal))
    assert kinds(processed) == {"limb_leads_disagree"}
    assert "2.56 mV in 9 of 5000 samples (from sample 791 to 799)" in processed.problems[0].detail


def test_partly_flat_lead_is_reported():
    signal = ecg()
    signal[1000:2000, 11] = 0.1
    processed = Preprocessing().apply(recording(signal))
    assert kinds(processed) == {"partly_flat_leads"}
    assert "V6" in processed.problems[0].detail


def test_longest_still_run():
    x = np.array([[1, 0, 5], [1, 1, 5], [2, 1, 5], [2, 1, 5], [2, 0, 6]], float)
    np.testing.assert_array_equal(longest_still_run(x), [3, 3, 4])
    np.testing.assert_array_equal(longest_still_run(x[:1]), [1, 1, 1])


@pytest.mark.parametrize("rate", [0.0, -500.0, 10.0, math.nan, math.inf, 1e6])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(BadRecording) as error:
        Preprocessing().apply(recording(ecg(), rate))
    assert error.value.problem.kind == "implausible_rate"


@pytest.mark.parametrize("n", [0, 1])
def test_empty_recordings_are_refused(n):
    with pytest.raises(BadRecording) as error:
        Preprocessing().apply(recording(ecg()[:n]))
    assert error.value.problem.kind == "no_signal"


def test_contract_survives_json():
    contract = Preprocessing(clip_mv=3.0, window_s=2.5, normalisation="ptbxl_canonical")
    assert Preprocessing.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_contract_refuses_missing_and_unknown_fields():
    values = Preprocessing().to_dict()
    with pytest.raises(UserError, match="rate_hz"):
        Preprocessing.from_dict({k: v for k, v in values.items() if k != "rate_hz"})
    with pytest.raises(UserError, match="gain"):
        Preprocessing.from_dict({**values, "gain": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [("leads", ("I", "II")), ("unit", "uV"), ("rate_hz", 500.0), ("nan_rule", "zero"), ("clip_mv", 3.0)],
)
def test_incompatible_contracts_name_the_field(field, value):
    other = dataclasses.replace(Preprocessing(), **{field: value})
    with pytest.raises(UserError, match=f"{field} is .* in the checkpoint but .* in the store"):
        Preprocessing().check_compatible(other, "the checkpoint", "the store")


def test_window_and_normalisation_are_not_compared():
    Preprocessing().check_compatible(Preprocessing(window_s=2.5, normalisation="ptbxl_canonical"))


def test_window_samples():
    assert Preprocessing(window_s=2.5).window_samples == 600
    with pytest.raises(UserError, match="window_s"):
        _ = Preprocessing().window_samples


def test_a_contract_this_code_cannot_execute_is_refused():
    with pytest.raises(UserError, match="cannot apply"):
        Preprocessing(nan_rule="zero").apply(recording(ecg()))
    with pytest.raises(UserError, match="resampler"):
        Preprocessing(resampler="linear").apply(recording(ecg()))
