"""launch/local.py when it is told to stop or is killed, with programs that stand for the command."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from process_runs import LOCAL, PATIENCE, local

#: A run that saves when it is told to; one that hangs, as in a collective, where SIGTERM is only noted.
SAVES = "trap 'echo saved; exit 0' TERM; echo up; while true; do sleep 0.05; done"
HANGS = "trap '' TERM; echo up; while true; do sleep 0.05; done"


def hear_hangups():
    """The tests themselves may run under nohup, whose deafness a program that they start would inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def launched(n, script, *before):
    """The launcher, whose output holds that of its processes."""
    words = [*before, sys.executable, local.__file__, "-n", str(n), "--", "bash", "-c", script, "bash"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(
        words, text=True, start_new_session=True, preexec_fn=hear_hangups, **pipes
    ) as launcher:
        # Whatever fails, nobody is left to hold the pipes open, on which a test may be waiting.
        patience = threading.Timer(PATIENCE, launcher.kill)
        patience.start()
        try:
            yield launcher
        finally:
            patience.cancel()
            launcher.kill()


def read_lines(launcher, n):
    return [launcher.stdout.readline().strip() for _ in range(n)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_once_all_save(number):
    with launched(2, SAVES) as launcher:
        assert read_lines(launcher, 2) == ["up", "up"]
        launcher.send_signal(number)
        launcher.send_signal(number)  # at once, as terminals that close do
        out, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, err
    assert out.split() == ["saved", "saved"]
    assert "the same signal again kills them" in err


def test_told_twice_a_hung_run_is_killed():
    with launched(2, HANGS) as launcher:
        assert read_lines(launcher, 2) == ["up", "up"]
        launcher.send_signal(signal.SIGINT)
        assert "again kills them" in launcher.stderr.readline()
        assert launcher.poll() is None
        while launcher.poll() is None:  # within a second it would be the same word
            launcher.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 130, err
    assert "killing all processes" in err


def test_told_while_it_starts_its_processes():
    """The first of them is quick: it tells the launcher, as a user in a hurry does."""
    script = "if [[ $3 == --process-id=0 ]]; then kill -TERM $PPID; fi; " + SAVES
    with launched(6, script) as launcher:
        _, err = launcher.communicate(timeout=PATIENCE)
    # Some may not have set their trap by then, which is what a process does that has nothing to save.
    assert launcher.returncode in (0, 128 + signal.SIGTERM), err
    assert "SIGTERM to all processes" in err


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_killing_the_launcher_leaves_no_process():
    with launched(2, HANGS) as launcher:
        assert read_lines(launcher, 2) == ["up", "up"]
        launcher.kill()
        # They hold the pipe open as long as they live.
        assert launcher.communicate(timeout=PATIENCE) == ("", "")


def test_under_nohup_a_terminal_may_close():
    with launched(1, SAVES, "nohup") as launcher:
        assert read_lines(launcher, 1) == ["up"]
        launcher.send_signal(signal.SIGHUP)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, err
    assert out.split() == ["saved"]


def test_a_terminal_that_is_gone_does_not_keep_it_from_saving(tmp_path):
    reader, writer = os.pipe()
    script = SAVES.replace("echo saved", f"touch {tmp_path}/saved").replace("echo up", f"touch {tmp_path}/up")
    words = [sys.executable, local.__file__, "-n", "1", "--", "bash", "-c", script]
    with subprocess.Popen(
        words, stderr=writer, stdout=writer, start_new_session=True, preexec_fn=hear_hangups
    ) as launcher:
        os.close(writer)
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "up").exists():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.close(reader)
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "saved").exists()


def test_a_program_that_is_not_there_is_one_sentence():
    command = [sys.executable, str(LOCAL), "-n", "2", "--", "no-such-program"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert "there is no program 'no-such-program'" in found.stderr
    assert "Traceback" not in found.stderr
