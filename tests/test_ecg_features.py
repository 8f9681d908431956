"""Simple ECG features: against annotations of cardiologists, known synthetic signals, and their own definitions."""

import dataclasses
import warnings

import numpy as np
import pytest

from ecg_files import DATA, SHARED
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.evaluation import ecg_features as ecg_features_module
from ecg_jax.evaluation.delineation import NO_WAVES, band_pass, delineate, median_beat, moving_mean, r_peaks
from ecg_jax.evaluation.ecg_features import (
    FEATURE_NAMES,
    FeatureTable,
    ecg_features,
    frontal_axis,
    store_features,
)

RATE = 240.0
ANNOTATED = {"1": DATA / "ludb" / "1.hea", "112": DATA / "ludb_annotated" / "112.hea"}
LUDB_LEADS = tuple(lead.lower() for lead in CANONICAL_LEADS)


def named(values):
    return dict(zip(FEATURE_NAMES, values, strict=True))


def annotations(path, lead):
    """[(symbol, begin, peak, end)] of one lead of LUDB in seconds; NaN where a boundary is not annotated."""
    import wfdb

    marks = wfdb.rdann(str(path.with_suffix("")), lead)
    symbols, times = marks.symbol, marks.sample / 500.0
    waves = []
    for i, symbol in enumerate(symbols):
        if symbol in "pNt":
            begin = times[i - 1] if i and symbols[i - 1] == "(" else np.nan
            end = times[i + 1] if i + 1 < len(symbols) and symbols[i + 1] == ")" else np.nan
            waves.append((symbol, begin, times[i], end))
    return waves


def ludb_truth(folder, record):
    """R peaks of lead II [n], and for each wave medians over leads and beats of (begin, end) relative to R."""
    every = {lead: annotations(folder / record, lead) for lead in LUDB_LEADS}
    peaks = np.array([peak for symbol, _, peak, _ in every["ii"] if symbol == "N"])
    reach = {"p": (-0.40, -0.03), "N": (-0.10, 0.10), "t": (0.08, 0.60)}
    waves = {}
    for symbol, (low, high) in reach.items():
        edges = [
            (begin - r, end - r)
            for r in peaks
            for lead in LUDB_LEADS
            for s, begin, peak, end in every[lead]
            if s == symbol and low < peak - r < high
        ]
        waves[symbol] = np.nanmedian(edges, axis=0) if len(edges) >= 6 * len(peaks) else None
    return peaks, waves


def detection(found, truth):
    """(hits, misses, false ones) within 100 ms, in the annotated stretch of a record."""
    found = found[(found > truth.min() - 0.3) & (found < truth.max() + 0.3)]
    near = np.abs(found[:, None] - truth) <= 0.1
    return near.any(axis=0).sum(), (~near.any(axis=0)).sum(), (~near.any(axis=1)).sum()


@pytest.mark.parametrize("record", ANNOTATED)
def test_against_cardiologists(record):
    """LUDB 1 (sinus rhythm) and 112 (atrial fibrillation): every R peak, and durations."""
    signal = Preprocessing().apply(read_wfdb(ANNOTATED[record], record, assume_gain=1000)).signal
    truth, waves = ludb_truth(DATA / "ludb_annotated", record)
    peaks = r_peaks(signal / 1000.0, RATE) / RATE
    assert detection(peaks, truth) == (len(truth), 0, 0)
    assert np.abs(peaks[:, None] - truth).min(axis=0).max() < 0.03
    found = named(ecg_features(signal, RATE))
    assert found["heart_rate"] == pytest.approx(60.0 / np.median(np.diff(truth)), rel=0.05)
    assert found["qrs_ms"] == pytest.approx(1000.0 * np.ptp(waves["N"]), abs=20.0)
    assert found["qt_ms"] == pytest.approx(1000.0 * (waves["t"][1] - waves["N"][0]), abs=40.0)
    if waves["p"] is None:
        assert found["p_found"] == 0.0
        assert np.isnan(found["pr_ms"])
        assert found["rr_irregularity"] > 0.05
    else:
        assert found["p_found"] == 1.0
        assert found["pr_ms"] == pytest.approx(1000.0 * (waves["N"][0] - waves["p"][0]), abs=20.0)
        assert found["rr_irregularity"] < 0.05


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger set of real recordings is not here")
def test_against_ludb():
    """Every fourth of 120 records, rhythms and blocks of all kinds."""
    counts, errors, p_waves = np.zeros(3), [], []
    for header in sorted((SHARED / "ludb" / "data").glob("*.hea"))[::4]:
        signal = Preprocessing().apply(read_wfdb(header, header.stem, assume_gain=1000)).signal
        truth, waves = ludb_truth(header.parent, header.stem)
        counts += detection(r_peaks(signal / 1000.0, RATE) / RATE, truth)
        found = named(ecg_features(signal, RATE))
        row = [found["qrs_ms"] - 1000.0 * np.ptp(waves["N"]), np.nan, np.nan]
        if waves["p"] is not None:
            row[1] = found["pr_ms"] - 1000.0 * (waves["N"][0] - waves["p"][0])
        if waves["t"] is not None:
            row[2] = found["qt_ms"] - 1000.0 * (waves["t"][1] - waves["N"][0])
        errors.append(row)
        p_waves.append((waves["p"] is not None, found["p_found"] == 1.0))
    hits, missed, false = counts
    assert hits / (hits + missed) > 0.995
    assert hits / (hits + false) > 0.995
    bias, spread = np.nanmedian(errors, axis=0), np.nanquantile(np.abs(errors), 0.9, axis=0)
    assert (np.abs(bias) <= (6.0, 8.0, 15.0)).all(), bias
    assert (spread <= (20.0, 20.0, 35.0)).all(), spread
    annotated, found = np.array(p_waves).T
    assert found[annotated].mean() > 0.95
    assert found[~annotated].mean() < 0.7  # fibrillation waves pass for P waves in some


@pytest.fixture(scope="module")
def synthetic():
    """Thirty synthetic recordings: (truth, features)."""
    made = []
    for index in range(30):
        recording, truth = synthetic_recording(3, index, 10.0, RATE)
        made.append((truth, named(ecg_features(recording.signal, RATE))))
    return made


def test_rate_of_synthetic_ecg(synthetic):
    for truth, found in synthetic:
        tolerance = 0.15 if truth.rhythm == "irregular" else 0.03
        assert found["heart_rate"] == pytest.approx(truth.heart_rate, rel=tolerance)


def test_axis_of_synthetic_ecg(synthetic):
    """Q and S lie at other angles than R, which turns the whole by a few degrees."""
    for truth, found in synthetic:
        difference = (found["qrs_axis_deg"] - truth.axis_deg + 180.0) % 360.0 - 180.0
        assert abs(difference) < 6.0
        assert found["qrs_axis_cos"] == pytest.approx(np.cos(np.deg2rad(found["qrs_axis_deg"])))
        assert found["qrs_axis_sin"] == pytest.approx(np.sin(np.deg2rad(found["qrs_axis_deg"])))


def test_st_and_rhythm_of_synthetic_ecg(synthetic):
    levels = {}
    for truth, found in synthetic:
        # Along the axis the ST vector shows in full, whatever lead it points to.
        i, avf = found["st60_mv_I"], found["st60_mv_aVF"] * 2.0 / np.sqrt(3.0)
        along = i * np.cos(np.deg2rad(truth.axis_deg)) + avf * np.sin(np.deg2rad(truth.axis_deg))
        levels.setdefault(truth.st, []).append(along)
        if truth.rhythm == "irregular":
            assert found["rr_irregularity"] > 0.03
        else:
            assert found["rr_irregularity"] < 0.04
            assert found["p_found"] == 1.0
    assert np.median(levels["st_depression"]) < -0.1
    assert -0.05 < np.median(levels["st_normal"]) < 0.12
    assert np.median(levels["st_elevation"]) > 0.15


def test_amplitudes_of_a_made_beat():
    """Gaussians of known height; a QS complex counts as S; Sokolow-Lyon and Cornell are sums of these."""
    time = np.arange(2400) / RATE
    signal = np.zeros((2400, 12))
    lead = {name: i for i, name in enumerate(CANONICAL_LEADS)}

    def add(name, centre, width, height):
        for beat in np.arange(0.6, 9.8, 0.8):
            signal[:, lead[name]] += height * np.exp(-0.5 * ((time - beat - centre) / width) ** 2)

    for name in CANONICAL_LEADS:
        add(name, 0.0, 0.013, 1.0)
        add(name, -0.16, 0.02, 0.15)
        add(name, 0.28, 0.045, 0.3)
    add("aVL", 0.0, 0.013, 0.5)
    add("V1", 0.0, 0.013, -2.2)
    add("V3", 0.035, 0.012, -0.9)
    add("V5", 0.0, 0.013, 0.4)
    found = named(ecg_features(signal, RATE))
    assert found["r_mv_II"] == pytest.approx(1.0, abs=0.12)
    assert found["r_mv_aVL"] == pytest.approx(1.5, abs=0.15)
    assert found["s_mv_V1"] == pytest.approx(-1.2, abs=0.15)
    assert found["r_mv_V1"] == pytest.approx(0.0, abs=0.05)
    assert found["s_mv_V3"] == pytest.approx(-0.85, abs=0.15)
    assert found["p_mv_II"] == pytest.approx(0.15, abs=0.03)
    assert found["t_mv_II"] == pytest.approx(0.3, abs=0.04)
    assert found["st60_mv_II"] == pytest.approx(0.0, abs=0.05)
    assert found["sokolow_lyon_mv"] == pytest.approx(found["r_mv_V5"] - found["s_mv_V1"])
    assert found["cornell_mv"] == pytest.approx(found["r_mv_aVL"] - found["s_mv_V3"])
    assert found["heart_rate"] == pytest.approx(75.0, abs=0.5)
    assert found["rr_sd_ms"] < 5.0
    assert found["qtc_ms"] == pytest.approx(found["qt_ms"] / np.cbrt(0.8))
    assert found["usual_beats"] == 1.0


def test_gain_scales_amplitudes_only():
    recording, _ = synthetic_recording(4, 1, 10.0, RATE)
    one, two = named(ecg_features(recording.signal, RATE)), named(ecg_features(2.0 * recording.signal, RATE))
    for name in FEATURE_NAMES:
        if "_mv" in name:
            assert two[name] == pytest.approx(2.0 * one[name], abs=1e-6, nan_ok=True), name
        elif name.startswith("log_power"):
            assert two[name] == pytest.approx(one[name] + np.log(4.0))
        else:
            assert two[name] == pytest.approx(one[name], abs=1e-6, nan_ok=True), name


def test_int16_means_microvolts():
    signal = np.rint(1000.0 * synthetic_recording(4, 2, 10.0, RATE)[0].signal).astype(np.int16)
    np.testing.assert_allclose(
        ecg_features(signal, RATE), ecg_features(signal.astype(np.float32) / 1000.0, RATE)
    )


def test_other_rates_measure_the_same():
    for index in range(3):
        fast, slow = (
            named(ecg_features(synthetic_recording(7, index, 10.0, rate, noise_mv=0.0)[0].signal, rate))
            for rate in (500.0, 240.0)
        )
        assert slow["heart_rate"] == pytest.approx(fast["heart_rate"], rel=0.02)
        assert slow["qrs_ms"] == pytest.approx(fast["qrs_ms"], abs=12.0)
        assert slow["qrs_axis_deg"] == pytest.approx(fast["qrs_axis_deg"], abs=3.0)


def test_missing_leads_are_nan_there_and_only_there():
    signal = synthetic_recording(4, 3, 10.0, RATE)[0].signal.copy()
    signal[:, [5, 8]] = 0.0  # aVF and V3
    found = named(ecg_features(signal, RATE))
    lost = {name for name, value in found.items() if np.isnan(value)}
    assert lost == {
        *(
            f"{kind}_{lead}"
            for kind in ("p_mv", "q_mv", "r_mv", "s_mv", "t_mv", "st60_mv", "log_power")
            for lead in ("aVF", "V3")
        ),
        *(f"{wave}_axis_{form}" for wave in ("p", "qrs", "t") for form in ("deg", "cos", "sin")),
        "cornell_mv",
    }


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros((2400, 12)),
        np.zeros((2400, 12), np.int16),
        np.zeros((0, 12)),
        np.ones((100, 12)),
        np.random.default_rng(0).normal(0, 0.01, (240, 12)),
        np.random.default_rng(0).normal(0, 30.0, (2400, 12)),
        np.eye(2400, 12),
        np.outer(np.arange(2400) / 100.0, np.ones(12)),
    ],
)
def test_no_ecg_gives_nan_and_no_warning(signal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ecg_features(signal, RATE)
    assert found.shape == (len(FEATURE_NAMES),)
    assert not np.isinf(found).any()
    if not np.ptp(signal, axis=0).any() if len(signal) else True:
        assert np.isnan(found).all()


def test_p_wave_is_unknown_where_no_beat_can_be_told(monkeypatch):
    """Not "no P wave": that is an absent P before a beat that was found."""
    signal = synthetic_recording(1, 0, 10.0, RATE)[0].signal
    monkeypatch.setattr(ecg_features_module, "delineate", lambda *_: NO_WAVES)
    assert np.isnan(named(ecg_features(signal, RATE))["p_found"])
    absent = dataclasses.replace(NO_WAVES, qrs_on=-0.05, qrs_off=0.05)
    monkeypatch.setattr(ecg_features_module, "delineate", lambda *_: absent)
    assert named(ecg_features(signal, RATE))["p_found"] == 0.0


@pytest.mark.parametrize(
    ("signal", "rate", "message"),
    [
        (np.zeros((2400, 8)), RATE, "shape"),
        (np.zeros(2400), RATE, "shape"),
        (np.zeros((2400, 12), np.int32), RATE, "int32"),
        (np.full((2400, 12), np.nan), RATE, "NaN"),
        (np.zeros((2400, 12)), 50.0, "too few"),
    ],
)
def test_refused_signals(signal, rate, message):
    with pytest.raises(ValueError, match=message):
        ecg_features(signal, rate)


def test_names_are_unique_and_finite_on_real_ecg(synthetic):
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES) == 110
    assert len({tuple(found) for _, found in synthetic}) == 1


def test_of_a_store(synthetic_store):
    store = Store(synthetic_store)
    rows = np.array([5, 0, 17])
    features = store_features(store, rows)
    assert features.shape == (3, len(FEATURE_NAMES))
    for row, values in zip(rows, features, strict=True):
        np.testing.assert_array_equal(values, ecg_features(store.read(row), store.rate_hz))
    np.testing.assert_array_equal(store_features(store, rows[[1, 1, 0]]), features[[1, 1, 0]])
    assert store_features(store, rows[:0]).shape == (0, len(FEATURE_NAMES))


def test_frontal_axis():
    """Lead I at 0 degrees, aVF at +90: a vector of 60 degrees, seen through Goldberger's lead."""
    for degrees in (-150.0, -60.0, 0.0, 60.0, 90.0, 135.0):
        x, y = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        one, two = x, x * 0.5 + y * np.sqrt(3.0) / 2.0
        assert np.rad2deg(frontal_axis(one, two - one / 2.0)) == pytest.approx(degrees)


def test_band_pass_is_a_band_without_phase():
    time = np.arange(2400)[:, None] / RATE
    slow, middle, fast = (np.sin(2 * np.pi * f * time + 0.3) for f in (0.1, 10.0, 80.0))
    out = band_pass(slow + middle + fast + 5.0, RATE, 1.0, 40.0)
    assert np.abs(out - middle)[240:-240].max() < 0.03  # mirroring leaves a kink in the slow wave
    constant = band_pass(np.full((2400, 1), 5.0), RATE, 0.0, 0.5)
    np.testing.assert_allclose(constant, 5.0)


def test_moving_mean():
    values = np.random.default_rng(0).standard_normal((20, 2))
    expected = [values[max(i - 2, 0) : i + 3].mean(axis=0) for i in range(20)]
    np.testing.assert_allclose(moving_mean(values, 5), expected)


def test_r_peaks_survive_one_artefact_and_a_pause():
    signal = synthetic_recording(1, 0, 10.0, RATE)[0].signal
    clean = r_peaks(signal, RATE)
    with_artefact = signal.copy()
    middle = (clean[4] + clean[5]) // 2
    with_artefact[middle - 3 : middle + 3] += 15.0
    found = r_peaks(with_artefact, RATE)
    assert set(clean[[0, 1, 2, 3, -1, -2]]) <= set(found)
    assert len(r_peaks(np.zeros((2400, 12)), RATE)) == 0
    assert len(r_peaks(signal[:60], RATE)) == 0


def test_median_beat_leaves_out_the_odd_one():
    signal = band_pass(synthetic_recording(1, 0, 10.0, RATE)[0].signal, RATE, 0.5, 40.0)
    peaks = r_peaks(signal, RATE)
    usual, r, share, noise = median_beat(signal, peaks, RATE)
    odd = signal.copy()
    odd[peaks[3] - 60 : peaks[3] + 60] *= -1.0
    beat, _, share_odd, _ = median_beat(odd, peaks, RATE)
    assert share == 1.0
    assert share_odd < 1.0
    assert np.abs(beat - usual).max() < 0.1 * np.abs(usual).max()
    assert noise.shape == usual.shape[:1]
    assert ((noise > 0.0) & (noise < 0.05)).all()
    assert usual[r].max() > 0.3
    assert len(median_beat(signal, peaks[:0], RATE)[0]) == 0
    assert delineate(np.zeros((240, 12)), 96, RATE, np.zeros(240)) is NO_WAVES


def test_table_for_a_linear_model():
    nan = np.nan
    names = ("a", "b", "constant", "unknown", "c")
    train = np.array(
        [
            [1.0, 5.0, 7.0, nan, nan],
            [2.0, nan, 7.0, nan, 1.0],
            [3.0, nan, 7.0, nan, 2.0],
            [1000.0, 6.0, 7.0, nan, 4.0],
        ]
    )
    table = FeatureTable.fit(train, names)
    assert table.names == ("a", "b", "c", "b_missing", "c_missing")
    out = table.transform(train)
    np.testing.assert_allclose(out[:, :3].mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(out[:, :3].std(axis=0), 1.0)
    np.testing.assert_array_equal(out[:, 3:], [[0, 1], [1, 0], [1, 0], [0, 0]])
    # Test values never enter the fit: unseen ones are clipped, missing ones become the training median.
    test = table.transform(np.array([[1e9, nan, nan, 3.0, nan], [2.5, 5.5, 7.0, nan, 2.0]]))
    assert test[0, 0] == 5.0
    np.testing.assert_allclose(test[0, 1], (5.5 - table.mean[1]) / table.scale[1])
    np.testing.assert_array_equal(test[:, 3:], [[1, 1], [0, 0]])
    assert np.isfinite(test).all()


def test_table_merges_marks_that_say_the_same():
    train = np.random.default_rng(0).standard_normal((20, 4))
    train[:5, :3] = np.nan
    table = FeatureTable.fit(train, ("p", "q", "r", "s"))
    assert table.names == ("p", "q", "r", "s", "p_missing")


def test_table_without_a_feature_that_varies():
    table = FeatureTable.fit(np.ones((5, 2)), ("a", "b"))
    assert table.names == ()
    assert table.transform(np.random.default_rng(0).standard_normal((3, 2))).shape == (3, 0)
    # That a constant is missing here and there is still something that varies.
    table = FeatureTable.fit(np.array([[7.0, 1.0], [np.nan, 1.0]]), ("a", "b"))
    assert table.names == ("a_missing",)
    np.testing.assert_array_equal(table.transform(np.array([[5.0, 2.0], [np.nan, 2.0]])), [[0], [1]])


def test_refused_tables():
    with pytest.raises(ValueError, match="shape"):
        FeatureTable.fit(np.ones((5, 3)), ("a", "b"))
    table = FeatureTable.fit(np.arange(6.0).reshape(3, 2), ("a", "b"))
    with pytest.raises(ValueError, match="fewer"):
        table.transform(np.ones((2, 1)))
    with pytest.raises(ValueError, match="infinite"):
        table.transform(np.array([[np.inf, 1.0]]))
