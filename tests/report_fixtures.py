"""Folders of results for the tests of `ecg-jax report`: random predictions, scored as a probe scores them.

Targets, patients and baselines of a task depend on its name only, so that folders of several models belong together.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from ecg_jax.evaluation import bootstrap, calibration, metrics, scoring
from ecg_jax.probe_output import plain

RESAMPLES = 100
LEVEL = 0.95
NAMES = ("NORM", "MI", "STTC", "CD", "HYP", "AFIB", "1AVB", "PVC")
#: What the leakage audit says where it found nothing.
CLEAN = {
    "identical_train_test": 0,
    "near_identical_train_test": 0,
    "patients_train_test": 0,
    "records_train_test": [],
    "pretraining": {
        "store": "stores/ptbxl", "fingerprint": "5" * 64, "identical_test": 0, "near_identical_test": 0,
        "same_patients": 0, "records_test": [],
    },
    "pretraining_problem": None,
    "examined": {"identical": True, "near_identical": True, "pretraining": True},
    "clean": True,
    "verdict": "Of 120 test recordings, the training and validation recordings hold 0 bit for bit.",
}  # fmt: skip
LEAKING = CLEAN | {
    "clean": False,
    "identical_train_test": 3,
    "verdict": "3 of 120 test recordings are trained on.",
}


def _generator(*words) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(" ".join(map(str, words)).encode()))


def truth(task: str, n: int, K: int, kind: str) -> np.ndarray:
    """Targets [n, K] of a task: classes from common to rare with a few unknown, or z-scores."""
    generator = _generator(task, "truth")
    if kind == "regression":
        targets = generator.normal(size=(n, K))
    else:
        targets = (generator.random((n, K)) < np.linspace(0.45, 0.08, K)).astype(float)
    targets[generator.random((n, K)) < 0.02] = np.nan
    return targets


def predict(task: str, model: str, targets: np.ndarray, kind: str, quality: float) -> np.ndarray:
    """Predictions [n, K] that know `quality` of the truth, the same for the same task and model name."""
    generator = _generator(task, model)
    known = np.where(np.isnan(targets), 0.0, targets)
    noise = generator.normal(size=targets.shape)
    if kind == "regression":
        return quality / (1 + quality) * (known + 0.5 * noise)
    share = np.clip(np.nanmean(targets, axis=0), 0.01, 0.99)
    rate = np.log(share / (1 - share))
    return 1 / (1 + np.exp(-(quality * (2 * known - 1) + noise + rate / 2)))


class Scorer:
    """Scores predictions of one task on one set of resamples, in the words of results.json."""

    def __init__(self, targets, patients, kind: str):
        self.targets, self.kind = targets, kind
        codes, self.unit = bootstrap.units(patients, len(targets))
        self.counts = bootstrap.draw(codes, RESAMPLES, seed=0)

    def score(self, predictions) -> bootstrap.Scored:
        """Of one set of predictions [n, K]."""
        metric = "mae" if self.kind == "regression" else "auroc"
        return scoring.score(metric, self.targets, predictions, self.counts)

    def macro(self, predictions) -> dict[str, float]:
        """Interval of the macro score; of [S, n, K] predictions the mean over seeds."""
        several = predictions if predictions.ndim == 3 else predictions[None]
        macros = [self.score(p).macros("exclude") for p in several]
        resampled = np.mean([values for _, values, _ in macros], axis=0)
        value = bootstrap.interval(np.mean([point for point, _, _ in macros]), resampled, LEVEL)
        name = "mae" if self.kind == "regression" else "macro_auroc"
        return {name: value.point, "ci_low": value.low, "ci_high": value.high}

    def triple(self, metric: str, predictions) -> dict[str, float]:
        """An entry of `metrics` in results.json."""
        value = scoring.score(metric, self.targets, predictions, self.counts).macro("exclude", LEVEL)
        return value._asdict()


def write_result(
    folder: Path,
    task: str = "ptbxl_super",
    *,
    model: str = "cpc",
    mode: str = "linear",
    encoder: str = "small S4",
    quality: float = 1.0,
    n: int = 120,
    K: int = 4,
    kind: str = "multilabel",
    group: str = "adult ECG",
    leakage: dict = CLEAN,
    layers: bool = True,
    store=None,
    patients_known: bool = True,
    interval: str = "percentile",
    changes: dict | None = None,
) -> Path:
    """A finished probe: results.json and predictions.npz.

    Args:
        folder: made if needed.
        task, model, mode, kind, group: as in results.json.
        encoder: what the randomly initialised twins depend on.
        quality: 0 knows nothing, 2 is very good.
        n: test records, two of a patient.
        K: classes.
        leakage: the audit's verdict.
        layers: whether a layer was chosen.
        store: a Store whose first n records are tested on; None for one that does not exist.
        patients_known: whether records have patients.
        interval: "percentile" or "bca".
        changes: fields of results.json that replace those computed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes = list(NAMES[:K])
    targets = truth(task, n, K, kind)
    patients = np.array([f"p{i // 2}" for i in range(n)])
    patients[-3:] = ""
    if not patients_known:
        patients[:] = ""
    records = np.array([f"rec{i:05d}" for i in range(n)]) if store is None else store.column("record_id")[:n]
    scorer = Scorer(targets, patients, kind)
    ours = predict(task, f"{model} {mode}", targets, kind, quality)
    # What a supervised or finetuned encoder is compared with is probed linearly.
    twin_mode = "frozen" if mode == "frozen" else "linear"
    twins = f"twin {encoder}" if twin_mode == "linear" else f"twin {encoder} {twin_mode}"
    seeds = np.stack([predict(task, f"{twins} {s}", targets, kind, 0.2 * (s + 1)) for s in range(3)])
    ecg_features = predict(task, "ecg features", targets, kind, 0.7)
    prior = 0.0 if kind == "regression" else np.linspace(0.45, 0.08, K)
    majority = np.broadcast_to(prior, targets.shape)

    twin_points = scorer.score(seeds[0]).per_class
    per_class = {}
    for k, (name, value) in enumerate(zip(classes, scorer.score(ours).class_intervals(LEVEL), strict=True)):
        score_name = "mae" if kind == "regression" else "auroc"
        entry = {"ci_low": value.low, "ci_high": value.high, "description": f"what {name} means"}
        if kind == "regression":
            known = int((~np.isnan(targets[:, k])).sum())
            entry |= {"mae": value.point, "r2": metrics.r2(targets, ours)[k], "n": known}
        else:
            n_pos, n_neg = metrics.class_counts(targets)
            entry |= {
                "auroc": value.point,
                "average_precision": metrics.average_precision(targets, ours)[k],
                "brier": calibration.brier(targets, ours)[k],
                "ece": calibration.ece(targets, ours)[k],
                "n_pos": int(n_pos[k]),
                "n_neg": int(n_neg[k]),
                "random_init_auroc": twin_points[k],
            }
        per_class[name] = entry

    whole = scorer.macro(ours)
    metric = "mae" if kind == "regression" else "macro_auroc"
    names = {"mae": "mae", "r2": "r2"}
    if kind != "regression":
        names = {"macro_auroc": "auroc", "micro_auroc": "micro_auroc", "macro_auprc": "average_precision"}
        names |= {"fmax": "fmax", "brier": "brier", "ece": "ece"}
    figures = {name: scorer.triple(internal, ours) for name, internal in names.items()}
    twin = scorer.macro(seeds)
    supervised = mode == "supervised"
    fingerprint = "5" * 64 if store is None else store.fingerprint
    results = {
        "task": task,
        "group": group,
        "kind": kind,
        "metric": metric,
        "mode": mode,
        "model": model,
        "label_set": task.rpartition("_")[2],
        **whole,
        "metrics": figures,
        "per_class": per_class,
        "n_records": n,
        "n_patients": len(set(patients) - {""}) or None,
        "baselines": {
            "random_init": twin
            | {"mode": twin_mode}
            | {"seeds": [{"seed": s, metric: scorer.macro(p)[metric]} for s, p in enumerate(seeds)]},
            "ecg_features": scorer.macro(ecg_features),
            "majority": scorer.macro(majority),
        },
        "difference_to_random_init": {metric: whole[metric] - twin[metric], "ci_low": -0.01, "ci_high": 0.02}
        if mode == twin_mode
        else None,
        "layers": None
        if supervised or not layers
        else {
            "chosen": "layer_2",
            "validation": {
                name: whole[metric] + (0.02 if kind == "regression" else -0.02) * abs(i - 3)
                for i, name in enumerate(("stem", "layer_0", "layer_1", "layer_2", "mixture"))
            },
        },
        "leakage": leakage,
        "classes_dropped": {"TRIGU": "3 positive records, fewer than min_count=10"},
        "classes_undefined_in_test": [name for name, e in per_class.items() if np.isnan(e[score_name])],
        "split": {"rule": "test = fold 10, validation = fold 9", "n_train": 8 * n, "n_val": n, "n_test": n}
        | {"fingerprint": "7" * 64},
        "records_excluded": {"stores/ptbxl": {"shorter_than_window": 2, "without_label_of_the_set": 5}},
        "bootstrap": {
            "unit": scorer.unit,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "undefined": "exclude",
            "interval": interval,
        },
        "config": {"mode": mode, "task": task},
        "checkpoint": {"run": "runs/cpc" if supervised else f"runs/{model}", "step": 2000},
        "store": {
            "path": "stores/ptbxl" if store is None else str(store.path),
            "corpus": "ptbxl",
            "fingerprint": fingerprint,
        },
        "test_store": None,
        "pretraining_config": None if supervised else {"objective": {"name": model}, "model": {"D": 64}},
        "seed": 0,
        "versions": {"ecg-jax": "0.1", "jax": "0.10.0", "numpy": "2.1", "python": "3.12.1"},
        "date": "2026-03-01T12:00:00+00:00",
    }
    results |= changes or {}
    validation = truth(f"{task} validation", n, K, kind)
    np.savez_compressed(
        folder / "predictions.npz",
        record_id=records.astype(str),
        patient_id=patients,
        row=np.arange(n),
        targets=targets,
        probabilities=ours,
        probabilities_random_init_seeds=seeds,
        probabilities_ecg_features=ecg_features,
        probabilities_majority=majority,
        classes=np.array(classes),
        val_record_id=np.array([f"val{i}" for i in range(n)]),
        val_targets=validation,
        val_probabilities=predict(f"{task} validation", model, validation, kind, quality),
    )
    (folder / "results.json").write_text(json.dumps(plain(results), allow_nan=False))
    return folder


def write_robustness(
    folder: Path, task: str = "ptbxl_super", clean: float = 0.85, model: str = "cpc"
) -> Path:
    """robustness.json with curves that fall from `clean`."""

    def condition(label, value, loss):
        point = clean - loss
        return {
            "label": label, "value": value, "padded": value == 1.25, "point": point, "low": point - 0.02,
            "high": point + 0.02,
            "difference": {"point": -loss, "low": -loss - 0.01, "high": -loss + 0.01},
        }  # fmt: skip

    families = [
        ("leads", "leads", [(str(n), n, 0.12 / n) for n in (1, 2, 3, 6, 8, 12)]),
        ("limb_swap", "", [(name, None, 0.01 * i) for i, name in enumerate(("RA-LA", "RA-LL", "LA-LL"), 1)]),
        ("powerline", "dB", [(f"{snr} dB", snr, 0.3 / (snr + 3)) for snr in (0, 6, 12, 18, 24)]),
        ("rate", "Hz", [(f"{rate} Hz", rate, 4 / rate) for rate in (50, 100, 125, 250, 500)]),
        ("window", "s", [(f"{s:g} s", s, 0.05 / s) for s in (1.25, 2.5, 5.0)]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "probe": {"model": model, "mode": "linear"},
        "task": task,
        "metric": "macro_auroc",
        "n_records": 120,
        "bootstrap": {"unit": "patient where known, else record", "level": LEVEL},
        "clean": {"point": clean, "low": clean - 0.02, "high": clean + 0.02},
        "families": [
            {"family": name, "unit": unit, "conditions": [condition(*c) for c in conditions]}
            for name, unit, conditions in families
        ],
    }
    (folder / "robustness.json").write_text(json.dumps(document))
    return folder


def write_label_efficiency(folder: Path, task: str = "ptbxl_super") -> Path:
    """label_efficiency.json of two models over nested subsets."""
    sizes = [16, 32, 64, 128, 256, 512]
    generator = _generator(task, "subsets")

    def model(C, a, L0, fitted=True):
        points = np.array([1 - (C * n**-a + L0) + generator.normal(0, 0.01, 3) for n in sizes])
        mean = points.mean(axis=1)
        return {
            "scores": points.tolist(), "mean": mean.tolist(), "low": (mean - 0.02).tolist(),
            "high": (mean + 0.02).tolist(), "fit": {"C": C, "a": a, "L0": L0} if fitted else None,
        }  # fmt: skip

    half = [0.5] * len(sizes)
    majority = {"scores": [[0.5]] * len(sizes), "mean": half, "low": half, "high": half, "fit": None}
    document = {
        "task": task,
        "metric": "macro_auroc",
        "sizes": sizes,
        "n_test": 120,
        "bootstrap": {"unit": "patient", "level": LEVEL},
        "models": {
            "cpc": model(0.8, 0.5, 0.1),
            "random_init": model(0.9, 0.3, 0.1, fitted=False),
            "majority": majority,
        },
        "saving": {
            "cpc": {
                "random_init": {
                    "by_size": [
                        {
                            "size": 512,
                            "factor": 0.2,
                            "low": 0.1,
                            "high": 0.4,
                            "least": 1 / 32,
                            "most": 1.0,
                            "factor_open": None,
                            "low_open": None,
                            "high_open": None,
                        },
                        {
                            "size": 256,
                            "factor": 0.7,
                            "low": 0.3,
                            "high": None,
                            "least": 1 / 16,
                            "most": 2.0,
                            "factor_open": None,
                            "low_open": None,
                            "high_open": ">",
                        },
                    ]
                }
            },
            "random_init": {"cpc": {"undefined": "no fit"}},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "label_efficiency.json").write_text(json.dumps(document))
    return folder


def write_study(folder: Path, tasks: dict[str, dict] | None = None, **common) -> list[Path]:
    """Workdirs of two checkpoints in two modes and a supervised encoder, each with a folder for every task.

    Args:
        folder: of the study.
        tasks: task -> keyword arguments of `write_result`; a classification and a regression if None.
        common: further keyword arguments of `write_result`.

    Returns:
        The workdirs, to be given to the command.
    """
    if tasks is None:
        tasks = {
            "ptbxl_super": {},
            "mimic_age": {"kind": "regression", "K": 2, "group": "patient characteristics"},
        }
    probes = (
        ("cpc", "linear", 1.3), ("cpc", "finetune", 1.6), ("jepa", "linear", 1.1), ("jepa", "finetune", 1.55),
        ("supervised s4", "supervised", 0.9),
    )  # fmt: skip
    workdirs = []
    for model, mode, quality in probes:
        workdir = Path(folder) / f"{model.replace(' ', '_')}_{mode}"
        for task, arguments in tasks.items():
            write_result(workdir / task, task, model=model, mode=mode, quality=quality, **arguments, **common)
        workdirs.append(workdir)
    return workdirs
