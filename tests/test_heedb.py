"""HEEDB and HEEDB-Emory, on replicas of their layouts."""

import json

import numpy as np
import pytest

import heedb_replica as replica
from ecg_jax.data import ladder
from ecg_jax.data.corpora import CORPORA, heedb, heedb_emory
from ecg_jax.data.preprocessing import resample
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.targets import LabelLists
from ecg_jax.prepare import prepare
from ecg_jax.verify import verify_all
from heedb_replica import listing, write


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


def test_a_name_in_two_folders_is_read_once(tmp_path):
    some = replica.studies(4)
    some[1].name = some[0].name
    write(tmp_path, 5, some)
    found = listing("heedb", tmp_path)
    assert [(p.record, p.kind) for p in found.problems] == [(some[0].name, "duplicate_id")]
    assert len(found.entries) == 3
    # Each row is told by its folder.
    assert next(e for e in found.entries if e.record_id == some[0].name).age == some[0].age


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


def test_problems_of_a_listing_reach_the_store(tmp_path):
    some = replica.studies(4, seconds=3.0)
    some[0].listed, some[1].codes, some[2].codes = False, None, []
    write(tmp_path / "source", 5, some)
    prepare("heedb", tmp_path / "source", tmp_path / "store", workers=1, progress=False)
    lines = (tmp_path / "store" / "problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["no_diagnosis", "no_table_row"]
    store = Store(tmp_path / "store")
    known = dict(zip(store.column("record_id"), LabelLists.of_store(store, "statement").known, strict=True))
    assert [known[s.name] for s in some] == [True, False, True, True]
    verify_all([store.path], progress=False)
