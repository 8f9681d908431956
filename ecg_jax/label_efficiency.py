"""`ecg-jax label-efficiency`: the error of a linear probe over the number of labelled training records.

Every encoder is probed on the same nested patient-wise subsets of the training records; beside it stand randomly
initialised encoders (another one for each draw of the subsets), simple ECG features and the constant guess. The curves
C N^-a + L0 and the label-saving factors come with intervals over test patients and draws.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax import probe_checks
from ecg_jax.config_flags import parse_command
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, tasks
from ecg_jax.evaluation import label_efficiency as study
from ecg_jax.evaluation.examples import Examples, choose_examples
from ecg_jax.evaluation.label_efficiency import Curve
from ecg_jax.evaluation.label_efficiency_plot import error_curves
from ecg_jax.evaluation.label_efficiency_table import summary, table
from ecg_jax.evaluation.probe_scores import check_scorable
from ecg_jax.files import write_atomic
from ecg_jax.label_efficiency_models import ECG_FEATURES, RANDOM, probe_models
from ecg_jax.probe_output import plain
from ecg_jax.probe_provenance import (
    checkpoint_identity,
    config_identity,
    features_folder,
    finished,
    leakage_verdict,
    made_with,
    make_folder,
    store_identity,
)
from ecg_jax.training.pretrained import RestoredEncoder, restore_encoder

DESCRIPTION = """\
Probes encoders on nested patient-wise subsets of the training records, from 1/128 of them to all, several draws each;
fits error = C N^-a + L0 to each model's scores and says which share of the labels a better model needs (label saving).
Randomly initialised encoders, simple ECG features and the constant guess are always among the models. Writes
label_efficiency.json, .csv and .png. Run the same command again after an interruption: finished fits are kept.
"""

RESULTS = "label_efficiency.json"
MAJORITY = "majority"

# Of the draws of the subsets.
_SEEDS = "Student's t, seeds - 1 degrees of freedom; each draw has another random_init"

_NUMBERS = "z-scores by all training records at every size; values outside 1-99 % of those are unknown"


def check_config(config) -> None:
    """Refuses values that no study can run with.

    Raises:
        UserError: names the field.
    """
    fractions = config.fractions
    if not fractions or not all(isinstance(f, int | float) and 0 < f <= 1 for f in fractions):
        raise UserError(f"--config.fractions={fractions} must be a list of numbers above 0, up to 1.")
    probe_checks.check_config(config)


def label_efficiency(config, workdir, checkpoints: Sequence[str], store) -> dict[str, Any]:
    """Runs one study, or finds it done.

    Args:
        config: from configs/label_efficiency.py.
        workdir: folder for results and finished fits, made if needed.
        checkpoints: RUN or RUN/STEP of one or several pretraining runs, of one preprocessing contract.
        store: path of a labelled store.

    Returns:
        What label_efficiency.json holds.

    Raises:
        UserError: anything in the config, checkpoints, store or workdir that does not fit.
    """
    check_config(config)
    probe_checks.check_workdir(Path(workdir))
    workdir, task, store = Path(workdir), tasks.get_task(config.task), Store(store)
    encoders = _open(checkpoints, store)
    identity = plain(
        {
            "config": config_identity(config),
            "checkpoints": {name: checkpoint_identity(each) for name, each in encoders.items()},
            "store": store_identity(store),
        }
    )
    if before := finished(workdir / RESULTS, identity, "study"):
        return before
    window = next(iter(encoders.values())).preprocessing.window_samples
    examples = choose_examples(task, store, None, window, config.min_count)
    check_scorable(examples)
    make_folder(workdir / "fits", workdir)

    codes, unit = bootstrap.units(examples.test.column("patient_id"), len(examples.test.rows))
    counts = bootstrap.draw(codes, config.bootstrap.resamples, config.seed)
    fractions = sorted(set(config.fractions))
    # [seed][size]
    subsets = [study.patient_subsets(examples, fractions, config.seed + i) for i in range(config.seeds)]
    sizes = np.array([[len(chosen) for chosen in of_seed] for of_seed in subsets]).T
    folder = features_folder(config)
    verdicts = {
        name: leakage_verdict(encoder, examples, config.near_duplicates, folder)
        for name, encoder in encoders.items()
    }
    curves, reports = probe_models(config, workdir, folder, encoders, examples, subsets, counts)
    fits = {name: study.fit_curve(curve, task.metric, config.seed) for name, curve in curves.items()}

    results = plain(
        {
            "task": task.name,
            "metric": task.metric,
            "fractions": fractions,
            "sizes": [round(size) for size in sizes.mean(axis=1)],
            "sizes_of_seeds": sizes.tolist(),
            "models": {
                **{
                    name: _model_entry(curve, fits[name], config.seed, config.bootstrap.level)
                    | {"probes": reports[name]}
                    for name, curve in curves.items()
                },
                MAJORITY: _majority_entry(examples, counts, sizes.shape, config.bootstrap.level),
            },
            "saving": _savings(curves, fits, task.metric, config.bootstrap.level),
            "subsets": "nested, whole patients, classes in proportion",
            "validation": f"all {len(examples.val.rows)} validation records at every size; they choose penalty and "
            "layer and are not counted among the labelled training records",
            "untrainable_classes": "a class without both kinds of records in a subset is predicted as the mean of its "
            "labels there",
            "targets": _NUMBERS if task.kind == "regression" else "classes",
            "leakage": verdicts,
            "n_test": len(examples.test.rows),
            "classes": examples.classes,
            "classes_dropped": examples.classes_dropped,
            "split": examples.split,
            "records_excluded": examples.excluded,
            "bootstrap": {
                "unit": unit,
                "resamples": config.bootstrap.resamples,
                "level": config.bootstrap.level,
                "seeds": _SEEDS
                if config.seeds > 1
                else "a single draw: intervals are over test records only",
                "interval": "percentile",
            },
            **identity,
            **made_with(("ecg-jax", "jax", "numpy", "scipy")),
        }
    )
    write_atomic(workdir / "label_efficiency.csv", table(results).encode())
    error_curves(results, workdir / "label_efficiency.png")
    # Last: a folder with the JSON is complete.
    write_atomic(workdir / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _open(checkpoints: Sequence[str], store: Store) -> dict[str, RestoredEncoder]:
    """Encoders by the name of their run, checked against the store and each other."""
    encoders: dict[str, RestoredEncoder] = {}
    for checkpoint in checkpoints:
        encoder = restore_encoder(checkpoint)
        where = f"checkpoint {encoder.run}"
        encoder.preprocessing.check_compatible(store.preprocessing, where, f"store {store.path}")
        if any((encoder.run, encoder.step) == (each.run, each.step) for each in encoders.values()):
            raise UserError(f"--checkpoint={checkpoint} is given twice; name each step of a run once.")
        name = encoder.run.resolve().name
        # Two steps of one run, or two runs of one name.
        if name in encoders or name in (RANDOM, ECG_FEATURES, MAJORITY):
            name = f"{name}/{encoder.step}"
        if name in encoders:
            raise UserError(f"--checkpoint={checkpoint}: two runs are called {name}; rename one of them.")
        encoders[name] = encoder
        first = next(iter(encoders.values())).preprocessing
        if encoder.preprocessing.window_samples != first.window_samples:
            raise UserError(
                f"--checkpoint={checkpoint} has windows of {encoder.preprocessing.window_s:g} s, the first one of "
                f"{first.window_s:g} s; compare checkpoints of one window, they are tested on the same records."
            )
    return encoders


def _model_entry(curve: Curve, fit, seed: int, level: float) -> dict[str, Any]:
    ends = curve.intervals(seed, level)
    return {
        "scores": curve.scores.tolist(),
        "mean": [end.point for end in ends],
        "low": [end.low for end in ends],
        "high": [end.high for end in ends],
        "fit": None if fit is None else fit.report(level),
    }


def _majority_entry(examples: Examples, counts, shape: tuple[int, int], level: float) -> dict[str, Any]:
    """The constant guess, the same at every size; there is no curve to fit."""
    point, resampled = study.majority_scores(examples, counts)
    point, low, high = bootstrap.interval(point, resampled, level)
    n_sizes, n_seeds = shape
    return {
        "scores": [[point] * n_seeds] * n_sizes,
        "mean": [point] * n_sizes,
        "low": [low] * n_sizes,
        "high": [high] * n_sizes,
        "fit": None,
    }


def _savings(curves: dict[str, Curve], fits, metric: str, level: float) -> dict[str, Any]:
    """{better model: {other: {"by_size": [...]} or {"undefined": why}}} for every pair."""
    savings: dict[str, Any] = {}

    def error(name: str) -> float:
        return float(np.log(study.errors_of(curves[name].scores.mean(axis=1), metric)).mean())

    for pair in itertools.combinations(curves, 2):
        better, other = sorted(pair, key=error)
        missing = [name for name in (better, other) if fits[name] is None]
        if missing:
            why = f"no curve was fitted to {missing[0]}: it takes {study.MIN_SIZES} sizes and scores that change"
            entry = {"undefined": why}
        else:
            sizes = curves[other].sizes.mean(axis=1)
            entry = {"by_size": study.label_saving(fits[better], fits[other], sizes, level)}
        savings.setdefault(better, {})[other] = entry
    return savings


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="RUN[/STEP]",
        help="pretraining run; may be given several times",
    )
    parser.add_argument("--store", required=True, help="labelled store to train, validate and test on")
    parser.add_argument("--workdir", required=True, help="folder for results, picture and finished fits")


def main(argv: list[str]) -> int:
    """`ecg-jax label-efficiency`."""
    config, options = parse_command(
        "label-efficiency", DESCRIPTION, argv, _add_options, like="configs/label_efficiency.py"
    )
    print(summary(label_efficiency(config, options.workdir, options.checkpoint, options.store)))
    print(f"  written to {options.workdir}")
    return 0
