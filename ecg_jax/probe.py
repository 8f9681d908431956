"""`ecg-jax probe`: how much of a labelled task a frozen encoder makes linearly readable, with honest
statistics.

Config and preprocessing contract come from the checkpoint. Features are computed once over non-overlapping
crops; a convex solver fits the head on the training folds, its penalty is chosen on the validation fold, crop
probabilities are averaged per recording, and the test fold is scored with intervals from resampled patients.
The same probe on a randomly initialised encoder and on the majority guess stand beside it.
"""

import argparse
import datetime
import io
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ecg_jax.config_flags import parse_command
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, heads, metrics, tasks
from ecg_jax.evaluation.examples import Examples, choose_examples
from ecg_jax.evaluation.features import compute_features, mean_per_record
from ecg_jax.evaluation.plots import FEW_POSITIVES, auroc_forest
from ecg_jax.files import write_atomic
from ecg_jax.training.pretrained import RestoredEncoder, encode_fn, random_twin, restore_encoder

DESCRIPTION = """\
Fits a linear head on the frozen features of a pretrained encoder and scores it on held-out recordings:
macro AUROC with its patient-level confidence interval, beside the same probe on a randomly initialised
encoder and on the majority guess. Writes results.json, predictions.npz and per_class_auroc.png.
"""


@dataclass(frozen=True)
class Fitted:
    """A probe of one encoder."""

    selection: heads.Selection
    probabilities: np.ndarray
    """float64 [n_test, K], averaged over the crops of each record."""


def fit_linear(encoder: RestoredEncoder, examples: Examples, config, label: str) -> Fitted:
    """Features of all parts, head on the training part, l2 by the validation part, test probabilities.

    Raises:
        UserError: the encoder's output is not finite, or no class is defined on the validation records.
    """
    window, encode = encoder.preprocessing.window_samples, encode_fn(encoder)
    features, record = {}, {}
    for name in ("train", "val", "test"):
        part = getattr(examples, name)
        starts, record[name] = part.crops(window)
        try:
            features[name] = compute_features(
                encode, part.store.read_crops, starts, window, config.batch_size, f"{label}, {name}"
            )
        except ValueError as error:
            raise UserError(f"Checkpoint {encoder.run}, {label}: {error}.") from error
    problem = heads.LogisticProblem(
        features["train"], examples.train.targets[record["train"]], heads.crop_weights(record["train"])
    )
    if not (metrics.has_both_kinds(examples.val.targets)).any():
        raise UserError(
            f"No class has both positives and negatives among the {len(examples.val.rows)} validation "
            f"records (fold {examples.split['val_fold']}), so l2 cannot be chosen; use more data."
        )
    selection = heads.select_l2(
        problem,
        features["val"],
        record["val"],
        examples.val.targets,
        config.linear.l2_grid,
        config.linear.tolerance,
        config.linear.max_steps,
    )
    crops = selection.head.probabilities(features["test"])
    return Fitted(selection, mean_per_record(crops, record["test"], len(examples.test.rows)))


def _interval(value: bootstrap.Interval) -> dict[str, float]:
    return {"macro_auroc": value.point, "ci_low": value.low, "ci_high": value.high}


def _solver_report(selection: heads.Selection) -> dict:
    return {
        "l2": selection.l2,
        "l2_at_edge_of_grid": selection.at_edge,
        "converged": selection.converged,
        "grid": [asdict(candidate) for candidate in selection.candidates],
    }


def score(examples: Examples, fitted: Fitted, random_init: Fitted, config) -> tuple[dict, dict]:
    """Scores with intervals, on one set of resamples for all models.

    Returns:
        (the part of results.json about scores, keyword arguments of `auroc_forest`).

    Raises:
        UserError: no class has both positives and negatives among the test records.
    """
    targets, settings = examples.test.targets, config.bootstrap
    undefined, level = settings.undefined, settings.level
    n_pos, n_neg = metrics.class_counts(targets)
    if not metrics.has_both_kinds(targets).any():
        raise UserError(
            f"No class of task {config.task} has both positives and negatives among the {len(targets)} test "
            "records, so there is nothing to score; use more data."
        )
    patients = examples.test.column("patient_id")
    codes, unit = bootstrap.units(patients, len(targets))
    counts = bootstrap.draw(codes, settings.resamples, config.seed)
    # One constant score per class: what a model that knows only how common a class is would say.
    majority_scores = np.broadcast_to(examples.train.targets.mean(axis=0), targets.shape)
    ours, twin, majority = (
        bootstrap.bootstrap_auroc(targets, p, counts)
        for p in (fitted.probabilities, random_init.probabilities, majority_scores)
    )
    precision = metrics.average_precision(targets, fitted.probabilities)
    intervals, twin_intervals = ours.class_intervals(level), twin.class_intervals(level)
    per_class = {
        name: {
            "auroc": intervals[k].point,
            "ci_low": intervals[k].low,
            "ci_high": intervals[k].high,
            "average_precision": precision[k],
            "random_init_auroc": twin_intervals[k].point,
            "n_pos": int(n_pos[k]),
            "n_neg": int(n_neg[k]),
        }
        for k, name in enumerate(examples.classes)
    }
    difference = bootstrap.macro_difference(ours, twin, undefined, level)
    scores = {
        **_interval(ours.macro(undefined, level)),
        "per_class": per_class,
        "n_records": len(targets),
        "n_patients": len({p for p in patients if p}) or None,
        "baselines": {
            "random_init": {
                **_interval(twin.macro(undefined, level)),
                "solver": _solver_report(random_init.selection),
            },
            "majority": _interval(majority.macro(undefined, level)),
        },
        "difference_to_random_init": _interval(difference),
        "macro_average_precision": metrics.macro(precision, "exclude"),
        "micro_auroc": metrics.micro_auroc(targets, fitted.probabilities),
        "classes_with_few_positives": [
            name for name, n in zip(examples.classes, n_pos, strict=True) if 0 < n < FEW_POSITIVES
        ],
        "classes_undefined_in_test": [
            name for name, auroc in zip(examples.classes, ours.per_class, strict=True) if np.isnan(auroc)
        ],
        "bootstrap": {
            "unit": unit,
            "resamples": settings.resamples,
            "level": level,
            "undefined": undefined,
            "interval": "percentile",
        },
    }
    picture = {
        "n_pos": n_pos,
        "models": {"pretrained": np.array(intervals), "random initialisation": np.array(twin_intervals)},
        "macro": {
            "pretrained": ours.macro(undefined, level),
            "random initialisation": twin.macro(undefined, level),
        },
    }
    return scores, picture


def _identity(config, encoder: RestoredEncoder, store: Store, test_store: Store | None) -> dict:
    """What makes two probes the same probe."""

    def described(store: Store) -> dict[str, str]:
        return {"path": str(store.path.resolve()), "corpus": store.corpus, "fingerprint": store.fingerprint}

    return {
        "config": config.to_dict(),
        "checkpoint": {"run": str(encoder.run.resolve()), "step": encoder.step},
        "store": described(store),
        "test_store": None if test_store is None else described(test_store),
    }


def _check_workdir(workdir: Path, identity: dict) -> None:
    """Refuses to overwrite the results of another probe.

    Raises:
        UserError: workdir holds a results.json of another config, checkpoint or store.
    """
    path = workdir / "results.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
        differing = [key for key, value in _plain(identity).items() if before[key] != value]
    except (ValueError, KeyError, TypeError):
        differing = ["kind"]
    if differing:
        raise UserError(
            f"--workdir={workdir} holds results of another probe (other {', '.join(differing)}); "
            "choose another folder."
        )


def _plain(value):
    """The same with lists for tuples, Python numbers for NumPy's, and None for what JSON cannot say (NaN)."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def probe(config, workdir, checkpoint: str, store, test_store=None) -> dict:
    """Runs one probe and writes results.json, predictions.npz and per_class_auroc.png.

    Args:
        config: from configs/probe.py.
        workdir: folder for the results, made if needed.
        checkpoint: RUN or RUN/STEP of a pretraining run.
        store: path of a store, trained and validated on.
        test_store: path of a store to test on instead of the test fold of `store`.

    Returns:
        What results.json holds.

    Raises:
        UserError: anything in the config, checkpoint, stores or workdir that does not fit.
    """
    check_config(config)
    workdir = Path(workdir)
    task = tasks.get_task(config.task)
    encoder = restore_encoder(checkpoint)
    contract = encoder.preprocessing
    store = Store(store)
    test_store = None if test_store is None else Store(test_store)
    for each in filter(None, (store, test_store)):
        contract.check_compatible(each.preprocessing, f"checkpoint {encoder.run}", f"store {each.path}")
    identity = _identity(config, encoder, store, test_store)
    _check_workdir(workdir, identity)
    examples = choose_examples(task, store, test_store, contract.window_samples, config.min_count)

    # Before the long part, so that a folder that cannot be written to costs nothing.
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write into --workdir={workdir}: {error.strerror}; name another folder."
        ) from error
    fitted = fit_linear(encoder, examples, config, "pretrained")
    random_init = fit_linear(random_twin(encoder, config.seed), examples, config, "random initialisation")
    scores, picture = score(examples, fitted, random_init, config)

    packages = ("ecg-jax", "jax", "flax", "numpy", "scipy")
    results = _plain(
        {
            "task": task.name,
            "label_set": task.label_set,
            "mode": config.mode,
            **scores,
            "classes_dropped": examples.classes_dropped,
            "solver": _solver_report(fitted.selection),
            "l2": fitted.selection.l2,
            "split": examples.split,
            "records_excluded": examples.excluded,
            "encoder_parameters": encoder.n_parameters,
            "preprocessing": contract.to_dict(),
            "pretraining_config": encoder.config,
            **identity,
            "seed": config.seed,
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    _write_predictions(workdir / "predictions.npz", examples, fitted, random_init)
    patients = f", {results['n_patients']} patients" if results["n_patients"] else ""
    auroc_forest(
        examples.classes,
        **picture,
        path=workdir / "per_class_auroc.png",
        title=f"{task.name}: {results['n_records']} test records{patients}",
        level=config.bootstrap.level,
    )
    # Last: a folder with results.json is complete.
    write_atomic(workdir / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def check_config(config) -> None:
    """Refuses values that no probe can run with.

    Raises:
        UserError: names the field.
    """
    if config.mode != "linear":
        raise UserError(f"mode={config.mode} is not available yet; use mode=linear.")
    if config.bootstrap.undefined not in ("exclude", "half"):
        raise UserError(
            f'--config.bootstrap.undefined={config.bootstrap.undefined} must be "exclude" or "half".'
        )
    if not 0 < config.bootstrap.level < 1:
        raise UserError(f"--config.bootstrap.level={config.bootstrap.level} must lie between 0 and 1.")
    grid = config.linear.l2_grid
    if not grid or not all(isinstance(l2, int | float) and 0 < l2 < float("inf") for l2 in grid):
        raise UserError(f"--config.linear.l2_grid={grid} must be a list of numbers above 0.")
    if not config.linear.tolerance > 0:
        raise UserError(f"--config.linear.tolerance={config.linear.tolerance} must be above 0.")
    sizes = {
        "batch_size": config.batch_size,
        "bootstrap.resamples": config.bootstrap.resamples,
        "linear.max_steps": config.linear.max_steps,
    }
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--config.{name}={value} must be at least 1.")
    if config.seed < 0:
        raise UserError(f"--config.seed={config.seed} must be at least 0.")


def _write_predictions(path: Path, examples: Examples, fitted: Fitted, random_init: Fitted) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        record_id=np.array(examples.test.column("record_id"), dtype=str),
        patient_id=np.array([p or "" for p in examples.test.column("patient_id")], dtype=str),
        targets=examples.test.targets,
        probabilities=fitted.probabilities,
        probabilities_random_init=random_init.probabilities,
        classes=np.array(examples.classes, dtype=str),
    )
    write_atomic(path, buffer.getvalue())


def summary(results: dict) -> str:
    """A few lines for the console."""

    def line(name, entry):
        return f"  {name:<24}{entry['macro_auroc']:.3f}   {entry['ci_low']:.3f} to {entry['ci_high']:.3f}"

    unit, level = results["bootstrap"]["unit"], 100 * results["bootstrap"]["level"]
    patients = f" of {results['n_patients']} patients" if results["n_patients"] else ""
    lines = [
        f"{results['task']}: {len(results['per_class'])} classes, "
        f"{results['n_records']} test records{patients}",
        f"  {'':<24}macro AUROC, {level:g} % interval (resampled by {unit})",
        line("pretrained", results),
        line("random initialisation", results["baselines"]["random_init"]),
        line("majority guess", results["baselines"]["majority"]),
        line("pretrained - random", results["difference_to_random_init"]),
        f"  l2 = {results['l2']:g}, chosen on {results['split']['n_val']} validation records",
    ]
    for key, what in (
        ("classes_dropped", "left out, too rare"),
        ("classes_undefined_in_test", "undefined in the test records"),
        ("classes_with_few_positives", f"with fewer than {FEW_POSITIVES} positive test records"),
    ):
        names = list(results[key])
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            lines.append(f"  {len(names)} classes {what}: {shown}")
    if not results["solver"]["converged"]:
        lines.append("  WARNING: the solver did not reach its tolerance; raise --config.linear.max_steps")
    return "\n".join(lines)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="RUN[/STEP]", help="pretraining run")
    parser.add_argument("--store", required=True, help="labelled store to train, validate and test on")
    parser.add_argument("--workdir", required=True, help="folder for results.json and pictures")
    parser.add_argument("--test-store", help="store to test on instead of the test fold of --store")


def main(argv: list[str]) -> int:
    """`ecg-jax probe`."""
    config, options = parse_command("probe", DESCRIPTION, argv, _add_options, like="configs/probe.py")
    results = probe(config, options.workdir, options.checkpoint, options.store, options.test_store)
    print(summary(results))
    print(f"  written to {options.workdir}")
    return 0
