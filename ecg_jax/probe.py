"""`ecg-jax probe`: what an encoder makes readable of a labelled task, with honest statistics.

Config and preprocessing contract come from the checkpoint. Whatever is chosen (penalty, layer, learning rate, epoch) is
chosen on the validation fold; predictions of non-overlapping crops are averaged per recording; the test fold is scored
once, with intervals from resampled patients. Randomly initialised encoders, simple ECG features and the majority guess
stand beside every probe, and what leaked from training or pretraining into the test records is said.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.config_flags import parse_command
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks
from ecg_jax.evaluation.ecg_feature_baseline import ecg_feature_layers
from ecg_jax.evaluation.examples import choose_examples
from ecg_jax.evaluation.head_training import check_attention_heads
from ecg_jax.evaluation.linear import FittedLinear, layers_to_compute
from ecg_jax.evaluation.plots import auroc_forest
from ecg_jax.evaluation.probe_scores import Baselines, Scores, Settings, check_scorable, majority_guess
from ecg_jax.evaluation.targets import known_value_sets
from ecg_jax.files import write_atomic
from ecg_jax.probe_checks import check_config, check_workdir
from ecg_jax.probe_modes import RANDOM_INIT_MODE, fit, random_init, solve
from ecg_jax.probe_output import is_whole, plain, summary, write_predictions, write_split
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
Probes a pretrained encoder on a labelled store and scores it on held-out recordings, with confidence intervals by
patient, beside randomly initialised encoders, simple ECG features and the majority guess.

  linear      a convex head on mean-pooled features
  frozen      attention pooling with a learned query on the frozen encoder's tokens
  finetune    encoder and head trained together, one learning rate for each part
  supervised  the same from random initialisation: what the labels give without pretraining

Writes results.json, predictions.npz, split.csv and a picture; for task=all a folder of these for each task that the
store can serve. Run the same command again after an interruption: finished tasks are kept, fits go on at their last
epoch.
"""


def probe(config, workdir, checkpoint: str, store, test_store=None) -> dict[str, Any]:
    """Probes one task and writes results.json, predictions.npz, split.csv and a picture, or finds them done.

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
    encoder, store, test_store = _open(config, checkpoint, store, test_store)
    return _probe_task(config, Path(workdir), tasks.get_task(config.task), encoder, store, test_store)


def probe_all(config, workdir, checkpoint: str, store, test_store=None) -> dict[str, dict[str, Any]]:
    """Probes every task that a store can serve, each in a folder of its name; the summary of each is printed.

    A task that the store cannot serve after all, for want of records or classes, is told and left out.

    Args:
        config, checkpoint, store, test_store: as in `probe`.
        workdir: folder of the tasks' folders.

    Returns:
        Task -> what its results.json holds.

    Raises:
        UserError: as in `probe`, or no task is left.
    """
    encoder, store, test_store = _open(config, checkpoint, store, test_store)
    check_workdir(Path(workdir))
    results, refused = {}, {}
    for task in tasks.fitting(store.corpus, list(store.classes), known_value_sets(store)):
        folder = Path(workdir) / task.name
        try:
            results[task.name] = _probe_task(config, folder, task, encoder, store, test_store)
        except tasks.TaskUnavailable as error:
            refused[task.name] = str(error)
            print(f"{task.name}: left out. {error}", flush=True)
            continue
        print(summary(results[task.name]), flush=True)
    if not results:
        reason = next(iter(refused.values()), "no task is known for its corpus and labels.")
        raise UserError(f"The store {store.path} (corpus {store.corpus!r}) can serve no task: {reason}")
    return results


def _open(config, checkpoint: str, store, test_store) -> tuple[RestoredEncoder, Store, Store | None]:
    """What a probe works on, checked to fit together."""
    check_config(config)
    encoder, store = restore_encoder(checkpoint), Store(store)
    layers_to_compute(encoder, config.linear.layers)
    if config.mode == "frozen" or (config.mode == "finetune" and config.finetune.head == "attention"):
        check_attention_heads(
            encoder.config["model"]["width"], config[config.mode].attention_heads, config.mode
        )
    test_store = None if test_store is None else Store(test_store)
    for each in filter(None, (store, test_store)):
        encoder.preprocessing.check_compatible(
            each.preprocessing, f"checkpoint {encoder.run}", f"store {each.path}"
        )
    return encoder, store, test_store


def _probe_task(
    config, workdir: Path, task: tasks.Task, encoder: RestoredEncoder, store: Store, test_store: Store | None
) -> dict[str, Any]:
    """One task, or its results if they are there already.

    Raises:
        TaskUnavailable: the stores cannot serve the task.
        UserError: anything else.
    """
    check_workdir(workdir)
    identity = plain(_identity(config, task, encoder, store, test_store))
    before = finished(workdir / "results.json", identity, "probe")
    if before and is_whole(workdir, config.mode):
        return before
    examples = choose_examples(
        task, store, test_store, encoder.preprocessing.window_samples, config.min_count
    )
    check_scorable(examples)
    make_folder(workdir, workdir)
    folder = features_folder(config)
    pretrained = None if config.mode == "supervised" else encoder
    verdict = leakage_verdict(pretrained, examples, config.near_duplicates, folder)
    fitted = fit(config, encoder, examples, workdir, folder)
    baselines = Baselines(
        random_init=np.stack(
            [random_init(config, encoder, examples, workdir, folder, i) for i in range(config.baseline_seeds)]
        ),
        random_mode=RANDOM_INIT_MODE[config.mode],
        ecg_features=solve(config, ecg_feature_layers(examples, folder), examples, "last").test,
        majority=majority_guess(examples),
    )
    settings = Settings(**config.bootstrap.to_dict(), seed=config.seed)
    scores = Scores(examples, fitted, config.mode, baselines, settings)
    results = plain(
        {
            "task": task.name,
            "group": task.group,
            "kind": task.kind,
            "metric": task.metric,
            "label_set": task.label_set,
            "mode": config.mode,
            "model": _model_name(config, encoder),
            **scores.report(),
            "layers": fitted.report["layers"] if config.mode == "linear" else None,
            "fit": {name: value for name, value in fitted.report.items() if name != "layers"},
            "leakage": verdict,
            "classes_dropped": examples.classes_dropped,
            "n_classes_dropped": examples.n_dropped,
            "split": examples.split,
            "records_excluded": examples.excluded,
            "encoder_parameters": None if config.mode == "supervised" else encoder.n_parameters,
            "preprocessing": encoder.preprocessing.to_dict(),
            "pretraining_config": None if config.mode == "supervised" else encoder.config,
            **identity,
            "seed": config.seed,
            **made_with(("ecg-jax", "jax", "flax", "numpy", "scipy")),
        }
    )
    if isinstance(fitted, FittedLinear):
        fitted.probe.save(workdir / "linear_probe.npz")
    write_predictions(workdir / "predictions.npz", examples, fitted, baselines)
    write_split(workdir / "split.csv", examples)
    if task.kind != "regression":
        patients = f", {results['n_patients']} patients" if results["n_patients"] else ""
        auroc_forest(
            examples.classes,
            **scores.picture(),
            path=workdir / "per_class_auroc.png",
            title=f"{task.name}, {config.mode}: {results['n_records']} test records{patients}",
            level=config.bootstrap.level,
        )
    # Last: a folder with results.json is complete.
    write_atomic(workdir / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _model_name(config, encoder: RestoredEncoder) -> str:
    """What the probed model is called in tables."""
    if config.mode != "supervised" or config.name:
        return config.name or encoder.run.resolve().name
    same = config.supervised.architecture == "same"
    return f"supervised {encoder.config['model']['backbone']}" if same else "supervised S4, 100 Hz"


def _identity(
    config, task: tasks.Task, encoder: RestoredEncoder, store: Store, test_store: Store | None
) -> dict[str, Any]:
    """What makes two probes the same probe."""
    return {
        "config": config_identity(config) | {"task": task.name},
        "checkpoint": checkpoint_identity(encoder),
        "store": store_identity(store),
        "test_store": None if test_store is None else store_identity(test_store),
    }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN[/STEP]",
        help="pretraining run; mode=supervised takes its architecture and preprocessing only",
    )
    parser.add_argument("--store", required=True, help="labelled store to train, validate and test on")
    parser.add_argument("--workdir", required=True, help="folder for results and pictures")
    parser.add_argument("--test-store", help="store to test on instead of the test fold of --store")


def main(argv: list[str]) -> int:
    """`ecg-jax probe`."""
    config, options = parse_command("probe", DESCRIPTION, argv, _add_options, like="configs/probe.py")
    if not options.workdir:
        raise UserError("--workdir is empty; name a folder.")
    arguments = (config, options.workdir, options.checkpoint, options.store, options.test_store)
    if config.task == tasks.ALL:
        probe_all(*arguments)
    else:
        print(summary(probe(*arguments)))
    print(f"  written to {options.workdir}")
    return 0
