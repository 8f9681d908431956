"""Locks on files: refused at once, or waited for where the holder's host may have vanished."""

import os
import socket
import subprocess
import sys

import pytest

from ecg_jax import files
from ecg_jax.errors import UserError
from ecg_jax.files import lock


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def naps(monkeypatch):
    """Stands for the clock: a nap takes its time at once, and `naps.then` happens in the third."""

    class Naps:
        now = 0.0
        then = staticmethod(lambda: None)

        def sleep(self, seconds):
            self.now += seconds
            if self.now == 3.0:
                self.then()

        def monotonic(self):
            return self.now

    clock = Naps()
    monkeypatch.setattr(files, "time", clock)
    return clock


def held_elsewhere(path):
    """The lock as a process of another host left it."""
    file = path.open("a+")
    lock(file, "unheard", wait_s=1.0)
    file.truncate(0)
    file.write("process 12 on node7\nanother kernel\n")
    file.flush()
    return file


def test_a_lock_is_refused_at_once(path):
    with path.open("w") as first, path.open("w") as second:
        lock(first, "unheard")
        with pytest.raises(UserError, match=r"^taken$"):
            lock(second, "taken")
    assert path.read_text() == ""
    with path.open("w") as file:
        lock(file, "unheard")


def test_a_holder_on_this_host_is_named_and_not_waited_for(path, naps, capsys):
    """The lock of a process of this host ends with it: it lives."""
    code = (
        "import sys; from ecg_jax.files import lock; file = open(sys.argv[1], 'a+'); "
        "lock(file, 'unheard', wait_s=600.0); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as holder, path.open("a+") as file:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as refusal:
            lock(file, "taken", wait_s=600.0)
        assert str(refusal.value) == f"taken (held by process {holder.pid} on {socket.gethostname()})"
        holder.communicate()
        lock(file, "unheard", wait_s=600.0)
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert naps.now == 0.0
    assert capsys.readouterr().err == ""


def test_a_holder_on_another_host_is_waited_for(path, naps, capsys):
    naps.then = held_elsewhere(path).close
    with path.open("a+") as file:
        lock(file, "unheard", wait_s=600.0)
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert naps.now == 3.0
    assert capsys.readouterr().err == f"waiting up to 600 s for {path}, held by process 12 on node7\n"


def test_a_holder_on_another_host_is_not_waited_for_without_end(path, naps):
    with held_elsewhere(path), path.open("a+") as file:
        with pytest.raises(UserError, match=r"^taken \(held by process 12 on node7\)$"):
            lock(file, "taken", wait_s=5.0)
        assert 5.0 <= naps.now <= 7.0
        assert path.read_text().startswith("process 12 on node7")


def test_a_lock_of_an_earlier_version_names_nobody(path, naps, capsys):
    with path.open("w") as earlier:
        lock(earlier, "unheard")
        naps.then = earlier.close
        with path.open("a+") as file:
            lock(file, "unheard", wait_s=600.0)
    assert "held by an unknown process" in capsys.readouterr().err
