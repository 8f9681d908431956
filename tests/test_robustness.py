"""The robustness suite: predictions under corruption, paired scores, and the command on a finished probe."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ecg_jax
from ecg_jax import robustness as command
from ecg_jax.config_flags import load_config, override
from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.evaluation.features import mean_per_record
from ecg_jax.evaluation.robustness import (
    CLEAN,
    Condition,
    Records,
    Scorer,
    build_conditions,
    evaluate,
    predict,
)
from ecg_jax.evaluation.robustness_plot import robustness_curves
from ecg_jax.prepare import prepare
from ecg_jax.probe import probe
from ecg_jax.training.pretrained import pooled_fn

WINDOW = 600
SUITE = {
    "leads": (12, 1),
    "swaps": ("RA/LA",),
    "noises": ("muscle", "baseline_wander"),
    "snr_db": (-20.0, 24.0),
    "rates_hz": (50.0,),
    "durations_s": (5.0, 1.0),
}
FIXED = {"rate_hz": 240.0, "source_hz": 500.0, "window_s": 2.5, "longest_s": 6.0, "seed": 0}


def encode(crops: np.ndarray) -> np.ndarray:
    """Second moments of I, II, V1 and V6 over time: enough to see an axis, and disturbed by noise."""
    leads = crops[:, :, [0, 1, 6, 11]] / 1000.0
    leads = leads - np.median(leads, axis=1, keepdims=True)
    moments = np.einsum("bti,btj->bij", leads, leads) / crops.shape[1]
    return moments[:, *np.triu_indices(4)].astype(np.float32)


@pytest.fixture(scope="module")
def task(synthetic_store):
    """(head, test records, targets, patients): a logistic regression of the axis, fitted on half of the patients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    store = Store(synthetic_store)
    labels = store.column("labels_synthetic")
    classes = ["axis_left", "axis_right"]
    targets = np.array([[name in set(each) for name in classes] for each in labels], float)
    patients = store.column("patient_id")
    testing = np.array([int(p[1:]) % 2 == 1 for p in patients])

    def crops(rows):
        return non_overlapping_crops(store.column("length")[rows], store.column("offset")[rows], WINDOW)

    rows = np.flatnonzero(~testing)
    starts, record = crops(rows)
    x = encode(store.read_crops(starts, WINDOW))
    heads = [make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y) for y in targets[rows][record].T]

    def head(features):
        return np.stack([each.predict_proba(features)[:, 1] for each in heads], axis=1)

    rows = np.flatnonzero(testing)
    records = Records(store, rows, [str(name) for name in store.column("record_id")[rows]])
    starts, record = crops(rows)
    features = encode(store.read_crops(starts, WINDOW))
    expected = mean_per_record(head(features), record, len(rows))
    return head, records, targets[rows], patients[rows], expected


def conditions(**changes):
    return build_conditions(**{**SUITE, **FIXED, **changes})


def run(task, condition, **settings):
    head, records, *_ = task
    return predict(encode, head, records, condition, **{"window": WINDOW, "batch_size": 16} | settings)


def test_clean_records_are_predicted_as_the_probe_does(task):
    expected = task[-1]
    for batch_size, threads in ((16, 2), (7, 1), (500, 3)):
        got = run(task, CLEAN, batch_size=batch_size, threads=threads)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_encoder_sees_one_shape_and_what_was_corrupted(task):
    head, records, *_ = task
    shapes, batches = set(), []

    def spy(crops):
        shapes.add(crops.shape)
        batches.append(crops.copy())
        return encode(crops)

    three = Records(records.store, records.rows[:3], records.record_ids[:3])
    seen = []
    halved = Condition("leads", "halved", None, lambda x, name: seen.append((name, x.shape)) or x[:900] / 2)
    predict(spy, head, three, halved, window=WINDOW, batch_size=4)
    assert shapes == {(4, WINDOW, 12)}
    assert sorted(seen) == sorted((name, (1440, 12)) for name in three.record_ids)
    for i, row in enumerate(three.rows):  # 900 samples: one window each
        halves = records.store.read(row)[:WINDOW] / 2  # microvolts, rounded either way at one half
        assert np.abs(batches[0][i] - halves).max() <= 0.5


def test_recordings_shorter_than_a_window_are_filled_with_zeros(task):
    head, records, *_ = task
    batches = []
    (condition,) = [c for c in conditions()[0] if c.label == "1 s"]
    assert "shorter than the window of 2.5 s" in condition.note
    two = Records(records.store, records.rows[:2], records.record_ids[:2])
    predict(lambda x: batches.append(x) or encode(x), head, two, condition, window=WINDOW, batch_size=2)
    for crop, row in zip(batches[0], two.rows, strict=True):
        np.testing.assert_array_equal(crop[:240], records.store.read(row)[:240])
        assert not crop[240:].any()


def test_scores_fall_with_noise_and_are_paired(task):
    _, _, targets, patients, clean = task
    codes, _ = bootstrap.units(patients, len(targets))
    counts = bootstrap.draw(codes, 200, 0)
    scorer = Scorer("macro_auroc", targets, counts)
    chosen, unavailable = conditions()
    assert not unavailable
    results = {
        f"{condition.family} {entry['label']}": entry
        for condition, entry in evaluate(lambda c: run(task, c), scorer, clean, chosen)
    }
    assert len(results) == len(chosen) == 2 + 1 + 2 * 2 + 1 + 2
    reference = bootstrap.bootstrap_auroc(targets, clean, counts)
    whole = reference.macro()
    assert whole.point > 0.9
    for entry in results.values():
        assert entry["low"] <= entry["point"] <= entry["high"]
        assert abs(entry["difference"]["point"] - (entry["point"] - whole.point)) < 1e-12
    same = results["leads 12 leads"]
    assert tuple(same["difference"].values()) == (0.0, 0.0, 0.0)
    assert (same["point"], same["low"], same["high"]) == whole
    noisy = results["muscle -20 dB"]
    assert noisy["difference"]["high"] < 0
    assert noisy["point"] < results["muscle 24 dB"]["point"]
    assert results["swapped_leads RA/LA"]["difference"]["high"] < 0
    assert results["leads 1 lead"]["difference"]["high"] < 0
    (muscle,) = [c for c in chosen if (c.family, c.label) == ("muscle", "-20 dB")]
    paired = bootstrap.macro_difference(
        bootstrap.bootstrap_auroc(targets, run(task, muscle), counts), reference
    )
    assert tuple(noisy["difference"].values()) == pytest.approx(tuple(paired))


def test_regression_is_scored_by_its_mean_absolute_error(task):
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(30, 3))
    targets[rng.random((30, 3)) < 0.3] = np.nan
    counts = bootstrap.draw(np.arange(30), 50, 0)
    scorer = Scorer("mae", targets, counts)
    good, bad = np.nan_to_num(targets) + 0.1, np.zeros((30, 3))
    first, second = scorer.score(good), scorer.score(bad)
    assert scorer.interval(first).point == pytest.approx(0.1)
    assert scorer.interval(second).point == pytest.approx(metrics.mean_absolute_error(targets, bad)[0].mean())
    assert scorer.difference(second, first).low > 0


def test_conditions_that_mean_nothing_are_listed_with_their_reason():
    chosen, unavailable = conditions(
        rate_hz=100.0,
        noises=("powerline_50hz", "muscle"),
        snr_db=(6.0,),
        rates_hz=(250.0, 100.0, 50.0),
        durations_s=(10.0, 5.0),
    )
    assert {(each.family, each.label) for each in unavailable} == {
        ("powerline_50hz", "6 dB"),
        ("sampling_rate", "250 Hz"),
        ("sampling_rate", "100 Hz"),
        ("duration", "10 s"),
    }
    assert all(each.reason for each in unavailable)
    kept = [(each.family, each.value) for each in chosen]
    assert kept == [
        ("leads", 12),
        ("leads", 1),
        ("swapped_leads", None),
        ("muscle", 6.0),
        ("sampling_rate", 50.0),
        ("duration", 5.0),
    ]
    chosen, unavailable = conditions(
        source_hz=100.0, noises=("powerline_50hz", "powerline_60hz"), rates_hz=(125.0, 62.5)
    )
    assert [(each.label, "made at 100 Hz" in each.reason) for each in unavailable] == [("125 Hz", True)]
    beyond = {each.family for each in chosen if "half of 100 Hz" in each.note}
    assert beyond == {"powerline_60hz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leads": (4,)}, "unknown number of leads 4; known: 1, 2, 3"),
        ({"swaps": ("RA/V6",)}, "unknown swap 'RA/V6'; known: RA/LA"),
        ({"noises": ("hum",)}, "unknown noise 'hum'"),
        ({"snr_db": (6.0, 6)}, "twice"),
    ],
)
def test_unknown_conditions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        conditions(**changes)


def test_predictions_that_are_not_finite_are_refused(task):
    _, records, *_ = task
    with pytest.raises(ValueError, match=r"predictions of 48 of 48 records are not finite \(clean\)"):
        predict(encode, lambda x: x[:, :2] * np.nan, records, CLEAN, window=WINDOW, batch_size=16)
    nobody = Records(records.store, records.rows[:0], [])
    with pytest.raises(ValueError, match="no record"):
        predict(encode, lambda x: x, nobody, CLEAN, window=WINDOW, batch_size=16)


def drawn(metric="macro_auroc"):
    """Something to draw, with a condition that is undefined."""

    def entry(label, value, point, padded=False):
        low, high = (None, None) if point is None else (point - 0.03, point + 0.02)
        worse = {"low": low and low - 0.9, "high": high and high - 0.9}
        return {
            "label": label, "value": value, "padded": padded, "point": point, "low": low, "high": high,
            "difference": worse,
        }  # fmt: skip

    short = entry("1 s", 1.0, 0.6, padded=True)
    return {
        "probe": {"model": "cpc"},
        "task": "ptbxl_super",
        "metric": metric,
        "n_records": 100,
        "clean": {"point": 0.9, "low": 0.87, "high": 0.92},
        "bootstrap": {"level": 0.95, "unit": "patient"},
        "families": [
            {"family": "muscle", "unit": "dB SNR", "conditions": [entry("6 dB", 6.0, 0.8), entry("0 dB", 0.0, None)]},
            {"family": "duration", "unit": "s", "conditions": [short]},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["macro_auroc", "mae"])
def test_picture(tmp_path, metric):
    robustness_curves(drawn(metric), tmp_path / "r.svg")
    svg = (tmp_path / "r.svg").read_text()
    assert svg.startswith("<?xml")
    with pytest.raises(ValueError, match="nothing to draw"):
        robustness_curves({**drawn(), "families": []}, tmp_path / "s.png")
    assert [path.name for path in tmp_path.iterdir()] == ["r.svg"]
    json.dumps(drawn())


SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
FEW = {
    "conditions.leads": "(12, 1)",
    "conditions.swaps": "('RA/LA',)",
    "conditions.noises": "('muscle',)",
    "conditions.snr_db": "(0.0,)",
    "conditions.rates_hz": "(240.0, 50.0)",
    "conditions.durations_s": "(1.0,)",
}


def suite(**changes):
    config = load_config("configs/robustness.py")
    for name, value in (FEW | {key.replace("__", "."): str(value) for key, value in changes.items()}).items():
        override(config, name, value)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished linear probe of a run of one step on the PTB-XL sample."""
    from ecg_jax.pretrain import pretrain

    root = tmp_path_factory.mktemp("robustness")
    prepare("ptbxl", SAMPLE, root / "store", rate=100, workers=1, progress=False)
    config = load_config("configs/cpc.py")
    config.store = str(root / "store")
    config.model.width, config.model.layers, config.model.state = 16, 1, 4
    config.steps, config.batch_size, config.data.max_val_crops = 1, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    pretrain(config, root / "run")

    settings = load_config("configs/probe.py:mode=linear,task=ptbxl_super")
    settings.linear.l2_grid, settings.linear.solver, settings.baseline_seeds = (0.1,), "lbfgs", 1
    settings.bootstrap.resamples, settings.bootstrap.level, settings.bootstrap.interval = 60, 0.9, "bca"
    settings.seed, settings.features, settings.near_duplicates = 3, str(root / "features"), False
    probe(settings, root / "probe", str(root / "run"), root / "store")
    return root / "probe"


def changed(finished, folder, **fields) -> Path:
    """A copy of the probe with other fields in results.json."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("robustness"))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | fields))
    return folder


def test_suite_of_a_finished_probe(finished, tmp_path):
    returned = command.robustness(suite(), finished, tmp_path / "out", progress=False)
    stored = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert stored == returned
    assert stored["probe"]["workdir"] == str(finished.resolve())
    assert (stored["probe"]["model"], stored["probe"]["mode"]) == ("run", "linear")
    assert stored["task"] == "ptbxl_super"
    assert stored["metric"] == "macro_auroc"
    before = json.loads((finished / "results.json").read_text())
    clean = {"point": before["macro_auroc"], "low": before["ci_low"], "high": before["ci_high"]}
    assert stored["clean"] == pytest.approx(clean, abs=1e-12)
    assert stored["bootstrap"] == before["bootstrap"]
    families = {each["family"]: each["conditions"] for each in stored["families"]}
    assert list(families) == ["leads", "swapped_leads", "muscle", "sampling_rate", "duration"]
    twelve, one = families["leads"]
    assert abs(twelve["difference"]["point"]) < 0.005  # the same recordings, encoded in other batches
    assert one["point"] != twelve["point"]
    assert one["difference"]["point"] == pytest.approx(one["point"] - stored["clean"]["point"])
    assert [each["label"] for each in stored["unavailable"]] == ["240 Hz"]
    assert "zeros fill it" in families["duration"][0]["note"]
    with open(tmp_path / "out" / "robustness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["clean", "12 leads", "1 lead", "RA/LA", "0 dB", "50 Hz", "1 s"]
    assert float(rows[4]["difference_high"]) == families["muscle"][0]["difference"]["high"]
    assert (tmp_path / "out" / "robustness.png").read_bytes().startswith(b"\x89PNG")
    text = command.summary(stored)
    assert f"{stored['clean']['point']:.3f} (" in text
    assert "not evaluated: sampling rate 240 Hz" in text


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(command.robustness_plot, "robustness_curves", lambda results, path: None)


@pytest.mark.usefixtures("no_picture")
def test_an_interrupted_suite_goes_on(finished, tmp_path, monkeypatch):
    out, done, interrupting = tmp_path / "out", [], True
    real = command.predict

    def interrupted(encode, head, records, condition, **settings):
        if interrupting and len(done) == 3:
            raise KeyboardInterrupt
        done.append(condition.label)
        return real(encode, head, records, condition, **settings)

    monkeypatch.setattr(command, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.robustness(suite(), finished, out, progress=False)
    assert done == ["clean", "12 leads", "1 lead"]
    assert not (out / "robustness.json").exists()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        command.robustness(suite(), finished, out, progress=False)
    assert done == ["clean", "RA/LA", "0 dB"]
    done.clear()
    interrupting = False
    continued = command.robustness(suite(), finished, out, progress=False)
    assert done == ["clean", "50 Hz", "1 s"]
    done.clear()
    assert command.robustness(suite(), finished, out, progress=False) == continued
    assert done == []
    command.robustness(suite(conditions__swaps="('RA/LA', 'V1/V2')"), finished, out, progress=False)
    assert done == ["clean", "V1/V2"]
    done.clear()
    elsewhere = command.robustness(
        suite(conditions__leads="(12,)"), finished, tmp_path / "new", progress=False
    )
    assert elsewhere["families"][1:] == continued["families"][1:]  # as without any interruption


@pytest.mark.usefixtures("no_picture")
def test_another_probe_or_seed_in_the_same_folder_is_refused(finished, tmp_path):
    few = {"conditions__noises": "()", "conditions__rates_hz": "()", "conditions__leads": "()"}
    out = tmp_path / "out"
    command.robustness(suite(**few), finished, out, progress=False)
    with pytest.raises(UserError, match=r"another probe, seed or version \(other seed\)"):
        command.robustness(suite(seed=1), finished, out, progress=False)
    other = changed(finished, tmp_path / "other", seed=4)
    with pytest.raises(UserError, match=r"another probe, seed or version \(other probe_seed\)"):
        command.robustness(suite(**few), other, out, progress=False)
    # A suite of before a corruption was mended, and one of before versions.
    kept = json.loads((out / command.PARTS).read_text())
    for identity in (
        kept["identity"] | {"corruptions": command.VERSION - 1},
        {key: value for key, value in kept["identity"].items() if key != "corruptions"},
    ):
        (out / command.PARTS).write_text(json.dumps(kept | {"identity": identity}))
        with pytest.raises(UserError, match=r"another probe, seed or version \(other corruptions\)"):
            command.robustness(suite(**few), finished, out, progress=False)
    (out / command.PARTS).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        command.robustness(suite(**few), finished, out, progress=False)
    (out / command.PARTS).unlink()
    with pytest.raises(UserError, match=r"robustness\.json of another run"):
        command.robustness(suite(**few), finished, out, progress=False)


def test_a_probe_that_does_not_fit_is_refused(finished, tmp_path):
    def refused(match, workdir, **settings):
        with pytest.raises(UserError, match=match):
            command.robustness(suite(), workdir, tmp_path / "out", progress=False, **settings)
        assert not (tmp_path / "out" / "robustness.json").exists()

    refused("no finished `ecg-jax probe`", tmp_path / "nowhere")
    refused("name one of the probes in it: probe", finished.parent)
    refused("mode=frozen; .* takes mode=linear probes only", changed(finished, tmp_path / "a", mode="frozen"))
    refused("without a checkpoint", changed(finished, tmp_path / "b", checkpoint=None))
    store = json.loads((finished / "results.json").read_text())["store"]
    refused("another fingerprint", changed(finished, tmp_path / "c", store=store | {"fingerprint": "0"}))
    refused("There is no store at", changed(finished, tmp_path / "d", store=store | {"path": "/nowhere"}))
    headless = changed(finished, tmp_path / "e")
    (headless / "linear_probe.npz").unlink()
    refused("There is no linear probe", headless)
    (changed(finished, tmp_path / "f") / "predictions.npz").write_bytes(b"PK")
    refused("predictions.npz is missing or damaged", tmp_path / "f")
    (changed(finished, tmp_path / "g") / "results.json").write_text("{}")
    refused("no result of this version", tmp_path / "g")
    refused("no checkpoint at step 7", finished, checkpoint=str(finished.parent / "run" / "7"))
    moved = changed(finished, tmp_path / "h", store=store | {"path": "/nowhere"})
    probe = command.read_probe(moved, store=store["path"])
    assert len(probe.records.rows) == len(probe.predictions)
    with np.load(finished / "predictions.npz") as file:
        arrays = dict(file)
    other = changed(finished, tmp_path / "i")
    np.savez(other / "predictions.npz", **arrays | {"probabilities": 1 - arrays["probabilities"]})
    refused("the probe's checkpoint or head has changed", other)


@pytest.mark.usefixtures("no_picture")
def test_a_regression_gets_worse_upwards(finished, tmp_path):
    """The same head as a regression of its own clean predictions, so that clean records have no error."""
    read = command.read_probe(finished)
    head = dataclasses.replace(read.head, kind="regression", scale=(np.zeros(5), np.ones(5)))
    clean = predict(
        pooled_fn(read.encoder, tuple(head.weights)),
        head.predict,
        read.records,
        CLEAN,
        window=600,
        batch_size=64,
    )
    workdir = changed(finished, tmp_path / "probe", metric="mae")
    head.save(workdir / "linear_probe.npz")
    with np.load(finished / "predictions.npz") as file:
        arrays = dict(file)
    np.savez(workdir / "predictions.npz", **arrays | {"targets": clean, "probabilities": clean})
    few = {"conditions__swaps": "()", "conditions__rates_hz": "()", "conditions__durations_s": "()"}
    results = command.robustness(suite(**few, conditions__leads="(1,)"), workdir, progress=False)
    assert results["metric"] == "mae"
    assert results["clean"] == {"point": 0.0, "low": 0.0, "high": 0.0}
    for family in results["families"]:
        assert family["conditions"][0]["difference"]["low"] > 0
    assert (workdir / "robustness" / "robustness.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions__leads": "(4,)"}, "unknown number of leads 4"),
        ({"conditions__leads": "('I',)"}, "conditions.leads"),
        ({"conditions__noises": "('hum',)"}, "unknown noise 'hum'"),
        ({"conditions__snr_db": "(1e999,)"}, "must hold finite numbers"),
        ({"conditions__rates_hz": "(20.0,)"}, "less than 50 Hz"),
        ({"conditions__durations_s": "(0.0,)"}, "must be above 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed"),
        ({name.replace(".", "__"): "()" for name in FEW}, "leaves nothing to evaluate"),
    ],
)
def test_bad_config_is_refused(finished, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        command.robustness(suite(**changes), finished, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_command_line(finished, tmp_path, capsys):
    words = [f"--config.{name}={value}" for name, value in {**FEW, "conditions.noises": "()"}.items()]
    out = tmp_path / "out"
    assert command.main([str(finished), f"--output={out}", *words]) == 0
    printed = capsys.readouterr().out
    assert "difference to clean" in printed
    assert f"written to {out}" in printed
    assert (out / "robustness.json").exists()
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    assert "signal-to-noise" in capsys.readouterr().out
