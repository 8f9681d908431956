"""Headers and signals of WFDB records, on real quirks (tests/data, see SOURCES.md there) and made ones."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_files import DATA, SHARED, checksum16, ecg, write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.header import HeaderError, parse_comments, parse_header
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import CANONICAL_LEADS, BadRecording
from ecg_jax.errors import UserError
from reader_checks import kinds, refusal

# ---------------------------------------------------------------- headers


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.hea")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_header_agrees_with_the_wfdb_package(path):
    """Both refuse the same real headers and read the same fields from the others."""
    try:
        theirs = wfdb.rdheader(str(path.with_suffix("")))
    except wfdb.io.header.HeaderSyntaxError:
        with pytest.raises(HeaderError):
            parse_header(path.read_text(), repair=False)
        return
    ours = parse_header(path.read_text(), repair=False)
    assert (ours.name, ours.rate, ours.n_samples) == (theirs.record_name, theirs.fs, theirs.sig_len)
    for i, signal in enumerate(ours.signals):
        assert signal.file == theirs.file_name[i]
        assert signal.format == theirs.fmt[i]
        assert signal.byte_offset == (theirs.byte_offset[i] or 0)
        assert (signal.gain, signal.baseline) == (theirs.adc_gain[i], theirs.baseline[i])
        assert (signal.unit or "mV") == theirs.units[i]
        assert signal.checksum == theirs.checksum[i]
        assert signal.lead == theirs.sig_name[i]


@pytest.mark.parametrize("name", ["E00001.mat", "a b", "x/y", "re%cord", "ok_1-2"])
def test_record_names_are_judged_as_wfdb_judges_them(tmp_path, name):
    write_record(tmp_path, "r", ecg(1.0), record_line=f"{name} 12 500 500")
    try:
        wfdb.rdheader(str(tmp_path / "r"))
        valid = "/" not in name
    except (wfdb.io.header.HeaderSyntaxError, ValueError, IndexError):
        valid = False
    if valid:
        read_wfdb(tmp_path / "r.hea", "r")
    else:
        assert refusal(tmp_path / "r.hea").kind == "header_refused"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "r 12\n",
        "r twelve 500 10\n",
        "r 2 500 10\nr.dat 16 1000/mV 16 0 0 0 0 I\n",
        "r 1 0 10\nr.dat 16 1000/mV 16 0 0 0 0 I\n",
        "r 1 nan 10\nr.dat 16 1000/mV 16 0 0 0 0 I\n",
        "r 1 500 10\nr.dat sixteen 1000/mV 16 0 0 0 0 I\n",
        "r 1 500 10\nr.dat 16 gain/mV 16 0 0 0 0 I\n",
        "r 1 500 10\nr.dat 16 1000/mV 16 zero 0 0 0 I\n",
        "r/3 1 500 10\nr.dat 16 1000/mV 16 0 0 0 0 I\n",
        "\x00\x01\x02",
    ],
)
@pytest.mark.parametrize("repair", [False, True])
def test_broken_headers_are_refused(tmp_path, text, repair):
    (tmp_path / "r.hea").write_text(text)
    assert refusal(tmp_path / "r.hea", repair=repair).kind == "header_refused"


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="r12 500.matI/#\n()+:xmVeE-\x00", max_size=120))
def test_the_header_parser_parses_or_refuses_anything(text):
    for repair in (False, True):
        try:
            header = parse_header(text, repair)
        except HeaderError:
            continue
        assert header.signals
        assert header.rate > 0


@pytest.mark.parametrize(
    ("comments", "expected"),
    [
        (("Age: 65", "Sex: Female", "Dx: 426783006,164889003"), (65.0, "F", ["164889003", "426783006"])),
        (("age: 81", "sex: female"), (81.0, "F", None)),
        (("<age>: 51", "<sex>: F"), (51.0, "F", None)),
        (("Age: NaN", "Sex: M", "Dx: "), (None, "M", [])),
        (("Age: -1", "Sex: Unknown", "Dx: Unknown"), (None, None, [])),
        (("Age: old", "Sex:", "Dx: RBBB,AF"), (None, None, ["AF", "RBBB"])),
        ((), (None, None, None)),
    ],
)
def test_comment_dialects(comments, expected):
    found = parse_comments(comments)
    assert (found["age"], found["sex"], found["dx"]) == expected


def test_textual_dx_of_a_real_header():
    header = parse_header((DATA / "cpsc2018" / "A0038.hea").read_text(), repair=False)
    assert parse_comments(header.comments) == {"age": 55.0, "sex": "M", "dx": ["Normal"]}


# ---------------------------------------------------------------- signals


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 600),
    leads=st.permutations(CANONICAL_LEADS),
    gain=st.sampled_from([200, 1000, 204.8, 4880]),
    baseline=st.integers(-500, 500),
)
def test_round_trip_through_the_wfdb_package(tmp_path, seed, n, leads, gain, baseline):
    """What the wfdb package writes is read back as the wfdb package reads it."""
    rng = np.random.default_rng(seed)
    digital = rng.integers(-32767, 32768, (n, 12))
    digital[rng.random((n, 12)) < 0.01] = -32768  # WFDB's invalid sample
    wfdb.wrsamp(
        "r",
        fs=360,
        units=["mV"] * 12,
        sig_name=list(leads),
        d_signal=digital,
        fmt=["16"] * 12,
        adc_gain=[gain] * 12,
        baseline=[baseline] * 12,
        write_dir=str(tmp_path),
    )
    expected = wfdb.rdrecord(str(tmp_path / "r")).p_signal
    recording = read_wfdb(tmp_path / "r.hea", "r")
    np.testing.assert_allclose(recording.signal, expected, atol=1e-12)
    assert recording.leads == tuple(leads)
    assert recording.rate == 360


@pytest.mark.parametrize("storage", ["80", "212", "24", "32"])
def test_other_formats_are_read_by_the_wfdb_package(tmp_path, storage):
    digital = np.rint(ecg(2.0) * 20).astype(int)
    digital[:10, 3] = {"80": 127, "212": 2047, "24": 2**23 - 1, "32": 2**31 - 1}[storage]
    wfdb.wrsamp(
        "r",
        fs=500,
        units=["mV"] * 12,
        sig_name=list(CANONICAL_LEADS),
        d_signal=digital,
        fmt=[storage] * 12,
        adc_gain=[20] * 12,
        baseline=[0] * 12,
        write_dir=str(tmp_path),
    )
    recording = read_wfdb(tmp_path / "r.hea", "r")
    np.testing.assert_allclose(recording.signal, digital / 20, atol=1e-12)
    assert recording.rail_samples == 10


def test_real_files_agree_with_the_wfdb_package():
    path = DATA / "challenge_2021" / "JS45544"
    theirs = wfdb.rdrecord(str(path))
    ours = read_wfdb(path.with_suffix(".hea"), "JS45544")
    np.testing.assert_allclose(ours.signal, theirs.p_signal, atol=1e-12)
    assert (ours.rate, ours.age, ours.sex) == (500, 77.0, "M")


def test_missing_signal_file_is_refused():
    assert refusal(DATA / "challenge_early" / "I0001.hea").kind == "missing_signal"


def test_missing_header_is_refused(tmp_path):
    assert refusal(tmp_path / "none.hea").kind == "missing_header"


@pytest.mark.parametrize("mat", [False, True])
@pytest.mark.parametrize("cut", [1, 24, 5000, 119_999])
def test_truncated_signal_is_refused(tmp_path, mat, cut):
    path = write_record(tmp_path, "r", ecg(), mat=mat)
    file = path.with_suffix(".mat" if mat else ".dat")
    file.write_bytes(file.read_bytes()[:-cut])
    assert refusal(path).kind == "truncated_signal"


def test_empty_signal_file_is_refused(tmp_path):
    path = write_record(tmp_path, "r", ecg())
    path.with_suffix(".dat").write_bytes(b"")
    assert refusal(path).kind == "truncated_signal"


def test_mat_that_is_not_the_described_matrix_is_refused(tmp_path):
    path = write_record(tmp_path, "r", ecg(), mat=True)
    mat = path.with_suffix(".mat")
    data = mat.read_bytes()
    mat.write_bytes(b"MATLAB 5.0 MAT-file" + data[19:])
    assert refusal(path).kind == "signal_refused"
    text = path.read_text()
    mat.write_bytes(data)
    path.write_text(text.replace("16+24", "16"))
    assert refusal(path).kind == "signal_refused"


def test_one_flipped_bit_breaks_the_checksum(tmp_path):
    path = write_record(tmp_path, "r", ecg())
    data = bytearray(path.with_suffix(".dat").read_bytes())
    data[1001] ^= 0x10
    path.with_suffix(".dat").write_bytes(data)
    problem = refusal(path)
    assert problem.kind == "bad_checksum"
    assert CANONICAL_LEADS[500 % 12] in problem.detail


def test_unsigned_checksums_are_the_same_checksums(tmp_path):
    signal = ecg()
    path = write_record(tmp_path, "r", signal)
    sums = [s.checksum % 65536 for s in parse_header(path.read_text(), False).signals]
    path = write_record(tmp_path, "r", signal, checksums=sums)
    assert max(sums) > 32767
    assert read_wfdb(path, "r").problems == []


def test_zero_checksums_are_kept_and_reported(tmp_path):
    path = write_record(tmp_path, "r", ecg(), checksums=[0] * 12)
    assert kinds(read_wfdb(path, "r")) == {"no_checksum"}


@pytest.mark.parametrize("mat", [False, True])
@pytest.mark.parametrize("n_samples", [2500, 4999])
def test_size_that_contradicts_the_header_is_refused_unless_a_checksum_vouches(tmp_path, mat, n_samples):
    signal = ecg()
    path = write_record(tmp_path, "r", signal, mat=mat, n_samples=n_samples, checksums=[0] * 12)
    assert refusal(path).kind == "signal_refused"
    sums = [checksum16(np.rint(signal[:n_samples, c] * 1000).astype("<i2")) for c in range(12)]
    path = write_record(tmp_path, "r", signal, mat=mat, n_samples=n_samples, checksums=sums)
    assert len(read_wfdb(path, "r").signal) == n_samples


def test_size_that_fits_no_number_of_samples_is_refused(tmp_path):
    path = write_record(tmp_path, "r", ecg(), record_line="r 12 500", checksums=[0] * 12)
    assert len(read_wfdb(path, "r").signal) == 5000
    with open(path.with_suffix(".dat"), "ab") as file:
        file.write(b"12")
    assert refusal(path).kind == "signal_refused"


@pytest.mark.parametrize("suffix", [".hea", ".dat"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_file_that_is_there_and_cannot_be_read_ends_the_command(tmp_path, monkeypatch, suffix, code):
    path = write_record(tmp_path, "r", ecg(1.0))
    original = Path.read_bytes

    def read_bytes(self):
        if self.suffix == suffix:
            raise OSError(code, os.strerror(code), str(self))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match=rf"Cannot read .*r\{suffix}: .*again") as error:
        read_wfdb(path, "r")
    assert not isinstance(error.value, BadRecording)


@pytest.mark.parametrize("name", ["x" * 300, "sub/none.dat", "."])
def test_signal_file_names_that_no_file_has(tmp_path, name):
    path = write_record(tmp_path, "r", ecg(1.0))
    path.write_text(path.read_text().replace("r.dat", name))
    assert refusal(path).kind == "missing_signal"


def test_header_with_a_byte_order_mark(tmp_path):
    path = write_record(tmp_path, "r", ecg(1.0))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_wfdb(path, "r").problems == []


def test_saturated_samples_are_counted_and_invalid_ones_are_nan(tmp_path):
    digital = np.rint(ecg() * 1000).astype("<i2")
    digital[10:13, 0] = 32767
    digital[20:22, 7] = -32767
    digital[30, 8] = -32768
    recording = read_wfdb(write_record(tmp_path, "r", digital), "r")
    assert recording.rail_samples == 5
    assert np.isnan(recording.signal[30, 8])
    assert np.isnan(recording.signal).sum() == 1
    processed = Preprocessing().apply(recording)
    assert {"saturated", "nan_samples"} <= {p.kind for p in processed.problems}


def test_fifteen_lower_case_leads_in_two_files_without_unit(tmp_path):
    """The real header of s0010_re on made signals: 12 leads and vx, vy, vz, gain 2000, checksums all zero."""
    shutil.copy(DATA / "ptbdb" / "s0010_re.hea", tmp_path)
    signal = ecg(38.4, 1000.0)
    np.rint(signal * 2000).astype("<i2").tofile(tmp_path / "s0010_re.dat")
    np.rint(signal[:, :3] * 2000).astype("<i2").tofile(tmp_path / "s0010_re.xyz")
    recording = read_wfdb(tmp_path / "s0010_re.hea", "r")
    assert recording.leads[12:] == ("vx", "vy", "vz")
    assert (recording.age, recording.sex) == (81.0, "F")
    assert kinds(recording) == {"no_checksum", "unit_assumed"}
    np.testing.assert_allclose(recording.signal[:, :12], signal, atol=0.00026)
    processed = Preprocessing().apply(recording)
    assert processed.signal.shape == (9216, 12)
    assert processed.flags == ["extra_leads", "lead_spelling", "no_checksum", "unit_assumed"]


def test_real_missing_leads():
    """JS45544: V2-V6 constant, V1 constant for a part."""
    processed = Preprocessing().apply(read_wfdb(DATA / "challenge_2021" / "JS45544.hea", "JS45544"))
    assert processed.missing_mask == 0b111110000000
    assert processed.flags == ["flat_leads", "missing_leads", "partly_flat_leads"]


def test_record_without_any_of_the_twelve_leads_is_refused(tmp_path):
    path = write_record(tmp_path, "r", ecg()[:, :2], leads=("MLII", "resp"))
    assert refusal(path).kind == "no_standard_leads"


def test_skew_and_mixed_rates_are_refused(tmp_path):
    path = write_record(tmp_path, "r", ecg())
    text = path.read_text()
    path.write_text(text.replace(" 16 1000", " 16:3 1000"))
    assert refusal(path).kind == "skewed_leads"
    path.write_text(text.replace(" 16 1000", " 16x2 1000"))
    assert refusal(path).kind == "mixed_rates"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger set of real recordings is not here")
def test_every_shared_header_is_read_or_refused_as_by_wfdb():
    for path in SHARED.rglob("*.hea"):
        try:
            theirs = wfdb.rdheader(str(path.with_suffix("")))
        except wfdb.io.header.HeaderSyntaxError:
            theirs = None
        try:
            ours = parse_header(path.read_text(), repair=False)
        except HeaderError:
            ours = None
        assert (ours is None) == (theirs is None), path
        if ours:
            assert [s.gain for s in ours.signals] == theirs.adc_gain, path
            assert [s.baseline for s in ours.signals] == theirs.baseline, path
            assert (ours.n_samples, ours.rate) == (theirs.sig_len, theirs.fs), path
