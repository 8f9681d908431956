"""Checkpoints of a run: writing, exact resume, and restoring only the encoder. The one file that imports
Orbax.

A checkpoint `RUN/checkpoints/STEP` holds two items. `state` is the tree of arrays (params, batch_stats, ssm,
objective state, teacher, optimiser moments, step, key). `meta` is JSON: the run's config, its preprocessing
contract, the fingerprint of its store, versions, and a CRC-32 of each array, so that a damaged file is found
even where the storage format would not notice.
"""

import contextlib
import dataclasses
import logging
import sys
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError

CHECKPOINTS = "checkpoints"
_SAVED_FIELDS = ("step", "params", "opt_state", "batch_stats", "ssm", "objective_state", "teacher", "rng")


def _saved(state) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _SAVED_FIELDS}


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Leaves of a tree as "a/b/c" -> shape; key arrays as their underlying words."""
    flat = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        flat["/".join(_key_name(key) for key in path)] = tuple(leaf.shape)
    return flat


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys (leaves of stored metadata never are)."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _key_name(key: Any) -> str:
    """The bare name of a pytree key: of a dict entry, an attribute, or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unexpected pytree key {key!r}")


def describe_mismatch(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], limit: int = 8
) -> str | None:
    """One sentence that lists missing, extra and differently shaped parameters; None when the two agree."""

    def listed(names):
        names = sorted(names, key=lambda name: (not name.startswith("params/"), name))
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        return ", ".join(names[:limit]) + more

    parts = []
    if missing := wanted.keys() - stored.keys():
        parts.append(f"missing {listed(missing)}")
    if extra := stored.keys() - wanted.keys():
        parts.append(f"extra {listed(extra)}")
    if different := [name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]]:
        parts.append(
            "shaped differently "
            + listed(f"{name} (stored {stored[name]}, expected {wanted[name]})" for name in different)
        )
    return "; ".join(parts) or None


def _checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of every leaf, by path. Leaves are replicated, so this process's copy stands for all."""

    def crc(leaf):
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        return zlib.crc32(np.ascontiguousarray(leaf.addressable_data(0)))

    leaves = jax.tree.flatten_with_path(tree)[0]
    return {"/".join(_key_name(key) for key in path): crc(leaf) for path, leaf in leaves}


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class Checkpoints:
    """The checkpoints of one run, newest and best kept, written in the background."""

    def __init__(self, workdir: Path, *, keep_latest: int, keep_best: int, meta: dict[str, Any]):
        """Opens or creates `workdir/checkpoints`.

        Args:
            workdir: the run's folder.
            keep_latest, keep_best: how many of the newest, and of those with the lowest validation loss, to
                keep.
            meta: JSON-able: `config`, `preprocessing`, `store_fingerprint`; stored with every checkpoint.
        """
        self._workdir = workdir
        self._meta = meta | {
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "ecg-jax")}
        }
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
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics["val_loss"],
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def save(self, state, *, val_loss: float | None) -> None:
        """Starts writing `state`; returns once the arrays are copied.

        Raises:
            UserError: this or an earlier write failed.
        """
        tree = _saved(state)
        with self._write_errors():
            self._manager.check_for_errors()
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    meta=ocp.args.JsonSave(self._meta | {"checksums": _checksums(tree)}),
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
                f"a checkpoint could not be written to {self._workdir / CHECKPOINTS}; {kept}. Free some space or mend "
                f"the folder, and run the same command again ({_first_line(error)})"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None when there is none."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asked all processes to stop (needs `jax.distributed`)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def restore_latest(self, state, sharding) -> Any | None:
        """The newest readable state, or None when the run has no checkpoint yet.

        A damaged checkpoint is moved to `workdir/damaged_checkpoints`, said on stderr, and the one before is
        used.

        Args:
            state: a freshly made state; gives tree, shapes and `basis`.
            sharding: where to place the restored arrays.

        Raises:
            UserError: a checkpoint has other parameters than the config makes, or all are damaged.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), _saved(state)
        )
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return state.replace(**self._restore(step, abstract))
            except UserError:
                raise
            # Damage surfaces as many types: tensorstore's, JSON's, the system's, our own checksum's.
            except Exception as error:
                if jax.process_count() > 1:
                    raise UserError(
                        f"checkpoint {self._path(step)} cannot be read ({_first_line(error)}); move it away to "
                        "resume from the one before"
                    ) from error
                aside = self._set_aside(step)
                print(
                    f"warning: checkpoint {step} is damaged ({_first_line(error)}); moved it to {aside} and going back "
                    "to the one before",
                    file=sys.stderr,
                )
        if steps:
            raise UserError(
                f"every checkpoint in {self._workdir / CHECKPOINTS} is damaged; they are now under "
                f"{self._workdir / 'damaged_checkpoints'}. Start again to train from step 0, or use another --workdir"
            )
        return None

    def _path(self, step: int) -> Path:
        return self._workdir / CHECKPOINTS / str(step)

    def _set_aside(self, step: int) -> Path:
        aside = self._workdir / "damaged_checkpoints" / str(step)
        aside.parent.mkdir(exist_ok=True)
        while aside.exists():
            aside = aside.with_name(aside.name + "x")
        self._path(step).rename(aside)
        self._manager.reload()
        return aside

    def _restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        path = self._path(step)
        if mismatch := describe_mismatch(_stored_shapes(path), flat_shapes(abstract)):
            raise UserError(f"checkpoint {path} does not fit the config: {mismatch}")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                ),
                meta=ocp.args.JsonRestore(),
            ),
        )
        if restored["meta"]["store_fingerprint"] != self._meta["store_fingerprint"]:
            raise UserError(
                f"{self._workdir} was trained on another store (its content differs from "
                f"{self._meta['config']['store']}); give the store it began with, or choose another --workdir"
            )
        if _checksums(restored["state"]) != restored["meta"]["checksums"]:
            raise OSError("the checksums of its arrays do not match")
        return restored["state"]

    def close(self) -> None:
        """Waits for the write in progress and closes.

        Raises:
            UserError: that write failed.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    # Orbax warns that an item has no metadata of a whole checkpoint; it need not.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return flat_shapes(checkpointer.metadata((path / "state").absolute()).item_metadata.tree)
    finally:
        absl.setLevel(level)


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
        raise UserError(
            f"checkpoint {checkpoint}: there is no run at {path} (its folder would hold `{CHECKPOINTS}/`)"
        )
    steps = finished_steps(path)
    if not steps:
        raise UserError(f"checkpoint {checkpoint}: the run has no finished checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"checkpoint {checkpoint}: the run has no checkpoint at step {step}; it has {steps}")
    return path, steps[-1] if step is None else step


def finished_steps(run: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending; [] when there is none."""
    if not (run / CHECKPOINTS).is_dir():
        return []
    folders = (run / CHECKPOINTS).iterdir()
    return sorted(int(p.name) for p in folders if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists())


@dataclasses.dataclass(frozen=True)
class StoredEncoder:
    """The encoder's part of a checkpoint.

    Attributes:
        run, step: where it comes from.
        config: of the pretraining run, nested plain dict.
        preprocessing: the contract, with `window_s` and `normalisation` of the run.
        variables: `params`, `batch_stats` and, unless they were trained, `ssm` of the encoder; numpy arrays.
        store_fingerprint: of the store it was pretrained on, None if it was imported.
    """

    run: Path
    step: int
    config: dict[str, Any]
    preprocessing: Preprocessing
    variables: dict[str, Any]
    store_fingerprint: str | None


def read_encoder(run: Path, step: int, abstract_encoder) -> StoredEncoder:
    """Reads config, contract and the encoder's arrays of a checkpoint, and nothing else.

    Args:
        run, step: from `resolve_checkpoint`.
        abstract_encoder: (config, contract) -> variables of the encoder (`params`, `batch_stats`, maybe
            `ssm`) as shapes.

    Raises:
        UserError: missing, extra or differently shaped parameters, or a damaged checkpoint.
    """
    path = run / CHECKPOINTS / str(step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            meta = checkpointer.restore((path / "meta").absolute())
        stored = _stored_shapes(path)
        preprocessing = Preprocessing.from_dict(meta["preprocessing"])
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged ({_first_line(error)}); choose another step of the run"
        ) from error
    wanted = {
        collection: {"encoder": tree}
        for collection, tree in abstract_encoder(meta["config"], preprocessing).items()
        if tree
    }
    shapes = flat_shapes(wanted)
    prefixes = ("params/encoder/", "batch_stats/encoder/", "ssm/encoder/")
    of_encoder = {name: shape for name, shape in stored.items() if name.startswith(prefixes)}
    if mismatch := describe_mismatch(of_encoder, shapes):
        raise UserError(f"checkpoint {path} does not hold the encoder its config describes: {mismatch}")
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(
                (path / "state").absolute(),
                args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True),
            )
        for key_path, leaf in jax.tree.flatten_with_path(tree)[0]:
            name = "/".join(_key_name(key) for key in key_path)
            if zlib.crc32(np.ascontiguousarray(leaf)) != meta["checksums"][name]:
                raise OSError(f"the checksum of {name} does not match")
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged ({_first_line(error)}); choose another step of the run"
        ) from error
    return StoredEncoder(
        run=run,
        step=step,
        config=meta["config"],
        preprocessing=preprocessing,
        variables={collection: subtree["encoder"] for collection, subtree in tree.items()},
        store_fingerprint=meta["store_fingerprint"],
    )
