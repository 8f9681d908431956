"""`ecg-jax prepare`: real and made sources, the same bytes always, interruptions, refusals."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ecg_jax
from ecg_files import DATA, SHARED, ecg, write_digital_zero, write_record
from ecg_jax.data import conversion, writer
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import main, prepare

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
N_MADE = 100  # four units of at most 32


def files_of(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def problems_of(store: Path) -> list[dict]:
    return [json.loads(line) for line in (store / "problems.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """WFDB records with a problem here and there."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(N_MADE):
        signal = ecg(3.0 + i % 3, 250.0, i)
        if i % 17 == 3:
            signal[:, 8] = 0
        path = write_record(folder / f"patient{i // 2:03d}", f"r{i:03d}", signal, rate=250)
        if i % 29 == 5:
            path.with_suffix(".dat").unlink()
    return folder


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    store = tmp_path_factory.mktemp("reference") / "store"
    summary = prepare("wfdb", source, store, workers=1, progress=False)
    return files_of(store), summary


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


# ---------------------------------------------------------------- the same bytes


def test_one_and_two_workers_write_the_same_bytes(source, reference, tmp_path):
    prepare("wfdb", source, tmp_path / "s", workers=2, progress=False)
    assert files_of(tmp_path / "s") == reference[0]
    assert not (tmp_path / "s" / ".partial").exists()


def test_complete_store_is_left_alone(source, reference, tmp_path):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    summary = prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert summary.already_complete
    assert "nothing done" in str(summary)
    assert (summary.written, summary.problems) == (reference[1].written, reference[1].problems)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")} == times


COMMAND = (
    "import sys; from ecg_jax.prepare import prepare; "
    "prepare('wfdb', sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), progress=False)"
)
# Dies by SIGKILL at the n-th call of the functions that put files in place.
DYING = """
import os, shutil, signal, sys
count = int(sys.argv[4])
def dying(function):
    def call(*args, **kwargs):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.replace, os.truncate, os.unlink = map(dying, (os.replace, os.truncate, os.unlink))
shutil.rmtree = dying(shutil.rmtree)
"""


def test_killed_at_every_step_and_resumed_gives_the_same_bytes(source, reference, tmp_path):
    """One store, killed again and again until it gets through: no run may spoil an earlier one."""
    for step in (0, 1, 2, 4, 5, 3, 2, 2, 1, 3, 2, 0, 1, 1, 3, 4):
        store = tmp_path / "s"
        run = subprocess.run([sys.executable, "-c", DYING + COMMAND, source, store, "1", str(step)])
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        if not (store / "zarr.json").exists():
            with pytest.raises(UserError, match=r"incomplete|not a store|no store"):
                Store(store)
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize("step", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
def test_killed_in_finalisation_and_resumed_gives_the_same_bytes(source, reference, tmp_path, step):
    run = subprocess.run([sys.executable, "-c", DYING + COMMAND, source, tmp_path / "s", "1", str(step)])
    assert run.returncode in (0, -signal.SIGKILL)
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_and_resumed_gives_the_same_bytes(tmp_path_factory, tmp_path, sent):
    source = tmp_path_factory.mktemp("long")
    for i in range(160):
        write_record(source, f"r{i:03d}", ecg(20.0, 500.0, i % 3) + i * 1e-3)
    prepare("wfdb", source, tmp_path / "reference", workers=2, progress=False)
    for _ in range(5):  # on a busy machine it may be through before the signal comes
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, source, tmp_path / "s", "2"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # A shell starts what it sends to the background with SIGINT ignored, and that is inherited.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not list((tmp_path / "s" / ".partial").glob("unit-*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(sent)
        if process.wait(30) != 0:
            break
        shutil.rmtree(tmp_path / "s")
    assert process.returncode != 0
    assert not (tmp_path / "s" / "zarr.json").exists()
    # Workers must not outlive the parent.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and group_is_alive(process.pid):
        time.sleep(0.05)
    assert not group_is_alive(process.pid)
    with pytest.raises(UserError, match="incomplete"):
        Store(tmp_path / "s")
    prepare("wfdb", source, tmp_path / "s", workers=2, progress=False)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "reference")


def group_is_alive(group: int) -> bool:
    """Whether a process of the group still runs (one that ended but was not waited for does not count)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_stopped_worker_abandons_its_unit(source, reference, tmp_path, monkeypatch):
    class StopAfterTen:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 10

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_stop", StopAfterTen())
        patch.setattr("ecg_jax.prepare.finalise", lambda *_, **__: None)
        with pytest.raises(UserError, match="incomplete"):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not list((tmp_path / "s" / ".partial").glob("unit-*"))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


def test_unit_without_chunk_file_is_done_again(source, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    (tmp_path / "s" / "signal/c/1/0").unlink()
    with open(tmp_path / "s" / "signal/c/2/0", "r+b") as file:
        file.truncate(100)
    (tmp_path / "s" / ".partial" / "unit-000000.json").write_text("{")
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


def test_flipped_byte_in_unfinished_work_does_not_become_a_store(source, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    chunk = tmp_path / "s" / "signal/c/1/0"
    data = bytearray(chunk.read_bytes())
    data[12345] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"1 of the 4 chunk files .*signal/c/1/0.*again"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not (tmp_path / "s" / "zarr.json").exists()
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda sidecar: [],
        lambda sidecar: None,
        lambda sidecar: {**sidecar, "samples": "many"},
        lambda sidecar: {**sidecar, "rows": 3},
        lambda sidecar: {**sidecar, "rows": sidecar["rows"][1:]},
        lambda sidecar: {**sidecar, "rows": [{**row, "age": "old"} for row in sidecar["rows"]]},
        lambda sidecar: {**sidecar, "problems": [{"kind": "x"}]},
        lambda sidecar: {"samples": 0},
    ],
)
def test_sidecar_of_another_shape_has_its_unit_done_again(source, reference, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    sidecar = tmp_path / "s" / ".partial" / "unit-000001.json"
    sidecar.write_text(json.dumps(damage(json.loads(sidecar.read_text()))))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_damaged_plan_is_a_sentence(source, tmp_path, text):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    (tmp_path / "s" / ".partial" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


@pytest.mark.parametrize("text", [None, "{\n", "[]\n", '{"kind": "x"}\n', '"text"\n'])
def test_complete_store_without_its_problems_is_a_sentence(source, tmp_path, text):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    if text is None:
        (tmp_path / "s" / "problems.jsonl").unlink()
    else:
        (tmp_path / "s" / "problems.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"problems\.jsonl(: No such| is damaged)"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


def test_complete_store_that_cannot_be_read_is_a_sentence(source, tmp_path, monkeypatch):
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    original = Path.read_text

    def read_text(self, *args, **kwargs):
        if self.name == "zarr.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UserError, match=r"Cannot read .*zarr\.json: Permission denied"):
        prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


def interrupt_finalisation(source, store, **options):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecg_jax.prepare.finalise", interrupted)
        prepare("wfdb", source, store, workers=1, progress=False, **options)


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize(("code", "call"), [(errno.EDQUOT, 3), *((errno.ENOSPC, call) for call in range(12))])
def test_full_disk_is_a_sentence_and_the_next_run_goes_on(
    source, reference, tmp_path, monkeypatch, code, call
):
    """The n-th fsync fails: in a chunk, a sidecar, or a file of the finalisation."""
    remaining = call
    original = os.fsync

    def full(fd):
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError(code, os.strerror(code))
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert not (tmp_path / "s" / "zarr.json").exists()
    assert not list((tmp_path / "s").rglob("*.tmp"))
    prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)
    assert files_of(tmp_path / "s") == reference[0]


def test_full_disk_in_a_worker_process(source, tmp_path):
    """A limit on file size is the full disk an ordinary user can make."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); " + COMMAND
    )
    run = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "s", "2"], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "UserError: Cannot write the store" in run.stderr
    assert not (tmp_path / "s" / "zarr.json").exists()


# ---------------------------------------------------------------- refusals


def test_store_of_another_job_is_refused(source, tmp_path):
    store = tmp_path / "s"
    prepare("wfdb", source, store, workers=1, progress=False)
    before = files_of(store)
    with pytest.raises(UserError, match="another job: corpus differs"):
        prepare("ptbxl", SAMPLE, store, progress=False)
    with pytest.raises(UserError, match="clip mv differs"):
        prepare("wfdb", source, store, clip_mv=3.0, progress=False)
    with pytest.raises(UserError, match="duplicates differs"):
        prepare("wfdb", source, store, duplicates="drop", progress=False)
    shutil.copytree(source, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="source differs"):
        prepare("wfdb", tmp_path / "elsewhere", store, progress=False)
    assert files_of(store) == before


def test_another_job_is_refused_before_recordings_are_listed(source, tmp_path, monkeypatch):
    """Listing a corpus with big tables takes minutes; it must not be waited for in vain."""
    prepare("wfdb", source, tmp_path / "complete", workers=1, progress=False)
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "begun")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    monkeypatch.setattr("ecg_jax.data.corpora.wfdb.list_records", None)
    for store, message in (
        ("complete", "clip mv differs"),
        ("begun", "clip mv differs"),
        ("foreign", "not empty"),
    ):
        with pytest.raises(UserError, match=message):
            prepare("wfdb", source, tmp_path / store, clip_mv=3.0, progress=False)


def test_partial_of_another_job_is_refused(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    with pytest.raises(UserError, match="assume gain differs"):
        prepare("wfdb", source, tmp_path / "s", assume_gain=1000, progress=False)


def test_source_that_has_changed_is_refused(tmp_path):
    write_record(tmp_path / "source", "a", ecg(3.0))
    prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)
    write_record(tmp_path / "source", "b", ecg(3.0, index=1))
    with pytest.raises(UserError, match="list of recordings differs"):
        prepare("wfdb", tmp_path / "source", tmp_path / "s", workers=1, progress=False)


def test_second_writer_is_refused(source, tmp_path):
    import fcntl

    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "s")
    with open(tmp_path / "s" / ".partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another `ecg-jax prepare`"):
            prepare("wfdb", source, tmp_path / "s", workers=1, progress=False)


def test_strict_stops_at_the_first_problem(source, tmp_path):
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"patient\d+/r\d+ has a problem \((missing_signal|flat_leads)"):
            prepare("wfdb", source, tmp_path / f"s{workers}", workers=workers, strict=True, progress=False)
        assert not (tmp_path / f"s{workers}" / "zarr.json").exists()
    # Units finished without strict do not slip through, nor does a complete store.
    with pytest.raises(KeyboardInterrupt):
        interrupt_finalisation(source, tmp_path / "partial")
    with pytest.raises(UserError, match="has a problem"):
        prepare("wfdb", source, tmp_path / "partial", workers=1, strict=True, progress=False)
    prepare("wfdb", source, tmp_path / "partial", workers=1, progress=False)
    with pytest.raises(UserError, match="has a problem"):
        prepare("wfdb", source, tmp_path / "partial", workers=1, strict=True, progress=False)


def test_strict_sees_what_only_the_listing_or_the_whole_store_shows(tmp_path):
    for folder in ("a", "b"):
        write_record(tmp_path / "ids" / folder, "E1", ecg(3.0, index=len(folder)), mat=True)
    with pytest.raises(UserError, match="duplicate_id"):
        prepare("challenge", tmp_path / "ids", tmp_path / "s", workers=1, strict=True, progress=False)
    for name in ("a", "b"):
        write_record(tmp_path / "twins", name, ecg(3.0))
    with pytest.raises(UserError, match="duplicate_signal"):
        prepare("wfdb", tmp_path / "twins", tmp_path / "t", workers=1, strict=True, progress=False)


def test_strict_passes_a_clean_source(tmp_path):
    summary = prepare("ptbxl", SAMPLE, tmp_path / "s", workers=1, strict=True, progress=False)
    assert summary.written == 304


def test_arguments_that_cannot_be_right(source, tmp_path):
    store = tmp_path / "s"
    with pytest.raises(UserError, match="no corpus 'ptbxxl'"):
        prepare("ptbxxl", source, store)
    with pytest.raises(UserError, match="is not a folder"):
        prepare("wfdb", tmp_path / "none", store)
    with pytest.raises(UserError, match="not a PTB-XL folder"):
        prepare("ptbxl", source, store)
    with pytest.raises(UserError, match="inside SOURCE"):
        prepare("wfdb", source, source / "store")
    with pytest.raises(UserError, match="inside SOURCE"):
        prepare("wfdb", source, source)
    for options, message in (
        ({"workers": 0}, "--workers"),
        ({"clip_mv": 0}, "--clip-mv"),
        ({"clip_mv": 40}, "--clip-mv"),
        ({"clip_mv": 0.3}, "--clip-mv"),
        ({"clip_mv": float("nan")}, "--clip-mv"),
        ({"assume_gain": -1}, "--assume-gain"),
        ({"assume_gain": float("inf")}, "--assume-gain"),
        ({"duplicates": "maybe"}, "--duplicates"),
        ({"rate": "fast"}, "--source-rate"),
    ):
        with pytest.raises(UserError, match=message):
            prepare("wfdb", source, store, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare("wfdb", source, tmp_path / "file")
    with pytest.raises(UserError, match="Cannot write the store"):
        prepare("wfdb", source, tmp_path / "file" / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        prepare("wfdb", source, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    assert not store.exists()


def test_zero_signal_under_a_real_header_is_a_bad_checksum(tmp_path):
    shutil.copy(DATA / "challenge_early" / "S0001.hea", tmp_path)
    write_digital_zero(tmp_path / "S0001.mat", 12, 38400)
    with pytest.raises(UserError, match="bad_checksum 1"):
        prepare("challenge", tmp_path, tmp_path.parent / f"{tmp_path.name}_s", workers=1, progress=False)


# ---------------------------------------------------------------- the command


def test_command(source, tmp_path, capsys):
    assert main(["wfdb", str(source), str(tmp_path / "s"), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "refused            4" in captured.out
    assert "missing_signal           4" in captured.out
    assert "Next: ecg-jax pretrain" in captured.out
    assert f"100/{N_MADE}" in captured.err


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
