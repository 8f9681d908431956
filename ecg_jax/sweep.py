"""`ecg-jax sweep`: many runs, each pretrained and probed, on this host or a SLURM cluster, and tables of all."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ecg_jax.errors import Stopped, UserError
from ecg_jax.sweep_declaration import check_folder, declare
from ecg_jax.sweep_file import Run, Sweep, load_sweep, select
from ecg_jax.sweep_folder import (
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    is_pretrained,
    may_begin,
    reason,
    state_of,
)
from ecg_jax.sweep_launch import TRY_AGAIN, run_jobs
from ecg_jax.sweep_listing import describe, describe_studies, print_tables, runs_text
from ecg_jax.sweep_locks import Busy
from ecg_jax.sweep_probes import is_done
from ecg_jax.sweep_results import write_tables
from ecg_jax.sweep_run import pretrain_and_probe
from ecg_jax.sweep_stores import StoreChoice, check_choice, check_folders, check_stores, make_stores
from ecg_jax.sweep_studies import all_finished, make_studies
from ecg_jax.sweep_submit import arguments_of, launch

DESCRIPTION = """\
Pretrains and probes every run of a sweep file and writes tables of them: macro AUROC of each group of seeds with an
interval over test patients and seeds, beside random initialisation and the majority guess; and one row for each run
with its settings and results. Run the same command again after an interruption: finished runs are skipped, the
interrupted ones go on. A run that fails is reported, and the others go on. Several processes may work in one DIR, on
one host or many: each takes runs that no other works on. Runs take turns in this process, unless --jobs is given; one
that hangs ends it with 75. A run that begins with another waits until that one is pretrained. Studies that the file
names follow when every run is finished.

  ecg-jax sweep configs/sweeps/objectives_quick.py --output=runs/objectives_quick
  ecg-jax sweep configs/sweeps/learning_rate.py:quick --output=runs/lr --launcher=slurm --jobs=4 \\
      --slurm='--partition=gpu --gpus=1 --time=24:00:00' --dry-run

Writes into DIR: NAME/run, NAME/probe, NAME/probes/... and NAME/status.json of each run; results.json, results.csv,
results.md and results.png; results_table.parquet and results_table.csv; studies/...; stores that the sweep makes. Exit
code 0: every run asked for is finished, or submitted; or SIGTERM stopped it, and the same command goes on; 2: some
failed, or a study did, or files are damaged; 75: none failed, but some ended themselves or other processes still work
on them: run the same command again; 130: Ctrl-C, the same.
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
            the PTB-XL sample that ships with the package. Runs may name their own.
        only: names of runs or groups, separated by commas; None for all.
        probe_store: the labelled store of the probes; None: the one that a run is pretrained on. Of several separated
            by commas the first is that of the tables, and further probes take those that their tasks fit.
        jobs: 1: one run after another, in this process; else so many at a time, each in a process of its own.
        tables: False: leaves them to somebody else.

    Returns:
        What results.json holds, see `studies.comparison.compare` ({} while no probe is finished); "failed", run ->
        reason; "damaged", run -> what cannot be read; "busy", names of runs that other processes work on; "waits", run
        -> the one that it begins with, which is not pretrained; "blocked", those of them for whose first run nobody is
        at work or was asked to be; "again", names of other runs that are not finished: their processes ended
        themselves, or were asked to.

    Raises:
        UserError: the folder or a store does not fit. A run that fails, or is damaged, does not raise.
        Stopped, KeyboardInterrupt: asked to stop; the same call goes on from there.
    """
    output = Path(output)
    choice = StoreChoice(*(None if given is None else str(given) for given in (store, probe_store)))
    chosen = select(sweep, only)
    check_choice(choice, sweep.runs)
    check_folder(sweep, output)
    check_stores(choice, chosen, output)  # before anything is written
    declare(sweep, output)
    if make_stores(choice, chosen, output):
        check_stores(choice, chosen, output)
    waiting = [run for run in chosen if not is_done(run, choice, output)]
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
            waiting, output, [*arguments_of(sweep, output, choice), "--no-tables"], jobs, write_meanwhile
        )
    else:
        failed = _in_turn(waiting, output, choice, write_meanwhile)
    # Another process may have finished meanwhile what failed here, or be at it.
    left = [run for run in waiting if not is_done(run, choice, output)]
    states = {run.name: state_of(output, run) for run in left}
    busy = [name for name, state in states.items() if state.kind == RUNNING]
    waits = {run.name: run for run in left if states[run.name].kind == WAITING and run.name not in failed}
    rest = [name for name in states if name not in (*busy, *waits)]
    results, damaged = write_tables(sweep, output) if tables else ({}, {})
    asked = {run.name for run in chosen}
    first = {name: _first_missing(output, run) for name, run in waits.items()}
    return results | {
        "failed": {name: failed[name] for name in rest if name in failed},
        "damaged": {run.name: damaged[run.name] for run in chosen if run.name in damaged},
        "busy": busy,
        "waits": {name: run.init.name for name, run in waits.items()},
        "blocked": [
            name
            for name, run in first.items()
            if run.name not in asked and state_of(output, run).kind != RUNNING
        ],
        "again": [name for name in rest if name not in failed],
    }


def _first_missing(output: Path, run: Run) -> Run:
    """The run that must be pretrained first for one that waits."""
    while run.init is not None and not is_pretrained(output, run.init):
        run = run.init
    return run


def _in_turn(
    runs: Sequence[Run], output: Path, choice: StoreChoice, before: Callable[[], None]
) -> dict[str, str]:
    """Works on runs in this process, one after another; on those that another process held, again when it has died.

    Runs that begin with another come after it, and are left out when that one is not pretrained.

    Args:
        before: called before each run.

    Returns:
        Run -> why it failed, here or in the process that held it.
    """
    failed: dict[str, str] = {}
    waiting = list(runs)
    while waiting:
        later = []
        for number, run in enumerate(waiting, start=1):
            before()
            print(f"\n[{number}/{len(waiting)}] {run.name}: {run.declared}", flush=True)
            if not may_begin(output, run):
                later.append(run)
                print(f"{run.name} waits for {run.init.name}", flush=True)
                continue
            try:
                pretrain_and_probe(run, choice, output)
            except Stopped:
                raise
            except Busy as error:
                later.append(run)
                print(error, file=sys.stderr, flush=True)
                continue
            except Exception as error:  # whatever it is, the other runs go on
                failed[run.name] = reason(error, output / run.name)
                print(f"{run.name} failed: {failed[run.name]}", file=sys.stderr, flush=True)
            jax.clear_caches()  # programs of a run that is over
        waiting = []
        for run in later:
            state = state_of(output, run)
            if state.kind == FAILED:
                failed[run.name] = state.error
            elif state.kind == WAITING:
                # The run that it waits for comes earlier: it is taken up again, or nobody does here.
                waiting += [run] * any(other.name == run.init.name for other in waiting)
            elif state.kind not in (FINISHED, RUNNING):
                waiting.append(run)
    return failed


def _conclude(sweep: Sweep, output: Path, results: dict[str, Any], studies: bool, here: bool) -> int:
    """Prints the tables and what is not finished, and makes the studies when all is; the exit code.

    Raises:
        UserError: runs or studies failed, are damaged, or wait for runs that nobody was asked to run.
    """
    failed, damaged, busy, waits, blocked, again = (
        results.pop(name) for name in ("failed", "damaged", "busy", "waits", "blocked", "again")
    )
    print_tables(sweep, output, results)
    if busy:
        print(f"other processes are working on {', '.join(busy)}", file=sys.stderr)
    if again:
        print(f"not finished: {', '.join(again)}", file=sys.stderr)
    for name, other in waits.items():
        print(f"{name} waits for {other}, which is not pretrained", file=sys.stderr)
    if damaged := {name: what for name, what in damaged.items() if name not in failed}:
        print("\n".join(f"{name}: {what}" for name, what in damaged.items()), file=sys.stderr)
    broken = _studies(sweep, output, here) if studies else {}
    if wrong := _wrong(failed, damaged, [] if failed else blocked, broken):
        raise UserError(wrong)
    if busy or again or waits:
        print("run the same command again to finish them, or to see that they are", file=sys.stderr)
        return TRY_AGAIN
    return 0


def _wrong(
    failed: Collection[str] = (),
    damaged: Collection[str] = (),
    blocked: Collection[str] = (),
    broken: Collection[str] = (),
) -> str:
    """What is wrong with runs and studies, which are named above, in one line; "" for nothing."""
    wrong = [
        f"{runs_text(names)} {what}, see above: {', '.join(names)}"
        for what, names in (("failed", failed), ("damaged", damaged))
        if names
    ]
    if blocked:
        wrong.append(f"{', '.join(blocked)} cannot begin before runs that --only leaves out; name those too")
    if broken:
        wrong.append(f"studies failed, see above: {', '.join(broken)}")
    return "; ".join(wrong)


def _studies(sweep: Sweep, output: Path, here: bool) -> dict[str, str]:
    """Makes the studies if every run is finished; study -> why it failed."""
    if not (names := [study.name for study in sweep.studies(output)]):
        return {}
    if not all_finished(sweep, output):
        print(f"studies wait until every run is finished: {', '.join(names)}")
        return {}
    return make_studies(sweep, output, here=here)


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
        "--probe-store",
        metavar="STORE,...",
        help="labelled store of the probes (default: the one of --store); of several the first is that of the tables, "
        "and further probes take all that their tasks fit",
    )
    parser.add_argument("--only", metavar="NAME,...", help="only these runs or groups")
    parser.add_argument(
        "--no-studies", action="store_true", help="leaves out what the file has made of the finished runs"
    )
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
        "--collect",
        action="store_true",
        help="makes the tables of what there is, and the studies if every run is finished; runs nothing",
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
    choice = StoreChoice(options.store, options.probe_store)
    check_choice(choice, sweep.runs)
    if options.list:
        check_folders(choice)
        print(describe(chosen, options.output))
        if text := describe_studies(sweep, options.output):
            print(text)
        return 0
    if options.output is None:
        raise UserError("give the folder of the sweep: --output=DIR")
    studies = not (options.no_studies or options.no_tables)
    if options.collect:
        with _terminating():
            return _collect(sweep, options.output, chosen, studies)
    if options.dry_run or options.launcher == "slurm":
        launch(
            sweep,
            options.output,
            choice,
            chosen,
            slurm=options.launcher == "slurm",
            options=options.slurm or "",
            jobs=options.jobs,
            dry_run=options.dry_run,
            studies=studies,
        )
        return 0
    with _terminating():
        jobs = options.jobs or 1
        results = run_sweep(
            sweep,
            options.output,
            options.store,
            options.only,
            options.probe_store,
            jobs=jobs,
            tables=not options.no_tables,
        )
        return _conclude(sweep, options.output, results, studies, here=jobs == 1)


def _collect(sweep: Sweep, output: Path, chosen: Sequence[Run], studies: bool) -> int:
    """The tables of what there is, and the studies if every run is finished; the exit code."""
    if not output.is_dir():
        raise UserError(f"there is no folder {output}; --collect reads what a sweep wrote")
    check_folder(sweep, output)
    print(describe(chosen, output))
    results, damaged = write_tables(sweep, output)
    print_tables(sweep, output, results)
    if damaged:
        print("\n".join(["", "damaged:", *(f"{name}: {what}" for name, what in damaged.items())]))
    broken = _studies(sweep, output, here=False) if studies else {}
    if wrong := _wrong(damaged=damaged, broken=broken):
        raise UserError(wrong)
    return 0
