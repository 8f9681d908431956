"""Units and gains of WFDB records, and tables, on real quirks (tests/data, see SOURCES.md there) and made ones."""

import shutil

import numpy as np
import pytest
import wfdb

from ecg_files import DATA, ecg, write_digital_zero, write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers import iter_recordings
from ecg_jax.data.readers.header import parse_header
from ecg_jax.data.readers.table import read_table
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import CANONICAL_LEADS, BadRecording
from ecg_jax.errors import UserError
from reader_checks import CHALLENGE, kinds, refusal

# ---------------------------------------------------------------- units and gains


@pytest.mark.parametrize(
    ("gain", "per_mv", "expected"),
    [
        ("1000/mV", 1000, set()),
        ("1000/mv", 1000, set()),
        ("1000.0(0)/mV", 1000, set()),
        ("1/uV", 1000, set()),
        ("0.5/µV", 500, set()),
        ("0.5/\u03bcV", 500, set()),
        ("1000000/V", 1000, set()),
        ("0.001/nV", 1000, set()),
        ("2000", 2000, {"unit_assumed"}),
    ],
)
def test_units_and_gains_give_millivolts(tmp_path, gain, per_mv, expected):
    signal = ecg()
    recording = read_wfdb(write_record(tmp_path, "r", signal, gain=gain, per_mv=per_mv), "r")
    np.testing.assert_allclose(recording.signal, signal, atol=0.5 / per_mv + 1e-9)
    assert kinds(recording) == expected


def test_latin_1_micro_sign(tmp_path):
    signal = ecg()
    path = write_record(tmp_path, "r", signal, gain="1/µV")
    path.write_bytes(path.read_text().encode("latin-1"))
    np.testing.assert_allclose(read_wfdb(path, "r").signal, signal, atol=6e-4)


def test_baseline_is_subtracted(tmp_path):
    signal = ecg()
    digital = np.rint(signal * 1000 + 512).astype("<i2")
    recording = read_wfdb(write_record(tmp_path, "r", digital, gain="1000(512)/mV"), "r")
    np.testing.assert_allclose(recording.signal, signal, atol=6e-4)


def test_unit_that_is_no_voltage_is_refused_only_on_an_ecg_lead(tmp_path):
    signal = np.concatenate([ecg(), ecg()[:, :1]], axis=1)
    leads = (*CANONICAL_LEADS, "ABP")
    path = write_record(tmp_path, "r", signal, leads, gain=["1000/mV"] * 12 + ["10/mmHg"], per_mv=1000)
    assert read_wfdb(path, "r").problems == []
    path = write_record(tmp_path, "r", signal, leads, gain=["1000/mmHg"] + ["1000/mV"] * 12, per_mv=1000)
    assert refusal(path).kind == "unknown_unit"


@pytest.mark.parametrize("gain", ["0/mV", "0"])
def test_uncalibrated_signals_are_refused_or_assumed(tmp_path, gain):
    signal = ecg()
    path = write_record(tmp_path, "r", signal, gain=gain)
    assert refusal(path).kind == "uncalibrated"
    recording = read_wfdb(path, "r", assume_gain=1000)
    assert kinds(recording) == {"gain_assumed"}
    np.testing.assert_allclose(recording.signal, signal, atol=6e-4)


@pytest.mark.parametrize("name", ["E00001", "HR00001"])
def test_real_early_headers_give_the_amplitude_of_the_right_headers(tmp_path, name):
    """The 2021 headers of the same integers are right: PTB-XL records500 and HR agree integer by integer."""
    early = read_wfdb(DATA / "challenge_early" / f"{name}.hea", name, repair=True)
    shutil.copy(DATA / "challenge_2021" / f"{name}.hea", tmp_path)
    shutil.copy(DATA / "challenge_early" / f"{name}.mat", tmp_path)
    right = read_wfdb(tmp_path / f"{name}.hea", name)
    np.testing.assert_array_equal(early.signal, right.signal)
    assert right.problems == []
    assert kinds(early) == {"gain_corrected"} | ({"header_repaired"} if name == "E00001" else set())
    np.testing.assert_allclose(right.signal, wfdb.rdrecord(str(tmp_path / name)).p_signal, atol=1e-12)


def test_header_with_mat_in_the_record_name_is_refused_without_repair():
    problem = refusal(DATA / "challenge_early" / "E00001.hea")
    assert problem.kind == "header_refused"
    assert "challenge" in problem.detail


@pytest.mark.parametrize("gain", ["4880/mV", "200/mV", "2000000/mV", "306000/mV", "1041000/mV", "200(0)/mv"])
def test_early_gains_are_corrected_in_any_challenge_mat(tmp_path, gain):
    signal = ecg()
    recording = read_wfdb(write_record(tmp_path, "X1", signal, gain=gain, mat=True, comments=CHALLENGE), "X1")
    np.testing.assert_allclose(recording.signal, signal, atol=6e-4)
    assert kinds(recording) == {"gain_corrected"}


def test_assumed_gain_keeps_the_baseline(tmp_path):
    signal = ecg()
    digital = np.rint(signal * 200 + 1024).astype("<i2")
    path = write_record(tmp_path, "u", digital, gain="200(1024)/mV", mat=True)
    np.testing.assert_allclose(read_wfdb(path, "r", assume_gain=200).signal, signal, atol=3e-3)


@pytest.mark.parametrize("gain", [200, 4880])
def test_the_same_gains_are_right_outside_the_challenge(tmp_path, gain):
    signal = ecg()
    options = {"gain": f"{gain}/mV", "per_mv": gain}
    recording = read_wfdb(write_record(tmp_path, "dat", signal, **options), "r")
    np.testing.assert_allclose(recording.signal, signal, atol=3e-3)
    converted = write_record(tmp_path, "m", signal, mat=True, comments=("Creator: wfdb2mat",), **options)
    np.testing.assert_allclose(read_wfdb(converted, "r").signal, signal, atol=3e-3)
    unknown = write_record(tmp_path, "u", signal, mat=True, **options)
    assert refusal(unknown).kind == "ambiguous_gain"
    assert kinds(read_wfdb(unknown, "r", assume_gain=gain)) == {"gain_assumed"}


def test_real_ptb_header_in_nanovolts(tmp_path):
    """The header of May 2020 says 2000000/mV; a made signal of zeros has none of its checksums."""
    shutil.copy(DATA / "challenge_early" / "S0001.hea", tmp_path)
    write_digital_zero(tmp_path / "S0001.mat", 12, 38400)
    assert refusal(tmp_path / "S0001.hea").kind == "bad_checksum"
    header = parse_header((tmp_path / "S0001.hea").read_text(), False)
    signal = ecg(38.4, 1000.0)
    path = write_record(
        tmp_path, "S0001", signal, rate=header.rate, gain="2000000/mV", mat=True, comments=header.comments
    )
    np.testing.assert_allclose(read_wfdb(path, "r").signal, signal, atol=6e-4)


def test_ludb_gains_are_refused_unless_assumed():
    path = DATA / "ludb" / "1.hea"
    problem = refusal(path)
    assert problem.kind == "inconsistent_gains"
    assert "--assume-gain" in problem.detail
    recording = read_wfdb(path, "r", assume_gain=1000)
    assert kinds(recording) == {"gain_assumed"}
    one, two, three = recording.signal[:, :3].T
    np.testing.assert_allclose(two, one + three, atol=1e-9)
    assert (recording.age, recording.sex) == (51.0, "F")


def test_unequal_gains_that_are_right_are_accepted(tmp_path):
    gains = [1000, 500, 2000, 1000, 800, 1000, 1000, 1000, 1000, 1000, 1000, 1000]
    signal = ecg()
    path = write_record(tmp_path, "r", signal, gain=[f"{g}/mV" for g in gains], per_mv=gains)
    recording = read_wfdb(path, "r")
    np.testing.assert_allclose(recording.signal, signal, atol=1.1e-3)
    assert recording.problems == []


def test_negative_gains_are_kept_and_reported(tmp_path):
    signal = ecg()
    path = write_record(
        tmp_path, "r", signal, gain=["1000/mV"] * 11 + ["-1000/mV"], per_mv=[1000] * 11 + [-1000]
    )
    recording = read_wfdb(path, "r")
    np.testing.assert_allclose(recording.signal, signal, atol=6e-4)
    assert kinds(recording) == {"negative_gain"}
    assert "V6 -1000" in recording.problems[0].detail
    # On limb leads the integers tell that the sign is wrong.
    assert (
        refusal(write_record(tmp_path, "s", signal, gain=["1000/mV", "-1000/mV"] + ["1000/mV"] * 10)).kind
        == "inconsistent_gains"
    )


@pytest.mark.parametrize("factor", [1000.0, 1 / 1000, 25.0])
def test_gains_wrong_by_orders_of_magnitude_are_refused(tmp_path, factor):
    path = write_record(tmp_path, "r", ecg(), gain=f"{1000 / factor:.12g}/mV")
    with pytest.raises(BadRecording) as error:
        Preprocessing().apply(read_wfdb(path, "r"))
    assert error.value.problem.kind == "implausible_amplitude"


# ---------------------------------------------------------------- tables and iter_recordings


def test_csv_and_npy_tables(tmp_path):
    signal = ecg(3.0, 240.0)
    order = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 10, 11]
    names = [CANONICAL_LEADS[i] for i in order]
    microvolts = signal[:, order] * 1000
    lines = [",".join(["time", *names])]
    lines += [",".join([str(t / 240), *map(repr, row)]) for t, row in enumerate(microvolts.tolist())]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    np.save(tmp_path / "b.npy", microvolts)
    expected = Preprocessing().apply(read_wfdb(write_record(tmp_path, "w", signal, rate=240), "w")).signal
    for name in ("a.csv", "b.npy"):
        recording = read_table(tmp_path / name, "t", 240, "uV", names)
        np.testing.assert_allclose(Preprocessing().apply(recording).signal, expected, atol=1)
    found = list(iter_recordings(tmp_path, rate=240, unit="uV", leads=names))
    assert [r.record_id for r in found] == ["a", "b", "w"]
    assert [r.record_id for r in iter_recordings(tmp_path)] == ["w"]


def test_tables_never_guess(tmp_path):
    np.save(tmp_path / "b.npy", ecg(1.0))
    for options in ({}, {"rate": 500}, {"unit": "mV"}):
        with pytest.raises(UserError, match="neither rate nor unit"):
            list(iter_recordings(tmp_path / "b.npy", **options))
    with pytest.raises(UserError, match="no lead names"):
        list(iter_recordings(tmp_path / "b.npy", rate=500, unit="mV"))
    with pytest.raises(UserError, match="none of mV"):
        list(iter_recordings(tmp_path / "b.npy", rate=500, unit="mmHg", leads=CANONICAL_LEADS))


def test_csv_row_of_another_length_is_a_problem_that_names_the_line(tmp_path):
    (tmp_path / "a.csv").write_text("I,II,III\n1,2,3\n\n0,1,0,2,0,3\n")
    (problem,) = iter_recordings(tmp_path / "a.csv", rate=500, unit="mV")
    assert problem.kind == "table_refused"
    assert "line 4 has 6 cells" in problem.detail


@pytest.mark.parametrize("value", [0, -1000, float("nan"), float("inf"), 0.5, 1e8])
def test_assumed_gain_that_cannot_be_right(tmp_path, value):
    write_record(tmp_path, "r", ecg(1.0), gain="0")
    with pytest.raises(UserError, match="--assume-gain"):
        list(iter_recordings(tmp_path, assume_gain=value))


@pytest.mark.parametrize("text", ["", "I,II\n1,x\n", "I,II\n1\n"])
def test_broken_csv_is_a_problem(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    (problem,) = iter_recordings(tmp_path / "a.csv", rate=500, unit="mV")
    assert problem.kind == "table_refused"


def test_transposed_npy_is_a_problem(tmp_path):
    np.save(tmp_path / "a.npy", ecg(1.0).T)
    (problem,) = iter_recordings(tmp_path / "a.npy", rate=500, unit="mV", leads=CANONICAL_LEADS)
    assert problem.kind == "table_refused"


def test_iter_recordings_goes_on_after_a_problem(tmp_path):
    write_record(tmp_path / "deep" / "er", "b", ecg(index=1), mat=True)
    write_record(tmp_path, "c", ecg(index=2))
    (tmp_path / "a.hea").write_text("nonsense\n")
    found = list(iter_recordings(tmp_path))
    assert [type(item).__name__ for item in found] == ["Problem", "Recording", "Recording"]
    assert [found[0].record, found[1].record_id, found[2].record_id] == ["a", "c", "deep/er/b"]


@pytest.mark.parametrize("suffix", [".hea", ".dat", ""])
def test_iter_recordings_of_one_file(tmp_path, suffix):
    path = write_record(tmp_path, "c", ecg())
    (recording,) = iter_recordings(path.with_suffix(suffix))
    assert recording.record_id == "c"


def test_iter_recordings_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no recordings"):
        list(iter_recordings(tmp_path))
    with pytest.raises(UserError, match="no recording"):
        list(iter_recordings(tmp_path / "none.hea"))
