"""Checkpoints of a run: writing, exact resume, and reading parts of one. The one file that imports Orbax.

A checkpoint `RUN/checkpoints/STEP` holds two items. `state` is the tree of arrays (params, batch_stats, ssm,
objective state, teacher, optimiser moments, step, key). `meta` is JSON: the run's config, its preprocessing
contract, the fingerprint of its store, versions, and a CRC-32 of each array, so that a damaged file is found
even where the storage format would not notice.

The state is the same on every device, so process 0 alone writes it, cleans up and sets damaged checkpoints aside, as a
run of one process would: nothing in a checkpoint tells how many processes or devices wrote it, and no barrier stands
between a write and its end. Every process reads for itself. What became of each write and of each reading is agreed on
before any process goes on (`agreement.py`).
"""

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ecg_jax.errors import UserError
from ecg_jax.training.agreement import answers, on_first
from ecg_jax.training.checkpoint_tree import (
    checksums,
    describe_mismatch,
    flat_shapes,
    place,
    to_host,
    words_of,
)
from ecg_jax.training.read_faults import first_line, first_not_readable, not_readable

CHECKPOINTS = "checkpoints"
#: Seconds after which a write that has not ended counts as failed.
WRITE_TIMEOUT_S = 1200
#: Seconds in which a checkpoint that not all processes find damaged is read again.
RETRY_S = 60.0
#: The last file of a checkpoint to be written.
_FINISHED = "_CHECKPOINT_METADATA"
_SAVED_FIELDS = ("step", "params", "opt_state", "batch_stats", "ssm", "objective_state", "teacher", "rng")


def _saved(state) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _SAVED_FIELDS}


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax by this process alone: no barrier with the others."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, asking JAX nothing about preemptions: it would name old steps, from its own thread, where JAX
    counts on steps that only rise, and the processes could then stop at different ones.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, newest and best kept, written in the background.

    All processes of the run make one and call its methods at the same steps.

    Attributes:
        last_save_seconds: how long the last `save` held the loop up; None before the first.
    """

    def __init__(self, workdir: Path, *, keep_latest: int, keep_best: int, meta: dict[str, Any]):
        """Opens or creates `workdir/checkpoints`; what a killed run left half-written there is deleted.

        Args:
            workdir: the run's folder, on a file system that all processes see.
            keep_latest, keep_best: how many of the newest, and of those with the lowest validation loss, to
                keep.
            meta: JSON-able: `config`, `preprocessing`, `store_fingerprint`; stored with every checkpoint.

        Raises:
            UserError: the folder cannot be made, or a file in it cannot be read.
        """
        self._workdir = workdir
        self._meta = meta | {
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "ecg-jax")}
        }
        self.last_save_seconds: float | None = None
        self._unread: dict[str, float] = {}
        self._manager: _Manager | None = None  # of process 0
        on_first("opening the checkpoints", lambda: self._open(keep_latest, keep_best))

    def _open(self, keep_latest: int, keep_best: int) -> None:
        policies = [LatestN(keep_latest)]
        if keep_best:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics["val_loss"],
                    reverse=True,  # ascending is kept last: the lowest loss
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        folder = self._folder.absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}") from error
        self._set_aside_without_metrics()
        self._manager = _Manager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics["val_loss"],
                best_mode="min",
                create=False,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=WRITE_TIMEOUT_S),
                multiprocessing_options=_alone(),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()),
                "meta": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
            },
        )

    def _set_aside_without_metrics(self) -> None:
        """Orbax reads the metrics of all checkpoints as it opens them, and would stop at damaged ones."""
        for step in finished_steps(self._workdir):
            path = self._path(step) / "metrics" / "metrics"
            try:
                if path.exists():
                    float(json.loads(path.read_bytes())["val_loss"])
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read: {error.strerror}; mend the disk and run the same command again"
                ) from error
            except (ValueError, TypeError, KeyError) as error:
                self._set_aside(step, f"its metrics cannot be read: {first_line(error)}")

    @property
    def _folder(self) -> Path:
        return self._workdir / CHECKPOINTS

    def save(self, state, *, val_loss: float | None) -> None:
        """Starts writing `state`; returns once the arrays are copied.

        Raises:
            UserError: this or an earlier write failed; on every process.
            NoAnswer: process 0 did not say how it went.
        """
        begin, step = time.perf_counter(), int(state.step)
        on_first(f"saving step {step}", lambda: self._start_write(step, state, val_loss))
        self.last_save_seconds = time.perf_counter() - begin
        kib = 1024 if sys.platform == "darwin" else 1  # macOS counts in bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 2**20
        self._unread = {"save_seconds": self.last_save_seconds, "peak_memory_gib": memory}

    def read(self) -> dict[str, float]:
        """Once after each `save`: `save_seconds`, and `peak_memory_gib`, the most memory of this process by then."""
        unread, self._unread = self._unread, {}
        return unread

    def _start_write(self, step: int, state, val_loss: float | None) -> None:
        tree = to_host(_saved(state))
        with self._write_errors():
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    meta=ocp.args.JsonSave(self._meta | {"checksums": checksums(tree)}),
                ),
                metrics=None if val_loss is None else {"val_loss": val_loss},
                force=True,
            )

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Failed writes surface as many types (the system's, tensorstore's, Orbax's); all become one
        sentence.
        """
        try:
            yield
        except Exception as error:
            complete = finished_steps(self._workdir)
            kept = (
                f"the last complete one is step {complete[-1]}"
                if complete
                else "there is no complete one yet"
            )
            raise UserError(
                f"a checkpoint could not be written to {self._folder}; {kept}. Free some space or mend "
                f"the folder, and run the same command again ({first_line(error)})"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asked all processes to stop (needs `jax.distributed`)."""
        return jax.process_count() > 1 and ocp.multihost.reached_preemption(step)

    def restore_latest(self, state, sharding: jax.sharding.Sharding) -> Any | None:
        """The newest readable state, or None when the run has no checkpoint yet.

        A damaged checkpoint is moved to `workdir/damaged_checkpoints`, said on stderr, and the one before is
        used. It is damaged where every process finds it so: files are missing, cannot be parsed, or do not match their
        checksums. What the system cannot read is left where it is. All processes return the same step.

        Args:
            state: a freshly made state; gives tree, shapes and `basis`.
            sharding: where to place the restored arrays.

        Raises:
            UserError: a checkpoint has other parameters than the config makes, or belongs to another store; all are
                damaged; or some process cannot read one, for about a minute, that is not damaged. On every process.
            NoAnswer: a process did not say whether it could read a checkpoint.
        """
        fresh = _saved(state)
        steps = on_first("the list of checkpoints", lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            tree, damage = self._read_together(step, words_of(fresh))
            if tree is not None:
                return state.replace(**place(tree, fresh, sharding))
            on_first(
                f"setting checkpoint {step} aside", lambda step=step, why=damage: self._set_aside(step, why)
            )
        if steps:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged; they are now under "
                f"{self._workdir / 'damaged_checkpoints'}. Start again to train from step 0, or use another --workdir"
            )
        return None

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self._workdir / "damaged_checkpoints" / str(step)
        aside.parent.mkdir(exist_ok=True)
        while aside.exists():
            aside = aside.with_name(aside.name + "x")
        self._path(step).rename(aside)
        if self._manager is not None:
            self._manager.reload()
        print(
            f"warning: checkpoint {step} is damaged ({reason}); moved it to {aside} and going back to the one before",
            file=sys.stderr,
        )

    def _read_together(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The arrays of a checkpoint, or None and why it is damaged; the same on every process.

        Raises:
            UserError: a process refuses it, or cannot read what is not damaged.
        """
        deadline = time.monotonic() + RETRY_S
        while True:
            tree, outcome = self._try_to_read(step, wanted)
            outcomes = answers(f"reading checkpoint {step}", outcome)
            kinds = [kind for kind, _ in outcomes]
            if "refused" in kinds:
                raise UserError(outcomes[kinds.index("refused")][1])
            if set(kinds) == {"read"} or set(kinds) == {"damaged"}:
                return tree, outcomes[0][1]
            # Over a network a file may be seen late on another host, and a server may not answer for a while.
            if not on_first("reading it again", lambda: time.monotonic() < deadline):
                break
            time.sleep(1.0)
        unread = next(process for process, kind in enumerate(kinds) if kind != "read")
        sentence = f"process {unread} cannot read checkpoint {self._path(step)} ({outcomes[unread][1]})"
        if "read" in kinds:
            sentence += (
                f", and process {kinds.index('read')} can; put the run's folder where every host sees it"
            )
        raise UserError(f"{sentence}; nothing was moved; run the same command again when it can be read")

    def _try_to_read(
        self, step: int, wanted: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, tuple[str, str]]:
        """The arrays of a checkpoint, or None, and how it went: ("read", "refused", "damaged" or "unreadable", why)."""
        for _ in range(2):  # what fails once may be no damage
            try:
                return self._read(step, wanted), ("read", "")
            except UserError as error:
                return None, ("refused", str(error))
            except MemoryError as error:
                return None, ("unreadable", first_line(error))
            # Damage surfaces as many types: tensorstore's, JSON's, the system's, our own checksum's.
            except Exception as error:
                why = first_line(error)
                if reason := not_readable(error) or first_not_readable(self._path(step)):
                    return None, ("unreadable", reason)
        return None, ("damaged", why)

    def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        path = self._path(step)
        if step not in _finished_steps(self._workdir):
            raise OSError(f"its {_FINISHED} is missing")
        if mismatch := describe_mismatch(stored_shapes(path), flat_shapes(wanted)):
            raise UserError(f"checkpoint {path} does not fit the config: {mismatch}")
        meta = read_meta(path)
        if meta["store_fingerprint"] != self._meta["store_fingerprint"]:
            raise UserError(
                f"{self._workdir} was trained on another store (its content differs from "
                f"{self._meta['config']['store']}); give the store it began with, or choose another --workdir"
            )
        tree = read_arrays(path, wanted)
        if checksums(tree) != meta["checksums"]:
            raise OSError("the checksums of its arrays do not match")
        return tree

    def finish(self) -> None:
        """Waits for the write in progress, so that every process knows how it ended.

        Raises:
            UserError: that write failed; on every process.
            NoAnswer: process 0 did not say how it went.
        """
        on_first("the end of the last write", self._end_write)

    def _end_write(self) -> None:
        with self._write_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the write in progress, if it is this process's, and closes. Asks no other process, so that one that
        leaves because of an error can call it.

        Raises:
            UserError: that write failed.
        """
        if self._manager is not None:
            self._end_write()
            self._manager.close()


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in the checkpoint at `path`."""
    # Orbax warns that an item has no metadata of a whole checkpoint; it need not.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with _reader(ocp.PyTreeCheckpointHandler) as reader:
            metadata = reader.metadata((path / "state").absolute()).item_metadata
    finally:
        absl.setLevel(level)
    if metadata is None:
        raise OSError("the list of its arrays cannot be read")
    return flat_shapes(metadata.tree)


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of the checkpoint at `path`."""
    with _reader(ocp.JsonCheckpointHandler) as reader:
        return reader.restore((path / "meta").absolute())


def read_arrays(path: Path, wanted: Any) -> Any:
    """Arrays of the checkpoint at `path`, on the host.

    Args:
        wanted: tree of shapes and types, all of the checkpoint's or a part; random keys as their words.

    Returns:
        The same tree of numpy arrays.
    """
    restore_args = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), wanted
    )
    with _reader(ocp.PyTreeCheckpointHandler) as reader:
        return reader.restore(
            (path / "state").absolute(),
            args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True),
        )


def _reader(handler: type) -> ocp.Checkpointer:
    return ocp.Checkpointer(handler(multiprocessing_options=_alone()), multiprocessing_options=_alone())


def resolve_checkpoint(checkpoint: str | Path, step: int | None = None) -> tuple[Path, int]:
    """`RUN`, `RUN/STEP` or `RUN/checkpoints/STEP` -> (run folder, step); without a step the latest.

    Raises:
        UserError: no run there, or it has no such checkpoint.
    """
    path = Path(checkpoint)
    if step is None and path.name.isdigit() and not (path / CHECKPOINTS).is_dir():
        path, step = path.parent, int(path.name)
        if path.name == CHECKPOINTS:
            path = path.parent
    if not (path / CHECKPOINTS).is_dir():
        of_sweep = path / "run"
        hint = f"; that of the sweep's run is {of_sweep}" if (of_sweep / CHECKPOINTS).is_dir() else ""
        raise UserError(
            f"checkpoint {checkpoint}: there is no run at {path} (its folder would hold `{CHECKPOINTS}/`){hint}"
        )
    steps = finished_steps(path)
    if not steps:
        raise UserError(f"checkpoint {checkpoint}: the run has no finished checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"checkpoint {checkpoint}: the run has no checkpoint at step {step}; it has {steps}")
    return path, steps[-1] if step is None else step


def finished_steps(run: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending; [] when there is none.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return _finished_steps(run)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or run / CHECKPOINTS}: {error.strerror}") from error


def _finished_steps(run: Path) -> list[int]:
    try:
        folders = list((run / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(p.name) for p in folders if p.name.isdigit() and (p / _FINISHED).exists())
