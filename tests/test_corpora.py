"""Listings of the corpora: files, ids, labels, folds; what is refused before reading."""

import csv
import os
import shutil
from pathlib import Path

import pytest

import ecg_jax
from ecg_files import DATA, ecg, write_record
from ecg_jax.data.corpora import CORPORA, challenge, ptbxl
from ecg_jax.data.corpora import wfdb as wfdb_corpus
from ecg_jax.data.corpora.listing import hash_fold
from ecg_jax.errors import UserError

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"


@pytest.fixture(scope="module")
def sample():
    return ptbxl.list_records(SAMPLE, None)


def test_sample_is_complete_and_licensed(sample):
    assert len(sample.entries) == 304
    for entry in sample.entries:
        assert (SAMPLE / entry.file).is_file()
        assert (SAMPLE / entry.file).with_suffix(".dat").stat().st_size == 24_000
    assert "Attribution 4.0 International" in (SAMPLE / "LICENSE.txt").read_text()
    assert "10.1038/s41597-020-0495-6" in (SAMPLE / "SOURCE.md").read_text()
    assert len((SAMPLE / "RECORDS").read_text().split()) == 304


def test_ptbxl_first_rows(sample):
    first = sample.entries[0]
    assert (first.record_id, first.patient_id, first.fold) == ("1", "15709", 3)
    assert (first.age, first.sex) == (56.0, "F")
    assert first.labels["all"] == [
        "LVOLT",
        "NORM",
        "SR",
    ]  # LVOLT and SR at likelihood 0: any likelihood counts
    assert first.labels["super"] == ["NORM"]
    assert first.labels["form"] == ["LVOLT"]
    assert first.labels["rhythm"] == ["SR"]
    assert [int(entry.record_id) for entry in sample.entries] == sorted(
        int(entry.record_id) for entry in sample.entries
    )


def test_ptbxl_classes_are_those_of_the_benchmark(sample):
    sizes = {name: len(classes) for name, classes in sample.classes.items()}
    assert sizes == {"all": 71, "diag": 44, "sub": 23, "super": 5, "form": 19, "rhythm": 12}
    assert sample.classes["super"] == ["CD", "HYP", "MI", "NORM", "STTC"]
    assert all(classes == sorted(classes) for classes in sample.classes.values())
    assert sample.descriptions["all"]["SR"] == "sinus rhythm"
    for entry in sample.entries:
        for name, codes in entry.labels.items():
            assert set(codes) <= set(sample.classes[name])


def copy_tables(folder):
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        shutil.copy(SAMPLE / name, folder)


def test_ptbxl_rate_is_chosen(tmp_path):
    copy_tables(tmp_path)
    with pytest.raises(UserError, match="no folder records100"):
        ptbxl.list_records(tmp_path, None)
    (tmp_path / "records100").mkdir()
    assert ptbxl.list_records(tmp_path, None).entries[0].file == "records100/00000/00001_lr.hea"
    with pytest.raises(UserError, match="no folder records500"):
        ptbxl.list_records(tmp_path, 500)
    (tmp_path / "records500").mkdir()
    assert ptbxl.list_records(tmp_path, None).entries[0].file == "records500/00000/00001_hr.hea"
    assert ptbxl.list_records(tmp_path, 100).entries[0].file == "records100/00000/00001_lr.hea"
    with pytest.raises(UserError, match="not at 250"):
        ptbxl.list_records(tmp_path, 250)


@pytest.mark.parametrize("missing", ["ptbxl_database.csv", "scp_statements.csv"])
def test_ptbxl_without_a_table(tmp_path, missing):
    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=missing):
        ptbxl.list_records(tmp_path, None)


@pytest.mark.parametrize("table", ["ptbxl_database.csv", "scp_statements.csv"])
@pytest.mark.parametrize("text", ["a,b\n1,2\n", "ecg_id,patient_id,scp_codes,strat_fold\n1,2,not a dict,3\n"])
def test_ptbxl_with_a_foreign_table(tmp_path, table, text):
    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    (tmp_path / table).write_text(text)
    with pytest.raises(UserError, match=r"has no column .* take the file as PhysioNet has it"):
        ptbxl.list_records(tmp_path, None)


@pytest.mark.parametrize("table", ["ptbxl_database.csv", "scp_statements.csv"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "no columns"),
        (lambda data: data.split(b"\n")[0] + b"\n", "no rows"),
        (lambda data: data + b'"' + b"x" * 200_000 + b'"\n', "field larger than"),
        (lambda data: data + b"\xff\n", "decode"),
        (lambda data: data.rstrip() + b"\n1,2\n", r"line \d+ has 2 cells, its first line \d\d"),
    ],
)
def test_ptbxl_with_a_damaged_table(tmp_path, table, damage, message):
    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    (tmp_path / table).write_bytes(damage((tmp_path / table).read_bytes()))
    with pytest.raises(UserError, match=rf"{table}.* {message}.*take the file as PhysioNet has it"):
        ptbxl.list_records(tmp_path, None)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("strat_fold", "0"),
        ("strat_fold", "11"),
        ("strat_fold", ""),
        ("scp_codes", "['NORM']"),
        ("scp_codes", "{1: 2}"),
        ("scp_codes", "(" * 500),
        ("scp_codes", ""),
        ("age", "old"),
        ("sex", "2"),
        ("patient_id", "inf"),
        ("filename_lr", ""),
    ],
)
def test_ptbxl_cells_that_cannot_be_right_are_named(tmp_path, column, value):
    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    with open(SAMPLE / "ptbxl_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[2][column] = value
    with open(tmp_path / "ptbxl_database.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match=rf"ecg_id {rows[2]['ecg_id']} has .* in column {column}, which must"):
        ptbxl.list_records(tmp_path, None)


def test_ptbxl_tables_saved_by_excel(tmp_path, sample):
    (tmp_path / "records100").mkdir()
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (SAMPLE / name).read_bytes())
    assert ptbxl.list_records(tmp_path, None).digest() == sample.digest()


@pytest.mark.parametrize("name", ["ptbxl_database.csv", "scp_statements.csv", "r.hea"])
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, name):
    import io

    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    write_record(tmp_path / "challenge", "r", ecg(1.0))
    original = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    corpus, source = (challenge, tmp_path / "challenge") if name == "r.hea" else (ptbxl, tmp_path)
    with pytest.raises(UserError, match=f"Cannot read .*{name}: Permission denied"):
        corpus.list_records(source, None)


def test_ptbxl_odd_rows(tmp_path):
    """An unknown code is reported, a repeated ecg_id refused, age 300 (over 89) shown as 90."""
    copy_tables(tmp_path)
    (tmp_path / "records100").mkdir()
    lines = (SAMPLE / "ptbxl_database.csv").read_text().splitlines()
    row = lines[1].replace("1,15709.0,56.0,1", "1,15709.0,300.0,0").replace("'SR': 0.0", "'XYZ': 0.0")
    assert row != lines[1]
    (tmp_path / "ptbxl_database.csv").write_text("\n".join([lines[0], row, lines[1]]) + "\n")
    listing = ptbxl.list_records(tmp_path, None)
    (entry,) = listing.entries
    assert (entry.age, entry.sex) == (90.0, "M")
    assert [p.kind for p in entry.problems] == ["unknown_label"]
    assert entry.labels["all"] == ["LVOLT", "NORM"]
    assert [p.kind for p in listing.problems] == ["duplicate_id"]


def test_challenge_finds_files_at_any_depth_and_refuses_repeated_ids(tmp_path):
    for folder in ("a/g1", "b/g1"):
        write_record(tmp_path / folder, "E1", ecg(3.0), mat=True)
    write_record(tmp_path / "b" / "g2" / "deep", "A2", ecg(3.0), mat=True)
    shutil.copy(tmp_path / "a/g1/E1.mat", tmp_path / "lonely.mat")
    listing = challenge.list_records(tmp_path, None)
    assert [(e.record_id, e.file) for e in listing.entries] == [
        ("A2", "b/g2/deep/A2.hea"),
        ("E1", "a/g1/E1.hea"),
    ]
    assert [(p.record, p.kind) for p in listing.problems] == [
        ("lonely", "missing_header"),
        ("E1", "duplicate_id"),
    ]


def test_real_challenge_labels():
    for folder, name, expected in (
        ("challenge_2021", "JS45544", ["425856008"]),
        ("challenge_early", "HR00001", []),
    ):
        entries = {e.record_id: e for e in challenge.list_records(DATA / folder, None).entries}
        assert challenge.read(DATA / folder, entries[name], None).labels == {"dx": expected}


def test_blank_and_absent_dx_are_empty_lists(tmp_path):
    write_record(tmp_path, "A1", ecg(3.0), mat=True, comments=("Dx: ",))
    write_record(tmp_path, "A2", ecg(3.0), mat=True, comments=("Age: 3",))
    write_record(tmp_path, "A3", ecg(3.0), mat=True, comments=("Dx: RBBB",))
    entries = challenge.list_records(tmp_path, None).entries
    assert [challenge.read(tmp_path, e, None).labels["dx"] for e in entries] == [[], [], ["RBBB"]]


def test_wfdb_ids_are_paths_and_patients_come_from_folders(tmp_path):
    write_record(tmp_path / "patient007", "s1", ecg(3.0))
    write_record(tmp_path / "other", "s1", ecg(3.0))
    entries = wfdb_corpus.list_records(tmp_path, None).entries
    assert [(e.record_id, e.patient_id) for e in entries] == [
        ("other/s1", None),
        ("patient007/s1", "patient007"),
    ]
    assert wfdb_corpus.read(tmp_path, entries[1], None).patient_id == "patient007"


def test_wfdb_finds_patients_of_mimic_iv_ecg(tmp_path):
    write_record(tmp_path / "files" / "p1000" / "p10000032" / "s40689238", "40689238", ecg(3.0))
    (entry,) = wfdb_corpus.list_records(tmp_path, None).entries
    assert entry.patient_id == "p10000032"


@pytest.mark.parametrize("corpus", ["challenge", "wfdb"])
def test_nothing_found(tmp_path, corpus):
    with pytest.raises(UserError, match="found"):
        CORPORA[corpus].list_records(tmp_path, None)
    with pytest.raises(UserError, match="--source-rate"):
        CORPORA[corpus].list_records(tmp_path, 500)


def test_wfdb_folder_without_mat_is_no_challenge_folder(tmp_path):
    write_record(tmp_path, "r", ecg(3.0))
    with pytest.raises(UserError, match="No Challenge recordings"):
        challenge.list_records(tmp_path, None)


def test_file_name_that_is_not_utf_8(tmp_path):
    path = write_record(tmp_path, "r", ecg(1.0))
    os.rename(path, os.path.join(os.fsencode(tmp_path), b"r\xff.hea"))
    with pytest.raises(UserError, match="not UTF-8"):
        wfdb_corpus.list_records(tmp_path, None)


def test_links_are_followed_once(tmp_path):
    write_record(tmp_path / "real", "r", ecg(3.0))
    (tmp_path / "source").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "source" / "link")
    os.symlink(tmp_path / "source", tmp_path / "real" / "loop")
    assert [e.record_id for e in wfdb_corpus.list_records(tmp_path / "source", None).entries] == ["link/r"]


def test_hashed_folds_are_fixed_and_even():
    # Constants: a fold that changed with a release would leak test recordings into training.
    assert [hash_fold(x) for x in ("HR00001", "patient001", "")] == [2, 9, 3]
    counts = [0] * 11
    for i in range(5000):
        counts[hash_fold(f"p{i}")] += 1
    assert counts[0] == 0
    assert min(counts[1:]) > 420
    assert max(counts[1:]) < 580


def test_digest_tells_listings_apart(tmp_path):
    write_record(tmp_path, "a", ecg(3.0))
    one = wfdb_corpus.list_records(tmp_path, None).digest()
    assert one == wfdb_corpus.list_records(tmp_path, None).digest()
    write_record(tmp_path, "b", ecg(3.0))
    assert one != wfdb_corpus.list_records(tmp_path, None).digest()
