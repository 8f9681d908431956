"""The labelled evaluation corpora in their published layout: leads, millivolts, labels, patients, folds."""

import json
from pathlib import Path

import numpy as np
import pytest

import corpus_replicas as replicas
import ecg_jax
from ecg_jax.data.corpora import CORPORA, code15, echonext, ptb, ptbxl
from ecg_jax.data.corpora.listing import hash_fold
from ecg_jax.data.preprocessing import resample
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare


def make(corpus, tmp_path, workers=1, **options):
    """The prepared store of a replica in tmp_path / "source"."""
    prepare(corpus, tmp_path / "source", tmp_path / "store", workers=workers, progress=False, **options)
    return Store(tmp_path / "store")


def rows(store, *columns):
    """record id -> cells of these columns."""
    ids = store.column("record_id").tolist()
    cells = [[list(c) if isinstance(c, np.ndarray) else c for c in store.column(name)] for name in columns]
    return {record: tuple(row) for record, *row in zip(ids, *cells, strict=True)}


def assert_signals(store, signals, rate, tolerance_mv=0.001):
    """The store holds these signals, each lead in its place, in microvolts at 240 Hz."""
    assert sorted(store.column("record_id").tolist()) == sorted(signals)
    for i, record in enumerate(store.column("record_id").tolist()):
        expected = resample(signals[record], rate, 240.0)
        found = store.read(i) / 1000.0
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance_mv, err_msg=record)
    assert not store.column("missing_leads").any()


def assert_patient_folds(store, lowest, highest):
    """Folds are of whole patients, in these limits, and -1 exactly where no patient is known."""
    fold_of = {}
    for patient, fold in zip(store.column("patient_id"), store.column("fold"), strict=True):
        if patient is None:
            assert fold == -1
        else:
            assert lowest <= fold <= highest
            assert fold_of.setdefault(patient, fold) == fold
    # The replicas have fewer patients than folds: each has its own.
    assert len(set(fold_of.values())) == len(fold_of)


def problems(store):
    """The lines of problems.jsonl."""
    return [json.loads(line) for line in (store.path / "problems.jsonl").read_text().splitlines()]


def test_sph(tmp_path):
    signals = replicas.write_sph(tmp_path / "source", 9, seconds=5.0)
    store = make("sph", tmp_path)
    assert_signals(store, signals, 500)
    table = {row["ECG_ID"]: row for row in replicas.read_csv(tmp_path / "source" / "metadata.csv")}
    found = rows(store, "labels_aha", "patient_id", "age", "sex", "flags")
    for record, row in table.items():
        primary = sorted({s.split("+")[0] for s in row["AHA_Code"].split(";")}, key=int)
        assert found[record] == (primary, row["Patient_ID"], float(row["Age"]), row["Sex"], [])
    assert_patient_folds(store, 1, 10)
    # Statements that occur, without their modifiers and in numeric order.
    assert store.classes == {"aha": ["1", "21", "22", "50", "145", "146"]}
    assert store.class_info["aha"]["50"]["description"] == "Atrial fibrillation"
    # The recording without a row can be trained on only.
    assert found["A00009"] == ([], None, pytest.approx(np.nan, nan_ok=True), None, ["no_table_row"])


def enlarge(path, n, ids):
    """Makes a table of n rows out of a replica's; `ids(i)` are the cells that tell row i from others."""
    table = replicas.read_csv(path)
    replicas.write_csv(path, [{**table[i // 2 * 7 % len(table)], **ids(i)} for i in range(n)])


def test_folds_are_stratified_by_labels(tmp_path):
    """Six hundred rows of a table, without signals: a listing does not read them."""
    n = 600
    replicas.write_sph(tmp_path / "sph", 9, seconds=1.0, unlisted=False)
    enlarge(
        tmp_path / "sph" / "metadata.csv",
        n,
        lambda i: {"ECG_ID": f"A{i:05d}", "Patient_ID": f"S{i // 2}", "Age": i % 90},
    )
    replicas.write_zzu(tmp_path / "zzu", 9, seconds=1.0)
    enlarge(
        tmp_path / "zzu" / "AttributesDictionary.csv",
        n,
        lambda i: {"ECG_ID": f"E{i}", "Patient_ID": f"P{i // 2}", "Lead": 12, "Age": f"{i * 10}d"},
    )
    replicas.write_chapman(tmp_path / "chapman", 9, seconds=1.0, xlsx=False)
    enlarge(tmp_path / "chapman" / "Diagnostics.csv", n, lambda i: {"FileName": f"M{i}"})
    for corpus, label_set in (("sph", "aha"), ("zzu", "finding"), ("chapman", "all")):
        entries = [e for e in CORPORA[corpus].list_records(tmp_path / corpus, None).entries if e.fold != -1]
        assert len(entries) == n
        folds = np.array([entry.fold for entry in entries])
        assert set(folds) == set(range(1, 11))
        fold_of = {}
        assert all(fold_of.setdefault(e.patient_id, e.fold) == e.fold for e in entries)
        np.testing.assert_allclose(np.bincount(folds)[1:], n / 10, atol=6)
        for label in {label for entry in entries for label in entry.labels[label_set]}:
            has = np.array([label in entry.labels[label_set] for entry in entries])
            # By chance one of ten folds would be off by about 11 of 266 records.
            found = np.bincount(folds[has], minlength=11)[1:]
            assert np.abs(found - has.sum() / 10).max() <= 5, (corpus, label, found)


def test_code15_has_a_hundred_folds(tmp_path):
    import h5py

    replicas.write_code15(tmp_path, 4, parts=1)
    enlarge(
        tmp_path / "exams.csv",
        800,
        lambda i: {"exam_id": 1 + i, "patient_id": 5000 + i // 2, "age": 20 + i // 2 % 60},
    )
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file.create_dataset(
            "tracings", (801, 4096, 12), "float32", chunks=(1, 4096, 12)
        )  # never written: no bytes
        file["exam_id"] = np.arange(1, 802)
    entries = CORPORA["code15"].list_records(tmp_path, None).entries
    fold_of = {}
    for entry in entries:
        assert fold_of.setdefault(entry.patient_id, entry.fold) == entry.fold
    # The last exam has no row, so nobody knows whose it is.
    assert fold_of.pop(None) == -1
    assert len(fold_of) == 400
    assert sorted(np.bincount(list(fold_of.values()))) == [4] * 100


def test_sph_with_files_beside_the_table(tmp_path):
    signals = replicas.write_sph(tmp_path / "source", 3, seconds=5.0, published=False, unlisted=False)
    store = make("sph", tmp_path)
    assert_signals(store, signals, 500)
    assert set(store.column("source_file")) == {"A00001.h5", "A00002.h5", "A00003.h5"}


def test_sph_reports_codes_its_table_does_not_know(tmp_path):
    replicas.write_sph(tmp_path / "source", 3, seconds=5.0, unlisted=False)
    table = replicas.read_csv(tmp_path / "source" / "metadata.csv")
    table[1]["AHA_Code"] = "22;999+310;313"  # 313 is a modifier, no statement
    replicas.write_csv(tmp_path / "source" / "metadata.csv", table)
    store = make("sph", tmp_path)
    assert rows(store, "labels_aha", "flags")["A00002"] == (["22"], ["unknown_label"])
    (problem,) = problems(store)
    assert "999, 313" in problem["detail"]


@pytest.mark.parametrize("units_per_mv", [1.0, 10.0])
def test_code15(tmp_path, units_per_mv):
    signals = replicas.write_code15(tmp_path / "source", 8, units_per_mv=units_per_mv)
    store = make("code15", tmp_path)
    # Padding at both ends is gone, and the row of zeros is no record.
    assert_signals(store, signals, 400)
    table = {row["exam_id"]: row for row in replicas.read_csv(tmp_path / "source" / "exams.csv")}
    found = rows(store, "labels_code15", "patient_id", "age", "sex")
    for record, row in table.items():
        labels = [name for name in code15.DIAGNOSES if row[name] == "True"]
        sex = "M" if row["is_male"] == "True" else "F"
        assert found[record] == (labels, row["patient_id"], float(row["age"]), sex)
    assert_patient_folds(store, 0, 99)
    assert sum(bool(labels) for labels, *_ in found.values()) > 3
    assert store.classes == {"code15": ["1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"]}
    assert found["1049"][:2] == ([], None)
    units = [(p["record"], p["action"]) for p in problems(store) if p["kind"] == "unit_detected"]
    unit = "millivolts" if units_per_mv == 1 else "1e-4 V"
    assert units == [("exams_part0.hdf5", unit), ("exams_part1.hdf5", unit)]


def test_code15_assume_gain_overrules_the_unit_found(tmp_path):
    signals = replicas.write_code15(tmp_path / "source", 2, parts=1, unlisted=False)
    store = make("code15", tmp_path, assume_gain=2.0)
    assert_signals(store, {record: signal / 2 for record, signal in signals.items()}, 400)
    assert all("gain_assumed" in flags for flags in store.column("flags"))


def test_code15_is_the_same_for_any_number_of_processes(tmp_path):
    replicas.write_code15(tmp_path / "source", 40, parts=3, extra_row=False)
    one = make("code15", tmp_path)
    prepare("code15", tmp_path / "source", tmp_path / "two", workers=2, progress=False)
    assert Store(tmp_path / "two").fingerprint == one.fingerprint
    # Records lie in the order of the parts' rows, so that parts are read front to back.
    files = one.column("source_file").tolist()
    key = [tuple(int(x) for x in file.removeprefix("exams_part").split(".hdf5#")) for file in files]
    assert key == sorted(key)
    assert len(set(files)) == 40


def test_code15_tells_what_is_not_there(tmp_path):
    replicas.write_code15(tmp_path / "source", 6, parts=3, unlisted=False)
    (tmp_path / "source" / "exams_part1.hdf5").unlink()
    table = replicas.read_csv(tmp_path / "source" / "exams.csv")
    table.append({**table[0], "exam_id": "5"})
    replicas.write_csv(tmp_path / "source" / "exams.csv", table)
    store = make("code15", tmp_path)
    assert len(store) == 4
    kinds = [(p["record"], p["kind"]) for p in problems(store) if p["kind"] != "unit_detected"]
    assert kinds == [("5", "missing_signal"), ("exams_part1.hdf5", "missing_part")]


@pytest.mark.parametrize("xlsx", [True, False])
def test_chapman(tmp_path, xlsx):
    signals = replicas.write_chapman(tmp_path / "source", 6, seconds=4.0, xlsx=xlsx)
    store = make("chapman", tmp_path)
    assert_signals(store, signals, 500)
    found = rows(store, "labels_rhythm", "labels_beat", "labels_all", "patient_id", "age", "sex")
    for i, record in enumerate(sorted(signals)):
        _, truth = replicas.synthetic(i, 4.0, 500)
        rhythm = {"sinus": "SR", "irregular": "AFIB", "brady": "SB", "tachy": "ST"}[truth.rhythm]
        beat = {"st_elevation": ["STE"], "st_depression": ["STDD"], "st_normal": []}[truth.st]
        beat = sorted(beat + {"axis_left": ["ALS"], "axis_right": ["ARS"], "axis_normal": []}[truth.axis])
        expected = ([rhythm], beat, sorted([rhythm, *beat]), record, 50.0 + i, "MF"[i % 2])
        assert found[record] == expected
    assert_patient_folds(store, 1, 10)
    assert "NONE" not in store.classes["beat"]
    assert set(store.classes["all"]) == {*store.classes["rhythm"], *store.classes["beat"]}
    assert store.class_info["rhythm"]["AFIB"]["description"] == "atrial fibrillation"


def test_chapman_beats_separated_by_commas(tmp_path):
    replicas.write_chapman(tmp_path / "source", 1, seconds=4.0, xlsx=False)
    table = replicas.read_csv(tmp_path / "source" / "Diagnostics.csv")
    table[0]["Beat"] = "TWC, RBBB  APB"
    replicas.write_csv(tmp_path / "source" / "Diagnostics.csv", table)
    assert CORPORA["chapman"].list_records(tmp_path / "source", None).classes["beat"] == [
        "APB",
        "RBBB",
        "TWC",
    ]


def test_chapman_denoised_files_have_no_lead_names(tmp_path):
    signals = replicas.write_chapman(tmp_path / "source", 2, seconds=4.0, denoised=True)
    store = make("chapman", tmp_path)
    assert_signals(store, signals, 500)
    assert all(list(flags) == ["lead_order_assumed"] for flags in store.column("flags"))
    # Where both are there, the raw signals are taken.
    replicas.write_chapman(tmp_path / "source", 2, seconds=4.0)
    listing = CORPORA["chapman"].list_records(tmp_path / "source", None)
    assert {entry.file.split("/")[0] for entry in listing.entries} == {"ECGData"}


def test_chapman_columns_are_matched_by_name(tmp_path):
    signals = replicas.write_chapman(tmp_path / "source", 1, seconds=4.0)
    (path,) = (tmp_path / "source" / "ECGData").iterdir()
    header, *lines = path.read_text().splitlines()
    turned = [",".join(reversed(line.split(","))) for line in (header, *lines)]
    path.write_text("\n".join(turned) + "\n")
    store = make("chapman", tmp_path)
    assert_signals(store, signals, 500)
    assert list(store.column("flags")[0]) == ["reordered_leads"]


def test_ptb(tmp_path):
    signals = replicas.write_ptb(tmp_path / "source", 6, seconds=4.0)
    store = make("ptb", tmp_path)
    assert_signals(store, signals, 1000)
    found = rows(store, "labels_diagnosis", "patient_id", "fold", "age", "sex")
    reasons = {
        "sinus": "healthy control",
        "irregular": "heart failure",
        "brady": "heart failure",
        "tachy": "myocardial infarction",
    }
    for i, record in enumerate(sorted(signals)):
        _, truth = replicas.synthetic(i, 4.0, 1000)
        patient = f"patient{i // 2 + 1:03d}"
        labels = [] if i == 5 else [reasons[truth.rhythm]]
        assert found[record] == (labels, patient, hash_fold(patient), 40.0 + i // 2, "FM"[i // 2 % 2])
    assert [p["record"] for p in problems(store) if p["kind"] == "no_diagnosis"] == ["patient003/s0006lre"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Myocardial infarction", "myocardial infarction"),
        ("Heart failure (NYHA 2)", "heart failure"),
        ("Cardiomyopathy/Heart  failure", "cardiomyopathy/heart failure"),
        ("n/a", None),
        ("", None),
    ],
)
def test_ptb_diagnoses_are_normalised(text, expected):
    assert ptb.normalise(text) == expected


def test_echonext(tmp_path):
    signals = replicas.write_echonext(tmp_path / "source", 20)
    store = make("echonext", tmp_path)
    assert_signals(store, signals, 250)
    found = rows(store, "labels_echo", "labels_shd", "patient_id", "fold", "age", "sex")
    for row in replicas.read_csv(tmp_path / "source" / "echonext_metadata_100k.csv"):
        if row["split"] == "no_split":
            assert row["ecg_key"] not in found
            continue
        echo, shd, patient, fold, age, sex = found[row["ecg_key"]]
        assert echo == [name for name in echonext.ECHO if row[name] == "1"]
        assert shd == [name for name in echonext.SHD if row[name] == "1"]
        assert (patient, age) == (row["patient_key"], float(row["age_at_ecg"]))
        assert sex == {"male": "M", "female": "F"}[row["sex"]]
        assert fold in {"val": {8}, "test": {9}, "train": set(range(8))}[row["split"]]
    folds = store.column("fold")
    assert set(folds.tolist()) >= {8, 9}
    patients = store.column("patient_id")
    for patient in set(patients):
        assert len(set(folds[patients == patient])) == 1
    assert {name: len(classes) for name, classes in store.classes.items()} == {"echo": 11, "shd": 1}
    kinds = sorted({(p["record"], p["kind"]) for p in problems(store)})
    assert kinds == [
        (f"EchoNext_{split}_waveforms.npy", kind)
        for split in ("test", "train", "val")
        for kind in ("lead_order_assumed", "standardised_unit")
    ]


MEAN_SD_MV = np.mean(list(echonext.PTBXL_SD_MV.values()))


def test_echonext_of_one_standard_deviation_keeps_the_limb_lead_identities(tmp_path):
    signals = replicas.write_echonext(tmp_path / "source", 6, no_split=0, standard_deviation=MEAN_SD_MV)
    store = make("echonext", tmp_path)
    assert_signals(store, signals, 250)
    for i in range(len(store)):
        one, two, three = store.read(i)[:, :3].astype(int).T
        assert np.abs(two - one - three).max() <= 2
    details = [p["detail"] for p in problems(store) if p["kind"] == "standardised_unit"]
    assert len(details) == 3
    assert all(
        "by one standard deviation (" in detail and "x 0.2244, the mean" in detail for detail in details
    )


def test_echonext_of_one_standard_deviation_per_lead(tmp_path):
    replicas.write_echonext(tmp_path / "source", 6, no_split=0)
    found = CORPORA["echonext"].list_records(tmp_path / "source", None).problems
    details = [problem.detail for problem in found if problem.kind == "standardised_unit"]
    assert len(details) == 3
    assert all("by one standard deviation per lead (" in detail for detail in details)


@pytest.mark.parametrize(("clip", "noise"), [(None, 0.0), (2.5, 0.05)])
def test_echonext_standardisation_is_told_in_clipped_and_noisy_scores(clip, noise):
    """Both ways of standardising, with the sample of PTB-XL: real ECGs, other spreads than PTBXL_SD_MV."""
    sample = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
    entries = ptbxl.list_records(sample, None).entries[:40]
    limb = np.concatenate([ptbxl.read(sample, entry, None).signal[:, :6] for entry in entries])
    for sd, common in ((limb.std(), True), (limb.std(axis=0), False)):
        scores = limb / sd + noise * np.random.default_rng(0).standard_normal(limb.shape)
        deviation, explained = echonext.limb_leads(scores if clip is None else scores.clip(-clip, clip))
        assert (deviation <= echonext._MAX_DEVIATION) == common, deviation
        assert explained > 0.9


def test_echonext_in_another_lead_order_is_refused(tmp_path):
    replicas.write_echonext(tmp_path / "source", 6, no_split=0)
    path = tmp_path / "source" / "EchoNext_train_waveforms.npy"
    array = np.load(path)
    # The order of the reference's list of standard deviations, and that of MIMIC-IV-ECG, with aVF before aVL.
    for order in ([0, 1, 6, 7, 8, 9, 10, 11, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4, *range(6, 12)]):
        np.save(path, array[..., order])
        with pytest.raises(
            UserError, match=r"EchoNext_train_waveforms\.npy: its leads are not in the order I, II"
        ):
            CORPORA["echonext"].list_records(tmp_path / "source", None)
    np.save(path, 0 * array)
    with pytest.raises(UserError, match="unit of its z-scores cannot be told, for a limb lead is constant"):
        CORPORA["echonext"].list_records(tmp_path / "source", None)


def test_echonext_training_folds_are_fixed_and_even():
    # Constants: a fold that changed with a release would make two stores incomparable.
    assert [hash_fold(patient, 8, 0) for patient in ("pt00002", "pt00003", "1")] == [4, 5, 1]
    counts = np.bincount([hash_fold(f"p{i}", 8, 0) for i in range(4000)], minlength=8)
    assert counts.min() > 400
    assert counts.max() < 600


def test_standard_deviations_of_ptbxl_belong_to_their_leads():
    """The reference lists them in another order than it uses them in (spec 1.4); the shipped sample tells which."""
    sample = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
    entries = ptbxl.list_records(sample, None).entries
    signal = np.concatenate([ptbxl.read(sample, entry, None).signal for entry in entries])
    measured = signal.std(axis=0)
    expected = np.array([echonext.PTBXL_SD_MV[lead] for lead in CANONICAL_LEADS])
    assert np.abs(np.log(measured / expected)).max() < 0.2
    # In the order of the reference's list the correlation is -0.45.
    assert np.corrcoef(np.log(measured), np.log(expected))[0, 1] > 0.95


def test_zzu(tmp_path):
    signals = replicas.write_zzu(tmp_path / "source", 10)
    store = make("zzu", tmp_path)
    assert_signals(store, signals, 500)
    assert len(signals) == 8
    found = rows(store, "labels_aha", "labels_finding", "patient_id", "age", "sex")
    aha = {"sinus": "A1", "irregular": "F50", "brady": "C22", "tachy": "C21"}
    text = {
        "A1": "Normal ECG",
        "F50": "Atrial fibrillation",
        "C22": "Sinus bradycardia",
        "C21": "Sinus tachycardia",
    }
    for i in range(10):
        patient = f"P{i // 2 + 1:05d}"
        record = f"{patient}_E{i % 2 + 1:02d}"
        if i % 5 == 4:
            assert record not in found
            continue
        _, truth = replicas.synthetic(i, 6.0, 500)
        codes = [aha[truth.rhythm]] + ["L145"] * (truth.st == "st_elevation")
        findings = [text[aha[truth.rhythm]]]
        findings += {
            "st_elevation": ["ST deviation"],
            "st_depression": ["Left ventricular high voltage"],
        }.get(truth.st, [])
        age = pytest.approx((572 + 100 * i) / 365.25)
        expected = (sorted(codes), sorted(findings), patient, age, "FM"[i // 2 % 2])
        assert found[record] == expected
    assert_patient_folds(store, 1, 10)
    assert store.class_info["aha"]["L145"]["description"] == "ST deviation"
    assert [p["record"] for p in problems(store) if p["kind"] == "too_few_leads"] == [
        "P00003_E01",
        "P00005_E02",
    ]


def test_zzu_codes_with_modifiers_and_unknown_items(tmp_path):
    replicas.write_zzu(tmp_path / "source", 2)
    table = replicas.read_csv(tmp_path / "source" / "AttributesDictionary.csv")
    table[0]["AHA_code"] = "'L145+Modifier362';'C21';'C21';'Q9+x';'Null'"
    table[1]["AHA_code"] = "Left ventricular high voltage"
    replicas.write_csv(tmp_path / "source" / "AttributesDictionary.csv", table)
    one, two = CORPORA["zzu"].list_records(tmp_path / "source", None).entries
    assert one.labels == {"aha": ["C21", "L145"], "finding": ["ST deviation", "Sinus tachycardia"]}
    assert [(p.kind, "Q9+x" in p.detail) for p in one.problems] == [("unknown_label", True)]
    assert two.labels == {"aha": [], "finding": ["Left ventricular high voltage"]}
    assert two.problems == ()
