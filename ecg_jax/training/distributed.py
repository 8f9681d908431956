"""Several processes as one run: joining them, ending together, and being told to stop."""

import atexit
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import TracebackType

import jax
from jax.experimental import multihost_utils

from ecg_jax import cpu
from ecg_jax.errors import Stopped, UserError
from ecg_jax.training import launchers
from ecg_jax.training.agreement import WAIT_S, FirstFailed, NoAnswer
from ecg_jax.training.peers import EXIT_LOST, Absent, Peers, cannot_listen, leave, meet, say

#: Seconds to wait until all processes of a run have started: cold starts of images and file systems take minutes.
INIT_TIMEOUT_S = 900.0
#: Seconds without a word after which a process counts as lost. One that is killed is noticed at once.
HEARTBEAT_S = 60.0

_peers: Peers | None = None


def initialise(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    init_timeout_s: float = INIT_TIMEOUT_S,
    heartbeat_s: float = HEARTBEAT_S,
    run: str = "",
) -> contextlib.AbstractContextManager:
    """Joins this process to its run; call it before any device is used.

    Either all three arguments are given (as `launch/local.py` does), or none: then JAX detects the cluster (Open MPI,
    SLURM, TPU pods, Kubernetes), as far as the environment speaks of one. A run of one process joins nothing;
    `num_processes=1` alone says that it is one, whatever the environment says.

    Every process says who it is and whom it waits for before it connects.

    Args:
        coordinator: "host:port" of process 0.
        num_processes: how many there are.
        process_id: which one this is.
        init_timeout_s: seconds to wait for all processes.
        heartbeat_s: seconds without a word after which a process counts as lost.
        run: what the processes know each other by, the workdir; a process of another run is turned away.

    Returns:
        A context manager around the work: however it is left, the other processes learn of it, and when another
        process fails or is lost this one ends too, at once and with a sentence.

    Raises:
        UserError: only some of the arguments are given; the environment speaks of several processes but does not say
            enough; the coordinator cannot be reached from other hosts; its port is in use; a timeout is below 1 s;
            this process cannot use its devices.
        SystemExit: not all processes came in time (code 75); the sentence on stderr names the missing.
    """
    global _peers
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if num_processes == 1 and given == [False, True, False]:
        return contextlib.nullcontext()
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --num-processes and --process-id belong together; give all three or none"
        )
    devices = None
    if not all(given):
        coordinator, num_processes, process_id, devices = _detect(init_timeout_s)
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(f"--process-id={process_id} is not below --num-processes={num_processes}")
    if num_processes == 1:
        return contextlib.nullcontext()
    for name, seconds in (("init", init_timeout_s), ("heartbeat", heartbeat_s)):
        if not seconds >= 1:
            raise UserError(f"--{name}-timeout={seconds:g} is too short; give 1 second or more")
    launchers.check_hosts(coordinator, os.environ)
    _forget_proxies()
    print(
        f"process {process_id} of {num_processes} on {socket.gethostname()}: coordinator {coordinator}, waiting up to "
        f"{init_timeout_s:g} s for all",
        flush=True,
    )
    try:
        _peers = meet(
            coordinator,
            num_processes,
            process_id,
            run=f"the run {run!r} (jax {version('jax')}, ecg-jax {version('ecg-jax')})",
            timeout_s=init_timeout_s,
            heartbeat_s=heartbeat_s,
        )
    except Absent as absent:
        say(f"ecg-jax: process {process_id} of {num_processes} on {socket.gethostname()} ends: {absent}")
        raise SystemExit(EXIT_LOST) from absent
    with contextlib.ExitStack() as stack:
        stack.push(_Together(_peers))
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes=num_processes,
                process_id=process_id,
                local_device_ids=devices,
                cluster_detection_method="deactivate",  # done above; under SLURM it would choose a GPU by itself
                initialization_timeout=round(init_timeout_s),
                # JAX ends processes without a sentence: only where ours has not.
                heartbeat_timeout_seconds=max(round(2 * heartbeat_s), 10),
            )
        except jax.errors.JaxRuntimeError as error:
            if process_id == 0 and "start RPC server" in str(
                error
            ):  # somebody took it since all have met on it
                raise UserError(cannot_listen(coordinator, str(error))) from error
            raise
        try:
            jax.local_devices()
        except Exception as error:  # JAX has no type for it: even its own assertions fail
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{_peers.name} cannot use its devices: {reason}; look at the driver there, or choose others with "
                "JAX_PLATFORMS"
            ) from error
        _forget_own_cache()
        # JAX's collectives on CPUs give up when processes come to their first one more than 30 s apart, as after they
        # compiled a model. Here they come together; later ones wait.
        multihost_utils.sync_global_devices("ecg_jax")
        return stack.pop_all()


def _detect(timeout_s: float) -> tuple[str | None, int, int, list[int] | None]:
    """Coordinator, number of processes, which one this is, and its devices, as the environment says.

    Raises:
        UserError: the environment speaks of several processes, but JAX detects no cluster or another one.
    """
    # JAX has no public name for them; `jax.distributed.initialize()` calls the same, but does not tell what it found.
    from jax._src import cloud_tpu_init
    from jax._src.clusters import ClusterEnv

    expected, said = launchers.expected_processes(os.environ)
    if expected == 1 and not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None, 1, 0, None
    _forget_proxies()
    try:
        coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, round(timeout_s)
        )
    except Exception as error:  # of Kubernetes' client, of Google's metadata server, of JAX itself
        text = " ".join(str(error).split())
        raise UserError(
            f"{said or 'this is a TPU VM'}, but JAX cannot detect the cluster ({type(error).__name__}: {text}); "
            f"{launchers.EXPLICIT}"
        ) from error
    if None in (coordinator, processes, process):
        if expected == 1:
            return None, 1, 0, None
        hint = ""
        if not expected:
            hint = "; it needs the package kubernetes (pip install 'jax[k8s]')"
        elif said.startswith(("TPU", "MEGASCALE")):
            hint = "; is the TPU visible and 'ecg_jax[tpu]' installed?"
        raise UserError(f"{said}, but JAX detects no cluster here{hint}; {launchers.EXPLICIT}")
    if expected > 1 and processes != expected:
        raise UserError(f"{said}, but JAX detects {processes} processes; {launchers.EXPLICIT}")
    if launchers.under_srun(os.environ):
        devices = launchers.slurm_devices(os.environ)
    return coordinator, processes, process, devices


def _forget_proxies() -> None:
    """JAX's services would be asked for through an HTTP proxy, which does not know them."""
    names = sorted(name for name in os.environ if name.lower().endswith("_proxy"))
    if any(name.lower() != "no_proxy" for name in names):
        print(
            f"warning: {', '.join(names)} unset: processes of a run talk to each other directly",
            file=sys.stderr,
        )
    for name in names:
        del os.environ[name]


class _Together:
    """Work that all processes of a run do: leaving it ends it for all, in peace or not."""

    def __init__(self, peers: Peers):
        self._peers = peers

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or isinstance(error, Stopped):
            self._peers.done()
            return
        # Collectives and writes fail when a process is lost; then the loss ends this process, with a better sentence.
        wait_s = 1.0 if isinstance(error, UserError | KeyboardInterrupt) else 5.0
        if isinstance(error, FirstFailed):
            # Before it ends all, process 0 waits for its write in progress and prints its traceback.
            say(f"ecg-jax: {self._peers.name}: {error}; waiting for its end")
            wait_s = WAIT_S
        self._peers.wait_for_loss(wait_s)
        if isinstance(error, UserError):
            sentence, code = str(error), 2
        elif isinstance(error, KeyboardInterrupt):
            sentence, code = "interrupted", 130
        elif isinstance(error, NoAnswer | FirstFailed):
            sentence, code = str(error), EXIT_LOST
        else:
            sentence, code = f"{kind.__name__}: {next(iter(str(error).splitlines()), '')}", 1
        self._peers.tell(f"{self._peers.name} failed: {sentence}", code)
        # An orderly exit waits in JAX for processes that are gone by now.
        atexit.register(leave, code)
        if isinstance(error, NoAnswer | FirstFailed):
            say(f"ecg-jax: {self._peers.name} ends: {sentence}")
            raise SystemExit(EXIT_LOST) from error


def end_run(sentence: str) -> None:
    """Ends this process and all others of its run at once, with exit code 75, because it is stuck.

    Args:
        sentence: why, for people.
    """
    if _peers:
        _peers.end(sentence, EXIT_LOST, stuck=True)
    say(f"ecg-jax: {sentence}")
    leave(EXIT_LOST)


def process_id() -> int:
    """Which process of its run this one is; unlike `jax.process_index`, without starting devices."""
    return _peers.process if _peers else 0


def when_stuck(dump: Callable[[], None]) -> None:
    """What this process does before it ends because another one is stuck."""
    if _peers:
        _peers.when_stuck = dump


def _forget_own_cache() -> None:
    """Compiled programs of several processes are kept only where the user says: JAX wants one folder that all of them
    share, and a home directory may belong to one host.
    """
    if cpu.own_cache:
        jax.config.update("jax_enable_compilation_cache", False)


class StopSignal:
    """Remembers a SIGTERM or SIGINT instead of dying of it, so that the loop can save first. A second one
    kills.

    Use as a context manager; read `received` between steps. Inactive, it changes nothing: in a run of several
    processes JAX itself watches for SIGTERM, so that all of them stop at the same step.
    """

    def __init__(self, *, active: bool):
        self._active = active
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT) if self._active else ():
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._previous[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
