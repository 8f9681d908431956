"""What `ecg-jax sweep` says of a sweep on the terminal: how far its runs and studies are, and its tables."""

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from ecg_jax.studies import comparison_tables
from ecg_jax.sweep_file import Run, Sweep
from ecg_jax.sweep_folder import state_of
from ecg_jax.sweep_studies import study_states
from ecg_jax.sweep_table import collect, loss_table


def describe(runs: Sequence[Run], output: Path | None) -> str:
    """One line for each run: name, group, state, config, what it begins with and how it is probed beside; and those
    that failed or died with their last error.
    """
    states = {run.name: state_of(output, run) for run in runs} if output else {}
    rows = [(run.name, run.group, str(states[run.name]) if output else "", _declared(run)) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True) if w] + [row[3]])
        for row in rows
    ]
    errors = [f"{name}: {state.error}" for name, state in states.items() if state.error]
    return "\n".join([*lines, *(["", "last errors:", *errors] if errors else [])])


def _declared(run: Run) -> str:
    more = [f"init: {run.init.name}"] if run.init else []
    more += [f"probes: {', '.join(probe.name for probe in run.further)}"] if run.further else []
    return run.declared + (f"  ({'; '.join(more)})" if more else "")


def describe_studies(sweep: Sweep, output: Path | None) -> str:
    """How far the studies of a sweep are, "" where it has none."""
    if output is None:
        names = ", ".join(study.name for study in sweep.studies(Path("OUTPUT")))
        return f"\nstudies: {names}" if names else ""
    lines = [
        f"study {state.name}: {state.kind}{f': {state.error}' if state.error else ''}"
        for state in study_states(sweep, output)
    ]
    return "\n".join(["", *lines]) if lines else ""


def print_tables(sweep: Sweep, output: Path, results: dict[str, Any]) -> None:
    """Prints the table of groups, or of losses, and where it was written."""
    if results:
        print("\n" + "\n".join(comparison_tables.group_table(results)))
        if results["note"]:
            print(f"\n{results['note']}")
        print(f"\nwritten to {output}: results.md, results.csv, results.json, results.png, results_table.*")
    elif not sweep.probes and (lines := loss_table(collect(sweep, output))):
        print("\n" + "\n".join(lines))
        print(f"\nwritten to {output}: results.md, results_table.parquet, results_table.csv")


def runs_text(names: Sized) -> str:
    """ "1 run", "2 runs"."""
    return f"{len(names)} runs" if len(names) > 1 else "1 run"
