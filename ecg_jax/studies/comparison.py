"""Groups of runs that differ in their seed: means over seeds, intervals that carry test patients and seeds, tables
and a picture.

A group's figure is the mean over its seeds of macro AUROC. Two things make it uncertain: which patients were tested
on, and which seeds were drawn. Every resample draws the patients once for all runs of the comparison, and for each
group a deviation of its few seeds from all seeds.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.evaluation.bootstrap import Interval, hierarchical_interval, seed_deviations

RANDOM_INIT = "random initialisation"
MAJORITY = "majority guess"
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

    @property
    def seed(self) -> int:
        """Of pretraining."""
        return self.results["pretraining_config"]["seed"]


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuses runs that were not tested alike.

    Raises:
        UserError: other test records, labels, classes or resampling; names two of the runs.
    """
    first = runs[0]
    for run in runs[1:]:
        same = all(
            np.array_equal(run.predictions[key], first.predictions[key], equal_nan=key == "targets")
            for key in ("record_id", "classes", "targets")
        )
        if not same or run.results["bootstrap"] != first.results["bootstrap"]:
            raise UserError(
                f"the runs {first.name} and {run.name} were probed on other test records, classes or resamples, so "
                "that they cannot stand in one table; give all runs the same window and the same probe"
            )


def compare(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Figures of runs, groups and baselines; groups in the order of their first runs.

    The randomly initialised twins of groups with the same encoder and input are one baseline.

    Raises:
        UserError: see `check_comparable`.
    """
    check_comparable(runs)
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
    each_twin = {
        run.name: [macro(scores) for scores in run.predictions["probabilities_random_init_seeds"]]
        for run in runs
    }
    twins = {
        name: tuple(np.mean(values, axis=0) for values in zip(*scored, strict=True))
        for name, scored in each_twin.items()
    }
    members: dict[str, list[FinishedRun]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run)

    groups, baselines, of_encoder = [], [], {}
    for group, own in members.items():
        differences = [
            (ours[run.name][0] - twins[run.name][0], ours[run.name][1] - twins[run.name][1]) for run in own
        ]
        logged = [_last(run.log) for run in own]
        groups.append(
            {
                "group": group,
                "seeds": [run.seed for run in own],
                **over_seeds([ours[run.name] for run in own]),
                "each_seed": [run.results["macro_auroc"] for run in own],
                "difference_to_random_init": over_seeds(differences),
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
        "n_patients": runs[0].results["n_patients"],
        "bootstrap": {
            **settings,
            "unit": unit,
            "seeds": "Student's t with S - 1 degrees of freedom",
        },
        "groups": groups,
        "baselines": baselines,
        "runs": [_row(run) for run in runs],
    }


def _interval(value: Interval) -> dict[str, float]:
    return {"macro_auroc": value.point, "ci_low": value.low, "ci_high": value.high}


def _mean(values: list) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def _last(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last logged value of each of `LOGGED`, in training or, where it is only known there, in validation."""
    found: dict[str, Any] = {"step": log[-1]["step"] if log else None}
    for name in LOGGED:
        keys = (name, f"val_{name}")
        values = [entry[key] for key in keys for entry in reversed(log) if key in entry]
        found[name] = values[0] if values else None
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


def to_csv(results: dict[str, Any]) -> str:
    """One line for each run, group and baseline; the first column says which."""
    columns = [
        "kind", "group", "name", "seeds", "macro_auroc", "ci_low", "ci_high", "difference_to_random_init",
        "difference_ci_low", "difference_ci_high", "step", *LOGGED, "seconds",
    ]  # fmt: skip
    rows = []
    for kind, entries in (
        ("run", results["runs"]),
        ("group", results["groups"]),
        ("baseline", results["baselines"]),
    ):
        for entry in entries:
            row = {"kind": kind} | {key: value for key, value in entry.items() if key in columns}
            row["seeds"] = " ".join(map(str, [entry["seed"]] if kind == "run" else entry["seeds"]))
            row.pop("difference_to_random_init", None)
            if kind == "baseline":
                row |= {"name": entry["baseline"], "group": " ".join(entry["groups"])}
            else:
                difference = entry["difference_to_random_init"]
                row |= {
                    "difference_to_random_init": difference["macro_auroc"],
                    "difference_ci_low": difference["ci_low"],
                    "difference_ci_high": difference["ci_high"],
                }
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(value: float | None, digits: str = ".3g") -> str:
    return "" if value is None else format(value, digits)


def _with_interval(entry: dict[str, float], sign: str = "") -> str:
    low, high = (_number(entry[name], f"{sign}.3f") for name in ("ci_low", "ci_high"))
    return f"{_number(entry['macro_auroc'], f'{sign}.3f')} ({low} to {high})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is left-aligned, columns padded for people who read the source."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells):
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return [line(header), line(rule), *map(line, rows)]


def baseline_label(entry: dict[str, Any], baselines: list[dict[str, Any]]) -> str:
    """The name of a baseline, with its groups where several of the kind differ."""
    several = sum(other["baseline"] == entry["baseline"] for other in baselines) > 1
    return f"{entry['baseline']} ({', '.join(entry['groups'])})" if several else entry["baseline"]


def group_table(results: dict[str, Any]) -> list[str]:
    """Lines of the table of groups and baselines."""
    header = [
        "group", "seeds", "macro AUROC", "each seed", f"minus {RANDOM_INIT}", "steps", "loss", "seconds"
    ]  # fmt: skip
    logged = [
        name for name in ("rankme", "feature_std") if any(g[name] is not None for g in results["groups"])
    ]
    header[7:7] = logged

    def each(entry):
        return " ".join(f"{value:.3f}" for value in entry["each_seed"])

    rows = [
        [
            entry["group"],
            str(len(entry["seeds"])),
            _with_interval(entry),
            each(entry),
            _with_interval(entry["difference_to_random_init"], "+"),
            _number(entry["step"], ".0f"),
            *(_number(entry[name]) for name in ("loss", *logged)),
            _number(entry["seconds"], ".0f"),
        ]
        for entry in results["groups"]
    ]
    for entry in results["baselines"]:
        seeds = str(len(entry["seeds"])) if entry["seeds"] else ""
        cells = [
            baseline_label(entry, results["baselines"]),
            seeds,
            _with_interval(entry),
            each(entry),
        ]
        rows.append(cells + [""] * (len(header) - len(cells)))
    return _table(header, rows)


def to_markdown(results: dict[str, Any]) -> str:
    """The table of groups, what it means, and the table of runs."""
    level = 100 * results["bootstrap"]["level"]
    patients = f" of {results['n_patients']} patients" if results["n_patients"] else ""
    lines = [
        f"# {results['sweep']}",
        "",
        *group_table(results),
        "",
        f"Macro AUROC of {results['task']} ({len(results['classes'])} classes) on {results['n_records']} test "
        f"records{patients}: mean over seeds with its {level:g} % interval over test patients and seeds. The "
        f"difference is paired: each seed against a {RANDOM_INIT} of the same encoder, on the same patients. Steps, "
        "loss (the last one logged) and seconds (of pretraining) are means over seeds; losses of different objectives "
        "have different units.",
    ]
    single = [entry["group"] for entry in results["groups"] if len(entry["seeds"]) == 1]
    if single:
        lines += ["", f"A single seed, so the interval is over patients only: {', '.join(single)}."]
    warned = [
        f"{run['name']} ({len(run['warnings'])} warnings, the first at step {run['warnings'][0]['step']})"
        for run in results["runs"]
        if run["warnings"]
    ]
    if warned:
        lines += ["", f"Warned of a collapse during pretraining, see log.jsonl: {', '.join(warned)}."]
    if results["missing"]:
        lines += ["", f"Not finished: {', '.join(results['missing'])}."]
    if results["note"]:
        lines += ["", f"**{results['note']}**"]
    names = [
        name
        for name in ("val_loss", "rankme", "feature_std")
        if any(r[name] is not None for r in results["runs"])
    ]
    header = ["run", "seed", "macro AUROC", RANDOM_INIT, "difference", "steps", "loss", *names, "seconds"]
    rows = [
        [
            run["name"],
            str(run["seed"]),
            _with_interval(run),
            _with_interval(run["random_init"]),
            _with_interval(run["difference_to_random_init"], "+"),
            _number(run["step"], "d"),
            *(_number(run[name]) for name in ("loss", *names)),
            _number(run["seconds"], ".0f"),
        ]
        for run in results["runs"]
    ]
    lines += ["", f"## Runs, with {level:g} % intervals over test patients", "", *_table(header, rows)]
    return "\n".join(lines) + "\n"
