#!/usr/bin/env python3
"""Runs one command as N processes of one run on this host, over the loopback interface.

    python launch/local.py --processes 2 -- ecg-jax pretrain --config=configs/cpc.py --workdir=runs/cpc ...

Each process gets `--coordinator`, `--num-processes` and `--process-id`. On a host with several GPUs this is
rarely needed: a single process already uses all of them. SIGTERM and Ctrl-C both reach the processes as
SIGTERM, so that all of them save and stop at the same step; when one process fails the others are ended. The
exit code is the first failure's, or 0.
"""

import argparse
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command: list[str], processes: int) -> int:
    """Starts `command` as `processes` processes and waits for all of them.

    Returns:
        0 when all succeed, else the exit code of the first that failed.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    children = [
        subprocess.Popen(
            [*command, f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={i}"],
            start_new_session=True,  # a Ctrl-C in the terminal reaches this launcher only
        )
        for i in range(processes)
    ]

    def hand_on(_number, _frame):
        # Processes of one run agree on the step to stop at when they get SIGTERM.
        for child in children:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    while True:
        codes = [child.poll() for child in children]
        if failed := [code for code in codes if code]:
            for child in children:
                child.terminate()
            for child in children:
                try:
                    child.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    child.kill()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- followed by the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1:
        parser.error("give --processes N and, after --, the command to run")
    return launch(command, args.processes)


if __name__ == "__main__":
    sys.exit(main())
