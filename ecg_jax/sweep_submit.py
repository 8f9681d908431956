"""`ecg-jax sweep --launcher=slurm` and `--dry-run`: which runs would be started, and how."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ecg_jax.sweep_declaration import check_folder, declare
from ecg_jax.sweep_file import Run, Sweep
from ecg_jax.sweep_folder import RUNNING, may_begin, state_of
from ecg_jax.sweep_listing import describe, describe_studies, runs_text
from ecg_jax.sweep_probes import is_done
from ecg_jax.sweep_slurm import (
    COLLECT_SCRIPT,
    array_script,
    check_slurm_options,
    collect_script,
    dependency,
    script_of,
    still_queued,
    submit,
    tasks_of,
    waves,
)
from ecg_jax.sweep_stores import StoreChoice, check_choice, check_stores


def arguments_of(sweep: Sweep, output: Path, choice: StoreChoice) -> list[str]:
    """Of `ecg-jax` for another process that works on this sweep."""
    arguments = ["sweep", sweep.path, f"--output={output}"]
    arguments += [f"--store={choice.store}"] if choice.store else []
    return arguments + ([f"--probe-store={choice.probe_store}"] if choice.probe_store else [])


def launch(
    sweep: Sweep,
    output: Path,
    choice: StoreChoice,
    chosen: Sequence[Run],
    *,
    slurm: bool,
    options: str,
    jobs: int | None,
    dry_run: bool,
    studies: bool,
) -> None:
    """Submits the runs that are neither finished, nor being worked on, nor waiting in SLURM's queue; or says how.

    A run that begins with another is submitted with it, or after it is in the queue.

    Args:
        sweep: from `load_sweep`.
        output: its folder.
        choice: of stores.
        chosen: the runs asked for.
        slurm: as arrays of SLURM jobs; else on this host, which this function only tells about.
        options: of sbatch, in one string.
        jobs: at a time, None for no limit.
        dry_run: tells what would be done, and writes nothing.
        studies: whether the studies follow the runs.

    Raises:
        UserError: the folder, a store or SLURM refuse.
    """
    of_sbatch = check_slurm_options(options)
    check_choice(choice, sweep.runs)
    check_folder(sweep, output)
    check_stores(choice, chosen, output)
    states = {run.name: state_of(output, run) for run in chosen}
    done = [run for run in chosen if is_done(run, choice, output)]
    working = [run for run in chosen if states[run.name].kind == RUNNING]
    runs = [run for run in chosen if run not in done and run not in working]
    queued = still_queued(output) if slurm else {}
    names = list(tasks_of(queued))
    in_queue, runs = (
        [run for run in runs if run.name in names],
        [run for run in runs if run.name not in names],
    )
    if in_queue:
        print(
            f"{runs_text(in_queue)} already in the queue, of the array {' and '.join(queued)}: "
            + ", ".join(run.name for run in in_queue)
        )
    left_out = []
    for run in list(runs):
        if not may_begin(output, run) and run.init.name not in (*names, *(each.name for each in runs)):
            runs.remove(run)
            left_out.append(run)
    arguments = arguments_of(sweep, output, choice)
    last = [] if studies else ["--no-studies"]
    if dry_run:
        print(describe(chosen, output))
        if text := describe_studies(sweep, output):
            print(text)
    for run in left_out:
        print(
            f"{run.name} waits for {run.init.name}, which is {state_of(output, run.init)} and not among these"
        )
    submitted = waves(runs, output, names)
    if not runs:
        print(
            f"nothing to run: of {len(chosen)} runs {len(done)} are finished and {len(working)} being worked on, and "
            f"{len(in_queue)} wait in the queue"
        )
    elif not slurm:
        for wave in submitted:
            print(f"\n# when {', '.join(wave.after)} are finished" if wave.after else "")
            for run in wave.runs:
                print(shlex.join(["ecg-jax", *arguments, f"--only={run.name}"]))
    elif dry_run:
        tasks = tasks_of(queued)
        for number, wave in enumerate(submitted):
            tasks |= {run.name: f"ARRAY{number + 1}_{task}" for task, run in enumerate(wave.runs)}
            words = ["sbatch", "--parsable", *dependency(wave, tasks), str(output / script_of(number))]
            print(f"\n# {' '.join(words)}")
            print(array_script(wave.runs, output, arguments, of_sbatch, jobs))
        arrays = ":".join(f"ARRAY{number + 1}" for number in range(len(submitted)))
        print(f"# sbatch --parsable --dependency=afterany:{arrays} {output / COLLECT_SCRIPT}")
        print(collect_script(output, [*arguments, *last], of_sbatch), end="")
    else:
        declare(sweep, output)
        arrays, collecting = submit(submitted, output, arguments, of_sbatch, jobs, queued, last)
        which = f"array {arrays[0]}" if len(arrays) == 1 else f"arrays {', '.join(arrays)}"
        print(
            f"submitted {runs_text(runs)} as the {which}, and job {collecting}, which then makes the tables"
            + (" and studies" if studies and sweep.studies(output) else "")
        )
