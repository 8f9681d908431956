"""`ecg-jax prepare`: what it refuses, before reading and under `strict`."""

import shutil

import pytest

from ecg_files import DATA, ecg, write_digital_zero, write_record
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from prepare_source import SAMPLE, files_of, interrupt_finalisation, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


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
