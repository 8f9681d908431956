"""What `studies.comparison` found, as CSV, as Markdown and on the terminal."""

import csv
import io
from typing import Any

from ecg_jax.studies.comparison import LOGGED, RANDOM_INIT

MOST_SETTINGS = 4  # columns of what groups differ in; beyond that they are named below the table


def to_csv(results: dict[str, Any]) -> str:
    """One line for each run, group and baseline; the first column says which."""
    columns = [
        "kind", "group", "name", "seeds", "macro_auroc", "ci_low", "ci_high", "difference_to_random_init",
        "difference_ci_low", "difference_ci_high", "difference_to_first", "difference_to_first_ci_low",
        "difference_to_first_ci_high", "parameters", "step", *LOGGED, "seconds",
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
            if (first := row.pop("difference_to_first", None)) is not None:
                row |= {
                    "difference_to_first": first["macro_auroc"],
                    "difference_to_first_ci_low": first["ci_low"],
                    "difference_to_first_ci_high": first["ci_high"],
                }
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


def _setting(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)


def _with_interval(entry: dict[str, float], sign: str = "") -> str:
    low, high = (_number(entry[name], f"{sign}.3f") for name in ("ci_low", "ci_high"))
    return f"{_number(entry['macro_auroc'], f'{sign}.3f')} ({low} to {high})"


def _difference(entry: dict[str, float] | None) -> str:
    """To the first group, whose own place is empty."""
    return "" if entry is None else _with_interval(entry, "+")


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


def _shown_settings(results: dict[str, Any]) -> list[str]:
    """The fields in which groups differ and that every one has; of an objective or backbone that differs, its name."""
    groups = [entry["settings"] for entry in results["groups"]]
    names = list(groups[0])
    for prefix, name in (("objective.", "objective.name"), ("model.", "model.backbone")):
        if name in names:
            names = [each for each in names if each == name or not each.startswith(prefix)]
    return [name for name in names if all(settings[name] is not None for settings in groups)]


def group_table(results: dict[str, Any]) -> list[str]:
    """Lines of the table of groups and baselines."""
    logged = [
        name for name in ("rankme", "feature_std") if any(g[name] is not None for g in results["groups"])
    ]
    several = len(results["groups"]) > 1
    header = ["group", "seeds", "macro AUROC", *[f"minus {results['groups'][0]['group']}"] * several]
    header += ["each seed", f"minus {RANDOM_INIT}", "parameters", "steps", "loss", *logged, "seconds"]
    shown = _shown_settings(results)
    shown = shown if len(shown) <= MOST_SETTINGS else []
    header[1:1] = [name.rpartition(".")[2] if name != "objective.name" else "objective" for name in shown]

    def each(entry):
        return " ".join(f"{value:.3f}" for value in entry["each_seed"])

    rows = [
        [
            entry["group"],
            *(_setting(entry["settings"][name]) for name in shown),
            str(len(entry["seeds"])),
            _with_interval(entry),
            *[_difference(entry["difference_to_first"])] * several,
            each(entry),
            _with_interval(entry["difference_to_random_init"], "+"),
            _number(entry["parameters"], ",").replace(",", " "),
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
            *("" for _ in shown),
            seeds,
            _with_interval(entry),
            *[""] * several,
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
        f"difference is paired: each seed against a {RANDOM_INIT} of the same encoder, on the same patients. "
        "Parameters are those of the encoder. Steps, loss (the last one logged) and seconds (of pretraining) are means "
        "over seeds; losses of different objectives have different units.",
    ]
    if len(results["groups"]) > 1:
        lines += [
            "",
            f"The difference to {results['groups'][0]['group']}, the first group, is paired too: on the same "
            "patients, and seed by seed where both groups have the same seeds. Each interval is for one comparison: of "
            "many, some exclude zero by chance.",
        ]
    differ = _shown_settings(results)
    if len(differ) > MOST_SETTINGS:
        lines += ["", f"Groups differ in {', '.join(differ)}; results_table.csv has their values."]
    if results["n_records_of_any"] > results["n_records"]:
        lines += [
            "",
            f"Some runs were tested on up to {results['n_records_of_any']} records: a recording shorter than a run's "
            "window is left out of that run's test. The first table is about the records that all were tested on, the "
            "second one about each run's own.",
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
    if results["lacking"]:
        left = (f"{run} ({', '.join(names)})" for run, names in results["lacking"].items())
        lines += ["", f"Probed as in the table, but with other probes still to be made: {', '.join(left)}."]
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
