"""Runs of a sweep in processes of their own: several at a time on this host, or as an array of SLURM jobs."""

import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.sweep_entry import SLURM
from ecg_jax.sweep_file import Run
from ecg_jax.sweep_folder import state_of

#: Exit code of a run that ended itself and goes on when it is run again (EX_TEMPFAIL).
TRY_AGAIN = 75
#: What a process of a sweep prints, in its run's folder.
OUTPUT_LOG = "output.log"
ARRAY_SCRIPT, COLLECT_SCRIPT = "sweep.sbatch", "collect.sbatch"
#: Which run each task of each array works on, in the folder of what SLURM jobs print.
_SUBMITTED = "submitted.json"

_POLL_S = 0.2

#: `ecg-jax` as this very Python with this very package.
COMMAND = (sys.executable, "-c", "from ecg_jax.cli import entry_point; entry_point()")

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


def run_jobs(
    runs: Sequence[Run],
    output: Path,
    arguments: Sequence[str],
    jobs: int,
    after: Callable[[], object],
) -> dict[str, str]:
    """Runs each of `runs` in a process of its own, `jobs` at a time.

    What a process prints goes to `output.log` in the run's folder. Of several GPUs each process sees its share: those
    of CUDA_VISIBLE_DEVICES, or all of the host. SIGTERM and Ctrl-C are passed on, once; a process whose parent was
    killed finishes its run.

    Args:
        runs: what is not finished.
        output: folder of the sweep.
        arguments: of `ecg-jax` for each of them, without --only.
        jobs: how many at a time, at least 2.
        after: called whenever a run has ended; what it raises ends all of them.

    Returns:
        Run -> why it failed; without those that ended with exit code 75, to be tried again, as do those that another
        process held.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """
    shares = device_shares(jobs)
    free, waiting = list(range(jobs)), list(runs)
    working: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or working:
            while waiting and free:
                run = waiting.pop(0)
                try:
                    child = _start(run, output, arguments, shares[free[0]])
                except OSError as error:
                    failed[run.name] = f"cannot write into {output / run.name}: {error.strerror}"
                    print(f"{run.name} failed: {failed[run.name]}", file=sys.stderr, flush=True)
                    continue
                number = len(runs) - len(waiting)
                print(f"[{number}/{len(runs)}] {run.name}: {run.declared}", flush=True)
                working[free.pop(0)] = run, child
            for place, (run, child) in list(working.items()):
                code = child.poll()
                if code is None:
                    continue
                del working[place]
                free.append(place)
                state = state_of(output, run)
                print(f"{run.name}: {state}{f': {state.error}' if state.error else ''}", flush=True)
                if code != TRY_AGAIN and (code or state.error):
                    log = output / run.name / OUTPUT_LOG
                    failed[run.name] = state.error or f"exit code {code}, see {log}"
                after()
            time.sleep(_POLL_S)
    except BaseException as error:
        # A second Ctrl-C, or an end of this process that is none of the children's: do not leave them behind.
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        for _, child in working.values():
            child.send_signal(number)
        try:
            for _, child in working.values():
                child.wait()
        except BaseException:
            for _, child in working.values():
                child.kill()
            raise
        raise
    return failed


def _start(run: Run, output: Path, arguments: Sequence[str], devices: str | None) -> subprocess.Popen:
    folder = output / run.name
    folder.mkdir(exist_ok=True)
    environment = os.environ | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
    with (folder / OUTPUT_LOG).open("a") as log:
        return subprocess.Popen(
            [*COMMAND, *arguments, f"--only={run.name}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only, which passes it on
        )


def device_shares(jobs: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of several jobs; None on a host without NVIDIA GPUs, or with JAX_PLATFORMS=cpu.

    Raises:
        UserError: there are fewer GPUs than jobs, each of which would take the whole memory of its GPU.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    on_host = glob.glob("/dev/nvidia[0-9]*")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or (named is None and not on_host):
        return [None] * jobs
    devices = [str(i) for i in range(len(on_host))] if named is None else [d for d in named.split(",") if d]
    if len(devices) < jobs:
        raise UserError(
            f"--jobs={jobs} exceeds the {len(devices)} GPUs that this process may use, and each job takes one or more; "
            "lower it, or set CUDA_VISIBLE_DEVICES"
        )
    return [",".join(devices[job::jobs]) for job in range(jobs)]


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


def submit(
    runs: Sequence[Run],
    output: Path,
    arguments: Sequence[str],
    options: Sequence[str],
    jobs: int | None,
    queued: dict[str, dict[str, str]],
) -> tuple[str, str]:
    """Writes both sbatch files into the sweep's folder and submits them, the second to begin when the first has ended.

    Args:
        runs, output, arguments, options, jobs: see `array_script`.
        queued: what `still_queued` said.

    Returns:
        The ids of the array and of the job that collects.

    Raises:
        UserError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch in PATH; run this on a host that submits to SLURM, or add --dry-run to see the script"
        )
    (output / SLURM).mkdir(exist_ok=True)
    scripts = {
        ARRAY_SCRIPT: array_script(runs, output, arguments, options, jobs),
        COLLECT_SCRIPT: collect_script(output, arguments, options),
    }
    for name, text in scripts.items():
        write_atomic(output / name, text.encode())
    array = _sbatch(output / ARRAY_SCRIPT)
    names = queued | {array: {str(task): run.name for task, run in enumerate(runs)}}
    write_atomic(output / SLURM / _SUBMITTED, (json.dumps(names, indent=1) + "\n").encode())
    try:
        return array, _sbatch(output / COLLECT_SCRIPT, f"--dependency=afterany:{array}")
    except UserError as error:
        raise UserError(
            f"the array is submitted as job {array}, but not the job that collects: {error}"
        ) from error


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
