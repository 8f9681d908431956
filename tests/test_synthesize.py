"""`ecg-jax synthesize`: what is drawn is what the labels say, and a shuffled label says nothing."""

import dataclasses
import math

import numpy as np
import pytest

from ecg_jax.data import synthetic_cases as cases
from ecg_jax.data.recording import limb_residual
from ecg_jax.data.synthetic_signal import draw_signal
from ecg_jax.evaluation.delineation import r_peaks
from ecg_jax.evaluation.ecg_features import FEATURE_NAMES, FeatureTable, ecg_features
from ecg_jax.probe_provenance import store_identity
from ecg_jax.synthesize import synthesize

RATE = 240.0
N = 420


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthesize")
    return synthesize(folder / "made", records=N, seed=3, workers=1, progress=False)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthesize")
    return synthesize(folder / "shuffled", records=N, seed=3, shuffle_labels=True, workers=1, progress=False)


@pytest.fixture(scope="module")
def drawn(made):
    """(case, signal in mV, features) of each recording."""
    found = []
    for index in range(N):
        patient = cases.draw_patient(3, cases.patient_of(index, N, N // 2))
        case = cases.draw_case(3, index, patient, 10.0)
        microvolts = made.read(index)
        found.append((case, microvolts / 1000.0, ecg_features(microvolts, RATE)))
    return found


# ---------------------------------------------------------------- what is drawn


def test_the_store_holds_what_the_functions_draw(made, drawn):
    for index in (0, 1, 200, N - 1):
        case = drawn[index][0]
        np.testing.assert_array_equal(made.read(index, verify=True), draw_signal(3, index, case, RATE))
        assert {name: made.column(f"labels_{name}")[index] for name in cases.CLASSES} == case.labels()
        np.testing.assert_array_equal(made.value_matrix("truth")[index], list(case.values().values()))


def test_limb_leads_obey_the_identities_exactly(made):
    for index in range(0, N, 7):
        assert limb_residual(made.read(index).astype(np.float64)).max() == 0.0


def test_everything_says_that_it_is_synthetic(made):
    assert made.synthetic
    assert made.corpus == "synthetic"
    assert all(record.startswith("synthetic") for record in made.column("record_id"))
    assert made.attributes["shuffle_labels"] is False


def test_every_class_occurs_about_as_often_as_it_should(made):
    for label_set, classes in cases.CLASSES.items():
        labels = [codes for codes in made.column(f"labels_{label_set}") if codes]
        for name, (share, _) in classes.items():
            assert made.classes[label_set] == list(classes)
            found = sum(codes == [name] for codes in labels) / len(labels)
            assert 0.5 * share < found < 1.8 * share, (name, found)


def test_numbers_agree_with_their_labels(drawn):
    for case, _, _ in drawn:
        values, labels = case.values(), case.labels()
        assert set(values) == set(cases.VALUES)
        low, high = {"normal_axis": (-15, 75), "left_axis": (-75, -42), "right_axis": (105, 150)}[
            case.patient.axis
        ]
        assert low <= values["axis_deg"] <= high
        assert (values["qrs_ms"] > 120) == (case.patient.conduction in cases.BUNDLE_BRANCH_BLOCKS)
        no_p = case.rhythm in ("atrial_fibrillation", "atrial_flutter")
        assert math.isnan(values["pr_ms"]) == no_p
        if not no_p:
            assert (values["pr_ms"] > 200) == (case.patient.conduction == "first_degree_av_block")
        assert (labels["st_t"] == []) == (case.patient.conduction in cases.BUNDLE_BRANCH_BLOCKS)
        if labels["st_t"]:
            sign = {"st_elevation": 1.0, "st_depression": -1.0}.get(case.st_t, 0.0)
            assert np.sign(values["st_mv"]) == sign
            assert (values["t_mv"] < 0) == (case.st_t == "t_inversion")
        else:
            assert math.isnan(values["st_mv"])
            assert math.isnan(values["t_mv"])
        assert (values["premature_beats"] > 0) == case.rhythm.endswith("_premature")
        if case.rhythm in ("sinus", "bradycardia", "tachycardia"):
            low, high = {"sinus": (58, 103), "bradycardia": (37, 58), "tachycardia": (102, 155)}[case.rhythm]
            assert low < values["heart_rate"] < high


def test_detected_r_peaks_are_the_known_beats(drawn):
    missed = false = beats = 0
    for case, millivolts, _ in drawn:
        if case.noise == "electrode_motion":  # whose shifts are steep enough to be taken for beats
            continue
        # Beats at the very ends are half outside.
        known = case.beats[(case.beats > 0.2) & (case.beats < 9.8)]
        peaks = r_peaks(millivolts, RATE) / RATE
        peaks = peaks[(peaks > 0.2) & (peaks < 9.8)]
        distance = np.abs(known[:, None] - peaks)
        missed += int((distance.min(axis=1) > 0.06).sum())
        # A beat just outside these ends is a known one too.
        false += int((np.abs(peaks[:, None] - case.beats).min(axis=1) > 0.06).sum())
        beats += len(known)
    assert beats > 4000
    assert missed / beats < 0.01
    assert false / beats < 0.005


@pytest.mark.parametrize(
    ("value", "feature", "tolerance"),
    [("heart_rate", "heart_rate", 2.0), ("pr_ms", "pr_ms", 15.0), ("qrs_ms", "qrs_ms", 20.0)],
)
def test_known_numbers_are_measured(drawn, value, feature, tolerance):
    """Median error and nine in ten of clean recordings, by a delineator that knows nothing of the generator."""
    errors = np.array(
        [
            features[FEATURE_NAMES.index(feature)] - case.values()[value]
            for case, _, features in drawn
            if case.noise == "clean"
        ]
    )
    errors = np.abs(errors[np.isfinite(errors)])
    assert len(errors) > 60
    assert np.median(errors) < tolerance / 2
    assert np.quantile(errors, 0.9) < tolerance


def test_known_axis_is_measured(drawn):
    angles = np.array(
        [
            (features[FEATURE_NAMES.index("qrs_axis_deg")], case.patient.axis_deg)
            for case, _, features in drawn
            if case.noise == "clean"
        ]
    )
    error = np.abs((angles[:, 0] - angles[:, 1] + 180.0) % 360.0 - 180.0)
    assert np.median(error) < 5.0
    assert np.quantile(error, 0.9) < 30.0


def test_st_level_and_t_are_seen_in_the_leads_they_point_to(drawn):
    """Against the same recording without them, so that nothing but ST and T differs."""
    for wanted in ("st_elevation", "st_depression", "t_inversion"):
        index = next(
            i for i, (case, _, _) in enumerate(drawn) if case.st_t == wanted and case.rhythm == "sinus"
        )
        case = drawn[index][0]
        plain = dataclasses.replace(case, st_t="normal_st_t", st_mv=0.0, t_mv=abs(case.t_mv))
        difference = draw_signal(3, index, case, RATE) / 1000.0 - draw_signal(3, index, plain, RATE) / 1000.0
        largest = difference[np.abs(difference).max(axis=1).argmax()]
        for lead in (1, 10):  # II and V5
            assert np.sign(largest[lead]) == (1.0 if wanted == "st_elevation" else -1.0)
        in_two = abs(largest[1])
        if wanted != "t_inversion":
            assert 0.8 < in_two / (abs(case.st_mv) * case.patient.voltage) < 1.05


def test_noise_is_as_loud_as_its_number_says(drawn):
    """V1's electrode against the mean of the limbs: variances of independent electrodes add up, 1 + 1/3."""
    for kind, few in (("muscle", 0.4), ("mains", 1.0), ("baseline_wander", 1.0)):
        ratios = []
        for index, (case, _, _) in enumerate(drawn):
            if case.noise == kind:
                quiet = dataclasses.replace(case, noise="clean", noise_mv=0.0)
                noise = draw_signal(3, index, case, RATE)[:, 6:] - draw_signal(3, index, quiet, RATE)[:, 6:]
                ratios.append(np.sqrt(np.square(noise / 1000.0).mean() / (4 / 3)) / case.noise_mv)
        assert len(ratios) > 30
        assert abs(np.mean(ratios) - 1.0) < 0.15 * (1 + few)


def test_patients_keep_what_belongs_to_the_body(made):
    patients, folds = made.column("patient_id"), made.column("fold")
    traits = zip(
        made.column("labels_conduction"), made.column("labels_axis"), folds, made.column("sex"), strict=True
    )
    seen = {}
    for patient, trait in zip(patients, traits, strict=True):
        assert seen.setdefault(patient, trait) == trait
    assert len(seen) == N // 2
    assert set(folds) == set(range(1, 11))
    rhythms = made.column("labels_rhythm")
    assert sum(rhythms[i] != rhythms[i + 1] for i in range(0, N, 2)) > N / 4


@pytest.mark.parametrize(("records", "patients"), [(10, 3), (7, 7), (1000, 1), (999, 400)])
def test_patients_have_equally_many_recordings(records, patients):
    owner = [cases.patient_of(index, records, patients) for index in range(records)]
    counts = np.bincount(owner, minlength=patients)
    assert counts.max() - counts.min() <= 1
    assert [owner.index(p) for p in range(patients)] == [
        cases.first_of(p, records, patients) for p in range(patients)
    ]
    assert cases.first_of(patients, records, patients) == records


# ---------------------------------------------------------------- probes


def scores(store, drawn, label_set):
    """Macro AUROC of a linear model on ECG features, trained on one half of the patients and tested on the other."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    features = np.array([found for _, _, found in drawn])
    labels = np.array([codes[0] if codes else "" for codes in store.column(f"labels_{label_set}")])
    known = labels != ""
    train, test = known & (np.arange(N) < N // 2), known & (np.arange(N) >= N // 2)
    table = FeatureTable.fit(features[train])
    model = LogisticRegression(C=0.1, max_iter=300).fit(table.transform(features[train]), labels[train])
    predicted = model.predict_proba(table.transform(features[test]))
    return roc_auc_score(labels[test], predicted, multi_class="ovr", average="macro", labels=model.classes_)


@pytest.mark.parametrize(
    ("label_set", "least"),
    [("rhythm", 0.9), ("conduction", 0.9), ("axis", 0.97), ("st_t", 0.85), ("noise", 0.8)],
)
def test_simple_features_find_the_labels_and_nothing_in_shuffled_ones(
    made, shuffled, drawn, label_set, least
):
    assert scores(made, drawn, label_set) > least
    assert abs(scores(shuffled, drawn, label_set) - 0.5) < 0.15


def test_shuffling_moves_labels_between_patients_and_changes_no_signal(made, shuffled):
    assert made.column("checksum").tolist() == shuffled.column("checksum").tolist()
    assert made.column("patient_id").tolist() == shuffled.column("patient_id").tolist()
    before, after = (
        list(zip(*(store.column(f"labels_{name}") for name in cases.CLASSES), strict=True))
        for store in (made, shuffled)
    )
    rows = {tuple(np.nan_to_num(row, nan=-1.0)): i for i, row in enumerate(made.value_matrix("truth"))}
    source = [rows[tuple(np.nan_to_num(row, nan=-1.0))] for row in shuffled.value_matrix("truth")]
    # Labels and numbers come from one recording, each recording gives its own once, patients stay together.
    assert [before[i] for i in source] == after
    assert sorted(source) == list(range(N))
    assert [i // 2 for i in source[::2]] == [i // 2 for i in source[1::2]]
    assert sum(i // 2 != row // 2 for row, i in enumerate(source)) > 0.95 * N


def test_a_probe_tells_the_control_from_the_store_it_was_made_of(made, shuffled):
    identities = [store_identity(store) for store in (made, shuffled)]
    assert identities[0]["fingerprint"] == identities[1]["fingerprint"]
    assert identities[0]["table"] != identities[1]["table"]


def test_shuffling_patients_of_unequal_size():
    order = cases.patient_order(0, 3)
    source = [cases.shuffled_source(index, 10, order) for index in range(10)]
    owner = [cases.patient_of(index, 10, 3) for index in source]
    assert owner == [order[cases.patient_of(index, 10, 3)] for index in range(10)]
