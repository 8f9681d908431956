"""`ecg-jax sweep`: many runs, each pretrained and probed, on this host or a SLURM cluster, and tables of all."""

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import jax

from ecg_jax.errors import Stopped, UserError
from ecg_jax.studies import comparison_tables
from ecg_jax.sweep_file import Run, Sweep, load_sweep, select
from ecg_jax.sweep_folder import (
    FAILED,
    FINISHED,
    RUNNING,
    Busy,
    State,
    check_folder,
    declare,
    is_finished,
    reason,
    state_of,
)
from ecg_jax.sweep_launch import (
    ARRAY_SCRIPT,
    COLLECT_SCRIPT,
    TRY_AGAIN,
    array_script,
    check_slurm_options,
    collect_script,
    run_jobs,
    still_queued,
    submit,
)
from ecg_jax.sweep_results import write_tables
from ecg_jax.sweep_run import StoreChoice, check_stores, prepare_sample, pretrain_and_probe
from ecg_jax.sweep_table import collect, loss_table

DESCRIPTION = """\
Pretrains and probes every run of a sweep file and writes tables of them: macro AUROC of each group of seeds with an
interval over test patients and seeds, beside random initialisation and the majority guess; and one row for each run
with its settings and results. Run the same command again after an interruption: finished runs are skipped, the
interrupted ones go on. A run that fails is reported, and the others go on. Several processes may work in one DIR, on
one host or many: each takes runs that no other works on. Runs take turns in this process, unless --jobs is given; one
that hangs ends it with 75.

  ecg-jax sweep configs/sweeps/objectives_quick.py --output=runs/objectives_quick
  ecg-jax sweep configs/sweeps/learning_rate.py:quick --output=runs/lr --launcher=slurm --jobs=4 \\
      --slurm='--partition=gpu --gpus=1 --time=24:00:00' --dry-run

Writes into DIR: NAME/run, NAME/probe and NAME/status.json of each run; results.json, results.csv, results.md and
results.png; results_table.parquet and results_table.csv. Exit code 0: every run asked for is finished, or submitted;
or SIGTERM stopped it, and the same command goes on; 2: some failed, or files are damaged; 75: none failed, but some
ended themselves or other processes still work on them: run the same command again; 130: Ctrl-C, the same.
"""


def run_sweep(
    sweep: Sweep,
    output: str | Path,
    store: str | None = None,
    only: str | None = None,
    probe_store: str | None = None,
    *,
    jobs: int = 1,
    tables: bool = True,
) -> dict[str, Any]:
    """Runs what is not finished yet, and writes the tables after each run.

    Args:
        sweep: from `load_sweep`.
        output: folder of the sweep, made if needed.
        store: that runs are pretrained on, one folder or several separated by commas; None: runs that name none use
            the PTB-XL sample that ships with the package.
        only: names of runs or groups, separated by commas; None for all.
        probe_store: the labelled store of the probes; None: the one that a run is pretrained on.
        jobs: 1: one run after another, in this process; else so many at a time, each in a process of its own.
        tables: False: leaves them to somebody else.

    Returns:
        What results.json holds, see `studies.comparison.compare` ({} while no probe is finished); "failed", run ->
        reason; "damaged", run -> what cannot be read; "busy", names of runs that other processes work on; "again",
        names of other runs that are not finished: their processes ended themselves, or were asked to.

    Raises:
        UserError: the folder or a store does not fit. A run that fails, or is damaged, does not raise.
        Stopped, KeyboardInterrupt: asked to stop; the same call goes on from there.
    """
    output, choice = Path(output), StoreChoice(store and str(store), probe_store and str(probe_store))
    chosen = select(sweep, only)
    check_folder(sweep, output)
    check_stores(choice, chosen, output)  # before anything is written
    declare(sweep, output)
    if prepare_sample(choice, chosen, output):
        check_stores(choice, chosen, output)
    waiting = [run for run in chosen if not is_finished(output, run)]
    if len(waiting) < len(chosen):
        print(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are finished already")

    def write_meanwhile() -> None:
        """Tables of what there is; whatever goes wrong, the runs go on."""
        if not tables:
            return
        try:
            write_tables(sweep, output, wait=False)
        except Busy:  # its holder, or whoever ends last, writes what this one would have
            pass
        except Exception as error:
            print(f"no tables now: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    if jobs > 1:
        write_meanwhile()
        failed = run_jobs(
            waiting, output, [*_arguments(sweep, output, choice), "--no-tables"], jobs, write_meanwhile
        )
    else:
        failed = _in_turn(waiting, output, choice, write_meanwhile)
    # Another process may have finished meanwhile what failed here, or be at it.
    left = [run for run in waiting if not is_finished(output, run)]
    busy = [run.name for run in left if state_of(output, run).kind == RUNNING]
    left = [run.name for run in left if run.name not in busy]
    results, damaged = write_tables(sweep, output) if tables else ({}, {})
    return results | {
        "failed": {name: failed[name] for name in left if name in failed},
        "damaged": {run.name: damaged[run.name] for run in chosen if run.name in damaged},
        "busy": busy,
        "again": [name for name in left if name not in failed],
    }


def _in_turn(
    runs: Sequence[Run], output: Path, choice: StoreChoice, before: Callable[[], None]
) -> dict[str, str]:
    """Works on runs in this process, one after another; on those that another process held, again when it has died.

    Args:
        before: called before each run.

    Returns:
        Run -> why it failed, here or in the process that held it.
    """
    failed: dict[str, str] = {}
    waiting = list(runs)
    while waiting:
        busy = []
        for number, run in enumerate(waiting, start=1):
            before()
            print(f"\n[{number}/{len(waiting)}] {run.name}: {run.declared}", flush=True)
            try:
                pretrain_and_probe(run, choice, output)
            except Stopped:
                raise
            except Busy as error:
                busy.append(run)
                print(error, file=sys.stderr, flush=True)
                continue
            except Exception as error:  # whatever it is, the other runs go on
                failed[run.name] = reason(error, output / run.name)
                print(f"{run.name} failed: {failed[run.name]}", file=sys.stderr, flush=True)
            jax.clear_caches()  # programs of a run that is over
        waiting = []
        for run in busy:
            state = state_of(output, run)
            if state.kind == FAILED:
                failed[run.name] = state.error
            elif state.kind not in (FINISHED, RUNNING):
                waiting.append(run)
    return failed


def _arguments(sweep: Sweep, output: Path, choice: StoreChoice) -> list[str]:
    """Of `ecg-jax` for another process that works on this sweep."""
    arguments = ["sweep", sweep.path, f"--output={output}"]
    arguments += [f"--store={choice.store}"] if choice.store else []
    return arguments + ([f"--probe-store={choice.probe_store}"] if choice.probe_store else [])


def describe(runs: Sequence[Run], output: Path | None) -> str:
    """One line for each run: name, group, state, config; and those that failed or died with their last error."""
    states = {run.name: state_of(output, run) for run in runs} if output else {}
    rows = [(run.name, run.group, str(states[run.name]) if output else "", run.declared) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True) if w] + [row[3]])
        for row in rows
    ]
    errors = [f"{name}: {state.error}" for name, state in states.items() if state.error]
    return "\n".join([*lines, *(["", "last errors:", *errors] if errors else [])])


def _launch(
    sweep: Sweep, output: Path, choice: StoreChoice, chosen: Sequence[Run], options: argparse.Namespace
) -> None:
    """Submits the runs that are neither finished, nor being worked on, nor waiting in SLURM's queue; or says how."""
    slurm = check_slurm_options(options.slurm or "")
    check_folder(sweep, output)
    check_stores(choice, chosen, output)
    states = {run.name: state_of(output, run) for run in chosen}
    runs = [run for run in chosen if states[run.name].kind not in (FINISHED, RUNNING)]
    queued = still_queued(output) if options.launcher == "slurm" else {}
    names = {name for of_array in queued.values() for name in of_array.values()}
    waiting, runs = [run for run in runs if run.name in names], [run for run in runs if run.name not in names]
    if waiting:
        print(
            f"{_runs(waiting)} already in the queue, of the array {' and '.join(queued)}: "
            + ", ".join(run.name for run in waiting)
        )
    arguments = _arguments(sweep, output, choice)
    if options.dry_run:
        print(describe(chosen, output))
    if not runs:
        print(
            f"nothing to run: of {len(chosen)} runs {_count(states, FINISHED)} are finished and "
            f"{_count(states, RUNNING)} being worked on, and {len(waiting)} wait in the queue"
        )
    elif options.launcher == "local":
        print("\n" + "\n".join(shlex.join(["ecg-jax", *arguments, f"--only={run.name}"]) for run in runs))
    elif options.dry_run:
        print(f"\n# sbatch --parsable {output / ARRAY_SCRIPT}")
        print(array_script(runs, output, arguments, slurm, options.jobs))
        print(f"# sbatch --parsable --dependency=afterany:ARRAY {output / COLLECT_SCRIPT}")
        print(collect_script(output, arguments, slurm), end="")
    else:
        declare(sweep, output)
        array, last = submit(runs, output, arguments, slurm, options.jobs, queued)
        print(f"submitted {_runs(runs)} as the array {array}, and job {last}, which then makes the tables")


def _count(states: dict[str, State], kind: str) -> int:
    return sum(state.kind == kind for state in states.values())


def _conclude(sweep: Sweep, output: Path, results: dict[str, Any]) -> int:
    """Prints the tables and what is not finished; the exit code.

    Raises:
        UserError: runs failed or are damaged.
    """
    failed, damaged, busy, again = (results.pop(name) for name in ("failed", "damaged", "busy", "again"))
    _print_tables(sweep, output, results)
    if busy:
        print(f"other processes are working on {', '.join(busy)}", file=sys.stderr)
    if again:
        print(f"not finished: {', '.join(again)}", file=sys.stderr)
    if damaged := {name: what for name, what in damaged.items() if name not in failed}:
        print("\n".join(f"{name}: {what}" for name, what in damaged.items()), file=sys.stderr)
    if wrong := [
        f"{_runs(names)} {what}, see above: {', '.join(names)}"
        for what, names in (("failed", failed), ("damaged", damaged))
        if names
    ]:
        raise UserError("; ".join(wrong))
    if busy or again:
        print("run the same command again to finish them, or to see that they are", file=sys.stderr)
        return TRY_AGAIN
    return 0


def _runs(names: Sized) -> str:
    return f"{len(names)} runs" if len(names) > 1 else "1 run"


def _print_tables(sweep: Sweep, output: Path, results: dict[str, Any]) -> None:
    if results:
        print("\n" + "\n".join(comparison_tables.group_table(results)))
        if results["note"]:
            print(f"\n{results['note']}")
        print(f"\nwritten to {output}: results.md, results.csv, results.json, results.png, results_table.*")
    elif not sweep.probes and (lines := loss_table(collect(sweep, output))):
        print("\n" + "\n".join(lines))
        print(f"\nwritten to {output}: results.md, results_table.parquet, results_table.csv")


class _Terminated(BaseException):
    """SIGTERM came while nothing was there that could save first."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does, with the status of its run written; pretraining saves first."""

    def end(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise Stopped("SIGTERM: run the same command again to continue", exit_code=0) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ecg-jax sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "sweep", metavar="SWEEP.py[:ARGS]", help="sweep file, e.g. configs/sweeps/data_ladder.py:ladder=paper"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all runs and of the tables")
    parser.add_argument(
        "--store",
        help="store that runs are pretrained on, or several separated by commas (default: the PTB-XL sample that "
        "ships with the package, unless the sweep asks for one)",
    )
    parser.add_argument(
        "--probe-store", metavar="STORE", help="labelled store of the probes (default: the one of --store)"
    )
    parser.add_argument("--only", metavar="NAME,...", help="only these runs or groups")
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="on this host, now (default); or as an array of SLURM jobs, one for each unfinished run",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: 1 on this host, no limit of SLURM's array); on this host each in a process of "
        "its own, with its share of the GPUs",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="of sbatch, for each run, which is one process on one node: --slurm='--partition=gpu --gpus=1'",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="prints what would be run or submitted, and writes nothing"
    )
    what.add_argument(
        "--list", action="store_true", help="shows the runs, how far they are and their last errors"
    )
    what.add_argument(
        "--collect", action="store_true", help="makes the tables of what there is, and runs nothing"
    )
    what.add_argument("--no-tables", action="store_true", help="runs, and leaves the tables to --collect")
    return parser


def main(argv: list[str]) -> int:
    """`ecg-jax sweep`."""
    options = _parser().parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs={options.jobs} must be at least 1")
    if options.slurm is not None and options.launcher != "slurm":
        raise UserError("--slurm goes with --launcher=slurm")
    idle = options.list or options.dry_run or options.collect or options.launcher == "slurm"
    if idle or (options.jobs or 1) > 1:
        # This process only reads configs and tables: the GPUs, and their memory, are for those that it starts.
        jax.config.update("jax_platforms", "cpu")
    sweep = load_sweep(options.sweep)
    chosen = select(sweep, options.only)
    if options.list:
        print(describe(chosen, options.output))
        return 0
    if options.output is None:
        raise UserError("give the folder of the sweep: --output=DIR")
    choice = StoreChoice(options.store, options.probe_store)
    if options.collect:
        if not options.output.is_dir():
            raise UserError(f"there is no folder {options.output}; --collect reads what a sweep wrote")
        check_folder(sweep, options.output)
        print(describe(chosen, options.output))
        results, damaged = write_tables(sweep, options.output)
        _print_tables(sweep, options.output, results)
        if damaged:
            print("\n".join(["", "damaged:", *(f"{name}: {what}" for name, what in damaged.items())]))
        return 0
    if options.dry_run or options.launcher == "slurm":
        _launch(sweep, options.output, choice, chosen, options)
        return 0
    with _terminating():
        results = run_sweep(
            sweep,
            options.output,
            options.store,
            options.only,
            options.probe_store,
            jobs=options.jobs or 1,
            tables=not options.no_tables,
        )
        return _conclude(sweep, options.output, results)
