"""The MIMIC-IV-ECG corpus, on a replica of its layout."""

import dataclasses

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ecg_jax.data.corpora import mimic
from ecg_jax.data.corpora.listing import hash_fold
from ecg_jax.data.corpora.mimic_tables import nearest, read_columns
from ecg_jax.data.corpora.mimic_targets import ECG, LABS, VITALS, ecg_features
from ecg_jax.data.readers import columns as reader
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare
from mimic_replica import MACHINE, STUDIES, icd, write_mimic, write_table

SETS = ["sex", "age", "protocol", "ecg", "biometrics", "labs", "vitals", "deterioration", "mortality", "icu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mimic(tmp_path_factory.mktemp("mimic") / "source")


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("mimic") / "store"
    prepare("mimic", folder, path, workers=1, progress=False, strict=True)
    return Store(path)


def listed(folder) -> dict[str, object]:
    return {entry.record_id: entry for entry in mimic.list_records(folder, None).entries}


def values(store, name) -> dict[str, dict[str, float]]:
    """record id -> name -> number."""
    matrix = store.value_matrix(name)
    return {
        record: dict(zip(store.values[name], row.tolist(), strict=True))
        for record, row in zip(store.column("record_id"), matrix, strict=True)
    }


class TestStore:
    def test_records_and_signals(self, store):
        assert store.corpus == "mimic"
        assert store.column("record_id").tolist() == [str(s.study) for s in STUDIES]
        assert store.column("patient_id").tolist() == [str(s.patient) for s in STUDIES]
        # aVF comes before aVL in the files; the store has the canonical order, and nothing to report.
        i, _, iii, _, avl, avf = (store.read(1)[:, :6] / 1000).T
        np.testing.assert_allclose(avl, (i - iii) / 2, atol=0.02)
        np.testing.assert_allclose(avf, i + iii - i / 2, atol=0.02)
        assert np.abs(avl - avf).max() > 0.2

    def test_folds_of_patients(self, store):
        assert store.column("fold").tolist()[:7] == [0, 0, 0, 18, 18, 19, 19]
        # Not in the table of diagnoses: the fold of the patient, or one that depends on the patient only.
        assert store.column("fold")[7] == 19
        assert store.column("fold")[8] == hash_fold("10000400", 20, 0)
        assert "strat_fold" in store.fold_source

    def test_labels(self, store):
        labels = [list(codes) for codes in store.column("labels_icd10")]
        assert labels[0] == ["I48", "I481", "I4819", "W19"]
        assert labels[1] == ["E78", "E785", "I48", "I481", "I4819", "T50", "T500"]
        assert labels[2] == labels[7] == labels[8] == []
        assert labels[5] == ["J18", "J189"]
        assert "I10" in store.classes["icd10"]
        assert store.class_info["icd10"]["I481"] == {
            "count": 2,
            "description": "IX: Diseases of the circulatory system",
        }

    def test_protocol_is_of_emergency_recordings_with_diagnoses_and_the_first_held_out_ones(self, store):
        assert store.value_matrix("protocol")[:, 0].tolist() == [1, 1, 0, 1, 0, 0, 1, 0, 0]

    def test_people(self, store):
        sex, age = store.value_matrix("sex")[:, 0], store.value_matrix("age")[:, 0]
        np.testing.assert_array_equal(sex, [0, 0, np.nan, 1, 1, 0, 0, np.nan, np.nan])
        np.testing.assert_array_equal(age, [52, 52, np.nan, 91, 93, 52, 52, np.nan, np.nan])
        assert store.column("sex").tolist() == ["F", "F", None, "M", "M", "F", "F", None, None]
        np.testing.assert_array_equal(store.column("age"), age)

    def test_outcomes(self, store):
        assert list(store.values) == SETS
        icu, mortality = values(store, "icu"), values(store, "mortality")
        assert np.isnan(icu["40689238"]["icu_24h"])  # -999
        assert icu["40689238"]["icu_stay"] == 1
        assert icu["45090959"] == {"icu_24h": 0, "icu_stay": 0}
        assert mortality["45090959"]["mortality_365d"] == 1
        assert mortality["45090959"]["mortality_1d"] == 0
        assert np.isnan(store.value_matrix("mortality")[1]).all()  # no row in the table
        assert np.isnan(values(store, "deterioration")["45090959"]["ecmo"])
        assert [store.value_matrix(name).shape[1] for name in SETS] == [1, 1, 1, 7, 3, 18, 6, 6, 7, 2]

    def test_measurements_of_the_emergency_table_in_the_units_of_the_others(self, store):
        found = values(store, "biometrics")["40689238"]
        np.testing.assert_allclose(list(found.values()), [180 / 2.54, 80 / 0.45359237, 24.7])
        assert (
            store.values["biometrics"]["height"] == "height, inches; mean of the first 90 minutes, mds_ed.csv"
        )
        vitals = values(store, "vitals")["40689238"]
        np.testing.assert_allclose(vitals["temperature"], 98.6)
        assert vitals["heartrate"] == 81.5
        assert np.isnan(vitals["sbp"])
        labs = values(store, "labs")["40689238"]
        assert (labs["Creatinine"], labs["Bilirubin, Total"]) == (1.1, 0.4)
        assert np.isnan(labs["Ferritin"])
        assert "does not have it" in store.values["labs"]["Ferritin"]

    def test_machine_measurements(self, store):
        found = values(store, "ecg")
        assert found["40689238"] == {
            "RR": 1000, "QRS": 90, "QT": 400, "QTc": 400, "P_axis": 50, "QRS_axis": -30, "T_axis": 45,
        }  # fmt: skip
        assert np.isnan(found["44458630"]["P_axis"])  # 29999
        assert np.isnan([found["49036311"][name] for name in ("RR", "QT", "QTc")]).all()
        assert found["49036311"]["QRS"] == 90
        assert np.isnan(found["48446569"]["QRS_axis"])  # beyond 360 degrees
        assert np.isnan(list(found["41420867"].values())).all()
        assert np.isnan(list(found["43000000"].values())).all()


class TestTables:
    def test_without_any_table_everything_is_unknown(self, tmp_path):
        source = write_mimic(tmp_path / "source", STUDIES[:3], False, False, False)
        summary = prepare("mimic", source, tmp_path / "store", workers=1, progress=False)
        store = Store(tmp_path / "store")
        assert "SHA-256" in summary.fold_source
        assert len(set(store.column("fold"))) == 1  # one patient
        assert store.classes == {}
        assert list(store.values) == SETS
        assert all(np.isnan(store.value_matrix(name)).all() for name in SETS)

    def test_nearest_of_the_hospital_tables(self, tmp_path):
        source = write_mimic(tmp_path, STUDIES[:4])  # first recording: 2180-07-23 08:44:00
        patient = 10000032
        omr = [("2180-05-01", "Weight (Lbs)", "150"), ("2180-07-01", "Weight (Lbs)", "160.5"),
               ("2180-08-22", "Weight (Lbs)", "170"), ("2180-07-23", "Blood Pressure", "120/80"),
               ("2180-07-20", "Weight (Lbs)", "16O"), ("2180-09-08", "BMI (kg/m2)", "30.1"),
               ("2180-07-07", "Height (Inches)", "70"), ("2180-07-06", "BMI (kg/m2)", "29")]  # fmt: skip
        write_table(
            source / "omr.csv.gz",
            [
                {"subject_id": patient, "chartdate": d, "seq_num": 1, "result_name": n, "result_value": v}
                for d, n, v in omr
            ],
        )
        stay = {"subject_id": patient, "stay_id": 1, **dict.fromkeys(VITALS, "")}
        write_table(
            source / "vitalsign.csv",
            [
                {**stay, "charttime": "2180-07-23 07:43:59", "sbp": 90, "dbp": 50},
                {**stay, "charttime": "2180-07-23 08:00:00", "sbp": 110, "temperature": 98.1},
                {**stay, "charttime": "2180-07-23 09:10:00", "temperature": 99.5},
            ],
        )
        lab = {"labevent_id": 1, "subject_id": patient, "comments": 'IF "HIGH",\nREPEAT'}
        creatinine, other = LABS["Creatinine"][0], 52546
        write_table(
            source / "labevents.csv",
            [
                {**lab, "itemid": creatinine, "storetime": "2180-07-23 09:14:00", "valuenum": 1.4},
                {**lab, "itemid": creatinine, "storetime": "2180-07-23 08:14:00", "valuenum": 1.2},
                {**lab, "itemid": creatinine, "storetime": "2180-07-23 08:44:00", "valuenum": ""},
                {**lab, "itemid": creatinine, "storetime": "", "valuenum": 9.9},
                {**lab, "itemid": other, "storetime": "2180-07-23 08:44:00", "valuenum": 7.7},
                {
                    **lab,
                    "subject_id": 10000117,
                    "itemid": creatinine,
                    "storetime": "2180-07-23 08:44:00",
                    "valuenum": 5,
                },
            ],
        )
        listing = mimic.list_records(source, None)
        first, second, third, other_patient = (entry.values for entry in listing.entries)
        # 30 days: July 1 and August 22 are within, August 22 (30 days) is farther than July 1 (22).
        assert first["biometrics"] == {"height": 70.0, "weight": 160.5, "bmi": 29.0}
        # Of August 6, 09:07: July 7 counts as 30 days before, July 6 as 31, September 8 as 32 after.
        assert third["biometrics"] == {"height": 70.0, "weight": 170.0}
        assert first["vitals"] == {"sbp": 110.0, "temperature": 99.5}  # 61 min before is too early
        assert second["vitals"] == {"temperature": 99.5}
        # 30 min before and after: the earlier counts.
        assert first["labs"] == {"Creatinine": 1.2}
        assert second["labs"] == {"Creatinine": 1.4}
        assert "labs" not in third
        assert "biometrics" not in other_patient
        assert "nearest of omr.csv" in listing.values["biometrics"]["weight"]
        assert first["icu"] == {"icu_stay": 1.0}  # still of mds_ed.csv

    def test_the_digest_tells_another_value(self, folder, tmp_path):
        other = [dataclasses.replace(STUDIES[0], machine={**MACHINE, "t_axis": 46}), *STUDIES[1:]]
        found = {mimic.list_records(f, None).digest() for f in (folder, write_mimic(tmp_path, other))}
        assert len(found) == 2

    @pytest.mark.parametrize(
        ("table", "change", "message"),
        [
            ("records_w_diag_icd10.csv", ("strat_fold", "old_fold"), "no column strat_fold"),
            ("machine_measurements.csv", ("t_axis", "tt"), "no column t_axis"),
            ("mds_ed.csv", ("deterioration_icu_24h", "x"), "no column deterioration_icu_24h"),
            ("record_list.csv", ("path", "where"), "no column path"),
            ("record_list.csv", ("40689238,40689238", "4068923a,40689238"), "is not the table PhysioNet has"),
            (
                "records_w_diag_icd10.csv",
                ("['J189'],F", "J189,F"),
                "study 42745010 has 'J189' in column all_diag_all",
            ),
            ("records_w_diag_icd10.csv", ("True,False,True,3,18", "True,False,True,3,20"), "strat_fold 20"),
            (
                "records_w_diag_icd10.csv",
                ("True,False,True,3,18", "True,False,True,3,17"),
                "10000117 has two folds",
            ),
        ],
    )
    def test_a_wrong_table_is_named(self, tmp_path, table, change, message):
        source = write_mimic(tmp_path / "source")
        path = source / table
        text = path.read_text()
        assert change[0] in text
        path.write_text(text.replace(*change, 1))
        with pytest.raises(UserError, match=message) as error:
            mimic.list_records(source, None)
        assert table in str(error.value)

    @pytest.mark.parametrize("table", ["mds_ed.csv", "records_w_diag_icd10.csv", "machine_measurements.csv"])
    def test_a_row_twice_in_a_table_counts_once(self, folder, tmp_path, table):
        source = write_mimic(tmp_path / "source")
        text = (source / table).read_text()
        (source / table).write_text(text + text.splitlines()[1] + "\n")
        listing = mimic.list_records(source, None)
        assert listing.problems == []
        assert listing.digest() == mimic.list_records(folder, None).digest()

    @pytest.mark.parametrize(
        ("table", "change", "lost"),
        [
            (
                "mds_ed.csv",
                ("81.5", "82.5"),
                {"vitals", "biometrics", "labs", "deterioration", "mortality", "icu"},
            ),
            ("machine_measurements.csv", (",290,", ",291,"), {"ecg"}),
            ("records_w_diag_icd10.csv", ("['I4819', 'W19XXXA']", "['I10']"), {"sex", "age"}),
        ],
    )
    def test_rows_that_contradict_each_other_are_unknown_and_reported(
        self, folder, tmp_path, table, change, lost
    ):
        source = write_mimic(tmp_path / "source")
        lines = (source / table).read_text().splitlines()
        (line,) = [line for line in lines[1:] if "40689238" in line]
        assert change[0] in line
        # Between them a row that agrees with the first: any two that differ make the study unknown.
        (source / table).write_text("\n".join([*lines, line, line.replace(*change)]) + "\n")
        listing = mimic.list_records(source, None)
        assert [(p.record, p.action) for p in listing.problems] == [("40689238", "unknown")]
        assert table in listing.problems[0].detail
        found, before = {e.record_id: e for e in listing.entries}, listed(folder)
        assert set(before["40689238"].values) - set(found["40689238"].values) == lost
        if table == "records_w_diag_icd10.csv":
            one = found["40689238"]
            # The fold is that of the patient's other rows; without diagnoses it is outside the protocol.
            assert (one.labels["icd10"], one.fold, one.age, one.sex) == ([], 0, None, None)
            assert one.values["protocol"] == {"ed": 0.0}
        del found["40689238"], before["40689238"]
        assert found == before
        prepare("mimic", source, tmp_path / "store", workers=1, progress=False)
        assert "contradict each other" in (tmp_path / "store" / "problems.jsonl").read_text()

    def test_stays_without_a_recording_are_left_out_and_ids_are_whole(self, folder, tmp_path, recwarn):
        source = write_mimic(tmp_path / "source")
        path = source / "mds_ed.csv"
        lines = path.read_text().splitlines()
        assert "general_study_id" in lines[0].split(",")[0]
        gap = lines[1].replace("40689238", "", 1)
        path.write_text("\n".join([*lines, gap, gap.replace("81.5", "70")]) + "\n")
        assert mimic.list_records(source, None).digest() == mimic.list_records(folder, None).digest()
        assert not recwarn.list
        path.write_text("\n".join([*lines, lines[1].replace("40689238", "40689238.5", 1)]) + "\n")
        with pytest.raises(UserError, match=r"mds_ed\.csv: general_study_id 40689238\.5 is no whole number"):
            mimic.list_records(source, None)

    def test_a_study_twice_in_the_list_is_refused(self, tmp_path):
        source = write_mimic(tmp_path / "source")
        path = source / "record_list.csv"
        path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
        listing = mimic.list_records(source, None)
        assert len(listing.entries) == len(STUDIES)
        assert [problem.kind for problem in listing.problems] == ["duplicate_id"]

    def test_another_folder_and_a_rate(self, tmp_path):
        with pytest.raises(UserError, match=r"record_list\.csv is missing"):
            mimic.list_records(tmp_path, None)
        with pytest.raises(UserError, match="--source-rate"):
            mimic.list_records(tmp_path, 500)


def test_columns_of_a_gzipped_table_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_BLOCK", 64)
    rows = [{"a": i, "b": "x, y" if i % 2 else "", "c": i / 2 if i % 3 else "", "d": "d"} for i in range(60)]
    path = write_table(tmp_path / "t.csv.gz", rows)
    sizes = []

    def keep(part):
        sizes.append(len(part["a"]))
        return pc.less(part["a"], 6)

    found = read_columns(path, {"c": "float", "a": "int", "b": "text"}, keep)
    assert len(sizes) > 3
    assert sum(sizes) == 60
    assert found["a"].tolist() == list(range(6))
    np.testing.assert_array_equal(found["c"], [np.nan, 0.5, 1, np.nan, 2, 2.5])
    assert found["b"].tolist() == [None, "x, y", None, "x, y", None, "x, y"]
    assert read_columns(path, {"a": "int"}, lambda part: pc.less(part["a"], 0))["a"].tolist() == []


def test_tables_that_cannot_be_read(tmp_path):
    whole = write_table(tmp_path / "t.csv.gz", [{"a": i} for i in range(1000)]).read_bytes()
    for name, data, message in [
        ("cut.csv.gz", whole[:60], "Cannot read"),
        ("damaged.csv.gz", whole[:30] + b"ECG" + whole[33:], "Cannot read"),
        ("plain.csv.gz", b"a\n1\n", "Cannot read"),
        ("empty.csv", b"", "no column a"),
        ("picture.csv", b"\xff\xfe\x00", "no CSV file"),
        ("gap.csv", b"a,b\n1,1\n,2\n", "row 2 .* has nothing in column a"),
        ("ragged.csv", b"a,b\n1,1\n2\n", "not the table"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            read_columns(tmp_path / name, {"a": "int"})
        assert name in str(error.value)


def test_codes_that_are_none_or_of_another_form():
    assert mimic._parse_codes("['I10', None, nan, 'NoDx']", "t", 1) == ["I10"]
    for text in (None, "", "I10", "['I10'", "[I10]", "['I10' 'I11']"):
        with pytest.raises(UserError, match="must be a list of codes"):
            mimic._parse_codes(text, "t", 1)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(0, 9)), max_size=20),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=10),
    st.integers(0, 6),
)
@example([(1, 3, 7), (1, 3, 8), (1, 6, 9), (1, 6, 5)], [(1, 4), (1, 5), (1, 6), (2, 3)], 6)
def test_nearest_against_a_plain_search(measured, recorded, within):
    def plain(patient, time):
        near = [(abs(t - time), t, k) for k, (p, t, _) in enumerate(measured) if p == patient]
        near = [found for found in near if found[0] <= within]
        return measured[min(near)[2]][2] if near else np.nan

    columns = [np.array([m[k] for m in measured], np.int64) for k in range(3)]
    patient, time = (np.array([r[k] for r in recorded], np.int64) for k in range(2))
    found = nearest(patient, time, columns[0], columns[1], columns[2].astype(float), within)
    np.testing.assert_array_equal(found, [plain(*r) for r in recorded])


@given(st.lists(st.floats(-1000, 30000) | st.just(29999.0) | st.just(np.nan), min_size=7, max_size=7))
def test_ecg_features_are_possible_or_unknown(numbers):
    names = ("rr_interval", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis")
    found = ecg_features({name: np.array([x]) for name, x in zip(names, numbers, strict=True)})
    assert found.shape == (1, len(ECG))
    by_name = dict(zip(ECG, found[0].tolist(), strict=True))
    for name in ("RR", "QRS", "QT"):
        assert np.isnan(by_name[name]) or 0 < by_name[name] <= 5000
    for name in ("P_axis", "QRS_axis", "T_axis"):
        assert np.isnan(by_name[name]) or abs(by_name[name]) <= 360
    if not np.isnan(by_name["RR"] + by_name["QT"]):
        np.testing.assert_allclose(by_name["QTc"], by_name["QT"] / (by_name["RR"] / 1000) ** 0.5)


def test_bazett_by_hand():
    columns = dict.fromkeys(("p_axis", "qrs_axis", "t_axis"), np.zeros(1))
    columns |= {"rr_interval": [640.0], "qrs_onset": [200.0], "qrs_end": [300.0], "t_end": [560.0]}
    found = ecg_features({name: np.array(x) for name, x in columns.items()})[0]
    np.testing.assert_allclose(found[:4], [640, 100, 360, 450])


def test_hashed_folds_spread_over_all_twenty():
    folds = np.bincount(
        [hash_fold(str(patient), 20, 0) for patient in range(10_000_000, 10_002_000)], minlength=20
    )
    assert folds.min() > 60
    assert len(folds) == 20


def test_the_second_recording_of_a_stay_is_in_the_protocol_only_in_training(tmp_path):
    studies = [
        dataclasses.replace(
            STUDIES[0], study=fold, patient=fold, icd=icd(["I10"], strat_fold=fold, ecg_no_within_stay=1)
        )
        for fold in range(20)
    ]
    found = listed(write_mimic(tmp_path, studies, with_mds=False, with_machine=False))
    assert [found[str(fold)].values["protocol"]["ed"] for fold in range(20)] == [1.0] * 18 + [0.0, 0.0]
