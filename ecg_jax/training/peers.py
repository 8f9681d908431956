"""The processes of a run, as TCP connections to process 0: waiting for all of them, and noticing when one is gone.

JAX's coordination service ends every process by a C++ abort when one does not come or does not answer, without
naming it in a sentence, and only after a timeout. So the processes first meet on the coordinator's own port: each
tells process 0 its number, and process 0 knows who is missing. Then the port is JAX's, and the connections stay. A
process that is killed closes its connection at once, wherever the others are waiting; a host that vanishes stops
beating. Process 0 tells everybody else, and everybody ends.

Messages are lines of JSON. There is no secret in them and no authentication, as in JAX's own service: use it on a
network where every host is trusted.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from jax.errors import JaxRuntimeError

from ecg_jax.errors import Stopped, UserError
from ecg_jax.training.agreement import FirstFailed, NoAnswer
from ecg_jax.training.launchers import is_loopback

#: Exit code of a process that ends because another is gone or stuck: run the same command again to continue.
EXIT_LOST = os.EX_TEMPFAIL  # 75

_MAGIC = "ecg_jax"
_BEATS = 4  # in the time after which a silent process counts as lost
_HELLO_S = 1.0  # that who has connected is given to say who it is; one of ours that is slower comes again
_FAREWELL_S = 5.0  # that an ending process waits for the others to have heard why
_ABORT_DELAY_S = 6  # see `_delay_abort`
_MAX_LINE = 65536  # bytes
_WITHOUT_TRACEBACK = (UserError, Stopped, NoAnswer, FirstFailed, JaxRuntimeError)


class Absent(Exception):
    """Some of the processes did not come in time; the message names them."""


@dataclasses.dataclass
class _Peer:
    """Another process: its number, host and connection, and what was read of a line that is not complete yet."""

    process: int
    host: str
    connection: socket.socket
    heard: float = dataclasses.field(default_factory=time.monotonic)
    unread: bytes = b""
    done: bool = False

    def send(self, message: dict) -> None:
        """Sends a line; a connection that is broken shows when it is read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have come, None at the end of the connection."""
        try:
            data = self.connection.recv(_MAX_LINE)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


def meet(
    coordinator: str, processes: int, process: int, *, run: str, timeout_s: float, heartbeat_s: float
) -> "Peers":
    """Waits until all processes of a run are there.

    Args:
        coordinator: "HOST:PORT" of process 0.
        processes, process: how many there are, and which this one is.
        run: what all of them are the same run by, e.g. the workdir and versions; others are turned away.
        timeout_s: seconds to wait for all.
        heartbeat_s: seconds without a word after which a process counts as lost.

    Raises:
        UserError: the port is in use, or process 0 turned this one away.
        Absent: not all came in time.
    """
    host, port = coordinator.rpartition(":")[0].strip("[]"), int(coordinator.rpartition(":")[2])
    deadline = time.monotonic() + timeout_s
    if process == 0:
        peers = _receive_all(coordinator, port, processes, run, deadline, timeout_s)
    else:
        peers = [_join(host, port, processes, process, run, deadline, timeout_s)]
    return Peers(peers, process, processes, heartbeat_s)


def _listen(coordinator: str, port: int) -> socket.socket:
    """A socket on the address that JAX's service will use: every interface."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.socket(family)
    try:
        # JAX's service does the same, so that it may have the port while these connections are open.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(cannot_listen(coordinator, error.strerror)) from error
    return listener


def cannot_listen(coordinator: str, why: str) -> str:
    """The sentence about a coordinator's port that process 0 does not get."""
    return (
        f"process 0 cannot listen on port {coordinator.rpartition(':')[2]} of the coordinator {coordinator}: {why}; "
        "another run or program has it: choose another port with --coordinator (JAX_COORDINATOR_PORT under SLURM)"
    )


def _receive_all(
    coordinator: str, port: int, processes: int, run: str, deadline: float, timeout_s: float
) -> list[_Peer]:
    """What process 0 does until everybody is there."""
    here: dict[int, _Peer] = {}

    def missing() -> list[int]:
        return [process for process in range(1, processes) if process not in here]

    with _listen(coordinator, port) as listener:
        report = time.monotonic() + 60.0
        while missing():
            now = time.monotonic()
            if now > deadline:
                sentence = f"{_these(missing())} of {processes} did not start within {timeout_s:g} s"
                for peer in here.values():
                    peer.send({"absent": sentence})
                raise Absent(sentence)
            if now > report:
                print(f"still waiting for {_these(missing())}", flush=True)
                report = now + 60.0
            listener.settimeout(min(1.0, max(deadline - now, 0.01)))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if peer := _admit(connection, here, processes, run):
                here[peer.process] = peer
    for peer in here.values():
        peer.send({"go": socket.gethostname()})
    return [here[process] for process in sorted(here)]


def _admit(connection: socket.socket, here: dict[int, _Peer], processes: int, run: str) -> _Peer | None:
    """Reads who has come; None when it is none of ours, which is told so."""
    try:
        hello = json.loads(_read_line(connection, time.monotonic() + _HELLO_S))
        process, host = int(hello["process"]), str(hello["host"])
        theirs = (hello["magic"], int(hello["processes"]), hello["run"])
    except (OSError, ValueError, KeyError, TypeError):  # a port scanner, or who knows
        connection.close()
        return None
    peer = _Peer(process, host, connection)
    refusal = None
    if theirs != (_MAGIC, processes, run):
        refusal = f"process 0 is of {processes} processes of {run}, this one of {theirs[1]} of {theirs[2]}"
    elif not 0 < process < processes:
        refusal = f"process 0 knows no process {process} of {processes}"
    elif process in here and not _has_ended(here[process].connection):
        refusal = f"there is a process {process} on {here[process].host} already"
    if refusal:
        print(f"turned a process on {host} away: {refusal}", file=sys.stderr, flush=True)
        peer.send({"refused": refusal})
        connection.close()
        return None
    return peer


def _has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _join(
    host: str, port: int, processes: int, process: int, run: str, deadline: float, timeout_s: float
) -> _Peer:
    """What every other process does: knocks until process 0 answers, then waits for its word."""
    hello = {
        "magic": _MAGIC,
        "process": process,
        "processes": processes,
        "run": run,
        "host": socket.gethostname(),
    }
    why = "it has not answered"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10.0))
            if connection.getsockname() == connection.getpeername():  # TCP may connect a port to itself
                raise OSError("nobody listens")
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = json.loads(_read_line(connection, deadline + _FAREWELL_S))
            if "refused" in answer:
                raise UserError(answer["refused"])
            if "absent" in answer:
                raise Absent(answer["absent"])
            return _Peer(0, str(answer["go"]), connection)
        except (OSError, EOFError) as error:
            why = error.strerror or str(error) if isinstance(error, OSError) else "it hangs up"
        except (ValueError, KeyError, TypeError):
            why = "another program answers"
        time.sleep(0.2)
    loopback = "; that address is this host's own: is process 0 on another?" if is_loopback(host) else ""
    raise Absent(
        f"process 0 of {processes} was not to be found at {host}:{port} within {timeout_s:g} s ({why}){loopback}"
    )


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        data = connection.recv(1)
        if not data:
            raise EOFError
        line += data
        if len(line) > _MAX_LINE:
            raise ValueError
    return line


def _these(processes: list[int]) -> str:
    listed = ", ".join(map(str, processes[:8])) + (
        f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    )
    return f"process {listed}" if len(processes) == 1 else f"processes {listed}"


class Peers:
    """The other processes of a run, watched by a thread that ends this process when one of them is gone.

    Process 0 is connected to everybody, everybody else to process 0.
    """

    def __init__(self, peers: list[_Peer], process: int, processes: int, heartbeat_s: float):
        """Takes over the connections and begins to watch.

        Args:
            peers: the connected processes.
            process, processes: which this one is, and how many there are.
            heartbeat_s: seconds without a word after which a process counts as lost.
        """
        self.process = process
        self._peers = {peer.process: peer for peer in peers}
        #: This process, as in "process 1 of 2 on node7".
        self.name = f"process {process} of {processes} on {socket.gethostname()}"
        self._heartbeat_s = heartbeat_s
        self._leaving = threading.Event()
        self._ending = threading.Lock()
        #: Called before this process ends because another is stuck, e.g. to dump its stacks.
        self.when_stuck: Callable[[], None] = lambda: None
        for peer in peers:
            peer.connection.settimeout(heartbeat_s)
            peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _delay_abort()
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        beat, last = self._heartbeat_s / _BEATS, 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._leaving.is_set() and selector.get_map():
                # What has come is read before anybody is called silent: this process may have slept itself.
                for key, _ in selector.select(timeout=beat / 2):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - last > beat:
                    last = now
                    for peer in self._peers.values():
                        peer.send({"beat": True})
                for peer in self._peers.values():
                    if not peer.done and now - peer.heard > self._heartbeat_s:
                        self._lost(peer, f"nothing was heard of it for {self._heartbeat_s:g} s")

    def _read(self, peer: _Peer) -> bool:
        """Acts on what a process says; False at the end of its connection."""
        messages = peer.receive()
        peer.heard = time.monotonic()
        for message in messages or ():
            if "done" in message:
                peer.done = True
            elif (
                "end" in message and not self._leaving.is_set()
            ):  # else it may be this one's own word, handed back
                if message["stuck"]:
                    self.when_stuck()
                self.end(message["end"], message["code"], stuck=message["stuck"])
        if messages is None and not (peer.done or self._leaving.is_set()):
            self._lost(peer, "its connection is closed, as when it was killed")
        return messages is not None

    def _lost(self, peer: _Peer, how: str) -> None:
        self.end(
            f"process {peer.process} on {peer.host} is lost: {how}; run the same command again to continue from the "
            "newest checkpoint",
            EXIT_LOST,
        )

    def wait_for_loss(self, seconds: float) -> None:
        """Gives the watching thread time to end this process: an error may be the consequence of a loss."""
        self._watcher.join(seconds)

    def done(self) -> None:
        """Says that this process has finished its work: from now on its end is no loss."""
        for peer in self._peers.values():
            peer.send({"done": True})

    def tell(self, sentence: str, code: int, *, stuck: bool = False) -> None:
        """Tells the others that this process ends the run, and waits a moment for them to hear it.

        Args:
            sentence: why, for people; process 0 hands it on.
            code: exit code for all.
            stuck: whether the others should call `when_stuck`.
        """
        self._leaving.set()
        message = {"end": sentence, "code": code, "stuck": stuck}
        for peer in self._peers.values():
            peer.send(message)
            with contextlib.suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
        # Closing with beats unread would take the message back.
        deadline = time.monotonic() + _FAREWELL_S
        for peer in self._peers.values():
            while (left := deadline - time.monotonic()) > 0:
                peer.connection.settimeout(left)
                try:
                    if not peer.connection.recv(_MAX_LINE):
                        break
                except OSError:
                    break

    def end(self, sentence: str, code: int, *, stuck: bool = False) -> None:
        """Ends the whole run: tells the others and ends this process at once. Does not return.

        Process 0 tells everybody; of what another process finds, that it is stuck is news to process 0.
        """
        with self._ending:
            say(f"ecg-jax: {self.name} ends: {sentence}")
            _say_what_fails_here()
            if stuck or 0 not in self._peers:
                self.tell(sentence, code, stuck=stuck)
            leave(code)


def say(sentence: str) -> None:
    """Writes a line to stderr without waiting for whoever else writes there."""
    os.write(2, f"{sentence}\n".encode())


def _say_what_fails_here() -> None:
    """Writes down the error that the main thread is on its way out with: nothing else will, once this process ends."""
    error = sys._current_exceptions().get(threading.main_thread().ident)
    if isinstance(error, tuple):  # before Python 3.12: type, error, traceback
        error = error[1]
    # A UserError comes again at the next start; those of JAX and of agreements are the consequence of a loss.
    if isinstance(error, Exception) and not isinstance(error, _WITHOUT_TRACEBACK):
        say("".join(traceback.format_exception(error)).rstrip())


def leave(code: int) -> None:
    """Ends the process now: an orderly exit would wait in JAX for the processes that are gone."""
    # The main thread may hang in the middle of a write.
    flushing = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(code)


def _delay_abort() -> None:
    """Makes a C++ abort wait some seconds in the thread it happens in.

    When process 0 dies, JAX aborts every other process within milliseconds and with a stack of C++ functions; its hook
    for this (`missed_heartbeat_callback`) cannot be called from Python in jaxlib 0.10. The delay lets the thread above
    say which process is gone and end this one. The handler of the signal, number 6, is `sleep`: sleep(6).
    """
    assert signal.SIGABRT == _ABORT_DELAY_S
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
