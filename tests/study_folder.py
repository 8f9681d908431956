"""Sweep folders written by hand: finished runs with losses and predictions that follow laws chosen by a test."""

import functools
import json
from pathlib import Path

import numpy as np

from ecg_jax.config_flags import load_config, override, with_argument
from ecg_jax.data.selection import SELECTION_NAME, Rule, Selection, Source, write_selection
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.run_setup import CONFIGS

STORE = "5" * 64
VERSIONS = {"ecg-jax": "0", "jax": "0", "flax": "0", "optax": "0", "numpy": "0", "python": "3"}


@functools.cache
def _shipped(objective: str, backbone: str):
    return load_config(with_argument(CONFIGS[objective], backbone=backbone))


def config_of(objective="cpc", backbone="s4", **overrides) -> dict:
    """A run's config.json without its provenance; "__" stands for the point in the name of a field."""
    config = _shipped(objective, backbone).copy_and_resolve_references()
    for name, value in {"model.width": 16, "batch_size": 8, **overrides}.items():
        override(config, name.replace("__", "."), str(value))
    return json.loads(json.dumps(config.to_dict()))


def selection_of(recordings: int, corpus=SYNTHETIC, window_samples=600, store=STORE, val=16) -> Selection:
    """The first recordings of a store, with the last of it held out."""
    records = 200_000
    rule = Rule("nested", "", recordings, 1, window_samples, True)
    return Selection(
        train=np.arange(recordings), val=np.arange(records - val, records), too_short=0, duplicates=0,
        held_elsewhere=0, available=records - val, sources=(Source(corpus, store, records),), rule=rule,
    )  # fmt: skip


def write_run(
    folder: Path, recordings: int, loss: float, *, objective="cpc", backbone="s4", seed=0, epochs=2, seconds=60.0,
    corpus=SYNTHETIC, store=STORE, **overrides,
) -> dict:  # fmt: skip
    """The workdir of a finished run whose validation loss ends at `loss`; its config.json."""
    folder.mkdir(parents=True)
    selection = selection_of(recordings, corpus, store=store)
    steps = -(-epochs * recordings // 8)
    config = config_of(objective, backbone, seed=seed, epochs=float(epochs), **overrides)
    config |= {
        "store": f"stores/{store[:4]}",
        "store_fingerprint": store,
        "selection_fingerprint": selection.fingerprint,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessing.json").write_text("{}")
    write_selection(folder / SELECTION_NAME, selection)
    log = [{"step": step, "loss": 1.1 * loss, "val_loss": loss * (1 + 0.5 * (1 - step / steps))}
           for step in (steps // 4, steps // 2, steps)]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    start = {
        "step": 0, "versions": VERSIONS, "date": "2026-01-01T00:00:00+00:00", "devices": 2, "device_kind": "cpu",
        "git": {"revision": "a" * 40, "dirty": False}, "processes": 1, "parameters": 1234, "seconds": seconds,
    }  # fmt: skip
    (folder / "made_with.json").write_text(json.dumps({"starts": [start]}))
    return config


def scores_of(targets: np.ndarray, auroc: float, noise: np.ndarray) -> np.ndarray:
    """Normal scores [n, K] of this AUROC: positives and negatives are sqrt(2) z(AUROC) apart (binormal model)."""
    from scipy.special import ndtri

    return noise + targets * np.sqrt(2) * ndtri(auroc)


def probe_config(mode: str, task: str, seed: int, **overrides) -> dict:
    config = load_config(with_argument("configs/probe.py", mode=mode))
    config.task = task
    for name, value in {"seed": seed, **overrides}.items():
        override(config, name.replace("__", "."), str(value))
    return json.loads(json.dumps(config.to_dict()))


def write_probe(
    folder: Path, run: Path, config: dict, step: int, error: float, *, task="ptbxl_super", mode="linear", records=400,
    store="9" * 64, seed=0, corpus="synthetic", first=0, **settings,
) -> None:  # fmt: skip
    """A finished probe whose macro AUROC is about 1 - error; patients have two recordings each.

    It is tested on so many records of a store from the one numbered `first`; `settings` are fields of its config, with
    "__" for the point.
    """
    from ecg_jax.evaluation.metrics import auroc

    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)  # the same test records and the same luck for all runs
    targets = (generator.random((records, 2)) < 0.4).astype(np.float32)
    predicted = scores_of(targets, 1 - error, generator.normal(size=targets.shape))
    predicted = predicted + 0.02 * np.random.default_rng(100 + seed).normal(size=targets.shape)
    value = float(auroc(targets, predicted).mean())
    np.savez(
        folder / "predictions.npz",
        record_id=np.array([f"r{i}" for i in range(first, first + records)]),
        patient_id=np.array([f"p{i // 2}" for i in range(first, first + records)]),
        row=np.arange(records), targets=targets, probabilities=predicted, classes=np.array(["a", "b"]),
    )  # fmt: skip
    results = {
        "task": task, "kind": "multilabel", "metric": "macro_auroc", "mode": mode, "macro_auroc": value,
        "ci_low": value - 0.01, "ci_high": value + 0.01, "n_records": records, "n_patients": records // 2,
        "checkpoint": {"run": str(run.resolve()), "step": step}, "pretraining_config": config,
        "store": {"path": "s", "corpus": corpus, "fingerprint": store, "table": ""}, "test_store": None,
        "config": probe_config(mode, task, seed, **settings),
        "bootstrap": {"unit": "patient", "resamples": 1000, "level": 0.95, "undefined": "exclude",
                      "interval": "percentile"},
        "versions": VERSIONS,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


def write_sweep(folder: Path, entries: list[dict]) -> Path:
    """A sweep folder.

    Args:
        folder: to make.
        entries: each with "name", "recordings", "loss", "errors" (task or (task, mode) -> error), and what else
            `write_run` takes.
    """
    declared = {}
    for entry in entries:
        entry = dict(entry)
        name, errors = entry.pop("name"), entry.pop("errors", {})
        config = write_run(folder / name / "run", entry.pop("recordings"), entry.pop("loss"), **entry)
        step = json.loads((folder / name / "run" / "log.jsonl").read_text().splitlines()[-1])["step"]
        for i, (key, error) in enumerate(errors.items()):
            task, mode = key if isinstance(key, tuple) else (key, "linear")
            place = folder / name / ("probe" if i == 0 else f"probes/{task}-{mode}")
            write_probe(
                place, folder / name / "run", config, step, error, task=task, mode=mode, seed=config["seed"]
            )
        declared[name] = {
            "group": name.rsplit("-", 1)[0],
            "config": config,
            "probe": None,
            "targets": None,
            "store": None,
        }
    (folder / "sweep.json").write_text(json.dumps({"sweep": "by_hand.py", "runs": declared}))
    return folder
