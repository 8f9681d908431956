"""Runs of a sweep in processes of their own, several at a time on this host."""

import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.sweep_file import Run
from ecg_jax.sweep_folder import may_begin, state_of

#: Exit code of a run that ended itself and goes on when it is run again (EX_TEMPFAIL).
TRY_AGAIN = 75
#: What a process of a sweep prints, in its run's folder.
OUTPUT_LOG = "output.log"

_POLL_S = 0.2

#: `ecg-jax` as this very Python with this very package.
COMMAND = (sys.executable, "-c", "from ecg_jax.cli import entry_point; entry_point()")


def run_jobs(
    runs: Sequence[Run],
    output: Path,
    arguments: Sequence[str],
    jobs: int,
    after: Callable[[], object],
) -> dict[str, str]:
    """Runs each of `runs` in a process of its own, `jobs` at a time; one that begins with another waits for that.

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
        process held, and without those that wait for a run which has not been pretrained.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """
    shares = device_shares(jobs)
    free, waiting = list(range(jobs)), list(runs)
    working: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed: dict[str, str] = {}
    try:
        while True:
            while free and (ready := [run for run in waiting if may_begin(output, run)]):
                run = ready[0]
                waiting.remove(run)
                try:
                    child = _start(run, output, arguments, shares[free[0]])
                except OSError as error:
                    failed[run.name] = f"cannot write into {output / run.name}: {error.strerror}"
                    print(f"{run.name} failed: {failed[run.name]}", file=sys.stderr, flush=True)
                    continue
                number = len(runs) - len(waiting)
                print(f"[{number}/{len(runs)}] {run.name}: {run.declared}", flush=True)
                working[free.pop(0)] = run, child
            if not working:
                break
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
