"""What the tables of HEEDB say of its recordings, and what is told or refused when they do not fit."""

import pytest

import corpus_replicas as replicas
import heedb_replica as replica
from ecg_jax.errors import UserError
from heedb_replica import listing, write


def counted(problems) -> list[tuple]:
    """(record, kind, number in the detail) of every problem."""
    return sorted((p.record, p.kind, next(w for w in p.detail.split() if w.isdigit())) for p in problems)


def diagnoses_of(folder, version):
    """The table of diagnoses."""
    if version == 2:
        return folder / "Metadata" / "ECG_Interpretations.psv"
    return folder / "I0001" / "12SL_diagnoses" / "diagnoses_v24.csv"


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
        ("S0003-1990", "no_diagnosis", "1"),
        (table, "missing_part", "2"),
    ]
    entries = {entry.record_id: entry for entry in found.entries}
    assert len(entries) == len(found.entries) == 12
    unlisted = entries[some[0].name]
    assert (unlisted.fold, unlisted.patient_id, unlisted.age, unlisted.sex) == (-1, None, None, None)
    # Unknown, which is not "no code": no probe may take it for a negative.
    assert entries[some[1].name].labels == {"statement": None}
    assert entries[some[1].name].fold >= 0


@pytest.mark.parametrize("version", [2, 5])
def test_rows_of_diagnoses_without_file_are_counted(tmp_path, version):
    some = replica.studies(12)
    write(tmp_path, version, some, **({"duplicated": [some[1].name]} if version == 2 else {}))
    table = diagnoses_of(tmp_path, version)
    with open(table, "a") as file:
        if version == 2:
            file.write("de_0_gone|22|1\nde_1_gone|22|1\n")
        else:
            file.write("./S0001/1987/04/de_0_gone,22\n./S0002/2013/04/de_1_gone,22\n")
    found = [p for p in listing("heedb", tmp_path).problems if "diagnoses" in p.detail or "ECG_" in p.detail]
    # The row of a recording that is left out as a duplicate is no row without file.
    assert counted(found) == (
        [(table.name, "missing_part", "2")]
        if version == 2
        else [("S0001-1987", "missing_part", "1"), ("S0002-2013", "missing_part", "1")]
    )


@pytest.mark.parametrize(
    ("version", "file", "old", "new"),
    [
        (2, "Metadata/ECG_Interpretations.psv", "de_", "ecg_de_"),
        (2, "Metadata/demographics_ECG.csv", "de_", "ecg_de_"),
        (5, "I0001/12SL_diagnoses/diagnoses_v24.csv", "./S", "records/S"),
        (5, "I0001/metadata/metadata.csv", "/S", "/records/S"),
    ],
)
def test_a_table_that_fits_no_recording_is_refused(tmp_path, version, file, old, new):
    some = replica.studies(6)
    write(tmp_path, version, some)
    path = tmp_path / file
    header, *lines = path.read_text().splitlines()
    for rows, named in ((lines, new.lstrip("/")), ([], "it has no rows")):
        path.write_text("\n".join([header, *(line.replace(old, new) for line in rows)]) + "\n")
        with pytest.raises(UserError, match=f"{path} fits no recording in SOURCE: ") as refusal:
            listing("heedb", tmp_path)
        assert named in str(refusal.value)
        assert f"the files are {some[0].folder}/{some[0].name} and others" in str(refusal.value)
        assert ("remove it to do without labels" in str(refusal.value)) == ("iagnos" in file or "psv" in file)


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
    expected = [
        ("S0001-1987", "listed_duplicate", "2"),
        ("S0003-1990", "listed_duplicate", "1"),
        ("duplicated.csv", "missing_part", "1"),
    ]
    assert counted(found.problems) == expected
    # Labels and people stay with their recordings.
    by_name = {s.name: s for s in some}
    for entry in found.entries:
        study = by_name[entry.record_id]
        assert (entry.patient_id, entry.age) == (str(study.patient), study.age)
        assert entry.labels == {"statement": [str(code) for code in study.codes]}


def test_a_list_of_duplicates_that_fits_nothing_is_refused(tmp_path):
    some = replica.studies(4)
    write(tmp_path, 2, some, duplicated=[f"{s.name}_hr" for s in some[:2]])
    with pytest.raises(
        UserError, match=rf"duplicated\.csv names recordings such as {some[0].name}_hr, but none"
    ):
        listing("heedb", tmp_path)
    # Of a part of the corpus it may name nothing, as long as the table of all recordings has a name of it.
    (tmp_path / "ECG" / "WFDB" / some[1].folder / f"{some[1].name}.hea").unlink()
    (tmp_path / "Metadata" / "duplicated.csv").write_text(f"file_name\n{some[1].name}\nde_not_there\n")
    found = listing("heedb", tmp_path)
    assert ("duplicated.csv", "missing_part", "2") in counted(found.problems)
    assert len(found.entries) == 3


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
        ("S0001-1987", "contradictory_rows"),
        ("S0001-1987", "no_table_row"),
    ]
    entries = {entry.record_id: entry for entry in found.entries}
    assert (entries[some[0].name].patient_id, entries[some[0].name].fold) == (None, -1)
    # A row that is there twice says the same twice.
    assert entries[some[1].name].patient_id == str(some[1].patient)


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
    assert all(entry.labels == {"statement": None} and entry.fold >= 0 for entry in found.entries)
    assert found.classes == {"statement": []}


@pytest.mark.parametrize("version", [2, 5])
def test_several_rows_of_diagnoses_are_united(tmp_path, version):
    some = replica.studies(6)
    some[0].codes, some[1].codes, some[2].codes = [22, 1684], [161], [19]
    write(tmp_path, version, some)
    with open(diagnoses_of(tmp_path, version), "a") as file:
        for i, codes in ((0, "9999, 22"), (0, ""), (1, "161")):
            name = some[i].name
            file.write(f"{name}|{codes}|2\n" if version == 2 else f'./{some[i].folder}/{name},"{codes}"\n')
    found = listing("heedb", tmp_path)
    labels = {entry.record_id: entry.labels["statement"] for entry in found.entries}
    assert [labels[s.name] for s in some[:3]] == [["22", "1684", "9999"], ["161"], ["19"]]
    assert all(labels[s.name] == [str(code) for code in s.codes] for s in some[3:])
    # A row that is there twice says the same twice, and is nothing to tell.
    assert counted(found.problems) == [("S0001-1987", "contradictory_rows", "1")]


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


def test_the_digest_notices_a_new_diagnosis(tmp_path):
    some = replica.studies(3)
    write(tmp_path, 5, some)
    before = listing("heedb", tmp_path).digest()
    assert listing("heedb", tmp_path).digest() == before
    some[1].codes = [161]
    write(tmp_path, 5, some)
    assert listing("heedb", tmp_path).digest() != before
