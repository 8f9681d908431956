"""Corruptions of recordings: lead algebra, noise at its stated strength, agreement with `ecg-jax prepare`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_files import write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS, Recording, limb_residual
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.evaluation import corruptions
from ecg_jax.prepare import prepare

RATE = 240.0
LEAD = {name: i for i, name in enumerate(CANONICAL_LEADS)}


def stored(index=0, seconds=10.0) -> np.ndarray:
    """A synthetic recording as it comes out of a store, float64 [T, 12] in millivolts."""
    return Preprocessing().apply(synthetic_recording(3, index, seconds)[0]).signal / 1000


def electrodes(signal) -> np.ndarray:
    """Potentials [T, 9] against the right arm, solved from I, II and V1-V6."""
    out = np.zeros((len(signal), 9))
    out[:, 1], out[:, 2] = signal[:, LEAD["I"]], signal[:, LEAD["II"]]
    out[:, 3:] = signal[:, 6:] + (signal[:, LEAD["I"]] + signal[:, LEAD["II"]])[:, None] / 3
    return out


def leads_of(potentials) -> np.ndarray:
    """The twelve leads from their definitions."""
    ra, la, ll, *chest = potentials.T
    limb = [la - ra, ll - ra, ll - la, ra - (la + ll) / 2, la - (ra + ll) / 2, ll - (ra + la) / 2]
    return np.stack(limb + [v - (ra + la + ll) / 3 for v in chest], axis=1)


@pytest.mark.parametrize(
    ("name", "exchanged"),
    [("RA/LA", (0, 1)), ("RA/LL", (0, 2)), ("LA/LL", (1, 2)), ("V1/V2", (3, 4)), ("RA/RL", None)],
)
def test_swaps_are_what_the_electrodes_would_give(name, exchanged):
    clean = leads_of(np.random.default_rng(0).normal(size=(50, 9)))
    potentials = electrodes(clean)
    if exchanged is None:
        potentials[:, 0] = potentials[:, 2]  # on the right leg, whose potential is that of the left leg
    else:
        a, b = exchanged
        potentials[:, [a, b]] = potentials[:, [b, a]]
    np.testing.assert_allclose(
        corruptions.swap(clean, corruptions.SWAPS[name]), leads_of(potentials), atol=1e-12
    )
    assert set(corruptions.SWAPS) == {"RA/LA", "RA/LL", "LA/LL", "V1/V2", "RA/RL"}


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32), name=st.sampled_from(["RA/LA", "RA/LL", "LA/LL", "V1/V2"]), missing=st.data()
)
def test_a_swap_twice_is_no_swap(seed, name, missing):
    microvolts = np.random.default_rng(seed).integers(-32767, 32768, (40, 12)).astype(np.int16)
    lost = missing.draw(st.sets(st.integers(0, 11)))
    microvolts[:, list(lost)] = 0
    once = corruptions.swap(microvolts / 1000, corruptions.SWAPS[name])
    assert (~once.any(axis=0)).sum() == len(lost)
    twice = corruptions.swap(once, corruptions.SWAPS[name])
    np.testing.assert_array_equal(corruptions.to_microvolts(twice), microvolts)
    if not lost:
        assert np.abs(once - microvolts / 1000).max() > 0


def test_a_swap_that_needs_a_missing_lead_loses_its_lead():
    signal = stored()
    signal[:, [LEAD["I"], LEAD["V2"]]] = 0
    out = corruptions.swap(signal, corruptions.SWAPS["RA/LA"])
    assert not out[:, LEAD["I"]].any()
    np.testing.assert_array_equal(out[:, LEAD["II"]], signal[:, LEAD["III"]])
    out = corruptions.swap(signal, corruptions.SWAPS["V1/V2"])
    assert not out[:, LEAD["V1"]].any()
    np.testing.assert_array_equal(out[:, LEAD["V2"]], signal[:, LEAD["V1"]])
    assert not corruptions.swap(signal, corruptions.SWAPS["RA/RL"])[:, [LEAD["II"], LEAD["V2"]]].any()


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(list(corruptions.NOISES)),
    snr=st.sampled_from([24.0, 18.0, 12.0, 6.0, 0.0, -6.0]),
    record=st.text(max_size=8),
    seed=st.integers(0, 1000),
    samples=st.integers(600, 2400),
    lost=st.sets(st.sampled_from([6, 7, 8, 9, 10, 11])),
)
def test_noise_has_its_snr_and_keeps_the_identities(kind, snr, record, seed, samples, lost):
    clean = stored()[:samples]
    clean[:, list(lost)] = 0
    noisy = corruptions.add_noise(clean, RATE, kind, snr, seed, record)
    kept = corruptions.to_microvolts(noisy) / 1000
    there = [lead for lead in range(12) if lead not in lost]
    noise = kept - clean
    measured = 10 * np.log10(clean[:, there].var(axis=0).mean() / noise[:, there].var(axis=0).mean())
    assert abs(measured - snr) < 0.1
    assert not kept[:, list(lost)].any()
    # Two roundings to 1 uV of I, II and the lead itself, those of the clean recording and these.
    assert limb_residual(kept).max() <= 0.0025 + 1e-9
    assert limb_residual(noisy - clean).max() < 1e-9
    np.testing.assert_array_equal(noisy, corruptions.add_noise(clean, RATE, kind, snr, seed, record))


def test_noise_is_that_of_the_record_and_only_scaled_by_the_snr():
    clean = stored()
    at_0, at_20 = (corruptions.add_noise(clean, RATE, "muscle", snr, 0, "a") - clean for snr in (0.0, 20.0))
    np.testing.assert_allclose(at_0, 10 * at_20, atol=1e-9)
    for seed, record, kind in ((0, "b", "muscle"), (1, "a", "muscle"), (0, "a", "baseline_wander")):
        other = corruptions.add_noise(clean, RATE, kind, 0.0, seed, record) - clean
        assert abs(np.corrcoef(other[:, LEAD["V1"]], at_0[:, LEAD["V1"]])[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("baseline_wander", 0.0, 0.6),
        ("powerline_50hz", 49.0, 51.0),
        ("powerline_60hz", 59.0, 61.0),
        ("muscle", 18.0, 112.0),
    ],
)
def test_noise_lies_in_its_band(kind, low, high):
    noise = corruptions.electrode_noise(kind, 24_000, RATE, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise, axis=0)) ** 2
    frequency = np.fft.rfftfreq(24_000, 1 / RATE)
    inside = (frequency >= low) & (frequency <= high)
    assert (power[inside].sum(axis=0) > 0.98 * power.sum(axis=0)).all()
    assert np.abs(noise.mean(axis=0)).max() < 1e-9
    # Electrodes are independent, or share the frequency only: no two give the same.
    assert np.abs(np.corrcoef(noise.T) - np.eye(9)).max() < 0.999
    if kind == "muscle":  # bursts: Gaussian noise of constant strength has 3
        kurtosis = (noise**4).mean(axis=0) / (noise**2).mean(axis=0) ** 2
        assert kurtosis.min() > 5


def test_noise_that_the_rate_cannot_carry_is_refused():
    rng = np.random.default_rng(0)
    for kind, rate, fits in (
        ("powerline_50hz", 100, False),
        ("powerline_60hz", 125, False),
        ("powerline_60hz", 240, True),
        ("muscle", 60, False),
        ("muscle", 100, True),
        ("baseline_wander", 50, True),
    ):
        assert corruptions.frequencies_fit(kind, rate) is fits
        if not fits:
            with pytest.raises(ValueError, match="cannot carry"):
                corruptions.electrode_noise(kind, 500, rate, rng)
    with pytest.raises(ValueError, match="unknown noise 'hum'; known: baseline_wander"):
        corruptions.electrode_noise("hum", 500, 240, rng)
    with pytest.raises(ValueError, match="recording x has no signal"):
        corruptions.add_noise(np.zeros((600, 12)), RATE, "muscle", 6.0, 0, "x")


@pytest.mark.parametrize("n_leads", [1, 2, 3, 6, 8, 12])
def test_fewer_leads_are_what_prepare_makes_of_such_a_file(n_leads, tmp_path):
    leads = corruptions.LEAD_SETS[n_leads]
    assert len(leads) == n_leads
    signal = synthetic_recording(5, 0, 10.0, 500.0)[0].signal
    write_record(tmp_path / "whole", "r", signal)
    columns = [CANONICAL_LEADS.index(lead) for lead in leads]
    write_record(tmp_path / "few", "r", signal[:, columns], leads=leads)
    for name in ("whole", "few"):
        prepare("wfdb", tmp_path / name, tmp_path / f"{name}_store", workers=1, progress=False)
    whole, few = (Store(tmp_path / f"{name}_store").read(0) for name in ("whole", "few"))
    kept = corruptions.to_microvolts(corruptions.keep_leads(whole / 1000, leads))
    # Derived before resampling and rounding there, from rounded leads here.
    assert np.abs(kept.astype(int) - few).max() <= 1
    assert (kept.any(axis=0) == few.any(axis=0)).all()
    np.testing.assert_array_equal(kept[:, columns], whole[:, columns])
    assert few.any(axis=0).sum() == {1: 1, 2: 6, 3: 7, 6: 6, 8: 12, 12: 12}[n_leads]


def test_another_device_is_what_prepare_makes_of_its_file():
    recording = synthetic_recording(3, 1, 10.0, 500.0)[0]
    ours = corruptions.from_device(stored(1), RATE, 125.0)
    # The same ECG sampled at 125 Hz in the first place.
    slow = Preprocessing(rate_hz=125.0).apply(recording).signal / 1000
    theirs = Preprocessing().apply(Recording("r", slow, 125.0, CANONICAL_LEADS)).signal / 1000
    assert ours.shape == theirs.shape == (2400, 12)
    inner = slice(60, -60)
    assert np.abs(ours[inner] - theirs[inner]).max() < 0.005
    assert np.abs(ours - stored(1))[inner].max() > 0.02  # something was lost
    assert limb_residual(ours).max() < 0.003


def test_another_device_keeps_length_and_missing_leads():
    signal = stored()[:607]
    signal[:, LEAD["V3"]] = 0
    out = corruptions.from_device(signal, RATE, 62.5)
    assert out.shape == signal.shape
    assert not out[:, LEAD["V3"]].any()
    tone = np.zeros((2400, 12))
    tone[:, 0] = np.sin(2 * np.pi * 40 * np.arange(2400) / RATE)
    # Beyond the 25 Hz of the device; the reflection at the ends leaves a step there.
    assert np.abs(corruptions.from_device(tone, RATE, 50.0)[120:-120]).max() < 0.01
    with pytest.raises(ValueError, match="nothing more to give"):
        corruptions.from_device(signal, RATE, 240.0)


def test_quantisation_and_length():
    microvolts = np.arange(-32767, 32767, 13, dtype=np.int16)
    microvolts = microvolts[: len(microvolts) // 12 * 12].reshape(-1, 12)
    np.testing.assert_array_equal(corruptions.to_microvolts(microvolts / 1000), microvolts)
    assert np.abs(corruptions.to_microvolts(np.full((1, 12), 50.0))).max() == 32767
    assert corruptions.to_microvolts(np.full((1, 12), -5.0), clip_mv=2.0).min() == -2000
    np.testing.assert_array_equal(corruptions.shorten(stored(), RATE, 1.25), stored()[:300])
    assert len(corruptions.shorten(stored(), RATE, 99.0)) == 2400
