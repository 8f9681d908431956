"""Runs of a sweep as arrays of SLURM jobs: one array for the runs that may begin, one more for each wave of runs that
begin with those of the wave before, and a job that makes the tables.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.sweep_entry import SLURM
from ecg_jax.sweep_file import Run
from ecg_jax.sweep_folder import may_begin
from ecg_jax.sweep_launch import COMMAND, TRY_AGAIN

COLLECT_SCRIPT = "collect.sbatch"
#: Which run each task of each array works on, in the folder of what SLURM jobs print.
_SUBMITTED = "submitted.json"

_ARRAY = """\
#!/bin/bash
# One task for each run of a sweep. Written by `ecg-jax sweep --launcher=slurm`, which writes it anew.
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
# 120 s before the time limit, to this shell, which passes it on as SIGTERM: the run saves and stops.
#SBATCH --signal=B:USR1@120
{options}
MAX_RESTARTS=${{MAX_RESTARTS:-20}} # requeues of a task, for whatever reason

cd {folder} || exit 2
ecg_jax=({command})
runs=(
{runs}
)
run=${{runs[$SLURM_ARRAY_TASK_ID]}}
time_limit='' cancelled=''
"${{ecg_jax[@]}}" {arguments} --only="$run" --launcher=local --no-tables &
child=$!
trap 'time_limit=1; kill -TERM $child' USR1
trap 'cancelled=1; kill -TERM $child' TERM # scancel, or SLURM makes room for others and requeues by itself
while kill -0 $child 2>/dev/null; do wait $child || true; done # a signal interrupts wait
code=0
wait $child || code=$?

# Running it again helps after exit code {again}, after a signal, and at the time limit; not after a mistake (2).
if [[ -n $cancelled || -z ${{SLURM_JOB_ID:-}} ]]; then
    exit "$code"
fi
if [[ $code == {again} || ( $code -gt 128 && $code != 130 ) || ( $code == 0 && -n $time_limit ) ]]; then
    if ((${{SLURM_RESTART_COUNT:-0}} < MAX_RESTARTS)); then
        echo "$run: exit code $code${{time_limit:+ at the time limit}}, requeued" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "$run: exit code $code after $MAX_RESTARTS restarts; submit the sweep again to continue" >&2
    fi
fi
exit "$code"
"""

_COLLECT = """\
#!/bin/bash
# The tables of a sweep, when its runs are through. Written by `ecg-jax sweep --launcher=slurm`.
#SBATCH --job-name={name}
#SBATCH --output={log}
{options}
cd {folder} || exit 2
{command} {arguments} --collect
"""


def check_slurm_options(text: str) -> list[str]:
    """The options of --slurm="..." one by one.

    Raises:
        UserError: quotes that do not close, a word that is no long option with its value, or an option that the
            launcher sets.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--slurm={text!r}: {error}") from error
    for option in options:
        name = option.partition("=")[0]
        if not option.startswith("--") or "\n" in option:
            raise UserError(
                f"--slurm: {option!r} is not of the form --option=value; write e.g. "
                "--slurm='--partition=gpu --time=24:00:00'"
            )
        if name in ("--array", "--dependency", "--parsable", "--output", "--wrap"):
            raise UserError(f"--slurm: {name} is set by the launcher; leave it out")
        if name == "--nodes" or name.startswith("--ntasks"):
            raise UserError(
                f"--slurm: {name} does not fit: each run of a sweep is one process on one node, which uses all GPUs "
                "that --gpus gives it; leave it out"
            )
    return options


def array_script(
    runs: Sequence[Run],
    output: Path,
    arguments: Sequence[str],
    options: Sequence[str],
    jobs: int | None,
    command: Sequence[str] = COMMAND,
) -> str:
    """The sbatch file whose array task i works on `runs[i]`.

    A task is requeued when running it again helps: after exit code 75, after a signal, and at the time limit, 120 s
    before which the run saves.

    Args:
        runs: what is not finished.
        output: folder of the sweep.
        arguments: of `ecg-jax` for each task, without --only.
        options: of sbatch.
        jobs: how many tasks run at a time; None for no limit.
        command: what runs `ecg-jax`.
    """
    return _ARRAY.format(
        name=_job_name(output),
        array=f"0-{len(runs) - 1}" + (f"%{jobs}" if jobs else ""),
        log=_sbatch_word(output.absolute() / SLURM / "%A_%a.out"),
        options=_directives(options),
        folder=shlex.quote(os.getcwd()),
        command=shlex.join(command),
        runs="\n".join(f"    {run.name}" for run in runs),
        arguments=shlex.join(arguments),
        again=TRY_AGAIN,
    )


def collect_script(output: Path, arguments: Sequence[str], options: Sequence[str]) -> str:
    """The sbatch file that makes the tables; arguments as in `array_script`."""
    return _COLLECT.format(
        name=f"{_job_name(output)}-collect",
        log=_sbatch_word(output.absolute() / SLURM / "%j.out"),
        options=_directives(options),
        folder=shlex.quote(os.getcwd()),
        command=shlex.join(COMMAND),
        arguments=shlex.join(arguments),
    )


class Wave(NamedTuple):
    """Runs that may begin at one time, as one array.

    Attributes:
        runs: in the order of its tasks.
        after: names of the runs that must have succeeded before.
    """

    runs: list[Run]
    after: list[str]


def waves(runs: Sequence[Run], output: Path, queued: Sequence[str]) -> list[Wave]:
    """Runs by when they may begin, each run's first one an earlier wave's.

    Args:
        runs: to be submitted, in the order of the sweep.
        output: folder of the sweep.
        queued: names of runs that are in the queue already, for which runs may wait too.
    """
    numbers = dict.fromkeys(queued, 0)
    for run in runs:
        numbers[run.name] = 0 if may_begin(output, run) else 1 + numbers[run.init.name]
    found = []
    for number in sorted({numbers[run.name] for run in runs}):
        of_wave = [run for run in runs if numbers[run.name] == number]
        found.append(Wave(of_wave, list(dict.fromkeys(run.init.name for run in of_wave)) if number else []))
    return found


def script_of(wave: int) -> str:
    """Name of the sbatch file of a wave, counted from 0."""
    return f"sweep.{wave + 1}.sbatch" if wave else "sweep.sbatch"


def dependency(wave: Wave, tasks: dict[str, str]) -> list[str]:
    """Options of sbatch for a wave; one whose first runs failed leaves the queue.

    Args:
        wave: to be submitted.
        tasks: name of a run -> ARRAY_TASK of it.
    """
    if not wave.after:
        return []
    return [
        f"--dependency=afterok:{':'.join(tasks[name] for name in wave.after)}",
        "--kill-on-invalid-dep=yes",
    ]


def submit(
    submitted: Sequence[Wave],
    output: Path,
    arguments: Sequence[str],
    options: Sequence[str],
    jobs: int | None,
    queued: dict[str, dict[str, str]],
    last: Sequence[str] = (),
) -> tuple[list[str], str]:
    """Writes all sbatch files into the sweep's folder and submits them, the last to begin when the others have ended.

    Args:
        submitted: from `waves`.
        output, arguments, options, jobs: see `array_script`.
        queued: what `still_queued` said.
        last: more arguments of `ecg-jax` for the job that collects.

    Returns:
        The ids of the arrays and of the job that collects.

    Raises:
        UserError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch in PATH; run this on a host that submits to SLURM, or add --dry-run to see the script"
        )
    (output / SLURM).mkdir(exist_ok=True)
    names, arrays = dict(queued), []
    try:
        for number, wave in enumerate(submitted):
            script = output / script_of(number)
            write_atomic(script, array_script(wave.runs, output, arguments, options, jobs).encode())
            arrays.append(_sbatch(script, *dependency(wave, tasks_of(names))))
            names[arrays[-1]] = {str(task): run.name for task, run in enumerate(wave.runs)}
            write_atomic(output / SLURM / _SUBMITTED, (json.dumps(names, indent=1) + "\n").encode())
        write_atomic(output / COLLECT_SCRIPT, collect_script(output, [*arguments, *last], options).encode())
        return arrays, _sbatch(output / COLLECT_SCRIPT, f"--dependency=afterany:{':'.join(arrays)}")
    except UserError as error:
        if not arrays:
            raise
        raise UserError(
            f"submitted as job {' and '.join(arrays)}, but not what comes after: {error}; submit the sweep again for "
            "the rest, and --collect when all is through"
        ) from error


def tasks_of(queued: dict[str, dict[str, str]]) -> dict[str, str]:
    """Name of a run -> ARRAY_TASK of it, from array -> task -> name."""
    return {name: f"{array}_{task}" for array, names in queued.items() for task, name in names.items()}


def still_queued(output: Path) -> dict[str, dict[str, str]]:
    """Array -> task -> run, of what was submitted for this folder and is in SLURM's queue, waiting or running.

    Raises:
        UserError: SLURM does not say, or the list of what was submitted is damaged.
    """
    path = output / SLURM / _SUBMITTED
    try:
        submitted = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; remove it when no job of this sweep is in the queue") from error
    found = {}
    for array, names in submitted.items():
        there = _tasks_in_queue(array)
        if left := {task: name for task, name in names.items() if task in there}:
            found[array] = left
    return found


def _tasks_in_queue(array: str) -> list[str]:
    try:
        done = subprocess.run(
            ["squeue", "--array", "--noheader", "--format=%K", f"--jobs={array}"],
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise UserError(
            f"runs of this sweep were submitted as the array {array}, and squeue cannot be asked whether they still "
            f"wait: {error.strerror}; run this on a host that submits to SLURM"
        ) from error
    if done.returncode and "Invalid job id" not in done.stderr:  # SLURM forgets jobs that ended
        raise UserError(f"squeue failed with exit code {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def _sbatch(script: Path, *options: str) -> str:
    """Submits a file; the id of the job."""
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    job = done.stdout.strip().partition(";")[0]  # "id;cluster" where there are several clusters
    if done.returncode or not job:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"sbatch {script} failed with exit code {done.returncode}: {said}")
    return job


def _directives(options: Sequence[str]) -> str:
    return "\n".join(f"#SBATCH {_sbatch_word(option)}" for option in options)


def _sbatch_word(word: object) -> str:
    """As a word of an #SBATCH line, which knows quotes."""
    text = str(word)
    return f'"{text}"' if any(c.isspace() for c in text) else text


def _job_name(output: Path) -> str:
    return f"ecg-jax-{output.absolute().name}".replace(" ", "_")
