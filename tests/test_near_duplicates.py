"""Copies of recordings are found; other recordings, of the same patient too, are not taken for copies."""

import numpy as np
import pytest
from scipy import signal as sp

from ecg_files import SHARED
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.errors import UserError
from ecg_jax.evaluation import kept_rows, near_duplicates
from ecg_jax.evaluation import signatures as signatures_module
from ecg_jax.evaluation.delineation import band_pass, r_peaks
from ecg_jax.evaluation.near_duplicates import beats_agree, compare, is_match, near_identical
from ecg_jax.evaluation.signatures import signatures
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
    return near_identical(signatures(sample, cache=cache), signatures(store))


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
    found = {(ids[m.row_a], ids[m.row_b]) for m in near_identical(*2 * [signatures(sample, cache=cache)])}
    assert found == {("137", "138"), ("143", "144"), ("145", "463")}
    patients = sample.column("patient_id")
    assert len(patients) - len(set(patients)) > 20  # so the claim about patients is not empty


def test_other_recordings_of_a_patient_are_no_copies(tmp_path):
    """Two pieces of one long, regular recording: everything the same except what does not repeat."""
    long = synthetic_recording(2, 3, seconds=24.0, rate=RATE)[0].signal
    halves = write_store(tmp_path / "s", [("a", "p", 1, long[:2400]), ("b", "p", 2, long[2640:5040])])
    assert near_identical(signatures(halves, np.array([0])), signatures(halves, np.array([1]))) == []


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


FIELDS = ("rows", "beat_row", "beat", "row", "position", "descriptor", "without")


def assert_same(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_signatures_are_kept_for_the_rows_asked_for(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_rows, "PART_RECORDS", 100)
    folder = tmp_path / f"signatures-v{signatures_module.VERSION}-{sample.fingerprint}"
    direct = signatures(sample)
    some = np.array([5, 17, 200])
    assert_same(signatures(sample, some, tmp_path), direct.of(some))
    assert sorted(path.name for path in folder.iterdir()) == ["000000.npz", "000002.npz"]

    read = []
    monkeypatch.setattr(
        Store, "read", lambda self, row, read_one=Store.read: read.append(row) or read_one(self, row)
    )
    more = np.array([3, 5, 17, 150])
    assert_same(signatures(sample, more, tmp_path), direct.of(more))
    assert read == [3, 150]  # the others are kept
    both = np.union1d(some, more)
    assert_same(signatures(sample, both, tmp_path), direct.of(both))
    assert read == [3, 150]
    np.testing.assert_array_equal(direct.of(some).beats_of(17), direct.beats_of(17))

    path = folder / "000000.npz"
    whole = path.read_bytes()
    for damage in (b"no signatures", b"", whole[:5000]):
        path.write_bytes(damage)
        read.clear()
        assert_same(signatures(sample, both, tmp_path), direct.of(both))
        assert read == [3, 5, 17]


def test_an_interrupted_run_goes_on_where_it_was(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_rows, "PART_RECORDS", 10)
    read, read_one = [], Store.read

    def read_some(self, row):
        if row == 25:
            raise KeyboardInterrupt
        return read_one(self, row)

    monkeypatch.setattr(Store, "read", read_some)
    with pytest.raises(KeyboardInterrupt):
        signatures(sample, np.arange(40), tmp_path)
    monkeypatch.setattr(Store, "read", lambda self, row: read.append(row) or read_one(self, row))
    found = signatures(sample, np.arange(40), tmp_path)
    assert read == list(range(20, 40))
    assert_same(found, signatures(sample, np.arange(40)))


def test_processes_compute_the_same(sample, monkeypatch, tmp_path):
    rows = np.arange(0, 120, 3)
    direct = signatures(sample, rows)
    monkeypatch.setattr(kept_rows, "PROCESSES_FROM", 10)
    monkeypatch.setattr(kept_rows.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(signatures_module, "describe_signal", lambda *_: pytest.fail("computed here"))
    assert_same(signatures(sample, rows), direct)


def test_a_cache_that_cannot_be_written(sample, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep signatures in"):
        signatures(sample, np.array([1]), tmp_path / "file")


@pytest.mark.parametrize("same", [True, False])
def test_candidates_are_those_of_all_pairs(sample, cache, monkeypatch, same):
    """Small blocks, cut down often, give what one comparison of everything with everything gives."""
    whole = signatures(sample, cache=cache)
    wide = whole.descriptor.astype(np.float32)
    i, j = np.nonzero(wide @ wide.T >= near_duplicates.MIN_COSINE)
    rows = np.stack([whole.row[i], whole.row[j]], axis=1)
    expected = {tuple(pair) for pair in (rows[rows[:, 0] < rows[:, 1]] if same else rows).tolist()}
    for block in (4096, 60):
        monkeypatch.setattr(near_duplicates, "_BLOCK", block)
        monkeypatch.setattr(near_duplicates, "_GATHERED", 10 * block)
        found = list(near_duplicates.candidates(whole, whole, same))
        assert len(set(found)) == len(found)
        assert {(p, q) for p, q, _ in found} == expected
        assert set(np.unique([(p, q) for p, q, _ in found], axis=0, return_counts=True)[1]) <= {1, 2, 3}


def test_a_store_with_itself_is_half_the_square(sample, cache, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", 100)
    products, multiply = [], near_duplicates._agreeing

    def counted(a, b, *rest):
        products.append(a.size * b.size)
        return multiply(a, b, *rest)

    monkeypatch.setattr(near_duplicates, "_agreeing", counted)
    whole = signatures(sample, cache=cache)
    counts = {}
    for same in (True, False):
        products.clear()
        list(near_duplicates.candidates(whole, whole, same))
        counts[same] = sum(products)
    assert counts[False] == whole.descriptor.size**2
    assert 0.5 <= counts[True] / counts[False] < 0.55


def test_the_best_of_many_hits(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PARTNERS", 2)
    hits = np.array(
        [
            # row of a, row of b, shift, 100 cosine
            (1, 7, 0, 91), (1, 8, 0, 95), (1, 9, 0, 93),  # 7 is one partner too many
            (2, 7, 0, 92), (2, 7, 5, 99), (2, 7, 14, 91), (2, 7, 100, 94), (2, 7, 200, 93),
        ]
    ).T  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(3):
        row_a, row_b, shift, cosine = hits[:, rng.permutation(hits.shape[1])]
        found = np.stack(near_duplicates.best_shifts(row_a, row_b, shift, cosine))
        assert found.T.tolist() == [
            [1, 8, 0, 95], [1, 9, 0, 93], [2, 7, 5, 99], [2, 7, 100, 94], [2, 7, 200, 93]
        ]  # fmt: skip


def test_hits_of_one_product_are_bounded(sample, cache, monkeypatch):
    """A thousand times the same beat: every descriptor keeps a few of them, and memory stays small."""
    monkeypatch.setattr(near_duplicates, "_HITS", 5)
    one = signatures(sample, cache=cache).descriptor[:1].astype(np.float32)
    block, wide = np.repeat(one, 50, axis=0), np.repeat(one, 1000, axis=0)
    i, _, _ = near_duplicates._agreeing(block, wide, np.arange(50), np.arange(1000), same=False)
    assert np.bincount(i).tolist() == [5] * 50
    i, j, _ = near_duplicates._agreeing(block, block, np.arange(50), np.arange(50), same=True)
    assert (i < j).all()
    assert np.bincount(i).tolist() == [5] * 45 + [4, 3, 2, 1]


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
    assert near_identical(*2 * [signatures(store)]) == []
    assert near_identical(signatures(store, every(store)[:0]), signatures(store)) == []


def test_missing_leads_in_both_are_no_hindrance(tmp_path, sample):
    signal = sample.read(0).copy()
    signal[:, 7:] = 0  # five of the eight leads that are compared
    store = write_store(tmp_path / "s", [("a", None, 1, signal), ("b", None, 2, 1.2 * signal[120:] / 1000.0)])
    (match,) = near_identical(*2 * [signatures(store)])
    assert (match.row_a, match.row_b, match.shift_s) == (0, 1, 0.5)


def test_clusters_of_copies_stay_bounded(tmp_path, sample, monkeypatch):
    """A simulator's test signal many times over: each is still found, without every pair."""
    signal = sample.read(0) / 1000.0
    monkeypatch.setattr(near_duplicates, "MAX_PARTNERS", 3)
    store = write_store(tmp_path / "s", [(str(i), None, 1, signal * (1 + 0.01 * i)) for i in range(12)])
    found = near_identical(*2 * [signatures(store)])
    assert {row for match in found for row in (match.row_a, match.row_b)} == set(range(12))
    assert len(found) <= 12 * 3


def test_other_rate_is_refused(tmp_path, sample):
    other = write_store(tmp_path / "s", [("a", None, 1, np.zeros((900, 12), np.int16))], rate=100.0)
    with pytest.raises(UserError, match=r"240 samples per second.* has 100"):
        near_identical(signatures(sample), signatures(other))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger set of real recordings is not here")
def test_known_copies_across_corpora(tmp_path, sample, cache):
    """HR000nn are PTB-XL 000nn, here against the 100 Hz variant; S0001 is s0010_re; ETEST is E00009."""
    prepare("challenge", SHARED / "challenge2021", tmp_path / "challenge", workers=1, progress=False)
    prepare("wfdb", SHARED / "ptbdb", tmp_path / "ptbdb", workers=1, progress=False)
    challenge, ptbdb = Store(tmp_path / "challenge"), Store(tmp_path / "ptbdb")

    def found(a, b):
        ids = a.column("record_id"), b.column("record_id")
        return {
            (ids[0][m.row_a], ids[1][m.row_b])
            for m in near_identical(signatures(a, cache=cache), signatures(b, cache=cache))
        }

    copies = {record for record in challenge.column("record_id") if record.startswith("HR")}
    in_sample = {f"HR{int(record):05d}" for record in sample.column("record_id")}
    expected = {(str(int(record[2:])), record) for record in copies & in_sample}
    assert len(expected) >= 8
    assert found(sample, challenge) == expected
    assert {a for a, b in found(challenge, ptbdb)} == {"S0001"}
