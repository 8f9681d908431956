"""The workdir of a pretraining run: held by one process, and known to belong to this very run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.data import ladder
from ecg_jax.data.mixture import parse_weights
from ecg_jax.data.selection import (
    SELECTION_NAME,
    Selection,
    knows_selections,
    read_selection,
    write_selection,
)
from ecg_jax.data.store import PARTIAL
from ecg_jax.errors import UserError
from ecg_jax.files import lock, write_atomic
from ecg_jax.models.encoder import BACKBONES
from ecg_jax.run_setup import CONFIGS, IMPORT_NAME, flatten
from ecg_jax.training.agreement import answers, on_first
from ecg_jax.training.checkpoint import finished_steps

if TYPE_CHECKING:
    from ecg_jax.run_data import RunData

#: Seconds that a run waits for the lock of one on another host, which may have vanished: NFSv4 keeps it for 90 s after
#: its last word, CephFS for 300 s.
LOCK_WAIT_S = 600.0
#: Seconds in which every host must see what process 0 wrote: NFS keeps what it knows of a folder for up to 60 s.
SEEN_WITHIN_S = 90.0
LOCK_NAME = ".lock"

# What may differ when a run is continued; everything else makes it another run.
_FREE_FIELDS = {
    "store",
    "log_every",
    "keep_latest",
    "keep_best",
    "tensorboard",
    "stall_timeout_s",
    "data.read_threads",
    "data.prefetch",
    # What they lead to is compared: the selection.
    "data.ladder", "data.rung", "data.max_records", "data.selection", "selection_fingerprint",
    # How a step is computed, not what.
    "model.conv", "model.remat",
    # Monitoring reads the state and never changes it.
    "stop_on_collapse", "monitor.min_rankme", "monitor.min_feature_std", "monitor.min_perplexity",
    "monitor.max_dead_share", "monitor.probe_every", "monitor.probe_records", "monitor.task",
}  # fmt: skip
# The length of a run shapes its learning rates and the teacher's momentum unless they are constant.
_LENGTH_FIELDS = {"steps", "epochs"}


def stored_config(workdir: Path) -> dict[str, Any]:
    """What config.json of a workdir with checkpoints holds: the config and, beside it, what was known of its data.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = workdir / "config.json"
    try:
        stored = json.loads(path.read_text())
        flatten(stored["data"])
        known = stored["objective"]["name"] in CONFIGS and stored["model"]["backbone"] in BACKBONES
        if not known or "max_records" not in stored["data"]:
            raise ValueError("no config")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so it cannot be told which run the checkpoints beside it belong to; "
            "put it back (a checkpoint's meta holds the config), or choose another --workdir"
        ) from error
    return stored


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: ConfigDict, data: RunData) -> Iterator[None]:
    """Holds the workdir for this run: locked against a second process, and known to belong to this very config.

    Writes config.json, preprocessing.json and selection.json when no run with a checkpoint is there yet. Stores are
    known by their content: config.json holds their fingerprint beside the config, and they may have moved when a run
    goes on. So are offline targets, and the selection.

    Raises:
        UserError: the workdir belongs to another run (the differing fields are named) or holds an imported
            checkpoint, is in use, is no folder, or is another folder for another process; on every process.
    """
    with contextlib.ExitStack() as held:
        holder = on_first("claiming the workdir", lambda: held.enter_context(_claimed(workdir, config, data)))
        _check_all_see(workdir, holder)
        yield


def _check_all_see(workdir: Path, holder: str) -> None:
    """Refuses a workdir that is not the same folder for all processes; `holder` is what process 0 left in `.lock`."""

    def sees() -> bool:
        try:
            return (workdir / LOCK_NAME).read_text() == holder
        except OSError:
            return False

    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (seen := sees()) and time.monotonic() < deadline:
        time.sleep(0.5)
    heard = answers("the workdir", [seen, socket.gethostname(), str(workdir.absolute())])
    for process, (seen, host, where) in enumerate(heard):
        if not seen:
            raise UserError(
                f"process {process} on {host} does not see in {where} what process 0 on {heard[0][1]} wrote into "
                f"{heard[0][2]}; put the run's folder where every host sees it, under the same path"
            )


@contextlib.contextmanager
def _claimed(workdir: Path, config: ConfigDict, data: RunData) -> Iterator[str]:
    if (workdir / IMPORT_NAME).exists():
        raise UserError(
            f"{workdir} is an imported checkpoint, which can be probed but not continued: its store and optimiser are "
            "not known; choose another --workdir, and --config.init.checkpoint to begin with its parameters"
        )
    if workdir.is_file():
        raise UserError(f"--workdir={workdir} is a file; choose a folder")
    if (workdir / "zarr.json").exists() or (workdir / PARTIAL).is_dir():
        raise UserError(f"--workdir={workdir} is a store; choose another folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = (workdir / LOCK_NAME).open("a+")
    except OSError as error:
        raise UserError(f"cannot write into --workdir={workdir}: {error.strerror}") from error
    with held:
        refusal = f"another `ecg-jax pretrain` is using {workdir}; choose another --workdir"
        lock(held, refusal, wait_s=LOCK_WAIT_S)
        wanted = json.loads(json.dumps(config.to_dict())) | data.provenance()
        if finished_steps(workdir):
            _check_same_run(workdir, wanted, constant_schedule=_is_constant(config))
            _check_same_selection(workdir, wanted, data.selection)
        else:
            files = {"preprocessing.json": data.preprocessing.to_dict(), "config.json": wanted}
            for name, value in files.items():
                write_atomic(workdir / name, (json.dumps(value, indent=2) + "\n").encode())
            write_selection(workdir / SELECTION_NAME, data.selection)
        yield (workdir / LOCK_NAME).read_text()


def _is_constant(config: ConfigDict) -> bool:
    """Whether a run of another length would have the same steps as far as both go."""
    moving = "teacher" in config.objective and (
        config.objective.teacher.momentum != config.objective.teacher.momentum_end
    )
    return config.optimiser.schedule == "constant" and not moving


def _check_same_run(workdir: Path, wanted: dict[str, Any], constant_schedule: bool) -> None:
    """Compares a config with the one that a workdir's checkpoints were written under."""
    there, wanted = flatten(stored_config(workdir)), flatten(wanted)
    # A run begun before a field was declared had its default.
    shipped = with_argument(CONFIGS[wanted["objective.name"]], backbone=wanted["model.backbone"])
    there = flatten(load_config(shipped).to_dict()) | there
    free = _FREE_FIELDS | (_LENGTH_FIELDS if constant_schedule else set())
    names = sorted(there.keys() | wanted.keys())
    differ = [
        name
        for name in names
        if name not in free and _meaning(name, there.get(name)) != _meaning(name, wanted.get(name))
    ]
    if differ:
        shown = ", ".join(
            f"{name} ({there.get(name)!r} there, {wanted.get(name)!r} now)" for name in differ[:5]
        )
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(f"{workdir} holds another run: it differs in {shown}{more}; choose another --workdir")


def _meaning(name: str, value: Any) -> Any:
    """What a field is compared by: weights are ratios, which have many spellings."""
    return parse_weights(value) if name == "data.weights" else value


def _check_same_selection(workdir: Path, wanted: dict[str, Any], selection: Selection) -> None:
    """Compares a selection with that of a workdir's checkpoints; writes it where they are from before there were any.

    Raises:
        UserError: it differs, or the workdir's is missing or damaged.
    """
    path, before = workdir / SELECTION_NAME, stored_config(workdir)
    if path.exists() or knows_selections(before["data"]):
        if differs := difference(read_selection(path), selection):
            raise UserError(
                f"{workdir} holds another run: its selection of recordings differs in {differs}; choose another "
                "--workdir"
            )
        return
    sizes = [_size(config["data"]) for config in (before, wanted)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{workdir} holds another run: it differs in data.max_records ({sizes[0]} there, {sizes[1]} now); "
            "choose another --workdir"
        )
    write_selection(path, selection)


def difference(there: Selection, now: Selection) -> str | None:
    """What tells two selections apart, for a sentence; None when they hold the same recordings."""
    if there.fingerprint == now.fingerprint:
        return None
    if [s.fingerprint for s in there.sources] != [s.fingerprint for s in now.sources]:
        return "the content of its stores"
    rules = dataclasses.asdict(there.rule), dataclasses.asdict(now.rule)
    parts = [
        f"{name} ({rules[0][name]} there, {rules[1][name]} now)"
        for name in rules[0]
        if rules[0][name] != rules[1][name]
    ]
    for name in ("train", "val"):
        counts = len(getattr(there, name)), len(getattr(now, name))
        if counts[0] != counts[1]:
            parts.append(f"{name} recordings ({counts[0]} there, {counts[1]} now)")
    return ", ".join(parts) or "which recordings they are (folds, patients or duplicates of a store changed)"


def _size(data: dict[str, Any]) -> int | None:
    """Training records at most, None for everything."""
    if data["max_records"]:
        return None if data["max_records"] == ladder.SIZES[ladder.EVERYTHING] else data["max_records"]
    return ladder.nested_size(data["rung"])
