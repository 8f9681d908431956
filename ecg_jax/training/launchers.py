"""What the environment says about the processes of a run: how many a launcher started, and whether it said enough.

A process that believes itself alone while its launcher started several would train the same run beside the others, in
the same workdir. So whoever was started as one of several either joins or is refused. JAX is not imported here.
"""

import os
import re
from collections.abc import Mapping

from ecg_jax.errors import UserError

#: What to do when a cluster is not detected.
EXPLICIT = (
    "give every process --coordinator=HOST:PORT of process 0, --num-processes and --process-id, or --num-processes=1 "
    "for a run of one process"
)
# All of them are set by srun, and only by srun; JAX detects SLURM by them.
_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
# Launchers that JAX does not detect: variable with the number of processes -> name.
_OTHERS = {"PMI_SIZE": "an MPI launcher", "WORLD_SIZE": "torchrun or the like"}


def _number(environ: Mapping[str, str], name: str) -> int:
    """A variable as a number, 0 when it is not set.

    Raises:
        UserError: it is no number.
    """
    text = environ.get(name, "0")
    if not text.strip().isdigit():
        raise UserError(f"the environment variable {name}={text!r} is not a number")
    return int(text)


def expected_processes(environ: Mapping[str, str]) -> tuple[int, str]:
    """How many processes a launcher says the run has, and by which variable; (1, "") when there is none.

    An indexed Kubernetes Job does not say how many pods it has; it counts as 0, unknown.

    Raises:
        UserError: a launcher says that there are several but not which of them this one is, or JAX does not know it.
    """
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        said = f"OMPI_COMM_WORLD_SIZE={environ['OMPI_COMM_WORLD_SIZE']}"
        if missing := [name for name in _OPEN_MPI if name not in environ]:
            raise UserError(
                f"{said}, but {' and '.join(missing)} is not set; start the run with mpirun, or {EXPLICIT}"
            )
        return int(environ["OMPI_COMM_WORLD_SIZE"]), said
    if under_srun(environ):
        tasks = _number(environ, "SLURM_NTASKS")
        step = _number(environ, "SLURM_STEP_NUM_TASKS") or tasks
        if step != tasks:
            raise UserError(
                f"srun started {step} tasks, but SLURM_NTASKS={tasks}; unset it before srun, or {EXPLICIT}"
            )
        if tasks > 1:
            return tasks, f"SLURM_NTASKS={tasks}"
        return 1, ""
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if _number(environ, name) > 1:
            raise UserError(
                f"{name}={environ[name]}, but this process was not started by srun "
                f"({', '.join(n for n in _SRUN if n not in environ)} not set): start it with `srun ecg-jax pretrain "
                f"...`, or {EXPLICIT}"
            )
    workers = environ["TPU_WORKER_HOSTNAMES"].split(",") if "TPU_WORKER_HOSTNAMES" in environ else []
    slices = max(_number(environ, "MEGASCALE_NUM_SLICES"), 1)
    if max(len(workers), 1) * slices > 1:
        named = f"TPU_WORKER_HOSTNAMES names {len(workers)} hosts"
        return max(len(workers), 1) * slices, named if slices == 1 else f"MEGASCALE_NUM_SLICES={slices}"
    if "JOB_COMPLETION_INDEX" in environ:
        return (
            0,
            f"JOB_COMPLETION_INDEX={environ['JOB_COMPLETION_INDEX']} (a pod of an indexed Kubernetes Job)",
        )
    for name, launcher in _OTHERS.items():
        if _number(environ, name) > 1:
            raise UserError(
                f"{name}={environ[name]}: {launcher} started several processes, which JAX does not detect; {EXPLICIT}"
            )
    if "JAX_COORDINATOR_ADDRESS" in environ:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, but nothing says how many processes there are and which this one is; "
            + EXPLICIT
        )
    return 1, ""


def under_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, as JAX judges it."""
    return all(name in environ for name in _SRUN)


def check_hosts(coordinator: str, environ: Mapping[str, str]) -> None:
    """Refuses a coordinator on the loopback interface of a run on several hosts.

    Raises:
        UserError: it is, or the address is not of the form HOST:PORT.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"the coordinator's address {coordinator!r} is not of the form HOST:PORT")
    if not is_loopback(host):
        return
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"):
        if under_srun(environ) and name in environ:
            if _number(environ, name) > 1:
                raise UserError(
                    f"the coordinator {coordinator} is reached from its own host only, but {name}={environ[name]}; "
                    "give the name or address that the other hosts know process 0 by"
                )
            return


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means "this host" wherever it is said."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs it sees a task under srun uses; None when SLURM says nothing of GPUs or JAX is told already.

    JAX gives every task the one GPU with the task's number on its node. That is right when as many tasks as GPUs are on
    a node and each sees all of them; a task that was bound to its own GPU sees one.

    Raises:
        UserError: the node has another number of tasks than GPUs.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ or environ.get("JAX_PLATFORMS") == "cpu":
        return None
    visible = 0
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in environ and not visible:
            visible = len([device for device in environ[name].split(",") if device.strip()])
    visible = visible or _number(environ, "SLURM_GPUS_ON_NODE")
    tasks = tasks_on_node(environ)
    if not visible or not tasks:
        return None
    if visible == tasks:
        return [_number(environ, "SLURM_LOCALID")]
    if visible == 1:
        return [0]
    raise UserError(
        f"this host has {visible} GPUs and {tasks} task{'s'[: tasks > 1]} of the run, and every task uses one GPU; ask "
        f"for --ntasks-per-node={visible}, or --gpus-per-node={tasks}"
    )


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from "4(x2),3"; 0 when SLURM does not say."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environ or "SLURM_NODEID" not in environ:
        return 0
    counts = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())):
            return 0
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID")
    return counts[node] if node < len(counts) else 0


def refuse_several(command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuses a command that works in one process when it was started as one of several.

    An allocation of several tasks is no reason: a command typed into it, or into a batch script, runs once.

    Raises:
        UserError: srun or mpirun started several.
    """
    tasks = (
        _number(environ, "SLURM_NTASKS") if under_srun(environ) else _number(environ, "OMPI_COMM_WORLD_SIZE")
    )
    if tasks > 1:
        raise UserError(
            f"`ecg-jax {command}` works in one process, but {tasks} were started, which would all do the same; start "
            "it once (srun --ntasks=1)"
        )
