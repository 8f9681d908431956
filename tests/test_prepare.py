"""`ecg-jax prepare`: real and made sources, what a store holds, the command."""

import re
import shutil

import numpy as np
import pytest

from ecg_files import DATA, SHARED, ecg, write_record
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import main, prepare
from prepare_source import N_MADE, SAMPLE, problems_of, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


# ---------------------------------------------------------------- the result


def test_summary_and_records(source, tmp_path):
    summary = prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    store = Store(tmp_path / "s")
    missing = len([i for i in range(N_MADE) if i % 29 == 5])
    flat = len([i for i in range(N_MADE) if i % 17 == 3 and i % 29 != 5])
    assert summary.written == len(store) == N_MADE - missing
    assert summary.refused == missing
    assert summary.problems == {"flat_leads": flat, "missing_leads": flat, "missing_signal": missing}
    assert summary.missing == flat
    assert sum(summary.folds.values()) == len(store)
    assert not summary.already_complete
    by_id = {record: i for i, record in enumerate(store.column("record_id"))}
    expected = (
        Preprocessing().apply(ecg_jax_recording(source / "patient003" / "r007.hea", "patient003/r007")).signal
    )
    np.testing.assert_array_equal(store.read(by_id["patient003/r007"], verify=True), expected)
    assert store.column("patient_id")[by_id["patient003/r007"]] == "patient003"
    folds = dict(zip(store.column("patient_id"), store.column("fold"), strict=True))
    assert all(folds[p] == f for p, f in zip(store.column("patient_id"), store.column("fold"), strict=True))
    for i in range(len(store)):
        store.read(i, verify=True)


def ecg_jax_recording(path, record_id):
    from ecg_jax.data.readers.wfdb import read_wfdb

    return read_wfdb(path, record_id)


def test_ptbxl_sample(tmp_path):
    summary = prepare("ptbxl", SAMPLE, tmp_path / "s", workers=2, progress=False)
    store = Store(tmp_path / "s")
    assert (summary.written, summary.refused, summary.problems) == (304, 0, {})
    assert set(store.column("length")) == {2400}
    assert set(store.column("source_rate")) == {100.0}
    assert summary.folds[9] + summary.folds[10] == 93
    assert store.fold_source.startswith("strat_fold")
    assert store.classes["super"] == ["CD", "HYP", "MI", "NORM", "STTC"]
    counts = {c: sum(c in labels for labels in store.column("labels_super")) for c in store.classes["super"]}
    assert counts == {c: info["count"] for c, info in store.class_info["super"].items()}
    assert counts["NORM"] > 100
    assert np.isfinite(store.column("age")[0])
    p2p = [np.ptp(store.read(i).astype(float), axis=0).max() for i in range(304)]
    assert 1500 < np.median(p2p) < 4500


def test_challenge_with_real_quirks(tmp_path):
    """Early headers beside right ones, a header whose signal is missing, real missing leads, repeated ids."""
    source = tmp_path / "source"
    shutil.copytree(DATA / "challenge_early", source / "early")
    (source / "early" / "S0001.hea").unlink()
    shutil.copytree(DATA / "challenge_2021", source / "later")
    for name in ("E00001", "HR00001"):
        for suffix in (".hea", ".mat"):
            origin = DATA / ("challenge_2021" if suffix == ".hea" else "challenge_early")
            shutil.copy(origin / f"{name}{suffix}", source / "later" / f"{name}{suffix}")
    summary = prepare("challenge", source, tmp_path / "s", workers=1, progress=False)
    store = Store(tmp_path / "s")
    assert store.column("record_id").tolist() == ["E00001", "HR00001", "JS45544"]
    assert summary.problems == {
        "duplicate_id": 2,
        "gain_corrected": 2,
        "header_repaired": 1,
        "missing_signal": 1,
        "flat_leads": 1,
        "missing_leads": 1,
        "partly_flat_leads": 1,
    }
    assert summary.refused == 3
    right = prepare("challenge", source / "later", tmp_path / "right", workers=1, progress=False)
    assert right.written == 3
    for i in range(3):
        np.testing.assert_array_equal(store.read(i), Store(tmp_path / "right").read(i))
    assert store.classes == {"dx": ["425856008"]}


def test_generic_corpus_corrects_early_gains_and_explains_bad_headers(tmp_path):
    summary = prepare("wfdb", DATA / "challenge_early", tmp_path / "s", workers=1, progress=False)
    assert Store(tmp_path / "s").column("record_id").tolist() == ["HR00001"]
    assert summary.problems == {"missing_signal": 2, "header_refused": 1, "gain_corrected": 1}


def test_ludb_is_refused_whole_and_explained_and_the_folder_can_be_used_again(tmp_path):
    with pytest.raises(UserError, match=r"inconsistent_gains 1.*problems\.jsonl"):
        prepare("wfdb", DATA / "ludb", tmp_path / "s", workers=1, progress=False)
    assert problems_of(tmp_path / "s")[0]["kind"] == "inconsistent_gains"
    summary = prepare("wfdb", DATA / "ludb", tmp_path / "s", workers=1, assume_gain=1000, progress=False)
    assert summary.problems == {"gain_assumed": 1, "lead_spelling": 1}


def test_every_problem_is_one_line_and_the_rest_goes_on(tmp_path):
    """One folder with everything that can be wrong with a WFDB file."""
    folder = tmp_path / "source"
    signal = ecg()
    write_record(folder, "a_good", signal)
    write_record(folder, "b_missing", ecg(index=1)).with_suffix(".dat").unlink()
    path = write_record(folder, "c_truncated", ecg(index=2)).with_suffix(".dat")
    path.write_bytes(path.read_bytes()[:-7])
    write_record(folder, "d_header", ecg(index=3), record_line="d_header.dat 12 500 5000")
    write_record(folder, "e_checksum", ecg(index=4), checksums=[1] * 12)
    write_record(folder, "f_reordered", ecg(index=5)[:, ::-1], CANONICAL_LEADS[::-1])
    write_record(
        folder,
        "g_two_limb",
        ecg(index=6)[:, [0, 1, *range(6, 12)]],
        ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6"),
    )
    write_record(folder, "h_no_unit", ecg(index=7), gain="1000")
    write_record(folder, "i_microvolt", ecg(index=8), gain="1/uV")
    write_record(folder, "j_tiny", ecg(index=9), gain="1000000/mV")
    write_record(folder, "k_short", ecg(1.5, index=10))
    write_record(folder, "l_slow", ecg(10.0, 100.0, 11), rate=100)
    write_record(folder, "m_fast", ecg(10.0, 1000.0, 12), rate=1000)
    write_record(folder, "n_twin", signal)
    saturated = np.rint(ecg(index=13) * 2000).astype("<i2")
    saturated[100:110, 6] = 32767
    saturated[200, 7] = -32768
    write_record(folder, "o_saturated", saturated, gain="2000/mV")
    write_record(folder, "p_zero", 0 * signal)
    summary = prepare("wfdb", folder, tmp_path / "s", workers=1, progress=False)
    lines = problems_of(tmp_path / "s")
    found = {(line["record"][0], line["kind"], line["action"]) for line in lines}
    assert found == {
        ("b", "missing_signal", "refused"),
        ("c", "truncated_signal", "refused"),
        ("d", "header_refused", "refused"),
        ("e", "bad_checksum", "refused"),
        ("f", "reordered_leads", "reordered by name"),
        ("g", "derived_leads", "derived"),
        ("h", "unit_assumed", "mV used"),
        ("j", "implausible_amplitude", "refused"),
        ("k", "short", "kept"),
        ("n", "duplicate_signal", "kept"),
        ("o", "saturated", "kept"),
        ("o", "nan_samples", "interpolated"),
        ("p", "no_signal", "refused"),
    }
    assert len(lines) == len(found)
    assert all(set(line) == {"record", "kind", "action", "detail"} for line in lines)
    assert (summary.written, summary.refused, summary.saturated) == (10, 6, 10)
    assert summary.derived == 1
    store = Store(tmp_path / "s")
    flags = dict(zip(store.column("record_id"), store.column("flags"), strict=True))
    assert flags["k_short"] == ["short"]
    assert flags["a_good"] == []
    lengths = dict(zip(store.column("record_id"), store.column("length"), strict=True))
    assert lengths["l_slow"] == lengths["m_fast"] == 2400
    # Whatever the order, unit and rate: millivolts as they were written, at most rounded twice.
    rows = {record: i for i, record in enumerate(store.column("record_id"))}
    for name, index in (("f_reordered", 5), ("g_two_limb", 6), ("h_no_unit", 7), ("i_microvolt", 8)):
        expected = Preprocessing().apply(
            ecg_jax_recording(write_record(tmp_path / "x", "x", ecg(index=index)), "x")
        )
        assert np.abs(store.read(rows[name]).astype(int) - expected.signal).max() <= 2, name


def test_duplicates_are_marked_or_dropped_and_leaks_are_mentioned(tmp_path):
    folder = tmp_path / "source"
    signal = ecg(3.0)
    for name in ("patient001/a", "patient002/b", "patient001/c"):
        write_record(folder / name[:10], name[-1], signal)
    write_record(folder / "patient003", "d", ecg(3.0, index=1))
    prepare("wfdb", folder, tmp_path / "keep", workers=1, progress=False)
    store = Store(tmp_path / "keep")
    assert store.column("duplicate_of").tolist() == [None, "patient001/a", "patient001/a", None]
    details = {p["record"]: p["detail"] for p in problems_of(tmp_path / "keep")}
    assert "patients differ (patient002 and patient001)" in details["patient002/b"]
    assert "folds differ" in details["patient002/b"]
    assert "differ" not in details["patient001/c"]
    summary = prepare("wfdb", folder, tmp_path / "drop", workers=1, duplicates="drop", progress=False)
    store = Store(tmp_path / "drop")
    assert store.column("record_id").tolist() == ["patient001/a", "patient003/d"]
    assert summary.problems == {"duplicate_signal": 2}
    for i in range(2):
        store.read(i, verify=True)


def test_clip(tmp_path):
    signal = ecg(3.0)
    signal[100, 6:] = 7.5
    write_record(tmp_path / "source", "r", signal)
    prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, clip_mv=3.0, progress=False)
    store = Store(tmp_path / "s")
    assert store.preprocessing.clip_mv == 3.0
    assert store.read(0).max() == 3000
    assert store.column("saturated")[0] >= 6


def test_unexpected_errors_are_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    write_record(tmp_path / "source", "a", ecg(3.0))
    write_record(tmp_path / "source", "b", ecg(3.0, index=1))
    from ecg_jax.data.corpora import wfdb as corpus

    original = corpus.read

    def read(source, entry, assume_gain):
        if entry.record_id == "a":
            raise ZeroDivisionError("surprise")
        return original(source, entry, assume_gain)

    monkeypatch.setattr(corpus, "read", read)
    summary = prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    assert summary.problems == {"unexpected_error": 1}
    assert "ZeroDivisionError: surprise" in problems_of(tmp_path / "s")[0]["detail"]


def test_source_that_vanishes_ends_the_command_and_the_next_run_goes_on(tmp_path, monkeypatch):
    for i in range(40):
        write_record(tmp_path / "source" / "records", f"r{i:02d}", ecg(3.0, index=i))
    from ecg_jax.data.corpora import wfdb as corpus

    original = corpus.read

    def read(source, entry, assume_gain):
        if entry.record_id == "records/r35":
            (source / "records").rename(tmp_path / "away")
        return original(source, entry, assume_gain)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read", read)
        with pytest.raises(UserError, match=r"source has vanished or is empty.*again"):
            prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    (tmp_path / "away").rename(tmp_path / "source" / "records")
    assert prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False).problems == {}


def test_a_folder_below_that_vanishes_ends_the_command_too(tmp_path, monkeypatch):
    """Sites of a corpus may be drives of their own."""
    for i in range(40):
        write_record(tmp_path / "source" / "site" / f"s{i // 20}" / "1987", f"r{i:02d}", ecg(3.0, index=i))
    from ecg_jax.data.corpora import wfdb as corpus

    original = corpus.read

    def read(source, entry, assume_gain):
        if entry.record_id == "site/s1/1987/r35":
            (source / "site/s1").rename(tmp_path / "away")
        return original(source, entry, assume_gain)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read", read)
        with pytest.raises(UserError, match=r"site/s1 has vanished or is empty.*again"):
            prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    (tmp_path / "away").rename(tmp_path / "source/site/s1")
    summary = prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    assert (summary.written, summary.problems) == (40, {})


def test_a_partial_download_of_a_corpus_with_a_table_is_no_reason_to_stop(tmp_path):
    """Its table names files whose folders have never been there."""
    shutil.copytree(SAMPLE, tmp_path / "source")
    table = tmp_path / "source" / "ptbxl_database.csv"
    before, _, after = table.read_text().rpartition("records100/00000/")
    table.write_text(f"{before}records100/21000/{after}")
    summary = prepare("ptbxl", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    assert (summary.written, summary.problems) == (303, {"missing_header": 1})


def test_a_problem_of_every_recording_is_said_to_be_one(tmp_path):
    for i in range(3):
        write_record(tmp_path / "source", f"r{i}", ecg(3.0, index=i)[:, :11], leads=CANONICAL_LEADS[:11])
    summary = prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    text = str(summary)
    size = (tmp_path / "s/problems.jsonl").stat().st_size
    assert summary.problem_bytes == size
    assert re.search(r"problems.jsonl \(3, 0.0 MB\)", text)
    assert "missing_leads            3 (as many as there are records)" in text


# ---------------------------------------------------------------- the command


def test_command(source, tmp_path, capsys):
    assert main(["wfdb", str(source), str(tmp_path / "s"), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "refused            4" in captured.out
    assert "missing_signal           4" in captured.out
    assert "Next: ecg-jax pretrain" in captured.out
    # No terminal: lines and no bar.
    assert f"prepare wfdb: {N_MADE} recordings in " in captured.err
    assert "\r" not in captured.err


def test_help_explains_every_corpus_and_kind(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for word in ("ptbxl_database.csv", "challenge", "any folder of WFDB", "examples:", "gain_corrected"):
        assert word in text


# ---------------------------------------------------------------- larger set of real recordings

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the larger set of real recordings is not here")


@needs_shared
def test_twins_have_equal_amplitudes(tmp_path):
    """PTB-XL 500 Hz = its Challenge copy, right and early headers; Georgia early = 2021; S0001 = s0010_re."""
    stores = {}
    for corpus, name in (
        ("ptbxl", "ptbxl"),
        ("challenge", "challenge2021"),
        ("challenge", "challenge2020_early_headers"),
        ("wfdb", "ptbdb"),
    ):
        prepare(corpus, SHARED / name, tmp_path / name, workers=2, progress=False)
        store = Store(tmp_path / name)
        stores[name] = {
            record: store.read(i).astype(int) for i, record in enumerate(store.column("record_id"))
        }
    twins = 0
    for name in ("challenge2021", "challenge2020_early_headers"):
        for record, samples in stores[name].items():
            if record.startswith("HR") and str(int(record[2:])) in stores["ptbxl"]:
                np.testing.assert_array_equal(samples, stores["ptbxl"][str(int(record[2:]))])
                twins += 1
    assert twins == 16
    both = stores["challenge2021"].keys() & stores["challenge2020_early_headers"].keys()
    assert len(both) == 20
    for record in both:
        np.testing.assert_array_equal(
            stores["challenge2021"][record], stores["challenge2020_early_headers"][record]
        )
    assert np.abs(stores["challenge2021"]["S0001"] - stores["ptbdb"]["s0010_re"]).max() <= 1


@needs_shared
def test_known_problems_of_the_larger_set(tmp_path):
    expected = {
        ("challenge", "challenge2020"): {},
        ("challenge", "cpsc2018_2020first"): {"partly_flat_leads": 1},
        ("challenge", "challenge2020_early_headers"): {
            "gain_corrected": 24,
            "header_repaired": 14,
            "missing_signal": 5,
            "duplicate_signal": 1,
        },
        ("wfdb", "chapman_physionet"): {},
        ("ptbxl", "ptbxl"): {"duplicate_signal": 3},
    }
    for (corpus, name), problems in expected.items():
        summary = prepare(corpus, SHARED / name, tmp_path / name, workers=2, progress=False)
        assert summary.problems == problems, name
    details = [p["detail"] for p in problems_of(tmp_path / "ptbxl") if p["record"] == "463"]
    assert "folds differ (1 and 3)" in details[0]
    with pytest.raises(UserError, match="inconsistent_gains 120"):
        prepare("wfdb", SHARED / "ludb", tmp_path / "ludb", workers=2, progress=False)
