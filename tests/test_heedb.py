"""HEEDB and HEEDB-Emory, on replicas of their layouts, and the table of entries that holds millions of them."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

import corpus_replicas as replicas
import heedb_replica as replica
from ecg_jax.data import ladder
from ecg_jax.data.corpora import CORPORA, heedb, heedb_emory
from ecg_jax.data.corpora.listing import Entry, EntryTable, Listing
from ecg_jax.data.preprocessing import resample
from ecg_jax.data.recording import Problem
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare


def write(folder, version, some, **more):
    """A replica of version 2 or 5, or of Emory, and the corpus that reads it."""
    if version == 2:
        replica.write_version_2(folder, some, **{"duplicated": [], **more})
    else:
        replica.write_institution(folder, some, emory=version == "emory", **more)
    return "heedb_emory" if version == "emory" else "heedb"


def listing(corpus, folder) -> Listing:
    return CORPORA[corpus].list_records(folder, None)


def name_of(version, study) -> str:
    """The partition of a study."""
    if version == "emory":
        return f"emory-{study.folder}"
    return study.folder[:10].replace("/", "-")


@pytest.mark.parametrize("version", [2, 5, "emory"])
def test_from_files_to_a_store(tmp_path, version):
    some = replica.studies(12, emory=version == "emory")
    corpus = write(tmp_path / "source", version, some)
    prepare(corpus, tmp_path / "source", tmp_path / "store", workers=1, progress=False)
    store = Store(tmp_path / "store")
    expected = {s.name: s for s in some}
    assert sorted(store.column("record_id").tolist()) == sorted(expected)
    names = (
        "record_id",
        "patient_id",
        "age",
        "sex",
        "labels_statement",
        "source_file",
        "source_rate",
        "fold",
    )
    for i, cells in enumerate(zip(*(store.column(name) for name in names), strict=True)):
        record, patient, age, sex, codes, file, rate, fold = cells
        study = expected[record]
        assert (patient, age, sex, rate) == (
            str(study.patient),
            pytest.approx(study.age),
            study.sex[0],
            study.rate,
        )
        assert sorted(map(int, codes)) == study.codes
        assert file.endswith(f"WFDB/{study.folder}/{study.name}.hea")
        assert (tmp_path / "source" / file).is_file()
        assert CORPORA[corpus].partition_of(file) == name_of(version, study)
        assert 0 <= fold < 20
        np.testing.assert_allclose(store.read(i) / 1000, resample(study.signal, rate, 240.0), atol=0.001)
    folds = {}
    for patient, fold in zip(store.column("patient_id"), store.column("fold"), strict=True):
        assert folds.setdefault(patient, fold) == fold
    assert store.classes["statement"] == sorted(store.classes["statement"], key=int)
    found = store.class_info["statement"]["22"]["description"]
    assert found == ("" if version == 2 else "Normal sinus rhythm")
    assert (tmp_path / "store" / "problems.jsonl").read_text() == ""
    # Folders lie together in the store, so that a slow disk is read in order.
    files = store.column("source_file").tolist()
    assert files == sorted(files)


def test_any_number_of_processes_gives_the_same_store(tmp_path):
    write(tmp_path / "source", 5, replica.studies(40, seconds=3.0))
    for workers in (1, 2):
        prepare("heedb", tmp_path / "source", tmp_path / str(workers), workers=workers, progress=False)
    assert Store(tmp_path / "1").fingerprint == Store(tmp_path / "2").fingerprint


def counted(problems) -> list[tuple]:
    """(record, kind, number in the detail) of every problem."""
    return sorted((p.record, p.kind, next(w for w in p.detail.split() if w.isdigit())) for p in problems)


@pytest.mark.parametrize("version", [2, 5])
def test_what_is_on_one_side_only_is_counted_by_partition(tmp_path, version):
    some = replica.studies(12)
    some[0].listed = some[3].listed = False  # both in S0001/1987
    some[1].codes = None
    row = {"BDSPPatientID": 5, "PatientRace": "", "SexDSC": ""}
    before = "WFDB/" if version == 2 else "/"
    age = "Age" if version == 2 else "AgeAtAcquisition"
    rows = [
        {**row, "FileName": f"{before}S0001/1987/04/de_5_gone", age: ""},
        {**row, "FileName": f"{before}S0002/2013/04/de_5_elsewhere", age: ""},
        {**row, "FileName": f"{before}S0002/2013/04/de_6_elsewhere", age: ""},
        {**row, "FileName": "nonsense", age: ""},
        {**row, "FileName": "", age: ""},
    ]
    columns = {"LanguageDSC": ""} if version == 2 else {"FileID": ""}
    write(tmp_path, version, some, rows=[{**r, **columns} for r in rows])
    found = listing("heedb", tmp_path)
    table = "demographics_ECG.csv" if version == 2 else "metadata.csv"
    assert counted(found.problems) == [
        ("S0001-1987", "missing_part", "1"),
        ("S0001-1987", "no_table_row", "2"),
        ("S0002-2013", "missing_part", "2"),
        (table, "missing_part", "2"),
    ]
    entries = {entry.record_id: entry for entry in found.entries}
    assert len(entries) == len(found.entries) == 12
    unlisted = entries[some[0].name]
    assert (unlisted.fold, unlisted.patient_id, unlisted.age, unlisted.sex) == (-1, None, None, None)
    assert entries[some[1].name].labels == {"statement": []}
    assert entries[some[1].name].fold >= 0


def test_a_recording_without_patient_is_trained_on_only(tmp_path):
    some = replica.studies(8, emory=True)
    some[2].patient = some[5].patient = some[7].patient = None
    write(tmp_path, "emory", some)
    found = listing("heedb_emory", tmp_path)
    entries = {entry.record_id: entry for entry in found.entries}
    assert (entries[some[2].name].fold, entries[some[2].name].patient_id) == (-1, None)
    assert entries[some[2].name].labels == {"statement": [str(code) for code in some[2].codes]}
    # The others' patients have lost the ".0" that gaps give to a column.
    assert entries[some[3].name].patient_id == str(some[3].patient)
    assert entries[some[3].name].fold >= 0
    assert counted(found.problems) == [("emory-2010", "no_patient", "1"), ("emory-2018", "no_patient", "2")]


def test_listed_duplicates_are_left_out(tmp_path):
    some = replica.studies(9)
    listed = [f"WFDB/{some[0].folder}/{some[0].name}.hea", some[2].name, f"{some[4].name}.mat", "de_not_here"]
    write(tmp_path, 2, some, duplicated=listed)
    found = listing("heedb", tmp_path)
    left = {s.name for i, s in enumerate(some) if i not in (0, 2, 4)}
    assert {entry.record_id for entry in found.entries} == left
    expected = [("S0001-1987", "listed_duplicate", "2"), ("S0003-1990", "listed_duplicate", "1")]
    assert counted(found.problems) == expected
    # Labels and people stay with their recordings.
    by_name = {s.name: s for s in some}
    for entry in found.entries:
        study = by_name[entry.record_id]
        assert (entry.patient_id, entry.age) == (str(study.patient), study.age)
        assert entry.labels == {"statement": [str(code) for code in study.codes]}


def test_version_2_needs_its_list_of_duplicates(tmp_path):
    write(tmp_path, 2, replica.studies(2))
    (tmp_path / "Metadata" / "duplicated.csv").unlink()
    with pytest.raises(UserError, match=r"duplicated\.csv is missing"):
        listing("heedb", tmp_path)


def test_rows_that_contradict_each_other_are_unknown(tmp_path):
    some = replica.studies(6)
    again = [
        {
            "BDSPPatientID": patient,
            "FileName": f"/{s.folder}/{s.name}",
            "FileID": "",
            "PatientRace": s.race,
            "SexDSC": s.sex,
            "AgeAtAcquisition": s.age * 365.25,
        }
        for s, patient in ((some[0], 7), (some[1], some[1].patient))
    ]
    write(tmp_path, 5, some, rows=again)
    found = listing("heedb", tmp_path)
    assert [(p.record, p.kind) for p in found.problems] == [
        (some[0].name, "contradictory_rows"),
        ("S0001-1987", "no_table_row"),
    ]
    entries = {entry.record_id: entry for entry in found.entries}
    assert (entries[some[0].name].patient_id, entries[some[0].name].fold) == (None, -1)
    # A row that is there twice says the same twice.
    assert entries[some[1].name].patient_id == str(some[1].patient)


def test_a_name_in_two_folders_is_read_once(tmp_path):
    some = replica.studies(4)
    some[1].name = some[0].name
    write(tmp_path, 5, some)
    found = listing("heedb", tmp_path)
    assert [(p.record, p.kind) for p in found.problems] == [(some[0].name, "duplicate_id")]
    assert len(found.entries) == 3
    # Each row is told by its folder.
    assert next(e for e in found.entries if e.record_id == some[0].name).age == some[0].age


@pytest.mark.parametrize(("text", "age"), [("", None), ("-1", None), ("nan", None), ("0", 0.0), ("61", 61.0)])
def test_ages(tmp_path, text, age):
    write(tmp_path, 2, replica.studies(2))
    path = tmp_path / "Metadata" / "demographics_ECG.csv"
    table = replicas.read_csv(path)
    for row in table:
        row.update(Age=text, SexDSC="Unknown", PatientRace="")
    replicas.write_csv(path, table)
    for entry in listing("heedb", tmp_path).entries:
        assert (entry.age, entry.sex) == (age, None)
        assert 0 <= entry.fold < 20


def test_codes_are_told_once_and_in_order(tmp_path):
    some = replica.studies(3)
    some[0].codes, some[1].codes, some[2].codes = [1700, 22, 22, 161], [], [9]
    write(tmp_path, 5, some)
    found = listing("heedb", tmp_path)
    labels = {entry.record_id: entry.labels["statement"] for entry in found.entries}
    assert [labels[s.name] for s in some] == [["22", "161", "1700"], [], ["9"]]
    assert found.classes == {"statement": ["9", "22", "161", "1700"]}
    assert found.descriptions["statement"] == {"22": "Normal sinus rhythm", "161": "Atrial fibrillation"}


def test_without_diagnoses_recordings_have_no_labels(tmp_path):
    write(tmp_path, 5, replica.studies(4))
    (tmp_path / "I0001" / "12SL_diagnoses" / "diagnoses_v24.csv").unlink()
    found = listing("heedb", tmp_path)
    assert [(p.record, p.kind) for p in found.problems] == [("diagnoses_v24.csv", "missing_part")]
    assert all(entry.labels == {"statement": []} and entry.fold >= 0 for entry in found.entries)
    assert found.classes == {"statement": []}


@pytest.mark.parametrize("below", ["", "ECG", "ECG/I0001"])
def test_source_may_be_any_of_three_folders(tmp_path, below):
    write(tmp_path / "ECG", 5, replica.studies(4))
    write(tmp_path / "ECG", "emory", replica.studies(2, emory=True))
    found = listing("heedb", tmp_path / below)
    assert len(found.entries) == 4
    assert {heedb.partition_of(f"/{entry.file}") for entry in found.entries} == {"S0001-1987", "S0003-1990"}
    emory = tmp_path / below.replace("I0001", "I0006")
    assert [heedb_emory.partition_of(e.file) for e in listing("heedb_emory", emory).entries] == [
        "emory-2010",
        "emory-2018",
    ]


def test_wrong_folders_are_refused(tmp_path):
    for corpus in ("heedb", "heedb_emory"):
        with pytest.raises(UserError, match="is not the HEEDB folder"):
            listing(corpus, tmp_path)
    write(tmp_path / "emory", "emory", replica.studies(2, emory=True))
    with pytest.raises(UserError, match="is not the HEEDB folder"):
        listing("heedb", tmp_path / "emory" / "I0006")
    write(tmp_path / "both", 5, replica.studies(2))
    write(tmp_path / "both", 2, replica.studies(2))
    with pytest.raises(UserError, match="two versions"):
        listing("heedb", tmp_path / "both")
    write(tmp_path / "empty", 5, replica.studies(1))
    for path in (tmp_path / "empty" / "I0001" / "WFDB").rglob("*.hea"):
        path.unlink()
    with pytest.raises(UserError, match=r"No \.hea file"):
        listing("heedb", tmp_path / "empty")
    (tmp_path / "empty" / "I0001" / "WFDB").rename(tmp_path / "empty" / "I0001" / "elsewhere")
    with pytest.raises(UserError, match="no folder like S0001/1987"):
        listing("heedb", tmp_path / "empty")
    with pytest.raises(UserError, match="--source-rate"):
        heedb.list_records(tmp_path, 500)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metadata/metadata.csv", "BDSPPatientID", "Patient", "has no column BDSPPatientID"),
        ("metadata/metadata.csv", "110000000", "x110", "BDSPPatientID is no whole number"),
        ("metadata/metadata.csv", "7305.0", "old", "is not the table BDSP has"),
        ("12SL_diagnoses/diagnoses_v24.csv", "codes", "code", "has no column codes"),
        ("12SL_diagnoses/diagnoses_v24.csv", "1684", "AF", "whole numbers separated by commas"),
        ("12SL_diagnoses/diagnoses_v24.csv", "1684", "-4", "whole numbers separated by commas"),
    ],
)
def test_damaged_tables_are_named(tmp_path, file, old, new, message):
    some = replica.studies(4)
    some[0].codes = [1684]
    write(tmp_path, 5, some)
    path = tmp_path / "I0001" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as refusal:
        listing("heedb", tmp_path)
    assert str(path) in str(refusal.value)


def test_a_partition_the_paper_does_not_have_is_told(tmp_path):
    some = replica.studies(4)
    some[0].folder = "S0001/1988/01"
    some[1].folder = "S0005/2024/01"
    write(tmp_path, 5, some)
    found = listing("heedb", tmp_path)
    assert [(p.record, p.kind) for p in found.problems] == [("S0005-2024", "extra_partition")]
    assert len(found.entries) == 4


def test_links_hidden_files_and_names_of_files(tmp_path):
    write(tmp_path, 5, replica.studies(6))
    wfdb = tmp_path / "I0001" / "WFDB"
    (wfdb / "S0001" / "1987" / "loop").symlink_to(wfdb / "S0001" / "1987")
    (wfdb / "S0003" / "1990" / "11").rename(tmp_path / "elsewhere")
    (wfdb / "S0003" / "1990" / "11").symlink_to(tmp_path / "elsewhere")
    (wfdb / "S0001" / "1987" / "04" / "._de_1.hea").touch()
    found = listing("heedb", tmp_path)
    assert len(found.entries) == 6
    assert found.problems == []
    (wfdb / "S0001" / "1987" / "04" / b"de_\xe9.hea".decode(errors="surrogateescape")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        listing("heedb", tmp_path)


def test_partitions_are_those_of_the_ladder():
    paper = set(ladder.PARTITIONS["11m"])
    assert {*heedb.PARTITIONS, *heedb_emory.PARTITIONS, "code15"} == paper
    assert (len(heedb.PARTITIONS), len(heedb_emory.PARTITIONS)) == (34, 9)
    assert heedb.partition_of("WFDB/S0001/1987/04/a.hea") == "S0001-1987"
    assert heedb.partition_of("records500/00000/00001_hr.hea") is None
    assert heedb_emory.partition_of("WFDB/S0001/1987/04/a.hea") is None


def test_folds_are_stratified(tmp_path):
    some = replica.studies(6, seconds=1.0)
    # 400 recordings of 200 patients, without signals: only the names of the files count here.
    more = [
        replica.Study(f"de_{i}", replica.PARTITIONS[i % 3], 500, some[0].signal, 1000 + i // 2, [i // 2 % 10])
        for i in range(400)
    ]
    write(tmp_path, 5, some)
    for study in more:
        (tmp_path / "I0001" / "WFDB" / study.folder / f"{study.name}.hea").touch()
    base = tmp_path / "I0001"
    people, codes = base / "metadata" / "metadata.csv", base / "12SL_diagnoses" / "diagnoses_v24.csv"
    with open(people, "a") as file, open(codes, "a") as other:
        for s in more:
            file.write(f"{s.patient},/{s.folder}/{s.name},,White,Male,20000\n")
            other.write(f'./{s.folder}/{s.name},"{s.codes[0]}, 5000"\n')
    entries = [e for e in listing("heedb", tmp_path).entries if int(e.patient_id) < 2000]
    assert len(entries) == 400
    table = np.zeros((10, 20), int)
    for entry in entries:
        table[int(entry.labels["statement"][0]), entry.fold] += 1
    # Forty recordings a code, in pairs of a patient: two in each fold.
    assert (table == 2).mean() > 0.9


def columns(n=50):
    return pa.table(
        {
            "record_id": pa.array([f"r{i}" for i in range(n)], pa.large_string()),
            "folder": pa.array([f"f{i // 7}/" for i in range(n)]).dictionary_encode(),
            "patient_id": pa.array([None if i % 9 == 0 else i // 2 for i in range(n)], pa.int64()),
            "fold": pa.array([i % 3 - 1 for i in range(n)], pa.int16()),
            "age": pa.array([None if i % 5 == 0 else i / 2 for i in range(n)], pa.float64()),
            "sex": pa.array([("F", "M", None)[i % 3] for i in range(n)]),
            "labels_a": pa.array([[] if i % 4 == 0 else [i % 2, 2] for i in range(n)], pa.list_(pa.int16())),
            "values_v": pa.array([[1.5, float("nan")] if i % 2 else [None, None] for i in range(n)]),
        }
    )


def entry_table(table, problems=None):
    return EntryTable(table, ".hea", {"a": ["x", "y", "z"]}, {"v": ["one", "two"]}, problems or {})


def test_an_entry_table_is_a_sequence_of_entries():
    problem = Problem("r3", "no_table_row", "kept", "why")
    entries = entry_table(columns(), {3: (problem,)})
    expected = [
        Entry(
            record_id=f"r{i}",
            file=f"f{i // 7}/r{i}.hea",
            patient_id=None if i % 9 == 0 else str(i // 2),
            fold=i % 3 - 1,
            labels={"a": [] if i % 4 == 0 else ["xy"[i % 2], "z"]},
            age=None if i % 5 == 0 else i / 2,
            sex=("F", "M", None)[i % 3],
            problems=(problem,) if i == 3 else (),
            values={"v": {"one": 1.5}} if i % 2 else {},
        )
        for i in range(50)
    ]
    assert len(entries) == 50
    assert list(entries) == expected
    assert [entries[i] for i in (0, 3, 49, -1)] == [expected[i] for i in (0, 3, 49, -1)]
    assert list(entries[2:5]) == expected[2:5]
    assert list(entries[40:90]) == expected[40:]
    assert list(entries[5:2]) == []
    assert list(entries[10:40][5:9]) == expected[15:19]
    with pytest.raises(IndexError):
        entries[50]
    with pytest.raises(ValueError, match="step"):
        entries[::2]


def test_a_slice_of_an_entry_table_takes_only_its_rows_along():
    entries = entry_table(columns(20_000), {7: (Problem("r7", "no_table_row", "kept", "why"),)})
    whole, part = len(pickle.dumps(entries)), pickle.dumps(entries[5:25])
    assert len(part) < whole / 20
    assert list(pickle.loads(part)) == list(entries[5:25])
    assert pickle.loads(part)[2].problems


def test_an_entry_table_may_have_few_columns():
    table = pa.table({"record_id": ["a", "b"], "file": ["x/1", "y/2"]})
    assert list(EntryTable(table, ".dat")) == [
        Entry("a", "x/1.dat", labels={}),
        Entry("b", "y/2.dat", labels={}),
    ]


def test_digest_of_a_table_tells_contents_and_not_chunks():
    table = columns()
    digest = Listing(entry_table(table), [], ("a",), None, {}, "").digest()
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 30), table.slice(33)])
    assert entry_table(pieces).digest() == digest
    assert entry_table(table.slice(0, 49)).digest() != digest
    assert entry_table(table, {1: (Problem("r1", "no_table_row", "kept", "why"),)}).digest() != digest
    for name in table.column_names:
        cells = table.column(name).to_pylist()
        cells[7], cells[10] = cells[10], cells[7]
        place = table.column_names.index(name)
        changed = table.set_column(place, name, pa.array(cells, table.schema.field(name).type))
        same = cells[7] == cells[10]
        assert (entry_table(changed).digest() == digest) == same, name
    # Where text ends is told too.
    swapped = [EntryTable(pa.table({"record_id": names})).digest() for names in (["ab", "c"], ["a", "bc"])]
    assert swapped[0] != swapped[1]


def test_the_digest_notices_a_new_diagnosis(tmp_path):
    some = replica.studies(3)
    write(tmp_path, 5, some)
    before = listing("heedb", tmp_path).digest()
    assert listing("heedb", tmp_path).digest() == before
    some[1].codes = [161]
    write(tmp_path, 5, some)
    assert listing("heedb", tmp_path).digest() != before


def test_problems_of_a_listing_reach_the_store(tmp_path):
    some = replica.studies(4, seconds=3.0)
    some[0].listed = False
    write(tmp_path / "source", 5, some)
    prepare("heedb", tmp_path / "source", tmp_path / "store", workers=1, progress=False)
    (line,) = (tmp_path / "store" / "problems.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "no_table_row"
