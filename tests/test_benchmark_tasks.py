"""Every task of the study from the published files of its corpus to targets: labels, folds, parts, classes."""

import functools

import numpy as np
import pytest

import corpus_replicas as replicas
from ecg_files import ecg, write_record
from ecg_jax.data.corpora.mimic_targets import LABS, OUTCOMES, VITALS
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.evaluation.examples import choose_examples
from ecg_jax.evaluation.tasks import BENCHMARK, get_task
from ecg_jax.prepare import prepare
from ecg_jax.quickstart import SAMPLE
from mimic_replica import MACHINE, Study, icd, mds, write_mimic

SINUS, FIBRILLATION, BRADYCARDIA, TACHYCARDIA = "426783006", "164889003", "426177001", "427084000"


def shown(i, seconds=10.0, rate=500.0, seed=replicas.SEED):
    """What the synthetic signal with that number shows."""
    return synthetic_recording(seed, i, seconds, rate)[1]


def write_challenge(folder):
    """Four datasets of 20 recordings of 10 s each, of which record i has two diagnoses where i % 3 is 0."""
    for dataset, name in enumerate(("A{:04d}", "Q{:04d}", "E{:05d}", "JS{:05d}")):
        for i in range(20):
            number = 10647 + i if name.startswith("JS") else 1 + i
            codes = [SINUS] if i % 2 else [FIBRILLATION]
            codes += [BRADYCARDIA] if i % 3 == 0 else []
            write_record(
                folder / f"g{dataset}",
                name.format(number),
                ecg(index=100 * dataset + i),
                mat=True,
                comments=["Age: 60", "Sex: Male", f"Dx: {','.join(codes)}"],
            )


def challenge_labels(record):
    number = int("".join(c for c in record if c.isdigit()))
    i = number - 10647 if record.startswith("JS") else number - 1
    return {SINUS if i % 2 else FIBRILLATION, *([BRADYCARDIA] if i % 3 == 0 else [])}


def sph_labels(record):
    truth = shown(int(record[1:]) - 1, 5.0)
    rhythm = {"sinus": "1", "irregular": "50", "brady": "22", "tachy": "21"}[truth.rhythm]
    st = {"st_normal": [], "st_elevation": ["145"], "st_depression": ["146"]}[truth.st]
    return {rhythm, *st}


def chapman_labels(record):
    truth = shown(int(record.split("_")[2]) - 171327, 5.0)
    return {
        {"sinus": "SR", "irregular": "AFIB", "brady": "SB", "tachy": "ST"}[truth.rhythm],
        *{"st_normal": [], "st_elevation": ["STE"], "st_depression": ["STDD"]}[truth.st],
        *{"axis_normal": [], "axis_left": ["ALS"], "axis_right": ["ARS"]}[truth.axis],
    }


def zzu_labels(record):
    patient, ecg_number = record.split("_E")
    truth = shown(2 * (int(patient[1:]) - 1) + int(ecg_number) - 1)
    rhythm = {"sinus": "A1", "irregular": "F50", "brady": "C22", "tachy": "C21"}[truth.rhythm]
    return {rhythm, *(["L145"] if truth.st == "st_elevation" else [])}


def echonext_labels(record):
    truth = shown(int(record[3:]), rate=250.0)
    flags = {
        "lvef_lte_45_flag": truth.st != "st_normal",
        "lvwt_gte_13_flag": truth.axis == "axis_left",
        "pasp_gte_45_flag": truth.axis == "axis_right",
        "tr_max_gte_32_flag": truth.rhythm == "irregular",
    }
    return {name for name, positive in flags.items() if positive}


#: Row 336 of ptbxl_database.csv: LVH, ISC_ and PVC at likelihood 100, NST_, AFLT and SVTAC at 0; fold 10.
PTBXL_336 = {
    "super": {"HYP", "STTC"},
    "sub": {"LVH", "ISC_", "NST_"},
    "diag": {"LVH", "ISC_", "NST_"},
    "form": {"PVC", "NST_"},
    "rhythm": {"AFLT", "SVTAC"},
    "all": {"LVH", "ISC_", "PVC", "NST_", "AFLT", "SVTAC"},
}

FOLDS = [*range(8), 18, 18, 18, 19, 19, 19]


def level(i):
    """A number of recording i that for test records lies between those of training records."""
    return 3 * i % len(FOLDS)


def mimic_outcomes(i):
    """Outcome -> 0 or 1 of recording i: every set has a name that varies."""
    return {name: float((i + k) % 2) for names in OUTCOMES.values() for k, name in enumerate(names)}


def write_mimic_folder(folder):
    """14 patients with one recording each in the emergency department, all of whose numbers depend on its number."""
    studies = []
    for i, fold in enumerate(FOLDS):
        measured = {
            "biometrics_height": 160.0 + level(i), "biometrics_weight": 60.0 + level(i),
            "biometrics_bmi": 20.0 + level(i),
            **{f"vitals_{name}_mean": 30.0 + level(i) for name in VITALS},
            "labvalues_creatinine_mean": 1.0 + level(i), "labvalues_hemoglobin_mean": 12.0 + level(i),
            **{f"deterioration_{name}": value for name, value in mimic_outcomes(i).items()},
        }  # fmt: skip
        studies.append(
            Study(
                40000000 + i, 10000000 + i, f"2180-01-{1 + i:02d} 08:44:00", {**MACHINE, "rr_interval": 800 + level(i)},
                icd(mimic_codes(i), gender="MF"[i % 2], age=40.0 + level(i), strat_fold=fold), mds(**measured),
            )
        )  # fmt: skip
    write_mimic(folder, studies)


def mimic_codes(i):
    return [*(["I4819"] if i % 2 else []), *(["E785"] if i % 3 else []), "R07"]


def mimic_truth(task, record):
    """Class or number -> what the tables say."""
    i = int(record) - 40000000
    if task.source == "labels":
        codes = {"mimic_cardiac": {"I48", "I481", "I4819"}, "mimic_non_cardiac": {"E78", "E785"}}[task.name]
        present = i % 2 if task.subset == "cardiac" else i % 3
        return dict.fromkeys(codes, float(present > 0))
    x = level(i)
    return {
        "sex": {"male": float(i % 2 == 0)},
        "age": {"age": 40.0 + x},
        "biometrics": {"height": (160.0 + x) / 2.54, "weight": (60.0 + x) / 0.45359237, "bmi": 20.0 + x},
        "ecg": {"RR": 800.0 + x, "QRS": 90.0, "P_axis": 50.0},
        "labs": {"Creatinine": 1.0 + x, "Hemoglobin": 12.0 + x},
        "vitals": {"heartrate": 30.0 + x, "temperature": (30.0 + x) * 1.8 + 32},
        **{name: {key: mimic_outcomes(i)[key] for key in names} for name, names in OUTCOMES.items()},
    }[task.label_set]


WRITE = {
    "challenge": write_challenge,
    "chapman": functools.partial(replicas.write_chapman, n=30, seconds=5.0),
    "sph": functools.partial(replicas.write_sph, n=40, seconds=5.0),
    "zzu": functools.partial(replicas.write_zzu, n=40, seconds=10.0),
    "echonext": functools.partial(replicas.write_echonext, n=40),
    "mimic": write_mimic_folder,
}
LABELS = {
    "challenge": challenge_labels,
    "chapman": chapman_labels,
    "sph": sph_labels,
    "zzu": zzu_labels,
    "echonext": echonext_labels,
}
#: Chapman's rhythms; the other sets hold all that the replica's truth has.
RHYTHMS = {"SR", "AFIB", "SB", "ST"}


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    """Corpus -> its replica, prepared once."""

    @functools.cache
    def prepared(corpus):
        folder = tmp_path_factory.mktemp(corpus)
        if corpus != "ptbxl":
            (folder / "source").mkdir()
            WRITE[corpus](folder / "source")
        source = SAMPLE if corpus == "ptbxl" else folder / "source"
        prepare(corpus, source, folder / "store", workers=1, progress=False)
        return Store(folder / "store")

    return prepared


def truth_of(task, record):
    """Class -> target of one record; those that are not named are 0."""
    if task.corpus == "ptbxl":
        return dict.fromkeys(PTBXL_336[task.label_set], 1.0)
    if task.corpus == "mimic":
        return mimic_truth(task, record)
    labels = LABELS[task.corpus](record)
    return dict.fromkeys(labels & RHYTHMS if task.name == "chapman_rhythm" else labels, 1.0)


CLASSES = {
    **{name: [FIBRILLATION, BRADYCARDIA, SINUS] for name in ("ningbo", "cpsc2018", "cpsc_extra", "georgia")},
    "chapman": ["AFIB", "ALS", "ARS", "SB", "SR", "ST", "STDD", "STE"],
    "chapman_rhythm": ["AFIB", "SB", "SR", "ST"],
    "sph": ["1", "21", "22", "50", "145", "146"],
    "zzu_pecg": ["A1", "C21", "C22", "F50", "L145"],
    "echonext": ["lvef_lte_45_flag", "lvwt_gte_13_flag", "pasp_gte_45_flag", "tr_max_gte_32_flag"],
    "ptbxl_super": ["CD", "HYP", "MI", "NORM", "STTC"],
    "mimic_cardiac": ["I48", "I481", "I4819"],
    "mimic_non_cardiac": ["E78", "E785"],
    "mimic_deterioration": list(OUTCOMES["deterioration"]),
    "mimic_mortality": list(OUTCOMES["mortality"]),
    "mimic_icu": list(OUTCOMES["icu"]),
    "mimic_sex": ["male"],
    "mimic_age": ["age"],
    "mimic_biometrics": ["height", "weight", "bmi"],
    "mimic_ecg_features": ["RR", "QRS", "QT", "QTc", "P_axis", "QRS_axis", "T_axis"],
    "mimic_labs": ["Creatinine", "Hemoglobin"],
    "mimic_vitals": list(VITALS),
}


@pytest.mark.parametrize("name", BENCHMARK)
def test_from_published_files_to_targets(name, store_of):
    task, store = get_task(name), store_of(get_task(name).corpus)
    examples = choose_examples(task, store, None, window=600, min_count=2)

    parts = {"train": examples.train, "validation": examples.val, "test": examples.test}
    records = [set(part.column("record_id")) for part in parts.values()]
    patients = [set(part.column("patient_id")) - {None} for part in parts.values()]
    assert all(records)
    assert len(set.union(*records)) == sum(map(len, records))
    assert len(set.union(*patients)) == sum(map(len, patients))
    assert bool(patients[0]) == (task.corpus != "challenge")

    if name in CLASSES:
        assert examples.classes == CLASSES[name]
    else:
        assert name.startswith("ptbxl_")
        assert set(examples.classes) <= set(store.classes[task.label_set])
        assert len(examples.classes) + examples.n_dropped == len(store.classes[task.label_set])

    ids = examples.test.column("record_id").tolist()
    chosen = ["336"] if task.corpus == "ptbxl" else ids
    for record in chosen:
        row = examples.test.targets[ids.index(record)].astype(np.float64)
        if task.kind == "regression":
            mean, sd = examples.scale
            row = row * sd + mean
        found = dict(zip(examples.classes, row.tolist(), strict=True))
        truth = truth_of(task, record)
        if task.kind == "regression":
            for key, expected in truth.items():
                assert found[key] == pytest.approx(expected, rel=1e-5)
        else:
            assert found == {key: truth.get(key, 0.0) for key in found}
    if task.corpus == "mimic":
        assert [part.column("fold").tolist() for part in parts.values()] == [
            FOLDS[:8],
            FOLDS[8:11],
            FOLDS[11:],
        ]
    if task.corpus == "echonext":
        assert set(examples.val.column("fold")) | set(examples.test.column("fold")) == {8, 9}


def test_labs_that_no_table_has_are_dropped_by_name(store_of):
    examples = choose_examples(get_task("mimic_labs"), store_of("mimic"), None, window=600, min_count=2)
    assert set(examples.classes_dropped) == set(LABS) - {"Creatinine", "Hemoglobin"}


def test_both_tasks_of_chapman_are_tested_on_the_same_records(store_of):
    fingerprints = {
        choose_examples(get_task(name), store_of("chapman"), None, 600, 2).split["fingerprint"]
        for name in ("chapman", "chapman_rhythm")
    }
    assert len(fingerprints) == 1
