"""`ecg-jax tasks [STORE...]`: the tasks there are, and what of each a store holds."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks
from ecg_jax.evaluation.examples import choose_examples
from ecg_jax.evaluation.targets import known_value_sets

DESCRIPTION = """\
Prints the 26 tasks of the study on 10 datasets and those beside them; of each STORE also how many recordings and
classes each of its tasks has, or why it has none.
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _split(task: tasks.Task) -> str:
    """How a task is split, in a few words."""
    unknown = task.corpus in tasks.WITHOUT_PATIENTS
    if task.split == "corpus_folds":
        text = "the corpus' folds"
        if task.held_out is not None:
            text += f", {task.held_out[0]} and {task.held_out[1]} held out"
        return f"{text}; by recording, patients unknown" if unknown else text
    by = "labels" if task.stratify_by is None else f"labels of set {task.stratify_by}"
    by += ", age and sex" if task.age_bins else ""
    return f"stratified by {by}; {'by recording, patients unknown' if unknown else 'whole patients'}"


def catalogue() -> list[str]:
    """One line for each task."""
    rows = [
        (
            task.name,
            task.group,
            task.corpus + (f", dataset {task.dataset}" if task.dataset else ""),
            f"{task.label_set} ({task.source})",
            task.kind,
            task.metric,
            _split(task),
        )
        for task in tasks.TASKS.values()
    ]
    return _table(("task", "group", "corpus of the store", "label set", "kind", "metric", "split"), rows)


def in_store(store: Store, window_s: float, min_count: int) -> list[str]:
    """What of each task a store holds, one line each."""
    rows, refused = [], []
    for task in tasks.fitting(store.corpus, list(store.classes), known_value_sets(store)):
        try:
            examples = choose_examples(task, store, None, round(window_s * store.rate_hz), min_count)
        except tasks.TaskUnavailable as error:
            refused.append(f"  {task.name}: {error}")
            continue
        sizes = [str(len(part.rows)) for part in (examples.train, examples.val, examples.test)]
        rows.append((task.name, *sizes, str(len(examples.classes)), str(examples.n_dropped)))
    lines = [f"{store.path}: {len(store)} records of {store.corpus}"]
    if rows:
        header = ("task", "train", "validation", "test", "classes", "dropped")
        lines += ["  " + line for line in _table(header, rows)]
    if refused:
        lines += ["not possible with it:", *refused]
    if not rows and not refused:
        lines.append("  no task is known for this corpus and its labels")
    return lines


def main(argv: list[str]) -> int:
    """`ecg-jax tasks`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax tasks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stores", nargs="*", type=Path, metavar="STORE", help="labelled stores")
    parser.add_argument(
        "--window", type=float, default=2.5, metavar="S", help="shortest usable recording (default: 2.5 s)"
    )
    parser.add_argument(
        "--min-count",
        type=int,
        default=0,
        metavar="N",
        help="positive recordings below which a class is dropped (default: the task's own number; "
        "1 keeps every class that can be trained)",
    )
    options = parser.parse_args(argv)
    # NaN compares false.
    if not 0 < options.window < math.inf or options.min_count < 0:
        raise UserError("--window must be a number above 0 and --min-count at least 0.")
    lines = [] if options.stores else catalogue()
    for path in options.stores:
        lines += in_store(Store(path), options.window, options.min_count)
    print("\n".join(lines))
    return 0
