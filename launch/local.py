#!/usr/bin/env python3
"""Runs one command as N processes of one run on this host, over the loopback interface.

    python launch/local.py -n 2 -- ecg-jax pretrain --config=configs/cpc.py --workdir=runs/cpc ...

Each process gets `--coordinator`, `--num-processes` and `--process-id`. On a host with several GPUs this is
rarely needed: a single process already uses all of them. SIGTERM, Ctrl-C and a terminal that is closed reach the
processes as SIGTERM, so that all of them save and stop at the same step; after a second Ctrl-C or SIGTERM, a second
later or more, they are killed. They are killed too when this launcher is (on Linux). When one process fails, the
others are given some seconds to end by themselves, and are ended then; which process was the first, and how, is said
on stderr.

The exit code is 0 when all succeed; 75 when the run can be continued by running it again (a process was lost, or the
run was stuck); 130 when a second signal killed them; else that of the first failure.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONTINUE = os.EX_TEMPFAIL  # 75
_GRACE_S = 15.0  # for the others to end by themselves after a failure; then again after SIGTERM
_TWICE_S = 1.0  # terminals that close, and `timeout`, send one signal twice


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port on the loopback interface that nobody has, nor gets as long as it is held here.

    Process 0 may listen on it all the same: the socket here does not listen, and both say SO_REUSEADDR.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def launch(command: list[str], processes: int, log_dir: Path | None = None) -> int:
    """Starts `command` as `processes` processes and waits for all of them.

    Args:
        command: program and arguments.
        processes: how many.
        log_dir: where each process's output goes, as process-I.log; None: to this one's.

    Returns:
        The exit code, see above.
    """
    told: list[float] = []  # when signals came
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, lambda *_: told.append(time.monotonic()))
    with contextlib.ExitStack() as stack:
        coordinator = f"127.0.0.1:{stack.enter_context(reserved_port())}"
        children = []
        for i in range(processes):
            output = {}
            if log_dir:
                log_dir.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context((log_dir / f"process-{i}.log").open("a"))
                output = {"stdout": log, "stderr": subprocess.STDOUT}
            numbers = [f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}"]
            child = subprocess.Popen(
                [*command, *numbers],
                start_new_session=True,  # a Ctrl-C in the terminal reaches this launcher only
                preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
                **output,
            )
            children.append(child)
        return _wait(children, told)


def _die_with_parent() -> Callable[[], None]:
    """What a child does before it becomes the command: asks Linux to be killed when this process has ended."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(128 + signal.SIGKILL)

    return ask


def _kill(children: list[subprocess.Popen]) -> None:
    """SIGKILL to all that live, each with what it has started."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def _wait(children: list[subprocess.Popen], told: list[float]) -> int:
    first, deadlines, stopping, killed = None, [], False, False
    while any(child.poll() is None for child in children):
        if told and not stopping:
            # Processes of one run agree on the step to stop at when they get SIGTERM.
            for child in children:
                child.send_signal(signal.SIGTERM)
            _say("SIGTERM to all processes, which save and stop; the same signal again kills them")
            stopping = True
        if told and told[-1] - told[0] >= _TWICE_S and not killed:
            _say("killing all processes")
            _kill(children)
            killed = True
        failed = [i for i, child in enumerate(children) if child.poll()]
        if failed and first is None:
            # Those that only say that another one is gone were not the first.
            first = min(failed, key=lambda i: (children[i].returncode == CONTINUE, i))
            _announce(first, children)
            deadlines = [time.monotonic() + _GRACE_S, time.monotonic() + 2 * _GRACE_S]
        if deadlines and time.monotonic() > deadlines[0]:
            deadlines.pop(0)
            if deadlines:
                for child in children:
                    child.terminate()
            else:
                _kill(children)
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    if killed:
        return 128 + signal.SIGINT
    if not any(codes):
        return 0
    if first is None:
        first = min((i for i, code in enumerate(codes) if code), key=lambda i: (codes[i] == CONTINUE, i))
        _announce(first, children)
    if CONTINUE in codes:
        return CONTINUE
    return codes[first] if codes[first] > 0 else 128 - codes[first]


def _say(sentence: str) -> None:
    with contextlib.suppress(
        OSError
    ):  # a terminal that was closed hears nothing; the processes must save all the same
        print(f"launch: {sentence}", file=sys.stderr, flush=True)


def _announce(first: int, children: list[subprocess.Popen]) -> None:
    code = children[first].returncode
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    _say(f"process {first} of {len(children)} failed first: {how}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="write DIR/process-I.log instead of mixing outputs"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- followed by the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1:
        parser.error("give -n N and, after --, the command to run")
    if shutil.which(command[0]) is None:
        parser.error(f"there is no program {command[0]!r}; is the environment activated?")
    return launch(command, args.processes, args.log_dir)


if __name__ == "__main__":
    sys.exit(main())
