"""Copies of recordings are found; other recordings, of the same patient too, are not taken for copies."""

import shutil

import numpy as np
import pytest
from scipy import signal as sp

from ecg_files import SHARED
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.errors import UserError
from ecg_jax.evaluation import near_duplicates
from ecg_jax.evaluation.delineation import band_pass, r_peaks
from ecg_jax.evaluation.near_duplicates import beats_agree, compare, is_match, near_identical, signatures
from ecg_jax.prepare import prepare
from store_files import write_store
from test_corpora import SAMPLE

RATE = 240.0


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The real recordings that ship: 304 of PTB-XL at 100 Hz, three pairs of which are copies."""
    path = tmp_path_factory.mktemp("stores") / "sample"
    prepare("ptbxl", SAMPLE, path, workers=1, progress=False)
    return Store(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("signatures")


def every(store):
    return np.arange(len(store))


def seconds(signal):
    return np.arange(len(signal))[:, None] / RATE


def filtered(signal, low, high):
    return sp.sosfiltfilt(sp.butter(3, (low, high), "band", fs=RATE, output="sos"), signal, axis=0)


def resampled(signal):
    """To 100 Hz and back by another resampler than the one that made the store."""
    return sp.resample_poly(sp.resample_poly(signal, 5, 12, axis=0), 12, 5, axis=0)


COPIES = {
    "gain": lambda x: 1.1 * x,
    "offset": lambda x: x + 0.3,
    "mains": lambda x: x + 0.1 * np.sin(2 * np.pi * 50 * seconds(x)),
    "wander": lambda x: x + 0.4 * np.sin(2 * np.pi * 0.3 * seconds(x)),
    "noise": lambda x: x + 0.01 * np.random.default_rng(0).standard_normal(x.shape),
    "filter": lambda x: filtered(x, 0.5, 40.0),
    "resampled": resampled,
    "shifted": lambda x: x[120:],
    "cropped": lambda x: x[600:2040],
    "inside": lambda x: np.concatenate([x[::-1][-300:], x, x[::-1][:300]]),
}
SHIFT_S = dict.fromkeys(COPIES, 0.0) | {"shifted": 0.5, "cropped": 2.5, "inside": -1.25}
OVERLAP_S = dict.fromkeys(COPIES, 10.0) | {"shifted": 9.5, "cropped": 6.0}


@pytest.fixture(scope="module")
def copied(sample, tmp_path_factory):
    """Copies of every 25th recording of the sample, each in all ways."""
    rows = every(sample)[::25]
    signals = {row: sample.read(row) / 1000.0 for row in rows.tolist()}
    records = [
        (f"{row}-{name}", None, 1, change(signal))
        for row, signal in signals.items()
        for name, change in COPIES.items()
    ]
    return rows, write_store(tmp_path_factory.mktemp("stores") / "copies", records)


@pytest.fixture(scope="module")
def matches(sample, copied, cache):
    _, store = copied
    return near_identical(sample, every(sample), store, every(store), cache)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_where_they_are(sample, copied, matches, kind):
    rows, store = copied
    ids = store.column("record_id")
    found = {(m.row_a, ids[m.row_b]): m for m in matches}
    for row in rows.tolist():
        match = found[row, f"{row}-{kind}"]
        assert match.shift_s == pytest.approx(SHIFT_S[kind], abs=0.01)
        assert match.correlation >= 0.9
        assert match.residual_correlation >= 0.8
        assert match.overlap_s == pytest.approx(OVERLAP_S[kind], abs=0.02)


def test_nothing_else_is_found(sample, copied, matches):
    """Precision over 304 x 130 pairs; two of the recordings at hand have a true copy in the sample."""
    _, store = copied
    ids, samples = store.column("record_id"), sample.column("checksum")
    for match in matches:
        of = int(ids[match.row_b].split("-")[0])
        assert (
            match.row_a == of or samples[match.row_a] == samples[of] or _known_pair(sample, match.row_a, of)
        )


def _known_pair(sample, a, b):
    ids = sample.column("record_id")
    return {ids[a], ids[b]} in ({"137", "138"}, {"143", "144"}, {"145", "463"})


def test_precision_and_recall_within_the_sample(sample, cache):
    """46,056 pairs of 304 real recordings, many of one patient: the three known copies and nothing else."""
    ids = sample.column("record_id")
    found = {
        (ids[m.row_a], ids[m.row_b])
        for m in near_identical(sample, every(sample), sample, every(sample), cache)
    }
    assert found == {("137", "138"), ("143", "144"), ("145", "463")}
    patients = sample.column("patient_id")
    assert len(patients) - len(set(patients)) > 20  # so the claim about patients is not empty


def test_other_recordings_of_a_patient_are_no_copies(tmp_path):
    """Two pieces of one long, regular recording: everything the same except what does not repeat."""
    long = synthetic_recording(2, 3, seconds=24.0, rate=RATE)[0].signal
    halves = write_store(tmp_path / "s", [("a", "p", 1, long[:2400]), ("b", "p", 2, long[2640:5040])])
    assert near_identical(halves, np.array([0]), halves, np.array([1])) == []


def test_regular_rhythm_correlates_but_its_residual_does_not():
    """Why there are two correlations: identical beats at constant distance match at every shift of a beat."""
    rng = np.random.default_rng(0)
    one = synthetic_recording(0, 1, seconds=3.0, rate=RATE, noise_mv=0.0)[0].signal
    peak = r_peaks(one, RATE)[1]
    beat = one[peak - 80 : peak + 120] * np.hanning(200)[:, None]
    train = np.tile(beat, (12, 1))
    first, second = (train + 0.02 * rng.standard_normal(train.shape) for _ in range(2))
    bands = [band_pass(x[:, near_duplicates.COMPARED_LEADS], RATE, 3.0, 30.0) for x in (first, second)]
    peaks = r_peaks(first, RATE)
    shift, overlap, correlation, residual = compare(*bands, 0, peaks, RATE)
    assert (shift, overlap) == (0, 2400)
    assert correlation > 0.95
    assert abs(residual) < 0.3
    assert not is_match(correlation, residual)
    assert is_match(*compare(bands[0], 1.3 * bands[0], 0, peaks, RATE)[2:])


def test_compare_refuses_too_little():
    noise = np.random.default_rng(0).standard_normal((2400, 8))
    assert compare(noise, noise, 2400 - 1100, np.arange(100, 2400, 200), RATE) is None
    assert compare(noise, np.zeros_like(noise), 0, np.arange(100, 2400, 200), RATE) is None
    assert is_match(0.99, np.nan)
    assert not is_match(0.97, np.nan)
    assert not is_match(0.99, 0.79)


def test_beats_must_fall_on_each_other():
    beats = np.arange(100, 2400, 190)
    assert beats_agree(beats, beats, 0, (2400, 2400), RATE)
    assert beats_agree(beats, beats[4:] - 760, 760, (2400, 1640), RATE)
    assert not beats_agree(beats, beats + 60, 0, (2400, 2400), RATE)
    assert not beats_agree(beats, beats, 1300, (2400, 2400), RATE)  # 4.6 s in common
    assert not beats_agree(beats, np.arange(100, 2400, 240), 0, (2400, 2400), RATE)


def test_signatures_are_kept(sample, cache, monkeypatch, tmp_path):
    path = cache / f"signatures-v{near_duplicates.VERSION}-{sample.fingerprint}.npz"
    fresh = signatures(sample, cache=cache)
    assert path.is_file()
    some = np.array([5, 17, 200])
    direct = signatures(sample, some)
    monkeypatch.setattr(near_duplicates, "_compute", lambda *_: pytest.fail("computed again"))
    kept = signatures(sample, some, cache)
    for name in ("beat_row", "beat", "row", "position", "descriptor", "without"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(direct, name))
    assert set(kept.row) == set(some)
    assert len(fresh.of(some).row) == len(kept.row)
    np.testing.assert_array_equal(fresh.beats_of(17), kept.beats_of(17))

    shutil.copy(path, tmp_path)
    broken = tmp_path / path.name
    for damage in (b"no signatures", b"", path.read_bytes()[:5000]):
        broken.write_bytes(damage)
        with pytest.raises(UserError, match="remove it"):
            signatures(sample, some, tmp_path)


def test_short_flat_and_odd_recordings(tmp_path, synthetic_store):
    real = Store(synthetic_store).read(0)
    records = [
        ("short", None, 1, real[:300]),
        ("flat", None, 1, np.zeros((2400, 12), np.int16)),
        ("one sample", None, 2, real[:1]),
        ("constant", None, 2, np.full((2400, 12), 7, np.int16)),
        ("noise", None, 3, np.random.default_rng(0).normal(0, 0.1, (2400, 12))),
    ]
    store = write_store(tmp_path / "s", records)
    assert set(signatures(store).without) >= {0, 1, 2, 3}
    assert near_identical(store, every(store), store, every(store)) == []
    assert near_identical(store, every(store)[:0], store, every(store)) == []


def test_missing_leads_in_both_are_no_hindrance(tmp_path, sample):
    signal = sample.read(0).copy()
    signal[:, 7:] = 0  # five of the eight leads that are compared
    store = write_store(tmp_path / "s", [("a", None, 1, signal), ("b", None, 2, 1.2 * signal[120:] / 1000.0)])
    (match,) = near_identical(store, every(store), store, every(store))
    assert (match.row_a, match.row_b, match.shift_s) == (0, 1, 0.5)


def test_clusters_of_copies_stay_bounded(tmp_path, sample, monkeypatch):
    """A simulator's test signal many times over: each is still found, without every pair."""
    signal = sample.read(0) / 1000.0
    monkeypatch.setattr(near_duplicates, "MAX_PARTNERS", 3)
    store = write_store(tmp_path / "s", [(str(i), None, 1, signal * (1 + 0.01 * i)) for i in range(12)])
    found = near_identical(store, every(store), store, every(store))
    assert {row for match in found for row in (match.row_a, match.row_b)} == set(range(12))
    assert len(found) <= 12 * 3


def test_other_rate_is_refused(tmp_path, sample):
    other = write_store(tmp_path / "s", [("a", None, 1, np.zeros((900, 12), np.int16))], rate=100.0)
    with pytest.raises(UserError, match=r"240 samples per second.* has 100"):
        near_identical(sample, every(sample), other, every(other))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger set of real recordings is not here")
def test_known_copies_across_corpora(tmp_path, sample, cache):
    """HR000nn are PTB-XL 000nn, here against the 100 Hz variant; S0001 is s0010_re; ETEST is E00009."""
    prepare("challenge", SHARED / "challenge2021", tmp_path / "challenge", workers=1, progress=False)
    prepare("wfdb", SHARED / "ptbdb", tmp_path / "ptbdb", workers=1, progress=False)
    challenge, ptbdb = Store(tmp_path / "challenge"), Store(tmp_path / "ptbdb")

    def found(a, b):
        ids = a.column("record_id"), b.column("record_id")
        return {(ids[0][m.row_a], ids[1][m.row_b]) for m in near_identical(a, every(a), b, every(b), cache)}

    copies = {record for record in challenge.column("record_id") if record.startswith("HR")}
    in_sample = {f"HR{int(record):05d}" for record in sample.column("record_id")}
    expected = {(str(int(record[2:])), record) for record in copies & in_sample}
    assert len(expected) >= 8
    assert found(sample, challenge) == expected
    assert {a for a, b in found(challenge, ptbdb)} == {"S0001"}
