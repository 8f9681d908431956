"""Groups of runs that differ in their seed: means over seeds, intervals that carry test patients and seeds, tables
and a picture.

A group's figure is the mean over its seeds of macro AUROC. Two things make it uncertain: which patients were tested
on, and which seeds were drawn. Every resample draws the patients once for all runs of the comparison, and for each
group a deviation of its few seeds from all seeds. The first group is the one that the others are set against.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.evaluation.bootstrap import Interval, hierarchical_interval, seed_deviations
from ecg_jax.run_setup import flatten
from ecg_jax.studies.report.rows import disagreement

RANDOM_INIT = "random initialisation"
MAJORITY = "majority guess"
#: Array of the probe's predictions [S, n, K]: of the randomly initialised twins.
TWINS = "probabilities_random_init_seeds"
#: Keys of log.jsonl that are reported with their last value where they were logged.
LOGGED = ("loss", "val_loss", "rankme", "feature_std")


class FinishedRun(NamedTuple):
    """A pretrained and probed run, as it lies on the disk."""

    name: str
    group: str
    results: dict[str, Any]
    """The probe's results.json."""
    predictions: dict[str, np.ndarray]
    """The probe's predictions.npz."""
    log: list[dict[str, Any]]
    """The logged steps of the run's log.jsonl."""
    warnings: list[tuple[int, str]]
    """(step, sentence) of what looked like a collapse."""
    seconds: float | None
    """That pretraining took; None when it was not measured."""
    init: str = ""
    """Group of the run that it began with, "" for none."""

    @property
    def seed(self) -> int:
        """Of pretraining."""
        return self.results["pretraining_config"]["seed"]


def contradiction(results: dict[str, Any], predictions: dict[str, np.ndarray]) -> str:
    """The first score of a probe's results.json that is not that of its predictions.npz, in a sentence; "" for none."""
    targets, undefined = predictions["targets"], results["bootstrap"]["undefined"]

    def score(name: str) -> float:
        return metrics.macro_auroc(targets, predictions[name], undefined)

    own, baselines = score("probabilities"), results["baselines"]
    random = float(np.mean([metrics.macro_auroc(targets, twin, undefined) for twin in predictions[TWINS]]))
    compared = [
        ("macro_auroc", results, own),
        ("baselines.random_init.macro_auroc", baselines["random_init"], random),
        ("difference_to_random_init.macro_auroc", results["difference_to_random_init"], own - random),
    ]
    # Runs from before these were kept have no predictions of theirs.
    compared += [
        (f"baselines.{name}.macro_auroc", baselines[name], score(f"probabilities_{name}"))
        for name in ("ecg_features", "majority")
        if f"probabilities_{name}" in predictions
    ]
    for field, entry, computed in compared:
        if wrong := disagreement(field, entry["macro_auroc"], computed):
            return wrong
    return ""


def on_common_records(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs with the predictions of the records that all of them were tested on, in the order of the first run's.

    Runs of different windows are tested on different records where a recording is shorter than a window.

    Raises:
        UserError: there are no such records, or other labels, classes or resampling; names two of the runs.
    """
    ids = [run.predictions["record_id"] for run in runs]
    common = set(ids[0]).intersection(*ids)
    order = [record for record in ids[0] if record in common]
    first, cut = runs[0], []
    for run, own in zip(runs, ids, strict=True):
        row_of = {record: row for row, record in enumerate(own)}
        rows = np.array([row_of[record] for record in order], int)
        tested = dict(run.predictions)
        for name in ("record_id", "patient_id", "targets", "probabilities"):
            tested[name] = tested[name][rows]
        tested[TWINS] = tested[TWINS][:, rows]
        cut.append(run._replace(predictions=tested))
        same = all(
            np.array_equal(tested[key], cut[0].predictions[key], equal_nan=key == "targets")
            for key in ("classes", "targets")
        )
        if not order or not same or run.results["bootstrap"] != first.results["bootstrap"]:
            raise UserError(
                f"the runs {first.name} and {run.name} were probed on other test records, classes or resamples, so "
                "that they cannot stand in one table; give all runs the same probe"
            )
    return cut


def _settings(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """Group -> the fields of pretraining in which groups differ, None where a group's config has no such field."""
    # Of a first checkpoint the path says nothing that its group does not, and differs from seed to seed.
    configs = {
        run.group: flatten(run.results["pretraining_config"]) | {"init.checkpoint": None, "init": run.init}
        for run in runs
    }
    names = dict.fromkeys(name for config in configs.values() for name in config)
    values = {name: [config.get(name) for config in configs.values()] for name in names}
    differ = [
        name
        for name, each in values.items()
        if name not in ("seed", "store") and any(value != each[0] for value in each)
    ]
    return {group: {name: config.get(name) for name in differ} for group, config in configs.items()}


def compare(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Figures of runs, groups and baselines; groups in the order of their first runs.

    The randomly initialised twins of groups with the same encoder and input are one baseline.

    Raises:
        UserError: see `on_common_records`.
    """
    largest = max(len(run.predictions["record_id"]) for run in runs)
    runs = on_common_records(runs)
    settings, tested = runs[0].results["bootstrap"], runs[0].predictions
    undefined, level = settings["undefined"], settings["level"]
    targets = tested["targets"]
    codes, unit = bootstrap.units(tested["patient_id"].tolist(), len(targets))
    counts = bootstrap.draw(codes, settings["resamples"], seed=0)

    def macro(scores) -> tuple[float, np.ndarray]:
        model = bootstrap.bootstrap_auroc(targets, scores, counts)
        return metrics.macro(model.per_class, undefined), metrics.macro(model.resampled, undefined)

    def over_seeds(models) -> dict[str, float]:
        points, resampled = zip(*models, strict=True)
        # The same draws for every group: a group's interval does not depend on its company.
        deviations = seed_deviations(points, settings["resamples"], np.random.default_rng(1))
        return _interval(hierarchical_interval(points, resampled, deviations, level))

    ours = {run.name: macro(run.predictions["probabilities"]) for run in runs}
    # The mean over a run's twins stands beside it, as in its results.json.
    each_twin = {run.name: [macro(scores) for scores in run.predictions[TWINS]] for run in runs}
    twins = {
        name: tuple(np.mean(values, axis=0) for values in zip(*scored, strict=True))
        for name, scored in each_twin.items()
    }
    # As the probes wrote it, to the last digit, unless they were tested on other records too.
    cut = largest > len(targets)
    points = {run.name: float(ours[run.name][0]) if cut else run.results["macro_auroc"] for run in runs}
    differing = _settings(runs)
    members: dict[str, list[FinishedRun]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run)

    def minus(own: list[FinishedRun], other: list[FinishedRun]) -> dict[str, float]:
        """Of the means of two groups: on the same patients, seed by seed where both have the same seeds."""
        if {run.seed for run in own} == {run.seed for run in other}:
            of_seed = {run.seed: ours[run.name] for run in other}
            return over_seeds(
                [[a - b for a, b in zip(ours[run.name], of_seed[run.seed], strict=True)] for run in own]
            )
        mine, theirs = (
            [np.array(values) for values in zip(*(ours[run.name] for run in each), strict=True)]
            for each in (own, other)
        )
        deviations = [
            seed_deviations(points, settings["resamples"], np.random.default_rng(1 + number))
            for number, (points, _) in enumerate((mine, theirs))
        ]
        resampled = mine[1].mean(axis=0) - theirs[1].mean(axis=0)
        point = mine[0].mean() - theirs[0].mean()
        return _interval(bootstrap.interval(point, resampled + deviations[0] - deviations[1], level))

    groups, baselines, of_encoder = [], [], {}
    reference = next(iter(members.values()))
    for group, own in members.items():
        differences = [
            (ours[run.name][0] - twins[run.name][0], ours[run.name][1] - twins[run.name][1]) for run in own
        ]
        logged = [_last(run.log) for run in own]
        groups.append(
            {
                "group": group,
                "settings": differing[group],
                "seeds": [run.seed for run in own],
                **over_seeds([ours[run.name] for run in own]),
                "each_seed": [points[run.name] for run in own],
                "difference_to_random_init": over_seeds(differences),
                "difference_to_first": None if own is reference else minus(own, reference),
                "parameters": own[0].results["encoder_parameters"],
                **{name: _mean([entry[name] for entry in logged]) for name in ("step", *LOGGED)},
                "seconds": _mean([run.seconds for run in own]),
            }
        )
        # Groups with the same encoder and input have the same twins, seed for seed.
        pretraining = own[0].results["pretraining_config"]
        key = json.dumps([pretraining["model"], own[0].results["preprocessing"]], sort_keys=True)
        shared = of_encoder.setdefault(key, {"groups": [], "twins": {}})
        shared["groups"].append(group)
        shared["twins"] |= {
            run.results["seed"] + i: scored for run in own for i, scored in enumerate(each_twin[run.name])
        }
    for shared in of_encoder.values():
        models = list(shared["twins"].values())
        baselines.append(
            {
                "baseline": RANDOM_INIT,
                "groups": shared["groups"],
                "seeds": list(shared["twins"]),
                **over_seeds(models),
                "each_seed": [float(point) for point, _ in models],
            }
        )
    majority = runs[0].results["baselines"]["majority"]
    baselines.append(
        {
            "baseline": MAJORITY,
            "groups": list(members),
            "seeds": [],
            **{name: majority[name] for name in ("macro_auroc", "ci_low", "ci_high")},
            "each_seed": [],
        }
    )
    return {
        "task": runs[0].results["task"],
        "classes": tested["classes"].tolist(),
        "n_records": len(targets),
        "n_records_of_any": largest,
        "n_patients": _n_patients(tested["patient_id"]) if cut else runs[0].results["n_patients"],
        "bootstrap": {
            **settings,
            "unit": unit,
            "seeds": "Student's t with S - 1 degrees of freedom",
        },
        "groups": groups,
        "baselines": baselines,
        "runs": [_row(run) for run in runs],
    }


def _n_patients(patient_ids: np.ndarray) -> int | None:
    """How many there are; None where any is unknown."""
    known = {patient for patient in patient_ids.tolist() if patient}
    return len(known) if all(patient_ids.tolist()) else None


def _interval(value: Interval) -> dict[str, float]:
    return {"macro_auroc": value.point, "ci_low": value.low, "ci_high": value.high}


def _mean(values: list) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def _last(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last logged value of each of `LOGGED`, in training or, where it is only known there, in validation."""
    found: dict[str, Any] = {"step": log[-1]["step"] if log else None}
    for name in LOGGED:
        keys = (name, f"val_{name}")
        values = [entry[key] for key in keys for entry in reversed(log) if entry.get(key) is not None]
        found[name] = values[0] if values and math.isfinite(values[0]) else None  # JSON has no other numbers
    return found


def _row(run: FinishedRun) -> dict[str, Any]:
    """The figures of one run, as its probe wrote them."""
    interval = ("macro_auroc", "ci_low", "ci_high")
    return {
        "name": run.name,
        "group": run.group,
        "seed": run.seed,
        **{name: run.results[name] for name in interval},
        "random_init": {name: run.results["baselines"]["random_init"][name] for name in interval},
        "difference_to_random_init": {
            name: run.results["difference_to_random_init"][name] for name in interval
        },
        **_last(run.log),
        "seconds": run.seconds,
        "warnings": [{"step": step, "warning": sentence} for step, sentence in run.warnings],
    }
